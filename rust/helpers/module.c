// SPDX-License-Identifier: GPL-2.0
/* Forwarders for modules, their open files, and deferred work. */
#include <linux/module.h>
#include <linux/workqueue.h>

#include "helpers.h"

#ifdef ZDM_VERSION
MODULE_VERSION(ZDM_VERSION);
#endif

bool zdm_module_try_get(struct module *module)
{
	return try_module_get(module);
}

/* If the init function of a module fails, the module goes whatever references it has. */
bool zdm_module_is_live(struct module *module)
{
#ifdef CONFIG_MODULES
	return !module || READ_ONCE(module->state) == MODULE_STATE_LIVE;
#else
	return true;
#endif
}

/* A kernel that unloads no modules counts none of their references. */
int zdm_module_refs(struct module *module)
{
#ifdef CONFIG_MODULE_UNLOAD
	return module ? module_refcount(module) : -1;
#else
	return -1;
#endif
}

void zdm_module_put(struct module *module)
{
	module_put(module);
}

/* What is part of the kernel is never unloaded. */
bool zdm_module_owns(struct module *module, unsigned long address)
{
	return !module || within_module_core(address, module);
}

#ifdef ZDM_VERSION
/*
 * The reference of the module for an open file, where the operations of the file name no
 * module. The module cannot drop its last reference itself, as it would return through its
 * own text. So it leaves that to __fput(), which drops the module of the operations that a
 * file has after ->release().
 */
bool zdm_own_file(void)
{
	return try_module_get(THIS_MODULE);
}

void zdm_disown_file(void)
{
	module_put(THIS_MODULE);
}

void zdm_give_file(struct file *file)
{
	static const struct file_operations released = { .owner = THIS_MODULE };

	file->f_op = &released;
}
#endif

void zdm_work_init(struct delayed_work *work, work_func_t func)
{
	INIT_DELAYED_WORK(work, func);
}

bool zdm_work_queue(struct delayed_work *work, unsigned int ms)
{
	return queue_delayed_work(system_unbound_wq, work, msecs_to_jiffies(ms));
}

/*
 * A kernel whose migration handles large COHERENT folios has a function that says so. Out of
 * the tree the same module is for kernels with the function and without.
 */
int zdm_migrate_device_max_order(enum memory_type type)
{
#ifdef ZDM_VERSION
	unsigned int (*max_order)(enum memory_type type);
	int order;

	max_order = (void *)__symbol_get("migrate_device_max_order");
	if (!max_order)
		return -EOPNOTSUPP;
	order = max_order(type);
	__symbol_put("migrate_device_max_order");
	return order;
#else
	return -EOPNOTSUPP;
#endif
}
