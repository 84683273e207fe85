//! Packets that wait for neighbours: what is asked for and how often, in which order they leave, what they cost
//! others.

mod common;

use common::mac;
use common::net::*;
use isoplane::blocks::router::{Limit, Request, ResolutionLimits, RouterConfig};
use isoplane::tables::NextHop;
use isoplane::wire::MacAddress;
use std::net::Ipv4Addr;

/// The n-th packet to an address.
fn numbered(to: &str, n: u16) -> Vec<u8> {
    match to.parse::<Ipv4Addr>() {
        Ok(_) => udp4("192.0.2.10", to, 18, |header| header.identification = n),
        Err(_) => {
            udp6("2001:db8:1::10", to, 18, |header| header.flow_label = u32::from(n).try_into().unwrap())
        }
    }
}

fn neighbour(place: u16, address: &str) -> Request {
    Request::Neighbour { interface: id(place), address: ip(address) }
}

fn with(resolution: ResolutionLimits) -> Net {
    Net::with(&RouterConfig { resolution, ..config() })
}

#[test]
fn packets_wait_in_order_for_neighbours_on_link() {
    for (to, prefix) in [("10.1.2.3", "10.1.2.3/32"), ("2001:db8:4::9", "2001:db8:4::9/128")] {
        let mut net = Net::new();
        for n in 0..5 {
            assert_eq!(net.send(0, &from_lan(&numbered(to, n))), []);
        }
        assert_eq!(net.asked(), [neighbour(VLAN20, to)], "once");
        assert_eq!((net.counter("waiting_neighbours"), net.counter("waiting_frames")), (1, 5));
        // The kernel has begun to ask: the neighbour is a next hop of its own.
        let found = net.next_hop(prefix, NextHop::Waiting { interface: id(VLAN20) });
        assert_eq!(net.send(0, &from_lan(&numbered(to, 5))), []);
        assert_eq!(net.asked(), [], "that is known already");
        let mac = MacAddress(mac(0x42));
        net.tables.next_hops.set(found, NextHop::Forward { interface: id(VLAN20), mac }).unwrap();
        // A packet that comes with the answer leaves behind those that have waited.
        let out = net.send(0, &from_lan(&numbered(to, 6)));
        let sent: Vec<Vec<u8>> = out.iter().map(|(_, frame)| frame[18..].to_vec()).collect();
        assert_eq!(sent, (0..7).map(|n| one_hop_less(&numbered(to, n))).collect::<Vec<_>>());
        assert!(out.iter().all(|(port, frame)| *port == 2 && frame[..6] == mac.0 && frame[15] == 20));
        assert_eq!((net.counter("waiting_neighbours"), net.counter("waiting_frames")), (0, 0));
        assert_eq!(net.asked(), []);
        assert_eq!(net.drops(), Default::default());
        net.bench.finish();
    }
}

#[test]
fn packets_wait_for_gateways() {
    let mut net = Net::new();
    let gateway = net.gateway;
    net.tables.next_hops.set(gateway, NextHop::Waiting { interface: id(WAN) }).unwrap();
    for n in 0..3 {
        // One queue for all who go there.
        assert_eq!(net.send(0, &from_lan(&numbered(&format!("8.8.8.{n}"), n))), []);
        assert_eq!(net.send(0, &from_lan(&numbered(&format!("2001:db8:9::{n}"), n))), []);
    }
    assert_eq!(net.asked(), [Request::NextHop { id: gateway }]);
    assert_eq!((net.counter("waiting_neighbours"), net.counter("waiting_frames")), (1, 6));
    // Meanwhile some of them have got another route.
    let other = net.host;
    net.route("8.8.8.1/32", other);
    let mac = MacAddress(GATEWAY);
    net.tables.next_hops.set(gateway, NextHop::Forward { interface: id(WAN), mac }).unwrap();
    net.turn();
    let out = net.take();
    assert_eq!((out[0].len(), out[1].len()), (1, 5));
    net.bench.finish();
}

#[test]
fn who_does_not_answer_is_asked_again_and_given_up() {
    let mut net = Net::new();
    net.send(0, &from_lan(&numbered("10.1.2.3", 1)));
    net.send(0, &from_lan(&numbered("10.1.2.3", 2)));
    net.send(0, &from_lan(&numbered("2001:db8:4::9", 1)));
    assert_eq!(net.asked().len(), 2);
    net.wait_ms(999);
    assert_eq!(net.asked(), []);
    net.wait_ms(1);
    let asked = net.asked();
    let wanted = ["10.1.2.3", "2001:db8:4::9"].map(|address| neighbour(VLAN20, address));
    assert!(asked.len() == 2 && wanted.iter().all(|wanted| asked.contains(wanted)), "{asked:?}");
    net.wait_ms(1000);
    assert_eq!(net.asked().len(), 2);
    net.wait_ms(999);
    assert_eq!((net.asked(), net.take().concat().len()), (vec![], 0));
    net.wait_ms(1);
    // Host and address unreachable, to whom it concerns.
    let out = net.take();
    let codes: Vec<[u8; 2]> = out[0]
        .iter()
        .map(|packet| packet.concat())
        .map(|frame| if frame[14] >> 4 == 4 { [frame[34], frame[35]] } else { [frame[54], frame[55]] })
        .collect();
    assert!(codes == [[3, 1], [3, 1], [1, 3]] || codes == [[1, 3], [3, 1], [3, 1]], "{codes:?}");
    assert_eq!((net.counter("held_timeout"), net.counter("drop_resolution")), (3, 3));
    // The kernel says that there is nobody: no waiting, but asked for again, once in an interval.
    let failed = net.next_hop("10.7.7.7/32", NextHop::Failed { interface: id(VLAN20) });
    for _ in 0..10 {
        assert_eq!(net.send(0, &from_lan(&numbered("10.7.7.7", 1))).len(), 1);
    }
    assert_eq!(net.asked(), [Request::NextHop { id: failed }]);
    net.now += 1_000_000_000;
    net.send(0, &from_lan(&numbered("10.7.7.7", 1)));
    assert_eq!(net.asked(), [Request::NextHop { id: failed }]);
    net.bench.finish();
}

#[test]
fn the_oldest_packet_makes_room() {
    let mut net = with(ResolutionLimits { frames_each: 4, frames: 6, ..ResolutionLimits::default() });
    for n in 0..10 {
        net.send(0, &from_lan(&numbered("10.1.2.3", n)));
    }
    assert_eq!((net.counter("waiting_frames"), net.counter("held_limit")), (4, 6));
    // A second neighbour gets what is left, and no more.
    for n in 0..4 {
        net.send(0, &from_lan(&numbered("10.1.2.4", n)));
    }
    assert_eq!((net.counter("waiting_frames"), net.counter("held_limit")), (6, 8));
    // A packet of more frames than may wait does not; one of three pushes three others out.
    let big = udp4("192.0.2.10", "10.1.2.3", 1000, |_| {});
    let parts = |n: usize| from_lan(&big).chunks(1042_usize.div_ceil(n)).map(<[u8]>::to_vec).collect();
    net.put_frames(0, parts(5));
    net.put_frames(0, parts(3));
    net.run();
    assert_eq!(net.counter("waiting_frames"), 6);
    net.next_hop("10.1.2.3/32", NextHop::Forward { interface: id(VLAN20), mac: MacAddress(mac(1)) });
    net.turn();
    let out = net.take();
    let frames: Vec<usize> = out[2].iter().map(Vec::len).collect();
    assert_eq!(frames, [1, 3]);
    assert_eq!(out[2][0].concat()[18..], one_hop_less(&numbered("10.1.2.3", 9)));
    assert_eq!(out[2][1].concat()[18..], one_hop_less(&big));
    net.drain();
    assert_eq!(net.counter("waiting_frames"), 0);
    net.bench.finish();
}

#[test]
fn a_scan_harms_nobody() {
    let mut net = with(ResolutionLimits {
        neighbours: 64,
        frames_each: 8,
        frames: 128,
        requests: Limit { per_second: 100, burst: 100 },
        ..ResolutionLimits::default()
    });
    // Somebody waits already.
    net.send(0, &from_lan(&numbered("203.0.113.77", 1)));
    let gateway = net.gateway;
    // A scan of 10.1/16, with traffic of others in between.
    for host in 0..=u16::MAX {
        let [high, low] = host.to_be_bytes();
        net.put(0, &from_lan(&numbered(&format!("10.1.{high}.{low}"), 1)));
        if host % 64 == 0 {
            net.put(0, &from_lan(&numbered("8.8.8.8", host)));
        }
        if host % 1024 == 1023 {
            net.run();
        }
    }
    net.run();
    assert_eq!(net.take()[1].len(), 1024, "all that has a neighbour");
    assert!(net.counter("waiting_neighbours") <= 48, "a quarter is for gateways");
    assert!(net.counter("waiting_frames") <= 128);
    assert_eq!(net.asked().len(), 100, "as many as are allowed");
    // A gateway still finds its place.
    net.tables.next_hops.set(gateway, NextHop::Waiting { interface: id(WAN) }).unwrap();
    net.send(0, &from_lan(&numbered("8.8.8.8", 1)));
    assert_eq!(net.asked(), [Request::NextHop { id: gateway }]);
    // Who waited first is answered, and gets the packet.
    net.next_hop("203.0.113.77/32", NextHop::Forward { interface: id(VLAN10), mac: MacAddress(mac(7)) });
    net.wait_ms(10);
    let out = net.take();
    assert_eq!(out[2].len(), 1);
    assert_eq!(out[2][0].concat()[18..], one_hop_less(&numbered("203.0.113.77", 1)));
    // All others are given up in time, and the table is empty.
    net.wait_ms(4000);
    net.wait_ms(4000);
    assert_eq!((net.counter("waiting_neighbours"), net.counter("waiting_frames")), (0, 0));
    net.bench.finish();
}

#[test]
fn requests_that_are_not_read_are_made_again() {
    let mut net = Net::new();
    for host in 0..=255_u16 {
        for third in 0..5 {
            net.put(0, &from_lan(&numbered(&format!("10.2.{third}.{host}"), 1)));
        }
    }
    net.run();
    assert!(net.counter("requests_limited") > 0);
    assert!(!net.asked().is_empty());
    net.drain();
    net.bench.finish();
}

#[test]
fn what_waits_is_given_back_at_the_end_and_after_a_rehearsal() {
    let mut net = Net::new();
    // Synthetic packets are for nobody: neither is anything asked for, nor does anything stay.
    let rehearsal = net.bench.rehearse();
    assert!(rehearsal.received > 0);
    assert_eq!((rehearsal.kept, net.asked()), (0, vec![]));
    assert_eq!(net.counter("general"), 0);
    net.send(0, &from_lan(&numbered("10.1.2.3", 1)));
    assert_eq!(net.asked().len(), 1, "now it is");
    net.drain();
    assert_eq!(net.drops(), [("drop_resolution".to_owned(), 1)].into());
    net.bench.finish();
}
