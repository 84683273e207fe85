//! Faults on purpose: a decorator around any receiving or transmitting half that drops, duplicates,
//! delays, reorders, corrupts and truncates packets, and refuses to transmit.
//!
//! Contract: what happens is a function of the seed and of the packets, so a run can be repeated. A
//! packet in several frames suffers one fate. No frame is lost: a dropped one goes back to the worker,
//! a duplicate is a copy in a free frame (or is not made, and counted, when there is none), and what
//! is held back is shown by `in_flight` and given up on close. Memory is allocated at construction only.

use crate::port::{KickError, RxQueue, TxQueue};
use isoplane_memory::{BATCH, Batch, Frame, FrameCache, Kernel, Pool, Survey};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How often each fault happens, in packets of a million, and how. All zero: none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FaultConfig {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// The packet vanishes.
    pub drop_ppm: u32,
    /// The packet comes twice, the second right after the first.
    pub duplicate_ppm: u32,
    /// The packet overtakes the one before it, if that one is still held.
    pub reorder_ppm: u32,
    /// One bit of one frame changes.
    pub flip_bit_ppm: u32,
    /// One byte of one frame changes to any value.
    pub corrupt_byte_ppm: u32,
    /// The packet's last frame is cut to a shorter length, perhaps 0.
    pub truncate_ppm: u32,
    /// The packet waits, and with it all that come after it.
    pub delay_ppm: u32,
    /// Turns that a delayed packet waits.
    pub delay_turns: u32,
    /// The whole call is refused, as by a full ring: transmit takes nothing, receive gives nothing.
    /// In calls of a million.
    pub refuse_ppm: u32,
    /// Frames that pass in one turn at most; more wait. 0 is no limit.
    pub frames_per_turn: usize,
}

/// What was done, by fault; totals. Shared with the decorator, which alone writes.
#[derive(Debug, Default)]
pub struct FaultCounters {
    counts: [AtomicU64; Fault::COUNT],
}

/// The faults that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Fault {
    /// Packets that vanished.
    Dropped = 0,
    /// Packets that came twice.
    Duplicated = 1,
    /// Packets that should have come twice when no free frame was left.
    NotDuplicated = 2,
    /// Packets that overtook another.
    Reordered = 3,
    /// Packets with a bit flipped.
    BitFlipped = 4,
    /// Packets with a byte changed.
    ByteCorrupted = 5,
    /// Packets cut short.
    Truncated = 6,
    /// Packets delayed.
    Delayed = 7,
    /// Calls refused.
    Refused = 8,
}

impl Fault {
    /// Number of faults.
    pub const COUNT: usize = 9;
}

impl FaultCounters {
    /// How often `fault` happened.
    #[must_use]
    pub fn get(&self, fault: Fault) -> u64 {
        self.counts[fault as usize].load(Ordering::Relaxed)
    }

    fn add(&self, fault: Fault) {
        let count = &self.counts[fault as usize];
        count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

/// One step of the SplitMix64 generator (Steele, Lea and Flood, 2014).
pub(crate) const fn split_mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Frames that can be held back. A batch is taken in while all of it, doubled, fits.
const HELD: usize = 16 * BATCH;

#[derive(Debug)]
struct Held {
    due: u64,
    frame: Frame,
}

/// Decides the packets' fates; both halves have one.
#[derive(Debug)]
struct Injector {
    config: FaultConfig,
    state: u64,
    turn: u64,
    passed_this_turn: usize,
    pool: Arc<Pool>,
    held: VecDeque<Held>,
    /// Where the last held packet begins, and when it is due; for the next one to overtake it.
    last: Option<usize>,
    counters: Arc<FaultCounters>,
}

// SAFETY: the frames inside stay with the half wherever it moves, and leave it only through its methods,
// to whoever has it then; nothing in it is tied to a thread.
#[allow(unsafe_code, reason = "a half is handed to its worker's thread with what it holds")]
unsafe impl Send for Injector {}

impl Injector {
    fn new(pool: &Arc<Pool>, config: FaultConfig) -> Self {
        Self {
            config,
            state: split_mix(config.seed),
            turn: 0,
            passed_this_turn: 0,
            pool: Arc::clone(pool),
            held: VecDeque::with_capacity(HELD),
            last: None,
            counters: Arc::default(),
        }
    }

    fn random(&mut self) -> u64 {
        self.state = split_mix(self.state);
        self.state
    }

    fn happens(&mut self, ppm: u32, fault: Fault) -> bool {
        let happens = self.chance(ppm);
        if happens {
            self.counters.add(fault);
        }
        happens
    }

    fn next_turn(&mut self) {
        self.turn += 1;
        self.passed_this_turn = 0;
    }

    fn has_room(&self) -> bool {
        self.held.len() + 2 * BATCH <= HELD
    }

    /// Decides the fate of every packet of `batch`, whole packets, at most [`BATCH`] frames; empties it.
    fn take(&mut self, frames: &mut FrameCache, batch: &mut Batch) {
        let mut packet = Batch::new();
        for frame in batch.drain() {
            let more = frame.has_more();
            // As large as the batch that the frames are of.
            if let Err(frame) = packet.push(frame) {
                frames.put(frame);
            }
            if !more {
                self.decide(frames, &mut packet);
            }
        }
        // A packet without an end: none of our ports gives one.
        frames.put_batch(&mut packet);
    }

    fn decide(&mut self, frames: &mut FrameCache, packet: &mut Batch) {
        let config = self.config;
        if self.happens(config.drop_ppm, Fault::Dropped) {
            frames.put_batch(packet);
            return;
        }
        if self.happens(config.flip_bit_ppm, Fault::BitFlipped) {
            let bit = 1 << (self.random() % 8);
            self.change_a_byte(packet, |byte| byte ^ bit);
        }
        if self.happens(config.corrupt_byte_ppm, Fault::ByteCorrupted) {
            let to = self.random() as u8;
            self.change_a_byte(packet, |_| to);
        }
        if self.happens(config.truncate_ppm, Fault::Truncated) {
            let chance = self.random();
            if let Some(last) = packet.as_mut_slice().last_mut() {
                last.truncate((chance % u64::from(last.len()).max(1)) as u16);
            }
        }
        let mut due = self.held.back().map_or(self.turn, |held| held.due.max(self.turn));
        if self.happens(config.delay_ppm, Fault::Delayed) {
            due = due.max(self.turn + u64::from(config.delay_turns));
        }
        let mut copy = None;
        if self.chance(config.duplicate_ppm) {
            copy = self.copy(frames, packet);
            self.counters.add(if copy.is_some() { Fault::Duplicated } else { Fault::NotDuplicated });
        }
        let overtakes = self.last.filter(|_| self.chance(config.reorder_ppm));
        let start = self.held.len();
        let n = packet.len();
        for frame in packet.drain() {
            self.held.push_back(Held { due, frame });
        }
        self.last = Some(start);
        if let Some(before) = overtakes.filter(|before| *before < start) {
            self.counters.add(Fault::Reordered);
            // The packet before moves behind this one; both are due when this one is.
            let moved = start - before;
            for held in self.held.range_mut(before..start) {
                held.due = due;
            }
            self.held.make_contiguous()[before..].rotate_left(moved);
            self.last = Some(before + n);
        }
        if let Some(mut copy) = copy {
            self.last = Some(self.held.len());
            for frame in copy.drain() {
                self.held.push_back(Held { due, frame });
            }
        }
    }

    fn chance(&mut self, ppm: u32) -> bool {
        ppm != 0 && self.random() % 1_000_000 < u64::from(ppm)
    }

    fn change_a_byte(&mut self, packet: &mut Batch, change: impl FnOnce(u8) -> u8) {
        let (which, at) = (self.random() as usize, self.random() as usize);
        let which = which % packet.len().max(1);
        if let Some(frame) = packet.as_mut_slice().get_mut(which) {
            let bytes = self.pool.bytes_mut(frame);
            let at = at % bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = change(*byte);
            }
        }
    }

    fn copy(&self, frames: &mut FrameCache, packet: &Batch) -> Option<Batch> {
        if frames.len() < packet.len() {
            return None;
        }
        let mut copy = Batch::new();
        for original in packet.iter() {
            let Some(mut frame) = frames.get() else { break };
            if self.pool.respan(&mut frame, original.offset(), original.len()) {
                self.pool.bytes_mut(&mut frame).copy_from_slice(self.pool.bytes(original));
            }
            if let Some(meta) = self.pool.meta(original) {
                self.pool.set_meta(&mut frame, meta);
            }
            frame.set_flags(original.flags());
            frame.set_mark(original.mark());
            if let Err(frame) = copy.push(frame) {
                frames.put(frame);
            }
        }
        Some(copy)
    }

    /// Moves packets that are due to `batch`, whole ones, as far as there is room; says how many frames.
    fn release(&mut self, batch: &mut Batch) -> usize {
        let mut limit = batch.room();
        if self.config.frames_per_turn != 0 {
            limit = limit.min(self.config.frames_per_turn.saturating_sub(self.passed_this_turn));
        }
        let mut whole = 0;
        for (n, held) in (1..=limit).zip(&self.held) {
            if held.due > self.turn {
                break;
            }
            if !held.frame.has_more() {
                whole = n;
            }
        }
        for held in self.held.drain(..whole) {
            // `whole` is at most the room.
            let _ = batch.push(held.frame);
        }
        self.last = self.last.and_then(|last| last.checked_sub(whole));
        self.passed_this_turn += whole;
        whole
    }

    fn sweep(&mut self) -> u32 {
        let mut swept = 0;
        for held in self.held.drain(..) {
            swept += u32::from(self.pool.surrender(held.frame).is_ok());
        }
        swept
    }

    /// After the worker died: its handles died with it, and the survey gives it their chunks.
    fn forget(&mut self) {
        self.held.clear();
        self.last = None;
    }
}

/// A receiving half with faults.
#[derive(Debug)]
pub struct FaultRx<R> {
    inner: R,
    injector: Injector,
    stopped: bool,
}

impl<R: RxQueue> FaultRx<R> {
    /// Wraps a half. `pool` is that of its port.
    #[must_use]
    pub fn new(inner: R, pool: &Arc<Pool>, config: FaultConfig) -> Self {
        Self { inner, injector: Injector::new(pool, config), stopped: false }
    }

    /// The counters, to be kept when the half is handed on.
    #[must_use]
    pub const fn counters(&self) -> &Arc<FaultCounters> {
        &self.injector.counters
    }
}

impl<R: RxQueue> RxQueue for FaultRx<R> {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        if self.stopped {
            return 0;
        }
        self.injector.next_turn();
        if self.injector.happens(self.injector.config.refuse_ppm, Fault::Refused) {
            return 0;
        }
        if self.injector.has_room() {
            let mut arrived = Batch::new();
            self.inner.receive(frames, &mut arrived);
            self.injector.take(frames, &mut arrived);
        }
        self.injector.release(batch)
    }
    fn wants_kick(&self) -> bool {
        self.inner.wants_kick()
    }
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        self.inner.kick(kernel)
    }
    fn bad_descriptors(&self) -> u64 {
        self.inner.bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.injector.forget();
        self.inner.survey(survey);
    }
    fn stop(&mut self) {
        self.stopped = true;
        self.inner.stop();
    }
    fn sweep(&mut self) -> u32 {
        self.injector.sweep() + self.inner.sweep()
    }
}

/// A transmitting half with faults. Fates are decided in `reclaim`, where there are free frames for
/// copies; a worker calls it once a turn, after `transmit`.
#[derive(Debug)]
pub struct FaultTx<T> {
    inner: T,
    injector: Injector,
    /// Accepted by `transmit`, not decided yet.
    accepted: Box<[Batch; ACCEPTED]>,
    /// The one being filled; those after it are empty.
    filling: usize,
    /// Released, not taken by the inner half yet.
    leaving: Batch,
    stopped: bool,
}

// SAFETY: the frames inside stay with the half wherever it moves, and leave it only through its methods,
// to whoever has it then; nothing in it is tied to a thread.
#[allow(unsafe_code, reason = "a half is handed to its worker's thread with what it holds")]
unsafe impl<T: Send> Send for FaultTx<T> {}

/// Batches that `transmit` accepts in one turn.
const ACCEPTED: usize = 4;

impl<T: TxQueue> FaultTx<T> {
    /// Wraps a half. `pool` is that of its port.
    #[must_use]
    pub fn new(inner: T, pool: &Arc<Pool>, config: FaultConfig) -> Self {
        Self {
            inner,
            injector: Injector::new(pool, config),
            accepted: Box::new([const { Batch::new() }; ACCEPTED]),
            filling: 0,
            leaving: Batch::new(),
            stopped: false,
        }
    }

    /// The counters, to be kept when the half is handed on.
    #[must_use]
    pub const fn counters(&self) -> &Arc<FaultCounters> {
        &self.injector.counters
    }
}

impl<T: TxQueue> TxQueue for FaultTx<T> {
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        if self.stopped
            || batch.is_empty()
            || self.injector.happens(self.injector.config.refuse_ppm, Fault::Refused)
        {
            return 0;
        }
        let mut taken = 0;
        while let Some(accepted) = self.accepted.get_mut(self.filling) {
            taken += batch.move_to(accepted, BATCH);
            if batch.is_empty() || self.filling + 1 == ACCEPTED {
                break;
            }
            self.filling += 1;
        }
        taken
    }

    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        if self.stopped {
            return 0;
        }
        let had = frames.len();
        self.injector.next_turn();
        let mut decided = 0;
        while decided <= self.filling && self.injector.has_room() {
            self.injector.take(frames, &mut self.accepted[decided]);
            decided += 1;
        }
        // What had to wait moves to the front.
        self.accepted.rotate_left(decided % ACCEPTED);
        self.filling = self.filling.saturating_sub(decided);
        loop {
            if !self.leaving.is_empty() && self.inner.transmit(&mut self.leaving) == 0 {
                break;
            }
            if self.injector.release(&mut self.leaving) == 0 && self.leaving.is_empty() {
                break;
            }
        }
        self.inner.reclaim(frames);
        frames.len().saturating_sub(had)
    }

    fn wants_kick(&self) -> bool {
        self.inner.wants_kick()
    }
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        self.inner.kick(kernel)
    }
    fn refused(&self) -> (u64, u64) {
        self.inner.refused()
    }
    fn in_flight(&self) -> usize {
        let accepted: usize = self.accepted.iter().map(Batch::len).sum();
        accepted + self.injector.held.len() + self.leaving.len() + self.inner.in_flight()
    }
    fn bad_descriptors(&self) -> u64 {
        self.inner.bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.injector.forget();
        self.leaving = Batch::new();
        self.filling = 0;
        for accepted in self.accepted.iter_mut() {
            *accepted = Batch::new();
        }
        self.inner.survey(survey);
    }
    fn stop(&mut self) {
        self.stopped = true;
        self.inner.stop();
    }
    fn sweep(&mut self) -> u32 {
        let mut swept = self.injector.sweep();
        for batch in self.accepted.iter_mut().chain([&mut self.leaving]) {
            for frame in batch.drain() {
                swept += u32::from(self.injector.pool.surrender(frame).is_ok());
            }
        }
        swept + self.inner.sweep()
    }
}
