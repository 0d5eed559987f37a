#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# What make must be told to use the compilers that a kernel was built with.
#
#   scripts/tree-compilers.sh DIR     DIR is the build directory
#
# zdvm looks closer, at versions; this is for `make modules`, which zdvm has no part in.
has() { grep -qsx "$2=y" "$1/.config"; }

if has "$1" CONFIG_CC_IS_CLANG; then
	if has "$1" CONFIG_LD_IS_LLD; then echo LLVM=1; else echo CC=clang; fi
elif has "$1" CONFIG_LD_IS_LLD; then
	echo LD=ld.lld
fi
