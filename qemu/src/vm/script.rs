// SPDX-License-Identifier: GPL-2.0
//! Provides what a test script of the kernel tree needs in the guest: bash, kmod, and the module in
//! the place where modprobe looks for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::job;
use crate::kernel::Tree;

/// Programs that scripts call, as links in the guest: name, and target in /bin.
pub const LINKS: &[(&str, &str)] = &[
    ("dirname", "busybox"),
    ("id", "busybox"),
    ("which", "busybox"),
    ("modinfo", "kmod"),
    ("modprobe", "kmod"),
];

/// The shared objects that `ldd` lists, by absolute path.
fn objects(ldd: &str) -> Vec<String> {
    let path =
        |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(str::to_owned);
    ldd.lines().filter_map(path).collect()
}

/// A program of this tool set with the shared objects that it needs: maps paths in the guest to
/// paths of the host.
pub fn program(name: &str) -> Result<BTreeMap<String, PathBuf>> {
    let places = ["/bin", "/usr/bin", "/sbin", "/usr/sbin"];
    let host = places.into_iter().map(|d| Path::new(d).join(name));
    let Some(host) = host.into_iter().find(|p| p.is_file()) else {
        bail!("no {name} here");
    };
    let listed = job::output(Command::new("ldd").arg(&host), "ldd")?;
    let mut files: BTreeMap<String, PathBuf> =
        objects(&listed).into_iter().map(|path| (path.clone(), PathBuf::from(path))).collect();
    files.insert(format!("/bin/{name}"), host);
    Ok(files)
}

/// The module and the files of depmod, for the guest's /lib/modules.
fn modules(tree: &Tree, module: &Path, run: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let release = tree.release()?;
    let base = run.join("depmod");
    let dir = base.join("lib/modules").join(&release);
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let name = module.file_name().context("a module has a name")?;
    fs::copy(module, dir.join(name)).with_context(|| format!("copying {}", module.display()))?;
    for list in ["modules.order", "modules.builtin"] {
        fs::write(dir.join(list), "")?;
    }
    let mut depmod = Command::new("depmod");
    depmod.arg("-b").arg(&base).arg(&release);
    job::output(&mut depmod, "depmod")?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&dir)? {
        let entry = entry?;
        let guest = format!("/lib/modules/{release}/{}", entry.file_name().to_string_lossy());
        files.insert(guest, entry.path());
    }
    Ok(files)
}

/// All files that a script needs.
pub fn files(tree: &Tree, module: &Path, run: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = modules(tree, module, run)?;
    for name in ["bash", "kmod"] {
        files.extend(program(name)?);
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ldd_says() {
        let text = "\tlinux-vdso.so.1 (0x00007f8157295000)\n\
                    \tlibtinfo.so.6 => /lib/x86_64-linux-gnu/libtinfo.so.6 (0x00007f815710b000)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f8157297000)\n";
        assert_eq!(
            objects(text),
            ["/lib/x86_64-linux-gnu/libtinfo.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
        assert!(objects("\tnot a dynamic executable\n").is_empty());
    }
}
