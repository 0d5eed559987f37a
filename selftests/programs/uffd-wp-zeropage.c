// SPDX-License-Identifier: GPL-2.0
/*
 * A zero page that userfaultfd protects against writing goes to the device: a write must still be
 * asked for.
 */
#include "program.h"
#include <linux/userfaultfd.h>
#include <sys/syscall.h>

/* Bit 57 of pagemap: protected by userfaultfd. */
static int is_protected(void *p)
{
	__u64 entry = 0;
	int f = open("/proc/self/pagemap", O_RDONLY);

	if (pread(f, &entry, sizeof(entry), (uintptr_t)p / PAGE * sizeof(entry)) != sizeof(entry))
		FAIL("pagemap: %s", strerror(errno));
	close(f);
	return entry >> 57 & 1;
}

static void try(const char *node, int huge)
{
	long len = huge ? HUGE_PAGE : 16 * PAGE;
	char *p = map(huge, len, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	char *out = malloc(len);
	int u = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK), fd = open(node, O_RDWR);
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP };
	struct uffdio_range range = { (uintptr_t)p, len };
	struct uffdio_register reg = { .range = range, .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	struct cmd c;

	for (long i = 0; i < len; i += PAGE)
		(void)*(volatile char *)(p + i);
	if (u < 0 || ioctl(u, UFFDIO_API, &api) || ioctl(u, UFFDIO_REGISTER, &reg) ||
	    ioctl(u, UFFDIO_WRITEPROTECT, &wp))
		SKIP("userfaultfd: %s", strerror(errno));
	if (fd < 0)
		SKIP("%s: %s", node, strerror(errno));
	if (!is_protected(p + PAGE))
		FAIL("not protected to begin with");
	if (hmm(fd, TO_DEV, p, out, len / PAGE, &c) && errno == EOPNOTSUPP)
		SKIP("MIGRATE_TO_DEV: %s", strerror(errno));
	if (!is_protected(p + PAGE))
		FAIL("%s page: no protection after MIGRATE_TO_DEV", huge ? "huge" : "small");
	close(u);
	close(fd);
	munmap(p, len);
	free(out);
}

int main(int argc, char **argv)
{
	const char *node = argc > 1 ? argv[1] : "/dev/hmm_dmirror0";

	try(node, 0);
	try(node, 1);
	puts("PASS");
	return 0;
}
