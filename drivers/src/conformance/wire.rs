//! Ports under test with what a worker would have: frames, a batch, a kick once a turn.

use super::packet;
use super::{Fixture, Opened};
use crate::port::{RxQueue, TxQueue};
use crate::queue::Queue;
use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, Frame, FrameCache, FrameFlags, Kernel, Pool};
use std::collections::VecDeque;
use std::sync::Arc;

/// One end: a queue and the frames of the worker that owns it.
pub struct End {
    /// The queue.
    pub queue: Queue,
    /// Its worker's free frames.
    pub frames: FrameCache,
    /// Whole packets of the suite that have arrived, in order.
    pub arrived: VecDeque<Vec<u8>>,
    /// Packets that others sent (a kernel talks on its own), dropped.
    pub foreign: u64,
}

/// Open ports with an end each.
pub struct Wire<'f> {
    /// The fixture.
    pub fixture: &'f mut dyn Fixture,
    /// The pool.
    pub pool: Arc<Pool>,
    /// The ports.
    pub opened: Opened,
    /// One end, or two.
    pub ends: Vec<End>,
    driver: &'static str,
}

/// Frames for each end's worker, in windows.
const SHARE: usize = 3;

impl<'f> Wire<'f> {
    /// Opens the fixture's ports on a new pool.
    pub fn open(fixture: &'f mut dyn Fixture) -> Self {
        let pool = fixture.pool();
        Self::open_on(fixture, pool)
    }

    /// Opens the fixture's ports on `pool`.
    pub fn open_on(fixture: &'f mut dyn Fixture, pool: Arc<Pool>) -> Self {
        let mut opened = fixture.open(&pool);
        let frames = (fixture.window() * SHARE) as u32;
        let driver = opened.a.driver();
        let mut ends = Vec::new();
        for port in [Some(&mut opened.a), opened.b.as_mut()].into_iter().flatten() {
            assert!(port.pool().same_as(&pool), "{driver}: the port works on another pool");
            assert!(port.queues() >= 1, "{driver}: no queue");
            let queue = port.take_queue(0).unwrap_or_else(|| panic!("{driver}: queue 0 is not handed out"));
            assert!(port.take_queue(0).is_none(), "{driver}: queue 0 was handed out twice");
            assert!(port.take_queue(port.queues()).is_none(), "{driver}: a queue past the last");
            let frames = pool.cache(port.name(), frames).unwrap_or_else(|e| panic!("{driver}: {e}"));
            ends.push(End { queue, frames, arrived: VecDeque::new(), foreign: 0 });
        }
        Self { fixture, pool, opened, ends, driver }
    }

    /// The driver's name, for messages.
    #[must_use]
    pub const fn driver(&self) -> &'static str {
        self.driver
    }

    /// The end that gets what end `from` sends.
    #[must_use]
    pub fn other(&self, from: usize) -> usize {
        self.ends.len() - 1 - from
    }

    /// Makes frames for a packet at the end of `batch`, with bytes in them. False when frames or room
    /// do not suffice; nothing has changed then.
    pub fn build(&mut self, from: usize, packet: &[u8], batch: &mut Batch) -> bool {
        let step = self.pool.max_frame() as usize;
        let parts = packet.len().div_ceil(step).max(1);
        let frames = &mut self.ends[from].frames;
        if frames.len() < parts || batch.room() < parts {
            return false;
        }
        for part in 0..parts {
            let bytes = &packet[part * step..packet.len().min((part + 1) * step)];
            let mut frame = frames.get().expect("counted above");
            assert!(self.pool.reset(&mut frame, bytes.len() as u16), "a part fits a frame");
            self.pool.bytes_mut(&mut frame).copy_from_slice(bytes);
            if part + 1 < parts {
                frame.set_flags(FrameFlags::MORE);
            }
            batch.push(frame).expect("counted above");
        }
        true
    }

    /// One turn of every worker: reclaim, kick, receive. Says whether anything moved.
    pub fn poll(&mut self) -> bool {
        let mut moved = false;
        for end in 0..self.ends.len() {
            let mut batch = Batch::new();
            moved |= self.turn(end, &mut batch) != 0;
            self.accept(end, &mut batch);
        }
        moved
    }

    /// One turn of one worker that leaves what arrives in `batch`. Says how many frames moved.
    pub fn turn(&mut self, at: usize, batch: &mut Batch) -> usize {
        let driver = self.driver;
        let End { queue, frames, .. } = &mut self.ends[at];
        let kernel = Kernel::outside_isolation();
        let reclaimed = queue.tx.reclaim(frames);
        let had = batch.len();
        let received = queue.rx.receive(frames, batch);
        assert_eq!(batch.len(), had + received, "{driver}: receive says what it added");
        for (half, wants) in [("tx", queue.tx.wants_kick()), ("rx", queue.rx.wants_kick())] {
            if wants {
                let kicked = if half == "tx" { queue.tx.kick(&kernel) } else { queue.rx.kick(&kernel) };
                kicked.unwrap_or_else(|e| panic!("{driver}: {half} kick: {e}"));
            }
        }
        received + reclaimed
    }

    /// Takes packets out of a batch, checks them and notes them as arrived; frees their frames.
    pub fn accept(&mut self, at: usize, batch: &mut Batch) {
        let driver = self.driver;
        let end = &mut self.ends[at];
        let mut packet: Vec<u8> = Vec::new();
        for frame in batch.drain() {
            packet.extend(self.pool.bytes(&frame));
            let more = frame.has_more();
            end.frames.put(frame);
            if more {
                continue;
            }
            let bytes = std::mem::take(&mut packet);
            match packet::check(&bytes) {
                Ok(None) if bytes.len() >= packet::HEADER || !is_prefix(&bytes) => end.foreign += 1,
                Ok(_) => end.arrived.push_back(bytes),
                Err(what) => panic!("{driver}: {what}"),
            }
        }
        assert!(packet.is_empty(), "{driver}: a packet is split across batches");
    }

    /// Polls until `done` or until nothing has moved for as long as the fixture's patience lasts.
    pub fn settle(&mut self, mut done: impl FnMut(&Self) -> bool) -> bool {
        let mut idle = 0;
        while !done(self) {
            if self.poll() {
                idle = 0;
                continue;
            }
            idle += 1;
            if idle > self.fixture.patience() {
                return false;
            }
            self.fixture.idle();
        }
        true
    }

    /// Polls until nothing has moved for a while: a port may look at its other side in some turns only.
    pub fn drain(&mut self) {
        let (mut idle, longest) = (0, self.fixture.patience().min(100));
        while idle < longest {
            idle = if self.poll() { 0 } else { idle + 1 };
            if idle != 0 {
                self.fixture.idle();
            }
        }
    }

    /// Sends packets from end `from`, never more than a window on the way, and waits for all of them
    /// to arrive, the same and in order.
    pub fn carry(&mut self, from: usize, packets: &[Vec<u8>], mut batch_size: impl FnMut() -> usize) {
        let to = self.other(from);
        let window = self.fixture.window();
        let parts = |packet: &Vec<u8>| packet.len().div_ceil(self.pool.max_frame() as usize).max(1);
        let sizes: Vec<usize> = packets.iter().map(parts).collect();
        let (mut sent, mut on_the_way, mut arrived) = (0, 0, 0);
        let mut batch = Batch::new();
        let mut idle = 0;
        while arrived < packets.len() {
            let want = batch_size();
            let mut filled = 0;
            while filled < want && sent < packets.len() && on_the_way + sizes[sent] <= window {
                if !self.build(from, &packets[sent], &mut batch) {
                    break;
                }
                on_the_way += sizes[sent];
                sent += 1;
                filled += 1;
            }
            let before = batch.len();
            let n = self.ends[from].queue.tx.transmit(&mut batch);
            assert_eq!(batch.len(), before - n, "{}: transmit says what it took", self.driver);
            let moved = self.poll();
            while let Some(packet) = self.ends[to].arrived.pop_front() {
                let expected = packets.get(arrived);
                if expected != Some(&packet) {
                    panic!("{}: {}", self.driver, unexpected(&packet, expected, arrived));
                }
                on_the_way -= sizes[arrived];
                arrived += 1;
            }
            idle = if moved || n != 0 { 0 } else { idle + 1 };
            assert!(
                idle <= self.fixture.patience(),
                "{}: {arrived} of {sent} packets sent have arrived, and nothing moves any more",
                self.driver
            );
            if idle != 0 {
                self.fixture.idle();
            }
        }
        assert!(batch.is_empty(), "{}: all was sent", self.driver);
    }

    fn balance(&self) -> Balance {
        let hands: Vec<(u8, u32)> =
            self.ends.iter().map(|e| (e.frames.id(), e.frames.len() as u32)).collect();
        Balance::of(&self.pool, &hands)
    }

    /// Polls until no end has frames in flight and every frame of the pool is on a free list, in the
    /// depot or lent to a port.
    pub fn assert_quiet(&mut self, when: &str) {
        self.settle(|wire| {
            wire.ends.iter().all(|end| end.queue.tx.in_flight() == 0) && wire.balance().is_whole()
        });
        let left: Vec<usize> = self.ends.iter().map(|e| e.queue.tx.in_flight()).collect();
        let none = left.iter().all(|left| *left == 0);
        assert!(none, "{}: {when}: transmitted frames never come back: {left:?}", self.driver);
        let balance = self.balance();
        assert!(balance.is_whole(), "{}: {when}: {balance:?}", self.driver);
    }

    /// Closes queues and ports and checks that all frames are on free lists or in the depot. Gives
    /// the pool back.
    pub fn close(self, when: &str) -> Arc<Pool> {
        let mut caches = Vec::new();
        for end in self.ends {
            end.queue.close();
            caches.push(end.frames);
        }
        drop(self.opened);
        let mut free = self.pool.in_depot();
        for cache in caches {
            assert_eq!(cache.owned(), cache.len() as u32, "{}: {when}: a worker's frames", self.driver);
            free += cache.len() as u32;
            // SAFETY: all frames of this worker are on its list: the line above has counted them.
            #[allow(unsafe_code, reason = "gives owner ids back, so that cases can reopen many times")]
            unsafe {
                cache.retire();
            }
        }
        assert_eq!(free, self.pool.chunks(), "{}: {when}: frames after close", self.driver);
        self.pool
    }

    /// Takes all free frames of an end away.
    pub fn starve(&mut self, at: usize) -> Vec<Frame> {
        std::iter::from_fn(|| self.ends[at].frames.get()).collect()
    }

    /// Gives them back.
    pub fn feed(&mut self, at: usize, frames: Vec<Frame>) {
        for frame in frames {
            self.ends[at].frames.put(frame);
        }
    }
}

/// Could this be one of the suite's packets, cut short?
fn is_prefix(bytes: &[u8]) -> bool {
    let whole = packet::make(0, packet::HEADER - 4);
    bytes.iter().zip(&whole).all(|(a, b)| a == b)
}

fn unexpected(packet: &[u8], expected: Option<&Vec<u8>>, arrived: usize) -> String {
    let name = |bytes: &[u8]| match packet::check(bytes) {
        Ok(Some(sequence)) => format!("packet {sequence} of {} bytes", bytes.len()),
        _ => format!("a packet of {} bytes", bytes.len()),
    };
    let wanted = expected.map_or_else(|| "nothing".to_owned(), |bytes| name(bytes));
    format!("after {arrived} packets arrives {}, not {wanted}", name(packet))
}
