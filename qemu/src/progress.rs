// SPDX-License-Identifier: GPL-2.0
//! Live progress: a bar on a terminal, occasional plain lines elsewhere.

use std::io::{IsTerminal, stderr};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The terminal's bars. There are two while two kernels are built.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Progress of one piece of work.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    title: String,
    shown: Instant,
    start: Instant,
    every: Duration,
}

impl Progress {
    /// Begins; `total` is 0 if it is not known.
    pub fn new(title: &str, total: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let template = if total == 0 {
                "{spinner} {prefix} {elapsed} {pos} {wide_msg}"
            } else {
                "{spinner} {prefix} [{bar:30}] {pos}/{len} {elapsed} {wide_msg}"
            };
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = if total == 0 { ProgressBar::no_length() } else { ProgressBar::new(total) };
            BARS.add(bar.with_style(style).with_prefix(title.to_owned()))
        });
        let now = Instant::now();
        if bar.is_none() {
            eprintln!("zdvm: {title}");
        }
        Self {
            bar,
            title: title.to_owned(),
            shown: now,
            start: now,
            every: Duration::from_secs(10),
        }
    }

    /// Shows the number of steps done and the current one.
    pub fn set(&mut self, done: u64, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(what.to_owned());
            bar.tick();
        } else if self.shown.elapsed() >= self.every {
            self.shown = Instant::now();
            let secs = self.start.elapsed().as_secs();
            eprintln!("zdvm: {}: {secs} s, {done} done, {what}", self.title);
        }
    }

    /// Prints a line of its own.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// The time since the beginning.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
