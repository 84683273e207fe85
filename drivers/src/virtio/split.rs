//! Split rings (virtio 1.2, section 2.7).
//!
//! ```text
//! descriptors: 16 bytes an id | driver area: flags, index, an id an entry, event index
//!                             | device area: flags, index, id and length an entry, event index | shared words
//! ```
//!
//! Contract: as [`ring`](super::ring). The entries of the driver area that are not published are the list of
//! free ids: the device has read those of everything that it is done with. Where a device goes in order, and they
//! all do, no entry of it is ever written again: the id that an entry gets back is the one that it had.

use super::layout::{DESCRIPTOR_BYTES, INDIRECT, NEXT, WRITE, split};
use super::ring::{Cursor, Left, Ring, SHARED_BYTES, Shared, Used, Word};
use super::transport::RingPlaces;
use crate::pci::{DmaMemory, DmaSlice, SliceError, Wrapped};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Flags and index, before the entries.
const HEAD: usize = 4;

/// A ring and its positions.
#[derive(Debug)]
pub(super) struct Split {
    /// Two words a descriptor: address; length, flags and next.
    descriptors: DmaSlice<AtomicU64>,
    /// Flags, index.
    driver: DmaSlice<AtomicU16>,
    ids: DmaSlice<AtomicU16>,
    used_event: DmaSlice<AtomicU16>,
    /// Flags, index.
    device: DmaSlice<AtomicU16>,
    /// Two words an entry: id, length.
    used: DmaSlice<AtomicU32>,
    avail_event: DmaSlice<AtomicU16>,
    shared: Shared,
    mask: u32,
    taken: u32,
    posted: u32,
    event_index: bool,
    corrupt: u64,
    /// The last impossible index that was counted.
    lie: Option<u16>,
}

struct Places {
    driver: usize,
    device: usize,
    shared: usize,
    end: usize,
}

const fn places(size: u16) -> Places {
    let size = size as usize;
    let driver = size * DESCRIPTOR_BYTES;
    // On lines of their own, since they have different writers.
    let device = (driver + HEAD + size * 2 + 2).next_multiple_of(64);
    let shared = (device + HEAD + size * 8 + 2).next_multiple_of(64);
    Places { driver, device, shared, end: shared + SHARED_BYTES }
}

impl Split {
    /// Bytes of DMA memory that a ring takes.
    pub(super) const fn bytes(size: u16) -> usize {
        places(size).end
    }

    /// Lays an empty ring out in zeroed memory. `receive` is the length of all buffers of a ring that
    /// receives.
    pub(super) fn new(
        memory: &Arc<dyn DmaMemory>,
        size: u16,
        event_index: bool,
        receive: Option<u32>,
    ) -> Result<Self, SliceError> {
        let at = places(size);
        let entries = usize::from(size);
        let ring = Self {
            descriptors: DmaSlice::new(memory, 0, entries * 2)?,
            driver: DmaSlice::new(memory, at.driver, 2)?,
            ids: DmaSlice::new(memory, at.driver + HEAD, entries)?,
            used_event: DmaSlice::new(memory, at.driver + HEAD + entries * 2, 1)?,
            device: DmaSlice::new(memory, at.device, 2)?,
            used: DmaSlice::new(memory, at.device + HEAD, entries * 2)?,
            avail_event: DmaSlice::new(memory, at.device + HEAD + entries * 8, 1)?,
            shared: Shared::new(memory, at.shared)?,
            mask: u32::from(size) - 1,
            taken: 0,
            posted: 0,
            event_index,
            corrupt: 0,
            lie: None,
        };
        for id in 0..size {
            ring.ids.wrapped(id.into()).store(id, Ordering::Relaxed);
            if let Some(len) = receive {
                let word = u64::from(len) | u64::from(WRITE) << 32;
                ring.descriptors.wrapped(usize::from(id) * 2 + 1).store(word, Ordering::Relaxed);
            }
        }
        // We poll: no interrupts. With an event index the flag is not used (2.7.10) and the vector that the
        // queue has not got must do; the index is as far away as it can be.
        let flags = if event_index { 0 } else { split::NO_INTERRUPT };
        ring.driver.wrapped(0).store(flags, Ordering::Relaxed);
        ring.used_event.wrapped(0).store(u16::MAX, Ordering::Relaxed);
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

    /// Forgets its positions.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        (self.taken, self.posted, self.corrupt, self.lie) = (0, 0, 0, None);
    }

    #[cold]
    fn lied(&mut self, index: u16) {
        if self.lie != Some(index) {
            self.lie = Some(index);
            self.corrupt += 1;
        }
    }
}

/// See [`Cursor`].
#[derive(Clone, Copy)]
pub(super) struct SplitCursor<'a> {
    descriptors: Wrapped<'a, AtomicU64>,
    ids: Wrapped<'a, AtomicU16>,
    used: Wrapped<'a, AtomicU32>,
    taken: u32,
    posted: u32,
    mask: u32,
}

impl SplitCursor<'_> {
    #[inline(always)]
    fn write(self, n: u16, address: u64, len: u32, flags: u16) {
        let at = usize::from(self.id(n)) * 2;
        self.descriptors.at(at).store(address, Ordering::Relaxed);
        let rest = u64::from(len) | u64::from(flags) << 32;
        self.descriptors.at(at + 1).store(rest, Ordering::Relaxed);
    }
}

impl Cursor for SplitCursor<'_> {
    #[inline(always)]
    fn used(self, n: u16) -> Used {
        let at = self.taken.wrapping_add(n.into()) as usize * 2;
        Used {
            id: self.used.at(at).load(Ordering::Relaxed),
            len: self.used.at(at + 1).load(Ordering::Relaxed),
        }
    }

    #[inline(always)]
    fn retire(self, n: u16, id: u32) {
        let entry = self.ids.at(self.taken.wrapping_add(n.into()) as usize);
        let id = (id & self.mask) as u16;
        // A line that is only read stays with both sides.
        if entry.load(Ordering::Relaxed) != id {
            entry.store(id, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn id(self, n: u16) -> u16 {
        let entry = self.ids.at(self.posted.wrapping_add(n.into()) as usize);
        entry.load(Ordering::Relaxed) & self.mask as u16
    }

    #[inline(always)]
    fn write_buffer(self, n: u16, address: u64) {
        // Length and flags are there since the ring was made.
        self.descriptors.at(usize::from(self.id(n)) * 2).store(address, Ordering::Relaxed);
    }

    #[inline(always)]
    fn write_packet(self, n: u16, address: u64, len: u32) {
        self.write(n, address, len, 0);
    }

    fn write_table(self, n: u16, address: u64, segments: u16) {
        self.write(n, address, u32::from(segments) * DESCRIPTOR_BYTES as u32, INDIRECT);
    }

    #[inline(always)]
    fn address(self, id: u32) -> u64 {
        self.descriptors.at(id as usize * 2).load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn segments(self, id: u32) -> u16 {
        let rest = self.descriptors.at(id as usize * 2 + 1).load(Ordering::Relaxed);
        let table = (rest >> 32) as u16 & INDIRECT != 0;
        if table { (rest as u32 / DESCRIPTOR_BYTES as u32) as u16 } else { 0 }
    }
}

impl Ring for Split {
    type Cursor<'a> = SplitCursor<'a>;

    #[inline(always)]
    fn cursor(&self) -> SplitCursor<'_> {
        SplitCursor {
            descriptors: self.descriptors.by_value(),
            ids: self.ids.by_value(),
            used: self.used.by_value(),
            taken: self.taken,
            posted: self.posted,
            mask: self.mask,
        }
    }

    fn size(&self) -> u16 {
        (self.mask + 1) as u16
    }

    #[inline(always)]
    fn ready(&mut self, want: u16) -> u16 {
        // Acquire: what the device wrote before it moved its index is seen.
        let index = self.device.wrapped(1).load(Ordering::Acquire);
        let ready = index.wrapping_sub(self.taken as u16);
        if u32::from(ready) > self.posted.wrapping_sub(self.taken) {
            self.lied(index);
            return 0;
        }
        ready.min(want)
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

    fn link(len: u32, n: u16, last: bool) -> u64 {
        let next = if last { 0 } else { u64::from(NEXT) << 32 | u64::from(n + 1) << 48 };
        u64::from(len) | next
    }

    #[inline(always)]
    fn position(&self) -> u32 {
        self.posted
    }

    #[inline(always)]
    fn publish(&mut self, n: u16) {
        self.posted = self.posted.wrapping_add(n.into());
        // Release: descriptors and packets are there before the index.
        self.driver.wrapped(1).store(self.posted as u16, Ordering::Release);
    }

    #[inline(always)]
    fn wants_doorbell(&self, n: u16) -> bool {
        // The index is out before we look whether the device sleeps (2.7.21.1).
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.avail_event.wrapped(0).load(Ordering::Relaxed);
            (self.posted as u16).wrapping_sub(event).wrapping_sub(1) < n
        } else {
            self.device.wrapped(0).load(Ordering::Relaxed) & split::NO_NOTIFY == 0
        }
    }

    fn publish_pair(&mut self, first: (u64, u32, u16), second: (u64, u32, u16)) {
        // The second borrows an id that is free and stays on the list.
        let cursor = self.cursor();
        for (n, (address, len, flags), link) in [(1, second, 0), (0, first, cursor.id(1))] {
            let more = if n == 0 { NEXT } else { 0 };
            cursor.write(n, address, len, flags | more);
            let rest = self.descriptors.wrapped(usize::from(cursor.id(n)) * 2 + 1);
            rest.store(rest.load(Ordering::Relaxed) | u64::from(link) << 48, Ordering::Relaxed);
        }
        self.publish(1);
    }

    fn take_pair(&mut self) -> bool {
        let done = self.ready(1) == 1;
        if done {
            let cursor = self.cursor();
            cursor.retire(0, cursor.used(0).id);
            self.consume(1);
        }
        done
    }

    #[inline(always)]
    fn corrupt(&self) -> u64 {
        self.corrupt
    }

    fn take_over(&mut self, journal: (u32, u32)) -> Left {
        self.taken = self.shared.get(Word::Taken) as u32;
        let index = self.driver.wrapped(1).load(Ordering::Acquire);
        // More than all can only be outstanding if the device has written here.
        let outstanding = u32::from(index.wrapping_sub(self.taken as u16)).min(self.mask + 1);
        self.posted = self.taken.wrapping_add(outstanding);
        let free = usize::from(self.free());
        let mut out = vec![true; usize::from(self.size())];
        let free_ids: Vec<u16> = (0..free as u16).map(|n| self.cursor().id(n)).collect();
        for id in &free_ids {
            out[usize::from(*id)] = false;
        }
        let (at, n) = journal;
        let unpublished = if at == self.posted { free.min(n as usize) } else { 0 };
        Left {
            outstanding: (0..self.size()).filter(|id| out[usize::from(*id)]).collect(),
            unpublished: free_ids[..unpublished].to_vec(),
        }
    }

    fn shared(&self) -> &Shared {
        &self.shared
    }
}
