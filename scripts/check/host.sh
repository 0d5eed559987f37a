#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs the tests of zdvm and of the selftests' library on this machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec cargo test -q --workspace
