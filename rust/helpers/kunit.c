// SPDX-License-Identifier: GPL-2.0
/* Forwarders for KUnit cases that want a real address space. */
#include <kunit/test.h>
#include <kunit/test-bug.h>
#include <linux/dma-mapping.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/sched/signal.h>

#include "helpers.h"

bool zdm_kunit_running(void)
{
	return kunit_get_current_test();
}

int zdm_kunit_attach_mm(void)
{
	return kunit_attach_mm();
}

unsigned long zdm_kunit_mmap(unsigned long len, bool shared)
{
	return kunit_vm_mmap(kunit_get_current_test(), NULL, 0, len, PROT_READ | PROT_WRITE,
			     (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS, 0);
}

struct device *zdm_kunit_device_register(void)
{
	const struct platform_device_info info = {
		.name = "zdm_kunit",
		.id = PLATFORM_DEVID_AUTO,
		.dma_mask = DMA_BIT_MASK(64),
	};
	struct platform_device *pdev = platform_device_register_full(&info);

	return IS_ERR(pdev) ? NULL : &pdev->dev;
}

void zdm_kunit_device_unregister(struct device *dev)
{
	platform_device_unregister(to_platform_device(dev));
}

/* As if so many references had been taken, or dropped, and were forgotten. */
void zdm_kunit_add_module_refs(struct module *module, int n)
{
#ifdef CONFIG_MODULE_UNLOAD
	if (module)
		atomic_add(n, &module->refcnt);
#endif
}

void zdm_kunit_set_module_live(struct module *module, bool live)
{
#ifdef CONFIG_MODULES
	if (module)
		WRITE_ONCE(module->state, live ? MODULE_STATE_LIVE : MODULE_STATE_COMING);
#endif
}

void zdm_kunit_set_poisoned(struct page *page, bool poisoned)
{
	if (page && poisoned)
		SetPageHWPoison(page);
	else if (page)
		ClearPageHWPoison(page);
}

/* As a task that was killed sees itself. Nothing but the flags is changed. */
void zdm_kunit_set_killed(bool killed)
{
	spin_lock_irq(&current->sighand->siglock);
	if (killed) {
		sigaddset(&current->pending.signal, SIGKILL);
		set_thread_flag(TIF_SIGPENDING);
	} else {
		sigdelset(&current->pending.signal, SIGKILL);
		recalc_sigpending();
	}
	spin_unlock_irq(&current->sighand->siglock);
}
