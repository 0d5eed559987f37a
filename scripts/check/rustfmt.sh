#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Checks the format of all Rust code; with ZDM_WRITE=1 formats it.
set -euo pipefail
cd "$(dirname "$0")/../.."

check=--check
[ -z "${ZDM_WRITE:-}" ] || check=
# shellcheck disable=SC2086
rustfmt --edition 2021 $check rust/zdmirror.rs samples/compile-fail/*.rs
# shellcheck disable=SC2086
cargo fmt --all $check
