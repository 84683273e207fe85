//! The in-memory port: two ports connected through shared memory, without a copy.
//!
//! ```text
//!            data ring: descriptors of frames that carry packets
//!  A tx  ----------------------------------------------------------->  B rx
//!        <-----------------------------------------------------------
//!            return ring: one free frame for each that arrived
//! ```
//!
//! and the same from B to A. Both sides share one pool, in one process, across `fork`, or in unrelated
//! processes that were handed the descriptors of pool and link.
//!
//! Contract: the packet's own chunk changes hands, so each receiver *owes* the sender a free chunk for
//! it and each worker's number of frames stays the same. A receiver that has no free frame still
//! delivers, and pays as soon as it has one, at its next `receive`. The debt is not a counter that
//! could be lost with a worker: it is the difference between the ring positions, which live in shared
//! memory, less the descriptors that were refused (a sender is not paid for a lie). Nobody ever waits
//! for the other side, so no order of events can block both.
//!
//! A half that closes sends what it could still have collected to the pool's depot; the last one ends
//! the custody, so ports may be opened and closed any number of times.

mod halves;
mod link;

pub use halves::{MemoryRx, MemoryTx};

use crate::port::{Capabilities, LinkState, Port, PortStatistics};
use crate::queue::Queue;
use isoplane_memory::ring::RingError;
use isoplane_memory::{Pool, PoolError, Region, RegionError};
use link::{Direction, Half, Link, Side};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// How to make a connected pair.
#[derive(Debug, Clone)]
pub struct MemoryConfig {
    /// Name of the port (of the first one, in a pair) for messages and counters.
    pub name: String,
    /// Queues of each port, 1 to 32; queue N of one is connected to queue N of the other. Each takes
    /// four of the pool's owner ids.
    pub queues: u16,
    /// Entries of each ring: a power of two from 2 to 65536.
    pub ring: u32,
}

impl MemoryConfig {
    /// One queue, rings of 512.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), queues: 1, ring: 512 }
    }
}

/// Why a pair could not be made or a side not attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// None, or more than a pool has owner ids for.
    #[error("memory port {name:?}: {queues} queues; take 1 to {}", link::MAX_QUEUES)]
    Queues {
        /// The port's name.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// Not a usable ring size.
    #[error(
        "memory port {name:?}: rings of {ring} entries; take a power of two from 2 to {}",
        link::MAX_RING
    )]
    Ring {
        /// The port's name.
        name: String,
        /// What was asked for.
        ring: u32,
    },
    /// The descriptor holds no link of this version.
    #[error("the descriptor holds no memory port link (or one of another version)")]
    NotALink,
    /// The link carries frames of another pool.
    #[error(
        "the memory port link carries frames of another pool than {pool:?}; attach to the pool that it was made with"
    )]
    OtherPool {
        /// The pool that was offered.
        pool: String,
    },
    /// Somebody else has attached to it.
    #[error("the other side of the memory port link is taken; make a new link for each pair")]
    Taken,
    /// The pool's descriptor cannot be examined.
    #[error("fstat of the pool's descriptor: {0}")]
    Identity(nix::Error),
    /// The rings in the link are damaged.
    #[error(transparent)]
    Rings(#[from] RingError),
    /// The pool has no owner ids left.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The shared memory could not be made or mapped.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// One of two connected ports. See the [module](self).
#[derive(Debug)]
pub struct MemoryPort {
    name: String,
    pool: Arc<Pool>,
    link: Arc<Link>,
    side: Side,
    queues: Vec<Option<Queue>>,
    /// What this side sends and what it gets, by queue: for statistics and link state.
    directions: Vec<(Direction, Direction)>,
}

impl MemoryPort {
    /// Makes both ports, to be used in this process and those forked from it.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn pair(pool: &Arc<Pool>, config: &MemoryConfig, peer: &str) -> Result<(Self, Self), MemoryError> {
        let a = Self::offer(pool, config)?;
        let b = Self::claim(peer, pool, Arc::clone(&a.link), Side::B)?;
        Ok((a, b))
    }

    /// Makes one port and leaves the other side to a process that gets the descriptors of
    /// [`MemoryPort::link_fd`] and of the pool's region, and calls [`MemoryPort::attach`].
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn offer(pool: &Arc<Pool>, config: &MemoryConfig) -> Result<Self, MemoryError> {
        let link = Link::create(pool, &config.name, config.queues, config.ring)?;
        Self::claim(&config.name, pool, link, Side::A)
    }

    /// Attaches to the other side of an offered port.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn attach(pool: &Arc<Pool>, link: OwnedFd, name: &str) -> Result<Self, MemoryError> {
        let link = Link::open(Region::from_fd(link, true)?, pool)?;
        Self::claim(name, pool, link, Side::B)
    }

    /// The link's descriptor, to be passed on.
    #[must_use]
    pub fn link_fd(&self) -> BorrowedFd<'_> {
        self.link.region().as_fd()
    }

    fn claim(name: &str, pool: &Arc<Pool>, link: Arc<Link>, side: Side) -> Result<Self, MemoryError> {
        let mut queues = Vec::new();
        let mut directions = Vec::new();
        for queue in 0..link.queues() {
            let tx = MemoryTx::new(pool, link.direction(queue, side)?)?;
            let rx = MemoryRx::new(pool, link.direction(queue, side.other())?)?;
            queues.push(Some(Queue { rx: rx.into(), tx: tx.into() }));
            directions.push((link.direction(queue, side)?, link.direction(queue, side.other())?));
        }
        // Last, so that a failure leaves the side free. What was made above has not been used.
        if !link.claim(side) {
            return Err(MemoryError::Taken);
        }
        Ok(Self { name: name.to_owned(), pool: Arc::clone(pool), link, side, queues, directions })
    }
}

impl Port for MemoryPort {
    fn name(&self) -> &str {
        &self.name
    }
    fn driver(&self) -> &'static str {
        "memory"
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::MULTI_BUFFER | Capabilities::ZERO_COPY | Capabilities::CROSS_PROCESS
    }
    fn mac(&self) -> Option<[u8; 6]> {
        None
    }
    fn max_frame(&self) -> u32 {
        self.pool.max_frame()
    }
    /// Down until the other side is attached, gone once one of its halves has stopped.
    fn link(&self) -> LinkState {
        let gone = |(out, back): &(Direction, Direction)| {
            out.state() & Half::Rx.stopped() != 0 || back.state() & Half::Tx.stopped() != 0
        };
        if !self.link.claimed(self.side.other()) {
            LinkState::Down
        } else if self.directions.iter().any(gone) {
            LinkState::Gone
        } else {
            LinkState::Up
        }
    }
    fn statistics(&self) -> PortStatistics {
        let mut statistics = PortStatistics::default();
        for (out, back) in &self.directions {
            statistics.tx_invalid += u64::from(out.refused());
            statistics.bad_descriptors += u64::from(back.refused());
        }
        statistics
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

impl Drop for MemoryPort {
    fn drop(&mut self) {
        for queue in self.queues.iter_mut().filter_map(Option::take) {
            queue.close();
        }
        // Nobody can attach to the other side any more once this side is gone: close it too.
        if self.side == Side::A && !self.link.claimed(Side::B) {
            let peer = Self::claim(&self.name, &self.pool, Arc::clone(&self.link), Side::B);
            drop(peer);
        }
    }
}
