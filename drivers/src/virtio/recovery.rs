//! Rings of both kinds against a model: whatever order a device gives entries back in, and wherever a worker
//! dies, its successor finds what is outstanding, and the device gets what was published and nothing else.

use super::fake::{FakeNet, Queue, Traits};
use super::packed::Packed;
use super::ring::{Cursor, Ring, Word};
use super::split::Split;
use crate::pci::fake::FakeFunction;
use crate::pci::{DmaMemory, Function};
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

const SIZE: u16 = 8;

/// A ring in memory of its own, and the device that serves it.
struct Bench<R> {
    function: FakeFunction<FakeNet>,
    device: Queue,
    ring: R,
    _memory: Arc<dyn DmaMemory>,
}

trait Kind: Ring + Sized {
    const PACKED: bool;
    fn make(memory: &Arc<dyn DmaMemory>) -> (Self, [u64; 3]);
    fn fresh(&mut self);
}

impl Kind for Split {
    const PACKED: bool = false;
    fn make(memory: &Arc<dyn DmaMemory>) -> (Self, [u64; 3]) {
        let ring = Self::new(memory, SIZE, false, None).unwrap();
        let at = ring.places();
        (ring, [at.descriptors, at.driver, at.device])
    }
    fn fresh(&mut self) {
        self.forget();
    }
}

impl Kind for Packed {
    const PACKED: bool = true;
    fn make(memory: &Arc<dyn DmaMemory>) -> (Self, [u64; 3]) {
        let ring = Self::new(memory, SIZE, None).unwrap();
        let at = ring.places();
        (ring, [at.descriptors, at.driver, at.device])
    }
    fn fresh(&mut self) {
        self.forget();
    }
}

impl<R: Kind> Bench<R> {
    fn new() -> Self {
        let function = FakeNet::new(Traits::default());
        function.bus_master(true);
        let memory = function.dma("ring", Split::bytes(SIZE).max(Packed::bytes(SIZE))).unwrap();
        let (ring, at) = R::make(&memory);
        let device = Queue::serving(SIZE, at, R::PACKED);
        Self { function, device, ring, _memory: memory }
    }
}

/// Where a worker dies.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// Entries written and noted, nothing published.
    Written,
    /// All but the last step of publishing done.
    Publishing,
    /// Between two calls.
    Idle,
    /// Entries looked at and given back, positions not yet moved.
    Collecting,
}

#[derive(Debug, Clone)]
enum Step {
    Send(u16),
    /// The device takes all that is there.
    Take,
    /// It gives so many back, chosen so.
    Give(u16, u64),
    Collect(u16),
    Die(Death, u16),
}

fn step() -> impl Strategy<Value = Step> {
    let death = prop_oneof![
        Just(Death::Written),
        Just(Death::Publishing),
        Just(Death::Idle),
        Just(Death::Collecting)
    ];
    prop_oneof![
        3 => (1..=SIZE).prop_map(Step::Send),
        3 => Just(Step::Take),
        3 => (1..=SIZE, any::<u64>()).prop_map(|(n, order)| Step::Give(n, order)),
        3 => (1..=SIZE).prop_map(Step::Collect),
        1 => (death, 1..=SIZE).prop_map(|(death, n)| Step::Die(death, n)),
    ]
}

#[derive(Default)]
struct Model {
    next: u64,
    /// Addresses published and not collected, by id.
    outstanding: HashMap<u16, u64>,
    /// Addresses published and not yet taken by the device, in order.
    waiting: VecDeque<u64>,
    journal: (u32, u32),
    /// What the journal names and nobody has published: known until something else is written.
    noted: Vec<(u16, u64)>,
}

fn write<R: Kind>(bench: &mut Bench<R>, model: &mut Model, n: u16) -> Vec<(u16, u64)> {
    let cursor = bench.ring.cursor();
    let written = (0..n)
        .map(|place| {
            model.next += 0x1000;
            let id = cursor.id(place);
            cursor.write_packet(place, model.next, 60);
            (id, model.next)
        })
        .collect();
    model.journal = (bench.ring.position(), n.into());
    written
}

fn publish(model: &mut Model, written: Vec<(u16, u64)>) {
    model.noted.clear();
    for (id, address) in written {
        assert!(model.outstanding.insert(id, address).is_none(), "id {id} is free");
        model.waiting.push_back(address);
    }
}

/// Looks at what is ready as a worker does; says which addresses.
fn look<R: Kind>(bench: &mut Bench<R>, n: u16) -> Vec<(u16, u64)> {
    let ready = bench.ring.ready(n);
    let cursor = bench.ring.cursor();
    (0..ready)
        .map(|place| {
            let id = cursor.used(place).id;
            cursor.retire(place, id);
            (id as u16, cursor.address(id))
        })
        .collect()
}

fn run<R: Kind>(steps: Vec<Step>) {
    let mut bench = Bench::<R>::new();
    let mut model = Model::default();
    // What the device has, and what it has given back and nobody has collected.
    let (mut held, mut given) = (Vec::new(), VecDeque::new());
    for step in steps {
        let free = bench.ring.free();
        match step {
            Step::Send(n) => {
                let n = n.min(free);
                if n != 0 {
                    let written = write(&mut bench, &mut model, n);
                    bench.ring.publish(n);
                    publish(&mut model, written);
                }
            }
            Step::Take => {
                while let Some(entry) = bench.device.pop(bench.function.bus()) {
                    let address = entry.address();
                    assert_eq!(model.waiting.pop_front(), Some(address), "what was published, in order");
                    held.push(entry);
                }
                assert!(model.waiting.is_empty(), "all of it");
            }
            Step::Give(n, order) => {
                for round in 0..u64::from(n) {
                    if held.is_empty() {
                        break;
                    }
                    let entry =
                        held.remove((order.rotate_left(round as u32 * 7) % held.len() as u64) as usize);
                    bench.device.push(bench.function.bus(), &entry, 0);
                    given.push_back(entry.address());
                }
            }
            Step::Collect(n) => {
                let seen = look(&mut bench, n);
                bench.ring.consume(seen.len() as u16);
                assert_eq!(seen.len(), usize::from(n).min(given.len()));
                for (id, address) in seen {
                    assert_eq!(given.pop_front(), Some(address));
                    assert_eq!(model.outstanding.remove(&id), Some(address));
                }
            }
            Step::Die(death, n) => {
                let n = n.min(free);
                match death {
                    Death::Idle => {}
                    Death::Written if n != 0 => model.noted = write(&mut bench, &mut model, n),
                    Death::Publishing if n != 0 && R::PACKED => {
                        let written = write(&mut bench, &mut model, n);
                        let position = u64::from(bench.ring.position()) + u64::from(n);
                        bench.ring.shared().set(Word::Posted, position);
                        // The successor finishes it.
                        publish(&mut model, written);
                    }
                    Death::Collecting => drop(look(&mut bench, n)),
                    Death::Written | Death::Publishing => {}
                }
                bench.ring.fresh();
                let left = bench.ring.take_over(model.journal);
                let mut expected: Vec<u16> = model.outstanding.keys().copied().collect();
                expected.sort_unstable();
                assert_eq!(left.outstanding, expected, "{death:?}");
                let cursor = bench.ring.cursor();
                for (id, address) in &model.outstanding {
                    assert_eq!(cursor.address((*id).into()), *address);
                }
                let ids: Vec<u16> = model.noted.iter().map(|(id, _)| *id).collect();
                assert_eq!(left.unpublished, ids, "{death:?}");
                for (id, address) in &model.noted {
                    assert_eq!(cursor.address((*id).into()), *address);
                }
            }
        }
        assert_eq!(usize::from(SIZE - bench.ring.free()), model.outstanding.len());
        assert_eq!(bench.ring.corrupt(), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_split_ring_loses_no_entry(steps in prop::collection::vec(step(), 1..60)) {
        run::<Split>(steps);
    }

    #[test]
    fn a_packed_ring_loses_no_entry(steps in prop::collection::vec(step(), 1..60)) {
        run::<Packed>(steps);
    }
}
