//! Ethernet headers and VLAN tags: any bytes are refused, or read as etherparse reads them and written back the same.
#![no_main]

use etherparse::Ethernet2HeaderSlice;
use isoplane::wire::ethernet::{Packet, Repr, TagPacket};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let theirs = Ethernet2HeaderSlice::from_slice(bytes);
    let Ok(packet) = Packet::new_checked(bytes) else {
        assert!(theirs.is_err());
        return;
    };
    let theirs = theirs.expect("as long as a header");
    assert_eq!(packet.destination().0, theirs.destination());
    assert_eq!(packet.source().0, theirs.source());
    assert_eq!(packet.ethertype().0, theirs.ether_type().0);
    assert_eq!(packet.payload(), &bytes[14..]);
    let Ok(repr) = Repr::parse(&packet) else {
        assert!(theirs.ether_type().0 == 0x8100 && TagPacket::new_checked(packet.payload()).is_err());
        return;
    };
    if let Some(tag) = repr.tag {
        let theirs = etherparse::SingleVlanSlice::from_slice(&bytes[14..]).expect("as long as a tag");
        assert_eq!(tag.to_tci().to_be_bytes(), bytes[14..16]);
        assert_eq!(tag.to_tci() & 0xfff, theirs.vlan_identifier().value());
        assert_eq!(repr.ethertype.0, theirs.ether_type().0);
    }
    let mut again = bytes.to_vec();
    again[..repr.header_len()].fill(0);
    let mut packet = Packet::new_checked(&mut again).expect("as long as before");
    repr.emit(&mut packet).expect("as long as before");
    assert_eq!(again, bytes);
});
