// SPDX-License-Identifier: GPL-2.0
//! `report.html`: a run, or several runs side by side, as one page in one file.
//!
//! [`model`] reads what a run left in its folder, [`first`] finds what failed first; [`page`],
//! [`timeline`], [`bench`] and [`kills`] write the markup. The page loads nothing and has no
//! script.

pub mod bench;
pub mod first;
pub mod kills;
pub mod model;
pub mod page;
pub mod timeline;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use kills::Kills;
use model::Run;

/// The command line of `zdvm report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folders of runs, which the page shows side by side, and folders of `zdvm mutants`.
    #[arg(required = true)]
    dirs: Vec<PathBuf>,
    /// Write to this file; the default is report.html in the first folder.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// The name of the page in a run's folder.
pub const FILE: &str = "report.html";

/// Writes the page of some runs. Returns its path.
pub fn write(dirs: &[PathBuf], out: &Path) -> Result<()> {
    let (mut runs, mut kills) = (Vec::new(), Vec::new());
    for dir in dirs {
        if !dir.is_dir() {
            bail!("{} is no folder", dir.display());
        }
        match Kills::read(dir)? {
            Some(matrix) => kills.push(matrix),
            None => runs.push(Run::read(dir)?),
        }
    }
    fs::write(out, page::page(&runs, &kills)).with_context(|| format!("writing {}", out.display()))
}

/// Writes the page of a run that has just been judged. A page that cannot be written does not
/// change the verdict.
pub fn beside(dir: &Path) {
    if let Err(e) = write(&[dir.to_owned()], &dir.join(FILE)) {
        eprintln!("zdvm: no {FILE}: {e:#}");
    }
}

/// Runs the command.
pub fn command(args: &Args) -> Result<()> {
    let Some(first) = args.dirs.first() else { return Ok(()) };
    let out = args.out.clone().unwrap_or_else(|| first.join(FILE));
    write(&args.dirs, &out)?;
    crate::report::say(&format!("{}\n", out.display()));
    Ok(())
}

/// Escapes text for use between tags and in attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // HTML has no other control character.
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
