// SPDX-License-Identifier: GPL-2.0
//! `qemu/kernel/matrix.toml` and the files of expected results that it names.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Deserializer};
use zdvm_guest::plan::Kind;

use crate::judge::taint;
use crate::plan::expected::{self, Expected, On, Pattern, Place, Selection};
use crate::plan::planned::{Known, Planned};

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Matrix {
    /// Symbols that a kernel must have.
    pub requires: Vec<String>,
    /// Limits, for KVM.
    pub timeouts: Timeouts,
    /// What is compiled after every patch, by name.
    pub compile: BTreeMap<String, CompileSpec>,
    /// Kernels by name.
    pub kernel: BTreeMap<String, Kernel>,
    /// Machines by name.
    pub machine: BTreeMap<String, MachineSpec>,
    /// Suites by name.
    pub suite: BTreeMap<String, SuiteSpec>,
    /// Order in which suites run.
    pub order: Vec<String>,
    /// Where the file is.
    #[serde(skip)]
    pub dir: PathBuf,
}

/// Limits in seconds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// Until the guest says hello.
    pub boot: u64,
    /// Silence of a running suite.
    pub test: u64,
    /// A whole suite.
    pub suite: u64,
    /// A whole boot.
    pub total: u64,
    /// All of the above times this under TCG.
    pub tcg_factor: u64,
}

impl Timeouts {
    /// All of them so many times as long.
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
    /// Architecture, as the kernel's make takes it; else this machine's.
    pub arch: Option<String>,
    /// Triplet of the compiler for it.
    pub cross: Option<String>,
    /// Configuration fragments, beside the matrix, merged in order.
    pub config: Vec<PathBuf>,
    /// Objects, from the top of the tree.
    pub objects: Vec<String>,
}

/// One kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Version, as `scripts/kernel-source.sh` takes it.
    pub source: String,
    /// Directories with patches and their `series`, beside the matrix: one after the other.
    #[serde(default, deserialize_with = "one_or_more")]
    pub patches: Vec<PathBuf>,
    /// Configuration fragments, beside the matrix, merged in order.
    pub config: Vec<PathBuf>,
    /// Whether clang builds it, and the rest of LLVM.
    #[serde(default)]
    pub llvm: bool,
    /// What all limits are multiplied by.
    #[serde(default = "one")]
    pub timeout_factor: u64,
    /// More kernel command line.
    #[serde(default)]
    pub cmdline_extra: String,
    /// Taint letters before the first test.
    #[serde(default)]
    pub taint_before: String,
    /// Taint letters after the last test.
    pub taint_after: String,
    /// The kernel whose results and faults are expected of this one, too.
    pub like: Option<String>,
    /// Lines of the log that are a fault of this kernel, known and no splat.
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

/// Lines that a kernel is known to break the module's rules with.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownSpec {
    /// What they look like.
    pub pattern: Pattern,
    /// Only on machines that give the module this parameter.
    #[serde(rename = "with")]
    pub param: Option<String>,
    /// Why they come.
    pub reason: String,
}

/// One machine: what a kernel runs on, and what the module is told about it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// `-m`.
    pub memory: String,
    /// `-smp`.
    pub vcpus: u32,
    /// NUMA nodes, which the kernel makes of the one that there is (`numa=fake=`).
    #[serde(default = "one_node")]
    pub nodes: u32,
    /// Kernel command line, `memmap=` and the like.
    #[serde(default)]
    pub cmdline: String,
    /// More arguments of QEMU, devices for example.
    #[serde(default)]
    pub qemu: String,
    /// Parameters of the module there.
    #[serde(default)]
    pub module_params: String,
    /// The machine whose results are expected on this one, too.
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
    /// File with its plan, beside the matrix.
    pub expected: PathBuf,
    /// Program in the guest.
    #[serde(default)]
    pub program: Option<String>,
    /// Arguments of the program; `{NAME}` is a module parameter, and left out where there is none.
    #[serde(default)]
    pub args: Vec<String>,
    /// Files of the guest's kernel, and what they say while the suite runs.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Why all of it is left out of a quick run, if it is.
    #[serde(default)]
    pub slow: Option<String>,
    /// Whether it runs only where it is asked for.
    #[serde(default)]
    pub by_name: bool,
    /// Whether the guest has the kernel tree's own driver, too.
    #[serde(default)]
    pub c_driver: bool,
}

impl SuiteSpec {
    /// How it is run.
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

/// The expectations of one suite, read but not yet selected from.
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

    /// Refuses what is like one that is not there, and an allowance that could never hold.
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
        Ok(())
    }

    /// A kernel by name.
    pub fn kernel(&self, name: &str) -> Result<&Kernel> {
        let known = || self.kernel.keys().cloned().collect::<Vec<_>>().join(", ");
        self.kernel
            .get(name)
            .with_context(|| format!("no kernel {name:?} in the matrix; there are: {}", known()))
    }

    /// A machine by name.
    pub fn machine(&self, name: &str) -> Result<&MachineSpec> {
        let known = || self.machine.keys().cloned().collect::<Vec<_>>().join(", ");
        self.machine
            .get(name)
            .with_context(|| format!("no machine {name:?} in the matrix; there are: {}", known()))
    }

    /// A suite by name.
    pub fn suite(&self, name: &str) -> Result<&SuiteSpec> {
        let known = || self.order.join(", ");
        self.suite
            .get(name)
            .with_context(|| format!("no suite {name:?} in the matrix; there are: {}", known()))
    }

    /// Suites that are to run, in order.
    pub fn selected(&self, selection: &Selection) -> Result<Vec<String>> {
        for name in &selection.suites {
            self.suite(name)?;
        }
        let mut out = Vec::new();
        for name in &self.order {
            let spec = self.suite(name)?;
            let wanted = if selection.suites.is_empty() {
                // A script runs all of its tests whatever is asked for: a filter is no wish for it.
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

    /// Reads every suite's file of expected results.
    pub fn plans(&self) -> Result<Plans> {
        let mut plans = Plans::new();
        for (name, spec) in &self.suite {
            let path = self.dir.join(&spec.expected);
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let plan: Expected =
                toml::from_str(&text).with_context(|| format!("in {}", path.display()))?;
            plan.check(self).with_context(|| format!("in {}", path.display()))?;
            plans.insert(name.clone(), plan);
        }
        Ok(plans)
    }

    /// What is planned for a kernel on a machine.
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
            // A filter that leaves nothing of a suite leaves the suite out.
            if selection.filter.is_some() && suite.tests.is_empty() {
                continue;
            }
            planned.suites.push(suite);
            planned.allow.extend(expected.allowed(place));
        }
        Ok(planned)
    }
}
