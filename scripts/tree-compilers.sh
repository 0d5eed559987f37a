#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Prints the arguments that make needs to use the compilers that a kernel was built with.
#
#   scripts/tree-compilers.sh DIR [c] [rust]     DIR is the build directory; without more words: c rust
#
# Run it with the tool set (scripts/toolchain.sh run). zdvm also checks the versions of C compilers; this
# script is for `make modules`, which runs without zdvm.
[ $# -gt 1 ] || set -- "$1" c rust
has() { grep -qsx "$2=y" "$1/.config"; }

case " $* " in
*" c "*)
	if has "$1" CONFIG_CC_IS_CLANG; then
		if has "$1" CONFIG_LD_IS_LLD; then echo LLVM=1; else echo CC=clang; fi
	elif has "$1" CONFIG_LD_IS_LLD; then
		echo LD=ld.lld
	fi
	;;
esac
case " $* " in
*" rust "*) ;;
*) exit 0 ;;
esac

# rustup installs in ~/.cargo/bin.
wanted=$(sed -n 's/^CONFIG_RUSTC_VERSION_TEXT="\(.*\)"$/\1/p' "$1/.config")
[ -n "$wanted" ] || exit 0
for rustc in rustc "$HOME/.cargo/bin/rustc"; do
	found=$("$rustc" --version 2>/dev/null) && here=${here:-$found}
	[ "$found" != "$wanted" ] || { [ "$rustc" = rustc ] || echo "RUSTC=$rustc"; exit 0; }
done
echo "$1: the kernel was built with \"$wanted\", here is \"${here:-no rustc}\": a module built now would not" \
	"match. Build the kernel with the tools that are here (scripts/toolchain.sh run make ...), or have" \
	"yours used (ZDM_TOOLCHAIN=native)" >&2
exit 1
