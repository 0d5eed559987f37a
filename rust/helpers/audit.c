// SPDX-License-Identifier: GPL-2.0
/* Forwarders for the oracle: the log's clock, and stacks. */
#include <linux/irqflags.h>
#include <linux/percpu.h>
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

/*
 * As local_interrupt_disable(), which Linux 7.3 has: in whatever order locks are given back,
 * interrupts stay disabled until the last one.
 */
struct zdm_irqs {
	unsigned int depth;
	unsigned long flags;
};

static DEFINE_PER_CPU(struct zdm_irqs, zdm_irqs);

void zdm_irq_disable(void)
{
	struct zdm_irqs *irqs;
	unsigned long flags;

	local_irq_save(flags);
	irqs = this_cpu_ptr(&zdm_irqs);
	if (!irqs->depth++)
		irqs->flags = flags;
}

void zdm_irq_enable(void)
{
	struct zdm_irqs *irqs = this_cpu_ptr(&zdm_irqs);

	if (!--irqs->depth)
		local_irq_restore(irqs->flags);
}
