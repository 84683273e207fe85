//! The whole router on in-memory ports: any frames at all, in any order. It does not panic, keeps no frame, and what it
//! forwards etherparse finds valid.
//!
//! An input is a list of frames: a byte that says what to do, a length, bytes.
//!
//! | bits | what |
//! |---|---|
//! | 0-1 | the port that it arrives at; 3 is the host's |
//! | 2 | the bytes are an IP packet: put the router's address and an EtherType before it |
//! | 3 | make the checksum of its IPv4 header right |
//! | 4 | in two frames |
//! | 5-7 | before it, so many times 100 ms pass |
#![no_main]

#[path = "../../dataplane/tests/common/mod.rs"]
mod common;

use common::net::{HOST, Net, ROUTER};
use etherparse::checksum::Sum16BitWords;
use etherparse::{Ipv4HeaderSlice, Ipv6HeaderSlice};
use isoplane::wire::ipv4;
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;

/// Frames that one input may send: more than are held, less than there are.
const MOST: usize = 200;

thread_local! {
    /// Made once: laying out its tables takes longer than an input.
    static NET: RefCell<Net> = RefCell::new(Net::new());
}

/// The frame that an input asks for.
fn make(what: u8, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if what & 8 != 0 && bytes.first().is_some_and(|first| first >> 4 == 4) {
        let header = bytes.first().map_or(0, |first| usize::from(first & 15) * 4);
        if let Some(header) = bytes.get_mut(..header).filter(|header| header.len() >= ipv4::HEADER) {
            header[10..12].fill(0);
            let sum = isoplane::wire::checksum::checksum(header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
    }
    if what & 4 != 0 {
        let port = usize::from(what & 3);
        let six = bytes.first().is_some_and(|first| first >> 4 == 6);
        let mut header = [ROUTER[port], HOST].concat();
        if port == 2 {
            header.extend([0x81, 0, 0, 10]);
        }
        header.extend(if six { [0x86, 0xdd] } else { [8, 0] });
        bytes.splice(..0, header);
    }
    bytes
}

/// What leaves by a port to a network is a frame of the router's with a valid packet.
fn check(frame: &[u8]) {
    let mut rest = &frame[12..];
    if rest.starts_with(&[0x81, 0]) {
        rest = &rest[4..];
    }
    let (kind, packet) = rest.split_first_chunk::<2>().expect("an EtherType");
    match kind {
        [8, 0] => {
            let header = Ipv4HeaderSlice::from_slice(packet).expect("an IPv4 header");
            assert!(usize::from(header.total_len()) <= packet.len());
            // Of the bytes as they are: a value of etherparse's does not hold the reserved flag.
            let sum = Sum16BitWords::new().add_slice(header.slice()).ones_complement();
            assert_eq!(sum, 0, "checksum {:04x}", header.header_checksum());
            assert_ne!(header.ttl(), 0);
        }
        [0x86, 0xdd] => {
            let header = Ipv6HeaderSlice::from_slice(packet).expect("an IPv6 header");
            assert!(40 + usize::from(header.payload_length()) <= packet.len());
            assert_ne!(header.hop_limit(), 0);
        }
        other => panic!("forwarded: EtherType {other:02x?}"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    NET.with_borrow_mut(|net| {
        let (mut rest, mut from_host) = (bytes, false);
        for _ in 0..MOST {
            let Some(([what, high, low], more)) = rest.split_first_chunk::<3>() else { break };
            let len = usize::from(u16::from_be_bytes([*high, *low]) % 1500).min(more.len());
            let (bytes, more) = more.split_at(len);
            rest = more;
            net.now += u64::from(what >> 5) * 100_000_000;
            let port = usize::from(what & 3);
            from_host |= port == common::net::TAP;
            let frame = make(*what, bytes);
            if what & 16 != 0 && frame.len() > 1 {
                let (one, other) = frame.split_at(frame.len() / 2);
                net.put_frames(port, vec![one.to_vec(), other.to_vec()]);
            } else {
                net.put(port, &frame);
            }
        }
        net.run();
        net.drain();
        net.turn();
        let left = net.take();
        if !from_host {
            left[..3].iter().flatten().for_each(|packet| check(&packet.concat()));
        }
        net.asked();
        let free = net.counter("free_frames");
        assert_eq!(free, 1024, "every frame is back");
    });
});
