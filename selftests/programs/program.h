/* SPDX-License-Identifier: GPL-2.0 */
/*
 * For small programs that use a device without any code of ours. Each takes the path of the node,
 * and prints PASS, SKIP or FAIL with a reason. The commands are those of lib/test_hmm_uapi.h.
 */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <errno.h>
#include <fcntl.h>
#include <linux/types.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096L
#define HUGE_PAGE (2L << 20)

#define END(word, code, ...) do {	\
	printf(word " " __VA_ARGS__);	\
	puts("");			\
	fflush(stdout);			\
	_exit(code);			\
} while (0)
#define FAIL(...) END("FAIL", 1, __VA_ARGS__)
#define SKIP(...) END("SKIP", 4, __VA_ARGS__)

struct cmd {
	__u64 addr, ptr, npages, cpages, faults;
};

enum { READ, WRITE, TO_DEV, TO_SYS, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE };

static inline int hmm(int fd, int n, void *addr, void *ptr, long npages, struct cmd *c)
{
	*c = (struct cmd){ (uintptr_t)addr, (uintptr_t)ptr, npages, 0, 0 };
	return ioctl(fd, _IOWR('H', n, struct cmd), c);
}

/* Private memory at an address that is aligned to huge pages and that nothing else uses. */
static inline char *map(int place, long len, int advice)
{
	void *at = (void *)(0x10000000000 + place * 0x10000000L);
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
	char *p = mmap(at, len, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (p == MAP_FAILED)
		FAIL("mmap: %s", strerror(errno));
	madvise(p, len, advice);
	return p;
}

#endif
