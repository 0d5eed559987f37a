// SPDX-License-Identifier: GPL-2.0

//! The device's view of the address space that it mirrors, for `HMM_DMIRROR_SNAPSHOT`.

#![forbid(unsafe_code)]

use super::open_file::Client;
use crate::{
    mm::{
        hmm::{
            mapped::Memory,
            snapshot::{
                MapSize,
                Seen,
                SNAPSHOT_PAGES, //
            },
        },
        user::range::PageRange, //
    },
    uapi, //
};
use kernel::{
    prelude::*,
    uaccess::{
        UserPtr,
        UserSlice, //
    }, //
};

/// The pages of a small snapshot.
const FEW: usize = 64;

impl Client {
    /// Writes a byte for each page of `range` to `to`. Returns the number of pages. May sleep.
    pub(in crate::driver) fn snapshot(&self, range: PageRange, to: UserPtr) -> Result<usize> {
        let mut writer = UserSlice::new(to, range.pages()).writer();
        let (mut few, mut many);
        // To clear more room than is used would take longer than to look at a few pages.
        let perms = if range.pages() <= FEW {
            few = [0; FEW];
            &mut few[..]
        } else {
            many = [0; SNAPSHOT_PAGES];
            &mut many[..]
        };
        self.mirror()
            .snapshot_parts(range, perms, perm, |perms| writer.write_slice(perms))?;
        Ok(range.pages())
    }
}

/// The byte of a page.
fn perm(seen: Seen) -> u8 {
    let Seen::Page {
        memory,
        write,
        size,
    } = seen
    else {
        return if seen == Seen::Error {
            uapi::HMM_DMIRROR_PROT_ERROR
        } else {
            uapi::HMM_DMIRROR_PROT_NONE
        };
    };
    let memory = match memory {
        Memory::System => uapi::HMM_DMIRROR_PROT_NONE,
        Memory::Zero => uapi::HMM_DMIRROR_PROT_ZERO,
        Memory::Private { local: true } => uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
        Memory::Private { local: false } => uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE,
        Memory::Coherent { local: true } => uapi::HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
        Memory::Coherent { local: false } => uapi::HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
        Memory::Generic { local: true } => uapi::ZDM_PROT_DEV_GENERIC_LOCAL,
        Memory::Generic { local: false } => uapi::ZDM_PROT_DEV_GENERIC_REMOTE,
    };
    let access = if write {
        uapi::HMM_DMIRROR_PROT_WRITE
    } else {
        uapi::HMM_DMIRROR_PROT_READ
    };
    let size = match size {
        MapSize::Base => 0,
        MapSize::Pmd => uapi::HMM_DMIRROR_PROT_PMD,
        MapSize::Pud => uapi::HMM_DMIRROR_PROT_PUD,
    };
    memory | access | size
}

#[kunit_tests(zdmirror_snapshot)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_the_uapi() {
        let page = |memory, write, size| Seen::Page {
            memory,
            write,
            size,
        };
        let private = |local| Memory::Private { local };
        let coherent = |local| Memory::Coherent { local };
        let generic = |local| Memory::Generic { local };
        for (seen, byte) in [
            (Seen::Error, 0xff),
            (Seen::Absent, 0x00),
            (page(Memory::System, false, MapSize::Base), 0x01),
            (page(Memory::System, true, MapSize::Base), 0x02),
            (page(Memory::System, true, MapSize::Pmd), 0x06),
            (page(Memory::System, false, MapSize::Pud), 0x09),
            (page(Memory::Zero, false, MapSize::Base), 0x11),
            (page(private(true), true, MapSize::Pmd), 0x26),
            (page(private(false), false, MapSize::Base), 0x31),
            (page(coherent(true), true, MapSize::Base), 0x42),
            (page(coherent(false), true, MapSize::Base), 0x52),
            (page(generic(true), true, MapSize::Pmd), 0x66),
            (page(generic(false), false, MapSize::Pud), 0x79),
        ] {
            assert_eq!(perm(seen), byte);
        }
    }
}
