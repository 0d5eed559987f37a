// SPDX-License-Identifier: GPL-2.0

//! Runs the sample driver in the address space of a KUnit thread.

#![forbid(unsafe_code)]

use kernel::prelude::kunit_tests;

#[kunit_tests(zdmirror_sample)]
mod tests {
    use crate::{
        miscdevice::{
            Node,
            NodeOps, //
        },
        mm::{
            kunit::support::{
                mmap_anon,
                this_module,
                Killed, //
            },
            module::scope::ModuleScope,
            PAGE_SIZE, //
        },
        sample::{
            Chip,
            Context,
            MIGRATE, //
        },
    };
    use kernel::{
        prelude::*,
        sizes::SZ_2M,
        uaccess::{
            UserPtr,
            UserSlice, //
        }, //
    };

    const PAGES: usize = 20;

    /// Executes the ioctl, with its arguments in user memory as a process has them.
    fn migrate(context: &Context, start: usize, pages: usize) -> Result {
        let arg = mmap_anon(PAGE_SIZE)?;
        let mut writer = UserSlice::new(UserPtr::from_addr(arg), 16).writer();
        writer.write(&(start as u64))?;
        writer.write(&(pages as u64))?;
        assert_eq!(context.ioctl(MIGRATE, arg)?, 0);
        // A killed task ends, however many pages are left.
        let killed = Killed::new()?;
        assert_eq!(context.ioctl(MIGRATE, arg), Err(EINTR));
        drop(killed);
        Ok(())
    }

    #[test]
    fn pages_go_and_come_back() -> Result {
        let scope = ModuleScope::new(this_module())?;
        let chip = Chip::new(SZ_2M, &scope)?;
        let node = Node::<Context>::register(&scope, c"zdm_sample", chip.clone())?;
        let context = Context::open(&chip)?;
        let start = mmap_anon(PAGES * PAGE_SIZE)?;
        let user = || UserSlice::new(UserPtr::from_addr(start), PAGES * PAGE_SIZE);
        for round in 1..3u8 {
            let mut writer = user().writer();
            for page in 0..PAGES {
                writer.write_slice(&[round + page as u8; PAGE_SIZE])?;
            }
            migrate(&context, start, PAGES)?;
            assert_eq!(chip.memory.used(), PAGES);
            // CPU faults bring the pages back the first time, the last close does the second time.
            if round == 2 {
                context.release();
                assert_eq!(chip.memory.used(), 0);
            }
            let mut reader = user().reader();
            let mut bytes = [0; PAGE_SIZE];
            for page in 0..PAGES {
                reader.read_slice(&mut bytes)?;
                assert!(bytes.iter().all(|&byte| byte == round + page as u8));
            }
            assert_eq!(chip.memory.used(), 0);
        }
        drop(node);
        Ok(())
    }

    #[test]
    fn bad_arguments_are_refused() -> Result {
        let chip = Chip::new(SZ_2M, &ModuleScope::new(this_module())?)?;
        let context = Context::open(&chip)?;
        let start = mmap_anon(PAGE_SIZE)?;
        assert_eq!(context.ioctl(0, 0), Err(ENOTTY));
        assert_eq!(context.ioctl(MIGRATE, 0), Err(EFAULT));
        assert_eq!(migrate(&context, start + 1, 1), Err(EINVAL));
        assert_eq!(migrate(&context, start, 0), Err(EINVAL));
        assert_eq!(migrate(&context, 16 * PAGE_SIZE, 1), Err(EFAULT));
        // There is not enough room, and the failed attempt leaves nothing behind.
        let start = mmap_anon(2 * SZ_2M)?;
        assert_eq!(migrate(&context, start, 1024), Err(ENOSPC));
        context.release();
        assert_eq!(chip.memory.used(), 0);
        Ok(())
    }
}
