// SPDX-License-Identifier: GPL-2.0

//! `struct page`, folios in use, and the memory behind a page of an emulated device.

pub(crate) mod backing;
mod batch;
pub(crate) mod device_folio;
pub(super) mod struct_page;
pub(crate) mod system_folio;
pub(crate) mod view;
