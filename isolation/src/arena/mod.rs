//! Memory for an isolated thread: an arena that is there before it is needed.
//!
//! Contract: from arming on, what the thread allocates comes from its arena in constant time, without a
//! system call, a page fault or a lock; what does not fit **fails**, is counted and recorded, and is never
//! fetched from the kernel instead. All that takes a program which installs [`WorkerAlloc`] as its global
//! allocator and a thread that has called [`install`]; without either nothing changes.
//!
//! | who frees | a block of | and then |
//! |---|---|---|
//! | its owner | an arena | it is free at once |
//! | another thread | an arena | it goes on a stack of the arena; the owner takes a few back at each allocation, all of them on the slow path |
//! | an isolated thread | the wrapped allocator | the free waits for the next visit to the slow path or the end of isolation; where 1024 wait already, the block is leaked and counted |
//! | any other thread | the wrapped allocator | it is the wrapped allocator's matter |
//!
//! An arena's blocks outlive isolation, and the arena itself is never unmapped. It is the process's own:
//! a forked child has a copy that works but faults where it is written to, until the child calls
//! [`install`] itself, which ends that.
//!
//! Rust's collections abort the process when an allocation fails, `Box::new` and `Vec::push` among them.
//! Code that must live through an exhausted arena reserves with `try_reserve` and looks at
//! [`last_failure`].
#![allow(unsafe_code, reason = "mapping memory and the allocator's thread-locals; see each block")]

mod local;
mod remote;
mod table;
mod worker_alloc;

#[cfg(test)]
mod tests;

use crate::prepare::{Weakness, memory};
use crate::status::{Words, bump};
use local::{Arena, Deferred};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use std::alloc::Layout;
use std::cell::Cell;
use std::num::NonZeroUsize;
use std::ptr::{NonNull, null};
use std::sync::atomic::Ordering;
pub use worker_alloc::WorkerAlloc;

/// The smallest arena.
pub const LEAST: usize = 64 * 1024;
/// The largest arena.
pub const MOST: usize = 4 << 30;

const PAGE: usize = 4096;

thread_local! {
    // Constant and without destructors: reading them is one load, in a signal handler and in a thread
    // that is ending too.
    /// This thread's arena.
    static MINE: Cell<*const Arena> = const { Cell::new(null()) };
    /// The same while allocations come from it.
    static SERVING: Cell<*const Arena> = const { Cell::new(null()) };
    /// Where allocations and failures are to be seen at once.
    static STATUS: Cell<*const Words> = const { Cell::new(null()) };
}

/// Why a thread cannot have an arena.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// Too small or too large.
    #[error("an arena of {bytes} bytes is not to be had; ask for {LEAST} to {MOST}")]
    Size {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The thread has one.
    #[error(
        "this thread has an arena of {capacity} bytes already; release it first, or ask for enough at once"
    )]
    Installed {
        /// Its size.
        capacity: usize,
    },
    /// The process has too many.
    #[error(
        "this process has {} arenas already; release those of threads that end (arena::release)",
        table::ARENAS
    )]
    TooMany,
    /// The kernel gave no memory.
    #[error(
        "cannot map an arena of {bytes} bytes: {errno}; ask for less, or raise the limits (ulimit -v, memory.max)"
    )]
    Map {
        /// Bytes asked for.
        bytes: usize,
        /// Its answer.
        errno: Errno,
    },
}

/// An arena that a thread has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Installed {
    /// Bytes for blocks. Each block takes 16 bytes more than it has, in steps of 32, and the search for
    /// a place rounds up by at most 1/32.
    pub capacity: usize,
    /// The memory is there but could not be locked.
    pub weakness: Option<Weakness>,
}

/// A request that did not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the arena is exhausted: {requested} bytes were asked for with {in_use} of {capacity} in use; install a \
     larger one, or allocate less after arming"
)]
#[non_exhaustive]
pub struct Exhausted {
    /// Bytes asked for.
    pub requested: usize,
    /// Bytes in use then, as they were asked for.
    pub in_use: usize,
    /// Size of the arena in bytes.
    pub capacity: usize,
}

/// Counts of one arena, since it was installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ArenaStats {
    /// Its size in bytes.
    pub capacity: usize,
    /// Allocations that it served; a block that only changed its size is not one.
    pub allocations: u64,
    /// Bytes in use, as they were asked for.
    pub in_use: usize,
    /// Requests that did not fit.
    pub exhausted: u64,
    /// Blocks that other threads freed and that are taken back.
    pub reclaimed: u64,
    /// Frees of the wrapped allocator's blocks that wait.
    pub deferred: usize,
    /// Blocks of the wrapped allocator that were leaked, since too many waited.
    pub leaked: u64,
    /// Times that a signal handler wanted to allocate or free while the thread was inside the arena.
    /// Such an allocation fails, and a block of the wrapped allocator that it frees is leaked.
    pub nested: u64,
}

/// Gives the calling thread an arena, pre-faulted and locked. Nothing is served from it before the thread
/// is armed. To be called before that, and again in a forked child.
///
/// # Errors
/// [`ArenaError`]. That the memory could not be locked is no error but a weakness.
pub fn install(bytes: usize) -> Result<Installed, ArenaError> {
    if !(LEAST..=MOST).contains(&bytes) {
        return Err(ArenaError::Size { bytes });
    }
    let process = std::process::id();
    let arena = match mine() {
        Some(mine) if mine.process.get() == process => {
            return Err(ArenaError::Installed { capacity: mine.capacity() });
        }
        // The copy of a forked child: large enough, or left to the blocks that are in it.
        Some(copy) if copy.capacity() >= bytes => copy,
        Some(_) | None => match vacant(bytes) {
            Some(vacant) => vacant,
            None => map(bytes)?,
        },
    };
    let weakness = lock(arena);
    arena.process.set(process);
    arena.begin();
    MINE.set(arena);
    Ok(Installed { capacity: arena.capacity(), weakness })
}

/// Takes an arena that a thread released: large enough, and not so large that most of it is wasted.
fn vacant(bytes: usize) -> Option<&'static Arena> {
    let fits = bytes..2 * bytes + PAGE;
    table::all().filter(|arena| fits.contains(&arena.capacity())).find(|arena| {
        // Acquire: what the former owner did to it comes before.
        arena.owned.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    })
}

fn map(bytes: usize) -> Result<&'static Arena, ArenaError> {
    let length = (size_of::<Arena>() + bytes).next_multiple_of(PAGE);
    let failed = |errno| ArenaError::Map { bytes, errno };
    let size = NonZeroUsize::new(length).ok_or(ArenaError::Size { bytes })?;
    let (protection, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let mapping = unsafe { mmap_anonymous(None, size, protection, flags) }.map_err(failed)?;
    // SAFETY: it was just made for this, is zeroed, and is unmapped below only, where nobody knows it.
    let arena = unsafe { Arena::create(mapping.cast(), length - size_of::<Arena>()) };
    if table::enter(arena) {
        return Ok(arena);
    }
    // SAFETY: it is in no table and no thread-local, so this is its only user.
    let _ = unsafe { munmap(mapping, length) };
    Err(ArenaError::TooMany)
}

/// Makes every page of an arena the process's own and present, and locks it. Both change no contents:
/// other threads may be using blocks of an arena that was released.
fn lock(arena: &Arena) -> Option<Weakness> {
    let mapping = NonNull::from(arena).cast();
    let length = arena.end - mapping.addr().get();
    // Not known before Linux 5.14; there mlock alone does it, and what cannot be locked faults.
    // SAFETY: the mapping of an arena, which is never unmapped.
    let _ = unsafe { madvise(mapping, length, MmapAdvise::MADV_POPULATE_WRITE) };
    // SAFETY: as above.
    unsafe { mlock(mapping, length) }
        .err()
        .map(|errno| Weakness::MemoryNotLocked { errno, limit: memory::limit() })
}

/// Gives the calling thread's arena up, for a thread that ends; a later [`install`] takes it over. Blocks
/// that are in use stay valid. Does nothing where there is none, or while it is served from.
pub fn release() {
    if serving().is_some() {
        return;
    }
    settle();
    if let Some(arena) = mine() {
        MINE.set(null());
        // Release: the next owner sees all that this one did.
        arena.owned.store(false, Ordering::Release);
    }
}

/// Counts of the calling thread's arena; `None` where it has none.
#[must_use]
pub fn stats() -> Option<ArenaStats> {
    mine().map(Arena::stats)
}

/// The last request of the calling thread that did not fit its arena.
#[must_use]
pub fn last_failure() -> Option<Exhausted> {
    mine()?.enter()?.last
}

/// Whether the program's global allocator is a [`WorkerAlloc`], so that an arena is of any use. Found out by
/// allocating a block; `None` where the calling thread has no arena to see it in, or is isolated.
#[must_use]
pub fn is_global() -> Option<bool> {
    let arena = mine().filter(|_| serving().is_none())?;
    let layout = Layout::new::<[u64; 8]>();
    serve(true);
    // SAFETY: the layout has a size.
    let block = unsafe { std::alloc::alloc(layout) };
    serve(false);
    let found = arena.contains(std::hint::black_box(block).addr());
    if !block.is_null() {
        // SAFETY: just allocated with that layout.
        unsafe { std::alloc::dealloc(block, layout) };
    }
    Some(found)
}

/// Whether allocations of the calling thread come from its arena from here on, or from the wrapped
/// allocator. Async-signal-safe.
pub(crate) fn serve(on: bool) {
    SERVING.set(if on { MINE.get() } else { null() });
}

/// Does the frees that waited, and takes back what other threads freed. For when the thread may enter the
/// kernel; does nothing while the arena is served from.
pub(crate) fn settle() {
    let Some(arena) = mine().filter(|_| serving().is_none()) else { return };
    // Not inside the arena while the wrapped allocator runs.
    while let Some(free) = arena.enter().and_then(|mut local| local.next_deferred()) {
        free.run();
    }
    if let Some(mut local) = arena.enter() {
        local.reclaim(arena, usize::MAX);
    }
}

/// Brings a status block up to date.
pub(crate) fn publish(words: &Words) {
    if let Some(mut local) = mine().and_then(Arena::enter) {
        tell(&mut local, words);
    }
}

/// Says where allocations and failures are to be seen at once, since a program may end by them; `None` is nowhere. Lasts
/// until it is said again, in this thread.
///
/// # Safety
/// The words stay mapped until another place or `None` is said.
pub(crate) unsafe fn set_status(words: Option<NonNull<Words>>) {
    STATUS.set(words.map_or(null(), |words| words.as_ptr().cast_const()));
}

/// Counts in a status block go on over restarts, so what is new is added.
fn tell(local: &mut local::Local, words: &Words) {
    let (now, before) = (local.counts, local.published);
    bump(&words.allocations, now.allocations.wrapping_sub(before.allocations));
    bump(&words.arena_exhausted, now.exhausted.wrapping_sub(before.exhausted));
    words.arena_in_use.store(now.in_use as u64, Ordering::Relaxed);
    local.published = now;
}

fn mine() -> Option<&'static Arena> {
    // SAFETY: set to arenas only, which are never unmapped.
    unsafe { MINE.get().as_ref() }
}

fn is_mine(arena: &Arena) -> bool {
    std::ptr::eq(MINE.get(), arena)
}

/// The arena to serve from, if the thread is isolated and has one.
#[inline(always)]
fn serving() -> Option<&'static Arena> {
    // SAFETY: as above.
    unsafe { SERVING.get().as_ref() }
}

/// A block of the calling thread's arena; it is counted, and a failure recorded.
#[inline]
fn allocate(arena: &Arena, layout: Layout) -> Option<NonNull<u8>> {
    let mut local = arena.enter()?;
    let block = local.allocate(layout, arena);
    tell_at_once(&mut local);
    block
}

/// As [`local::Local::reallocate`].
unsafe fn reallocate(
    arena: &Arena,
    block: NonNull<u8>,
    layout: Layout,
    size: usize,
    record: bool,
) -> Option<NonNull<u8>> {
    let mut local = arena.enter()?;
    // SAFETY: the caller's promises, which are the same.
    let moved = unsafe { local.reallocate(block, layout, size, arena, record) };
    if moved.is_some() || record {
        tell_at_once(&mut local);
    }
    moved
}

/// A worker may never visit the kernel, and a program may end by a failure, so neither is waited for. A few
/// plain stores.
#[inline]
fn tell_at_once(local: &mut local::Local) {
    // SAFETY: `set_status` has the promise that they are mapped.
    if let Some(words) = unsafe { STATUS.get().as_ref() } {
        tell(local, words);
    }
}

/// Keeps a free of the wrapped allocator for [`settle`].
fn defer(arena: &Arena, free: Deferred) {
    // Inside already: a signal handler frees; what it frees is leaked, and counted as nested.
    if let Some(mut local) = arena.enter() {
        local.defer(free);
    }
}
