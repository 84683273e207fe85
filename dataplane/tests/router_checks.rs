//! What a router does not forward, and why: headers, addresses, options, limits of the host; each case with the
//! reason and the counter that it must have.

mod common;

use common::net::*;
use common::{BROADCAST, frame, mac};
use etherparse::{EtherType, Ipv4Header, Ipv4Options};
use isoplane::blocks::router::{Limit, PuntLimits, RouterConfig};
use isoplane::tables::interface::ReversePath;
use isoplane::tables::{NextHop, NextHopId};
use isoplane::wire::MacAddress;

fn plain4() -> Vec<u8> {
    udp4("192.0.2.10", "8.8.8.8", 18, |_| {})
}

fn plain6() -> Vec<u8> {
    udp6("2001:db8:1::10", "2001:db8:ffff::1", 18, |_| {})
}

/// With its checksum counted anew.
fn edited4(edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut packet = plain4();
    edit(&mut packet);
    packet[10..12].fill(0);
    let sum = packet[..20].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

/// A header of `words` words, the rest of them no operation, with everything right but its bytes.
fn options(bytes: &[u8]) -> Vec<u8> {
    let mut options = bytes.to_vec();
    options.resize(bytes.len().next_multiple_of(4), 1);
    udp4("192.0.2.10", "8.8.8.8", 18, |header| {
        header.total_len += options.len() as u16;
        header.options = Ipv4Options::try_from(&options[..]).unwrap();
    })
}

#[test]
fn headers_that_are_not_valid() {
    let mut net = Net::new();
    let mut bad: Vec<Vec<u8>> = (0..plain4().len()).map(|len| plain4()[..len].to_vec()).collect();
    bad.extend((0..plain6().len()).map(|len| plain6()[..len].to_vec()));
    bad.retain(|packet| !packet.is_empty());
    // RFC 1812, 5.2.2: (1) length, (2) checksum, (3) version, (4) header length, (5) total length.
    for flip in 0..20 {
        let mut packet = plain4();
        packet[flip] ^= 0x01;
        bad.push(packet);
    }
    bad.push(edited4(|ip| ip[0] = 0x55));
    bad.push(edited4(|ip| ip[0] = 0x65));
    bad.push(edited4(|ip| ip[0] = 0x44));
    bad.push(edited4(|ip| ip[0] = 0x40));
    bad.push(edited4(|ip| ip[2..4].copy_from_slice(&19_u16.to_be_bytes())));
    bad.push(edited4(|ip| ip[2..4].copy_from_slice(&0_u16.to_be_bytes())));
    bad.push(edited4(|ip| ip[2..4].copy_from_slice(&47_u16.to_be_bytes())));
    bad.push(edited4(|ip| ip[2..4].copy_from_slice(&u16::MAX.to_be_bytes())));
    // Options that are not there.
    bad.push(edited4(|ip| ip[0] = 0x4f));
    // IPv6: version, length, a jumbogram.
    let mut packet = plain6();
    packet[0] = 0x50;
    bad.push(packet);
    let mut packet = plain6();
    packet[5] += 1;
    bad.push(packet);
    let mut packet = plain6();
    packet[4..7].fill(0);
    bad.push(packet);
    for packet in &bad {
        let kind = if packet[0] >> 4 == 6 || packet[0] == 0x50 { EtherType::IPV6 } else { EtherType::IPV4 };
        // A version that does not fit its EtherType has no right one.
        let frame = ethernet(ROUTER[0], HOST, None, kind, packet);
        if packet[0] == 0x65 {
            let frame = ethernet(ROUTER[0], HOST, None, EtherType::IPV4, packet);
            net.dropped(0, &frame, "drop_malformed", "bad_header");
            continue;
        }
        net.dropped(0, &frame, "drop_malformed", "bad_header");
    }
    // Each in the other's place.
    net.dropped(
        0,
        &ethernet(ROUTER[0], HOST, None, EtherType::IPV6, &plain4()),
        "drop_malformed",
        "bad_header",
    );
    net.dropped(
        0,
        &ethernet(ROUTER[0], HOST, None, EtherType::IPV4, &plain6()),
        "drop_malformed",
        "bad_header",
    );
    assert_eq!(net.counter("icmp_parameter_problem"), 0, "no word about what nobody may have sent");
    net.bench.finish();
}

#[test]
fn frames_for_others_and_frames_that_are_too_short() {
    let mut net = Net::new();
    let good = from_lan(&plain4());
    let mut other = good.clone();
    other[5] ^= 1;
    net.dropped(0, &other, "drop_policy", "not_ours");
    // From a group address, and from nobody.
    let mut group = good.clone();
    group[6] |= 1;
    net.dropped(0, &group, "drop_policy", "not_ours");
    let mut nobody = good.clone();
    nobody[6..12].fill(0);
    net.dropped(0, &nobody, "drop_policy", "not_ours");
    for len in 1..14 {
        net.dropped(0, &good[..len], "drop_malformed", "general");
    }
    // A tag that is cut off.
    let tagged = ethernet(ROUTER[0], HOST, Some(10), EtherType::IPV4, &[]);
    net.dropped(0, &tagged[..16], "drop_malformed", "general");
    net.bench.finish();
}

#[test]
fn addresses_that_are_not_forwarded() {
    let mut net = Net::new();
    let good = "8.8.8.8";
    for source in [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "169.254.1.1",
    ] {
        net.dropped(0, &from_lan(&udp4(source, good, 18, |_| {})), "drop_martian", "martian");
    }
    for destination in
        ["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "240.0.0.1", "255.255.255.254", "169.254.1.1"]
    {
        net.dropped(0, &from_lan(&udp4("192.0.2.10", destination, 18, |_| {})), "drop_martian", "martian");
    }
    let good = "2001:db8:ffff::1";
    for source in ["::", "::1", "::ffff:192.0.2.1", "ff02::1", "ff0e::1"] {
        net.dropped(0, &from_lan(&udp6(source, good, 18, |_| {})), "drop_martian", "martian");
    }
    for destination in ["::", "::1", "::ffff:192.0.2.1"] {
        net.dropped(
            0,
            &from_lan(&udp6("2001:db8:1::10", destination, 18, |_| {})),
            "drop_martian",
            "martian",
        );
    }
    assert_eq!(net.counter("icmp_unreachable"), 0);
    // RFC 1812, 5.3.4: unicast that came as broadcast or multicast.
    for to in [BROADCAST, [1, 0, 0x5e, 0, 0, 1]] {
        let frame = ethernet(to, HOST, None, EtherType::IPV4, &plain4());
        net.dropped(0, &frame, "drop_policy", "link_broadcast");
        let frame = ethernet(to, HOST, None, EtherType::IPV6, &plain6());
        net.dropped(0, &frame, "drop_policy", "link_broadcast");
    }
    net.bench.finish();
}

#[test]
fn directed_broadcasts_are_forwarded_only_where_that_is_on() {
    let mut net = Net::new();
    let broadcast = NextHop::Forward { interface: id(VLAN10), mac: MacAddress(BROADCAST) };
    net.next_hop("203.0.113.255/32", broadcast);
    let packet = udp4("192.0.2.10", "203.0.113.255", 18, |_| {});
    net.dropped(0, &from_lan(&packet), "drop_policy", "link_broadcast");
    net.change(VLAN10, |interface| interface.directed_broadcast = true);
    let expected = ethernet(BROADCAST, ROUTER[2], Some(10), EtherType::IPV4, &one_hop_less(&packet));
    assert_eq!(net.one(0, &from_lan(&packet)), (2, expected));
    // No error message to a broadcast address, nor about a packet to one.
    let packet = udp4("203.0.113.255", "9.9.9.9", 18, |header| header.time_to_live = 1);
    net.dropped(0, &from_lan(&packet), "drop_hop_limit", "icmp_forbidden");
    net.bench.finish();
}

#[test]
fn sources_must_be_reached_through_where_they_come_from() {
    let mut net = Net::new();
    let packets = |source: &str, source6: &str| {
        [udp4(source, "203.0.113.10", 18, |_| {}), udp6(source6, "2001:db8:3::10", 18, |_| {})]
    };
    let from_wan = |packet: &[u8]| {
        let mut frame = from_lan(packet);
        frame[..12].copy_from_slice(&[ROUTER[1], GATEWAY].concat());
        frame
    };
    // A source that needs the default route, an address behind it, one of ours, and one without a route.
    let strange = packets("8.8.4.4", "2001:db8:ffff::4");
    let (host, own) = (packets("192.0.2.10", "2001:db8:1::10"), packets("192.0.2.1", "2001:db8:1::1"));
    let nowhere = packets("7.1.1.1", "2001:db8:7::1");
    net.route("7.0.0.0/8", NextHopId::BLACKHOLE);
    net.route("2001:db8:7::/48", NextHopId::UNREACHABLE);
    for packet in strange.iter().chain(&host).chain(&own).chain(&nowhere) {
        assert_eq!(net.send(0, &from_lan(packet)).len(), 1);
    }
    net.change(LAN, |lan| lan.reverse_path = ReversePath::Loose);
    for packet in own.iter().chain(&nowhere) {
        net.dropped(0, &from_lan(packet), "drop_reverse_path", "reverse_path");
    }
    for packet in strange.iter().chain(&host) {
        assert_eq!(net.send(0, &from_lan(packet)).len(), 1);
    }
    net.change(LAN, |lan| lan.reverse_path = ReversePath::Strict);
    for packet in strange.iter().chain(&own).chain(&nowhere) {
        net.dropped(0, &from_lan(packet), "drop_reverse_path", "reverse_path");
    }
    for packet in &host {
        assert_eq!(net.send(0, &from_lan(packet)).len(), 1);
        // Another interface has no filter.
        assert_eq!(net.send(1, &from_wan(packet)).len(), 1);
    }
    // Of several ways back, one by the interface is enough.
    let group = net.tables.next_hops.add_group(&[(net.gateway, 1), (net.host, 1)]).unwrap();
    net.route("8.8.4.4/32", group);
    assert_eq!(net.send(0, &from_lan(&strange[0])).len(), 1);
    net.bench.finish();
}

#[test]
fn ipv4_options() {
    let mut net = Net::new();
    // Source routes.
    for kind in [131, 137] {
        net.change(WAN, |_| {});
        let route = [kind, 11, 4, 9, 9, 9, 9, 9, 9, 9, 9];
        let out = net.send(0, &from_lan(&options(&route)));
        assert_eq!(out.len(), 1, "source route failed");
        assert_eq!((out[0].0, &out[0].1[34..36]), (0, &[3, 5][..]));
    }
    assert_eq!(net.counter("drop_options"), 2);
    // What nobody here knows, timestamps, security: as they are.
    for option in [&[30, 4, 1, 2][..], &[68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[130, 3, 0], &[0, 0, 0, 0]] {
        let packet = options(option);
        assert_eq!(net.one(0, &from_lan(&packet)).1[14..], one_hop_less(&packet));
    }
    // The length cannot be: too small, or beyond the header. The pointer names the option.
    for (option, pointer) in [
        (&[30, 0, 0, 0][..], 20),
        (&[30, 1, 0, 0], 20),
        (&[1, 1, 30, 3], 22),
        (&[1, 1, 1, 30], 23),
        (&[7, 7, 3, 0, 0, 0, 0], 22),
        (&[7, 8, 6, 0, 0, 0, 0, 0], 22),
    ] {
        let (port, out) = net.one(0, &from_lan(&options(option)));
        assert_eq!((port, &out[34..36], out[38]), (0, &[12, 0][..], pointer), "{option:?}");
    }
    assert_eq!(net.counter("icmp_parameter_problem"), 6);
    net.bench.finish();
}

#[test]
fn routes_are_recorded() {
    let mut net = Net::new();
    let of = |out: &[u8]| {
        let (header, _) = Ipv4Header::from_slice(&out[14..]).unwrap();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(header.time_to_live, 63);
        header.options.as_slice().to_vec()
    };
    // Behind one no operation; room for two addresses, for none, and full.
    let (_, out) = net.one(0, &from_lan(&options(&[1, 7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0])));
    assert_eq!(of(&out), [1, 7, 11, 8, 198, 51, 100, 1, 0, 0, 0, 0]);
    let (_, out) = net.one(0, &from_lan(&options(&[1, 7, 11, 8, 9, 9, 9, 9, 0, 0, 0, 0])));
    assert_eq!(of(&out), [1, 7, 11, 12, 9, 9, 9, 9, 198, 51, 100, 1]);
    let (_, out) = net.one(0, &from_lan(&options(&[1, 7, 11, 12, 9, 9, 9, 9, 8, 8, 8, 8])));
    assert_eq!(of(&out), [1, 7, 11, 12, 9, 9, 9, 9, 8, 8, 8, 8]);
    let mut net = Net::with(&RouterConfig { record_route: false, ..config() });
    let packet = options(&[1, 7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(net.one(0, &from_lan(&packet)).1[14..], one_hop_less(&packet));
    net.bench.finish();
}

/// An IPv6 packet with this extension header in front of its UDP.
fn extended(kind: u8, header: &[u8]) -> Vec<u8> {
    let mut packet = plain6();
    packet[6] = kind;
    let mut header = header.to_vec();
    header[0] = 17;
    packet.splice(40..40, header.iter().copied());
    let len = (packet.len() - 40) as u16;
    packet[4..6].copy_from_slice(&len.to_be_bytes());
    packet
}

#[test]
fn ipv6_extension_headers() {
    let mut net = Net::new();
    // Hop-by-hop: padding; options unknown, with every prescription of what to do (RFC 8200, 4.2): ignored.
    for option in [1, 0x3e, 0x7e, 0xbe, 0xfe] {
        let packet = extended(0, &[0, 0, option, 4, 0, 0, 0, 0]);
        assert_eq!(net.one(0, &from_lan(&packet)).1[14..], one_hop_less(&packet));
    }
    let alert = extended(0, &[0, 0, 5, 2, 0, 0, 1, 0]);
    assert_eq!(net.one(0, &from_lan(&alert)), (TAP, from_lan(&alert)));
    // Routing headers: type 0 with segments left is not forwarded (RFC 5095), everything else is.
    let zero = extended(43, &[0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    net.dropped(0, &from_lan(&zero), "drop_options", "options");
    for (kind, left) in [(0, 0), (2, 1), (4, 1)] {
        let mut packet = zero.clone();
        (packet[42], packet[43]) = (kind, left);
        assert_eq!(net.one(0, &from_lan(&packet)).1[14..], one_hop_less(&packet));
    }
    // Fragments, destination options, authentication, and lengths that lie: not the router's business.
    for (kind, header) in [
        (44, [0, 0, 0, 1, 0, 0, 0, 1]),
        (60, [0, 0, 1, 4, 0, 0, 0, 0]),
        (60, [0, 255, 1, 4, 0, 0, 0, 0]),
        (0, [0, 255, 1, 4, 0, 0, 0, 0]),
        (0, [0, 0, 1, 255, 0, 0, 0, 0]),
        (43, [0, 255, 0, 0, 0, 0, 0, 0]),
        (51, [0, 1, 0, 0, 0, 0, 0, 0]),
    ] {
        let packet = extended(kind, &header);
        assert_eq!(net.one(0, &from_lan(&packet)).1[14..], one_hop_less(&packet));
    }
    let mut net = Net::with(&RouterConfig { router_alert: false, routing_header_0: true, ..config() });
    for packet in [alert, zero] {
        assert_eq!(net.one(0, &from_lan(&packet)).1[14..], one_hop_less(&packet));
    }
    net.bench.finish();
}

#[test]
fn what_is_for_the_host_goes_to_its_port_and_back_unchanged() {
    let mut net = Net::new();
    let group6 = [0x33, 0x33, 0, 0, 0, 1];
    let arp = ethernet(BROADCAST, HOST, None, EtherType::ARP, &[0; 28]);
    let alert = options(&[148, 4, 0, 0]);
    let own_as_broadcast = udp4("192.0.2.10", "192.0.2.1", 18, |_| {});
    let cases = [
        arp.clone(),
        ethernet(ROUTER[0], HOST, None, EtherType::ARP, &[0; 46]),
        frame([1, 0x80, 0xc2, 0, 0, 0xe], HOST, None, b"LLDP"),
        ethernet(
            [1, 0, 0x5e, 0, 0, 5],
            HOST,
            None,
            EtherType::IPV4,
            &udp4("192.0.2.10", "224.0.0.5", 18, |_| {}),
        ),
        ethernet(BROADCAST, HOST, None, EtherType::IPV4, &udp4("0.0.0.0", "255.255.255.255", 18, |_| {})),
        ethernet(BROADCAST, HOST, None, EtherType::IPV4, &own_as_broadcast),
        ethernet(group6, HOST, None, EtherType::IPV6, &udp6("::", "ff02::1", 18, |_| {})),
        from_lan(&udp6("fe80::10", "fe80::1", 18, |_| {})),
        from_lan(&udp4("192.0.2.10", "192.0.2.1", 18, |header| header.time_to_live = 1)),
        from_lan(&udp4("192.0.2.10", "198.51.100.1", 18, |header| header.time_to_live = 0)),
        from_lan(&udp6("2001:db8:1::10", "2001:db8:1::1", 18, |_| {})),
        from_lan(&udp6("fe80::10", "2001:db8:2::1", 18, |header| header.hop_limit = 1)),
        from_lan(&alert),
    ];
    for packet in &cases {
        assert_eq!(net.one(0, packet), (TAP, packet.clone()));
        // Whatever comes from the host leaves as it is.
        assert_eq!(net.one(TAP, packet), (0, packet.clone()));
    }
    assert_eq!(net.counter("punted"), cases.len() as u64);
    assert_eq!(net.counter("from_host"), cases.len() as u64);
    // By a port without one to the host it goes nowhere.
    let mut other = arp;
    other[6..12].copy_from_slice(&GATEWAY);
    net.dropped(1, &other, "drop_punt", "punt_unavailable");
    net.bench.finish();
}

#[test]
fn a_flood_for_the_host_is_limited_and_disturbs_nothing_else() {
    let limits =
        PuntLimits { link: Limit { per_second: 10, burst: 3 }, local: Limit { per_second: 1000, burst: 20 } };
    let mut net = Net::with(&RouterConfig { punt: limits, ..config() });
    let flood = from_lan(&udp4("192.0.2.10", "192.0.2.1", 18, |_| {}));
    let arp = ethernet(BROADCAST, HOST, None, EtherType::ARP, &[0; 28]);
    let transit = from_lan(&plain4());
    for n in 0..1000 {
        net.put(0, &flood);
        if n % 100 == 0 {
            net.put(0, &transit);
        }
    }
    net.run();
    let out = net.take();
    assert_eq!((out[TAP].len(), out[1].len()), (20, 10));
    assert_eq!((net.counter("punt_limited"), net.counter("drop_punt")), (980, 980));
    // The link has a limit of its own.
    for _ in 0..5 {
        net.put(0, &arp);
    }
    net.run();
    assert_eq!(net.take()[TAP].len(), 3);
    // A second brings some of it back.
    net.now += 1_000_000_000;
    for _ in 0..100 {
        net.put(0, &flood);
        net.put(0, &arp);
    }
    net.run();
    assert_eq!(net.take()[TAP].len(), 20 + 3);
    net.bench.finish();
}

#[test]
fn a_mac_of_ours_is_no_licence_on_another_interface() {
    let mut net = Net::new();
    let frame = ethernet(ROUTER[1], mac(9), None, EtherType::IPV4, &plain4());
    net.dropped(0, &frame, "drop_policy", "not_ours");
    net.bench.finish();
}
