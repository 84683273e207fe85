//! What a port, its two hot halves and its kicker share about one queue.
//!
//! Contract: the descriptor stays open while the port or a half of the queue lives; a kicker alone does not keep it.

use super::layout::{Count, Lane};
use super::mover::Mover;
use super::queue::pause_after;
use crate::port::{KickError, KickTarget, Kicked};
use isoplane_memory::Kernel;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

/// The two halves of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    Rx,
    Tx,
}

/// One queue.
#[derive(Debug)]
pub(super) struct Slot {
    descriptor: OwnedFd,
    lanes: [Lane; 2],
}

impl Slot {
    pub(super) const fn new(descriptor: OwnedFd, rx: Lane, tx: Lane) -> Self {
        Self { descriptor, lanes: [rx, tx] }
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }

    pub(super) const fn lane(&self, half: Half) -> &Lane {
        &self.lanes[half as usize]
    }

    /// Sum over both lanes.
    pub(super) fn counted(&self, which: Count) -> u64 {
        self.lanes.iter().map(|lane| lane.counted(which)).fold(0, u64::wrapping_add)
    }
}

/// A queue as its kicker sees it: it reads and writes the tap on the worker's behalf. Works in any process that has the
/// descriptor.
#[derive(Debug)]
pub struct TapKick {
    slot: Weak<Slot>,
    rx: Mover,
    tx: Mover,
    /// Looks since the kernel was asked for packets, and how many pass until it is asked again.
    looks: u32,
    pause: u32,
}

impl TapKick {
    pub(super) fn new(slot: &Arc<Slot>, rx: Mover, tx: Mover) -> Self {
        Self { slot: Arc::downgrade(slot), rx, tx, looks: 0, pause: 0 }
    }
}

impl KickTarget for TapKick {
    /// Sends what waits; asks the kernel for packets, less often the longer it had none: asking is a system call, and
    /// other queues wait for this kicker, too.
    fn poll(&mut self, _kernel: &Kernel) -> Result<Kicked, KickError> {
        let Some(slot) = self.slot.upgrade() else { return Ok(Kicked::Idle) };
        let mut received = Ok(0);
        self.looks = self.looks.saturating_add(1);
        if self.looks > self.pause {
            self.looks = 0;
            received = self.rx.receive(slot.descriptor());
            self.pause = pause_after(self.pause, *received.as_ref().unwrap_or(&0));
        }
        let sent = self.tx.transmit(slot.descriptor())?;
        match received? + sent {
            0 => Ok(Kicked::Idle),
            waiting => Ok(Kicked::Kicked { waiting }),
        }
    }
}
