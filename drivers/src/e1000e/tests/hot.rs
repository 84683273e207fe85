//! What the hot halves do beyond moving packets: offloads, RSS, packets in pieces, doorbells, refusals.

use super::super::E1000eConfig;
use super::super::layout::*;
use super::Pair;
use crate::conformance::packet::make;
use crate::port::{RxQueue, TxQueue};
use etherparse::PacketBuilder;
use isoplane_memory::{Batch, FrameFlags, FrameMeta};

pub(super) fn udp(from: (u8, u16), to: (u8, u16), len: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([10, 0, 0, from.0], [10, 0, 0, to.0], 64)
        .udp(from.1, to.1)
        .write(&mut packet, &vec![from.0; len])
        .unwrap();
    packet
}

pub(super) fn tcp(from: (u8, u16), to: (u8, u16), len: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([10, 0, 0, from.0], [10, 0, 0, to.0], 64)
        .tcp(from.1, to.1, 1, 1000)
        .write(&mut packet, &vec![from.0; len])
        .unwrap();
    packet
}

/// Where an IPv4 header without options ends.
pub(super) const TRANSPORT: u16 = 34;
pub(super) const UDP_SUM: u16 = 6;
pub(super) const TCP_SUM: u16 = 16;

/// Replaces the checksum by that of the pseudo-header, as somebody does who leaves the rest to the device.
pub(super) fn without_checksum(packet: &[u8], at: u16) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let len = (packet.len() - usize::from(TRANSPORT)) as u16;
    let words = packet[26..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum::<u32>() + u32::from(packet[23]) + u32::from(len);
    let sum = (sum & 0xffff) + (sum >> 16);
    let at = usize::from(TRANSPORT + at);
    packet[at..at + 2].copy_from_slice(&(sum as u16).to_be_bytes());
    packet
}

fn ask(pair: &mut Pair, batch: &mut Batch, packet: &[u8], meta: FrameMeta) {
    pair.add(batch, packet, 1600);
    let mut frame = batch.pop().unwrap();
    pair.pool.set_meta(&mut frame, meta);
    frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
    batch.push(frame).unwrap();
}

fn at(csum_offset: u16) -> FrameMeta {
    FrameMeta { csum_start: TRANSPORT, csum_offset, ..FrameMeta::default() }
}

#[test]
fn checksums_are_computed_by_the_device_and_verified_by_the_other() {
    for queues in [1, 2] {
        let mut pair = Pair::open(&E1000eConfig::default().queues(queues));
        let mut batch = Batch::new();
        let mut expected = Vec::new();
        for n in 0..10 {
            let (whole, place) = match n {
                5.. => (tcp((1, 2), (3, 4), 200 + n), TCP_SUM),
                _ => (udp((1, 2), (3, 4), 200 + n), UDP_SUM),
            };
            ask(&mut pair, &mut batch, &without_checksum(&whole, place), at(place));
            expected.push(whole);
            // One that asks for nothing goes between them, unchanged.
            let plain = make(n as u32, 80);
            pair.add(&mut batch, &plain, 1600);
            expected.push(plain);
        }
        assert_eq!(pair.queues[0][0].tx.transmit(&mut batch), 20);
        assert_eq!(pair.queues[0][0].tx.in_flight(), 20);
        let contexts = pair.cards[0].device(|device, _| device.context_descriptors);
        assert_eq!(contexts, if queues == 1 { 2 } else { 10 }, "one for all that are alike, if it lasts");
        assert_eq!(pair.queues[0][0].tx.reclaim(&mut pair.frames[0]), 20);
        let mut got = Vec::new();
        for queue in &mut pair.queues[1] {
            queue.rx.receive(&mut pair.frames[1], &mut batch);
            for frame in batch.drain() {
                let good = frame.flags().contains(FrameFlags::RX_CHECKSUM_GOOD);
                let bytes = pair.pool.bytes(&frame).to_vec();
                assert_eq!(good, bytes[12..14] == [8, 0], "verified if there is one");
                got.push(bytes);
                pair.frames[1].put(frame);
            }
        }
        // Over two queues, plain packets overtake flows.
        let sorted = |mut all: Vec<Vec<u8>>| {
            all.sort();
            all
        };
        assert_eq!(sorted(got), sorted(expected));
        pair.close();
    }
}

#[test]
fn a_wrong_checksum_is_not_called_good() {
    let mut pair = Pair::open(&E1000eConfig::default());
    let (right, mut wrong) = (udp((1, 2), (3, 4), 50), udp((1, 2), (3, 4), 51));
    wrong[60] ^= 1;
    pair.send(0, &[right, wrong]);
    let mut batch = Batch::new();
    pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch);
    let good: Vec<bool> =
        batch.iter().map(|frame| frame.flags().contains(FrameFlags::RX_CHECKSUM_GOOD)).collect();
    assert_eq!(good, [true, false]);
    pair.frames[1].put_batch(&mut batch);
    pair.close();
}

#[test]
fn what_cannot_be_sent_comes_back_and_the_rest_goes() {
    let mut pair = Pair::open(&E1000eConfig::default());
    let packet = udp((1, 2), (3, 4), 300);
    let mut batch = Batch::new();
    let mut refused = 0;
    let mut sent = Vec::new();
    let mut good = |pair: &mut Pair, batch: &mut Batch| {
        let packet = make(sent.len() as u32, 90);
        pair.add(batch, &packet, 1600);
        sent.push(packet);
    };
    good(&mut pair, &mut batch);
    // Too short, too long in pieces, in 33 pieces, with an empty piece.
    for (len, step) in [(16, 100), (1519, 1000), (330, 10)] {
        pair.add(&mut batch, &make(9, len), step);
        refused += len.div_ceil(step);
        good(&mut pair, &mut batch);
    }
    assert_eq!(pair.queues[0][0].tx.transmit(&mut batch), refused + 4);
    pair.add(&mut batch, &make(9, 90), 60);
    batch.as_mut_slice()[1].truncate(0);
    // A checksum out of the device's reach, over the end, of a frame without metadata; a time.
    for (csum_start, csum_offset) in [(256, 6), (250, 6), (34, 400), (u16::MAX, 6)] {
        let meta = FrameMeta { csum_start, csum_offset, ..FrameMeta::default() };
        ask(&mut pair, &mut batch, &packet, meta);
    }
    for flags in [FrameFlags::TX_CHECKSUM, FrameFlags::TX_TIMESTAMP] {
        pair.add(&mut batch, &packet, 1600);
        let last = batch.as_mut_slice().last_mut().unwrap();
        last.set_flags(flags);
    }
    refused += 8;
    good(&mut pair, &mut batch);
    assert_eq!(pair.queues[0][0].tx.transmit(&mut batch), 9);
    assert_eq!(pair.queues[0][0].tx.refused().0, refused as u64);
    assert_eq!(pair.queues[0][0].tx.in_flight(), 5);
    assert_eq!(pair.queues[0][0].tx.reclaim(&mut pair.frames[0]), refused + 5);
    assert_eq!((pair.frames[0].len(), pair.queues[0][0].tx.in_flight()), (300, 0));
    assert_eq!(pair.received(0), sent);
    pair.close();
}

#[test]
fn a_flow_stays_on_one_queue_both_ways_and_carries_the_devices_hash() {
    let mut pair = Pair::open(&E1000eConfig::default().queues(2).rx_hash(true));
    let mut by_queue = [0; 2];
    for n in 0..60_u16 {
        let (a, b) = ((n as u8, 1000 + n), (200, 80));
        let there = if n % 2 == 0 { tcp(a, b, 40) } else { udp(a, b, 40) };
        let back = if n % 2 == 0 { tcp(b, a, 40) } else { udp(b, a, 40) };
        pair.send(0, &[there.clone(), back]);
        let expected = pair.cards[1].device(|device, _| device.hash(&there));
        assert_ne!(expected, 0);
        let mut seen = Vec::new();
        for queue in 0..2 {
            let mut batch = Batch::new();
            pair.queues[1][queue].rx.receive(&mut pair.frames[1], &mut batch);
            for frame in batch.drain() {
                assert!(frame.flags().contains(FrameFlags::META));
                seen.push((queue, pair.pool.meta(&frame).unwrap().hash));
                pair.frames[1].put(frame);
            }
        }
        assert_eq!(seen, [seen[0]; 2], "flow {n}");
        assert_eq!(seen[0].1, expected, "flow {n}");
        by_queue[seen[0].0] += 1;
    }
    assert!(by_queue.iter().all(|n| *n > 10), "{by_queue:?}");
    pair.close();
}

#[test]
fn a_batch_is_one_doorbell() {
    let mut pair = Pair::open(&E1000eConfig::default());
    let bells = |pair: &Pair, card: usize| pair.cards[card].device(|device, _| device.doorbells);
    let before = [bells(&pair, 0), bells(&pair, 1)];
    for round in 1..=5 {
        let mut batch = Batch::new();
        for n in 0..64 {
            pair.add(&mut batch, &make(n, 100), 1600);
        }
        assert_eq!(pair.queues[0][0].tx.transmit(&mut batch), 64);
        assert_eq!(bells(&pair, 0), before[0] + round);
        assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 64);
        assert_eq!(bells(&pair, 1), before[1] + round);
        pair.frames[1].put_batch(&mut batch);
        assert_eq!(pair.queues[0][0].tx.reclaim(&mut pair.frames[0]), 64);
    }
    assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut Batch::new()), 0);
    assert_eq!(pair.queues[0][0].tx.transmit(&mut Batch::new()), 0);
    assert_eq!((bells(&pair, 0), bells(&pair, 1)), (before[0] + 5, before[1] + 5), "nothing, no doorbell");
    pair.close();
}

#[test]
fn frames_are_held_until_the_device_reports_them() {
    let mut pair = Pair::open(&E1000eConfig::default());
    pair.cards[0].device(|device, _| device.silent = true);
    for n in 1..=3 {
        let mut batch = Batch::new();
        pair.add(&mut batch, &make(n, 100), 1600);
        pair.add(&mut batch, &make(n, 100), 1600);
        assert_eq!(pair.queues[0][0].tx.transmit(&mut batch), 2);
    }
    assert_eq!(pair.queues[0][0].tx.reclaim(&mut pair.frames[0]), 0);
    assert_eq!(pair.queues[0][0].tx.in_flight(), 6);
    // It reports the second batch, then the first: order is the ring's.
    let base = pair.cards[0].device(|device, _| {
        u64::from(device.get(tx(0, BASE_HIGH))) << 32 | u64::from(device.get(tx(0, BASE_LOW)))
    });
    for (descriptor, back) in [(3, 0), (1, 4), (5, 2)] {
        let done = base + descriptor * 16 + 12;
        assert!(pair.cards[0].bus().write(done, &[1]));
        assert_eq!(pair.queues[0][0].tx.reclaim(&mut pair.frames[0]), back);
    }
    assert_eq!(pair.frames[0].len(), 300);
    pair.close();
}

/// What the device writes when it has filled a buffer, by hand.
fn write_back(pair: &Pair, descriptor: u64, end: bool, len: u64) {
    let base = pair.cards[1].device(|device, _| {
        u64::from(device.get(rx(0, BASE_HIGH))) << 32 | u64::from(device.get(rx(0, BASE_LOW)))
    });
    let word = 1 | u64::from(end) << 1 | len << 32;
    assert!(pair.cards[1].bus().write(base + descriptor * 16 + 8, &word.to_le_bytes()));
}

#[test]
fn a_packet_in_pieces_waits_for_its_end_and_for_room() {
    let mut pair = Pair::open(&E1000eConfig::default().mtu(9000));
    let mut batch = Batch::new();
    for descriptor in 0..5 {
        write_back(&pair, descriptor, false, 1024);
        assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 0);
    }
    write_back(&pair, 5, true, 7);
    write_back(&pair, 6, true, 60);
    while batch.room() > 5 {
        batch.push(pair.frames[1].get().unwrap()).unwrap();
    }
    assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 0, "no room for it");
    pair.frames[1].put(batch.pop().unwrap());
    assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 6, "just for it");
    let pieces: Vec<(u16, bool)> = batch.iter().skip(58).map(|f| (f.len(), f.has_more())).collect();
    assert_eq!(pieces[4..], [(1024, true), (7, false)]);
    assert!(pieces[..4].iter().all(|piece| *piece == (1024, true)));
    pair.frames[1].put_batch(&mut batch);
    assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 1);
    pair.frames[1].put_batch(&mut batch);
    assert_eq!(pair.queues[1][0].rx.bad_descriptors(), 0);
    pair.close();
}

#[test]
fn tagged_packets_pass_as_they_are_the_longest_too() {
    let mut pair = Pair::open(&E1000eConfig::default());
    let tagged = [60, 1518].map(|len| {
        let mut packet = make(len as u32, len);
        packet[12..16].copy_from_slice(&[0x81, 0, 0x20, 5]);
        packet
    });
    pair.send(0, &tagged);
    assert_eq!(pair.received(0), tagged);
    pair.close();
}

#[test]
fn a_packet_without_an_end_and_a_damaged_one_are_dropped_and_counted() {
    let mut pair = Pair::open(&E1000eConfig::default().mtu(9000));
    let mut batch = Batch::new();
    let free = pair.frames[1].len();
    for descriptor in 0..64 {
        write_back(&pair, descriptor, false, 1024);
    }
    write_back(&pair, 64, true, 100);
    assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 1, "the one behind it");
    assert_eq!(pair.queues[1][0].rx.bad_descriptors(), 1);
    // Longer than its chunk, with good pieces around it.
    for (descriptor, end, len) in [(65, false, 1024), (66, false, 60_000), (67, true, 10), (68, true, 50_000)]
    {
        write_back(&pair, descriptor, end, len);
    }
    write_back(&pair, 69, true, 99);
    assert_eq!(pair.queues[1][0].rx.receive(&mut pair.frames[1], &mut batch), 1);
    assert_eq!(pair.queues[1][0].rx.bad_descriptors(), 3);
    let lengths: Vec<u16> = batch.iter().map(|frame| frame.len()).collect();
    assert_eq!(lengths, [100, 99]);
    pair.frames[1].put_batch(&mut batch);
    // 70 came, 64 + 6 went back to the device at the most.
    assert!(pair.frames[1].len() >= free);
    pair.close();
}

#[test]
fn long_packets_pass_in_pieces_of_any_size() {
    let mut pair = Pair::open(&E1000eConfig::default().mtu(9216));
    for (len, step) in [(9234, 1500), (9234, 300), (1518, 50), (8192, 1024), (1024, 1024), (2048, 1500)] {
        let packet = make(len as u32, len);
        let mut batch = Batch::new();
        pair.add(&mut batch, &packet, step);
        let pieces = batch.len();
        assert_eq!(pair.queues[0][0].tx.transmit(&mut batch), pieces);
        assert_eq!(pair.queues[0][0].tx.reclaim(&mut pair.frames[0]), pieces);
        assert_eq!(pair.received(0), [packet], "{len} bytes in pieces of {step}");
    }
    pair.close();
}
