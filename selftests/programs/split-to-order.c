// SPDX-License-Identifier: GPL-2.0
/*
 * A mapped COHERENT or GENERIC huge page is split to folios of an order through debugfs
 * split_huge_pages; then it is migrated back, zapped, unmapped, evicted, or released. Either the
 * split is refused, or everything goes on with the data kept. Arguments: the node, the order.
 */
#include "program.h"
#include <sys/klog.h>

/* Bad page, oops, WARN, soft lockup. */
static long taint(void)
{
	long t = 0;
	FILE *f = fopen("/proc/sys/kernel/tainted", "r");

	if (!f || fscanf(f, "%ld", &t) != 1)
		FAIL("tainted");
	fclose(f);
	return t & (1 << 5 | 1 << 7 | 1 << 9 | 1 << 14);
}

static int violations(void)
{
	static char log[1 << 20];
	int n = klogctl(3, log, sizeof(log) - 1), found = 0;

	log[n < 0 ? 0 : n] = 0;
	for (char *s = log; (s = strstr(s, "violation")); s++)
		found++;
	return found;
}

static void fill(char *p, long len)
{
	for (long i = 0; i < len; i += PAGE)
		memset(p + i, i / PAGE, PAGE);
}

static void check(char *p, const char *when)
{
	for (long i = 0; i < HUGE_PAGE; i += PAGE) {
		char expected = i / PAGE;

		if (p[i] != expected || p[i + PAGE - 1] != expected)
			FAIL("%s: page %ld has %d", when, i / PAGE, p[i]);
	}
}

int main(int argc, char **argv)
{
	static const char *const ways[] = {
		"migrated", "zapped", "unmapped", "evicted", "released",
	};
	const char *node = argc > 1 ? argv[1] : "/dev/hmm_dmirror2";
	int order = argc > 2 ? atoi(argv[2]) : 4;
	int split = open("/sys/kernel/debug/split_huge_pages", O_WRONLY);
	long before = taint();
	int bad = violations();
	char *out = malloc(HUGE_PAGE), line[128];
	struct cmd c;

	if (split < 0)
		SKIP("split_huge_pages: %s", strerror(errno));
	for (int way = 0; way < 5; way++) {
		int fd = open(node, O_RDWR), n;
		char *p;

		if (fd < 0)
			SKIP("%s: %s", node, strerror(errno));
		p = map(0, HUGE_PAGE, MADV_HUGEPAGE);
		fill(p, HUGE_PAGE);
		if (hmm(fd, TO_DEV, p, out, HUGE_PAGE / PAGE, &c))
			SKIP("MIGRATE_TO_DEV: %s", strerror(errno));
		n = snprintf(line, sizeof(line), "%d,0x%lx,0x%lx,%d", getpid(), (long)p,
			     (long)p + HUGE_PAGE, order);
		if (write(split, line, n) != n)
			fprintf(stderr, "split: %s\n", strerror(errno));
		check(p, "after the split");
		switch (way) {
		case 0:
			if (hmm(fd, TO_SYS, p, out, HUGE_PAGE / PAGE, &c))
				FAIL("MIGRATE_TO_SYS: %s", strerror(errno));
			break;
		case 1:
			madvise(p, HUGE_PAGE / 2, MADV_DONTNEED);
			fill(p, HUGE_PAGE / 2);
			break;
		case 3:
			close(fd);
			fd = -1;
			usleep(300000);
			break;
		case 4:
			if (hmm(fd, RELEASE, p, out, 1, &c))
				FAIL("RELEASE: %s", strerror(errno));
			break;
		}
		check(p, ways[way]);
		munmap(p, HUGE_PAGE);
		if (fd >= 0)
			close(fd);
		if (violations() != bad)
			FAIL("%s: %d new violations in the log", ways[way], violations() - bad);
		if (taint() != before)
			FAIL("%s: the kernel warned, taint %lx", ways[way], taint());
	}
	puts("PASS");
	return 0;
}
