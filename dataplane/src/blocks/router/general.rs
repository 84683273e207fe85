//! The way of packets that are not plain: each check in its turn, and what follows from it.
//!
//! Contract: bounded work a packet, nothing kept but what waits for a neighbour. A packet is changed only when
//! everything about it is decided, so that error messages quote it as it came.

use super::fast::{reachable, resize_header};
use super::lines::{DIRECTED_BROADCAST, FORWARD4, FORWARD6, Line, REDIRECTS, UP};
use super::pending::Neighbour;
use super::{Router, field, martian, options};
use crate::app::{DropReason, PortId, Turn};
use crate::tables::{InterfaceId, NextHop, NextHopId};
use crate::wire::ethernet::{EtherType, MacAddress, Packet, Repr};
use crate::wire::{ipv4, ipv6};
use isoplane_memory::{Batch, FrameFlags, Pool};
use std::net::IpAddr;

/// Ethernet's shortest frame, without its check sequence.
const SHORTEST: usize = 60;

/// How a packet came. While it waits this is the mark of its first frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// Place of the interface that it came in by.
    pub(super) place: u16,
    /// Bytes of its Ethernet header.
    pub(super) header: u8,
    /// It was made here.
    pub(super) own: bool,
}

impl Way {
    pub(super) const fn to_mark(self) -> u32 {
        self.place as u32 | (self.header as u32) << 16 | (self.own as u32) << 24
    }

    pub(super) const fn from_mark(mark: u32) -> Self {
        Self { place: mark as u16, header: (mark >> 16) as u8, own: mark >> 24 != 0 }
    }

    pub(super) const fn header(self) -> usize {
        self.header as usize
    }
}

/// What is read of a valid header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// Bytes of the packet.
    pub(super) total: u32,
    pub(super) hops: u8,
    /// Must it stay whole?
    pub(super) whole: bool,
}

impl Head {
    const fn ethertype(&self) -> EtherType {
        if self.source.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 }
    }
}

/// An error message that a packet is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    NoRoute,
    Rejected,
    Prohibited,
    NoAnswer,
    Expired,
    TooBig { mtu: u16 },
    BeyondScope,
    SourceRoute,
    Problem { pointer: u8 },
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Objection {
    Drop(usize, DropReason),
    Refuse(Refusal, usize, DropReason),
    Punt,
}

/// Which limit a packet for the host is under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Link,
    Local,
}

/// Bytes of the packet behind `from` bytes of it, copied; says how many there were.
pub(super) fn copy_out(pool: &Pool, packet: &Batch, from: usize, to: &mut [u8]) -> usize {
    let (mut skip, mut done) = (from, 0);
    for frame in packet.iter() {
        let bytes = pool.bytes(frame);
        let part = bytes.get(skip..).unwrap_or_default();
        skip = skip.saturating_sub(bytes.len());
        let room = to.get_mut(done..).unwrap_or_default();
        let n = part.len().min(room.len());
        room[..n].copy_from_slice(&part[..n]);
        done += n;
    }
    done
}

/// The packet behind its Ethernet header, as far as the first frame holds it.
pub(super) fn start<'a>(pool: &'a Pool, packet: &'a Batch, way: Way) -> &'a [u8] {
    let bytes = packet.as_slice().first().map_or(&[][..], |frame| pool.bytes(frame));
    bytes.get(way.header()..).unwrap_or_default()
}

/// Reads the header of a packet; `None` when it is not valid.
pub(super) fn head(pool: &Pool, packet: &Batch, way: Way) -> Option<Head> {
    let bytes = start(pool, packet, way);
    let arrived = (packet.bytes() as usize).saturating_sub(way.header());
    if bytes.first()? >> 4 == 4 {
        let ip = ipv4::Packet::new_checked(bytes, arrived).ok()?;
        return Some(Head {
            source: ip.source().into(),
            destination: ip.destination().into(),
            total: ip.total_len().into(),
            hops: ip.ttl(),
            whole: ip.dont_fragment(),
        });
    }
    let ip = ipv6::Packet::new_checked(bytes, arrived).ok()?;
    // With a payload of no bytes there are no options either: a jumbogram (RFC 2675), which we do not take.
    let jumbogram = ip.payload_len() == 0 && ip.next_header() == ipv6::next_header::HOP_BY_HOP;
    (!jumbogram).then(|| Head {
        source: ip.source().into(),
        destination: ip.destination().into(),
        total: ip.total_len(),
        hops: ip.hop_limit(),
        whole: true,
    })
}

impl Router {
    /// Takes a packet that is not plain.
    #[cold]
    #[inline(never)]
    pub(super) fn general(&mut self, turn: &mut Turn<'_>, from: PortId, packet: &mut Batch) {
        turn.count(field::GENERAL, 1);
        let pool = turn.pool();
        let Some(first) = packet.as_slice().first() else { return };
        if packet.as_slice().last().is_some_and(|frame| frame.has_more()) {
            // The batch has ended within a packet: its port broke the contract, and the rest is not to come.
            return turn.drop_all(packet, DropReason::Malformed);
        }
        let Some(ethernet) = Packet::new_checked(pool.bytes(first)).ok().and_then(|p| Repr::parse(&p).ok())
        else {
            return turn.drop_all(packet, DropReason::Malformed);
        };
        let place = self.lines.place(from, ethernet.tag.map_or(0, |tag| tag.vlan));
        let line = self.lines.at(place);
        if !line.has(UP) {
            turn.count(field::NO_INTERFACE, 1);
            return turn.drop_all(packet, DropReason::NoInterface);
        }
        let group = ethernet.destination.is_group();
        if !group && ethernet.destination.to_bits() != line.mac || !ethernet.source.is_station() {
            turn.count(field::NOT_OURS, 1);
            return turn.drop_all(packet, DropReason::Policy);
        }
        let way = Way { place, header: ethernet.header_len() as u8, own: false };
        let version = match ethernet.ethertype {
            EtherType::IPV4 => 4,
            EtherType::IPV6 => 6,
            _ => return self.punt(turn, from, packet, Class::Link),
        };
        let head = head(pool, packet, way).filter(|head| head.source.is_ipv4() == (version == 4));
        let Some(head) = head else {
            turn.count(field::BAD_HEADER, 1);
            return turn.drop_all(packet, DropReason::Malformed);
        };
        let (martian, for_link) = match (head.source, head.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => (
                martian::source4(source) || martian::destination4(destination),
                destination.is_multicast() || destination.is_broadcast(),
            ),
            (IpAddr::V6(source), IpAddr::V6(destination)) => (
                martian::source6(source) || martian::destination6(destination),
                // Everything that a link is asked for comes from somewhere, or from nowhere yet.
                !source.is_multicast() && (destination.is_multicast() || destination.is_unicast_link_local()),
            ),
            _ => (true, false),
        };
        if for_link {
            return self.punt(turn, from, packet, Class::Link);
        }
        if martian {
            turn.count(field::MARTIAN, 1);
            return turn.drop_all(packet, DropReason::Martian);
        }
        if group {
            // RFC 1812, 5.3.4: only what is for the host itself, by an address or a broadcast address.
            let (_, next_hop) = self.next_hop(&head, start(pool, packet, way));
            let broadcast = matches!(next_hop, NextHop::Forward { mac, .. } if mac.is_group());
            if next_hop == NextHop::Local || broadcast {
                return self.punt(turn, from, packet, Class::Link);
            }
            turn.count(field::LINK_BROADCAST, 1);
            return turn.drop_all(packet, DropReason::Policy);
        }
        self.route(turn, packet, way);
    }

    fn next_hop(&self, head: &Head, packet: &[u8]) -> (NextHopId, NextHop) {
        self.next_hop_of(head.destination, packet)
    }

    /// Where a flow goes, to an address: the member, for a group. `packet` is one of the flow's.
    pub(super) fn next_hop_of(&self, address: IpAddr, packet: &[u8]) -> (NextHopId, NextHop) {
        let (id, hash) = match address {
            IpAddr::V4(to) => (self.tables.fib4.lookup(to.to_bits()), self.flow.of4(packet)),
            IpAddr::V6(to) => (self.tables.fib6.lookup(to.to_bits()), self.flow.of6(packet)),
        };
        let NextHop::Group(group) = self.tables.next_hops.get(id) else {
            return (id, self.tables.next_hops.get(id));
        };
        let id = self.tables.next_hops.member(group, hash);
        match self.tables.next_hops.get(id) {
            NextHop::Group(_) => (id, NextHop::None),
            what => (id, what),
        }
    }

    /// Sends a packet with a valid header on its way; also one that has waited, and one of our own.
    pub(super) fn route(&mut self, turn: &mut Turn<'_>, packet: &mut Batch, way: Way) {
        let pool = turn.pool();
        let Some(head) = head(pool, packet, way) else {
            return turn.drop_all(packet, DropReason::Malformed);
        };
        let (id, next_hop) = self.next_hop(&head, start(pool, packet, way));
        if next_hop == NextHop::Local {
            let from = self.lines.at(way.place).port();
            return match way.own {
                false => self.punt(turn, from, packet, Class::Local),
                true => turn.drop_all(packet, DropReason::Policy),
            };
        }
        if !way.own
            && let Err(objection) = self.may_forward(&head, start(pool, packet, way), way)
        {
            return self.object(turn, packet, way, objection);
        }
        let refuse = |refusal| Objection::Refuse(refusal, field::NO_ROUTE, DropReason::NoRoute);
        match next_hop {
            NextHop::Forward { interface, mac } => {
                self.deliver(turn, packet, way, &head, (interface, id), mac)
            }
            NextHop::OnLink { interface } => {
                self.hold(turn, packet, way, Neighbour::OnLink(interface, head.destination));
            }
            NextHop::Waiting { interface } => {
                let neighbour = self.waited_for(id, interface, head.destination);
                self.hold(turn, packet, way, neighbour);
            }
            NextHop::Failed { .. } => {
                self.ask_again(turn, id);
                let none = Objection::Refuse(Refusal::NoAnswer, field::HELD_TIMEOUT, DropReason::Resolution);
                self.object(turn, packet, way, none);
            }
            NextHop::Blackhole => {
                self.object(turn, packet, way, Objection::Drop(field::NO_ROUTE, DropReason::NoRoute));
            }
            NextHop::Unreachable => self.object(turn, packet, way, refuse(Refusal::Rejected)),
            NextHop::Prohibit => self.object(turn, packet, way, refuse(Refusal::Prohibited)),
            NextHop::None | NextHop::Local | NextHop::Group(_) => {
                self.object(turn, packet, way, refuse(Refusal::NoRoute));
            }
        }
    }

    /// Checks everything that a router checks about packets for others.
    fn may_forward(&self, head: &Head, packet: &[u8], way: Way) -> Result<(), Objection> {
        let line = self.lines.at(way.place);
        let forwards = if head.source.is_ipv4() { FORWARD4 } else { FORWARD6 };
        if !line.has(forwards) {
            return Err(Objection::Drop(field::NOT_FORWARDING, DropReason::Policy));
        }
        let back = match (head.source, head.destination) {
            // RFC 3927, 2.7.
            (IpAddr::V4(source), IpAddr::V4(destination))
                if source.is_link_local() || destination.is_link_local() =>
            {
                return Err(Objection::Drop(field::MARTIAN, DropReason::Martian));
            }
            // RFC 4291, 2.5.6; RFC 4443, 3.1.
            (IpAddr::V6(source), _) if source.is_unicast_link_local() => {
                return Err(Objection::Refuse(Refusal::BeyondScope, field::MARTIAN, DropReason::Martian));
            }
            (IpAddr::V4(source), _) => self.tables.fib4.lookup(source.to_bits()),
            (IpAddr::V6(source), _) => self.tables.fib6.lookup(source.to_bits()),
        };
        if !reachable(&self.tables, line.flags, way.place, back) {
            return Err(Objection::Drop(field::REVERSE_PATH, DropReason::ReversePath));
        }
        options::check(&self.config, packet)?;
        if head.hops <= 1 {
            return Err(Objection::Refuse(Refusal::Expired, field::EXPIRED, DropReason::HopLimit));
        }
        Ok(())
    }

    /// Does what an objection says.
    pub(super) fn object(&mut self, turn: &mut Turn<'_>, packet: &mut Batch, way: Way, what: Objection) {
        match what {
            Objection::Drop(field, reason) => {
                turn.count(field, 1);
                turn.drop_all(packet, reason);
            }
            Objection::Refuse(refusal, field, reason) => {
                self.error(turn, packet, way, refusal);
                turn.count(field, 1);
                turn.drop_all(packet, reason);
            }
            Objection::Punt => {
                let from = self.lines.at(way.place).port();
                self.punt(turn, from, packet, Class::Local);
            }
        }
    }

    /// Hands a packet to the host, unchanged.
    fn punt(&mut self, turn: &mut Turn<'_>, from: PortId, packet: &mut Batch, class: Class) {
        let Some(port) = self.ports.get_mut(from.index()) else {
            return turn.drop_all(packet, DropReason::NoPort);
        };
        let Some(to) = port.punt else {
            turn.count(field::PUNT_UNAVAILABLE, 1);
            return turn.drop_all(packet, DropReason::Punt);
        };
        let bucket = match class {
            Class::Link => &mut port.link,
            Class::Local => &mut port.local,
        };
        if !bucket.take(turn.now()) {
            turn.count(field::PUNT_LIMITED, 1);
            return turn.drop_all(packet, DropReason::Punt);
        }
        turn.count(field::PUNTED, 1);
        turn.send_all(to, packet);
    }

    /// Sends a packet to a neighbour whose Ethernet address is known.
    pub(super) fn deliver(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &mut Batch,
        way: Way,
        head: &Head,
        (interface, id): (InterfaceId, NextHopId),
        mac: MacAddress,
    ) {
        let out = *self.lines.get(interface);
        if !out.has(UP) {
            let down = Objection::Drop(field::NO_INTERFACE, DropReason::NoInterface);
            return self.object(turn, packet, way, down);
        }
        if mac.is_group() && (way.own || !out.has(DIRECTED_BROADCAST)) {
            // RFC 2644.
            let broadcast = Objection::Drop(field::LINK_BROADCAST, DropReason::Policy);
            return self.object(turn, packet, way, broadcast);
        }
        if head.total > u32::from(out.mtu) {
            if !head.whole {
                return self.fragment(turn, packet, way, &out, mac);
            }
            let too_big = Refusal::TooBig { mtu: out.mtu };
            let too_big = Objection::Refuse(too_big, field::TOO_BIG, DropReason::TooBig);
            return self.object(turn, packet, way, too_big);
        }
        if out.has(REDIRECTS) && interface.get() == way.place && !way.own && !mac.is_group() {
            self.redirect(turn, packet, way, head, (interface, id));
        }
        self.send(turn, packet, way, head, &out, mac);
    }

    /// Takes a hop off, writes the Ethernet header, and sends.
    pub(super) fn send(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &mut Batch,
        way: Way,
        head: &Head,
        out: &Line,
        mac: MacAddress,
    ) {
        let pool = turn.pool();
        trim(turn, packet, way.header() + head.total as usize);
        let Some(first) = packet.as_mut_slice().first_mut() else { return };
        if !resize_header(pool, first, way.header(), out.header()) {
            turn.count(field::NO_ROOM, 1);
            return turn.drop_all(packet, DropReason::Malformed);
        }
        let bytes = pool.bytes_mut(first);
        out.write_header(bytes, mac.to_bits(), head.ethertype());
        if !way.own {
            let ip = bytes.get_mut(out.header()..).unwrap_or_default();
            options::pass(&self.config, ip, out.address4);
            let counter = if head.source.is_ipv4() { field::FORWARDED4 } else { field::FORWARDED6 };
            turn.count(counter, 1);
        }
        turn.send_all(out.port(), packet);
    }
}

/// Takes off what a link has added behind a packet of `len` bytes, its own header included.
fn trim(turn: &mut Turn<'_>, packet: &mut Batch, len: usize) {
    let mut left = len.max(SHORTEST);
    if packet.bytes() as usize <= left {
        return;
    }
    let mut rest = Batch::new();
    let mut kept = Batch::new();
    for mut frame in packet.drain() {
        let to = if left == 0 { &mut rest } else { &mut kept };
        let here = usize::from(frame.len());
        if here >= left && left != 0 {
            frame.truncate(left as u16);
            frame.set_flags(frame.flags() - FrameFlags::MORE);
        }
        left = left.saturating_sub(here);
        // As many frames as the packet had, which fit a batch.
        let _ = to.push(frame).map_err(|frame| turn.drop(frame, DropReason::Malformed));
    }
    turn.give_back(&mut rest);
    kept.move_to(packet, isoplane_memory::BATCH);
}
