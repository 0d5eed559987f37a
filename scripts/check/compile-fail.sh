#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Checks that the compiler refuses misuses of the abstractions. Each file of samples/compile-fail names
# the error that it must cause, and must cause no other. All files are compiled with the crate at once,
# by the command that builds the module against the kernel of ZDM_TREE, up to the passes that report
# errors.
set -euo pipefail
cd "$(dirname "$0")/../.."

top=$PWD
cases=$top/samples/compile-fail
out=$top/build/compile-fail
mkdir -p "$out"
# shellcheck disable=SC2046
make -C "$ZDM_TREE" $(scripts/tree-compilers.sh "$ZDM_TREE") M="$top" MO="$out" rust/zdmirror.o \
	> "$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
cmd=$(sed -nE 's/^savedcmd_[^ ]* := //p' "$out/rust/.zdmirror.o.cmd")

sed -E -e "s|^#\[path = \"|&$top/rust/|" \
	-e "s|^mod (audit\|bindings\|driver);|#[path = \"$top/rust/\1/mod.rs\"]\nmod \1;|" \
	-e "s|^mod examples;|#[path = \"$top/rust/examples.rs\"]\n&|" rust/zdmirror.rs > "$out/root.rs"
for f in "$cases"/*.rs; do
	printf '#[path = "%s"]\nmod fail_%s;\n' "$f" "$(basename "$f" .rs)" >> "$out/root.rs"
done

cmd=${cmd%% --out-dir *}
export RUSTC_BOOTSTRAP=1 ZDM_BINDINGS=$out/rust/bindings/bindings_generated.rs
export ZDM_DOCTESTS=$out/rust/doctests_generated.rs
status=0
cd "$out"
bash -c "$cmd --emit=metadata=$out/root.rmeta --cap-lints=allow --error-format=short $out/root.rs" \
	> "$out/log" 2>&1 || status=$?
errors=$(sed -nE 's|^([^ ]*):[0-9]+:[0-9]+: error\[(E[0-9]+)\].*|\1 \2|p' "$out/log" | sort -u)

bad=0
for f in "$cases"/*.rs; do
	wanted=$(sed -nE 's|^// error: ||p' "$f")
	found=$(awk -v f="$f" '$1 == f { print $2 }' <<< "$errors" | paste -sd' ')
	if [ "${found:-none}" != "$wanted" ]; then
		echo "compile-fail: $(basename "$f"): expected $wanted, found ${found:-none}" >&2
		bad=1
	fi
done
others=$(grep -E ': error' "$out/log" | grep -vF "$cases/" || true)
if [ "$status" -eq 0 ] || [ -n "$others" ]; then
	echo "compile-fail: the crate itself: ${others:-no error at all}" >&2
	bad=1
fi
[ "$bad" -eq 0 ] || { echo "compile-fail: see $out/log" >&2; exit 1; }
echo "compile-fail: $(grep -Lx '// error: none' "$cases"/*.rs | wc -l) misuses are refused"
