// SPDX-License-Identifier: GPL-2.0
/* Forwarders for struct page, folios, ZONE_DEVICE and mmu interval notifiers. */
#include <linux/dma-mapping.h>
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/jiffies.h>
#include <linux/memcontrol.h>
#include <linux/memory_hotplug.h>
#include <linux/migrate.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "helpers.h"

struct page *zdm_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long zdm_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

/*
 * All that tells a free page from others, in one look. Of the page itself, not of its folio:
 * a free page may still look like the tail of the large folio that it was part of, and then
 * most of its fields are that folio's.
 */
unsigned int zdm_page_bits(const struct page *page)
{
	unsigned long flags = READ_ONCE(page->flags.f);
	unsigned int bits = 0;

	if (page_ref_count(page))
		bits |= ZDM_BIT_REFERENCED;
	/* PageAnonExclusive() insists on an anonymous page; the oracle asks of any page. */
	if (flags & BIT(PG_anon_exclusive))
		bits |= ZDM_BIT_ANON_EXCLUSIVE;
	if (PageTail(page))
		return bits | ZDM_BIT_TAIL;
	if (flags & BIT(PG_locked))
		bits |= ZDM_BIT_LOCKED;
	if (flags & BIT(PG_lru))
		bits |= ZDM_BIT_LRU;
	if (flags & BIT(PG_head))
		bits |= ZDM_BIT_HEAD;
	if (atomic_read(&page->_mapcount) != -1)
		bits |= ZDM_BIT_MAPPED;
	if (page->mapping)
		bits |= ZDM_BIT_MAPPING;
	if ((unsigned long)page->mapping & FOLIO_MAPPING_ANON)
		bits |= ZDM_BIT_ANON;
#ifdef CONFIG_MEMCG
	if (page->memcg_data)
		bits |= ZDM_BIT_CHARGED;
#endif
	return bits;
}

/* Flags that neither a free page nor any page of a device that is left alone has. */
#define ZDM_UNCLEAN	(BIT(PG_locked) | BIT(PG_lru) | BIT(PG_anon_exclusive))

/*
 * Of the pages from @pfn on, how many are free by @state, which is then 0, and have nothing
 * that a free page must not have. A loop in C, as a call for each page would cost more than
 * the page.
 */
unsigned long zdm_clean_pages(unsigned long pfn, const s8 *state, unsigned long n)
{
	const struct page *page = pfn_to_page(pfn);
	unsigned long i, stale;

	for (i = 0; i < n && !READ_ONCE(state[i]); i++, page++) {
		stale = (READ_ONCE(page->flags.f) & ZDM_UNCLEAN) | page_ref_count(page) |
			(unsigned long)page->mapping | PageTail(page);
#ifdef CONFIG_MEMCG
		stale |= page->memcg_data;
#endif
		if (!stale && atomic_read(&page->_mapcount) == -1)
			continue;
		/* The words of a tail that was left over say something else. */
		if (zdm_page_bits(page) & ~(ZDM_BIT_HEAD | ZDM_BIT_TAIL))
			break;
	}
	return i;
}

/*
 * Of the pages from @head on, the first of a folio that is not in use, how many nothing
 * refers to, and which are no tails of another folio.
 */
unsigned long zdm_idle_pages(const struct page *head, unsigned long n)
{
	const struct page *page = head;
	unsigned long i;

	for (i = 0; i < n && !page_ref_count(page); i++, page++) {
		if (PageTail(page) ? compound_head(page) != head :
				     READ_ONCE(page->flags.f) & BIT(PG_locked))
			break;
	}
	return i;
}

/* Whether a page has as many references as mappings, as one that is free has. */
bool zdm_is_settled(const struct page *page)
{
	return page_ref_count(page) == folio_mapcount(page_folio(page));
}

/* Whether all pages of a folio but the first are tails, and else as free pages must be. */
bool zdm_clean_tails(const struct page *head, unsigned int order)
{
	unsigned long i;

	for (i = 1; i < 1UL << order; i++)
		if (zdm_page_bits(head + i) != ZDM_BIT_TAIL)
			return false;
	return true;
}

/*
 * Of the entries of a migration from @i on, the first of a folio that has moved and that
 * somebody may refer to besides the migration, its mappings, and the fault on @fault that
 * it is made for; @n where there is none. What the driver asks of each of them, in a loop
 * in C for the same reason.
 */
unsigned long zdm_next_suspect(const unsigned long *src, const unsigned long *dst,
			       unsigned long i, unsigned long n, struct page *fault)
{
	const struct folio *faulting = fault ? page_folio(fault) : NULL;

	for (; i < n; i++) {
		struct page *from = migrate_pfn_to_page(src[i]);
		struct page *to = migrate_pfn_to_page(dst[i]);

		if (!to || !(src[i] & MIGRATE_PFN_MIGRATE))
			continue;
		if (from && page_ref_count(from) != 1 + (page_folio(from) == faulting))
			break;
		if (page_ref_count(to) != folio_mapcount(page_folio(to)) + 1)
			break;
	}
	return i;
}

/* Reads all of every struct page, and gives the caller something that depends on it. */
unsigned long zdm_read_pages(const struct page *page, unsigned long n)
{
	const unsigned long *word = (const unsigned long *)page;
	const unsigned long *end = (const unsigned long *)(page + n);
	unsigned long all = 0;

	while (word < end)
		all |= READ_ONCE(*word++);
	return all;
}

int zdm_folio_mapcount(struct page *page)
{
	return folio_mapcount(page_folio(page));
}

unsigned int zdm_folio_order(struct page *page)
{
	return folio_order(page_folio(page));
}

unsigned long zdm_folio_mapping(struct page *page)
{
	return (unsigned long)page_folio(page)->mapping;
}

/* Whether a memory cgroup is charged for every page in use, but for this one none is. */
bool zdm_folio_is_uncharged(struct page *page)
{
#ifdef CONFIG_MEMCG
	return !mem_cgroup_disabled() && !page_folio(page)->memcg_data;
#else
	return false;
#endif
}

bool zdm_folio_is_ksm(struct page *page)
{
	return folio_test_ksm(page_folio(page));
}

unsigned long zdm_folio_memcg(struct page *page)
{
#ifdef CONFIG_MEMCG
	return page_folio(page)->memcg_data;
#else
	return 0;
#endif
}

struct page *zdm_compound_head(struct page *page)
{
	return compound_head(page);
}

bool zdm_pgmap_tryget_live(struct dev_pagemap *pgmap)
{
	return percpu_ref_tryget_live(&pgmap->ref);
}

void zdm_pgmap_put(struct dev_pagemap *pgmap)
{
	put_dev_pagemap(pgmap);
}

void zdm_folio_init(struct page *page, struct dev_pagemap *pgmap, unsigned int order)
{
	zone_device_folio_init((struct folio *)page, pgmap, order);
}

/* What the core copies itself where a pagemap has no folio_split. */
void zdm_folio_inherit(struct folio *tail, struct folio *head)
{
	tail->pgmap = head->pgmap;
	tail->mapping = head->mapping;
}

struct dev_pagemap *zdm_page_pgmap(struct page *page)
{
	return page_folio(page)->pgmap;
}

/* All that there is to know of a device folio that is being freed, in one call. */
void zdm_look_at_freed(struct page *head, struct zdm_freed *freed)
{
	struct folio *folio = page_folio(head);

	freed->pgmap = folio->pgmap;
	freed->pfn = page_to_pfn(head);
	freed->data = head->zone_device_data;
	freed->bits = zdm_page_bits(head);
}

bool zdm_is_device_private_page(const struct page *page)
{
	return is_device_private_page(page);
}

/*
 * The data of the folio of a device-private page, and which of its pages this is, in one
 * call; false for any other page.
 */
bool zdm_private_page(const struct page *page, void **data, unsigned long *nth)
{
	const struct page *head;

	if (!is_device_private_page(page))
		return false;
	head = compound_head(page);
	*data = head->zone_device_data;
	*nth = page - head;
	return true;
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

/*
 * Whether the kernel can reach the contents of a page in use: not those of a page that is
 * known to be broken, nor of memory that was taken out of the direct map, as that of
 * memfd_secret(2) is. A page that is mapped or locked stays as it is in this respect,
 * unless the hardware breaks it.
 */
bool zdm_page_is_reachable(struct page *page)
{
	unsigned long *first = kmap_local_page(page);
	unsigned long word;
	bool there = !PageHWPoison(page) && !get_kernel_nofault(word, first);

	kunmap_local(first);
	return there;
}

/*
 * A page that cannot be reached is not read at all: copy_mc_highpage() would report it as
 * a failure of the memory.
 */
int zdm_copy_mc_highpage(struct page *to, struct page *from)
{
	return zdm_page_is_reachable(from) ? copy_mc_highpage(to, from) : -EFAULT;
}

bool zdm_dma_mapping_error(struct device *dev, dma_addr_t address)
{
	return dma_mapping_error(dev, address);
}

void zdm_clear_highpage(struct page *page)
{
	clear_highpage(page);
}

struct page *zdm_alloc_pages(gfp_t gfp, unsigned int order)
{
	return alloc_pages(gfp, order);
}

struct page *zdm_alloc_folio(gfp_t gfp, unsigned int order)
{
	return (struct page *)folio_alloc(gfp, order);
}

struct page *zdm_alloc_folio_vma(gfp_t gfp, unsigned int order, struct vm_area_struct *vma,
				 unsigned long addr)
{
	return (struct page *)vma_alloc_folio(gfp, order, vma, addr);
}

bool zdm_request_mem_region(resource_size_t start, resource_size_t n, const char *name)
{
	return request_mem_region(start, n, name);
}

void zdm_release_mem_region(resource_size_t start, resource_size_t n)
{
	release_mem_region(start, n);
}

unsigned long long zdm_max_phys(void)
{
	return mhp_get_pluggable_range(true).end;
}

bool zdm_is_system_ram(resource_size_t start, size_t n)
{
	return region_intersects(start, n, IORESOURCE_SYSTEM_RAM, IORES_DESC_NONE) !=
	       REGION_DISJOINT;
}

bool zdm_thp_migration_supported(void)
{
	return thp_migration_supported();
}

/* A kernel without the flag migrates no GENERIC pages: 0 selects none. */
unsigned long zdm_migrate_select_generic(void)
{
#ifdef MIGRATE_VMA_SELECT_DEVICE_GENERIC
	return MIGRATE_VMA_SELECT_DEVICE_GENERIC;
#else
	return 0;
#endif
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

/*
 * Of the pages from @start to @end, all below one PMD, how many the CPU has accessed since they
 * were mapped. A look without locks, as get_user_pages_fast() takes it: with interrupts off no
 * page table is freed. In a loop in C for the same reason as those above.
 */
unsigned long zdm_accessed_pages(struct vm_area_struct *vma, unsigned long start,
				 unsigned long end)
{
	unsigned long irqs, n = 0;
	p4d_t *p4dp, p4d;
	pud_t *pudp, pud;
	pmd_t *pmdp, pmd;
	pgd_t *pgdp, pgd;
	pte_t *ptep, pte;

	if (start >= end || (start & PMD_MASK) != ((end - 1) & PMD_MASK))
		return 0;
	local_irq_save(irqs);
	pgdp = pgd_offset(vma->vm_mm, start);
	pgd = pgdp_get(pgdp);
	if (pgd_none(pgd) || pgd_bad(pgd))
		goto out;
	p4dp = p4d_offset_lockless(pgdp, pgd, start);
	p4d = p4dp_get(p4dp);
	if (!p4d_present(p4d))
		goto out;
	pudp = pud_offset_lockless(p4dp, p4d, start);
	pud = pudp_get(pudp);
	if (!pud_present(pud) || pud_leaf(pud))
		goto out;
	pmdp = pmd_offset_lockless(pudp, pud, start);
	pmd = pmdp_get_lockless(pmdp);
	if (!pmd_present(pmd) || pmd_leaf(pmd))
		goto out;
	ptep = pte_offset_kernel(&pmd, start);
	for (; start < end; start += PAGE_SIZE, ptep++) {
		pte = ptep_get_lockless(ptep);
		n += pte_present(pte) && pte_young(pte);
	}
out:
	local_irq_restore(irqs);
	return n;
}

unsigned long zdm_task_size(void)
{
	return TASK_SIZE_MAX;
}
