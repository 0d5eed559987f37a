// SPDX-License-Identifier: GPL-2.0
/* Forwarders for what a device does with the pages that it found mapped. */
#include <linux/highmem.h>
#include <linux/hmm.h>
#include <linux/memremap.h>
#include <linux/pagemap.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include <test_hmm_uapi.h>

#include "helpers.h"

bool zdm_is_zero_page(const struct page *page)
{
	return is_zero_pfn(page_to_pfn(page));
}

#ifdef __HAVE_COLOR_ZERO_PAGE
#error "there is more than one page of zeroes"
#endif

struct page *zdm_zero_page(void)
{
	return ZERO_PAGE(0);
}

struct page *zdm_folio_page(struct page *page, unsigned long n)
{
	return folio_page(page_folio(page), n);
}

/* The function and the command that tests it came together, in Linux 7.3. */
int zdm_range_fault_unlocked(struct hmm_range *range, unsigned long timeout)
{
#ifdef HMM_DMIRROR_READ_UNLOCKED
	return hmm_range_fault_unlocked_timeout(range, timeout);
#else
	return -EOPNOTSUPP;
#endif
}

/* What backs PRIVATE memory is no part of an address space, and stays clean. */
void zdm_mark_dirty(struct page *page)
{
	if (page_folio(page)->mapping)
		folio_mark_dirty(page_folio(page));
}

/*
 * Copies between a page that a device maps and a buffer. copy_mc_to_kernel() survives a
 * page that breaks meanwhile, where the machine can.
 */
int zdm_read_page(void *to, struct page *page)
{
	void *from = kmap_local_page(page);
	unsigned long left = PAGE_SIZE;

	if (zdm_page_is_reachable(page))
		left = copy_mc_to_kernel(to, from, PAGE_SIZE);
	kunmap_local(from);
	return left ? -EFAULT : 0;
}

int zdm_write_page(struct page *page, const void *from)
{
	void *to = kmap_local_page(page);
	unsigned long left = PAGE_SIZE;

	if (zdm_page_is_reachable(page))
		left = copy_mc_to_kernel(to, from, PAGE_SIZE);
	flush_dcache_page(page);
	kunmap_local(to);
	return left ? -EFAULT : 0;
}

/* What copy_mc_to_user() does, which is not exported. */
int zdm_page_to_user_nofault(void *to, struct page *page)
{
	void *from = kmap_local_page(page);
	struct iov_iter iter;
	size_t copied;

	iov_iter_ubuf(&iter, ITER_DEST, (void __user *)to, PAGE_SIZE);
	pagefault_disable();
	copied = PageHWPoison(page) ? 0 : _copy_mc_to_iter(from, PAGE_SIZE, &iter);
	pagefault_enable();
	kunmap_local(from);
	return copied == PAGE_SIZE ? 0 : -EFAULT;
}

int zdm_page_from_user_nofault(struct page *page, const void *from)
{
	void *to = kmap_local_page(page);
	int ret = -EFAULT;

	if (!PageHWPoison(page))
		ret = copy_from_user_nofault(to, (const void __user *)from, PAGE_SIZE);
	kunmap_local(to);
	return ret;
}
