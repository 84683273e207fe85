//! A worker's free frames.
//!
//! Contract: used by one worker, without atomics; the most recently returned frame comes out first,
//! because its lines are still in the cache. The list is private memory: when the worker dies it is
//! rebuilt from the pool's owner map ([`recovery`](crate::recovery)).
#![allow(unsafe_code, reason = "bulk moves between list and batch; see each block")]

use crate::batch::Batch;
use crate::frame::Frame;
use crate::pool::Pool;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Forks that lie between this process and the one that the first pool was made in.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Says that this process was just forked: caches that it has inherited hand out nothing any more, since
/// the parent has them too. [`FrameCache::adopt`] excepts the one that was made for this process.
pub fn forked() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Free frames of one worker; made by [`Pool::cache`](crate::Pool::cache).
#[derive(Debug)]
pub struct FrameCache {
    pool: Arc<Pool>,
    id: u8,
    /// The process generation that may use the list; see [`forked`].
    generation: u32,
    /// Chunk numbers; capacity is the whole pool, so putting a frame back never allocates.
    free: Vec<u32>,
}

impl FrameCache {
    pub(crate) fn empty(pool: Arc<Pool>, id: u8) -> Self {
        let free = Vec::with_capacity(pool.chunks() as usize);
        Self { pool, id, generation: GENERATION.load(Ordering::Relaxed), free }
    }

    /// The pool that the frames are of.
    #[inline(always)]
    #[must_use]
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Owner id, the index into [`Pool::census`](crate::Pool::census).
    #[inline(always)]
    #[must_use]
    pub const fn id(&self) -> u8 {
        self.id
    }

    /// Free frames.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "callers compare with what they need")]
    pub const fn len(&self) -> usize {
        self.free.len()
    }

    #[inline(always)]
    fn is_ours(&self) -> bool {
        self.generation == GENERATION.load(Ordering::Relaxed)
    }

    /// Takes over, in a forked process, a cache that was made for it.
    ///
    /// # Safety
    /// No other process uses the cache, or frames of its owner id, any more.
    pub unsafe fn adopt(&mut self) {
        self.generation = GENERATION.load(Ordering::Relaxed);
    }

    /// Takes a free frame: empty, at the pool's start offset.
    #[inline(always)]
    pub fn get(&mut self) -> Option<Frame> {
        if !self.is_ours() {
            return None;
        }
        let chunk = self.free.pop()?;
        Some(self.pool.frame_at(chunk, self.pool.start_offset(chunk), 0))
    }

    /// Gives a frame back. One of another pool is leaked there and counted by nobody here: ports and
    /// caches are checked to share a pool when they are wired together.
    #[inline(always)]
    pub fn put(&mut self, frame: Frame) {
        debug_assert!(self.pool.owns(&frame), "frame of another pool");
        if self.pool.owns(&frame) && self.free.len() < self.free.capacity() {
            self.free.push(frame.chunk());
        }
    }

    /// Adds up to `n` free frames of `len` bytes each to the end of `batch`; says how many.
    #[inline(always)]
    pub fn get_batch(&mut self, batch: &mut Batch, n: usize, len: u16) -> usize {
        let pool = &*self.pool;
        let len = len.min(pool.max_frame() as u16);
        let n = if self.is_ours() { n.min(self.free.len()).min(batch.room()) } else { 0 };
        // The last ones put back, since their lines are warm; among them the order does not matter.
        let from = self.free.len() - n;
        let starts = pool.starts();
        let got = batch.extend(&self.free[from..], len, starts);
        self.free.truncate(self.free.len() - got);
        got
    }

    /// Takes back all frames of a batch.
    #[inline(always)]
    pub fn put_batch(&mut self, batch: &mut Batch) {
        let n = batch.len();
        self.put_front(batch, n);
    }

    /// Takes back the first `n` frames of a batch.
    #[inline(always)]
    pub fn put_front(&mut self, batch: &mut Batch, n: usize) {
        let n = n.min(batch.len()).min(self.free.capacity() - self.free.len());
        let tag = self.pool.tag();
        let mut alien = 0;
        for (slot, frame) in self.free.spare_capacity_mut().iter_mut().zip(&batch.as_slice()[..n]) {
            slot.write(frame.chunk());
            alien |= frame.pool_tag() ^ tag;
        }
        if alien == 0 {
            // SAFETY: `n` is at most the spare capacity, and the loop has written as many slots.
            unsafe { self.free.set_len(self.free.len() + n) };
        } else {
            self.put_known(&batch.as_slice()[..n]);
        }
        batch.forget_front(n);
    }

    /// As `put_front`, for frames among which some are of another pool: those are leaked there.
    #[cold]
    fn put_known(&mut self, frames: &[Frame]) {
        debug_assert!(false, "frame of another pool");
        for frame in frames.iter().filter(|frame| self.pool.owns(frame)) {
            if self.free.len() < self.free.capacity() {
                self.free.push(frame.chunk());
            }
        }
    }

    /// The last `n` chunks put back, or as many as there are; none in a process that must not use them.
    #[inline(always)]
    pub(crate) fn top(&self, n: usize) -> &[u32] {
        let n = if self.is_ours() { n.min(self.free.len()) } else { 0 };
        &self.free[self.free.len() - n..]
    }

    /// Takes the last `n` chunks off the list: somebody else owns them now.
    #[inline(always)]
    pub(crate) fn forget_top(&mut self, n: usize) {
        self.free.truncate(self.free.len() - n);
    }

    /// The slots behind the last chunk.
    #[inline(always)]
    pub(crate) fn spare(&mut self) -> &mut [std::mem::MaybeUninit<u32>] {
        self.free.spare_capacity_mut()
    }

    /// Counts `n` more chunks.
    ///
    /// # Safety
    /// The first `n` of the [spare](Self::spare) slots were written, with chunks whose owner is this cache.
    #[inline(always)]
    pub(crate) unsafe fn occupy(&mut self, n: usize) {
        // SAFETY: the caller's promise; they are within the capacity.
        unsafe { self.free.set_len(self.free.len() + n) };
    }

    /// Frames that this worker owns, free or in its hands, by the owner map: cold.
    #[must_use]
    pub fn owned(&self) -> u32 {
        (0..self.pool.chunks()).filter(|c| self.pool.owner(*c).load(Ordering::Relaxed) == self.id).count()
            as u32
    }

    /// Takes up to `n` more frames from the pool's depot; says how many.
    pub fn draw(&mut self, n: u32) -> u32 {
        if !self.is_ours() {
            return 0;
        }
        let n = n.min((self.free.capacity() - self.free.len()) as u32);
        let drawn = self.pool.draw_for(self.id, n);
        self.free.extend_from_slice(&drawn);
        drawn.len() as u32
    }

    /// Ends the cache: every frame that is its worker's, on the list or leaked, goes to the depot and
    /// the owner id may be used again. Says how many. The worker must have no frame in its hands.
    ///
    /// # Safety
    /// No frame of this cache's owner id is alive in any process.
    pub unsafe fn retire(self) -> u32 {
        self.pool.retire_owner(self.id)
    }

    /// Throws the list away and takes every chunk whose owner byte is ours; says how many.
    ///
    /// # Safety
    /// No frame of this cache's owner id is alive in any process, but for those on the list itself:
    /// otherwise two handles to one chunk exist. That holds when the worker that had the frames is
    /// dead and [`Survey`](crate::Survey) has put those it found in rings back into custody.
    pub unsafe fn rebuild(&mut self) -> u32 {
        self.free.clear();
        for chunk in (0..self.pool.chunks()).rev() {
            if self.pool.owner(chunk).load(Ordering::Acquire) == self.id {
                self.free.push(chunk);
            }
        }
        self.free.len() as u32
    }
}
