//! Memory of a queue that the device, its worker, and the worker's successor share.
//!
//! ```text
//! RX descriptors | TX descriptors | places: address in the pool by RX descriptor | handover
//! ```
//!
//! Contract: a received descriptor has lost its buffer's address, so `places` keeps it; a TX descriptor keeps its
//! own. Positions run freely (they wrap at 2^32, not at the ring's size) and a queue's half writes them to the
//! handover once a batch, after what they publish: so whoever takes over from a dead worker finds every
//! frame between two positions. All of it is DMA memory, so what is read back is checked.

use super::layout::{DESCRIPTOR_BYTES, Descriptor};
use crate::pci::{DmaMemory, DmaSlice, SliceError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Descriptors of one direction.
#[derive(Debug)]
pub(super) struct Ring {
    words: DmaSlice<AtomicU64>,
    size: u32,
}

impl Ring {
    fn new(memory: &Arc<dyn DmaMemory>, offset: usize, size: u32) -> Result<Self, SliceError> {
        Ok(Self { words: DmaSlice::new(memory, offset, size as usize * 2)?, size })
    }

    /// Number of descriptors, a power of two.
    #[inline(always)]
    pub(super) const fn size(&self) -> u32 {
        self.size
    }

    #[inline(always)]
    pub(super) const fn mask(&self) -> u32 {
        self.size - 1
    }

    /// Most descriptors that may be with the device: with all of them, head and tail would be the same,
    /// which says that there are none.
    #[inline(always)]
    pub(super) const fn most(&self) -> u32 {
        self.size - 1
    }

    pub(super) fn iova(&self) -> u64 {
        self.words.iova()
    }

    /// The descriptor at a position.
    #[inline(always)]
    pub(super) fn at(&self, position: u32) -> &Descriptor {
        &self.words.as_chunks().0[(position & self.mask()) as usize]
    }

    /// `n` descriptors from a position on, in order: those up to the ring's end, and those from its start.
    #[inline(always)]
    pub(super) fn runs(&self, position: u32, n: usize) -> [&[Descriptor]; 2] {
        runs(self.words.as_chunks().0, position, n)
    }
}

/// `n` values of a ring from a position on. The length is a power of two and `n` at most that.
#[inline(always)]
pub(super) fn runs<T>(ring: &[T], position: u32, n: usize) -> [&[T]; 2] {
    let (before, from) = ring.split_at(position as usize & (ring.len() - 1));
    let first = n.min(from.len());
    [&from[..first], &before[..(n - first).min(before.len())]]
}

/// What a half leaves to its successor, by index. The two halves' words are on lines of their own.
#[derive(Debug, Clone, Copy)]
pub(super) enum Word {
    /// Next descriptor to be received.
    RxNext = 0,
    /// Where the next one will be posted.
    RxPosted = 1,
    /// Lies seen.
    RxBad = 2,
    TxPosted = 16,
    /// Oldest descriptor not reclaimed.
    TxClean = 17,
    TxBad = 18,
    /// Frames refused.
    TxRefused = 19,
}

const WORDS: usize = 32;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Handover {
    words: DmaSlice<AtomicU64>,
}

impl Handover {
    #[inline(always)]
    pub(super) fn set(&self, word: Word, value: u64) {
        // Release: what it publishes was written before.
        self.words[word as usize].store(value, Ordering::Release);
    }

    pub(super) fn get(&self, word: Word) -> u64 {
        self.words[word as usize].load(Ordering::Acquire)
    }

    /// A count, by whoever may have written it: never so large that counting on would overflow.
    pub(super) fn count(&self, word: Word) -> u64 {
        self.get(word).min(u64::MAX / 2)
    }

    /// Two positions as the predecessor left them; the same twice when they cannot be.
    pub(super) fn span(&self, from: Word, to: Word, most: u32) -> (u32, u32) {
        let (from, to) = (self.get(from) as u32, self.get(to) as u32);
        if to.wrapping_sub(from) > most { (to, to) } else { (from, to) }
    }
}

/// All of a queue's memory.
pub(super) struct QueueMemory {
    memory: Arc<dyn DmaMemory>,
    rx: u32,
    tx: u32,
}

impl QueueMemory {
    /// Bytes for rings of these sizes.
    pub(super) const fn bytes(rx: u32, tx: u32) -> usize {
        Self::handover_at(rx, tx) + WORDS * size_of::<u64>()
    }

    const fn places_at(rx: u32, tx: u32) -> usize {
        (rx + tx) as usize * DESCRIPTOR_BYTES
    }

    const fn handover_at(rx: u32, tx: u32) -> usize {
        // Both rings have at least 64 descriptors, so this is a multiple of 128.
        Self::places_at(rx, tx) + rx as usize * size_of::<u64>()
    }

    /// Lays a queue out in memory of at least [`QueueMemory::bytes`].
    pub(super) const fn new(memory: Arc<dyn DmaMemory>, rx: u32, tx: u32) -> Self {
        Self { memory, rx, tx }
    }

    pub(super) fn rx(&self) -> Result<Ring, SliceError> {
        Ring::new(&self.memory, 0, self.rx)
    }

    pub(super) fn tx(&self) -> Result<Ring, SliceError> {
        Ring::new(&self.memory, self.rx as usize * DESCRIPTOR_BYTES, self.tx)
    }

    pub(super) fn places(&self) -> Result<DmaSlice<AtomicU64>, SliceError> {
        DmaSlice::new(&self.memory, Self::places_at(self.rx, self.tx), self.rx as usize)
    }

    pub(super) fn handover(&self) -> Result<Handover, SliceError> {
        Ok(Handover { words: DmaSlice::new(&self.memory, Self::handover_at(self.rx, self.tx), WORDS)? })
    }
}
