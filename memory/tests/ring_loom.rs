//! The ring's logic over a model of memory that explores every order two sides' accesses can happen in
//! (loom), with slots that notice an access while the other side is at it.

use isoplane_memory::ring::{Consumer, Producer, RingMemory};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

struct Shared {
    producer: AtomicU32,
    consumer: AtomicU32,
    slots: Vec<UnsafeCell<u32>>,
    /// Replaces the orders that the ring asks for, to see that the model can fail.
    weaken: bool,
}

struct Model(Arc<Shared>);

// SAFETY: loom checks every access to the slots and fails the test when two overlap.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Model {
    fn order(&self, order: Ordering) -> Ordering {
        if self.0.weaken { Ordering::Relaxed } else { order }
    }
}

impl RingMemory<u32> for Model {
    fn capacity(&self) -> u32 {
        self.0.slots.len() as u32
    }
    fn load_producer(&self, order: Ordering) -> u32 {
        self.0.producer.load(self.order(order))
    }
    fn store_producer(&self, index: u32, order: Ordering) {
        self.0.producer.store(index, self.order(order));
    }
    fn load_consumer(&self, order: Ordering) -> u32 {
        self.0.consumer.load(self.order(order))
    }
    fn store_consumer(&self, index: u32, order: Ordering) {
        self.0.consumer.store(index, self.order(order));
    }
    fn read(&self, slot: u32) -> u32 {
        // SAFETY: loom checks that nobody writes meanwhile.
        self.0.slots[slot as usize].with(|value| unsafe { *value })
    }
    fn write(&self, slot: u32, value: u32) {
        // SAFETY: loom checks that nobody else accesses it meanwhile.
        self.0.slots[slot as usize].with_mut(|to| unsafe { *to = value });
    }
}

fn ring(capacity: usize, start: u32, weaken: bool) -> (Producer<u32, Model>, Consumer<u32, Model>) {
    let shared = Arc::new(Shared {
        producer: AtomicU32::new(start),
        consumer: AtomicU32::new(start),
        slots: (0..capacity).map(|_| UnsafeCell::new(0)).collect(),
        weaken,
    });
    (Producer::new(Model(Arc::clone(&shared))), Consumer::new(Model(shared)))
}

fn one_by_one(weaken: bool) {
    loom::model(move || {
        let (mut producer, mut consumer) = ring(2, u32::MAX, weaken);
        let sender = loom::thread::spawn(move || {
            for value in 1..=3 {
                while producer.push(value).is_err() {
                    loom::thread::yield_now();
                }
            }
        });
        for value in 1..=3 {
            let got = loop {
                match consumer.pop() {
                    Some(got) => break got,
                    None => loom::thread::yield_now(),
                }
            };
            assert_eq!(got, value);
        }
        sender.join().unwrap();
    });
}

#[test]
fn entries_arrive_whole_and_in_order() {
    one_by_one(false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn the_model_notices_missing_barriers() {
    one_by_one(true);
}

#[test]
fn batches_arrive_whole_and_slots_are_not_reused_early() {
    loom::model(|| {
        let (mut producer, mut consumer) = ring(2, u32::MAX - 1, false);
        let sender = loom::thread::spawn(move || {
            let mut next = 1;
            while next <= 4 {
                let n = producer.free(2).min(5 - next);
                for slot in 0..n {
                    producer.write(slot, next + slot);
                }
                if n == 0 {
                    loom::thread::yield_now();
                } else {
                    producer.publish(n);
                    next += n;
                }
            }
            assert_eq!(producer.corrupt(), 0);
        });
        let mut expected = 1;
        while expected <= 4 {
            let n = consumer.available(2);
            for slot in 0..n {
                assert_eq!(consumer.read(slot), expected + slot);
            }
            if n == 0 {
                loom::thread::yield_now();
            } else {
                consumer.release(n);
                expected += n;
            }
        }
        assert_eq!(consumer.corrupt(), 0);
        sender.join().unwrap();
    });
}
