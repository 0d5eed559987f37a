// SPDX-License-Identifier: GPL-2.0
/* Forwarders for the references of a pagemap, and for fault injection. */
#include <linux/cpumask.h>
#include <linux/highmem.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/percpu-refcount.h>

#include "helpers.h"

/* Where the counts by processor are, 0 if there is only one count. */
unsigned long zdm_pgmap_counts(struct dev_pagemap *pgmap)
{
	unsigned long __percpu *counts;

	return __ref_is_percpu(&pgmap->ref, &counts) ? (__force unsigned long)counts : 0;
}

unsigned long zdm_pgmap_cpu_count(unsigned long counts, unsigned int cpu)
{
	return READ_ONCE(*per_cpu_ptr((unsigned long __percpu *)counts, cpu));
}

unsigned long zdm_pgmap_count(struct dev_pagemap *pgmap)
{
	return atomic_long_read(&pgmap->ref.data->count);
}

unsigned int zdm_next_possible_cpu(int cpu)
{
	return cpumask_next(cpu, cpu_possible_mask);
}

/* For fault injection. */
void zdm_set_page_mapping(struct page *page, unsigned long mapping)
{
	WRITE_ONCE(page->mapping, (struct address_space *)mapping);
}

void zdm_set_anon_exclusive(struct page *page, bool set)
{
	if (set)
		set_bit(PG_anon_exclusive, &page->flags.f);
	else
		clear_bit(PG_anon_exclusive, &page->flags.f);
}

void zdm_flip_bit(struct page *page)
{
	char *data = kmap_local_page(page);

	data[0] ^= 1;
	kunmap_local(data);
}
