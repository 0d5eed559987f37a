// SPDX-License-Identifier: GPL-2.0

//! `/dev/zdmirror`, which belongs to no device: `ZDM_INSPECT` of the page frames of any driver.

#![forbid(unsafe_code)]

use super::ioctl::without_device;
use crate::{
    miscdevice::{
        Node,
        NodeOps, //
    },
    mm::{
        module::scope::ModuleScope,
        region::owner::PgmapOwner, //
    }, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// An open file of the node. The owner has no pagemap; it only represents the caller.
pub(crate) struct Observer(Arc<PgmapOwner>);

impl Observer {
    /// Registers the node. May sleep.
    ///
    /// # Errors
    ///
    /// Those of [`Node::register`].
    pub(crate) fn register(scope: &Arc<ModuleScope>) -> Result<Node<Self>> {
        let owner = PgmapOwner::in_scope(scope.clone())?;
        Node::register(scope, c"zdmirror", owner)
    }
}

#[vtable]
impl NodeOps for Observer {
    type Data = Arc<PgmapOwner>;

    fn open(owner: &Arc<PgmapOwner>) -> Result<Pin<KBox<Self>>> {
        Ok(KBox::pin(Self(owner.clone()), GFP_KERNEL)?)
    }

    fn release(&self) {}

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        without_device(cmd, arg, &self.0).map(|()| 0)
    }
}
