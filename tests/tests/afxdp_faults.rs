//! Faults while a port runs: links that go down or away, closing and opening in quick succession. Nothing panics or hangs, and every frame is accounted for.

mod afxdp;

use afxdp::{PATIENCE, Wires, Worker, config, frame, pool, receive_from};
use isoplane_drivers::xdp::{XdpConfig, ZeroCopy};
use isoplane_drivers::{KickError, Kicked, LinkState, Port, RxQueue, TxQueue};
use isoplane_lab::PacketSocket;
use isoplane_memory::{Batch, Kernel};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn copying(name: &str) -> XdpConfig {
    config(name).zero_copy(ZeroCopy::Never)
}

fn numbered(n: u32, len: usize) -> Vec<Vec<u8>> {
    (0..n).map(|i| frame(i, len)).collect()
}

/// Down: kicks say so, frames wait; up: they leave.
#[test]
fn a_link_that_goes_down_and_comes_back() {
    let wires = Wires::new();
    let (x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut port = wires.open(&pool, copying("x0")).expect("a port");
    let mut worker = Worker::new(&mut port, 0, 128);
    let mut target = port.kick_target(0).expect("a kick target");
    for round in 0..3 {
        assert_eq!(port.link(), LinkState::Up);
        x.down().expect("down");
        assert_eq!(port.link(), LinkState::Down);
        let mut batch = Batch::new();
        let frames = numbered(10, 100 + round);
        for one in &frames {
            worker.build(one, 2048, &mut batch);
        }
        assert_eq!(worker.queue.tx.transmit(&mut batch), 10);
        assert!(worker.queue.tx.wants_kick());
        assert_eq!(worker.queue.tx.kick(&worker.kernel), Err(KickError::Down));
        assert_eq!(target.poll(&worker.kernel), Err(KickError::Down));
        assert_eq!(worker.queue.tx.reclaim(&mut worker.frames), 0);
        assert!(worker.poll().is_empty());
        x.up().expect("up");
        assert!(x.wait_running(PATIENCE).expect("status"));
        let mut peer = PacketSocket::open(&y).expect("a packet socket");
        assert_eq!(target.poll(&worker.kernel), Ok(Kicked::Kicked { waiting: 10 }));
        assert_eq!(target.poll(&worker.kernel), Ok(Kicked::Idle));
        assert_eq!(receive_from(&mut peer, 10), frames, "what waited has left");
        worker.send(&[], 2048);
        for one in &frames {
            peer.send(one).expect("sent");
        }
        assert_eq!(worker.receive(10), frames, "and receiving goes on");
    }
    assert!(port.statistics().kick_errors >= 6);
    worker.close();
}

/// The carrier goes with the peer's switch.
#[test]
fn a_peer_that_goes_down() {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut port = wires.open(&pool, copying("x0")).expect("a port");
    let mut worker = Worker::new(&mut port, 0, 128);
    y.down().expect("down");
    assert_eq!(port.link(), LinkState::Down);
    // veth drops them; the frames come back.
    worker.send(&numbered(50, 100), 2048);
    y.up().expect("up");
    assert!(y.wait_running(PATIENCE).expect("status"));
    assert_eq!(port.link(), LinkState::Up);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let frames = numbered(50, 100);
    worker.send(&frames, 2048);
    assert_eq!(receive_from(&mut peer, 50), frames);
    worker.close();
}

/// Deleted, or its namespace gone, with frames in every ring.
#[test]
fn an_interface_that_is_deleted_while_it_runs() {
    for by_namespace in [false, true] {
        let wires = Wires::new();
        let (x, y) = wires.pair(1500, 1);
        let pool = pool(512);
        let mut port = wires.open(&pool, copying("x0")).expect("a port");
        let mut worker = Worker::new(&mut port, 0, 128);
        let mut target = port.kick_target(0).expect("a kick target");
        let peer = PacketSocket::open(&y).expect("a packet socket");
        for one in numbered(20, 100) {
            peer.send(&one).expect("sent");
        }
        drop(peer);
        let mut batch = Batch::new();
        for one in numbered(10, 100) {
            worker.build(&one, 2048, &mut batch);
        }
        worker.queue.tx.transmit(&mut batch);
        if by_namespace {
            drop(wires.theirs);
            // The kernel takes a dead namespace apart in its own time.
            let deadline = Instant::now() + PATIENCE;
            while port.link() != LinkState::Gone {
                assert!(Instant::now() < deadline, "the pair outlives a namespace");
                std::thread::sleep(Duration::from_millis(5));
            }
        } else {
            x.delete().expect("deleted");
        }
        assert_eq!(port.link(), LinkState::Gone);
        assert_eq!(worker.queue.tx.kick(&worker.kernel), Err(KickError::Gone));
        assert_eq!(target.poll(&worker.kernel), Err(KickError::Gone));
        for _ in 0..100 {
            worker.poll();
            worker.queue.tx.reclaim(&mut worker.frames);
            assert!(worker.queue.rx.kick(&worker.kernel).is_err());
            if worker.frames.len() > 10 {
                worker.build(&frame(1, 64), 2048, &mut batch);
            }
            worker.queue.tx.transmit(&mut batch);
            worker.frames.put_batch(&mut batch);
        }
        let _ = port.statistics();
        worker.close();
        assert_eq!(target.poll(&Kernel::outside_isolation()), Ok(Kicked::Idle), "closed");
        drop(port);
        assert_eq!(pool.in_depot(), pool.chunks());
    }
}

/// The kernel frees a queue some time after it was closed; the next one gets it anyway.
#[test]
fn closing_and_opening_in_quick_succession() {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    for round in 0..20 {
        let mut port = wires.open(&pool, copying("x0")).expect("a port");
        let mut worker = Worker::new(&mut port, 0, 64);
        let frames = numbered(round + 1, 100);
        worker.send(&frames, 2048);
        assert_eq!(receive_from(&mut peer, frames.len()), frames);
        worker.close();
        // Untaken queues close with their port.
        drop(port);
        drop(wires.open(&pool, copying("x0")).expect("a port"));
        assert_eq!(pool.in_depot(), pool.chunks());
    }
}

/// A port that is dropped first stays open until its queue is closed.
#[test]
fn a_queue_outlives_its_port() {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut port = wires.open(&pool, copying("x0")).expect("a port");
    let mut worker = Worker::new(&mut port, 0, 64);
    drop(port);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let frames = numbered(20, 100);
    worker.send(&frames, 2048);
    assert_eq!(receive_from(&mut peer, 20), frames);
    for one in &frames {
        peer.send(one).expect("sent");
    }
    assert_eq!(worker.receive(20), frames);
    worker.close();
    assert_eq!(pool.in_depot(), pool.chunks());
}

/// A kicker in another thread looks all the time while queues are closed and opened.
#[test]
fn a_kicker_that_never_rests() {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    for _ in 0..5 {
        let mut port = wires.open(&pool, copying("x0")).expect("a port");
        let mut target = port.kick_target(0).expect("a kick target");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let kernel = Kernel::outside_isolation();
                while !stop.load(Ordering::Relaxed) {
                    target.poll(&kernel).expect("a kick");
                    std::thread::yield_now();
                }
            });
            let mut worker = Worker::new(&mut port, 0, 64);
            let frames = numbered(200, 100);
            let mut batch = Batch::new();
            let deadline = Instant::now() + PATIENCE;
            for one in &frames {
                while worker.frames.len() == 0 {
                    assert!(Instant::now() < deadline, "nothing comes back");
                    worker.queue.tx.transmit(&mut batch);
                    worker.queue.tx.reclaim(&mut worker.frames);
                }
                if batch.room() == 0 {
                    worker.queue.tx.transmit(&mut batch);
                }
                worker.build(one, 2048, &mut batch);
            }
            while !batch.is_empty() || worker.queue.tx.in_flight() != 0 {
                assert!(Instant::now() < deadline, "the kicker does not kick");
                worker.queue.tx.transmit(&mut batch);
                worker.queue.tx.reclaim(&mut worker.frames);
            }
            assert_eq!(receive_from(&mut peer, 200), frames);
            // Close with the kicker looking.
            worker.close();
            stop.store(true, Ordering::Relaxed);
        });
    }
    assert_eq!(pool.in_depot(), pool.chunks());
}

/// The port whose UMEM would be shared has lost its interface: the next port makes one of its own.
#[test]
fn a_shared_umem_whose_interface_is_gone() {
    let wires = Wires::new();
    let (x, _y) = wires.pair(1500, 1);
    let (_, peer) = wires.named("x1", "y1", 1500, 1);
    let pool = pool(512);
    let first = wires.open(&pool, copying("x0")).expect("a port");
    x.delete().expect("deleted");
    assert_eq!(first.link(), LinkState::Gone);
    let mut second = wires.open(&pool, copying("x1")).expect("a port");
    assert!(!second.shares_umem());
    let mut peer = PacketSocket::open(&peer).expect("a packet socket");
    let mut worker = Worker::new(&mut second, 0, 64);
    let frames = numbered(20, 100);
    worker.send(&frames, 2048);
    assert_eq!(receive_from(&mut peer, 20), frames);
    drop(first);
    for one in &frames {
        peer.send(one).expect("sent");
    }
    assert_eq!(worker.receive(20), frames);
    worker.close();
}
