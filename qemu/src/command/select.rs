// SPDX-License-Identifier: GPL-2.0
//! The options that select tests.

use anyhow::{Context, Result};
use regex::Regex;

use crate::plan::expected::Selection;

/// The options that select tests.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Select {
    /// Run only this suite: kunit, selftests, hmm, or another one of qemu/kernel/matrix.toml; may be
    /// given more than once.
    #[arg(long = "suite")]
    pub suites: Vec<String>,
    /// Run only tests whose name matches this regular expression.
    #[arg(long)]
    pub filter: Option<String>,
    /// Run the slow tests, too.
    #[arg(long)]
    pub full: bool,
}

impl Select {
    /// The selection, for a kernel with any configuration.
    pub fn selection(&self) -> Result<Selection> {
        let filter = self.filter.as_deref().map(Regex::new).transpose().context("--filter")?;
        Ok(Selection { suites: self.suites.clone(), filter, full: self.full, config: None })
    }
}
