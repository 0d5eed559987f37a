// SPDX-License-Identifier: GPL-2.0

//! A file whose reads and writes take as long as a test wants: a FUSE file system with this single
//! file, served by the test. Direct I/O to the file holds the pages of the caller until the test
//! answers.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::MntFlags;

use crate::{files, sys};

const INIT: u32 = 26;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
/// These requests need no answer.
const UNANSWERED: &[u32] = &[2, 36, 42];

const FOPEN_DIRECT_IO: u32 = 1;
/// FUSE_ASYNC_READ of the flags of INIT.
const ASYNC_READ: u32 = 1;
/// The largest request in bytes.
const MAX: u32 = 128 << 10;
const HEADER: usize = 40;
/// The size of fuse_read_in and of fuse_write_in.
const RW_HEADER: usize = 40;

/// The file system. Dropping it unmounts it.
pub struct SlowFile {
    device: File,
    path: PathBuf,
}

/// A read or write that waits for its answer.
pub struct Request {
    unique: u64,
    /// The data to write, or nothing for a read.
    pub data: Vec<u8>,
    pub size: u32,
    pub is_write: bool,
}

/// Builds a little-endian structure field by field.
#[derive(Default)]
struct Out(Vec<u8>);

impl Out {
    fn u64(mut self, n: u64) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn u32(mut self, n: u32) -> Self {
        self.0.extend(n.to_le_bytes());
        self
    }

    fn zeroes(mut self, n: usize) -> Self {
        self.0.resize(self.0.len() + n, 0);
        self
    }
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let bytes = bytes.get(at..at + len).unwrap_or_default();
    bytes.iter().rev().fold(0, |n, b| (n << 8) | u64::from(*b))
}

impl SlowFile {
    /// Mounts the file system over an ordinary file.
    pub fn mount(path: &Path) -> io::Result<Self> {
        File::create(path)?;
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let fd = device.as_raw_fd();
        let data = format!("fd={fd},rootmode=100600,user_id=0,group_id=0");
        files::mount("zdm-slow", path, "fuse", &data)?;
        let path = path.to_path_buf();
        Ok(Self { device, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn answer(&self, unique: u64, error: i32, body: &[u8]) -> io::Result<()> {
        // CAST: An answer is far shorter than 4 GiB; an error has its sign bit.
        let head = Out::default()
            .u32((16 + body.len()) as u32)
            .u32(error as u32)
            .u64(unique);
        let text = [&head.0[..], body].concat();
        (&self.device).write_all(&text)
    }

    /// Serves requests until a read or write comes, which then waits for `complete`. Returns `None`
    /// if no request comes within the limit.
    pub fn next(&self, limit: Duration) -> io::Result<Option<Request>> {
        let mut text = vec![0; MAX as usize + 4096];
        loop {
            if !sys::readable(&self.device, limit)? {
                return Ok(None);
            }
            let n = (&self.device).read(&mut text)?;
            let request = &text[..n];
            let unique = number(request, 8, 8);
            // CAST: The field has four bytes.
            let opcode = number(request, 4, 4) as u32;
            let body = match opcode {
                // Version 7.31: the kernel leaves out newer features. It reads ahead without waiting: a
                // task that waits for an answer itself stays until the answer comes, also if it is killed.
                INIT => {
                    Out::default()
                        .u32(7)
                        .u32(31)
                        .u32(MAX)
                        .u32(ASYNC_READ)
                        .zeroes(4)
                        .u32(MAX)
                        .zeroes(40)
                        .0
                }
                GETATTR => {
                    Out::default()
                        .u64(1 << 30)
                        .zeroes(8)
                        .u64(1)
                        .u64(1 << 30)
                        .zeroes(8 + 24 + 12)
                        .u32(libc::S_IFREG | 0o600)
                        .u32(1)
                        .zeroes(12)
                        .u32(4096)
                        .zeroes(4)
                        .0
                }
                OPEN => Out::default().u64(1).u32(FOPEN_DIRECT_IO).u32(0).0,
                READ | WRITE => {
                    let is_write = opcode == WRITE;
                    let data = request.get(HEADER + RW_HEADER..).unwrap_or_default();
                    return Ok(Some(Request {
                        unique,
                        data: data.to_vec(),
                        // CAST: The field has four bytes.
                        size: number(request, HEADER + 16, 4) as u32,
                        is_write,
                    }));
                }
                RELEASE => Vec::new(),
                _ if UNANSWERED.contains(&opcode) => continue,
                // The kernel asks no second time for what is not implemented, such as FLUSH: no process
                // that has the file from its parent waits for an answer when it ends.
                _ => {
                    self.answer(unique, -libc::ENOSYS, &[])?;
                    continue;
                }
            };
            self.answer(unique, 0, &body)?;
        }
    }

    /// Answers a read with `data`, or a write with success.
    pub fn complete(&self, request: &Request, data: &[u8]) -> io::Result<()> {
        match request.is_write {
            true => self.answer(
                request.unique,
                0,
                &Out::default().u32(request.size).u32(0).0,
            ),
            false => self.answer(request.unique, 0, data),
        }
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        // The force fails every request that waits for an answer, whoever has the device open.
        let _ = files::unmount(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    }
}
