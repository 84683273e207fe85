//! What the AF_XDP tests share: a veth pair in anonymous namespaces with a port on one end, a worker's
//! loop in small, and the balance that every test ends with.
#![allow(dead_code, reason = "each test takes what it needs")]

use isoplane_drivers::xdp::{XdpConfig, XdpPort};
use isoplane_drivers::{Port, Queue, RxQueue, TxQueue};
use isoplane_lab::veth::pair;
use isoplane_lab::{Link, Namespace, PacketSocket, VethEnd};
use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, FrameCache, HugePages, Kernel, Pool, PoolConfig};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) const OURS: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0a];
pub(crate) const THEIRS: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0b];
/// An EtherType for experiments (IEEE 802): nothing in the kernel answers it.
pub(crate) const TEST_TYPE: u16 = 0x88b5;
/// How long anything may take before a test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A pool of 4 KiB pages with `chunks` chunks.
pub(crate) fn pool(chunks: u32) -> Arc<Pool> {
    pool_with(chunks, 2048, 1522)
}

pub(crate) fn pool_with(chunks: u32, chunk_bytes: u32, max_frame: u32) -> Arc<Pool> {
    let mut config = PoolConfig::new("afxdp-test", chunks);
    config.huge_pages = HugePages::Never;
    config.chunk_bytes = chunk_bytes;
    config.max_frame = max_frame;
    Pool::create(&config).expect("a pool")
}

/// Two namespaces, one for our end of the pair and one for the peer's.
pub(crate) struct Wires {
    pub(crate) ours: Namespace,
    pub(crate) theirs: Namespace,
}

impl Wires {
    pub(crate) fn new() -> Self {
        Self { ours: Namespace::new().expect("a namespace"), theirs: Namespace::new().expect("a namespace") }
    }

    /// The pair: `x0` is ours, `y0` the peer's.
    pub(crate) fn pair(&self, mtu: u32, queues: u32) -> (Link<'_>, Link<'_>) {
        self.named("x0", "y0", mtu, queues)
    }

    pub(crate) fn named(&self, x: &str, y: &str, mtu: u32, queues: u32) -> (Link<'_>, Link<'_>) {
        let ours = VethEnd::new(&self.ours, x).mac(OURS).mtu(mtu).queues(queues, queues);
        let theirs = VethEnd::new(&self.theirs, y).mac(THEIRS).mtu(mtu).queues(queues, queues);
        pair(&ours, &theirs).expect("a veth pair")
    }

    /// Opens a port in our namespace.
    pub(crate) fn open(
        &self,
        pool: &Arc<Pool>,
        config: XdpConfig,
    ) -> Result<XdpPort, isoplane_drivers::xdp::XdpError> {
        let inside = self.ours.enter().expect("our namespace");
        let port = XdpPort::open(pool, &config);
        inside.leave().expect("back");
        port
    }
}

/// A configuration for tests: small rings.
pub(crate) fn config(interface: &str) -> XdpConfig {
    XdpConfig::new(interface).rings(64, 64)
}

/// A frame of the test EtherType: addresses, type, a number, and bytes that follow from the number.
pub(crate) fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(&[0x02, 0, 0, 0, 0, 0xff]);
    bytes.extend_from_slice(&[0x02, 0, 0, 0, 0, 0xfe]);
    bytes.extend_from_slice(&TEST_TYPE.to_be_bytes());
    bytes.extend_from_slice(&number.to_be_bytes());
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

pub(crate) fn is_test(bytes: &[u8]) -> bool {
    bytes.get(12..14) == Some(&TEST_TYPE.to_be_bytes())
}

/// A worker with one queue, as far as a test needs one.
pub(crate) struct Worker {
    pub(crate) queue: Queue,
    pub(crate) frames: FrameCache,
    pub(crate) pool: Arc<Pool>,
    pub(crate) kernel: Kernel,
}

impl Worker {
    pub(crate) fn new(port: &mut XdpPort, queue: u16, frames: u32) -> Self {
        let pool = Arc::clone(port.pool());
        Self {
            queue: port.take_queue(queue).expect("a queue"),
            frames: pool.cache("worker", frames).expect("frames"),
            pool,
            kernel: Kernel::outside_isolation(),
        }
    }

    /// Copies a packet into frames of at most `room` bytes.
    pub(crate) fn build(&mut self, packet: &[u8], room: usize, batch: &mut Batch) {
        use isoplane_memory::FrameFlags;
        let mut parts = packet.chunks(room).peekable();
        while let Some(part) = parts.next() {
            let mut frame = self.frames.get().expect("a free frame");
            assert!(self.pool.reset(&mut frame, part.len() as u16), "a part fits a chunk");
            self.pool.bytes_mut(&mut frame).copy_from_slice(part);
            if parts.peek().is_some() {
                frame.set_flags(FrameFlags::MORE);
            }
            batch.push(frame).expect("room in the batch");
        }
    }

    /// Sends packets, each in frames of at most `room` bytes; kicks, and reclaims until all are back.
    pub(crate) fn send(&mut self, packets: &[Vec<u8>], room: usize) {
        let mut batch = Batch::new();
        let deadline = Instant::now() + PATIENCE;
        for packet in packets {
            if batch.room() < packet.len().div_ceil(room) {
                self.flush(&mut batch, deadline);
            }
            self.build(packet, room, &mut batch);
        }
        self.flush(&mut batch, deadline);
        while self.queue.tx.in_flight() != 0 {
            assert!(Instant::now() < deadline, "{} frames do not come back", self.queue.tx.in_flight());
            self.kick();
            self.queue.tx.reclaim(&mut self.frames);
        }
    }

    pub(crate) fn flush(&mut self, batch: &mut Batch, deadline: Instant) {
        while !batch.is_empty() {
            assert!(Instant::now() < deadline, "{} frames are not taken", batch.len());
            self.queue.tx.transmit(batch);
            self.kick();
            self.queue.tx.reclaim(&mut self.frames);
        }
    }

    pub(crate) fn kick(&mut self) {
        if self.queue.tx.wants_kick() {
            self.queue.tx.kick(&self.kernel).expect("a kick");
        }
        if self.queue.rx.wants_kick() {
            self.queue.rx.kick(&self.kernel).expect("a kick");
        }
    }

    /// Takes what has arrived: whole packets.
    pub(crate) fn poll(&mut self) -> Vec<Vec<u8>> {
        let mut batch = Batch::new();
        self.queue.rx.receive(&mut self.frames, &mut batch);
        let mut packets = Vec::new();
        let mut packet = Vec::new();
        for frame in batch.iter() {
            packet.extend_from_slice(self.pool.bytes(frame));
            if !frame.has_more() {
                packets.push(std::mem::take(&mut packet));
            }
        }
        assert!(packet.is_empty(), "a packet does not end within its batch");
        self.frames.put_batch(&mut batch);
        packets
    }

    /// Receives `n` test frames, passing over what else the kernel sends.
    pub(crate) fn receive(&mut self, n: usize) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        let mut got = Vec::new();
        while got.len() < n {
            assert!(Instant::now() < deadline, "{} of {n} frames arrived", got.len());
            got.extend(self.poll().into_iter().filter(|p| is_test(p)));
        }
        got
    }

    /// Closes the queue; every frame must be back.
    pub(crate) fn close(self) {
        let Self { queue, frames, pool, .. } = self;
        let in_hand = [(frames.id(), frames.len() as u32)];
        assert!(Balance::of(&pool, &in_hand).is_whole(), "before: {:?}", Balance::of(&pool, &in_hand));
        queue.close();
        let balance = Balance::of(&pool, &in_hand);
        assert_eq!((balance.missing, balance.in_custody), (0, 0), "after: {balance:?}");
        // SAFETY: the balance has shown that all of the worker's frames are on the list.
        unsafe { frames.retire() };
    }
}

/// Receives test frames from a packet socket.
pub(crate) fn receive_from(socket: &mut PacketSocket, n: usize) -> Vec<Vec<u8>> {
    (0..n)
        .map(|i| {
            socket
                .receive_matching(PATIENCE, is_test)
                .expect("a packet socket")
                .unwrap_or_else(|| panic!("{i} of {n} frames arrived"))
        })
        .collect()
}
