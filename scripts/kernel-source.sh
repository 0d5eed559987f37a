#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Fetch Debian's linux-source-VERSION (from backports) and unpack it once.
#
#   scripts/kernel-source.sh VERSION     prints the path of the pristine tree
#
# To be run with the tool set (scripts/toolchain.sh run): it needs apt of Debian 13.
set -euo pipefail

ver=${1:?usage: scripts/kernel-source.sh VERSION}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/zdmirror
package=linux-source-$ver

say() { printf 'kernel-source: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

mkdir -p "$cache/src" "$cache/apt/lists/partial" "$cache/apt/archives/partial"
exec 9>"$cache/src.lock"
flock 9

newest=$cache/src/$package.path
if [ -r "$newest" ] && [ -e "$(cat "$newest")/.complete" ]; then
	cat "$newest"
	exit 0
fi

# Backports is the same archive under another suite; the line of the sysroot (or of this
# machine, where it is Debian 13) says where the archive is. A private apt state, so that
# an ordinary user can do this and nothing of the machine's own apt changes.
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
	die "cannot download $package: is it still in trixie-backports?"
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
