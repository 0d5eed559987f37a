/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Forwarders to C inlines and macros for rust/kernel/mm, one per line of C. They are
 * not exported, and their prefix is unique, so that no other module can clash.
 */
#ifndef ZDM_HELPERS_H
#define ZDM_HELPERS_H

#include <linux/debugfs.h>
#include <linux/mm.h>
#include <linux/memremap.h>
#include <linux/mmu_notifier.h>
#include <linux/workqueue.h>

struct hmm_range;
struct user_struct;

/* Kinds of lines that zdm_may_log() limits. */
#define ZDM_LOG_TOPICS		3

/* What zdm_look_up() finds: kinds of entries, of which those from PRESENT on map a page. */
#define ZDM_ENTRY_NONE		0
#define ZDM_ENTRY_OTHER		1	/* swap, markers, poison */
#define ZDM_ENTRY_MIGRATION	2
#define ZDM_ENTRY_PRESENT	3
#define ZDM_ENTRY_PROTNONE	4
#define ZDM_ENTRY_PRIVATE	5
#define ZDM_ENTRY_EXCLUSIVE	6

struct zdm_entry {
	unsigned long pfn;
	unsigned int kind;
	unsigned int order;
	bool write;
	bool soft_dirty;
	bool uffd;
	bool exclusive;	/* PageAnonExclusive() */
	bool zero;	/* the page of zeroes, which has no owner */
	bool young;
	bool dirty;	/* the entry or the page, which is anonymous, or swap has the contents */
	bool large;	/* a page of a large folio */
	bool marks_new;	/* what fills a hole is soft-dirty, and keeps what protects the zero page */
	bool clean;	/* the CPU may write, which marks the entry dirty; a device may not yet */
};

struct page *zdm_pfn_to_page(unsigned long pfn);
unsigned long zdm_page_to_pfn(const struct page *page);
unsigned int zdm_folio_order(struct page *page);
bool zdm_folio_is_uncharged(struct page *page);
bool zdm_folio_is_ksm(struct page *page);
struct page *zdm_compound_head(struct page *page);
bool zdm_pgmap_tryget_live(struct dev_pagemap *pgmap);
void zdm_pgmap_put(struct dev_pagemap *pgmap);
void zdm_folio_init(struct page *page, struct dev_pagemap *pgmap, unsigned int order);
void zdm_folio_inherit(struct folio *tail, struct folio *head);
bool zdm_folio_try_get(struct page *page);
void zdm_folio_put(struct page *page);
int zdm_folio_lock_killable(struct page *page);
void zdm_folio_unlock(struct page *page);
bool zdm_page_is_reachable(struct page *page);
int zdm_copy_mc_highpage(struct page *to, struct page *from);
int zdm_copy_device_page(struct page *to, struct page *from);
void zdm_clear_highpage(struct page *page);
bool zdm_dma_mapping_error(struct device *dev, dma_addr_t address);
struct page *zdm_alloc_pages(gfp_t gfp, unsigned int order);
struct page *zdm_alloc_folio(gfp_t gfp, unsigned int order);
unsigned long zdm_alloc_pages_bulk(gfp_t gfp, int n, struct page **pages);
bool zdm_has_mempolicy(const struct vm_area_struct *vma);
struct page *zdm_alloc_folio_vma(gfp_t gfp, unsigned int order, struct vm_area_struct *vma,
				 unsigned long addr);
bool zdm_request_mem_region(resource_size_t start, resource_size_t n, const char *name);
void zdm_release_mem_region(resource_size_t start, resource_size_t n);
unsigned long long zdm_max_phys(void);
bool zdm_is_system_ram(resource_size_t start, size_t n);
bool zdm_thp_migration_supported(void);
unsigned long zdm_migrate_select_generic(void);
unsigned int zdm_pgmap_migratable_flags(enum memory_type type);

void zdm_mmu_interval_set_seq(struct mmu_interval_notifier *sub, unsigned long seq);
unsigned long zdm_mmu_interval_seq(struct mmu_interval_notifier *sub);
bool zdm_mmu_interval_read_retry(struct mmu_interval_notifier *sub, unsigned long seq);
bool zdm_fatal_signal_pending(void);
void zdm_pagefault_disable(void);
void zdm_pagefault_enable(void);
bool zdm_pagefault_disabled(void);
int zdm_mmap_read_lock_killable(struct mm_struct *mm);
int zdm_mmap_write_lock_killable(struct mm_struct *mm);
void zdm_mmap_write_unlock(struct mm_struct *mm);
bool zdm_mm_has_notifiers(struct mm_struct *mm);
bool zdm_vma_is_anonymous(struct vm_area_struct *vma);
bool zdm_userfaultfd_armed(struct vm_area_struct *vma);
unsigned long zdm_jiffies_after_ms(unsigned int ms);
bool zdm_jiffies_passed(unsigned long deadline);
void zdm_cond_resched(void);
void zdm_wait_for_preempted(void);
unsigned long zdm_accessed_pages(struct vm_area_struct *vma, unsigned long start,
				 unsigned long end);
unsigned long zdm_task_size(void);
struct user_struct *zdm_get_current_user(void);
void zdm_put_user(struct user_struct *user);
atomic_long_t *zdm_user_locked_vm(struct user_struct *user);
unsigned long zdm_memlock_limit(void);

int zdm_range_fault_unlocked(struct hmm_range *range, unsigned long timeout);
bool zdm_is_zero_page(const struct page *page);
struct page *zdm_zero_page(void);
struct page *zdm_folio_page(struct page *page, unsigned long n);
void zdm_mark_dirty(struct page *page);
int zdm_read_page(void *to, struct page *page);
int zdm_write_page(struct page *page, const void *from);
int zdm_page_to_user_nofault(void *to, struct page *page);
int zdm_page_from_user_nofault(struct page *page, const void *from);

bool zdm_pfn_valid(unsigned long pfn);
unsigned int zdm_large_order(const struct page *head);
int zdm_large_mapcount(const struct page *head);
int zdm_large_pins(const struct page *head);
bool zdm_folio_is_rmappable(const struct page *head);
bool zdm_folio_is_hugetlb(const struct page *head);

unsigned long zdm_pgmap_counts(struct dev_pagemap *pgmap);
unsigned long zdm_pgmap_cpu_count(unsigned long counts, unsigned int cpu);
unsigned long zdm_pgmap_count(struct dev_pagemap *pgmap);
unsigned int zdm_next_possible_cpu(int cpu);
void zdm_irq_disable(void);
void zdm_irq_enable(void);
u64 zdm_log_clock(void);
bool zdm_may_log(unsigned int topic);
unsigned int zdm_stack(unsigned long *entries, unsigned int room, unsigned int skip);
int zdm_symbol(char *buf, size_t size, unsigned long address);
void zdm_set_page_mapping(struct page *page, unsigned long mapping);
void zdm_set_anon_exclusive(struct page *page, bool set);
void zdm_flip_bit(struct page *page);

struct dentry *zdm_debugfs_create_dir(const char *name, struct dentry *parent);
struct dentry *zdm_debugfs_create_file(const char *name, umode_t mode, struct dentry *parent,
				       void *data, const struct debugfs_short_fops *fops);
void zdm_debugfs_remove(struct dentry *dentry);

bool zdm_module_try_get(struct module *module);
bool zdm_module_is_live(struct module *module);
int zdm_module_refs(struct module *module);
void zdm_module_put(struct module *module);
bool zdm_module_owns(struct module *module, unsigned long address);
bool zdm_own_file(void);
void zdm_disown_file(void);
void zdm_give_file(struct file *file);
void zdm_work_init(struct delayed_work *work, work_func_t func);
bool zdm_work_queue(struct delayed_work *work, unsigned int ms);
const char *zdm_param_audit(void);
bool zdm_param_inject(void);
bool zdm_param_ledger(void);
int zdm_migrate_device_max_order(enum memory_type type);

struct device *zdm_kunit_device_register(void);
void zdm_kunit_device_unregister(struct device *dev);
bool zdm_kunit_running(void);
int zdm_kunit_attach_mm(void);
unsigned long zdm_kunit_mmap(unsigned long len, bool shared);
void zdm_kunit_add_module_refs(struct module *module, int n);
void zdm_kunit_set_module_live(struct module *module, bool live);
void zdm_kunit_set_killed(bool killed);
void zdm_kunit_set_poisoned(struct page *page, bool poisoned);

int zdm_whole_entire_mapcount(const struct page *head);
int zdm_whole_pincount(const struct page *head);
int zdm_whole_large_mapcount(const struct page *head);
int zdm_whole_pages_mapped(const struct page *head);
unsigned long zdm_whole_nr_pages(const struct page *head);
bool zdm_whole_is_deferred(const struct page *head);
void zdm_look_up(struct mm_struct *mm, unsigned long addr, struct zdm_entry *out);
bool zdm_is_alone(struct mm_struct *mm);
unsigned long zdm_area_flags(struct mm_struct *mm, unsigned long addr);
int zdm_count_entries(struct page *head);
bool zdm_is_misplaced(struct mm_struct *mm, unsigned long addr);
unsigned long zdm_faults(void);
unsigned long zdm_scanned(void);
bool zdm_page_is_empty(struct page *page);
bool zdm_may_protect(const struct vm_area_struct *vma);
bool zdm_may_hide(const struct vm_area_struct *vma);
extern bool zdm_strict;

#endif /* ZDM_HELPERS_H */
