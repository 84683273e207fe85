//! The in-memory port against the conformance suite, its debts, and how it comes and goes.

use isoplane_drivers::conformance::packet::{self, split_mix};
use isoplane_drivers::conformance::{Fixture, Lies, Opened, Wire};
use isoplane_drivers::memory::{MemoryConfig, MemoryError, MemoryRx};
use isoplane_drivers::{AnyRx, LinkState, MemoryPort, Port, Queue, RxQueue, TxQueue};
use isoplane_memory::ring::HEADER_BYTES;
use isoplane_memory::{Batch, FrameCache, Pool, PoolConfig, PoolError, Region};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

const RING: u32 = 128;

#[derive(Default)]
struct Pair {
    link: Option<OwnedFd>,
}

impl Fixture for Pair {
    fn pool(&mut self) -> Arc<Pool> {
        Pool::create(&PoolConfig::new("memory-test", 1024)).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let config = MemoryConfig { ring: RING, ..MemoryConfig::new("mem-a") };
        let (a, b) = MemoryPort::pair(pool, &config, "mem-b").unwrap();
        self.link = Some(a.link_fd().try_clone_to_owned().unwrap());
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn window(&self) -> usize {
        100
    }
    fn max_packet(&self, _port: &dyn Port) -> u32 {
        9014
    }
    /// Plays a peer gone mad: writes random indices and descriptors in all four rings.
    fn lie(&mut self, _opened: &Opened, round: u64) -> Lies {
        let region = Region::from_fd(self.link.take().unwrap(), true).unwrap();
        let word = |at: usize| region.slice::<u32>(at, 1).unwrap();
        let magic = u32::from_be_bytes(*b"IRNG");
        let mut state = round;
        let mut random = || {
            state = split_mix(state);
            state
        };
        for at in (0..region.len() - HEADER_BYTES).step_by(64) {
            // SAFETY: aligned and inside the mapping; ports reach these words by atomics and volatile
            // copies only, as this does.
            unsafe {
                if word(at).read_volatile() != magic {
                    continue;
                }
                for index in [128, 256] {
                    let to = word(at + index);
                    match random() % 4 {
                        0 => to.write_volatile(random() as u32),
                        1 => to.write_volatile(to.read_volatile().wrapping_add(random() as u32 % 300)),
                        2 => to.write_volatile(to.read_volatile().wrapping_sub(random() as u32 % 300)),
                        _ => {}
                    }
                }
                for _ in 0..random() % 64 {
                    let slot = HEADER_BYTES + (random() as usize % (RING as usize * 2)) * 4;
                    // Addresses inside the pool, lengths and flags that may be right, and anything.
                    let value = match random() % 3 {
                        0 => random() as u32 % (1024 * 2048),
                        1 => random() as u32 % 2048,
                        _ => random() as u32,
                    };
                    word(at + slot).write_volatile(value);
                }
            }
        }
        Lies::Told
    }
}

isoplane_drivers::conformance_tests!(link, Pair::default());

/// Chunks of 64 KiB: packets of up to 65472 bytes lie in one frame, longer ones in two.
struct Big;

impl Fixture for Big {
    fn pool(&mut self) -> Arc<Pool> {
        let config = PoolConfig {
            chunk_bytes: 65_536,
            headroom: 0,
            max_frame: 65_472,
            ..PoolConfig::new("big-test", 256)
        };
        Pool::create(&config).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let (a, b) = MemoryPort::pair(pool, &MemoryConfig::new("big-a"), "big-b").unwrap();
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn window(&self) -> usize {
        20
    }
}

#[test]
fn packets_of_0_to_65535_bytes_of_random_content() {
    let mut lengths: Vec<usize> = (0..=300).chain(65_400..=65_535).collect();
    for power in 9..16 {
        lengths.extend([(1 << power) - 1, 1 << power, (1 << power) + 1]);
    }
    let mut state = 1;
    lengths.extend((0..1000).map(|_| {
        state = split_mix(state);
        state as usize % 65_536
    }));
    let packets: Vec<Vec<u8>> = (0..).zip(&lengths).map(|(n, len)| packet::make(n, *len)).collect();
    let mut fixture = Big;
    let mut wire = Wire::open(&mut fixture);
    wire.carry(0, &packets, || 7);
    wire.assert_quiet("after packets of all lengths");
    wire.close("after packets of all lengths");
}

fn rx(queue: &Queue) -> &MemoryRx {
    let AnyRx::Memory(rx) = &queue.rx else { panic!("a memory port") };
    rx
}

#[test]
fn a_receiver_without_free_frames_delivers_and_pays_later() {
    let pool = Pair::default().pool();
    let (mut a, mut b) = MemoryPort::pair(&pool, &MemoryConfig::new("a"), "b").unwrap();
    let (mut a, mut b) = (a.take_queue(0).unwrap(), b.take_queue(0).unwrap());
    let (mut at_a, mut at_b) = (pool.cache("a", 40).unwrap(), pool.cache("b", 0).unwrap());
    let mut batch = Batch::new();
    at_a.get_batch(&mut batch, 40, 60);
    a.tx.transmit(&mut batch);
    assert_eq!(b.rx.receive(&mut at_b, &mut batch), 40);
    assert_eq!((rx(&b).debt(), a.tx.in_flight(), a.tx.reclaim(&mut at_a)), (40, 40, 0));
    at_b.put_front(&mut batch, 15);
    assert_eq!(b.rx.receive(&mut at_b, &mut Batch::new()), 0);
    assert_eq!((rx(&b).debt(), a.tx.reclaim(&mut at_a), a.tx.in_flight()), (25, 15, 25));
    at_b.put_batch(&mut batch);
    b.rx.receive(&mut at_b, &mut Batch::new());
    assert_eq!((rx(&b).debt(), a.tx.reclaim(&mut at_a), a.tx.in_flight()), (0, 25, 0));
    assert_eq!((at_a.len(), at_b.len()), (40, 0));
}

#[test]
fn two_workers_that_owe_each_other_everything_get_out_of_it() {
    let pool = Pair::default().pool();
    let (mut a, mut b) = MemoryPort::pair(&pool, &MemoryConfig::new("a"), "b").unwrap();
    let mut queues = [a.take_queue(0).unwrap(), b.take_queue(0).unwrap()];
    let mut caches = [pool.cache("a", 50).unwrap(), pool.cache("b", 50).unwrap()];
    let mut batches = [Batch::new(), Batch::new()];
    for ((queue, frames), batch) in queues.iter_mut().zip(&mut caches).zip(&mut batches) {
        frames.get_batch(batch, 50, 60);
        assert_eq!(queue.tx.transmit(batch), 50);
    }
    for ((queue, frames), batch) in queues.iter_mut().zip(&mut caches).zip(&mut batches) {
        assert_eq!((queue.rx.receive(frames, batch), frames.len()), (50, 0));
    }
    assert_eq!(queues.each_ref().map(|queue| rx(queue).debt()), [50, 50]);
    for _ in 0..3 {
        for ((queue, frames), batch) in queues.iter_mut().zip(&mut caches).zip(&mut batches) {
            frames.put_batch(batch);
            queue.rx.receive(frames, batch);
            queue.tx.reclaim(frames);
        }
    }
    assert_eq!(queues.each_ref().map(|queue| rx(queue).debt()), [0, 0]);
    assert_eq!(caches.each_ref().map(FrameCache::len), [50, 50]);
}

#[test]
fn links_tell_whether_the_other_side_is_there() {
    let pool = Pair::default().pool();
    let config = MemoryConfig { queues: 2, ..MemoryConfig::new("a") };
    let mut a = MemoryPort::offer(&pool, &config).unwrap();
    assert_eq!((a.link(), a.queues()), (LinkState::Down, 2));
    let fd = || a.link_fd().try_clone_to_owned().unwrap();
    let mut b = MemoryPort::attach(&pool, fd(), "b").unwrap();
    assert_eq!((a.link(), b.link()), (LinkState::Up, LinkState::Up));
    assert!(matches!(MemoryPort::attach(&pool, fd(), "c"), Err(MemoryError::Taken)));
    let other = Pair::default().pool();
    assert!(matches!(MemoryPort::attach(&other, fd(), "d"), Err(MemoryError::OtherPool { .. })));
    let not_a_link = pool.as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(MemoryPort::attach(&pool, not_a_link, "e"), Err(MemoryError::NotALink)));

    let mut frames = pool.cache("w", 20).unwrap();
    let mut queue = a.take_queue(1).unwrap();
    let mut batch = Batch::new();
    frames.get_batch(&mut batch, 3, 60);
    assert_eq!(queue.tx.transmit(&mut batch), 3);
    let owned = b.take_queue(1).unwrap();
    owned.close();
    drop(b);
    assert_eq!(a.link(), LinkState::Gone);
    frames.get_batch(&mut batch, 5, 60);
    assert_eq!(queue.tx.transmit(&mut batch), 0, "nobody is there to take them");
    frames.put_batch(&mut batch);
    queue.close();
    drop(a);
    assert_eq!(frames.len() as u32 + pool.in_depot(), pool.chunks());
}

#[test]
fn ports_that_nobody_used_or_attached_to_give_their_owner_ids_back() {
    let pool = Pair::default().pool();
    for n in 0..100 {
        let port = MemoryPort::offer(&pool, &MemoryConfig::new("alone")).unwrap();
        drop(port);
        let pair =
            MemoryPort::pair(&pool, &MemoryConfig { queues: 3, ..MemoryConfig::new("a") }, "b").unwrap();
        if n % 2 == 0 {
            drop(pair)
        } else {
            let (a, b) = pair;
            drop(b);
            drop(a)
        }
    }
    assert_eq!(pool.in_depot(), pool.chunks());
    // Only if all ids are free is there room for so many queues.
    MemoryPort::pair(&pool, &MemoryConfig { queues: 32, ..MemoryConfig::new("a") }, "b").unwrap();
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let pool = Pair::default().pool();
    let refusal = |config: MemoryConfig| MemoryPort::offer(&pool, &config).unwrap_err().to_string();
    for ring in [0, 1, 3, 100, 1 << 17] {
        let text = refusal(MemoryConfig { ring, ..MemoryConfig::new("mem7") });
        assert!(text.contains("mem7") && text.contains("power of two"), "{text}");
    }
    for queues in [0, 33] {
        assert!(refusal(MemoryConfig { queues, ..MemoryConfig::new("mem7") }).contains("1 to 32"));
    }
    let custodies: Vec<_> = (0..252).map(|_| pool.custody().unwrap()).collect();
    assert!(matches!(
        MemoryPort::offer(&pool, &MemoryConfig::new("mem7")),
        Err(MemoryError::Pool(PoolError::Owners { .. }))
    ));
    drop(custodies);
    assert!((0..3).all(|_| pool.custody().is_ok()), "the refusal gave back what it had taken");
}
