//! Modes of an AF_XDP port beyond the plain one: several queues, several ports on one pool, packets in
//! several frames, unaligned chunks, requests on transmit, loopback.

mod afxdp;

use afxdp::{PATIENCE, Wires, Worker, config, frame, is_test, pool, pool_with, receive_from};
use etherparse::{PacketBuilder, SlicedPacket};
use isoplane_drivers::xdp::{Chunks, TxMetadata, Want, XdpConfig, ZeroCopy};
use isoplane_drivers::{AnyTx, Capabilities, Port, RxQueue, TxQueue};
use isoplane_lab::PacketSocket;
use isoplane_memory::{Batch, FrameFlags, FrameMeta};
use std::time::Instant;

fn copying(name: &str) -> XdpConfig {
    config(name).zero_copy(ZeroCopy::Never)
}

fn numbered(n: u32, len: usize) -> Vec<Vec<u8>> {
    (0..n).map(|i| frame(i, len)).collect()
}

/// Two queues at each end, all four on one pool: queue by queue, frames arrive where they should.
#[test]
fn queues_keep_apart_and_share_one_umem() {
    let wires = Wires::new();
    wires.pair(1500, 2);
    let pool = pool(2048);
    let mut x = wires.open(&pool, copying("x0").queues(2)).expect("a port");
    let far = wires.theirs.try_clone().expect("a descriptor");
    let mut y = isoplane_drivers::XdpPort::open(&pool, &copying("y0").queues(2).namespace(far.into()))
        .expect("a port on the same pool in another namespace");
    assert_eq!((x.queues(), y.queues()), (2, 2));
    assert!(x.shares_umem(), "queue 1 uses the UMEM of queue 0");
    assert!(y.shares_umem(), "the second port uses the UMEM of the first");
    let mut near: Vec<Worker> = (0..2).map(|q| Worker::new(&mut x, q, 128)).collect();
    let mut far: Vec<Worker> = (0..2).map(|q| Worker::new(&mut y, q, 128)).collect();
    for round in 0..4 {
        for queue in 0..2 {
            let sent: Vec<Vec<u8>> = (0..40).map(|i| frame(round * 1000 + queue * 100 + i, 200)).collect();
            near[queue as usize].send(&sent, 2048);
            assert_eq!(far[queue as usize].receive(40), sent, "queue {queue}");
            far[queue as usize].send(&sent, 2048);
            assert_eq!(near[queue as usize].receive(40), sent, "queue {queue}, back");
        }
    }
    for worker in &mut near {
        assert!(worker.poll().is_empty());
    }
    // One after the other, since the frames of one worker are not those of another.
    let in_hand: Vec<(u8, u32)> =
        near.iter().chain(&far).map(|w| (w.frames.id(), w.frames.len() as u32)).collect();
    for worker in near.into_iter().chain(far) {
        worker.queue.close();
    }
    let balance = isoplane_memory::recovery::Balance::of(&pool, &in_hand);
    assert_eq!((balance.missing, balance.in_custody), (0, 0), "{balance:?}");
}

/// A frame that came in on one port goes out on another: the same chunk, no copy.
#[test]
fn a_frame_crosses_two_ports_without_a_copy() {
    let wires = Wires::new();
    let (_, peer_a) = wires.pair(1500, 1);
    let (_, peer_b) = wires.named("x1", "y1", 1500, 1);
    let pool = pool(1024);
    let mut a = wires.open(&pool, copying("x0")).expect("a port");
    let mut b = wires.open(&pool, copying("x1").share_umem(Want::Require)).expect("a port");
    assert!(!a.shares_umem() && b.shares_umem());
    let from = PacketSocket::open(&peer_a).expect("a packet socket");
    let mut to = PacketSocket::open(&peer_b).expect("a packet socket");
    let mut worker = Worker::new(&mut a, 0, 256);
    let mut out = b.take_queue(0).expect("a queue");
    let frames = numbered(200, 700);
    for burst in frames.chunks(20) {
        for one in burst {
            from.send(one).expect("sent");
        }
        let deadline = Instant::now() + PATIENCE;
        let mut crossed = 0;
        while crossed < burst.len() {
            assert!(Instant::now() < deadline, "{crossed} of {} crossed", burst.len());
            let mut batch = Batch::new();
            worker.queue.rx.receive(&mut worker.frames, &mut batch);
            crossed += batch.iter().filter(|f| is_test(pool.bytes(f))).count();
            out.tx.transmit(&mut batch);
            assert!(batch.is_empty(), "the ring is larger than a burst");
            out.tx.kick(&worker.kernel).expect("a kick");
            out.tx.reclaim(&mut worker.frames);
        }
        assert_eq!(receive_from(&mut to, burst.len()), burst);
    }
    while out.tx.in_flight() != 0 {
        out.tx.reclaim(&mut worker.frames);
    }
    out.close();
    worker.close();
}

#[test]
fn ports_that_do_not_agree_have_a_umem_each() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    wires.named("x1", "y1", 1500, 1);
    wires.named("x2", "y2", 1500, 1);
    let pool = pool(1024);
    let _first = wires.open(&pool, copying("x0")).expect("a port");
    let second = wires.open(&pool, copying("x1").need_wakeup(false)).expect("a port");
    assert!(!second.shares_umem());
    let third = wires.open(&pool, copying("x2").share_umem(Want::Never)).expect("a port");
    assert!(!third.shares_umem());
    drop(second);
    let refused =
        wires.open(&pool, copying("x1").need_wakeup(false).multi_buffer(true).share_umem(Want::Require));
    let text = refused.expect_err("no port like it").to_string();
    assert!(text.contains("x1") && text.contains("UMEM"), "{text}");
}

/// The first port on a pool closes; those that share its UMEM go on, and new ones join them.
#[test]
fn a_shared_umem_outlives_the_port_that_made_it() {
    let wires = Wires::new();
    wires.pair(1500, 1);
    let (_, peer) = wires.named("x1", "y1", 1500, 1);
    let pool = pool(1024);
    let first = wires.open(&pool, copying("x0")).expect("a port");
    let mut second = wires.open(&pool, copying("x1")).expect("a port");
    assert!(second.shares_umem());
    drop(first);
    let mut worker = Worker::new(&mut second, 0, 128);
    let mut peer = PacketSocket::open(&peer).expect("a packet socket");
    let frames = numbered(50, 300);
    worker.send(&frames, 2048);
    assert_eq!(receive_from(&mut peer, 50), frames);
    let third = wires.open(&pool, copying("x0")).expect("a port");
    drop(third);
    for one in &frames {
        peer.send(one).expect("sent");
    }
    assert_eq!(worker.receive(50), frames);
    worker.close();
}

/// Jumbo frames from and to the kernel, in chunks of 2 KiB.
#[test]
fn jumbo_frames_take_several_chunks() {
    let wires = Wires::new();
    let (_, y) = wires.pair(9000, 1);
    let pool = pool(2048);
    let mut port = wires.open(&pool, copying("x0").rings(256, 256).multi_buffer(true)).expect("a port");
    assert!(port.capabilities().contains(Capabilities::MULTI_BUFFER));
    assert_eq!(port.max_frame(), 9014);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let mut worker = Worker::new(&mut port, 0, 1024);
    let lengths = [60, 1514, 1792, 1793, 3584, 3585, 5000, 9000, 9014];
    let frames: Vec<Vec<u8>> = (0..90).map(|i| frame(i, lengths[i as usize % lengths.len()])).collect();
    for burst in frames.chunks(10) {
        for one in burst {
            peer.send(one).expect("sent");
        }
        assert_eq!(worker.receive(burst.len()), burst, "from the kernel");
    }
    worker.send(&frames, 1024);
    assert_eq!(receive_from(&mut peer, frames.len()), frames, "to the kernel");
    assert_eq!(port.statistics().tx_invalid, 0);
    worker.close();
}

/// Chunks that the kernel would not take aligned: of 16 KiB, and with starts spread over the cache.
#[test]
fn unaligned_chunks_spread_frame_starts() {
    for (chunk_bytes, max_frame) in [(4096, 1522), (16384, 9000)] {
        let wires = Wires::new();
        let (_, y) = wires.pair(1500, 1);
        let pool = pool_with(512, chunk_bytes, max_frame);
        let mut port = wires.open(&pool, copying("x0").chunks(Chunks::Unaligned)).expect("a port");
        let mut peer = PacketSocket::open(&y).expect("a packet socket");
        let mut worker = Worker::new(&mut port, 0, 128);
        let frames = numbered(100, 1514);
        let mut starts = std::collections::HashSet::new();
        for burst in frames.chunks(25) {
            for one in burst {
                peer.send(one).expect("sent");
            }
            let deadline = Instant::now() + PATIENCE;
            let mut got: Vec<Vec<u8>> = Vec::new();
            while got.len() < burst.len() {
                assert!(Instant::now() < deadline, "{} of {}", got.len(), burst.len());
                let mut batch = Batch::new();
                worker.queue.rx.receive(&mut worker.frames, &mut batch);
                starts.extend(batch.iter().map(|f| f.offset()));
                got.extend(batch.iter().map(|f| pool.bytes(f).to_vec()).filter(|p| is_test(p)));
                worker.frames.put_batch(&mut batch);
            }
            assert_eq!(got, burst, "{chunk_bytes}");
        }
        assert_eq!(starts.len(), 16, "{chunk_bytes}: {starts:?}");
        worker.send(&frames, 2048);
        assert_eq!(receive_from(&mut peer, frames.len()), frames);
        worker.close();
    }
}

/// Makes a UDP packet whose checksum field holds what the network stack leaves there: the sum of the
/// pseudo-header.
fn unfinished_udp(payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let mut whole = Vec::new();
    PacketBuilder::ethernet2(afxdp::OURS, afxdp::THEIRS)
        .ipv4(from, to, 64)
        .udp(7, 9)
        .write(&mut whole, payload)
        .expect("a packet");
    let words = [from, to].concat();
    let mut sum: u32 = words.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    sum += 17 + 8 + payload.len() as u32;
    sum = (sum & 0xffff) + (sum >> 16);
    let mut partial = whole.clone();
    partial[40..42].copy_from_slice(&(sum as u16).to_be_bytes());
    (partial, whole)
}

#[test]
fn checksums_and_times_on_transmit() {
    let wires = Wires::new();
    let (_, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let config = copying("x0").tx_metadata(TxMetadata::SoftwareChecksum);
    let mut port = wires.open(&pool, config).expect("a port");
    assert!(port.capabilities().contains(Capabilities::TX_CHECKSUM | Capabilities::TX_TIMESTAMP));
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    let mut worker = Worker::new(&mut port, 0, 128);
    let mut last = 0;
    for i in 0..100_u8 {
        let (partial, whole) = unfinished_udp(&vec![i; usize::from(i) * 7]);
        let mut batch = Batch::new();
        worker.build(&partial, 2048, &mut batch);
        let sent = &mut batch.as_mut_slice()[0];
        pool.set_meta(sent, FrameMeta { csum_start: 34, csum_offset: 6, ..FrameMeta::default() });
        sent.set_flags(sent.flags() | FrameFlags::TX_CHECKSUM | FrameFlags::TX_TIMESTAMP);
        let chunk = sent.chunk();
        // A packet without requests travels beside it.
        worker.build(&frame(u32::from(i), 100), 2048, &mut batch);
        worker.flush(&mut batch, Instant::now() + PATIENCE);
        while worker.queue.tx.in_flight() != 0 {
            worker.queue.tx.reclaim(&mut worker.frames);
        }
        let is_udp = |p: &[u8]| SlicedPacket::from_ethernet(p).is_ok_and(|p| p.transport.is_some());
        let got = peer.receive_matching(PATIENCE, is_udp).expect("a packet socket").expect("the packet");
        assert_eq!(got, whole, "the checksum is there");
        let AnyTx::Xdp(tx) = &mut worker.queue.tx else { panic!("another driver") };
        let time = tx.pop_time().expect("a time");
        assert_eq!(time.chunk, chunk);
        assert!(time.nanoseconds > last, "{} after {last}", time.nanoseconds);
        last = time.nanoseconds;
        assert_eq!(tx.pop_time(), None, "the other packet did not ask");
    }
    worker.close();
}

/// What the kernel would not take, or would block the ring with, is refused here and comes back.
#[test]
fn frames_that_cannot_be_sent_are_refused_and_come_back() {
    let wires = Wires::new();
    let (_, y) = wires.pair(1500, 1);
    let pool = pool(1024);
    let mut peer = PacketSocket::open(&y).expect("a packet socket");
    for (multi_buffer, metadata) in [(false, false), (true, true)] {
        let requests = if metadata { TxMetadata::On } else { TxMetadata::Off };
        let config = copying("x0").multi_buffer(multi_buffer).tx_metadata(requests);
        let mut port = wires.open(&pool, config).expect("a port");
        let mut worker = Worker::new(&mut port, 0, 256);
        let mut refused = 0;
        for round in 0..40 {
            let mut batch = Batch::new();
            let good = [frame(round * 2, 100), frame(round * 2 + 1, 300)];
            worker.build(&good[0], 2048, &mut batch);
            // An empty frame.
            worker.build(&[0; 1], 2048, &mut batch);
            batch.as_mut_slice()[1].truncate(0);
            // A checksum that lies outside its packet, or that nobody computes here.
            worker.build(&frame(9999, 60), 2048, &mut batch);
            let bad = &mut batch.as_mut_slice()[2];
            pool.set_meta(bad, FrameMeta { csum_start: 50, csum_offset: 9, ..FrameMeta::default() });
            bad.set_flags(bad.flags() | FrameFlags::TX_CHECKSUM);
            // A packet in more frames than the kernel takes.
            worker.build(&frame(9998, 180), 10, &mut batch);
            worker.build(&good[1], 2048, &mut batch);
            refused += 20;
            worker.flush(&mut batch, Instant::now() + PATIENCE);
            assert_eq!(receive_from(&mut peer, 2), good);
        }
        while worker.queue.tx.in_flight() != 0 {
            worker.queue.tx.reclaim(&mut worker.frames);
        }
        worker.queue.tx.reclaim(&mut worker.frames);
        assert_eq!(port.statistics().tx_invalid, refused);
        worker.close();
        drop(port);
    }
}

/// `lo` has an MTU that no chunk holds, and no driver to attach to.
#[test]
fn loopback() {
    let wires = Wires::new();
    let pool = pool(512);
    let mut port = wires.open(&pool, config("lo").allow_larger_mtu(true)).expect("a port");
    assert_eq!(port.attached(), isoplane_drivers::xdp::Attached::Generic);
    let reason = port.mode_reason().expect("a reason").to_owned();
    assert!(reason.contains("network stack") && reason.contains("zero-copy"), "{reason}");
    let mut worker = Worker::new(&mut port, 0, 128);
    let frames = numbered(100, 1000);
    for burst in frames.chunks(20) {
        worker.send(burst, 2048);
        assert_eq!(worker.receive(burst.len()), burst, "what is sent on lo arrives there");
    }
    // The kernel's own traffic, such as a UDP datagram to 127.0.0.1.
    wires
        .ours
        .run(|| {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
            socket.send_to(b"to whom it may concern", "127.0.0.1:9").expect("sent");
        })
        .expect("the namespace");
    let deadline = Instant::now() + PATIENCE;
    let mut seen = false;
    while !seen {
        assert!(Instant::now() < deadline, "the datagram did not arrive");
        seen = worker.poll().iter().any(|p| p.ends_with(b"to whom it may concern"));
    }
    worker.close();
}
