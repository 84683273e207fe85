//! The tap's rings and mover with a socket pair in the kernel's place: whole packets with a header before each, so all
//! but the interface itself. With a kernel: `tests/tests/tap.rs`.
#![allow(unsafe_code, reason = "plays a worker gone mad: writes to shared words")]

use super::layout::{Count, HEADER_BYTES, Lane, NEEDS_CSUM, VnetHeader, lane_bytes};
use super::lock::Held;
use super::mover::Mover;
use super::packet::Packet;
use super::port::open_queue;
use super::slot::{Half, Slot, TapKick};
use super::sys::Span;
use crate::conformance::packet::{make, split_mix};
use crate::conformance::{Fixture, Lies, Opened, Wire};
use crate::port::{Capabilities, KickTarget, Kicked, LinkState, Port, PortStatistics, RxQueue, TxQueue};
use crate::queue::Queue;
use isoplane_memory::{
    Batch, Frame, FrameFlags, FrameMeta, HugePages, Kernel, Pool, PoolConfig, Region, RegionConfig,
};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{read, write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

const RING: u32 = 128;

/// A port on a descriptor that somebody else made.
struct Loose {
    pool: Arc<Pool>,
    slot: Arc<Slot>,
    region: Arc<Region>,
    queue: Option<Queue>,
    segments: usize,
}

impl Loose {
    fn new(pool: &Arc<Pool>, descriptor: OwnedFd, segments: usize) -> Self {
        let bytes = 2 * lane_bytes(RING);
        let region = Region::create(&RegionConfig::new("tap-test", bytes)).unwrap();
        let lane = |n: usize| Lane::new(&region, n * lane_bytes(RING), RING).unwrap();
        let slot = Arc::new(Slot::new(descriptor, lane(0), lane(1)));
        let queue = Some(open_queue(&slot, pool, RING, segments).unwrap());
        Self { pool: Arc::clone(pool), slot, region, queue, segments }
    }
}

impl Port for Loose {
    fn name(&self) -> &str {
        "loose"
    }
    fn driver(&self) -> &'static str {
        "tap on a socket"
    }
    fn capabilities(&self) -> Capabilities {
        if self.segments > 1 { Capabilities::MULTI_BUFFER } else { Capabilities::empty() }
    }
    fn mac(&self) -> Option<[u8; 6]> {
        None
    }
    fn max_frame(&self) -> u32 {
        self.pool.max_frame() * self.segments as u32
    }
    fn link(&self) -> LinkState {
        LinkState::Up
    }
    fn statistics(&self) -> PortStatistics {
        PortStatistics::default()
    }
    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
    fn queues(&self) -> u16 {
        1
    }
    fn take_queue(&mut self, index: u16) -> Option<Queue> {
        self.queue.take().filter(|_| index == 0)
    }
    fn kick_target(&self, _index: u16) -> Option<Box<dyn KickTarget>> {
        let mover = |half| Mover::new(self.slot.lane(half), &self.pool, self.segments).unwrap();
        Some(Box::new(TapKick::new(&self.slot, mover(Half::Rx), mover(Half::Tx))))
    }
}

impl Drop for Loose {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.close();
        }
    }
}

fn sockets() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap()
}

fn pool() -> Arc<Pool> {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("tap-test", 1024) };
    Pool::create(&config).unwrap()
}

#[derive(Default)]
struct Pair {
    segments: usize,
    region: Option<Arc<Region>>,
}

impl Fixture for Pair {
    fn pool(&mut self) -> Arc<Pool> {
        pool()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let (a, b) = sockets();
        let (a, b) = (Loose::new(pool, a, self.segments), Loose::new(pool, b, self.segments));
        self.region = Some(Arc::clone(&a.region));
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn min_len(&self) -> u16 {
        1
    }
    /// Plays a worker gone mad: random words in both lanes, the lock among them.
    fn lie(&mut self, _opened: &Opened, round: u64) -> Lies {
        let region = self.region.take().unwrap();
        let word = |at: usize| region.slice::<u32>(at, 1).unwrap();
        let mut state = round;
        let mut random = || {
            state = split_mix(state);
            state
        };
        for lane in [0, lane_bytes(RING)] {
            for at in [0, 128, 256, 384] {
                let to = word(lane + at);
                // SAFETY: aligned and inside the mapping; the driver reaches these words by atomics and volatile copies
                // only, as this does.
                unsafe {
                    match random() % 4 {
                        0 => to.write_volatile(random() as u32),
                        1 => to.write_volatile(to.read_volatile().wrapping_add(random() as u32 % 300)),
                        2 => to.write_volatile(to.read_volatile().wrapping_sub(random() as u32 % 300)),
                        _ => {}
                    }
                }
            }
            for _ in 0..random() % 64 {
                let at = 1024 + (random() as usize % (RING as usize * 8)) * 4;
                let value = match random() % 3 {
                    0 => random() as u32 % (1024 * 2048),
                    1 => random() as u32 % 2048,
                    _ => random() as u32,
                };
                // SAFETY: as above.
                unsafe { word(lane + at).write_volatile(value) };
            }
        }
        Lies::Told
    }
}

fn fixture(segments: usize) -> Pair {
    Pair { segments, region: None }
}

mod single {
    use super::*;
    crate::conformance_tests!(link, fixture(1));
}

mod multi_buffer {
    use super::*;
    crate::conformance_tests!(link, fixture(6));
}

/// A queue whose other side is the test.
struct Bench {
    port: Loose,
    queue: Queue,
    frames: isoplane_memory::FrameCache,
    peer: OwnedFd,
    kernel: Kernel,
}

impl Bench {
    fn new(segments: usize) -> Self {
        let (ours, peer) = sockets();
        let pool = pool();
        let mut port = Loose::new(&pool, ours, segments);
        let queue = port.take_queue(0).unwrap();
        let frames = pool.cache("worker", 100).unwrap();
        Self { port, queue, frames, peer, kernel: Kernel::outside_isolation() }
    }

    /// The peer sends; what the worker gets of it.
    fn arrives(&mut self, header: VnetHeader, packet: &[u8]) -> Vec<(Vec<u8>, FrameFlags)> {
        let mut bytes = bytemuck::bytes_of(&header).to_vec();
        bytes.extend(packet);
        self.arrives_raw(&bytes)
    }

    fn arrives_raw(&mut self, bytes: &[u8]) -> Vec<(Vec<u8>, FrameFlags)> {
        assert_eq!(write(&self.peer, bytes).unwrap(), bytes.len());
        self.queue.rx.kick(&self.kernel).unwrap();
        let mut batch = Batch::new();
        self.queue.rx.receive(&mut self.frames, &mut batch);
        let mut packets = Vec::new();
        let mut packet = Vec::new();
        for frame in batch.drain() {
            packet.extend(self.port.pool.bytes(&frame));
            if !frame.has_more() {
                packets.push((std::mem::take(&mut packet), frame.flags()));
            }
            self.frames.put(frame);
        }
        packets
    }

    fn frame(&mut self, packet: &[u8]) -> Frame {
        let mut frame = self.frames.get().unwrap();
        assert!(self.port.pool.reset(&mut frame, packet.len() as u16));
        self.port.pool.bytes_mut(&mut frame).copy_from_slice(packet);
        frame
    }

    fn send(&mut self, frames: Vec<Frame>) {
        let mut batch = Batch::new();
        for frame in frames {
            batch.push(frame).unwrap();
        }
        let n = batch.len();
        assert_eq!(self.queue.tx.transmit(&mut batch), n);
        self.queue.tx.kick(&self.kernel).unwrap();
        assert_eq!(self.queue.tx.reclaim(&mut self.frames), n, "all come back");
    }

    /// What the peer got last.
    fn leaves(&mut self) -> Option<(VnetHeader, Vec<u8>)> {
        let mut bytes = vec![0; 70_000];
        let n = read(&self.peer, &mut bytes).ok()?;
        Some((bytemuck::pod_read_unaligned(&bytes[..HEADER_BYTES]), bytes[HEADER_BYTES..n].to_vec()))
    }

    fn counted(&self, which: Count) -> u64 {
        self.port.slot.counted(which)
    }

    fn close(self) {
        let Self { port, queue, frames, .. } = self;
        queue.close();
        assert_eq!(frames.len() as u32 + port.pool.in_depot(), port.pool.chunks(), "frames after close");
    }
}

/// An Ethernet, IPv4 and UDP packet; the header says where the checksum that it lacks goes.
fn udp(payload: &[u8]) -> (Vec<u8>, Vec<u8>, VnetHeader) {
    let mut whole = Vec::new();
    etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(1000, 2000)
        .write(&mut whole, payload)
        .unwrap();
    let mut partial = whole.clone();
    // As the kernel leaves it: the sum of the pseudo header, not complemented.
    let length = (8 + payload.len()) as u32;
    let mut sum = 0x0a00 + 0x0001 + 0x0a00 + 0x0002 + 17 + length;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    partial[40..42].copy_from_slice(&(sum as u16).to_be_bytes());
    let header = VnetHeader { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VnetHeader::default() };
    (whole, partial, header)
}

#[test]
fn a_missing_checksum_is_computed_before_the_worker_sees_the_packet() {
    for segments in [1, 6] {
        let mut bench = Bench::new(segments);
        let longest = if segments == 1 { 1480 } else { 8000 };
        for len in
            [0, 1, 2, 3, 469, 470, 471, 1000, 1480, 3003, 8000].into_iter().filter(|len| *len <= longest)
        {
            let (whole, partial, header) = udp(&make(len as u32, len));
            assert_eq!(bench.arrives(header, &partial), [(whole, FrameFlags::empty())], "{len} bytes");
        }
        bench.close();
    }
}

#[test]
fn a_checksum_of_zero_is_sent_as_ones() {
    // A payload that makes the sum of a packet without payload all ones.
    let mut bench = Bench::new(1);
    let (whole, ..) = udp(&[0, 0]);
    let missing = u16::from_be_bytes([whole[40], whole[41]]);
    let (whole, partial, header) = udp(&missing.to_be_bytes());
    assert_eq!(whole[40..42], [0xff, 0xff], "RFC 768: as the other implementation has it");
    assert_eq!(bench.arrives(header, &partial), [(whole, FrameFlags::empty())]);
    bench.close();
}

#[test]
fn headers_and_lengths_that_make_no_sense_cost_a_count() {
    let mut bench = Bench::new(1);
    let (_, partial, header) = udp(b"payload");
    let wild = |start, offset| VnetHeader { csum_start: start, csum_offset: offset, ..header };
    let joined = VnetHeader { gso_type: 1, gso_size: 1000, ..VnetHeader::default() };
    let bad = [wild(48, 0), wild(34, 14), wild(u16::MAX, u16::MAX), wild(0, u16::MAX), joined];
    for (n, header) in (1..).zip(bad) {
        assert_eq!(bench.arrives(header, &partial), [], "{header:?}");
        assert_eq!(bench.counted(Count::Dropped), n);
    }
    let room = bench.port.pool.max_frame() as usize;
    for bytes in [vec![0], vec![0; 9], vec![0; 10], vec![0; 10 + room + 1], vec![0; 10 + 40_000]] {
        assert_eq!(bench.arrives_raw(&bytes), [], "{} bytes", bytes.len());
    }
    assert_eq!(bench.counted(Count::Dropped), 10);
    for len in [1, 13, 14, room] {
        let got = bench.arrives(VnetHeader::default(), &vec![7; len]);
        assert_eq!(got, [(vec![7; len], FrameFlags::empty())], "passed as they are");
    }
    let checked = VnetHeader { flags: super::layout::DATA_VALID, ..VnetHeader::default() };
    assert_eq!(bench.arrives(checked, &partial), [(partial, FrameFlags::RX_CHECKSUM_GOOD)]);
    bench.close();
}

#[test]
fn a_frame_may_ask_for_a_checksum() {
    let mut bench = Bench::new(1);
    let (_, partial, header) = udp(b"payload");
    let mut frame = bench.frame(&partial);
    let meta = FrameMeta { csum_start: 34, csum_offset: 6, ..FrameMeta::default() };
    bench.port.pool.set_meta(&mut frame, meta);
    frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
    bench.send(vec![frame]);
    assert_eq!(bench.leaves(), Some((header, partial.clone())));
    // And one that does not.
    let frame = bench.frame(&partial);
    bench.send(vec![frame]);
    assert_eq!(bench.leaves(), Some((VnetHeader::default(), partial)));
    bench.close();
}

#[test]
fn packets_in_more_frames_than_one_may_have_are_refused_whole_and_come_back() {
    let mut bench = Bench::new(6);
    let more = |mut frame: Frame| {
        frame.set_flags(FrameFlags::MORE);
        frame
    };
    let mut frames: Vec<Frame> = (0..17).map(|_| more(bench.frame(&[1; 100]))).collect();
    frames.push(bench.frame(&[2; 50]));
    frames.push(bench.frame(&[3; 60]));
    bench.send(frames);
    assert_eq!(bench.leaves(), Some((VnetHeader::default(), vec![3; 60])), "the next packet is sent");
    assert_eq!(bench.queue.tx.refused(), (18, 1750));
    bench.close();
}

#[test]
fn a_kicker_moves_everything_and_ends_with_the_queue() {
    let mut bench = Bench::new(1);
    let mut kick = bench.port.kick_target(0).unwrap();
    assert_eq!(kick.poll(&bench.kernel), Ok(Kicked::Idle));
    let mut batch = Batch::new();
    let frame = bench.frame(&[5; 80]);
    batch.push(frame).unwrap();
    assert_eq!(bench.queue.tx.transmit(&mut batch), 1);
    assert!(bench.queue.tx.wants_kick());
    assert_eq!(kick.poll(&bench.kernel), Ok(Kicked::Kicked { waiting: 1 }));
    assert!(!bench.queue.tx.wants_kick());
    assert_eq!(bench.leaves(), Some((VnetHeader::default(), vec![5; 80])));
    assert_eq!(bench.queue.tx.reclaim(&mut bench.frames), 1);

    write(&bench.peer, &[0; 90]).unwrap();
    let looks = (1..).find(|_| kick.poll(&bench.kernel) == Ok(Kicked::Kicked { waiting: 1 })).unwrap();
    assert!(looks <= 17, "an idle queue is asked every 17 looks at least, not after {looks}");
    assert_eq!(bench.queue.rx.receive(&mut bench.frames, &mut batch), 1);
    bench.frames.put_batch(&mut batch);

    // While somebody else moves packets, a kicker does nothing, and does not wait.
    let frame = bench.frame(&[6; 70]);
    batch.push(frame).unwrap();
    bench.queue.tx.transmit(&mut batch);
    let held = Held::take(bench.port.slot.lane(Half::Tx)).unwrap();
    assert_eq!(kick.poll(&bench.kernel), Ok(Kicked::Idle));
    drop(held);

    // Stopped: what waits is not sent any more, and the frame is back.
    bench.queue.tx.stop();
    assert_eq!(kick.poll(&bench.kernel), Ok(Kicked::Idle));
    assert_eq!(bench.queue.tx.sweep(), 1);
    bench.close();
    assert_eq!(kick.poll(&Kernel::outside_isolation()), Ok(Kicked::Idle), "the queue is no more");
}

#[test]
fn the_right_to_move_packets_of_one_who_died_is_taken_over() {
    let bench = Bench::new(1);
    let lane = bench.port.slot.lane(Half::Rx);
    let held = Held::take(lane).unwrap();
    assert!(Held::take(lane).is_none(), "another thread of this process has it");
    drop(held);
    lane.lock().store(1, std::sync::atomic::Ordering::Release);
    assert!(Held::take(lane).is_none(), "process 1 lives");
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    lane.lock().store(child.id(), std::sync::atomic::Ordering::Release);
    drop(Held::take(lane).expect("its holder is dead"));
    drop(Held::take(lane).expect("it was given back"));
    bench.close();
}

#[test]
fn spans_lie_inside_one_chunk_and_behind_its_metadata() {
    let pool = pool();
    let chunk = u64::from(pool.chunk_bytes());
    let of = |address: u64, len: usize| Span::of(&pool, address, len).map(|span| span.len());
    assert_eq!(of(64, 1984), Some(1984));
    assert_eq!(of(chunk * 1023 + 64, 1984), Some(1984));
    for (address, len) in [(63, 1), (64, 1985), (0, 0), (chunk, 10), (chunk * 1024 + 64, 1), (u64::MAX, 1)] {
        assert_eq!(of(address, len), None, "{len} bytes at {address}");
    }
    assert_eq!(of(u64::MAX - 100, usize::MAX), None);
}

proptest::proptest! {
    /// The checksum of a packet in any parts is that of the whole.
    #[test]
    fn checksums_do_not_depend_on_the_parts(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 2..4000),
        cuts in proptest::collection::vec(1_usize..1500, 1..16),
        start in 0_usize..4000, offset in 0_usize..4000,
    ) {
        let pool = pool();
        let mut packet = Packet::new();
        let mut at = 0;
        for (chunk, cut) in (0..).zip(&cuts) {
            let len = (*cut).min(bytes.len() - at);
            let span = Span::of(&pool, chunk * u64::from(pool.chunk_bytes()) + 100, len).unwrap();
            for (n, byte) in bytes[at..at + len].iter().enumerate() {
                span.set(n, *byte);
            }
            packet.push(span);
            at += len;
        }
        let mut expected = bytes[..at].to_vec();
        let fits = start + offset + 2 <= at;
        proptest::prop_assert_eq!(packet.complete_checksum(start, offset), fits);
        if fits {
            // Word by word, as RFC 1071 says it.
            let mut sum = 0_u32;
            for word in expected[start..].chunks(2) {
                sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
                sum = (sum & 0xffff) + (sum >> 16);
            }
            let checksum = match !(sum as u16) { 0 => 0xffff, other => other };
            expected[start + offset..start + offset + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        let mut now = Vec::new();
        for part in packet.parts() {
            let mut bytes = vec![0; part.len()];
            part.copy_out(0, &mut bytes);
            now.extend(bytes);
        }
        proptest::prop_assert_eq!(now, expected);
    }
}

#[test]
fn a_worker_that_dies_while_its_kicker_works_loses_nothing() {
    // The suite's `worker_death` has no kicker; here one moves packets between any two steps of the survey.
    let mut fixture = fixture(1);
    let mut wire = Wire::open(&mut fixture);
    let mut kicks =
        [&wire.opened.a, wire.opened.b.as_ref().unwrap()].map(|port| port.kick_target(0).unwrap());
    let kernel = Kernel::outside_isolation();
    for round in 0..50 {
        let mut batch = Batch::new();
        for n in 0..20 {
            assert!(wire.build(0, &make(n, 100), &mut batch));
        }
        wire.ends[0].queue.tx.transmit(&mut batch);
        for kick in &mut kicks[..round % 3] {
            kick.poll(&kernel).unwrap();
        }
        let victim = round % 2;
        let end = &mut wire.ends[victim];
        end.queue.rx.receive(&mut end.frames, &mut batch);
        drop(batch);
        let mut survey = isoplane_memory::Survey::new(&end.frames);
        end.queue.survey(&mut survey);
        kicks[victim].poll(&kernel).unwrap();
        // SAFETY: the worker's frames were those on its list and in the batch that is gone.
        let found = unsafe { survey.finish(&mut end.frames) };
        assert_eq!(found.lies, 0, "{found:?}");
        wire.drain();
        wire.assert_quiet("after a death under a kicker");
    }
    wire.close("after deaths under a kicker");
}
