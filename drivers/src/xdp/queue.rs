//! The hot halves: frames to and from the four rings of one socket.
//!
//! Contract: no system call but in `kick`; no allocation, lock, panic or log; at most two batches of
//! work a call. What the kernel puts in a ring is checked by `isoplane_memory::transfer`. A descriptor
//! that the kernel would refuse is never written, since it would not give its frame back: such frames
//! are counted and come back through `reclaim`.

use super::layout::{XDP_PKT_CONTD, XDP_TX_METADATA, XdpDesc};
use super::metadata::{self, TxTime, TxTimes};
use super::slot::Slot;
use super::socket::Socket;
use super::umem::Geometry;
use crate::port::{KickError, RxQueue, TxQueue};
use isoplane_memory::{
    BATCH, Batch, Collector, Frame, FrameCache, FrameFlags, Inbox, Kernel, Lender, Outbox, Survey, Taken,
};
use std::sync::Arc;

/// Frames that a call moves at most in each ring.
const WORK: usize = 2 * BATCH;
/// Free slots that make refilling worth while; a ring smaller than that is refilled at half.
const REFILL: usize = BATCH / 2;

/// The receiving half of an AF_XDP queue.
#[derive(Debug)]
pub struct XdpRx {
    live: Option<RxLive>,
    parked: Option<(Lender, Collector)>,
    slot: Arc<Slot>,
    bad: u64,
}

#[derive(Debug)]
struct RxLive {
    fill: Outbox<u64>,
    rx: Inbox<XdpDesc>,
    geometry: Geometry,
    refill: usize,
    socket: Arc<Socket>,
}

impl XdpRx {
    pub(super) fn new(
        fill: Outbox<u64>,
        rx: Inbox<XdpDesc>,
        geometry: Geometry,
        socket: Arc<Socket>,
        slot: Arc<Slot>,
    ) -> Self {
        let refill = REFILL.min(fill.ring().capacity() as usize / 2).max(1);
        Self { live: Some(RxLive { fill, rx, geometry, refill, socket }), parked: None, slot, bad: 0 }
    }
}

impl XdpRx {
    /// Fills the fill ring from the pool's depot; says how many chunks that took.
    pub(super) fn prime(&mut self, n: usize) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let geometry = live.geometry;
        live.fill.prime(n, |address| geometry.fill(address))
    }
}

/// What a received descriptor says.
#[inline(always)]
fn taken(geometry: Geometry, desc: XdpDesc) -> Taken {
    let more = desc.options & XDP_PKT_CONTD != 0;
    let flags = if more { FrameFlags::MORE } else { FrameFlags::empty() };
    Taken { address: geometry.received(desc.addr), len: desc.len, flags }
}

impl RxQueue for XdpRx {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let geometry = live.geometry;
        let got = live.rx.take(frames, batch, |desc| taken(geometry, desc));
        let free = live.fill.free(live.refill);
        if free >= live.refill {
            live.fill.post_free(frames, free.min(WORK), |_, address| geometry.fill(address));
        }
        let bad = live.rx.bad() + live.fill.ring().corrupt();
        if bad != self.bad {
            self.bad = bad;
            live.socket.note_bad(0, bad);
        }
        got
    }

    #[inline(always)]
    fn wants_kick(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.socket.rx_wants_kick())
    }

    fn kick(&mut self, _kernel: &Kernel) -> Result<(), KickError> {
        self.live.as_ref().map_or(Ok(()), |live| live.socket.kick_rx())
    }

    fn bad_descriptors(&self) -> u64 {
        self.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        if let Some(live) = &mut self.live {
            let geometry = live.geometry;
            live.fill.survey(survey, |address| address);
            live.rx.survey(survey, |desc| geometry.received(desc.addr));
        }
    }

    fn stop(&mut self) {
        if let Some(live) = self.live.take() {
            // Nothing more arrives, whoever else has the socket.
            live.socket.delist();
            self.parked = Some((live.fill.into_parts().1, live.rx.into_parts().1));
            drop(live.socket);
            self.slot.half_stopped();
        }
    }

    fn sweep(&mut self) -> u32 {
        self.slot.sweep(self.parked.take())
    }
}

/// The transmitting half of an AF_XDP queue.
#[derive(Debug)]
pub struct XdpTx {
    live: Option<TxLive>,
    parked: Option<(Lender, Collector)>,
    slot: Arc<Slot>,
    /// Frames that the kernel would not take; `reclaim` gives them back.
    refused: Batch,
    /// Frames refused so far, and their bytes.
    refusals: (u64, u64),
    in_flight: usize,
    bad: u64,
}

// SAFETY: the frames inside stay with the half wherever it moves, and leave it only through its methods,
// to whoever has it then; everything else in it is `Send` by itself.
#[allow(unsafe_code, reason = "a half is handed to its worker's thread with what it holds")]
unsafe impl Send for XdpTx {}

#[derive(Debug)]
struct TxLive {
    tx: Outbox<XdpDesc>,
    completion: Inbox<u64>,
    rules: TxRules,
    times: TxTimes,
    socket: Arc<Socket>,
}

/// What the kernel takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct TxRules {
    /// Bytes that one frame may have.
    pub(super) room: u32,
    /// Frames that a packet may have.
    pub(super) segments: usize,
    /// Frames may ask for a checksum or a time.
    pub(super) metadata: bool,
}

const ASKS: FrameFlags = FrameFlags::TX_CHECKSUM.union(FrameFlags::TX_TIMESTAMP);

impl XdpTx {
    pub(super) fn new(
        tx: Outbox<XdpDesc>,
        completion: Inbox<u64>,
        rules: TxRules,
        socket: Arc<Socket>,
        slot: Arc<Slot>,
    ) -> Self {
        let times = TxTimes::new(if rules.metadata { tx.lender().pool().chunks() } else { 0 });
        let live = Some(TxLive { tx, completion, rules, times, socket });
        Self { live, parked: None, slot, refused: Batch::new(), refusals: (0, 0), in_flight: 0, bad: 0 }
    }

    /// When a frame sent with [`FrameFlags::TX_TIMESTAMP`] left, oldest first; known once the frame
    /// has been reclaimed. The last 64 are kept.
    pub fn pop_time(&mut self) -> Option<TxTime> {
        self.live.as_mut()?.times.pop()
    }

    /// Sends with every packet looked at by itself: some want metadata, or cannot be sent. Says how
    /// many frames left the batch.
    #[cold]
    #[inline(never)]
    fn transmit_checked(&mut self, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let mut good = Batch::new();
        let mut refused = 0;
        while let Some(last) = batch.iter().position(|frame| !frame.has_more()) {
            let packet = &mut batch.as_mut_slice()[..=last];
            let frames = packet.len();
            if live.rules.allow(packet) && metadata::write(live.tx.lender().pool(), packet) {
                batch.move_to(&mut good, frames);
            } else if self.refused.room() >= frames {
                refused += frames;
                self.refusals.1 += packet.iter().map(|frame| u64::from(frame.len())).sum::<u64>();
                batch.move_to(&mut self.refused, frames);
            } else {
                break;
            }
        }
        for frame in good.iter().filter(|frame| frame.flags().contains(FrameFlags::TX_TIMESTAMP)) {
            live.times.ask(frame.chunk());
        }
        if refused != 0 {
            self.refusals.0 += refused as u64;
            live.socket.note_refused(self.refusals.0);
        }
        let sent = live.tx.post(&mut good, describe);
        self.in_flight += sent;
        if !good.is_empty() {
            // The ring is full: what is left goes back in front of what was not looked at.
            for frame in good.iter() {
                live.times.forget(frame.chunk());
            }
            for frame in batch.drain() {
                // Both together came out of one batch, so there is room.
                let _ = good.push(frame);
            }
            std::mem::swap(batch, &mut good);
        }
        sent + refused
    }
}

impl TxRules {
    /// May this packet be sent?
    fn allow(&self, packet: &[Frame]) -> bool {
        let whole = packet.len() <= self.segments;
        let sizes = packet.iter().all(|f| f.len() != 0 && u32::from(f.len()) <= self.room);
        let asks = packet.iter().any(|f| f.flags().intersects(ASKS));
        whole && sizes && (self.metadata || !asks)
    }

    /// May all of these be sent as they are? Cheaper than [`TxRules::allow`] and stricter.
    #[inline(always)]
    fn plain(&self, frames: &[Frame]) -> bool {
        let (mut odd, mut run) = (false, 0);
        for frame in frames {
            odd |= frame.len() == 0 || u32::from(frame.len()) > self.room;
            odd |= frame.flags().intersects(ASKS);
            run = if frame.has_more() { run + 1 } else { 0 };
            odd |= run >= self.segments;
        }
        !odd
    }
}

/// The descriptor of a frame.
#[inline(always)]
fn describe(frame: &Frame, addr: u64) -> XdpDesc {
    let mut options = 0;
    if frame.has_more() {
        options |= XDP_PKT_CONTD;
    }
    if frame.flags().intersects(ASKS) {
        options |= XDP_TX_METADATA;
    }
    XdpDesc { addr, len: u32::from(frame.len()), options }
}

impl TxQueue for XdpTx {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        if !live.rules.plain(batch.as_slice()) {
            return self.transmit_checked(batch);
        }
        let sent = live.tx.post(batch, describe);
        self.in_flight += sent;
        sent
    }

    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let mut got = if live.times.waiting() {
            live.times.reclaim(&mut live.completion, frames)
        } else {
            live.completion.collect(frames, WORK, |address| address)
        };
        self.in_flight = self.in_flight.saturating_sub(got);
        if !self.refused.is_empty() {
            got += self.refused.len();
            frames.put_batch(&mut self.refused);
        }
        let bad = live.completion.bad() + live.tx.ring().corrupt();
        if bad != self.bad {
            self.bad = bad;
            live.socket.note_bad(1, bad);
        }
        got
    }

    #[inline(always)]
    fn wants_kick(&self) -> bool {
        self.live.as_ref().is_some_and(|live| live.socket.tx_wants_kick())
    }

    fn kick(&mut self, _kernel: &Kernel) -> Result<(), KickError> {
        self.live.as_ref().map_or(Ok(()), |live| live.socket.kick_tx().map(drop))
    }

    /// Frames that were empty, too long for a chunk, of a packet in more frames than the kernel takes,
    /// or asking for what the port cannot do.
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
            live.tx.survey(survey, |desc| desc.addr);
            live.completion.survey(survey, |address| address);
            // Its handles died with it: those of refused frames, which the survey gives back as free,
            // and who had asked for times.
            self.refused = Batch::new();
            live.times.reset();
            // What the dead worker had in flight is in custody: that many will come back.
            self.in_flight = survey.held(live.completion.collector().id());
        }
    }

    fn stop(&mut self) {
        if let Some(live) = self.live.take() {
            let lender = live.tx.into_parts().1;
            for frame in self.refused.drain() {
                // Into custody, which is swept. They are of this pool: a frame of another was
                // never taken by `post`, and leaks in its own pool, as everywhere.
                let _ = lender.commit(frame);
            }
            self.parked = Some((lender, live.completion.into_parts().1));
            drop(live.socket);
            self.slot.half_stopped();
        }
        self.in_flight = 0;
    }

    fn sweep(&mut self) -> u32 {
        self.slot.sweep(self.parked.take())
    }
}
