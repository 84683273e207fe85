//! The learning bridge, through turns over in-process ports: learning, ageing, flooding, limits,
//! faults.

mod common;

use common::{BROADCAST, Bench, Size, frame, mac};
use isoplane::app::PortId;
use isoplane::blocks::bridge::{
    Bridge, BridgeConfig, BridgeError, BridgePort, FloodLimits, StaticStation, WhenFull,
};
use isoplane::wire::MacAddress;
use proptest::prelude::*;
use std::time::Duration;

/// A bench with a bridge whose hash is the same in every run.
fn bridge(config: &BridgeConfig) -> Bench<Bridge> {
    bridge_of(&Size::ports(config.ports.len()), config)
}

fn bridge_of(size: &Size, config: &BridgeConfig) -> Bench<Bridge> {
    let config = BridgeConfig { seed: config.seed.or(Some(7)), ..config.clone() };
    Bench::new(size, &Bridge::FIELDS, Bridge::new(&config).unwrap())
}

/// Which ports something left by.
fn ports(out: &[Vec<Vec<u8>>]) -> Vec<usize> {
    out.iter().enumerate().flat_map(|(port, packets)| packets.iter().map(move |_| port)).collect()
}

#[test]
fn floods_until_it_has_learned() {
    let mut bench = bridge(&BridgeConfig::new(4));
    let request = frame(mac(2), mac(1), None, b"who are you");
    let out = bench.through(0, &request);
    assert_eq!(ports(&out), [1, 2, 3]);
    assert!(out[1..].iter().all(|packets| *packets == [request.clone()]));
    let answer = frame(mac(1), mac(2), None, b"two");
    assert_eq!(bench.through(3, &answer), [vec![answer], vec![], vec![], vec![]]);
    assert_eq!(ports(&bench.through(0, &request)), [3]);
    assert_eq!(ports(&bench.through(0, &frame(BROADCAST, mac(1), None, b""))), [1, 2, 3]);
    assert_eq!(ports(&bench.through(0, &frame([1, 0, 0x5e, 0, 0, 1], mac(1), None, b""))), [1, 2, 3]);
    assert!(bench.drops().is_empty());
    for (name, value) in [("learned", 2), ("stations", 2), ("unicast", 2), ("flooded", 3), ("copies", 6)] {
        assert_eq!(bench.counter(name), value, "{name}");
    }
    bench.finish();
}

#[test]
fn never_sends_back_where_it_came_from() {
    let mut bench = bridge(&BridgeConfig::new(2));
    bench.through(0, &frame(mac(9), mac(1), None, b""));
    assert!(ports(&bench.through(0, &frame(mac(1), mac(2), None, b""))).is_empty());
    assert_eq!(bench.counter("drop_policy"), 1);
    bench.finish();
}

#[test]
fn follows_a_station_that_moves() {
    let mut bench = bridge(&BridgeConfig::new(3));
    bench.through(0, &frame(mac(9), mac(1), None, b""));
    let to_it = frame(mac(1), mac(3), None, b"");
    assert_eq!(ports(&bench.through(2, &to_it)), [0]);
    bench.through(1, &frame(mac(9), mac(1), None, b""));
    assert_eq!(ports(&bench.through(2, &to_it)), [1]);
    assert_eq!(bench.counter("moved"), 1);
    assert_eq!(bench.counter("stations"), 2);
    bench.finish();
}

#[test]
fn a_move_within_a_batch_counts_for_the_packets_after_it() {
    let mut bench = bridge(&BridgeConfig::new(3));
    bench.through(0, &frame(mac(9), mac(1), None, b""));
    // From port 2, in one batch: to station 1, then from station 1 itself, then to it again.
    let to_it = frame(mac(1), mac(3), None, b"");
    for packet in [&to_it, &frame(mac(9), mac(1), None, b""), &to_it] {
        bench.put(2, packet);
    }
    bench.turn();
    let out = bench.take();
    assert_eq!([out[0].len(), out[1].len(), out[2].len()], [2, 1, 0]);
    assert_eq!(bench.counter("drop_policy"), 1, "the last one would go back");
    bench.finish();
}

#[test]
fn forgets_the_silent_on_time() {
    let mut bench = bridge(&BridgeConfig { ageing: Duration::from_secs(10), ..BridgeConfig::new(3) });
    bench.through(0, &frame(mac(9), mac(1), None, b""));
    let to_it = frame(mac(1), mac(3), None, b"");
    bench.now += 10_000_000_000;
    assert_eq!(ports(&bench.through(2, &to_it)), [0], "10 s: still known");
    bench.now += 1_000_000;
    assert_eq!(ports(&bench.through(2, &to_it)), [0, 1], "10.001 s: forgotten, whether swept or not");
    let swept = |b: &Bench<Bridge>| (b.counter("aged"), b.counter("stations"));
    bench.wait_ms(4096);
    assert_eq!(swept(&bench), (1, 1), "station 3 is heard from lately");
    bench.wait_ms(10_001);
    bench.wait_ms(4096);
    assert_eq!(swept(&bench), (2, 0));
    assert_eq!(bench.app.fdb().iter(bench.now).count(), 0);
    bench.finish();
}

#[test]
fn a_station_that_returns_after_its_time_is_learned_anew() {
    let mut bench = bridge(&BridgeConfig { ageing: Duration::from_secs(10), ..BridgeConfig::new(2) });
    for _ in 0..3 {
        bench.through(0, &frame(mac(9), mac(1), None, b""));
        // No turn in between, so no sweep has passed.
        bench.now += 10_001_000_000;
    }
    assert_eq!((bench.counter("learned"), bench.counter("aged")), (3, 2));
    assert_eq!(bench.counter("stations"), 1);
    bench.finish();
}

#[test]
fn traffic_keeps_a_station_known() {
    let mut bench = bridge(&BridgeConfig { ageing: Duration::from_secs(10), ..BridgeConfig::new(3) });
    for _ in 0..10 {
        bench.through(0, &frame(mac(9), mac(1), None, b""));
        bench.wait_ms(9_000);
    }
    assert_eq!(ports(&bench.through(2, &frame(mac(1), mac(3), None, b""))), [0]);
    assert_eq!(bench.counter("learned"), 2);
    bench.finish();
}

#[test]
fn a_link_that_goes_down_takes_its_stations_along() {
    let mut bench = bridge(&BridgeConfig {
        stations: vec![StaticStation { mac: MacAddress(mac(8)), vlan: None, port: PortId(0) }],
        ..BridgeConfig::new(3)
    });
    bench.through(0, &frame(mac(9), mac(1), None, b""));
    bench.through(1, &frame(mac(9), mac(2), None, b""));
    bench.app.set_link(PortId(0), false);
    assert_eq!(ports(&bench.through(2, &frame(mac(1), mac(3), None, b""))), [1], "flooded, but not there");
    assert_eq!(ports(&bench.through(2, &frame(mac(2), mac(3), None, b""))), [1]);
    assert!(ports(&bench.through(2, &frame(mac(8), mac(3), None, b""))).is_empty());
    assert_eq!(bench.counter("drop_no_port"), 1, "the static station's port is down");
    bench.through(0, &frame(mac(3), mac(1), None, b"late"));
    assert!(bench.app.fdb().station(None, MacAddress(mac(1)), bench.now).is_none());
    bench.app.set_link(PortId(0), true);
    assert_eq!(ports(&bench.through(2, &frame(mac(1), mac(3), None, b""))), [0, 1]);
    assert_eq!(bench.counter("flushed"), 1);
    bench.app.set_link(PortId(200), false);
    bench.app.flush_port(PortId(200));
    bench.finish();
}

#[test]
fn a_flushed_port_learns_again() {
    let mut bench = bridge(&BridgeConfig { capacity: 64, ..BridgeConfig::new(2) });
    for round in 1..=100 {
        for n in 1..=40 {
            bench.put(0, &frame(mac(200), mac(n), None, b""));
        }
        bench.run();
        assert_eq!(bench.app.fdb().len(), 40, "round {round}");
        bench.app.flush_port(PortId(0));
        assert!(bench.app.fdb().is_empty());
        assert_eq!(bench.app.fdb().iter(bench.now).count(), 0);
    }
    bench.turn();
    assert_eq!(bench.counter("flushed"), 4000);
    assert_eq!(bench.counter("aged"), 0);
    bench.finish();
}

#[test]
fn drops_what_no_bridge_forwards() {
    let config = BridgeConfig { own: vec![MacAddress(mac(77))], ..BridgeConfig::new(3) };
    let mut bench = bridge(&config);
    let mut dropped = 0;
    let refused = [
        frame([0x01, 0x80, 0xc2, 0, 0, 0x00], mac(1), None, b"spanning tree"),
        frame([0x01, 0x80, 0xc2, 0, 0, 0x01], mac(1), None, b"pause"),
        frame([0x01, 0x80, 0xc2, 0, 0, 0x0e], mac(1), None, b"LLDP"),
        frame(mac(2), [0x01, 0, 0x5e, 0, 0, 1], None, b"from a group"),
        frame(mac(2), BROADCAST, None, b"from everybody"),
        frame(mac(2), [0; 6], None, b"from nobody"),
        frame(mac(2), mac(77), None, b"from ourselves"),
        frame(mac(77), mac(1), None, b"to ourselves"),
    ];
    for packet in &refused {
        assert!(ports(&bench.through(0, packet)).is_empty(), "{packet:02x?}");
        dropped += 1;
        assert_eq!(bench.counter("drop_policy"), dropped);
    }
    let next = frame([0x01, 0x80, 0xc2, 0, 0, 0x10], mac(1), None, b"not reserved");
    assert_eq!(ports(&bench.through(0, &next)), [1, 2]);
    assert_eq!(bench.counter("learned"), 1, "only from station 1");
    bench.finish();

    let mut open = bridge(&BridgeConfig { forward_reserved: 1 << 14, ..config });
    assert_eq!(ports(&open.through(0, &refused[2])), [1, 2], "LLDP was allowed");
    assert!(ports(&open.through(0, &refused[0])).is_empty());
    open.finish();
}

#[test]
fn short_frames_are_malformed() {
    let mut bench = bridge(&BridgeConfig::new(2));
    for len in 0..14 {
        assert!(ports(&bench.through(0, &frame(BROADCAST, mac(1), None, b"")[..len])).is_empty());
    }
    assert_eq!(bench.counter("drop_malformed"), 14);
    assert_eq!(ports(&bench.through(0, &frame(BROADCAST, mac(1), None, b""))), [1], "14 bytes will do");
    bench.finish();
}

#[test]
fn isolated_ports_reach_only_the_others() {
    let mut config = BridgeConfig::new(4);
    config.ports[0].isolated = true;
    config.ports[1].isolated = true;
    let mut bench = bridge(&config);
    assert_eq!(ports(&bench.through(0, &frame(BROADCAST, mac(1), None, b""))), [2, 3]);
    assert_eq!(ports(&bench.through(2, &frame(BROADCAST, mac(3), None, b""))), [0, 1, 3]);
    assert!(ports(&bench.through(1, &frame(mac(1), mac(2), None, b""))).is_empty());
    assert_eq!(bench.counter("drop_policy"), 1);
    assert_eq!(ports(&bench.through(1, &frame(mac(3), mac(2), None, b""))), [2]);
    bench.finish();
}

#[test]
fn static_stations_stay_where_they_were_put() {
    let station = StaticStation { mac: MacAddress(mac(1)), vlan: None, port: PortId(2) };
    let mut bench = bridge(&BridgeConfig { stations: vec![station], ..BridgeConfig::new(3) });
    let to_it = frame(mac(1), mac(5), None, b"");
    assert_eq!(ports(&bench.through(0, &to_it)), [2]);
    bench.through(1, &frame(mac(5), mac(1), None, b"spoofed"));
    bench.wait_ms(400_000);
    bench.app.flush_port(PortId(2));
    assert_eq!(ports(&bench.through(0, &to_it)), [2]);
    assert_eq!(bench.counter("static_conflict"), 1);
    let seen = bench.app.fdb().station(None, station.mac, bench.now).unwrap();
    assert_eq!((seen.port, seen.age, seen.vlan), (PortId(2), None, None));
    assert!(bench.app.remove_station(None, station.mac));
    assert!(!bench.app.remove_station(None, station.mac));
    assert_eq!(ports(&bench.through(0, &to_it)), [1, 2]);
    bench.app.add_station(StaticStation { port: PortId(1), ..station }, bench.now).unwrap();
    assert_eq!(ports(&bench.through(0, &to_it)), [1]);
    bench.finish();
}

#[test]
fn the_table_can_be_read() {
    let mut bench = bridge(&BridgeConfig::new(2));
    for n in 1..=100 {
        bench.put(usize::from(n) % 2, &frame(mac(200), mac(n), None, b""));
    }
    bench.run();
    bench.now += 3_000_000_000;
    let mut all: Vec<_> = bench.app.fdb().iter(bench.now).collect();
    all.sort_by_key(|s| s.mac);
    assert_eq!(all.len(), 100);
    for (station, n) in all.iter().zip(1..) {
        assert_eq!(station.mac, MacAddress(mac(n)));
        assert_eq!(usize::from(station.port.0), usize::from(n) % 2);
        assert_eq!(station.age, Some(Duration::from_secs(3)));
        assert_eq!(bench.app.fdb().station(None, station.mac, bench.now), Some(*station));
    }
    bench.finish();
}

/// Station `n` of a great many.
fn nth(n: u64) -> [u8; 6] {
    let [_, _, a, b, c, d, e, f] = n.to_be_bytes();
    [a & 0xfc | 2, b, c, d, e, f]
}

#[test]
fn a_million_made_up_addresses_neither_grow_the_table_nor_displace_the_known() {
    let mut bench = bridge(&BridgeConfig { capacity: 4096, ..BridgeConfig::new(2) });
    bench.through(1, &frame(mac(200), mac(1), None, b""));
    for n in 0..1_000_000_u64 {
        let made_up = nth(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        bench.put(0, &frame(mac(1), made_up, None, b""));
        if n % 64 == 63 {
            bench.turn();
            let delivered = bench.take()[1].len();
            assert_eq!(delivered, 64, "the known station gets its packets all the while");
        }
    }
    bench.run();
    assert_eq!(bench.app.fdb().capacity(), 4096);
    assert!(bench.app.fdb().len() <= 4096);
    assert!(bench.app.fdb().len() >= 4000, "{} of 4096 used", bench.app.fdb().len());
    assert_eq!(bench.counter("learned") + bench.counter("table_full"), 1_000_001);
    bench.finish();
}

#[test]
fn evicting_makes_room_for_the_new_at_the_cost_of_the_oldest() {
    let config = BridgeConfig { capacity: 8, when_full: WhenFull::EvictOldest, ..BridgeConfig::new(2) };
    let station = StaticStation { mac: MacAddress([6; 6]), vlan: None, port: PortId(1) };
    let mut bench = bridge(&BridgeConfig { stations: vec![station], ..config });
    for n in 0..1000 {
        bench.through(0, &frame([6; 6], nth(n), None, b""));
        assert_eq!(bench.app.fdb().station(None, MacAddress(nth(n)), bench.now).unwrap().port, PortId(0));
        bench.wait_ms(1);
    }
    assert!(bench.app.fdb().len() <= 8);
    assert!(bench.counter("evicted") >= 992);
    assert_eq!(bench.counter("table_full"), 0);
    assert!(bench.app.fdb().station(None, station.mac, bench.now).is_some(), "static ones stay");
    bench.finish();
}

#[test]
fn a_port_cannot_learn_more_than_its_share() {
    let mut config = BridgeConfig::new(3);
    config.ports[0] = BridgePort { max_stations: 10, ..BridgePort::default() };
    config.ports[2].learn = false;
    let mut bench = bridge(&config);
    for n in 1..=100 {
        bench.put(0, &frame(mac(200), mac(n), None, b""));
    }
    bench.run();
    assert_eq!((bench.app.fdb().len(), bench.counter("port_limit")), (10, 90));
    bench.through(1, &frame(mac(200), mac(101), None, b""));
    bench.through(2, &frame(mac(200), mac(102), None, b""));
    assert_eq!(bench.app.fdb().len(), 11, "other ports are not concerned, and port 2 does not learn");
    bench.through(1, &frame(mac(200), mac(1), None, b"moves away"));
    bench.through(0, &frame(mac(200), mac(50), None, b"takes its place"));
    let at = |n| bench.app.fdb().station(None, MacAddress(mac(n)), bench.now).map(|s| s.port.0);
    assert_eq!((at(1), at(50), at(51)), (Some(1), Some(0), None));
    bench.finish();
}

#[test]
fn a_storm_neither_takes_the_pool_nor_stops_known_stations() {
    let limits = FloodLimits { copies_per_second: 1000, burst: 300, copies_per_turn: 90, reserve: 128 };
    let size = Size { frames: 512, ..Size::ports(4) };
    let mut bench = bridge_of(&size, &BridgeConfig { flood: limits, ..BridgeConfig::new(4) });
    bench.through(1, &frame(mac(200), mac(1), None, b""));
    bench.wait_ms(1000);
    let copies = |b: &Bench<Bridge>| b.counter("copies");
    let before = copies(&bench);
    // One second of 1000 turns, each with 40 broadcasts and 20 packets for a known station.
    for turn in 0..1000 {
        bench.now += 1_000_000;
        let made = copies(&bench);
        for n in 0..60_u8 {
            let to = if n % 3 == 0 { mac(1) } else { BROADCAST };
            bench.put(0, &frame(to, mac(2), None, &[n]));
        }
        bench.turn();
        let known = bench.take()[1].iter().filter(|p| p[0][..6] == mac(1)).count();
        assert_eq!(known, 20, "turn {turn}");
        assert!(copies(&bench) - made <= 90, "turn {turn}");
    }
    let made = copies(&bench) - before;
    assert!((1298..=1300).contains(&made), "{made}: 300 at once and 1000 in the second that passed");
    let flooded = made / 2;
    assert_eq!(bench.counter("drop_storm"), 40_000 - flooded);
    assert_eq!(bench.drops().len(), 1, "{:?}", bench.drops());
    bench.finish();
}

#[test]
fn flooding_leaves_the_frames_for_receiving_alone() {
    let limits = FloodLimits {
        copies_per_second: 1_000_000_000,
        burst: u32::MAX,
        copies_per_turn: u32::MAX,
        reserve: 40,
    };
    let size = Size { frames: 64, ..Size::ports(10) };
    let mut bench = bridge_of(&size, &BridgeConfig { flood: limits, ..BridgeConfig::new(10) });
    for n in 0..8 {
        bench.put(0, &frame(BROADCAST, mac(1), None, &[n]));
    }
    bench.turn();
    // 64 frames, 8 received, 16 to spare above the reserve: two floods of eight copies.
    assert_eq!(bench.take().iter().map(Vec::len).collect::<Vec<_>>(), [0, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
    assert_eq!(bench.counter("drop_no_frame"), 6);
    bench.finish();
}

#[test]
fn two_ports_flood_without_copies() {
    let none = FloodLimits { copies_per_second: 1, burst: 0, copies_per_turn: 0, reserve: u32::MAX };
    let mut bench = bridge(&BridgeConfig { flood: none, ..BridgeConfig::new(2) });
    for _ in 0..500 {
        assert_eq!(ports(&bench.through(0, &frame(BROADCAST, mac(1), None, b""))), [1]);
    }
    assert_eq!(bench.counter("copies"), 0);
    bench.finish();
}

#[test]
fn packets_in_several_frames_are_one() {
    let mut bench = bridge(&BridgeConfig::new(4));
    let head = |to, from| frame(to, from, None, b"head");
    let broadcast = vec![head(BROADCAST, mac(1)), vec![1; 700], vec![2; 3]];
    bench.put_frames(0, broadcast.clone());
    bench.run();
    assert_eq!(bench.take()[1..], [[broadcast.clone()], [broadcast.clone()], [broadcast]]);
    // Later frames that look like headers are not looked at.
    let unicast = vec![head(mac(1), mac(2)), head(BROADCAST, mac(3)), head(mac(9), mac(4))];
    bench.put_frames(3, unicast.clone());
    bench.put(3, &frame(mac(1), mac(2), None, b"next"));
    bench.run();
    assert_eq!(bench.take()[0], [unicast, vec![frame(mac(1), mac(2), None, b"next")]]);
    assert_eq!(bench.app.fdb().len(), 2);
    // A header must lie in the first frame.
    bench.put_frames(3, vec![vec![2; 13], vec![2; 100], vec![]]);
    bench.run();
    assert_eq!(bench.counter("drop_malformed"), 3);
    assert!(bench.take().iter().all(Vec::is_empty));
    bench.finish();
}

#[test]
fn a_large_packet_is_flooded_whole_or_not_at_all() {
    let limits = FloodLimits { copies_per_turn: 100, ..FloodLimits::default() };
    let mut bench = bridge(&BridgeConfig { flood: limits, ..BridgeConfig::new(3) });
    let packet = |n: usize| [vec![frame(BROADCAST, mac(1), None, b"")], vec![vec![0; 10]; n - 1]].concat();
    bench.put_frames(0, packet(40));
    bench.put_frames(1, packet(64));
    bench.turn();
    let out = bench.take();
    assert_eq!([out[0].len(), out[1].len(), out[2].len()], [0, 1, 1]);
    assert_eq!(bench.counter("drop_storm"), 64);
    assert_eq!(bench.counter("copies"), 40);
    bench.finish();
}

#[test]
fn ports_that_the_bridge_does_not_have_are_refused() {
    let mut few = bridge_of(&Size::ports(3), &BridgeConfig::new(2));
    assert!(ports(&few.through(2, &frame(BROADCAST, mac(1), None, b""))).is_empty());
    assert_eq!(few.counter("drop_no_port"), 1);
    assert_eq!(ports(&few.through(0, &frame(BROADCAST, mac(1), None, b""))), [1]);
    few.finish();
    let mut many = bridge_of(&Size::ports(2), &BridgeConfig::new(64));
    assert_eq!(ports(&many.through(0, &frame(BROADCAST, mac(1), None, b""))), [1]);
    many.finish();
}

#[test]
fn bad_configurations_say_what_to_do() {
    let base = BridgeConfig::new(2);
    let station = |n, port| StaticStation { mac: MacAddress(n), vlan: None, port: PortId(port) };
    let cases = [
        (BridgeConfig::new(0), "take 1 to 64"),
        (BridgeConfig::new(65), "take 1 to 64"),
        (BridgeConfig { ageing: Duration::ZERO, ..base.clone() }, "300 s is usual"),
        (BridgeConfig { ageing: Duration::MAX, ..base.clone() }, "300 s is usual"),
        (BridgeConfig { capacity: 0, ..base.clone() }, "take 8 to 1048576"),
        (BridgeConfig { capacity: usize::MAX, ..base.clone() }, "take 8 to 1048576"),
        (BridgeConfig { forward_reserved: 2, ..base.clone() }, "PAUSE"),
        (BridgeConfig { vlans: Some(vec![]), ..base.clone() }, "one for each port"),
        (BridgeConfig { own: vec![MacAddress::BROADCAST], ..base.clone() }, "ff:ff:ff:ff:ff:ff"),
        (BridgeConfig { stations: vec![station(mac(1), 2)], ..base.clone() }, "no such port"),
        (BridgeConfig { stations: vec![station([0; 6], 0)], ..base.clone() }, "zero"),
        (
            BridgeConfig {
                flood: FloodLimits { copies_per_second: 0, ..Default::default() },
                ..base.clone()
            },
            "1 to 1000000000",
        ),
        (
            BridgeConfig {
                flood: FloodLimits { copies_per_turn: 5, ..Default::default() },
                ..BridgeConfig::new(8)
            },
            "at least",
        ),
    ];
    for (config, hint) in cases {
        let error = Bridge::new(&config).unwrap_err();
        assert!(error.to_string().contains(hint), "{error} does not say {hint:?}");
    }
}

#[test]
fn static_stations_cannot_overfill_the_table() {
    let stations = (1..=9).map(|n| StaticStation { mac: MacAddress(mac(n)), vlan: None, port: PortId(0) });
    let config = BridgeConfig { capacity: 8, stations: stations.collect(), ..BridgeConfig::new(2) };
    let error = Bridge::new(&config).unwrap_err();
    assert!(matches!(error, BridgeError::Station { .. }), "{error}");
    assert!(error.to_string().contains("make the table larger"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Nothing that arrives makes the bridge panic or lose a frame, VLANs or not.
    #[test]
    fn survives_random_bytes(
        packets in prop::collection::vec(
            (0..3_usize, prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 1..4)), 1..60),
        vlans in any::<bool>(),
    ) {
        use isoplane::blocks::bridge::{PortVlans, VlanSet};
        use isoplane::wire::VlanId;
        let trunk = PortVlans::Trunk { allowed: VlanSet::ALL, native: Some(VlanId::DEFAULT) };
        let vlans = vlans.then(|| vec![trunk.clone(), trunk, PortVlans::Access(VlanId::DEFAULT)]);
        let mut bench = bridge_of(
            &Size { chunk: 2048, max_frame: 1984, headroom: 0, ..Size::ports(3) },
            &BridgeConfig { vlans, ..BridgeConfig::new(3) },
        );
        for (port, frames) in packets {
            let frames = frames.into_iter().map(|mut f| { f.truncate(1984); f }).collect();
            bench.put_frames(port, frames);
        }
        bench.run();
        bench.take();
        bench.finish();
    }
}

#[test]
fn frames_of_every_length_pass_unchanged() {
    // 65 536-byte chunks hold 65 471 bytes behind the metadata; longer packets come in several frames.
    let size = Size { frames: 64, chunk: 65_536, max_frame: 65_000, headroom: 64, ..Size::ports(2) };
    let mut bench = bridge_of(&size, &BridgeConfig::new(2));
    let mut sent = 0_u64;
    for len in (0..=65_535_usize).step_by(13).chain([13, 14, 15, 17, 18, 65_470, 65_471, 65_535]) {
        let mut packet = frame(mac(2), mac(1), None, b"");
        packet.resize(len.max(14), len as u8);
        packet.truncate(len);
        let frames: Vec<Vec<u8>> = match packet.len() {
            0 => vec![vec![]],
            n if n > 65_471 => packet.chunks(40_000).map(<[u8]>::to_vec).collect(),
            _ => vec![packet],
        };
        bench.put_frames(0, frames.clone());
        bench.turn();
        let out = bench.take();
        assert_eq!(out[1], if len < 14 { vec![] } else { vec![frames] }, "{len} bytes");
        sent += u64::from(len >= 14);
    }
    assert!(sent > 5000);
    bench.finish();
}
