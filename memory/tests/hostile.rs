//! A peer that writes anything into the rings: it can cost frames and counts, never a panic and never
//! two handles to one chunk.

use isoplane_memory::ring::{Consumer, Mapped, Producer, RingMemory, bytes_for};
use isoplane_memory::{
    BATCH, Batch, Frame, FrameCache, FrameFlags, Inbox, Outbox, Pool, PoolConfig, Region, RegionConfig, Taken,
};
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const CHUNKS: u32 = 96;

/// Address, length, flags: as wide as what can come from outside.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Entry {
    address: u64,
    len: u32,
    flags: u32,
}

fn encode(frame: &Frame, address: u64) -> Entry {
    Entry { address, len: frame.len().into(), flags: frame.flags().bits().into() }
}

fn decode(entry: Entry) -> Taken {
    Taken {
        address: entry.address,
        len: entry.len,
        flags: FrameFlags::from_bits_retain(entry.flags as u16) & FrameFlags::MORE,
    }
}

struct Link {
    pool: Arc<Pool>,
    memory: Mapped<Entry>,
    outbox: Outbox<Entry>,
    inbox: Inbox<Entry>,
    sender: FrameCache,
    receiver: FrameCache,
}

fn link(capacity: u32) -> Link {
    let pool = Pool::create(&PoolConfig::new("hostile-test", CHUNKS)).unwrap();
    let region = Region::create(&RegionConfig::new("hostile-test", bytes_for::<Entry>(capacity))).unwrap();
    let memory = Mapped::create(&region, 0, capacity).unwrap();
    let (lender, collector) = pool.custody().unwrap();
    Link {
        outbox: Outbox::new(Producer::new(memory.share()), lender),
        inbox: Inbox::new(Consumer::new(memory.share()), collector),
        sender: pool.cache("sender", CHUNKS - 8).unwrap(),
        receiver: pool.cache("receiver", 8).unwrap(),
        memory,
        pool,
    }
}

impl Link {
    /// Sends a packet of `frames` frames.
    fn send(&mut self, frames: usize) {
        let mut batch = Batch::new();
        assert_eq!(self.sender.get_batch(&mut batch, frames, 60), frames);
        for frame in batch.as_mut_slice().iter_mut().take(frames - 1) {
            frame.set_flags(FrameFlags::MORE);
        }
        assert_eq!(self.outbox.post(&mut batch, encode), frames);
    }

    fn take(&mut self) -> Vec<u32> {
        let mut batch = Batch::new();
        let n = self.inbox.take(&mut self.receiver, &mut batch, decode);
        assert_eq!(n, batch.len());
        let chunks = batch.iter().map(Frame::chunk).collect();
        self.receiver.put_batch(&mut batch);
        chunks
    }
}

#[derive(Debug, Clone)]
enum Step {
    Post(usize, usize),
    PostFree(usize),
    Take,
    Collect(usize),
    Free,
    Producer(u32),
    Consumer(u32),
    Slot(u32, u64, u32, u32),
    Copy(u32, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = || prop_oneof![any::<u32>(), 0_u32..64, Just(u32::MAX), Just(u32::MAX - 1), Just(16)];
    let address =
        prop_oneof![0_u64..u64::from(CHUNKS) * 2048, (0_u64..96).prop_map(|c| c * 2048 + 128), any::<u64>()];
    let step = prop_oneof![
        4 => (1_usize..20, 1_usize..5).prop_map(|(n, packet)| Step::Post(n, packet)),
        1 => (1_usize..20).prop_map(Step::PostFree),
        4 => Just(Step::Take),
        1 => (1_usize..20).prop_map(Step::Collect),
        2 => Just(Step::Free),
        1 => index().prop_map(Step::Producer),
        1 => index().prop_map(Step::Consumer),
        2 => (0_u32..16, address, prop_oneof![0_u32..3000, any::<u32>()], 0_u32..4)
            .prop_map(|(slot, address, len, flags)| Step::Slot(slot, address, len, flags)),
        2 => (0_u32..16, 0_u32..16).prop_map(|(from, to)| Step::Copy(from, to)),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_lie_makes_two_frames_of_a_chunk(steps in steps()) {
        let mut link = link(16);
        let mut held: Vec<Frame> = Vec::new();
        for step in steps {
            match step {
                Step::Post(n, packet) => {
                    let mut batch = Batch::new();
                    let got = link.sender.get_batch(&mut batch, n, 60);
                    for (at, frame) in batch.iter_mut().enumerate() {
                        if (at + 1) % packet != 0 && at + 1 < got {
                            frame.set_flags(FrameFlags::MORE);
                        }
                    }
                    link.outbox.post(&mut batch, encode);
                    link.sender.put_batch(&mut batch);
                }
                Step::PostFree(n) => {
                    link.outbox.post_free(&mut link.sender, n, encode);
                }
                Step::Take => {
                    let mut batch = Batch::new();
                    link.inbox.take(&mut link.receiver, &mut batch, decode);
                    for frame in batch.iter() {
                        prop_assert!(frame.offset() >= 64);
                        prop_assert!(u32::from(frame.offset()) + u32::from(frame.len()) <= 2048);
                        prop_assert_eq!(link.pool.bytes(frame).len(), usize::from(frame.len()));
                    }
                    held.extend(batch.drain());
                }
                Step::Collect(n) => {
                    link.inbox.collect(&mut link.receiver, n, |entry| entry.address);
                }
                Step::Free => {
                    for frame in held.drain(..) {
                        link.receiver.put(frame);
                    }
                    // The receiver gives half of its frames back for the sender to go on with.
                    for _ in 0..link.receiver.len() / 2 {
                        if let Some(frame) = link.receiver.get() {
                            prop_assert!(link.pool.surrender(frame).is_ok());
                        }
                    }
                    link.sender.draw(CHUNKS);
                }
                Step::Producer(index) => link.memory.store_producer(index, Ordering::Release),
                Step::Consumer(index) => link.memory.store_consumer(index, Ordering::Release),
                Step::Slot(slot, address, len, flags) => link.memory.write(slot, Entry { address, len, flags }),
                Step::Copy(from, to) => link.memory.write(to, link.memory.read(from)),
            }
            prop_assert_eq!(link.sender.owned() as usize, link.sender.len());
            prop_assert_eq!(link.receiver.owned() as usize, link.receiver.len() + held.len());
        }
        let mut chunks = HashSet::new();
        held.extend(std::iter::from_fn(|| link.sender.get()));
        held.extend(std::iter::from_fn(|| link.receiver.get()));
        for frame in &held {
            prop_assert!(chunks.insert(frame.chunk()), "chunk {} twice", frame.chunk());
        }
        let lent = link.pool.census()[usize::from(link.outbox.lender().id())];
        prop_assert_eq!(chunks.len() as u32 + lent + link.pool.in_depot(), CHUNKS);
    }
}

#[test]
fn a_bad_frame_costs_its_packet_and_no_other() {
    let mut link = link(16);
    link.send(1);
    link.send(3);
    link.send(1);
    let mut entry = link.memory.read(2);
    let good = entry;
    entry.len = 60_000;
    link.memory.write(2, entry);
    assert_eq!(link.take().len(), 2, "the packets before and after");
    assert_eq!(link.inbox.bad(), 1);
    assert_eq!(link.receiver.len(), 8 + 4, "the good frames of the bad packet are the receiver's");
    link.memory.write(5, good);
    link.memory.store_producer(6, Ordering::Release);
    assert!(link.take().is_empty(), "a packet whose end has not come");
}

#[test]
fn an_unfinished_packet_waits_without_holding_up_those_before_it() {
    let mut link = link(16);
    link.send(2);
    link.send(3);
    // The end of the second packet is not there yet.
    link.memory.store_producer(4, Ordering::Release);
    assert_eq!(link.take().len(), 2);
    assert!(link.take().is_empty() && link.take().is_empty());
    assert_eq!((link.inbox.bad(), link.receiver.len()), (0, 10));
    link.memory.store_producer(5, Ordering::Release);
    assert_eq!(link.take().len(), 3);
    assert_eq!((link.inbox.bad(), link.receiver.len()), (0, 13));
}

#[test]
fn a_packet_without_end_is_dropped_once_it_fills_a_batch_or_the_ring() {
    for capacity in [16, 128] {
        let mut link = link(capacity);
        let n = (capacity as usize).min(BATCH);
        let mut batch = Batch::new();
        link.sender.get_batch(&mut batch, n, 60);
        // Sent as single frames; the flag is the lie.
        link.outbox.post(&mut batch, |frame, address| Entry {
            flags: FrameFlags::MORE.bits().into(),
            ..encode(frame, address)
        });
        assert!(link.take().is_empty());
        assert_eq!(link.inbox.bad(), 1);
        assert_eq!(link.receiver.len(), 8 + n, "its frames are the receiver's");
        link.send(2);
        assert_eq!(link.take().len(), 2, "and the next packet arrives");
    }
}

#[test]
fn an_entry_that_comes_twice_counts_once() {
    let mut link = link(16);
    link.send(1);
    link.memory.write(1, link.memory.read(0));
    link.memory.write(2, link.memory.read(0));
    link.memory.store_producer(3, Ordering::Release);
    assert_eq!(link.take().len(), 1);
    assert_eq!(link.inbox.bad(), 2);
}

#[test]
fn a_packet_stays_whole_when_the_ring_has_room_for_a_part() {
    let mut link = link(4);
    link.send(3);
    let mut batch = Batch::new();
    link.sender.get_batch(&mut batch, 2, 60);
    batch.as_mut_slice()[0].set_flags(FrameFlags::MORE);
    assert_eq!(link.outbox.post(&mut batch, encode), 0);
    assert_eq!(batch.len(), 2);
    assert_eq!(link.take().len(), 3);
    assert_eq!(link.outbox.post(&mut batch, encode), 2);
    assert_eq!(link.take().len(), 2);
}
