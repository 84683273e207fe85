//! Batch and free list against plain vectors.

use isoplane_memory::{BATCH, Batch, Frame, FrameCache, FrameFlags, Pool, PoolConfig};
use proptest::prelude::*;
use std::collections::HashSet;

#[derive(Debug, Clone)]
enum Step {
    Push(bool),
    Pop,
    Drain(usize),
    MoveTo(usize),
    MoveBack(usize),
    Whole(usize),
    GetBatch(usize),
    PutFront(usize),
    PutAll,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = || 0_usize..90;
    let step = prop_oneof![
        4 => any::<bool>().prop_map(Step::Push),
        1 => Just(Step::Pop),
        1 => n().prop_map(Step::Drain),
        2 => n().prop_map(Step::MoveTo),
        2 => n().prop_map(Step::MoveBack),
        2 => n().prop_map(Step::Whole),
        2 => n().prop_map(Step::GetBatch),
        1 => n().prop_map(Step::PutFront),
        1 => Just(Step::PutAll),
    ];
    prop::collection::vec(step, 1..120)
}

type Model = Vec<(u32, bool)>;

fn look(batch: &Batch) -> Model {
    batch.iter().map(|frame| (frame.chunk(), frame.has_more())).collect()
}

fn whole(model: &Model, limit: usize) -> usize {
    let mut n = limit.min(model.len());
    while n > 0 && model[n - 1].1 {
        n -= 1;
    }
    n
}

fn move_model(from: &mut Model, to: &mut Model, n: usize) -> usize {
    let n = whole(from, n.min(BATCH - to.len()));
    to.extend(from.drain(..n));
    n
}

fn take(frames: &mut FrameCache, more: bool) -> Frame {
    let mut frame = frames.get().expect("enough for two batches");
    if more {
        frame.set_flags(FrameFlags::MORE);
    }
    frame
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn two_batches_and_a_free_list_behave_as_vectors(steps in steps()) {
        let pool = Pool::create(&PoolConfig::new("batch-test", 200)).unwrap();
        let mut frames = pool.cache("test", 200).unwrap();
        let (mut a, mut b) = (Batch::new(), Batch::new());
        let (mut in_a, mut in_b): (Model, Model) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Push(more) => {
                    let frame = take(&mut frames, more);
                    let entry = (frame.chunk(), more);
                    match a.push(frame) {
                        Ok(()) => in_a.push(entry),
                        Err(back) => {
                            prop_assert_eq!(in_a.len(), BATCH);
                            prop_assert_eq!(back.chunk(), entry.0);
                            frames.put(back);
                        }
                    }
                }
                Step::Pop => {
                    let got = a.pop().map(|f| { let e = (f.chunk(), f.has_more()); frames.put(f); e });
                    prop_assert_eq!(got, in_a.pop());
                }
                Step::Drain(n) => {
                    let got: Vec<Frame> = a.drain().take(n).collect();
                    let expected: Model = in_a.drain(..n.min(in_a.len())).collect();
                    let chunks: Model = got.iter().map(|f| (f.chunk(), f.has_more())).collect();
                    prop_assert_eq!(chunks, expected);
                    for frame in got {
                        frames.put(frame);
                    }
                }
                Step::MoveTo(n) => prop_assert_eq!(a.move_to(&mut b, n), move_model(&mut in_a, &mut in_b, n)),
                Step::MoveBack(n) => prop_assert_eq!(b.move_to(&mut a, n), move_model(&mut in_b, &mut in_a, n)),
                Step::Whole(n) => prop_assert_eq!(a.whole_packets(n), whole(&in_a, n)),
                Step::GetBatch(n) => {
                    let got = frames.get_batch(&mut b, n, 60);
                    prop_assert_eq!(got, n.min(BATCH - in_b.len()));
                    in_b.extend(look(&b).into_iter().skip(in_b.len()));
                }
                Step::PutFront(n) => {
                    frames.put_front(&mut b, n);
                    in_b.drain(..n.min(in_b.len()));
                }
                Step::PutAll => {
                    frames.put_batch(&mut b);
                    in_b.clear();
                }
            }
            prop_assert_eq!(look(&a), in_a.clone());
            prop_assert_eq!(look(&b), in_b.clone());
            prop_assert_eq!((a.len(), a.room(), a.is_empty()), (in_a.len(), BATCH - in_a.len(), in_a.is_empty()));
            prop_assert_eq!(frames.len() + a.len() + b.len(), 200);
            let mut chunks: HashSet<u32> = HashSet::new();
            prop_assert!(in_a.iter().chain(&in_b).all(|(chunk, _)| chunks.insert(*chunk)));
        }
        frames.put_batch(&mut a);
        frames.put_batch(&mut b);
        let all: HashSet<u32> = std::iter::from_fn(|| frames.get()).map(|f| f.chunk()).collect();
        prop_assert_eq!(all.len(), 200);
    }
}

#[test]
fn a_drain_that_is_forgotten_leaks_and_never_doubles() {
    let pool = Pool::create(&PoolConfig::new("batch-test", 16)).unwrap();
    let mut frames = pool.cache("test", 16).unwrap();
    let mut batch = Batch::new();
    frames.get_batch(&mut batch, 10, 60);
    let mut drain = batch.drain();
    let first = drain.next().unwrap();
    std::mem::forget(drain);
    assert!(batch.is_empty());
    frames.put(first);
    assert_eq!((frames.len(), frames.owned()), (7, 16), "nine are leaked, and the balance shows it");
}
