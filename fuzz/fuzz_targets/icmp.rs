//! ICMP errors of both versions: whatever they quote, etherparse finds their type and a right checksum.
#![no_main]

use etherparse::{Icmpv4Slice, Icmpv6Slice};
use isoplane::wire::{icmp4, icmp6};
use libfuzzer_sys::fuzz_target;
use std::net::Ipv6Addr;

fuzz_target!(|bytes: &[u8]| {
    let Some((head, quoted)) = bytes.split_first_chunk::<37>() else { return };
    let number = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    let four = match head[0] % 8 {
        0 => icmp4::Error::NetUnreachable,
        1 => icmp4::Error::HostUnreachable,
        2 => icmp4::Error::FragmentationNeeded { mtu: number as u16 },
        3 => icmp4::Error::SourceRouteFailed,
        4 => icmp4::Error::Prohibited,
        5 => icmp4::Error::Redirect { gateway: number.into() },
        6 => icmp4::Error::TimeExceeded,
        _ => icmp4::Error::ParameterProblem { pointer: number as u8 },
    };
    let mut message = [&[0xa5; 8], quoted].concat();
    four.emit(&mut message).expect("there is a header");
    let read = Icmpv4Slice::from_slice(&message).expect("a message");
    let (kind, code, rest) = four.header();
    assert_eq!((read.type_u8(), read.code_u8()), (kind, code));
    assert_eq!(message[4..8], rest);
    assert_eq!(message[8..], *quoted);
    let sum = etherparse::checksum::Sum16BitWords::new().add_slice(read.slice()).ones_complement();
    assert_eq!(sum, 0, "the checksum is right");

    let address = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&head[at..at + 16]).expect("16 bytes"));
    let (source, destination) = (address(5), address(21));
    let six = match head[0] % 7 {
        0 => icmp6::Error::NoRoute,
        1 => icmp6::Error::Prohibited,
        2 => icmp6::Error::BeyondScope,
        3 => icmp6::Error::AddressUnreachable,
        4 => icmp6::Error::RejectRoute,
        5 => icmp6::Error::PacketTooBig { mtu: number },
        _ => icmp6::Error::TimeExceeded,
    };
    let mut message = [&[0xa5; 8], quoted].concat();
    six.emit(source, destination, &mut message).expect("there is a header");
    let read = Icmpv6Slice::from_slice(&message).expect("a message");
    let (kind, code, rest) = six.header();
    assert_eq!((read.type_u8(), read.code_u8(), &message[4..8]), (kind, code, &rest.to_be_bytes()[..]));
    assert!(read.is_checksum_valid(source.octets(), destination.octets()));
    for short in 0..8 {
        assert!(four.emit(&mut message[..short]).is_err());
        assert!(six.emit(source, destination, &mut message[..short]).is_err());
    }
});
