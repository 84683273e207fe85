//! The header that the kernel has before a packet, and what worker and housekeeping share about a queue.
//!
//! ```text
//! lane | words, 1 KiB: posted | done | taken | lock, stopped | counters     (128 bytes each)
//!      | entries given: free frames (receive), packets (transmit)
//!      | entries done:  packets (receive), sent frames (transmit)
//! ```
//!
//! A lane is two rings that share their middle: each entry given becomes one entry done, in order, so one word, `done`,
//! is where the first ring was read up to and where the second was written up to. Whoever moves packets changes one
//! word, and dies before it or after it.
//!
//! Contract: laid out once, then only atomics and rings change it. Nothing in it is trusted.
#![allow(unsafe_code, reason = "words and rings in shared memory; see each block")]

use super::error::TapError;
use isoplane_memory::ring::{Consumer, Mapped, Producer, RingError};
use isoplane_memory::{Collector, Inbox, Lender, Outbox, Region};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// `struct virtio_net_hdr` (Linux 6.18, `include/uapi/linux/virtio_net.h`), in the machine's byte order, as the kernel
/// has it before each packet of a tap with `IFF_VNET_HDR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct VnetHeader {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    pub(super) hdr_len: u16,
    pub(super) gso_size: u16,
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
}

pub(super) const HEADER_BYTES: usize = size_of::<VnetHeader>();
const _: () = assert!(HEADER_BYTES == 10);

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum at `csum_start + csum_offset` is of the pseudo header alone.
pub(super) const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: the checksum has been verified.
pub(super) const DATA_VALID: u8 = 2;

/// An entry of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Entry {
    /// Address of the packet's first byte in this frame, in bytes from chunk 0.
    pub(super) address: u64,
    /// Bytes of the packet in this frame.
    pub(super) len: u16,
    /// `FrameFlags`.
    pub(super) flags: u16,
    /// For `TX_CHECKSUM`: as in `FrameMeta`.
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
}

const _: () = assert!(size_of::<Entry>() == 16);

const POSTED: usize = 0;
const DONE: usize = 128;
const TAKEN: usize = 256;
const LOCK: usize = 384;
const STOPPED: usize = 388;
const COUNTERS: usize = 512;
const WORDS_BYTES: usize = 1024;

/// What whoever moves packets counts, in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Count {
    /// Packets dropped: a header that makes no sense, or longer than the frames offered.
    Dropped,
    /// Frames that could not be sent.
    RefusedFrames,
    /// Their bytes.
    RefusedBytes,
    /// Entries that named no place of the pool, or packets without an end.
    Bad,
    /// Times that packets were moved, or could not be.
    Kicks,
    /// System calls that moved packets failed for good.
    Errors,
}

/// Bytes of a lane with `ring` entries.
pub(super) const fn lane_bytes(ring: u32) -> usize {
    WORDS_BYTES + 2 * ring as usize * size_of::<Entry>()
}

/// One direction of one queue. See the [module](self).
#[derive(Debug, Clone)]
pub(super) struct Lane {
    region: Arc<Region>,
    at: usize,
    ring: u32,
    words: NonNull<u8>,
}

// SAFETY: the pointer leads into the region that the value keeps mapped, where only atomics are used.
unsafe impl Send for Lane {}
// SAFETY: as above.
unsafe impl Sync for Lane {}

impl Lane {
    /// The lane at `at` bytes of a region that is all zeroes there. `ring` is a power of two.
    pub(super) fn new(region: &Arc<Region>, at: usize, ring: u32) -> Result<Self, TapError> {
        let space = RingError::Space { bytes: lane_bytes(ring), offset: at, region: region.len() };
        let words = region.slice::<u8>(at, lane_bytes(ring)).filter(|_| at.is_multiple_of(128));
        let words = words.ok_or(space)?;
        Ok(Self { region: Arc::clone(region), at, ring, words })
    }

    fn address<T>(&self, at: usize) -> NonNull<T> {
        // SAFETY: only called with offsets of words, which `new` found inside the region.
        unsafe { self.words.byte_add(at) }.cast()
    }

    #[inline(always)]
    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: inside the region, which `self` keeps mapped, and aligned, since lanes start at multiples of 128.
        unsafe { self.address::<AtomicU32>(at).as_ref() }
    }

    #[inline(always)]
    fn counter(&self, which: Count) -> &AtomicU64 {
        // SAFETY: as in `word`; counters lie at multiples of 8 inside the words.
        unsafe { self.address::<AtomicU64>(COUNTERS + 8 * which as usize).as_ref() }
    }

    /// Only whoever has the lock counts.
    pub(super) fn count(&self, which: Count, n: u64) {
        let counter = self.counter(which);
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    #[inline(always)]
    pub(super) fn counted(&self, which: Count) -> u64 {
        self.counter(which).load(Ordering::Relaxed)
    }

    /// Has the worker given entries that are not done?
    #[inline(always)]
    pub(super) fn has_work(&self) -> bool {
        self.word(POSTED).load(Ordering::Acquire) != self.word(DONE).load(Ordering::Acquire)
    }

    pub(super) fn lock(&self) -> &AtomicU32 {
        self.word(LOCK)
    }

    /// From now on nobody begins to move packets here.
    pub(super) fn stop(&self) {
        self.word(STOPPED).store(1, Ordering::Release);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.word(STOPPED).load(Ordering::Acquire) != 0
    }

    fn given(&self) -> Result<Mapped<Entry>, RingError> {
        self.mapped(POSTED, DONE, WORDS_BYTES)
    }

    fn done(&self) -> Result<Mapped<Entry>, RingError> {
        self.mapped(DONE, TAKEN, WORDS_BYTES + self.ring as usize * size_of::<Entry>())
    }

    fn mapped(&self, producer: usize, consumer: usize, slots: usize) -> Result<Mapped<Entry>, RingError> {
        let keep = Arc::clone(&self.region);
        let space =
            RingError::Space { bytes: lane_bytes(self.ring), offset: self.at, region: self.region.len() };
        let slots = self.region.slice::<Entry>(self.at + slots, self.ring as usize).ok_or(space)?;
        // SAFETY: the words are aligned and inside the region, `slots` was checked by the line above; the region stays
        // mapped while `keep` lives, and only atomics and volatile copies touch it.
        unsafe { Mapped::from_raw(self.address(producer), self.address(consumer), slots, self.ring, keep) }
    }

    /// The worker's ends: it gives entries, and takes those that are done.
    pub(super) fn worker(
        &self,
        lender: Lender,
        collector: Collector,
    ) -> Result<(Outbox<Entry>, Inbox<Entry>), RingError> {
        let given = Outbox::new(Producer::new(self.given()?), lender);
        Ok((given, Inbox::new(Consumer::new(self.done()?), collector)))
    }

    /// The ends of whoever moves packets.
    pub(super) fn mover(&self) -> Result<(Consumer<Entry>, Producer<Entry>), RingError> {
        Ok((Consumer::new(self.given()?), Producer::new(self.done()?)))
    }
}
