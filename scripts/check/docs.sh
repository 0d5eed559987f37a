#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Makes web pages of the documentation. A warning is an error.
set -euo pipefail
cd "$(dirname "$0")/../.."

python3 -m sphinx -q -W --keep-going -n -d build/doctrees -b html Documentation build/htmldocs
echo "  DOC     build/htmldocs/index.html"
