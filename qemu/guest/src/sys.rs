// SPDX-License-Identifier: GPL-2.0
//! The interfaces of the guest's kernel: files and a few system calls.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, mount};
use rustix::system::{delete_module, finit_module};
use zdvm_guest::wire::{Encoder, Message, PORT_NAME};

/// Mounts the file systems that tests expect. Only proc, sys and dev are indispensable.
pub fn mount_all() -> Result<()> {
    let needed = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")];
    for (kind, dir) in needed {
        fs::create_dir_all(dir)?;
        // The kernel may have mounted devtmpfs by itself.
        match mount(kind, dir, kind, MountFlags::empty(), None) {
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(e) => bail!("mounting {kind} on {dir}: {e}"),
        }
    }
    let wanted = [
        ("debugfs", "/sys/kernel/debug"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("tmpfs", "/dev/shm"),
        ("devpts", "/dev/pts"),
        ("hugetlbfs", "/dev/hugepages"),
    ];
    for (kind, dir) in wanted {
        // On a kernel without one of these the tests that need it fail and say so.
        let _ = fs::create_dir_all(dir);
        let _ = mount(kind, dir, kind, MountFlags::empty(), None);
    }
    Ok(())
}

/// The stream to the host.
pub struct Link {
    port: File,
    encoder: Encoder,
}

impl Link {
    /// Finds the port by its name and opens it.
    pub fn open() -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(path) = port_path() {
                let port = OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .with_context(|| format!("opening {path}"))?;
                return Ok(Self { port, encoder: Encoder::default() });
            }
            if Instant::now() > deadline {
                bail!("no virtio-serial port named {PORT_NAME}");
            }
            // The device announces the port after its driver has come up.
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends one message. The message has reached QEMU when this returns.
    pub fn send(&mut self, message: &Message) -> Result<()> {
        self.port
            .write_all(self.encoder.encode(message).as_bytes())
            .context("writing to the status port")
    }
}

fn port_path() -> Option<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT_NAME {
            return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    None
}

/// `uname -r`.
pub fn release() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// How many of something are online, counted in a list such as "0-3,5".
fn online(what: &str) -> Result<u32> {
    let path = format!("/sys/devices/system/{what}/online");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    count(&text).with_context(|| format!("{path} says {text:?}"))
}

fn count(list: &str) -> Option<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1)
    };
    list.trim().split(',').map(range).sum()
}

/// Returns an error if the guest is not the requested machine: its results would prove nothing
/// about that machine.
pub fn check_machine(cpus: u32, nodes: u32) -> Result<()> {
    for (what, wanted, hint) in [("cpu", cpus, "NR_CPUS"), ("node", nodes, "NUMA_EMU")] {
        if wanted == 0 {
            continue;
        }
        let found = online(what)?;
        if found != wanted {
            bail!("the guest has {found} of {what}, {wanted} were asked for (CONFIG_{hint}?)");
        }
    }
    Ok(())
}

/// The taint mask.
pub fn taint() -> Result<u64> {
    let text = fs::read_to_string("/proc/sys/kernel/tainted")?;
    text.trim().parse().with_context(|| format!("taint mask {text:?}"))
}

/// Writes `value` to a file of the kernel, and returns the previous value. Returns `None` if the
/// kernel was built without the feature, so that not even the folder exists.
pub fn set(file: &str, value: &str) -> Result<Option<String>> {
    if !Path::new(file).parent().is_some_and(Path::exists) {
        return Ok(None);
    }
    let old = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    fs::write(file, value).with_context(|| format!("writing {value:?} to {file}"))?;
    Ok(Some(old.trim().to_owned()))
}

/// Writes one line to the kernel log, so that the lines after it can be attributed.
pub fn kmsg(text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = log.write_all(format!("<5>{text}\n").as_bytes());
    }
}

/// Whether the module is loaded.
pub fn module_loaded(name: &str) -> Result<bool> {
    let text = fs::read_to_string("/proc/modules")?;
    Ok(text.lines().any(|l| l.split(' ').next() == Some(name)))
}

/// Loads the module.
pub fn insmod(path: &str, params: &str) -> Result<()> {
    let file = File::open(path).with_context(|| format!("opening {path}"))?;
    let params = CString::new(params)?;
    finit_module(&file, &params, 0).with_context(|| format!("loading {path} {params:?}"))
}

/// Unloads the module; waits a little for the last user to leave.
pub fn rmmod(name: &str) -> Result<()> {
    let c_name = CString::new(name)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        // O_NONBLOCK: a busy module is an error, not a hang.
        match delete_module(&c_name, 0o4000) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::BUSY)
                if Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => bail!("unloading {name}: {e}"),
        }
    }
}

/// The directory of KUnit's results.
pub const KUNIT: &str = "/sys/kernel/debug/kunit";

/// The sorted names of the KUnit suites that are registered now.
pub fn kunit_suites() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(KUNIT)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Prints all stacks into the kernel log.
pub fn dump_stacks() {
    for key in ["l", "w", "t"] {
        let _ = fs::write("/proc/sysrq-trigger", key);
    }
}

/// Makes kmemleak, if it is built in, print its findings into the kernel log.
pub fn kmemleak_scan() {
    let file = Path::new("/sys/kernel/debug/kmemleak");
    if file.exists() {
        // The second scan confirms the suspects of the first one.
        for _ in 0..2 {
            let _ = fs::write(file, "scan");
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    #[test]
    fn lists_of_processors() {
        for (list, n) in [("0\n", Some(1)), ("0-3", Some(4)), ("0-1,4,6-7\n", Some(5)), ("", None)]
        {
            assert_eq!(count(list), n, "{list:?}");
        }
    }

    #[test]
    fn a_setting_says_what_was_before() {
        let dir = std::env::temp_dir().join(format!("zdvm-guest-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join("file");
        fs::write(&file, "old\n").unwrap();
        let file = file.to_str().unwrap();
        assert_eq!(set(file, "new").unwrap().as_deref(), Some("old"));
        assert_eq!(fs::read_to_string(file).unwrap(), "new");
        assert_eq!(set(&format!("{file}s/a"), "new").unwrap(), None);
        // A missing file in an existing folder is a mistake of the plan.
        assert!(set(&format!("{file}s"), "new").is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
