//! A device that lies: about what it has done, ids, lengths, headers, positions, in any of the memory that it can
//! reach. Whatever it writes, nothing panics or spins, no frame is handed out twice, none leaves its chunk, and
//! each is accounted for at any time. With a device that is honest none is lost either.
#![allow(unsafe_code, reason = "a survey is finished on behalf of a worker that is gone")]

use super::fake::{Entry, FakeNet, Traits};
use super::layout::header;
use super::packed::Packed;
use super::split::Split;
use super::{Features, VirtioConfig, VirtioNetPort};
use crate::conformance::packet::{make, split_mix};
use crate::pci::Function;
use crate::pci::fake::FakeFunction;
use crate::port::{Port, RxQueue, TxQueue};
use crate::queue::Queue;
use crate::xdp::Want;
use isoplane_memory::pool::META_BYTES;
use isoplane_memory::recovery::{Balance, Recovered};
use isoplane_memory::{Batch, FrameCache, FrameFlags, FrameMeta, HugePages, Lock, Pool, PoolConfig, Survey};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const RING: u16 = 64;
const CHUNKS: u32 = 200;

#[derive(Debug, Clone)]
enum Step {
    /// Ours: receive, and free what arrived.
    Receive,
    /// Ours: send frames of these lengths with these flags, and this as the place of a checksum.
    Transmit(Vec<(u16, u16, u16)>),
    /// Ours: take back.
    Reclaim,
    /// The device, honest: packets of that length arrive.
    Arrive(u8, u16),
    /// The device, honest: it sends and delivers.
    Work,
    /// A lie: anything in rings, tables and positions.
    Rave(u64),
    /// A lie: headers in all chunks.
    Headers(u64),
    /// A lie: it is done with this id of a queue, so many bytes long.
    Done(bool, u16, u32),
    /// The worker dies, and a survey takes over.
    Die,
}

fn honest() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Receive),
        3 => vec((0..2000_u16, 0..64_u16, 0..300_u16), 0..40).prop_map(Step::Transmit),
        3 => Just(Step::Reclaim),
        4 => (0..40_u8, 60..5000_u16).prop_map(|(n, len)| Step::Arrive(n, len)),
        3 => Just(Step::Work),
        1 => Just(Step::Die),
    ]
}

fn lying() -> impl Strategy<Value = Step> {
    let length = prop_oneof![any::<u32>(), 0..2100_u32];
    prop_oneof![
        4 => honest(),
        1 => any::<u64>().prop_map(Step::Rave),
        1 => any::<u64>().prop_map(Step::Headers),
        4 => (any::<bool>(), prop_oneof![8 => 0..RING, 1 => any::<u16>()], length)
            .prop_map(|(tx, id, len)| Step::Done(tx, id, len)),
    ]
}

#[derive(Debug, Clone, Copy)]
struct Kind {
    packed: bool,
    events: bool,
    several: bool,
    checksum: bool,
    hash: bool,
    shuffles: bool,
}

impl Kind {
    fn traits(self) -> Traits {
        let mut traits = Traits { shuffles: self.shuffles, ..Traits::default() };
        traits.offered |= Features::HASH_REPORT | Features::MTU;
        traits.offered.set(Features::RING_PACKED, self.packed);
        traits.mtu = if self.several { 9000 } else { 1500 };
        traits
    }

    fn config(self) -> VirtioConfig {
        VirtioConfig {
            rx_ring: RING,
            tx_ring: RING,
            multi_buffer: self.several,
            rx_checksum: self.checksum,
            rx_hash: self.hash,
            packed: if self.packed { Want::Require } else { Want::Never },
            event_index: if self.events { Want::Require } else { Want::Never },
            ..VirtioConfig::default()
        }
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(packed, events, several, checksum, hash, shuffles)| Kind {
            packed,
            events,
            several,
            checksum,
            hash,
            shuffles,
        },
    )
}

struct Lab {
    kind: Kind,
    pool: Arc<Pool>,
    frames: FrameCache,
    device: FakeFunction<FakeNet>,
    port: VirtioNetPort<FakeFunction<FakeNet>>,
    queue: Queue,
    /// The device has lied: what it believes means nothing any more.
    lied: bool,
}

impl Lab {
    fn new(kind: Kind) -> Self {
        let mut pool = PoolConfig::new("hostile", CHUNKS);
        (pool.huge_pages, pool.lock) = (HugePages::Never, Lock::Never);
        let pool = Pool::create(&pool).expect("a pool");
        let device = FakeNet::new(kind.traits());
        let mut port = VirtioNetPort::open(device.clone(), &pool, &kind.config()).expect("a port");
        let queue = port.take_queue(0).expect("a queue");
        let frames = pool.cache("worker", CHUNKS - u32::from(RING)).expect("frames");
        Self { kind, pool, frames, device, port, queue, lied: false }
    }

    /// What is owned by the worker is on its list: none lost, none twice.
    fn check(&self) {
        let balance = Balance::of(&self.pool, &[(self.frames.id(), self.frames.len() as u32)]);
        assert_eq!(balance.missing, 0, "{balance:?}");
        assert_eq!(balance.in_hand + balance.in_custody + balance.depot, CHUNKS);
    }

    /// Says how many packets arrived, at the device or at the worker.
    fn step(&mut self, step: &Step) -> usize {
        let Self { kind, pool, frames, device, queue, lied, .. } = self;
        match step {
            Step::Receive => {
                let mut batch = Batch::new();
                let got = queue.rx.receive(frames, &mut batch);
                assert_eq!(got, batch.len());
                assert!(batch.as_slice().last().is_none_or(|last| !last.has_more()), "packets are whole");
                for frame in batch.iter() {
                    let end = u32::from(frame.offset()) + u32::from(frame.len());
                    assert!(u32::from(frame.offset()) >= META_BYTES && end <= pool.chunk_bytes());
                }
                let packets = batch.iter().filter(|frame| !frame.has_more()).count();
                frames.put_batch(&mut batch);
                return packets;
            }
            Step::Transmit(lengths) => {
                let mut batch = Batch::new();
                for (len, flags, csum_start) in lengths {
                    let Some(mut frame) = frames.get() else { break };
                    pool.reset(&mut frame, (*len).min(1522));
                    let meta = FrameMeta { csum_start: *csum_start, csum_offset: 6, ..FrameMeta::default() };
                    pool.set_meta(&mut frame, meta);
                    frame.set_flags(FrameFlags::from_bits_truncate(*flags));
                    batch.push(frame).expect("fewer than a batch");
                }
                let before = batch.len();
                let sent = queue.tx.transmit(&mut batch);
                assert_eq!(batch.len() + sent, before);
                frames.put_batch(&mut batch);
                // Refused frames come back now, so that the balance can be taken.
                queue.tx.reclaim(frames);
            }
            Step::Reclaim => {
                queue.tx.reclaim(frames);
            }
            Step::Arrive(..) | Step::Work if *lied => {}
            Step::Arrive(n, len) => {
                let len = if kind.several { *len } else { (*len).min(1514) };
                let packet = make(7, len.into());
                device.device(|device, bus| {
                    device.inbound.extend((0..*n).map(|_| (0, packet.clone(), [0; 20])));
                    device.step(bus);
                });
                return (*n).into();
            }
            Step::Work => device.device(|device, bus| {
                device.step(bus);
                device.outbound.clear();
            }),
            Step::Rave(seed) => {
                *lied = true;
                rave(device, kind.packed, *seed);
            }
            Step::Headers(seed) => headers(device, pool, *seed),
            Step::Done(tx, id, len) => {
                *lied = true;
                device.device(|device, bus| {
                    device.queues[usize::from(*tx)].push(bus, &Entry::forged(*id), *len);
                });
            }
            Step::Die => {
                self.die();
            }
        }
        0
    }

    /// The worker is gone, another one takes its place.
    fn die(&mut self) -> Recovered {
        let mut survey = Survey::new(&self.frames);
        self.queue.survey(&mut survey);
        // SAFETY: no frame is alive between steps, and the one queue was surveyed.
        unsafe { survey.finish(&mut self.frames) }
    }

    /// A worker that has died did not come to showing the device what it has written from `position` on.
    fn unpublish(&self, tx: bool, position: u16) {
        self.device.device(|device, bus| {
            let queue = &device.queues[usize::from(tx)];
            if self.kind.packed {
                let flags = queue.at[0] + u64::from(position % RING) * 16 + 14;
                let hidden = bus.get16(flags) ^ 1 << 7;
                assert!(bus.write(flags, &hidden.to_le_bytes()));
                assert!(bus.write(self.shared(queue, 1), &u64::from(position).to_le_bytes()));
            } else {
                assert!(bus.write(queue.at[1] + 2, &position.to_le_bytes()));
            }
        });
    }

    /// It did not come to noting that it had taken anything.
    fn untake(&self, tx: bool) {
        self.device.device(|device, bus| {
            assert!(bus.write(self.shared(&device.queues[usize::from(tx)], 0), &[0; 8]));
        });
    }

    /// Where a word is that the queue's lives share.
    fn shared(&self, queue: &super::fake::Queue, word: u64) -> u64 {
        queue.at[0] + ring_bytes(self.kind.packed) - 64 + word * 8
    }

    /// Closes: whatever happened, all frames are there.
    fn close(self) {
        let Self { pool, frames, queue, port, device, .. } = self;
        port.statistics();
        queue.close();
        drop(port);
        assert_eq!(pool.in_depot() + frames.len() as u32, CHUNKS);
        assert_eq!(device.bus().live(), 0);
    }
}

/// Bytes of one ring with all that is behind it.
fn ring_bytes(packed: bool) -> u64 {
    (if packed { Packed::bytes(RING) } else { Split::bytes(RING) }) as u64
}

/// Writes anything to rings, words behind them, and tables.
fn rave(device: &FakeFunction<FakeNet>, packed: bool, seed: u64) {
    let mut state = seed;
    let mut random = move || {
        state = split_mix(state);
        state
    };
    device.device(|device, bus| {
        for queue in &device.queues[..2] {
            let base = queue.at[0];
            for _ in 0..random() % 200 {
                let at = base + random() % (ring_bytes(packed) / 2) * 2;
                let value = match random() % 4 {
                    0 => random() as u16,
                    1 => random() as u16 % RING,
                    2 => queue.next_used.wrapping_add(random() as u16 % 20),
                    // Used and available, both ways, and a table.
                    _ => [0, 0x80, 0x8000, 0x8080, 4][random() as usize % 5],
                };
                bus.write(at, &value.to_le_bytes());
            }
            for n in 0..u64::from(RING) {
                let (table, flags) =
                    (bus.get64(base + n * 16), bus.get16(base + n * 16 + if packed { 14 } else { 12 }));
                if flags & 4 != 0 && random() % 4 == 0 {
                    // A wild address is a fault, and nothing is written.
                    bus.write(table + random() % 32 * 8, &random().to_le_bytes());
                }
            }
        }
    });
}

/// Writes headers to wherever one may be, in all chunks.
fn headers(device: &FakeFunction<FakeNet>, pool: &Arc<Pool>, seed: u64) {
    let base = device.map_pool(pool).expect("mapped");
    let mut state = seed;
    for chunk in 0..pool.chunks() {
        state = split_mix(state);
        let mut bytes = [0; header::BYTES_WITH_HASH];
        (bytes[0], bytes[6], bytes[8]) = (state as u8 & 3, (state >> 8) as u8, (state >> 16) as u8);
        bytes[9] = (state >> 24) as u8 & 7;
        let buffers = [0, 1, 2, 3, 17, u16::MAX][(state >> 32) as usize % 6];
        bytes[header::BUFFERS..][..2].copy_from_slice(&buffers.to_le_bytes());
        bytes[header::HASH_KIND] = (state >> 40) as u8 & 1;
        let start = base + (u64::from(chunk) << pool.chunk_shift()) + u64::from(pool.start_offset(chunk));
        for before in [header::BYTES_WITH_HASH, header::BYTES, 0] {
            device.bus().write(start - before as u64, &bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_lying_device_cannot_break_frames(kind in kinds(), steps in vec(lying(), 1..80)) {
        let mut lab = Lab::new(kind);
        for step in &steps {
            lab.step(step);
            lab.check();
        }
        lab.close();
    }

    #[test]
    fn an_honest_device_loses_nothing(kind in kinds(), steps in vec(honest(), 1..80)) {
        let mut lab = Lab::new(kind);
        let (mut arrived, mut received) = (0, 0);
        for step in &steps {
            match step {
                Step::Arrive(..) => arrived += lab.step(step),
                Step::Receive => received += lab.step(step),
                _ => { lab.step(step); }
            }
            lab.check();
        }
        while received < arrived {
            lab.step(&Step::Work);
            let got = lab.step(&Step::Receive);
            prop_assert_ne!(got, 0, "{} of {}", received, arrived);
            received += got;
        }
        prop_assert_eq!(received, arrived);
        lab.step(&Step::Work);
        lab.step(&Step::Reclaim);
        prop_assert_eq!(lab.queue.tx.in_flight(), 0);
        prop_assert_eq!(lab.port.statistics().bad_descriptors, 0);
        lab.close();
    }
}

const PLAIN: Kind =
    Kind { packed: false, events: true, several: false, checksum: false, hash: false, shuffles: false };

fn both() -> [Lab; 2] {
    [false, true].map(|packed| Lab::new(Kind { packed, several: true, ..PLAIN }))
}

#[test]
fn chunks_that_a_dying_worker_had_not_published_are_its_successors() {
    for mut lab in both() {
        lab.step(&Step::Arrive(40, 100));
        assert_eq!(lab.step(&Step::Receive), 40);
        // They were replaced by 40 others, which are in custody.
        lab.unpublish(false, RING);
        let found = lab.die();
        assert_eq!((found.unpublished, found.in_rings, found.lies), (40, u32::from(RING) - 40, 0));
        lab.check();
        lab.step(&Step::Arrive(20, 100));
        assert_eq!(lab.step(&Step::Receive), 20);
        assert_eq!(lab.port.statistics().bad_descriptors, 0);
        lab.close();
    }
}

#[test]
fn packets_that_a_dying_worker_took_and_did_not_note_are_received_by_its_successor() {
    for mut lab in both() {
        lab.step(&Step::Arrive(10, 100));
        assert_eq!(lab.step(&Step::Receive), 10);
        lab.untake(false);
        let found = lab.die();
        assert_eq!((found.unpublished, found.in_rings, found.lies), (0, RING.into(), 0));
        lab.check();
        assert_eq!(lab.step(&Step::Receive), 10, "nobody has seen them");
        assert_eq!(lab.port.statistics().bad_descriptors, 0);
        lab.close();
    }
}

#[test]
fn all_frames_of_a_packet_that_a_dying_worker_had_not_sent_are_its_successors() {
    for mut lab in both() {
        let (free, more) = (lab.frames.len(), FrameFlags::MORE.bits());
        lab.step(&Step::Transmit(vec![(100, more, 0), (100, more, 0), (100, 0, 0)]));
        assert_eq!(lab.frames.len(), free - 3);
        lab.unpublish(true, 0);
        let found = lab.die();
        assert_eq!((found.unpublished, found.in_rings, found.lies), (3, RING.into(), 0));
        assert_eq!((lab.frames.len(), lab.queue.tx.in_flight()), (free, 0));
        lab.check();
        lab.close();
    }
}

#[test]
fn packets_that_a_dying_worker_took_back_and_did_not_note_come_back_once() {
    for mut lab in both() {
        let (free, more) = (lab.frames.len(), FrameFlags::MORE.bits());
        lab.step(&Step::Transmit(vec![(100, 0, 0), (100, more, 0), (100, 0, 0)]));
        lab.step(&Step::Work);
        lab.step(&Step::Reclaim);
        assert_eq!(lab.frames.len(), free);
        lab.untake(true);
        let found = lab.die();
        assert_eq!((found.unpublished, found.in_rings, found.lies), (0, u32::from(RING) + 3, 0));
        assert_eq!((lab.frames.len(), lab.queue.tx.in_flight()), (free - 3, 3));
        lab.check();
        lab.step(&Step::Reclaim);
        assert_eq!((lab.frames.len(), lab.queue.tx.in_flight()), (free, 0));
        assert_eq!(lab.port.statistics().bad_descriptors, 0);
        lab.check();
        lab.close();
    }
}

#[test]
fn counts_that_the_device_has_written_do_not_overflow() {
    for packed in [false, true] {
        let mut lab = Lab::new(Kind { packed, ..PLAIN });
        lab.device.device(|device, bus| {
            for queue in &device.queues[..2] {
                // Lies, doorbells, refused frames: of the words behind the ring.
                for word in [2, 3, 4] {
                    assert!(bus.write(lab.shared(queue, word), &[0xff; 8]));
                }
            }
        });
        lab.step(&Step::Die);
        for id in 0..8 {
            lab.step(&Step::Done(false, id, 60_000));
        }
        lab.step(&Step::Receive);
        lab.step(&Step::Transmit(vec![(0, 0, 0), (60, 0, 0)]));
        let counted = lab.port.statistics();
        assert!(counted.bad_descriptors >= u64::MAX / 2 && counted.tx_invalid >= u64::MAX / 2);
        lab.check();
        lab.close();
    }
}

/// Says that it is over, however it ends: a panic must not wait for ever for the other thread.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The device writes while the worker reads: what is looked at twice may be something else the second time.
#[test]
fn a_device_that_changes_its_mind_meanwhile_cannot_break_frames() {
    for packed in [false, true] {
        for several in [false, true] {
            let mut lab = Lab::new(Kind { packed, several, ..PLAIN });
            let (device, stop, writes) = (lab.device.clone(), AtomicBool::new(false), AtomicU64::new(0));
            let rings = device.device(|device, _| [device.queues[0].at, device.queues[1].at]);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (bus, mut state) = (device.bus(), 1);
                    while !stop.load(Ordering::Relaxed) {
                        state = split_mix(state);
                        let [descriptors, _, used] = rings[state as usize & 1];
                        let (n, id) = (state >> 8 & 63, state >> 16 & 63);
                        let len = (state >> 32) as u32 & 0xfff;
                        if packed {
                            let flags = [0_u16, 0x8080, 0x80][(state >> 24) as usize % 3];
                            bus.write(descriptors + n * 16 + 8, &len.to_le_bytes());
                            bus.write(descriptors + n * 16 + 12, &(id as u16).to_le_bytes());
                            bus.write(descriptors + n * 16 + 14, &flags.to_le_bytes());
                        } else {
                            bus.write(used + 4 + n * 8, &(id as u32).to_le_bytes());
                            bus.write(used + 8 + n * 8, &len.to_le_bytes());
                            let index = bus.get16(used + 2).wrapping_add((state >> 48) as u16 & 1);
                            bus.write(used + 2, &index.to_le_bytes());
                        }
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let end = End(&stop);
                let mut round = 0;
                // Until both have done something, and one has met the other.
                while round < 2000
                    || writes.load(Ordering::Relaxed) < 50_000
                    || lab.queue.rx.bad_descriptors() == 0
                {
                    round += 1;
                    assert!(round < 10_000_000, "nothing is ever seen of it");
                    lab.step(&Step::Receive);
                    lab.step(&Step::Transmit(vec![(100, 0, 0); round % 5]));
                    lab.step(&Step::Reclaim);
                    lab.check();
                    if round % 100 == 0 {
                        lab.step(&Step::Die);
                        lab.check();
                    }
                }
                drop(end);
            });
            lab.close();
        }
    }
}
