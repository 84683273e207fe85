//! What split and packed rings have in common, and what a queue's two lives share.
//!
//! Contract: one descriptor a packet: a packet in several frames is one that names a table. So each entry has an
//! *id* from 0 to the ring's size, and each id names a buffer. Ids are handed out in the order in which
//! they came back; which are free, and which buffer an id has, is in the ring's own memory. A successor of a
//! dead worker finds there what is outstanding. The device may write to that memory too: ids are taken modulo
//! the ring's size, and addresses are checked by whoever makes frames of them. The worst that a lie does is
//! that a buffer is not found again until the queue is closed.
//!
//! Positions run freely, modulo 2^32.

use crate::pci::{DmaMemory, DmaSlice, SliceError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the device says about an entry that it is done with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Used {
    /// Which; unchecked.
    pub(super) id: u32,
    /// Bytes that it wrote; unchecked.
    pub(super) len: u32,
}

/// The entries of a ring from its positions on, by value: what loops need stays in registers.
pub(super) trait Cursor: Copy {
    /// The `n`th of those that [`Ring::ready`] has counted.
    fn used(self, n: u16) -> Used;
    /// The `n`th of those that were ready leaves this id free; modulo the size.
    fn retire(self, n: u16, id: u32);
    /// The id of the `n`th free entry.
    fn id(self, n: u16) -> u16;
    /// Writes the `n`th free entry: a buffer to receive into, of the length that the ring was made with.
    fn write_buffer(self, n: u16, address: u64);
    /// Writes the `n`th free entry: a packet to send.
    fn write_packet(self, n: u16, address: u64, len: u32);
    /// Writes the `n`th free entry: a table of `segments` descriptors.
    fn write_table(self, n: u16, address: u64, segments: u16);
    /// The address that was written for an id; modulo the size.
    fn address(self, id: u32) -> u64;
    /// How many descriptors the table of an id has; 0 when it has none.
    fn segments(self, id: u32) -> u16;
}

/// One virtqueue as the driver sees it.
pub(super) trait Ring: Send + std::fmt::Debug + 'static {
    /// Its entries.
    type Cursor<'a>: Cursor;
    /// The entries, until positions change.
    fn cursor(&self) -> Self::Cursor<'_>;
    /// Entries.
    fn size(&self) -> u16;
    /// Entries that the device is done with, at most `want`.
    fn ready(&mut self, want: u16) -> u16;
    /// Gives the first `n` of those that were ready back to the driver.
    fn consume(&mut self, n: u16);
    /// Entries that can be written.
    fn free(&self) -> u16;
    /// The second word of the `n`th descriptor of a table.
    fn link(len: u32, n: u16, last: bool) -> u64;
    /// Position of the first free entry, for the journal.
    fn position(&self) -> u32;
    /// Shows the first `n` free entries, which were written, to the device.
    fn publish(&mut self, n: u16);
    /// After [`Ring::publish`]: does the device want to hear of the last `n` entries?
    fn wants_doorbell(&self, n: u16) -> bool;
    /// Writes and shows an entry of two buffers, for a control queue: address, length and flags of each. There is
    /// never more than one in such a ring.
    fn publish_pair(&mut self, first: (u64, u32, u16), second: (u64, u32, u16));
    /// Takes that entry back when the device is done with it.
    fn take_pair(&mut self) -> bool;
    /// Positions or flags from the device that were impossible, so far.
    fn corrupt(&self) -> u64;
    /// After the worker died: takes positions over. `journal` is what was noted last: position and number.
    fn take_over(&mut self, journal: (u32, u32)) -> Left;
    /// Words that the queue's lives share.
    fn shared(&self) -> &Shared;
}

/// What a dead worker left in a ring, as ids.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// Published, and not consumed.
    pub(super) outstanding: Vec<u16>,
    /// Written, and not published.
    pub(super) unpublished: Vec<u16>,
}

/// A line of words behind a ring that its worker writes once a batch, and its successor and the port read.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    words: DmaSlice<AtomicU64>,
}

/// Bytes of [`Shared`].
pub(super) const SHARED_BYTES: usize = 64;

/// Which word.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    /// Position up to which entries were consumed.
    Taken = 0,
    /// Position up to which entries were published; packed rings only.
    Posted = 1,
    /// Lies of the device.
    Bad = 2,
    /// Doorbells rung.
    Doorbells = 3,
    /// Frames that could not be sent.
    Refused = 4,
}

impl Shared {
    pub(super) fn new(memory: &Arc<dyn DmaMemory>, at: usize) -> Result<Self, SliceError> {
        Ok(Self { words: DmaSlice::new(memory, at, SHARED_BYTES / 8)? })
    }

    #[inline(always)]
    pub(super) fn get(&self, word: Word) -> u64 {
        self.words.wrapped(word as usize).load(Ordering::Acquire)
    }

    /// A count, by whoever may have written it: never so large that counting on would overflow.
    pub(super) fn count(&self, word: Word) -> u64 {
        self.get(word).min(u64::MAX / 2)
    }

    #[inline(always)]
    pub(super) fn set(&self, word: Word, value: u64) {
        self.words.wrapped(word as usize).store(value, Ordering::Release);
    }

    /// One doorbell more.
    #[inline(always)]
    pub(super) fn count_doorbell(&self) {
        self.set(Word::Doorbells, self.get(Word::Doorbells).wrapping_add(1));
    }
}
