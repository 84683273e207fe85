//! Memory that a device reads and writes, as slices of atomics.
//!
//! Contract: a slice keeps its memory alive and mapped for the device; it is inside the memory and aligned
//! (checked once, when it is made). Who may write what is between driver and device: a device that does not
//! keep to it changes values, which the driver checks.
#![allow(unsafe_code, reason = "the one place where DMA memory becomes references")]

use super::DmaMemory;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

mod sealed {
    pub trait Atomic {}
}

/// An atomic integer: what DMA memory may be seen as.
pub trait Shared: sealed::Atomic + Send + Sync + 'static {}

macro_rules! shared {
    ($($atomic:ty),*) => { $(impl sealed::Atomic for $atomic {} impl Shared for $atomic {})* };
}
shared!(AtomicU8, AtomicU16, AtomicU32, AtomicU64);

/// Why there is no such slice.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error(
    "{count} values of {size} bytes at offset {offset} of DMA memory of {bytes} bytes: they do not fit, are not \
     aligned, or are none"
)]
pub struct SliceError {
    /// Where they should start.
    pub offset: usize,
    /// How many there should be.
    pub count: usize,
    /// Bytes of each.
    pub size: usize,
    /// Bytes that there are.
    pub bytes: usize,
}

/// `[T]` in memory that a device shares.
pub struct DmaSlice<T> {
    start: NonNull<T>,
    count: usize,
    memory: Arc<dyn DmaMemory>,
}

// SAFETY: it is a shared reference to atomics in memory that `memory`, itself `Send` and `Sync`, keeps.
unsafe impl<T: Shared> Send for DmaSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for DmaSlice<T> {}

impl<T> Clone for DmaSlice<T> {
    fn clone(&self) -> Self {
        Self { start: self.start, count: self.count, memory: Arc::clone(&self.memory) }
    }
}

impl<T: Shared> DmaSlice<T> {
    /// `count` values at `offset`.
    ///
    /// # Errors
    /// [`SliceError`].
    pub fn new(memory: &Arc<dyn DmaMemory>, offset: usize, count: usize) -> Result<Self, SliceError> {
        let (size, bytes) = (size_of::<T>(), memory.bytes());
        let error = SliceError { offset, count, size, bytes };
        let end = count.checked_mul(size).and_then(|len| len.checked_add(offset)).ok_or(error)?;
        let at = memory.start().as_ptr().wrapping_add(offset).cast::<T>();
        if count == 0 || end > bytes || !at.is_aligned() {
            return Err(error);
        }
        let start = NonNull::new(at).ok_or(error)?;
        Ok(Self { start, count, memory: Arc::clone(memory) })
    }

    /// The value at `index`, modulo the number of values where that is a power of two: an element of a ring,
    /// without a branch. For other numbers it is some element.
    #[inline(always)]
    #[must_use]
    pub const fn wrapped(&self, index: usize) -> &T {
        // SAFETY: `new` has made sure that `count` is not 0, so what is masked with `count - 1` is less than
        // `count`, and as for `deref`.
        unsafe { self.start.add(index & (self.count - 1)).as_ref() }
    }

    /// The slice by value, for loops.
    #[inline(always)]
    #[must_use]
    pub const fn by_value(&self) -> Wrapped<'_, T> {
        Wrapped { start: self.start, mask: self.count - 1, _memory: PhantomData }
    }

    /// Where the device finds the first value.
    #[must_use]
    pub fn iova(&self) -> u64 {
        let offset = self.start.as_ptr() as usize - self.memory.start().as_ptr() as usize;
        self.memory.iova() + offset as u64
    }
}

/// A [`DmaSlice`] by value, for loops: what it is made of stays in registers.
pub struct Wrapped<'a, T> {
    start: NonNull<T>,
    mask: usize,
    _memory: PhantomData<&'a DmaSlice<T>>,
}

impl<T> Clone for Wrapped<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Wrapped<'_, T> {}

impl<'a, T: Shared> Wrapped<'a, T> {
    /// As [`DmaSlice::wrapped`].
    #[inline(always)]
    #[must_use]
    pub const fn at(self, index: usize) -> &'a T {
        // SAFETY: `mask` is the slice's number of values less one, so as in `DmaSlice::wrapped`; the slice, which
        // keeps the memory, is borrowed for `'a`.
        unsafe { self.start.add(index & self.mask).as_ref() }
    }
}

impl<T: Shared> Deref for DmaSlice<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `new` checked that `count` aligned values lie inside `memory`, which says (its trait is
        // unsafe to implement) that they stay mapped while it lives and are only ever accessed as atomics
        // or by a device; `T` is an atomic integer, for which every bit pattern is a value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T> std::fmt::Debug for DmaSlice<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaSlice").field("start", &self.start).field("count", &self.count).finish()
    }
}
