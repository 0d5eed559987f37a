// SPDX-License-Identifier: GPL-2.0
/* Forwarders for a look at all of a struct page: I14. */
#include <linux/mm.h>

#include "helpers.h"

/* Without node, zone and section, which say where the page is. */
unsigned long zdm_whole_flags(const struct page *page)
{
	return READ_ONCE(page->flags.f) & (BIT(NR_PAGEFLAGS) - 1);
}

unsigned long zdm_whole_private(const struct page *page)
{
	return READ_ONCE(page->private);
}

unsigned long zdm_whole_index(const struct page *page)
{
	return READ_ONCE(page->__folio_index);
}

unsigned int zdm_whole_type(const struct page *page)
{
	return READ_ONCE(page->page_type);
}

int zdm_whole_entire_mapcount(const struct page *head)
{
	return atomic_read(&((struct folio *)head)->_entire_mapcount);
}

int zdm_whole_pincount(const struct page *head)
{
	return atomic_read(&((struct folio *)head)->_pincount);
}

int zdm_whole_large_mapcount(const struct page *head)
{
	return atomic_read(&((struct folio *)head)->_large_mapcount);
}

int zdm_whole_pages_mapped(const struct page *head)
{
	return atomic_read(&((struct folio *)head)->_nr_pages_mapped);
}

unsigned long zdm_whole_nr_pages(const struct page *head)
{
	return folio_nr_pages((const struct folio *)head);
}

bool zdm_whole_is_deferred(const struct page *head)
{
	return !list_empty(&((struct folio *)head)->_deferred_list);
}

/*
 * Of the @n free pages from @page on, how many have no flag but those of @explained, and
 * nothing in the fields that a free page leaves empty, before the first one that has. A tail
 * that was left over has fields of its folio there.
 */
unsigned long zdm_whole_pages(const struct page *page, unsigned long n, unsigned long explained)
{
	unsigned long i, stale;

	for (i = 0; i < n; i++, page++) {
		if (PageTail(page))
			continue;
		stale = zdm_whole_flags(page) & ~explained;
		stale |= page->private | (unsigned long)page->zone_device_data;
		if (stale)
			break;
	}
	return i;
}
