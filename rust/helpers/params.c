// SPDX-License-Identifier: GPL-2.0
/* The one module parameter that is a word: module! of 7.3 knows numbers and bool only. */
#include <linux/moduleparam.h>

#include "helpers.h"

static char *audit = "report";
module_param(audit, charp, 0444);
MODULE_PARM_DESC(audit, "What a broken invariant does: off, report (default) or panic");

const char *zdm_param_audit(void)
{
	return audit;
}
