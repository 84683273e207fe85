//! The ring against a `VecDeque`, over mapped memory and with indices about to wrap.

use isoplane_memory::ring::{Consumer, Mapped, Producer, RingError, RingMemory, bytes_for, channel};
use isoplane_memory::{Region, RegionConfig};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn region(bytes: usize) -> Arc<Region> {
    Region::create(&RegionConfig::new("ring-test", bytes)).unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Push,
    Pop,
    /// Write this many, publish that many of them.
    Bulk(u32, u32),
    /// Look at this many, release that many of them.
    Take(u32, u32),
    /// Both sides start anew from the shared indices, as after a restart.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        Just(Step::Push),
        Just(Step::Pop),
        (0_u32..40, 0_u32..40).prop_map(|(n, m)| Step::Bulk(n, m)),
        (0_u32..40, 0_u32..40).prop_map(|(n, m)| Step::Take(n, m)),
        Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn behaves_as_a_bounded_queue(
        log in 0_u32..6,
        start in prop_oneof![Just(0), any::<u32>(), (u32::MAX - 50)..=u32::MAX],
        steps in steps(),
    ) {
        let capacity = 1 << log;
        let region = region(bytes_for::<u64>(capacity));
        let memory = Mapped::<u64>::create(&region, 0, capacity).unwrap();
        memory.store_producer(start, Ordering::Release);
        memory.store_consumer(start, Ordering::Release);
        let mut producer = Producer::new(memory.share());
        let mut consumer = Consumer::new(memory.share());
        let mut model: VecDeque<u64> = VecDeque::new();
        let mut next = 0;
        for step in steps {
            let room = capacity - model.len() as u32;
            match step {
                Step::Push => {
                    let pushed = producer.push(next);
                    prop_assert_eq!(pushed.is_ok(), room > 0);
                    if pushed.is_ok() {
                        model.push_back(next);
                    }
                    next += 1;
                }
                Step::Pop => prop_assert_eq!(consumer.pop(), model.pop_front()),
                Step::Bulk(n, publish) => {
                    let free = producer.free(n);
                    prop_assert!(free <= room && free.min(n) == room.min(n), "{} free of {}", free, room);
                    let n = n.min(free);
                    for slot in 0..n {
                        let value = next + u64::from(slot);
                        if slot % 2 == 0 {
                            producer.write(slot, value);
                        } else {
                            // SAFETY: the region is mapped, and the slot is free: the producer's own.
                            unsafe { producer.slot(slot).write_volatile(value) };
                        }
                    }
                    let publish = publish.min(n);
                    producer.publish(publish);
                    model.extend(next..next + u64::from(publish));
                    next += u64::from(n);
                }
                Step::Take(n, release) => {
                    let available = consumer.available(n);
                    let there = model.len() as u32;
                    prop_assert!(available <= there && available.min(n) == there.min(n));
                    for slot in 0..n.min(available) {
                        prop_assert_eq!(Some(&consumer.read(slot)), model.get(slot as usize));
                    }
                    let release = release.min(n).min(available);
                    consumer.release(release);
                    model.drain(..release as usize);
                }
                Step::Restart => {
                    producer = Producer::new(memory.share());
                    consumer = Consumer::new(memory.share());
                }
            }
            prop_assert_eq!(producer.pending(), Some(model.len() as u32));
            prop_assert_eq!((producer.corrupt(), consumer.corrupt()), (0, 0));
        }
    }

    /// Whatever the other side's index says, no side sees more than the ring holds.
    #[test]
    fn impossible_indices_read_as_nothing(
        ours in any::<u32>(),
        theirs in any::<u32>(),
        restart in any::<bool>(),
        want in any::<u32>(),
    ) {
        let region = region(bytes_for::<u32>(16));
        let memory = Mapped::<u32>::create(&region, 0, 16).unwrap();
        memory.store_producer(ours, Ordering::Release);
        memory.store_consumer(ours, Ordering::Release);
        let (mut producer, mut consumer) = (Producer::new(memory.share()), Consumer::new(memory.share()));
        memory.store_consumer(theirs, Ordering::Release);
        if restart {
            producer = Producer::new(memory.share());
        }
        let used = ours.wrapping_sub(theirs);
        let free = producer.free(want);
        prop_assert!(free <= 16);
        if restart || want > 16 {
            prop_assert_eq!(free, 16_u32.saturating_sub(used));
            prop_assert_eq!(producer.corrupt() > 0, used > 16);
        }
        memory.store_consumer(ours, Ordering::Release);
        memory.store_producer(theirs, Ordering::Release);
        let there = theirs.wrapping_sub(ours);
        let available = consumer.available(want.max(1));
        prop_assert_eq!(available, if there > 16 { 0 } else { there });
        prop_assert_eq!(consumer.corrupt() > 0, there > 16);
    }
}

#[test]
fn places_and_sizes_are_checked() {
    let region = region(4096);
    assert_eq!(Mapped::<u64>::create(&region, 0, 12).unwrap_err(), RingError::Capacity { capacity: 12 });
    assert!(matches!(Mapped::<u64>::create(&region, 0, 1 << 20), Err(RingError::Space { .. })));
    assert!(matches!(Mapped::<u64>::create(&region, 8, 4), Err(RingError::Space { .. })));
    assert!(matches!(Mapped::<u64>::create(&region, 1 << 40, 4), Err(RingError::Space { .. })));
    assert!(matches!(Mapped::<u64>::attach(&region, 1024), Err(RingError::NotARing { .. })));
    channel::<u64>(&region, 0, 64).unwrap();
    assert!(matches!(Mapped::<u32>::attach(&region, 0), Err(RingError::NotARing { entry: 4, .. })));
    let capacity = region.slice::<u32>(4, 1).unwrap();
    for lie in [0, 3, 1 << 20, u32::MAX] {
        // SAFETY: inside the region; rings reach it by volatile copies.
        unsafe { capacity.write_volatile(lie) };
        assert!(Mapped::<u64>::attach(&region, 0).is_err(), "{lie}");
    }
}

#[test]
fn two_threads_pass_a_million_entries_in_order() {
    let region = region(bytes_for::<u64>(64));
    let (mut producer, mut consumer) = channel::<u64>(&region, 0, 64).unwrap();
    let sender = std::thread::spawn(move || {
        for value in 0..1_000_000 {
            while producer.push(value).is_err() {
                std::thread::yield_now();
            }
        }
    });
    for value in 0..1_000_000 {
        let got = loop {
            match consumer.pop() {
                Some(got) => break got,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(got, value);
    }
    sender.join().unwrap();
    assert_eq!(consumer.pop(), None);
}
