//! A bridge that is told something new while it works.

mod common;

use common::{BROADCAST, Bench, Size, frame, mac};
use isoplane::app::PortId;
use isoplane::blocks::bridge::change::Message;
use isoplane::blocks::bridge::{
    Bridge, BridgeConfig, BridgeError, BridgePort, Change, FloodLimits, StaticStation,
};
use isoplane::wire::{MacAddress, VlanId};
use proptest::prelude::*;
use std::time::Duration;

fn bridge(ports: usize) -> Bench<Bridge> {
    let config = BridgeConfig { seed: Some(7), ..BridgeConfig::new(ports) };
    Bench::new(&Size::ports(ports), &Bridge::FIELDS, Bridge::new(&config).unwrap())
}

/// Which ports something left by.
fn ports(out: &[Vec<Vec<u8>>]) -> Vec<usize> {
    out.iter().enumerate().flat_map(|(port, packets)| packets.iter().map(move |_| port)).collect()
}

fn change(bench: &mut Bench<Bridge>, change: Change) {
    let now = bench.now;
    bench.app.change(change, now).unwrap();
}

#[test]
fn stations_come_and_go() {
    let mut bench = bridge(3);
    let station = StaticStation { mac: MacAddress(mac(9)), vlan: None, port: PortId(2) };
    let to_it = frame(mac(9), mac(1), None, b"");
    change(&mut bench, Change::AddStation(station));
    assert_eq!(ports(&bench.through(0, &to_it)), [2]);
    change(&mut bench, Change::AddStation(StaticStation { port: PortId(1), ..station }));
    assert_eq!(ports(&bench.through(0, &to_it)), [1], "it has moved");
    change(&mut bench, Change::RemoveStation { vlan: None, mac: station.mac });
    assert_eq!(ports(&bench.through(0, &to_it)), [1, 2]);
    bench.wait_ms(1);
    assert_eq!(bench.counter("stations"), 1, "the one that sent");
    bench.finish();
}

#[test]
fn a_shorter_ageing_time_is_that_of_known_stations_too() {
    let mut bench = bridge(3);
    bench.through(0, &frame(BROADCAST, mac(1), None, b""));
    let to_it = frame(mac(1), mac(3), None, b"");
    bench.now += 10_000_000_000;
    change(&mut bench, Change::Ageing(Duration::from_secs(10)));
    assert_eq!(ports(&bench.through(2, &to_it)), [0]);
    change(&mut bench, Change::Ageing(Duration::from_secs(9)));
    assert_eq!(ports(&bench.through(2, &to_it)), [0, 1]);
    bench.finish();
}

#[test]
fn flooding_is_as_the_new_limits_say() {
    let mut bench = bridge(4);
    let all = frame(BROADCAST, mac(1), None, b"");
    assert_eq!(ports(&bench.through(0, &all)), [1, 2, 3]);
    let limits = FloodLimits { burst: 2, copies_per_second: 1, ..FloodLimits::default() };
    change(&mut bench, Change::Flood(limits));
    assert_eq!(ports(&bench.through(0, &all)), [1, 2, 3], "a burst of two copies");
    assert!(ports(&bench.through(0, &all)).is_empty(), "and no more");
    change(&mut bench, Change::Flood(FloodLimits::default()));
    assert_eq!(ports(&bench.through(0, &all)), [1, 2, 3]);
    assert_eq!(bench.counter("drop_storm"), 1);
    bench.finish();
}

#[test]
fn a_port_is_isolated_and_joined_again() {
    let mut bench = bridge(3);
    let all = frame(BROADCAST, mac(1), None, b"");
    let isolated = BridgePort { isolated: true, ..BridgePort::default() };
    for port in [PortId(0), PortId(1)] {
        change(&mut bench, Change::Port { port, config: isolated });
    }
    assert_eq!(ports(&bench.through(0, &all)), [2]);
    assert_eq!(ports(&bench.through(2, &frame(BROADCAST, mac(2), None, b""))), [0, 1]);
    change(&mut bench, Change::Port { port: PortId(1), config: BridgePort::default() });
    assert_eq!(ports(&bench.through(0, &all)), [1, 2]);
    bench.finish();
}

#[test]
fn a_port_stops_learning_and_has_a_new_limit() {
    let mut bench = bridge(3);
    let deaf = BridgePort { learn: false, ..BridgePort::default() };
    change(&mut bench, Change::Port { port: PortId(0), config: deaf });
    bench.through(0, &frame(BROADCAST, mac(1), None, b""));
    assert_eq!(ports(&bench.through(2, &frame(mac(1), mac(3), None, b""))), [0, 1]);
    let one = BridgePort { max_stations: 1, ..BridgePort::default() };
    change(&mut bench, Change::Port { port: PortId(0), config: one });
    for station in 4..7 {
        bench.through(0, &frame(BROADCAST, mac(station), None, b""));
    }
    assert_eq!((bench.counter("learned"), bench.counter("port_limit")), (2, 2));
    bench.finish();
}

#[test]
fn what_would_be_refused_in_a_new_bridge_is_refused_and_changes_nothing() {
    let mut bridge = Bridge::new(&BridgeConfig::new(5)).unwrap();
    let mut refused = |change| bridge.change(change, 0).unwrap_err();
    assert_eq!(refused(Change::Ageing(Duration::ZERO)), BridgeError::Ageing { ageing: Duration::ZERO });
    assert_eq!(refused(Change::ForwardReserved(2)), BridgeError::Pause);
    let none = FloodLimits { burst: 2, ..FloodLimits::default() };
    assert_eq!(refused(Change::Flood(none)), BridgeError::FloodSize { ports: 5, needed: 3 });
    let (port, config) = (PortId(5), BridgePort::default());
    assert_eq!(refused(Change::Port { port, config }), BridgeError::NoPort { port, ports: 5 });
    let vlan = VlanId::new(3);
    let station = StaticStation { mac: MacAddress(mac(1)), vlan, port: PortId(0) };
    assert!(matches!(refused(Change::AddStation(station)), BridgeError::Station { .. }));
    // As before: had the ageing time stayed zero, this would be refused for it.
    bridge.change(Change::ForwardReserved(1 << 14), 0).unwrap();
}

fn any_change() -> impl Strategy<Value = Change> {
    let mac = any::<[u8; 6]>().prop_map(MacAddress);
    let vlan = any::<u16>().prop_map(VlanId::new);
    let port = any::<u8>().prop_map(PortId);
    prop_oneof![
        any::<u32>().prop_map(|ms| Change::Ageing(Duration::from_millis(ms.into()))),
        any::<u16>().prop_map(Change::ForwardReserved),
        any::<[u32; 4]>().prop_map(|[copies_per_second, burst, copies_per_turn, reserve]| {
            Change::Flood(FloodLimits { copies_per_second, burst, copies_per_turn, reserve })
        }),
        (port.clone(), any::<(bool, bool, u32)>()).prop_map(|(port, (isolated, learn, max_stations))| {
            Change::Port { port, config: BridgePort { isolated, learn, max_stations } }
        }),
        (mac.clone(), vlan.clone(), port).prop_map(|(mac, vlan, port)| Change::AddStation(StaticStation {
            mac,
            vlan,
            port
        })),
        (mac, vlan).prop_map(|(mac, vlan)| Change::RemoveStation { vlan, mac }),
    ]
}

proptest! {
    #[test]
    fn a_change_survives_its_message(change in any_change()) {
        prop_assert_eq!(Message::from(change).parse(), Some(change));
    }

    /// Whatever lies in a mailbox is a change or none, and no bridge minds.
    #[test]
    fn nonsense_is_harmless(words in any::<[u64; 3]>(), kind in 0u64..9) {
        let first = words[0] << 32 | kind;
        let message: Message = bytemuck::cast([first, words[1], words[2]]);
        let mut bridge = Bridge::new(&BridgeConfig::new(3)).unwrap();
        if let Some(change) = message.parse() {
            let _ = bridge.change(change, 0);
        }
        prop_assert_eq!(bridge.fdb().capacity(), 8192);
    }
}
