//! IPv6 headers and extension headers: the fixed header is read as etherparse reads it; extension headers follow each
//! other inside the packet, and the walk comes to an end.
#![no_main]

use etherparse::Ipv6HeaderSlice;
use isoplane::wire::ipv6::{HEADER, Packet, Repr, has_option, may_be_error};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let theirs = Ipv6HeaderSlice::from_slice(bytes)
        .ok()
        .filter(|header| HEADER + usize::from(header.payload_length()) <= bytes.len());
    let ours = Packet::new_checked(bytes, bytes.len());
    let (Ok(packet), Some(theirs)) = (&ours, &theirs) else {
        assert!(ours.is_err() && theirs.is_none(), "{ours:?}, {theirs:?}");
        return;
    };
    assert_eq!(packet.traffic_class(), theirs.traffic_class());
    assert_eq!(packet.flow_label(), theirs.flow_label().value());
    assert_eq!(packet.payload_len(), theirs.payload_length());
    assert_eq!((packet.next_header(), packet.hop_limit()), (theirs.next_header().0, theirs.hop_limit()));
    assert_eq!((packet.source(), packet.destination()), (theirs.source_addr(), theirs.destination_addr()));
    let end = HEADER + usize::from(packet.payload_len());
    assert_eq!(packet.payload(), &bytes[HEADER..end]);

    let mut extensions = packet.extensions();
    let (mut at, mut next, mut walked) = (HEADER, packet.next_header(), 0);
    for extension in extensions.by_ref() {
        assert_eq!((extension.at, extension.kind), (at, next), "one after the other");
        assert!(extension.bytes.len() >= 8 && extension.bytes.len().is_multiple_of(4));
        next = extension.bytes[0];
        at += extension.bytes.len();
        assert_eq!(extension.bytes, &bytes[extension.at..at]);
        let _ = has_option(extension.bytes, 5);
        walked += 1;
    }
    assert!(at <= end && walked <= 16);
    if let Some((kind, upper)) = extensions.upper() {
        assert_eq!((kind, upper), (next, &bytes[at..end]));
    }
    let _ = may_be_error(packet);

    let repr = Repr::parse(packet);
    let mut copy = bytes.to_vec();
    copy[..HEADER].fill(0);
    repr.emit(&mut copy).expect("as long as before");
    assert_eq!(copy, bytes);
});
