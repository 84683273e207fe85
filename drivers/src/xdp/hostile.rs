//! The hot halves on plain memory, with a kernel at the other end of the rings that may lie: about
//! indices, addresses, lengths, flags. Whatever it says, nothing panics, no frame is handed out twice,
//! none leaves its chunk, and each is accounted for at any time; with a kernel that is honest none is
//! lost either.
#![allow(unsafe_code, reason = "the other side of the rings writes raw slots")]

use super::open::{Opened, Plan};
use super::socket::plain::{Which, socket};
use super::socket::{RingSizes, Socket};
use super::umem::Geometry;
use crate::port::{RxQueue, TxQueue};
use isoplane_memory::pool::META_BYTES;
use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, FrameCache, FrameFlags, HugePages, Lock, Pool, PoolConfig, Survey};
use proptest::collection::vec;
use proptest::prelude::*;
use std::sync::Arc;

const SIZES: RingSizes = RingSizes { rx: 16, tx: 16, fill: 32, completion: 16 };
const CHUNKS: u32 = 96;

#[derive(Debug, Clone)]
enum Step {
    /// Ours: receive, and free what arrived.
    Receive,
    /// Ours: send frames of these lengths, some with flags.
    Transmit(Vec<(u16, u16)>),
    /// Ours: take completions.
    Reclaim,
    /// The kernel, honest: receives packets of that many frames into chunks of the fill ring.
    Deliver(u8, u8),
    /// The kernel, honest: sends and completes.
    Complete(u8),
    /// A lie: that index of that ring.
    Index(u8, bool, u32),
    /// A lie: entries of the RX ring (which, address, length, options).
    Received(u32, u64, u32, u32),
    /// A lie: an entry of the completion ring.
    Completed(u32, u64),
    /// The worker dies, and a survey takes over.
    Die,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0..u64::from(CHUNKS), 0..5000_u64).prop_map(|(chunk, at)| chunk * 4096 + at),
        1 => (0..u64::from(CHUNKS), any::<u16>()).prop_map(|(chunk, at)| (chunk * 4096) | (u64::from(at) << 48)),
        1 => any::<u64>(),
    ]
}

fn honest() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Receive),
        3 => vec((0..2000_u16, 0..64_u16), 0..20).prop_map(Step::Transmit),
        3 => Just(Step::Reclaim),
        4 => (0..20_u8, 1..4_u8).prop_map(|(n, frames)| Step::Deliver(n, frames)),
        3 => (0..20_u8).prop_map(Step::Complete),
        1 => Just(Step::Die),
    ]
}

fn lying() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => honest(),
        1 => (0..4_u8, any::<bool>(), prop_oneof![any::<u32>(), 0..64_u32])
            .prop_map(|(ring, producer, value)| Step::Index(ring, producer, value)),
        1 => (0..16_u32, address(), prop_oneof![0..5000_u32, any::<u32>()], prop_oneof![0..4_u32, any::<u32>()])
            .prop_map(|(slot, a, len, options)| Step::Received(slot, a, len, options)),
        1 => (0..16_u32, address()).prop_map(|(slot, a)| Step::Completed(slot, a)),
    ]
}

struct Lab {
    pool: Arc<Pool>,
    frames: FrameCache,
    opened: Opened,
    socket: Arc<Socket>,
    geometry: Geometry,
    /// Chunks that the honest kernel has, and how far it is in our rings.
    sending: Vec<u64>,
    honest: bool,
}

impl Lab {
    fn new(unaligned: bool, honest: bool) -> Self {
        let mut config = PoolConfig::new("hostile", CHUNKS);
        (config.chunk_bytes, config.huge_pages, config.lock) = (4096, HugePages::Never, Lock::Never);
        let pool = Pool::create(&config).expect("a pool");
        let geometry = Geometry::new(&pool, unaligned, 24, false).expect("a layout");
        let socket = socket(SIZES, &pool);
        let plan = Plan::plain(&pool, &socket, geometry, SIZES);
        let mut opened = plan
            .assemble(&socket, pool.custody().expect("an id"), pool.custody().expect("an id"))
            .expect("rings");
        let crate::AnyRx::Xdp(rx) = &mut opened.queue.rx else { unreachable!("we made it") };
        assert_eq!(rx.prime(SIZES.fill as usize), SIZES.fill as usize);
        let frames = pool.cache("worker", CHUNKS - SIZES.fill).expect("frames");
        Self { pool, frames, opened, socket, geometry, sending: Vec::new(), honest }
    }

    /// What is owned by the worker is on its list: none lost, none twice.
    fn check(&self) {
        let balance = Balance::of(&self.pool, &[(self.frames.id(), self.frames.len() as u32)]);
        assert_eq!(balance.missing, 0, "{balance:?}");
        assert_eq!(balance.in_hand + balance.in_custody + balance.depot, CHUNKS);
    }

    fn read(&self, which: Which, index: u32) -> [u64; 2] {
        // SAFETY: `slot` lies in the ring; the rings of one entry size are read as such.
        unsafe {
            let slot = self.socket.slot(which, index);
            if matches!(which, Which::Rx | Which::Tx) {
                slot.read_volatile()
            } else {
                [slot.cast::<u64>().read_volatile(), 0]
            }
        }
    }

    fn write(&self, which: Which, index: u32, value: [u64; 2]) {
        // SAFETY: as in `read`.
        unsafe {
            let slot = self.socket.slot(which, index);
            if matches!(which, Which::Rx | Which::Tx) {
                slot.write_volatile(value);
            } else {
                slot.cast::<u64>().write_volatile(value[0]);
            }
        }
    }

    fn descriptor(addr: u64, len: u32, options: u32) -> [u64; 2] {
        [addr, u64::from(len) | u64::from(options) << 32]
    }

    /// The kernel receives `packets` packets of `each` frames. Says how many frames.
    fn deliver(&mut self, packets: u8, each: u8) -> u32 {
        let mut delivered = 0;
        for _ in 0..packets {
            let (filled, mut taken) = self.socket.indices(Which::Fill);
            let (mut at, seen) = self.socket.indices(Which::Rx);
            let n = u32::from(each);
            if filled.wrapping_sub(taken) < n || SIZES.rx.wrapping_sub(at.wrapping_sub(seen)) < n {
                break;
            }
            for frame in 0..n {
                let [address, _] = self.read(Which::Fill, taken);
                taken = taken.wrapping_add(1);
                // Documentation/networking/af_xdp.rst: the offset is in the upper bits when unaligned.
                let address = match self.geometry.unaligned() {
                    true => address | 256 << 48,
                    false => (address & !4095) + 256,
                };
                let more = u32::from(frame + 1 < n);
                self.write(Which::Rx, at, Self::descriptor(address, 60 + frame, more));
                at = at.wrapping_add(1);
            }
            self.socket.set(Which::Fill, "consumer", taken);
            self.socket.set(Which::Rx, "producer", at);
            delivered += n;
        }
        delivered
    }

    /// The kernel takes up to `n` frames to send, and completes what it took before.
    fn complete(&mut self, n: u8) {
        let (mut at, taken) = self.socket.indices(Which::Completion);
        while SIZES.completion.wrapping_sub(at.wrapping_sub(taken)) > 0 {
            let Some(address) = self.sending.pop() else { break };
            self.write(Which::Completion, at, [address, 0]);
            at = at.wrapping_add(1);
        }
        self.socket.set(Which::Completion, "producer", at);
        let (published, mut next) = self.socket.indices(Which::Tx);
        for _ in 0..n {
            if published == next || published.wrapping_sub(next) > SIZES.tx {
                break;
            }
            let [address, rest] = self.read(Which::Tx, next);
            if self.honest {
                assert_ne!(rest as u32, 0, "an empty descriptor would never be completed");
                assert!(rest as u32 <= 4096 && address < u64::from(CHUNKS) * 4096);
            }
            self.sending.push(address);
            next = next.wrapping_add(1);
        }
        self.socket.set(Which::Tx, "consumer", next);
    }

    fn step(&mut self, step: &Step) -> u32 {
        let queue = &mut self.opened.queue;
        match step {
            Step::Receive => {
                let mut batch = Batch::new();
                let got = queue.rx.receive(&mut self.frames, &mut batch);
                assert_eq!(got, batch.len());
                assert!(batch.as_slice().last().is_none_or(|last| !last.has_more()), "packets are whole");
                for frame in batch.iter() {
                    let end = u32::from(frame.offset()) + u32::from(frame.len());
                    assert!(u32::from(frame.offset()) >= META_BYTES && end <= self.pool.chunk_bytes());
                    std::hint::black_box(self.pool.bytes(frame).iter().fold(0_u8, |a, b| a ^ b));
                }
                self.frames.put_batch(&mut batch);
                return got as u32;
            }
            Step::Transmit(lengths) => {
                let mut batch = Batch::new();
                for (len, flags) in lengths {
                    let Some(mut frame) = self.frames.get() else { break };
                    self.pool.reset(&mut frame, (*len).min(1522));
                    frame.set_flags(FrameFlags::from_bits_truncate(*flags));
                    batch.push(frame).expect("fewer than a batch");
                }
                let before = batch.len();
                let sent = queue.tx.transmit(&mut batch);
                assert_eq!(batch.len() + sent, before);
                self.frames.put_batch(&mut batch);
                // Refused frames come back now, so that the balance can be taken.
                queue.tx.reclaim(&mut self.frames);
            }
            Step::Reclaim => {
                queue.tx.reclaim(&mut self.frames);
            }
            Step::Deliver(packets, each) => return self.deliver(*packets, *each),
            Step::Complete(n) => self.complete(*n),
            Step::Index(ring, producer, value) => {
                let which = [Which::Rx, Which::Tx, Which::Fill, Which::Completion][usize::from(*ring)];
                self.socket.set(which, if *producer { "producer" } else { "consumer" }, *value);
            }
            Step::Received(slot, address, len, options) => {
                self.write(Which::Rx, *slot, Self::descriptor(*address, *len, *options));
            }
            Step::Completed(slot, address) => self.write(Which::Completion, *slot, [*address, 0]),
            Step::Die => {
                let mut survey = Survey::new(&self.frames);
                queue.survey(&mut survey);
                // SAFETY: no frame is alive between steps, and the one queue was surveyed.
                let _ = unsafe { survey.finish(&mut self.frames) };
            }
        }
        0
    }

    /// Closes: whatever happened, all frames are there.
    fn close(self) {
        let Self { pool, frames, opened, socket, .. } = self;
        drop(socket);
        opened.queue.close();
        assert_eq!(pool.in_depot() + frames.len() as u32, CHUNKS);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_lying_kernel_cannot_break_frames(unaligned: bool, steps in vec(lying(), 1..120)) {
        let mut lab = Lab::new(unaligned, false);
        for step in &steps {
            lab.step(step);
            lab.check();
        }
        lab.close();
    }

    #[test]
    fn an_honest_kernel_loses_nothing(unaligned: bool, steps in vec(honest(), 1..120)) {
        let mut lab = Lab::new(unaligned, true);
        let (mut delivered, mut received) = (0, 0);
        for step in &steps {
            match step {
                Step::Deliver(..) => delivered += lab.step(step),
                Step::Receive => received += lab.step(step),
                _ => { lab.step(step); }
            }
            lab.check();
        }
        for _ in 0..8 {
            received += lab.step(&Step::Receive);
            lab.step(&Step::Complete(64));
            lab.step(&Step::Reclaim);
        }
        prop_assert_eq!(received, delivered);
        prop_assert_eq!(lab.opened.queue.tx.in_flight(), 0);
        prop_assert_eq!(lab.opened.queue.rx.bad_descriptors() + lab.opened.queue.tx.bad_descriptors(), 0);
        lab.close();
    }
}
