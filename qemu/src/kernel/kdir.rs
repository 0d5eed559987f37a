// SPDX-License-Identifier: GPL-2.0
//! The user's own kernel tree. A configured tree is brought up to date by its own make; another one
//! is configured and built in a directory of its own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::kernel::compiler;
use crate::kernel::kconfig;
use crate::kernel::make::logged;
use crate::kernel::{self, Tree};
use crate::plan::matrix::{Kernel, Matrix};
use crate::repo;

/// The oldest kernel that has the interfaces that the module uses.
const OLDEST: (u32, u32) = (7, 2);

/// Opens the kernel of `--kdir` and `--objdir`: brings it up to date by its own make, and checks
/// it.
pub fn open(matrix: &Matrix, like: &Kernel, kdir: &Path, objdir: Option<&Path>) -> Result<Tree> {
    let mut tree = find(kdir, objdir)?;
    if tree.objects.join(".config").is_file() {
        configured(matrix, &mut tree)?;
    } else {
        unconfigured(matrix, like, &mut tree, objdir.is_some())?;
    }
    check(&tree)?;
    Ok(tree)
}

/// Finds source and build directory. Checks only that they exist and that the version is supported.
pub fn find(kdir: &Path, objdir: Option<&Path>) -> Result<Tree> {
    let source = kdir.canonicalize().with_context(|| format!("--kdir {}", kdir.display()))?;
    let objects = match objdir {
        Some(dir) => dir.canonicalize().with_context(|| format!("--objdir {}", dir.display()))?,
        None => source.clone(),
    };
    let tree =
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
    let (major, minor) = version(&tree.source)?;
    if (major, minor) < OLDEST {
        bail!(
            "{} is Linux {major}.{minor}: zdmirror needs {}.{} or newer (its abstractions use what \
             rust/kernel and mm/ have since then)",
            tree.name,
            OLDEST.0,
            OLDEST.1
        );
    }
    Ok(tree)
}

/// The VERSION and PATCHLEVEL of a kernel source.
pub fn version(source: &Path) -> Result<(u32, u32)> {
    let path = source.join("Makefile");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let number = |name: &str| {
        let mut values =
            text.lines().filter_map(|l| l.strip_prefix(name)?.trim().strip_prefix('='));
        values.next().and_then(|v| v.trim().parse().ok())
    };
    match (number("VERSION"), number("PATCHLEVEL")) {
        (Some(major), Some(minor)) => Ok((major, minor)),
        _ => bail!("{} has no VERSION and PATCHLEVEL: no kernel source?", path.display()),
    }
}

/// Brings a configured tree up to date with the compilers that its configuration names. An edit
/// since the last build must not be judged by the old image.
fn configured(matrix: &Matrix, tree: &mut Tree) -> Result<()> {
    let config = tree.config()?;
    let lacking = kconfig::lacking(&matrix.requires, &config);
    if !lacking.is_empty() {
        bail!(
            "the kernel in {} lacks:\n  {}\nmake kconfig KDIR={} writes a configuration that has \
             them, beside yours",
            tree.objects.display(),
            lacking.join("\n  "),
            tree.source.display()
        );
    }
    if config.lines().any(|l| l == "CONFIG_CMDLINE_OVERRIDE=y") {
        bail!(
            "the kernel in {} does not listen to its boot loader (CONFIG_CMDLINE_OVERRIDE=y): zdvm \
             could not tell it what memory is for devices",
            tree.objects.display()
        );
    }
    tree.args = compiler::arguments(&config, &compiler::version)
        .with_context(|| format!("the kernel in {}", tree.objects.display()))?;
    let key = repo::key([tree.objects.display().to_string()]);
    let trees = repo::cache("kdir")?;
    let _lock = repo::lock(&trees.join(format!("{key}.lock")))?;
    let log = trees.join(format!("{key}.log"));
    let _ = fs::remove_file(&log);
    kernel::compile(tree, &log)
}

/// Configures and builds a tree that has no configuration, in the directory that the user gave or
/// else in the cache.
fn unconfigured(matrix: &Matrix, like: &Kernel, tree: &mut Tree, given: bool) -> Result<()> {
    let source = tree.source.clone();
    if source.join("include/config").is_dir() {
        bail!(
            "{0} has been built in place, and has no .config now: configure it there, or give its \
             build directory (O=)",
            source.display()
        );
    }
    if given && source.join(".config").exists() {
        bail!("{} is configured in place: kbuild takes no O= beside that", source.display());
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
    if !configured.exists() {
        kernel::configure(tree, &fragments, &log)?;
        fs::write(&configured, "")?;
    }
    // The user's source changes between runs: let make decide every time what is stale.
    kernel::compile(tree, &log)
}

/// What [`configure`] has written.
#[derive(Debug)]
pub struct Configured {
    pub file: PathBuf,
    /// Whether it began as the tree's own.
    pub is_theirs: bool,
    /// The required settings that it had to be given.
    pub added: Vec<String>,
}

/// Writes a configuration with all required symbols, and the tree's own settings for the rest, into
/// a directory of its own. The tree's own configuration stays unchanged.
pub fn configure(matrix: &Matrix, kdir: &Path, objdir: Option<&Path>) -> Result<Configured> {
    let mut tree = find(kdir, objdir)?;
    let key = repo::key([tree.objects.display().to_string()]);
    let dir = repo::cache("kernels")?.join(format!("kconfig-{key}"));
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let file = dir.join(".config");
    let theirs = tree.objects.join(".config");
    let is_theirs = theirs.is_file();
    let mut text = match is_theirs {
        true => tree.config()?,
        false => String::new(),
    };
    if is_theirs {
        tree.args = compiler::arguments(&text, &compiler::version).unwrap_or_default();
    } else {
        let base = kernel::fragments(matrix, &[PathBuf::from("config/base.config")])?;
        text.extend(base.into_iter().map(|(_, text)| text));
    }
    // The last line of a symbol counts.
    text.push('\n');
    let mut added = kconfig::lacking(&matrix.requires, &text);
    for symbol in added.iter_mut().filter(|s| !s.contains('=')) {
        symbol.push_str("=y");
    }
    for symbol in &added {
        text.push_str(symbol);
        text.push('\n');
    }
    fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
    let in_place = tree.objects == tree.source && is_theirs;
    if !in_place {
        tree.objects = dir.clone();
    }
    let mut command = tree.make();
    command.env("KCONFIG_CONFIG", &file).arg("olddefconfig");
    let log = dir.join("kconfig.log");
    let _ = fs::remove_file(&log);
    logged(&mut command, "make olddefconfig", &log, None)?;
    let lacking = kconfig::lacking(&matrix.requires, &fs::read_to_string(&file)?);
    if !lacking.is_empty() {
        bail!(
            "{} still lacks what other options of it exclude, or what this kernel does not have:\n  {}",
            file.display(),
            lacking.join("\n  ")
        );
    }
    Ok(Configured { file, is_theirs, added })
}

/// Whether a tree is configured or built in place. kbuild takes no build directory beside such a tree.
pub fn is_in_place(source: &Path) -> bool {
    source.join(".config").exists() || source.join("include/config").is_dir()
}

/// Says how to test a kernel with the configuration that [`configure`] has written. What kbuild advises
/// beside a tree that is configured in place, `make mrproper`, deletes the configuration: such a tree is
/// copied.
pub fn advice(written: &Configured, kdir: &Path, objdir: Option<&Path>) -> String {
    let in_place = is_in_place(kdir);
    let (file, kdir) = (written.file.display(), kdir.display());
    let commands = match (in_place, objdir) {
        (true, _) => format!(
            "    cp -a --reflink=auto {kdir} DIR && cp {file} DIR/.config\n    ./zdvm run --kdir DIR\n"
        ),
        (false, Some(objdir)) => format!(
            "    cp -a --reflink=auto {} DIR && cp {file} DIR/.config\n    ./zdvm run --kdir {kdir} \
             --objdir DIR\n",
            objdir.display()
        ),
        (false, None) => format!(
            "    mkdir -p DIR && cp {file} DIR/.config\n    ./zdvm run --kdir {kdir} --objdir DIR\n"
        ),
    };
    let origin = match (written.is_theirs, written.added.as_slice()) {
        (false, _) => "The tree has no configuration. This is one that suffices.".to_owned(),
        (true, []) => "This is your configuration, which lacked nothing.".to_owned(),
        (true, added) => {
            format!("This is your configuration with what it lacked: {}.", added.join(" "))
        }
    };
    format!(
        "{file}\n{origin} These commands build a kernel with it in a directory of its own, and test \
         that kernel:\n{commands}"
    )
}

/// The release in the header of a bzImage (Documentation/arch/x86/boot.rst, kernel_version).
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

/// Refuses a tree that could not work or whose results could not be trusted; the error names the
/// fault.
fn check(tree: &Tree) -> Result<()> {
    let (image, release) = (image_release(&tree.image())?, tree.release()?);
    if image != release {
        bail!(
            "{} says it is {image}, its tree says {release}: build it again",
            tree.image().display()
        );
    }
    let crate_file = tree.objects.join("rust/libkernel.rmeta");
    if !crate_file.is_file() {
        bail!(
            "{} is not there, which a module in Rust is built against: is it an installed package of \
             headers? A tree that has been built is wanted",
            crate_file.display()
        );
    }
    Ok(())
}

/// A value in a module's .modinfo section.
pub fn modinfo(module: &Path, field: &str) -> Result<String> {
    let bytes = fs::read(module).with_context(|| format!("reading {}", module.display()))?;
    let tag = format!("{field}=");
    let found = bytes.split(|&b| b == 0).find_map(|s| s.strip_prefix(tag.as_bytes()));
    let Some(value) = found else {
        bail!("{} has no {field} in its modinfo", module.display());
    };
    Ok(String::from_utf8_lossy(value).into_owned())
}

/// Checks that a module was built for this very kernel.
pub fn check_module(module: &Path, tree: &Tree) -> Result<()> {
    let magic = modinfo(module, "vermagic")?;
    let release = tree.release()?;
    if magic.split(' ').next() != Some(release.as_str()) {
        bail!("{} is built for {magic:?}, the kernel is {release}", module.display());
    }
    Ok(())
}

/// The directory of the programs and modules that are built for a tree.
pub fn outputs(repo: &Path, tree: &Tree, sub: &str) -> Result<PathBuf> {
    let parts = [repo.display().to_string(), tree.objects.display().to_string()];
    let dir = repo::cache(sub)?.join(repo::key(&parts));
    fs::create_dir_all(&dir)?;
    Ok(dir)
}
