//! The one ring: single producer, single consumer, over memory that somebody else may share.
//!
//! Frames, diagnostics and control messages travel in it, and so do the four rings of an AF_XDP
//! socket: the logic is here once, the memory is a [`RingMemory`].
//!
//! Contract: indices are free-running `u32` that wrap; the slot is the index modulo a power-of-two
//! capacity. The producer publishes with a release store after it has written the slots, the
//! consumer gives slots back with a release store after it has read them. What the other side's
//! index says is checked: more entries than slots is a lie, counts as corrupt, and reads as "nothing
//! there". Nothing blocks, allocates or panics.
#![allow(unsafe_code, reason = "slots in shared memory, see `mapped`")]

mod mapped;

pub use mapped::{HEADER_BYTES, Mapped, RingError, bytes_for, channel};

use crate::Pod;
use std::sync::atomic::Ordering;

/// Where a ring's two indices and its slots live. [`Mapped`] is the real one; tests have others
/// (plain memory, loom's model, memory that crashes).
///
/// Slot numbers passed in are always below `capacity`, which is a power of two that never changes.
pub trait RingMemory<T: Pod> {
    /// Number of slots, a power of two.
    fn capacity(&self) -> u32;
    /// Reads the producer's index.
    fn load_producer(&self, order: Ordering) -> u32;
    /// Writes the producer's index.
    fn store_producer(&self, index: u32, order: Ordering);
    /// Reads the consumer's index.
    fn load_consumer(&self, order: Ordering) -> u32;
    /// Writes the consumer's index.
    fn store_consumer(&self, index: u32, order: Ordering);
    /// Copies a slot out.
    fn read(&self, slot: u32) -> T;
    /// Writes a slot.
    fn write(&self, slot: u32, value: T);
}

/// The side that puts entries in.
///
/// Entries are written with [`Producer::write`] at an offset from the next free slot and become
/// visible together with [`Producer::publish`].
#[derive(Debug)]
pub struct Producer<T: Pod, M: RingMemory<T> = Mapped<T>> {
    memory: M,
    mask: u32,
    next: u32,
    consumer: u32,
    corrupt: u64,
    _entry: std::marker::PhantomData<fn(T)>,
}

impl<T: Pod, M: RingMemory<T>> Producer<T, M> {
    /// Takes the producing side over where the shared indices say it is. There must be one producer
    /// only; a second one corrupts entries, not memory safety.
    pub fn new(memory: M) -> Self {
        let mask = memory.capacity() - 1;
        let mut ring =
            Self { memory, mask, next: 0, consumer: 0, corrupt: 0, _entry: std::marker::PhantomData };
        ring.resync();
        ring
    }

    /// Reads both indices anew: after a fork, or when a predecessor in another process died.
    pub fn resync(&mut self) {
        self.next = self.memory.load_producer(Ordering::Acquire);
        // Full, until a look at the consumer's index says otherwise: that look checks it.
        self.consumer = self.next.wrapping_sub(self.capacity());
        let _ = self.refresh();
    }

    /// Number of slots.
    #[inline(always)]
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.mask + 1
    }

    /// Slots free for writing, at least `want` if there are that many. Looks at the consumer's index
    /// only when the last look does not suffice: that line belongs to somebody else.
    #[inline(always)]
    pub fn free(&mut self, want: u32) -> u32 {
        let free = self.capacity().wrapping_sub(self.next.wrapping_sub(self.consumer));
        if free >= want {
            return free;
        }
        self.refresh()
    }

    #[inline]
    fn refresh(&mut self) -> u32 {
        let consumer = self.memory.load_consumer(Ordering::Acquire);
        let used = self.next.wrapping_sub(consumer);
        if used > self.capacity() {
            self.corrupt += 1;
            return 0;
        }
        self.consumer = consumer;
        self.capacity() - used
    }

    /// Writes the entry `offset` slots after the last published one. The caller has made sure that
    /// `offset < self.free(..)`; otherwise an entry that the consumer may be reading is overwritten.
    #[inline(always)]
    pub fn write(&mut self, offset: u32, value: T) {
        self.memory.write(self.next.wrapping_add(offset) & self.mask, value);
    }

    /// Makes the next `n` entries visible.
    #[inline(always)]
    pub fn publish(&mut self, n: u32) {
        self.next = self.next.wrapping_add(n);
        self.memory.store_producer(self.next, Ordering::Release);
    }

    /// Writes and publishes one entry.
    ///
    /// # Errors
    /// Gives the value back when the ring is full.
    #[inline]
    pub fn push(&mut self, value: T) -> Result<(), T> {
        if self.free(1) == 0 {
            return Err(value);
        }
        self.write(0, value);
        self.publish(1);
        Ok(())
    }

    /// Index of the next entry to be written (free-running).
    #[inline(always)]
    #[must_use]
    pub const fn position(&self) -> u32 {
        self.next
    }

    /// Entries published that the consumer has not given back. `None` when its index is a lie.
    #[must_use]
    pub fn pending(&self) -> Option<u32> {
        let used = self.next.wrapping_sub(self.memory.load_consumer(Ordering::Acquire));
        (used <= self.capacity()).then_some(used)
    }

    /// How often the consumer's index was impossible.
    #[must_use]
    pub const fn corrupt(&self) -> u64 {
        self.corrupt
    }

    /// The memory below.
    pub const fn memory(&self) -> &M {
        &self.memory
    }
}

/// The side that takes entries out.
///
/// Entries are looked at with [`Consumer::read`] at an offset from the oldest and given back to the
/// producer together with [`Consumer::release`].
#[derive(Debug)]
pub struct Consumer<T: Pod, M: RingMemory<T> = Mapped<T>> {
    memory: M,
    mask: u32,
    next: u32,
    producer: u32,
    corrupt: u64,
    _entry: std::marker::PhantomData<fn() -> T>,
}

impl<T: Pod, M: RingMemory<T>> Consumer<T, M> {
    /// Takes the consuming side over where the shared indices say it is. There must be one consumer.
    pub fn new(memory: M) -> Self {
        let mask = memory.capacity() - 1;
        let mut ring =
            Self { memory, mask, next: 0, producer: 0, corrupt: 0, _entry: std::marker::PhantomData };
        ring.resync();
        ring
    }

    /// Reads our index anew: after a fork, or when a predecessor in another process died.
    pub fn resync(&mut self) {
        self.next = self.memory.load_consumer(Ordering::Acquire);
        self.producer = self.next;
    }

    /// Number of slots.
    #[inline(always)]
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.mask + 1
    }

    /// Entries to be read, at least `want` if there are that many.
    #[inline(always)]
    pub fn available(&mut self, want: u32) -> u32 {
        let known = self.producer.wrapping_sub(self.next);
        if known >= want {
            return known;
        }
        self.refresh()
    }

    #[inline]
    fn refresh(&mut self) -> u32 {
        let producer = self.memory.load_producer(Ordering::Acquire);
        let available = producer.wrapping_sub(self.next);
        if available > self.capacity() {
            self.corrupt += 1;
            return 0;
        }
        self.producer = producer;
        available
    }

    /// Copies the entry `offset` slots after the oldest. Meaningless, not harmful, at or past
    /// `self.available(..)`.
    #[inline(always)]
    pub fn read(&self, offset: u32) -> T {
        self.memory.read(self.next.wrapping_add(offset) & self.mask)
    }

    /// Gives the oldest `n` entries back to the producer.
    #[inline(always)]
    pub fn release(&mut self, n: u32) {
        self.next = self.next.wrapping_add(n);
        self.memory.store_consumer(self.next, Ordering::Release);
    }

    /// Takes the oldest entry.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.available(1) == 0 {
            return None;
        }
        let value = self.read(0);
        self.release(1);
        Some(value)
    }

    /// Index of the oldest entry (free-running).
    #[inline(always)]
    #[must_use]
    pub const fn position(&self) -> u32 {
        self.next
    }

    /// How often the producer's index was impossible.
    #[must_use]
    pub const fn corrupt(&self) -> u64 {
        self.corrupt
    }

    /// The memory below.
    pub const fn memory(&self) -> &M {
        &self.memory
    }
}
