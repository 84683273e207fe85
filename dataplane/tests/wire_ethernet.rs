//! Ethernet views and values against etherparse, and against any bytes at all.

use etherparse::{Ethernet2Header, SingleVlanHeader, VlanId as TheirVlanId, VlanPcp};
use isoplane::wire::ethernet::{HEADER, Packet, Repr, TAG, Tag, TagPacket};
use isoplane::wire::{EtherType, MacAddress, VlanId};
use proptest::prelude::*;

fn headers() -> impl Strategy<Value = Repr> {
    let tag = (0..8_u8, any::<bool>(), 0..4096_u16).prop_map(|(priority, drop_eligible, vlan)| Tag {
        priority,
        drop_eligible,
        vlan,
    });
    (any::<[u8; 6]>(), any::<[u8; 6]>(), prop::option::of(tag), any::<u16>())
        .prop_filter("without a tag, 0x8100 announces one", |(.., tag, ethertype)| {
            tag.is_some() || *ethertype != 0x8100
        })
        .prop_map(|(destination, source, tag, ethertype)| Repr {
            destination: MacAddress(destination),
            source: MacAddress(source),
            tag,
            ethertype: EtherType(ethertype),
        })
}

/// The same header as etherparse writes it.
fn theirs(header: &Repr) -> Vec<u8> {
    let outer = header.tag.map_or(header.ethertype, |_| EtherType::VLAN);
    let ethernet = Ethernet2Header {
        destination: header.destination.0,
        source: header.source.0,
        ether_type: etherparse::EtherType(outer.0),
    };
    let mut bytes = ethernet.to_bytes().to_vec();
    if let Some(tag) = header.tag {
        let vlan = SingleVlanHeader {
            pcp: VlanPcp::try_new(tag.priority).unwrap(),
            drop_eligible_indicator: tag.drop_eligible,
            vlan_id: TheirVlanId::try_new(tag.vlan).unwrap(),
            ether_type: etherparse::EtherType(header.ethertype.0),
        };
        bytes.extend(vlan.to_bytes());
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn emits_and_parses_what_etherparse_does(header in headers(), payload in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut expected = theirs(&header);
        prop_assert_eq!(expected.len(), header.header_len());
        expected.extend(&payload);
        let mut bytes = vec![0xaa; header.header_len()];
        header.emit(&mut Packet::new_checked(&mut bytes).unwrap()).unwrap();
        bytes.extend(&payload);
        prop_assert_eq!(&bytes, &expected);
        let packet = Packet::new_checked(&expected).unwrap();
        prop_assert_eq!(Repr::parse(&packet).unwrap(), header);
        let behind = match header.tag {
            None => packet.payload().to_vec(),
            Some(tag) => {
                let inner = TagPacket::new_checked(packet.payload()).unwrap();
                prop_assert_eq!((inner.tag(), inner.ethertype()), (tag, header.ethertype));
                inner.payload().to_vec()
            }
        };
        prop_assert_eq!(behind, payload);
    }

    #[test]
    fn reads_any_bytes_as_etherparse_does(mut bytes in prop::collection::vec(any::<u8>(), 0..80), tagged in any::<bool>()) {
        if tagged && bytes.len() >= HEADER {
            bytes[12..14].copy_from_slice(&[0x81, 0]);
        }
        let their = Ethernet2Header::from_slice(&bytes);
        let Ok(packet) = Packet::new_checked(&bytes) else {
            prop_assert!(bytes.len() < HEADER && their.is_err());
            return Ok(());
        };
        let (their, rest) = their.unwrap();
        prop_assert_eq!(packet.destination().0, their.destination);
        prop_assert_eq!(packet.source().0, their.source);
        prop_assert_eq!(packet.ethertype().0, their.ether_type.0);
        prop_assert_eq!(packet.payload(), rest);
        let header = Repr::parse(&packet);
        if their.ether_type.0 != 0x8100 {
            prop_assert_eq!(header.unwrap().tag, None);
            return Ok(());
        }
        match SingleVlanHeader::from_slice(rest) {
            Err(_) => {
                let error = header.unwrap_err();
                prop_assert_eq!((error.needed, error.found), (HEADER + TAG, bytes.len()));
            }
            Ok((vlan, _)) => {
                let header = header.unwrap();
                let tag = header.tag.unwrap();
                prop_assert_eq!(tag.vlan, vlan.vlan_id.value());
                prop_assert_eq!(tag.priority, vlan.pcp.value());
                prop_assert_eq!(tag.drop_eligible, vlan.drop_eligible_indicator);
                prop_assert_eq!(header.ethertype.0, vlan.ether_type.0);
            }
        }
    }

    #[test]
    fn a_header_that_does_not_fit_writes_nothing(header in headers(), room in HEADER..HEADER + TAG) {
        let mut bytes = vec![0xaa; room];
        let fits = room >= header.header_len();
        let result = header.emit(&mut Packet::new_checked(&mut bytes).unwrap());
        prop_assert_eq!(result.is_ok(), fits);
        prop_assert!(fits || bytes.iter().all(|b| *b == 0xaa));
    }

    #[test]
    fn addresses_read_back_as_written(bytes in any::<[u8; 6]>()) {
        let mac = MacAddress(bytes);
        prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        prop_assert_eq!(mac.to_string().to_uppercase().replace(':', "-").parse(), Ok(mac));
        prop_assert_eq!(MacAddress::from_bits(mac.to_bits()), mac);
        prop_assert_eq!(mac.is_group(), bytes[0] % 2 == 1);
        prop_assert_eq!(mac.is_broadcast(), bytes == [0xff; 6]);
        let reserved = bytes[..5] == [0x01, 0x80, 0xc2, 0, 0] && bytes[5] < 16;
        prop_assert_eq!(mac.reserved_group().is_some(), reserved);
    }

    #[test]
    fn no_text_makes_an_address_panic(text in ".{0,24}") {
        if let Ok(mac) = text.parse::<MacAddress>() {
            prop_assert_eq!(text.to_lowercase().replace('-', ":"), mac.to_string());
        }
    }

    #[test]
    fn tags_are_sixteen_bits(tci in any::<u16>()) {
        prop_assert_eq!(Tag::from_tci(tci).to_tci(), tci);
    }
}

#[test]
fn special_addresses() {
    for digit in 0..16 {
        assert_eq!(MacAddress([0x01, 0x80, 0xc2, 0, 0, digit]).reserved_group(), Some(digit));
    }
    assert_eq!(MacAddress([0x01, 0x80, 0xc2, 0, 0, 16]).reserved_group(), None);
    assert!(!MacAddress::default().is_station());
    assert!(!MacAddress::BROADCAST.is_station());
    assert!(MacAddress([2, 0, 0, 0, 0, 1]).is_station());
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "2:0:0:0:0:1",
        "02:00:00:00:00:0g",
        "+2:00:00:00:00:01",
    ] {
        let error = bad.parse::<MacAddress>().unwrap_err();
        assert!(error.to_string().contains("02:00:00:00:00:01"), "{error}");
    }
}

#[test]
fn vlan_numbers_have_bounds() {
    for (id, valid) in [(0, false), (1, true), (4094, true), (4095, false), (u16::MAX, false)] {
        assert_eq!(VlanId::new(id).is_some(), valid, "{id}");
    }
}
