// SPDX-License-Identifier: GPL-2.0

//! What comes between the notice of a change and the change. The kernel tells all mirrors of a process
//! that pages are about to change, and then takes the lock of the page table: in between everything may
//! have changed, so that what was found before must be looked at again, and a device that asks meanwhile
//! must wait for the end. On its own this takes microseconds. Here the device holds the notice, and each
//! action comes in between, for each change.
//!
//! Afterwards all agree on what the memory holds: the CPU, the device, its other file, a file that was
//! opened meanwhile, and a child.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::super::Ctx;
use super::super::chain::filled;
use super::super::counts::Waiting;
use super::super::entries::Strict;
use super::super::ksm::{self, Ksm};
use super::super::leak::settled;
use super::super::strict::needs_all_fixes;
use super::super::target::Target;
use super::{Place, RW, Scene};
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, check_bytes, pattern_bytes};
use crate::memory::{PAGE, WORDS, pattern_words};
use crate::swap::Swap;
use crate::threads::{self, SetOnDrop};
use crate::uapi::*;
use crate::{check, check_eq, proc, sys};

/// How long an action may take before it is said to wait for the change.
const PATIENCE: Duration = Duration::from_millis(15);
/// Small pages of a scene.
const SMALL: usize = 4;

/// What a thread does, of which the device holds the first notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Dontneed,
    ReadOnly,
    Move,
    Fork,
    /// The CPU writes to what a child shares.
    Copy,
    /// The CPU reads what is the device's alone, or on it.
    Access,
    ToDevice,
    ToSystem,
    Release,
    /// The other file gets exclusive access.
    Exclusive,
    /// The device takes what was never touched.
    Fill,
    /// Small pages become a huge one.
    Collapse,
    /// Core mm swaps out what the other file has for itself. It does so without a lock of the process.
    Reclaim,
    /// KSM puts a page in their place that it shares with others.
    Merge,
}

/// What comes in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Read,
    /// A file that was opened before.
    ReadOther,
    /// A file that is opened now.
    ReadNew,
    Write,
    CpuWrite,
    Dontneed,
    ReadOnly,
    Fork,
    ToDevice,
    ToSystem,
    Release,
    Exclusive,
}

const CHANGES: [Change; 12] = [
    Change::Dontneed,
    Change::ReadOnly,
    Change::Move,
    Change::Fork,
    Change::Copy,
    Change::Access,
    Change::ToDevice,
    Change::ToSystem,
    Change::Release,
    Change::Exclusive,
    Change::Fill,
    Change::Collapse,
];

const ACTS: [Act; 12] = [
    Act::Read,
    Act::ReadOther,
    Act::ReadNew,
    Act::Write,
    Act::CpuWrite,
    Act::Dontneed,
    Act::ReadOnly,
    Act::Fork,
    Act::ToDevice,
    Act::ToSystem,
    Act::Release,
    Act::Exclusive,
];

/// What an action leaves for later.
#[derive(Default)]
struct Left {
    child: Option<Waiting>,
    opened: Option<Target>,
}

/// What came of a pair.
struct Met {
    /// The device held a notice.
    held: bool,
    /// The action ended before the change went on.
    in_time: bool,
    /// The action succeeded.
    done: bool,
    left: [Left; 2],
}

impl Left {
    /// A child, which keeps what it has now, whatever the others write. Unless somebody writes at the same
    /// time, that is all of the pattern, or nothing.
    fn child(buf: &Buffer, others_write: bool) -> Outcome<Self> {
        let n = buf.pages();
        let kept = std::cell::OnceCell::new();
        let child = Waiting::start(
            || {
                let words: Vec<_> = (0..n).map(|page| buf.words(page)).collect();
                let _ = kept.set(words);
                match others_write {
                    true => Ok(()),
                    false => only(buf, &[Some(SEED), None]),
                }
            },
            || {
                let kept = kept.get().into_iter().flatten();
                let wrong = kept
                    .enumerate()
                    .find(|(page, words)| buf.words(*page) != **words);
                check!(
                    wrong.is_none(),
                    "page {:?} of a child: expected what it was",
                    wrong.map(|(page, _)| page)
                );
                Ok(())
            },
        )?;
        Ok(Self {
            child: Some(child),
            ..Self::default()
        })
    }
}

impl Act {
    fn writes(self) -> bool {
        matches!(self, Self::Write | Self::CpuWrite)
    }
}

/// The patterns before, and of an action that writes.
const SEED: u64 = 3400;
const NEW: u64 = 3401;

/// Checks that each page holds one of these patterns, or zeroes for `None`.
fn only(buf: &Buffer, allowed: &[Option<u64>]) -> Outcome {
    for page in 0..buf.pages() {
        let found = buf.words(page);
        let fits = |seed: &Option<u64>| match seed {
            Some(seed) => found == pattern_words(*seed, page),
            None => found == [0; WORDS],
        };
        check!(
            allowed.iter().any(fits),
            "page {page}: expected the pattern of one of {allowed:?}, or zeroes for None, found {:x?}",
            &found[..2]
        );
    }
    Ok(())
}

/// The device reads what the CPU does.
#[track_caller]
fn same(device: &Target, buf: &Buffer) -> Outcome {
    let n = buf.pages();
    let read = device.read(buf, 0, n).or_fail("READ")?;
    for (page, bytes) in read.data.chunks_exact(PAGE).enumerate() {
        let words = buf.words(page);
        let own = words.iter().flat_map(|w| w.to_ne_bytes());
        check!(
            bytes.iter().copied().eq(own),
            "page {page} by the device: expected what the CPU reads, {:x?}, found {:x?}",
            &words[..1],
            &bytes[..8]
        );
    }
    Ok(())
}

/// Asks the cgroup of the process to give up memory, until the first page is in swap.
fn reclaim(buf: &Buffer) -> Outcome {
    let text = fs::read_to_string("/proc/self/cgroup").or_fail("/proc/self/cgroup")?;
    let own = text.trim().strip_prefix("0::/").unwrap_or_default();
    let file = Path::new("/sys/fs/cgroup").join(own).join("memory.reclaim");
    for _ in 0..8 {
        // It fails if there is less, which the caller sees.
        let _ = fs::write(&file, (buf.pages() * PAGE).to_string());
        if proc::swapped(buf, 0, 1)? == 1 {
            break;
        }
    }
    Ok(())
}

impl Scene<'_> {
    fn change(&self, (change, act): (Change, Act), buf: &Buffer, second: &Target) -> Outcome<Left> {
        let n = buf.pages();
        match change {
            Change::Dontneed => buf.advise(0, n, libc::MADV_DONTNEED)?,
            Change::ReadOnly => buf.protect(0, n, libc::PROT_READ)?,
            Change::Move => {
                // There and back, as the pages are looked at where they were.
                let place = Buffer::anon(n)?;
                buf.move_contents(0, n, &place, 0)?;
                place.move_pages(0, n, buf, 0)?;
            }
            Change::Fork => return Left::child(buf, act.writes()),
            Change::Copy => buf.fill(0, n, NEW),
            Change::Access => drop(buf.get(0, 0)),
            // Pages may be in use for the other one.
            Change::ToDevice | Change::Fill => drop(self.target.to_device(buf, 0, n)),
            Change::ToSystem => drop(self.target.to_system(buf, 0, n)),
            Change::Release => self.target.release().or_fail("RELEASE")?,
            Change::Exclusive => drop(second.exclusive(buf, 0, n)),
            Change::Collapse => drop(buf.try_advise(0, n, libc::MADV_COLLAPSE)),
            Change::Reclaim => reclaim(buf)?,
            Change::Merge => {
                buf.advise(0, n, libc::MADV_MERGEABLE)?;
                ksm::wait_for_scans()?;
            }
        }
        Ok(Left::default())
    }

    /// Returns whether it succeeded, too.
    fn act(
        &self,
        ctx: &Ctx,
        (change, act): (Change, Act),
        buf: &Buffer,
        second: &Target,
    ) -> Outcome<(bool, Left)> {
        let n = buf.pages();
        let mut left = Left::default();
        let done = match act {
            Act::Read => self.target.read(buf, 0, n).is_ok(),
            Act::ReadOther => second.read(buf, 0, n).is_ok(),
            Act::ReadNew => {
                let new = Target::open(ctx, self.target.node())?;
                let done = new.read(buf, 0, n).is_ok();
                left.opened = Some(new);
                done
            }
            Act::Write => self.target.write(buf, 0, &pattern_bytes(NEW, 0, n)).is_ok(),
            Act::CpuWrite => {
                buf.fill(0, n, NEW);
                true
            }
            Act::Dontneed => buf.try_advise(0, n, libc::MADV_DONTNEED).is_ok(),
            Act::ReadOnly => {
                buf.protect(0, n, libc::PROT_READ)?;
                true
            }
            Act::Fork => {
                left = Left::child(buf, change == Change::Copy)?;
                true
            }
            Act::ToDevice => self.target.to_device(buf, 0, n).is_ok(),
            Act::ToSystem => self.target.to_system(buf, 0, n).is_ok(),
            Act::Release => self.target.release().is_ok(),
            Act::Exclusive => self.target.exclusive(buf, 0, n).is_ok(),
        };
        Ok((done, left))
    }

    /// Runs both, the action while the change is held.
    fn meet(&self, ctx: &Ctx, pair: (Change, Act), buf: &Buffer, second: &Target) -> Outcome<Met> {
        let inject = |kind, page| self.target.inject(kind, page).or_fail("ZDM_INJECT");
        inject(ZDM_INJECT_HOLD, buf.at(0))?;
        let [ready, go, over] = [const { AtomicBool::new(false) }; 3];
        std::thread::scope(|scope| {
            // A new thread maps its stack and its heap, for which it would wait within the window.
            let acting = scope.spawn(|| {
                drop(std::hint::black_box(vec![0_u8; 1 << 16]));
                ready.store(true, Ordering::SeqCst);
                while !go.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                let result = self.act(ctx, pair, buf, second);
                over.store(true, Ordering::SeqCst);
                result
            });
            // Whatever happens, it must not wait for ever.
            let _go = SetOnDrop(&go);
            sys::wait_until(Duration::from_secs(10), || ready.load(Ordering::SeqCst));
            let changing = scope.spawn(|| self.change(pair, buf, second));
            let mut held = false;
            let mut wait = || {
                sys::wait_until(Duration::from_secs(10), || {
                    held = inject(ZDM_INJECT_IS_HELD, 0).is_ok_and(|n| n == 1);
                    held || changing.is_finished()
                });
            };
            wait();
            // The second notice is the one before the pages are put in. Before the first they are read-only.
            if matches!(pair.0, Change::Fill | Change::Merge) && inject(ZDM_INJECT_IS_HELD, 0)? == 1
            {
                inject(ZDM_INJECT_GO_ON, buf.at(0))?;
                wait();
            }
            go.store(true, Ordering::SeqCst);
            let ended = sys::wait_until(PATIENCE, || over.load(Ordering::SeqCst));
            let in_time = inject(ZDM_INJECT_LET_GO, 0).is_ok_and(|n| n == 1) && ended;
            let changed = threads::join(changing)?;
            let (done, acted) = threads::join(acting)?;
            Ok(Met {
                held,
                in_time,
                done,
                left: [changed, acted],
            })
        })
    }

    /// The memory of a scene, and what it holds.
    fn buffer(&self, change: Change) -> Outcome<(Buffer, Option<u64>)> {
        let n = if self.huge { HUGE_PAGES } else { SMALL };
        let buf = match (change, self.huge) {
            (Change::Fill | Change::Collapse, true) => Buffer::anon_huge_aligned(n)?,
            (Change::Fill, false) => return Ok((Buffer::anon(n)?, None)),
            (_, true) => filled(true, SEED)?,
            (_, false) => Buffer::filled(n, SEED)?,
        };
        if change == Change::Collapse {
            buf.advise(0, n, libc::MADV_NOHUGEPAGE)?;
            buf.fill(0, n, SEED);
        }
        if matches!(change, Change::Fill | Change::Collapse) {
            buf.advise(0, n, libc::MADV_HUGEPAGE)?;
        }
        if change == Change::Fill {
            return Ok((buf, None));
        }
        self.arrange(&buf)?;
        Ok((buf, Some(SEED)))
    }

    /// One action within one change. Returns whether the device held a notice, and whether the action was
    /// in time.
    fn window(&self, ctx: &Ctx, change: Change, act: Act) -> Outcome<(bool, bool)> {
        let second = Target::open(ctx, self.target.node())?;
        let (buf, old) = self.buffer(change)?;
        let n = buf.pages();
        let shared = match change {
            Change::Copy => Some(Left::child(&buf, false)?),
            _ => None,
        };
        if old.is_some() {
            // Both files have mapped the pages.
            let _ = self.target.fault(buf.at(0), n as u64, 0);
            let _ = second.fault(buf.at(0), n as u64, 0);
        }
        let is_away = self.place != Place::System && !self.target.cpu_maps();
        if matches!(change, Change::Access | Change::Reclaim) && !is_away {
            second.exclusive(&buf, 0, n).or_fail("EXCLUSIVE")?;
        }
        // KSM shares pages of others by then, and puts one of these in place.
        let merging = match change {
            Change::Merge => {
                let ksm = Ksm::start()?;
                let twins = ksm::merged(&ksm, SEED)?;
                ksm.resume()?;
                Some((twins, ksm))
            }
            _ => None,
        };
        let met = self.meet(ctx, (change, act), &buf, &second)?;
        let waits = matches!(act, Act::Read | Act::ReadNew | Act::Write);
        check!(
            !(waits && met.in_time && met.done),
            "expected it to wait for the end of the change"
        );
        buf.protect(0, n, RW)?;
        let copies = change == Change::Copy;
        let drops = [change == Change::Dontneed, act == Act::Dontneed && met.done];
        let writes = copies || act.writes();
        let mut allowed = Vec::new();
        if change == Change::Move {
            // The action may have met either place.
            allowed.extend([None, Some(SEED), Some(NEW)]);
        } else if writes && drops != [false, false] {
            // Which one was last is known only if one came within the other.
            if met.in_time {
                allowed.push(if drops[0] { None } else { Some(NEW) });
            }
        } else if writes {
            allowed.push(Some(NEW));
            if !met.done && !copies {
                allowed.push(old);
            }
        } else {
            allowed.push(if drops == [false, false] { old } else { None });
        }
        if !allowed.is_empty() {
            only(&buf, &allowed)?;
        }
        let opened = met.left.iter().filter_map(|left| left.opened.as_ref());
        let files: Vec<&Target> = [self.target, &second].into_iter().chain(opened).collect();
        same(self.target, &buf)?;
        // The first pages of a small buffer are all.
        for page in [0, 1, n / 2, n - 1] {
            // No other file is told when the device writes to what it has: one that kept an older page shows.
            let data = pattern_bytes(SEED + 9, page, 1);
            self.target.write(&buf, page, &data).or_fail("WRITE")?;
            for (k, reader) in files.iter().enumerate() {
                let read = reader.read(&buf, page, 1).or_fail("READ")?;
                let what = format!("what the device wrote, by file {k}");
                check_bytes(&read.data, SEED + 9, page, &what)?;
            }
            for (i, file) in files.iter().enumerate() {
                let seed = SEED + 10 + 2 * i as u64;
                buf.fill(page, 1, seed);
                for (k, reader) in files.iter().enumerate() {
                    let read = reader.read(&buf, page, 1).or_fail("READ")?;
                    let what = format!("what the CPU wrote, by file {k}");
                    check_bytes(&read.data, seed, page, &what)?;
                }
                let data = pattern_bytes(seed + 1, page, 1);
                file.write(&buf, page, &data).or_fail("WRITE")?;
                buf.check(page, 1, seed + 1)?;
            }
        }
        for left in met.left.into_iter().chain(shared) {
            left.child.map_or(Ok(()), Waiting::join)?;
        }
        self.counted(&buf)?;
        drop(merging);
        Ok((met.held, met.in_time))
    }

    /// The pages have one entry each, and no other reference.
    fn counted(&self, buf: &Buffer) -> Outcome {
        let pages = self.target.inspect(buf, 0, buf.pages());
        for (i, page) in pages.or_fail("ZDM_INSPECT")?.iter().enumerate() {
            check!(
                page.kind == 0 || page.refs == page.mapcount,
                "page {i}: expected its mappings as references, found {page:x?}"
            );
        }
        for device in [self.target, &self.other] {
            let (audit, records) = device.audit()?;
            check_eq!(audit.total, 0, "violations, of which {records:x?}");
        }
        Ok(())
    }
}

/// Whether a pair is left out: the CPU may write to what is read-only by then, or there is no such change.
fn is_left_out(change: Change, act: Act, place: Place, huge: bool) -> bool {
    let is_deadly = change == Change::Copy && act == Act::ReadOnly
        || change == Change::ReadOnly && act == Act::CpuWrite;
    let is_anywhere = change == Change::Fill && place != Place::System;
    // Each pair takes long with huge pages, and most are those of small ones.
    let is_rare = huge
        && (matches!(
            change,
            Change::ReadOnly | Change::Move | Change::Release | Change::Exclusive
        ) || !matches!(
            act,
            Act::ReadNew | Act::CpuWrite | Act::Dontneed | Act::Fork | Act::ToSystem
        ));
    is_deadly || is_anywhere || is_rare || change == Change::Collapse && !huge
}

fn each(ctx: &Ctx, node: usize, huge: bool, changes: &[Change], places: &[Place]) -> Outcome {
    needs_all_fixes(ctx)?;
    for &place in places {
        settled(ctx, node, |target| {
            let _strict = Strict::on()?;
            let swap = changes.contains(&Change::Reclaim).then(Swap::on);
            let _swap = swap.transpose()?;
            let scene = Scene {
                target,
                other: Target::open(ctx, node + 1)?,
                place,
                huge,
                seed: SEED,
            };
            for &change in changes {
                let mut met = [0; 2];
                let acts = ACTS
                    .into_iter()
                    .filter(|act| !is_left_out(change, *act, place, huge));
                for act in acts.clone() {
                    proc::drain_batches()?;
                    let (held, in_time) = scene.window(ctx, change, act).map_err(|e| match e {
                        Fail::Skip(_) => e,
                        e => Fail::failed(format!("{act:?} within {change:?}, {place:?}: {e}")),
                    })?;
                    met[0] += usize::from(held);
                    met[1] += usize::from(in_time);
                }
                crate::harness::note(&format!(
                    "{change:?}, {place:?}: held {} of {}, {} in time",
                    met[0],
                    acts.clone().count(),
                    met[1]
                ));
                // Every change is told. There is none if pages are released that are not on the device, or
                // collapsed that are and stay there.
                let is_none = match change {
                    Change::Release => place == Place::System,
                    Change::Collapse => place == Place::Local && target.cpu_maps(),
                    _ => false,
                };
                check!(
                    is_none || met[0] * 2 >= acts.clone().count(),
                    "{change:?}, {place:?}: expected the device to be told, found {} of {} times",
                    met[0],
                    acts.count()
                );
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Small pages.
pub(super) fn windows(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, false, &CHANGES, &[Place::System, Place::Local])
}

/// Huge pages.
pub(super) fn windows_huge(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, true, &CHANGES, &[Place::System, Place::Local])
}

/// Small pages that are swapped out, while their folios are locked and the locks of the process are free.
pub(super) fn windows_reclaim(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, false, &[Change::Reclaim], &[Place::System])
}

/// Small pages that KSM merges with those of others.
pub(super) fn windows_merge(ctx: &Ctx, node: usize) -> Outcome {
    each(ctx, node, false, &[Change::Merge], &[Place::System])
}
