#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Checks that the modules of these folders do not import each other in a cycle.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec python3 scripts/check/module-cycles.py rust/audit rust/driver rust/kernel/mm rust/kernel \
	qemu/src qemu/guest/src selftests/src
