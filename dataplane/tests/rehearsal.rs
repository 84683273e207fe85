//! The rehearsal of a worker's app, over in-process ports: what the app sees, and that nothing of it is
//! left.

mod common;

use common::{BROADCAST, Bench, Size, frame, mac};
use etherparse::{EtherType, NetSlice, SlicedPacket, TransportSlice};
use isoplane::app::{App, PortId, Turn};
use isoplane::blocks::bridge::{
    Bridge, BridgeConfig, BridgePort, FloodLimits, PortVlans, StaticStation, VlanSet,
};
use isoplane::blocks::{self, CrossConnect};
use isoplane::memory::{Batch, Frame};
use isoplane::rehearsal::{FRAMES_PER_TURN, Rehearsal, TURNS};
use isoplane::wire::{MacAddress, VlanId};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Writes down what it sees and does what it is told.
#[derive(Default)]
struct Witness {
    wants: bool,
    seen: Vec<(u8, Vec<u8>)>,
    turns: u32,
    drained: u32,
    rehearsed: u32,
    /// Frames to keep, and those kept.
    keep: usize,
    kept: Vec<Frame>,
    gives_back: bool,
    panics: bool,
}

impl App for Witness {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        assert!(!self.panics, "told to");
        for frame in batch.drain() {
            self.seen.push((from.0, turn.pool().bytes(&frame).to_vec()));
            turn.count(0, 1);
            if self.kept.len() < self.keep {
                self.kept.push(frame);
            } else {
                turn.send(PortId(from.0 ^ 1), frame);
            }
        }
    }
    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.turns += 1;
        turn.gauge(0, u64::from(self.turns));
    }
    fn drain(&mut self, turn: &mut Turn<'_>) {
        self.drained += 1;
        if self.gives_back {
            self.kept.drain(..).for_each(|frame| turn.send(PortId(0), frame));
        }
    }
    fn wants_rehearsal(&self) -> bool {
        self.wants
    }
    fn rehearsed(&mut self) {
        self.rehearsed += 1;
    }
}

fn witness(ports: usize, app: Witness) -> Bench<Witness> {
    Bench::new(&Size::ports(ports), &[isoplane::memory::stats::Field::counter("seen")], app)
}

#[test]
fn an_app_that_does_not_ask_is_left_alone() {
    let mut bench = witness(2, Witness::default());
    assert_eq!(bench.rehearse(), Rehearsal::default());
    assert_eq!((bench.app.seen.len(), bench.app.turns, bench.app.rehearsed), (0, 0, 0));
    bench.finish();
}

#[test]
fn nothing_of_it_leaves_the_worker_or_shows() {
    for ports in [1, 2, 3, 64] {
        let mut bench = witness(ports, Witness { wants: true, ..Witness::default() });
        let new = bench.statistics();
        let did = bench.rehearse();
        let app = &bench.app;
        assert_eq!((did.turns, did.received, did.kept), (TURNS, app.seen.len(), 0));
        assert_eq!((app.turns, app.drained, app.rehearsed), (TURNS, 1, 1), "{ports} ports");
        assert!(app.seen.len() <= TURNS as usize * FRAMES_PER_TURN, "bounded");
        let ports_seen: BTreeSet<u8> = app.seen.iter().map(|(port, _)| *port).collect();
        assert_eq!(ports_seen.len(), ports, "every port is rehearsed");
        assert_eq!(bench.statistics(), new);
        assert!(bench.take().iter().all(Vec::is_empty), "a synthetic packet was sent");

        // Packets and counters of the real ports work as ever.
        bench.app.seen.clear();
        let packet = frame(mac(1), mac(2), None, b"real");
        bench.put(0, &packet);
        bench.run();
        assert_eq!(bench.app.seen, [(0, packet)]);
        assert_eq!(bench.counter("seen"), u64::from(TURNS) + 1, "a gauge of turns, and the packet");
        assert_eq!(bench.counter("busy_turns"), 1);
        bench.finish();
    }
}

/// An independent parser finds nothing wrong with any of the packets.
#[test]
fn the_packets_are_well_formed() {
    let mut bench = witness(3, Witness { wants: true, ..Witness::default() });
    bench.rehearse();
    let mut sources = [const { BTreeSet::new() }; 3];
    let mut kinds = BTreeSet::new();
    let mut lengths = BTreeSet::new();
    for (port, bytes) in &bench.app.seen {
        let packet = SlicedPacket::from_ethernet(bytes).unwrap_or_else(|error| panic!("{error}: {bytes:x?}"));
        let Some(etherparse::LinkSlice::Ethernet2(link)) = &packet.link else { panic!("{packet:?}") };
        let (to, from) = (link.destination(), link.source());
        assert!(from[0] & 0b11 == 0b10, "{from:x?} is not a local station's");
        sources[usize::from(*port)].insert(from);
        lengths.insert(bytes.len());
        let ethertype = packet.payload_ether_type().unwrap_or(link.ether_type());
        kinds.insert((to == BROADCAST, !packet.link_exts.is_empty(), ethertype.0));
        if let Some(NetSlice::Ipv4(ip)) = &packet.net {
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            assert_eq!(header.time_to_live, 1);
            let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("{packet:?}") };
            let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload());
            assert_eq!(Ok(udp.checksum()), sum);
        }
        if let Some(NetSlice::Ipv6(ip)) = &packet.net {
            assert_eq!(ip.header().hop_limit(), 1);
            let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("{packet:?}") };
            let sum = udp.to_header().calc_checksum_ipv6(&ip.header().to_header(), udp.payload());
            assert_eq!(Ok(udp.checksum()), sum);
        }
    }
    assert!(sources.iter().all(|s| s.len() == 1), "one station a port: {sources:x?}");
    let stations: BTreeSet<[u8; 6]> = sources.into_iter().flatten().collect();
    assert_eq!(stations.len(), 3);
    let destinations: BTreeSet<[u8; 6]> =
        bench.app.seen.iter().map(|(_, bytes)| bytes[..6].try_into().unwrap()).collect();
    let unknown: Vec<_> = destinations.difference(&stations).filter(|to| **to != BROADCAST).collect();
    assert!(destinations.is_superset(&stations) && destinations.contains(&BROADCAST));
    assert!(matches!(unknown[..], [to] if to[0] & 0b11 == 0b10), "one unknown station: {unknown:x?}");
    for tagged in [false, true] {
        for broadcast in [false, true] {
            assert!(kinds.contains(&(broadcast, tagged, 0x88b5)), "{kinds:x?}");
        }
    }
    for ethertype in [EtherType::ARP, EtherType::IPV4, EtherType::IPV6] {
        assert!(kinds.iter().any(|(_, _, found)| *found == ethertype.0), "{ethertype:?}");
    }
    assert!(lengths.first() == Some(&60) && lengths.last() == Some(&1518), "{lengths:?}");
    bench.finish();
}

/// A pool of short frames gets packets that fit, and still only whole ones.
#[test]
fn packets_fit_the_frames_of_the_pool() {
    for max_frame in [1, 13, 41, 42, 60, 64, 100] {
        let app = Witness { wants: true, ..Witness::default() };
        let fields = [isoplane::memory::stats::Field::counter("seen")];
        let mut bench = Bench::new(&Size { max_frame, ..Size::ports(2) }, &fields, app);
        bench.rehearse();
        assert_eq!(bench.app.seen.is_empty(), max_frame < 14, "{max_frame}");
        for (_, bytes) in &bench.app.seen {
            assert!(bytes.len() <= max_frame as usize);
            SlicedPacket::from_ethernet(bytes).unwrap_or_else(|error| panic!("{max_frame}: {error}"));
        }
        bench.finish();
    }
}

#[test]
fn what_an_app_holds_back_it_is_asked_for() {
    let mut bench = witness(2, Witness { wants: true, keep: 5, gives_back: true, ..Witness::default() });
    assert_eq!(bench.rehearse().kept, 0);
    assert!(bench.take().iter().all(Vec::is_empty));
    bench.finish();

    let mut bench = witness(2, Witness { wants: true, keep: 5, ..Witness::default() });
    assert_eq!(bench.rehearse().kept, 5, "it is said how many frames an app keeps");
    bench.app.gives_back = true;
    bench.drain();
    bench.turn();
    bench.finish();
}

/// A worker in a thread is started again with the queues that it had.
#[test]
fn ports_and_counters_come_back_when_the_app_panics() {
    let mut bench = witness(2, Witness { wants: true, panics: true, ..Witness::default() });
    let new = bench.statistics();
    let panic = catch_unwind(AssertUnwindSafe(|| bench.rehearse())).unwrap_err();
    assert_eq!(panic.downcast_ref(), Some(&"told to"));
    assert_eq!(bench.statistics(), new);
    bench.app.panics = false;
    let packet = frame(mac(1), mac(2), None, b"real");
    assert_eq!(bench.through(0, &packet), [vec![], vec![packet]]);
    assert_eq!(bench.counter("busy_turns"), 1);
    bench.finish();
}

#[test]
fn a_cross_connect_rehearses_in_both_directions() {
    let mut bench = Bench::new(&Size::ports(2), &[], CrossConnect);
    assert!(bench.rehearse().received > 100);
    assert!(bench.take().iter().all(Vec::is_empty));
    bench.finish();
}

fn vlan(n: u16) -> VlanId {
    VlanId::new(n).unwrap()
}

fn station(n: u8, vlan: Option<VlanId>) -> StaticStation {
    StaticStation { mac: MacAddress(mac(n)), vlan, port: PortId(0) }
}

/// Bridges whose rehearsal takes different ways through them.
fn bridges() -> Vec<(&'static str, BridgeConfig)> {
    let plain = BridgeConfig { seed: Some(7), ..BridgeConfig::new(3) };
    let trunk = |native| PortVlans::Trunk { allowed: VlanSet::from_iter([vlan(1), vlan(2)]), native };
    let vlans = vec![trunk(None), trunk(Some(vlan(2))), PortVlans::Access(vlan(1))];
    let limits = BridgePort { max_stations: 0, ..BridgePort::default() };
    let scarce = FloodLimits { copies_per_second: 1, burst: 10, copies_per_turn: 10, reserve: 0 };
    vec![
        ("statics", BridgeConfig { stations: vec![station(9, None)], ..plain.clone() }),
        ("one table line", BridgeConfig { capacity: 8, ..plain.clone() }),
        ("station limit", BridgeConfig { ports: vec![limits; 3], ..plain.clone() }),
        ("scarce flooding", BridgeConfig { flood: scarce, ..plain.clone() }),
        (
            "vlans",
            BridgeConfig { vlans: Some(vlans), stations: vec![station(9, Some(vlan(1)))], ..plain.clone() },
        ),
        ("plain", plain),
    ]
}

/// After its rehearsal a bridge is in every respect that shows like one that was just made.
#[test]
fn a_rehearsed_bridge_is_as_new() {
    for (name, config) in bridges() {
        let new = |now: u64| {
            let mut bench =
                Bench::new(&Size::ports(3), &Bridge::FIELDS, Bridge::new(&config).expect("a bridge"));
            bench.now = now;
            bench
        };
        let (mut fresh, mut rehearsed) = (new(5_000_000), new(5_000_000));
        let did = rehearsed.rehearse();
        assert!(did.received > 100 && did.kept == 0, "{name}: {did:?}");
        assert_eq!(rehearsed.statistics(), fresh.statistics(), "{name}");
        let stations = |bench: &Bench<Bridge>| {
            let mut all: Vec<_> = bench.app.fdb().iter(bench.now).map(|s| format!("{s:?}")).collect();
            all.sort();
            (bench.app.fdb().len(), all)
        };
        assert_eq!(stations(&rehearsed), stations(&fresh), "{name}: stations");
        assert_eq!(stations(&rehearsed).0, config.stations.len(), "{name}: only the static ones");

        // The same packets meet the same fate, in the same order, and are counted alike. Bursts of
        // flooding find what budget there is; time passes in between.
        for round in 0..20_u8 {
            for bench in [&mut fresh, &mut rehearsed] {
                for (port, n) in [(0, 1), (1, 2), (2, 3), (1, 1)] {
                    let tci = (round % 3 == 0).then_some(u16::from(round % 2) + 1);
                    for to in [BROADCAST, mac(n + 1), mac(round), mac(9)] {
                        bench.put(port, &frame(to, mac(n + round % 4), tci, &[round; 46]));
                    }
                }
                bench.run();
                bench.wait_ms(3);
            }
            assert_eq!(rehearsed.take(), fresh.take(), "{name}: round {round}");
            assert_eq!(rehearsed.statistics(), fresh.statistics(), "{name}: round {round}");
            assert_eq!(stations(&rehearsed), stations(&fresh), "{name}: round {round}");
        }
        fresh.finish();
        rehearsed.finish();
    }
}

/// The first packet to a station that nobody has seen goes everywhere, and is the first one counted.
#[test]
fn the_first_real_packet_is_the_first() {
    let config = BridgeConfig { ageing: Duration::from_secs(1), ..BridgeConfig::new(3) };
    let mut bench = Bench::new(&Size::ports(3), &Bridge::FIELDS, Bridge::new(&config).unwrap());
    bench.rehearse();
    assert!(bench.app.fdb().is_empty());
    let packet = frame(mac(1), mac(2), None, b"first");
    assert_eq!(bench.through(0, &packet), [vec![], vec![packet.clone()], vec![packet]]);
    assert_eq!((bench.counter("learned"), bench.counter("flooded"), bench.counter("copies")), (1, 1, 1));
    assert_eq!((bench.counter("unicast"), bench.counter("stations")), (0, 1));
    bench.finish();
}

/// A decorator decides for the app that it decorates.
#[test]
fn a_decorator_forwards_the_wish() {
    struct Around(Bridge);
    impl App for Around {
        fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
            self.0.packets(turn, from, batch);
        }
        fn wants_rehearsal(&self) -> bool {
            self.0.wants_rehearsal()
        }
        fn rehearsed(&mut self) {
            self.0.rehearsed();
        }
    }
    let bridge = blocks::Bridge::new(&BridgeConfig::new(2)).unwrap();
    let mut bench = Bench::new(&Size::ports(2), &Bridge::FIELDS, Around(bridge));
    assert_eq!(bench.rehearse().turns, TURNS);
    assert!(bench.app.0.fdb().is_empty());
    bench.finish();
}
