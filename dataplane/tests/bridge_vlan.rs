//! 802.1Q on the bridge: every kind of port against every kind of frame, tags in place, headroom.

mod common;

use common::{BROADCAST, Bench, Size, frame, mac};
use isoplane::app::{App, PortId, Turn};
use isoplane::blocks::bridge::{Bridge, BridgeConfig, BridgeError, PortVlans, StaticStation, VlanSet};
use isoplane::memory::{Batch, FrameFlags, FrameMeta};
use isoplane::wire::{MacAddress, VlanId};

fn vid(n: u16) -> VlanId {
    VlanId::new(n).unwrap()
}

fn trunk(allowed: &[u16], native: Option<u16>) -> PortVlans {
    PortVlans::Trunk { allowed: allowed.iter().map(|n| vid(*n)).collect(), native: native.map(vid) }
}

fn config(vlans: Vec<PortVlans>) -> BridgeConfig {
    BridgeConfig {
        seed: Some(3),
        ..BridgeConfig {
            ports: vec![Default::default(); vlans.len()],
            vlans: Some(vlans),
            ..BridgeConfig::new(1)
        }
    }
}

fn bench(size: &Size, config: &BridgeConfig) -> Bench<Bridge> {
    Bench::new(size, &Bridge::FIELDS, Bridge::new(config).unwrap())
}

/// Tag of a frame on the wire.
#[derive(Debug, Clone, Copy, PartialEq)]
enum On {
    Untagged,
    Tci(u16),
    Nowhere,
}
use On::{Nowhere, Tci, Untagged};

#[test]
fn matrix_of_ports_and_tags() {
    // Ports: 0 access 10 | 1 access 20 | 2 trunk 10,20 | 3 trunk 10,20 native 20 | 4 trunk 10
    let ports = vec![
        PortVlans::Access(vid(10)),
        PortVlans::Access(vid(20)),
        trunk(&[10, 20], None),
        trunk(&[10, 20], Some(20)),
        trunk(&[10], None),
    ];
    const PRIO: u16 = 5 << 13 | 1 << 12;
    let none = [Nowhere; 5];
    // (in by, as, out by each port)
    #[rustfmt::skip]
    let table: [(usize, On, [On; 5]); 19] = [
        (0, Untagged,         [Nowhere,  Nowhere,  Tci(10),        Tci(10),        Tci(10)]),
        (0, Tci(PRIO),        [Nowhere,  Nowhere,  Tci(PRIO | 10), Tci(PRIO | 10), Tci(PRIO | 10)]),
        (0, Tci(10),          none),
        (0, Tci(20),          none),
        (0, Tci(4095),        none),
        (1, Untagged,         [Nowhere,  Nowhere,  Tci(20),        Untagged,       Nowhere]),
        (1, Tci(PRIO),        [Nowhere,  Nowhere,  Tci(PRIO | 20), Untagged,       Nowhere]),
        (2, Untagged,         none),
        (2, Tci(PRIO),        none),
        (2, Tci(PRIO | 10),   [Untagged, Nowhere,  Nowhere,        Tci(PRIO | 10), Tci(PRIO | 10)]),
        (2, Tci(20),          [Nowhere,  Untagged, Nowhere,        Untagged,       Nowhere]),
        (2, Tci(30),          none),
        (2, Tci(4095),        none),
        (3, Untagged,         [Nowhere,  Untagged, Tci(20),        Nowhere,        Nowhere]),
        (3, Tci(PRIO),        [Nowhere,  Untagged, Tci(PRIO | 20), Nowhere,        Nowhere]),
        (3, Tci(PRIO | 20),   [Nowhere,  Untagged, Tci(PRIO | 20), Nowhere,        Nowhere]),
        (3, Tci(10),          [Untagged, Nowhere,  Tci(10),        Nowhere,        Tci(10)]),
        (4, Tci(20),          none),
        (4, Tci(10),          [Untagged, Nowhere,  Tci(10),        Tci(10),        Nowhere]),
    ];
    let packet = |tag: On, to| match tag {
        Untagged => frame(to, mac(1), None, b"payload"),
        Tci(tci) => frame(to, mac(1), Some(tci), b"payload"),
        Nowhere => vec![],
    };
    for (from, tag, expected) in table {
        let mut flood = bench(&Size::ports(5), &config(ports.clone()));
        let out = flood.through(from, &packet(tag, BROADCAST));
        for (port, on) in expected.into_iter().enumerate() {
            let want = if on == Nowhere { vec![] } else { vec![packet(on, BROADCAST)] };
            assert_eq!(out[port], want, "broadcast in by {from} as {tag:x?}, out by {port}");
        }
        let dropped = u64::from(expected == none);
        assert_eq!(flood.counter("drop_vlan"), dropped, "in by {from} as {tag:x?}");
        assert_eq!(flood.app.fdb().len() as u64, 1 - dropped, "what is filtered teaches nothing");
        flood.finish();
        // The same as unicast, to a station that each port in turn has heard in both VLANs.
        for (port, on) in expected.into_iter().enumerate() {
            let mut known = bench(&Size::ports(5), &config(ports.clone()));
            for lesson in [Untagged, Tci(10), Tci(20)] {
                let mut lesson = packet(lesson, mac(3));
                lesson[6..12].copy_from_slice(&mac(2));
                known.through(port, &lesson);
            }
            let out = known.through(from, &packet(tag, mac(2)));
            let want = if on == Nowhere { vec![] } else { vec![packet(on, mac(2))] };
            assert_eq!(out[port], want, "unicast in by {from} as {tag:x?}, out by {port}");
            known.finish();
        }
    }
}

#[test]
fn each_vlan_has_its_own_stations() {
    let mut b = bench(&Size::ports(3), &config(vec![trunk(&[10, 20], None); 3]));
    b.through(0, &frame(mac(9), mac(1), Some(10), b""));
    b.through(1, &frame(mac(9), mac(1), Some(20), b""));
    let to = |vid| frame(mac(1), mac(2), Some(vid), b"");
    assert_eq!(b.through(2, &to(10)), [vec![to(10)], vec![], vec![]]);
    assert_eq!(b.through(2, &to(20)), [vec![], vec![to(20)], vec![]]);
    assert_eq!(b.counter("moved"), 0);
    let at = |v| b.app.fdb().station(Some(vid(v)), MacAddress(mac(1)), b.now).map(|s| (s.vlan, s.port));
    assert_eq!(at(10), Some((Some(vid(10)), PortId(0))));
    assert_eq!(at(20), Some((Some(vid(20)), PortId(1))));
    b.finish();
}

#[test]
fn service_tags_and_inner_tags_are_payload() {
    let mut b = bench(&Size::ports(2), &config(vec![PortVlans::Access(vid(10)), trunk(&[10], None)]));
    let mut service = [BROADCAST, mac(1)].concat();
    service.extend([0x88, 0xa8, 0, 20, 0x81, 0, 0, 30, 8, 0, 1, 2]);
    let mut tagged = service.clone();
    tagged.splice(12..12, [0x81, 0, 0, 10]);
    assert_eq!(b.through(0, &service), [vec![], vec![tagged.clone()]]);
    assert_eq!(b.through(1, &tagged), [vec![service], vec![]]);
    let mut twice = frame(BROADCAST, mac(1), Some(10), b"x");
    twice.splice(12..12, [0x81, 0, 0x20, 10]);
    assert_eq!(b.through(1, &twice), [vec![frame(BROADCAST, mac(1), Some(10), b"x")], vec![]]);
    b.finish();
}

#[test]
fn a_bridge_that_ignores_vlans_leaves_tags_alone() {
    let config = BridgeConfig { seed: Some(3), ..BridgeConfig::new(2) };
    let mut b = bench(&Size::ports(2), &config);
    for tci in [0, 10, 0xffff] {
        let packet = frame(BROADCAST, mac(1), Some(tci), b"");
        assert_eq!(b.through(0, &packet)[1], [packet]);
    }
    let cut_off = &frame(BROADCAST, mac(1), Some(10), b"")[..15];
    assert_eq!(b.through(0, cut_off)[1], [cut_off]);
    assert_eq!(b.app.fdb().len(), 1);
    b.finish();
}

#[test]
fn a_frame_that_ends_within_its_tag_is_malformed() {
    let mut b = bench(&Size::ports(2), &config(vec![trunk(&[10], None); 2]));
    let whole = frame(BROADCAST, mac(1), Some(10), b"");
    for len in 0..18 {
        assert!(b.through(0, &whole[..len])[1].is_empty(), "{len} bytes");
    }
    assert_eq!(b.counter("drop_malformed"), 18);
    assert_eq!(b.through(0, &whole)[1], [whole]);
    b.finish();
}

/// Sends a full-size frame through an access port into a trunk.
fn tag_into(size: &Size, len: usize) -> (Option<Vec<u8>>, Vec<u8>, u64) {
    let mut b = bench(size, &config(vec![PortVlans::Access(vid(10)), trunk(&[10], None)]));
    let body: Vec<u8> = (0..len - 14).map(|i| i as u8).collect();
    let out = b.through(0, &frame(BROADCAST, mac(1), None, &body));
    let no_room = b.counter("no_room");
    b.finish();
    (out[1].first().cloned(), frame(BROADCAST, mac(1), Some(10), &body), no_room)
}

#[test]
fn a_tag_goes_where_there_is_room() {
    let size = |headroom| Size { headroom, max_frame: 1984 - headroom, frames: 8, ..Size::ports(2) };
    // Before the frame, then behind it, then nowhere.
    for (headroom, len) in [(64, 1500), (0, 1500), (0, 1980)] {
        let (out, expected, no_room) = tag_into(&size(headroom), len);
        assert_eq!((out, no_room), (Some(expected), 0), "headroom {headroom}, {len} bytes");
    }
    assert_eq!(tag_into(&size(0), 1981).0, None);
    assert_eq!(tag_into(&size(0), 1984).2, 1, "counted");
}

#[test]
fn a_packet_without_room_for_its_tag_is_dropped_whole() {
    let size = Size { headroom: 0, max_frame: 1984, frames: 64, ..Size::ports(2) };
    let mut b = bench(&size, &config(vec![PortVlans::Access(vid(10)), trunk(&[10], None)]));
    b.through(1, &frame(mac(9), mac(2), Some(10), b""));
    let full = frame(mac(2), mac(1), None, &[7; 1970]);
    b.put_frames(0, vec![full.clone(), vec![1; 100], vec![2; 100]]);
    b.put(0, &frame(mac(2), mac(1), None, b"next"));
    b.run();
    assert_eq!(b.take()[1], [[frame(mac(2), mac(1), Some(10), b"next")]]);
    assert_eq!((b.counter("drop_malformed"), b.counter("no_room")), (3, 1));
    b.finish();
}

/// Asks for a checksum on every packet, then lets the bridge have it.
struct Checksummed(Bridge);

impl App for Checksummed {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for frame in batch.iter_mut() {
            let meta = FrameMeta { csum_start: 34, csum_offset: 16, ..FrameMeta::default() };
            turn.pool().set_meta(frame, meta);
            frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
        }
        self.0.packets(turn, from, batch);
    }
}

#[test]
fn a_checksum_that_is_still_to_be_made_moves_with_the_packet() {
    let ports = vec![PortVlans::Access(vid(10)), PortVlans::Access(vid(10)), trunk(&[10], None)];
    let bridge = Bridge::new(&config(ports)).unwrap();
    let mut b = Bench::new(&Size::ports(3), &Bridge::FIELDS, Checksummed(bridge));
    b.through(0, &frame(BROADCAST, mac(1), None, &[0; 50]));
    b.through(2, &frame(mac(1), mac(2), Some(10), &[0; 50]));
    assert_eq!(
        [b.checksum_starts(0), b.checksum_starts(1), b.checksum_starts(2)],
        [vec![30], vec![34], vec![38]]
    );
    b.finish();
}

#[test]
fn static_stations_must_be_in_a_vlan_of_their_port() {
    let base = config(vec![PortVlans::Access(vid(10)), trunk(&[20, 30], Some(20))]);
    let with = |vlan: Option<u16>, port| {
        let station = StaticStation { mac: MacAddress(mac(1)), vlan: vlan.map(vid), port: PortId(port) };
        Bridge::new(&BridgeConfig { stations: vec![station], ..base.clone() }).map(|_| ())
    };
    assert_eq!(with(Some(10), 0), Ok(()));
    assert_eq!(with(Some(30), 1), Ok(()));
    for (vlan, port) in [(Some(20), 0), (Some(10), 1), (None, 0)] {
        assert!(matches!(with(vlan, port), Err(BridgeError::Station { .. })), "{vlan:?} on {port}");
    }
    let native = Bridge::new(&config(vec![trunk(&[10], Some(20))])).unwrap_err();
    assert!(native.to_string().contains("not among the allowed"), "{native}");
}

#[test]
fn sets_of_vlans() {
    assert_eq!(VlanSet::ALL.iter().count(), 4094);
    let mut set = VlanSet::from_iter([vid(1), vid(63), vid(64), vid(4094)]);
    assert_eq!(set.iter().map(VlanId::get).collect::<Vec<_>>(), [1, 63, 64, 4094]);
    set.remove(vid(64));
    assert!(!set.contains(vid(64)) && set.contains(vid(63)));
    assert_eq!(VlanSet::EMPTY.iter().count(), 0);
    assert_eq!(format!("{:?} {set:?}", VlanSet::ALL), "ALL {VlanId(1), VlanId(63), VlanId(4094)}");
}
