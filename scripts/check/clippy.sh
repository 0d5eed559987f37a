#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs clippy on user space and, against the kernel of ZDM_TREE, on the module. The module's objects go
# to a directory of their own, because objects of a plain build would hide the warnings.
set -euo pipefail
cd "$(dirname "$0")/../.."

cargo clippy -q --workspace --all-targets -- -D warnings
rm -rf build/clippy
mkdir -p build/clippy
# shellcheck disable=SC2046
exec make -C "$ZDM_TREE" $(scripts/tree-compilers.sh "$ZDM_TREE") M="$PWD" MO="$PWD/build/clippy" \
	CLIPPY=1 KRUSTFLAGS=-Dwarnings modules
