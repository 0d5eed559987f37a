// SPDX-License-Identifier: GPL-2.0

//! The module parameters, checked.

#![forbid(unsafe_code)]

use crate::{
    audit::Policy,
    driver::fault_around::streams::{
        Most,
        MAX_WINDOW, //
    },
    mm::{
        region::memory_type::MemoryType,
        PAGE_SIZE, //
    },
};
use core::num::NonZeroUsize;
use kernel::{
    fmt,
    prelude::*,
    sizes::SZ_1M,
    str::CStr, //
};

const PAGES_PER_MB: NonZeroUsize = NonZeroUsize::new(SZ_1M / PAGE_SIZE).unwrap();

/// The settings that all devices share.
#[derive(Clone, Copy)]
pub(crate) struct Config {
    /// The effect of a broken invariant.
    pub(crate) policy: Policy,
    /// The number of pages of a chunk.
    pub(crate) chunk_pages: NonZeroUsize,
    /// Whether `ZDM_INJECT` is allowed.
    pub(crate) inject: bool,
    /// Whether devices keep a ledger of pages.
    pub(crate) ledger: bool,
    /// The largest number of pages that a CPU fault brings back, unless the file sets another one.
    pub(crate) fault_around: Most,
}

impl Config {
    /// The largest chunk, so that a mistyped size does not use all memory for struct pages.
    const MAX_CHUNK_MB: usize = 16 * 1024;

    /// Checks the parameters. The log names the bad one and the reason.
    pub(crate) fn parse(
        audit: &CStr,
        chunk_mb: usize,
        inject: bool,
        ledger: bool,
        fault_around: usize,
    ) -> Result<Self> {
        let Some(policy) = Policy::parse(audit) else {
            pr_err!("parameter audit: must be off, report or panic\n");
            return Err(EINVAL);
        };
        let chunk_pages = match NonZeroUsize::new(chunk_mb) {
            Some(mb) if chunk_mb % 2 == 0 && chunk_mb <= Self::MAX_CHUNK_MB => {
                mb.checked_mul(PAGES_PER_MB)
            }
            _ => None,
        };
        let Some(chunk_pages) = chunk_pages else {
            pr_err!(
                "parameter devmem_chunk_mb: {} is not a multiple of 2 from 2 to {}\n",
                chunk_mb,
                Self::MAX_CHUNK_MB
            );
            return Err(EINVAL);
        };
        let Ok(fault_around) = Most::new(fault_around) else {
            pr_err!(
                "parameter fault_around: {} is more than {} pages\n",
                fault_around,
                MAX_WINDOW
            );
            return Err(EINVAL);
        };
        Ok(Self {
            policy,
            chunk_pages,
            inject,
            ledger,
            fault_around,
        })
    }
}

/// The place of a device's memory, which decides its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Location {
    /// PRIVATE memory, at unused addresses; the device gets as many chunks as it needs.
    Anywhere,
    /// COHERENT memory, one chunk at this physical address.
    Coherent(u64),
    /// GENERIC memory, one chunk at this physical address.
    Generic(u64),
}

impl Location {
    /// The type of the memory.
    pub(crate) fn memory_type(self) -> MemoryType {
        match self {
            Self::Anywhere => MemoryType::Private,
            Self::Coherent(_) => MemoryType::Coherent,
            Self::Generic(_) => MemoryType::Generic,
        }
    }

    /// Checks `spm_addr_dev0` and `spm_addr_dev1`, of which both or none must be given.
    pub(crate) fn coherent(addresses: [u64; 2]) -> Result<Option<[Self; 2]>> {
        let pair = both_or_none("spm_addr_dev", addresses)?;
        Ok(pair.map(|addresses| addresses.map(Self::Coherent)))
    }

    /// Checks `generic_addr_dev0` and `generic_addr_dev1` in the same way.
    pub(crate) fn generic(addresses: [u64; 2]) -> Result<Option<[Self; 2]>> {
        let pair = both_or_none("generic_addr_dev", addresses)?;
        Ok(pair.map(|addresses| addresses.map(Self::Generic)))
    }
}

/// The values of two parameters, whose names are `name` and a digit, if both are given.
fn both_or_none(name: &str, addresses: [u64; 2]) -> Result<Option<[u64; 2]>> {
    match addresses {
        [0, 0] => Ok(None),
        [_, 0] | [0, _] => {
            pr_err!("parameters {name}0 and {name}1: only one of them is given\n");
            Err(EINVAL)
        }
        both => Ok(Some(both)),
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anywhere => f.write_str("the memory"),
            Self::Coherent(start) | Self::Generic(start) => write!(f, "{start:#x}"),
        }
    }
}

#[kunit_tests(zdmirror_params)]
mod tests {
    // `Location` is also a name in the macro.
    use super::{
        Location as Place,
        MemoryType, //
    };

    #[test]
    fn coherent_needs_both_addresses() {
        assert_eq!(Place::coherent([0, 0]), Ok(None));
        assert_eq!(
            Place::coherent([1 << 32, 1 << 33]),
            Ok(Some([Place::Coherent(1 << 32), Place::Coherent(1 << 33)]))
        );
    }

    #[test]
    fn generic_is_a_place_of_its_own() {
        assert_eq!(Place::generic([0, 0]), Ok(None));
        let both = Place::generic([1 << 32, 1 << 33]);
        assert_eq!(
            both,
            Ok(Some([Place::Generic(1 << 32), Place::Generic(1 << 33)]))
        );
        for (place, memory) in [
            (Place::Anywhere, MemoryType::Private),
            (Place::Coherent(1 << 32), MemoryType::Coherent),
            (Place::Generic(1 << 32), MemoryType::Generic),
        ] {
            assert_eq!(place.memory_type(), memory);
        }
    }

    #[test]
    fn only_generic_may_lack_migration() {
        assert!(MemoryType::Private.is_migratable());
        assert!(MemoryType::Coherent.is_migratable());
        let generic = MemoryType::Generic;
        assert!(generic.is_migratable() || generic.max_order() == 0);
    }
}
