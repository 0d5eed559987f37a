// SPDX-License-Identifier: GPL-2.0
/* Forwarders that need THIS_MODULE. */
#include <linux/module.h>

#include "helpers.h"

void zdm_module_get(void)
{
	__module_get(THIS_MODULE);
}

void zdm_module_put(void)
{
	module_put(THIS_MODULE);
}
