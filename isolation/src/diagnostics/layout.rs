//! What lies in the shared memory of a channel.
//!
//! ```text
//! 0                128                                        512
//! | Head: counters | ring: indices (isoplane_memory::ring)    | slot 0 | slot 1 | ...
//!
//! slot     0        1       2       3       4         6        8        16
//! event    | EVENT  | flags | count | 0     | id      | used   | TSC    | fields ...
//! announce | ANNOUNCE| 0    | part  | parts | id      | used   | TSC    | bytes of the description
//! start    | START  | 0     | 0     | 0     | 0       | used   | TSC    | incarnation u64, CPU u64
//!
//! field    0        1        2
//! raw      | kind   | index  | 1, 8 or 16 bytes
//! text     | kind   | index  | length u16 | bytes
//! ```
//!
//! Contract: native byte order (both sides are processes of one program on one machine). `used` counts
//! from the slot's first byte and covers the header. The drainer takes nothing in here for granted.
#![allow(unsafe_code, reason = "counters in shared memory; see each block")]

use isoplane_memory::{Pod, Region, Zeroable};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bytes of one record.
pub const SLOT_BYTES: usize = 256;
/// Callsites that a worker may use in one incarnation; events of further ones are lost, and counted.
pub const CALLSITES: usize = 1024;
/// Fewest records that a ring may have: a callsite's announcement takes several at once.
pub const MIN_CAPACITY: u32 = 16;

/// Where the ring starts.
pub(super) const RING_AT: usize = 128;
/// Bytes of a slot's header.
pub(super) const HEADER: usize = 16;
/// Slots that one announcement takes at most.
pub(super) const PARTS: usize = 8;
/// Bytes of a callsite's description at most.
pub(super) const DESCRIPTION: usize = PARTS * (SLOT_BYTES - HEADER);
/// Fields of a callsite that are announced; values of further ones are cut off. `tracing`'s macros stop at
/// 32 fields.
pub(super) const FIELDS: usize = 64;

/// A record. Aligned to cache lines, so that a short one touches one line only.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Slot(pub(super) [u64; SLOT_BYTES / 8]);

const _: () = assert!(size_of::<Slot>() == SLOT_BYTES);
const _: () = assert!(MIN_CAPACITY as usize >= PARTS + 2, "start, announcement and event fit together");
const _: () = assert!((RING_AT + isoplane_memory::ring::HEADER_BYTES).is_multiple_of(64));

/// Kinds of records.
pub(super) mod record {
    pub(in super::super) const EVENT: u8 = 1;
    pub(in super::super) const ANNOUNCE: u8 = 2;
    pub(in super::super) const START: u8 = 3;
}

/// Kinds of fields.
pub(super) mod kind {
    pub(in super::super) const I64: u8 = 1;
    pub(in super::super) const U64: u8 = 2;
    pub(in super::super) const I128: u8 = 3;
    pub(in super::super) const U128: u8 = 4;
    pub(in super::super) const F64: u8 = 5;
    pub(in super::super) const BOOL: u8 = 6;
    /// A `str` value.
    pub(in super::super) const STR: u8 = 7;
    /// What `Debug` or `Display` made of a value.
    pub(in super::super) const TEXT: u8 = 8;
}

/// The record was cut: a text is not whole, or fields are missing.
pub(super) const TRUNCATED: u8 = 1;

/// A slot's first word.
#[inline(always)]
pub(super) const fn header(kind: u8, flags: u8, count: u8, parts: u8, id: u16, used: u16) -> u64 {
    let [i, d] = id.to_ne_bytes();
    let [u, v] = used.to_ne_bytes();
    u64::from_ne_bytes([kind, flags, count, parts, i, d, u, v])
}

/// Counters before the ring, written by the worker.
#[repr(C, align(128))]
pub(super) struct Counters {
    /// Number of the incarnation: how often a recorder was installed.
    pub(super) incarnation: AtomicU64,
    pub(super) recorded: AtomicU64,
    pub(super) full: AtomicU64,
    pub(super) callsites: AtomicU64,
    /// The only one that another thread may count in.
    pub(super) nested: AtomicU64,
}

const _: () = assert!(size_of::<Counters>() == RING_AT);

/// The counters of a channel, mapped while the value lives.
#[derive(Debug, Clone)]
pub(super) struct Head {
    counters: NonNull<Counters>,
    _region: Arc<Region>,
}

// SAFETY: only atomics are reached, in a region that the value keeps mapped.
unsafe impl Send for Head {}
// SAFETY: as above.
unsafe impl Sync for Head {}

impl Head {
    pub(super) fn of(region: &Arc<Region>) -> Option<Self> {
        let counters = region.slice::<[u64; RING_AT / 8]>(0, 1)?.cast();
        Some(Self { counters, _region: Arc::clone(region) })
    }

    #[inline(always)]
    pub(super) fn counters(&self) -> &Counters {
        // SAFETY: the region holds them at its start (checked by `of`), page-aligned, and is mapped while
        // this value lives; every bit pattern is valid, and only shared references to atomics are made.
        unsafe { self.counters.as_ref() }
    }
}
