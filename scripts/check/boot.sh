#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Boots guests that go wrong on purpose, with the kernel of ZDM_TREE, and checks that zdvm notices.
set -euo pipefail
cd "$(dirname "$0")/../.."

export ZDVM_TEST_TREE=$ZDM_TREE
exec cargo test -q -p zdvm --test boot -- --ignored --test-threads=2
