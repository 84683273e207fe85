//! An AF_XDP port on one end of a veth pair, the kernel's packet socket on the other: frames both ways,
//! byte for byte, in each mode that works over veth.

mod afxdp;

use afxdp::{PATIENCE, Wires, Worker, config, frame, pool, receive_from};
use isoplane_drivers::xdp::{Attach, Attached, XdpConfig, ZeroCopy};
use isoplane_drivers::{LinkState, Port, TxQueue};
use isoplane_lab::PacketSocket;
use isoplane_memory::Batch;
use std::time::Instant;

/// Frames of many lengths, both ways.
fn both_ways(config: XdpConfig) {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(1024);
    let mut port = wires.open(&pool, config).expect("a port");
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let mut worker = Worker::new(&mut port, 0, 512);
    let lengths = [60, 61, 64, 128, 513, 1024, 1513, 1514];
    let frames: Vec<Vec<u8>> = (0..200).map(|i| frame(i, lengths[i as usize % lengths.len()])).collect();
    for (sent, expected) in frames.chunks(32).zip(frames.chunks(32)) {
        for one in sent {
            peer.send(one).expect("the kernel sends");
        }
        assert_eq!(worker.receive(expected.len()), expected, "from the kernel to us");
    }
    worker.send(&frames, 2048);
    assert_eq!(receive_from(&mut peer, frames.len()), frames, "from us to the kernel");
    let statistics = port.statistics();
    assert_eq!(
        (statistics.rx_ring_full, statistics.rx_dropped, statistics.tx_invalid, statistics.bad_descriptors),
        (0, 0, 0, 0),
        "{statistics:?}"
    );
    assert!(statistics.kicks > 0);
    assert_eq!(port.link(), LinkState::Up);
    worker.close();
    drop(port);
}

#[test]
fn copy_mode_native() {
    both_ways(config("x0").zero_copy(ZeroCopy::Never).attach(Attach::Native));
}

#[test]
fn copy_mode_generic() {
    both_ways(config("x0").zero_copy(ZeroCopy::Never).attach(Attach::Generic));
}

#[test]
fn without_need_wakeup() {
    both_ways(config("x0").zero_copy(ZeroCopy::Never).need_wakeup(false));
}

#[test]
fn zero_copy_preferred_says_why_not() {
    both_ways(config("x0"));
    let wires = Wires::new();
    let _links = wires.pair(1500, 1);
    let pool = pool(256);
    let port = wires.open(&pool, config("x0")).expect("a port");
    assert_eq!(port.attached(), Attached::Native);
    assert!(!port.is_zero_copy());
    let reason = port.mode_reason().expect("a reason");
    assert!(reason.contains("x0") && reason.contains("zero-copy"), "{reason}");
}

/// However much waits in the ring, one kick sends it.
#[test]
fn one_kick_sends_a_whole_ring() {
    let wires = Wires::new();
    let (_x, y) = wires.pair(1500, 1);
    let pool = pool(2048);
    let config = XdpConfig::new("x0").rings(512, 512).zero_copy(ZeroCopy::Never);
    let mut port = wires.open(&pool, config).expect("a port");
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let mut worker = Worker::new(&mut port, 0, 512);
    let frames: Vec<Vec<u8>> = (0..512).map(|i| frame(i, 80)).collect();
    assert!(!worker.queue.tx.wants_kick(), "nothing waits");
    let mut batch = Batch::new();
    for burst in frames.chunks(64) {
        for one in burst {
            worker.build(one, 2048, &mut batch);
        }
        assert_eq!(worker.queue.tx.transmit(&mut batch), 64);
    }
    assert!(worker.queue.tx.wants_kick());
    worker.queue.tx.kick(&worker.kernel).expect("a kick");
    assert!(!worker.queue.tx.wants_kick(), "all of it is sent");
    assert_eq!(port.statistics().kicks, 1);
    assert_eq!(receive_from(&mut peer, 512), frames);
    while worker.queue.tx.in_flight() != 0 {
        worker.queue.tx.reclaim(&mut worker.frames);
    }
    worker.close();
}

/// What the kernel drops is counted by reason, and what it kept arrives.
#[test]
fn drops_are_counted_by_reason() {
    let wires = Wires::new();
    let (x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut port = wires.open(&pool, config("x0")).expect("a port");
    let peer = PacketSocket::open(&y).expect("a packet socket");
    let mut worker = Worker::new(&mut port, 0, 64);
    let frames: Vec<Vec<u8>> = (0..200).map(|i| frame(i, 80)).collect();
    let all_seen = |want: u64, port: &isoplane_drivers::XdpPort| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let s = port.statistics();
            if s.rx_ring_full + s.rx_dropped == want {
                return s;
            }
            assert!(Instant::now() < deadline, "{s:?}");
        }
    };
    // The RX ring holds 64, the fill ring as many more.
    for one in &frames {
        peer.send(one).expect("sent");
    }
    assert_eq!(all_seen(136, &port).rx_ring_full, 136);
    assert_eq!(worker.receive(64), frames[..64]);
    // Longer than a chunk holds, once the MTU allows it.
    x.set_mtu(3000).expect("an MTU");
    y.set_mtu(3000).expect("an MTU");
    for i in 0..5 {
        peer.send(&frame(i, 2500)).expect("sent");
    }
    assert_eq!(all_seen(141, &port).rx_dropped, 5);
    peer.send(&frames[7]).expect("sent");
    assert_eq!(worker.receive(1), frames[7..8]);
    worker.close();
    assert_eq!(port.statistics().rx_ring_full, 136, "totals outlive the queue");
}
