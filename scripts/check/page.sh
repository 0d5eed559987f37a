#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Draws the page of a run in a real browser, and compares it with stored pictures; with ZDM_WRITE=1
# stores what was drawn.
set -euo pipefail
cd "$(dirname "$0")/../.."

export ZDM_PICTURES=${ZDM_WRITE:+write}
exec cargo test -q -p zdvm --test html -- --ignored
