//! Packed rings (virtio 1.2, section 2.8).
//!
//! ```text
//! descriptors: 16 bytes an entry, written by both sides | driver's events | device's events
//!                                          | address and segments an id | shared words
//! ```
//!
//! Contract: as [`ring`](super::ring). The id that the device leaves in a descriptor which it is done with is the
//! one that this descriptor gets next: so the descriptors that are not published are the list of free ids.
//! Where an entry's first descriptor was written it becomes available last, by one bit.

use super::layout::{DESCRIPTOR_BYTES, INDIRECT, NEXT, WRITE, packed};
use super::ring::{Cursor, Left, Ring, SHARED_BYTES, Shared, Used, Word};
use super::transport::RingPlaces;
use crate::pci::{DmaMemory, DmaSlice, SliceError, Wrapped};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

/// Where the fields are in the second word of a descriptor: length, id, flags.
const ID_SHIFT: u32 = 32;
const FLAGS_SHIFT: u32 = 48;
const AVAIL: u64 = (packed::AVAIL as u64) << FLAGS_SHIFT;
const USED: u64 = (packed::USED as u64) << FLAGS_SHIFT;
const BOTH: u64 = AVAIL | USED;
/// Where the number of segments is in the word of an id; the address is below.
const SEGMENTS_SHIFT: u32 = 56;
/// Addresses that fit such a word.
pub(super) const MOST_ADDRESS: u64 = (1 << SEGMENTS_SHIFT) - 1;

/// A ring and its positions.
#[derive(Debug)]
pub(super) struct Packed {
    /// Two words a descriptor: address; length, id and flags.
    descriptors: DmaSlice<AtomicU64>,
    /// Offset and wrap bit, flags: when the device shall interrupt.
    driver: DmaSlice<AtomicU16>,
    /// The same: when it wants doorbells.
    device: DmaSlice<AtomicU16>,
    buffers: DmaSlice<AtomicU64>,
    shared: Shared,
    mask: u32,
    /// The ring's size as a power of two.
    shift: u32,
    taken: u32,
    posted: u32,
    receive: u32,
}

struct Places {
    driver: usize,
    device: usize,
    buffers: usize,
    shared: usize,
    end: usize,
}

const fn places(size: u16) -> Places {
    let size = size as usize;
    // On lines of their own, since they have different writers.
    let driver = (size * DESCRIPTOR_BYTES).next_multiple_of(64);
    let device = driver + 64;
    let buffers = device + 64;
    let shared = (buffers + size * 8).next_multiple_of(64);
    Places { driver, device, buffers, shared, end: shared + SHARED_BYTES }
}

/// Is the wrap counter set at a position? It begins set, and flips where the ring begins again.
#[inline(always)]
const fn wraps(position: u32, shift: u32) -> bool {
    position >> shift & 1 == 0
}

/// The two flags of a descriptor that the device is done with. Those of one that is not yet available are the
/// others; of one that is, those with `AVAIL` flipped.
#[inline(always)]
const fn done(position: u32, shift: u32) -> u64 {
    if wraps(position, shift) { BOTH } else { 0 }
}

impl Packed {
    /// Bytes of DMA memory that a ring takes.
    pub(super) const fn bytes(size: u16) -> usize {
        places(size).end
    }

    /// Lays an empty ring out in zeroed memory. `receive` is the length of all buffers of a ring that
    /// receives.
    pub(super) fn new(
        memory: &Arc<dyn DmaMemory>,
        size: u16,
        receive: Option<u32>,
    ) -> Result<Self, SliceError> {
        let at = places(size);
        let entries = usize::from(size);
        let ring = Self {
            descriptors: DmaSlice::new(memory, 0, entries * 2)?,
            driver: DmaSlice::new(memory, at.driver, 2)?,
            device: DmaSlice::new(memory, at.device, 2)?,
            buffers: DmaSlice::new(memory, at.buffers, entries)?,
            shared: Shared::new(memory, at.shared)?,
            mask: u32::from(size) - 1,
            shift: u32::from(size).trailing_zeros(),
            taken: 0,
            posted: 0,
            receive: receive.unwrap_or(0),
        };
        for id in 0..size {
            let second = ring.descriptors.wrapped(usize::from(id) * 2 + 1);
            second.store(u64::from(id) << ID_SHIFT, Ordering::Relaxed);
        }
        // We poll: no interrupts.
        ring.driver.wrapped(1).store(packed::EVENTS_OFF, Ordering::Relaxed);
        Ok(ring)
    }

    /// For [`Transport::enable`](super::transport::Transport::enable).
    pub(super) fn places(&self) -> RingPlaces {
        RingPlaces {
            descriptors: self.descriptors.iova(),
            driver: self.driver.iova(),
            device: self.device.iova(),
        }
    }

    #[inline(always)]
    const fn wraps(&self, position: u32) -> bool {
        wraps(position, self.shift)
    }

    #[inline(always)]
    const fn done(&self, position: u32) -> u64 {
        done(position, self.shift)
    }

    #[inline(always)]
    fn second(&self, position: u32) -> &AtomicU64 {
        self.descriptors.wrapped(position as usize * 2 + 1)
    }

    #[inline(always)]
    fn flip(&self, position: u32) {
        let second = self.second(position);
        // Release: the entries behind it, buffers and packets are there before.
        second.store(second.load(Ordering::Relaxed) ^ AVAIL, Ordering::Release);
    }

    /// Forgets its positions.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        (self.taken, self.posted) = (0, 0);
    }
}

/// See [`Cursor`].
#[derive(Clone, Copy)]
pub(super) struct PackedCursor<'a> {
    descriptors: Wrapped<'a, AtomicU64>,
    buffers: Wrapped<'a, AtomicU64>,
    taken: u32,
    posted: u32,
    mask: u32,
    shift: u32,
    receive: u32,
}

impl PackedCursor<'_> {
    /// Writes the `n`th free descriptor; all but the first are available at once, since the device does not
    /// look past the first.
    #[inline(always)]
    fn write(self, n: u16, id: u16, address: u64, len: u32, flags: u16) {
        let position = self.posted.wrapping_add(n.into());
        let at = position as usize * 2;
        self.descriptors.at(at).store(address, Ordering::Relaxed);
        let mut both = done(position, self.shift) ^ BOTH;
        if n != 0 {
            both ^= AVAIL;
        }
        let fields = u64::from(len) | u64::from(id) << ID_SHIFT | u64::from(flags) << FLAGS_SHIFT;
        self.descriptors.at(at + 1).store(fields | both, Ordering::Relaxed);
    }

    #[inline(always)]
    fn note(self, id: u16, address: u64, segments: u16) {
        let word = address | u64::from(segments) << SEGMENTS_SHIFT;
        self.buffers.at(id.into()).store(word, Ordering::Relaxed);
    }
}

impl Cursor for PackedCursor<'_> {
    #[inline(always)]
    fn used(self, n: u16) -> Used {
        let at = self.taken.wrapping_add(n.into()) as usize * 2 + 1;
        let fields = self.descriptors.at(at).load(Ordering::Relaxed);
        Used { id: u32::from((fields >> ID_SHIFT) as u16), len: fields as u32 }
    }

    #[inline(always)]
    fn retire(self, _n: u16, _id: u32) {
        // The device has left the id in the descriptor.
    }

    #[inline(always)]
    fn id(self, n: u16) -> u16 {
        let at = self.posted.wrapping_add(n.into()) as usize * 2 + 1;
        (self.descriptors.at(at).load(Ordering::Relaxed) >> ID_SHIFT) as u16 & self.mask as u16
    }

    #[inline(always)]
    fn write_buffer(self, n: u16, address: u64) {
        let id = self.id(n);
        self.note(id, address, 0);
        self.write(n, id, address, self.receive, WRITE);
    }

    #[inline(always)]
    fn write_packet(self, n: u16, address: u64, len: u32) {
        let id = self.id(n);
        self.note(id, address, 0);
        self.write(n, id, address, len, 0);
    }

    fn write_table(self, n: u16, address: u64, segments: u16) {
        let id = self.id(n);
        self.note(id, address, segments);
        self.write(n, id, address, u32::from(segments) * DESCRIPTOR_BYTES as u32, INDIRECT);
    }

    #[inline(always)]
    fn address(self, id: u32) -> u64 {
        self.buffers.at(id as usize).load(Ordering::Relaxed) & MOST_ADDRESS
    }

    #[inline(always)]
    fn segments(self, id: u32) -> u16 {
        (self.buffers.at(id as usize).load(Ordering::Relaxed) >> SEGMENTS_SHIFT) as u16
    }
}

impl Ring for Packed {
    type Cursor<'a> = PackedCursor<'a>;

    #[inline(always)]
    fn cursor(&self) -> PackedCursor<'_> {
        PackedCursor {
            descriptors: self.descriptors.by_value(),
            buffers: self.buffers.by_value(),
            taken: self.taken,
            posted: self.posted,
            mask: self.mask,
            shift: self.shift,
            receive: self.receive,
        }
    }

    fn size(&self) -> u16 {
        (self.mask + 1) as u16
    }

    #[inline(always)]
    fn ready(&mut self, want: u16) -> u16 {
        let most = u32::from(want).min(self.posted.wrapping_sub(self.taken)) as u16;
        let mut ready = 0;
        while ready < most {
            let position = self.taken.wrapping_add(ready.into());
            // Acquire: what the device wrote before the flags is seen.
            if self.second(position).load(Ordering::Acquire) & BOTH != self.done(position) {
                break;
            }
            ready += 1;
        }
        ready
    }

    #[inline(always)]
    fn consume(&mut self, n: u16) {
        self.taken = self.taken.wrapping_add(n.into());
        self.shared.set(Word::Taken, self.taken.into());
    }

    #[inline(always)]
    fn free(&self) -> u16 {
        (self.mask + 1 - self.posted.wrapping_sub(self.taken)) as u16
    }

    /// Tables are arrays: nothing is linked (2.8.7).
    fn link(len: u32, _n: u16, _last: bool) -> u64 {
        len.into()
    }

    #[inline(always)]
    fn position(&self) -> u32 {
        self.posted
    }

    #[inline(always)]
    fn publish(&mut self, n: u16) {
        let first = self.posted;
        self.posted = self.posted.wrapping_add(n.into());
        // Before it is so, since a successor can finish what was begun but not know what was done.
        self.shared.set(Word::Posted, self.posted.into());
        self.flip(first);
    }

    #[inline(always)]
    fn wants_doorbell(&self, n: u16) -> bool {
        // The entries are out before we look whether the device sleeps (2.8.21.3.1).
        fence(Ordering::SeqCst);
        match self.device.wrapped(1).load(Ordering::Relaxed) {
            packed::EVENTS_OFF => false,
            packed::EVENTS_AT => {
                let word = self.device.wrapped(0).load(Ordering::Relaxed);
                let mut event = word & 0x7fff;
                if (word >> 15 != 0) != self.wraps(self.posted) {
                    event = event.wrapping_sub(self.size());
                }
                let next = (self.posted & self.mask) as u16;
                next.wrapping_sub(event).wrapping_sub(1) < n
            }
            _ => true,
        }
    }

    /// Two descriptors, with the id in both.
    fn publish_pair(&mut self, first: (u64, u32, u16), second: (u64, u32, u16)) {
        let cursor = self.cursor();
        let id = cursor.id(0);
        cursor.write(1, id, second.0, second.1, second.2);
        cursor.write(0, id, first.0, first.1, first.2 | NEXT);
        self.publish(2);
    }

    fn take_pair(&mut self) -> bool {
        let done = self.ready(1) == 1;
        if done {
            self.consume(2);
        }
        done
    }

    /// There are no positions from the device.
    #[inline(always)]
    fn corrupt(&self) -> u64 {
        0
    }

    fn take_over(&mut self, journal: (u32, u32)) -> Left {
        self.taken = self.shared.get(Word::Taken) as u32;
        let posted = self.shared.get(Word::Posted) as u32;
        // More than all can only be outstanding if the device has written here.
        let outstanding = posted.wrapping_sub(self.taken).min(self.mask + 1);
        self.posted = self.taken.wrapping_add(outstanding);
        let (at, n) = journal;
        if n != 0 && at.wrapping_add(n) == self.posted {
            // Noted as published: if the worker did not come so far, now it is.
            let flags = self.second(at).load(Ordering::Relaxed) & BOTH;
            if flags == self.done(at) ^ BOTH {
                self.flip(at);
            }
        }
        let free = u32::from(self.free());
        let unpublished = if at == self.posted { free.min(n) } else { 0 };
        for position in (0..free).map(|n| self.posted.wrapping_add(n)) {
            // What is published next must not be followed by what was written and not even noted.
            let second = self.second(position);
            let fields = second.load(Ordering::Relaxed) & !BOTH;
            second.store(fields | self.done(position) ^ BOTH, Ordering::Relaxed);
        }
        let free_ids: Vec<u16> = (0..free as u16).map(|n| self.cursor().id(n)).collect();
        let mut out = vec![true; usize::from(self.size())];
        for id in &free_ids {
            out[usize::from(*id)] = false;
        }
        Left {
            outstanding: (0..self.size()).filter(|id| out[usize::from(*id)]).collect(),
            unpublished: free_ids[..unpublished as usize].to_vec(),
        }
    }

    fn shared(&self) -> &Shared {
        &self.shared
    }
}
