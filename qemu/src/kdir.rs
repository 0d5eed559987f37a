// SPDX-License-Identifier: GPL-2.0
//! The user's own kernel tree: taken as it is if built, else built beside it, never inside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::job;
use crate::kconfig;
use crate::kernel::{self, Tree};
use crate::matrix::{Kernel, Matrix};
use crate::repo;

/// The kernel of `--kdir` and `--objdir`, built if need be, and checked.
pub fn open(matrix: &Matrix, like: &Kernel, kdir: &Path, objdir: Option<&Path>) -> Result<Tree> {
    let source = kdir.canonicalize().with_context(|| format!("--kdir {}", kdir.display()))?;
    let objects = match objdir {
        Some(dir) => dir.canonicalize().with_context(|| format!("--objdir {}", dir.display()))?,
        None => source.clone(),
    };
    let mut tree =
        Tree { name: source.display().to_string(), source, objects, ours: false, args: vec![] };
    if !tree.source.join("Makefile").is_file() {
        if tree.objects == tree.source && tree.source.join("source/Makefile").is_file() {
            bail!(
                "{} is a build directory; give its source as --kdir and it as --objdir",
                tree.name
            );
        }
        bail!("--kdir {}: no kernel source there", tree.name);
    }
    if !tree.image().exists() {
        build(matrix, like, &mut tree, objdir.is_some())?;
    }
    check(matrix, &tree)?;
    Ok(tree)
}

/// Builds a tree that is not built: in the directory that the user gave, else in the cache.
fn build(matrix: &Matrix, like: &Kernel, tree: &mut Tree, given: bool) -> Result<()> {
    let source = tree.source.clone();
    if source.join(".config").exists() || source.join("include/config").is_dir() {
        bail!(
            "{0} is configured in place but has no bzImage: build it there, or clean it with \
             `make -C {0} mrproper` and it is built beside itself",
            source.display()
        );
    }
    let fragments = kernel::fragments(matrix, &like.config)?;
    let key = {
        let mut parts = vec![source.display().to_string()];
        parts.extend(fragments.iter().map(|(_, text)| text.clone()));
        repo::key(&parts)
    };
    let kernels = repo::cache("kernels")?;
    if !given {
        tree.objects = kernels.join(format!("kdir-{key}"));
        tree.ours = true;
        fs::create_dir_all(&tree.objects)?;
    }
    let _lock = repo::lock(&kernels.join(format!("kdir-{key}.lock")))?;
    let log = kernels.join(format!("kdir-{key}.log"));
    let _ = fs::remove_file(&log);
    let configured = tree.objects.join(".zdvm-configured");
    let theirs = given && tree.objects.join(".config").exists();
    if !configured.exists() && !theirs {
        kernel::configure(tree, &fragments, &log)?;
        fs::write(&configured, "")?;
    }
    // The user's source changes between runs: make decides what is stale, every time.
    kernel::compile(tree, &log)
}

/// The release that a bzImage says of itself (Documentation/arch/x86/boot.rst, kernel_version).
pub fn image_release(image: &Path) -> Result<String> {
    let bytes = fs::read(image).with_context(|| format!("reading {}", image.display()))?;
    let text = bytes.get(0x20e..0x210).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let start = text.filter(|&t| t != 0).map(|t| t + 0x200);
    let text = start.and_then(|s| bytes.get(s..)).and_then(|t| t.split(|&b| b == 0).next());
    match text.and_then(|t| std::str::from_utf8(t).ok()).and_then(|t| t.split(' ').next()) {
        Some(release) if bytes.get(0x202..0x206) == Some(b"HdrS") => Ok(release.to_owned()),
        _ => bail!("{} is no bzImage", image.display()),
    }
}

/// Refuses by name what could not work or could not be trusted.
fn check(matrix: &Matrix, tree: &Tree) -> Result<()> {
    let config = tree.config()?;
    let lacking = kconfig::lacking(&matrix.requires, &config);
    if !lacking.is_empty() {
        bail!("the kernel in {} lacks:\n  {}", tree.objects.display(), lacking.join("\n  "));
    }
    let symbols = kconfig::parse(&config);
    let built = symbols.get("CONFIG_RUSTC_VERSION_TEXT").map(|t| t.trim_matches('"'));
    let ours = job::output(Command::new("rustc").arg("--version"), "rustc")?;
    if built != Some(ours.trim()) {
        bail!(
            "the kernel in {} was built with {}, here is {}: a module built now would not match",
            tree.objects.display(),
            built.unwrap_or("an unknown rustc"),
            ours.trim()
        );
    }
    let (image, release) = (image_release(&tree.image())?, tree.release()?);
    if image != release {
        bail!(
            "{} says it is {image}, its tree says {release}: build it again",
            tree.image().display()
        );
    }
    Ok(())
}

/// A value of a module's .modinfo.
pub fn modinfo(module: &Path, field: &str) -> Result<String> {
    let bytes = fs::read(module).with_context(|| format!("reading {}", module.display()))?;
    let tag = format!("{field}=");
    let found = bytes.split(|&b| b == 0).find_map(|s| s.strip_prefix(tag.as_bytes()));
    let Some(value) = found else {
        bail!("{} has no {field} in its modinfo", module.display());
    };
    Ok(String::from_utf8_lossy(value).into_owned())
}

/// Whether a module was built for this very kernel.
pub fn check_module(module: &Path, tree: &Tree) -> Result<()> {
    let magic = modinfo(module, "vermagic")?;
    let release = tree.release()?;
    if magic.split(' ').next() != Some(release.as_str()) {
        bail!("{} is built for {magic:?}, the kernel is {release}", module.display());
    }
    Ok(())
}

/// Where the programs and modules built for a tree are kept.
pub fn outputs(repo: &Path, tree: &Tree, sub: &str) -> Result<PathBuf> {
    let parts = [repo.display().to_string(), tree.objects.display().to_string()];
    let dir = repo::cache(sub)?.join(repo::key(&parts));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}
