//! What is where after a worker died, and the proof that no frame is missing.
//!
//! Contract: the owner map and the rings are both evidence; neither is trusted alone.
//!
//! | the chunk is | owner byte says | it goes to |
//! |---|---|---|
//! | in a ring, published | worker or this custody | the ring (the byte is corrected) |
//! | in a slot that the journal names, not published | worker or this custody | the worker |
//! | nowhere | the worker | the worker: it was free, in a batch or in the app |
//! | nowhere | a custody | the kernel, the device or the peer still has it: it comes back through the ring |
//! | in a ring | anybody else | nobody: the entry is a lie, counted here, refused when it is taken |
//!
//! A recovery is: make a [`Survey`] for the worker's cache, show it to every queue of the worker,
//! then [`Survey::finish`].

use crate::cache::FrameCache;
use crate::pool::Pool;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One recovery of one worker's frames. Collects evidence; nothing changes before [`Survey::finish`].
#[derive(Debug)]
pub struct Survey {
    pool: Arc<Pool>,
    worker: u8,
    /// By chunk: whom the owner byte shall name, once a ring has shown where the chunk is.
    sightings: Vec<Option<u8>>,
    report: Recovered,
}

/// What a recovery found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Frames that the worker has again.
    pub free: u32,
    /// Frames found in rings, where they stay.
    pub in_rings: u32,
    /// Frames taken back from slots that were written but not published.
    pub unpublished: u32,
    /// Ring entries that named no chunk, a chunk of somebody else, or one that was found before.
    pub lies: u32,
}

impl Survey {
    /// Starts a recovery for the worker that `cache` belonged to.
    #[must_use]
    pub fn new(cache: &FrameCache) -> Self {
        let pool = Arc::clone(cache.pool());
        Self {
            worker: cache.id(),
            sightings: vec![None; pool.chunks() as usize],
            pool,
            report: Recovered::default(),
        }
    }

    /// A published ring entry names `address`.
    pub fn in_ring(&mut self, custody: u8, address: u64) {
        if self.sight(custody, address, custody) {
            self.report.in_rings += 1;
        }
    }

    /// A slot that was written but not published names `address`.
    pub fn unpublished(&mut self, custody: u8, address: u64) {
        if self.sight(custody, address, self.worker) {
            self.report.unpublished += 1;
        }
    }

    fn sight(&mut self, custody: u8, address: u64, belongs_to: u8) -> bool {
        let found = self.pool.chunk_of(address).filter(|&chunk| {
            let owner = self.pool.owner(chunk).load(Ordering::Acquire);
            self.sightings[chunk as usize].is_none() && (owner == custody || owner == self.worker)
        });
        match found {
            Some(chunk) => self.sightings[chunk as usize] = Some(belongs_to),
            None => self.report.lies += 1,
        }
        found.is_some()
    }

    /// Chunks that will be in `custody` when this survey is finished. Walks the owner map: cold.
    #[must_use]
    pub fn held(&self, custody: u8) -> usize {
        let owner = |chunk: u32| self.pool.owner(chunk).load(Ordering::Acquire);
        let whose = (0..).zip(&self.sightings).map(|(chunk, seen)| seen.unwrap_or_else(|| owner(chunk)));
        whose.filter(|id| *id == custody).count()
    }

    /// Corrects the owner map and rebuilds the free list from what is left to the worker.
    ///
    /// # Safety
    /// As [`FrameCache::rebuild`]; and every queue of the worker has been surveyed.
    #[allow(unsafe_code, reason = "passes the caller's promise on")]
    pub unsafe fn finish(mut self, cache: &mut FrameCache) -> Recovered {
        if cache.id() == self.worker && cache.pool().same_as(&self.pool) {
            for (chunk, belongs_to) in (0..).zip(&self.sightings) {
                let Some(belongs_to) = *belongs_to else { continue };
                let owner = self.pool.owner(chunk);
                if belongs_to == self.worker {
                    owner.store(self.worker, Ordering::Release);
                } else {
                    // Only from the dead worker: a live peer may have taken it from the ring by now.
                    let _ =
                        owner.compare_exchange(self.worker, belongs_to, Ordering::AcqRel, Ordering::Relaxed);
                }
            }
            // SAFETY: the caller promises what `rebuild` asks for.
            self.report.free = unsafe { cache.rebuild() };
        }
        self.report
    }
}

/// Are all frames where they should be?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Balance {
    /// Frames that the pool has.
    pub total: u32,
    /// Frames nobody was given.
    pub depot: u32,
    /// Frames on free lists and in batches, as their holders say.
    pub in_hand: u32,
    /// Frames in custody (rings, kernel, device, peer), by the owner map.
    pub in_custody: u32,
    /// Frames whose owner byte names a worker that does not have them: leaked.
    pub missing: i64,
}

impl Balance {
    /// Counts. `in_hand` pairs each worker's owner id with the frames that it holds: on its free
    /// list and in batches.
    #[must_use]
    pub fn of(pool: &Pool, in_hand: &[(u8, u32)]) -> Self {
        let census = pool.census();
        let owned: u32 = in_hand.iter().map(|(id, _)| census[usize::from(*id)]).sum();
        let held: u32 = in_hand.iter().map(|(_, n)| n).sum();
        Self {
            total: pool.chunks(),
            depot: census[0],
            in_hand: held,
            in_custody: pool.chunks() - census[0] - owned,
            missing: i64::from(owned) - i64::from(held),
        }
    }

    /// True when every frame is accounted for.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.missing == 0
    }
}
