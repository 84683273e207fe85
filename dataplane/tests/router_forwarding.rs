//! What a router forwards, where to, and what it changes: every packet that leaves is compared byte by byte with
//! what etherparse makes of the one that came in.

mod common;

use common::net::*;
use etherparse::EtherType;
use isoplane::tables::{NextHop, NextHopId};
use isoplane::wire::MacAddress;

fn kind(packet: &[u8]) -> EtherType {
    if packet[0] >> 4 == 4 { EtherType::IPV4 } else { EtherType::IPV6 }
}

#[test]
fn unicast_between_interfaces() {
    let mut net = Net::new();
    let cases = [
        (udp4("192.0.2.10", "8.8.8.8", 18, |_| {}), 1, GATEWAY, WAN, None),
        (udp4("192.0.2.10", "198.51.100.254", 1000, |_| {}), 1, GATEWAY, WAN, None),
        (udp4("192.0.2.10", "203.0.113.10", 1, |_| {}), 2, VLAN_HOST, VLAN10, Some(10)),
        (udp6("2001:db8:1::10", "2001:db8:ffff::1", 18, |_| {}), 1, GATEWAY, WAN, None),
        (udp6("2001:db8:1::10", "2001:db8:3::10", 1400, |_| {}), 2, VLAN_HOST, VLAN10, Some(10)),
    ];
    for (packet, port, to, place, vlan) in cases {
        let out = net.one(0, &from_lan(&packet));
        let from = ROUTER[usize::from(place)];
        assert_eq!(out, (port, ethernet(to, from, vlan, kind(&packet), &one_hop_less(&packet))));
    }
    assert_eq!(net.counter("forwarded4"), 3);
    assert_eq!(net.counter("forwarded6"), 2);
    assert_eq!(net.drops(), Default::default());
    assert_eq!(net.counter("general"), 0, "all of them are plain");
    net.bench.finish();
}

#[test]
fn from_a_vlan_and_between_vlans() {
    let mut net = Net::new();
    let vlan20_host = net.next_hop("10.0.0.9/32", forward(VLAN20, 0x40));
    net.route("2001:db8:4::9/128", vlan20_host);
    for (packet, port, to, place, vlan) in [
        (udp4("203.0.113.10", "192.0.2.10", 40, |_| {}), 0, HOST, LAN, None),
        (udp6("2001:db8:3::10", "2001:db8:1::10", 40, |_| {}), 0, HOST, LAN, None),
        (udp4("203.0.113.10", "10.0.0.9", 40, |_| {}), 2, common::mac(0x40), VLAN20, Some(20)),
        (udp6("2001:db8:3::10", "2001:db8:4::9", 40, |_| {}), 2, common::mac(0x40), VLAN20, Some(20)),
    ] {
        // The priority of the tag is not kept: it is of that link.
        let frame = ethernet(ROUTER[2], VLAN_HOST, Some(0xa00a), kind(&packet), &packet);
        let out = net.one(2, &frame);
        let from = ROUTER[usize::from(place)];
        assert_eq!(out, (port, ethernet(to, from, vlan, kind(&packet), &one_hop_less(&packet))));
    }
    assert_eq!(net.counter("general"), 0, "all of them are plain");
    let packet = udp4("203.0.113.10", "192.0.2.10", 40, |_| {});
    let tagged = |vlan| ethernet(ROUTER[2], VLAN_HOST, Some(vlan), EtherType::IPV4, &packet);
    net.dropped(2, &tagged(30), "drop_no_interface", "no_interface");
    let untagged = ethernet(ROUTER[2], VLAN_HOST, None, EtherType::IPV4, &packet);
    net.dropped(2, &untagged, "drop_no_interface", "no_interface");
    // Priority tags are no VLAN.
    let priority = ethernet(ROUTER[0], HOST, Some(5 << 13), EtherType::IPV4, &packet);
    assert_eq!(net.send(0, &priority).len(), 1);
    net.bench.finish();
}

fn forward(place: u16, mac: u8) -> NextHop {
    NextHop::Forward { interface: id(place), mac: MacAddress(common::mac(mac)) }
}

#[test]
fn routes_and_interfaces_change_under_way() {
    let mut net = Net::new();
    let frame = from_lan(&udp4("192.0.2.10", "8.8.8.8", 18, |_| {}));
    assert_eq!(net.one(0, &frame).0, 1);
    let other = net.next_hop("8.0.0.0/8", forward(VLAN10, 0x44));
    assert_eq!(net.one(0, &frame).0, 2);
    net.tables.next_hops.set(other, forward(WAN, 0x45)).unwrap();
    let (port, out) = net.one(0, &frame);
    assert_eq!((port, &out[..6]), (1, &common::mac(0x45)[..]));
    net.change(WAN, |wan| wan.mac = MacAddress(common::mac(0xbb)));
    assert_eq!(net.one(0, &frame).1[6..12], common::mac(0xbb));
    net.change(WAN, |wan| wan.up = false);
    net.dropped(0, &frame, "drop_no_interface", "no_interface");
    net.change(LAN, |lan| lan.up = false);
    net.dropped(0, &frame, "drop_no_interface", "no_interface");
    net.change(LAN, |lan| (lan.up, lan.forward4) = (true, false));
    net.change(WAN, |wan| wan.up = true);
    net.dropped(0, &frame, "drop_policy", "not_forwarding");
    assert!(net.tables.interfaces.set(id(LAN), None));
    net.dropped(0, &frame, "drop_no_interface", "no_interface");
    net.bench.finish();
}

#[test]
fn a_batch_of_everything_keeps_its_order() {
    let mut net = Net::new();
    let mut expected = vec![Vec::new(); 4];
    for n in 0..60_u16 {
        let edit4 = |header: &mut etherparse::Ipv4Header| header.identification = n;
        let packet = match n % 4 {
            0 => udp4("192.0.2.10", "8.8.8.8", 30, edit4),
            1 => udp4("192.0.2.10", "203.0.113.10", 30, edit4),
            2 => udp6("2001:db8:1::10", "2001:db8:ffff::1", usize::from(n), |_| {}),
            // By the general way, for its option: no operation.
            _ => udp4("192.0.2.10", "8.8.8.8", 30, |header| {
                header.identification = n;
                header.options = [1, 1, 1, 1].into();
                header.total_len += 4;
            }),
        };
        let (port, to, place, vlan) =
            if n % 4 == 1 { (2, VLAN_HOST, VLAN10, Some(10)) } else { (1, GATEWAY, WAN, None) };
        let from = ROUTER[usize::from(place)];
        expected[port].push(vec![ethernet(to, from, vlan, kind(&packet), &one_hop_less(&packet))]);
        net.put(0, &from_lan(&packet));
    }
    net.run();
    assert_eq!(net.take(), expected);
    assert_eq!(net.counter("general"), 15);
    net.bench.finish();
}

#[test]
fn what_a_link_adds_behind_a_packet_is_not_forwarded() {
    let mut net = Net::new();
    let packet = udp4("192.0.2.10", "8.8.8.8", 2, |_| {});
    let mut frame = from_lan(&packet);
    frame.resize(60, 0xee);
    // Up to the shortest frame it is padding, which the next link needs as well.
    let (_, out) = net.one(0, &frame);
    assert_eq!(out.len(), 60);
    assert_eq!(out[14..14 + packet.len()], one_hop_less(&packet));
    frame.resize(200, 0xee);
    let (_, out) = net.one(0, &frame);
    assert_eq!(out.len(), 60);
    let packet = udp6("2001:db8:1::10", "2001:db8:ffff::1", 100, |_| {});
    let mut frame = from_lan(&packet);
    frame.extend([0xee; 100]);
    assert_eq!(net.one(0, &frame).1[14..], one_hop_less(&packet));
    net.bench.finish();
}

#[test]
fn packets_in_several_frames_are_forwarded_whole() {
    let mut net = Net::new();
    net.change(WAN, |wan| wan.mtu = 9000);
    let packet = udp4("192.0.2.10", "8.8.8.8", 4000, |_| {});
    let frame = from_lan(&packet);
    let parts: Vec<Vec<u8>> = frame.chunks(1400).map(<[u8]>::to_vec).collect();
    net.put_frames(0, parts.clone());
    net.run();
    let mut out = net.take();
    assert_eq!(out[1].len(), 1);
    assert_eq!(out[1][0].iter().map(Vec::len).collect::<Vec<_>>(), [1400, 1400, 1242]);
    assert_eq!(out[1].remove(0).concat()[14..], one_hop_less(&packet));
    // Longer than its header says, by a frame and a half.
    let mut parts = parts;
    parts[2].extend([0xee; 100]);
    parts.push(vec![0xee; 900]);
    net.put_frames(0, parts);
    net.run();
    let mut out = net.take();
    assert_eq!(out[1].remove(0).concat()[14..], one_hop_less(&packet));
    // Shorter.
    net.put_frames(0, frame[..2000].chunks(1400).map(<[u8]>::to_vec).collect());
    net.run();
    assert_eq!(net.take().concat(), Vec::<Vec<Vec<u8>>>::new());
    assert_eq!(net.counter("bad_header"), 1);
    assert_eq!(net.drops(), [("drop_malformed".to_owned(), 2)].into());
    net.bench.finish();
}

#[test]
fn flows_of_a_group_stay_together_in_both_directions() {
    let mut net = Net::new();
    let second = net.tables.next_hops.add(forward(VLAN10, 0x50)).unwrap();
    let members = [(net.gateway, 1), (second, 1)];
    let group: NextHopId = net.tables.next_hops.add_group(&members).unwrap();
    net.route("0.0.0.0/0", group);
    net.route("::/0", group);
    let mut ports = [0; 4];
    for n in 0..64_u8 {
        let host = format!("8.8.8.{n}");
        let (there, back) = (udp4("9.9.9.9", &host, 20, |_| {}), udp4(&host, "9.9.9.9", 20, |_| {}));
        let port = net.one(0, &from_lan(&there)).0;
        ports[port] += 1;
        // etherparse's ports are the same in both, so the flow is another: swap them.
        let mut back = back;
        back[20..24].rotate_left(2);
        assert_eq!(net.one(0, &from_lan(&back)).0, port);
        // The general way agrees with the other.
        let options = udp4("9.9.9.9", &host, 20, |header| {
            header.options = [1, 1, 1, 1].into();
            header.total_len += 4;
        });
        assert_eq!(net.one(0, &from_lan(&options)).0, port);
        let host = format!("2001:db8:5::{n:x}");
        let there = udp6("2001:db8:6::1", &host, 20, |header| header.flow_label = 7.try_into().unwrap());
        let mut back = udp6(&host, "2001:db8:6::1", 20, |_| {});
        back[40..44].rotate_left(2);
        let port = net.one(0, &from_lan(&there)).0;
        assert_eq!(net.one(0, &from_lan(&back)).0, port);
        ports[port] += 1;
    }
    assert!(ports[1] > 40 && ports[2] > 40 && ports[1] + ports[2] == 128, "{ports:?}");
    net.bench.finish();
}
