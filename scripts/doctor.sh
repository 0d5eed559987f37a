#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Prints what this machine lacks with the command that installs it, what will be slow and why, and what
# the first run will download. It changes nothing. Exit status: 0 if nothing is missing, else 1.
#
# ZDM_TOOLCHAIN and ZDM_SOURCE count, as for every other command.
#
# ZDM_OS_RELEASE and ZDM_KVM stand for /etc/os-release and /dev/kvm in tests.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/zdmirror
os_release=${ZDM_OS_RELEASE:-/etc/os-release}
kvm=${ZDM_KVM:-/dev/kvm}

case ${1:-} in
'') ;;
-h | --help)
	cat <<-'END'
		Say what this machine lacks and the command that installs it, what will be slow and why, and
		what the first run will download. The doctor changes nothing.

		Usage: ./zdvm doctor

		Exit status: 0 if nothing is missing, else 1.
	END
	exit 0
	;;
*) echo "usage: ./zdvm doctor    (it takes no options)" >&2; exit 2 ;;
esac

os=$( (. "$os_release" && echo "${ID:-unknown} ${ID_LIKE:-}") 2>/dev/null || echo unknown)
version=$( (. "$os_release" && echo "${VERSION_CODENAME:-}") 2>/dev/null || true)
sudo=
[ "$(id -u)" = 0 ] || sudo="sudo "
missing=0
packages=()
remedies=()

ok() { printf '  ok        %s\n' "$*"; }
slow() { printf '  slow      %s\n' "$*"; }
download() { printf '  download  %s\n' "$*"; }
lacking() { printf '  MISSING   %s\n' "$*"; missing=1; }

# have COMMAND PACKAGE: the package has the same name in all distributions that follow.
have() {
	if command -v "$1" >/dev/null; then
		ok "$1"
	else
		lacking "$1"
		packages+=("$2")
	fi
}

case " $os " in
*" ubuntu "*) family=ubuntu install="apt-get install -y" ;;
*" debian "*) family=debian install="apt-get install -y" ;;
*" fedora "* | *" rhel "*) family=fedora install="dnf install -y" ;;
*" arch "*) family=arch install="pacman -S --needed --noconfirm" ;;
*" suse "* | *" opensuse "*) family=suse install="zypper install -y" ;;
*) family=other install= ;;
esac

echo "This machine ($family${version:+ $version}, $(uname -m)):"
[ "$(uname -m)" = x86_64 ] || lacking "an x86-64 processor; guests are x86-64 and so are the tools"
have git git
have make make

# With ZDM_TOOLCHAIN=native everything runs with the programs of this machine, whichever it is.
own_tools() {
	local absent
	# toolchain.sh knows where the programs are looked for.
	# shellcheck disable=SC2016
	mapfile -t absent < <("$here/toolchain.sh" run bash -c 'for t; do command -v "$t" >/dev/null || echo "$t"; done' - \
		bc bindgen bison busybox cargo cpio depmod flex gcc gdb git ld mkfs.ext4 mkfs.xfs objcopy pahole \
		patch perl python3 qemu-system-x86_64 rustc rustfmt setpriv xz)
	if [ ${#absent[@]} -eq 0 ]; then
		ok "the programs of this machine, as ZDM_TOOLCHAIN=native wants"
	else
		lacking "programs that ZDM_TOOLCHAIN=native takes from this machine: ${absent[*]}"
		remedies+=("unset ZDM_TOOLCHAIN    # or install what has the programs above, with your package manager")
	fi
	if [ -n "${ZDM_SOURCE:-}" ] || [ -e "$cache/src/linux-source-7.3.path" ] || command -v apt-get >/dev/null; then
		return
	fi
	lacking "apt-get, which would get the kernel source"
	remedies+=("export ZDM_SOURCE=/a/tree/or/tarball/of/Linux-7.3")
}

# Debian's tools come as a sysroot, except on Debian 13 with all packages installed.
case ${ZDM_TOOLCHAIN:-auto}:$family in
native:*) own_tools ;;
*:debian | *:ubuntu)
	if "$here/toolchain.sh" native 2>/dev/null; then
		ok "all tools are installed; no sysroot is needed"
	else
		have mmdebstrap mmdebstrap
		have bwrap bubblewrap
		[ "$(id -u)" = 0 ] || have newuidmap uidmap
		if [ "$family" = ubuntu ] && [ ! -r /usr/share/keyrings/debian-archive-keyring.gpg ]; then
			lacking "Debian's signing keys, which Ubuntu does not install by itself"
			packages+=(debian-archive-keyring)
		fi
	fi
	;;
*)
	# Without Debian's package manager there is no sysroot; a container has the package manager.
	have podman podman
	remedies+=("podman build -t zdmirror . && podman run --rm -it --device /dev/kvm -v zdmirror-cache:/root/.cache zdmirror ./zdvm run")
	[ -e "$kvm" ] || remedies=("${remedies[@]/--device \/dev\/kvm /}")
	;;
esac

# Many containers forbid user namespaces, and so does Ubuntu since 24.04.
if [ "${ZDM_TOOLCHAIN:-auto}" != native ] && command -v bwrap >/dev/null && ! bwrap --ro-bind / / true 2>/dev/null; then
	lacking "permission to make user namespaces, which bwrap needs"
	if [ "$(cat /proc/sys/kernel/apparmor_restrict_unprivileged_userns 2>/dev/null)" = 1 ]; then
		remedies+=("${sudo}sysctl kernel.apparmor_restrict_unprivileged_userns=0")
	else
		remedies+=("${sudo}sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=15000")
	fi
fi

below=$cache
while [ ! -d "$below" ]; do below=$(dirname "$below"); done
free=$(df -Pk "$below" | awk 'NR == 2 { print int($4 / 1048576) }')
if [ "$free" -ge 15 ]; then
	ok "disk: $free GiB free for $cache"
else
	# What the cache holds already counts. Adding it up may take a minute.
	used=$( (du -sk "$cache" 2>/dev/null || true) | awk '{ print int($1 / 1048576) }')
	if [ $((free + ${used:-0})) -ge 15 ]; then
		ok "disk: $free GiB free for $cache, $used GiB used there"
	else
		lacking "disk: 15 GiB are needed in $cache, $free GiB are free"
		remedies+=("export XDG_CACHE_HOME=/a/directory/with/room")
	fi
fi
memory=$(awk '/^MemTotal/ { print int($2 / 1048576 + 0.5) }' /proc/meminfo)
if [ "$memory" -ge 8 ]; then
	ok "memory: $memory GiB; a guest has 6 GiB"
else
	slow "memory: $memory GiB, a guest has 6 GiB; use --machine private, which has 2"
fi

echo "Speed:"
cpus=$(nproc)
if [ "$cpus" -ge 4 ]; then
	ok "$cpus processors"
else
	slow "$cpus processors: the first kernel takes a quarter of an hour or more"
fi
if [ ! -e "$kvm" ]; then
	if grep -qE '^flags.*\b(vmx|svm)\b' /proc/cpuinfo; then
		slow "no $kvm: run ${sudo}modprobe kvm_intel (or kvm_amd); until then guests run under TCG"
	else
		slow "no $kvm: the processor, or the virtual machine that this is, offers no virtualisation; guests run under TCG, several times slower, with longer time limits"
	fi
elif [ ! -r "$kvm" ] || [ ! -w "$kvm" ]; then
	slow "$kvm is not yours to open: run ${sudo}usermod -aG kvm $(id -un) and log in again; until then guests run under TCG"
else
	ok "$kvm opens; whether a guest really runs with it, a boot finds out"
fi

echo "The first run downloads:"
need=0
root=$("$here/toolchain.sh" where 2>/dev/null || true)
if [ "$root" != native ] && [ ! -e "${root:-/nonexistent}/.complete" ]; then
	download "a Debian 13 sysroot (2.5 GB on disk, one to three minutes)"
	need=1
fi
if [ -n "${ZDM_SOURCE:-}" ]; then
	ok "the kernel source is $ZDM_SOURCE"
elif [ ! -e "$cache/src/linux-source-7.3.path" ]; then
	download "Debian's linux-source-7.3 (1.6 GB on disk, under a minute)"
	need=1
fi
if [ ! -d "$cache/cargo/registry" ]; then
	download "crates from crates.io (under 100 MB)"
	need=1
fi
[ "$need" = 1 ] || ok "nothing"

# The program knows which kernels are built and what the last boot found out about KVM.
program=$here/../target/debug/zdvm
if [ "$missing" = 0 ] && [ "$need" = 0 ] && [ -x "$program" ]; then
	"$here/toolchain.sh" run "$program" --repo "$here/.." doctor || true
fi

if [ ${#packages[@]} -gt 0 ]; then
	if [ -n "$install" ]; then
		remedies=("$sudo$install ${packages[*]}" "${remedies[@]}")
	else
		remedies=("install these with your package manager: ${packages[*]}" "${remedies[@]}")
	fi
fi
if [ "$missing" = 0 ]; then
	echo "Nothing is missing. Next: ${remedies[0]:-./zdvm run}"
	exit 0
fi
echo "To mend it, run:"
printf '    %s\n' "${remedies[@]}"
exit 1
