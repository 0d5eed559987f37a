// SPDX-License-Identifier: GPL-2.0
/*
 * A huge page on the device that two processes share counts half in Pss for each, as small pages
 * do.
 */
#include "program.h"
#include <sys/wait.h>

/* The number in a field of the area at p in smaps. */
static long field(void *p, const char *name)
{
	FILE *f = fopen("/proc/self/smaps", "r");
	size_t n = strlen(name);
	char line[512];
	long value = -1;
	int in = 0;

	if (!f)
		FAIL("smaps: %s", strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		unsigned long start, end;

		if (sscanf(line, "%lx-%lx ", &start, &end) == 2) {
			in = start == (uintptr_t)p;
		} else if (in && !strncmp(line, name, n) && line[n] == ':') {
			value = strtol(line + n + 1, NULL, 10);
			break;
		}
	}
	fclose(f);
	return value;
}

static void try(const char *node, int huge)
{
	const char *size = huge ? "huge" : "small";
	char *p = map(huge, HUGE_PAGE, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	char *out = malloc(HUGE_PAGE), x;
	int fd = open(node, O_RDWR), pipes[2];
	long alone, rss, pss, private;
	struct cmd c;
	pid_t pid;

	memset(p, 5, HUGE_PAGE);
	if (fd < 0 || hmm(fd, TO_DEV, p, out, HUGE_PAGE / PAGE, &c))
		SKIP("%s: %s", node, strerror(errno));
	if (huge && field(p, "AnonHugePages") != HUGE_PAGE >> 10)
		SKIP("the page is not huge on the device");
	alone = field(p, "Pss");
	if (pipe(pipes))
		FAIL("pipe: %s", strerror(errno));
	pid = fork();
	if (!pid) {
		close(pipes[1]);
		_exit(read(pipes[0], &x, 1) < 0);
	}
	rss = field(p, "Rss");
	pss = field(p, "Pss");
	private = field(p, "Private_Clean") + field(p, "Private_Dirty");
	close(pipes[1]);
	close(pipes[0]);
	waitpid(pid, NULL, 0);
	if (alone != HUGE_PAGE >> 10 || rss != HUGE_PAGE >> 10)
		FAIL("%s: Rss %ld, Pss alone %ld", size, rss, alone);
	if (pss != HUGE_PAGE >> 11 || private)
		FAIL("%s page shared by two: Pss %ld kB, private %ld kB", size, pss, private);
	close(fd);
	munmap(p, HUGE_PAGE);
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
