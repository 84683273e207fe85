//! IPv4 headers and options: exactly those are taken that etherparse takes and whose checksum and length are right; they
//! are read as it reads them; a hop less leaves a right checksum.
#![no_main]

use etherparse::Ipv4HeaderSlice;
use etherparse::checksum::Sum16BitWords;
use isoplane::wire::ipv4::{HEADER, Options, Packet, Repr};
use libfuzzer_sys::fuzz_target;

/// Of the bytes as they are: a value of etherparse's does not hold the reserved flag.
fn has_right_checksum(header: &[u8]) -> bool {
    Sum16BitWords::new().add_slice(header).ones_complement() == 0
}

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // Chance finds few right checksums.
    let mut right = bytes.to_vec();
    let header = bytes.first().map_or(0, |first| usize::from(first & 15) * 4);
    if let Some(header) = right.get_mut(..header).filter(|header| header.len() >= HEADER) {
        header[10..12].fill(0);
        let sum = isoplane::wire::checksum::checksum(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        check(&right);
    }
});

fn check(bytes: &[u8]) {
    let theirs = Ipv4HeaderSlice::from_slice(bytes).ok().filter(|header| {
        let total = usize::from(header.total_len());
        has_right_checksum(header.slice()) && total >= header.slice().len() && total <= bytes.len()
    });
    let ours = Packet::new_checked(bytes, bytes.len());
    let (Ok(packet), Some(theirs)) = (&ours, &theirs) else {
        assert!(ours.is_err() && theirs.is_none(), "{ours:?}, {theirs:?}");
        return;
    };
    assert_eq!(packet.header_len(), theirs.slice().len());
    assert_eq!(packet.total_len(), theirs.total_len());
    assert_eq!(packet.identification(), theirs.identification());
    assert_eq!(packet.dont_fragment(), theirs.dont_fragment());
    assert_eq!(packet.more_fragments(), theirs.more_fragments());
    assert_eq!(packet.fragment_offset(), u32::from(theirs.fragments_offset().value()) * 8);
    assert_eq!(packet.is_fragment(), theirs.is_fragmenting_payload());
    assert_eq!((packet.ttl(), packet.protocol()), (theirs.ttl(), theirs.protocol().0));
    assert_eq!((packet.source(), packet.destination()), (theirs.source_addr(), theirs.destination_addr()));
    assert_eq!(packet.options(), theirs.options());
    assert_eq!(packet.payload(), &bytes[packet.header_len()..packet.total_len().into()]);

    let mut end = HEADER;
    for option in Options::new(packet.options()) {
        let Ok(option) = option else { break };
        assert!(option.at >= end && option.bytes.len() >= 2);
        end = option.at + option.bytes.len();
        assert_eq!(option.bytes, &bytes[option.at..end]);
    }
    assert!(end <= packet.header_len());

    let mut copy = bytes.to_vec();
    let mut changed = Packet::new_checked(&mut copy, bytes.len()).expect("the same bytes");
    changed.decrement_ttl();
    let header = Ipv4HeaderSlice::from_slice(&copy).expect("the same but for a hop");
    assert_eq!(header.ttl(), theirs.ttl().wrapping_sub(1));
    assert!(has_right_checksum(header.slice()));

    let repr = Repr::parse(packet);
    let mut emitted = [0; HEADER];
    repr.emit(&mut emitted).expect("there is room");
    let whole = [&emitted[..], packet.payload()].concat();
    assert_eq!(Repr::parse(&Packet::new_checked(&whole[..], whole.len()).expect("our own")), repr);
}
