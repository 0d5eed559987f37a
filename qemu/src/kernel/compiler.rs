// SPDX-License-Identifier: GPL-2.0
//! Finds the compilers that a tree was built with, by its .config, and the arguments that make make
//! use them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::job;
use crate::kernel::kconfig;

/// The first line of a program's version text; `None` if there is no such program.
pub fn version(program: &str) -> Option<String> {
    let text = job::output(Command::new(program).arg("--version"), program).ok()?;
    text.lines().next().map(|line| line.trim().to_owned())
}

/// Finds the program, under one of several names, whose version is that of the configuration.
fn find(
    what: &str,
    text: &str,
    names: &[String],
    version: &dyn Fn(&str) -> Option<String>,
) -> Result<String> {
    let here: Vec<(&String, String)> =
        names.iter().filter_map(|n| Some((n, version(n)?))).collect();
    if let Some((name, _)) = here.iter().find(|(_, v)| v == text) {
        return Ok((*name).clone());
    }
    let found = match here.first() {
        Some((_, version)) => format!("here is {version:?}"),
        None => format!("here is no {what}"),
    };
    bail!(
        "it was built with {text:?}, {found}: a module built now would not match. Build it with the \
         tools that are here (scripts/toolchain.sh run make ...), or have yours used \
         (ZDM_TOOLCHAIN=native)"
    );
}

/// The arguments of make for a tree with this configuration. An error names the missing program.
pub fn arguments(config: &str, version: &dyn Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let symbols = kconfig::parse(config);
    let text = |name: &str| symbols.get(name).map(|t| t.trim_matches('"').to_owned());
    let yes = |name: &str| symbols.get(name).is_some_and(|v| v == "y");
    let mut out = Vec::new();
    let (clang, lld) = (yes("CONFIG_CC_IS_CLANG"), yes("CONFIG_LD_IS_LLD"));
    let (base, number) =
        if clang { ("clang", "CONFIG_CLANG_VERSION") } else { ("gcc", "CONFIG_GCC_VERSION") };
    if let Some(wanted) = text("CONFIG_CC_VERSION_TEXT") {
        let major = text(number).and_then(|n| n.parse::<u64>().ok()).map_or(0, |n| n / 10_000);
        let names = [base.to_owned(), format!("{base}-{major}")];
        let suffix = find(base, &wanted, &names, version)?.replacen(base, "", 1);
        match (clang, lld) {
            (true, true) if suffix.is_empty() => out.push("LLVM=1".to_owned()),
            (true, true) => out.push(format!("LLVM={suffix}")),
            (true, false) => out.push(format!("CC=clang{suffix}")),
            (false, _) if suffix.is_empty() => {}
            (false, _) => out.push(format!("CC=gcc{suffix}")),
        }
        if lld && !clang {
            out.push("LD=ld.lld".to_owned());
        }
    }
    let Some(wanted) = text("CONFIG_RUSTC_VERSION_TEXT") else {
        bail!("its configuration knows no rustc: was it made where there is none?");
    };
    let mut names = vec!["rustc".to_owned()];
    // rustup installs here, and the tool set's PATH does not include the directory.
    let cargo = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo/bin/rustc"));
    names.extend(cargo.map(|path| path.display().to_string()));
    let rustc = find("rustc", &wanted, &names, version)?;
    if rustc != "rustc" {
        out.push(format!("RUSTC={rustc}"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    fn config(clang: bool, lld: bool, cc: &str) -> String {
        let yes = |on: bool, name: &str| match on {
            true => format!("CONFIG_{name}=y\n"),
            false => format!("# CONFIG_{name} is not set\n"),
        };
        format!(
            "{}{}CONFIG_CLANG_VERSION=190107\nCONFIG_GCC_VERSION=130300\n\
             CONFIG_CC_VERSION_TEXT=\"{cc}\"\nCONFIG_RUSTC_VERSION_TEXT=\"rustc 1\"\n",
            yes(clang, "CC_IS_CLANG"),
            yes(lld, "LD_IS_LLD")
        )
    }

    fn here(program: &str) -> Option<String> {
        let version = match program {
            "gcc" => "gcc 14",
            "gcc-13" => "gcc-13 13",
            "clang" => "clang 18",
            "clang-19" => "clang 19",
            "rustc" => "rustc 1",
            _ => return None,
        };
        Some(version.to_owned())
    }

    #[test]
    fn the_tree_says_who_built_it() {
        for (clang, lld, cc, args) in [
            (false, false, "gcc 14", &[][..]),
            (false, true, "gcc 14", &["LD=ld.lld"]),
            (false, false, "gcc-13 13", &["CC=gcc-13"]),
            (true, true, "clang 18", &["LLVM=1"]),
            (true, true, "clang 19", &["LLVM=-19"]),
            (true, false, "clang 18", &["CC=clang"]),
        ] {
            assert_eq!(arguments(&config(clang, lld, cc), &here).unwrap(), args, "{cc}");
        }
    }

    #[test]
    fn another_compiler_is_named_with_the_remedy() {
        let error = arguments(&config(true, true, "clang 20"), &here).unwrap_err().to_string();
        for part in ["\"clang 20\"", "\"clang 18\"", "ZDM_TOOLCHAIN=native"] {
            assert!(error.contains(part), "{error}");
        }
        let none = |program: &str| here(program).filter(|_| program == "gcc");
        let error = arguments(&config(false, false, "gcc 14"), &none).unwrap_err().to_string();
        assert!(error.contains("here is no rustc"), "{error}");
        let rustup = |program: &str| match program {
            "rustc" => Some("rustc 0".to_owned()),
            path if path.ends_with("/.cargo/bin/rustc") => Some("rustc 1".to_owned()),
            other => here(other),
        };
        let args = arguments(&config(false, false, "gcc 14"), &rustup).unwrap();
        assert!(args.len() == 1 && args[0].starts_with("RUSTC=/"), "{args:?}");
    }
}
