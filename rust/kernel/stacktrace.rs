// SPDX-License-Identifier: GPL-2.0

//! Short stack traces.
//!
//! C header: [`include/linux/stacktrace.h`](srctree/include/linux/stacktrace.h)

use crate::bindings;
use kernel::{
    fmt,
    prelude::*, //
};

/// Frames that a trace has at most.
const FRAMES: usize = 10;

/// The innermost frames of a stack; none in a kernel without `CONFIG_STACKTRACE`.
///
/// # Examples
///
/// ```
/// use kernel::stacktrace::Trace;
///
/// for frame in Trace::capture(0).frames() {
///     pr_debug!("called from {}\n", frame);
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    frames: [usize; FRAMES],
    len: usize,
}

impl Trace {
    /// No frames.
    pub(crate) const NONE: Self = Self {
        frames: [0; FRAMES],
        len: 0,
    };

    /// The stack of the current task, without its `skip` innermost frames. In any context; does not
    /// sleep.
    pub(crate) fn capture(skip: u32) -> Self {
        let mut trace = Self::NONE;
        let frames = trace.frames.as_mut_ptr();
        // SAFETY: There is room for `FRAMES` frames.
        trace.len = unsafe { bindings::zdm_stack(frames, FRAMES as u32, skip) } as usize;
        trace
    }

    /// Its frames, the innermost one first.
    pub(crate) fn frames(&self) -> impl Iterator<Item = Frame> + '_ {
        self.frames.iter().take(self.len).copied().map(Frame)
    }
}

/// A return address, shown as `%pB` shows it.
pub(crate) struct Frame(usize);

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0u8; 256];
        // SAFETY: There is room for that many bytes, the NUL included.
        let len = unsafe { bindings::zdm_symbol(text.as_mut_ptr().cast(), text.len(), self.0) };
        let name = text.get(..len as usize).ok_or(fmt::Error)?;
        f.write_str(core::str::from_utf8(name).map_err(|_| fmt::Error)?)
    }
}

/// The name of a function with its module, as in `dmirror_devmem_free [test_hmm]`.
///
/// # Examples
///
/// ```
/// use kernel::stacktrace::Symbol;
///
/// fn called() {}
///
/// pr_debug!("{} is called\n", Symbol::of(called as *const () as usize));
/// ```
#[derive(Clone, Copy)]
pub(crate) struct Symbol(usize);

impl Symbol {
    /// Of the function at `address`.
    pub(crate) fn of(address: usize) -> Self {
        Self(address)
    }
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0u8; 256];
        // `%pB` looks up the byte before the address, as it is made for return addresses.
        let address = self.0.wrapping_add(1);
        // SAFETY: There is room for that many bytes, the NUL included.
        let len = unsafe { bindings::zdm_symbol(text.as_mut_ptr().cast(), text.len(), address) };
        let name = text.get(..len as usize).ok_or(fmt::Error)?;
        let name = core::str::from_utf8(name).map_err(|_| fmt::Error)?;
        let (function, rest) = name.split_once('+').unwrap_or((name, ""));
        f.write_str(function)?;
        match rest.split_once(' ') {
            Some((_, module)) => write!(f, " {module}"),
            None => Ok(()),
        }
    }
}

#[kunit_tests(zdmirror_stacktrace)]
mod tests {
    use super::*;
    use kernel::str::CString;

    #[test]
    fn trace_names_who_called() -> Result {
        assert_eq!(Trace::NONE.frames().count(), 0);
        let trace = Trace::capture(0);
        assert!((1..=FRAMES).contains(&trace.frames().count()));
        let first = trace.frames().next().ok_or(EINVAL)?;
        let text = CString::try_from_fmt(fmt!("{}", first))?;
        assert!(text.to_bytes().windows(2).any(|part| part == b"+0"));
        Ok(())
    }
}
