//! The hot halves of the memory port.
//!
//! Contract: as in [`port`](crate::port); a call touches its two rings, the state word of its
//! direction (which changes only when somebody closes) and nothing else that is shared.

use super::MemoryError;
use super::link::{Descriptor, Direction, Half};
use crate::port::{RxQueue, TxQueue};
use isoplane_memory::ring::{Consumer, Producer};
use isoplane_memory::{BATCH, Batch, Frame, FrameCache, FrameFlags, Inbox, Outbox, Pool, Survey, Taken};
use std::sync::Arc;

/// What a peer may say about a frame. A checksum that it vouches for would only be its word.
const PASSED: FrameFlags = FrameFlags::MORE.union(FrameFlags::META);
/// Frames paid or collected in one call, at most: twice what one call can receive or send, so that a
/// backlog shrinks.
const SETTLED: usize = 2 * BATCH;

#[inline(always)]
fn encode(frame: &Frame, address: u64) -> Descriptor {
    let flags = frame.flags().intersection(PASSED).bits();
    Descriptor { address, len: frame.len().into(), flags: flags.into() }
}

#[inline(always)]
fn decode(descriptor: Descriptor) -> Taken {
    let flags = FrameFlags::from_bits_retain(descriptor.flags as u16).intersection(PASSED);
    Taken { address: descriptor.address, len: descriptor.len, flags }
}

/// The receiving half. See [`memory`](crate::memory).
#[derive(Debug)]
pub struct MemoryRx {
    data: Inbox<Descriptor>,
    returns: Outbox<u64>,
    direction: Direction,
    /// Copy of [`Direction::refused`], which only this half writes.
    refused: u32,
    pool: Arc<Pool>,
}

impl MemoryRx {
    pub(super) fn new(pool: &Arc<Pool>, mut direction: Direction) -> Result<Self, MemoryError> {
        let (data, returns) = direction.rings()?;
        let ((_, collector), (lender, _)) = direction.custodies(pool)?;
        Ok(Self {
            data: Inbox::new(Consumer::new(data), collector),
            returns: Outbox::new(Producer::new(returns), lender),
            refused: direction.refused(),
            direction,
            pool: Arc::clone(pool),
        })
    }

    /// Frames that this half owes the sender: one for each that it took, none for a lie.
    #[inline(always)]
    #[must_use]
    pub fn debt(&self) -> u32 {
        let taken = self.data.ring().position().wrapping_sub(self.refused);
        taken.wrapping_sub(self.returns.ring().position())
    }

    #[cold]
    fn refuse(&mut self, n: u32) {
        self.refused = self.refused.wrapping_add(n);
        self.direction.set_refused(self.refused);
    }
}

impl RxQueue for MemoryRx {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let state = self.direction.state();
        if state & Half::Rx.stopped() != 0 {
            return 0;
        }
        let had = frames.len() + batch.len();
        let from = self.data.ring().position();
        let received = self.data.take(frames, batch, decode);
        // Slots that were given back but gained no frame held lies.
        let slots = self.data.ring().position().wrapping_sub(from);
        let gained = (frames.len() + batch.len() - had) as u32;
        if slots != gained {
            self.refuse(slots.wrapping_sub(gained));
        }
        let mut debt = self.debt();
        if debt > self.pool.chunks() {
            // Only indices that somebody forged, read anew after a restart, give such a number.
            self.refuse(debt);
            debt = 0;
        }
        if debt != 0 && state & Half::Tx.stopped() == 0 {
            self.returns.post_free(frames, SETTLED.min(debt as usize), |_, address| address);
        }
        received
    }

    fn bad_descriptors(&self) -> u64 {
        self.data.bad() + self.returns.ring().corrupt()
    }

    fn survey(&mut self, survey: &mut Survey) {
        self.refused = self.direction.refused();
        self.data.survey(survey, |descriptor| descriptor.address);
        self.returns.survey(survey, |address| address);
    }

    fn stop(&mut self) {
        self.direction.stop(Half::Rx);
    }

    fn sweep(&mut self) -> u32 {
        self.direction.close(&self.pool, Half::Rx, || self.data.collector().sweep())
    }
}

/// The transmitting half. See [`memory`](crate::memory).
#[derive(Debug)]
pub struct MemoryTx {
    data: Outbox<Descriptor>,
    returns: Inbox<u64>,
    direction: Direction,
    pool: Arc<Pool>,
}

impl MemoryTx {
    pub(super) fn new(pool: &Arc<Pool>, mut direction: Direction) -> Result<Self, MemoryError> {
        let (data, returns) = direction.rings()?;
        let ((lender, _), (_, collector)) = direction.custodies(pool)?;
        Ok(Self {
            data: Outbox::new(Producer::new(data), lender),
            returns: Inbox::new(Consumer::new(returns), collector),
            direction,
            pool: Arc::clone(pool),
        })
    }
}

impl TxQueue for MemoryTx {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        if self.direction.state() & (Half::Tx.stopped() | Half::Rx.stopped()) != 0 {
            return 0;
        }
        self.data.post(batch, encode)
    }

    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        if self.direction.state() & Half::Tx.stopped() != 0 {
            return 0;
        }
        self.returns.collect(frames, SETTLED, |address| address)
    }

    fn in_flight(&self) -> usize {
        let sent = self.data.ring().position().wrapping_sub(self.direction.refused());
        sent.wrapping_sub(self.returns.ring().position()).min(self.pool.chunks()) as usize
    }

    fn bad_descriptors(&self) -> u64 {
        self.returns.bad() + self.data.ring().corrupt()
    }

    fn survey(&mut self, survey: &mut Survey) {
        self.data.survey(survey, |descriptor| descriptor.address);
        self.returns.survey(survey, |address| address);
    }

    fn stop(&mut self) {
        self.direction.stop(Half::Tx);
    }

    fn sweep(&mut self) -> u32 {
        self.direction.close(&self.pool, Half::Tx, || self.returns.collector().sweep())
    }
}
