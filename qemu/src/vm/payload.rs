// SPDX-License-Identifier: GPL-2.0
//! Builds what the guest contains: the module, the test programs, the agent, and the initramfs with
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use zdvm_guest::plan::{MODULE, PATH, Plan};

use crate::job;
use crate::kernel::Tree;
use crate::kernel::kdir;
use crate::kernel::make::logged;
use crate::plan::matrix::{Matrix, Plans};
use crate::repo;
use crate::vm::script::LINKS;

/// Path in the kernel tree of the script that loads the driver and runs its tests.
pub const HMM_SCRIPT: &str = "tools/testing/selftests/mm/test_hmm.sh";
/// The test program that the script runs.
pub const HMM_TESTS: &str = "hmm-tests";

/// Programs that the selftests run: they make file systems on pmem and on a RAM disk.
pub const SELFTEST_TOOLS: &[&str] = &["mkfs.ext4", "mkfs.xfs"];

/// The target of guest programs. Naming it keeps build scripts and proc macros dynamically linked.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Refuses a repository that has the objects of `make KDIR=`: kbuild makes no others beside them.
pub fn check_source(repo: &Path) -> Result<()> {
    if repo.join("modules.order").exists() {
        bail!(
            "{} has the objects of an earlier \"make\", beside which kbuild makes no others: \"make clean\" \
             there removes them",
            repo.display()
        );
    }
    Ok(())
}

/// Builds the module against a tree. Returns its file.
pub fn module(repo: &Path, tree: &Tree) -> Result<PathBuf> {
    check_source(repo)?;
    let dir = kdir::outputs(repo, tree, "modules")?;
    let _lock = repo::lock(&dir.with_extension("lock"))?;
    if !repo.join("Makefile").is_file() {
        bail!(
            "no Makefile in {}: the module cannot be built (--module FILE takes another)",
            repo.display()
        );
    }
    let mut command = crate::kernel::make::make(repo);
    command.arg("modules").arg(format!("KDIR={}", tree.source.display()));
    if tree.objects != tree.source {
        command.arg(format!("O={}", tree.objects.display()));
    }
    command.arg(format!("MO={}", dir.display())).args(&tree.args);
    if !tree.config()?.contains("CONFIG_DEBUG_INFO=y") {
        // Gives stacks and debuggers the lines of the module, even if the kernel has no debug
        // information.
        for (name, flag) in [("KCFLAGS", "-g1"), ("KRUSTFLAGS", "-Cdebuginfo=line-tables-only")] {
            let users = std::env::var(name).unwrap_or_default();
            command.env(name, format!("{users} {flag}").trim());
        }
    }
    let log = dir.with_extension("log");
    let _ = fs::remove_file(&log);
    logged(&mut command, "building the module", &log, None)?;
    let module = dir.join("zdmirror.ko");
    kdir::check_module(&module, tree)?;
    Ok(module)
}

/// Makes the guest's copy of the module below `dir`, without debug information, which is the
/// largest part.
pub fn stripped(module: &Path, dir: &Path) -> Result<PathBuf> {
    let out = dir.join("zdmirror.ko");
    let bytes = fs::read(module).with_context(|| format!("reading {}", module.display()))?;
    if !bytes.starts_with(b"\x7fELF") {
        // Not an object file: the guest refuses it.
        fs::write(&out, bytes).with_context(|| format!("writing {}", out.display()))?;
        return Ok(out);
    }
    let mut strip = Command::new("strip");
    strip.arg("--strip-debug").arg("-o").arg(&out).arg(module);
    job::output(&mut strip, "strip")?;
    Ok(out)
}

/// Builds Rust programs of the workspace as static programs. Returns their directory.
pub fn programs(repo: &Path, packages: &[&str]) -> Result<PathBuf> {
    let dir = repo::cache("guest")?.join(repo::key([repo.display().to_string()]));
    fs::create_dir_all(&dir)?;
    let _lock = repo::lock(&dir.with_extension("lock"))?;
    let mut command = job::build("cargo");
    command.args(["build", "--release", "--target", TARGET]).current_dir(repo);
    for package in packages {
        command.args(["-p", package]);
    }
    command.env("RUSTFLAGS", "-C target-feature=+crt-static").env("CARGO_TARGET_DIR", &dir);
    let log = dir.with_extension("log");
    let _ = fs::remove_file(&log);
    logged(&mut command, "building the guest's programs", &log, None)?;
    Ok(dir.join(TARGET).join("release"))
}

/// Builds the C programs that our selftests run, as static programs. Returns them with their names.
pub fn c_programs(repo: &Path) -> Result<Vec<(String, PathBuf)>> {
    let dir = repo::cache("guest")?.join(repo::key([repo.display().to_string()])).join("programs");
    fs::create_dir_all(&dir)?;
    let _lock = repo::lock(&dir.with_extension("lock"))?;
    let sources = repo.join("selftests/programs");
    let mut out = Vec::new();
    for entry in fs::read_dir(&sources).with_context(|| sources.display().to_string())? {
        let source = entry?.path();
        if source.extension().is_none_or(|e| e != "c") {
            continue;
        }
        let Some(name) = source.file_stem().and_then(|n| n.to_str()) else { continue };
        let program = dir.join(name);
        let mut command = job::command("gcc");
        command.args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-o"]);
        command.arg(&program).arg(&source);
        job::output(&mut command, name)?;
        out.push((name.to_owned(), program));
    }
    Ok(out)
}

/// Builds the kernel's own, unmodified hmm-tests as a static program. Returns its file.
pub fn hmm_tests(repo: &Path, tree: &Tree) -> Result<PathBuf> {
    let dir = kdir::outputs(repo, tree, "hmm")?;
    let _lock = repo::lock(&dir.with_extension("lock"))?;
    let tests = tree.source.join("tools/testing/selftests");
    let binary = dir.join(HMM_TESTS);
    let mut sources = vec![tests.join("mm/hmm-tests.c")];
    // Other versions of mm/Makefile link other helpers into every test.
    let helpers = ["vm_util.c", "hugepage_settings.c", "thp_settings.c"];
    sources.extend(helpers.iter().map(|h| tests.join("mm").join(h)).filter(|p| p.is_file()));
    let mut command = job::command("gcc");
    command.args(["-static", "-O2", "-w", "-U_FORTIFY_SOURCE", "-D_GNU_SOURCE"]);
    command.arg("-I").arg(&tree.source).arg("-I").arg(&tests);
    command.arg("-isystem").arg(tree.source.join("tools/include/uapi"));
    if tree.ours && tree.objects.join("usr/include/linux/mman.h").is_file() {
        command.arg("-isystem").arg(tree.objects.join("usr/include"));
    }
    command.arg("-o").arg(&binary).args(&sources).args(["-lrt", "-lpthread", "-lm"]);
    let log = dir.with_extension("log");
    let _ = fs::remove_file(&log);
    let newest =
        sources.iter().filter_map(|p| fs::metadata(p).and_then(|m| m.modified()).ok()).max();
    let built = fs::metadata(&binary).and_then(|m| m.modified()).ok();
    if built.is_none() || built < newest {
        logged(&mut command, "building hmm-tests", &log, None)?;
    }
    Ok(binary)
}

/// The tests that a kselftest_harness program lists (fixture, variant, test in fixed columns).
pub fn harness_list(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for group in text.split("\n-----") {
        let (mut fixture, mut variants, mut tests) = (String::new(), Vec::new(), Vec::new());
        for line in group.lines().filter(|l| !l.starts_with(['#', '-'])) {
            let column = |from: usize, to: usize| {
                let end = to.min(line.len());
                line.get(from.min(end)..end).unwrap_or_default().trim().to_owned()
            };
            if !column(0, 20).is_empty() {
                fixture = column(0, 20);
            }
            variants.push(column(21, 46));
            tests.push(column(47, line.len()));
        }
        variants.retain(|v| !v.is_empty());
        tests.retain(|t| !t.is_empty());
        if variants.is_empty() {
            out.extend(tests.iter().map(|t| format!("{fixture}.{t}")));
        }
        for variant in &variants {
            out.extend(tests.iter().map(|t| format!("{fixture}.{variant}.{t}")));
        }
    }
    out
}

/// Runs a harness program on the host to list its tests.
pub fn list_harness(binary: &Path) -> Result<Vec<String>> {
    let out = Command::new(binary).arg("-l").output().context("listing hmm-tests")?;
    let list = harness_list(&String::from_utf8_lossy(&out.stderr));
    if list.is_empty() {
        bail!("{} -l lists no test", binary.display());
    }
    Ok(list)
}

/// Runs our selftests on the host to list their tests.
pub fn list_plain(binary: &Path, args: &[String]) -> Result<Vec<String>> {
    let out = job::output(Command::new(binary).args(args).arg("--list"), "zdm-selftests --list")?;
    Ok(out.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect())
}

/// The plans of a checkout. Builds the selftests, which list their tests.
pub fn plans(repo: &Path, matrix: &Matrix) -> Result<Plans> {
    matrix.plans(&|spec| {
        let program = programs(repo, &["zdm-selftests"])?.join("zdm-selftests");
        list_plain(&program, &spec.args)
    })
}

/// The tree's own archiver; builds it from its source if the tree has not built it.
fn gen_init_cpio(repo: &Path, tree: &Tree) -> Result<PathBuf> {
    let built = tree.objects.join("usr/gen_init_cpio");
    if built.is_file() {
        return Ok(built);
    }
    let out = kdir::outputs(repo, tree, "hmm")?.join("gen_init_cpio");
    if !out.is_file() {
        let mut cc = Command::new("cc");
        cc.arg("-O2").arg("-o").arg(&out).arg(tree.source.join("usr/gen_init_cpio.c"));
        job::output(&mut cc, "cc gen_init_cpio.c")?;
    }
    Ok(out)
}

/// The directories of the guest, parents first.
fn directories<'a>(files: impl Iterator<Item = &'a String>) -> BTreeSet<String> {
    let fixed = ["dev", "proc", "sys", "tmp", "run", "bin", "lib", "lib/modules", "etc"];
    let mut out: BTreeSet<String> = fixed.iter().map(|d| format!("/{d}")).collect();
    for file in files {
        let parents = Path::new(file).ancestors().skip(1).filter(|p| *p != Path::new("/"));
        out.extend(parents.map(|p| p.display().to_string()));
    }
    out
}

/// Writes the initramfs; `files` maps paths in the guest to files of the host.
pub fn initramfs(
    repo: &Path,
    tree: &Tree,
    run: &Path,
    plan: &Plan,
    files: &BTreeMap<String, PathBuf>,
) -> Result<PathBuf> {
    let plan_file = run.join("plan.txt");
    fs::write(&plan_file, plan.to_text())?;
    let mut list = String::new();
    for dir in directories(files.keys()) {
        list.push_str(&format!("dir {dir} 0755 0 0\n"));
    }
    list.push_str("nod /dev/console 0600 0 0 c 5 1\nnod /dev/null 0666 0 0 c 1 3\n");
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).is_file());
    if let Some(busybox) = busybox {
        list.push_str(&format!(
            "file /bin/busybox {busybox} 0755 0 0\nslink /bin/sh busybox 0777 0 0\n"
        ));
    } else {
        bail!("no busybox here (package busybox-static)");
    }
    for (name, target) in LINKS {
        if *target == "busybox" || files.contains_key(&format!("/bin/{target}")) {
            list.push_str(&format!("slink /bin/{name} {target} 0777 0 0\n"));
        }
    }
    list.push_str(&format!("file {PATH} {} 0644 0 0\n", plan_file.display()));
    for (guest, host) in files {
        // The format of the list has no quoting.
        if host.to_string_lossy().contains(char::is_whitespace) {
            bail!("{}: a path with blanks cannot go into an initramfs list", host.display());
        }
        let mode = if guest == MODULE { "0644" } else { "0755" };
        list.push_str(&format!("file {guest} {} {mode} 0 0\n", host.display()));
    }
    let list_file = run.join("initramfs.list");
    fs::write(&list_file, list)?;
    let image = run.join("initramfs.cpio");
    let out = Command::new(gen_init_cpio(repo, tree)?)
        .arg(&list_file)
        .stdout(fs::File::create(&image)?)
        .output()
        .context("starting gen_init_cpio")?;
    if !out.status.success() {
        bail!("gen_init_cpio: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    #[test]
    fn harness_columns() {
        let text = "# FIXTURE            VARIANT                   TEST\n\
            global                                         \n\
            --------------------------------------------------------------------------------\n\
            hmm                  hmm_device_private        open_close\n\
            \x20                    hmm_device_coherent       anon_read\n\
            \x20                                              migrate\n\
            --------------------------------------------------------------------------------\n\
            plain                                          only\n";
        assert_eq!(
            harness_list(text),
            [
                "hmm.hmm_device_private.open_close",
                "hmm.hmm_device_private.anon_read",
                "hmm.hmm_device_private.migrate",
                "hmm.hmm_device_coherent.open_close",
                "hmm.hmm_device_coherent.anon_read",
                "hmm.hmm_device_coherent.migrate",
                "plain.only"
            ]
        );
    }

    #[test]
    fn objects_in_the_source_are_named() {
        let dir = tempfile::TempDir::new().unwrap();
        check_source(dir.path()).unwrap();
        fs::write(dir.path().join("modules.order"), "zdmirror.o\n").unwrap();
        let said = check_source(dir.path()).unwrap_err().to_string();
        assert!(said.contains("\"make clean\""), "{said}");
    }

    #[test]
    fn parents_come_first() {
        let files = ["/init".to_owned(), "/lib64/x86/ld.so".to_owned()];
        let dirs: Vec<String> = directories(files.iter()).into_iter().collect();
        assert!(!dirs.contains(&"/".to_owned()) && dirs.contains(&"/lib/modules".to_owned()));
        let at = |d: &str| dirs.iter().position(|x| x == d).unwrap();
        assert!(at("/lib64") < at("/lib64/x86"));
    }
}
