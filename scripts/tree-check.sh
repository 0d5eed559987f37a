#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# Says in one sentence why no module in Rust can be built against a tree.
#
#   scripts/tree-check.sh DIR     DIR is the build directory
#
# zdvm checks more; this script is for `make modules`, which runs without zdvm.
die() { echo "$dir: $*" >&2; exit 1; }

dir=$1
[ -f "$dir/Makefile" ] || die "no kernel tree is there"
[ -f "$dir/.config" ] || die "this kernel tree is not configured here. O=DIR names its build directory; ./zdvm run --kdir needs none"
grep -qx CONFIG_RUST=y "$dir/.config" ||
	die "the kernel is configured without CONFIG_RUST. make kconfig KDIR=... writes a configuration with all that is missing"
[ -f "$dir/rust/libkernel.rmeta" ] ||
	die "rust/libkernel.rmeta is not there: build the kernel first. Packages of headers have no such file"
