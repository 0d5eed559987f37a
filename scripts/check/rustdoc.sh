#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Documents all items of the module, private ones too, against the kernel of ZDM_TREE. A warning is an
# error.
set -euo pipefail
cd "$(dirname "$0")/../.."

mkdir -p build/rustdoc
# shellcheck disable=SC2046
make -C "$ZDM_TREE" $(scripts/tree-compilers.sh "$ZDM_TREE") M="$PWD" MO="$PWD/build/rustdoc" \
	ZDM_RUSTDOC=y modules
echo "  DOC     build/rustdoc/doc/zdmirror/index.html"
