// SPDX-License-Identifier: GPL-2.0
/*
 * Page table entries, for the oracle: the entry that maps an address, and the number of entries
 * that map a folio. walk_page_range(), folio_walk_start() and rmap_walk() are not exported, and the
 * oracle is to find what these get wrong. Nothing is changed, and no lock is taken but, for
 * the second, that of the anon_vma.
 *
 * These walks are in C on purpose. Whatever finds and reads an entry is a macro or inline, and
 * differs between architectures. From Rust each would be a call: 27 for an entry that is present,
 * where this has one, and strict mode looks at each page of a range twice.
 */
#include <linux/highmem.h>
#include <linux/leafops.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/pagemap.h>
#include <linux/pgtable.h>
#include <linux/rcupdate.h>
#include <linux/rmap.h>
#include <linux/sched.h>
#include <linux/uaccess.h>
#include <linux/userfaultfd_k.h>
#include <linux/vmstat.h>

#include "helpers.h"

/* The bit got another use, and another name, in Linux 7.3. */
#ifndef UFFDIO_REGISTER_MODE_RWP
#define pte_uffd	pte_uffd_wp
#define pte_swp_uffd	pte_swp_uffd_wp
#define pmd_uffd	pmd_uffd_wp
#define pmd_swp_uffd	pmd_swp_uffd_wp
/* Since then anonymous pages of a private file mapping have an index of their own. */
#define vma_start_anon_pgoff(vma)	((vma)->vm_pgoff)
#endif

/* With the series for 7.3 a fault makes an entry dirty before a device may write. */
#if defined(UFFDIO_REGISTER_MODE_RWP) && defined(MIGRATE_VMA_SELECT_DEVICE_GENERIC)
#define ZDM_HAS_SERIES	true
#else
#define ZDM_HAS_SERIES	false
#endif

/*
 * Another task may have freed the page that an entry has, and used it again, as the tail of a large
 * folio, too. So its flags are read without the checks of folio_test_*(), which are a BUG then with
 * CONFIG_DEBUG_VM_PGFLAGS.
 */
static void of_page(struct zdm_entry *out)
{
	const struct folio *folio;
	const struct page *page;
	unsigned long flags;

	if (!pfn_valid(out->pfn))
		return;
	page = pfn_to_page(out->pfn);
	folio = page_folio(page);
	flags = READ_ONCE(folio->flags.f);
	out->large = flags & BIT(PG_head);
	if (flags & BIT(PG_dirty))
		out->clean = false;
	if (!folio_test_anon(folio)) {
		/* Writeback cleans what a file backs at any time. */
		out->dirty = false;
		return;
	}
	out->exclusive = test_bit(PG_anon_exclusive, &page->flags.f);
	/* Reclaim does not drop what is dirty, or in the swap cache. */
	if (flags & BIT(PG_dirty) || (flags & BIT(PG_swapbacked) && flags & BIT(PG_swapcache)))
		out->dirty = true;
}

static void of_leaf(softleaf_t entry, struct zdm_entry *out)
{
	if (softleaf_is_device_private(entry)) {
		out->kind = ZDM_ENTRY_PRIVATE;
		out->write = softleaf_is_device_private_write(entry);
	} else if (softleaf_is_device_exclusive(entry)) {
		out->kind = ZDM_ENTRY_EXCLUSIVE;
		out->write = true;
	} else if (softleaf_is_migration(entry)) {
		out->kind = ZDM_ENTRY_MIGRATION;
	} else {
		out->kind = ZDM_ENTRY_OTHER;
		return;
	}
	out->pfn = softleaf_to_pfn(entry);
	of_page(out);
}

static void of_pte(pte_t pte, struct zdm_entry *out)
{
	out->order = 0;
	if (pte_none(pte))
		return;
	if (!pte_present(pte)) {
		out->soft_dirty = pte_swp_soft_dirty(pte);
		out->uffd = pte_swp_uffd(pte);
		of_leaf(softleaf_from_pte(pte), out);
		return;
	}
	out->kind = pte_protnone(pte) ? ZDM_ENTRY_PROTNONE : ZDM_ENTRY_PRESENT;
	out->pfn = pte_pfn(pte);
	out->write = pte_write(pte);
	out->soft_dirty = pte_soft_dirty(pte);
	out->uffd = pte_uffd(pte);
	out->young = pte_young(pte);
	out->dirty = pte_dirty(pte);
	out->clean = ZDM_HAS_SERIES && out->write && !out->dirty;
	out->zero = is_zero_pfn(out->pfn);
	of_page(out);
}

static void of_pmd(pmd_t pmd, struct zdm_entry *out)
{
	out->order = PMD_ORDER;
	if (pmd_none(pmd))
		return;
	if (!pmd_present(pmd)) {
		out->soft_dirty = pmd_swp_soft_dirty(pmd);
		out->uffd = pmd_swp_uffd(pmd);
		of_leaf(softleaf_from_pmd(pmd), out);
		return;
	}
	out->kind = pmd_protnone(pmd) ? ZDM_ENTRY_PROTNONE : ZDM_ENTRY_PRESENT;
	out->pfn = pmd_pfn(pmd);
	out->write = pmd_write(pmd);
	out->soft_dirty = pmd_soft_dirty(pmd);
	out->uffd = pmd_uffd(pmd);
	out->young = pmd_young(pmd);
	out->dirty = pmd_dirty(pmd);
	out->clean = ZDM_HAS_SERIES && out->write && !out->dirty;
	of_page(out);
}

/*
 * The entry that maps @addr in @mm, with the number of its first page frame. The caller keeps
 * page tables from being freed for good, by the mmap lock or that of an anon_vma that has the
 * area; RCU keeps those that khugepaged frees. An entry is one word, which is read once: no
 * lock of a page table makes it truer by the time that the caller looks at it.
 */
static void look_up(struct mm_struct *mm, unsigned long addr, struct zdm_entry *out)
{
	pgd_t *pgd;
	p4d_t *p4d;
	pud_t *pud;
	pmd_t *pmd, now;
	pte_t *table;

	memset(out, 0, sizeof(*out));
	out->order = PMD_ORDER;
	out->marks_new = ZDM_HAS_SERIES && IS_ENABLED(CONFIG_MEM_SOFT_DIRTY);
	pgd = pgd_offset(mm, addr);
	if (pgd_none(*pgd))
		return;
	p4d = p4d_offset(pgd, addr);
	if (p4d_none(*p4d))
		return;
	pud = pud_offset(p4d, addr);
	if (pud_none(*pud) || !pud_present(*pud))
		return;
	if (pud_leaf(*pud)) {
		out->kind = ZDM_ENTRY_PRESENT;
		out->order = PUD_ORDER;
		out->pfn = pud_pfn(*pud);
		out->write = pud_write(*pud);
		return;
	}
	pmd = pmd_offset(pud, addr);
	now = pmdp_get_lockless(pmd);
	if (pmd_none(now) || !pmd_present(now) || pmd_leaf(now)) {
		of_pmd(now, out);
		return;
	}
	if (pmd_bad(now))
		return;
	table = (pte_t *)pmd_page_vaddr(now);
	of_pte(ptep_get(table + pte_index(addr)), out);
}

/*
 * For a caller that holds the mmap lock. What was read of the page belongs to the entry only if
 * the entry is the same afterwards: a migration by another process clears PageAnonExclusive()
 * when the entry is gone.
 */
void zdm_look_up(struct mm_struct *mm, unsigned long addr, struct zdm_entry *out)
{
	struct zdm_entry first;
	int tries = 8;

	mmap_assert_locked(mm);
	rcu_read_lock();
	look_up(mm, addr, out);
	do {
		first = *out;
		look_up(mm, addr, out);
	} while (memcmp(&first, out, sizeof(first)) && --tries);
	rcu_read_unlock();
}

/* Faults that the task has taken, on its own account or for a device. */
unsigned long zdm_faults(void)
{
	return current->min_flt + current->maj_flt;
}

/* Anonymous pages that reclaim has looked at, since the system started. */
unsigned long zdm_scanned(void)
{
	unsigned long events[NR_VM_EVENT_ITEMS] = {};

	all_vm_events(events);
	return events[PGSCAN_ANON];
}

/* Whether @page, which has a struct page and contents, holds zeroes only. */
bool zdm_page_is_empty(struct page *page)
{
	void *contents = kmap_local_page(page);
	bool is_empty = !memchr_inv(contents, 0, PAGE_SIZE);

	kunmap_local(contents);
	return is_empty;
}

/*
 * Whether the current task is the only user of @mm: of the two references, one is the task's, the
 * other the caller's.
 */
bool zdm_is_alone(struct mm_struct *mm)
{
	return current->mm == mm && atomic_read(&mm->mm_users) == 2;
}

/* Flags of the area that maps @addr, 0 if there is none. */
unsigned long zdm_area_flags(struct mm_struct *mm, unsigned long addr)
{
	struct vm_area_struct *vma = find_vma(mm, addr);

	return vma && vma->vm_start <= addr ? vma->vm_flags : 0;
}

/* Entries of @vma for the @n pages of a folio from index @pgoff on that map one of them. */
static unsigned int entries_of(struct vm_area_struct *vma, unsigned long pfn, unsigned long n,
			       unsigned long pgoff)
{
	unsigned long start = vma_start_anon_pgoff(vma);
	unsigned long end = start + vma_pages(vma);
	unsigned long first = max(pgoff, start);
	unsigned long last = min(pgoff + n, end);
	struct zdm_entry entry;
	unsigned int found = 0;
	unsigned long addr, at;

	while (first < last) {
		addr = vma->vm_start + ((first - start) << PAGE_SHIFT);
		look_up(vma->vm_mm, addr, &entry);
		/* The page frame that this place must have. */
		at = pfn + (first - pgoff);
		if (entry.order)
			at -= (addr >> PAGE_SHIFT) & ((1UL << entry.order) - 1);
		if (entry.kind >= ZDM_ENTRY_PRESENT && entry.pfn == at)
			found++;
		first += (1UL << entry.order) - ((addr >> PAGE_SHIFT) & ((1UL << entry.order) - 1));
	}
	return found;
}

/* folio_mapped() and folio_nr_pages() of a folio in any state, as in of_page(). */
static bool is_mapped(const struct folio *folio)
{
	/* The type of a page without mappings is negative, too. */
	if (test_bit(PG_head, &folio->flags.f))
		return atomic_read(&folio->_large_mapcount) >= 0;
	return atomic_read(&folio->_mapcount) >= 0;
}

static unsigned long nr_pages(const struct folio *folio)
{
	return test_bit(PG_head, &folio->flags.f) ? folio_large_nr_pages(folio) : 1;
}

/*
 * Page table entries that map the anonymous folio of @head where its index says that they are,
 * in any address space: what folio_mapcount() must be. -EAGAIN where another task changes it,
 * -EOPNOTSUPP where it is not anonymous, or merged by KSM, which keeps its own lists.
 */
int zdm_count_entries(struct page *head)
{
	struct folio *folio = (struct folio *)head;
	struct anon_vma *anon_vma, *root;
	unsigned long mapping;
	struct rb_node *node;
	int found = 0;

	/* As in folio_lock_anon_vma_read(): SLAB_TYPESAFE_BY_RCU, and mapped once it is locked. */
	rcu_read_lock();
	mapping = (unsigned long)READ_ONCE(folio->mapping);
	if ((mapping & FOLIO_MAPPING_FLAGS) != FOLIO_MAPPING_ANON) {
		rcu_read_unlock();
		return -EOPNOTSUPP;
	}
	/*
	 * In a tail the words are others. The mapping of a folio that is not mapped may be stale,
	 * its anon_vma freed.
	 */
	if (compound_head(head) != head || !is_mapped(folio)) {
		rcu_read_unlock();
		return -EAGAIN;
	}
	/*
	 * An earlier user of the page may have left the mapping that was read above. The one
	 * that is there after the folio was mapped is that of the folio, so that it was alive in
	 * this RCU section. The barrier orders the two looks.
	 */
	smp_rmb();
	if ((unsigned long)READ_ONCE(folio->mapping) != mapping || compound_head(head) != head) {
		rcu_read_unlock();
		return -EAGAIN;
	}
	anon_vma = (struct anon_vma *)(mapping - FOLIO_MAPPING_ANON);
	root = READ_ONCE(anon_vma->root);
	if (!down_read_trylock(&root->rwsem)) {
		rcu_read_unlock();
		return -EAGAIN;
	}
	if (!is_mapped(folio) || (unsigned long)READ_ONCE(folio->mapping) != mapping) {
		found = -EAGAIN;
		goto out;
	}
	for (node = rb_first_cached(&anon_vma->rb_root); node; node = rb_next(node)) {
		struct anon_vma_chain *avc = rb_entry(node, struct anon_vma_chain, rb);

		found += entries_of(avc->vma, folio_pfn(folio), nr_pages(folio),
				    folio->index);
	}
out:
	up_read(&root->rwsem);
	rcu_read_unlock();
	return found;
}

/*
 * Whether the folio that the entry of @addr has says that it is elsewhere: in another file, another
 * anon_vma, or at another index. rmap would not find this entry then, and a report of a broken
 * page would name another place. For a caller that holds the mmap lock. UFFDIO_MOVE, migration and
 * truncation change both in two steps, so that one look proves nothing.
 */
bool zdm_is_misplaced(struct mm_struct *mm, unsigned long addr)
{
	struct vm_area_struct *vma = find_vma(mm, addr);
	struct zdm_entry entry, again;
	const struct folio *folio;
	const struct page *page;
	unsigned long mapping, kind, pfn;
	bool is_misplaced = false;
	pgoff_t index;

	mmap_assert_locked(mm);
	if (!vma || vma->vm_start > addr || is_vm_hugetlb_page(vma))
		return false;
	rcu_read_lock();
	look_up(mm, addr, &entry);
	pfn = entry.pfn + ((addr >> PAGE_SHIFT) & ((1UL << entry.order) - 1));
	if (entry.kind < ZDM_ENTRY_PRESENT || !pfn_valid(pfn))
		goto out;
	page = pfn_to_page(pfn);
	folio = page_folio(page);
	mapping = (unsigned long)READ_ONCE(folio->mapping);
	index = READ_ONCE(folio->index) + (pfn - folio_pfn(folio));
	kind = mapping & FOLIO_MAPPING_FLAGS;
	if (kind == FOLIO_MAPPING_ANON) {
		const struct anon_vma *anon_vma = (void *)(mapping - kind);
		const struct anon_vma *own = READ_ONCE(vma->anon_vma);
		pgoff_t start = vma_start_anon_pgoff(vma);
		struct anon_vma *root;

		/*
		 * A freed anon_vma can still be read, as in zdm_count_entries(). But the page may
		 * have got another use since its entry was read, and the word be no mapping.
		 */
		if (get_kernel_nofault(root, &anon_vma->root))
			goto out;
		is_misplaced = !own || root != READ_ONCE(own->root) ||
			       index != start + ((addr - vma->vm_start) >> PAGE_SHIFT);
	} else if (mapping && !kind) {
		is_misplaced = !vma->vm_file ||
			       vma->vm_file->f_mapping != (struct address_space *)mapping ||
			       index != linear_page_index(vma, addr);
	}
	/* Neither a page without a mapping, such as a driver's, nor one of KSM names a place. */
	look_up(mm, addr, &again);
	if (again.kind != entry.kind || again.pfn != entry.pfn || again.order != entry.order)
		is_misplaced = false;
out:
	rcu_read_unlock();
	return is_misplaced;
}
