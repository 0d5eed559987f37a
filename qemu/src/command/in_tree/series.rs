// SPDX-License-Identifier: GPL-2.0
//! Makes the patches of the files of the module.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde::Deserialize;

use super::text;
use crate::kernel::series::apply;

/// The condition of all files in the kernel.
const CONDITION: &str = "CONFIG_DEVICE_PRIVATE, CONFIG_HMM_MIRROR";

/// The declaration of a module with a file of its own.
const DECLARATION: &str = r"^(?:pub(?:\(\w+\))? )?mod (\w+);$";

/// `qemu/kernel/in-tree/series.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The author of the patches.
    author: String,
    /// Files of `rust/kernel/mm` that the series leaves out, without the ending.
    pub out_of_tree: Vec<String>,
    /// Macros that are defined in the kernel.
    pub defined: Vec<String>,
    /// Macros that are not defined in the kernel.
    pub undefined: Vec<String>,
    /// The patches, in order.
    pub patch: Vec<PatchSpec>,
}

/// One patch.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchSpec {
    subject: String,
    body: String,
    /// Files of `rust/helpers`.
    #[serde(default)]
    pub c: Vec<String>,
    /// Files of `rust/kernel/mm`, without the ending.
    #[serde(default)]
    pub rust: Vec<String>,
    /// Other files.
    #[serde(default)]
    pub other: Vec<String>,
    /// Whether the KUnit cases of all files so far come with this patch. They use files of later patches than
    /// their own.
    #[serde(default)]
    pub cases: bool,
}

/// The series that was written.
#[derive(Debug)]
pub struct Files {
    /// The names of the patches, in order.
    pub patches: Vec<String>,
    /// Each file of the kernel that the series changes, with its text afterwards.
    pub files: BTreeMap<String, String>,
}

/// Reads the description of the series.
pub fn spec(repo: &Path) -> Result<Spec> {
    let path = repo.join("qemu/kernel/in-tree/series.toml");
    toml::from_str(&read(&path)?).with_context(|| format!("reading {}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// Inserts text behind the line that begins with `anchor`.
fn insert_after(text: &str, anchor: &str, new: &str) -> Result<String> {
    let at = text.find(anchor).with_context(|| format!("there is no {anchor:?}"))?;
    let end = at + text[at..].find('\n').context("the last line has no end")? + 1;
    Ok(format!("{}{new}{}", &text[..end], &text[end..]))
}

/// Formats Rust code as the kernel does.
fn rustfmt(text: &str) -> Result<String> {
    let mut child = Command::new("rustfmt")
        .args(["--edition", "2021"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting rustfmt")?;
    let mut stdin = child.stdin.take().context("rustfmt has no input")?;
    let owned = text.to_owned();
    let writer =
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, owned.as_bytes()));
    let out = child.wait_with_output()?;
    writer.join().map_err(|_| anyhow::anyhow!("feeding rustfmt"))??;
    if !out.status.success() {
        bail!("rustfmt does not take:\n{text}");
    }
    Ok(String::from_utf8(out.stdout)?)
}

/// The text of the `mod.rs` of a folder, with the declarations of the modules that are wanted.
fn declaring(text: &str, wanted: impl Fn(&str) -> bool) -> Result<String> {
    let declaration = Regex::new(DECLARATION)?;
    let kept = text.lines().filter(|line| declaration.captures(line).is_none_or(|f| wanted(&f[1])));
    Ok(kept.flat_map(|line| [line, "\n"]).collect())
}

/// Makes the texts.
struct Maker<'a> {
    repo: &'a Path,
    source: &'a Path,
    spec: &'a Spec,
    /// Texts of the files that were changed so far.
    now: BTreeMap<String, String>,
}

impl Maker<'_> {
    /// The text of a file of the kernel as it is with the patches so far.
    fn text(&self, file: &str) -> Result<String> {
        match self.now.get(file) {
            Some(text) => Ok(text.clone()),
            None => read(&self.source.join(file)),
        }
    }

    fn change(&mut self, file: &str, f: impl FnOnce(&str) -> Result<String>) -> Result<()> {
        let text = f(&self.text(file)?).with_context(|| format!("changing {file}"))?;
        self.now.insert(file.to_owned(), text);
        Ok(())
    }

    fn module(&self, name: &str) -> Result<String> {
        read(&self.repo.join(format!("rust/kernel/mm/{name}.rs")))
    }

    /// Helpers and bindings.
    fn c(&mut self, files: &[String]) -> Result<()> {
        let mut includes =
            String::from("#if defined(CONFIG_DEVICE_PRIVATE) && defined(CONFIG_HMM_MIRROR)\n");
        let mut kunit = false;
        for name in files {
            let text = read(&self.repo.join(format!("rust/helpers/{name}.c")))?;
            let text = text::helpers(&text, &self.spec.defined, &self.spec.undefined)?;
            self.now.insert(format!("rust/helpers/devmem/{name}.c"), text);
            if name == "kunit" {
                kunit = true;
            } else {
                let _ = writeln!(includes, "#include \"devmem/{name}.c\"");
            }
        }
        if kunit {
            includes += "#if IS_BUILTIN(CONFIG_KUNIT)\n#include \"devmem/kunit.c\"\n#endif\n";
        }
        includes += "#endif\n";
        self.change("rust/helpers/helpers.c", |text| {
            insert_after(text, "#include \"device.c\"", &includes)
        })?;
        let ours = read(&self.repo.join("rust/bindings/bindings_helper.h"))?;
        let mut used = String::new();
        for patch in &self.spec.patch {
            for name in &patch.rust {
                used += &self.module(name)?;
            }
        }
        let mut names = Vec::new();
        self.change("rust/bindings/bindings_helper.h", |text| {
            let (text, new) = bindings(text, &ours, &used)?;
            names = new;
            Ok(text)
        })?;
        // bindgen can evaluate some of them itself, with another type, and there must be one of
        // each.
        self.change("rust/bindgen_parameters", |text| {
            let mut text = format!(
                "{text}\n# Constants of rust/bindings/bindings_helper.h for device memory.\n"
            );
            for name in &names {
                let _ = writeln!(text, "--blocklist-item {name}");
            }
            Ok(text)
        })?;
        let author = &self.spec.author;
        self.change("MAINTAINERS", |text| {
            let entry = format!(
                "RUST [DEVICE MEMORY]\nM:\t{author}\nL:\trust-for-linux@vger.kernel.org\n\
                 S:\tMaintained\nF:\trust/helpers/devmem/\nF:\trust/kernel/miscdevice/\n\
                 F:\trust/kernel/mm/\nF:\tsamples/rust/rust_dmem.rs\n\n"
            );
            let at = text.find("RUST [INTEROP]").context("there is no entry to insert before")?;
            Ok(format!("{}{entry}{}", &text[..at], &text[at..]))
        })
    }

    /// Files of `rust/kernel/mm`, and the modules of `rust/kernel/mm.rs` and of the folders with those of the
    /// patches before. With `cases` all files get their KUnit cases.
    fn rust(&mut self, files: &[String], all: &[String], cases: bool) -> Result<()> {
        for name in if cases { all } else { files } {
            let all = self.module(name)?;
            let text = if cases { all.as_str() } else { text::without_cases(&all)? };
            let text = rustfmt(&text::rust(text)?)?;
            self.now.insert(format!("rust/kernel/mm/{name}.rs"), text);
        }
        let folders: BTreeSet<&str> =
            all.iter().filter_map(|name| Some(name.split_once('/')?.0)).collect();
        for folder in &folders {
            // The kernel crate has FOLDER.rs next to FOLDER/.
            let list = self.module(&format!("{folder}/mod"))?;
            let list = declaring(&list, |name| all.contains(&format!("{folder}/{name}")))?;
            self.now.insert(format!("rust/kernel/mm/{folder}.rs"), text::rust(&list)?);
        }
        let list = self.module("mod")?;
        let mut modules = String::new();
        let declaration = Regex::new(DECLARATION)?;
        let mut kunit = false;
        for line in list.lines() {
            if let Some(found) = declaration
                .captures(line)
                .filter(|f| folders.contains(&f[1]) || all.iter().any(|n| *n == f[1]))
            {
                let more =
                    if kunit && &found[1] != "prelude" { "CONFIG_KUNIT = \"y\", " } else { "" };
                let _ = writeln!(modules, "#[cfg(all({more}{CONDITION}))]");
                let _ = writeln!(modules, "{}", line.replace("pub(crate)", "pub"));
            }
            kunit = line == "#[cfg(CONFIG_KUNIT = \"y\")]";
        }
        let head = "\
\n/// Order of a folio that one entry of a page middle directory maps: 9 on x86-64.
#[cfg(all(CONFIG_DEVICE_PRIVATE, CONFIG_HMM_MIRROR))]
pub const PMD_ORDER: u32 = bindings::PMD_ORDER;

/// Order of a folio that one entry of a page upper directory maps: 18 on x86-64.
#[cfg(all(CONFIG_DEVICE_PRIVATE, CONFIG_HMM_MIRROR))]
pub const PUD_ORDER: u32 = bindings::PUD_ORDER;

#[cfg(all(CONFIG_DEVICE_PRIVATE, CONFIG_HMM_MIRROR))]
use crate::page::{
    PAGE_SHIFT,
    PAGE_SIZE, //
};
";
        let original = read(&self.source.join("rust/kernel/mm.rs"))?;
        let text = insert_after(&original, "mod mmput_async;", &format!("\n{modules}{head}"))?;
        self.now.insert("rust/kernel/mm.rs".to_owned(), text);
        Ok(())
    }

    fn other(&mut self, file: &str) -> Result<()> {
        let text = read(&self.repo.join(file))?;
        match file {
            "samples/dmem.rs" => {
                let tail = read(&self.repo.join("qemu/kernel/in-tree/rust_dmem.tail"))?;
                // The expansion of `module!` has unsafe code; the driver itself has none.
                let text = text
                    .replace("#![forbid(unsafe_code)]\n\n", "")
                    .replace(
                        "use crate::miscdevice::NodeOps;",
                        "use kernel::miscdevice::{Node, NodeOps};",
                    )
                    .replace("crate::mm", "kernel::mm")
                    .replace(
                        "use kernel::{prelude::*, sync::Arc, uaccess};",
                        "use kernel::{prelude::*, sizes::SZ_2M, sync::Arc, uaccess};",
                    )
                    .replace("pub(crate) ", "");
                self.now.insert("samples/rust/rust_dmem.rs".to_owned(), rustfmt(&(text + &tail))?);
                self.change("samples/rust/Makefile", |text| {
                    insert_after(
                        text,
                        "obj-$(CONFIG_SAMPLE_RUST_DMA)",
                        "obj-$(CONFIG_SAMPLE_RUST_DMEM)\t\t\t+= rust_dmem.o\n",
                    )
                })?;
                let entry = read(&self.repo.join("qemu/kernel/in-tree/rust_dmem.Kconfig"))?;
                self.change("samples/rust/Kconfig", |text| {
                    let at =
                        text.find("config SAMPLE_RUST_DMA\n").context("there is no DMA sample")?;
                    Ok(format!("{}{entry}\n{}", &text[..at], &text[at..]))
                })
            }
            "rust/kernel/miscdevice.rs" => {
                let text = rustfmt(&text::rust(&text)?)?;
                self.now.insert("rust/kernel/miscdevice/node.rs".to_owned(), text);
                self.change("rust/kernel/miscdevice.rs", |text| {
                    insert_after(
                        text,
                        "use core::marker::PhantomData;",
                        &format!(
                            "\n#[cfg(all({CONDITION}))]\nmod node;\n\n#[cfg(all({CONDITION}))]\npub use \
                             node::{{\n    Node,\n    NodeOps, //\n}};\n"
                        ),
                    )
                })
            }
            _ => bail!("{file} has no place in the kernel"),
        }
    }
}

/// The header for bindgen, with our headers, and those of our constants that the modules use.
fn bindings(text: &str, ours: &str, used: &str) -> Result<(String, Vec<String>)> {
    let mut out = text.to_owned();
    for line in ours.lines().filter(|line| line.starts_with("#include <linux/")) {
        if out.contains(line) {
            continue;
        }
        // The headers are sorted.
        let next = out
            .lines()
            .filter(|l| l.starts_with("#include <linux/") && !l.contains("hrtimer_types"))
            .find(|l| *l > line)
            .context("no header comes after it")?
            .to_owned();
        out = out.replacen(&format!("{next}\n"), &format!("{line}\n{next}\n"), 1);
    }
    let constant = Regex::new(r"(?m)^const [\w ]+?\bRUST_CONST_HELPER_(\w+) =[^;]*;\n")?;
    let (mut new, mut names) = (String::new(), Vec::new());
    for found in constant.captures_iter(ours) {
        let name = &found[1];
        if used.contains(&format!("bindings::{name}")) && !out.contains(&format!("HELPER_{name} "))
        {
            new += &found[0];
            names.push(name.to_owned());
        }
    }
    let at = out.find("#if IS_ENABLED(CONFIG_GPU_BUDDY)").context("the end is not as it was")?;
    Ok((format!("{}{new}\n{}", &out[..at], &out[at..]), names))
}

/// The difference of two texts of a file, in the format of a patch.
fn diff(file: &str, old: Option<&str>, new: &str) -> Result<String> {
    let dir = tempfile::tempdir()?;
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    fs::write(&a, old.unwrap_or_default())?;
    fs::write(&b, new)?;
    let out = Command::new("diff")
        .args(["-u", "--label"])
        .arg(if old.is_some() { format!("a/{file}") } else { "/dev/null".to_owned() })
        .arg("--label")
        .arg(format!("b/{file}"))
        .arg(&a)
        .arg(&b)
        .output()
        .context("starting diff")?;
    if out.status.code() == Some(2) {
        bail!("diff: {}", String::from_utf8_lossy(&out.stderr));
    }
    let mode = if old.is_some() { "" } else { "new file mode 100644\n" };
    let text = String::from_utf8(out.stdout)?;
    Ok(format!("diff --git a/{file} b/{file}\n{mode}{text}"))
}

/// The name of a patch's file.
fn file_name(number: usize, subject: &str) -> String {
    let words: String =
        subject.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    let words: Vec<&str> = words.split('-').filter(|word| !word.is_empty()).collect();
    let name: String = words.join("-").chars().take(52).collect();
    format!("{number:04}-{}.patch", name.trim_end_matches('-'))
}

/// Makes the series in a directory, and checks that it applies to the source.
pub fn write(repo: &Path, source: &Path, dir: &Path) -> Result<Files> {
    let spec = spec(repo)?;
    let mut maker = Maker { repo, source, spec: &spec, now: BTreeMap::new() };
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    fs::create_dir_all(dir)?;
    let stage = tempfile::tempdir().context("making a directory for patched files")?;
    let (mut patches, mut list, mut all) = (Vec::new(), String::new(), Vec::new());
    let mut known: BTreeSet<String> = BTreeSet::new();
    for (i, patch) in spec.patch.iter().enumerate() {
        let before = maker.now.clone();
        if !patch.c.is_empty() {
            maker.c(&patch.c)?;
        }
        if !patch.rust.is_empty() {
            all.extend(patch.rust.iter().cloned());
            maker.rust(&patch.rust, &all, patch.cases)?;
        }
        for file in &patch.other {
            maker.other(file)?;
        }
        let mut text = format!(
            "From: {0}\nSubject: [PATCH {1}/{2}] {3}\n\n{4}\n\nSigned-off-by: {0}\n---\n\n",
            spec.author,
            i + 1,
            spec.patch.len(),
            patch.subject,
            patch.body.trim()
        );
        for (file, new) in maker.now.iter().filter(|(file, new)| before.get(*file) != Some(new)) {
            let path = source.join(file);
            let old = match before.get(file) {
                Some(text) => Some(text.clone()),
                None if path.exists() => Some(read(&path)?),
                None => None,
            };
            if known.insert(file.clone()) && path.exists() {
                let to = stage.path().join(file);
                fs::create_dir_all(to.parent().context("a file without a folder")?)?;
                fs::copy(&path, &to)?;
            }
            text += &diff(file, old.as_deref(), new)?;
        }
        let name = file_name(i + 1, &patch.subject);
        fs::write(dir.join(&name), text)?;
        apply(stage.path(), &dir.join(&name))?;
        let _ = writeln!(list, "{name}");
        patches.push(name);
    }
    fs::write(dir.join("series"), list)?;
    Ok(Files { patches, files: maker.now })
}
