//! Whose is this address? The arenas of the process, by their addresses.
//!
//! Contract: arenas are entered and never taken out, so an answer stays true; a look-up takes two loads
//! where there is no arena near the address, and at most [`ARENAS`] comparisons otherwise. A thread that
//! was handed a block sees the entry of its arena: that was made before the block.
#![allow(unsafe_code, reason = "arenas by address; see each block")]

use super::local::Arena;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// Most arenas of one process.
pub(super) const ARENAS: usize = 64;

static TABLE: [AtomicPtr<Arena>; ARENAS] = [const { AtomicPtr::new(std::ptr::null_mut()) }; ARENAS];
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// All blocks of all arenas are between these.
static LOW: AtomicUsize = AtomicUsize::new(usize::MAX);
static HIGH: AtomicUsize = AtomicUsize::new(0);

/// Enters an arena; false when there are too many.
pub(super) fn enter(arena: &'static Arena) -> bool {
    let free = |count: usize| (count < ARENAS).then_some(count + 1);
    let Ok(at) = COUNT.try_update(Ordering::AcqRel, Ordering::Acquire, free) else { return false };
    LOW.fetch_min(arena.start, Ordering::AcqRel);
    HIGH.fetch_max(arena.end, Ordering::AcqRel);
    TABLE[at].store(std::ptr::from_ref(arena).cast_mut(), Ordering::Release);
    true
}

/// All arenas.
pub(super) fn all() -> impl Iterator<Item = &'static Arena> {
    TABLE.iter().take(COUNT.load(Ordering::Acquire)).filter_map(|entry| {
        // SAFETY: what is entered is never unmapped, and shared references to it are all there are.
        NonNull::new(entry.load(Ordering::Acquire)).map(|arena| unsafe { arena.as_ref() })
    })
}

/// The arena that a block is in.
#[inline(always)]
pub(super) fn find(block: *const u8) -> Option<&'static Arena> {
    let address = block.addr();
    if address < LOW.load(Ordering::Relaxed) || address >= HIGH.load(Ordering::Relaxed) {
        return None;
    }
    all().find(|arena| arena.contains(address))
}
