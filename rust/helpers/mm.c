// SPDX-License-Identifier: GPL-2.0
/* Forwarders for struct page, folios, ZONE_DEVICE and mmu interval notifiers. */
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/jiffies.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>

#include "helpers.h"

struct page *zdm_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long zdm_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

int zdm_page_ref_count(const struct page *page)
{
	return page_ref_count(page);
}

void zdm_set_page_count(struct page *page, int count)
{
	set_page_count(page, count);
}

int zdm_folio_mapcount(struct page *page)
{
	return folio_mapcount(page_folio(page));
}

unsigned int zdm_folio_order(struct page *page)
{
	return folio_order(page_folio(page));
}

bool zdm_folio_locked(struct page *page)
{
	return folio_test_locked(page_folio(page));
}

bool zdm_folio_lru(struct page *page)
{
	return folio_test_lru(page_folio(page));
}

/* PageAnonExclusive() insists on an anonymous page; the oracle asks of any page. */
bool zdm_page_anon_exclusive(struct page *page)
{
	return test_bit(PG_anon_exclusive, &page->flags.f);
}

unsigned long zdm_folio_mapping(struct page *page)
{
	return (unsigned long)page_folio(page)->mapping;
}

unsigned long zdm_folio_memcg(struct page *page)
{
#ifdef CONFIG_MEMCG
	return page_folio(page)->memcg_data;
#else
	return 0;
#endif
}

struct dev_pagemap *zdm_page_pgmap(struct page *page)
{
	return page_folio(page)->pgmap;
}

bool zdm_is_device_private_page(const struct page *page)
{
	return is_device_private_page(page);
}

void *zdm_zone_device_data(const struct page *page)
{
	return page->zone_device_data;
}

void zdm_set_zone_device_data(struct page *page, void *data)
{
	page->zone_device_data = data;
}

bool zdm_folio_try_get(struct page *page)
{
	return folio_try_get(page_folio(page));
}

void zdm_folio_put(struct page *page)
{
	folio_put(page_folio(page));
}

void zdm_folio_lock(struct page *page)
{
	folio_lock(page_folio(page));
}

void zdm_folio_unlock(struct page *page)
{
	folio_unlock(page_folio(page));
}

void zdm_copy_highpage(struct page *to, struct page *from)
{
	copy_highpage(to, from);
}

void zdm_clear_highpage(struct page *page)
{
	clear_highpage(page);
}

struct page *zdm_alloc_page(gfp_t gfp)
{
	return alloc_page(gfp);
}

struct page *zdm_alloc_page_vma(gfp_t gfp, struct vm_area_struct *vma, unsigned long addr)
{
	return alloc_page_vma(gfp, vma, addr);
}

void zdm_release_mem_region(resource_size_t start, resource_size_t n)
{
	release_mem_region(start, n);
}

void zdm_mmu_interval_set_seq(struct mmu_interval_notifier *sub, unsigned long seq)
{
	mmu_interval_set_seq(sub, seq);
}

bool zdm_mmu_interval_read_retry(struct mmu_interval_notifier *sub, unsigned long seq)
{
	return mmu_interval_read_retry(sub, seq);
}

bool zdm_mmu_notifier_range_blockable(const struct mmu_notifier_range *range)
{
	return mmu_notifier_range_blockable(range);
}

bool zdm_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

unsigned long zdm_jiffies_after_ms(unsigned int ms)
{
	return jiffies + msecs_to_jiffies(ms);
}

bool zdm_jiffies_passed(unsigned long deadline)
{
	return time_after(jiffies, deadline);
}

void zdm_cond_resched(void)
{
	cond_resched();
}

unsigned long zdm_task_size(void)
{
	return TASK_SIZE_MAX;
}
