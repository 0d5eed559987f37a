#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Prints the arguments that make needs to use the compilers that a kernel was built with.
#
#   scripts/tree-compilers.sh DIR     DIR is the build directory
#
# zdvm also checks versions; this script is for `make modules`, which runs without zdvm.
has() { grep -qsx "$2=y" "$1/.config"; }

if has "$1" CONFIG_CC_IS_CLANG; then
	if has "$1" CONFIG_LD_IS_LLD; then echo LLVM=1; else echo CC=clang; fi
elif has "$1" CONFIG_LD_IS_LLD; then
	echo LD=ld.lld
fi
