//! Custody: chunks that are lent to somebody who is not a worker - the kernel, a device, a peer.
//!
//! Contract: frames go in by the [`Lender`], which ends the handle, and come out by the one
//! [`Collector`], by address and only if the owner byte agrees. Since there is one collector for each
//! owner id, no lie that a ring tells can make two handles to one chunk.

use crate::cache::FrameCache;
use crate::frame::Frame;
use crate::pool::{META_BYTES, Pool};
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Both ends for an owner id; the pool vouches that there are no others in use.
pub(crate) fn open(pool: &Arc<Pool>, id: u8) -> Custody {
    let collector = Collector { id, pool: Arc::clone(pool), _not_sync: PhantomData };
    (Lender { id, pool: Arc::clone(pool) }, collector)
}

/// Ends a custody: what is still in it goes to the pool's depot, its owner id may be used again. Says
/// how many chunks that were. The kernel, device or peer must be done with them: socket closed,
/// device reset, peer gone.
///
/// The two ends must belong together; otherwise nothing happens.
pub fn end(lender: Lender, collector: Collector) -> u32 {
    if lender.id != collector.id || !lender.pool.same_as(&collector.pool) {
        return 0;
    }
    collector.pool.retire_owner(collector.id)
}

/// A new custodian's two ends: see [`Pool::custody`].
pub type Custody = (Lender, Collector);

/// The end of a custody that frames go into: one direction of a port queue takes them from a worker.
///
/// Not `Clone`. After a fork both processes have a copy; only one of them may use it (the dataplane's
/// zygote never does).
#[derive(Debug)]
pub struct Lender {
    id: u8,
    pool: Arc<Pool>,
}

/// The end of a custody that frames come out of, by address, and only if the owner byte says that
/// they are in it. Neither `Clone` nor `Sync`: two collectors at work could make two handles to one
/// chunk, since looking at an owner byte and changing it are two steps.
///
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<isoplane_memory::Collector>();
/// ```
#[derive(Debug)]
pub struct Collector {
    id: u8,
    pool: Arc<Pool>,
    _not_sync: PhantomData<Cell<()>>,
}

impl Lender {
    /// The pool.
    #[inline(always)]
    #[must_use]
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Owner id, the index into [`Pool::census`].
    #[inline(always)]
    #[must_use]
    pub const fn id(&self) -> u8 {
        self.id
    }

    /// Address of the frame's packet, in bytes from chunk 0. `None` for a frame of another pool.
    #[inline(always)]
    #[must_use]
    pub fn address(&self, frame: &Frame) -> Option<u64> {
        if !self.pool.owns(frame) {
            return None;
        }
        Some(((frame.chunk() as u64) << self.pool.chunk_shift()) + frame.offset() as u64)
    }

    /// Notes in shared memory that the entries from `position` on, `n` of them, are written but not
    /// yet published; recovery gives them back to the worker if it dies before they are.
    #[inline(always)]
    pub fn journal(&self, position: u32, n: u32) {
        self.pool.journal(self.id).store(u64::from(position) << 32 | u64::from(n), Ordering::Release);
    }

    /// The last note: position and number.
    #[must_use]
    pub fn journaled(&self) -> (u32, u32) {
        let word = self.pool.journal(self.id).load(Ordering::Acquire);
        ((word >> 32) as u32, word as u32)
    }

    /// Takes the frame into custody, which ends the handle.
    ///
    /// # Errors
    /// The frame, when it belongs to another pool.
    #[inline(always)]
    pub fn commit(&self, frame: Frame) -> Result<(), Frame> {
        if !self.pool.owns(&frame) {
            return Err(frame);
        }
        self.pool.owner(frame.chunk()).store(self.id, Ordering::Release);
        Ok(())
    }

    /// Frames in custody now. Walks the owner map: cold.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.pool.count(self.id)
    }
}

impl Collector {
    /// The pool.
    #[inline(always)]
    #[must_use]
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Owner id, the index into [`Pool::census`].
    #[inline(always)]
    #[must_use]
    pub const fn id(&self) -> u8 {
        self.id
    }

    /// Sends everything in custody to the pool's depot; says how many chunks. As for [`end`], the
    /// other side must be done with them.
    #[must_use]
    pub fn sweep(&self) -> u32 {
        self.pool.sweep(self.id)
    }

    /// Takes a frame out of custody into the worker that owns `cache`: the chunk that `address` lies
    /// in, with the packet at `address` and `len` bytes long.
    ///
    /// `None` when the address is outside the pool, the span leaves its chunk or touches the
    /// metadata, the chunk is not in this custody (a lie, a duplicate), or the cache is of another pool.
    #[inline(always)]
    pub fn release(&self, cache: &FrameCache, address: u64, len: u32) -> Option<Frame> {
        let offset = address as u32 & (self.pool.chunk_bytes() - 1);
        let chunk = self.pool.chunk_of(address)?;
        let end = u64::from(offset) + u64::from(len);
        if end > u64::from(self.pool.chunk_bytes()) || offset < META_BYTES || len > u32::from(u16::MAX) {
            return None;
        }
        self.take(cache, chunk).then(|| self.pool.frame_at(chunk, offset as u16, len as u16))
    }

    /// As [`Collector::release`], but wherever in the chunk `address` points: the frame comes back
    /// empty at the pool's own start offset. For completions, which carry no packet.
    #[inline(always)]
    pub fn release_empty(&self, cache: &FrameCache, address: u64) -> Option<Frame> {
        let chunk = self.pool.chunk_of(address)?;
        let start = self.pool.start_offset(chunk);
        self.take(cache, chunk).then(|| self.pool.frame_at(chunk, start, 0))
    }

    #[inline(always)]
    fn take(&self, cache: &FrameCache, chunk: u32) -> bool {
        let owner = self.pool.owner(chunk);
        // Acquire: what the last owner wrote to the chunk before handing it over is seen.
        if owner.load(Ordering::Acquire) != self.id || !cache.pool().same_as(&self.pool) {
            return false;
        }
        owner.store(cache.id(), Ordering::Relaxed);
        true
    }

    /// Puts a frame that was just released back into custody: its descriptor stays in the ring.
    pub(crate) fn put_back(&self, frame: Frame) {
        debug_assert!(self.pool.owns(&frame));
        self.pool.owner(frame.chunk()).store(self.id, Ordering::Release);
    }

    /// Frames in custody now. Walks the owner map: cold.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.pool.count(self.id)
    }
}
