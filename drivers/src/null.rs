//! The null port: receive hands out frames of the worker's own, transmit takes them back.
//!
//! What is left when everything outside the worker is taken away, so its benchmark is that of the
//! loop itself; also the cheapest source and sink for tests.
//!
//! Contract: frames never leave the worker, so nothing here changes an owner byte or touches shared
//! memory. What was transmitted is held, as in a real ring, until it is reclaimed; the hold has a
//! fixed size and a full one leaves frames in the batch. A packet's bytes are whatever its chunk holds.

use crate::port::{Capabilities, LinkState, Port, PortStatistics, RxQueue, TxQueue};
use crate::queue::Queue;
use isoplane_memory::{BATCH, Batch, FrameCache, Pool, Survey};
use std::sync::Arc;

/// Batches that [`NullTx`] holds at most.
const HELD: usize = 8;

/// How to open a [`NullPort`].
#[derive(Debug, Clone)]
pub struct NullConfig {
    /// Name for messages and counters.
    pub name: String,
    /// Number of queues.
    pub queues: u16,
    /// Length of every frame that is received, in bytes.
    pub frame_len: u16,
    /// Frames that one `receive` gives at most: 1 to [`BATCH`]. Zero makes a port that only swallows.
    pub batch: usize,
}

impl NullConfig {
    /// One queue, 64-byte frames, whole batches.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), queues: 1, frame_len: 64, batch: BATCH }
    }
}

/// Why a [`NullPort`] could not be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NullError {
    /// The pool's frames are shorter than those the port shall hand out.
    #[error("null port {name:?}: frames of {len} bytes, but the pool's hold {max}; take a larger chunk")]
    FrameLength {
        /// The port's name.
        name: String,
        /// What was asked for.
        len: u16,
        /// What the pool gives.
        max: u32,
    },
    /// More frames at once than a batch holds.
    #[error("null port {name:?}: batches of {batch} frames; a batch holds at most {BATCH}")]
    Batch {
        /// The port's name.
        name: String,
        /// What was asked for.
        batch: usize,
    },
    /// No queue.
    #[error("null port {name:?}: it needs at least one queue")]
    NoQueue {
        /// The port's name.
        name: String,
    },
}

/// A port that is a source and a sink. See the [module](self).
#[derive(Debug)]
pub struct NullPort {
    name: String,
    pool: Arc<Pool>,
    queues: Vec<Option<Queue>>,
}

impl NullPort {
    /// Opens the port. Its frames are those of the cache that a call passes; `pool` is for the
    /// wiring check and the bounds.
    ///
    /// # Errors
    /// See [`NullError`].
    pub fn open(pool: &Arc<Pool>, config: &NullConfig) -> Result<Self, NullError> {
        let name = || config.name.clone();
        if u32::from(config.frame_len) > pool.max_frame() {
            return Err(NullError::FrameLength {
                name: name(),
                len: config.frame_len,
                max: pool.max_frame(),
            });
        }
        if config.batch > BATCH {
            return Err(NullError::Batch { name: name(), batch: config.batch });
        }
        if config.queues == 0 {
            return Err(NullError::NoQueue { name: name() });
        }
        let queue = |_| {
            let rx = NullRx { len: config.frame_len, batch: config.batch };
            Some(Queue { rx: rx.into(), tx: NullTx::new(pool).into() })
        };
        Ok(Self { name: name(), pool: Arc::clone(pool), queues: (0..config.queues).map(queue).collect() })
    }
}

impl Port for NullPort {
    fn name(&self) -> &str {
        &self.name
    }
    fn driver(&self) -> &'static str {
        "null"
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::MULTI_BUFFER | Capabilities::ZERO_COPY
    }
    fn mac(&self) -> Option<[u8; 6]> {
        None
    }
    fn max_frame(&self) -> u32 {
        self.pool.max_frame()
    }
    fn link(&self) -> LinkState {
        LinkState::Up
    }
    fn statistics(&self) -> PortStatistics {
        PortStatistics::default()
    }
    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }
    fn take_queue(&mut self, index: u16) -> Option<Queue> {
        self.queues.get_mut(usize::from(index))?.take()
    }
}

/// The source.
#[derive(Debug)]
pub struct NullRx {
    len: u16,
    batch: usize,
}

impl RxQueue for NullRx {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        frames.get_batch(batch, self.batch, self.len)
    }
    fn survey(&mut self, _survey: &mut Survey) {}
    fn stop(&mut self) {
        self.batch = 0;
    }
    fn sweep(&mut self) -> u32 {
        0
    }
}

/// The sink. Frames that it holds are still the worker's by the owner map, so a recovery finds them.
#[derive(Debug)]
pub struct NullTx {
    pool: Arc<Pool>,
    held: Box<[Batch; HELD]>,
    /// The batch being filled; those before it hold frames, those after it are empty. [`HELD`] after
    /// the queue has stopped.
    filling: usize,
}

// SAFETY: the frames inside stay with the half wherever it moves, and leave it only through its methods,
// to whoever has it then; nothing in it is tied to a thread.
#[allow(unsafe_code, reason = "a half is handed to its worker's thread with what it holds")]
unsafe impl Send for NullTx {}

impl NullTx {
    pub(crate) fn new(pool: &Arc<Pool>) -> Self {
        Self { pool: Arc::clone(pool), held: Box::new([const { Batch::new() }; HELD]), filling: 0 }
    }
}

impl TxQueue for NullTx {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let mut sent = 0;
        while let Some(held) = self.held.get_mut(self.filling) {
            sent += batch.move_to(held, batch.len());
            // A packet in several frames that did not fit goes to the next one, whole.
            if batch.is_empty() || self.filling + 1 == HELD {
                break;
            }
            self.filling += 1;
        }
        sent
    }
    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        let mut got = 0;
        for held in self.held.iter_mut().take(self.filling + 1) {
            got += held.len();
            frames.put_batch(held);
        }
        if self.filling < HELD {
            self.filling = 0;
        }
        got
    }
    fn in_flight(&self) -> usize {
        self.held.iter().map(Batch::len).sum()
    }
    fn survey(&mut self, _survey: &mut Survey) {
        // The dead worker's handles died with it: what was held here counts as its free frames.
        for held in self.held.iter_mut() {
            *held = Batch::new();
        }
        self.filling = 0;
    }
    fn stop(&mut self) {
        self.filling = HELD;
    }
    fn sweep(&mut self) -> u32 {
        let mut swept = 0;
        for held in self.held.iter_mut() {
            for frame in held.drain() {
                // One of another pool is not ours to give away.
                swept += u32::from(self.pool.surrender(frame).is_ok());
            }
        }
        swept
    }
}
