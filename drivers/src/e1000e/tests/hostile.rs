//! A device that lies: about what it has done, lengths, addresses, positions, in any of the memory that it can
//! reach. Whatever it writes, nothing panics or spins, no frame is handed out twice, none leaves its chunk, and
//! each is accounted for at any time. With a device that is honest none is lost either.
#![allow(unsafe_code, reason = "a survey is finished on behalf of a worker that is gone")]

use super::super::layout::*;
use super::super::rings::Word;
use super::super::{E1000eConfig, E1000ePort, RxDescriptors};
use super::{Card, Fake, unplugged};
use crate::conformance::packet::{make, split_mix};
use crate::port::{Port, RxQueue, TxQueue};
use crate::queue::Queue;
use isoplane_memory::pool::META_BYTES;
use isoplane_memory::recovery::{Balance, Recovered};
use isoplane_memory::{Batch, FrameCache, FrameFlags, FrameMeta, HugePages, Lock, Pool, PoolConfig, Survey};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const RING: u32 = 64;
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
    /// It reports nothing as sent for a while.
    Silent(bool),
    /// A lie: anything in the rings, places and positions.
    Rave(u64),
    /// A lie: this descriptor was received so.
    Received(u32, u64),
    /// A lie: this was sent.
    Sent(u32),
    /// A lie: a position of the handover.
    Position(u8, u64),
    /// The worker dies, and a survey takes over.
    Die,
}

fn honest() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Receive),
        3 => vec((0..2000_u16, 0..64_u16, 0..300_u16), 0..40).prop_map(Step::Transmit),
        3 => Just(Step::Reclaim),
        4 => (0..40_u8, 60..5000_u16).prop_map(|(n, len)| Step::Arrive(n, len)),
        1 => any::<bool>().prop_map(Step::Silent),
        1 => Just(Step::Die),
    ]
}

fn lying() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => honest(),
        1 => any::<u64>().prop_map(Step::Rave),
        1 => (0..RING, prop_oneof![any::<u64>(), (0..4_u64, 0..3000_u64).prop_map(|(status, len)| status | len << 32)])
            .prop_map(|(at, word)| Step::Received(at, word)),
        1 => (0..RING).prop_map(Step::Sent),
        1 => (0..20_u8, prop_oneof![any::<u64>(), 0..200_u64, Just(u64::MAX)]).prop_map(|(at, value)| Step::Position(at, value)),
    ]
}

struct Lab {
    pool: Arc<Pool>,
    frames: FrameCache,
    card: Card,
    port: E1000ePort<Card>,
    queue: Queue,
}

impl Lab {
    fn new(config: &E1000eConfig) -> Self {
        let mut pool = PoolConfig::new("hostile", CHUNKS);
        (pool.huge_pages, pool.lock) = (HugePages::Never, Lock::Never);
        let pool = Pool::create(&pool).expect("a pool");
        let card = Card::new(Fake::new(1));
        let mut port = E1000ePort::open(card.clone(), &pool, config).expect("a port");
        let queue = port.take_queue(0).expect("a queue");
        let frames = pool.cache("worker", CHUNKS - RING).expect("frames");
        Self { pool, frames, card, port, queue }
    }

    /// What is owned by the worker is on its list: none lost, none twice.
    fn check(&self) {
        let balance = Balance::of(&self.pool, &[(self.frames.id(), self.frames.len() as u32)]);
        assert_eq!(balance.missing, 0, "{balance:?}");
        assert_eq!(balance.in_hand + balance.in_custody + balance.depot, CHUNKS);
    }

    fn base(device: &Fake, at: usize) -> u64 {
        u64::from(device.get(at + BASE_HIGH)) << 32 | u64::from(device.get(at + BASE_LOW))
    }

    fn step(&mut self, step: &Step) -> usize {
        let Self { pool, frames, card, queue, .. } = self;
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
                    let csum_offset = 6;
                    pool.set_meta(
                        &mut frame,
                        FrameMeta { csum_start: *csum_start, csum_offset, ..FrameMeta::default() },
                    );
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
            Step::Arrive(n, len) => {
                let packet = make(7, usize::from(*len));
                return card.device(|device, bus| {
                    let missed = |device: &Fake| device.get(0x4010) + device.get(0x40ac);
                    let before = missed(device);
                    (0..*n).for_each(|_| device.arrive(bus, &packet));
                    usize::from(*n) - (missed(device) - before) as usize
                });
            }
            Step::Silent(silent) => card.device(|device, _| device.silent = *silent),
            Step::Rave(seed) => card.device(|device, bus| device.rave(bus, *seed)),
            Step::Received(at, word) => card.device(|device, bus| {
                let to = Self::base(device, rx(0, 0)) + u64::from(*at) * 16 + 8;
                bus.write(to, &word.to_le_bytes());
            }),
            Step::Sent(at) => card.device(|device, bus| {
                bus.write(Self::base(device, tx(0, 0)) + u64::from(*at) * 16 + 12, &[1]);
            }),
            Step::Position(at, value) => card.device(|device, bus| {
                let handover = Self::base(device, rx(0, 0)) + u64::from(RING) * 40;
                bus.write(handover + u64::from(*at) * 8, &value.to_le_bytes());
            }),
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

    /// A worker that has died did not come to writing this.
    fn unwrite(&mut self, word: Word, value: u32) {
        self.step(&Step::Position(word as u8, value.into()));
    }

    /// Closes: whatever happened, all frames are there.
    fn close(self) -> Card {
        let Self { pool, frames, queue, port, card } = self;
        queue.close();
        drop(port);
        assert_eq!(pool.in_depot() + frames.len() as u32, CHUNKS);
        card
    }
}

fn small() -> E1000eConfig {
    E1000eConfig::default().rings(RING, RING)
}

fn send(lab: &mut Lab, n: usize) {
    lab.step(&Step::Transmit(vec![(100, 0, 0); n]));
}

#[test]
fn chunks_that_a_dying_worker_had_not_posted_are_its_successors() {
    let mut lab = Lab::new(&small());
    lab.step(&Step::Arrive(40, 100));
    assert_eq!(lab.step(&Step::Receive), 40);
    // One chunk went to the ring's last descriptor, 39 to its first ones; these are written and in custody.
    lab.unwrite(Word::RxPosted, RING);
    let found = lab.die();
    assert_eq!((found.unpublished, found.in_rings, found.lies), (39, RING - 40, 0));
    lab.check();
    lab.step(&Step::Arrive(20, 100));
    assert_eq!(lab.step(&Step::Receive), 20);
    assert_eq!(lab.queue.rx.bad_descriptors(), 0);
    lab.close();
}

#[test]
fn packets_that_a_dying_worker_took_and_did_not_note_are_received_by_its_successor() {
    let mut lab = Lab::new(&small());
    lab.step(&Step::Arrive(10, 100));
    assert_eq!(lab.step(&Step::Receive), 10);
    lab.unwrite(Word::RxNext, 0);
    let found = lab.die();
    assert_eq!((found.unpublished, found.in_rings, found.lies), (0, RING - 1, 0));
    lab.check();
    assert_eq!(lab.step(&Step::Receive), 10, "nobody has seen them");
    assert_eq!(lab.queue.rx.bad_descriptors(), 0);
    lab.close();
}

#[test]
fn packets_that_a_dying_worker_had_not_sent_are_its_successors() {
    let mut lab = Lab::new(&small());
    lab.step(&Step::Silent(true));
    send(&mut lab, 7);
    lab.check();
    let free = lab.frames.len();
    lab.unwrite(Word::TxPosted, 0);
    let found = lab.die();
    assert_eq!((found.unpublished, found.lies), (7, 0));
    assert_eq!((lab.frames.len(), lab.queue.tx.in_flight()), (free + 7, 0));
    lab.check();
    // Of two descriptors, one is no packet's: it says where the checksum goes.
    let asks = (FrameFlags::TX_CHECKSUM | FrameFlags::META).bits();
    lab.step(&Step::Transmit(vec![(100, asks, 34)]));
    assert_eq!(lab.card.device(|device, _| device.context_descriptors), 1);
    lab.unwrite(Word::TxPosted, 0);
    let found = lab.die();
    assert_eq!((found.unpublished, found.lies, lab.frames.len()), (1, 0, free + 7));
    lab.check();
    lab.close();
}

#[test]
fn packets_that_a_dying_worker_took_back_and_did_not_note_come_back_once() {
    let mut lab = Lab::new(&small());
    let free = lab.frames.len();
    send(&mut lab, 7);
    lab.step(&Step::Reclaim);
    assert_eq!(lab.frames.len(), free);
    lab.unwrite(Word::TxClean, 0);
    let found = lab.die();
    assert_eq!((found.unpublished, found.in_rings, found.lies), (0, RING - 1 + 7, 0));
    assert_eq!((lab.frames.len(), lab.queue.tx.in_flight()), (free - 7, 7));
    lab.check();
    lab.step(&Step::Reclaim);
    assert_eq!((lab.frames.len(), lab.queue.tx.in_flight()), (free, 0));
    assert_eq!(lab.queue.tx.bad_descriptors(), 0);
    lab.check();
    lab.close();
}

#[test]
fn counts_that_the_device_has_written_do_not_overflow() {
    let mut lab = Lab::new(&small());
    for word in [Word::RxBad, Word::TxBad, Word::TxRefused] {
        lab.step(&Step::Position(word as u8, u64::MAX));
    }
    lab.die();
    for at in 0..8 {
        lab.step(&Step::Received(at, 0b11 | 60_000 << 32));
    }
    lab.step(&Step::Receive);
    lab.step(&Step::Transmit(vec![(5, 0, 0)]));
    let counted = lab.port.statistics();
    assert!(counted.bad_descriptors >= u64::MAX / 2 && counted.tx_invalid >= u64::MAX / 2);
    lab.close();
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
    for legacy in [false, true] {
        let form = if legacy { RxDescriptors::Legacy } else { RxDescriptors::Extended };
        let mut lab = Lab::new(&small().rx_descriptors(form).rx_hash(!legacy).mtu(9000));
        let (card, stop, writes) = (lab.card.clone(), AtomicBool::new(false), AtomicU64::new(0));
        let (base, sent) =
            card.device(|device, _| (Lab::base(device, rx(0, 0)), Lab::base(device, tx(0, 0))));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut state = 1;
                while !stop.load(Ordering::Relaxed) {
                    state = split_mix(state);
                    let (at, kind, len) = (state % u64::from(RING) * 16, state >> 16, state >> 32 & 0xfff);
                    // Done, mostly whole, sometimes damaged, in both formats; now and then not done again.
                    let status =
                        if kind & 0b111 == 0 { 0 } else { 1 | (kind & 0b10) | kind & (1 << 9) << 16 };
                    let word = if legacy { len | status << 32 } else { len << 32 | status };
                    card.bus().write(base + at + 8, &word.to_le_bytes());
                    card.bus().write(sent + (state >> 48) % u64::from(RING) * 16 + 12, &[kind as u8 & 1]);
                    if kind & 0xff_0000 == 0 {
                        card.bus().write(base + u64::from(RING) * 32 + at / 2, &[kind as u8; 2]);
                    }
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
            let end = End(&stop);
            let mut round = 0;
            // Until both have done something, and one has met the other.
            while round < 4000
                || writes.load(Ordering::Relaxed) < 100_000
                || lab.queue.rx.bad_descriptors() == 0
            {
                round += 1;
                assert!(round < 10_000_000, "nothing is ever seen of it");
                lab.step(&Step::Receive);
                send(&mut lab, round % 5);
                lab.step(&Step::Reclaim);
                lab.check();
                if round % 100 == 0 {
                    lab.die();
                    lab.check();
                }
            }
            drop(end);
        });
        lab.close();
    }
}

fn configs() -> impl Strategy<Value = E1000eConfig> {
    (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(legacy, hash, long)| {
        let config = E1000eConfig::default().rings(RING, RING).mtu(if long { 9000 } else { 1500 });
        let form = if legacy { RxDescriptors::Legacy } else { RxDescriptors::Extended };
        config.rx_descriptors(form).rx_hash(hash && !legacy)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_lying_device_cannot_break_frames(config in configs(), steps in vec(lying(), 1..80)) {
        let mut lab = Lab::new(&config);
        for step in &steps {
            lab.step(step);
            lab.check();
        }
        lab.close();
    }

    #[test]
    fn an_honest_device_loses_nothing(config in configs(), steps in vec(honest(), 1..80)) {
        let mut lab = Lab::new(&config);
        let (mut arrived, mut received) = (0, 0);
        for step in &steps {
            match step {
                Step::Arrive(..) => arrived += lab.step(step),
                Step::Receive => received += lab.step(step),
                _ => { lab.step(step); }
            }
            lab.check();
        }
        lab.step(&Step::Silent(false));
        for _ in 0..8 {
            received += lab.step(&Step::Receive);
        }
        prop_assert_eq!(received, arrived);
        prop_assert_eq!(lab.queue.rx.bad_descriptors() + lab.queue.tx.bad_descriptors(), 0);
        // A batch that was sent while the device was silent is reported by no other.
        let silent = lab.card.device(|device, _| device.unreported);
        if silent == 0 {
            lab.step(&Step::Reclaim);
            lab.step(&Step::Reclaim);
            prop_assert_eq!(lab.queue.tx.in_flight(), 0);
        }
        let card = lab.close();
        unplugged([card, Card::new(Fake::new(2))]);
    }
}
