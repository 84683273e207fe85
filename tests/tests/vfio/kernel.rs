//! Our driver on one end of a cable, Linux's for the same device on the other.

use crate::hub::{self, Driver, Ours, Pass};
use crate::nics::{Nic, WAYS, inside};
use crate::peer::{self, Peer};
use crate::worker::{self, PATIENCE, Worker, is_test, packet};
use etherparse::{PacketBuilder, PacketHeaders, TransportHeader};
use isoplane_drivers::e1000e::E1000eConfig;
use isoplane_drivers::vfio::Domain;
use isoplane_drivers::virtio::{self, VirtioConfig};
use isoplane_memory::{FrameFlags, FrameMeta};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

/// Our address of IP.
const IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// Where the transport header of a packet with no options and no tag starts.
const TRANSPORT: usize = 34;

/// Our port with a worker, and the kernel. Dropped in this order: the device goes back last.
struct Cable {
    worker: Option<Worker>,
    ours: Ours,
    nic: Nic,
    peer: Peer,
}

impl Cable {
    fn new(driver: &Driver, [here, there]: [&str; 2]) -> Self {
        let peer = Peer::new(there, driver.kernels());
        let nic = Nic::bound(here);
        let domain = Domain::new(WAYS[0]).unwrap();
        let pool = hub::pool(2048);
        let [mut ours] = driver.open([here], [&nic], &domain, &pool);
        let worker = Some(Worker::new(ours.port(), 0, 512));
        peer.wait_running();
        Self { worker, ours, nic, peer }
    }

    fn worker(&mut self) -> &mut Worker {
        self.worker.as_mut().expect("until the end")
    }

    fn end(mut self) {
        assert_eq!(self.ours.port().statistics().bad_descriptors, 0);
        worker::close(self.worker.take());
        drop(self.ours);
        drop(self.nic);
        drop(self.peer);
    }
}

/// Puts a VLAN tag into a packet.
fn tagged(mut packet: Vec<u8>, vlan: u16) -> Vec<u8> {
    packet.splice(12..12, [&[0x81, 0][..], &vlan.to_be_bytes()].concat());
    packet
}

#[test]
fn packets_are_the_same_on_both_ends() {
    if !inside() {
        return;
    }
    let long = [
        Driver::Virtio(VirtioConfig { multi_buffer: true, mtu: Some(9000), ..VirtioConfig::default() }),
        Driver::E1000e(E1000eConfig::default().mtu(9000)),
    ];
    let usual = Driver::all().into_iter().map(|driver| (driver, &[60, 61, 64, 127, 590, 1513, 1514][..]));
    let long = long.into_iter().map(|driver| (driver, &[60, 1514, 1515, 2047, 2048, 4000, 9013, 9014][..]));
    for (driver, lengths) in usual.chain(long) {
        let mut cable = Cable::new(&driver, driver.ends());
        if lengths.contains(&9014) {
            cable.peer.link().set_mtu(9000).expect("a long MTU");
            // For some of them that is a new beginning.
            cable.peer.wait_running();
        }
        let make = |to: [u8; 6]| -> Vec<Vec<u8>> {
            let plain = (0..).zip(lengths).map(|(n, len)| packet(to, n, *len));
            let with = (100..).zip(lengths).map(|(n, len)| tagged(packet(to, n, *len), 5));
            plain.chain(with).collect()
        };
        let mut socket = cable.peer.socket();
        let from_kernel = make(cable.ours.mac());
        for packet in &from_kernel {
            socket.send(packet).expect("sent");
        }
        assert_eq!(cable.worker().receive_tests(from_kernel.len()), from_kernel, "{driver:?}");
        let from_us = make(cable.peer.mac);
        cable.worker().send(&from_us);
        // The kernel hands those with a tag up by another way, and so earlier or later.
        let by_tag = |packets: Vec<Vec<u8>>| -> (Vec<_>, Vec<_>) {
            packets.into_iter().partition(|packet| packet[12..14] == [0x81, 0])
        };
        let got = peer::receive(&mut socket, from_us.len());
        assert_eq!(by_tag(got), by_tag(from_us), "{driver:?}");
        drop(socket);
        cable.end();
    }
}

/// Sum of the 16-bit words of `bytes` in ones' complement (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum over what the checksum covers and is not in the segment (RFC 9293, section 3.1).
fn pseudo_header(packet: &[u8]) -> u16 {
    let length = u32::from(u16::from_be_bytes([packet[16], packet[17]])) - 20;
    sum(&packet[26..34], u32::from(packet[23]) + length)
}

/// Is the transport checksum of an IPv4 packet right, by etherparse's reckoning?
fn is_right(packet: &[u8]) -> bool {
    let headers = PacketHeaders::from_ethernet_slice(packet).expect("a whole packet");
    let Some(etherparse::NetHeaders::Ipv4(ip, _)) = &headers.net else { panic!("{:?}", headers.net) };
    match headers.transport.expect("a transport header") {
        TransportHeader::Udp(udp) => {
            udp.checksum == udp.calc_checksum_ipv4(ip, headers.payload.slice()).unwrap()
        }
        TransportHeader::Tcp(tcp) => {
            tcp.checksum == tcp.calc_checksum_ipv4(ip, headers.payload.slice()).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

/// What somebody who forwards it would do about a packet's checksum is right: nothing, or what its metadata says.
fn check_arrived(arrived: &worker::Arrived) -> bool {
    let mut bytes = arrived.bytes.clone();
    if arrived.flags.contains(FrameFlags::TX_CHECKSUM) {
        let meta = arrived.meta.expect("where the checksum goes");
        let (start, at) = (usize::from(meta.csum_start), usize::from(meta.csum_start + meta.csum_offset));
        assert_eq!(start, TRANSPORT);
        let value = !sum(&bytes[start..], 0);
        bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
    }
    assert!(is_right(&bytes), "{bytes:x?}");
    arrived.flags.contains(FrameFlags::RX_CHECKSUM_GOOD)
}

/// Asks for the checksum of each packet; what it covers beside the segment is in its place.
fn wants_checksum(pool: &isoplane_memory::Pool, frame: &mut isoplane_memory::Frame) {
    let packet = pool.bytes(frame);
    let offset = if packet[23] == 17 { 6 } else { 16 };
    let start = pseudo_header(packet);
    let at = TRANSPORT + offset;
    pool.bytes_mut(frame)[at..at + 2].copy_from_slice(&start.to_be_bytes());
    let meta = FrameMeta { csum_start: TRANSPORT as u16, csum_offset: offset as u16, ..FrameMeta::default() };
    pool.set_meta(frame, meta);
    frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
}

#[test]
fn checksums_are_left_to_the_devices() {
    if !inside() {
        return;
    }
    // On a hub, QEMU's virtio-net computes none.
    let config = VirtioConfig { rx_checksum: true, ..VirtioConfig::default() };
    let virtio = (Driver::Virtio(config), ["virtio4", "virtio5"]);
    let e1000e = Driver::E1000e(E1000eConfig::default());
    let ends = e1000e.ends();
    for (driver, ends) in [virtio, (e1000e, ends)] {
        if !crate::nics::is_there(ends[0]) {
            println!("skipped: no taps for {}", ends[0]);
            continue;
        }
        let mut cable = Cable::new(&driver, ends);
        let (mac, theirs) = (cable.ours.mac(), cable.peer.mac);
        cable.peer.address_and_neighbour(IP, mac);
        let socket = UdpSocket::bind((Peer::IP, 7000)).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let is_udp = |bytes: &[u8]| bytes.get(12..14) == Some(&[8, 0]) && bytes[23] == 17;
        for len in [0, 1, 2, 511, 1400, 1472] {
            let payload: Vec<u8> = (0..len).map(|n| n as u8).collect();
            socket.send_to(&payload, (IP, 9)).expect("sent");
            let arrived = cable.worker().receive(1, is_udp).remove(0);
            assert!(check_arrived(&arrived), "{len} bytes: {arrived:?}");
            assert!(arrived.bytes[42..].starts_with(&payload), "{len} bytes");
        }
        let ip = || PacketBuilder::ethernet2(mac, theirs).ipv4(IP.octets(), Peer::IP.octets(), 64);
        for len in [1, 2, 511, 1400, 1472] {
            let payload: Vec<u8> = (0..len).map(|n| n as u8 ^ 0x55).collect();
            let mut bytes = Vec::new();
            ip().udp(9, 7000).write(&mut bytes, &payload).unwrap();
            // One that nobody completes is no good to the kernel.
            bytes[TRANSPORT + 6] ^= 0xff;
            cable.worker().send(std::slice::from_ref(&bytes));
            cable.worker().send_with(&[bytes], wants_checksum);
            let mut got = vec![0; 2000];
            let (n, from) = socket.recv_from(&mut got).expect("a datagram");
            assert_eq!((&got[..n], from), (&payload[..], SocketAddr::from((IP, 9))), "{len} bytes");
        }
        // The kernel answers no segment with a wrong checksum.
        let listener = TcpListener::bind((Peer::IP, 7001)).expect("a socket");
        let mut syn = Vec::new();
        ip().tcp(9, 7001, 1, 1000).syn().write(&mut syn, &[]).unwrap();
        syn[TRANSPORT + 16] ^= 0xff;
        cable.worker().send_with(&[syn], wants_checksum);
        let is_tcp = |bytes: &[u8]| bytes.get(12..14) == Some(&[8, 0]) && bytes[23] == 6;
        let answer = cable.worker().receive(1, is_tcp).remove(0);
        assert!(check_arrived(&answer), "{answer:?}");
        assert_eq!(answer.bytes[TRANSPORT + 13] & 0x3f, 0x12, "SYN and ACK");
        // What the device has found wrong, or has not looked at, is not called good.
        let mut bad = Vec::new();
        PacketBuilder::ethernet2(theirs, mac)
            .ipv4(Peer::IP.octets(), IP.octets(), 64)
            .udp(7000, 9)
            .write(&mut bad, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18])
            .unwrap();
        bad[TRANSPORT + 7] ^= 1;
        cable.peer.socket().send(&bad).expect("sent");
        let arrived = cable.worker().receive(1, is_udp).remove(0);
        assert_eq!(arrived.bytes, bad);
        assert!(!arrived.flags.contains(FrameFlags::RX_CHECKSUM_GOOD), "{:?}", arrived.flags);
        drop((listener, socket));
        cable.end();
    }
}

#[test]
fn the_device_passes_what_the_filter_says() {
    if !inside() {
        return;
    }
    const STATION: [u8; 6] = [0x02, 0, 0, 0, 0x77, 0x77];
    const ALL: [u8; 6] = [0xff; 6];
    const WANTED: [u8; 6] = [0x01, 0, 0x5e, 1, 2, 3];
    const OTHER: [u8; 6] = [0x01, 0, 0x5e, 9, 8, 7];
    for driver in Driver::all() {
        let mut cable = Cable::new(&driver, driver.ends());
        let own = cable.ours.mac();
        let socket = cable.peer.socket();
        for (which, expected) in [
            (Pass::Everything, &[own, STATION, ALL, WANTED, OTHER][..]),
            (Pass::Own(&[WANTED]), &[own, ALL, WANTED]),
            (Pass::Own(&[]), &[own, ALL]),
            (Pass::AllMulticast, &[own, ALL, WANTED, OTHER]),
            (Pass::Everything, &[own, STATION, ALL, WANTED, OTHER]),
        ] {
            cable.ours.pass(which);
            // The last one is passed always: all before it have been judged.
            for to in [own, STATION, ALL, WANTED, OTHER] {
                socket.send(&packet(to, 1, 60)).expect("sent");
            }
            socket.send(&packet(own, 2, 60)).expect("sent");
            let got = cable.worker().receive_tests(expected.len() + 1);
            let to: Vec<[u8; 6]> = got.iter().map(|bytes| bytes[..6].try_into().unwrap()).collect();
            assert_eq!(to[..expected.len()], *expected, "{driver:?}: {which:?}");
            assert_eq!(got.last(), Some(&packet(own, 2, 60)), "{driver:?}: {which:?}");
        }
        drop(socket);
        cable.end();
    }
}

#[test]
fn only_vlans_that_were_asked_for_arrive() {
    if !inside() {
        return;
    }
    // The 82574L has no such command here: it passes all.
    let filter = virtio::Filter::Own;
    let driver = Driver::Virtio(VirtioConfig { vlans: vec![5, 4094], filter, ..VirtioConfig::default() });
    let mut cable = Cable::new(&driver, driver.ends());
    let (own, socket) = (cable.ours.mac(), cable.peer.socket());
    let send = |vlans: &[u16]| {
        for vlan in vlans {
            socket.send(&tagged(packet(own, (*vlan).into(), 60), *vlan)).expect("sent");
        }
        // Without a tag it is of no VLAN, and always passed.
        socket.send(&packet(own, 1, 60)).expect("sent");
    };
    let expected = |vlans: &[u16]| -> Vec<Vec<u8>> {
        let tagged = vlans.iter().map(|vlan| tagged(packet(own, (*vlan).into(), 60), *vlan));
        tagged.chain([packet(own, 1, 60)]).collect()
    };
    send(&[4, 5, 6, 4094]);
    assert_eq!(cable.worker().receive_tests(3), expected(&[5, 4094]));
    let Ours::Virtio(port) = &cable.ours else { unreachable!("it is virtio") };
    port.pass_vlan(6, true).unwrap();
    port.pass_vlan(5, false).unwrap();
    send(&[4, 5, 6, 4094]);
    assert_eq!(cable.worker().receive_tests(3), expected(&[6, 4094]));
    assert!(cable.worker().poll().iter().all(|packet| !is_test(&packet.bytes)));
    drop(socket);
    cable.end();
}
