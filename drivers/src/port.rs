//! What every driver implements.
//!
//! Contract of the hot halves: a call never blocks, allocates, panics or logs, and does a bounded
//! amount of work; frames keep their order; a packet in several frames stays whole; what the kernel,
//! a device or a peer puts in a ring is checked, and a lie is counted. All ports of a worker share one
//! [`Pool`], so a frame received here can be transmitted there without a copy.

use crate::queue::Queue;
use isoplane_memory::{Batch, FrameCache, Kernel, Pool, Survey};
use std::os::fd::RawFd;
use std::sync::Arc;

bitflags::bitflags! {
    /// What a port can do beyond moving single-frame packets.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Capabilities: u32 {
        /// Packets in several frames (`FrameFlags::MORE`), both directions.
        const MULTI_BUFFER = 1 << 0;
        /// The kernel or device reads and writes our chunks itself; nothing is copied.
        const ZERO_COPY = 1 << 1;
        /// Computes transport checksums on transmit (`FrameFlags::TX_CHECKSUM`).
        const TX_CHECKSUM = 1 << 2;
        /// Records transmit times (`FrameFlags::TX_TIMESTAMP`).
        const TX_TIMESTAMP = 1 << 3;
        /// Needs kicks at times: `wants_kick` may say yes, and a kicker makes sense.
        const KICKS = 1 << 4;
        /// Peers may live in another process.
        const CROSS_PROCESS = 1 << 5;
    }
}

/// State of the wire behind a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum LinkState {
    /// Cannot be known.
    #[default]
    Unknown = 0,
    /// Frames can pass.
    Up = 1,
    /// No carrier, or administratively down; may come back.
    Down = 2,
    /// The interface is no more: deleted or unplugged.
    Gone = 3,
}

/// What a port counted itself; all are totals since it was opened. What does not apply stays 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PortStatistics {
    /// Packets dropped by the kernel or device because our receive ring was full.
    pub rx_ring_full: u64,
    /// Packets dropped because we had given it no free chunk.
    pub rx_no_frames: u64,
    /// Packets dropped for other reasons on receive (too long, bad).
    pub rx_dropped: u64,
    /// Descriptors of ours that the other side refused.
    pub tx_invalid: u64,
    /// Times the kernel found nothing to transmit.
    pub tx_ring_empty: u64,
    /// Entries that the other side put in a ring and that were lies.
    pub bad_descriptors: u64,
    /// Kicks made.
    pub kicks: u64,
    /// Kicks that failed for good.
    pub kick_errors: u64,
}

/// Why a kick failed for good. Passing conditions (EAGAIN, EBUSY, ENOBUFS) are not errors: the entry
/// stays in the ring and the next kick tries again.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KickError {
    /// The interface is down (ENETDOWN): frames wait in the ring until it is up again.
    #[error("the interface is down")]
    Down,
    /// The interface is gone (ENXIO, ENODEV): the port must be reopened.
    #[error("the interface is gone")]
    Gone,
    /// Anything else the kernel says.
    #[error("kick: {0}")]
    Os(nix::errno::Errno),
}

/// The cold half of a port. Opening is each driver's own, since what it needs differs.
///
/// Dropping a port closes it: the other side is told to stop, and what was attached is detached.
/// Queues taken from it must have been closed before ([`Queue::close`]); a port that is dropped
/// earlier stays open until they are.
pub trait Port: Send {
    /// Name for messages and counters: the interface's, or the one given.
    fn name(&self) -> &str;
    /// Name of the driver and its mode, such as `af_xdp copy`.
    fn driver(&self) -> &'static str;
    /// What the port can do.
    fn capabilities(&self) -> Capabilities;
    /// Ethernet address, where there is one.
    fn mac(&self) -> Option<[u8; 6]>;
    /// Longest frame, Ethernet header included and FCS not, that the port passes.
    fn max_frame(&self) -> u32;
    /// State of the wire, asked now; cold.
    fn link(&self) -> LinkState;
    /// Totals since open; cold.
    fn statistics(&self) -> PortStatistics;
    /// The pool that the port's frames are of.
    fn pool(&self) -> &Arc<Pool>;
    /// Number of queues opened.
    fn queues(&self) -> u16;
    /// Hands a queue out, once; `None` when there is no such queue or it was taken.
    fn take_queue(&mut self, index: u16) -> Option<Queue>;
    /// What a kicker needs to kick queue `index` on the worker's behalf, from this process; `None`
    /// when the driver needs no kicks. May be asked before or after the queue is taken.
    fn kick_target(&self, index: u16) -> Option<Box<dyn KickTarget>> {
        let _ = index;
        None
    }
    /// File descriptors that the port holds, each with the queue that it serves, or `None` for the port as
    /// a whole. A worker process, which inherits them all, closes those that are not of its own queues.
    fn descriptors(&self) -> Vec<(Option<u16>, RawFd)> {
        Vec::new()
    }
}

/// What one look at a kick target did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kicked {
    /// Nothing was waiting.
    Idle,
    /// Something was waiting and the kernel was told; `waiting` entries were in the ring before.
    Kicked {
        /// Entries that waited.
        waiting: u32,
    },
}

/// A queue as its kicker sees it: looks at the shared ring, kicks when the ring has work.
pub trait KickTarget: Send {
    /// Looks, and kicks if there is work; entries that the kernel leaves for now are not an error.
    ///
    /// # Errors
    /// See [`KickError`].
    fn poll(&mut self, kernel: &Kernel) -> Result<Kicked, KickError>;
}

/// The receiving half of a queue.
pub trait RxQueue: Send {
    /// Adds packets that have arrived to the end of `batch`, as far as there is room, and gives the
    /// other side free frames from `frames` in return; says how many frames arrived. With `frames`
    /// empty it still delivers what has arrived.
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize;

    /// Would a kick help receiving now (the other side sleeps)?
    fn wants_kick(&self) -> bool {
        false
    }

    /// Tells the other side that it has free frames.
    ///
    /// # Errors
    /// See [`KickError`].
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        let _ = kernel;
        Ok(())
    }

    /// Descriptors and indices from the other side that were lies, so far.
    fn bad_descriptors(&self) -> u64 {
        0
    }

    /// After the worker that used this queue died: takes the shared indices over and shows `survey`
    /// every frame that lies in a ring.
    fn survey(&mut self, survey: &mut Survey);

    /// Ends receiving: tells the other side to stop and lets go of rings and descriptors. After this
    /// `receive` finds nothing. Called once, before `sweep`.
    fn stop(&mut self);

    /// After both halves have stopped: sends every frame still in custody to the pool's depot; says
    /// how many.
    fn sweep(&mut self) -> u32;
}

/// The transmitting half of a queue.
///
/// A half moves to its worker's thread before the first turn. One that holds [frames](isoplane_memory::Frame),
/// which are not `Send`, must argue in an `unsafe impl Send` that they leave it through `reclaim` only.
pub trait TxQueue: Send {
    /// Sends packets from the front of `batch`; what does not fit stays in it. Says how many frames it
    /// took, those that it then refuses ([`TxQueue::refused`]) included.
    fn transmit(&mut self, batch: &mut Batch) -> usize;

    /// Takes frames back that the other side is done with; says how many. Works without traffic.
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize;

    /// Does the other side need a kick to see what was sent? Asked once a turn.
    fn wants_kick(&self) -> bool {
        false
    }

    /// Tells the other side that the ring has work: once a turn, never a batch.
    ///
    /// # Errors
    /// See [`KickError`].
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        let _ = kernel;
        Ok(())
    }

    /// Frames that `transmit` took but the other side could never send (empty, too long, asking for
    /// what the port cannot do), and their bytes, so far. They come back through `reclaim`.
    fn refused(&self) -> (u64, u64) {
        (0, 0)
    }

    /// Frames handed over and not yet taken back.
    fn in_flight(&self) -> usize;

    /// As [`RxQueue::bad_descriptors`].
    fn bad_descriptors(&self) -> u64 {
        0
    }

    /// As [`RxQueue::survey`].
    fn survey(&mut self, survey: &mut Survey);

    /// As [`RxQueue::stop`].
    fn stop(&mut self);

    /// As [`RxQueue::sweep`].
    fn sweep(&mut self) -> u32;
}
