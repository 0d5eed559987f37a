// SPDX-License-Identifier: GPL-2.0

//! Selftests of the kernel module zdmirror, for a guest that may crash.
//!
//! The program runs as root without swap, with /proc, /sys, /dev and debugfs mounted. It loads and
//! unloads the module itself, and reports in KTAP. `tests/mod.rs` has the table of tests;
//! `harness.rs` prepares and audits each of them.

#![deny(unsafe_code)]

mod check;
mod dax;
mod device;
mod files;
mod fsdax;
mod fuse;
mod gup;
mod harness;
mod ktap;
mod kvm;
mod memory;
mod module;
mod numa;
mod pagemap;
mod pagestate;
mod peers;
mod pkey;
mod proc;
mod swap;
mod sys;
mod tests;
mod threads;
mod uapi;
mod uffd;
mod uring;
mod vfio;
mod vsock;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::harness::Harness;
use crate::module::Module;
use crate::tests::Test;

const USAGE: &str = "\
usage: zdm-selftests [--bench | --versus] [--module FILE] [--timeout SECONDS] [NAME...]
       zdm-selftests [--bench | --versus] --list

Runs the tests, or the benchmarks of the oracle, or those against the C driver, with
these names, or whose names begin so; all of them without a name. The module is unloaded
at the end, which is the test unload.clean.
It is always loaded with the parameters in ZDM_MODULE_PARAMS, too.
";

struct Options {
    tests: fn() -> Vec<&'static Test>,
    list: bool,
    help: bool,
    module: PathBuf,
    timeout: Duration,
    names: Vec<String>,
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        tests: tests::all,
        list: false,
        help: false,
        module: PathBuf::from("/lib/modules/zdmirror.ko"),
        timeout: Duration::from_secs(60),
        names: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value"));
        match arg.as_str() {
            "--bench" => options.tests = tests::benchmarks,
            "--versus" => options.tests = tests::versus,
            "--list" => options.list = true,
            "--help" | "-h" => options.help = true,
            "--module" => options.module = PathBuf::from(value()?),
            "--timeout" => {
                let text = value()?;
                let seconds = text.parse().ok().filter(|n| *n > 0);
                let seconds = seconds.ok_or(format!("--timeout: '{text}' is no time"))?;
                options.timeout = Duration::from_secs(seconds);
            }
            _ if arg.starts_with('-') => return Err(format!("unknown option {arg}")),
            _ => options.names.push(arg),
        }
    }
    Ok(options)
}

fn run() -> Result<bool, String> {
    let options = options(std::env::args().skip(1))?;
    if options.help {
        print!("{USAGE}");
        return Ok(true);
    }
    let tests = (options.tests)();
    let names: Vec<&str> = tests.iter().map(|t| t.name).collect();
    if options.list {
        for name in names {
            println!("{name}");
        }
        return Ok(true);
    }
    let mut chosen = ktap::select(&names, &options.names)?;
    // Every run ends with the test that unloads the module.
    let last = tests.len() - 1;
    if chosen.last() != Some(&last) {
        chosen.push(last);
    }
    let chosen: Vec<_> = chosen.into_iter().map(|i| tests[i]).collect();
    // Without the variable the module gets no additional parameters.
    let base = std::env::var(module::BASE).unwrap_or_default();
    Harness::new(Module::new(options.module, base), options.timeout)
        .run(&chosen, std::io::stdout())
        .map_err(|e| format!("the harness itself failed: {e}"))
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("zdm-selftests: {e}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        options(args.iter().map(|s| s.to_string()))
    }

    #[test]
    fn command_line() {
        let o = parse(&["--timeout", "5", "a", "--module", "/m.ko", "b"]).unwrap();
        assert_eq!(o.timeout, Duration::from_secs(5));
        assert_eq!(o.module, PathBuf::from("/m.ko"));
        assert_eq!(o.names, ["a", "b"]);
        assert!(parse(&["--timeout"]).is_err());
        assert!(parse(&["--timeout", "0"]).is_err());
        assert!(parse(&["--frobnicate"]).is_err());
    }
}
