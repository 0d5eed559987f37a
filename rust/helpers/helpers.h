/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Forwarders to C inlines and macros for rust/kernel/mm, one per line of C. They are
 * not exported, and their prefix is unique, so that no other module can clash.
 */
#ifndef ZDM_HELPERS_H
#define ZDM_HELPERS_H

#include <linux/mm.h>
#include <linux/memremap.h>
#include <linux/mmu_notifier.h>

struct page *zdm_pfn_to_page(unsigned long pfn);
unsigned long zdm_page_to_pfn(const struct page *page);
int zdm_page_ref_count(const struct page *page);
void zdm_set_page_count(struct page *page, int count);
int zdm_folio_mapcount(struct page *page);
unsigned int zdm_folio_order(struct page *page);
bool zdm_folio_locked(struct page *page);
bool zdm_folio_lru(struct page *page);
bool zdm_page_anon_exclusive(struct page *page);
unsigned long zdm_folio_mapping(struct page *page);
unsigned long zdm_folio_memcg(struct page *page);
struct dev_pagemap *zdm_page_pgmap(struct page *page);
bool zdm_is_device_private_page(const struct page *page);
void *zdm_zone_device_data(const struct page *page);
void zdm_set_zone_device_data(struct page *page, void *data);
bool zdm_folio_try_get(struct page *page);
void zdm_folio_put(struct page *page);
void zdm_folio_lock(struct page *page);
void zdm_folio_unlock(struct page *page);
void zdm_copy_highpage(struct page *to, struct page *from);
void zdm_clear_highpage(struct page *page);
struct page *zdm_alloc_page(gfp_t gfp);
struct page *zdm_alloc_page_vma(gfp_t gfp, struct vm_area_struct *vma, unsigned long addr);
void zdm_release_mem_region(resource_size_t start, resource_size_t n);

void zdm_mmu_interval_set_seq(struct mmu_interval_notifier *sub, unsigned long seq);
bool zdm_mmu_interval_read_retry(struct mmu_interval_notifier *sub, unsigned long seq);
bool zdm_mmu_notifier_range_blockable(const struct mmu_notifier_range *range);
bool zdm_fatal_signal_pending(void);
unsigned long zdm_jiffies_after_ms(unsigned int ms);
bool zdm_jiffies_passed(unsigned long deadline);
void zdm_cond_resched(void);
unsigned long zdm_task_size(void);

bool zdm_is_device_coherent_page(const struct page *page);
bool zdm_is_zero_page(const struct page *page);
void *zdm_page_pgmap_owner(const struct page *page);
struct page *zdm_folio_page(struct page *page, unsigned long n);
unsigned int zdm_hmm_pfn_order(unsigned long entry);
void zdm_mark_dirty(struct page *page);
int zdm_page_to_user_nofault(void *to, struct page *page);
int zdm_page_from_user_nofault(struct page *page, const void *from);

void zdm_module_get(void);
void zdm_module_put(void);
const char *zdm_param_audit(void);

int zdm_kunit_attach_mm(void);
unsigned long zdm_kunit_mmap_anon(unsigned long len);

#endif /* ZDM_HELPERS_H */
