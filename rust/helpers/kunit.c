// SPDX-License-Identifier: GPL-2.0
/* Forwarders for KUnit cases that want a real address space. */
#include <kunit/test.h>
#include <kunit/test-bug.h>
#include <linux/mman.h>

#include "helpers.h"

int zdm_kunit_attach_mm(void)
{
	return kunit_attach_mm();
}

unsigned long zdm_kunit_mmap_anon(unsigned long len)
{
	return kunit_vm_mmap(kunit_get_current_test(), NULL, 0, len, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, 0);
}

void zdm_kunit_set_poisoned(struct page *page, bool poisoned)
{
	if (page && poisoned)
		SetPageHWPoison(page);
	else if (page)
		ClearPageHWPoison(page);
}
