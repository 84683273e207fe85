//! Ring memory in a [`Region`] or at addresses that the kernel gave us.

use super::{Consumer, Producer, RingMemory};
use crate::{Pod, Region, pool};
use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes before the slots of a ring of ours: magic and capacity, then each index on a cache-line pair
/// of its own (the adjacent-line prefetcher pulls lines in pairs).
pub const HEADER_BYTES: usize = 384;
const PRODUCER_AT: usize = 128;
const CONSUMER_AT: usize = 256;
const MAGIC: u32 = 0x4952_4e47; // "IRNG"

/// Why a ring could not be made or found in a region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RingError {
    /// The capacity is not a power of two between 1 and 2^31.
    #[error("a ring of {capacity} entries: take a power of two from 1 to 2147483648")]
    Capacity {
        /// What was asked for.
        capacity: u32,
    },
    /// The region ends before the ring does.
    #[error("a ring of {bytes} bytes at offset {offset} does not fit its region of {region} bytes")]
    Space {
        /// Bytes the ring takes.
        bytes: usize,
        /// Where it should start.
        offset: usize,
        /// Size of the region.
        region: usize,
    },
    /// There is no ring with these entries at that place.
    #[error("no ring of {entry}-byte entries at offset {offset}: wrong descriptor, offset or version")]
    NotARing {
        /// Size of one entry.
        entry: usize,
        /// Where it should start.
        offset: usize,
    },
}

/// Bytes that a ring of `capacity` entries of `T` takes.
#[must_use]
pub const fn bytes_for<T>(capacity: u32) -> usize {
    HEADER_BYTES + capacity as usize * size_of::<T>()
}

/// Ring memory at fixed addresses. One value serves one side.
#[derive(Debug)]
pub struct Mapped<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    slots: NonNull<T>,
    capacity: u32,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointers stay valid while `_keep` lives; indices are atomics, slots are `Pod` and are
// accessed volatile, so using the value from another thread is no different from another process
// doing so, which rings are made for.
unsafe impl<T: Pod> Send for Mapped<T> {}

impl<T: Pod> Mapped<T> {
    /// Ring memory at addresses given by somebody else, such as the kernel's AF_XDP rings.
    ///
    /// # Safety
    /// While `keep` lives, `producer` and `consumer` are valid and aligned for atomic access, and
    /// `slots` for `capacity` values of `T`; nobody makes Rust references to that memory.
    ///
    /// # Errors
    /// [`RingError::Capacity`] unless `capacity` is a power of two.
    pub unsafe fn from_raw(
        producer: NonNull<u32>,
        consumer: NonNull<u32>,
        slots: NonNull<T>,
        capacity: u32,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, RingError> {
        if !capacity.is_power_of_two() {
            return Err(RingError::Capacity { capacity });
        }
        Ok(Self { producer: producer.cast(), consumer: consumer.cast(), slots, capacity, _keep: keep })
    }

    /// Lays out an empty ring at `offset` of a region.
    ///
    /// # Errors
    /// See [`RingError`].
    pub fn create(region: &Arc<Region>, offset: usize, capacity: u32) -> Result<Self, RingError> {
        let memory = Self::at(region, offset, capacity)?;
        let head = Self::head(region, offset)?;
        // SAFETY: `head` spans HEADER_BYTES of the region (checked by `head`).
        unsafe {
            head.add(1).write_volatile(capacity);
            head.add(2).write_volatile(entry_size::<T>());
        }
        memory.store_producer(0, Ordering::Relaxed);
        memory.store_consumer(0, Ordering::Relaxed);
        // SAFETY: as above, and u32 is aligned; the release store makes the rest visible before it.
        unsafe { AtomicU32::from_ptr(head.as_ptr()) }.store(MAGIC, Ordering::Release);
        Ok(memory)
    }

    /// Finds a ring that somebody else laid out at `offset`.
    ///
    /// # Errors
    /// See [`RingError`].
    pub fn attach(region: &Arc<Region>, offset: usize) -> Result<Self, RingError> {
        let head = Self::head(region, offset)?;
        // SAFETY: `head` spans HEADER_BYTES of the region and is aligned.
        let (magic, capacity, entry) = unsafe {
            (
                AtomicU32::from_ptr(head.as_ptr()).load(Ordering::Acquire),
                head.add(1).read_volatile(),
                head.add(2).read_volatile(),
            )
        };
        if magic != MAGIC || entry != entry_size::<T>() {
            return Err(RingError::NotARing { entry: size_of::<T>(), offset });
        }
        Self::at(region, offset, capacity)
    }

    fn head(region: &Arc<Region>, offset: usize) -> Result<NonNull<u32>, RingError> {
        region
            .slice::<u32>(offset, HEADER_BYTES / 4)
            .filter(|_| offset.is_multiple_of(64))
            .ok_or(RingError::Space { bytes: HEADER_BYTES, offset, region: region.len() })
    }

    fn at(region: &Arc<Region>, offset: usize, capacity: u32) -> Result<Self, RingError> {
        if !capacity.is_power_of_two() {
            return Err(RingError::Capacity { capacity });
        }
        let head = Self::head(region, offset)?;
        // SAFETY: inside the mapping and aligned (`slice` has checked); a volatile copy.
        if region.slice::<u64>(0, 1).is_some_and(|magic| unsafe { magic.read_volatile() } == pool::MAGIC) {
            // A ring over a pool would change bytes that frames lend out.
            return Err(RingError::NotARing { entry: size_of::<T>(), offset });
        }
        let space = || RingError::Space { bytes: bytes_for::<T>(capacity), offset, region: region.len() };
        let slots = region.slice::<T>(offset + HEADER_BYTES, capacity as usize).ok_or_else(space)?;
        // SAFETY: both indices lie in the header, which `head` has checked; the region stays mapped
        // while `_keep` holds it, and only atomics and volatile copies touch it.
        unsafe {
            Self::from_raw(
                head.byte_add(PRODUCER_AT),
                head.byte_add(CONSUMER_AT),
                slots,
                capacity,
                Arc::clone(region) as _,
            )
        }
    }

    /// Address of a slot.
    #[inline(always)]
    fn slot(&self, slot: u32) -> NonNull<T> {
        // SAFETY: masking keeps the slot inside the `capacity` values that `from_raw` vouches for.
        unsafe { self.slots.add((slot & (self.capacity - 1)) as usize) }
    }

    /// A second handle on the same ring, for the other side or for somebody who only looks.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            producer: self.producer,
            consumer: self.consumer,
            slots: self.slots,
            capacity: self.capacity,
            _keep: Arc::clone(&self._keep),
        }
    }
}

const fn entry_size<T>() -> u32 {
    size_of::<T>() as u32
}

impl<T: Pod> RingMemory<T> for Mapped<T> {
    #[inline(always)]
    fn capacity(&self) -> u32 {
        self.capacity
    }
    #[inline(always)]
    fn load_producer(&self, order: Ordering) -> u32 {
        // SAFETY: valid while `_keep` lives (contract of `from_raw`).
        unsafe { self.producer.as_ref() }.load(order)
    }
    #[inline(always)]
    fn store_producer(&self, index: u32, order: Ordering) {
        // SAFETY: as in `load_producer`.
        unsafe { self.producer.as_ref() }.store(index, order);
    }
    #[inline(always)]
    fn load_consumer(&self, order: Ordering) -> u32 {
        // SAFETY: as in `load_producer`.
        unsafe { self.consumer.as_ref() }.load(order)
    }
    #[inline(always)]
    fn store_consumer(&self, index: u32, order: Ordering) {
        // SAFETY: as in `load_producer`.
        unsafe { self.consumer.as_ref() }.store(index, order);
    }
    #[inline(always)]
    fn read(&self, slot: u32) -> T {
        // SAFETY: masking keeps the slot inside the `capacity` values that `from_raw` vouches for;
        // any bit pattern is a `T`, and a volatile copy tolerates a writer that breaks the protocol.
        unsafe { self.slots.add((slot & (self.capacity - 1)) as usize).read_volatile() }
    }
    #[inline(always)]
    fn write(&self, slot: u32, value: T) {
        // SAFETY: as in `read`.
        unsafe { self.slots.add((slot & (self.capacity - 1)) as usize).write_volatile(value) };
    }
}

impl<T: Pod> Producer<T, Mapped<T>> {
    /// Address of the entry `offset` slots after the last published one, for an entry that is built in
    /// place because only a part of it is used. It holds what it held before, whatever that was.
    ///
    /// The address stays valid while the region is mapped. Until [`publish`](Producer::publish) the slot is
    /// the producer's if `offset < self.free(..)`; after that, and otherwise, the consumer may read it.
    #[inline(always)]
    pub fn slot(&mut self, offset: u32) -> NonNull<T> {
        self.memory.slot(self.next.wrapping_add(offset) & self.mask)
    }
}

/// Lays out a ring at `offset` of a region and gives both sides.
///
/// # Errors
/// See [`RingError`].
pub fn channel<T: Pod>(
    region: &Arc<Region>,
    offset: usize,
    capacity: u32,
) -> Result<(Producer<T>, Consumer<T>), RingError> {
    let memory = Mapped::create(region, offset, capacity)?;
    let other = memory.share();
    Ok((Producer::new(memory), Consumer::new(other)))
}
