// SPDX-License-Identifier: GPL-2.0
//! `zdvm run` and `zdvm shell`: build, boot, judge, report.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use zdvm_guest::plan::{self, Kind, MODULE, Plan};
use zdvm_guest::wire::{self, Message};

use crate::accel::{Accel, Choice};
use crate::kernel::Tree;
use crate::matrix::{Matrix, Plans, Selection};
use crate::payload;
use crate::progress::Progress;
use crate::report;
use crate::verdict::{self, Evidence, Planned, Verdict};
use crate::vm::Machine;

/// What is the same for every boot of one kernel.
#[derive(Debug)]
pub struct Setup {
    /// The checkout.
    pub repo: PathBuf,
    /// The kernel.
    pub tree: Tree,
    /// Its name in the matrix, for what is expected of it.
    pub kernel: String,
    /// The module, unless none is wanted.
    pub module: Option<PathBuf>,
    /// The agent.
    pub agent: PathBuf,
    /// Programs by suite: path in the guest, file here.
    pub programs: BTreeMap<String, (String, PathBuf)>,
    /// What the programs say they have.
    pub lists: BTreeMap<String, Vec<String>>,
}

impl Setup {
    /// Builds whatever the selected suites need.
    pub fn new(
        repo: &Path,
        matrix: &Matrix,
        tree: Tree,
        kernel: &str,
        module: Option<&Path>,
        suites: &[String],
    ) -> Result<Self> {
        let mut packages = vec!["zdvm-guest"];
        let mut kinds = BTreeMap::new();
        for name in suites {
            let kind = matrix.suite(name)?.kind()?;
            if kind == Kind::Ktap {
                packages.push("zdm-selftests");
            }
            kinds.insert(name.clone(), kind);
        }
        let module = match module {
            Some(file) => {
                crate::kdir::check_module(file, &tree)?;
                file.canonicalize()?
            }
            None => payload::module(repo, &tree)?,
        };
        let programs_dir = payload::programs(repo, &packages)?;
        let mut setup = Self {
            repo: repo.to_owned(),
            kernel: kernel.to_owned(),
            module: Some(module),
            agent: programs_dir.join("zdvm-guest"),
            programs: BTreeMap::new(),
            lists: BTreeMap::new(),
            tree,
        };
        for (name, kind) in kinds {
            let (file, list) = match kind {
                Kind::Kunit => continue,
                Kind::Ktap => {
                    let file = programs_dir.join("zdm-selftests");
                    let list = payload::list_plain(&file)?;
                    (file, list)
                }
                Kind::Harness => {
                    let file = payload::hmm_tests(repo, &setup.tree)?;
                    let list = payload::list_harness(&file)?;
                    (file, list)
                }
            };
            let guest = matrix.suite(&name)?.program.clone();
            let guest = guest.with_context(|| format!("suite {name} has no program"))?;
            setup.programs.insert(name.clone(), (guest, file));
            setup.lists.insert(name, list);
        }
        Ok(setup)
    }

    /// A planned test that its program does not have cannot come: say why it will be missing.
    fn say_unknown(&self, planned: &Planned) {
        for suite in &planned.suites {
            let Some(list) = self.lists.get(&suite.name) else { continue };
            for test in suite.tests.iter().filter(|t| !list.contains(&t.name)) {
                eprintln!(
                    "zdvm: {} is planned by {}, but the suite's program has no such test",
                    test.name, suite.source
                );
            }
        }
    }

    fn files(&self) -> BTreeMap<String, PathBuf> {
        let mut files: BTreeMap<String, PathBuf> = self.programs.values().cloned().collect();
        files.insert("/init".to_owned(), self.agent.clone());
        if let Some(module) = &self.module {
            files.insert(MODULE.to_owned(), module.clone());
        }
        files
    }

    fn guest_plan(&self, planned: &Planned, limit: u64, whole: bool) -> Result<Plan> {
        let module = match &self.module {
            Some(file) => crate::kdir::modinfo(file, "name")?,
            None => "zdmirror".to_owned(),
        };
        let mut out = Plan { module, shell: false, suites: Vec::new() };
        for suite in &planned.suites {
            // The program's own choice of tests would be no plan: names are given, except where
            // all of them are wanted and the program may have more than is planned.
            let named = suite.kind == Kind::Harness || (suite.kind == Kind::Ktap && !whole);
            let in_list = |t: &&String| self.lists.get(&suite.name).is_none_or(|l| l.contains(t));
            let names = suite.tests.iter().map(|t| &t.name);
            out.suites.push(plan::Suite {
                name: suite.name.clone(),
                kind: suite.kind,
                timeout: limit,
                program: self.programs.get(&suite.name).map_or("-", |p| p.0.as_str()).to_owned(),
                tests: if named { names.filter(in_list).cloned().collect() } else { Vec::new() },
            });
        }
        Ok(out)
    }

    fn machine(&self, matrix: &Matrix, dir: &Path, plan: &Plan) -> Result<Machine> {
        let spec = matrix.kernel(&self.kernel)?;
        let qemu = std::env::var_os("ZDVM_QEMU").map_or("qemu-system-x86_64".into(), PathBuf::from);
        Ok(Machine {
            qemu,
            image: self.tree.image(),
            initrd: payload::initramfs(&self.repo, &self.tree, dir, plan, &self.files())?,
            memory: spec.memory.clone(),
            vcpus: spec.vcpus,
            cmdline: spec.cmdline_extra.clone(),
            dir: dir.to_owned(),
            extra: Vec::new(),
        })
    }
}

/// A new folder for a run, and `latest` pointing at it.
pub fn folder(repo: &Path, out: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = out {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        return Ok(dir.canonicalize()?);
    }
    let runs = repo.join("build/runs");
    fs::create_dir_all(&runs).with_context(|| format!("making {}", runs.display()))?;
    let name = format!("{}-{}", timestamp(), std::process::id());
    let dir = runs.join(&name);
    fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
    // Made under another name and moved, so that `latest` is there at any time.
    let temporary = runs.join(format!(".latest-{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(&name, &temporary)?;
    fs::rename(&temporary, runs.join("latest"))?;
    Ok(dir)
}

/// UTC as 20260131-235959 (days to a date after Howard Hinnant's civil_from_days).
fn timestamp() -> String {
    let secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (secs / 86_400 + 719_468, secs % 86_400);
    let era = days / 146_097;
    let doe = days % 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}-{:02}{:02}{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Shows what the guest is doing.
struct Live {
    suite: Option<(String, Progress, u64)>,
    sizes: BTreeMap<String, u64>,
}

impl Live {
    fn message(&mut self, message: &Message) {
        match message {
            Message::SuiteStart(name) => {
                let total = self.sizes.get(name).copied().unwrap_or(0);
                self.suite =
                    Some((name.clone(), Progress::new(&format!("suite {name}"), total), 0));
            }
            Message::SuiteEnd(..) => self.suite = None,
            Message::Ktap(line) => {
                let text = line.trim_start();
                let result = text.starts_with("ok ") || text.starts_with("not ok ");
                if let Some((_, progress, done)) = self.suite.as_mut().filter(|_| result) {
                    *done += 1;
                    progress.set(*done, text);
                    if text.starts_with("not ok ") {
                        progress.line(text);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Writes the (K)TAP of every suite into a file of its own.
fn write_ktap(stream: &[u8], dir: &Path) -> Result<()> {
    let mut suite = None;
    let mut texts: BTreeMap<String, String> = BTreeMap::new();
    for message in wire::decode(stream).0 {
        match message {
            Message::SuiteStart(name) => {
                texts.entry(name.clone()).or_default();
                suite = Some(name);
            }
            Message::Ktap(line) => {
                if let Some(text) = suite.as_ref().and_then(|n| texts.get_mut(n)) {
                    text.push_str(&line);
                    text.push('\n');
                }
            }
            _ => {}
        }
    }
    for (name, text) in texts {
        fs::write(dir.join(format!("{name}.ktap")), text)?;
    }
    Ok(())
}

/// The stacks of an ill run with file and line, where the tree knows them.
fn decode_stacks(tree: &Tree, dir: &Path) {
    let debug = tree.config().is_ok_and(|c| c.contains("CONFIG_DEBUG_INFO=y"));
    let vmlinux = tree.objects.join("vmlinux");
    let script = tree.source.join("scripts/decode_stacktrace.sh");
    if !debug || !vmlinux.is_file() || !script.is_file() {
        return;
    }
    let (Ok(log), Ok(out)) = (
        fs::File::open(dir.join("console.log")),
        fs::File::create(dir.join("console.decoded.log")),
    ) else {
        return;
    };
    let mut command = crate::job::command(script);
    command.arg(vmlinux).arg(&tree.objects).stdin(log).stdout(out);
    command.stderr(std::process::Stdio::null());
    let done = crate::job::Job::spawn(&mut command, "decode_stacktrace.sh")
        .and_then(|mut job| job.success(|| Ok(())));
    if done.is_err() {
        eprintln!("zdvm: scripts/decode_stacktrace.sh failed; console.log has the raw stacks");
    }
}

/// One boot, judged, reported and written down.
pub fn once(
    setup: &Setup,
    matrix: &Matrix,
    plans: &Plans,
    selection: &Selection,
    choice: &Choice,
    dir: &Path,
) -> Result<Verdict> {
    let planned = matrix.planned(&setup.kernel, plans, &setup.lists, selection)?;
    if planned.suites.is_empty() {
        bail!("nothing is left to run: no test matches");
    }
    let factor = if choice.known() == Some(Accel::Kvm) { 1 } else { matrix.timeouts.tcg_factor };
    let limit = matrix.timeouts.test * factor;
    setup.say_unknown(&planned);
    let plan = setup.guest_plan(&planned, limit, selection.filter.is_none())?;
    let machine = setup.machine(matrix, dir, &plan)?;
    let size = |s: &verdict::Suite| (s.name.clone(), u64::try_from(s.tests.len()).unwrap_or(0));
    let mut live = Live { suite: None, sizes: planned.suites.iter().map(size).collect() };
    let start = Instant::now();
    let (accel, exit) = choice.boot(&machine, matrix.timeouts, &mut |m| live.message(m))?;
    live.suite = None;
    let seconds = start.elapsed().as_secs_f64();
    let console = fs::read(dir.join("console.log"))?;
    let console = String::from_utf8_lossy(&console);
    let stream = fs::read(dir.join("wire.log"))?;
    write_ktap(&stream, dir)?;
    let evidence = Evidence { console: &console, wire: &stream, exit: exit.clone() };
    let verdict = verdict::judge(&planned, &evidence);
    if !verdict.splats.is_empty() {
        decode_stacks(&setup.tree, dir);
    }
    let run = report::Run {
        verdict: &verdict,
        pass: verdict.pass(),
        accel: format!("{accel:?}").to_lowercase(),
        exit: format!("{exit:?}"),
        seconds,
    };
    report::write(&run, dir)?;
    report::say(&format!("\n{}{}", report::table(&verdict), report::problems(&verdict)));
    report::say(&report::verdict_line(&run, dir));
    Ok(verdict)
}

/// An interactive guest.
pub fn shell(setup: &Setup, matrix: &Matrix, choice: &Choice, dir: &Path) -> Result<()> {
    let module = setup.module.as_deref().map(|m| crate::kdir::modinfo(m, "name")).transpose()?;
    let plan = Plan { module: module.unwrap_or_default(), shell: true, suites: Vec::new() };
    let machine = setup.machine(matrix, dir, &plan)?;
    // Nobody wants to wait for a proof here: TCG unless KVM has been proved by a run.
    let accel = choice.known().unwrap_or(Accel::Tcg);
    machine.interact(accel)?;
    Ok(())
}
