//! Many frames at once into custody and out of it: what a driver's hot path does, with the pool's geometry read
//! once a batch and not once a frame.
//!
//! Contract: each call does for every frame what the calls for one frame do ([`Lender::commit`],
//! [`Collector::release`], ...), checks included, and nothing else; closures are told the place of the entry
//! in the call.
#![allow(unsafe_code, reason = "owner bytes, handles and headers in bulk; see each block")]

use crate::batch::Batch;
use crate::cache::FrameCache;
use crate::custody::{Collector, Lender};
use crate::frame::Frame;
use crate::pool::{META_BYTES, Pool};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

/// A pool's owner bytes, by value.
#[derive(Clone, Copy)]
struct Owners {
    bytes: NonNull<AtomicU8>,
    chunks: u32,
    shift: u32,
}

impl Owners {
    #[inline(always)]
    const fn of(pool: &Pool) -> Self {
        Self { bytes: pool.owners(), chunks: pool.chunks(), shift: pool.chunk_shift() }
    }

    /// Chunk and owner byte of an address inside the pool.
    #[inline(always)]
    fn find(&self, address: u64) -> Option<(u32, &AtomicU8)> {
        let chunk = address >> self.shift;
        if chunk >= u64::from(self.chunks) {
            return None;
        }
        // SAFETY: the pool has one owner byte a chunk, and there is such a chunk; the caller has the pool.
        Some((chunk as u32, unsafe { self.bytes.add(chunk as usize).as_ref() }))
    }
}

impl Lender {
    /// Lends up to `n` free frames: writes the entry of each with `write` (place, address of the frame's start),
    /// notes them in the journal as entries from `position` on, and takes them into custody. Says how many; the
    /// caller publishes them.
    #[inline(always)]
    pub fn lend_free(
        &self,
        frames: &mut FrameCache,
        n: usize,
        position: u32,
        mut write: impl FnMut(usize, u64),
    ) -> usize {
        let pool = &**self.pool();
        if !frames.pool().same_as(pool) {
            return 0;
        }
        let (starts, shift, owners, id) = (pool.starts(), pool.chunk_shift(), pool.owners(), self.id());
        let chunks = frames.top(n);
        for (place, chunk) in chunks.iter().enumerate() {
            write(place, (u64::from(*chunk) << shift) + u64::from(starts.offset(*chunk)));
        }
        let n = chunks.len();
        self.journal(position, n as u32);
        for chunk in chunks {
            // SAFETY: what is on the list is a chunk of the cache's pool, which is this one.
            unsafe { owners.add(*chunk as usize).as_ref() }.store(id, Ordering::Release);
        }
        frames.forget_top(n);
        n
    }

    /// Writes `header` right before the packet of each of the first `n` frames, as
    /// [`Pool::prepend`] does, after `write` (place, frame, address of the header) has written its entry. Ends
    /// before the first frame that `write` wants no entry for, that has no room for the header, or that is of
    /// another pool; says how many went well.
    #[inline(always)]
    pub fn head_each<const N: usize>(
        &self,
        batch: &mut Batch,
        n: usize,
        header: &[u8; N],
        mut write: impl FnMut(usize, &Frame, u64) -> bool,
    ) -> usize {
        let pool = &**self.pool();
        let (base, shift, tag) = (pool.chunks_base(), pool.chunk_shift(), pool.tag());
        let mut done = 0;
        for frame in batch.as_mut_slice().iter_mut().take(n) {
            if frame.pool_tag() != tag || (frame.offset() as usize) < META_BYTES as usize + N {
                break;
            }
            let at = ((frame.chunk() as usize) << shift) + frame.offset() as usize - N;
            if !write(done, frame, at as u64) {
                break;
            }
            // SAFETY: as in `Pool::prepend`: the frame is of this pool, and its offset says that the `N` bytes
            // before the packet lie in its chunk, behind the metadata; it is the only handle.
            unsafe { base.add(at).cast::<[u8; N]>().write(*header) };
            done += 1;
        }
        done
    }

    /// Notes the first `n` frames of a batch in the journal, as `entries` entries from `position` on, and takes
    /// them into custody, which ends the handles. The caller has written the entries and publishes them.
    /// A frame of another pool is leaked there.
    #[inline(always)]
    pub fn lend_front(&self, batch: &mut Batch, n: usize, position: u32, entries: u32) {
        let pool = &**self.pool();
        let (owners, tag, id) = (pool.owners(), pool.tag(), self.id());
        self.journal(position, entries);
        let n = n.min(batch.len());
        for frame in &batch.as_slice()[..n] {
            debug_assert!(frame.pool_tag() == tag, "frame of another pool");
            if frame.pool_tag() == tag {
                // SAFETY: a frame with the pool's tag has a chunk of it.
                unsafe { owners.add(frame.chunk() as usize).as_ref() }.store(id, Ordering::Release);
            }
        }
        batch.forget_front(n);
    }
}

impl Collector {
    /// Takes up to `n` frames out of custody to the end of `batch`, as [`Collector::release`] does; `entry` gives
    /// address and length for each place. Says how many entries were lies. `n` is at most the room in `batch`.
    #[inline(always)]
    pub fn release_each(
        &self,
        frames: &FrameCache,
        batch: &mut Batch,
        n: usize,
        mut entry: impl FnMut(usize) -> (u64, u32),
    ) -> usize {
        let pool = &**self.pool();
        let (id, to, tag, bytes) = (self.id(), frames.id(), pool.tag(), pool.chunk_bytes());
        let owners = Owners::of(pool);
        let known = frames.pool().same_as(pool);
        let slots = batch.vacant();
        let n = if known { n.min(slots.len()) } else { 0 };
        let (mut taken, mut lies) = (0, 0);
        for place in 0..n {
            let (address, len) = entry(place);
            let offset = address as u32 & (bytes - 1);
            // That the length fits 16 bits follows: chunks have 64 KiB at most, and the offset is not 0.
            let fits = offset >= META_BYTES && u64::from(offset) + u64::from(len) <= u64::from(bytes);
            match owners.find(address).filter(|_| fits) {
                // Acquire: what the last owner wrote to the chunk before handing it over is seen.
                Some((chunk, owner)) if owner.load(Ordering::Acquire) == id => {
                    owner.store(to, Ordering::Relaxed);
                    // SAFETY: `taken` is at most `place`, which is less than the number of slots.
                    let slot = unsafe { slots.get_unchecked_mut(taken) };
                    slot.write(Frame::new(tag, chunk, offset as u16, len as u16));
                    taken += 1;
                }
                _ => lies += 1,
            }
        }
        // SAFETY: the first `taken` vacant slots were written.
        unsafe { batch.occupy(taken) };
        lies
    }

    /// Takes up to `n` empty frames out of custody straight to `frames`, as [`Collector::release_empty`] does;
    /// `entry` gives an address for each place. Says how many came; the others were lies.
    #[inline(always)]
    pub fn collect_each(
        &self,
        frames: &mut FrameCache,
        n: usize,
        mut entry: impl FnMut(usize) -> u64,
    ) -> usize {
        let pool = &**self.pool();
        let (id, to) = (self.id(), frames.id());
        let owners = Owners::of(pool);
        let known = frames.pool().same_as(pool);
        let spare = frames.spare();
        // There is room for the whole pool, so this cuts nothing off that is not a lie.
        let n = if known { n.min(spare.len()) } else { 0 };
        let mut taken = 0;
        for place in 0..n {
            match owners.find(entry(place)) {
                Some((chunk, owner)) if owner.load(Ordering::Acquire) == id => {
                    owner.store(to, Ordering::Relaxed);
                    // SAFETY: `taken` is at most `place`, which is less than the number of slots.
                    unsafe { spare.get_unchecked_mut(taken) }.write(chunk);
                    taken += 1;
                }
                _ => {}
            }
        }
        // SAFETY: the first `taken` spare slots were written.
        unsafe { frames.occupy(taken) };
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PoolConfig;
    use std::sync::Arc;

    fn set_up() -> (Arc<Pool>, FrameCache, Lender, Collector) {
        let pool = Pool::create(&PoolConfig::new("bulk", 64)).unwrap();
        let (lender, collector) = pool.custody().unwrap();
        (Arc::clone(&pool), pool.cache("bulk", 32).unwrap(), lender, collector)
    }

    #[test]
    fn free_frames_go_out_and_come_back_and_lies_do_not() {
        let (pool, mut frames, lender, collector) = set_up();
        let mut sent = Vec::new();
        assert_eq!(lender.lend_free(&mut frames, 40, 7, |place, address| sent.push((place, address))), 32);
        assert_eq!((frames.len(), lender.held(), lender.journaled()), (0, 32, (7, 32)));
        for (place, (n, address)) in sent.iter().enumerate() {
            let chunk = (address >> pool.chunk_shift()) as u32;
            assert_eq!((*n, (address & 2047) as u16), (place, pool.start_offset(chunk)));
        }
        let mut batch = Batch::new();
        let outside = u64::from(pool.chunks()) << pool.chunk_shift();
        let entries = [
            (sent[0].1, 100),
            (sent[0].1, 100),
            (outside + 100, 1),
            (u64::MAX, 1),
            (sent[1].1 & !2047, 10),
            (sent[1].1, 2048),
            (sent[1].1, u32::MAX),
            ((sent[1].1 & !2047) + 2048 - 10, 10),
        ];
        let lies = collector.release_each(&frames, &mut batch, entries.len(), |place| entries[place]);
        assert_eq!((batch.len(), lies), (2, 6));
        let spans: Vec<_> = batch.iter().map(|frame| (frame.offset(), frame.len())).collect();
        assert_eq!(spans, [((sent[0].1 & 2047) as u16, 100), (2038, 10)]);
        frames.put_batch(&mut batch);
        let got = collector.collect_each(&mut frames, sent.len(), |place| sent[place].1);
        assert_eq!((got, frames.len(), collector.held()), (30, 32, 0), "those two were free already");
        assert_eq!(frames.owned(), 32);
    }

    #[test]
    fn headed_frames_are_lent_up_to_the_first_that_cannot_be() {
        let (pool, mut frames, lender, collector) = set_up();
        let mut batch = Batch::new();
        frames.get_batch(&mut batch, 8, 4);
        let near = batch.as_mut_slice()[5].len();
        assert!(pool.respan(&mut batch.as_mut_slice()[5], META_BYTES as u16, near));
        let mut seen = Vec::new();
        let n = lender.head_each(&mut batch, 64, b"head", |place, frame, address| {
            seen.push((place, frame.chunk(), address));
            true
        });
        assert_eq!((n, seen.len()), (5, 5), "the sixth has no room");
        for ((_, chunk, address), frame) in seen.iter().zip(batch.iter_mut()) {
            assert_eq!((*chunk, address & 2047), (frame.chunk(), u64::from(frame.offset()) - 4));
            assert!(pool.grow_front(frame, 4));
            assert_eq!(&pool.bytes(frame)[..4], b"head");
        }
        assert_eq!(lender.head_each(&mut batch, 3, b"x", |place, _, _| place < 2), 2, "no entry wanted");
        lender.lend_front(&mut batch, 5, 3, 2);
        assert_eq!((batch.len(), lender.held(), lender.journaled()), (3, 5, (3, 2)));
        frames.put_batch(&mut batch);
        assert_eq!(collector.collect_each(&mut frames, 5, |place| seen[place].2), 5);
        assert_eq!(frames.len(), 32);
    }

    #[test]
    fn nothing_moves_between_pools() {
        let (_, mut frames, lender, _) = set_up();
        let (_, mut others, other_lender, other_collector) = set_up();
        assert_eq!(other_lender.lend_free(&mut frames, 4, 0, |_, _| ()), 0);
        let mut sent = Vec::new();
        other_lender.lend_free(&mut others, 4, 0, |_, address| sent.push(address));
        assert_eq!(other_collector.collect_each(&mut frames, 4, |place| sent[place]), 0);
        let mut batch = Batch::new();
        other_collector.release_each(&frames, &mut batch, 4, |place| (sent[place], 1));
        others.get_batch(&mut batch, 4, 4);
        assert_eq!(lender.head_each(&mut batch, 4, b"head", |_, _, _| true), 0);
        assert_eq!((batch.len(), frames.len(), others.len()), (4, 32, 24));
        others.put_batch(&mut batch);
    }
}
