// SPDX-License-Identifier: GPL-2.0
//! Finds the checkout and the cache, and takes locks.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::job;

/// Finds the checkout that this run works on.
pub fn find(given: Option<PathBuf>) -> Result<PathBuf> {
    let is_repo = |dir: &Path| dir.join("qemu/kernel/matrix.toml").is_file();
    if let Some(dir) = given {
        let dir = dir.canonicalize().with_context(|| format!("--repo {}", dir.display()))?;
        if !is_repo(&dir) {
            bail!("--repo {}: no qemu/kernel/matrix.toml there", dir.display());
        }
        return Ok(dir);
    }
    let here = env::current_dir()?;
    match here.ancestors().find(|d| is_repo(d)) {
        Some(dir) => Ok(dir.to_owned()),
        None => bail!("no qemu/kernel/matrix.toml here or above; give --repo DIR"),
    }
}

/// The cache directory; makes it if it does not exist.
pub fn cache(sub: &str) -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    let dir = base.join("zdmirror").join(sub);
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// Hashes parts to a key. The lengths of the parts are hashed, too, so that "ab","c" and "a","bc"
/// differ.
pub fn key<T: AsRef<[u8]>>(parts: impl IntoIterator<Item = T>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    digest.iter().take(6).fold(String::new(), |all, b| all + &format!("{b:02x}"))
}

/// An exclusive lock, held until it is dropped.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code)] File);

/// Takes a lock; prints a line if another run holds it.
pub fn lock(path: &Path) -> Result<Lock> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut said = false;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if !said {
            eprintln!("zdvm: waiting for another zdvm that holds {}", path.display());
            said = true;
        }
        job::check_signals()?;
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(Lock(file))
}

/// How long [`lock_soon`] waits.
const SOON: Duration = Duration::from_secs(2);

/// Locks a file, unless another process keeps it for more than [`SOON`].
pub fn lock_soon(path: &Path) -> Option<Lock> {
    let end = Instant::now() + SOON;
    loop {
        if let Some(lock) = try_lock(path) {
            return Some(lock);
        }
        if Instant::now() > end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Takes a lock unless it is held.
pub fn try_lock(path: &Path) -> Option<Lock> {
    let file = File::create(path).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(Lock(file))
}
