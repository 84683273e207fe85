//! What the two halves of a queue share: a ring of either kind, a custody, a doorbell.

use super::ending::Ending;
use super::packed::Packed;
use super::ring::{Ring, Shared, Word};
use super::split::Split;
use super::transport::Doorbell;
use crate::pci::{DmaSlice, Registers};
use isoplane_memory::{BATCH, Collector, Lender, Pool, Survey};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Frames that a call moves at most in each ring.
pub(super) const WORK: u16 = 2 * BATCH as u16;

/// A ring of either kind: one branch a batch.
#[derive(Debug)]
pub(super) enum AnyRing {
    Split(Split),
    Packed(Packed),
}

/// Runs an expression with the ring, whichever kind it is, so that it is compiled for each.
macro_rules! with_ring {
    ($any:expr, $ring:ident => $work:expr) => {
        match $any {
            AnyRing::Split($ring) => $work,
            AnyRing::Packed($ring) => $work,
        }
    };
}
pub(super) use with_ring;

impl AnyRing {
    pub(super) fn shared(&self) -> &Shared {
        with_ring!(self, ring => ring.shared())
    }

    pub(super) fn size(&self) -> u16 {
        with_ring!(self, ring => ring.size())
    }
}

/// Where frames go and come back, and where the device finds them.
#[derive(Debug)]
pub(super) struct Path<R> {
    pub(super) lender: Lender,
    pub(super) collector: Collector,
    /// Where the device finds byte 0 of chunk 0.
    pub(super) base: u64,
    /// Bytes of the header before a packet.
    pub(super) header: u32,
    pub(super) doorbell: Doorbell<R>,
    /// Entries that were lies.
    pub(super) bad: u64,
    /// What is in shared memory of them.
    pub(super) told: u64,
}

impl<R: Registers> Path<R> {
    pub(super) fn pool(&self) -> &Arc<Pool> {
        self.lender.pool()
    }

    /// After [`Ring::publish`].
    #[inline(always)]
    pub(super) fn notify<Q: Ring>(&self, ring: &Q, n: u16) {
        if ring.wants_doorbell(n) {
            self.doorbell.ring();
            ring.shared().count_doorbell();
        }
    }

    /// Lies so far; in shared memory too, where the port finds them.
    #[inline(always)]
    pub(super) fn tell_bad<Q: Ring>(&mut self, ring: &Q) {
        let bad = self.bad + ring.corrupt();
        if bad != self.told {
            self.told = bad;
            ring.shared().set(Word::Bad, bad);
        }
    }

    /// Shows the frames of a dead worker's ring, by `addresses` of an id, and wakes the device up, in case the
    /// worker died before it could.
    pub(super) fn survey<Q: Ring>(
        &mut self,
        ring: &mut Q,
        survey: &mut Survey,
        addresses: impl Fn(&Q, u16, &mut dyn FnMut(u64)),
    ) {
        let left = ring.take_over(self.lender.journaled());
        let id = self.lender.id();
        for entry in left.outstanding {
            addresses(ring, entry, &mut |address| survey.in_ring(id, address.wrapping_sub(self.base)));
        }
        for entry in left.unpublished {
            addresses(ring, entry, &mut |address| survey.unpublished(id, address.wrapping_sub(self.base)));
        }
        self.doorbell.ring();
        self.bad = ring.shared().count(Word::Bad);
        self.told = self.bad;
    }
}

/// What stays of a half that was stopped.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) custody: (Lender, Collector),
    /// Ring and tables: their memory is kept until the device has let go of it.
    pub(super) _memory: (AnyRing, Option<DmaSlice<AtomicU64>>),
}

/// How a half ends; the other side of it is in `ending`.
pub(super) type End = Arc<dyn Ending>;
