// SPDX-License-Identifier: GPL-2.0
/* One page on the device in 64 MiB of untouched memory: migrating all of it back fills no hole. */
#include "program.h"

static long rss(void)
{
	long all = 0, rss = 0;
	FILE *f = fopen("/proc/self/statm", "r");

	if (!f || fscanf(f, "%ld %ld", &all, &rss) != 2)
		FAIL("statm");
	fclose(f);
	return rss;
}

int main(int argc, char **argv)
{
	const char *node = argc > 1 ? argv[1] : "/dev/hmm_dmirror0";
	long len = 64 << 20, before, after;
	char *out = malloc(len), *p;
	int fd = open(node, O_RDWR);
	struct cmd c;

	if (fd < 0)
		SKIP("%s: %s", node, strerror(errno));
	p = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED || !out)
		FAIL("mmap: %s", strerror(errno));
	memset(out, 0, len);
	p[0] = 1;
	if (hmm(fd, TO_DEV, p, out, 1, &c))
		SKIP("MIGRATE_TO_DEV: %s", strerror(errno));
	before = rss();
	if (hmm(fd, TO_SYS, p, out, len / PAGE, &c))
		FAIL("MIGRATE_TO_SYS: %s", strerror(errno));
	after = rss();
	if (after - before > 600)
		FAIL("migrating back populated %ld pages of holes", after - before);
	if (c.cpages != 1)
		FAIL("cpages is %ld", (long)c.cpages);
	if (p[0] != 1)
		FAIL("the page has %d", p[0]);
	puts("PASS");
	return 0;
}
