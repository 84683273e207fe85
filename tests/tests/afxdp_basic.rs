//! An AF_XDP port on one end of a veth pair, the kernel's packet socket on the other: frames both ways,
//! byte for byte, in each mode that works over veth.

mod afxdp;

use afxdp::{Wires, Worker, config, frame, pool, receive_from};
use isoplane_drivers::xdp::{Attach, Attached, XdpConfig, ZeroCopy};
use isoplane_drivers::{LinkState, Port};
use isoplane_lab::PacketSocket;

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
