#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Checks that only rust/kernel and rust/bindings have unsafe code, that every file of the driver and of
# the oracle forbids it, that the abstractions have at most 4 unsafe blocks per 100 lines, and that no
# SAFETY comment points to another one instead of naming an invariant. Clippy checks that each block has one.
set -euo pipefail
cd "$(dirname "$0")/../.."

bad=0
if grep -nE '\bunsafe\b' -r rust samples --include='*.rs' --exclude-dir=kernel --exclude-dir=bindings |
	grep -vE 'forbid\(unsafe_code\)|^[^:]*:[0-9]+:[[:space:]]*//'; then
	echo "check unsafe: the lines above belong in rust/kernel" >&2
	bad=1
fi
for f in $(find rust/driver rust/audit samples -name '*.rs'); do
	grep -q '^#!\[forbid(unsafe_code)\]' "$f" ||
		{ echo "check unsafe: $f does not forbid unsafe_code" >&2; bad=1; }
done
blocks=$(find rust/kernel -name '*.rs' -exec cat {} + | grep -vE '^[[:space:]]*//' | grep -cE 'unsafe (\{|impl)' || true)
lines=$(find rust/kernel -name '*.rs' -exec cat {} + | wc -l)
awk -v b="$blocks" -v l="$lines" 'BEGIN {
	printf "check unsafe: rust/kernel: %d unsafe blocks in %d lines, %.1f per 100\n", b, l, 100 * b / l
	exit 100 * b / l > 4
}' || { echo "check unsafe: more than 4 per 100 lines" >&2; bad=1; }
if grep -rniE "SAFETY:.*(as above|likewise|the same as|caller's contract)" rust/kernel >&2; then
	echo "check unsafe: the comments above name no invariant" >&2
	bad=1
fi
exit $bad
