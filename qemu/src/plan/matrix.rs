// SPDX-License-Identifier: GPL-2.0
//! `qemu/kernel/matrix.toml`, and the files of expected results that it names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Deserializer};
use zdvm_guest::plan::Kind;

use crate::judge::taint;
use crate::plan::campaign::CampaignRun;
use crate::plan::expected::{self, Expected, On, Pattern, Place, Selection};
use crate::plan::planned::{Known, Planned};

/// The content of the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// The symbols that a kernel must have.
    pub requires: Vec<String>,
    /// The time limits under KVM.
    pub timeouts: Timeouts,
    /// The configurations in which objects are compiled after every patch, by name.
    pub compile: BTreeMap<String, CompileSpec>,
    /// The kernels by name.
    pub kernel: BTreeMap<String, Kernel>,
    /// The machines by name.
    pub machine: BTreeMap<String, MachineSpec>,
    /// The suites by name.
    pub suite: BTreeMap<String, SuiteSpec>,
    /// The order in which suites run.
    pub order: Vec<String>,
    /// The runs of `zdvm test`, `zdvm test --short` and `zdvm bench`, by the names "full", "short"
    /// and "bench".
    #[serde(default)]
    pub campaign: BTreeMap<String, Vec<CampaignRun>>,
    /// The directory of the file.
    #[serde(skip)]
    pub dir: PathBuf,
}

/// Time limits in seconds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// From the start to the guest's first message.
    pub boot: u64,
    /// The silence of a running suite.
    pub test: u64,
    /// A whole suite.
    pub suite: u64,
    /// A whole boot.
    pub total: u64,
    /// The factor for all limits under TCG.
    pub tcg_factor: u64,
}

impl Timeouts {
    /// Multiplies all limits.
    pub fn times(self, factor: u64) -> Self {
        Self {
            boot: self.boot * factor,
            test: self.test * factor,
            suite: self.suite * factor,
            total: self.total * factor,
            tcg_factor: self.tcg_factor,
        }
    }
}

/// One configuration that objects are compiled in.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompileSpec {
    /// The architecture, as the kernel's make takes it; the default is this machine's.
    pub arch: Option<String>,
    /// The triplet of the compiler for that architecture.
    pub cross: Option<String>,
    /// The configuration fragments, relative to the matrix, merged in order.
    pub config: Vec<PathBuf>,
    /// The objects, relative to the top of the tree.
    pub objects: Vec<String>,
}

/// One kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// The version, as `scripts/kernel-source.sh` takes it.
    pub source: String,
    /// The directories of patches with their `series`, relative to the matrix, applied in order.
    #[serde(default, deserialize_with = "one_or_more")]
    pub patches: Vec<PathBuf>,
    /// The configuration fragments, relative to the matrix, merged in order.
    pub config: Vec<PathBuf>,
    /// Whether clang and the rest of LLVM build the kernel.
    #[serde(default)]
    pub llvm: bool,
    /// The factor for all time limits.
    #[serde(default = "one")]
    pub timeout_factor: u64,
    /// Additional options of the kernel command line.
    #[serde(default)]
    pub cmdline_extra: String,
    /// The taint letters before the first test.
    #[serde(default)]
    pub taint_before: String,
    /// The taint letters after the last test.
    pub taint_after: String,
    /// The kernel whose results and faults are also expected of this one.
    pub like: Option<String>,
    /// Log lines that are a known fault of this kernel and no splat.
    #[serde(default)]
    pub allow: Vec<KnownSpec>,
}

fn one() -> u64 {
    1
}

fn one_node() -> u32 {
    1
}

/// A path, or a list of them.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Paths {
        One(PathBuf),
        More(Vec<PathBuf>),
    }
    Ok(match Paths::deserialize(deserializer)? {
        Paths::One(path) => vec![path],
        Paths::More(paths) => paths,
    })
}

/// Log lines by which a kernel is known to break the module's rules.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownSpec {
    /// The pattern of the lines.
    pub pattern: Pattern,
    /// The lines come only on machines that give the module this parameter.
    #[serde(rename = "with")]
    pub param: Option<String>,
    /// The reason.
    pub reason: String,
}

/// A machine: the hardware that a kernel runs on, and the module's parameters for it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// `-m`.
    pub memory: String,
    /// `-smp`.
    pub vcpus: u32,
    /// The number of NUMA nodes, which the kernel makes from its only one (`numa=fake=`).
    #[serde(default = "one_node")]
    pub nodes: u32,
    /// The options of the kernel command line, such as `memmap=`.
    #[serde(default)]
    pub cmdline: String,
    /// Additional arguments of QEMU, such as devices.
    #[serde(default)]
    pub qemu: String,
    /// The parameters of the module on this machine.
    #[serde(default)]
    pub module_params: String,
    /// Files of the guest's kernel with the values that they have while a suite runs, unless the suite has
    /// another value.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// The machine whose results are also expected on this one.
    pub like: Option<String>,
}

impl MachineSpec {
    /// The value of one of the module's parameters.
    pub fn param(&self, name: &str) -> Option<&str> {
        let mut words = self.module_params.split_whitespace();
        words.find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
    }
}

/// One suite.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuiteSpec {
    /// `kunit`, `ktap`, `harness` or `script`.
    pub kind: String,
    /// The file with its plan, relative to the matrix.
    pub expected: PathBuf,
    /// The program in the guest.
    #[serde(default)]
    pub program: Option<String>,
    /// The arguments of the program. `{NAME}` is a parameter of the module; an argument whose
    /// parameter is not set is left out.
    #[serde(default)]
    pub args: Vec<String>,
    /// Files of the guest's kernel, each with the value that it has while the suite runs.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// The reason why a quick run leaves the suite out, if it does.
    #[serde(default)]
    pub slow: Option<String>,
    /// Whether the suite runs only if the command line names it.
    #[serde(default)]
    pub by_name: bool,
    /// Whether the guest also has the kernel tree's own driver.
    #[serde(default)]
    pub c_driver: bool,
}

impl SuiteSpec {
    /// The way in which the suite runs.
    pub fn kind(&self) -> Result<Kind> {
        Ok(match self.kind.as_str() {
            "kunit" => Kind::Kunit,
            "ktap" => Kind::Ktap,
            "harness" => Kind::Harness,
            "script" => Kind::Script,
            other => bail!("unknown kind of suite {other:?}: kunit, ktap, harness or script"),
        })
    }

    /// The arguments of the program on a machine.
    pub fn arguments(&self, machine: &MachineSpec) -> Vec<String> {
        let value = |arg: &String| match arg.strip_prefix('{').and_then(|a| a.strip_suffix('}')) {
            Some(name) => machine.param(name).map(str::to_owned),
            None => Some(arg.clone()),
        };
        self.args.iter().filter_map(value).collect()
    }
}

/// The expectations of each suite, read but not yet selected from.
pub type Plans = BTreeMap<String, Expected>;

impl expected::Known for Matrix {
    fn kernel(&self, name: &str) -> Result<()> {
        self.kernel(name).map(drop)
    }

    fn machine(&self, name: &str) -> Result<()> {
        self.machine(name).map(drop)
    }
}

impl Matrix {
    /// Reads the matrix of a checkout.
    pub fn load(repo: &Path) -> Result<Self> {
        let dir = repo.join("qemu/kernel");
        let path = dir.join("matrix.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let mut matrix: Self =
            toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        matrix.dir = dir;
        for name in &matrix.order {
            matrix.suite(name)?;
        }
        for name in matrix.suite.keys() {
            if !matrix.order.contains(name) {
                bail!("suite {name} is not in `order` of {}", path.display());
            }
        }
        matrix.check_names()?;
        Ok(matrix)
    }

    /// Refuses a `like` that names nothing, and an allowance that can never apply.
    fn check_names(&self) -> Result<()> {
        for (name, machine) in &self.machine {
            if let Some(like) = &machine.like {
                self.machine(like).with_context(|| format!("what machine {name} is like"))?;
            }
        }
        for (name, kernel) in &self.kernel {
            if let Some(like) = &kernel.like {
                self.kernel(like).with_context(|| format!("what kernel {name} is like"))?;
            }
            for param in kernel.allow.iter().filter_map(|a| a.param.as_ref()) {
                if self.machine.values().all(|m| m.param(param).is_none()) {
                    bail!("kernel {name} allows lines with {param}, which no machine has");
                }
            }
        }
        for (name, runs) in &self.campaign {
            for run in runs {
                self.check_run(run).with_context(|| format!("in a run of campaign {name}"))?;
            }
        }
        Ok(())
    }

    fn check_run(&self, run: &CampaignRun) -> Result<()> {
        if run.kernels.is_empty() {
            bail!("no kernel is named");
        }
        for name in &run.kernels {
            self.kernel(name)?;
        }
        self.machine(&run.machine)?;
        for name in &run.suites {
            self.suite(name)?;
        }
        Ok(())
    }

    /// Finds a kernel by name.
    pub fn kernel(&self, name: &str) -> Result<&Kernel> {
        let known = || self.kernel.keys().cloned().collect::<Vec<_>>().join(", ");
        self.kernel
            .get(name)
            .with_context(|| format!("no kernel {name:?} in the matrix; there are: {}", known()))
    }

    /// Finds a machine by name.
    pub fn machine(&self, name: &str) -> Result<&MachineSpec> {
        let known = || self.machine.keys().cloned().collect::<Vec<_>>().join(", ");
        self.machine
            .get(name)
            .with_context(|| format!("no machine {name:?} in the matrix; there are: {}", known()))
    }

    /// Finds a suite by name.
    pub fn suite(&self, name: &str) -> Result<&SuiteSpec> {
        let known = || self.order.join(", ");
        self.suite
            .get(name)
            .with_context(|| format!("no suite {name:?} in the matrix; there are: {}", known()))
    }

    /// The suites that are to run, in order.
    pub fn selected(&self, selection: &Selection) -> Result<Vec<String>> {
        for name in &selection.suites {
            self.suite(name)?;
        }
        let mut out = Vec::new();
        for name in &self.order {
            let spec = self.suite(name)?;
            let wanted = if selection.suites.is_empty() {
                // A script always runs all of its tests, so a filter does not select it.
                let vain = selection.filter.is_some() && spec.kind()? == Kind::Script;
                (selection.full || spec.slow.is_none()) && !spec.by_name && !vain
            } else {
                selection.suites.contains(name)
            };
            if wanted {
                out.push(name.clone());
            }
        }
        Ok(out)
    }

    /// Reads every suite's file of expected results. `list` gives the tests that a suite's program
    /// lists; it is called for files that only count them.
    pub fn plans(&self, list: &dyn Fn(&SuiteSpec) -> Result<Vec<String>>) -> Result<Plans> {
        let mut plans = Plans::new();
        for (name, spec) in &self.suite {
            let path = self.dir.join(&spec.expected);
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let mut plan: Expected =
                toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
            plan.fill(|| list(spec)).with_context(|| format!("in {}", path.display()))?;
            plan.check(self).with_context(|| format!("in {}", path.display()))?;
            plans.insert(name.clone(), plan);
        }
        Ok(plans)
    }

    /// The plan for a kernel on a machine.
    pub fn planned(&self, on: &On, plans: &Plans, selection: &Selection) -> Result<Planned> {
        let kernel = self.kernel(&on.kernel)?;
        let machine = self.machine(&on.machine)?;
        let like = kernel.like.as_deref().map(|name| self.kernel(name)).transpose()?;
        let place = Place {
            kernel: (&on.kernel, kernel.like.as_deref()),
            machine: (&on.machine, machine.like.as_deref()),
        };
        let faults = kernel.allow.iter().chain(like.iter().flat_map(|k| &k.allow));
        let there = |k: &&KnownSpec| k.param.as_ref().is_none_or(|p| machine.param(p).is_some());
        let known =
            |k: &KnownSpec| Known { pattern: k.pattern.0.clone(), reason: k.reason.clone() };
        let mut planned = Planned {
            kernel: on.kernel.clone(),
            machine: on.machine.clone(),
            suites: Vec::new(),
            left_out: Vec::new(),
            allow: Vec::new(),
            known: faults.filter(there).map(known).collect(),
            taint_before: taint::parse(&kernel.taint_before)?,
            taint_after: taint::parse(&kernel.taint_after)?,
        };
        let selected = self.selected(selection)?;
        for name in &self.order {
            let (Some(expected), spec) = (plans.get(name), self.suite(name)?) else {
                bail!("no plan for the suite {name}");
            };
            if !selected.contains(name) {
                let slow = selection.suites.is_empty() && !selection.full && spec.slow.is_some();
                if slow && selection.filter.is_none() {
                    planned.left_out.push((name.clone(), expected.present(place).count()));
                }
                continue;
            }
            let source = format!("qemu/kernel/{}", spec.expected.display());
            let suite = expected.suite(name, spec.kind()?, source, place, selection);
            // A suite without a test that matches the filter is left out.
            if selection.filter.is_some() && suite.tests.is_empty() {
                continue;
            }
            planned.suites.push(suite);
            planned.allow.extend(expected.allowed(place));
        }
        Ok(planned)
    }
}
