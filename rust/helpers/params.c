// SPDX-License-Identifier: GPL-2.0
/* Module parameters that are no numbers: module! knows no words, and bool only from 7.3 on. */
#include <linux/moduleparam.h>

#include "helpers.h"

static char *audit = "report";
module_param(audit, charp, 0444);
MODULE_PARM_DESC(audit, "What a broken invariant does: off, report (default) or panic");

static bool inject;
module_param(inject, bool, 0444);
MODULE_PARM_DESC(inject, "Allow ZDM_INJECT to break invariants on purpose");

static bool ledger = true;
module_param(ledger, bool, 0444);
MODULE_PARM_DESC(ledger, "Keep the last transition of every page, for reports (default)");

/* Read often, and without a call: rust/driver/client/strict.rs. */
bool zdm_strict;
module_param_named(strict, zdm_strict, bool, 0644);
MODULE_PARM_DESC(strict, "Compare all of struct page, the device's page table with the CPU's, and mapping counts with page tables; slow");

bool zdm_param_inject(void)
{
	return inject;
}

bool zdm_param_ledger(void)
{
	return ledger;
}

const char *zdm_param_audit(void)
{
	return audit;
}
