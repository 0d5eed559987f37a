#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Fetch Debian's linux-source-VERSION (from backports) and unpack it once.
#
#   scripts/kernel-source.sh VERSION     prints the path of the pristine tree
#
# ZDM_SOURCE names a source tree, or a tarball of one, to use instead; it must have that version.
#
# Run it with the tool set (scripts/toolchain.sh run): it needs the apt of Debian 13.
set -euo pipefail

ver=${1:?usage: scripts/kernel-source.sh VERSION}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/zdmirror
package=linux-source-$ver

say() { printf 'kernel-source: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

mkdir -p "$cache/src" "$cache/apt/lists/partial" "$cache/apt/archives/partial"
exec 9>"$cache/src.lock"
flock 9

# VERSION.PATCHLEVEL of a tree.
version_of() {
	awk -F ' *= *' '$1 == "VERSION" { v = $2 } $1 == "PATCHLEVEL" { print v "." $2; exit }' "$1/Makefile"
}

if [ -n "${ZDM_SOURCE:-}" ]; then
	tree=$ZDM_SOURCE
	if [ -f "$tree" ]; then
		tree=$cache/src/linux-$ver-$(sha256sum <"$ZDM_SOURCE" | cut -c1-12)
		if [ ! -e "$tree/.complete" ]; then
			say "unpacking $ZDM_SOURCE"
			work=$(mktemp -d "$cache/src/tmp.XXXXXX")
			trap 'rm -rf "$work"' EXIT
			tar -xf "$ZDM_SOURCE" -C "$work" --strip-components=1 || die "cannot unpack $ZDM_SOURCE"
			touch "$work/.complete"
			rm -rf "$tree"
			mv "$work" "$tree"
			chmod 755 "$tree"
		fi
	fi
	[ -r "$tree/Makefile" ] || die "$ZDM_SOURCE holds no kernel tree"
	[ ! -e "$tree/.config" ] || die "$ZDM_SOURCE is configured in place: a source as it was unpacked is wanted"
	found=$(version_of "$tree")
	[ "$found" = "$ver" ] || die "$ZDM_SOURCE is Linux $found; the kernels that are asked for are Linux $ver"
	echo "$tree"
	exit 0
fi

newest=$cache/src/$package.path
if [ -r "$newest" ] && [ -e "$(cat "$newest")/.complete" ]; then
	cat "$newest"
	exit 0
fi

# Backports is another suite of the same archive. The apt configuration of the sysroot (or of this
# machine, if it is Debian 13) has the archive's address. A private apt state lets an ordinary user do
# this, and leaves the machine's own apt unchanged.
site=$(apt-get indextargets --format '$(SITE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
	awk '$2 == "Debian" && $1 !~ /security/ { print $1; exit }')
[ -n "$site" ] ||
	site=$(awk '$1 == "deb" { for (i = 2; i <= NF; i++) if ($i ~ /:\/\// && $i !~ /security/) { print $i; exit } }' \
		/etc/apt/sources.list)
[ -n "$site" ] || die "no Debian mirror known to apt"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site trixie-backports main" \
	>"$cache/apt/sources.list"
apt=(apt-get -q -o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
	-o "Dir::State::lists=$cache/apt/lists" -o "Dir::Cache=$cache/apt" -o Dir::State::status=/dev/null
	-o APT::Sandbox::User= -o Acquire::Retries=3 -o Acquire::Languages=none)
say "looking for $package in trixie-backports"
"${apt[@]}" update >&2 || die "apt-get update failed, see above"
work=$(mktemp -d "$cache/src/tmp.XXXXXX")
trap 'rm -rf "$work"' EXIT
(cd "$work" && "${apt[@]}" download "$package" >&2) ||
	die "cannot download $package: if it has left trixie-backports, name a tree or a tarball of Linux $ver (make SOURCE=...)"
deb=$(echo "$work"/*.deb)
debver=$(dpkg-deb -f "$deb" Version)
tree=$cache/src/linux-$ver-$debver
if [ ! -e "$tree/.complete" ]; then
	say "unpacking $package $debver (about 1.6 GB, under a minute)"
	dpkg-deb -x "$deb" "$work/deb"
	mkdir "$work/tree"
	tar -xJf "$work/deb/usr/src/$package.tar.xz" -C "$work/tree" --strip-components=1
	[ -r "$work/tree/Makefile" ] || die "$package holds no kernel tree"
	touch "$work/tree/.complete"
	rm -rf "$tree"
	mv "$work/tree" "$tree"
fi
echo "$tree" >"$newest"
echo "$tree"
