// SPDX-License-Identifier: GPL-2.0
/* Forwarders for a look at all of a struct page: I14. */
#include <linux/mm.h>

#include "helpers.h"

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
	return folio_large_nr_pages((const struct folio *)head);
}

bool zdm_whole_is_deferred(const struct page *head)
{
	return !list_empty(&((struct folio *)head)->_deferred_list);
}
