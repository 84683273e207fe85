//! The loop of a worker: for each port receive and let the app run, then transmit, reclaim, kick and
//! count.
//!
//! Contract: a turn allocates nothing, takes no lock, does a bounded amount of work and enters the
//! kernel only in [`Turns::kick`], which a worker that has a kicker never calls. It touches, per port:
//! the two ring index lines, the descriptors, the batch, one counter line.

use crate::app::{App, DropReason, PortId, Turn, WorkerPort};
use isoplane_drivers::{KickError, Queue, RxQueue, TxQueue};
use isoplane_memory::stats::{Block, BlockId, Field, Segment, SegmentBuilder};
use isoplane_memory::{Batch, FrameCache, Kernel, Pool, RegionError};
use std::sync::Arc;

/// Words of a port's counter block.
pub mod port_field {
    use super::Field;
    /// Frames received.
    pub const RX_FRAMES: usize = 0;
    /// Bytes received.
    pub const RX_BYTES: usize = 1;
    /// Frames sent.
    pub const TX_FRAMES: usize = 2;
    /// Bytes sent.
    pub const TX_BYTES: usize = 3;
    /// Kicks made by the worker itself.
    pub const KICKS: usize = 4;
    /// Kicks that failed for good.
    pub const KICK_ERRORS: usize = 5;
    /// Descriptors from the other side that were lies.
    pub const BAD_DESCRIPTORS: usize = 6;
    /// The fields, in order.
    pub const FIELDS: [Field; 7] = [
        Field::counter("rx_frames"),
        Field::counter("rx_bytes"),
        Field::counter("tx_frames"),
        Field::counter("tx_bytes"),
        Field::counter("kicks"),
        Field::counter("kick_errors"),
        Field::counter("bad_descriptors"),
    ];
}

/// Words of a worker's counter block: these, then one for each [`DropReason`].
pub mod worker_field {
    use super::{DropReason, Field};
    /// Turns made.
    pub const TURNS: usize = 0;
    /// Turns in which at least one frame arrived.
    pub const BUSY_TURNS: usize = 1;
    /// Free frames at the end of the turn.
    pub const FREE_FRAMES: usize = 2;
    /// First of the drop counters.
    pub const DROPS: usize = 3;
    /// The fields, in order.
    #[must_use]
    pub fn fields() -> Vec<Field> {
        let mut fields =
            vec![Field::counter("turns"), Field::counter("busy_turns"), Field::gauge("free_frames")];
        fields.extend(DropReason::NAMES.map(Field::counter));
        fields
    }
}

/// Which blocks of the statistics segment belong to a worker.
#[derive(Debug, Clone)]
pub struct WorkerBlocks {
    worker: BlockId,
    ports: Vec<BlockId>,
    /// Where the watcher publishes each port's link state; empty when there is no watcher.
    links: Vec<BlockId>,
    app: BlockId,
}

impl WorkerBlocks {
    /// Declares a worker's blocks in a segment: its own, one a port, and the app's own fields.
    pub fn declare(segment: &mut SegmentBuilder, worker: &str, ports: &[&str], app: &[Field]) -> Self {
        Self {
            worker: segment.block(worker, "", &worker_field::fields()),
            ports: ports.iter().map(|port| segment.block(worker, port, &port_field::FIELDS)).collect(),
            links: Vec::new(),
            app: segment.block(worker, "app", app),
        }
    }

    /// Names the blocks whose first word is the link state of each port, in the ports' order.
    pub(crate) fn follow_links(&mut self, links: Vec<BlockId>) {
        self.links = links;
    }
}

/// A worker's ports, frames and counters: what turns are made with.
#[derive(Debug)]
pub struct Turns {
    ports: Vec<WorkerPort>,
    frames: FrameCache,
    pool: Arc<Pool>,
    batch: Batch,
    drops: [u64; DropReason::COUNT],
    counters: Block,
    app_counters: Block,
    stopping: bool,
    until_lies: u32,
}

/// What turns are made with besides frames: exchanged for a [rehearsal](crate::rehearsal).
#[derive(Debug)]
pub(crate) struct Scene {
    ports: Vec<WorkerPort>,
    counters: Block,
    app_counters: Block,
    drops: [u64; DropReason::COUNT],
    until_lies: u32,
}

/// Turns between two looks at how often ports were lied to.
const LIES_EVERY: u32 = 256;

impl WorkerPort {
    /// `link` is where the watcher publishes the link state.
    fn new(queue: Queue, link: Option<Block>, counters: Block) -> Self {
        let (refused, lies) = (queue.tx.refused(), lies(&queue));
        Self { queue, out: Batch::new(), dropping: false, refused, lies, link, counters }
    }
}

fn lies(queue: &Queue) -> u64 {
    queue.rx.bad_descriptors().wrapping_add(queue.tx.bad_descriptors())
}

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TurnReport {
    /// Frames that arrived.
    pub received: usize,
}

impl Turns {
    /// Puts a worker together. `blocks` were declared in this segment, for as many ports as there are
    /// queues.
    ///
    /// # Panics
    /// When they were not: cold code that runs before the first packet.
    #[must_use]
    pub fn new(queues: Vec<Queue>, frames: FrameCache, segment: &Segment, blocks: &WorkerBlocks) -> Self {
        assert_eq!(queues.len(), blocks.ports.len(), "one block a port");
        let block = |id| segment.block(id).unwrap_or_else(|| panic!("{id:?} is of another segment"));
        let ports = queues.into_iter().zip(&blocks.ports).enumerate().map(|(at, (queue, id))| {
            WorkerPort::new(queue, blocks.links.get(at).map(|id| block(*id)), block(*id))
        });
        Self {
            ports: ports.collect(),
            pool: Arc::clone(frames.pool()),
            frames,
            batch: Batch::new(),
            drops: [0; DropReason::COUNT],
            counters: block(blocks.worker),
            app_counters: block(blocks.app),
            stopping: false,
            until_lies: LIES_EVERY,
        }
    }

    /// The pool that all frames of this worker are of.
    #[must_use]
    pub const fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Takes no more packets from the ports; turns go on for what is held and in flight.
    pub const fn stop_receiving(&mut self) {
        self.stopping = true;
    }

    /// Frames that ports have not given back yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.ports.iter().map(|port| port.queue.tx.in_flight()).sum()
    }

    /// Lets the app give back what it holds, and sends that.
    pub fn drain<A: App>(&mut self, app: &mut A, now: u64) {
        let (_, mut turn) = self.borrow(now);
        app.drain(&mut turn);
        self.send();
        self.count(0);
        self.count_lies();
    }

    /// Takes the worker apart: queues and free frames. Frames on their way out go to the free list.
    #[must_use]
    pub fn into_parts(mut self) -> (Vec<Queue>, FrameCache) {
        self.frames.put_batch(&mut self.batch);
        for port in &mut self.ports {
            self.frames.put_batch(&mut port.out);
        }
        (self.ports.into_iter().map(|port| port.queue).collect(), self.frames)
    }

    /// Number of ports.
    #[must_use]
    pub const fn ports(&self) -> usize {
        self.ports.len()
    }

    /// Free frames.
    #[must_use]
    pub const fn free_frames(&self) -> usize {
        self.frames.len()
    }

    /// A scene with these queues, whose links are unknown, and counters that nobody reads.
    pub(crate) fn scene(&self, queues: Vec<Queue>) -> Result<Scene, RegionError> {
        let like = self.ports.iter().map(|port| &port.counters);
        let mut blocks = Block::unpublished(like.chain([&self.counters, &self.app_counters]))?;
        let counters = self.counters.clone();
        let app_counters = blocks.pop().unwrap_or_else(|| counters.clone());
        let counters = blocks.pop().unwrap_or(counters);
        let ports = queues.into_iter().zip(blocks);
        let ports = ports.map(|(queue, counters)| WorkerPort::new(queue, None, counters)).collect();
        Ok(Scene { ports, counters, app_counters, drops: [0; DropReason::COUNT], until_lies: LIES_EVERY })
    }

    /// Does something in another scene. Frames that are left there come back, also when it panics.
    pub(crate) fn on(&mut self, scene: Scene, act: impl FnOnce(&mut Self)) {
        struct Stage<'a>(&'a mut Turns, Scene);
        impl Stage<'_> {
            const fn exchange(&mut self) {
                let Self(turns, scene) = self;
                std::mem::swap(&mut turns.ports, &mut scene.ports);
                std::mem::swap(&mut turns.counters, &mut scene.counters);
                std::mem::swap(&mut turns.app_counters, &mut scene.app_counters);
                std::mem::swap(&mut turns.drops, &mut scene.drops);
                std::mem::swap(&mut turns.until_lies, &mut scene.until_lies);
            }
        }
        impl Drop for Stage<'_> {
            fn drop(&mut self) {
                self.exchange();
                let Self(turns, scene) = self;
                turns.frames.put_batch(&mut turns.batch);
                for port in &mut scene.ports {
                    turns.frames.put_batch(&mut port.out);
                    port.queue.tx.reclaim(&mut turns.frames);
                }
            }
        }
        let mut stage = Stage(self, scene);
        stage.exchange();
        act(stage.0);
    }

    #[inline(always)]
    fn borrow(&mut self, now: u64) -> (&mut Batch, Turn<'_>) {
        let turn = Turn {
            ports: &mut self.ports,
            frames: &mut self.frames,
            pool: &self.pool,
            now,
            drops: &mut self.drops,
            app_counters: &self.app_counters,
            stopping: self.stopping,
        };
        (&mut self.batch, turn)
    }

    #[inline(always)]
    fn send(&mut self) {
        for port in &mut self.ports {
            flush(port, &mut self.drops);
            // A packet ends in the batch that it began in, so what was being dropped is over.
            port.dropping = false;
            port.queue.tx.reclaim(&mut self.frames);
            if !port.out.is_empty() {
                self.drops[DropReason::TxFull as usize] += port.out.len() as u64;
                self.frames.put_batch(&mut port.out);
            }
        }
    }

    /// Makes one turn: at most one batch from each port. `now` is the time in nanoseconds.
    #[inline(always)]
    pub fn turn<A: App>(&mut self, app: &mut A, now: u64) -> TurnReport {
        let mut received = 0;
        for index in 0..self.ports.len() {
            let port = &mut self.ports[index];
            if !self.stopping {
                port.queue.rx.receive(&mut self.frames, &mut self.batch);
            }
            let n = self.batch.len();
            if n == 0 {
                continue;
            }
            received += n;
            let bytes = self.batch.bytes();
            port.counters.add(port_field::RX_FRAMES, n as u64);
            port.counters.add(port_field::RX_BYTES, bytes);
            let (batch, mut turn) = self.borrow(now);
            app.packets(&mut turn, PortId(index as u8), batch);
            if !batch.is_empty() {
                turn.drop_all(batch, DropReason::Unhandled);
            }
        }
        let (_, mut turn) = self.borrow(now);
        app.turn(&mut turn);
        self.send();
        self.count(received);
        TurnReport { received }
    }

    #[inline(always)]
    fn count(&mut self, received: usize) {
        self.counters.add(worker_field::TURNS, 1);
        self.until_lies -= 1;
        if self.until_lies == 0 {
            self.count_lies();
        }
        if received != 0 {
            self.counters.add(worker_field::BUSY_TURNS, 1);
        }
        self.counters.set(worker_field::FREE_FRAMES, self.frames.len() as u64);
        if self.drops != [0; DropReason::COUNT] {
            for (reason, n) in self.drops.iter_mut().enumerate() {
                self.counters.add(worker_field::DROPS + reason, std::mem::take(n));
            }
        }
    }

    /// Publishes what the other sides of the ports have lied about; rare, so not looked at every turn.
    #[cold]
    fn count_lies(&mut self) {
        self.until_lies = LIES_EVERY;
        for port in &mut self.ports {
            let now = lies(&port.queue);
            port.counters.add(port_field::BAD_DESCRIPTORS, now.wrapping_sub(port.lies));
            port.lies = now;
        }
    }

    /// Some port wants the kernel to be told that its rings have work.
    #[inline(always)]
    #[must_use]
    pub fn wants_kick(&self) -> bool {
        self.ports.iter().any(|port| port.queue.tx.wants_kick() || port.queue.rx.wants_kick())
    }

    /// Kicks the ports that want it, once: for workers that run without a kicker.
    #[inline]
    pub fn kick(&mut self, kernel: &Kernel) {
        for port in &mut self.ports {
            let mut kicks = 0;
            let mut result: Result<(), KickError> = Ok(());
            if port.queue.tx.wants_kick() {
                kicks += 1;
                result = port.queue.tx.kick(kernel);
            }
            if port.queue.rx.wants_kick() {
                kicks += 1;
                result = result.and(port.queue.rx.kick(kernel));
            }
            if kicks != 0 {
                port.counters.add(port_field::KICKS, kicks);
                if result.is_err() {
                    port.counters.add(port_field::KICK_ERRORS, 1);
                }
            }
        }
    }
}

/// Hands a port's outgoing frames to its transmit ring; what does not fit stays.
#[inline(always)]
pub(crate) fn flush(port: &mut WorkerPort, drops: &mut [u64; DropReason::COUNT]) {
    let total = port.out.len();
    if total == 0 {
        return;
    }
    let mut bytes = port.out.bytes();
    let mut sent = port.queue.tx.transmit(&mut port.out) as u64;
    if sent != total as u64 {
        bytes -= port.out.bytes();
    }
    let refused = port.queue.tx.refused();
    if refused != port.refused {
        let frames = refused.0.wrapping_sub(port.refused.0);
        drops[DropReason::Refused as usize] += frames;
        sent = sent.saturating_sub(frames);
        bytes = bytes.saturating_sub(refused.1.wrapping_sub(port.refused.1));
        port.refused = refused;
    }
    port.counters.add(port_field::TX_FRAMES, sent);
    port.counters.add(port_field::TX_BYTES, bytes);
}
