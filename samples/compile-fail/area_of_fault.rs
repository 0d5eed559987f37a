// SPDX-License-Identifier: GPL-2.0
// error: E0308

//! The handler of a fault migrates by the fault only, which says what the task has locked.

#![forbid(unsafe_code)]

use crate::mm::{
    migrate::migration::{Request, Select},
    pagemap::fault::VmFault,
    region::owner::PgmapOwner,
    user::range::PageRange,
};

fn all<'a>(fault: &'a VmFault<'_>, range: PageRange, owner: &'a PgmapOwner) -> Request<'a> {
    Request {
        select: Select::System,
        ..Request::system(fault.vma(), range, owner)
    }
}
