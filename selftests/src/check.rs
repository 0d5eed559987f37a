// SPDX-License-Identifier: GPL-2.0

//! The outcome of a test. A failure has its place in the source, the expected value and the value
//! found; `?` carries it to the harness.

use std::fmt;
use std::io;
use std::panic::Location;

/// The reason why a test did not pass.
#[derive(Debug)]
pub enum Fail {
    /// A check failed.
    Failed {
        at: &'static Location<'static>,
        what: String,
    },
    /// The test cannot run here.
    Skip(String),
}

/// The result of a test and of its helpers.
pub type Outcome<T = ()> = Result<T, Fail>;

impl Fail {
    /// A failure at the caller's place in the source.
    #[track_caller]
    pub fn failed(what: impl Into<String>) -> Self {
        Fail::Failed {
            at: Location::caller(),
            what: what.into(),
        }
    }
}

impl fmt::Display for Fail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fail::Failed { at, what } => write!(f, "{}:{}: {what}", at.file(), at.line()),
            Fail::Skip(why) => write!(f, "skipped: {why}"),
        }
    }
}

/// Turns a system call's error into a failure at the caller's place.
pub trait OrFail<T> {
    #[track_caller]
    fn or_fail(self, what: &str) -> Outcome<T>;
}

impl<T> OrFail<T> for io::Result<T> {
    // A closure in map_err() would be the reported place.
    #[track_caller]
    fn or_fail(self, what: &str) -> Outcome<T> {
        match self {
            Ok(value) => Ok(value),
            Err(e) => Err(Fail::failed(format!("{what}: expected success, found {e}"))),
        }
    }
}

/// Checks that a call failed with one of `errnos`.
#[track_caller]
pub fn expect_errno<T>(result: io::Result<T>, errnos: &[i32], what: &str) -> Outcome {
    let names = || {
        let list: Vec<String> = errnos
            .iter()
            .map(|e| io::Error::from_raw_os_error(*e).to_string())
            .collect();
        list.join(" or ")
    };
    match result {
        Ok(_) => Err(Fail::failed(format!(
            "{what}: expected {}, found success",
            names()
        ))),
        Err(e) if e.raw_os_error().is_some_and(|n| errnos.contains(&n)) => Ok(()),
        Err(e) => Err(Fail::failed(format!(
            "{what}: expected {}, found {e}",
            names()
        ))),
    }
}

/// Fails the test with a message unless the condition holds.
#[macro_export]
macro_rules! check {
    ($cond:expr, $($arg:tt)+) => {
        let holds: bool = $cond;
        if !holds {
            return Err($crate::check::Fail::failed(format!($($arg)+)));
        }
    };
}

/// Fails the test unless the value found is the expected one.
#[macro_export]
macro_rules! check_eq {
    ($found:expr, $expected:expr, $($arg:tt)+) => {
        match (&$found, &$expected) {
            (found, expected) => if *found != *expected {
                return Err($crate::check::Fail::failed(format!(
                    "{}: expected {:?}, found {:?}", format_args!($($arg)+), expected, found
                )));
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three_is(n: u32) -> Outcome {
        check_eq!(n, 3, "number");
        Ok(())
    }

    #[test]
    fn a_failure_names_place_and_values() {
        assert!(three_is(3).is_ok());
        let text = three_is(4).unwrap_err().to_string();
        assert!(text.contains("check.rs:"), "{text}");
        assert!(text.ends_with("number: expected 3, found 4"), "{text}");
    }

    #[test]
    fn errno_lists() {
        let einval = || Err::<(), _>(io::Error::from_raw_os_error(libc::EINVAL));
        assert!(expect_errno(einval(), &[libc::EINVAL], "x").is_ok());
        assert!(expect_errno(einval(), &[], "x").is_err());
        assert!(expect_errno(einval(), &[libc::EFAULT], "x").is_err());
        assert!(expect_errno(Ok(()), &[libc::EINVAL], "x").is_err());
    }
}
