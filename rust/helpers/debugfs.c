// SPDX-License-Identifier: GPL-2.0
/* Forwarders for rust/kernel/debugfs.rs; without CONFIG_DEBUG_FS they return errors. */
#include <linux/debugfs.h>

#include "helpers.h"

struct dentry *zdm_debugfs_create_dir(const char *name, struct dentry *parent)
{
	return debugfs_create_dir(name, parent);
}

struct dentry *zdm_debugfs_create_file(const char *name, umode_t mode, struct dentry *parent,
				       void *data, const struct debugfs_short_fops *fops)
{
	return debugfs_create_file(name, mode, parent, data, fops);
}

void zdm_debugfs_remove(struct dentry *dentry)
{
	debugfs_remove(dentry);
}
