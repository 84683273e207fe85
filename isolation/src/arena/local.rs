//! One arena: its blocks, its counts, and what waits to be freed elsewhere.
//!
//! Contract: only the owner reaches [`Local`], by [`Arena::enter`], which refuses a second entry: a signal
//! handler that allocates or frees while the thread is inside finds the door shut, not half-changed lists.
//! Other threads reach the stack of freed blocks and nothing else. No function here allocates, locks or
//! enters the kernel; all but [`Local::reallocate`], which may have to copy, take constant time.
//! The algorithm is two-level segregated fit (the `rlsf` crate).
#![allow(unsafe_code, reason = "an allocator's insides; see each block")]

use super::remote::{Stack, Taken};
use super::{ArenaStats, Exhausted};
use std::alloc::{GlobalAlloc, Layout};
use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, compiler_fence};

/// 28 powers of two from 32 bytes on, so up to 8 GiB, each in 32 steps: at most 1/32 is lost in rounding.
type Heap = rlsf::Tlsf<'static, u32, u32, 28, 32>;

/// Frees of the wrapped allocator's blocks that can wait at a time.
pub(super) const DEFERRED: usize = 1024;
/// Blocks freed by other threads that one allocation takes back.
const RECLAIMED_AT_ONCE: usize = 8;
/// And one that would fail otherwise.
const RECLAIMED_IN_NEED: usize = 256;

/// A free of a block that is not the arena's, to be done when the kernel may be entered.
pub(super) struct Deferred {
    free: unsafe fn(*const (), NonNull<u8>, Layout),
    allocator: *const (),
    block: NonNull<u8>,
    layout: Layout,
}

impl Deferred {
    /// # Safety
    /// `block` is one of `allocator`'s with this layout, is given up by the caller, and `allocator` lives
    /// until the free is done.
    pub(super) unsafe fn new<A: GlobalAlloc>(allocator: &A, block: NonNull<u8>, layout: Layout) -> Self {
        unsafe fn free<A: GlobalAlloc>(allocator: *const (), block: NonNull<u8>, layout: Layout) {
            // SAFETY: the promises made to `new`, for this very type.
            unsafe { (*allocator.cast::<A>()).dealloc(block.as_ptr(), layout) }
        }
        Self { free: free::<A>, allocator: std::ptr::from_ref(allocator).cast(), block, layout }
    }

    pub(super) fn run(self) {
        // SAFETY: what was promised to `new`; `self` is gone afterwards, so it happens once.
        unsafe { (self.free)(self.allocator, self.block, self.layout) }
    }
}

/// What lies at the start of an arena's mapping; the blocks follow.
#[repr(C, align(128))]
pub(super) struct Arena {
    /// Blocks of this arena that other threads freed.
    pub(super) remote: Stack<AtomicUsize>,
    /// A thread has it.
    pub(super) owned: AtomicBool,
    /// Where the blocks are; never changes.
    pub(super) start: usize,
    pub(super) end: usize,
    _apart: [u8; 96],
    /// The process that pre-faulted it: a forked child's copy is copied page by page as it is written to.
    pub(super) process: Cell<u32>,
    busy: Cell<bool>,
    nested: Cell<u64>,
    local: UnsafeCell<Local>,
}

impl Arena {
    /// Makes an arena of a mapping: the header in place, the rest its blocks.
    ///
    /// # Safety
    /// The mapping has room for the header and this many bytes behind it, is aligned to pages, zeroed,
    /// writable, nobody else's, and stays mapped for ever.
    pub(super) unsafe fn create<'a>(mapping: NonNull<u8>, bytes: usize) -> &'a Self {
        let arena = mapping.cast::<Self>();
        // SAFETY: inside the mapping.
        let blocks = unsafe { mapping.add(size_of::<Self>()) };
        let start = blocks.addr().get();
        // SAFETY: the mapping has room for it. Fields are written one by one, since the whole is too
        // large to pass over the stack; the counts and tables are valid as the zeroes they are.
        unsafe {
            let at = arena.as_ptr();
            (&raw mut (*at).remote).write(Stack::new());
            (&raw mut (*at).owned).write(AtomicBool::new(true));
            (&raw mut (*at).start).write(start);
            (&raw mut (*at).end).write(start + bytes);
            (&raw mut (*at).process).write(Cell::new(std::process::id()));
            (&raw mut (*at).busy).write(Cell::new(false));
            (&raw mut (*at).nested).write(Cell::new(0));
            let local = UnsafeCell::raw_get(&raw const (*at).local);
            (&raw mut (*local).heap).write(Heap::new());
            (&raw mut (*local).taken).write(Taken::none());
            (&raw mut (*local).counts).write(Counts::default());
            (&raw mut (*local).published).write(Counts::default());
            (&raw mut (*local).last).write(None);
            (&raw mut (*local).waiting).write(0);
            (*local).heap.insert_free_block_ptr(NonNull::slice_from_raw_parts(blocks, bytes));
            arena.as_ref()
        }
    }

    #[inline(always)]
    pub(super) fn contains(&self, address: usize) -> bool {
        (self.start..self.end).contains(&address)
    }

    pub(super) fn capacity(&self) -> usize {
        self.end - self.start
    }

    /// The insides, for the owner; `None` when it is inside already.
    #[inline(always)]
    pub(super) fn enter(&self) -> Option<Entered<'_>> {
        if self.busy.replace(true) {
            self.nested.set(self.nested.get().wrapping_add(1));
            return None;
        }
        compiler_fence(Ordering::SeqCst);
        Some(Entered(self))
    }

    /// Counts from nothing for a new owner; what is in use stays.
    pub(super) fn begin(&self) {
        self.nested.set(0);
        if let Some(mut local) = self.enter() {
            local.counts = Counts { in_use: local.counts.in_use, ..Counts::default() };
            local.published = Counts::default();
            local.last = None;
        }
    }

    pub(super) fn stats(&self) -> ArenaStats {
        let nested = self.nested.get();
        let capacity = self.capacity();
        let Some(local) = self.enter() else {
            return ArenaStats { capacity, nested, ..ArenaStats::default() };
        };
        ArenaStats {
            capacity,
            nested,
            allocations: local.counts.allocations,
            in_use: local.counts.in_use,
            exhausted: local.counts.exhausted,
            reclaimed: local.counts.reclaimed,
            deferred: local.waiting,
            leaked: local.counts.leaked,
        }
    }
}

/// The owner's way in; the door opens again when this goes.
pub(super) struct Entered<'a>(&'a Arena);

impl Deref for Entered<'_> {
    type Target = Local;
    #[inline(always)]
    fn deref(&self) -> &Local {
        // SAFETY: there is one `Entered` at a time, only the owner makes it, and it is not sent.
        unsafe { &*self.0.local.get() }
    }
}

impl DerefMut for Entered<'_> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Local {
        // SAFETY: as above.
        unsafe { &mut *self.0.local.get() }
    }
}

impl Drop for Entered<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.0.busy.set(false);
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) allocations: u64,
    pub(super) in_use: usize,
    pub(super) exhausted: u64,
    pub(super) reclaimed: u64,
    pub(super) leaked: u64,
}

/// What only the owner reaches.
pub(super) struct Local {
    heap: Heap,
    /// Blocks freed by others that are the owner's again and not in the heap yet.
    taken: Taken<AtomicUsize>,
    pub(super) counts: Counts,
    /// What the status block has been told.
    pub(super) published: Counts,
    pub(super) last: Option<Exhausted>,
    waiting: usize,
    deferred: [MaybeUninit<Deferred>; DEFERRED],
}

impl Local {
    /// A block, or null and a record of the failure.
    #[inline]
    pub(super) fn allocate(&mut self, layout: Layout, arena: &Arena) -> Option<NonNull<u8>> {
        if !self.taken.is_empty() || !arena.remote.is_empty() {
            self.reclaim(arena, RECLAIMED_AT_ONCE);
        }
        let block = self.heap.allocate(layout).or_else(|| self.allocate_in_need(layout, arena))?;
        self.counts.allocations = self.counts.allocations.wrapping_add(1);
        self.counts.in_use += layout.size();
        Some(block)
    }

    #[cold]
    fn allocate_in_need(&mut self, layout: Layout, arena: &Arena) -> Option<NonNull<u8>> {
        self.reclaim(arena, RECLAIMED_IN_NEED);
        let block = self.heap.allocate(layout);
        if block.is_none() {
            self.fail(layout.size(), arena);
        }
        block
    }

    #[cold]
    fn fail(&mut self, requested: usize, arena: &Arena) {
        self.counts.exhausted = self.counts.exhausted.wrapping_add(1);
        self.last = Some(Exhausted { requested, in_use: self.counts.in_use, capacity: arena.capacity() });
    }

    /// # Safety
    /// `block` is one of this arena's with this layout, and given up.
    #[inline]
    pub(super) unsafe fn free(&mut self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { self.heap.deallocate(block, layout.align()) };
        self.counts.in_use = self.counts.in_use.saturating_sub(layout.size());
    }

    /// A block of another size with the same bytes at its start, or `None` and the old one as it was; a
    /// failure is recorded where `record` says so.
    ///
    /// # Safety
    /// `block` is one of this arena's with this layout, and given up unless this returns `None`. `size`
    /// is not 0 and makes a layout with the old one's alignment.
    pub(super) unsafe fn reallocate(
        &mut self,
        block: NonNull<u8>,
        layout: Layout,
        size: usize,
        arena: &Arena,
        record: bool,
    ) -> Option<NonNull<u8>> {
        // SAFETY: the caller's promise about `size`.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: the caller's promise about `block`, also for the second try: a failed one changes
        // nothing.
        let moved = unsafe {
            self.heap.reallocate(block, new).or_else(|| {
                self.reclaim(arena, RECLAIMED_IN_NEED);
                self.heap.reallocate(block, new)
            })
        };
        if moved.is_some() {
            self.counts.in_use = self.counts.in_use.saturating_sub(layout.size()) + size;
        } else if record {
            self.fail(size, arena);
        }
        moved
    }

    /// Takes back at most this many blocks that others freed.
    #[cold]
    pub(super) fn reclaim(&mut self, arena: &Arena, most: usize) {
        for _ in 0..most {
            if self.taken.is_empty() {
                self.taken = arena.remote.take();
            }
            let Some((block, layout)) = self.taken.next() else { return };
            // SAFETY: it was pushed as a block of this arena, by who gave it up.
            unsafe { self.free(block, layout) };
            self.counts.reclaimed = self.counts.reclaimed.wrapping_add(1);
        }
    }

    /// Keeps a free for later, or leaks the block when too many wait.
    pub(super) fn defer(&mut self, free: Deferred) {
        if let Some(place) = self.deferred.get_mut(self.waiting) {
            place.write(free);
            self.waiting += 1;
        } else {
            self.counts.leaked = self.counts.leaked.wrapping_add(1);
        }
    }

    pub(super) fn next_deferred(&mut self) -> Option<Deferred> {
        let last = self.waiting.checked_sub(1)?;
        self.waiting = last;
        // SAFETY: the first `waiting` places are written, and this one is not among them any more.
        Some(unsafe { self.deferred[last].assume_init_read() })
    }
}
