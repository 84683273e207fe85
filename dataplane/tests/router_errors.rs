//! ICMP and ICMPv6 error messages: which packet gets which, how it looks to etherparse, when there is none.

mod common;

use common::net::*;
use common::{Bench, mac};
use etherparse::icmpv4::{DestUnreachableHeader, RedirectCode, TimeExceededCode};
use etherparse::{Icmpv4Slice, Icmpv4Type, Icmpv6Slice, Icmpv6Type, IpNumber, NetSlice, SlicedPacket};
use isoplane::blocks::router::{IcmpLimits, Limit, RouterConfig};
use isoplane::tables::{NextHop, NextHopId};
use isoplane::wire::MacAddress;
use std::net::IpAddr;

/// An error message as etherparse reads it, all checksums verified.
#[derive(Debug)]
struct Message {
    source: IpAddr,
    destination: IpAddr,
    class: u8,
    hops: u8,
    four: Option<Icmpv4Type>,
    six: Option<Icmpv6Type>,
    quoted: Vec<u8>,
    len: usize,
}

fn read(frame: &[u8]) -> Message {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    match packet.net.unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(header.protocol, IpNumber::ICMP);
            let icmp = Icmpv4Slice::from_slice(ip.payload().payload).unwrap();
            assert_eq!(icmp.icmp_type().calc_checksum(icmp.payload()), icmp.checksum());
            Message {
                source: header.source.into(),
                destination: header.destination.into(),
                class: header.dscp.value() << 2 | header.ecn.value(),
                hops: header.time_to_live,
                four: Some(icmp.icmp_type()),
                six: None,
                quoted: icmp.payload().to_vec(),
                len: usize::from(header.total_len),
            }
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.next_header, IpNumber::IPV6_ICMP);
            let icmp = Icmpv6Slice::from_slice(ip.payload().payload).unwrap();
            assert!(icmp.is_checksum_valid(header.source, header.destination));
            Message {
                source: header.source.into(),
                destination: header.destination.into(),
                class: header.traffic_class,
                hops: header.hop_limit,
                four: None,
                six: Some(icmp.icmp_type()),
                quoted: icmp.payload().to_vec(),
                len: usize::from(header.payload_length) + 40,
            }
        }
        other => panic!("{other:?}"),
    }
}

fn unreachable4(header: DestUnreachableHeader) -> Icmpv4Type {
    Icmpv4Type::DestinationUnreachable(header)
}

/// A network in which everything can go wrong.
fn net(config: &RouterConfig) -> Net {
    let mut net = Net::with(config);
    for (prefix, to) in [
        ("20.0.0.0/8", NextHopId::NONE),
        ("21.0.0.0/8", NextHopId::UNREACHABLE),
        ("22.0.0.0/8", NextHopId::PROHIBIT),
        ("23.0.0.0/8", NextHopId::BLACKHOLE),
        ("2001:db8:20::/48", NextHopId::NONE),
        ("2001:db8:21::/48", NextHopId::UNREACHABLE),
        ("2001:db8:22::/48", NextHopId::PROHIBIT),
        ("2001:db8:23::/48", NextHopId::BLACKHOLE),
    ] {
        net.route(prefix, to);
    }
    net.next_hop("198.51.100.66/32", NextHop::Failed { interface: id(WAN) });
    net.next_hop("2001:db8:2::66/128", NextHop::Failed { interface: id(WAN) });
    net.change(VLAN10, |interface| interface.mtu = 1300);
    net
}

fn generous() -> RouterConfig {
    let limit = Limit { per_second: 1_000_000, burst: 10_000 };
    RouterConfig { icmp: IcmpLimits { total: limit, host: limit }, ..config() }
}

#[test]
fn each_refusal_has_its_message() {
    use etherparse::icmpv6::{DestUnreachableCode, TimeExceededCode as Exceeded};
    let mut net = net(&generous());
    let next = |mtu| DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
    let exceeded = Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit);
    for (to, len, ttl, expected) in [
        ("20.0.0.1", 18, 64, unreachable4(DestUnreachableHeader::Network)),
        ("21.0.0.1", 18, 64, unreachable4(DestUnreachableHeader::Host)),
        ("22.0.0.1", 18, 64, unreachable4(DestUnreachableHeader::FilterProhibited)),
        ("198.51.100.66", 18, 64, unreachable4(DestUnreachableHeader::Host)),
        ("203.0.113.10", 1273, 64, unreachable4(next(1300))),
        ("8.8.8.8", 18, 1, exceeded.clone()),
        ("8.8.8.8", 18, 0, exceeded.clone()),
        // The hops are counted before the way is looked at.
        ("20.0.0.1", 1400, 1, exceeded),
    ] {
        let packet = udp4("192.0.2.10", to, len, |header| header.time_to_live = ttl);
        let (port, frame) = net.one(0, &from_lan(&packet));
        assert_eq!((port, &frame[..12]), (0, &[HOST, ROUTER[0]].concat()[..]));
        let message = read(&frame);
        assert_eq!(message.four, Some(expected));
        assert_eq!((message.source, message.destination), (ip("192.0.2.1"), ip("192.0.2.10")));
        assert_eq!((message.class, message.hops), (0xc0, 64));
        let quoted = packet.len().min(548);
        assert_eq!((message.quoted.as_slice(), message.len), (&packet[..quoted], quoted + 28));
    }
    for (to, len, ttl, expected) in [
        ("2001:db8:20::1", 18, 64, Icmpv6Type::DestinationUnreachable(DestUnreachableCode::NoRoute)),
        ("2001:db8:21::1", 18, 64, Icmpv6Type::DestinationUnreachable(DestUnreachableCode::RejectRoute)),
        ("2001:db8:22::1", 18, 64, Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Prohibited)),
        ("2001:db8:2::66", 18, 64, Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Address)),
        ("2001:db8:3::10", 1253, 64, Icmpv6Type::PacketTooBig { mtu: 1300 }),
        ("2001:db8:ffff::1", 18, 1, Icmpv6Type::TimeExceeded(Exceeded::HopLimitExceeded)),
        ("2001:db8:ffff::1", 18, 0, Icmpv6Type::TimeExceeded(Exceeded::HopLimitExceeded)),
    ] {
        let packet = udp6("2001:db8:1::10", to, len, |header| header.hop_limit = ttl);
        let (port, frame) = net.one(0, &from_lan(&packet));
        assert_eq!((port, &frame[..12]), (0, &[HOST, ROUTER[0]].concat()[..]));
        let message = read(&frame);
        assert_eq!(message.six, Some(expected));
        assert_eq!((message.source, message.destination), (ip("2001:db8:1::1"), ip("2001:db8:1::10")));
        let quoted = packet.len().min(1232);
        assert_eq!((message.quoted.as_slice(), message.len), (&packet[..quoted], quoted + 48));
    }
    // What just fits is no case for a message.
    assert_eq!(net.one(0, &from_lan(&udp4("192.0.2.10", "203.0.113.10", 1272, |_| {}))).0, 2);
    assert_eq!(net.one(0, &from_lan(&udp6("2001:db8:1::10", "2001:db8:3::10", 1252, |_| {}))).0, 2);
    // Black holes are silent.
    for packet in
        [udp4("192.0.2.10", "23.0.0.1", 18, |_| {}), udp6("2001:db8:1::10", "2001:db8:23::1", 18, |_| {})]
    {
        net.dropped(0, &from_lan(&packet), "drop_no_route", "no_route");
    }
    assert_eq!(net.counter("icmp_unreachable"), 8);
    assert_eq!((net.counter("icmp_time_exceeded"), net.counter("icmp_too_big")), (5, 2));
    net.bench.finish();
}

#[test]
fn messages_are_routed_and_come_from_where_they_leave() {
    let mut net = net(&generous());
    // The source is behind the gateway, not where the packet came from.
    let packet = udp4("9.9.9.9", "20.0.0.1", 18, |_| {});
    let (port, frame) = net.one(0, &from_lan(&packet));
    assert_eq!((port, read(&frame).source), (1, ip("198.51.100.1")));
    // Behind a VLAN.
    let packet = udp6("2001:db8:3::10", "2001:db8:20::1", 18, |_| {});
    let (port, frame) = net.one(0, &from_lan(&packet));
    assert_eq!((port, &frame[12..18]), (2, &[0x81, 0, 0, 10, 0x86, 0xdd][..]));
    assert_eq!(read(&frame).source, ip("2001:db8:3::1"));
    // By an interface without addresses: that of where it came from, then any.
    net.change(LAN, |lan| (lan.address4, lan.address6) = (None, Some(v6("fe80::1"))));
    let packet = udp4("192.0.2.10", "20.0.0.1", 18, |_| {});
    assert_eq!(read(&net.one(0, &from_lan(&packet)).1).source, ip("198.51.100.1"));
    let packet = udp6("2001:db8:1::10", "2001:db8:20::1", 18, |_| {});
    assert_eq!(read(&net.one(0, &from_lan(&packet)).1).source, ip("2001:db8:2::1"));
    // A link-local host is answered on its link, by a link-local address.
    let packet = udp6("fe80::10", "2001:db8:ffff::1", 18, |_| {});
    let mut frame = from_lan(&packet);
    frame[6..12].copy_from_slice(&mac(0x77));
    let (port, frame) = net.one(0, &frame);
    assert_eq!((port, &frame[..6]), (0, &mac(0x77)[..]));
    let message = read(&frame);
    assert_eq!((message.source, message.destination), (ip("fe80::1"), ip("fe80::10")));
    let scope = etherparse::icmpv6::DestUnreachableCode::BeyondScope;
    assert_eq!(message.six, Some(Icmpv6Type::DestinationUnreachable(scope)));
    // No way back, no address at all: no message.
    let lost = udp4("23.1.1.1", "20.0.0.1", 18, |_| {});
    net.dropped(0, &from_lan(&lost), "drop_no_route", "icmp_failed");
    for place in [LAN, WAN, VLAN10, VLAN20] {
        net.change(place, |interface| (interface.address4, interface.address6) = (None, None));
    }
    let packet = udp4("192.0.2.10", "20.0.0.1", 18, |_| {});
    net.dropped(0, &from_lan(&packet), "drop_no_route", "icmp_failed");
    let packet = udp6("2001:db8:1::10", "2001:db8:20::1", 18, |_| {});
    net.dropped(0, &from_lan(&packet), "drop_no_route", "icmp_failed");
    net.bench.finish();
}

/// An ICMP packet to nowhere, of this type.
fn icmp4(kind: u8) -> Vec<u8> {
    let mut packet = udp4("192.0.2.10", "20.0.0.1", 18, |header| header.protocol = IpNumber::ICMP);
    packet[20] = kind;
    packet
}

fn icmp6(kind: u8) -> Vec<u8> {
    let mut packet = udp6("2001:db8:1::10", "2001:db8:20::1", 18, |header| {
        header.next_header = IpNumber::IPV6_ICMP;
    });
    packet[40] = kind;
    packet
}

#[test]
fn no_message_about_messages_fragments_and_nobody() {
    let mut net = net(&generous());
    // RFC 1812, 4.3.2.7: errors are types 3, 4, 5, 11, 12, and what is unknown may be one.
    for kind in 0..=255 {
        let frame = from_lan(&icmp4(kind));
        match kind {
            0 | 8 | 9 | 10 | 13..=18 => assert_eq!(net.one(0, &frame).0, 0, "{kind}"),
            _ => net.dropped(0, &frame, "drop_no_route", "icmp_forbidden"),
        }
        // RFC 4443, 2.4 (e.1) and (e.2).
        let frame = from_lan(&icmp6(kind));
        match kind {
            ..128 | 137 => net.dropped(0, &frame, "drop_no_route", "icmp_forbidden"),
            _ => assert_eq!(net.one(0, &frame).0, 0, "{kind}"),
        }
    }
    // Behind extension headers as well.
    let mut packet = icmp6(1);
    packet[6] = 60;
    packet.splice(40..40, [58, 0, 1, 4, 0, 0, 0, 0]);
    packet[5] += 8;
    net.dropped(0, &from_lan(&packet), "drop_no_route", "icmp_forbidden");
    packet[48] = 128;
    assert_eq!(net.one(0, &from_lan(&packet)).0, 0);
    // Headers that do not come to an end may be in front of an error message.
    packet[41] = 255;
    net.dropped(0, &from_lan(&packet), "drop_no_route", "icmp_forbidden");
    // An error message that ends before its type.
    let mut packet = udp4("192.0.2.10", "20.0.0.1", 0, |header| {
        header.protocol = IpNumber::ICMP;
        header.total_len = 20;
    });
    packet.truncate(20);
    net.dropped(0, &from_lan(&packet), "drop_no_route", "icmp_forbidden");
    // Fragments: the first one, others.
    let fragment = |offset: u16, more| {
        udp4("192.0.2.10", "20.0.0.1", 24, |header| {
            header.dont_fragment = false;
            header.more_fragments = more;
            header.fragment_offset = offset.try_into().unwrap();
        })
    };
    assert_eq!(net.one(0, &from_lan(&fragment(0, true))).0, 0);
    for (offset, more) in [(1, true), (1, false), (185, true), (8000, false)] {
        net.dropped(0, &from_lan(&fragment(offset, more)), "drop_no_route", "icmp_forbidden");
    }
    // From an address of the router itself.
    let own = udp4("198.51.100.1", "20.0.0.1", 18, |_| {});
    net.dropped(0, &from_lan(&own), "drop_no_route", "icmp_forbidden");
    let own = udp6("2001:db8:2::1", "2001:db8:20::1", 18, |_| {});
    net.dropped(0, &from_lan(&own), "drop_no_route", "icmp_forbidden");
    net.bench.finish();
}

fn count(bench: &mut Bench<isoplane::blocks::Router>, frame: &[u8], times: usize) -> usize {
    (0..times).for_each(|_| bench.put(0, frame));
    bench.run();
    bench.take()[0].len()
}

#[test]
fn messages_are_limited_for_a_host_and_for_all() {
    let limits =
        IcmpLimits { total: Limit { per_second: 100, burst: 30 }, host: Limit { per_second: 10, burst: 10 } };
    let mut net = net(&RouterConfig { icmp: limits, ..config() });
    let of = |host: u8| from_lan(&udp4(&format!("192.0.2.{host}"), "20.0.0.1", 18, |_| {}));
    for host in [20, 21, 22, 23] {
        net.route(&format!("192.0.2.{host}/32"), net.host);
    }
    assert_eq!(count(&mut net, &of(20), 1000), 10, "a host has its limit");
    assert_eq!(count(&mut net, &of(21), 1000), 10, "and leaves the others theirs");
    assert_eq!(count(&mut net, &of(22), 5), 5);
    assert_eq!(count(&mut net, &of(23), 1000), 5, "up to the limit for all");
    // IPv6 has limits of its own.
    let six = from_lan(&udp6("2001:db8:1::10", "2001:db8:20::1", 18, |_| {}));
    assert_eq!(count(&mut net, &six, 1000), 10);
    net.now += 500_000_000;
    assert_eq!(count(&mut net, &of(20), 1000), 5);
    assert_eq!(net.counter("icmp_limited") + net.counter("icmp_unreachable"), 5005);
    net.bench.finish();
}

#[test]
fn redirects_only_where_they_are_on_and_only_to_neighbours() {
    let mut net = net(&generous());
    let better = NextHop::Forward { interface: id(LAN), mac: MacAddress(mac(0x99)) };
    let gateway = net.next_hop("7.0.0.0/8", better);
    let packet = udp4("192.0.2.10", "7.7.7.7", 18, |_| {});
    let forwarded = |frames: &[(usize, Vec<u8>)]| {
        assert_eq!(frames.last().unwrap().1[14..], one_hop_less(&packet));
        frames.len()
    };
    assert_eq!(forwarded(&net.send(0, &from_lan(&packet))), 1, "off");
    net.change(LAN, |lan| lan.redirects = true);
    assert_eq!(forwarded(&net.send(0, &from_lan(&packet))), 1, "nobody knows the address");
    net.tables.next_hops.set_address(gateway, Some(ip("192.0.2.99")));
    let out = net.send(0, &from_lan(&packet));
    assert_eq!(forwarded(&out), 2);
    let message = read(&out[0].1);
    let expected = etherparse::icmpv4::RedirectHeader {
        code: RedirectCode::RedirectForHost,
        gateway_internet_address: [192, 0, 2, 99],
    };
    assert_eq!(message.four, Some(Icmpv4Type::Redirect(expected)));
    assert_eq!((message.destination, message.quoted), (ip("192.0.2.10"), packet.clone()));
    // The sender on this link is another router.
    let mut frame = from_lan(&packet);
    frame[6..12].copy_from_slice(&mac(0x55));
    assert_eq!(forwarded(&net.send(0, &frame)), 1);
    // And by another interface there is no better way.
    let packet = udp4("192.0.2.10", "8.8.8.8", 18, |_| {});
    assert_eq!(net.send(0, &from_lan(&packet)).len(), 1);
    assert_eq!(net.counter("icmp_redirect"), 1);
    net.bench.finish();
}

#[test]
fn a_message_waits_for_its_neighbour_and_is_dropped_without_a_word() {
    let mut net = net(&generous());
    let packet = udp4("10.9.9.9", "20.0.0.1", 18, |_| {});
    assert_eq!(net.send(0, &from_lan(&packet)), []);
    assert_eq!(net.counter("held"), 1);
    let neighbour = NextHop::Forward { interface: id(VLAN20), mac: MacAddress(mac(0x33)) };
    net.next_hop("10.9.9.9/32", neighbour);
    net.turn();
    let out = net.take();
    let message = read(&out[2][0].concat());
    assert_eq!((message.destination, message.hops), (ip("10.9.9.9"), 64));
    // Another, whose neighbour never answers.
    let packet = udp4("10.9.9.8", "20.0.0.1", 18, |_| {});
    assert_eq!(net.send(0, &from_lan(&packet)), []);
    net.wait_ms(4000);
    assert_eq!(net.take().concat(), Vec::<Vec<Vec<u8>>>::new());
    assert_eq!(net.counter("held_timeout"), 1);
    net.bench.finish();
}
