// SPDX-License-Identifier: GPL-2.0
/* Forwarders for struct page, folios, ZONE_DEVICE and mmu interval notifiers. */
#include <linux/dma-mapping.h>
#include <linux/highmem.h>
#include <linux/ioport.h>
#include <linux/jiffies.h>
#include <linux/memcontrol.h>
#include <linux/memory_hotplug.h>
#include <linux/migrate.h>
#include <linux/mmap_lock.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>
#include <linux/userfaultfd_k.h>

#include "helpers.h"

/* What rust/kernel/mm/page/struct_page.rs knows of the array of struct pages. */
static_assert(IS_ENABLED(CONFIG_SPARSEMEM_VMEMMAP));

struct page *zdm_pfn_to_page(unsigned long pfn)
{
	return pfn_to_page(pfn);
}

unsigned long zdm_page_to_pfn(const struct page *page)
{
	return page_to_pfn(page);
}

/* What rust/kernel/mm/page/struct_page.rs knows of the words that follow the flags. */
static_assert(offsetof(struct folio, pgmap) == offsetof(struct page, lru));
static_assert(offsetof(struct page, lru) == sizeof(unsigned long));
static_assert(offsetof(struct page, zone_device_data) == 2 * sizeof(unsigned long));
static_assert(offsetof(struct page, mapping) == 3 * sizeof(unsigned long));
static_assert(offsetof(struct page, __folio_index) == 4 * sizeof(unsigned long));
static_assert(offsetof(struct page, private) == 5 * sizeof(unsigned long));

unsigned int zdm_folio_order(struct page *page)
{
	return folio_order(page_folio(page));
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

bool zdm_folio_try_get(struct page *page)
{
	return folio_try_get(page_folio(page));
}

void zdm_folio_put(struct page *page)
{
	folio_put(page_folio(page));
}

int zdm_folio_lock_killable(struct page *page)
{
	return folio_lock_killable(page_folio(page));
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
 * On x86 copy_mc_highpage() is a memcpy(), which is slower than to copy a page. What recovers
 * from broken memory has ERMS.
 */
static int copy_mc(struct page *to, struct page *from)
{
#ifdef CONFIG_X86
	if (!boot_cpu_has(X86_FEATURE_ERMS)) {
		copy_highpage(to, from);
		return 0;
	}
#endif
	return copy_mc_highpage(to, from);
}

/*
 * A page that cannot be reached is not read at all: copy_mc_highpage() would report it as
 * a failure of the memory. Anonymous memory is never taken out of the direct map.
 */
int zdm_copy_mc_highpage(struct page *to, struct page *from)
{
	if (PageAnon(from) ? PageHWPoison(from) : !zdm_page_is_reachable(from))
		return -EFAULT;
	return copy_mc(to, from);
}

/* From memory of a device, or what emulates it, which stays in the direct map. */
int zdm_copy_device_page(struct page *to, struct page *from)
{
	if (PageHWPoison(from))
		return -EFAULT;
	return copy_mc(to, from);
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

unsigned long zdm_alloc_pages_bulk(gfp_t gfp, int n, struct page **pages)
{
	return alloc_pages_bulk(gfp, n, pages);
}

/* Whether a memory policy says where the current task, or @vma if there is one, has its memory. */
bool zdm_has_mempolicy(const struct vm_area_struct *vma)
{
#ifdef CONFIG_NUMA
	return current->mempolicy || (vma && (vma->vm_policy || vma->vm_ops));
#else
	return false;
#endif
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

/*
 * Flags of a pagemap whose pages are to be migrated. A kernel without PGMAP_MIGRATABLE migrates no
 * GENERIC pages.
 */
unsigned int zdm_pgmap_migratable_flags(enum memory_type type)
{
#ifdef PGMAP_MIGRATABLE
	return type == MEMORY_DEVICE_GENERIC ? PGMAP_MIGRATABLE : 0;
#else
	return 0;
#endif
}

void zdm_mmu_interval_set_seq(struct mmu_interval_notifier *sub, unsigned long seq)
{
	mmu_interval_set_seq(sub, seq);
}

unsigned long zdm_mmu_interval_seq(struct mmu_interval_notifier *sub)
{
	return READ_ONCE(sub->invalidate_seq);
}

bool zdm_mmu_interval_read_retry(struct mmu_interval_notifier *sub, unsigned long seq)
{
	return mmu_interval_read_retry(sub, seq);
}

bool zdm_fatal_signal_pending(void)
{
	return fatal_signal_pending(current);
}

void zdm_pagefault_disable(void)
{
	pagefault_disable();
}

void zdm_pagefault_enable(void)
{
	pagefault_enable();
}

bool zdm_pagefault_disabled(void)
{
	return pagefault_disabled();
}

int zdm_mmap_read_lock_killable(struct mm_struct *mm)
{
	return mmap_read_lock_killable(mm);
}

int zdm_mmap_write_lock_killable(struct mm_struct *mm)
{
	return mmap_write_lock_killable(mm);
}

void zdm_mmap_write_unlock(struct mm_struct *mm)
{
	mmap_write_unlock(mm);
}

bool zdm_mm_has_notifiers(struct mm_struct *mm)
{
	return mm_has_notifiers(mm);
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

/* Without preemption in the kernel this is synchronize_rcu(), which is enough then. */
void zdm_wait_for_preempted(void)
{
	synchronize_rcu_tasks();
}

unsigned long zdm_task_size(void)
{
	return TASK_SIZE_MAX;
}

bool zdm_vma_is_anonymous(struct vm_area_struct *vma)
{
	return vma_is_anonymous(vma);
}

bool zdm_userfaultfd_armed(struct vm_area_struct *vma)
{
	return userfaultfd_armed(vma);
}

/* Whether userfaultfd may protect pages of zeroes in @vma, small and huge. */
bool zdm_may_protect(const struct vm_area_struct *vma)
{
	vm_flags_t flags = VM_UFFD_WP;

#ifdef UFFDIO_REGISTER_MODE_RWP
	flags |= VM_UFFD_RWP;
#endif
	return vma->vm_flags & flags;
}

/* Whether userfaultfd may keep the process from reading pages of @vma. */
bool zdm_may_hide(const struct vm_area_struct *vma)
{
#ifdef UFFDIO_REGISTER_MODE_RWP
	return vma->vm_flags & VM_UFFD_RWP;
#else
	return false;
#endif
}
