// SPDX-License-Identifier: GPL-2.0
/* Forwarders for the oracle: references of a pagemap, the log's clock, stacks, and faults. */
#include <linux/highmem.h>
#include <linux/jiffies.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/percpu-refcount.h>
#include <linux/ratelimit.h>
#include <linux/sched/clock.h>
#include <linux/stacktrace.h>

#include "helpers.h"

/*
 * The top bit is percpu_ref's own while it counts by processor, and means nothing here: what is
 * below it is the count, or its lower bits where there were more puts than gets.
 */
static long zdm_ref_value(unsigned long count)
{
	return (long)(count << 1) >> 1;
}

/*
 * References on a pagemap; exact while nobody takes or drops one. To have it count in one place
 * would be exact at any time, and the end of the pagemap: its percpu_ref is not one that can be
 * switched back (no PERCPU_REF_ALLOW_REINIT).
 */
long zdm_pgmap_refs(struct dev_pagemap *pgmap)
{
	struct percpu_ref *ref = &pgmap->ref;
	unsigned long __percpu *counts;
	unsigned long sum;
	int cpu;

	rcu_read_lock();
	sum = atomic_long_read(&ref->data->count);
	if (__ref_is_percpu(ref, &counts))
		for_each_possible_cpu(cpu)
			sum += READ_ONCE(*per_cpu_ptr(counts, cpu));
	rcu_read_unlock();
	return zdm_ref_value(sum);
}

u64 zdm_log_clock(void)
{
	return local_clock();
}

#define ZDM_LIMIT(n)	RATELIMIT_STATE_INIT(limits[n], DEFAULT_RATELIMIT_INTERVAL, \
					     DEFAULT_RATELIMIT_BURST)

/* Limits lines of the log that any opener of a device can cause, so that the log is not flooded. */
bool zdm_may_log(unsigned int topic)
{
	static struct ratelimit_state limits[ZDM_LOG_TOPICS] = {
		ZDM_LIMIT(0), ZDM_LIMIT(1), ZDM_LIMIT(2),
	};

	return __ratelimit(&limits[topic]);
}

/* When the current task does what. */
void zdm_stamp(u64 *time, u64 *rest, u64 when, u32 what)
{
	WRITE_ONCE(*time, when);
	WRITE_ONCE(*rest, (u64)current->pid << 32 | what);
}

/*
 * As zdm_stamp(), at the time of the last tick: to read the clock costs more than the rest of
 * what is done for a page. Never before what the stamp says already. Tasks that do this at the
 * same time may take each other's reading for that of another tick.
 */
void zdm_stamp_recent(u64 *time, u64 *rest, struct zdm_recent *recent, u32 what)
{
	unsigned long now = jiffies;

	if (READ_ONCE(recent->jiffies) != now) {
		WRITE_ONCE(recent->time, local_clock());
		WRITE_ONCE(recent->jiffies, now);
	}
	zdm_stamp(time, rest, max(READ_ONCE(recent->time), READ_ONCE(*time)), what);
}

/* Without CONFIG_STACKTRACE there is none. */
unsigned int zdm_stack(unsigned long *entries, unsigned int room, unsigned int skip)
{
#ifdef CONFIG_STACKTRACE
	return stack_trace_save(entries, room, skip + 1);
#else
	return 0;
#endif
}

int zdm_symbol(char *buf, size_t size, unsigned long address)
{
	return scnprintf(buf, size, "%pB", (void *)address);
}

/* For fault injection. */
void zdm_set_page_mapping(struct page *page, unsigned long mapping)
{
	WRITE_ONCE(page->mapping, (struct address_space *)mapping);
}

void zdm_set_anon_exclusive(struct page *page, bool set)
{
	if (set)
		set_bit(PG_anon_exclusive, &page->flags.f);
	else
		clear_bit(PG_anon_exclusive, &page->flags.f);
}

void zdm_flip_bit(struct page *page)
{
	char *data = kmap_local_page(page);

	data[0] ^= 1;
	kunmap_local(data);
}
