//! IPv4 options and IPv6 extension headers: which packets they keep from being forwarded, and what a router does
//! to them on the way.
//!
//! | what | becomes of the packet |
//! |---|---|
//! | IPv4 source route | dropped, source route failed; forwarded where configured (RFC 7126, 4.3, 4.4) |
//! | IPv4 record route | the address is written into it (RFC 1812, 5.3.13.5), unless configured otherwise |
//! | IPv4 timestamp | forwarded as it is: a worker does not know the time of day (RFC 7126, 4.7) |
//! | router alert, IPv4 or IPv6 | punted, or forwarded as it is (RFC 2113, RFC 2711, RFC 6398) |
//! | other IPv4 options | forwarded as they are (RFC 1812, 5.3.13.1) |
//! | an IPv4 option with an impossible length | dropped, parameter problem |
//! | other hop-by-hop options | forwarded as they are (RFC 8200, 4: nodes need not look) |
//! | routing header of type 0 with segments left | dropped (RFC 5095), unless configured otherwise |

use super::RouterConfig;
use super::field;
use super::general::{Objection, Refusal};
use crate::app::DropReason;
use crate::wire::ethernet::array;
use crate::wire::ipv4::option;
use crate::wire::{ipv4, ipv6};

/// Looks whether a packet with a valid header may be forwarded.
pub(super) fn check(config: &RouterConfig, packet: &[u8]) -> Result<(), Objection> {
    match packet.first().map(|first| first >> 4) {
        Some(4) => check4(config, packet),
        _ => check6(config, packet),
    }
}

const fn refuse(refusal: Refusal) -> Objection {
    Objection::Refuse(refusal, field::OPTIONS, DropReason::Options)
}

fn check4(config: &RouterConfig, packet: &[u8]) -> Result<(), Objection> {
    let [first]: [u8; 1] = array(packet, 0);
    let options = packet.get(ipv4::HEADER..usize::from(first & 15) * 4).unwrap_or_default();
    let mut alert = false;
    for option in ipv4::Options::new(options) {
        let option = option.map_err(|e| refuse(Refusal::Problem { pointer: e.at as u8 }))?;
        match option.kind {
            option::LOOSE_SOURCE_ROUTE | option::STRICT_SOURCE_ROUTE if !config.source_route => {
                return Err(refuse(Refusal::SourceRoute));
            }
            option::RECORD_ROUTE if config.record_route => {
                // The pointer counts from 1 and starts behind type, length and itself.
                let pointer = option.bytes.get(2).copied().unwrap_or(0);
                let room = option.bytes.len() as u8;
                if pointer < 4 || pointer <= room && pointer + 3 > room {
                    return Err(refuse(Refusal::Problem { pointer: option.at as u8 + 2 }));
                }
            }
            option::ROUTER_ALERT => alert = config.router_alert,
            _ => {}
        }
    }
    if alert { Err(Objection::Punt) } else { Ok(()) }
}

fn check6(config: &RouterConfig, packet: &[u8]) -> Result<(), Objection> {
    let Ok(ip) = ipv6::Packet::new_checked(packet, usize::MAX) else { return Ok(()) };
    for extension in ip.extensions() {
        match extension.kind {
            ipv6::next_header::HOP_BY_HOP
                if config.router_alert && ipv6::has_option(extension.bytes, ipv6::ROUTER_ALERT) =>
            {
                return Err(Objection::Punt);
            }
            ipv6::next_header::ROUTING => {
                let [_, _, kind, left]: [u8; 4] = array(extension.bytes, 0);
                if !config.routing_header_0 && kind == 0 && left != 0 {
                    return Err(Objection::Drop(field::OPTIONS, DropReason::Options));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Does what a router does to a packet that passes: one hop less, a route recorded. `address` is that of the
/// interface by which it leaves, 0 when it has none.
pub(super) fn pass(config: &RouterConfig, packet: &mut [u8], address: u32) {
    let Some(first) = packet.first().copied() else { return };
    if first >> 4 == 4 {
        // Only the header is looked at: whether all of the rest is here was seen before.
        let Ok(mut ip) = ipv4::Packet::new_checked(packet, usize::MAX) else { return };
        ip.decrement_ttl();
        if first & 15 > 5 && config.record_route && record_route(&mut ip, address) {
            ip.fill_checksum();
        }
    } else if let Ok(mut ip) = ipv6::Packet::new_checked(packet, usize::MAX) {
        ip.decrement_hop_limit();
    }
}

/// Writes the address into the first record route option that has room; says whether there was one.
fn record_route(ip: &mut ipv4::Packet<&mut [u8]>, address: u32) -> bool {
    let found = ipv4::Options::new(ip.options()).find_map(|option| {
        let option = option.ok().filter(|option| option.kind == option::RECORD_ROUTE)?;
        let pointer = usize::from(*option.bytes.get(2)?);
        (pointer >= 4 && pointer + 3 <= option.bytes.len()).then_some((option.at - ipv4::HEADER, pointer))
    });
    let Some((at, pointer)) = found.filter(|_| address != 0) else { return false };
    let options = ip.options_mut();
    if let Some(slot) = options.get_mut(at + pointer - 1..at + pointer + 3) {
        slot.copy_from_slice(&address.to_be_bytes());
    }
    if let Some(slot) = options.get_mut(at + 2) {
        *slot += 4;
    }
    true
}
