// SPDX-License-Identifier: GPL-2.0

//! UFFDIO_MOVE of pages that somebody else uses, too: each kind of user, for pages in each place. A
//! page that is shared or pinned is refused, and stays as it is; a page without users may move, and
//! then keeps its contents and its counts.

use crate::check::{Fail, OrFail, Outcome, expect_errno};
use crate::device::{Buffer, check_bytes};
use crate::harness::note;
use crate::tests::counts::Waiting;
use crate::tests::leak::settled;
use crate::tests::target::{Place, Target};
use crate::tests::{Ctx, Test};
use crate::uapi::*;
use crate::uffd::Uffd;
use crate::{check, check_eq, proc};

pub const TESTS: &[Test] = of_each_kind!("uffd": "move_used" => move_used);

const N: usize = 6;
/// The page that is moved, from the middle of a mapping to another distance from its beginning.
const PAGE_FROM: usize = 3;
const PAGE_TO: usize = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum User {
    Nobody,
    Child,
    Pin(u32),
}

const USERS: [User; 6] = [
    User::Nobody,
    User::Child,
    User::Pin(0),
    User::Pin(ZDM_PIN_WRITE),
    User::Pin(ZDM_PIN_WRITE | ZDM_PIN_FAST),
    User::Pin(ZDM_PIN_WRITE | ZDM_PIN_LONGTERM),
];

fn move_used(ctx: &Ctx, node: usize) -> Outcome {
    settled(ctx, node, |target| {
        let other = Target::open(ctx, node + 1)?;
        for place in Place::ALL {
            for user in USERS {
                one(target, &other, place, user).map_err(|e| match e {
                    Fail::Skip(_) => e,
                    e => Fail::failed(format!("{place:?}, used by {user:?}: {e}")),
                })?;
            }
        }
        Ok(())
    })
}

fn one(target: &Target, other: &Target, place: Place, user: User) -> Outcome {
    let from = Buffer::filled(N, 1580)?;
    let to = Buffer::anon(N)?;
    let uffd = Uffd::new().or_fail("userfaultfd")?;
    uffd.register(&to, 0, N).or_fail("UFFDIO_REGISTER")?;
    let device = match place {
        Place::System => None,
        Place::Local => Some(target),
        Place::Remote => Some(other),
    };
    if let Some(device) = device {
        proc::drain_batches()?;
        device.move_all(&from, 1580)?;
    }
    let pin = match user {
        // A pin brings PRIVATE pages back, and long-term pins COHERENT ones, too.
        User::Pin(flags) => Some(target.pin(&from, PAGE_FROM, 1, flags).or_fail("ZDM_PIN")?),
        _ => None,
    };
    let child = match user {
        User::Child => Some(Waiting::start(
            || Ok(()),
            || {
                from.check(0, N, 1580)?;
                from.fill(0, N, 1581);
                from.check(0, N, 1581)
            },
        )?),
        _ => None,
    };
    let before = proc::entries(&from, 0, N)?;
    let result = uffd.move_pages(&from, PAGE_FROM, 1, &to, PAGE_TO);
    if user == User::Nobody {
        let moved = result.is_ok_and(|n| n == 1);
        note(&format!("{place:?}: moved {moved}"));
        check!(
            moved || place != Place::System,
            "UFFDIO_MOVE: expected success"
        );
        if moved {
            to.check_from(PAGE_TO, 1, 1580, PAGE_FROM)?;
            let page = target.inspect_one(&to, PAGE_TO)?;
            check!(
                page.kind == 0 || page.refs == page.mapcount,
                "the page that was moved: expected its mapping as reference, found {page:x?}"
            );
            from.check_zero(PAGE_FROM, 1)?;
        }
        return Ok(());
    }
    if user == User::Child && device.is_some_and(|device| !device.cpu_maps()) {
        // The kernel may bring the page back first.
        let refused = [libc::EBUSY, libc::EFAULT, libc::EINVAL, libc::ENOENT];
        expect_errno(result, &refused, "UFFDIO_MOVE")?;
    } else {
        expect_errno(result, &[libc::EBUSY], "UFFDIO_MOVE")?;
        check_eq!(proc::entries(&from, 0, N)?, before, "entries of the pages");
    }
    let read = target.read(&from, 0, N).or_fail("READ")?;
    check_bytes(&read.data, 1580, 0, "READ")?;
    if let Some(child) = child {
        // Neither sees what the other one writes.
        from.fill(0, N, 1582);
        child.join()?;
        from.check(0, N, 1582)?;
    }
    if let Some(pin) = pin {
        target.unpin(pin, 0).or_fail("ZDM_UNPIN")?;
        from.check(0, N, 1580)?;
        let moved = uffd.move_pages(&from, PAGE_FROM, 1, &to, PAGE_TO);
        check_eq!(
            moved.or_fail("UFFDIO_MOVE without the pin")?,
            1,
            "pages moved"
        );
        to.check_from(PAGE_TO, 1, 1580, PAGE_FROM)?;
    }
    Ok(())
}
