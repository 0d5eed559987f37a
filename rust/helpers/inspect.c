// SPDX-License-Identifier: GPL-2.0
/*
 * Forwarders for a look at a page in any state. A page of a pagemap may be
 * handed out, split or freed meanwhile: the accessors of core mm insist on a folio that
 * is not.
 */
#include <linux/memremap.h>
#include <linux/mm.h>

#include "helpers.h"

/* pgmap_pfn_valid(), which is not exported; not before there is a memory map, either. */
bool zdm_pgmap_pfn_valid(struct dev_pagemap *pgmap, unsigned long pfn)
{
	unsigned long first = vmem_altmap_offset(pgmap_altmap(pgmap));
	int i;

	for (i = 0; i < pgmap->nr_range; i++, first = 0) {
		struct range *range = &pgmap->ranges[i];

		if (pfn >= PHYS_PFN(range->start) && pfn <= PHYS_PFN(range->end))
			return pfn - PHYS_PFN(range->start) >= first && pfn_valid(pfn);
	}
	return false;
}

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

/*
 * is_huge_zero_folio() wants a variable that is not exported. What tells that folio from
 * others is that it is large and has no rmap.
 */
bool zdm_is_huge_zero_page(const struct page *page)
{
	const struct folio *folio = page_folio(page);

	return folio_test_large(folio) && !folio_test_large_rmappable(folio) &&
	       !folio_test_hugetlb(folio) && !folio_is_zone_device(folio) && !folio->mapping;
}
