#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Checks that the modules of these folders do not import each other in a cycle, and that the folders
# of rust/driver and rust/kernel/mm do not, either.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec python3 scripts/check/module-cycles.py rust/audit rust/kernel qemu/src \
	qemu/guest/src selftests/src --layers rust/driver rust/kernel/mm
