// SPDX-License-Identifier: GPL-2.0
//! `zdvm run` and `zdvm shell`: build, boot, judge, report.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use zdvm_guest::plan::{self, Kind, MODULE, Plan};
use zdvm_guest::wire::{self, Message};

use crate::judge::verdict::{self, Evidence, Exit, Verdict};
use crate::kernel::Tree;
use crate::plan::expected::{On, Selection};
use crate::plan::matrix::{MachineSpec, Matrix, Plans};
use crate::plan::planned::{self, Planned};
use crate::progress::Progress;
use crate::report;
use crate::report::stacks;
use crate::vm::accel::Accel;
use crate::vm::kvm::Choice;
use crate::vm::payload;
use crate::vm::script;
use crate::vm::{Machine, Watcher};

/// Where the program of the audit is in the guest.
const AUDIT: &str = "/bin/zdvm-audit";
/// Path of the kernel tree's own driver in the guest, for suites that load it beside ours.
const C_DRIVER: &str = "/lib/modules/test_hmm.ko";
/// Directory of the C programs in the guest that the selftests run.
const C_PROGRAMS: &str = "/bin/programs";

/// The options of a run.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The kernel whose results are expected, and the machine.
    pub on: On,
    /// The number of processors, if not the machine's own.
    pub vcpus: Option<u32>,
    /// A module to use instead of building ours.
    pub module: Option<&'a Path>,
    /// The suites to build programs for.
    pub suites: &'a [String],
}

/// The data that all boots of one kernel share.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The checkout.
    pub repo: PathBuf,
    /// The kernel.
    pub tree: Tree,
    /// The names of the kernel and of the machine.
    pub on: On,
    /// The machine.
    pub machine: MachineSpec,
    /// The module.
    pub module: PathBuf,
    /// Whether the module can be audited after every test.
    pub audited: bool,
    /// Whether a suite of a harness ends with the first test that leaves the kernel in doubt.
    pub while_sound: bool,
    /// Options of the kernel command line in addition to those of the matrix.
    pub cmdline: String,
    /// A factor for all time limits, in addition to the kernel's own.
    pub timeout_factor: u64,
    /// Seconds that a test may take in a program that runs a suite by itself, if not the limit of
    /// the matrix.
    pub test_limit: Option<u64>,
    /// The programs of the agent and of the audit.
    agent: (PathBuf, PathBuf),
    /// The programs by suite: path in the guest, file on the host.
    pub programs: BTreeMap<String, (String, PathBuf)>,
    /// The tests that each program lists.
    pub lists: BTreeMap<String, Vec<String>>,
}

impl Setup {
    /// Builds everything that the selected suites need.
    pub fn new(repo: &Path, matrix: &Matrix, tree: Tree, request: &Request<'_>) -> Result<Self> {
        let mut machine = matrix.machine(&request.on.machine)?.clone();
        machine.vcpus = request.vcpus.unwrap_or(machine.vcpus);
        let mut packages = vec!["zdvm-guest"];
        let mut kinds = BTreeMap::new();
        let mut c_programs = Vec::new();
        for name in request.suites {
            let kind = matrix.suite(name)?.kind()?;
            if kind == Kind::Ktap {
                c_programs = payload::c_programs(repo)?;
                packages.push("zdm-selftests");
            }
            kinds.insert(name.clone(), kind);
        }
        let module = match request.module {
            Some(file) => {
                crate::kernel::kdir::check_module(file, &tree)?;
                file.canonicalize()?
            }
            None => payload::module(repo, &tree)?,
        };
        let programs_dir = payload::programs(repo, &packages)?;
        let mut setup = Self {
            repo: repo.to_owned(),
            on: request.on.clone(),
            machine,
            module,
            audited: true,
            while_sound: false,
            cmdline: String::new(),
            timeout_factor: 1,
            test_limit: None,
            agent: (programs_dir.join("zdvm-guest"), programs_dir.join("zdvm-audit")),
            programs: BTreeMap::new(),
            lists: BTreeMap::new(),
            tree,
        };
        for (name, file) in c_programs {
            let guest = format!("{C_PROGRAMS}/{name}");
            setup.programs.insert(format!("the program {name}"), (guest, file));
        }
        for (name, kind) in kinds {
            let (file, list) = match kind {
                Kind::Kunit => continue,
                Kind::Ktap => {
                    let file = programs_dir.join("zdm-selftests");
                    let args = matrix.suite(&name)?.arguments(&setup.machine);
                    let list = payload::list_plain(&file, &args)?;
                    (file, list)
                }
                Kind::Harness => {
                    let file = payload::hmm_tests(repo, &setup.tree)?;
                    let list = payload::list_harness(&file)?;
                    (file, list)
                }
                Kind::Script => {
                    let tests = payload::hmm_tests(repo, &setup.tree)?;
                    let list = payload::list_harness(&tests)?;
                    let guest = format!("/bin/{}", payload::HMM_TESTS);
                    setup.programs.insert(format!("{name}'s program"), (guest, tests));
                    (setup.tree.source.join(payload::HMM_SCRIPT), list)
                }
            };
            let spec = matrix.suite(&name)?;
            // A user's tree may lack the driver; the tests that need it then say so.
            if let Some(file) = spec.c_driver.then(|| setup.tree.c_driver().ok()).flatten() {
                setup.programs.insert(format!("{name}'s driver"), (C_DRIVER.to_owned(), file));
            }
            let guest = spec.program.clone();
            let guest = guest.with_context(|| format!("suite {name} has no program"))?;
            setup.programs.insert(name.clone(), (guest, file));
            setup.lists.insert(name, list);
        }
        Ok(setup)
    }

    /// Prints the differences between plan and program: planned tests that the program does not
    /// have, and tests of the program that no plan names.
    fn say_unknown(&self, planned: &Planned) {
        for suite in &planned.suites {
            let Some(list) = self.lists.get(&suite.name) else { continue };
            for test in suite.tests.iter().filter(|t| !list.contains(&t.name)) {
                eprintln!(
                    "zdvm: {} is planned by {}, but the suite's program has no such test",
                    test.name, suite.source
                );
            }
            let known = |t: &&String| {
                suite.deselected.contains(*t) || suite.tests.iter().any(|p| p.name == **t)
            };
            for test in list.iter().filter(|t| !known(t)) {
                eprintln!("zdvm: {test} of suite {} is not in {}", suite.name, suite.source);
            }
        }
    }

    fn files(&self, planned: &Planned, dir: &Path) -> Result<BTreeMap<String, PathBuf>> {
        let mut files: BTreeMap<String, PathBuf> = self.programs.values().cloned().collect();
        files.insert("/init".to_owned(), self.agent.0.clone());
        files.insert(AUDIT.to_owned(), self.agent.1.clone());
        let module = payload::stripped(&self.module, dir)?;
        files.insert(MODULE.to_owned(), module.clone());
        if planned.suites.iter().any(|s| s.kind == Kind::Script) {
            files.extend(script::files(&self.tree, &module, dir)?);
        }
        if planned.suites.iter().any(|s| s.kind == Kind::Ktap) {
            for name in payload::SELFTEST_TOOLS {
                files.extend(script::program(name)?);
            }
        }
        Ok(files)
    }

    fn guest_plan(&self, matrix: &Matrix, planned: &Planned, limit: u64) -> Result<Plan> {
        let mut out = Plan {
            module: crate::kernel::kdir::modinfo(&self.module, "name")?,
            params: self.machine.module_params.clone(),
            audit: if self.audited { AUDIT.to_owned() } else { String::new() },
            cpus: self.machine.vcpus,
            nodes: self.machine.nodes,
            shell: false,
            while_sound: self.while_sound,
            suites: Vec::new(),
        };
        for suite in &planned.suites {
            let in_list = |t: &&String| self.lists.get(&suite.name).is_none_or(|l| l.contains(t));
            let names = suite.tests.iter().map(|t| &t.name).filter(in_list).cloned();
            // The matrix does not know the parts of a suite that is run in parts.
            let spec = matrix.suite.get(&suite.name);
            let mut tests = spec.map(|s| s.arguments(&self.machine)).unwrap_or_default();
            let mut settings = self.machine.settings.clone();
            settings.extend(spec.map(|s| s.settings.clone()).unwrap_or_default());
            match suite.kind {
                Kind::Kunit | Kind::Script => {}
                Kind::Harness => tests.extend(names),
                Kind::Ktap => {
                    // The program says more about a test that hangs than the agent, which only
                    // kills the program: let the program's limit expire first.
                    let seconds = self.test_limit.unwrap_or(limit * 8 / 9);
                    tests.extend(["--timeout".to_owned(), seconds.to_string()]);
                    // The plan, not the program, selects tests: name them. If all planned tests are
                    // selected, name none: the program may have tests that the plan lacks, and
                    // their results show it.
                    if !suite.deselected.is_empty() {
                        tests.extend(names);
                    }
                }
            }
            out.suites.push(plan::Suite {
                name: suite.name.clone(),
                kind: suite.kind,
                timeout: limit,
                program: self.programs.get(&suite.name).map_or("-", |p| p.0.as_str()).to_owned(),
                tests,
                settings: settings.into_iter().collect(),
            });
        }
        Ok(out)
    }

    fn machine(
        &self,
        matrix: &Matrix,
        dir: &Path,
        plan: &Plan,
        files: &BTreeMap<String, PathBuf>,
    ) -> Result<Machine> {
        let spec = matrix.kernel(&self.on.kernel)?;
        let qemu = std::env::var_os("ZDVM_QEMU").map_or("qemu-system-x86_64".into(), PathBuf::from);
        let nodes = match self.machine.nodes {
            0 | 1 => String::new(),
            n => format!("numa=fake={n}"),
        };
        let cmdline = [&*self.machine.cmdline, &*nodes, &*spec.cmdline_extra, &*self.cmdline];
        Ok(Machine {
            qemu,
            image: self.tree.image(),
            initrd: payload::initramfs(&self.repo, &self.tree, dir, plan, files)?,
            memory: self.machine.memory.clone(),
            vcpus: self.machine.vcpus,
            cmdline: cmdline.join(" ").split_whitespace().collect::<Vec<_>>().join(" "),
            dir: dir.to_owned(),
            extra: self.machine.qemu.split_whitespace().map(str::to_owned).collect(),
        })
    }
}

/// Makes a new folder for a run, and points `latest` to it.
pub fn folder(repo: &Path, out: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = out {
        fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        return Ok(dir.canonicalize()?);
    }
    let runs = repo.join("build/runs");
    fs::create_dir_all(&runs).with_context(|| format!("making {}", runs.display()))?;
    let stem = format!("{}-{}", Timestamp::now().strftime("%Y%m%d-%H%M%S"), std::process::id());
    // One process may begin two runs in the same second.
    let mut name = stem.clone();
    let mut more = 1;
    while let Err(e) = fs::create_dir(runs.join(&name)) {
        if e.kind() != std::io::ErrorKind::AlreadyExists {
            return Err(e).with_context(|| format!("making {}", runs.join(&name).display()));
        }
        more += 1;
        name = format!("{stem}-{more}");
    }
    let dir = runs.join(&name);
    // Create the link under another name and rename it, so that `latest` always exists.
    let temporary = runs.join(format!(".latest-{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    std::os::unix::fs::symlink(&name, &temporary)?;
    fs::rename(&temporary, runs.join("latest"))?;
    Ok(dir)
}

/// Shows the progress of the guest.
struct Live {
    suite: Option<(String, Progress, u64)>,
    sizes: BTreeMap<String, u64>,
}

impl Watcher for Live {
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
                if let Some(figure) = text.split_once("bench: ").filter(|_| text.starts_with('#')) {
                    report::say(&format!("{}\n", figure.1));
                }
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

/// The result of one boot.
#[derive(Debug)]
pub struct Boot {
    /// The verdict.
    pub verdict: Verdict,
    /// How QEMU ran the guest.
    pub accel: Accel,
    /// How QEMU ended.
    pub exit: Exit,
    /// Seconds from start to end of QEMU.
    pub seconds: f64,
}

impl Boot {
    /// The accelerator in one word.
    pub fn accel(&self) -> String {
        format!("{:?}", self.accel).to_lowercase()
    }
}

/// Boots once and judges the boot.
pub fn boot(
    setup: &Setup,
    matrix: &Matrix,
    planned: &Planned,
    choice: &Choice,
    dir: &Path,
) -> Result<Boot> {
    let size = |s: &planned::Suite| (s.name.clone(), u64::try_from(s.tests.len()).unwrap_or(0));
    let mut live = Live { suite: None, sizes: planned.suites.iter().map(size).collect() };
    let boot = watched(setup, matrix, planned, choice, dir, &mut live)?;
    // Stacks of reports that tests provoke on purpose are not decoded: they are many.
    if !boot.verdict.splats.is_empty() && !boot.verdict.pass() {
        stacks::decode(&setup.tree, &setup.module, dir);
    }
    Ok(boot)
}

/// Boots once with a watcher, and judges the boot.
pub fn watched(
    setup: &Setup,
    matrix: &Matrix,
    planned: &Planned,
    choice: &Choice,
    dir: &Path,
    watcher: &mut dyn Watcher,
) -> Result<Boot> {
    let factor = matrix.kernel(&setup.on.kernel)?.timeout_factor * setup.timeout_factor;
    let timeouts = matrix.timeouts.times(factor);
    let limits = choice.known().unwrap_or(Accel::Tcg).scale(timeouts);
    let plan = setup.guest_plan(matrix, planned, limits.test)?;
    let machine = setup.machine(matrix, dir, &plan, &setup.files(planned, dir)?)?;
    let start = Instant::now();
    let (accel, exit) = choice.boot(&machine, timeouts, watcher)?;
    let seconds = start.elapsed().as_secs_f64();
    let console = fs::read(dir.join("console.log"))?;
    let console = String::from_utf8_lossy(&console);
    let stream = fs::read(dir.join("wire.log"))?;
    write_ktap(&stream, dir)?;
    let evidence = Evidence { console: &console, wire: &stream, exit: exit.clone() };
    let verdict = verdict::judge(planned, &evidence);
    Ok(Boot { verdict, accel, exit, seconds })
}

/// The plan for a kernel on a machine, which must have a test.
pub fn planned(matrix: &Matrix, on: &On, plans: &Plans, selection: &Selection) -> Result<Planned> {
    let planned = matrix.planned(on, plans, selection)?;
    if planned.suites.iter().any(|s| !s.tests.is_empty()) {
        return Ok(planned);
    }
    let all = Selection { full: true, ..selection.clone() };
    let all = matrix.planned(on, plans, &all)?;
    let slow: usize = all.suites.iter().map(|s| s.tests.len()).sum();
    let lacking: usize = planned.suites.iter().map(|s| s.not_applicable).sum();
    bail!(
        "nothing is left to run: {}",
        match (slow, lacking) {
            (0, 0) => "no test matches; zdvm run --list --full shows all names".to_owned(),
            (0, n) =>
                format!("what matches needs what this kernel's configuration lacks (tests: {n})"),
            (n, _) => format!("what matches is slow, and runs with --full only (tests: {n})"),
        }
    );
}

/// Boots once, judges the boot, prints the result and writes it to the folder.
pub fn once(
    setup: &Setup,
    matrix: &Matrix,
    plans: &Plans,
    selection: &Selection,
    choice: &Choice,
    dir: &Path,
) -> Result<Boot> {
    let planned = planned(matrix, &setup.on, plans, selection)?;
    setup.say_unknown(&planned);
    let boot = boot(setup, matrix, &planned, choice, dir)?;
    let run = report::Run {
        verdict: &boot.verdict,
        pass: boot.verdict.pass(),
        accel: boot.accel(),
        exit: boot.exit.to_string(),
        seconds: boot.seconds,
    };
    report::write(&run, dir)?;
    crate::report::html::beside(dir);
    report::say(&format!("\n{}{}", report::table(&boot.verdict), report::problems(&boot.verdict)));
    report::say(&report::verdict_line(&run, dir));
    Ok(boot)
}

/// The machine of an interactive guest.
pub fn shell_machine(setup: &Setup, matrix: &Matrix, dir: &Path) -> Result<Machine> {
    let plan = Plan {
        module: crate::kernel::kdir::modinfo(&setup.module, "name")?,
        params: setup.machine.module_params.clone(),
        shell: true,
        ..Plan::default()
    };
    let mut files = setup.files(&Planned::default(), dir)?;
    for name in payload::SELFTEST_TOOLS {
        files.extend(script::program(name)?);
    }
    // strace is no part of the tool set: ./zdvm adds it, if it can be had.
    files.extend(script::program("strace").unwrap_or_default());
    let mut setup = setup.clone();
    // Each load of the module would run its unit tests, which provoke warnings.
    setup.cmdline = format!("{} kunit.enable=0", setup.cmdline);
    setup.machine(matrix, dir, &plan, &files)
}

/// What is printed before the guest's own lines.
const SHELL: &str = "zdvm: booting to a shell. `exit` powers off, Ctrl-A X ends QEMU at once, Ctrl-A C is its monitor.\n\
                     zdvm: in the guest: zdm-selftests, hmm-tests, mkfs.ext4, mkfs.xfs, strace, busybox.\n\
                     zdvm: with a debugger: ./zdvm gdb\n";

/// Runs an interactive guest.
pub fn shell(setup: &Setup, matrix: &Matrix, choice: &Choice, dir: &Path) -> Result<()> {
    let machine = shell_machine(setup, matrix, dir)?;
    // Proving KVM takes seconds: use TCG unless an earlier run has proved KVM.
    let accel = choice.known().unwrap_or(Accel::Tcg);
    report::say(SHELL);
    machine.interact(accel)?;
    Ok(())
}
