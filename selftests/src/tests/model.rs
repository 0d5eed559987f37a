// SPDX-License-Identifier: GPL-2.0

//! Processes and devices change memory in a random order, next to a model that knows the content of
//! each byte (I10).
//!
//! A process has some memory and opens a file of every device of the machine. When it forks, the
//! child continues at the same time with a copy of the model. A failure names the seed;
//! `ZDM_SEED=123 zdm-selftests model.random` in `make shell` starts with it again. The processes
//! then take the same steps, but their timing varies.

use std::time::{SystemTime, UNIX_EPOCH};

use super::allocator::Random;
use super::fight::in_turn;
use super::leak::settled;
use super::target::{PRIVATE, Target, open_all};
use super::{Ctx, Test, test};
use crate::check;
use crate::check::{Fail, OrFail, Outcome};
use crate::device::{Buffer, HUGE_PAGES, PAGE, pattern_bytes};
use crate::harness::{Child, note};
use crate::memory::{WORDS, pattern_words};
use crate::swap::Swap;

pub const TESTS: &[Test] = &[
    test("model.short", short),
    test("model.random", random),
    test("model.swap", swap),
];

/// Two huge pages, as long as they are not split, and some small pages.
const PAGES: usize = 2 * HUGE_PAGES + 96;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// The number of processes in a line of descent, and of children that a process has at a time.
const DEPTH: usize = 3;
const CHILDREN: usize = 2;

/// The expected content of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Zero,
    /// The pattern of `seed` for a page that was page `page` when it was filled.
    Pattern {
        seed: u64,
        page: usize,
    },
}

/// The model of a page.
#[derive(Clone, Copy)]
struct Slot {
    content: Content,
    /// A word that was written since, and its value.
    word: Option<(usize, u64)>,
    rights: i32,
}

impl Slot {
    const FRESH: Self = Self {
        content: Content::Zero,
        word: None,
        rights: RW,
    };

    fn readable(&self) -> bool {
        self.rights & libc::PROT_READ != 0
    }

    fn writable(&self) -> bool {
        self.rights & libc::PROT_WRITE != 0
    }

    fn expected(&self) -> [u64; WORDS] {
        let mut words = match self.content {
            Content::Zero => [0; WORDS],
            Content::Pattern { seed, page } => pattern_words(seed, page),
        };
        if let Some((word, value)) = self.word {
            words[word] = value;
        }
        words
    }

    #[track_caller]
    fn check(&self, page: usize, found: &[u64; WORDS], who: &str) -> Outcome {
        let expected = self.expected();
        match expected.iter().zip(found).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(word) => Err(Fail::failed(format!(
                "word {word} of page {page} by {who}: expected {:#x}, found {:#x}",
                expected[word], found[word]
            ))),
        }
    }
}

/// A process of the test.
struct Walk<'a> {
    ctx: &'a Ctx,
    random: Random,
    buf: &'a Buffer,
    model: Vec<Slot>,
    targets: Vec<Target>,
    children: Vec<Child>,
    depth: usize,
    /// How often each kind of step was taken.
    taken: [usize; STEPS.len()],
}

type Step = for<'a> fn(&mut Walk<'a>) -> Outcome;

/// The steps with their relative weights. mlock is not among them, for the reason in `advice.rs`.
const STEPS: &[(&str, usize, Step)] = &[
    ("write", 12, |w| w.write()),
    ("write a word", 12, |w| w.write_word()),
    ("device write", 8, |w| w.device_write()),
    ("to device", 24, |w| w.go()),
    ("to system", 10, |w| w.come_back()),
    ("device read", 8, |w| w.device_read()),
    ("read", 8, |w| w.read()),
    ("exclusive", 4, |w| w.exclusive()),
    ("rights", 6, |w| w.rights()),
    ("throw away", 4, |w| w.throw_away()),
    ("unmap", 3, |w| w.unmap()),
    ("move", 6, |w| w.move_page()),
    ("move and stay", 3, |w| w.move_contents()),
    ("advise", 6, |w| w.advise()),
    ("fork", 4, |w| w.fork()),
    ("join", 3, |w| w.join()),
    ("close", 2, |w| w.close()),
    ("check all", 3, |w| w.check_all()),
];

impl<'a> Walk<'a> {
    fn new(
        ctx: &'a Ctx,
        seed: u64,
        buf: &'a Buffer,
        model: Vec<Slot>,
        depth: usize,
    ) -> Outcome<Self> {
        Ok(Self {
            ctx,
            random: Random(seed),
            buf,
            model,
            targets: open_all(ctx)?,
            children: Vec::new(),
            depth,
            taken: [0; STEPS.len()],
        })
    }

    /// Takes steps, waits for all children and checks every byte.
    fn run(&mut self, steps: usize) -> Outcome {
        let all: usize = STEPS.iter().map(|s| s.1).sum();
        for step in 0..steps {
            let mut chance = self.random.below(all);
            let kind = STEPS.iter().position(|s| {
                let hit = chance < s.1;
                chance = chance.wrapping_sub(s.1);
                hit
            });
            let Some(kind) = kind else { continue };
            self.taken[kind] += 1;
            STEPS[kind].2(self).map_err(|e| {
                Fail::failed(format!(
                    "step {step}, {}, in depth {}: {e}",
                    STEPS[kind].0, self.depth
                ))
            })?;
        }
        for child in self.children.drain(..) {
            child.join()?;
        }
        self.check_all()?;
        let last = self.random.below(self.targets.len());
        // The close of the files frees the pages that are still on the devices, or brings them
        // back.
        drop(self.targets.remove(last));
        self.check_all()
    }

    /// A random range of pages: mostly few, sometimes a whole huge page.
    fn range(&mut self) -> (usize, usize) {
        if self.random.below(5) == 0 {
            let first = self.random.below(2) * HUGE_PAGES;
            return (first, HUGE_PAGES);
        }
        let first = self.random.below(PAGES);
        let most = (PAGES - first).min(24);
        (first, 1 + self.random.below(most))
    }

    /// The runs of pages within a range that meet a condition.
    fn runs(&self, (first, n): (usize, usize), fit: fn(&Slot) -> bool) -> Vec<(usize, usize)> {
        let mut at = first;
        let mut runs = Vec::new();
        for run in self.model[first..first + n].chunk_by(|a, b| fit(a) == fit(b)) {
            if fit(&run[0]) {
                runs.push((at, run.len()));
            }
            at += run.len();
        }
        runs
    }

    fn target(&mut self) -> usize {
        self.random.below(self.targets.len())
    }

    fn seed(&mut self) -> u64 {
        1 + self.random.below(0x7fff) as u64
    }

    /// Records that pages hold the pattern of `seed` now.
    fn filled(&mut self, first: usize, n: usize, seed: u64) {
        for (page, slot) in self.model.iter_mut().enumerate().skip(first).take(n) {
            slot.content = Content::Pattern { seed, page };
            slot.word = None;
        }
    }

    /// Checks bytes that a device returned.
    fn check_bytes(&self, first: usize, bytes: &[u8], who: &str) -> Outcome {
        for (i, page) in bytes.chunks_exact(PAGE).enumerate() {
            let words = std::array::from_fn(|word| {
                let bytes = page[word * 8..word * 8 + 8].iter().rev();
                bytes.fold(0, |n, b| (n << 8) | u64::from(*b))
            });
            self.model[first + i].check(first + i, &words, who)?;
        }
        Ok(())
    }

    fn check(&self, first: usize, n: usize) -> Outcome {
        for page in first..first + n {
            if self.model[page].readable() {
                self.model[page].check(page, &self.buf.words(page), "the CPU")?;
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Outcome {
        let range = self.range();
        let seed = self.seed();
        for (first, n) in self.runs(range, Slot::writable) {
            self.buf.fill(first, n, seed);
            self.filled(first, n, seed);
        }
        Ok(())
    }

    /// Writes one word of each page: the rest must stay the same.
    fn write_word(&mut self) -> Outcome {
        let range = self.range();
        for (first, n) in self.runs(range, Slot::writable) {
            for page in first..first + n.min(24) {
                // A page has one written word in the model: write the same word again.
                let word = match self.model[page].word {
                    Some((word, _)) => word,
                    None => self.random.below(WORDS),
                };
                let value = self.seed();
                self.buf.set(page, word, value);
                self.model[page].word = Some((word, value));
            }
            self.check(first, 1)?;
        }
        Ok(())
    }

    fn device_write(&mut self) -> Outcome {
        let range = self.range();
        let (target, seed) = (self.target(), self.seed());
        for (first, n) in self.runs(range, Slot::writable) {
            let data = pattern_bytes(seed, first, n);
            in_turn(|| self.targets[target].write(self.buf, first, &data)).or_fail("WRITE")?;
            self.filled(first, n, seed);
            self.check(first, 1)?;
        }
        Ok(())
    }

    fn go(&mut self) -> Outcome {
        let (first, n) = self.range();
        let target = self.target();
        match self.targets[target].to_device(self.buf, first, n) {
            Ok(moved) => self.check_bytes(first, &moved.data, "MIGRATE_TO_DEV"),
            Err(e) => {
                // The range has no access rights, is on another device, or is in use by another
                // process.
                let errnos = [libc::EINVAL, libc::ENOENT, libc::EBUSY, libc::EFAULT];
                check!(
                    e.raw_os_error().is_some_and(|n| errnos.contains(&n)),
                    "MIGRATE_TO_DEV: expected success or {errnos:?}, found {e}"
                );
                Ok(())
            }
        }
    }

    fn come_back(&mut self) -> Outcome {
        let (first, n) = self.range();
        let target = self.target();
        match self.targets[target].to_system(self.buf, first, n) {
            // The range has no access rights.
            Err(e) if e.raw_os_error() != Some(libc::EINVAL) => Err(e).or_fail("MIGRATE_TO_SYS"),
            _ => Ok(()),
        }
    }

    fn device_read(&mut self) -> Outcome {
        let range = self.range();
        let target = self.target();
        for (first, n) in self.runs(range, Slot::readable) {
            let read = in_turn(|| self.targets[target].read(self.buf, first, n)).or_fail("READ")?;
            self.check_bytes(first, &read.data, "READ")?;
        }
        Ok(())
    }

    fn read(&mut self) -> Outcome {
        let (first, n) = self.range();
        self.check(first, n)
    }

    fn exclusive(&mut self) -> Outcome {
        let range = self.range();
        let target = self.target();
        for (first, n) in self.runs(range, Slot::writable) {
            match self.targets[target].exclusive(self.buf, first, n) {
                Ok(taken) => self.check_bytes(first, &taken.data, "EXCLUSIVE")?,
                Err(e) => {
                    // A file or process has already taken the pages away again.
                    let errnos = [libc::ENOENT, libc::EBUSY, libc::EFAULT];
                    check!(
                        e.raw_os_error().is_some_and(|n| errnos.contains(&n)),
                        "EXCLUSIVE: expected success or {errnos:?}, found {e}"
                    );
                }
            }
        }
        Ok(())
    }

    fn rights(&mut self) -> Outcome {
        let (first, n) = self.range();
        let rights = [RW, RW, libc::PROT_READ, libc::PROT_NONE][self.random.below(4)];
        self.buf.protect(first, n, rights)?;
        for slot in &mut self.model[first..first + n] {
            slot.rights = rights;
        }
        Ok(())
    }

    fn throw_away(&mut self) -> Outcome {
        let (first, n) = self.range();
        self.buf.advise(first, n, libc::MADV_DONTNEED)?;
        for slot in &mut self.model[first..first + n] {
            (slot.content, slot.word) = (Content::Zero, None);
        }
        self.check(first, n.min(4))
    }

    /// Unmaps pages and maps new ones at once, before another mapping can take the place.
    fn unmap(&mut self) -> Outcome {
        let (first, n) = self.range();
        self.buf.unmap(first, n)?;
        self.buf.map_again(first, n)?;
        if self.random.below(2) == 0 {
            self.buf.advise(first, n, libc::MADV_HUGEPAGE)?;
        }
        self.model[first..first + n].fill(Slot::FRESH);
        Ok(())
    }

    /// Moves pages one by one over others with mremap, and maps new ones in their old place.
    fn move_page(&mut self) -> Outcome {
        for _ in 0..1 + self.random.below(4) {
            let (from, to) = (self.random.below(PAGES), self.random.below(PAGES));
            if from == to {
                continue;
            }
            self.buf.move_pages(from, 1, self.buf, to)?;
            self.buf.map_again(from, 1)?;
            self.model[to] = self.model[from];
            self.model[from] = Slot::FRESH;
            self.check(to, 1)?;
        }
        Ok(())
    }

    /// As `move_page`, but the old place stays mapped without pages.
    fn move_contents(&mut self) -> Outcome {
        let (from, to) = (self.random.below(PAGES), self.random.below(PAGES));
        if from != to {
            self.buf.move_contents(from, 1, self.buf, to)?;
            self.model[to] = self.model[from];
            let slot = &mut self.model[from];
            (slot.content, slot.word) = (Content::Zero, None);
            self.check(from, 1)?;
            self.check(to, 1)?;
        }
        Ok(())
    }

    fn advise(&mut self) -> Outcome {
        let (mut first, mut n) = self.range();
        let advice = [
            libc::MADV_COLD,
            libc::MADV_PAGEOUT,
            libc::MADV_POPULATE_READ,
            libc::MADV_COLLAPSE,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
        ][self.random.below(6)];
        if advice == libc::MADV_COLLAPSE {
            (first, n) = (self.random.below(2) * HUGE_PAGES, HUGE_PAGES);
        }
        // The advice may be refused for locked or shared pages and for pages without access.
        let _ = self.buf.try_advise(first, n, advice);
        Ok(())
    }

    fn fork(&mut self) -> Outcome {
        if self.depth + 1 == DEPTH || self.children.len() == CHILDREN {
            return Ok(());
        }
        let (seed, model) = (self.random.below(1 << 31) as u64, self.model.clone());
        let child = Child::spawn(|| {
            let mut walk = Walk::new(self.ctx, seed, self.buf, model, self.depth + 1)?;
            walk.run(60)
        })?;
        self.children.push(child);
        Ok(())
    }

    fn join(&mut self) -> Outcome {
        match self.children.pop() {
            Some(child) => child.join(),
            None => Ok(()),
        }
    }

    /// Closes the file of a device, which brings its pages back, and opens it again.
    fn close(&mut self) -> Outcome {
        self.targets = {
            let target = self.target();
            let mut targets = std::mem::take(&mut self.targets);
            drop(targets.swap_remove(target));
            drop(targets);
            open_all(self.ctx)?
        };
        Ok(())
    }

    fn check_all(&mut self) -> Outcome {
        match self.random.below(2) {
            0 => self.check(0, PAGES),
            _ => {
                let target = self.target();
                for (first, n) in self.runs((0, PAGES), Slot::readable) {
                    let read = in_turn(|| self.targets[target].read(self.buf, first, n))
                        .or_fail("READ")?;
                    self.check_bytes(first, &read.data, "READ")?;
                }
                Ok(())
            }
        }
    }
}

/// Runs the model once in a process and a cgroup of its own.
fn walk(ctx: &Ctx, seed: u64, steps: usize) -> Outcome {
    let named = |e: Fail| match e {
        Fail::Skip(why) => Fail::Skip(why),
        e => Fail::failed(format!("ZDM_SEED={seed}: {e}")),
    };
    settled(ctx, PRIVATE, |_| {
        let work = || -> Outcome {
            let buf = Buffer::anon_huge_aligned(PAGES)?;
            buf.advise(0, 2 * HUGE_PAGES, libc::MADV_HUGEPAGE)?;
            let model = vec![Slot::FRESH; PAGES];
            let mut walk = Walk::new(ctx, seed, &buf, model, 0)?;
            walk.run(steps)?;
            let taken = STEPS.iter().zip(walk.taken);
            let taken: Vec<String> = taken.map(|(s, n)| format!("{} {n}", s.0)).collect();
            note(&format!("ZDM_SEED={seed}: {}", taken.join(", ")));
            Ok(())
        };
        work().map_err(named)
    })
    .map_err(named)
}

/// The seed from the environment, or one from the clock.
fn first_seed() -> Outcome<u64> {
    match std::env::var("ZDM_SEED") {
        Ok(text) => text
            .parse()
            .map_err(|e| Fail::failed(format!("ZDM_SEED={text}: {e}"))),
        // Every time gives a valid seed.
        Err(_) => Ok(SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |time| time.subsec_nanos().into())),
    }
}

/// The seed is fixed.
fn short(ctx: &Ctx) -> Outcome {
    walk(ctx, 20, 120)
}

fn random(ctx: &Ctx) -> Outcome {
    let first = first_seed()?;
    for seed in first..first + 3 {
        walk(ctx, seed, 200)?;
    }
    Ok(())
}

/// With swap on, MADV_PAGEOUT moves pages out.
fn swap(ctx: &Ctx) -> Outcome {
    let first = first_seed()?;
    let _swap = Swap::on()?;
    for seed in first..first + 2 {
        walk(ctx, seed, 200)?;
    }
    Ok(())
}
