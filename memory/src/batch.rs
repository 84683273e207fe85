//! The batch: a fixed-capacity array of frames that moves through a worker's loop.
//!
//! Contract: frames keep their order; a packet in several frames
//! ([`FrameFlags::MORE`](crate::FrameFlags)) lies in one batch, its frames side by side. No
//! operation allocates, and a full batch gives the frame back instead of losing it.
#![allow(unsafe_code, reason = "frames move in bulk; see each block")]

use crate::frame::Frame;
use crate::starts::Starts;
use std::mem::MaybeUninit;

/// Frames a batch can hold.
pub const BATCH: usize = 64;

/// Up to [`BATCH`] frames.
///
/// Dropping a batch that is not empty leaks its frames (see [`Frame`]); give them to a
/// [`FrameCache`](crate::FrameCache) first.
#[must_use]
pub struct Batch {
    len: usize,
    frames: [MaybeUninit<Frame>; BATCH],
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Batch {
    /// An empty batch.
    pub const fn new() -> Self {
        Self { len: 0, frames: [const { MaybeUninit::uninit() }; BATCH] }
    }

    /// Frames held.
    #[inline(always)]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// True when no frame is held.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Frames that still fit.
    #[inline(always)]
    #[must_use]
    pub const fn room(&self) -> usize {
        BATCH - self.len
    }

    /// Adds a frame at the end.
    ///
    /// # Errors
    /// Gives the frame back when the batch is full.
    #[inline(always)]
    pub const fn push(&mut self, frame: Frame) -> Result<(), Frame> {
        if self.len == BATCH {
            return Err(frame);
        }
        self.frames[self.len] = MaybeUninit::new(frame);
        self.len += 1;
        Ok(())
    }

    /// Takes the last frame.
    #[inline(always)]
    pub const fn pop(&mut self) -> Option<Frame> {
        if self.len == 0 {
            return None;
        }
        self.len -= 1;
        // SAFETY: slots below the old `len` are initialised, and lowering `len` first makes this
        // slot vacant, so the value is read out exactly once.
        Some(unsafe { self.frames[self.len].assume_init_read() })
    }

    /// The frames, in order.
    #[inline(always)]
    pub const fn as_slice(&self) -> &[Frame] {
        // SAFETY: the first `len` slots are initialised (invariant of every method here) and
        // `MaybeUninit<Frame>` has the layout of `Frame`.
        unsafe { std::slice::from_raw_parts(self.frames.as_ptr().cast::<Frame>(), self.len) }
    }

    /// The frames, in order, to be changed in place.
    #[inline(always)]
    pub const fn as_mut_slice(&mut self) -> &mut [Frame] {
        // SAFETY: as in `as_slice`; `&mut self` makes the borrow unique.
        unsafe { std::slice::from_raw_parts_mut(self.frames.as_mut_ptr().cast::<Frame>(), self.len) }
    }

    /// Walks the frames.
    #[inline(always)]
    pub fn iter(&self) -> std::slice::Iter<'_, Frame> {
        self.as_slice().iter()
    }

    /// Walks the frames, to be changed in place.
    #[inline(always)]
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, Frame> {
        self.as_mut_slice().iter_mut()
    }

    /// Takes all frames out, in order. Frames that the iterator has not reached when it is dropped
    /// stay in the batch.
    #[inline(always)]
    pub fn drain(&mut self) -> Drain<'_> {
        // Vacant until the iterator is dropped: leaking it may leak frames, never duplicate one.
        let end = std::mem::take(&mut self.len);
        Drain { next: 0, end, batch: self }
    }

    /// Moves up to `n` frames from the front of `self` to the end of `to`; says how many. A packet
    /// in several frames is moved whole or not at all.
    pub fn move_to(&mut self, to: &mut Self, n: usize) -> usize {
        let n = self.whole_packets(n.min(to.room()));
        // SAFETY: `n <= self.len` and `n <= to.room()`, so both ranges are in bounds; two `&mut`
        // cannot overlap. The source slots are vacated by `forget_front` right after.
        unsafe {
            std::ptr::copy_nonoverlapping(self.frames.as_ptr(), to.frames.as_mut_ptr().add(to.len), n);
        }
        to.len += n;
        self.forget_front(n);
        n
    }

    /// The largest number of leading frames, at most `limit`, that ends on a packet boundary.
    #[inline(always)]
    #[must_use]
    pub const fn whole_packets(&self, limit: usize) -> usize {
        let mut n = if limit < self.len { limit } else { self.len };
        while n > 0 && self.as_slice()[n - 1].has_more() {
            n -= 1;
        }
        n
    }

    /// Vacates the first `n` slots and closes the gap. The caller has taken over what was in them.
    #[inline(always)]
    pub(crate) const fn forget_front(&mut self, n: usize) {
        debug_assert!(n <= self.len);
        let rest = self.len - n;
        if rest != 0 && n != 0 {
            let base = self.frames.as_mut_ptr();
            // SAFETY: `n + rest == len <= BATCH`: both ranges lie in the array; `copy` allows overlap.
            unsafe { std::ptr::copy(base.add(n), base, rest) };
        }
        self.len = rest;
    }

    /// Adds a frame of `len` bytes for each chunk, as far as there is room; says how many.
    #[inline(always)]
    pub(crate) fn extend(&mut self, chunks: &[u32], len: u16, starts: Starts) -> usize {
        let free = &mut self.frames[self.len..];
        let n = chunks.len().min(free.len());
        starts.frames(&chunks[..n], len, &mut free[..n]);
        self.len += n;
        n
    }

    /// The slots behind the last frame.
    #[inline(always)]
    pub(crate) fn vacant(&mut self) -> &mut [MaybeUninit<Frame>] {
        &mut self.frames[self.len..]
    }

    /// Counts `n` more frames.
    ///
    /// # Safety
    /// The first `n` of the [vacant](Self::vacant) slots were written.
    #[inline(always)]
    pub(crate) const unsafe fn occupy(&mut self, n: usize) {
        self.len += n;
    }

    /// Bytes of all frames together.
    #[inline(always)]
    #[must_use]
    pub fn bytes(&self) -> u64 {
        // At most 64 times 65535: a narrow sum is exact.
        u64::from(self.iter().map(|frame| u32::from(frame.len())).sum::<u32>())
    }
}

/// See [`Batch::drain`].
pub struct Drain<'a> {
    next: usize,
    end: usize,
    batch: &'a mut Batch,
}

impl Iterator for Drain<'_> {
    type Item = Frame;

    #[inline(always)]
    fn next(&mut self) -> Option<Frame> {
        if self.next == self.end {
            return None;
        }
        // SAFETY: `next < end`, the batch's old length, so the slot is initialised; `next` moves
        // past it, and `Drop` gives only the slots from `next` on back to the batch, so it is read
        // out once.
        let frame = unsafe { self.batch.frames[self.next].assume_init_read() };
        self.next += 1;
        Some(frame)
    }

    #[inline(always)]
    fn size_hint(&self) -> (usize, Option<usize>) {
        let n = self.end - self.next;
        (n, Some(n))
    }
}

impl Drop for Drain<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.batch.len = self.end;
        self.batch.forget_front(self.next);
    }
}
