//! The allocator that a program installs.
#![allow(unsafe_code, reason = "GlobalAlloc; see each block")]

use super::local::{Arena, Deferred};
use super::{is_mine, serving, table};
use std::alloc::{GlobalAlloc, Layout};
use std::ptr::{NonNull, null_mut};

/// A global allocator that serves isolated threads from their arenas and everybody else from `A`.
///
/// ```
/// use isoplane_isolation::arena::WorkerAlloc;
/// use std::alloc::System;
///
/// #[global_allocator]
/// static ALLOCATOR: WorkerAlloc<System> = WorkerAlloc::new(System);
/// ```
///
/// In a thread that is not isolated an allocation costs one read of a thread-local more than `A`'s, and a
/// free two loads.
///
/// # Safety
/// Frees that wait refer to the value, so one that is used by hand must live as long as its users do: put
/// it into a `static`, which `#[global_allocator]` does.
#[derive(Debug, Default)]
pub struct WorkerAlloc<A> {
    inner: A,
}

impl<A> WorkerAlloc<A> {
    /// Wraps an allocator.
    #[must_use]
    pub const fn new(inner: A) -> Self {
        Self { inner }
    }

    /// The wrapped allocator.
    pub const fn inner(&self) -> &A {
        &self.inner
    }
}

/// The block's address, or null: what a global allocator answers.
fn answer(block: Option<NonNull<u8>>) -> *mut u8 {
    block.map_or(null_mut(), NonNull::as_ptr)
}

/// # Safety
/// `block` is one of `home`'s with this layout, and given up.
unsafe fn give_back(home: &Arena, block: NonNull<u8>, layout: Layout) {
    if is_mine(home)
        && let Some(mut local) = home.enter()
    {
        // SAFETY: the caller's promise; the arena is this thread's.
        unsafe { local.free(block, layout) };
    } else {
        // Another thread's, or this one is inside it at the moment (it is in a signal handler).
        // SAFETY: the caller's promise; no arena hands out less than 16 bytes, aligned to 16.
        unsafe { home.remote.push(block, layout) };
    }
}

impl<A: GlobalAlloc> WorkerAlloc<A> {
    /// A block for `layout` with the first bytes of an old one, from `arena` or the wrapped allocator.
    ///
    /// # Safety
    /// `old` has `kept` bytes, `layout` is not of size 0 and has at least as many.
    unsafe fn copy(&self, arena: Option<&Arena>, old: NonNull<u8>, kept: usize, layout: Layout) -> *mut u8 {
        let new = match arena {
            Some(arena) => super::allocate(arena, layout),
            // SAFETY: the layout has a size.
            None => NonNull::new(unsafe { self.inner.alloc(layout) }),
        };
        if let Some(new) = new {
            // SAFETY: both have that many bytes, and a new block overlaps no old one.
            unsafe { new.copy_from_nonoverlapping(old, kept) };
        }
        answer(new)
    }

    /// Frees a block of the wrapped allocator, now or when the kernel may be entered.
    ///
    /// # Safety
    /// `block` is one of the wrapped allocator's with this layout, and given up.
    #[inline(always)]
    unsafe fn free_inner(&self, arena: Option<&Arena>, block: NonNull<u8>, layout: Layout) {
        match arena {
            // SAFETY: the caller's promise.
            None => unsafe { self.inner.dealloc(block.as_ptr(), layout) },
            // SAFETY: the caller's promise, and that of whoever made `self`.
            Some(arena) => super::defer(arena, unsafe { Deferred::new(&self.inner, block, layout) }),
        }
    }
}

// SAFETY: blocks come from the wrapped allocator or from an arena, which keep them apart and alive until
// they are given back, and which is told by the address; nothing here unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for WorkerAlloc<A> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match serving() {
            // SAFETY: the caller's promises are those that `A` asks for.
            None => unsafe { self.inner.alloc(layout) },
            Some(arena) => answer(super::allocate(arena, layout)),
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match serving() {
            // SAFETY: as above.
            None => unsafe { self.inner.alloc_zeroed(layout) },
            Some(arena) => {
                let block = super::allocate(arena, layout);
                if let Some(block) = block {
                    // SAFETY: a new block of that size.
                    unsafe { block.write_bytes(0, layout.size()) };
                }
                answer(block)
            }
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller frees a block, which is never null.
        let at = unsafe { NonNull::new_unchecked(block) };
        match table::find(block) {
            // SAFETY: not in an arena, so it is of the wrapped allocator.
            None => unsafe { self.free_inner(serving(), at, layout) },
            // SAFETY: the caller's promise, and the arena is the one that it is in.
            Some(home) => unsafe { give_back(home, at, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let arena = serving();
        // SAFETY: as in `dealloc`.
        let old = unsafe { NonNull::new_unchecked(block) };
        // SAFETY: the caller's promise about `size`.
        let new_layout = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        let kept = layout.size().min(size);
        // SAFETY: throughout, the caller's promises about the old block, which is given up only when
        // there is a new one; whose it is was told by its address.
        unsafe {
            match table::find(block) {
                None if arena.is_none() => self.inner.realloc(block, layout, size),
                None => {
                    let new = self.copy(arena, old, kept, new_layout);
                    if !new.is_null() {
                        self.free_inner(arena, old, layout);
                    }
                    new
                }
                Some(home) => {
                    if is_mine(home) {
                        let moved = super::reallocate(home, old, layout, size, arena.is_some());
                        // Outside isolation what does not fit the arena leaves it.
                        if moved.is_some() || arena.is_some() {
                            return answer(moved);
                        }
                    }
                    let new = self.copy(arena, old, kept, new_layout);
                    if !new.is_null() {
                        give_back(home, old, layout);
                    }
                    new
                }
            }
        }
    }
}
