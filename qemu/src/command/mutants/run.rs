// SPDX-License-Identifier: GPL-2.0
//! Boots the bugs, several at a time, and stores the results.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use regex::Regex;

use crate::command::compare;
use crate::command::mutants::catalogue::{Catalogue, Mutant, essence};
use crate::command::mutants::finding::{self, Outcome};
use crate::command::mutants::plan::{Baseline, Detector, LAST, PARTS, limit, ordered, shorten};
use crate::command::mutants::table::{self, Table};
use crate::command::mutants::verdicts::{self, Verdict, Verdicts};
use crate::command::mutants::watch::{Lookout, shape};
use crate::command::run::{self, Request, Setup};
use crate::job;
use crate::kernel::series::Patch;
use crate::kernel::{self, Tree};
use crate::plan::expected::{On, Selection};
use crate::plan::matrix::{Matrix, Plans};
use crate::plan::planned::{Expect, Planned, Test};
use crate::repo;
use crate::report::{self, html};
use crate::vm::kvm::Choice;
use crate::vm::payload;

/// The kernel of the matrix that has the bugs.
pub const KERNEL: &str = "mutants";
/// What the kernel command line calls the switch.
pub const PARAMETER: &str = "zdm_mutant";
/// Raised when stored results change their meaning.
const VERSION: &str = "2";
/// hmm-tests that only measure times. A bug that only a benchmark reaches does not show in a time.
const BENCHMARKS: &str = r"\.benchmark_";

/// The options of the command.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Bugs by name; empty for all.
    pub names: Vec<String>,
    /// Detectors; empty for all.
    pub detectors: Vec<Detector>,
    /// Guests at a time.
    pub jobs: usize,
    /// Only tests whose name matches.
    pub filter: Option<Regex>,
    /// Leave out the tests of our suite that do not reach the bug.
    pub short: bool,
    /// Ignore stored results.
    pub fresh: bool,
    /// Write Documentation/mutants.rst.
    pub write: bool,
    /// The machine.
    pub machine: String,
}

/// One detector, ready to run.
struct Ready {
    detector: Detector,
    setup: Setup,
    planned: Planned,
    baseline: Baseline,
    /// The key of the programs and the module.
    key: String,
}

/// The data that all boots share.
struct Ground<'a> {
    matrix: Matrix,
    patches: Vec<Patch>,
    /// The key of the kernel without the bugs.
    base: String,
    choice: &'a Choice,
    store: PathBuf,
    dir: PathBuf,
    /// Leave out the tests of our suite that do not reach the bug.
    short: bool,
}

/// Collects the text of a source file, or of all files of a directory in order.
fn sources(path: &Path, out: &mut Vec<String>) -> Result<()> {
    if path.is_dir() {
        let entries = fs::read_dir(path).with_context(|| format!("reading {}", path.display()))?;
        let mut entries = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
        entries.sort();
        return entries.iter().try_for_each(|entry| sources(entry, out));
    }
    let ours = path.extension().and_then(|e| e.to_str());
    if matches!(ours, Some("rs" | "c" | "h") | None) {
        out.push(repo::key([fs::read(path)?]));
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    // An unreadable result is determined again.
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<()> {
    // Write under another name first: an interruption must not leave half a file.
    let new = path.with_extension(format!("{}.new", std::process::id()));
    fs::write(&new, serde_json::to_string_pretty(value)? + "\n")
        .with_context(|| format!("writing {}", new.display()))?;
    fs::rename(&new, path).with_context(|| format!("writing {}", path.display()))
}

fn names_of(planned: &Planned) -> Vec<String> {
    let tests = planned.suites.iter().flat_map(|s| &s.tests);
    tests.map(|t| format!("{} {:?}", t.name, t.expect)).collect()
}

impl Ground<'_> {
    /// The folder of a boot, emptied.
    fn folder(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
        }
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// The key of the series that the bugs are seeded over.
    fn series(&self) -> Result<String> {
        let kernel = self.matrix.kernel(KERNEL)?;
        let mut patches = Vec::new();
        for dir in kernel.patches.iter().rev().skip(1).rev() {
            patches.extend(crate::kernel::series::read(&self.matrix.dir.join(dir))?);
        }
        Ok(verdicts::series(&patches))
    }

    fn ready(
        &self,
        repo: &Path,
        plans: &Plans,
        tree: &Tree,
        wish: &Wish,
        detector: Detector,
    ) -> Result<Ready> {
        let suites = [detector.suite().to_owned()];
        let on = On { kernel: KERNEL.to_owned(), machine: wish.machine.clone() };
        let theirs = detector == Detector::UpstreamC;
        let upstream = theirs.then(|| tree.c_driver()).transpose()?;
        let request = Request { on, vcpus: None, module: upstream.as_deref(), suites: &suites };
        let mut setup = Setup::new(repo, &self.matrix, tree.clone(), &request)?;
        let selection =
            Selection { suites: suites.to_vec(), filter: None, full: true, config: None };
        let mut planned = self.matrix.planned(&request.on, plans, &selection)?;
        let measures = Regex::new(BENCHMARKS)?;
        let wanted = |name: &str| wish.filter.as_ref().is_none_or(|f| f.is_match(name));
        for suite in &mut planned.suites {
            suite.tests.retain(|t| !measures.is_match(&t.name));
            let (tests, out) =
                suite.tests.drain(..).partition(|t: &Test| wanted(&t.name) || t.name == LAST);
            suite.tests = tests;
            suite.deselected.extend(out.into_iter().map(|t: Test| t.name));
        }
        let mut order = "by reach";
        match detector {
            Detector::Suite => {
                // The same program runs all parts.
                for part in PARTS {
                    let program = setup.programs.get(detector.suite()).cloned();
                    setup.programs.extend(program.map(|p| (part.to_owned(), p)));
                    let list = setup.lists.get(detector.suite()).cloned();
                    setup.lists.extend(list.map(|l| (part.to_owned(), l)));
                }
            }
            Detector::UpstreamC => {
                setup.audited = false;
                order = "as it is";
                let tests = planned.suites.iter_mut().flat_map(|s| &mut s.tests);
                tests.for_each(|t| t.expect = Expect::Pass);
            }
            Detector::UpstreamOurs => {}
        }
        let parts = [VERSION, order, detector.word(), &wish.machine];
        let mut parts: Vec<String> = parts.map(str::to_owned).to_vec();
        // test_hmm.ko and hmm-tests belong to the kernel, and the kernel's key covers them. The
        // module's object contains paths, among them the kernel's, which change with every bug: use
        // its source for the key.
        if detector != Detector::UpstreamC {
            for dir in ["rust", "uapi", "Kbuild"] {
                sources(&repo.join(dir), &mut parts)?;
            }
        }
        if let (Detector::Suite, Some((_, program))) =
            (detector, setup.programs.get(detector.suite()))
        {
            let bytes =
                fs::read(program).with_context(|| format!("reading {}", program.display()))?;
            parts.push(repo::key([bytes]));
        }
        parts.extend(names_of(&planned));
        Ok(Ready {
            detector,
            setup,
            planned,
            baseline: Baseline::default(),
            key: repo::key(&parts),
        })
    }

    /// Runs a detector without any bug, unless a result for these very bugs is stored.
    fn baseline(&self, ready: &mut Ready, fresh: bool) -> Result<()> {
        let mut parts = vec![self.base.clone(), ready.key.clone()];
        parts.extend(self.patches.iter().map(|p| p.diff().to_owned()));
        let kept = self.store.join(format!("baseline-{}.json", repo::key(&parts)));
        if let Some(baseline) = read_json(&kept).filter(|_| !fresh) {
            ready.baseline = baseline;
            return Ok(());
        }
        eprintln!("zdvm: {} without any bug", ready.detector.title());
        let mut setup = ready.setup.clone();
        setup.cmdline = format!("{PARAMETER}=coverage");
        let dir = self.folder(&format!("baseline.{}", ready.detector.word()))?;
        let mut baseline = Baseline::default();
        let mut dirs = Vec::new();
        if ready.detector == Detector::UpstreamC {
            let outcomes =
                compare::theirs(&setup, &self.matrix, &ready.planned, self.choice, &dir)?;
            for (test, outcome) in outcomes.iter().filter(|(_, o)| o.word != "pass" || o.oopses > 0)
            {
                let why = format!("{}, {} oopses", outcome.word, outcome.oopses);
                baseline.bad.insert(test.clone(), why);
            }
            dirs.extend((1..).map(|n| dir.join(format!("guest-{n}"))).take_while(|d| d.exists()));
        } else {
            let boot = run::boot(&setup, &self.matrix, &ready.planned, self.choice, &dir)?;
            for result in boot.verdict.suites.iter().flat_map(|s| &s.tests) {
                if !result.status.good() {
                    baseline.bad.insert(result.name.clone(), result.reason.clone());
                }
            }
            for splat in &boot.verdict.splats {
                let test = splat.test.clone().unwrap_or_default();
                if boot.verdict.problems.iter().any(|p| p.text.starts_with(&splat.text)) {
                    baseline.bad.insert(test, splat.text.clone());
                }
            }
            if boot.verdict.problems.iter().any(|p| p.kind == "timeout" || p.kind == "exit") {
                report::say(&report::problems(&boot.verdict));
                bail!("{} does not come to an end without any bug", ready.detector.title());
            }
            dirs.push(dir);
        }
        for dir in &dirs {
            let console = fs::read(dir.join("console.log"))?;
            let console = String::from_utf8_lossy(&console);
            if !console.contains(&format!("{PARAMETER}: coverage is on")) {
                bail!("the kernel has no {PARAMETER}=coverage; see {}", dir.display());
            }
            baseline.cover(&console);
            if ready.detector == Detector::UpstreamC {
                let splats = crate::judge::splat::scan(&console);
                baseline.usual.extend(splats.iter().map(|s| shape(&s.text)));
            }
            let _ = fs::remove_file(dir.join("initramfs.cpio"));
        }
        write_json(&kept, &baseline)?;
        ready.baseline = baseline;
        Ok(())
    }

    /// The file with a detector's stored result for a bug.
    fn kept(&self, ready: &Ready, mutant: &Mutant) -> PathBuf {
        let mut parts = vec![
            self.base.clone(),
            ready.key.clone(),
            mutant.name.clone(),
            essence(&self.patches, &mutant.name),
        ];
        if self.short {
            parts.push("short".to_owned());
        }
        let key = repo::key(&parts);
        self.store.join(format!("{}-{key}.json", mutant.name))
    }

    /// The file that names the test that noticed a bug last, whatever the tests were then.
    fn noticed(&self, detector: Detector, mutant: &Mutant) -> PathBuf {
        self.store.join(format!("noticed-{}.{}.json", mutant.name, detector.word()))
    }

    /// Boots a bug that some test reaches.
    ///
    /// A test that does not reach the bug may still fail: as a consequence of the bug, or because a
    /// busy machine made it exceed its time limit. A second boot tells the two apart, because a
    /// consequence appears in both boots.
    fn look(&self, ready: &Ready, mutant: &Mutant) -> Result<Outcome> {
        let Some(reach) = ready.baseline.reach.get(&mutant.name) else {
            return Ok(Outcome::default());
        };
        let mut first = self.boot(ready, mutant)?;
        if !first.reached {
            // Some tests reach it. A guest that gets no CPU ends before they run.
            first = self.boot(ready, mutant)?;
        }
        if !first.killed() || first.noticed_by(reach) {
            return Ok(first);
        }
        let second = self.boot(ready, mutant)?;
        if second.killed() && !second.noticed_by(reach) && !second.same_tests(&first) {
            return Ok(Outcome { found: Vec::new(), ..second });
        }
        Ok(second)
    }

    fn boot(&self, ready: &Ready, mutant: &Mutant) -> Result<Outcome> {
        let mut setup = ready.setup.clone();
        setup.cmdline = format!("{PARAMETER}={}", mutant.name);
        // Some tests damage the C driver's COHERENT memory for good, so the results of later tests
        // depend on the order.
        let keep = ready.detector == Detector::UpstreamC;
        let noticed = self.noticed(ready.detector, mutant);
        let last = read_json::<String>(&noticed);
        let mut planned = ordered(&ready.planned, &ready.baseline, mutant, keep, last.as_deref());
        if self.short {
            shorten(&mut planned);
        }
        if ready.detector == Detector::Suite {
            setup.test_limit = Some(limit(&planned, &ready.baseline));
        }
        let dir = self.folder(&format!("{}.{}", mutant.name, ready.detector.word()))?;
        let usual = &ready.baseline.usual;
        let mut lookout = Lookout::new(&planned, usual, &mutant.name);
        let boot = run::watched(&setup, &self.matrix, &planned, self.choice, &dir, &mut lookout)?;
        let _ = fs::remove_file(dir.join("initramfs.cpio"));
        let console = fs::read(dir.join("console.log"))?;
        let console = String::from_utf8_lossy(&console);
        let on = console.contains(&format!("{PARAMETER}: {} is on", mutant.name));
        if lookout.refused() || !on {
            bail!("the kernel does not know the mutant {}; see {}", mutant.name, dir.display());
        }
        let wire = fs::read(dir.join("wire.log"))?;
        let mut outcome = finding::judge(&finding::Evidence {
            mutant: &mutant.name,
            planned: &planned,
            verdict: &boot.verdict,
            console: &console,
            wire: &wire,
            exit: &boot.exit,
            usual,
        });
        outcome.seconds = boot.seconds;
        if let Some(finding) = outcome.found.first().filter(|_| outcome.killed()) {
            write_json(&noticed, &finding.test)?;
        }
        write_json(&dir.join("outcome.json"), &outcome)?;
        Ok(outcome)
    }
}

/// One line about a boot.
fn line(mutant: &Mutant, ready: &Ready, outcome: &Outcome) -> String {
    let what = if outcome.killed() {
        let words: BTreeSet<&str> = outcome.found.iter().map(|f| f.by.word()).collect();
        let test = outcome.found.first().map_or("", |f| f.test.as_str());
        format!("{} ({test})", words.into_iter().collect::<Vec<_>>().join(", "))
    } else if let Some(why) = &outcome.uncounted {
        format!("not counted: {why}")
    } else if outcome.reached {
        "reached and not noticed".to_owned()
    } else {
        "not reached".to_owned()
    };
    format!("{} {}: {what}, {:.0} s", ready.detector.word(), mutant.name, outcome.seconds)
}

type Results = BTreeMap<(String, Detector), Outcome>;

/// Works on the remaining bugs, several at a time.
fn work(
    ground: &Ground<'_>,
    ready: &[Ready],
    queue: Vec<(usize, Mutant)>,
    jobs: usize,
    results: &mut Results,
) -> Result<()> {
    let total = queue.len();
    let shared = Mutex::new((VecDeque::from(queue), results, 0));
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let one = || -> Result<()> {
        loop {
            job::check_signals()?;
            let Some((at, mutant)) = lock().0.pop_front() else { return Ok(()) };
            let ready = &ready[at];
            let done = ground.look(ready, &mutant).and_then(|outcome| {
                write_json(&ground.kept(ready, &mutant), &outcome)?;
                Ok(outcome)
            });
            let mut shared = lock();
            match done {
                Ok(outcome) => {
                    shared.2 += 1;
                    let said = line(&mutant, ready, &outcome);
                    eprintln!("zdvm: [{}/{total}] {said}", shared.2);
                    shared.1.insert((mutant.name.clone(), ready.detector), outcome);
                }
                Err(e) => {
                    // The other threads finish the boots that they have begun.
                    shared.0.clear();
                    return Err(e);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(one)).collect();
        let ends = threads.into_iter().map(|t| match t.join() {
            Ok(end) => end,
            Err(_) => bail!("a thread of zdvm panicked"),
        });
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

/// The bugs that the command line names.
fn chosen<'a>(catalogue: &'a Catalogue, names: &[String]) -> Result<Vec<&'a Mutant>> {
    for name in names {
        if catalogue.mutant.iter().all(|m| m.name != *name) {
            bail!("no mutant {name:?} in the catalogue; `zdvm mutants --list` shows them");
        }
    }
    Ok(catalogue.mutant.iter().filter(|m| names.is_empty() || names.contains(&m.name)).collect())
}

/// Reads the catalogue of a checkout.
pub fn catalogue(matrix: &Matrix) -> Result<(Catalogue, Vec<Patch>)> {
    let kernel = matrix.kernel(KERNEL)?;
    let Some(dir) = kernel.patches.last() else { bail!("kernel {KERNEL} has no patches") };
    let patches = crate::kernel::series::read(&matrix.dir.join(dir))?;
    Ok((Catalogue::load(&matrix.dir, &patches)?, patches))
}

/// Records the verdicts of this run beside those of earlier ones, and renews the document. If the run
/// had only some of the tests, only bugs that were found have a verdict.
fn record(
    repo: &Path,
    ground: &Ground<'_>,
    catalogue: &Catalogue,
    results: &Results,
    partly: bool,
    release: &str,
) -> Result<()> {
    let series = ground.series()?;
    let file = Verdicts::path(&ground.matrix.dir);
    let mut verdicts = Verdicts::load(&file)?;
    for ((mutant, detector), outcome) in results {
        if outcome.killed() || !partly {
            verdicts.set(*detector, mutant, Verdict::new(outcome, &series));
        }
    }
    verdicts.retain(|name| catalogue.mutant.iter().any(|m| m.name == name));
    fs::write(&file, verdicts.text()).with_context(|| format!("writing {}", file.display()))?;
    let mutants: Vec<&Mutant> = catalogue.mutant.iter().collect();
    let part = Table::recorded(&mutants, &verdicts).document(release, &verdicts, &series);
    let path = repo.join("Documentation/mutants.rst");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    fs::write(&path, table::renew(&text, &part)?)?;
    report::say("written: qemu/kernel/mutants/verdicts.toml, Documentation/mutants.rst\n");
    Ok(())
}

/// Prints the catalogue.
pub fn list(matrix: &Matrix) -> Result<()> {
    let (catalogue, _) = catalogue(matrix)?;
    let mut out = String::new();
    for m in &catalogue.mutant {
        out += &format!("{:26}  {}: {} [{}]\n", m.name, m.place, m.does, m.stands_for);
    }
    report::say(&format!("{out}{} mutants\n", catalogue.mutant.len()));
    Ok(())
}

/// Runs the command. Returns true if the tests are good enough and every surviving bug has its
/// reason.
pub fn all(repo: &Path, matrix: &Matrix, choice: &Choice, wish: &Wish) -> Result<bool> {
    let (catalogue, patches) = catalogue(matrix)?;
    let mutants = chosen(&catalogue, &wish.names)?;
    let tree = kernel::build(repo, matrix, KERNEL)?;
    let mut matrix = matrix.clone();
    // Without a bug no test is silent for long.
    matrix.timeouts.test = 25;
    let ground = Ground {
        base: kernel::key_without(repo, &matrix, KERNEL, patches.len())?,
        patches,
        choice,
        store: repo::cache("mutants")?,
        dir: repo.join("build/mutants"),
        short: wish.short,
        matrix,
    };
    fs::create_dir_all(&ground.dir)?;
    let _lock = repo::lock(&ground.dir.join("lock"))?;
    let plans = payload::plans(repo, &ground.matrix)?;
    let detectors = if wish.detectors.is_empty() { &Detector::ALL[..] } else { &wish.detectors };
    let mut ready = Vec::new();
    for &detector in detectors {
        let mut one = ground.ready(repo, &plans, &tree, wish, detector)?;
        ground.baseline(&mut one, wish.fresh)?;
        for (test, why) in one.baseline.bad.iter().filter(|_| detector != Detector::UpstreamC) {
            eprintln!("zdvm: {} is not clean without any bug: {test}: {why}", detector.title());
        }
        ready.push(one);
    }
    let mut results = Results::new();
    let mut queue = Vec::new();
    for (at, one) in ready.iter().enumerate() {
        for &mutant in &mutants {
            match read_json::<Outcome>(&ground.kept(one, mutant)).filter(|_| !wish.fresh) {
                Some(outcome) => {
                    results.insert((mutant.name.clone(), one.detector), outcome);
                }
                None => queue.push((at, mutant.clone())),
            }
        }
    }
    eprintln!("zdvm: {} results are known, {} boots to go", results.len(), queue.len());
    let end = work(&ground, &ready, queue, wish.jobs, &mut results);
    let table = Table::new(&mutants, &results, detectors);
    fs::write(ground.dir.join("matrix.txt"), table.text())?;
    write_json(&ground.dir.join(html::kills::FILE), &table)?;
    html::beside(&ground.dir);
    end?;
    report::say(&table.text());
    if wish.write {
        record(repo, &ground, &catalogue, &results, wish.filter.is_some(), &tree.release()?)?;
    }
    let mut good = true;
    for one in ready.iter().filter(|r| r.detector != Detector::UpstreamC) {
        for (test, why) in &one.baseline.bad {
            report::say(&format!(
                "zdvm: left out, as {} fails without any bug: {test}: {why}\n",
                one.detector.title()
            ));
            good = false;
        }
    }
    for problem in table.problems() {
        report::say(&format!("zdvm: {problem}\n"));
        good = false;
    }
    Ok(good)
}
