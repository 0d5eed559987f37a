// SPDX-License-Identifier: GPL-2.0
/* Forwarders for the oracle: the log's clock, and stacks. */
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

/* Limits lines that any task with a file of a device can cause, so that the log is not flooded. */
bool zdm_may_log(unsigned int topic)
{
	static struct ratelimit_state limits[ZDM_LOG_TOPICS] = {
		ZDM_LIMIT(0), ZDM_LIMIT(1), ZDM_LIMIT(2),
	};

	return __ratelimit(&limits[topic]);
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
