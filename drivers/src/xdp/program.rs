//! From steering rules to the instructions of an XDP program.
//!
//! ```text
//! parse: Ethernet, up to two VLAN tags, IPv4 or IPv6, ports      (skipped when everything is taken)
//! rules: each in turn; the first that matches decides
//! take:  redirect to the socket of this queue; without one, pass
//! pass:  the kernel's own
//! ```
//!
//! Contract: the program reads a packet only after it has compared with the packet's end, has no loops,
//! calls one helper, and keeps nothing. After parsing: `R0` outer EtherType, `R1` inner EtherType (both
//! as they are in memory), `R3` IP version (0: none), `R4` protocol, `R5` source and `R2` destination
//! port as in memory (`NONE`: none), `R6` context, `R9` the IP header.

use super::asm::{Assembler, Label, Reg, Width};
use super::layout::{Insn, bpf};
use super::steering::{Prefix, Rule, Steering};
use Reg::{R0, R1, R2, R3, R4, R5, R6, R7, R8, R9};
use Width::{W1, W2, W4};
use std::net::IpAddr;

/// No port and no protocol: larger than any.
const NONE: i32 = 0x1_0000;

/// Offsets in `struct xdp_md`.
const MD_DATA: i16 = 0;
const MD_DATA_END: i16 = 4;
const MD_RX_QUEUE: i16 = 16;

/// Makes the program; `map_fd` is the map of sockets.
pub(super) fn assemble(steering: &Steering, map_fd: i32) -> Option<Vec<Insn>> {
    let mut asm = Assembler::default();
    if matches!(steering, Steering::Matching(rules) if rules.is_empty()) {
        // A port that only sends. The verifier wants no code that is never reached.
        asm.set(R0, bpf::XDP_PASS);
        asm.exit();
        return asm.finish();
    }
    let parsing = !steering.rules().is_empty();
    let (take, pass) = (asm.label(), asm.label());
    asm.mov(R6, R1);
    let (hit, miss) = match steering {
        Steering::Everything => (take, take),
        Steering::Matching(_) => (take, pass),
        Steering::Excluding(_) => (pass, take),
    };
    if parsing {
        parse(&mut asm, pass);
        for rule in steering.rules() {
            let next = asm.label();
            check(&mut asm, rule, next);
            asm.jump(hit);
            asm.place(next);
        }
    }
    asm.jump(miss);
    asm.place(take);
    asm.load(W4, R2, R6, MD_RX_QUEUE);
    asm.load_map(R1, map_fd);
    // The flags' low bits are the verdict where the map has no socket.
    asm.set(R3, bpf::XDP_PASS);
    asm.call(bpf::HELPER_REDIRECT_MAP);
    asm.exit();
    if parsing {
        asm.place(pass);
        asm.set(R0, bpf::XDP_PASS);
        asm.exit();
    }
    asm.finish()
}

/// The value that a 16-bit load gives for a number in network order.
const fn wire16(value: u16) -> u32 {
    value.to_be() as u32
}

/// Jumps to `else_` unless `bytes` more bytes follow `base`.
fn need(asm: &mut Assembler, base: Reg, bytes: i32, else_: Label) {
    asm.mov(R2, base);
    asm.add(R2, bytes);
    asm.jump_if_above(R2, R8, else_);
}

fn parse(asm: &mut Assembler, pass: Label) {
    let (rules, ports, v6, typed) = (asm.label(), asm.label(), asm.label(), asm.label());
    let no_ip = asm.label();
    asm.load(W4, R9, R6, MD_DATA);
    asm.load(W4, R8, R6, MD_DATA_END);
    need(asm, R9, 14, pass);
    asm.load(W2, R0, R9, 12);
    asm.mov(R1, R0);
    asm.add(R9, 14);
    for _ in 0..2 {
        let tag = asm.label();
        asm.jump_if(R1, wire16(0x8100), tag);
        asm.jump_if(R1, wire16(0x88a8), tag);
        asm.jump(typed);
        asm.place(tag);
        need(asm, R9, 4, no_ip);
        asm.load(W2, R1, R9, 2);
        asm.add(R9, 4);
    }
    asm.place(typed);
    asm.jump_if(R1, wire16(0x86dd), v6);
    asm.jump_unless(R1, wire16(0x0800), no_ip);

    need(asm, R9, 20, no_ip);
    asm.load(W1, R7, R9, 0);
    asm.mov(R2, R7);
    asm.and(R2, 0xf0);
    asm.jump_unless(R2, 0x40, no_ip);
    asm.set(R3, 4);
    asm.load(W1, R4, R9, 9);
    asm.and(R7, 0x0f);
    asm.shift_left(R7, 2);
    // A header shorter than its own minimum is no header: let it have no ports.
    let (short, whole) = (asm.label(), asm.label());
    for words in 0..5 {
        asm.jump_if(R7, words * 4, short);
    }
    // Fragments other than the first carry no ports.
    asm.load(W2, R2, R9, 6);
    asm.and(R2, wire16(0x1fff));
    asm.jump_if(R2, 0, whole);
    asm.place(short);
    asm.set(R5, NONE);
    asm.set(R2, NONE);
    asm.jump(rules);
    asm.place(whole);
    asm.add_reg(R7, R9);
    asm.jump(ports);

    asm.place(v6);
    need(asm, R9, 40, no_ip);
    asm.set(R3, 6);
    asm.load(W1, R4, R9, 6);
    asm.mov(R7, R9);
    asm.add(R7, 40);

    asm.place(ports);
    let (with_ports, without) = (asm.label(), asm.label());
    for protocol in [6, 17, 132] {
        asm.jump_if(R4, protocol, with_ports);
    }
    asm.place(without);
    asm.set(R5, NONE);
    asm.set(R2, NONE);
    asm.jump(rules);
    asm.place(with_ports);
    need(asm, R7, 4, without);
    asm.load(W2, R5, R7, 0);
    asm.load(W2, R2, R7, 2);
    asm.jump(rules);

    asm.place(no_ip);
    asm.set(R3, 0);
    asm.set(R4, NONE);
    asm.set(R5, NONE);
    asm.set(R2, NONE);
    asm.place(rules);
}

/// Goes on only if the rule matches; else to `next`.
fn check(asm: &mut Assembler, rule: &Rule, next: Label) {
    if let Some(ether_type) = rule.ether_type {
        let matched = asm.label();
        asm.jump_if(R0, wire16(ether_type), matched);
        asm.jump_unless(R1, wire16(ether_type), next);
        asm.place(matched);
    }
    if rule.not_ip {
        for version in [0x0800, 0x86dd] {
            asm.jump_if(R1, wire16(version), next);
        }
    }
    if let Some(protocol) = rule.protocol {
        asm.jump_unless(R4, u32::from(protocol), next);
    }
    if let Some(port) = rule.source_port {
        asm.jump_unless(R5, wire16(port), next);
    }
    if let Some(port) = rule.destination_port {
        asm.jump_unless(R2, wire16(port), next);
    }
    if let Some(prefix) = rule.source {
        address(asm, prefix, 12, 8, next);
    }
    if let Some(prefix) = rule.destination {
        address(asm, prefix, 16, 24, next);
    }
}

/// Compares an address, at `v4` or `v6` bytes into the IP header, with a prefix.
fn address(asm: &mut Assembler, prefix: Prefix, v4: i16, v6: i16, next: Label) {
    let (version, at, octets) = match prefix.address {
        IpAddr::V4(address) => (4, v4, address.octets().to_vec()),
        IpAddr::V6(address) => (6, v6, address.octets().to_vec()),
    };
    asm.jump_unless(R3, version, next);
    let mut left = u32::from(prefix.length);
    for (place, word) in (at..).step_by(4).zip(octets.chunks_exact(4)) {
        let bits = left.min(32);
        if bits == 0 {
            break;
        }
        left -= bits;
        let mask = (u32::MAX << (32 - bits)).to_be();
        let want = word.try_into().map_or(0, u32::from_ne_bytes) & mask;
        asm.load(W4, R7, R9, place);
        if bits < 32 {
            asm.and(R7, mask);
        }
        asm.jump_unless(R7, want, next);
    }
}
