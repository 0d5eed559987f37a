// SPDX-License-Identifier: GPL-2.0
//! Makes text of the module into text of the kernel tree.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use regex::Regex;

/// The longest line that checkpatch.pl accepts.
const WIDTH: usize = 100;
/// The name of the helpers in the kernel tree, in the place of `zdm`.
const PREFIX: &str = "devmem";

fn regex(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).with_context(|| format!("the expression {pattern:?}"))
}

/// Whether a line is a comment, and where its text begins.
fn comment(line: &str) -> Option<(&str, &str)> {
    let indent = line.len() - line.trim_start().len();
    let rest = &line[indent..];
    let mark = ["//!", "///", "//"].into_iter().find(|mark| rest.starts_with(mark))?;
    Some((&line[..indent + mark.len()], &rest[mark.len()..]))
}

/// Whether the text of a comment begins a paragraph of its own, and is not to be filled with others.
fn is_special(text: &str) -> bool {
    let text = text.trim_start();
    text.is_empty()
        || ["- ", "* ", "#", "|", "[", "SAFETY:", "INVARIANT:", "CAST:", "PANIC:"]
            .iter()
            .any(|start| text.starts_with(start))
}

/// Fills the paragraphs of comments that have lines above [`WIDTH`].
fn fill(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut out = String::new();
    let mut fenced = false;
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at];
        let Some((mark, words)) = comment(line) else {
            fenced = false;
            out += line;
            out.push('\n');
            at += 1;
            continue;
        };
        if words.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        // The following lines of the same paragraph.
        let mut end = at + 1;
        while !fenced
            && end < lines.len()
            && !words.trim_start().starts_with("```")
            && comment(lines[end]).is_some_and(|(m, w)| {
                m == mark && !is_special(w) && !w.trim_start().starts_with("```")
            })
        {
            end += 1;
        }
        let paragraph = &lines[at..end];
        if fenced || paragraph.iter().all(|line| line.len() <= WIDTH) {
            for line in paragraph {
                out += line;
                out.push('\n');
            }
        } else {
            let hang = if words.trim_start().starts_with("- ") { "   " } else { " " };
            let mut line = mark.to_owned();
            let all = paragraph.iter().filter_map(|l| comment(l)).map(|(_, words)| words);
            let mut first = true;
            for word in all.flat_map(str::split_whitespace) {
                if !first && line.len() + 1 + word.len() > WIDTH {
                    let _ = writeln!(out, "{line}");
                    line = format!("{mark}{}", &hang[1..]);
                }
                let _ = write!(line, " {word}");
                first = false;
            }
            let _ = writeln!(out, "{line}");
        }
        at = end;
    }
    out
}

/// Functions for the errors that the kernel crate of an older kernel does not have, and the errors.
const ERRORS: [(&str, &str); 2] = [("not_supported", "EOPNOTSUPP"), ("would_deadlock", "EDEADLK")];

/// Text with the errors of the kernel crate in the place of our functions, which are not imported then.
fn errors(text: &str) -> Result<String> {
    let mut text = text.to_owned();
    for (function, error) in ERRORS {
        // The last one of a list has the mark that keeps the list in lines of its own.
        let last = regex(&format!(r",( //)?\n *(?:mm::)?{function}, //\n"))?;
        text = last.replace_all(&text, ", //\n").into_owned();
        let other = regex(&format!(r"\n *(?:mm::)?{function},\n"))?;
        text = other.replace_all(&text, "\n").into_owned();
        text = text.replace(&format!("{function}()"), error);
    }
    Ok(text)
}

/// The text of a file before its KUnit cases, which are the last item.
pub fn without_cases(text: &str) -> Result<&str> {
    let suite = regex(r"(?m)^#\[(?:kernel::prelude::)?kunit_tests\(")?;
    let Some(found) = suite.find(text) else { return Ok(text) };
    let (before, cases) = text.split_at(found.start());
    let mut items = cases.lines().filter(|line| !line.is_empty() && !line.starts_with([' ', '#']));
    if !matches!((items.next(), items.next(), items.next()), (Some("mod tests {"), Some("}"), None))
    {
        bail!("an item follows the KUnit cases:\n{cases}");
    }
    Ok(before.trim_end_matches('\n'))
}

/// A file of `rust/kernel` as one of the kernel crate.
pub fn rust(text: &str) -> Result<String> {
    let text = errors(text)?;
    let path = regex(r"(^|[^\w:])kernel::")?;
    let suite = regex(r"kunit_tests\(zdmirror_")?;
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        // Items for older kernels, under `cfg(zdm_...)`, are left out, and items for newer ones
        // always stay.
        if line.trim_start().starts_with("#[cfg(not(zdm_") {
            continue;
        }
        if line.trim_start().starts_with("#[cfg(zdm_") {
            let indent = &line[..line.len() - line.trim_start().len()];
            // Also the comment of the item.
            while out.lines().next_back().is_some_and(|l| l.trim_start().starts_with("///")) {
                let cut = out.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
                out.truncate(cut);
            }
            for line in lines.by_ref() {
                if line == format!("{indent}}}") {
                    break;
                }
            }
            continue;
        }
        if comment(line).is_some() {
            out += line;
        } else {
            let line = line.replace("pub(crate)", "pub");
            let line = path.replace_all(&line, "${1}crate::");
            let line = suite.replace_all(&line, "kunit_tests(rust_mm_");
            out += &line.replace("bindings::zdm_", &format!("bindings::{PREFIX}_"));
        }
        out.push('\n');
    }
    Ok(fill(&out).replace("\n\n\n", "\n\n"))
}

/// Text of C, without the parts under false conditions, and without the known conditions
/// themselves.
fn unifdef(text: &str, defined: &[String], undefined: &[String]) -> String {
    /// The value of a condition, as far as it is known.
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        Unknown,
        Keep,
        Drop,
    }
    let mut stack: Vec<State> = Vec::new();
    let mut out = String::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (first, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let keeps = stack.iter().all(|state| *state != State::Drop);
        let known = |list: &[String]| list.iter().any(|n| n == name);
        match first {
            "#ifdef" | "#ifndef" => {
                let keep = if first == "#ifdef" { known(defined) } else { known(undefined) };
                let drop = if first == "#ifdef" { known(undefined) } else { known(defined) };
                stack.push(match (keep, drop) {
                    (true, _) => State::Keep,
                    (_, true) => State::Drop,
                    _ => State::Unknown,
                });
            }
            "#if" => stack.push(State::Unknown),
            "#else" => {
                if let Some(state) = stack.last_mut() {
                    *state = match *state {
                        State::Keep => State::Drop,
                        State::Drop => State::Keep,
                        State::Unknown => State::Unknown,
                    };
                }
            }
            _ => {}
        }
        let last = stack.last().copied().unwrap_or(State::Unknown);
        let is_condition = matches!(first, "#ifdef" | "#ifndef" | "#else" | "#endif");
        if first == "#endif" {
            stack.pop();
        }
        let keeps = keeps && stack.iter().all(|state| *state != State::Drop);
        if keeps && !(is_condition && last != State::Unknown) {
            out += line;
            out.push('\n');
        }
    }
    out
}

/// The head of a function, in lines of at most 80 columns where that is possible.
fn head(ret: &str, name: &str, args: &[String]) -> String {
    let width = |text: &str| text.chars().map(|c| if c == '\t' { 8 } else { 1 }).sum::<usize>();
    for newline in [false, true] {
        let start = if newline { format!("{ret}\n") } else { format!("{ret} ") };
        let start = if ret.ends_with('*') && !newline { ret.to_owned() } else { start };
        let open = format!("{name}(");
        let last = start.rsplit('\n').next().unwrap_or_default();
        let column = width(last) + width(&open);
        let indent = format!("{}{}", "\t".repeat(column / 8), " ".repeat(column % 8));
        let mut out = format!("{start}{open}");
        let mut at = column;
        for (i, arg) in args.iter().enumerate() {
            let end = if i + 1 == args.len() { ")" } else { "," };
            if i > 0 && at + 1 + arg.len() + end.len() > 80 {
                let _ = write!(out, "\n{indent}{arg}{end}");
                at = column + arg.len() + end.len();
            } else {
                let space = if i > 0 { " " } else { "" };
                let _ = write!(out, "{space}{arg}{end}");
                at += space.len() + arg.len() + end.len();
            }
        }
        if newline || out.lines().all(|line| width(line) <= 80) {
            return out;
        }
    }
    String::new()
}

/// A file of `rust/helpers` as one of the kernel tree.
pub fn helpers(text: &str, defined: &[String], undefined: &[String]) -> Result<String> {
    let text = unifdef(text, defined, undefined);
    let ours = regex(r"\bzdm_(\w+)")?;
    let start = regex(r"^(?P<ret>[a-z][\w ]*[ *])(?P<name>zdm_\w+)\((?P<args>[^;]*)$")?;
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if matches!(line, "#include \"helpers.h\"" | "#include <test_hmm_uapi.h>") {
            continue;
        }
        let Some(found) = start.captures(line) else {
            out += &ours.replace_all(line, format!("rust_helper_{PREFIX}_$1"));
            out.push('\n');
            continue;
        };
        let mut args = found["args"].to_owned();
        while !args.ends_with(')') {
            args.push(' ');
            args += lines.next().context("a function without an end")?.trim();
        }
        let args: Vec<String> = args.trim_end_matches(')').split(", ").map(str::to_owned).collect();
        let name = found["name"].replace("zdm_", &format!("rust_helper_{PREFIX}_"));
        out += &head(&format!("__rust_helper {}", found["ret"].trim_end()), &name, &args);
        out.push('\n');
    }
    Ok(out
        .replace("\n\n\n", "\n\n")
        .replace("#include <linux/workqueue.h>\n\n\n", "#include <linux/workqueue.h>\n\n"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // A test may panic.
    use super::*;

    #[test]
    fn paths_and_visibility_of_rust() {
        let text = "\
/// See `kernel::mm` and pub(crate).
use kernel::{
    prelude::*, //
};
#[kunit_tests(zdmirror_range)]
pub(crate) fn f() -> ::kernel::ffi::c_int {
    unsafe { bindings::zdm_f(kernel::page::PAGE_SIZE) }
}

/// New.
#[cfg(not(zdm_old))]
pub(super) fn g() {}

/// Old.
#[cfg(zdm_old)]
pub(super) fn g() {
    old()
}
";
        let wanted = "\
/// See `kernel::mm` and pub(crate).
use crate::{
    prelude::*, //
};
#[kunit_tests(rust_mm_range)]
pub fn f() -> ::kernel::ffi::c_int {
    unsafe { bindings::devmem_f(crate::page::PAGE_SIZE) }
}

/// New.
pub(super) fn g() {}

";
        assert_eq!(rust(text).unwrap(), wanted);
    }

    #[test]
    fn cases_are_the_last_item() {
        let text = "fn f() {}\n\n#[kunit_tests(zdmirror_f)]\nmod tests {\n    use super::*;\n}\n";
        assert_eq!(without_cases(text).unwrap(), "fn f() {}");
        assert_eq!(without_cases("fn f() {}\n").unwrap(), "fn f() {}\n");
        without_cases(&format!("{text}fn g() {{}}\n")).unwrap_err();
    }

    #[test]
    fn errors_are_those_of_the_kernel_crate() {
        let text = "\
use crate::{
    bindings,
    mm::{
        not_supported,
        sync::task::NoFaults,
        would_deadlock, //
    },
};
fn f() -> Error {
    if g() == not_supported() {
        return would_deadlock();
    }
}
";
        let wanted = "\
use crate::{
    bindings,
    mm::{
        sync::task::NoFaults, //
    },
};
fn f() -> Error {
    if g() == EOPNOTSUPP {
        return EDEADLK;
    }
}
";
        assert_eq!(rust(text).unwrap(), wanted);
        let text = "use crate::{\n    bindings,\n    mm::would_deadlock, //\n};\n";
        assert_eq!(rust(text).unwrap(), "use crate::{\n    bindings, //\n};\n");
    }

    #[test]
    fn long_comments_are_filled() {
        let long = "word ".repeat(22);
        let text = format!("    /// {}\n    /// end.\n    ///\n    /// next\n", long.trim_end());
        let filled = rust(&text).unwrap();
        assert!(filled.lines().all(|line| line.len() <= WIDTH), "{filled}");
        assert!(filled.ends_with("word end.\n    ///\n    /// next\n"), "{filled}");
        let code = format!("/// ```\n/// {long}\n/// ```\n");
        assert_eq!(rust(&code).unwrap(), code);
    }

    #[test]
    fn helpers_of_this_kernel() {
        let text = "\
#include <linux/mm.h>

#include \"helpers.h\"

#ifdef OLD
int zdm_old(void);
#else
/* New. */
#endif
#ifdef CONFIG_X
#define X
#endif
struct page *zdm_alloc_folio_vma(gfp_t gfp, unsigned int order, struct vm_area_struct *vma,
				 unsigned long addr)
{
	return zdm_f(gfp);
}
";
        let wanted = "\
#include <linux/mm.h>

/* New. */
#ifdef CONFIG_X
#define X
#endif
__rust_helper struct page *
rust_helper_devmem_alloc_folio_vma(gfp_t gfp, unsigned int order,
				   struct vm_area_struct *vma,
				   unsigned long addr)
{
	return rust_helper_devmem_f(gfp);
}
";
        assert_eq!(helpers(text, &[], &["OLD".to_owned()]).unwrap(), wanted);
    }
}
