//! The hot halves: frames to and from the lanes of one queue.
//!
//! Contract: no system call but in `kick`; no allocation, lock, panic or log; at most two batches of work a call. What
//! comes back through a lane is checked by `isoplane_memory::transfer`.

use super::layout::{Count, Entry};
use super::lock::Held;
use super::mover::Mover;
use super::slot::{Half, Slot};
use crate::port::{KickError, RxQueue, TxQueue};
use isoplane_memory::{
    BATCH, Batch, Collector, Frame, FrameCache, FrameFlags, Inbox, Kernel, Lender, Outbox, Survey, Taken,
};
use std::sync::Arc;

/// Frames that a call moves at most in each ring.
const WORK: usize = 2 * BATCH;
/// Free entries that make refilling worth while.
const REFILL: usize = BATCH / 2;
/// What the other side may say of a frame.
const PASSED: FrameFlags = FrameFlags::MORE.union(FrameFlags::RX_CHECKSUM_GOOD);
/// What we tell it.
const TOLD: FrameFlags = FrameFlags::MORE.union(FrameFlags::TX_CHECKSUM);
/// Turns that a worker which kicks itself lets pass at most before it asks the kernel for packets again.
const LONGEST_PAUSE: u32 = 16;

/// The pause after a look that found `moved` packets.
pub(super) const fn pause_after(pause: u32, moved: u32) -> u32 {
    if moved != 0 {
        0
    } else if pause * 2 + 1 < LONGEST_PAUSE {
        pause * 2 + 1
    } else {
        LONGEST_PAUSE
    }
}

/// A half's rings, and the mover for a worker that kicks itself.
#[derive(Debug)]
struct Live {
    given: Outbox<Entry>,
    done: Inbox<Entry>,
    mover: Mover,
    slot: Arc<Slot>,
}

/// One half, live or stopped.
#[derive(Debug)]
struct Ends {
    live: Option<Live>,
    parked: Option<(Lender, Collector)>,
    slot: Arc<Slot>,
    half: Half,
    bad: u64,
}

impl Ends {
    fn new(given: Outbox<Entry>, done: Inbox<Entry>, mover: Mover, slot: &Arc<Slot>, half: Half) -> Self {
        let live = Live { given, done, mover, slot: Arc::clone(slot) };
        Self { live: Some(live), parked: None, slot: Arc::clone(slot), half, bad: 0 }
    }

    fn survey(&mut self, survey: &mut Survey) {
        let lane = self.slot.lane(self.half);
        // Exact while nobody moves; else frames may be seen on either side of the move, or on neither, and stay where
        // their owner bytes say.
        let held = Held::wait(lane);
        if held.is_none() {
            tracing::warn!("a tap's queue is surveyed while its packets are moved");
        }
        if let Some(live) = &mut self.live {
            live.given.survey(survey, |entry| entry.address);
            live.done.survey(survey, |entry| entry.address);
        }
    }

    /// Notes lies found so far.
    #[inline(always)]
    fn note_bad(&mut self) {
        if let Some(live) = &self.live {
            self.bad = live.done.bad() + live.given.ring().corrupt();
        }
    }

    fn stop(&mut self) {
        self.slot.lane(self.half).stop();
        if let Some(live) = self.live.take() {
            self.parked = Some((live.given.into_parts().1, live.done.into_parts().1));
        }
    }

    fn sweep(&mut self) -> u32 {
        let Some((lender, collector)) = self.parked.take() else { return 0 };
        let lane = self.slot.lane(self.half);
        let Some(_held) = Held::wait(lane) else {
            tracing::warn!(
                frames = collector.held(),
                "a tap's queue that was closed is still in use; its frames stay in custody"
            );
            return 0;
        };
        isoplane_memory::custody::end(lender, collector)
    }
}

/// The receiving half of a tap's queue.
#[derive(Debug)]
pub struct TapRx {
    ends: Ends,
    /// Turns since this worker asked the kernel itself, and how many it lets pass.
    turns: u32,
    pause: u32,
}

impl TapRx {
    pub(super) fn new(given: Outbox<Entry>, done: Inbox<Entry>, mover: Mover, slot: &Arc<Slot>) -> Self {
        Self { ends: Ends::new(given, done, mover, slot, Half::Rx), turns: 0, pause: 0 }
    }

    /// Gives `n` frames of the pool's depot to be received into; says how many that were.
    pub(super) fn prime(&mut self, n: u32) -> usize {
        let Some(live) = &mut self.ends.live else { return 0 };
        let pool = Arc::clone(live.given.lender().pool());
        live.given.prime(n as usize, |address| {
            let start = pool.chunk_of(address).map_or(0, |chunk| pool.start_offset(chunk));
            Entry { address: address + u64::from(start), ..Entry::default() }
        })
    }
}

#[inline(always)]
fn taken(entry: Entry) -> Taken {
    let flags = FrameFlags::from_bits_retain(entry.flags).intersection(PASSED);
    Taken { address: entry.address, len: entry.len.into(), flags }
}

impl RxQueue for TapRx {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.ends.live else { return 0 };
        let got = live.done.take(frames, batch, taken);
        let free = live.given.free(REFILL);
        if free >= REFILL {
            live.given.post_free(frames, free.min(WORK), |_, address| Entry { address, ..Entry::default() });
        }
        self.turns = self.turns.saturating_add(1);
        self.ends.note_bad();
        got
    }

    #[inline(always)]
    fn wants_kick(&self) -> bool {
        self.ends.live.is_some() && self.turns > self.pause
    }

    fn kick(&mut self, _kernel: &Kernel) -> Result<(), KickError> {
        self.turns = 0;
        let Some(live) = &mut self.ends.live else { return Ok(()) };
        let moved = live.mover.receive(live.slot.descriptor());
        self.pause = pause_after(self.pause, *moved.as_ref().unwrap_or(&0));
        moved.map(drop)
    }

    fn bad_descriptors(&self) -> u64 {
        self.ends.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        self.ends.survey(survey);
    }

    fn stop(&mut self) {
        self.ends.stop();
    }

    fn sweep(&mut self) -> u32 {
        self.ends.sweep()
    }
}

/// The transmitting half of a tap's queue.
#[derive(Debug)]
pub struct TapTx {
    ends: Ends,
}

impl TapTx {
    pub(super) fn new(given: Outbox<Entry>, done: Inbox<Entry>, mover: Mover, slot: &Arc<Slot>) -> Self {
        Self { ends: Ends::new(given, done, mover, slot, Half::Tx) }
    }
}

impl TxQueue for TapTx {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.ends.live else { return 0 };
        let asks = batch.iter().any(|frame| frame.flags().contains(FrameFlags::TX_CHECKSUM));
        if asks {
            let pool = Arc::clone(live.given.lender().pool());
            return live.given.post(batch, |frame, address| {
                // One that does not say where asks for the impossible, and is refused.
                let meta = pool.meta(frame).filter(|_| frame.flags().contains(FrameFlags::META));
                let (csum_start, csum_offset) =
                    meta.map_or((u16::MAX, u16::MAX), |meta| (meta.csum_start, meta.csum_offset));
                Entry { csum_start, csum_offset, ..entry(frame, address) }
            });
        }
        live.given.post(batch, entry)
    }

    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        let Some(live) = &mut self.ends.live else { return 0 };
        let got = live.done.collect(frames, WORK, |entry| entry.address);
        self.ends.note_bad();
        got
    }

    #[inline(always)]
    fn wants_kick(&self) -> bool {
        self.ends.live.as_ref().is_some_and(|live| live.given.ring().pending() != Some(0))
    }

    fn kick(&mut self, _kernel: &Kernel) -> Result<(), KickError> {
        let Some(live) = &mut self.ends.live else { return Ok(()) };
        live.mover.transmit(live.slot.descriptor()).map(drop)
    }

    /// Frames of packets that the kernel does not take: shorter than an Ethernet header, in more frames than a packet
    /// may have, or with a checksum to be computed outside the packet.
    #[inline(always)]
    fn refused(&self) -> (u64, u64) {
        let lane = self.ends.slot.lane(Half::Tx);
        (lane.counted(Count::RefusedFrames), lane.counted(Count::RefusedBytes))
    }

    fn in_flight(&self) -> usize {
        let Some(live) = &self.ends.live else { return 0 };
        let chunks = live.given.lender().pool().chunks();
        live.given.ring().position().wrapping_sub(live.done.ring().position()).min(chunks) as usize
    }

    fn bad_descriptors(&self) -> u64 {
        self.ends.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        self.ends.survey(survey);
    }

    fn stop(&mut self) {
        self.ends.stop();
    }

    fn sweep(&mut self) -> u32 {
        self.ends.sweep()
    }
}

#[inline(always)]
fn entry(frame: &Frame, address: u64) -> Entry {
    let flags = frame.flags().intersection(TOLD).bits();
    Entry { address, len: frame.len(), flags, ..Entry::default() }
}
