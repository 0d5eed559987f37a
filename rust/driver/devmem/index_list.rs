// SPDX-License-Identifier: GPL-2.0

//! Doubly linked lists without allocation and without `unsafe`: links are indices into a table.

#![forbid(unsafe_code)]

use core::{
    num::NonZeroUsize,
    ops::{
        Index,
        IndexMut,
        Range, //
    }, //
};
use kernel::prelude::*;

/// No element.
pub(super) const NIL: u32 = u32::MAX;

/// Elements that are added and removed by the chunk. Those of chunk `n` have numbers from `n *
/// per_chunk` on.
pub(super) struct Table<T> {
    /// The size is not zero, so that dividing by it cannot panic.
    per_chunk: NonZeroUsize,
    /// The logarithm of the size, if it is whole: a shift costs less than a division.
    shift: Option<u32>,
    /// A vacant number has an empty chunk.
    chunks: KVec<KVVec<T>>,
}

impl<T> Table<T> {
    /// Makes a table for up to `chunks` chunks of `per_chunk` elements, all vacant. May sleep.
    pub(super) fn new(chunks: usize, per_chunk: NonZeroUsize) -> Result<Self> {
        // Every element has a number, and no number is `NIL`.
        let elements = per_chunk.get().checked_mul(chunks).ok_or(EINVAL)?;
        if u32::try_from(elements).map_or(true, |n| n == NIL) {
            return Err(EINVAL);
        }
        let mut table = KVec::with_capacity(chunks, GFP_KERNEL)?;
        for _ in 0..chunks {
            table.push(KVVec::new(), GFP_KERNEL)?;
        }
        Ok(Self {
            per_chunk,
            shift: per_chunk
                .is_power_of_two()
                .then(|| per_chunk.trailing_zeros()),
            chunks: table,
        })
    }

    /// The number of elements of a chunk.
    pub(super) fn per_chunk(&self) -> usize {
        self.per_chunk.get()
    }

    /// The chunk of element `i`, and the index of the element there.
    fn place(&self, i: u32) -> (usize, usize) {
        let i = i as usize;
        match self.shift {
            Some(shift) => (i >> shift, i & ((1 << shift) - 1)),
            None => (i / self.per_chunk, i % self.per_chunk),
        }
    }

    /// The lowest number without a chunk.
    pub(super) fn vacancy(&self) -> Option<usize> {
        self.chunks.iter().position(|chunk| chunk.is_empty())
    }

    /// The elements of chunk `number`; none if it is vacant.
    pub(super) fn chunk(&self, number: usize) -> &[T] {
        self.chunks.get(number).map_or(&[], |chunk| chunk)
    }

    /// The numbers of the elements of chunk `number`.
    pub(super) fn numbers(&self, number: usize) -> Range<u32> {
        let first = number * self.per_chunk.get();
        // CAST: `new()` checked that every number fits.
        first as u32..(first + self.per_chunk.get()) as u32
    }

    /// Replaces chunk `number` by `chunk`. Returns the old chunk.
    pub(super) fn replace(&mut self, number: usize, chunk: KVVec<T>) -> KVVec<T> {
        core::mem::replace(&mut self.chunks[number], chunk)
    }

    /// Element `i`, if there is one.
    pub(super) fn get(&self, i: u32) -> Option<&T> {
        let (chunk, n) = self.place(i);
        self.chunks.get(chunk)?.get(n)
    }
}

impl<T> Index<u32> for Table<T> {
    type Output = T;

    // PANIC: Callers pass only elements that exist, such as those on a list.
    fn index(&self, i: u32) -> &T {
        let (chunk, n) = self.place(i);
        &self.chunks[chunk][n]
    }
}

impl<T> IndexMut<u32> for Table<T> {
    // PANIC: Callers pass only elements that exist, such as those on a list.
    fn index_mut(&mut self, i: u32) -> &mut T {
        let (chunk, n) = self.place(i);
        &mut self.chunks[chunk][n]
    }
}

/// The neighbours of an element on its list.
#[derive(Clone, Copy)]
pub(super) struct Link {
    prev: u32,
    next: u32,
}

impl Link {
    /// The link of an element that is on no list.
    pub(super) const NONE: Self = Self {
        prev: NIL,
        next: NIL,
    };
}

/// An element that can be on one list at a time.
pub(super) trait Linked {
    /// The neighbours, for reading.
    fn peek(&self) -> Link;

    /// The neighbours, for writing.
    fn link(&mut self) -> &mut Link;
}

/// A list of elements of one table.
#[derive(Clone, Copy)]
pub(super) struct List {
    head: u32,
    tail: u32,
    len: u32,
}

impl List {
    pub(super) const EMPTY: Self = Self {
        head: NIL,
        tail: NIL,
        len: 0,
    };

    /// The first element.
    pub(super) fn head(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }

    /// The last element.
    pub(super) fn tail(&self) -> Option<u32> {
        (self.tail != NIL).then_some(self.tail)
    }

    /// The element after `i`, which is on this list.
    pub(super) fn next<T: Linked>(&self, table: &Table<T>, i: u32) -> Option<u32> {
        let next = table[i].peek().next;
        (next != NIL).then_some(next)
    }

    /// The number of elements.
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// Adds `i`, which is on no list, as the first element.
    pub(super) fn push_front<T: Linked>(&mut self, table: &mut Table<T>, i: u32) {
        let next = self.head;
        *table[i].link() = Link { prev: NIL, next };
        match next {
            NIL => self.tail = i,
            _ => table[next].link().prev = i,
        }
        self.head = i;
        self.len += 1;
    }

    /// Adds `i`, which is on no list, as the last element.
    pub(super) fn push_back<T: Linked>(&mut self, table: &mut Table<T>, i: u32) {
        let prev = self.tail;
        *table[i].link() = Link { prev, next: NIL };
        match prev {
            NIL => self.head = i,
            _ => table[prev].link().next = i,
        }
        self.tail = i;
        self.len += 1;
    }

    /// Adds `elements`, which are on no list, as the last ones. `f` gets each to change what else it has.
    pub(super) fn append<T: Linked>(
        &mut self,
        table: &mut Table<T>,
        elements: &[u32],
        mut f: impl FnMut(&mut T),
    ) {
        let (Some(&first), Some(&last)) = (elements.first(), elements.last()) else {
            return;
        };
        let mut prev = self.tail;
        for (n, &i) in elements.iter().enumerate() {
            let next = elements.get(n + 1).copied().unwrap_or(NIL);
            let element = &mut table[i];
            *element.link() = Link { prev, next };
            f(element);
            prev = i;
        }
        match self.tail {
            NIL => self.head = first,
            tail => table[tail].link().next = first,
        }
        self.tail = last;
        // CAST: A table has no more elements than numbers.
        self.len += elements.len() as u32;
    }

    /// Removes `i`, which is on this list.
    pub(super) fn remove<T: Linked>(&mut self, table: &mut Table<T>, i: u32) {
        let Link { prev, next } = core::mem::replace(table[i].link(), Link::NONE);
        match prev {
            NIL => self.head = next,
            _ => table[prev].link().next = next,
        }
        match next {
            NIL => self.tail = prev,
            _ => table[next].link().prev = prev,
        }
        self.len -= 1;
    }
}

#[kunit_tests(zdmirror_index_list)]
mod tests {
    use super::*;

    impl Linked for Link {
        fn peek(&self) -> Link {
            *self
        }

        fn link(&mut self) -> &mut Link {
            self
        }
    }

    /// Chunks 0 and 2 of three, with four elements each.
    fn table() -> Result<Table<Link>> {
        let mut table = Table::new(3, NonZeroUsize::new(4).ok_or(EINVAL)?)?;
        for number in [0, 2] {
            table.replace(number, KVVec::from_elem(Link::NONE, 4, GFP_KERNEL)?);
        }
        Ok(table)
    }

    /// Whether the list is `expected`, read in both directions.
    fn is(list: &List, table: &Table<Link>, expected: &[u32]) -> bool {
        let mut forth = list.head;
        let mut back = list.tail;
        for (&a, &b) in expected.iter().zip(expected.iter().rev()) {
            if forth != a || back != b {
                return false;
            }
            forth = table[a].next;
            back = table[b].prev;
        }
        forth == NIL && back == NIL && list.len() == expected.len()
    }

    #[test]
    fn elements_of_vacant_chunks_do_not_exist() -> Result {
        let table = table()?;
        for i in 0..16 {
            assert_eq!(table.get(i).is_some(), i < 4 || (8..12).contains(&i));
        }
        assert!(table.get(NIL).is_none());
        assert_eq!(table.vacancy(), Some(1));
        assert_eq!(table.numbers(1), 4..8);
        assert!(table.chunk(1).is_empty());
        assert!(table.chunk(3).is_empty());
        Ok(())
    }

    #[test]
    fn numbers_fit() {
        let half = NonZeroUsize::MIN.saturating_add((NIL / 2) as usize);
        assert!(Table::<u8>::new(2, half).is_err());
        assert!(Table::<u8>::new(2, NonZeroUsize::MAX).is_err());
    }

    #[test]
    fn ends_and_middle_can_go() -> Result {
        let mut table = table()?;
        let mut list = List::EMPTY;
        for i in [1, 9, 3] {
            list.push_back(&mut table, i);
        }
        list.push_front(&mut table, 8);
        assert!(is(&list, &table, &[8, 1, 9, 3]));
        assert_eq!(list.next(&table, 9), Some(3));
        assert_eq!(list.next(&table, 3), None);
        list.remove(&mut table, 9);
        assert!(is(&list, &table, &[8, 1, 3]));
        list.remove(&mut table, 8);
        list.remove(&mut table, 3);
        assert!(is(&list, &table, &[1]));
        list.remove(&mut table, 1);
        assert!(is(&list, &table, &[]));
        list.push_front(&mut table, 0);
        assert!(is(&list, &table, &[0]));
        Ok(())
    }
}
