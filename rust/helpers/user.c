// SPDX-License-Identifier: GPL-2.0
/* Forwarders for users and their limits. */
#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>

#include "helpers.h"

struct user_struct *zdm_get_current_user(void)
{
	return get_current_user();
}

void zdm_put_user(struct user_struct *user)
{
	free_uid(user);
}

/* The condition is that of the field in struct user_struct. */
atomic_long_t *zdm_user_locked_vm(struct user_struct *user)
{
#if defined(CONFIG_NET) || defined(CONFIG_IO_URING) || \
	defined(CONFIG_VFIO_PCI_ZDEV_KVM) || IS_ENABLED(CONFIG_IOMMUFD) || \
	defined(CONFIG_SECRETMEM)
	return &user->locked_vm;
#else
	/* Without anything else that locks pages of a user, one counter for all users. */
	static atomic_long_t locked_vm;

	return &locked_vm;
#endif
}

/* In pages. */
unsigned long zdm_memlock_limit(void)
{
	return capable(CAP_IPC_LOCK) ? ULONG_MAX : rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;
}
