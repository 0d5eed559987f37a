// SPDX-License-Identifier: GPL-2.0

//! The last reference of a DAX page is dropped just when a task begins to wait for it, many times.
//! A lost wake-up leaves the waiter asleep, which the test notices.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, Device};
use crate::fsdax::{EXT4, REFLINK, XFS};
use crate::harness::note;
use crate::tests::counts::{IDLE, MAPPED};
use crate::tests::fsdax::{LARGE, SMALL, Setup};
use crate::tests::{Ctx, Test, test};
use crate::threads::{self, SetOnDrop};
use crate::uapi::*;
use crate::{check, files};

pub const TESTS: &[Test] = &[
    test("fsdax.race_ext4", unpin::<EXT4, QUICK>),
    test("fsdax.race_xfs", unpin::<XFS, QUICK>),
    test("fsdax.race_reflink", unpin::<REFLINK, QUICK>),
    test("fsdax.race_many_ext4", unpin::<EXT4, MANY>),
    test("fsdax.race_many_xfs", unpin::<XFS, MANY>),
    test("fsdax.race_many_reflink", unpin::<REFLINK, MANY>),
    test("fsdax.race_unlink_ext4", unlink::<EXT4>),
    test("fsdax.race_unlink_xfs", unlink::<XFS>),
    test("fsdax.race_unlink_reflink", unlink::<REFLINK>),
    test("fsdax.race_faults_ext4", faults::<EXT4>),
    test("fsdax.race_faults_xfs", faults::<XFS>),
    test("fsdax.race_faults_reflink", faults::<REFLINK>),
    test("fsdax.race_gup_fast_ext4", gup_fast::<EXT4>),
    test("fsdax.race_gup_fast_xfs", gup_fast::<XFS>),
    test("fsdax.race_gup_fast_reflink", gup_fast::<REFLINK>),
];

/// The numbers of rounds: of a quick test, of a thorough one (10,500 on all file systems together),
/// and of a test with slow rounds.
const QUICK: usize = 300;
const MANY: usize = 3_500;
const SLOW: usize = 1_000;

/// A limit that is far longer than a round on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

type Call = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// A thread that makes one call after the other, and reports for each whether it slept.
struct Taker {
    calls: Sender<Call>,
    done: Receiver<io::Result<bool>>,
    begun: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    /// The time between the start of the call and the drop of the reference. It is adjusted so that
    /// the call sleeps about every other time.
    delay: Duration,
    slept: usize,
    rounds: usize,
}

impl Taker {
    fn start() -> Self {
        let (calls, todo) = channel::<Call>();
        let (say, done) = channel();
        let begun = Arc::new(AtomicBool::new(false));
        let flag = begun.clone();
        let thread = std::thread::spawn(move || {
            for call in todo {
                let before = files::sleeps();
                flag.store(true, Ordering::SeqCst);
                let result = call();
                let slept = before.and_then(|n| Ok(files::sleeps()? > n));
                // The receiver may have gone.
                let _ = say.send(result.and(slept));
            }
        });
        Self {
            calls,
            done,
            begun,
            thread,
            delay: Duration::from_micros(20),
            slept: 0,
            rounds: 0,
        }
    }

    /// Lets the thread make a call that has to wait, and drops the reference meanwhile.
    #[track_caller]
    fn round(&mut self, call: Call, release: impl FnOnce() -> Outcome) -> Outcome {
        self.begun.store(false, Ordering::SeqCst);
        self.calls
            .send(call)
            .map_err(|_| Fail::failed("the other thread: expected one, found none"))?;
        while !self.begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let start = Instant::now();
        while start.elapsed() < self.delay {
            std::thread::yield_now();
        }
        let early = self.done.try_recv();
        check!(
            matches!(early, Err(TryRecvError::Empty)),
            "round {}, with the page still held: expected a wait, found {early:?}",
            self.rounds
        );
        release()?;
        let slept = match self.done.recv_timeout(LIMIT) {
            Ok(result) => result.or_fail("the call")?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Fail::failed(format!(
                    "round {}: expected an end as nobody holds the page, found the waiter asleep",
                    self.rounds
                )));
            }
            Err(e) => return Err(Fail::failed(format!("the other thread: {e}"))),
        };
        self.rounds += 1;
        self.slept += usize::from(slept);
        self.delay = match slept {
            true => self.delay * 9 / 10,
            false => self.delay * 11 / 10 + Duration::from_nanos(500),
        };
        Ok(())
    }

    /// Ends the thread. Some calls must have slept, or no wake-up was tested.
    #[track_caller]
    fn end(self) -> Outcome {
        drop(self.calls);
        self.thread
            .join()
            .map_err(|_| Fail::failed("the other thread: expected its end, found a panic"))?;
        note(&format!("{} of {} calls slept", self.slept, self.rounds));
        check!(
            self.slept > self.rounds / 20,
            "calls that slept: expected one in 20, found {} of {}",
            self.slept,
            self.rounds
        );
        Ok(())
    }
}

/// A page is released while truncation or a hole punch begins to wait for it.
fn unpin<const KIND: usize, const ROUNDS: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    let file = Arc::new(s.fs.file("a", SMALL)?);
    let buf = Buffer::shared(&file, SMALL)?;
    let flavours = [
        0,
        ZDM_PIN_GET,
        ZDM_PIN_WRITE | ZDM_PIN_FAST,
        ZDM_PIN_GET | ZDM_PIN_FAST,
    ];
    let mut taker = Taker::start();
    for round in 0..ROUNDS {
        if round % 2 == 1 {
            files::truncate(&file, SMALL).or_fail("ftruncate")?;
        }
        buf.set(1, 0, round as u64);
        let flags = flavours[round % flavours.len()];
        let id = s.device.pin(&buf, 1, 1, flags).or_fail("ZDM_PIN")?;
        let file = file.clone();
        let call: Call = match round % 2 {
            0 => Box::new(move || files::truncate(&file, 0)),
            _ => Box::new(move || files::punch(&file, 0, SMALL)),
        };
        taker.round(call, || s.device.unpin(id, 0).or_fail("ZDM_UNPIN"))?;
        if round % 2 == 1 {
            let word = buf.get(1, 0);
            check!(word == 0, "word in the hole: expected 0, found {word}");
        }
    }
    taker.end()?;
    drop((file, buf));
    s.unmount()
}

/// A huge page is locked by fsync(2) and by faults on all of it, while others wait in faults on single
/// pages of it: each is woken, and finds its data.
fn faults<const KIND: usize>(_: &Ctx) -> Outcome {
    const TIME: Duration = Duration::from_secs(2);
    let s = Setup::new(KIND)?;
    let (file, whole) = s.mapped("a", LARGE, 850)?;
    // Mappings with room for small entries only.
    let narrow = |page: usize| -> Outcome<Buffer> {
        let map = Buffer::shared(&file, LARGE)?;
        map.unmap(0, page)?;
        map.unmap(page + 3, LARGE - page - 3)?;
        Ok(map)
    };
    let pages = [7, 300];
    let maps = [narrow(pages[0])?, narrow(pages[1])?];
    let over = AtomicBool::new(false);
    let counts = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| -> Outcome {
        let mut readers = Vec::new();
        for ((map, page), count) in maps.iter().zip(pages).zip(&counts) {
            let over = &over;
            readers.push(scope.spawn(move || -> Outcome {
                while !over.load(Ordering::SeqCst) {
                    map.advise(page, 3, libc::MADV_DONTNEED)?;
                    map.check(page, 1, 850)?;
                    // A write fault waits for the entry, too.
                    let word = map.get(page + 1, 0);
                    map.set(page + 1, 0, word);
                    count.fetch_add(1, Ordering::SeqCst);
                }
                Ok(())
            }));
        }
        let _over = SetOnDrop(&over);
        let start = Instant::now();
        while start.elapsed() < TIME {
            for page in [0, 100] {
                let word = whole.get(page, 0);
                whole.set(page, 0, word);
            }
            file.sync_data().or_fail("fdatasync")?;
            whole.advise(0, LARGE, libc::MADV_DONTNEED)?;
        }
        over.store(true, Ordering::SeqCst);
        readers.into_iter().try_for_each(threads::join)
    })?;
    let counts = counts.map(AtomicU64::into_inner);
    note(&format!("{counts:?} rounds of faults"));
    check!(
        counts.iter().all(|n| *n > 1),
        "rounds of faults: expected some of each, found {counts:?}"
    );
    whole.check(0, LARGE, 850)?;
    drop((file, whole, maps));
    s.unmount()
}

/// A page is released while the last user of an unlinked file begins to wait for it.
fn unlink<const KIND: usize>(_: &Ctx) -> Outcome {
    let s = Setup::new(KIND)?;
    let mut taker = Taker::start();
    for round in 0..SLOW {
        let file = s.fs.file("a", SMALL)?;
        let buf = Buffer::shared(&file, SMALL)?;
        buf.set(1, 0, round as u64);
        let id = s.device.pin(&buf, 1, 1, 0).or_fail("ZDM_PIN")?;
        s.fs.remove("a")?;
        let call: Call = Box::new(move || {
            drop((file, buf));
            Ok(())
        });
        taker.round(call, || s.device.unpin(id, 0).or_fail("ZDM_UNPIN"))?;
    }
    taker.end()?;
    s.unmount()
}

/// Threads pin pages by the fast way, which takes no lock, while the pages are unmapped and their
/// blocks are freed. No thread pins a page that has been freed, which core mm and the file system
/// would report, and in the end no page is held.
///
/// The blocks are freed after the mapping: truncation would not end for a page that the threads can
/// fault in again, see `mapped_again`.
fn gup_fast<const KIND: usize>(_: &Ctx) -> Outcome {
    const THREADS: u32 = 3;
    let s = Setup::new(KIND)?;
    for pages in [SMALL, LARGE] {
        let file = s.fs.file("a", pages)?;
        let buf = Buffer::shared(&file, pages)?;
        buf.fill(0, pages, 850);
        let frames = s.expect(&buf, MAPPED, "mapped")?;
        let address = Arc::new(AtomicU64::new(buf.at(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let pinned = Arc::new(AtomicU64::new(0));
        let threads: Vec<JoinHandle<Outcome>> = (0..THREADS)
            .map(|i| {
                let (address, stop, pinned) = (address.clone(), stop.clone(), pinned.clone());
                std::thread::spawn(move || {
                    let device = Device::open(0)?;
                    let flags = [0, ZDM_PIN_GET, ZDM_PIN_WRITE][i as usize % 3] | ZDM_PIN_FAST;
                    while !stop.load(Ordering::Relaxed) {
                        let at = address.load(Ordering::Relaxed);
                        match device.pin_at(at, 2, flags) {
                            Ok(id) => {
                                pinned.fetch_add(1, Ordering::Relaxed);
                                device.unpin(id, 0).or_fail("ZDM_UNPIN")?;
                            }
                            // The address is not mapped, or lies beyond the end of the file.
                            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {}
                            Err(e) => return Err(e).or_fail("ZDM_PIN"),
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let result = unmap_and_truncate(&file, buf, pages, &address);
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| Fail::failed("a pinning thread: expected its end, found a panic"))??;
        }
        result?;
        let pinned = pinned.load(Ordering::Relaxed);
        note(&format!(
            "{pages} pages: {pinned} pins by {THREADS} threads"
        ));
        check!(pinned > 0, "pins: expected some, found none");
        s.expect_frames(&frames, IDLE, "unmapped")?;
        drop(file);
        s.fs.remove("a")?;
        s.expect_free(&frames, "unlinked")?;
    }
    s.unmount()
}

/// Runs for some seconds.
fn unmap_and_truncate(file: &File, buf: Buffer, pages: usize, address: &AtomicU64) -> Outcome {
    let start = Instant::now();
    let mut buf = Some(buf);
    let mut round = 0u64;
    while start.elapsed() < Duration::from_secs(2) {
        drop(buf.take());
        match round % 4 {
            1 => files::punch(file, 0, pages).or_fail("hole punch")?,
            3 => {
                files::truncate(file, 0).or_fail("ftruncate")?;
                files::truncate(file, pages).or_fail("ftruncate")?;
            }
            _ => {}
        }
        // The new mapping may have the same address or another one.
        let new = Buffer::shared(file, pages)?;
        address.store(new.at(0), Ordering::Relaxed);
        new.set(0, 0, round);
        new.get(1, 0);
        buf = Some(new);
        round += 1;
    }
    note(&format!("{pages} pages: {round} mappings"));
    Ok(())
}
