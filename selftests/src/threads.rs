// SPDX-License-Identifier: GPL-2.0

//! Threads of a test: a panic of a thread is a failure of the test.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;

use crate::check::{Fail, Outcome};

/// Waits for the end of a thread and returns its outcome.
#[track_caller]
pub fn join<T>(thread: ScopedJoinHandle<'_, Outcome<T>>) -> Outcome<T> {
    match thread.join() {
        Ok(outcome) => outcome,
        Err(_) => Err(Fail::failed("a thread panicked")),
    }
}

/// Runs `work` in `n` threads at once, each with its number. Returns the first failure.
#[track_caller]
pub fn run(n: usize, work: impl Fn(usize) -> Outcome + Sync) -> Outcome {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..n).map(|i| scope.spawn(move || work(i))).collect();
        let mut outcome = Ok(());
        for thread in threads {
            outcome = outcome.and(join(thread));
        }
        outcome
    })
}

/// Sets a flag when dropped, so that the other threads end in any case.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
