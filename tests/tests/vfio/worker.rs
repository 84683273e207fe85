//! A worker's loop in small, and the balance that every test ends with.

use isoplane_drivers::{Port, Queue, RxQueue, TxQueue};
use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, Frame, FrameCache, FrameFlags, FrameMeta, Pool};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An EtherType for experiments (IEEE 802): nothing in a kernel answers it.
pub(crate) const TEST_TYPE: u16 = 0x88b5;
/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A packet of the test EtherType whose bytes follow from its number.
pub(crate) fn packet(to: [u8; 6], number: u32, len: usize) -> Vec<u8> {
    let mut bytes = [&to[..], &[0x02, 0, 0, 0, 0, 0xfe], &TEST_TYPE.to_be_bytes()].concat();
    bytes.extend(number.to_be_bytes());
    let mut state = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.push(state as u8);
    }
    bytes.truncate(len);
    bytes
}

/// Is it one of those, with a VLAN tag or without?
pub(crate) fn is_test(bytes: &[u8]) -> bool {
    let at = if bytes.get(12..14) == Some(&[0x81, 0]) { 16 } else { 12 };
    bytes.get(at..at + 2) == Some(&TEST_TYPE.to_be_bytes())
}

/// A packet that has arrived, and what its first frame says about it.
#[derive(Debug, Clone)]
pub(crate) struct Arrived {
    pub(crate) bytes: Vec<u8>,
    pub(crate) flags: FrameFlags,
    pub(crate) meta: Option<FrameMeta>,
}

/// One queue and free frames.
pub(crate) struct Worker {
    pub(crate) queue: Queue,
    pub(crate) frames: FrameCache,
    pub(crate) pool: Arc<Pool>,
}

impl Worker {
    pub(crate) fn new(port: &mut dyn Port, queue: u16, frames: u32) -> Self {
        let pool = Arc::clone(port.pool());
        let queue = port.take_queue(queue).expect("a queue");
        Self { queue, frames: pool.cache("worker", frames).expect("frames"), pool }
    }

    /// Puts a packet into free frames; false when there are too few, or there is no room in the batch.
    pub(crate) fn build(&mut self, packet: &[u8], batch: &mut Batch) -> bool {
        let parts = packet.chunks(self.pool.max_frame() as usize);
        if self.frames.len() < parts.len() || batch.room() < parts.len() {
            return false;
        }
        let last = parts.len() - 1;
        for (n, part) in parts.enumerate() {
            let mut frame = self.frames.get().expect("counted");
            assert!(self.pool.reset(&mut frame, part.len() as u16), "a part fits a chunk");
            self.pool.bytes_mut(&mut frame).copy_from_slice(part);
            if n != last {
                frame.set_flags(FrameFlags::MORE);
            }
            batch.push(frame).expect("counted");
        }
        true
    }

    /// Sends packets and waits until their frames are back.
    pub(crate) fn send(&mut self, packets: &[Vec<u8>]) {
        self.send_with(packets, |_, _| ());
    }

    /// As [`Worker::send`]; `change` sees the first frame of each packet before it goes.
    pub(crate) fn send_with(&mut self, packets: &[Vec<u8>], mut change: impl FnMut(&Pool, &mut Frame)) {
        let end = Instant::now() + PATIENCE;
        let mut left = packets.iter().peekable();
        let mut batch = Batch::new();
        while left.peek().is_some() || !batch.is_empty() || self.queue.tx.in_flight() != 0 {
            let had = batch.len();
            if let Some(packet) = left.peek()
                && self.build(packet, &mut batch)
            {
                change(&self.pool, &mut batch.as_mut_slice()[had]);
                left.next();
                continue;
            }
            self.queue.tx.transmit(&mut batch);
            self.queue.tx.reclaim(&mut self.frames);
            let (waiting, flying) = (left.len() + batch.len(), self.queue.tx.in_flight());
            assert!(Instant::now() < end, "{waiting} are not taken, {flying} do not come back");
            std::thread::yield_now();
        }
    }

    /// Sends a packet if there is a frame and room for it; waits for nothing.
    pub(crate) fn send_once(&mut self, packet: &[u8]) {
        let mut batch = Batch::new();
        self.queue.tx.reclaim(&mut self.frames);
        self.build(packet, &mut batch);
        self.queue.tx.transmit(&mut batch);
        self.frames.put_batch(&mut batch);
    }

    /// Packets that have arrived.
    pub(crate) fn poll(&mut self) -> Vec<Arrived> {
        let mut batch = Batch::new();
        self.queue.rx.receive(&mut self.frames, &mut batch);
        let mut packets: Vec<Arrived> = Vec::new();
        let mut goes_on = false;
        for frame in batch.iter() {
            match packets.last_mut().filter(|_| goes_on) {
                Some(packet) => packet.bytes.extend(self.pool.bytes(frame)),
                None => {
                    let flags = frame.flags();
                    let meta = self.pool.meta(frame).filter(|_| flags.contains(FrameFlags::META));
                    packets.push(Arrived { bytes: self.pool.bytes(frame).to_vec(), flags, meta });
                }
            }
            goes_on = frame.has_more();
        }
        assert!(!goes_on, "a packet does not end within its batch");
        self.frames.put_batch(&mut batch);
        packets
    }

    /// Receives until `n` packets that are `wanted` have arrived; a kernel says things of its own, too.
    pub(crate) fn receive(&mut self, n: usize, wanted: impl Fn(&[u8]) -> bool) -> Vec<Arrived> {
        let end = Instant::now() + PATIENCE;
        let mut got = Vec::new();
        while got.len() < n {
            assert!(Instant::now() < end, "{} of {n} packets have arrived", got.len());
            got.extend(self.poll().into_iter().filter(|packet| wanted(&packet.bytes)));
            std::thread::yield_now();
        }
        got
    }

    /// Test packets up to this one.
    pub(crate) fn receive_until(&mut self, last: &[u8]) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        while got.last().is_none_or(|bytes: &Vec<u8>| bytes != last) {
            got.extend(self.receive_tests(1));
        }
        got
    }

    /// As [`Worker::receive`] for test packets, without their flags.
    pub(crate) fn receive_tests(&mut self, n: usize) -> Vec<Vec<u8>> {
        self.receive(n, is_test).into_iter().map(|packet| packet.bytes).collect()
    }
}

/// Closes queues; every frame of their pool must be free then.
pub(crate) fn close(workers: impl IntoIterator<Item = Worker>) {
    let mut caches = Vec::new();
    let mut pools: Vec<Arc<Pool>> = Vec::new();
    for Worker { queue, frames, pool } in workers {
        queue.close();
        caches.push(frames);
        if !pools.iter().any(|known| known.same_as(&pool)) {
            pools.push(pool);
        }
    }
    let hands: Vec<(u8, u32)> = caches.iter().map(|cache| (cache.id(), cache.len() as u32)).collect();
    assert_eq!(pools.len(), 1, "workers of one pool");
    let balance = Balance::of(&pools[0], &hands);
    assert_eq!((balance.missing, balance.in_custody), (0, 0), "{balance:?}");
    for cache in caches {
        // SAFETY: the balance has shown that all of the worker's frames are on its list.
        unsafe { cache.retire() };
    }
}
