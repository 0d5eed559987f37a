// SPDX-License-Identifier: GPL-2.0

//! Records whether anything but a migration changes the pages that the migration moves.

use super::changes::Span;
use crate::bindings;
use core::cell::Cell;
use kernel::{
    prelude::*,
    task::Task, //
};

/// The pages that a task is about to migrate, and whether anything else has changed them.
#[derive(Clone, Copy)]
struct Watched {
    span: Span,
    task: *mut bindings::task_struct,
    disturbed: bool,
}

/// A watch, for the request of a migration to name: the address of the token is the identity. The field is
/// the number that [`Watches::begin`] returned.
///
/// # Examples
///
/// ```
/// use kernel::mm::{migrate::migration::Request, user::watches::WatchToken};
/// # use kernel::mm::{
/// #     kunit::{device::EmulatedDevice, support::anon_range},
/// #     migrate::migration::Area,
/// # };
/// # let device = EmulatedDevice::new()?;
/// # let range = anon_range(1)?;
/// # let mirror = device.mirror()?;
/// # let task = current!();
/// # let mm = task.mm().ok_or(EINVAL)?;
///
/// let watch = mirror.watch(range).ok_or(EAGAIN)?;
/// let token: &WatchToken = watch.token();
/// # let mmap = mm.mmap_read_lock();
/// # let area = Area::lookup(&mmap, range.start()).ok_or(EFAULT)?;
/// let request = Request {
///     watch: Some(token),
///     ..Request::system(area, range, device.owner())
/// };
/// # let _ = request;
/// # drop(mmap);
/// # Ok::<(), Error>(())
/// ```
// The field has a size, so that the address of each token is unique.
pub(crate) struct WatchToken(pub(in crate::mm) usize);

/// Migrations that can be watched at a time.
const WATCHES: usize = 4;

/// Watches of the migrations of an address space, which the lock of a notifier protects.
pub(in crate::mm) struct Watches {
    slots: [Cell<Option<Watched>>; WATCHES],
    /// Number of watches. It is usually 0, so that most changes need no look at the slots.
    some: Cell<usize>,
}

// SAFETY: Tasks are only compared.
unsafe impl Send for Watches {}

impl Watches {
    /// None.
    pub(in crate::mm) const fn new() -> Self {
        Self {
            slots: [const { Cell::new(None) }; WATCHES],
            some: Cell::new(0),
        }
    }

    /// Begins to watch the pages of `span` for the current task: whether anything changes them but a
    /// migration of that task. `None` while too many are watched.
    pub(in crate::mm) fn begin(&self, span: Span) -> Option<usize> {
        let slot = self.slots.iter().position(|slot| slot.get().is_none())?;
        self.slots[slot].set(Some(Watched {
            span,
            task: Task::current_raw(),
            disturbed: false,
        }));
        self.some.set(self.some.get() + 1);
        Some(slot)
    }

    /// Records that the current task changes the pages of `span`, by a `migration` or otherwise.
    #[inline]
    pub(in crate::mm) fn disturb(&self, span: &Span, migration: bool) {
        if self.some.get() > 0 {
            self.disturb_some(span, migration);
        }
    }

    fn disturb_some(&self, span: &Span, migration: bool) {
        for slot in &self.slots {
            let Some(watched) = slot.get() else { continue };
            let own = migration && watched.task == Task::current_raw();
            if !own && span.overlaps(&watched.span) {
                slot.set(Some(Watched {
                    disturbed: true,
                    ..watched
                }));
            }
        }
    }

    /// Whether the pages of a watch are as the task's migration has left them.
    pub(in crate::mm) fn is_undisturbed(&self, slot: usize) -> bool {
        let watched = self.slots.get(slot).and_then(Cell::get);
        watched.is_some_and(|watched| !watched.disturbed)
    }

    /// Ends a watch.
    pub(in crate::mm) fn end(&self, slot: usize) {
        let watched = self.slots.get(slot).and_then(Cell::take);
        if watched.is_some() {
            self.some.set(self.some.get() - 1);
        }
    }
}

#[kunit_tests(zdmirror_watches)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_few() -> Result {
        let (watches, span) = (Watches::new(), Span { first: 2, last: 9 });
        let mut slots = [0; WATCHES];
        for slot in &mut slots {
            *slot = watches.begin(span).ok_or(EINVAL)?;
        }
        assert!(watches.begin(span).is_none());
        assert!(watches.is_undisturbed(slots[1]) && !watches.is_undisturbed(WATCHES));
        watches.end(slots[1]);
        assert!(!watches.is_undisturbed(slots[1]));
        assert_eq!(watches.begin(span), Some(slots[1]));
        // A migration of the task itself does not disturb its watch.
        watches.disturb(&span, true);
        watches.disturb(&Span { first: 0, last: 1 }, false);
        assert!(watches.is_undisturbed(slots[0]));
        watches.disturb(&Span { first: 9, last: 9 }, false);
        assert!(!watches.is_undisturbed(slots[0]));
        // One that is left is still disturbed.
        for slot in [0, 1, 2, 2, WATCHES] {
            watches.end(slot);
        }
        let last = slots[WATCHES - 1];
        watches.end(last);
        assert_eq!(watches.begin(span), Some(slots[0]));
        assert!(watches.is_undisturbed(slots[0]));
        watches.disturb(&span, false);
        assert!(!watches.is_undisturbed(slots[0]));
        Ok(())
    }
}
