// SPDX-License-Identifier: GPL-2.0

//! Text files in debugfs that do not keep the module loaded.
//!
//! The files of `kernel::debugfs` have a `release()` that is called through their operations, which
//! are in the module, and name no owner: a file that stays open over the end of the module calls
//! into nowhere when it is closed. Files with `debugfs_short_fops` have no `release()`: once one
//! is removed, which waits for readers, debugfs does not come back to the module.
//!
//! C header: [`include/linux/debugfs.h`](srctree/include/linux/debugfs.h)

use crate::{
    bindings,
    mm::module::{
        callback::Callback,
        scope::{
            Callbacks,
            ModuleScope,
            Scoped, //
        },
    },
    uapi::is_admin, //
};
use kernel::{
    fmt,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceWriter, //
    }, //
};

/// A file or a directory; removed when dropped. May sleep.
///
/// # Invariants
///
/// What `debugfs_create_dir()` or `debugfs_create_file()` returned, which may be an error: debugfs
/// takes that everywhere. Not removed yet, and so the directory that it is in is not either.
struct Dentry(*mut bindings::dentry);

// SAFETY: debugfs has its own locking, and an entry belongs to no thread.
unsafe impl Send for Dentry {}
// SAFETY: debugfs locks by itself, so that several threads may use an entry.
unsafe impl Sync for Dentry {}

impl Drop for Dentry {
    fn drop(&mut self) {
        // SAFETY: Not removed yet by the type invariants of `Dentry`.
        unsafe { bindings::zdm_debugfs_remove(self.0) };
    }
}

/// A directory; removed with the last file or directory in it.
///
/// # Examples
///
/// ```
/// use kernel::{debugfs::Dir, mm::module::scope::ModuleScope, module::this_module};
///
/// let scope = ModuleScope::new(this_module::<LocalModule>())?;
/// let outer = Dir::root(scope, c"zdm_outer")?;
/// let inner = Dir::new(outer, c"inner")?;
/// // Both go, the inner one first.
/// drop(inner);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct Dir {
    // Removed before the directory that it is in.
    dentry: Dentry,
    _parent: Option<Arc<Dir>>,
    scope: Arc<ModuleScope>,
}

impl Dir {
    /// Makes a directory at the root, for files in `scope`. May sleep. Where debugfs refuses it, as for a name that
    /// there is already, its files do not exist either, and all goes on without them.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn root(scope: Arc<ModuleScope>, name: &CStr) -> Result<Arc<Self>> {
        Self::make(scope, name, None)
    }

    /// Makes a directory in `parent`, as [`Dir::root`]. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(parent: Arc<Dir>, name: &CStr) -> Result<Arc<Self>> {
        Self::make(parent.scope.clone(), name, Some(parent))
    }

    fn make(scope: Arc<ModuleScope>, name: &CStr, parent: Option<Arc<Dir>>) -> Result<Arc<Self>> {
        let above = parent
            .as_ref()
            .map_or(core::ptr::null_mut(), |dir| dir.dentry.0);
        // SAFETY: `above` is NULL or a directory that lives as long as `parent`.
        let dentry = unsafe { bindings::zdm_debugfs_create_dir(name.as_char_ptr(), above) };
        // INVARIANT: `_parent` keeps the directory above from being removed.
        let dir = Self {
            dentry: Dentry(dentry),
            _parent: parent,
            scope,
        };
        Ok(Arc::new(dir, GFP_KERNEL)?)
    }
}

/// The content of a file.
///
/// # Examples
///
/// ```
/// use kernel::debugfs::{Source, Text};
///
/// /// A file with a line for each number.
/// struct Numbers(u32);
///
/// impl Source for Numbers {
///     fn write(&self, text: &mut Text) -> Result {
///         (0..self.0).try_for_each(|n| text.line(fmt!("{}", n)))
///     }
/// }
/// # let mut text = Text::default();
/// # Numbers(2).write(&mut text)?;
/// # assert_eq!(text.as_bytes(), b"0\n1\n");
/// # Ok::<(), Error>(())
/// ```
pub(crate) trait Source: Send + Sync + 'static {
    /// Writes the text, when a file is read from its start. May sleep. A registration that is dropped here, as
    /// that of a file, stays, as [`Scoped`] says.
    ///
    /// # Errors
    ///
    /// What `read(2)` returns.
    fn write(&self, text: &mut Text) -> Result;
}

/// Text that is being written, of at most [`Text::MOST`] bytes.
///
/// # Examples
///
/// ```
/// use kernel::debugfs::Text;
///
/// let mut text = Text::default();
/// text.line(fmt!("pages {}", 3))?;
/// assert_eq!(text.as_bytes(), b"pages 3\n");
/// # Ok::<(), Error>(())
/// ```
#[derive(Default)]
pub(crate) struct Text {
    bytes: KVVec<u8>,
    /// Whether something was too long for it.
    is_full: bool,
}

impl Text {
    /// Most bytes of a text. All of it is in memory until its reader has read it.
    pub(crate) const MOST: usize = 4 << 20;

    /// Adds a line. May sleep.
    ///
    /// # Errors
    ///
    /// `EFBIG` when the text would be longer than [`Text::MOST`], `ENOMEM`.
    pub(crate) fn line(&mut self, args: fmt::Arguments<'_>) -> Result {
        let before = self.bytes.len();
        let written = fmt::Write::write_fmt(self, args);
        written
            .and_then(|()| fmt::Write::write_str(self, "\n"))
            .map_err(|_| {
                // A line is written as a whole, or not at all.
                self.bytes.truncate(before);
                if self.is_full {
                    EFBIG
                } else {
                    ENOMEM
                }
            })
    }

    /// All lines so far.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        if s.len() > Self::MOST - self.bytes.len() {
            self.is_full = true;
            return Err(fmt::Error);
        }
        self.bytes
            .extend_from_slice(s.as_bytes(), GFP_KERNEL_ACCOUNT)
            .map_err(|_| fmt::Error)
    }
}

/// A file.
#[pin_data]
struct Shared<S> {
    // Removed before what its readers use, and before the directory that it is in.
    dentry: Dentry,
    #[pin]
    content: Content<S>,
    _dir: Arc<Dir>,
}

/// The number of reads in progress. The text of one more replaces that of the first one, which continues
/// with a new text.
const READERS: usize = 8;

/// The state that the readers of a file share. Readers may have a reference on it while the file is still being
/// made.
#[pin_data]
struct Content<S> {
    source: S,
    /// The reads in progress, at most [`READERS`], the latest one last: a reader may read a text in pieces.
    #[pin]
    reads: Mutex<KVec<InProgress>>,
}

/// A text of which its reader has read a part.
struct InProgress {
    /// The open file. Its close is not noticed, and another one may come to have the same address.
    file: usize,
    /// Whether the text was made for a task with `CAP_SYS_ADMIN`, which sees more than others.
    admin: bool,
    text: Text,
}

impl<S: Source> Callbacks for Shared<S> {
    fn end(&self) {
        // SAFETY: Not removed yet by the type invariants of `Dentry`. What has ended is not dropped.
        unsafe { bindings::zdm_debugfs_remove(self.dentry.0) };
    }
}

impl<S: Source> Content<S> {
    /// Reads from the open file at address `file`. May sleep, without the lock: for the source, and for user
    /// memory.
    fn read(&self, file: usize, mut out: UserSliceWriter, pos: &mut i64) -> Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        let admin = is_admin();
        // A read from the start is one of a new text.
        let begun = self.take(file, admin).filter(|_| *pos != 0);
        let text = match begun {
            Some(text) => text,
            None => self.write()?,
        };
        let result = out.write_slice_file(text.as_bytes(), pos);
        // The end of the text was not seen yet.
        if !matches!(result, Ok(0)) {
            self.keep(InProgress { file, admin, text });
        }
        result
    }

    /// A new text. `EBUSY` while too many tasks are in callbacks.
    fn write(&self) -> Result<Text> {
        let _callback = Callback::enter()?;
        let mut text = Text::default();
        self.source.write(&mut text).map(|()| text)
    }

    /// Takes the text that `file` reads.
    fn take(&self, file: usize, admin: bool) -> Option<Text> {
        let mut reads = self.reads.lock();
        let place = reads.iter().position(|read| read.file == file)?;
        // The text is freed without the lock.
        let read = reads.remove(place).ok()?;
        drop(reads);
        (read.admin == admin).then_some(read.text)
    }

    fn keep(&self, read: InProgress) {
        let mut reads = self.reads.lock();
        let first = (reads.len() >= READERS).then(|| reads.remove(0));
        // There is room for so many.
        let left = reads.push_within_capacity(read);
        drop(reads);
        drop((first, left));
    }
}

/// A file that only its owner may read; removed when dropped, which waits for readers. One that is
/// forgotten keeps the module loaded, or is removed when the module is unloaded, as its scope says.
///
/// A file that a [`Source::write`] drops, its own or another, is treated as a file that was forgotten, as
/// [`Scoped`] says: dropping it would wait for the reader that the function writes for, or for one that waits for
/// this task.
///
/// # Examples
///
/// ```
/// use kernel::{
///     //,
///     debugfs::{Dir, Source, Text, TextFile},
///     mm::module::scope::ModuleScope,
///     module::this_module,
/// };
///
/// struct Answer;
///
/// impl Source for Answer {
///     fn write(&self, text: &mut Text) -> Result {
///         text.line(fmt!("answer {}", 42))
///     }
/// }
///
/// let scope = ModuleScope::new(this_module::<LocalModule>())?;
/// let dir = Dir::root(scope, c"zdm_example")?;
/// let file = TextFile::new(dir, c"answer", Answer)?;
/// // File and directory go away together.
/// drop(file);
/// # Ok::<(), Error>(())
/// ```
pub(crate) struct TextFile<S: Source> {
    shared: Scoped<Shared<S>>,
}

impl<S: Source> TextFile<S> {
    /// Makes the file `name` in `dir`, unless debugfs refuses it. May sleep.
    ///
    /// Wraps `debugfs_create_file()`.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is on its way out, `ENOMEM`.
    pub(crate) fn new(dir: Arc<Dir>, name: &CStr, source: S) -> Result<Self> {
        let scope = dir.scope.clone();
        Ok(Self {
            shared: Scoped::new(&scope, Shared::make(dir, name, source))?,
        })
    }
}

impl<S: Source> Shared<S> {
    const OPS: &'static bindings::debugfs_short_fops = &bindings::debugfs_short_fops {
        read: Some(Content::<S>::read_raw),
        write: None,
        llseek: Some(bindings::default_llseek),
    };

    fn make(dir: Arc<Dir>, name: &CStr, source: S) -> impl PinInit<Self, Error> + '_ {
        let above = dir.dentry.0;
        try_pin_init!(&this in Self {
            content <- try_pin_init!(Content {
                source,
                reads <- new_mutex!(
                    KVec::with_capacity(READERS, GFP_KERNEL)?,
                    "TextFile::reads"
                ),
            }? Error),
            // INVARIANT: `_dir` keeps the directory from being removed.
            _dir: dir,
            // The file may be read as soon as it is there, so that it comes last.
            dentry: {
                let name = name.as_char_ptr();
                // SAFETY: `this` is the place that is being initialised. `content` was initialised above.
                let data = unsafe { &raw mut (*this.as_ptr()).content };
                // SAFETY: `above` is a directory, and `data` and the operations outlive the file.
                Dentry(unsafe {
                    bindings::zdm_debugfs_create_file(name, 0o400, above, data.cast(), Self::OPS)
                })
            },
        })
    }
}

impl<S: Source> Content<S> {
    /// # Safety
    ///
    /// Only to be called by debugfs, for a file with a content of this type.
    unsafe extern "C" fn read_raw(
        file: *mut bindings::file,
        buffer: *mut kernel::ffi::c_char,
        len: usize,
        pos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: debugfs put the data there that the file was made with. The file is not removed before this
        // returns, so it is alive.
        let content = unsafe { &*(*file).private_data.cast::<Self>() };
        // SAFETY: This is the caller's position, which no other task uses.
        let pos = unsafe { &mut *pos };
        let out = UserSlice::new(UserPtr::from_ptr(buffer.cast()), len).writer();
        match content.read(file.addr(), out, pos) {
            // CAST: No slice is larger than `isize::MAX` bytes.
            Ok(n) => n as isize,
            Err(err) => err.to_errno() as isize,
        }
    }
}

#[kunit_tests(zdmirror_debugfs_text)]
mod tests {
    use super::*;
    use crate::mm::{
        kunit::support::{
            mmap_anon,
            this_module, //
        },
        module::scope::TestExit, //
    };

    /// The place of a file that drops itself.
    #[pin_data]
    struct Slot {
        #[pin]
        file: Mutex<Option<TextFile<Own>>>,
    }

    struct Own(Arc<Slot>);

    impl Source for Own {
        fn write(&self, text: &mut Text) -> Result {
            let file = self.0.file.lock().take();
            drop(file);
            text.line(fmt!("read"))
        }
    }

    #[test]
    fn file_does_not_wait_for_the_reader_that_drops_it() -> Result {
        // SAFETY: The module is running this case, at the end of which the result is dropped.
        let exit = unsafe { TestExit::new(this_module()) }?;
        let slot = Arc::pin_init(
            pin_init!(Slot { file <- new_mutex!(None, "Slot::file") }),
            GFP_KERNEL,
        )?;
        let dir = Dir::root(exit.scope().clone(), c"zdm_kunit_own")?;
        let file = TextFile::new(dir, c"own", Own(slot.clone()))?;
        let content = &raw const file.shared.content;
        *slot.file.lock() = Some(file);
        // SAFETY: The file stays until `exit` is dropped: a file that its own source drops is forgotten.
        let content = unsafe { &*content };
        let address = mmap_anon(16)?;
        let user = || UserSlice::new(UserPtr::from_addr(address), 5);
        let mut pos = 0;
        assert_eq!(content.read(1, user().writer(), &mut pos)?, 5);
        let mut found = [0; 5];
        user().reader().read_slice(&mut found)?;
        assert_eq!(&found, b"read\n");
        assert!(slot.file.lock().is_none());
        // The file can still be read, and is removed by the exit.
        pos = 0;
        assert_eq!(content.read(1, user().writer(), &mut pos)?, 5);
        Ok(())
    }

    #[test]
    fn text_is_bounded() -> Result {
        let mut text = Text::default();
        let long = KVVec::from_elem(b'x', (1 << 20) - 1, GFP_KERNEL)?;
        let long = core::str::from_utf8(&long).map_err(|_| EINVAL)?;
        for mib in 1..=Text::MOST >> 20 {
            text.line(fmt!("{}", long))?;
            assert_eq!(text.as_bytes().len(), mib << 20);
        }
        // There is no room for the end of a line, nor for part of one.
        for line in ["", long] {
            assert_eq!(text.line(fmt!("{}", line)), Err(EFBIG));
            assert_eq!(text.as_bytes().len(), Text::MOST);
        }
        Ok(())
    }
}
