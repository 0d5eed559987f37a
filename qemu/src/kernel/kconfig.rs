// SPDX-License-Identifier: GPL-2.0
//! Checks that the kernel's configuration has what the fragments ask for. `merge_config.sh` only
//! warns, and olddefconfig drops symbols silently.

use std::collections::HashMap;

/// The symbols of a `.config` or a fragment; the value is `n` for "is not set".
pub fn parse(text: &str) -> HashMap<String, String> {
    let mut out = HashMap::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("# ").and_then(|l| l.strip_suffix(" is not set")) {
            out.insert(name.to_owned(), "n".to_owned());
        } else if let Some((name, value)) = line.split_once('=') {
            if name.starts_with("CONFIG_") {
                out.insert(name.to_owned(), value.to_owned());
            }
        }
    }
    out
}

/// Describes every line of a fragment that `config` does not have. Later fragments override earlier
/// ones.
pub fn missing(fragments: &[(String, String)], config: &str) -> Vec<String> {
    let have = parse(config);
    let mut wanted: HashMap<String, (String, &str)> = HashMap::new();
    for (file, text) in fragments {
        for (symbol, value) in parse(text) {
            wanted.insert(symbol, (value, file));
        }
    }
    let mut out: Vec<String> = wanted
        .into_iter()
        .filter_map(|(symbol, (value, file))| {
            let got = have.get(&symbol).map_or("n", String::as_str);
            (got != value).then(|| format!("{symbol}={value} of {file} did not land: it is {got}"))
        })
        .collect();
    out.sort();
    out
}

/// The required symbols (`CONFIG_X=y`, or `CONFIG_X` for y or m) that a `.config` does not have.
pub fn lacking(requires: &[String], config: &str) -> Vec<String> {
    let have = parse(config);
    let fits = |r: &&String| {
        let (symbol, value) = r.split_once('=').map_or((r.as_str(), None), |(s, v)| (s, Some(v)));
        let got = have.get(symbol).map_or("n", String::as_str);
        value.map_or(got == "y" || got == "m", |v| v == got)
    };
    requires.iter().filter(|r| !fits(r)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "# Automatically generated\nCONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\n\
                          CONFIG_S=\"text\"\nCONFIG_N=7\n";

    fn fragment(text: &str) -> Vec<(String, String)> {
        vec![("x.config".to_owned(), text.to_owned())]
    }

    #[test]
    fn what_landed_is_quiet() {
        let f = fragment(
            "# comment\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=n\nCONFIG_S=\"text\"\nCONFIG_N=7\nCONFIG_GONE=n\n",
        );
        assert_eq!(missing(&f, CONFIG), Vec::<String>::new());
        assert_eq!(missing(&fragment("# CONFIG_C is not set\n"), CONFIG), Vec::<String>::new());
    }

    #[test]
    fn what_did_not_land_is_named() {
        for (line, says) in [
            ("CONFIG_A=n", "CONFIG_A=n of x.config did not land: it is y"),
            ("CONFIG_B=y", "CONFIG_B=y of x.config did not land: it is m"),
            ("CONFIG_C=y", "CONFIG_C=y of x.config did not land: it is n"),
            ("CONFIG_GONE=y", "CONFIG_GONE=y of x.config did not land: it is n"),
            ("# CONFIG_A is not set", "CONFIG_A=n of x.config did not land: it is y"),
        ] {
            assert_eq!(missing(&fragment(line), CONFIG), [says]);
        }
    }

    #[test]
    fn a_later_fragment_wins() {
        let f = vec![("a".into(), "CONFIG_A=n".into()), ("b".into(), "CONFIG_A=y".into())];
        assert_eq!(missing(&f, CONFIG), Vec::<String>::new());
    }

    #[test]
    fn requirements() {
        let r = ["CONFIG_A=y", "CONFIG_B", "CONFIG_B=y", "CONFIG_C", "CONFIG_GONE=y"];
        let r: Vec<String> = r.iter().map(|s| (*s).to_owned()).collect();
        assert_eq!(lacking(&r, CONFIG), ["CONFIG_B=y", "CONFIG_C", "CONFIG_GONE=y"]);
    }
}
