//! A bridge or any other app under test: turns over ports whose other end is a list of packets, time
//! as the test says, and a proof at the end that no frame is missing.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod net;

use isoplane::app::App;
use isoplane::drivers::{AnyRx, AnyTx, Queue, RxQueue, TxQueue};
use isoplane::memory::recovery::Balance;
use isoplane::memory::stats::{Field, Segment, SegmentBuilder};
use isoplane::memory::{Batch, Frame, FrameCache, FrameFlags, HugePages, Lock, Pool, PoolConfig, Survey};
use isoplane::rehearsal::{Rehearsal, rehearse};
use isoplane::turns::{Turns, WorkerBlocks};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

/// A packet: the bytes of each of its frames.
pub(crate) type Frames = Vec<Vec<u8>>;

#[derive(Default)]
struct Wire {
    to_worker: VecDeque<Frames>,
    from_worker: VecDeque<Frames>,
    open: Frames,
    checksum_starts: Vec<u16>,
}

struct Rx {
    wire: Arc<Mutex<Wire>>,
    pool: Arc<Pool>,
}

struct Tx {
    wire: Arc<Mutex<Wire>>,
    pool: Arc<Pool>,
    held: Vec<Frame>,
    /// Frames that fit until they are reclaimed.
    ring: usize,
}

// SAFETY: the frames that it holds stay with it and leave it by `reclaim` only.
#[allow(unsafe_code, reason = "frames are not `Send`, ports are")]
unsafe impl Send for Tx {}

impl RxQueue for Rx {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let mut wire = self.wire.lock().unwrap();
        let mut received = 0;
        while let Some(packet) = wire.to_worker.front() {
            if packet.len() > batch.room() || packet.len() > frames.len() {
                break;
            }
            let packet = wire.to_worker.pop_front().unwrap();
            for (i, bytes) in packet.iter().enumerate() {
                let mut frame = frames.get().unwrap();
                let len = u16::try_from(bytes.len()).unwrap();
                // A packet longer than fits behind headroom and colour starts right after the metadata.
                if !self.pool.reset(&mut frame, len) {
                    assert!(self.pool.respan(&mut frame, 64, len), "{len} bytes do not fit a chunk");
                }
                self.pool.bytes_mut(&mut frame).copy_from_slice(bytes);
                if i + 1 < packet.len() {
                    frame.set_flags(FrameFlags::MORE);
                }
                batch.push(frame).unwrap();
                received += 1;
            }
        }
        received
    }
    fn survey(&mut self, _: &mut Survey) {}
    fn stop(&mut self) {}
    fn sweep(&mut self) -> u32 {
        0
    }
}

impl TxQueue for Tx {
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let mut wire = self.wire.lock().unwrap();
        let fits = batch.whole_packets(self.ring - self.held.len());
        for frame in batch.drain().take(fits) {
            wire.open.push(self.pool.bytes(&frame).to_vec());
            if frame.flags().contains(FrameFlags::TX_CHECKSUM | FrameFlags::META) {
                wire.checksum_starts.extend(self.pool.meta(&frame).map(|meta| meta.csum_start));
            }
            if !frame.has_more() {
                let packet = std::mem::take(&mut wire.open);
                wire.from_worker.push_back(packet);
            }
            self.held.push(frame);
        }
        fits
    }
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        let n = self.held.len();
        self.held.drain(..).for_each(|frame| frames.put(frame));
        n
    }
    fn in_flight(&self) -> usize {
        self.held.len()
    }
    fn survey(&mut self, _: &mut Survey) {}
    fn stop(&mut self) {}
    fn sweep(&mut self) -> u32 {
        0
    }
}

/// How large things are.
pub(crate) struct Size {
    pub(crate) ports: usize,
    pub(crate) frames: u32,
    pub(crate) chunk: u32,
    pub(crate) max_frame: u32,
    pub(crate) headroom: u32,
    pub(crate) ring: usize,
}

impl Size {
    pub(crate) fn ports(ports: usize) -> Self {
        Self { ports, frames: 1024, chunk: 2048, max_frame: 1522, headroom: 64, ring: 1024 }
    }
}

pub(crate) struct Bench<A> {
    pub(crate) app: A,
    turns: Turns,
    wires: Vec<Arc<Mutex<Wire>>>,
    segment: Segment,
    owner: u8,
    pool: Arc<Pool>,
    pub(crate) now: u64,
}

impl<A: App> Bench<A> {
    pub(crate) fn new(size: &Size, fields: &[Field], app: A) -> Self {
        let pool = Pool::create(&PoolConfig {
            chunk_bytes: size.chunk,
            max_frame: size.max_frame,
            headroom: size.headroom,
            huge_pages: HugePages::Never,
            lock: Lock::Prefer,
            ..PoolConfig::new("bench", size.frames)
        })
        .unwrap();
        let cache = pool.cache("bench", size.frames).unwrap();
        let owner = cache.id();
        let mut segment = SegmentBuilder::default();
        let names: Vec<String> = (0..size.ports).map(|i| format!("port{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let blocks = WorkerBlocks::declare(&mut segment, "bench", &names, fields);
        let segment = segment.build("bench").unwrap();
        let wires: Vec<Arc<Mutex<Wire>>> = (0..size.ports).map(|_| Arc::default()).collect();
        let queue = |wire: &Arc<Mutex<Wire>>| {
            let rx: Box<dyn RxQueue> = Box::new(Rx { wire: Arc::clone(wire), pool: Arc::clone(&pool) });
            let tx: Box<dyn TxQueue> = Box::new(Tx {
                wire: Arc::clone(wire),
                pool: Arc::clone(&pool),
                held: Vec::new(),
                ring: size.ring,
            });
            Queue { rx: AnyRx::from(rx), tx: AnyTx::from(tx) }
        };
        let turns = Turns::new(wires.iter().map(queue).collect(), cache, &segment, &blocks);
        Self { app, turns, wires, segment, owner, pool, now: 0 }
    }

    /// Queues a packet of one frame for the next turns.
    pub(crate) fn put(&mut self, port: usize, bytes: &[u8]) {
        self.put_frames(port, vec![bytes.to_vec()]);
    }

    /// Queues a packet of several frames.
    pub(crate) fn put_frames(&mut self, port: usize, frames: Frames) {
        self.wires[port].lock().unwrap().to_worker.push_back(frames);
    }

    pub(crate) fn turn(&mut self) {
        self.turns.turn(&mut self.app, self.now);
    }

    /// Rehearses, as a worker does before it is isolated.
    pub(crate) fn rehearse(&mut self) -> Rehearsal {
        rehearse(&mut self.app, &mut self.turns, || self.now).unwrap()
    }

    /// Lets the app give back what it holds.
    pub(crate) fn drain(&mut self) {
        self.turns.drain(&mut self.app, self.now);
    }

    /// Turns until everything queued was received.
    pub(crate) fn run(&mut self) {
        while self.wires.iter().any(|w| !w.lock().unwrap().to_worker.is_empty()) {
            assert_ne!(self.turns.turn(&mut self.app, self.now).received, 0, "nothing can be received");
        }
    }

    /// What has left each port since the last call.
    pub(crate) fn take(&mut self) -> Vec<Vec<Frames>> {
        let take = |w: &Arc<Mutex<Wire>>| {
            let mut wire = w.lock().unwrap();
            assert!(wire.open.is_empty(), "a packet was sent without its end");
            wire.from_worker.drain(..).collect()
        };
        self.wires.iter().map(take).collect()
    }

    /// Where the checksums start that the port was asked to compute.
    pub(crate) fn checksum_starts(&self, port: usize) -> Vec<u16> {
        self.wires[port].lock().unwrap().checksum_starts.clone()
    }

    /// Sends one packet through and says what left each port, as whole packets.
    pub(crate) fn through(&mut self, port: usize, bytes: &[u8]) -> Vec<Vec<Vec<u8>>> {
        self.put(port, bytes);
        self.run();
        self.take().into_iter().map(|ports| ports.into_iter().map(|p| p.concat()).collect()).collect()
    }

    /// Advances time, with turns that see no packet: one a millisecond, at most 4096.
    pub(crate) fn wait_ms(&mut self, ms: u64) {
        let steps = ms.clamp(1, 4096);
        for step in 1..=steps {
            let now = self.now + ms * step / steps * 1_000_000;
            self.turns.turn(&mut self.app, now);
        }
        self.now += ms * 1_000_000;
    }

    /// All counters of the worker and its app by name (ports' left out).
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let rows = self.segment.reader().unwrap().rows();
        rows.into_iter().filter(|r| !r.port.starts_with("port")).map(|r| (r.name, r.values[0])).collect()
    }

    /// All values of the segment but the number of turns and the free frames, which are not packets'.
    pub(crate) fn statistics(&self) -> Vec<u64> {
        let mut rows = self.segment.reader().unwrap().rows();
        rows.retain(|row| !["turns", "free_frames"].contains(&row.name.as_str()));
        rows.into_iter().flat_map(|row| row.values).collect()
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        *self.counters().get(name).unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// Drops of all reasons.
    pub(crate) fn drops(&self) -> BTreeMap<String, u64> {
        self.counters().into_iter().filter(|(k, v)| k.starts_with("drop_") && *v != 0).collect()
    }

    /// Every frame is accounted for.
    pub(crate) fn finish(self) -> A {
        let (queues, cache) = self.turns.into_parts();
        let in_flight: usize = queues.iter().map(|q| q.tx.in_flight()).sum();
        let held = cache.len() as u32 + in_flight as u32;
        let balance = Balance::of(&self.pool, &[(self.owner, held)]);
        assert!(balance.is_whole(), "{balance:?}");
        assert_eq!(held, self.pool.chunks(), "all frames are the worker's");
        self.app
    }
}

/// An address that is easy to read in failures: 02:00:00:00:00:NN.
pub(crate) fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// A frame: addresses, an optional tag control word, EtherType 0x88b5 (local experiments), payload.
pub(crate) fn frame(to: [u8; 6], from: [u8; 6], tci: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    if let Some(tci) = tci {
        bytes.extend([0x81, 0]);
        bytes.extend(tci.to_be_bytes());
    }
    bytes.extend([0x88, 0xb5]);
    bytes.extend(payload);
    bytes
}
