//! Random packets: whatever they hold, no frame is lost or doubled and each packet has one fate; and well-formed
//! ones meet the fate that a small independent forwarder says, which knows only etherparse and a list of prefixes.

mod common;

use common::net::*;
use common::{BROADCAST, mac};
use etherparse::{EtherType, Ipv4Header, Ipv6Header};
use ipnet::IpNet;
use isoplane::blocks::router::{IcmpLimits, Limit, RouterConfig};
use isoplane::tables::interface::ReversePath;
use isoplane::tables::{NextHop, NextHopId};
use isoplane::wire::MacAddress;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use std::net::IpAddr;

/// What the model knows of a next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum To {
    Neighbour(usize, [u8; 6], [u8; 6], Option<u16>),
    Host,
    Refuse([u8; 2]),
    Silence,
    Wait,
}

const TO_HOST: To = To::Neighbour(0, HOST, ROUTER[0], None);
const TO_GATEWAY: To = To::Neighbour(1, GATEWAY, ROUTER[1], None);
const TO_VLAN: To = To::Neighbour(2, VLAN_HOST, ROUTER[2], Some(10));

/// The prefixes of the network under test and of `net`.
fn prefixes() -> Vec<(IpNet, To)> {
    [
        ("0.0.0.0/0", TO_GATEWAY),
        ("192.0.2.0/24", To::Wait),
        ("192.0.2.10/32", TO_HOST),
        ("198.51.100.254/32", TO_GATEWAY),
        ("203.0.113.10/32", TO_VLAN),
        ("10.0.0.0/8", To::Wait),
        ("192.0.2.1/32", To::Host),
        ("10.0.0.1/32", To::Host),
        ("21.0.0.0/8", To::Refuse([3, 1])),
        ("21.1.0.0/16", To::Silence),
        ("21.1.1.0/24", TO_VLAN),
        ("22.0.0.0/8", To::Refuse([3, 13])),
        ("20.0.0.0/8", To::Refuse([3, 0])),
        ("::/0", TO_GATEWAY),
        ("2001:db8:1::10/128", TO_HOST),
        ("2001:db8:3::10/128", TO_VLAN),
        ("2001:db8:1::1/128", To::Host),
        ("2001:db8:4::/64", To::Wait),
        ("2001:db8:21::/48", To::Refuse([1, 6])),
        ("2001:db8:22::/48", To::Refuse([1, 1])),
        ("2001:db8:23::/48", To::Silence),
    ]
    .map(|(prefix, to)| (prefix.parse().unwrap(), to))
    .to_vec()
}

fn net(config: &RouterConfig) -> Net {
    let mut net = Net::with(config);
    for (prefix, to) in [
        ("21.0.0.0/8", NextHopId::UNREACHABLE),
        ("21.1.0.0/16", NextHopId::BLACKHOLE),
        ("22.0.0.0/8", NextHopId::PROHIBIT),
        ("20.0.0.0/8", NextHopId::NONE),
        ("2001:db8:21::/48", NextHopId::UNREACHABLE),
        ("2001:db8:22::/48", NextHopId::PROHIBIT),
        ("2001:db8:23::/48", NextHopId::BLACKHOLE),
    ] {
        net.route(prefix, to);
    }
    net.next_hop("21.1.1.0/24", NextHop::Forward { interface: id(VLAN10), mac: MacAddress(VLAN_HOST) });
    net.change(VLAN10, |interface| interface.mtu = 1400);
    net
}

fn look_up(prefixes: &[(IpNet, To)], address: IpAddr) -> To {
    let found = prefixes.iter().filter(|(prefix, _)| prefix.contains(&address));
    found.max_by_key(|(prefix, _)| prefix.prefix_len()).unwrap().1
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    Sent(usize, Vec<u8>),
    /// An error message to the host: type and code.
    Message([u8; 2]),
    /// Some fragments by VLAN 10.
    Fragments,
    Nothing,
}

/// The model.
fn expected(prefixes: &[(IpNet, To)], packet: &[u8]) -> Fate {
    let (source, destination, hops, total, whole): (IpAddr, IpAddr, u8, usize, bool) = if packet[0] >> 4 == 4
    {
        let (header, _) = Ipv4Header::from_slice(packet).unwrap();
        let total = usize::from(header.total_len);
        let whole = header.dont_fragment;
        (header.source.into(), header.destination.into(), header.time_to_live, total, whole)
    } else {
        let (header, _) = Ipv6Header::from_slice(packet).unwrap();
        let total = usize::from(header.payload_length) + 40;
        (header.source.into(), header.destination.into(), header.hop_limit, total, true)
    };
    let four = source.is_ipv4();
    // A source without an answer waits for one: its messages are not seen.
    let message = |message| {
        if look_up(prefixes, source) == TO_HOST { Fate::Message(message) } else { Fate::Nothing }
    };
    let to = look_up(prefixes, destination);
    if to == To::Host {
        return Fate::Sent(TAP, from_lan(packet));
    }
    if hops <= 1 {
        return message(if four { [11, 0] } else { [3, 0] });
    }
    match to {
        To::Refuse(what) => message(what),
        To::Silence | To::Wait | To::Host => Fate::Nothing,
        To::Neighbour(port, to, from, vlan) => {
            let mtu = if vlan.is_some() { 1400 } else { 1500 };
            if total > mtu {
                return if whole { message(if four { [3, 4] } else { [2, 0] }) } else { Fate::Fragments };
            }
            let kind = if four { EtherType::IPV4 } else { EtherType::IPV6 };
            Fate::Sent(port, ethernet(to, from, vlan, kind, &one_hop_less(packet)))
        }
    }
}

fn seen(out: &[(usize, Vec<u8>)]) -> Fate {
    match out {
        [] => Fate::Nothing,
        [(0, frame)] if frame[6..12] == ROUTER[0] && frame[12] == 8 && frame[23] == 1 => {
            Fate::Message([frame[34], frame[35]])
        }
        [(0, frame)] if frame[6..12] == ROUTER[0] && frame[12] == 0x86 && frame[20] == 58 => {
            Fate::Message([frame[54], frame[55]])
        }
        [(port, frame)] => Fate::Sent(*port, frame.clone()),
        [(2, first), ..] if first[24] & 0x20 != 0 => Fate::Fragments,
        other => panic!("{other:?}"),
    }
}

/// Packets with a valid header.
fn packets() -> impl Strategy<Value = Vec<u8>> {
    let four = (
        select(vec!["192.0.2.10", "192.0.2.77"]),
        select(vec![
            "8.8.8.8",
            "192.0.2.1",
            "10.0.0.1",
            "10.9.9.9",
            "203.0.113.10",
            "20.1.1.1",
            "21.2.2.2",
            "21.1.2.3",
            "21.1.1.9",
            "22.0.0.1",
            "198.51.100.254",
            "192.0.2.10",
        ]),
        select(vec![0_u8, 1, 2, 64, 255]),
        0_usize..1460,
        any::<bool>(),
        any::<u8>(),
    )
        .prop_map(|(from, to, hops, len, whole, class)| {
            udp4(from, to, len, |header| {
                header.time_to_live = hops;
                header.dont_fragment = whole;
                header.dscp = (class >> 2).try_into().unwrap();
                header.ecn = (class & 3).try_into().unwrap();
                header.identification = u16::from(class) << 5;
            })
        });
    let six = (
        select(vec!["2001:db8:1::10", "2001:db8:1::77"]),
        select(vec![
            "2001:db8:ffff::1",
            "2001:db8:1::1",
            "2001:db8:3::10",
            "2001:db8:4::9",
            "2001:db8:21::1",
            "2001:db8:22::1",
            "2001:db8:23::1",
            "2001:db8:1::10",
        ]),
        select(vec![0_u8, 1, 2, 64, 255]),
        0_usize..1452,
        any::<u8>(),
    )
        .prop_map(|(from, to, hops, len, class)| {
            udp6(from, to, len, |header| {
                header.hop_limit = hops;
                header.traffic_class = class;
                header.flow_label = u32::from(class).try_into().unwrap();
            })
        });
    prop_oneof![four, six]
}

/// A packet in its frame, with something wrong or nothing.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let addresses = select(vec![ROUTER[0], ROUTER[2], BROADCAST, mac(1), [0x33, 0x33, 0, 0, 0, 1]]);
    let flips = prop::collection::vec((any::<Index>(), any::<u8>()), 0..4);
    let tag = select(vec![None, None, Some(10), Some(20), Some(0), Some(4095)]);
    (packets(), addresses, tag, flips, any::<Index>(), any::<bool>(), 0_usize..100, any::<bool>()).prop_map(
        |(packet, to, tag, flips, cut, cuts, more, count)| {
            let kind = if packet[0] >> 4 == 4 { EtherType::IPV4 } else { EtherType::IPV6 };
            let mut bytes = ethernet(to, HOST, tag, kind, &packet);
            for (at, value) in flips {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if cuts {
                bytes.truncate(cut.index(bytes.len()) + 1);
            }
            bytes.resize((bytes.len() + more).min(1522), 0xee);
            let ip = if tag.is_some() { 18 } else { 14 };
            // Half of them with a checksum that is right after all.
            if count && bytes.len() >= ip + 20 && bytes[ip] >> 4 == 4 {
                let len = (usize::from(bytes[ip] & 15) * 4).clamp(20, bytes.len() - ip) & !1;
                bytes[ip + 10..ip + 12].fill(0);
                let words =
                    bytes[ip..ip + len].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
                let sum: u32 = words.sum();
                let sum = (sum & 0xffff) + (sum >> 16);
                let sum = (sum & 0xffff) + (sum >> 16);
                bytes[ip + 10..ip + 12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn packets_meet_the_fate_of_the_model(packets in prop::collection::vec(packets(), 1..40)) {
        let limit = Limit { per_second: 1_000_000, burst: 10_000 };
        let mut net = net(&RouterConfig { icmp: IcmpLimits { total: limit, host: limit }, ..config() });
        let prefixes = prefixes();
        for packet in &packets {
            let out = net.send(0, &from_lan(packet));
            prop_assert_eq!(seen(&out), expected(&prefixes, packet), "{:02x?}", packet);
        }
        net.drain();
        net.bench.finish();
    }

    #[test]
    fn every_packet_has_one_fate(
        packets in prop::collection::vec((0_usize..4, frames()), 1..200),
        filter in select(vec![ReversePath::Off, ReversePath::Loose, ReversePath::Strict]),
    ) {
        let never = Limit { per_second: 0, burst: 0 };
        let mut net = net(&RouterConfig { icmp: IcmpLimits { total: never, host: never }, ..config() });
        net.change(LAN, |lan| lan.reverse_path = filter);
        net.change(VLAN10, |vlan| (vlan.reverse_path, vlan.redirects) = (filter, true));
        for (port, packet) in &packets {
            net.put(*port, packet);
        }
        net.run();
        let counters = net.counters();
        let sum = |names: &[&str]| names.iter().map(|name| counters[*name]).sum::<u64>();
        let dropped: u64 = net.drops().values().sum();
        let passed = sum(&["forwarded4", "forwarded6", "punted", "from_host"]);
        let held = sum(&["waiting_frames"]);
        prop_assert_eq!(passed + dropped + held, packets.len() as u64, "{:?}", counters);
        let left: usize = net.take().iter().map(Vec::len).sum();
        prop_assert_eq!(left as u64, passed + sum(&["fragments"]) - sum(&["fragmented"]), "{:?}", counters);
        net.drain();
        net.bench.finish();
    }

    #[test]
    fn packets_in_any_number_of_frames_lose_none(
        packets in prop::collection::vec((0_usize..4, frames(), 1_usize..70), 1..60),
    ) {
        let mut net = net(&config());
        for (port, packet, parts) in &packets {
            let len = packet.len().div_ceil(*parts);
            net.put_frames(*port, packet.chunks(len).take(64).map(<[u8]>::to_vec).collect());
        }
        net.run();
        net.wait_ms(10);
        // `take` refuses a packet without its end.
        let _ = net.take();
        net.wait_ms(4000);
        net.drain();
        net.bench.finish();
    }
}
