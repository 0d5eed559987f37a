#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
#
# Runs checkpatch.pl of the kernel of ZDM_TREE on all patches and on all C files. The commits that a
# message names cannot be looked up without the kernel's history.
set -uo pipefail
cd "$(dirname "$0")/../.."

bad=0
check() {
	perl "$ZDM_TREE/scripts/checkpatch.pl" --strict --quiet --no-tree "$@" || bad=1
}
for p in $(find qemu/kernel/patches -name '*.patch' | sort); do
	check --ignore UNKNOWN_COMMIT_ID - < "$p"
done
for p in qemu/kernel/mutants/*.patch; do
	check --ignore FILE_PATH_CHANGES - < "$p"
done
check --file --ignore CONST_STRUCT,VOLATILE rust/helpers/*.[ch] uapi/*.h selftests/programs/*.[ch]
exit $bad
