// SPDX-License-Identifier: GPL-2.0

//! Keeps a module loaded, or ends its registrations, before the kernel calls functions that are gone.
//!
//! A registration lets the kernel call functions of a module until it is dropped, and safe code may
//! forget to drop it ([`core::mem::forget`]). A [`ModuleScope`] makes that harmless in one of two ways.
//!
//! - A registration takes a reference of the module. The module cannot be unloaded while a forgotten
//!   registration has one.
//! - The module drops its own registrations when it is unloaded, so that they must not keep it loaded. If
//!   the module has a [`ModuleExit`], they are listed instead, and the [`ModuleExit`] ends those that were
//!   forgotten.
//!
//! C header: [`include/linux/module.h`](srctree/include/linux/module.h)

use super::{
    callback::check_may_wait,
    pin::ModulePin, //
};
use crate::bindings;
use core::{
    marker::PhantomPinned,
    mem::ManuallyDrop,
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

/// Something that lets the kernel call functions of a module.
///
/// # Examples
///
/// ```
/// use kernel::mm::module::scope::Callbacks;
///
/// struct Timer;
///
/// impl Callbacks for Timer {
///     fn end(&self) {
///         // Here the timer would be deleted, which waits for its function.
///     }
/// }
/// # Timer.end();
/// ```
pub(crate) trait Callbacks: Sync + 'static {
    /// Makes sure that the kernel does not call the module for `self`, and never will. Called when the
    /// module is unloaded, at most once, and not for a registration that was dropped. May sleep.
    fn end(&self);
}

/// A registration in the list of a scope.
struct Listed {
    number: usize,
    /// What was registered, once it is.
    callbacks: Option<NonNull<dyn Callbacks>>,
}

/// # Invariants
///
/// Each of the `callbacks` in `list` is there for as long as its entry is.
struct List {
    /// A [`ModuleExit`] ends the registrations in `list`, as it was not dropped yet.
    has_exit: bool,
    next: usize,
    list: KVec<Listed>,
}

// SAFETY: `Callbacks` are `Sync`, so that any thread may use a shared reference.
unsafe impl Send for List {}

/// The registrations of a module.
///
/// # Examples
///
/// ```
/// use kernel::{mm::{module::scope::ModuleScope, region::owner::PgmapOwner}, module::this_module};
///
/// let scope = ModuleScope::new(this_module::<LocalModule>())?;
/// // No `ModuleExit` has the scope, so that registrations take a reference of the module.
/// let owner = PgmapOwner::in_scope(scope)?;
/// # drop(owner);
/// # Ok::<(), Error>(())
/// ```
#[pin_data]
pub(crate) struct ModuleScope {
    module: &'static ThisModule,
    #[pin]
    list: Mutex<List>,
}

impl ModuleScope {
    /// A scope in which each registration takes a reference of `module`, which there is once the init
    /// function of the module has succeeded. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(module: &'static ThisModule) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                module,
                list <- new_mutex!(
                    List {
                        has_exit: false,
                        next: 0,
                        list: KVec::new(),
                    },
                    "ModuleScope::list"
                ),
            }),
            GFP_KERNEL,
        )
    }

    /// The module that registrations in this scope call.
    pub(crate) fn module(&self) -> &'static ThisModule {
        self.module
    }

    /// Makes an entry for a registration, which comes before the registration itself. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is on its way out, or its init function has not succeeded yet and no
    /// [`ModuleExit`] ends the registration. `ENOMEM`.
    pub(in crate::mm) fn enter(self: &Arc<Self>) -> Result<ScopeEntry> {
        let mut list = self.list.lock();
        let hold = if list.has_exit {
            let number = list.next;
            let callbacks = None;
            list.list.push(Listed { number, callbacks }, GFP_KERNEL)?;
            list.next += 1;
            Hold::Listed(number)
        } else {
            drop(list);
            Hold::Module(ManuallyDrop::new(
                ModulePin::try_take(self.module).ok_or(ENODEV)?,
            ))
        };
        Ok(ScopeEntry {
            scope: self.clone(),
            hold,
        })
    }

    /// Ends what is listed, from the last registration on, and lists nothing any more. May sleep.
    fn end(&self) {
        loop {
            let mut list = self.list.lock();
            list.has_exit = false;
            let Some(last) = list.list.pop() else { return };
            drop(list);
            if let Some(callbacks) = last.callbacks {
                pr_warn!("a registration was forgotten, and ends with the module\n");
                // SAFETY: By the invariants of `List` it was there as long as its entry. It stays, as only
                // its owner frees it, which `ScopeEntry::leave()` tells that it must not.
                unsafe { callbacks.as_ref() }.end();
            }
        }
    }
}

/// What keeps the functions of a registration in memory.
enum Hold {
    /// By a reference of the module.
    Module(ManuallyDrop<ModulePin>),
    /// The [`ModuleExit`] ends the registration with this number.
    Listed(usize),
}

/// The entry of a registration in a scope. If it is dropped, as with a registration that is forgotten,
/// the kernel may go on calling the module.
#[must_use = "a registration leaves its scope by `leave()`"]
pub(in crate::mm) struct ScopeEntry {
    scope: Arc<ModuleScope>,
    hold: Hold,
}

impl ScopeEntry {
    /// Says what was registered. `false` if the exit of the module has come in between, and does not end it: the
    /// caller must. May sleep.
    ///
    /// # Safety
    ///
    /// If the result is `true`, `callbacks` must stay where it is until [`ScopeEntry::leave`] returns something. If
    /// that never happens, or returns `None`, it must stay for good.
    pub(in crate::mm) unsafe fn set<C: Callbacks>(&self, callbacks: *const C) -> bool {
        let Hold::Listed(number) = self.hold else {
            return true;
        };
        let callbacks = NonNull::new(callbacks.cast_mut()).map(|c| c as NonNull<dyn Callbacks>);
        let mut list = self.scope.list.lock();
        let Some(listed) = list.list.iter_mut().find(|e| e.number == number) else {
            return false;
        };
        // INVARIANT: It stays by the contract of this function.
        listed.callbacks = callbacks;
        true
    }

    /// Takes the registration out of its scope. `None` when the module's exit has ended it, or is doing so.
    /// May sleep.
    ///
    /// # Safety
    ///
    /// The caller must end what was registered before it drops the result, and must leave it alone if there is
    /// none.
    pub(in crate::mm) unsafe fn leave(self) -> Option<Loaded> {
        match self.hold {
            Hold::Module(pin) => Some(Loaded {
                _pin: Some(ManuallyDrop::into_inner(pin)),
            }),
            Hold::Listed(number) => {
                let mut list = self.scope.list.lock();
                let at = list.list.iter().position(|e| e.number == number)?;
                // The order is that in which the exit ends the others.
                let _ = list.list.remove(at);
                Some(Loaded { _pin: None })
            }
        }
    }
}

/// Keeps the functions of a module in memory while a registration is ended.
#[must_use = "the module may be unloaded when it is dropped"]
pub(in crate::mm) struct Loaded {
    _pin: Option<ModulePin>,
}

/// Something registered in a scope, which dropping it unregisters.
///
/// One that is dropped where the end of a registration must not be waited for, as [`check_may_wait`] says, is treated
/// as one that was forgotten: it keeps the module loaded, or ends with it, as its scope says.
///
/// # Examples
///
/// ```
/// use kernel::{mm::module::scope::{Callbacks, ModuleScope, Scoped}, module::this_module};
///
/// /// As long as it is not dropped the kernel calls a function of the module.
/// #[pin_data(PinnedDrop)]
/// struct Timer {}
///
/// impl Callbacks for Timer {
///     fn end(&self) {
///         // Here the timer would be deleted, which waits for its function.
///     }
/// }
///
/// #[pinned_drop]
/// impl PinnedDrop for Timer {
///     fn drop(self: Pin<&mut Self>) {
///         self.end();
///     }
/// }
///
/// let scope = ModuleScope::new(this_module::<LocalModule>())?;
/// // What makes the timer would start it, too.
/// let init = try_pin_init!(Timer {}? Error);
/// let timer: Scoped<Timer> = Scoped::new(&scope, init)?;
/// drop(timer);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// `entry` is the entry of `inner` in its scope, until `drop()` leaves that.
pub(crate) struct Scoped<C: Callbacks> {
    inner: ManuallyDrop<Pin<KBox<C>>>,
    entry: Option<ScopeEntry>,
}

impl<C: Callbacks> Scoped<C> {
    /// Registers what `init` makes. `C` unregisters it when it is dropped. May sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` when the module is on its way out, also if its exit has come while `init` ran; `ENOMEM`, and the
    /// error of `init`.
    pub(crate) fn new(scope: &Arc<ModuleScope>, init: impl PinInit<C, Error>) -> Result<Self> {
        let entry = scope.enter()?;
        let inner = match KBox::try_pin_init(init, GFP_KERNEL) {
            Ok(inner) => inner,
            Err(err) => {
                // SAFETY: Nothing was registered.
                drop(unsafe { entry.leave() });
                return Err(err);
            }
        };
        // SAFETY: `drop()` drops the box after it has left the scope, or never. What is not listed is dropped here.
        if !unsafe { entry.set(&raw const *inner) } {
            return Err(ENODEV);
        }
        // INVARIANT: Set above.
        Ok(Self {
            inner: ManuallyDrop::new(inner),
            entry: Some(entry),
        })
    }
}

impl<C: Callbacks> Deref for Scoped<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.inner
    }
}

impl<C: Callbacks> Drop for Scoped<C> {
    fn drop(&mut self) {
        if check_may_wait().is_err() {
            pr_err!(
                "a registration stays: it was dropped by a task that must not wait for its end\n"
            );
            // The entry stays in its scope, as one that is forgotten.
            return;
        }
        let Some(entry) = self.entry.take() else {
            return;
        };
        // SAFETY: `C` is dropped, which unregisters it, before `loaded` is; without one it is left alone.
        let Some(loaded) = (unsafe { entry.leave() }) else {
            return;
        };
        // SAFETY: The field is dropped here only, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.inner) };
        // The kernel calls nothing for it any more.
        drop(loaded);
    }
}

/// Ends the registrations of a module that were forgotten, when the module is unloaded.
///
/// A field of the type that implements `InPlaceModule`, after those that own registrations: fields are
/// dropped in the order in which they are declared.
///
/// The field must be of this type. `Opaque::pin_init()` and `MaybeUninit::pin_init()` take any initializer, and
/// never drop the value. What is forgotten then goes on after the module is gone, as each registration of the
/// kernel crate does that is put there.
///
/// # Examples
///
/// ```
/// use kernel::{
///     mm::{module::scope::ModuleExit, region::owner::PgmapOwner},
///     sync::Arc,
///     InPlaceModule,
/// };
///
/// /// What the module has registered, which would be devices.
/// #[pin_data]
/// struct Driver {
///     owner: Arc<PgmapOwner>,
///     #[pin]
///     exit: ModuleExit,
/// }
///
/// impl InPlaceModule for Driver {
///     fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
///         try_pin_init!(Self {
///             exit <- ModuleExit::new(module),
///             owner: PgmapOwner::in_scope(exit.scope().clone())?,
///         })
///     }
/// }
/// # use kernel::module::this_module;
/// # let module = this_module::<LocalModule>();
/// # let elsewhere = KBox::try_pin_init(Driver::init(module), GFP_KERNEL);
/// # // Only the module's own memory goes away with the module.
/// # assert!(module.as_ptr().is_null() || elsewhere.is_err());
/// # drop(elsewhere);
/// # Ok::<(), Error>(())
/// ```
///
/// # Invariants
///
/// The value is pinned in the memory of the module of `scope`, or the module is part of the kernel.
#[pin_data(PinnedDrop)]
pub(crate) struct ModuleExit {
    scope: Arc<ModuleScope>,
    #[pin]
    _pin: PhantomPinned,
}

impl ModuleExit {
    /// Makes a scope of `module` in which registrations take no reference of the module. May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` when it is initialised anywhere but in the memory of the module, where `module!` has the
    /// module's own type. `ENOMEM`.
    pub(crate) fn new(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            scope: {
                // What is pinned is dropped before its memory goes. That of the module goes together with
                // its functions, after its exit function. So what is listed ends before the functions go.
                let place = this.as_ptr() as usize;
                // SAFETY: A `ThisModule` is NULL or the `struct module` of the code that has it, by the
                // contract of `ThisModule::from_ptr()`.
                if !unsafe { bindings::zdm_module_owns(module.as_ptr(), place) } {
                    return Err(EINVAL);
                }
                let scope = ModuleScope::new(module)?;
                // INVARIANT: The place was checked above.
                scope.list.lock().has_exit = true;
                scope
            },
            _pin: PhantomPinned,
        })
    }

    /// The scope, for the registrations that the module drops itself.
    pub(crate) fn scope(&self) -> &Arc<ModuleScope> {
        &self.scope
    }
}

#[pinned_drop]
impl PinnedDrop for ModuleExit {
    fn drop(self: Pin<&mut Self>) {
        self.scope.end();
    }
}

/// What a [`ModuleExit`] does, for KUnit cases, which are not in the memory of the module.
///
/// # Examples
///
/// ```
/// use kernel::{
///     mm::{module::scope::TestExit, region::owner::PgmapOwner},
///     sync::Arc, //
/// };
///
/// /// An owner whose registrations end when `exit` is dropped.
/// fn owner(exit: &TestExit) -> Result<Arc<PgmapOwner>> {
///     PgmapOwner::in_scope(exit.scope().clone())
/// }
/// # let _ = owner;
/// ```
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) struct TestExit(Arc<ModuleScope>);

#[cfg(CONFIG_KUNIT = "y")]
impl TestExit {
    /// A scope in which registrations take no reference of `module`. May sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Safety
    ///
    /// The module must stay loaded until the result is dropped, or every registration in its scope is.
    pub(crate) unsafe fn new(module: &'static ThisModule) -> Result<Self> {
        let scope = ModuleScope::new(module)?;
        scope.list.lock().has_exit = true;
        Ok(Self(scope))
    }

    /// The scope.
    pub(crate) fn scope(&self) -> &Arc<ModuleScope> {
        &self.0
    }
}

#[cfg(CONFIG_KUNIT = "y")]
impl Drop for TestExit {
    fn drop(&mut self) {
        self.0.end();
    }
}
