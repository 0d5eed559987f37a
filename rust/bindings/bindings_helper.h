/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads. Macros that it cannot evaluate get a constant of their own, whose
 * prefix the build strips (as rust/bindings/bindings_helper.h of the kernel does).
 */
#include <linux/gfp.h>
#include <linux/hmm.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/mman.h>
#include <linux/mmu_notifier.h>
#include <linux/rmap.h>

#include <test_hmm_uapi.h>

#include "uapi/zdmirror.h"
#include "rust/helpers/helpers.h"

const gfp_t RUST_CONST_HELPER_GFP_HIGHUSER = GFP_HIGHUSER;
const gfp_t RUST_CONST_HELPER_GFP_HIGHUSER_MOVABLE = GFP_HIGHUSER_MOVABLE;
const unsigned long RUST_CONST_HELPER_MIGRATE_PFN_VALID = MIGRATE_PFN_VALID;
const unsigned long RUST_CONST_HELPER_MIGRATE_PFN_MIGRATE = MIGRATE_PFN_MIGRATE;
const unsigned long RUST_CONST_HELPER_MIGRATE_PFN_WRITE = MIGRATE_PFN_WRITE;
const unsigned long RUST_CONST_HELPER_MIGRATE_PFN_SHIFT = MIGRATE_PFN_SHIFT;
const unsigned long RUST_CONST_HELPER_MIGRATE_VMA_SELECT_SYSTEM = MIGRATE_VMA_SELECT_SYSTEM;
const unsigned long RUST_CONST_HELPER_MIGRATE_VMA_SELECT_DEVICE_PRIVATE =
	MIGRATE_VMA_SELECT_DEVICE_PRIVATE;
const unsigned int RUST_CONST_HELPER_HMM_RANGE_DEFAULT_TIMEOUT = HMM_RANGE_DEFAULT_TIMEOUT;
/* Flags of the top bits, which bindgen makes nothing of, by the numbers of their bits. */
const unsigned int RUST_CONST_HELPER_HMM_PFN_VALID_BIT = __builtin_ctzl(HMM_PFN_VALID);
const unsigned int RUST_CONST_HELPER_HMM_PFN_WRITE_BIT = __builtin_ctzl(HMM_PFN_WRITE);
const unsigned int RUST_CONST_HELPER_HMM_PFN_ERROR_BIT = __builtin_ctzl(HMM_PFN_ERROR);
const unsigned int RUST_CONST_HELPER_HMM_PFN_FLAGS_BIT = __builtin_ctzl(HMM_PFN_FLAGS);
const unsigned int RUST_CONST_HELPER_PMD_ORDER = PMD_SHIFT - PAGE_SHIFT;
const unsigned int RUST_CONST_HELPER_PUD_ORDER = PUD_SHIFT - PAGE_SHIFT;
const unsigned int RUST_CONST_HELPER_VM_FAULT_OOM = VM_FAULT_OOM;
const unsigned int RUST_CONST_HELPER_VM_FAULT_SIGBUS = VM_FAULT_SIGBUS;
const unsigned int RUST_CONST_HELPER_MEMORY_DEVICE_PRIVATE = MEMORY_DEVICE_PRIVATE;

const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_READ = HMM_DMIRROR_READ;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_WRITE = HMM_DMIRROR_WRITE;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_MIGRATE_TO_DEV = HMM_DMIRROR_MIGRATE_TO_DEV;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_MIGRATE_TO_SYS = HMM_DMIRROR_MIGRATE_TO_SYS;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_SNAPSHOT = HMM_DMIRROR_SNAPSHOT;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_EXCLUSIVE = HMM_DMIRROR_EXCLUSIVE;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_CHECK_EXCLUSIVE = HMM_DMIRROR_CHECK_EXCLUSIVE;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_RELEASE = HMM_DMIRROR_RELEASE;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_FLAGS = HMM_DMIRROR_FLAGS;
const unsigned int RUST_CONST_HELPER_HMM_DMIRROR_READ_UNLOCKED = HMM_DMIRROR_READ_UNLOCKED;
const unsigned int RUST_CONST_HELPER_ZDM_FAULT = ZDM_FAULT;
const unsigned int RUST_CONST_HELPER_ZDM_AUDIT = ZDM_AUDIT;
const unsigned int RUST_CONST_HELPER_ZDM_INJECT = ZDM_INJECT;
const unsigned int RUST_CONST_HELPER_ZDM_STATS = ZDM_STATS;
