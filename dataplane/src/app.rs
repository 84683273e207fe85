//! What a worker runs.
//!
//! Contract: [`App::packets`] is called with each batch that arrived and takes every frame out of it:
//! sent, dropped with a reason, or kept by the app. Nothing in a turn allocates, locks, panics, enters
//! the kernel or does unbounded work. A frame that the app leaves in the batch is dropped and counted
//! as [`DropReason::Unhandled`].

use isoplane_drivers::{LinkState, Queue, TxQueue};
use isoplane_isolation::SlowPathError;
use isoplane_memory::stats::Block;
use isoplane_memory::{Batch, Frame, FrameCache, Kernel, Pool};
use std::sync::Arc;

/// A port of this worker: its place in the worker's list of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PortId(pub u8);

impl PortId {
    /// As an index.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Why a frame was dropped. Every drop has a reason, and each reason has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum DropReason {
    /// The transmit ring of the port it should leave by was full.
    TxFull = 0,
    /// No free frame was left to copy it into (flooding).
    NoFrame = 1,
    /// The app left it in the batch.
    Unhandled = 2,
    /// Too short or too long for what it claims to be.
    Malformed = 3,
    /// By policy: not for us, same port, filtered, reserved address.
    Policy = 4,
    /// The VLAN is not allowed on that port.
    Vlan = 5,
    /// Flooding was over its budget.
    Storm = 6,
    /// There is no such port.
    NoPort = 7,
    /// The port could never send it: empty, too long, or asking for what the port cannot do.
    Refused = 8,
    /// Came in by no interface of the router, or by one that is down, or would leave by one.
    NoInterface = 9,
    /// No route, or one that says to drop it.
    NoRoute = 10,
    /// No hops left.
    HopLimit = 11,
    /// Too long for the next link.
    TooBig = 12,
    /// Its neighbour is not resolved, and it cannot wait.
    Resolution = 13,
    /// For the host, and more than that takes, or there is no way there.
    Punt = 14,
    /// From or to an address that cannot be on a wire, or is not forwarded.
    Martian = 15,
    /// Its source is not reached through where it came from.
    ReversePath = 16,
    /// Options or extension headers that are not forwarded.
    Options = 17,
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = 18;
    /// Counter names, in the order of the reasons.
    pub const NAMES: [&'static str; Self::COUNT] = [
        "drop_tx_full",
        "drop_no_frame",
        "drop_unhandled",
        "drop_malformed",
        "drop_policy",
        "drop_vlan",
        "drop_storm",
        "drop_no_port",
        "drop_refused",
        "drop_no_interface",
        "drop_no_route",
        "drop_hop_limit",
        "drop_too_big",
        "drop_resolution",
        "drop_punt",
        "drop_martian",
        "drop_reverse_path",
        "drop_options",
    ];
}

/// What a worker runs each turn. Lives in the worker's own process: what it shares with the program
/// is what the builder declared, nothing else.
pub trait App {
    /// Takes the packets that arrived on `from`.
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch);

    /// Called once a turn, after the packets of all ports: timers, messages.
    fn turn(&mut self, turn: &mut Turn<'_>) {
        let _ = turn;
    }

    /// Gives frames that the app keeps back, before the worker stops.
    fn drain(&mut self, turn: &mut Turn<'_>) {
        let _ = turn;
    }

    /// Shall the app be given synthetic packets before its worker is isolated, so that what it touches for
    /// the first time faults then and not under its first real packets? See
    /// [`rehearsal`](crate::rehearsal). No packet of that time leaves the worker and no counter of
    /// [`Turn`] shows it; an app that says yes answers for everything else that it does with packets
    /// (messages to the program, tables).
    fn wants_rehearsal(&self) -> bool {
        false
    }

    /// Called after the rehearsal, of which [`App::drain`] was the end: be as new.
    fn rehearsed(&mut self) {}
}

/// One port of a worker as its loop sees it.
#[derive(Debug)]
pub(crate) struct WorkerPort {
    pub(crate) queue: Queue,
    /// Frames on their way out in this turn.
    pub(crate) out: Batch,
    /// The rest of a packet whose beginning was dropped is dropped too.
    pub(crate) dropping: bool,
    /// What the queue had refused, and found to be lies, when it was last looked at.
    pub(crate) refused: (u64, u64),
    pub(crate) lies: u64,
    /// Where the watcher publishes the link state, in the first word.
    pub(crate) link: Option<Block>,
    /// Per-port counters; see `turns::port_field`.
    pub(crate) counters: Block,
}

/// What an app may use during a turn.
#[derive(Debug)]
pub struct Turn<'a> {
    pub(crate) ports: &'a mut [WorkerPort],
    pub(crate) frames: &'a mut FrameCache,
    pub(crate) pool: &'a Arc<Pool>,
    pub(crate) now: u64,
    pub(crate) drops: &'a mut [u64; DropReason::COUNT],
    pub(crate) app_counters: &'a Block,
    pub(crate) stopping: bool,
}

impl<'a> Turn<'a> {
    /// The pool that all frames of this worker are of. The reference outlives the turn's borrow, so
    /// that bytes can be looked at while frames are sent.
    #[inline(always)]
    #[must_use]
    pub const fn pool(&self) -> &'a Arc<Pool> {
        self.pool
    }

    /// Nanoseconds since the worker's clock was made; read once a turn.
    #[inline(always)]
    #[must_use]
    pub const fn now(&self) -> u64 {
        self.now
    }

    /// Number of ports of this worker.
    #[inline(always)]
    #[must_use]
    pub const fn ports(&self) -> usize {
        self.ports.len()
    }

    /// State of a port's link, as the program's watcher saw it last (some 50 ms ago at most);
    /// `Unknown` where nobody watches or there is no such port.
    #[inline(always)]
    #[must_use]
    pub fn link(&self, port: PortId) -> LinkState {
        let block = self.ports.get(port.index()).and_then(|port| port.link.as_ref());
        block.map_or(LinkState::Unknown, |block| match block.get(0) {
            1 => LinkState::Up,
            2 => LinkState::Down,
            3 => LinkState::Gone,
            _ => LinkState::Unknown,
        })
    }

    /// True when the worker is asked to stop: send what is held, take nothing new on.
    #[must_use]
    pub const fn stopping(&self) -> bool {
        self.stopping
    }

    /// Free frames of this worker, to look at; [`Turn::new_frame`], [`Turn::copy`], [`Turn::give_back`]
    /// and [`Turn::drop`] use them.
    #[inline(always)]
    #[must_use]
    pub const fn frames(&self) -> &FrameCache {
        self.frames
    }

    /// Takes frames back that the app made and will not send.
    #[inline(always)]
    pub fn give_back(&mut self, batch: &mut Batch) {
        self.frames.put_batch(batch);
    }

    /// Takes back one frame that the app is done with: received and understood, not dropped.
    #[inline(always)]
    pub fn take_back(&mut self, frame: Frame) {
        self.frames.put(frame);
    }

    /// A free frame made `len` bytes long, for a packet of our own; its bytes are undefined.
    #[inline(always)]
    pub fn new_frame(&mut self, len: u16) -> Option<Frame> {
        let mut frame = self.frames.get()?;
        if self.pool.reset(&mut frame, len) {
            return Some(frame);
        }
        self.frames.put(frame);
        None
    }

    /// Sends a frame on `to`. The frames of one packet are sent one after the other, in order. When
    /// the port's transmit ring is full the packet is dropped, whole, and counted.
    #[inline(always)]
    pub fn send(&mut self, to: PortId, frame: Frame) {
        let Some(port) = self.ports.get_mut(to.index()) else {
            return self.drop(frame, DropReason::NoPort);
        };
        if port.dropping {
            port.dropping = frame.has_more();
            return self.drop(frame, DropReason::TxFull);
        }
        if let Err(frame) = port.out.push(frame) {
            self.send_full(to, frame);
        }
    }

    /// The outgoing batch is full: send it now, and if that does not help, drop the packet.
    #[cold]
    fn send_full(&mut self, to: PortId, frame: Frame) {
        self.flush(to);
        let port = &mut self.ports[to.index()];
        let Err(frame) = port.out.push(frame) else { return };
        // Drop what is there of this packet, and remember to drop the rest.
        port.dropping = frame.has_more();
        self.drop(frame, DropReason::TxFull);
        loop {
            let port = &mut self.ports[to.index()];
            match port.out.pop() {
                Some(head) if head.has_more() => self.drop(head, DropReason::TxFull),
                Some(last_of_another) => {
                    // There is room: the frame was just taken out.
                    let _ = port.out.push(last_of_another).map_err(|f| self.frames.put(f));
                    break;
                }
                None => break,
            }
        }
    }

    /// Sends all frames of `batch` on `to`.
    #[inline(always)]
    pub fn send_all(&mut self, to: PortId, batch: &mut Batch) {
        let whole = match self.ports.get_mut(to.index()) {
            Some(port) if !port.dropping && port.out.is_empty() => {
                let n = batch.len();
                batch.move_to(&mut port.out, n)
            }
            _ => 0,
        };
        if whole == 0 || !batch.is_empty() {
            for frame in batch.drain() {
                self.send(to, frame);
            }
        }
    }

    /// Drops a frame, with its reason.
    #[inline(always)]
    pub fn drop(&mut self, frame: Frame, reason: DropReason) {
        self.drops[reason as usize] += 1;
        self.frames.put(frame);
    }

    /// Drops all frames of a batch.
    #[inline(always)]
    pub fn drop_all(&mut self, batch: &mut Batch, reason: DropReason) {
        self.drops[reason as usize] += batch.len() as u64;
        self.frames.put_batch(batch);
    }

    /// Counts a drop of a packet that never had a frame of its own (a copy that could not be made).
    #[inline(always)]
    pub fn count_drop(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
    }

    /// A copy of the frame, with its length, flags and mark; `None` when no free frame is left.
    #[inline]
    pub fn copy(&mut self, frame: &Frame) -> Option<Frame> {
        let mut copy = self.frames.get()?;
        if !self.pool.respan(&mut copy, frame.offset(), frame.len()) {
            self.frames.put(copy);
            return None;
        }
        self.pool.bytes_mut(&mut copy).copy_from_slice(self.pool.bytes(frame));
        copy.set_mark(frame.mark());
        if let Some(meta) =
            self.pool.meta(frame).filter(|_| frame.flags().contains(isoplane_memory::FrameFlags::META))
        {
            self.pool.set_meta(&mut copy, meta);
        }
        copy.set_flags(frame.flags());
        Some(copy)
    }

    /// Adds to one of the counters that the builder declared for this app, by its place there.
    #[inline(always)]
    pub fn count(&mut self, counter: usize, n: u64) {
        self.app_counters.add(counter, n);
    }

    /// Sets one of the gauges that the builder declared for this app, by its place there.
    #[inline(always)]
    pub fn gauge(&mut self, gauge: usize, value: u64) {
        self.app_counters.set(gauge, value);
    }

    /// Visits the kernel by permission: system calls are allowed in `visit`, and the CPU is quiesced after
    /// it. Counted and timed. For what is rare: the packets that arrive meanwhile wait.
    ///
    /// # Errors
    /// [`SlowPathError::OverBudget`] when the worker's budget is used up; `visit` has not run then.
    pub fn slow_path<R>(&self, visit: impl FnOnce(&Kernel) -> R) -> Result<R, SlowPathError> {
        isoplane_isolation::visit(visit)
    }

    /// Hands the outgoing frames of a port to its ring now instead of at the end of the turn.
    #[inline(always)]
    pub fn flush(&mut self, to: PortId) {
        if let Some(port) = self.ports.get_mut(to.index()) {
            crate::turns::flush(port, self.drops);
            let _ = port.queue.tx.in_flight();
        }
    }
}
