//! Fault injection: transparent when off, and when on exactly what it counts.

use isoplane_drivers::conformance::{Fixture, Opened, packet};
use isoplane_drivers::fault::{Fault, FaultConfig, FaultCounters, FaultRx, FaultTx};
use isoplane_drivers::memory::MemoryConfig;
use isoplane_drivers::{AnyRx, AnyTx, Decorated, MemoryPort, Port, Queue, RxQueue, TxQueue};
use isoplane_memory::recovery::Balance;
use isoplane_memory::{BATCH, Batch, FrameCache, Pool, PoolConfig};
use std::sync::Arc;

fn pair(pool: &Arc<Pool>, ring: u32) -> (MemoryPort, MemoryPort) {
    MemoryPort::pair(pool, &MemoryConfig { ring, ..MemoryConfig::new("a") }, "b").unwrap()
}

fn wrap(port: MemoryPort, pool: &Arc<Pool>, config: FaultConfig) -> Decorated {
    let pool = Arc::clone(pool);
    Decorated::new(Box::new(port), move |_, queue| Queue {
        rx: AnyRx::Dyn(Box::new(FaultRx::new(queue.rx, &pool, config))),
        tx: AnyTx::Dyn(Box::new(FaultTx::new(queue.tx, &pool, config))),
    })
}

/// Faults that a port may have all the same: it is slow, in bursts, and often full.
struct Slow(FaultConfig);

impl Fixture for Slow {
    fn pool(&mut self) -> Arc<Pool> {
        Pool::create(&PoolConfig::new("fault-test", 2048)).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let (a, b) = pair(pool, 128);
        Opened { a: Box::new(wrap(a, pool, self.0)), b: Some(Box::new(wrap(b, pool, self.0))) }
    }
    fn window(&self) -> usize {
        100
    }
    fn max_packet(&self, _port: &dyn Port) -> u32 {
        9014
    }
}

mod transparent_when_off {
    isoplane_drivers::conformance_tests!(link, super::Slow(super::FaultConfig::default()));
}

mod slow_is_still_correct {
    use super::FaultConfig;
    const SLOW: FaultConfig = FaultConfig {
        seed: 11,
        delay_ppm: 100_000,
        delay_turns: 3,
        frames_per_turn: 40,
        drop_ppm: 0,
        duplicate_ppm: 0,
        reorder_ppm: 0,
        flip_bit_ppm: 0,
        corrupt_byte_ppm: 0,
        truncate_ppm: 0,
        refuse_ppm: 0,
    };
    isoplane_drivers::conformance_tests!(link, super::Slow(SLOW));
}

struct Run {
    lengths: Vec<u16>,
    arrived: Vec<Result<Option<u32>, String>>,
    rx: Arc<FaultCounters>,
    tx: Arc<FaultCounters>,
}

/// Sends `n` packets of 100 bytes from A to B, with `on_tx` at A and `on_rx` at B, and checks the
/// balance and that nothing stays behind.
fn run(n: u32, on_tx: FaultConfig, on_rx: FaultConfig) -> Run {
    let pool = Pool::create(&PoolConfig::new("fault-test", 4096)).unwrap();
    let (mut a, mut b) = pair(&pool, 256);
    let (mut at_a, mut at_b) = (pool.cache("a", 1800).unwrap(), pool.cache("b", 1800).unwrap());
    let (a, b) = (a.take_queue(0).unwrap(), b.take_queue(0).unwrap());
    let mut tx = FaultTx::new(a.tx, &pool, on_tx);
    let mut rx = FaultRx::new(b.rx, &pool, on_rx);
    let mut batch = Batch::new();
    let (mut arrived, mut lengths) = (Vec::new(), Vec::new());
    let mut sent = 0;
    let mut quiet = 0;
    while quiet < 100 {
        while sent < n && batch.room() > 0 {
            let Some(mut frame) = at_a.get() else { break };
            let bytes = packet::make(sent, 100);
            assert!(pool.reset(&mut frame, 100));
            pool.bytes_mut(&mut frame).copy_from_slice(&bytes);
            batch.push(frame).unwrap();
            sent += 1;
        }
        tx.transmit(&mut batch);
        tx.reclaim(&mut at_a);
        let mut got = Batch::new();
        quiet = if rx.receive(&mut at_b, &mut got) == 0 && sent == n { quiet + 1 } else { 0 };
        arrived.extend(got.iter().map(|frame| packet::check(pool.bytes(frame))));
        lengths.extend(got.iter().map(|frame| frame.len()));
        at_b.put_batch(&mut got);
    }
    assert!(batch.is_empty());
    assert_eq!(tx.in_flight(), 0, "all came back");
    let hands = |cache: &FrameCache| (cache.id(), cache.len() as u32);
    let balance = Balance::of(&pool, &[hands(&at_a), hands(&at_b)]);
    assert!(balance.is_whole() && balance.in_custody == 0, "{balance:?}");
    assert_eq!((at_a.len(), at_b.len()), (1800, 1800), "each worker has as many frames as before");
    Run { lengths, arrived, rx: Arc::clone(rx.counters()), tx: Arc::clone(tx.counters()) }
}

const OFF: FaultConfig = FaultConfig {
    seed: 0,
    drop_ppm: 0,
    duplicate_ppm: 0,
    reorder_ppm: 0,
    flip_bit_ppm: 0,
    corrupt_byte_ppm: 0,
    truncate_ppm: 0,
    delay_ppm: 0,
    delay_turns: 0,
    refuse_ppm: 0,
    frames_per_turn: 0,
};
const N: u32 = 5000;

/// Both placements of a fault, with the counters of the decorator that has it.
fn both(config: FaultConfig) -> Vec<(Run, Arc<FaultCounters>)> {
    let (first, second) = (run(N, config, OFF), run(N, OFF, config));
    let counters = (Arc::clone(&first.tx), Arc::clone(&second.rx));
    vec![(first, counters.0), (second, counters.1)]
}

fn numbers(run: &Run) -> Vec<u32> {
    run.arrived.iter().map(|p| p.clone().unwrap().unwrap()).collect()
}

#[test]
fn drops_are_missing_and_counted() {
    for (run, counters) in both(FaultConfig { drop_ppm: 200_000, seed: 3, ..OFF }) {
        let dropped = counters.get(Fault::Dropped);
        assert!((800..1200).contains(&dropped), "{dropped} of {N} at one in five");
        let got = numbers(&run);
        assert_eq!(got.len() as u64 + dropped, u64::from(N));
        assert!(got.is_sorted_by(|a, b| a < b), "the others in order, once");
    }
}

#[test]
fn duplicates_follow_their_originals() {
    for (run, counters) in both(FaultConfig { duplicate_ppm: 200_000, seed: 4, ..OFF }) {
        let got = numbers(&run);
        let twice = got.windows(2).filter(|w| w[0] == w[1]).count() as u64;
        assert_eq!(twice, counters.get(Fault::Duplicated));
        assert!(twice > 800);
        assert_eq!(got.len() as u64, u64::from(N) + twice);
        assert!(got.is_sorted());
    }
}

#[test]
fn reordering_loses_nothing() {
    for (run, counters) in both(FaultConfig { reorder_ppm: 200_000, seed: 5, ..OFF }) {
        let mut got = numbers(&run);
        let inversions = got.windows(2).filter(|w| w[0] > w[1]).count() as u64;
        let reordered = counters.get(Fault::Reordered);
        assert!(inversions > 0 && inversions <= reordered, "{inversions} of {reordered}");
        got.sort_unstable();
        assert_eq!(got, (0..N).collect::<Vec<_>>());
    }
}

#[test]
fn changed_bytes_are_changed_and_counted() {
    for (run, counters) in both(FaultConfig { flip_bit_ppm: 200_000, seed: 6, ..OFF }) {
        let intact = run.arrived.iter().filter(|p| matches!(p, Ok(Some(_)))).count() as u64;
        assert_eq!(run.arrived.len() as u32, N);
        // A changed sequence number is seen, since the filling depends on it.
        assert_eq!(intact + counters.get(Fault::BitFlipped), u64::from(N));
        assert!(counters.get(Fault::BitFlipped) > 800);
    }
    for (run, counters) in both(FaultConfig { corrupt_byte_ppm: 1_000_000, seed: 7, ..OFF }) {
        let intact = run.arrived.iter().filter(|p| matches!(p, Ok(Some(_)))).count();
        assert_eq!(counters.get(Fault::ByteCorrupted), u64::from(N));
        assert!(intact < N as usize / 64, "one in 256 gets its own value back, {intact} were intact");
    }
}

#[test]
fn truncated_packets_arrive_shorter() {
    for (run, counters) in both(FaultConfig { truncate_ppm: 300_000, seed: 8, ..OFF }) {
        let cut = run.lengths.iter().filter(|len| **len < 100).count() as u64;
        assert_eq!(cut, counters.get(Fault::Truncated));
        assert!(cut > 1000);
        assert_eq!(run.arrived.len() as u32, N);
    }
}

#[test]
fn refusals_and_limits_only_slow_down() {
    for (run, counters) in both(FaultConfig { refuse_ppm: 500_000, frames_per_turn: 5, seed: 9, ..OFF }) {
        assert_eq!(numbers(&run), (0..N).collect::<Vec<_>>());
        assert!(counters.get(Fault::Refused) > 10);
    }
}

#[test]
fn the_seed_decides_everything() {
    let config = FaultConfig {
        seed: 77,
        drop_ppm: 50_000,
        duplicate_ppm: 50_000,
        reorder_ppm: 50_000,
        corrupt_byte_ppm: 50_000,
        ..OFF
    };
    let first = run(2000, config, config).arrived;
    assert_eq!(run(2000, config, config).arrived, first);
    assert_ne!(run(2000, FaultConfig { seed: 78, ..config }, config).arrived, first);
}

/// A million frames through every fault at once, both ways, and not one is lost.
#[test]
fn a_million_frames_with_faults_and_a_balance_of_zero() {
    let pool = Pool::create(&PoolConfig::new("million", 4096)).unwrap();
    let faults = |seed| FaultConfig {
        seed,
        drop_ppm: 10_000,
        duplicate_ppm: 10_000,
        reorder_ppm: 10_000,
        flip_bit_ppm: 10_000,
        corrupt_byte_ppm: 10_000,
        truncate_ppm: 10_000,
        delay_ppm: 1000,
        delay_turns: 3,
        refuse_ppm: 20_000,
        frames_per_turn: 0,
    };
    let (a, b) = pair(&pool, 512);
    let (mut a, mut b) = (wrap(a, &pool, faults(1)), wrap(b, &pool, faults(2)));
    let mut queues = [a.take_queue(0).unwrap(), b.take_queue(0).unwrap()];
    let mut caches = [pool.cache("a", 2000).unwrap(), pool.cache("b", 2000).unwrap()];
    let (mut received, mut turns) = (0_u64, 0_u64);
    let mut state = 1;
    while received < 1_000_000 {
        turns += 1;
        assert!(turns < 1_000_000, "stuck at {received}");
        for (queue, frames) in queues.iter_mut().zip(&mut caches) {
            let mut batch = Batch::new();
            received += queue.rx.receive(frames, &mut batch) as u64;
            frames.put_batch(&mut batch);
            state = packet::split_mix(state);
            frames.get_batch(&mut batch, state as usize % (BATCH + 1), 200);
            queue.tx.transmit(&mut batch);
            frames.put_batch(&mut batch);
            queue.tx.reclaim(frames);
        }
        if turns % 1024 == 0 {
            let census: u32 = pool.census().iter().sum();
            assert_eq!(census, pool.chunks());
        }
    }
    for _ in 0..10_000 {
        for (queue, frames) in queues.iter_mut().zip(&mut caches) {
            let mut batch = Batch::new();
            queue.rx.receive(frames, &mut batch);
            frames.put_batch(&mut batch);
            queue.tx.reclaim(frames);
        }
    }
    assert_eq!(queues.each_ref().map(|queue| queue.tx.in_flight()), [0, 0]);
    assert_eq!(caches.each_ref().map(FrameCache::len), [2000, 2000]);
    let hands = caches.each_ref().map(|cache| (cache.id(), cache.len() as u32));
    let balance = Balance::of(&pool, &hands);
    assert_eq!((balance.missing, balance.in_custody, balance.depot), (0, 0, 96), "{balance:?}");
    for queue in queues {
        assert_eq!(queue.close(), 0, "nothing was left in a ring");
    }
}
