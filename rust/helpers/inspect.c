// SPDX-License-Identifier: GPL-2.0
/*
 * Forwarders for a look at a page in any state. A page of a pagemap may be
 * allocated, split or freed meanwhile: the accessors of core mm insist on a folio that
 * is not, which is a BUG with CONFIG_DEBUG_VM_PGFLAGS if it is.
 */
#include <linux/memremap.h>
#include <linux/mm.h>

#include "helpers.h"

bool zdm_pfn_valid(unsigned long pfn)
{
	return pfn_valid(pfn);
}

unsigned int zdm_large_order(const struct page *head)
{
	return READ_ONCE(((struct folio *)head)->_flags_1) & 0xff;
}

int zdm_large_mapcount(const struct page *head)
{
	return atomic_read(&((struct folio *)head)->_large_mapcount) + 1;
}

int zdm_large_pins(const struct page *head)
{
	return atomic_read(&((struct folio *)head)->_pincount);
}

bool zdm_folio_is_rmappable(const struct page *head)
{
	return test_bit(PG_large_rmappable, &((struct folio *)head)->_flags_1);
}

bool zdm_folio_is_hugetlb(const struct page *head)
{
	return folio_test_hugetlb((const struct folio *)head);
}
