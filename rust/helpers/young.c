// SPDX-License-Identifier: GPL-2.0
/*
 * A loop over page table entries that is in C on purpose. What reads an entry is inline and differs
 * between architectures, so that from Rust it would be a call per entry. On x86-64 the loop has 11
 * instructions per entry, and with a call per entry 17 (gcc 14, -O2). It runs over up to 512
 * entries for a CPU fault that brings back more than one page.
 */
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/pgtable.h>

#include "helpers.h"

/*
 * Of the pages from @start to @end, all below one PMD, how many the CPU has accessed since they
 * were mapped. A look without locks, as get_user_pages_fast() takes it: with interrupts off no
 * page table is freed.
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
