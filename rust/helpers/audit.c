// SPDX-License-Identifier: GPL-2.0
/* Forwarders for the oracle: the log's clock, and stacks. */
#include <linux/jiffies.h>
#include <linux/ratelimit.h>
#include <linux/sched/clock.h>
#include <linux/stacktrace.h>

#include "helpers.h"

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
