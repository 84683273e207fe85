//! IPv4 fragmentation: what comes out is put together again, by code that shares nothing with the router's, and
//! must be what went in.

mod common;

use common::Size;
use common::net::*;
use etherparse::{Ipv4Header, Ipv4Options};
use isoplane::blocks::router::RouterConfig;

/// A packet that may be fragmented.
fn packet(len: usize, edit: impl FnOnce(&mut Ipv4Header)) -> Vec<u8> {
    udp4("192.0.2.10", "203.0.113.10", len, |header| {
        header.dont_fragment = false;
        header.identification = 0x1234;
        edit(header);
    })
}

/// Puts fragments together: their payloads where they belong, without gaps, the last one last.
fn reassemble(fragments: &[Vec<u8>]) -> Vec<u8> {
    let mut whole = Vec::new();
    for (n, fragment) in fragments.iter().enumerate() {
        let (header, payload) = Ipv4Header::from_slice(fragment).unwrap();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(usize::from(header.total_len), fragment.len());
        assert_eq!(usize::from(header.fragment_offset.value()) * 8, whole.len(), "in order, without gaps");
        let last = n + 1 == fragments.len();
        assert_eq!(header.more_fragments, !last);
        assert!(last || payload.len() % 8 == 0);
        whole.extend(payload);
    }
    whole
}

/// The fragments that leave by VLAN 10, without their Ethernet headers.
fn through(net: &mut Net, frame: &[u8]) -> Vec<Vec<u8>> {
    let out = net.send(0, frame);
    out.into_iter()
        .map(|(port, frame)| {
            assert_eq!((port, &frame[..12]), (2, &[VLAN_HOST, ROUTER[2]].concat()[..]));
            assert_eq!(frame[12..18], [0x81, 0, 0, 10, 8, 0]);
            frame[18..].to_vec()
        })
        .collect()
}

#[test]
fn fragments_make_the_packet_again() {
    let mut net = Net::with(&config());
    for mtu in [68, 100, 576, 577, 583, 584, 1000, 1280, 1499] {
        net.change(VLAN10, |interface| interface.mtu = mtu);
        for len in [60, 552, 553, 1000, 1400, 1472] {
            let packet = packet(len, |_| {});
            let fragments = through(&mut net, &from_lan(&packet));
            assert!(fragments.iter().all(|fragment| fragment.len() <= usize::from(mtu)));
            if packet.len() <= usize::from(mtu) {
                assert_eq!(fragments, [one_hop_less(&packet)]);
                continue;
            }
            // As few as there can be: the last one may be of any length.
            let room = (usize::from(mtu) - 20) & !7;
            let least = (packet.len() - 20).saturating_sub(usize::from(mtu) - 20).div_ceil(room) + 1;
            assert_eq!(fragments.len(), least, "{len} bytes over {mtu}");
            let (header, payload) = Ipv4Header::from_slice(&packet).unwrap();
            assert_eq!(reassemble(&fragments), payload);
            for fragment in &fragments {
                let (found, _) = Ipv4Header::from_slice(fragment).unwrap();
                let expected = Ipv4Header {
                    total_len: found.total_len,
                    more_fragments: found.more_fragments,
                    fragment_offset: found.fragment_offset,
                    header_checksum: found.header_checksum,
                    time_to_live: header.time_to_live - 1,
                    ..header.clone()
                };
                assert_eq!(found, expected);
            }
        }
    }
    assert_eq!(net.drops(), Default::default());
    net.bench.finish();
}

#[test]
fn fragments_are_cut_again() {
    let mut net = Net::with(&config());
    net.change(VLAN10, |interface| interface.mtu = 1004);
    let first = packet(1472, |_| {});
    let fragments = through(&mut net, &from_lan(&first));
    net.change(VLAN10, |interface| interface.mtu = 300);
    let again: Vec<Vec<u8>> =
        fragments.iter().flat_map(|fragment| through(&mut net, &from_lan(fragment))).collect();
    assert_eq!((fragments.len(), again.len()), (2, 6));
    let (_, payload) = Ipv4Header::from_slice(&first).unwrap();
    assert_eq!(reassemble(&again), payload);
    // Where the end would lie beyond the longest packet there is nothing to be reassembled.
    for offset in [8190, 8100] {
        let packet = packet(1000, |header| header.fragment_offset = offset.try_into().unwrap());
        net.dropped(0, &from_lan(&packet), "drop_malformed", "bad_header");
    }
    // No room for eight bytes.
    net.change(VLAN10, |interface| interface.mtu = 27);
    net.dropped(0, &from_lan(&packet(1000, |_| {})), "drop_malformed", "bad_header");
    net.bench.finish();
}

#[test]
fn options_are_copied_as_their_type_says() {
    let mut net = Net::with(&config());
    net.change(VLAN10, |interface| interface.mtu = 576);
    // Timestamp (not copied), no operation, security (copied), then an unknown one (copied).
    let options = [68, 8, 9, 0, 1, 2, 3, 4, 1, 130, 4, 7, 7, 0x9e, 3, 5];
    let packet = packet(1200, |header| {
        header.options = Ipv4Options::try_from(&options[..]).unwrap();
        header.total_len += options.len() as u16;
    });
    let fragments = through(&mut net, &from_lan(&packet));
    let found: Vec<Vec<u8>> = fragments
        .iter()
        .map(|fragment| Ipv4Header::from_slice(fragment).unwrap().0.options.as_slice().to_vec())
        .collect();
    assert_eq!(found[0], options);
    assert!(found.len() == 3 && found[1..].iter().all(|o| *o == [130, 4, 7, 7, 0x9e, 3, 5, 0]), "{found:?}");
    let (_, payload) = Ipv4Header::from_slice(&packet).unwrap();
    assert_eq!(reassemble(&fragments), payload);
    net.bench.finish();
}

#[test]
fn what_must_not_be_fragmented_is_not() {
    let mut net = Net::with(&config());
    net.change(VLAN10, |interface| interface.mtu = 576);
    let whole = packet(1000, |header| header.dont_fragment = true);
    assert_eq!(net.one(0, &from_lan(&whole)).0, 0, "an error message");
    assert_eq!((net.counter("icmp_too_big"), net.counter("fragmented")), (1, 0));
    net.bench.finish();
}

#[test]
fn packets_in_several_frames() {
    let size = Size { headroom: 128, ..Size::ports(4) };
    let mut net = Net::sized(&config(), &size);
    net.change(VLAN10, |interface| interface.mtu = 1500);
    let packet = packet(8000, |_| {});
    let frame = from_lan(&packet);
    net.put_frames(0, frame.chunks(1000).map(<[u8]>::to_vec).collect());
    net.run();
    let out: Vec<Vec<u8>> = net.take()[2].iter().map(|packet| packet.concat()[18..].to_vec()).collect();
    assert_eq!(reassemble(&out), Ipv4Header::from_slice(&packet).unwrap().1);
    assert_eq!((net.counter("fragmented"), net.counter("fragments")), (1, 6));
    // Longer than any chunk, on a link that would take it whole: fragments fit their frames.
    net.change(VLAN10, |interface| interface.mtu = 4000);
    net.put_frames(0, frame.chunks(1000).map(<[u8]>::to_vec).collect());
    net.run();
    let out: Vec<Vec<u8>> = net.take()[2].iter().map(|packet| packet.concat()[18..].to_vec()).collect();
    assert_eq!(reassemble(&out), Ipv4Header::from_slice(&packet).unwrap().1);
    net.bench.finish();
}

#[test]
fn neither_frames_nor_time_are_used_up() {
    let mut net = Net::with(&RouterConfig { fragments_per_turn: 10, ..config() });
    net.change(VLAN10, |interface| interface.mtu = 576);
    let frame = from_lan(&packet(1400, |_| {}));
    for _ in 0..5 {
        net.put(0, &frame);
    }
    // Three fragments each.
    net.turn();
    assert_eq!(net.take()[2].len(), 9);
    assert_eq!(net.drops(), [("drop_too_big".to_owned(), 2)].into());
    net.put(0, &frame);
    net.turn();
    assert_eq!(net.take()[2].len(), 3, "another turn, another time");
    net.bench.finish();
    let mut net = Net::with(&RouterConfig { reserve: 1022, ..config() });
    net.change(VLAN10, |interface| interface.mtu = 576);
    net.dropped(0, &frame, "drop_no_frame", "fragment_limit");
    net.bench.finish();
}
