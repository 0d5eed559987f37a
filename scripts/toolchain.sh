#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Run a command with the tool set of Debian 13, which Linux 7.3 requires.
#
#   scripts/toolchain.sh run CMD [ARG...]   run CMD with that tool set
#   scripts/toolchain.sh get                prepare the tool set; silent if it is there
#   scripts/toolchain.sh check              the same, and print where it comes from
#   scripts/toolchain.sh cross TRIPLET      prepare gcc for another architecture, too
#   scripts/toolchain.sh sphinx             prepare Sphinx, too
#   scripts/toolchain.sh chromium           prepare a browser without a window, too
#   scripts/toolchain.sh strace             prepare strace, too
#   scripts/toolchain.sh packages           print the package list
#   scripts/toolchain.sh native             succeed if this machine's own tools are used
#   scripts/toolchain.sh where              print "native" or the sysroot's directory; make nothing
#
# On Debian 13 with the packages installed CMD runs directly. On another system with mmdebstrap and
# bubblewrap (on Debian, root gets them installed) CMD runs in a sysroot below
# ${XDG_CACHE_HOME:-~/.cache}/zdmirror, which has the caller's files under their own names.
# ZDM_TOOLCHAIN=native|sysroot overrides the choice: native uses the caller's PATH, and then rustup's
# programs in ~/.cargo/bin.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/zdmirror
suite=trixie
packages="make gcc libc6-dev libc6-dbg flex bison bc libelf-dev libssl-dev libnuma-dev libcap-dev
liburing-dev rustc cargo rust-src rustfmt rust-clippy bindgen clang lld llvm libclang-dev cpio kmod xz-utils
zstd python3 ccache busybox-static qemu-system-x86 seabios perl rsync git pahole e2fsprogs xfsprogs
ca-certificates binutils gawk file gdb patch diffstat pkgconf"

say() { printf 'toolchain: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

native_ok() {
	[ -r /etc/os-release ] || return 1
	# shellcheck disable=SC1091
	[ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = "$suite" ] || return 1
	# shellcheck disable=SC2086
	dpkg-query -W -f '${db:Status-Status}\n' $packages 2>/dev/null |
		awk '$1 != "installed" { bad = 1 } END { exit bad || NR == 0 }' || return 1
	# dpkg-query leaves out unknown packages, and its status reports that.
	# shellcheck disable=SC2086
	dpkg-query -W $packages >/dev/null 2>&1
}

# The mirror in the machine's own apt configuration, so that a local mirror is used.
mirror() {
	apt-get indextargets --format '$(SITE) $(ORIGIN)' 'Created-By: Packages' 2>/dev/null |
		awk '$2 == "Debian" && $1 !~ /security/ { print $1; found = 1; exit }
			END { if (!found && others) print "http://deb.debian.org/debian" }' \
			others="$([ -r /usr/share/keyrings/debian-archive-keyring.gpg ] && ! grep -q '^ID=debian' /etc/os-release && echo 1)"
}

need_tools() {
	local missing=() t
	for t in mmdebstrap bwrap; do
		command -v "$t" >/dev/null || missing+=("${t/bwrap/bubblewrap}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
		say "installing ${missing[*]}"
		apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 ||
			die "cannot install ${missing[*]}: see apt's message above"
	else
		die "missing ${missing[*]}; ./zdvm doctor says what to run on this machine"
	fi
}

# A sysroot's name has a key of its contents; an unfinished one never gets the name.
sysroot_dir() {
	printf '%s/sysroot-%s-%s' "$cache" "$suite" \
		"$(printf '%s' "$packages" | tr -s ' \n' ' ' | sha256sum | cut -c1-12)"
}

make_sysroot() {
	local dir=$1 tmp site log
	need_tools
	mkdir -p "$cache"
	exec 9>"$cache/sysroot.lock"
	flock 9
	[ -e "$dir/.complete" ] && return 0
	site=$(mirror)
	[ -n "$site" ] || die "no Debian mirror in the apt configuration; run: apt-get update"
	tmp=$(mktemp -d "$cache/sysroot.XXXXXX")
	log=$cache/sysroot.log
	say "making a $suite sysroot (about 2.5 GB, one to three minutes); log: $log"
	# Unpacked without ownership, the tarball works for root and for ordinary users.
	if ! mmdebstrap --variant=minbase --format=tar --aptopt='Acquire::Retries "3"' \
		--include="$(echo $packages | tr ' ' ,)" "$suite" - "$site" 2>"$log" |
		tar -x -C "$tmp" --no-same-owner --exclude='./dev/*'; then
		tail -n 20 "$log" >&2
		rm -rf "$tmp"
		die "mmdebstrap failed; the whole log is $log"
	fi
	# Add the machine's own certificates: a proxy may have its own authority.
	[ ! -r /etc/ssl/certs/ca-certificates.crt ] ||
		cp -L /etc/ssl/certs/ca-certificates.crt "$tmp/etc/ssl/certs/ca-certificates.crt"
	touch "$tmp/.complete"
	rm -rf "$dir"
	mv "$tmp" "$dir"
	chmod 755 "$dir"
	say "sysroot ready: $dir"
	flock -u 9
}

# Sets root to the directory of the sysroot, made or not, or to nothing for the machine's own tools.
choose() {
	root=
	case ${ZDM_TOOLCHAIN:-auto} in
	native) return ;;
	auto) if native_ok; then return; fi ;;
	sysroot) ;;
	*) die "ZDM_TOOLCHAIN must be native or sysroot, not '$ZDM_TOOLCHAIN'" ;;
	esac
	root=$(sysroot_dir)
}

ensure() {
	choose
	[ -n "$root" ] || return 0
	[ -e "$root/.complete" ] || make_sysroot "$root"
	command -v bwrap >/dev/null || need_tools
}

run() {
	export CARGO_HOME=${ZDM_CARGO_HOME:-$cache/cargo} CCACHE_DIR=${CCACHE_DIR:-$cache/ccache}
	if [ "${ZDM_TOOLCHAIN:-auto}" = native ]; then
		# The caller has chosen these tools: put no others before them.
		export PATH=$PATH:${HOME:-/root}/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin
	else
		export PATH=/usr/lib/ccache:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
		# Debian's cargo must not see rustup's settings on the host.
		unset RUSTUP_HOME RUSTUP_TOOLCHAIN RUSTC_WRAPPER
	fi
	export RUSTC_BOOTSTRAP=
	unset RUSTC_BOOTSTRAP
	if [ -z "$root" ]; then
		exec "$@"
	fi
	mkdir -p "$CARGO_HOME" "$CCACHE_DIR"
	local args=(--bind "$root" / --dev-bind /dev /dev --proc /proc --tmpfs /run) d
	# Every top directory that the sysroot does not have keeps its name: home, work, tmp, ...
	for d in /*; do
		[ -d "$d" ] && [ ! -L "$d" ] || continue
		case $d in
		/bin | /boot | /dev | /etc | /lib* | /proc | /run | /sbin | /usr | /var) ;;
		*) args+=(--bind "$d" "$d") ;;
		esac
	done
	for d in /etc/resolv.conf /etc/hosts /etc/passwd /etc/group; do
		[ -r "$d" ] && args+=(--ro-bind "$(readlink -f "$d")" "$d")
	done
	exec bwrap "${args[@]}" --die-with-parent --chdir "$PWD" -- "$@"
}

# Few users need a cross compiler, Sphinx, a browser or strace, and the sysroot's key has its packages. Such a package is
# therefore unpacked into the sysroot on demand, without its package database. Unpacking a package twice
# does no harm.
#
# extra NAME PACKAGES CHECK...: NAME is the mark in the sysroot; CHECK is a command that succeeds once
# the packages are installed.
extra() {
	local name=$1 package=$2 tmp
	shift 2
	ensure
	if [ -z "$root" ]; then
		"$@" >/dev/null 2>&1 && return
		die "missing $package; run: sudo apt-get install -y --no-install-recommends $package"
	fi
	[ -e "$root/.$name" ] && return
	exec 9>"$cache/sysroot.lock"
	flock 9
	[ -e "$root/.$name" ] && return
	tmp=$(mktemp -d "$cache/extra.XXXXXX")
	trap "rm -rf '$tmp'" EXIT
	mkdir -p "$tmp/lists/partial" "$tmp/archives/partial"
	say "adding $package to the sysroot"
	# shellcheck disable=SC2016
	(run bash -euc '
		tmp=$1 package=$2
		shift 2
		apt=(apt-get -q -o "Dir::State::lists=$tmp/lists" -o "Dir::Cache=$tmp"
			-o APT::Sandbox::User= -o Acquire::Retries=3 -o Acquire::Languages=none
			-o Debug::NoLocking=1)
		"${apt[@]}" update
		"${apt[@]}" install -y --download-only --no-install-recommends $package
		for deb in "$tmp"/archives/*.deb; do dpkg-deb -x "$deb" /; done
		"$@"' bash "$tmp" "$package" "$@") >"$cache/extra.log" 2>&1 || {
		tail -n 20 "$cache/extra.log" >&2
		die "cannot add $package; the whole log is $cache/extra.log"
	}
	touch "$root/.$name"
}

case ${1:-} in
run)
	shift
	[ $# -gt 0 ] || die "run: no command given"
	ensure
	run "$@"
	;;
get) ensure ;;
check)
	ensure
	if [ -n "$root" ]; then say "using the sysroot $root"; else say "using this machine's own tools"; fi
	;;
cross)
	[ $# -eq 2 ] || die "cross: give one triplet, such as powerpc64le-linux-gnu"
	extra "cross-$2" "gcc-$2" "$2-gcc" --version
	;;
sphinx) extra sphinx python3-sphinx python3 -m sphinx --version ;;
# Without a font of its own the page would be drawn in whatever the machine has.
chromium)
	extra chromium "chromium-headless-shell fonts-dejavu-core" chromium-headless-shell --version
	;;
strace) extra strace strace strace --version ;;
packages) echo $packages ;;
native) native_ok ;;
where)
	choose
	echo "${root:-native}"
	;;
*) die "usage: scripts/toolchain.sh run CMD [ARG...] | get | check | cross TRIPLET | sphinx | chromium | strace | packages | native | where" ;;
esac
