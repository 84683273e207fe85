//! A router under test in a small network, and etherparse as the independent referee of what leaves it.
//!
//! ```text
//!  host .10 --- port 0 [192.0.2.1/24, 2001:db8:1::1/64]  R  [198.51.100.1/24, 2001:db8:2::1/64] port 1 --- gateway .254
//!                                                        R  [203.0.113.1/24,  2001:db8:3::1/64] port 2, VLAN 10 --- host .10
//!   the host's TAP of port 0 is port 3                   R  [10.0.0.1/8] port 2, VLAN 20: on link, nobody resolved
//! ```

use super::{Bench, Size};
use etherparse::{EtherType, IpNumber, Ipv4Header, Ipv6Header};
use isoplane::PortId;
use isoplane::blocks::router::{Request, RequestMailbox, Router, RouterConfig, RouterPort, request};
use isoplane::tables::{Interface, InterfaceId, NextHop, NextHopId, Tables, TablesConfig, TablesWriter};
use isoplane::wire::MacAddress;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::{Deref, DerefMut};

/// Addresses of the router's interfaces.
pub(crate) const ROUTER: [[u8; 6]; 4] = [super_mac(0xa0), super_mac(0xa1), super_mac(0xa2), super_mac(0xa3)];
pub(crate) const HOST: [u8; 6] = super_mac(0x10);
pub(crate) const GATEWAY: [u8; 6] = super_mac(0xfe);
pub(crate) const VLAN_HOST: [u8; 6] = super_mac(0x30);

pub(crate) const LAN: u16 = 0;
pub(crate) const WAN: u16 = 1;
pub(crate) const VLAN10: u16 = 2;
pub(crate) const VLAN20: u16 = 3;
/// The port of the host's kernel.
pub(crate) const TAP: usize = 3;

const fn super_mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

pub(crate) fn id(place: u16) -> InterfaceId {
    InterfaceId::new(place).unwrap()
}

pub(crate) fn v4(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

pub(crate) fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

pub(crate) struct Net {
    pub(crate) bench: Bench<Router>,
    pub(crate) tables: TablesWriter,
    pub(crate) requests: RequestMailbox,
    pub(crate) gateway: NextHopId,
    pub(crate) host: NextHopId,
}

impl Deref for Net {
    type Target = Bench<Router>;
    fn deref(&self) -> &Bench<Router> {
        &self.bench
    }
}

impl DerefMut for Net {
    fn deref_mut(&mut self) -> &mut Bench<Router> {
        &mut self.bench
    }
}

pub(crate) fn config() -> RouterConfig {
    let mut config = RouterConfig { seed: 1, ..RouterConfig::new(4) };
    config.ports[0] = RouterPort { punt: Some(PortId(TAP as u8)) };
    config
}

impl Net {
    pub(crate) fn new() -> Self {
        Self::with(&config())
    }

    pub(crate) fn with(config: &RouterConfig) -> Self {
        Self::sized(config, &Size { headroom: 128, ..Size::ports(4) })
    }

    pub(crate) fn sized(config: &RouterConfig, size: &Size) -> Self {
        let sizes = TablesConfig {
            routes4: 4096,
            routes6: 4096,
            next_hops: 4096,
            group_buckets: 4096,
            interfaces: 16,
        };
        let (mut tables, readers) = Tables::create("test", &sizes).unwrap();
        let interface = |port, vlan, place: u16, address4: &str, address6: &str| Interface {
            port: PortId(port),
            vlan,
            mac: MacAddress(ROUTER[usize::from(place)]),
            mtu: 1500,
            up: true,
            forward4: true,
            forward6: true,
            address4: Some(v4(address4)),
            address6: Some(v6(address6)),
            ..Interface::default()
        };
        for (place, interface) in [
            (LAN, interface(0, None, LAN, "192.0.2.1", "2001:db8:1::1")),
            (WAN, interface(1, None, WAN, "198.51.100.1", "2001:db8:2::1")),
            (VLAN10, interface(2, Some(10), VLAN10, "203.0.113.1", "2001:db8:3::1")),
            (VLAN20, interface(2, Some(20), VLAN20, "10.0.0.1", "2001:db8:4::1")),
        ] {
            assert!(tables.interfaces.set(id(place), Some(&interface)));
        }
        let (requests, worker) = request::requests("test", 1024).unwrap();
        let mut add = |place, mac| {
            tables.next_hops.add(NextHop::Forward { interface: id(place), mac: MacAddress(mac) }).unwrap()
        };
        let (host, gateway, vlan_host) = (add(LAN, HOST), add(WAN, GATEWAY), add(VLAN10, VLAN_HOST));
        let router = Router::new(config, readers, worker.open()).unwrap();
        let bench = Bench::new(size, &Router::FIELDS, router);
        let mut net = Self { bench, tables, requests, gateway, host };
        for (prefix, to) in [
            ("192.0.2.10/32", host),
            ("198.51.100.254/32", gateway),
            ("0.0.0.0/0", gateway),
            ("203.0.113.10/32", vlan_host),
        ] {
            net.route(prefix, to);
        }
        for (prefix, to) in [
            ("2001:db8:1::10/128", host),
            ("2001:db8:2::fe/128", gateway),
            ("::/0", gateway),
            ("2001:db8:3::10/128", vlan_host),
        ] {
            net.route(prefix, to);
        }
        for (place, prefixes) in [
            (LAN, ["192.0.2.0/24", "2001:db8:1::/64"]),
            (WAN, ["198.51.100.0/24", "2001:db8:2::/64"]),
            (VLAN10, ["203.0.113.0/24", "2001:db8:3::/64"]),
            (VLAN20, ["10.0.0.0/8", "2001:db8:4::/64"]),
        ] {
            let on_link = net.tables.next_hops.add(NextHop::OnLink { interface: id(place) }).unwrap();
            prefixes.iter().for_each(|prefix| net.route(prefix, on_link));
        }
        for own in ["192.0.2.1/32", "198.51.100.1/32", "203.0.113.1/32", "10.0.0.1/32"] {
            net.route(own, NextHopId::LOCAL);
        }
        for own in ["2001:db8:1::1/128", "2001:db8:2::1/128", "2001:db8:3::1/128", "2001:db8:4::1/128"] {
            net.route(own, NextHopId::LOCAL);
        }
        net
    }

    /// Puts a prefix of either family in.
    pub(crate) fn route(&mut self, prefix: &str, to: NextHopId) {
        match prefix.parse() {
            Ok(prefix) => self.tables.fib4.insert(prefix, to).unwrap(),
            Err(_) => self.tables.fib6.insert(prefix.parse().unwrap(), to).unwrap(),
        };
    }

    /// Adds a next hop and a prefix of it.
    pub(crate) fn next_hop(&mut self, prefix: &str, what: NextHop) -> NextHopId {
        let id = self.tables.next_hops.add(what).unwrap();
        self.route(prefix, id);
        id
    }

    /// Changes an interface.
    pub(crate) fn change(&mut self, place: u16, change: impl FnOnce(&mut Interface)) {
        let mut interface = self.tables.interfaces.reader().get(id(place)).unwrap();
        change(&mut interface);
        assert!(self.tables.interfaces.set(id(place), Some(&interface)));
    }

    /// What was asked for since the last call.
    pub(crate) fn asked(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.requests.receive()).map(|message| message.parse().unwrap()).collect()
    }

    /// Sends a packet in by a port; says what left, by which port.
    pub(crate) fn send(&mut self, port: usize, packet: &[u8]) -> Vec<(usize, Vec<u8>)> {
        let out = self.bench.through(port, packet).into_iter().enumerate();
        out.flat_map(|(port, packets)| packets.into_iter().map(move |packet| (port, packet))).collect()
    }

    /// As `send`, when exactly one packet leaves.
    #[track_caller]
    pub(crate) fn one(&mut self, port: usize, packet: &[u8]) -> (usize, Vec<u8>) {
        let mut out = self.send(port, packet);
        assert_eq!(out.len(), 1, "{out:02x?}, {:?}", self.bench.drops());
        out.remove(0)
    }

    /// As `send`, when nothing leaves; the drop has this reason and this counter alone has grown by one.
    #[track_caller]
    pub(crate) fn dropped(&mut self, port: usize, packet: &[u8], reason: &str, counter: &str) {
        let before = (self.bench.counter(reason), self.bench.counter(counter));
        let out = self.send(port, packet);
        assert_eq!(out, [], "{:?}", self.bench.drops());
        let after = (self.bench.counter(reason), self.bench.counter(counter));
        assert_eq!(after, (before.0 + 1, before.1 + 1), "{reason}, {counter}; {:?}", self.bench.counters());
    }
}

/// A frame: addresses, tag, payload.
pub(crate) fn ethernet(
    to: [u8; 6],
    from: [u8; 6],
    vlan: Option<u16>,
    kind: EtherType,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    if let Some(vlan) = vlan {
        bytes.extend([0x81, 0]);
        bytes.extend(vlan.to_be_bytes());
    }
    bytes.extend(kind.0.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// An IPv4 packet of UDP, made by etherparse, its header changed by `edit` before its checksum is counted.
pub(crate) fn udp4(from: &str, to: &str, payload: usize, edit: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
    let data: Vec<u8> = (0..payload).map(|n| n as u8).collect();
    let (source, destination) = (v4(from), v4(to));
    let mut header =
        Ipv4Header::new(payload as u16 + 8, 64, IpNumber::UDP, source.octets(), destination.octets())
            .unwrap();
    let udp = etherparse::UdpHeader::with_ipv4_checksum(4000, 5000, &header, &data).unwrap();
    edit(&mut header);
    header.header_checksum = header.calc_header_checksum();
    [header.to_bytes().to_vec(), udp.to_bytes().to_vec(), data].concat()
}

/// The same for IPv6.
pub(crate) fn udp6(from: &str, to: &str, payload: usize, edit: impl FnOnce(&mut Ipv6Header)) -> Vec<u8> {
    let data: Vec<u8> = (0..payload).map(|n| n as u8).collect();
    let mut header = Ipv6Header {
        payload_length: payload as u16 + 8,
        next_header: IpNumber::UDP,
        hop_limit: 64,
        source: v6(from).octets(),
        destination: v6(to).octets(),
        ..Ipv6Header::default()
    };
    let udp = etherparse::UdpHeader::with_ipv6_checksum(4000, 5000, &header, &data).unwrap();
    edit(&mut header);
    [header.to_bytes().to_vec(), udp.to_bytes().to_vec(), data].concat()
}

/// From the host on the LAN to its router.
pub(crate) fn from_lan(packet: &[u8]) -> Vec<u8> {
    let kind = if packet[0] >> 4 == 4 { EtherType::IPV4 } else { EtherType::IPV6 };
    ethernet(ROUTER[0], HOST, None, kind, packet)
}

/// What forwarding makes of an IP packet, by etherparse: one hop less, nothing else.
pub(crate) fn one_hop_less(packet: &[u8]) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        let (mut header, payload) = Ipv4Header::from_slice(packet).unwrap();
        header.time_to_live -= 1;
        header.header_checksum = header.calc_header_checksum();
        return [header.to_bytes().to_vec(), payload.to_vec()].concat();
    }
    let (mut header, payload) = Ipv6Header::from_slice(packet).unwrap();
    header.hop_limit -= 1;
    [header.to_bytes().to_vec(), payload.to_vec()].concat()
}

/// An address of either family.
pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
