//! A router in a strict worker: everything that it does with packets, and that it follows what the program
//! changes, without one breach.

use crate::peer::{Peer, pool, wait_for};
use crate::strict::{assert_no_breach, cpus, enforced};
use isoplane::blocks::Router;
use isoplane::blocks::router::{Request, RouterConfig, RouterPort, request};
use isoplane::tables::{Interface, InterfaceId, NextHop, NextHopId, Tables, TablesConfig};
use isoplane::wire::checksum::checksum;
use isoplane::wire::ethernet::{EtherType, MacAddress};
use isoplane::wire::{ipv4, ipv6};
use isoplane::{Dataplane, PortId, Worker, WorkerIsolation};
use std::net::IpAddr;

const fn mac(n: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, n])
}

/// A UDP packet of `len` bytes from the host on port 0 to `to`, in its frame.
fn packet(to: &str, hops: u8, len: u16, whole: bool) -> Vec<u8> {
    let mut bytes = [mac(0xa0).0, mac(0x10).0].concat();
    match to.parse().expect("an address") {
        IpAddr::V4(destination) => {
            bytes.extend(EtherType::IPV4.0.to_be_bytes());
            bytes.resize(14 + usize::from(len), 0);
            let repr = ipv4::Repr {
                tos: 0,
                identification: 7,
                dont_fragment: whole,
                ttl: hops,
                protocol: ipv4::protocol::UDP,
                source: [192, 0, 2, 10].into(),
                destination,
                payload_len: len - 20,
            };
            repr.emit(&mut bytes[14..]).expect("room for a header");
        }
        IpAddr::V6(destination) => {
            bytes.extend(EtherType::IPV6.0.to_be_bytes());
            bytes.resize(14 + usize::from(len), 0);
            let repr = ipv6::Repr {
                traffic_class: 0,
                flow_label: 0,
                payload_len: len - 40,
                next_header: ipv4::protocol::UDP,
                hop_limit: hops,
                source: "2001:db8:1::10".parse().expect("an address"),
                destination,
            };
            repr.emit(&mut bytes[14..]).expect("room for a header");
        }
    }
    bytes
}

/// With a record route option.
fn recording(to: &str) -> Vec<u8> {
    let mut bytes = packet(to, 64, 60, true);
    bytes.splice(34..34, [7, 7, 4, 0, 0, 0, 0, 0]);
    bytes[14] = 0x47;
    bytes[16..18].copy_from_slice(&68_u16.to_be_bytes());
    bytes[24..26].fill(0);
    let sum = checksum(&bytes[14..42]);
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    bytes
}

pub(crate) fn strict_router() {
    let Some((cpu, _)) = cpus() else { return };
    let pool = pool("router", 4096);
    let sizes =
        TablesConfig { routes4: 1024, routes6: 1024, next_hops: 64, group_buckets: 256, interfaces: 4 };
    let (mut tables, readers) = Tables::create("router", &sizes).expect("tables");
    let [lan, wan] = [0, 1].map(|place| InterfaceId::new(place).expect("a place"));
    let mut interfaces = [(lan, "192.0.2.1", "2001:db8:1::1"), (wan, "198.51.100.1", "2001:db8:2::1")].map(
        |(id, four, six)| {
            let interface = Interface {
                port: PortId(id.get() as u8),
                mac: mac(0xa0 + id.get() as u8),
                mtu: 1280,
                up: true,
                forward4: true,
                forward6: true,
                address4: four.parse().ok(),
                address6: six.parse().ok(),
                ..Interface::default()
            };
            assert!(tables.interfaces.set(id, Some(&interface)));
            interface
        },
    );
    let mut add = |what| tables.next_hops.add(what).expect("a next hop");
    let host = add(NextHop::Forward { interface: lan, mac: mac(0x10) });
    let gateways = [0x20, 0x21].map(|n| add(NextHop::Forward { interface: wan, mac: mac(n) }));
    let on_link = add(NextHop::OnLink { interface: wan });
    let group = tables.next_hops.add_group(&gateways.map(|id| (id, 1))).expect("a group");
    let four = [("192.0.2.10/32", host), ("0.0.0.0/0", gateways[0]), ("9.0.0.0/8", group)];
    let four = [&four[..], &[("198.51.100.0/24", on_link), ("192.0.2.1/32", NextHopId::LOCAL)]].concat();
    for (prefix, to) in [&four[..], &[("20.0.0.0/8", NextHopId::NONE)]].concat() {
        tables.fib4.insert(prefix.parse().expect("a prefix"), to).expect("room");
    }
    for (prefix, to) in [("2001:db8:1::10/128", host), ("::/0", gateways[0]), ("2001:db8:2::/64", on_link)] {
        tables.fib6.insert(prefix.parse().expect("a prefix"), to).expect("room");
    }
    let (mut requests, end) = request::requests("router", 64).expect("mailbox");
    let mut config = RouterConfig::new(3);
    config.ports[0] = RouterPort { punt: Some(PortId(2)) };

    let mut plane = Dataplane::builder("router");
    let mut worker = Worker::new("w0").cpu(cpu).counters(&Router::FIELDS);
    let mut peers = Vec::new();
    for n in 0..3 {
        let (port, peer) = Peer::new(&pool, &format!("port{n}"));
        worker = worker.queue(plane.port(port), 0);
        peers.push(peer);
    }
    plane.isolation(WorkerIsolation::default());
    plane.worker(worker, move |_| Router::new(&config, readers.clone(), end.open()).expect("router"));
    let running = plane.launch().expect("launch");
    let statistics = running.statistics();

    let packets = [
        packet("8.8.8.8", 64, 60, true),
        packet("9.9.9.9", 64, 60, true),
        packet("2001:db8:ffff::1", 64, 80, true),
        recording("8.8.8.8"),
        packet("8.8.8.8", 1, 60, true),
        packet("2001:db8:ffff::1", 1, 80, true),
        packet("20.1.1.1", 64, 60, true),
        packet("8.8.8.8", 64, 1400, true),
        packet("8.8.8.8", 64, 1400, false),
        packet("2001:db8:ffff::1", 64, 1400, true),
        packet("192.0.2.1", 64, 60, true),
        packet("198.51.100.77", 64, 60, true),
        packet("2001:db8:2::77", 64, 80, true),
        packet("127.0.0.1", 64, 60, true),
    ];
    for round in 0..50_u8 {
        for frame in &packets {
            wait_for("room for a packet", || peers[0].send_bytes(frame));
        }
        let punted = [mac(0x10).0, mac(0xa0).0].concat();
        wait_for("room for a packet of the host", || {
            peers[2].send_bytes(&[&punted[..], &[8, 6], &[0; 46]].concat())
        });
        // The program changes what the worker reads.
        interfaces[1].redirects = round % 2 == 0;
        assert!(tables.interfaces.set(wan, Some(&interfaces[1])));
        let to = gateways[usize::from(round % 2)];
        tables.fib4.insert("8.0.0.0/8".parse().expect("a prefix"), to).expect("room");
        // And answers its requests.
        while let Some(request) = requests.receive() {
            if let Some(Request::Neighbour { interface, address }) = request.parse() {
                let id = tables.next_hops.add(NextHop::Forward { interface, mac: mac(0x77) }).expect("room");
                match address {
                    IpAddr::V4(address) => drop(tables.fib4.insert(address.into(), id).expect("room")),
                    IpAddr::V6(address) => drop(tables.fib6.insert(address.into(), id).expect("room")),
                }
            }
        }
        let arrived = u64::from(round + 1) * (packets.len() as u64 + 1);
        wait_for("the packets to arrive", || {
            for peer in &mut peers {
                peer.take();
            }
            statistics.total("rx_frames") == arrived
        });
    }
    for (name, least) in [
        ("forwarded4", 150),
        ("forwarded6", 50),
        ("held", 2),
        ("icmp_time_exceeded", 5),
        ("icmp_unreachable", 2),
        ("icmp_too_big", 5),
        ("fragmented", 50),
        ("punted", 50),
        ("from_host", 50),
        ("martian", 50),
        ("requests", 2),
    ] {
        assert!(statistics.total(name) >= least, "{name}: {}", statistics.total(name));
    }
    if enforced(&running) {
        assert_no_breach(&running);
    }
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    peers.into_iter().for_each(|mut peer| peer.close());
    assert_eq!(pool.in_depot(), pool.chunks(), "frames are missing: {report:?}, {:?}", pool.census());
}
