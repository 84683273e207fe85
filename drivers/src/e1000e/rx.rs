//! The receiving half: descriptors with free chunks out, packets in.
//!
//! Contract: no system call, allocation, lock, panic or log. A call takes as many packets as the batch has
//! room for, gives the device at most two batches of chunks, and writes the tail register at most once. Lines
//! that it touches: one of the ring for four packets and one of `places` for eight, the chunk's owner byte,
//! and nothing of the packet. That a descriptor is done is read with acquire: what the device wrote
//! before it (the packet) is seen. What it says is checked against the pool; a lie costs the frames that it names.

use super::device::Holder;
use super::layout::{Descriptor, Extended, Legacy, RxFormat};
use super::rings::{Handover, Ring, Word, runs};
use crate::pci::{DmaSlice, Registers};
use crate::port::RxQueue;
use isoplane_memory::{BATCH, Batch, Collector, Frame, FrameCache, FrameFlags, FrameMeta, Lender, Survey};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Chunks that a call gives to the device at most.
const WORK: u32 = 2 * BATCH as u32;
/// Vacant descriptors that make it worth while.
const REFILL: u32 = BATCH as u32 / 2;

/// The receiving half of an e1000e queue whose registers are reached through `R`.
#[derive(Debug)]
pub struct E1000eRx<R> {
    live: Option<RxLive<R>>,
    parked: Option<(Lender, Collector)>,
    holder: Arc<dyn Holder>,
    bad: u64,
}

/// How descriptors are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RxMode {
    Legacy,
    Extended,
    /// And the RSS hash goes to the metadata.
    Hash,
}

/// What a receiving half is made of.
#[derive(Debug)]
pub(super) struct RxLive<R> {
    pub(super) ring: Ring,
    pub(super) places: DmaSlice<AtomicU64>,
    pub(super) handover: Handover,
    pub(super) bar: R,
    /// Offset of the tail register.
    pub(super) tail: usize,
    /// Where the device finds byte 0 of chunk 0.
    pub(super) iova: u64,
    pub(super) mode: RxMode,
    /// Bytes that there are behind a packet's start in any chunk.
    pub(super) room: u16,
    pub(super) lender: Lender,
    pub(super) collector: Collector,
    /// Next descriptor to look at.
    pub(super) next: u32,
    /// Where the next chunk is posted.
    pub(super) posted: u32,
    pub(super) bad: u64,
}

/// Ends of a look at descriptors.
enum Odd {
    /// The device is not there yet, or the packet has no room.
    Wait,
    /// So many descriptors were dealt with.
    Took(u32),
}

impl<R: Registers> RxLive<R> {
    #[inline(always)]
    fn take<D: RxFormat, const HASH: bool>(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let before = batch.len();
        let first = self.next;
        while self.is_done::<D>() {
            let room = (self.posted.wrapping_sub(self.next) as usize).min(batch.room());
            let taken = self.plain::<D, HASH>(frames, batch, room);
            self.next = self.next.wrapping_add(taken as u32);
            if taken == room {
                break;
            }
            // Not there yet. Never look again: a device that takes back what it says could go on for ever.
            if !self.is_done::<D>() {
                break;
            }
            match self.odd::<D>(frames, batch) {
                Odd::Wait => break,
                Odd::Took(n) => self.next = self.next.wrapping_add(n),
            }
        }
        if self.next != first {
            self.handover.set(Word::RxNext, self.next.into());
        }
        batch.len() - before
    }

    /// Is the device done with the next descriptor? Not if none is posted: it would be an old one.
    #[inline(always)]
    fn is_done<D: RxFormat>(&self) -> bool {
        self.next != self.posted && self.ring.at(self.next)[1].load(Ordering::Acquire) & D::DONE != 0
    }

    /// Takes packets that lie in one descriptor each and are as they should be; says how many descriptors.
    #[inline(always)]
    fn plain<D: RxFormat, const HASH: bool>(
        &mut self,
        frames: &mut FrameCache,
        batch: &mut Batch,
        n: usize,
    ) -> usize {
        let places = runs(&self.places, self.next, n);
        let mut taken = 0;
        for (descriptors, places) in self.ring.runs(self.next, n).into_iter().zip(places) {
            if descriptors.is_empty() {
                break;
            }
            let ready = ready::<D>(descriptors, self.room);
            let (done, before) = (&descriptors[..ready], batch.len());
            let places = &places[..ready.min(places.len())];
            let lies = self.collector.release_each(frames, batch, places.len(), |n| {
                let len = D::len(done[n][1].load(Ordering::Relaxed));
                (places[n].load(Ordering::Relaxed), len.into())
            });
            taken += ready;
            if lies == 0 {
                for (frame, descriptor) in batch.as_mut_slice()[before..].iter_mut().zip(done) {
                    frame.set_flags(checked::<D>(descriptor[1].load(Ordering::Relaxed)));
                    if HASH {
                        note_hash(frames, frame, descriptor[0].load(Ordering::Relaxed));
                    }
                }
            }
            // Else it is not known which descriptor a frame came from; what the device says of it is not worth much.
            self.bad += lies as u64;
            if ready != descriptors.len() {
                break;
            }
        }
        taken
    }

    /// The next descriptor is not done, is damaged, or begins a packet of several.
    #[inline(never)]
    fn odd<D: RxFormat>(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> Odd {
        let outstanding = self.posted.wrapping_sub(self.next);
        let (mut n, mut damaged, mut ended) = (0, false, false);
        while !ended && n < outstanding.min(BATCH as u32) {
            let word = self.ring.at(self.next.wrapping_add(n))[1].load(Ordering::Acquire);
            if word & D::DONE == 0 {
                return Odd::Wait;
            }
            damaged |= word & D::DAMAGED != 0;
            ended = word & D::END != 0;
            n += 1;
        }
        // A packet that fills a whole batch or ring never ends; one that has only used up what was posted may.
        let endless = !ended && (n == BATCH as u32 || n == self.ring.most());
        if !ended && !endless {
            return Odd::Wait;
        }
        if !endless && !damaged && n as usize > batch.room() {
            return Odd::Wait;
        }
        let (start, room) = (batch.len(), u32::from(self.room));
        let mut broken = damaged || endless;
        self.bad += u64::from(broken);
        for at in 0..n {
            let position = self.next.wrapping_add(at);
            let word = self.ring.at(position)[1].load(Ordering::Acquire);
            let more = if at + 1 < n { FrameFlags::MORE } else { FrameFlags::empty() };
            let (address, len) = (self.address(position), u32::from(D::len(word)));
            // One that is too long is taken empty, and the packet dropped.
            let fits = len <= room;
            self.bad += u64::from(!fits);
            broken |= !fits;
            match self.collector.release(frames, address, if fits { len } else { 0 }) {
                Some(frame) if broken => frames.put(frame),
                Some(mut frame) => {
                    frame.set_flags(checked::<D>(word) | more);
                    // There is room for `n`.
                    if let Err(frame) = batch.push(frame) {
                        frames.put(frame);
                    }
                }
                None => {
                    self.bad += 1;
                    broken = true;
                }
            }
        }
        while broken && batch.len() > start {
            if let Some(frame) = batch.pop() {
                frames.put(frame);
            }
        }
        Odd::Took(n)
    }

    /// Where the packet of a posted descriptor starts.
    fn address(&self, position: u32) -> u64 {
        self.place(position).load(Ordering::Relaxed)
    }

    fn place(&self, position: u32) -> &AtomicU64 {
        &self.places[(position & self.ring.mask()) as usize]
    }

    /// Descriptors that could be posted.
    #[inline(always)]
    fn vacant(&self) -> u32 {
        self.ring.most().wrapping_sub(self.posted.wrapping_sub(self.next))
    }

    /// Gives the device free chunks, as far as there are some.
    #[inline(always)]
    fn refill(&mut self, frames: &mut FrameCache) {
        let want = self.vacant().min(WORK) as usize;
        let (from, iova) = (self.posted, self.iova);
        let places = runs(&self.places, from, want);
        for (descriptors, places) in self.ring.runs(from, want).into_iter().zip(places) {
            if descriptors.is_empty() {
                break;
            }
            let most = descriptors.len().min(places.len());
            let n = self.lender.lend_free(frames, most, self.posted, |n, address| {
                let descriptor = &descriptors[n];
                places[n].store(address, Ordering::Relaxed);
                descriptor[0].store(iova.wrapping_add(address), Ordering::Relaxed);
                descriptor[1].store(0, Ordering::Relaxed);
            });
            self.posted = self.posted.wrapping_add(n as u32);
            self.handover.set(Word::RxPosted, self.posted.into());
            if n < descriptors.len() {
                break;
            }
        }
        if self.posted != from {
            self.ring_tail();
        }
    }

    /// Fills the ring from the pool's depot; says how many chunks that took. The device is not told.
    pub(super) fn prime(&mut self) -> usize {
        let pool = Arc::clone(self.lender.pool());
        let drawn = pool.draw(&self.lender, self.vacant() as usize);
        for (position, address) in (self.posted..).zip(&drawn) {
            let chunk = (address >> pool.chunk_shift()) as u32;
            let start = address + u64::from(pool.start_offset(chunk));
            self.place(position).store(start, Ordering::Relaxed);
            let descriptor = self.ring.at(position);
            descriptor[0].store(self.iova.wrapping_add(start), Ordering::Relaxed);
            descriptor[1].store(0, Ordering::Relaxed);
        }
        self.posted = self.posted.wrapping_add(drawn.len() as u32);
        self.handover.set(Word::RxPosted, self.posted.into());
        drawn.len()
    }

    /// Tells the device how far descriptors are posted.
    #[inline(always)]
    pub(super) fn ring_tail(&self) {
        self.bar.write32(self.tail, self.posted & self.ring.mask());
    }

    fn survey(&mut self, survey: &mut Survey) {
        let most = self.ring.most();
        self.bad = self.handover.count(Word::RxBad);
        (self.next, self.posted) = self.handover.span(Word::RxNext, Word::RxPosted, most);
        let id = self.lender.id();
        let outstanding = self.posted.wrapping_sub(self.next);
        for ahead in 0..outstanding {
            survey.in_ring(id, self.address(self.next.wrapping_add(ahead)));
        }
        let (at, n) = self.lender.journaled();
        if at == self.posted && n <= most - outstanding {
            for ahead in 0..n {
                survey.unpublished(id, self.address(self.posted.wrapping_add(ahead)));
            }
        }
        // The dead worker may not have come to it.
        self.ring_tail();
    }
}

/// How many descriptors from the first on are received packets in one piece each, as they should be.
#[inline(always)]
fn ready<D: RxFormat>(descriptors: &[Descriptor], room: u16) -> usize {
    let whole = D::DONE | D::END;
    let odd = |descriptor: &Descriptor| {
        // Acquire: what the device wrote before it, the packet, is seen.
        let word = descriptor[1].load(Ordering::Acquire);
        word & (whole | D::DAMAGED) != whole || D::len(word) > room
    };
    descriptors.iter().position(odd).unwrap_or(descriptors.len())
}

/// What the device says about the transport checksum.
#[inline(always)]
fn checked<D: RxFormat>(word: u64) -> FrameFlags {
    let good = word & D::CHECKED != 0 && word & D::CHECK_FAILED == 0;
    FrameFlags::from_bits_retain(FrameFlags::RX_CHECKSUM_GOOD.bits() * u16::from(good))
}

/// Notes the RSS hash, which the first word of an extended descriptor has in its upper half.
#[inline(always)]
fn note_hash(frames: &FrameCache, frame: &mut Frame, word: u64) {
    frames.pool().set_meta(frame, FrameMeta { hash: (word >> 32) as u32, ..FrameMeta::default() });
}

impl<R: Registers> E1000eRx<R> {
    pub(super) fn new(live: RxLive<R>, holder: Arc<dyn Holder>) -> Self {
        Self { live: Some(live), parked: None, holder, bad: 0 }
    }

    /// A successor begins with what the half was when it was made.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        if let Some(live) = &mut self.live {
            (live.next, live.posted, live.bad) = (0, live.ring.most(), 0);
        }
        self.bad = 0;
    }

    /// Tells the device about what was posted when the half was made.
    pub(super) fn start(&self) {
        if let Some(live) = &self.live {
            live.ring_tail();
        }
    }
}

impl<R: Registers> RxQueue for E1000eRx<R> {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let got = match live.mode {
            RxMode::Extended => live.take::<Extended, false>(frames, batch),
            RxMode::Hash => live.take::<Extended, true>(frames, batch),
            RxMode::Legacy => live.take::<Legacy, false>(frames, batch),
        };
        if live.vacant() >= REFILL {
            live.refill(frames);
        }
        if live.bad != self.bad {
            self.bad = live.bad;
            live.handover.set(Word::RxBad, live.bad);
        }
        got
    }

    fn bad_descriptors(&self) -> u64 {
        self.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        if let Some(live) = &mut self.live {
            live.survey(survey);
            self.bad = live.bad;
        }
    }

    fn stop(&mut self) {
        if let Some(live) = self.live.take() {
            self.parked = Some((live.lender, live.collector));
            self.holder.rx_stopped();
        }
    }

    fn sweep(&mut self) -> u32 {
        self.parked.take().map_or(0, |custody| self.holder.sweep(custody))
    }
}
