//! The transmitting half: packets out, chunks back.
//!
//! Contract: no system call, allocation, lock, panic or log. A call writes the tail register at most once. Lines
//! that it touches: one of the ring for four packets (again when they are reclaimed), the chunk's owner byte,
//! and nothing of the packet unless it asks for a checksum.
//!
//! The device reports once a batch: the last descriptor of each carries RS, and its position is remembered. So
//! reclaiming looks at one descriptor a batch, and the last packet before a silence comes back like any other.

use super::device::Holder;
use super::layout::{
    MIN_PACKET, TX_CONTEXT_TCP, TX_DATA, TX_DONE, TX_EOP, TX_EXTENDED, TX_IFCS, TX_RS, TX_TRANSPORT_CHECKSUM,
    context, is_context,
};
use super::rings::{Handover, Ring, Word};
use crate::pci::Registers;
use crate::port::TxQueue;
use isoplane_memory::{BATCH, Batch, Collector, Frame, FrameCache, FrameFlags, Lender, Pool, Survey};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Descriptors that a call reclaims at most, but for the last batch it takes whole.
const WORK: u32 = 2 * BATCH as u32;
/// Frames that a packet may have: with a context they fit the smallest ring.
const MAX_FRAGMENTS: usize = 32;

/// Frames with one of these are looked at packet by packet.
const SPECIAL: FrameFlags = FrameFlags::MORE.union(FrameFlags::TX_CHECKSUM).union(FrameFlags::TX_TIMESTAMP);

/// The transmitting half of an e1000e queue whose registers are reached through `R`.
#[derive(Debug)]
pub struct E1000eTx<R> {
    live: Option<TxLive<R>>,
    parked: Option<(Lender, Collector)>,
    holder: Arc<dyn Holder>,
    /// Frames that the device could not send; `reclaim` gives them back.
    refused: Batch,
    refusals: (u64, u64),
    in_flight: usize,
    bad: u64,
}

// SAFETY: the frames inside stay with the half wherever it moves, and leave it only through its methods, to
// whoever has it then; everything else in it is `Send` by itself.
#[allow(unsafe_code, reason = "a half is handed to its worker's thread with what it holds")]
unsafe impl<R: Registers> Send for E1000eTx<R> {}

/// What a transmitting half is made of.
#[derive(Debug)]
pub(super) struct TxLive<R> {
    pub(super) ring: Ring,
    pub(super) handover: Handover,
    pub(super) bar: R,
    /// Offset of the tail register.
    pub(super) tail: usize,
    /// Where the device finds byte 0 of chunk 0.
    pub(super) iova: u64,
    /// Longest packet.
    pub(super) longest: u32,
    /// The queue is the only one, so that the device's context is ours and lasts.
    pub(super) alone: bool,
    pub(super) lender: Lender,
    pub(super) collector: Collector,
    /// Where the next descriptor is written.
    pub(super) posted: u32,
    /// Oldest descriptor not reclaimed.
    pub(super) clean: u32,
    /// Ends of batches that are not reclaimed.
    pub(super) marks: Marks,
    /// Context descriptors that are not reclaimed.
    pub(super) contexts: u32,
    /// The last context that the device was given.
    pub(super) context: Option<Checksum>,
    pub(super) bad: u64,
}

/// Positions in order, oldest first; as many as a ring has descriptors.
#[derive(Debug)]
pub(super) struct Marks {
    positions: Box<[u32]>,
    first: u32,
    end: u32,
}

impl Marks {
    /// Room for `size` of them, a power of two.
    pub(super) fn new(size: u32) -> Self {
        Self { positions: vec![0; size as usize].into_boxed_slice(), first: 0, end: 0 }
    }

    #[inline(always)]
    fn push(&mut self, position: u32) {
        let mask = self.positions.len() - 1;
        self.positions[self.end as usize & mask] = position;
        self.end = self.end.wrapping_add(1);
    }

    #[inline(always)]
    fn first(&self) -> Option<u32> {
        let mask = self.positions.len() - 1;
        (self.first != self.end).then(|| self.positions[self.first as usize & mask])
    }

    #[inline(always)]
    fn pop(&mut self) {
        self.first = self.first.wrapping_add(1);
    }

    fn clear(&mut self) {
        self.first = self.end;
    }
}

/// A checksum from `start` to the packet's end, stored at `at`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checksum {
    start: u8,
    at: u8,
    tcp: bool,
}

/// Offset of the checksum in a TCP header (RFC 9293, section 3.1).
const TCP_CHECKSUM_AT: u16 = 16;

impl Checksum {
    /// What a packet's first frame asks for; `Err` when the device cannot do it.
    fn of(pool: &Pool, frame: &Frame) -> Result<Option<Self>, ()> {
        if !frame.flags().contains(FrameFlags::TX_CHECKSUM) {
            return Ok(None);
        }
        let meta = pool.meta(frame).filter(|_| frame.flags().contains(FrameFlags::META)).ok_or(())?;
        let at = meta.csum_start.checked_add(meta.csum_offset).ok_or(())?;
        if u32::from(at) + 2 > u32::from(frame.len()) {
            return Err(());
        }
        let start = u8::try_from(meta.csum_start).map_err(drop)?;
        let at = u8::try_from(at).map_err(drop)?;
        Ok(Some(Self { start, at, tcp: meta.csum_offset == TCP_CHECKSUM_AT }))
    }
}

/// May this frame be sent as it is, a whole packet?
#[inline(always)]
fn is_plain(frame: &Frame, longest: u32) -> bool {
    let len = u32::from(frame.len());
    len.wrapping_sub(MIN_PACKET) <= longest - MIN_PACKET && !frame.flags().intersects(SPECIAL)
}

impl<R: Registers> TxLive<R> {
    #[inline(always)]
    fn vacant(&self) -> u32 {
        self.ring.most().wrapping_sub(self.posted.wrapping_sub(self.clean))
    }

    /// Writes the descriptors of whole packets in single frames from the front of the batch. `None`: there is
    /// something special among them.
    #[inline(always)]
    fn describe_plain(&self, batch: &Batch) -> Option<usize> {
        let n = batch.len().min(self.vacant() as usize);
        let (addresses, iova, longest) = (self.lender.pool().addresses(), self.iova, self.longest);
        let mut waiting = batch.as_slice()[..n].iter();
        for run in self.ring.runs(self.posted, n) {
            for (descriptor, frame) in run.iter().zip(waiting.by_ref()) {
                if !is_plain(frame, longest) {
                    return None;
                }
                let address = addresses.of(frame)?;
                descriptor[0].store(iova.wrapping_add(address), Ordering::Relaxed);
                descriptor[1].store(u64::from(frame.len()) | TX_EOP | TX_IFCS, Ordering::Relaxed);
            }
        }
        Some(n)
    }

    /// Gives the device the first `n` frames of the batch, in `descriptors` descriptors that are written.
    #[inline(always)]
    fn publish(&mut self, batch: &mut Batch, n: usize, descriptors: u32) {
        if descriptors == 0 {
            return;
        }
        let end = self.posted.wrapping_add(descriptors);
        let last = &self.ring.at(end.wrapping_sub(1))[1];
        last.store(last.load(Ordering::Relaxed) | TX_RS, Ordering::Relaxed);
        // All of them: their addresses were asked for, which has checked the pool.
        self.lender.lend_front(batch, n, self.posted, descriptors);
        self.posted = end;
        self.handover.set(Word::TxPosted, end.into());
        self.marks.push(end);
        self.ring_tail();
    }

    #[inline(always)]
    fn ring_tail(&self) {
        self.bar.write32(self.tail, self.posted & self.ring.mask());
    }

    /// What a packet needs; `Err` when it cannot be sent.
    fn look(&self, packet: &[Frame]) -> Result<Option<Checksum>, ()> {
        let total: u32 = packet.iter().map(|frame| u32::from(frame.len())).sum();
        let fits = (MIN_PACKET..=self.longest).contains(&total) && packet.len() <= MAX_FRAGMENTS;
        let parts = packet.iter().all(|frame| frame.len() != 0);
        let asks = packet.iter().any(|frame| frame.flags().contains(FrameFlags::TX_TIMESTAMP));
        let first = packet.first().ok_or(())?;
        if !fits || !parts || asks { Err(()) } else { Checksum::of(self.lender.pool(), first) }
    }

    /// Writes a packet's descriptors `ahead` of the posted ones; says how many, or `None` when they do not fit
    /// or a frame is of another pool.
    fn describe(&mut self, packet: &[Frame], checksum: Option<Checksum>, ahead: u32) -> Option<u32> {
        let fresh = checksum.filter(|sum| !self.alone || self.context != Some(*sum));
        let needs = packet.len() as u32 + u32::from(fresh.is_some());
        if needs > self.vacant() - ahead || packet.iter().any(|frame| self.lender.address(frame).is_none()) {
            return None;
        }
        let mut at = self.posted.wrapping_add(ahead);
        if let Some(sum) = fresh {
            let tcp = if sum.tcp { TX_CONTEXT_TCP } else { 0 };
            let descriptor = self.ring.at(at);
            descriptor[0].store(context(sum.start, sum.at), Ordering::Relaxed);
            descriptor[1].store(TX_EXTENDED | tcp, Ordering::Relaxed);
            at = at.wrapping_add(1);
            self.context = Some(sum);
            self.contexts += 1;
        }
        let mut kind =
            if checksum.is_some() { TX_EXTENDED | TX_DATA | TX_TRANSPORT_CHECKSUM } else { 0 } | TX_IFCS;
        for frame in packet {
            let address = self.lender.address(frame)?;
            let end = if frame.has_more() { 0 } else { TX_EOP };
            let descriptor = self.ring.at(at);
            descriptor[0].store(self.iova.wrapping_add(address), Ordering::Relaxed);
            descriptor[1].store(u64::from(frame.len()) | kind | end, Ordering::Relaxed);
            // Packet options count in the first descriptor only.
            kind &= !TX_TRANSPORT_CHECKSUM;
            at = at.wrapping_add(1);
        }
        Some(needs)
    }

    /// Takes back what the device has reported; says how many frames came to `frames` and how many
    /// descriptors had one.
    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> (usize, usize) {
        let (mut got, mut held) = (0, 0);
        let first = self.clean;
        while let Some(end) = self.marks.first() {
            let done = self.ring.at(end.wrapping_sub(1))[1].load(Ordering::Acquire) & TX_DONE != 0;
            if !done || self.clean.wrapping_sub(first) >= WORK {
                break;
            }
            self.marks.pop();
            let n = end.wrapping_sub(self.clean) as usize;
            let (iova, some, mut contexts) = (self.iova, self.contexts != 0, 0);
            for run in self.ring.runs(self.clean, n) {
                if run.is_empty() {
                    break;
                }
                let before = contexts;
                let came = self.collector.collect_each(frames, run.len(), |n| {
                    let [address, word] = &run[n];
                    if some && is_context(word.load(Ordering::Relaxed)) {
                        contexts += 1;
                        return u64::MAX;
                    }
                    address.load(Ordering::Relaxed).wrapping_sub(iova)
                });
                got += came;
                self.bad += (run.len() - came).saturating_sub((contexts - before) as usize) as u64;
            }
            self.contexts = self.contexts.saturating_sub(contexts);
            held += n.saturating_sub(contexts as usize);
            self.clean = end;
        }
        if self.clean != first {
            self.handover.set(Word::TxClean, self.clean.into());
        }
        (got, held)
    }

    /// Says how many frames are in the ring.
    fn survey(&mut self, survey: &mut Survey) -> usize {
        let most = self.ring.most();
        (self.clean, self.posted) = self.handover.span(Word::TxClean, Word::TxPosted, most);
        self.bad = self.handover.count(Word::TxBad);
        self.marks.clear();
        (self.contexts, self.context) = (0, None);
        let id = self.lender.id();
        let outstanding = self.posted.wrapping_sub(self.clean);
        let mut held = 0;
        for ahead in 0..outstanding {
            let position = self.clean.wrapping_add(ahead);
            let [address, word] = self.ring.at(position);
            let word = word.load(Ordering::Relaxed);
            if word & TX_RS != 0 || ahead + 1 == outstanding {
                self.marks.push(position.wrapping_add(1));
            }
            if is_context(word) {
                self.contexts += 1;
            } else {
                survey.in_ring(id, address.load(Ordering::Relaxed).wrapping_sub(self.iova));
                held += 1;
            }
        }
        let (at, n) = self.lender.journaled();
        if at == self.posted && n <= most - outstanding {
            for ahead in 0..n {
                let [address, word] = self.ring.at(self.posted.wrapping_add(ahead));
                if !is_context(word.load(Ordering::Relaxed)) {
                    survey.unpublished(id, address.load(Ordering::Relaxed).wrapping_sub(self.iova));
                }
            }
        }
        // The dead worker may not have come to it.
        self.ring_tail();
        held
    }
}

impl<R: Registers> E1000eTx<R> {
    pub(super) fn new(live: TxLive<R>, holder: Arc<dyn Holder>) -> Self {
        let (refused, refusals) = (Batch::new(), (0, 0));
        Self { live: Some(live), parked: None, holder, refused, refusals, in_flight: 0, bad: 0 }
    }

    /// A successor begins with what the half was when it was made.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        if let Some(live) = &mut self.live {
            (live.posted, live.clean, live.bad) = (0, 0, 0);
            (live.contexts, live.context) = (0, None);
            live.marks.clear();
        }
        self.refused = Batch::new();
        (self.refusals, self.in_flight, self.bad) = ((0, 0), 0, 0);
    }

    /// Sends with every packet looked at by itself. Says how many frames left the batch.
    #[inline(never)]
    fn transmit_checked(&mut self, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let mut good = Batch::new();
        let (mut described, mut refused) = (0, 0);
        while let Some(last) = batch.iter().position(|frame| !frame.has_more()) {
            let packet = &batch.as_slice()[..=last];
            let frames = packet.len();
            if let Ok(checksum) = live.look(packet) {
                let Some(n) = live.describe(packet, checksum, described) else { break };
                described += n;
                batch.move_to(&mut good, frames);
            } else if self.refused.room() >= frames {
                refused += frames;
                self.refusals.1 += packet.iter().map(|frame| u64::from(frame.len())).sum::<u64>();
                batch.move_to(&mut self.refused, frames);
            } else {
                break;
            }
        }
        let sent = good.len();
        live.publish(&mut good, sent, described);
        self.in_flight += sent;
        if refused != 0 {
            self.refusals.0 += refused as u64;
            live.handover.set(Word::TxRefused, self.refusals.0);
        }
        sent + refused
    }
}

impl<R: Registers> TxQueue for E1000eTx<R> {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let Some(n) = live.describe_plain(batch) else { return self.transmit_checked(batch) };
        live.publish(batch, n, n as u32);
        self.in_flight += n;
        n
    }

    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let (mut got, held) = live.reclaim(frames);
        self.in_flight = self.in_flight.saturating_sub(held);
        if !self.refused.is_empty() {
            got += self.refused.len();
            frames.put_batch(&mut self.refused);
        }
        if live.bad != self.bad {
            self.bad = live.bad;
            live.handover.set(Word::TxBad, live.bad);
        }
        got
    }

    /// Frames of packets that were shorter than 17 bytes, too long, in too many or in empty pieces, or asked
    /// for a time or for a checksum that starts or goes beyond byte 255.
    #[inline(always)]
    fn refused(&self) -> (u64, u64) {
        self.refusals
    }

    #[inline(always)]
    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn bad_descriptors(&self) -> u64 {
        self.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        if let Some(live) = &mut self.live {
            // Handles of refused frames died with the worker; the survey gives those frames back as free.
            self.refused = Batch::new();
            self.in_flight = live.survey(survey);
            self.bad = live.bad;
            self.refusals.0 = live.handover.count(Word::TxRefused);
        }
    }

    fn stop(&mut self) {
        if let Some(live) = self.live.take() {
            for frame in self.refused.drain() {
                // Into custody, which is swept. They are of this pool: no other frame is refused.
                let _ = live.lender.commit(frame);
            }
            self.parked = Some((live.lender, live.collector));
            self.holder.tx_stopped();
        }
        self.in_flight = 0;
    }

    fn sweep(&mut self) -> u32 {
        self.parked.take().map_or(0, |custody| self.holder.sweep(custody))
    }
}
