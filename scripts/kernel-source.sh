#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Fetch Debian's linux-source-VERSION (from backports) and unpack it once.
#
#   scripts/kernel-source.sh VERSION     prints the path of the pristine tree
#
# ZDM_SOURCE names a source tree, or a tarball of one, to use instead; it must have that version. A tree is
# copied, and an edited one is copied again, because the name of the copy is part of the key of each
# kernel that zdvm builds: no kernel of an older state is taken for this one.
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

# The names, sizes and times of all files of a tree, as a key. What git keeps for itself does not count.
state_of() {
	(cd "$1" && find . -path ./.git -prune -o ! -type d -printf '%P %s %T@ %l\n' | LC_ALL=C sort) |
		sha256sum | cut -c1-12
}

# keep TREE COMMAND: makes TREE, unless it is there, by the command, which gets a directory to fill.
keep() {
	local tree=$1
	shift
	[ ! -e "$tree/.complete" ] || return 0
	work=$(mktemp -d "$cache/src/tmp.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	"$@" "$work" || die "cannot read $ZDM_SOURCE"
	touch "$work/.complete"
	rm -rf "$tree"
	mv "$work" "$tree"
	chmod 755 "$tree"
}

unpack() {
	say "unpacking $ZDM_SOURCE"
	tar -xf "$ZDM_SOURCE" -C "$1" --strip-components=1
}

copy() {
	say "copying $ZDM_SOURCE"
	find "$ZDM_SOURCE" -mindepth 1 -maxdepth 1 ! -name .git -exec cp -a --reflink=auto -t "$1" {} +
}

if [ -n "${ZDM_SOURCE:-}" ]; then
	[ -e "$ZDM_SOURCE" ] || die "ZDM_SOURCE=$ZDM_SOURCE: no such file or directory"
	if [ -f "$ZDM_SOURCE" ]; then
		tree=$cache/src/linux-$ver-$(sha256sum <"$ZDM_SOURCE" | cut -c1-12)
		keep "$tree" unpack
	else
		tree=$ZDM_SOURCE
	fi
	[ -r "$tree/Makefile" ] || die "$ZDM_SOURCE holds no kernel tree"
	if [ -e "$tree/.config" ] || [ -d "$tree/include/config" ]; then
		die "$ZDM_SOURCE is configured or built in place: a source as it was unpacked is wanted"
	fi
	found=$(version_of "$tree")
	[ "$found" = "$ver" ] || die "$ZDM_SOURCE is Linux $found; the kernels that are asked for are Linux $ver"
	if [ -d "$ZDM_SOURCE" ]; then
		place=$(readlink -f "$ZDM_SOURCE" | sha256sum | cut -c1-6)
		tree=$cache/src/linux-$ver-$place-$(state_of "$ZDM_SOURCE")
		keep "$tree" copy
		touch "$tree/.complete"
		# Copies of older states: one that was used lately may be in use now.
		for old in "$cache/src/linux-$ver-$place"-*; do
			[ "$old" = "$tree" ] || [ -z "$(find "$old/.complete" -mmin +720 2>/dev/null)" ] || rm -rf "$old"
		done
	fi
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
command -v apt-get >/dev/null ||
	die "no apt-get here: name a tree or a tarball of Linux $ver (make SOURCE=..., or ZDM_SOURCE= for ./zdvm)"
site=$(apt-get indextargets --format '$(SITE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
	awk '$2 == "Debian" && $1 !~ /security/ { print $1; exit }')
[ -n "$site" ] || [ ! -r /etc/apt/sources.list ] ||
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
	die "cannot download $package: if it has left trixie-backports, name a tree or a tarball of Linux $ver (make SOURCE=..., or ZDM_SOURCE= for ./zdvm)"
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
