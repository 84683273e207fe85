//! Error messages: when one is due and allowed, what it quotes, where it comes from, how often.
//!
//! Contract: no message is sent about an error message, a fragment other than the first, a packet to several
//! hosts, or to anything but one host (RFC 1812, 4.3.2.7; RFC 4443, 2.4 (e)). One message quotes the packet as it
//! came, as much as fits in 576 bytes (RFC 1812, 4.3.2.3), for IPv6 1280 (RFC 4443, 2.4 (c)); it has the address
//! of the interface that it leaves by (RFC 1812, 4.3.2.4), and precedence "internetwork control" (4.3.2.5). It is
//! routed like any other packet, and waits for neighbours like one.
//!
//! IPv6 redirects are not sent: they must come from the router's link-local address on that link (RFC 4861, 8.2),
//! which the tables do not hold.

use super::general::{Head, Refusal, Way, copy_out, head, start};
use super::{Router, field, martian};
use crate::app::{DropReason, Turn};
use crate::tables::{InterfaceId, NextHop, NextHopId};
use crate::wire::ethernet::{HEADER, MacAddress, Packet};
use crate::wire::ipv4::protocol;
use crate::wire::{icmp4, icmp6, ipv4, ipv6};
use isoplane_memory::Batch;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Hops of a message (RFC 1812, 4.2.2.9 with the number of RFC 1700).
const HOPS: u8 = 64;
/// Class selector 6, internetwork control.
const CONTROL: u8 = 0xc0;

/// Why a message was not sent.
enum Not {
    Forbidden,
    Limited,
    Failed,
}

impl Refusal {
    const fn icmp4(self) -> icmp4::Error {
        match self {
            Self::NoRoute | Self::BeyondScope => icmp4::Error::NetUnreachable,
            Self::Rejected | Self::NoAnswer => icmp4::Error::HostUnreachable,
            Self::Prohibited => icmp4::Error::Prohibited,
            Self::Expired => icmp4::Error::TimeExceeded,
            Self::TooBig { mtu } => icmp4::Error::FragmentationNeeded { mtu },
            Self::SourceRoute => icmp4::Error::SourceRouteFailed,
            Self::Problem { pointer } => icmp4::Error::ParameterProblem { pointer },
        }
    }

    const fn icmp6(self) -> icmp6::Error {
        match self {
            Self::NoRoute => icmp6::Error::NoRoute,
            Self::Rejected => icmp6::Error::RejectRoute,
            Self::NoAnswer => icmp6::Error::AddressUnreachable,
            Self::Expired => icmp6::Error::TimeExceeded,
            Self::TooBig { mtu } => icmp6::Error::PacketTooBig { mtu: mtu as u32 },
            Self::BeyondScope => icmp6::Error::BeyondScope,
            // The rest is about IPv4 options but for the first.
            Self::Prohibited | Self::SourceRoute | Self::Problem { .. } => icmp6::Error::Prohibited,
        }
    }

    const fn counter(self) -> usize {
        match self {
            Self::Expired => field::SENT_TIME_EXCEEDED,
            Self::TooBig { .. } => field::SENT_TOO_BIG,
            Self::Problem { .. } => field::SENT_PARAMETER_PROBLEM,
            _ => field::SENT_UNREACHABLE,
        }
    }
}

impl Router {
    /// Sends an error message about a packet, if one may be sent.
    pub(super) fn error(&mut self, turn: &mut Turn<'_>, packet: &Batch, way: Way, refusal: Refusal) {
        if way.own {
            return;
        }
        let Some(head) = head(turn.pool(), packet, way) else { return };
        let sent = match (head.source, head.destination) {
            (IpAddr::V4(host), IpAddr::V4(_)) => self.error4(turn, packet, way, &head, host, refusal.icmp4()),
            (IpAddr::V6(host), IpAddr::V6(_)) => self.error6(turn, packet, way, &head, host, refusal.icmp6()),
            _ => return,
        };
        count(turn, sent, refusal.counter());
    }

    /// Tells a host of a better gateway (RFC 1812, 5.2.7.2): the packet leaves by the interface that it came in by,
    /// and its source is a neighbour there.
    pub(super) fn redirect(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &Batch,
        way: Way,
        head: &Head,
        to: (InterfaceId, NextHopId),
    ) {
        let (IpAddr::V4(host), IpAddr::V4(_)) = (head.source, head.destination) else { return };
        let Some(IpAddr::V4(gateway)) = self.tables.next_hops.address(to.1) else { return };
        let source = self.tables.next_hops.get(self.tables.fib4.lookup(host.to_bits()));
        let neighbour = NextHop::Forward { interface: to.0, mac: sender(turn, packet) };
        if source == neighbour {
            let redirect = icmp4::Error::Redirect { gateway };
            let sent = self.error4(turn, packet, way, head, host, redirect);
            count(turn, sent, field::SENT_REDIRECT);
        }
    }

    fn error4(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &Batch,
        way: Way,
        head: &Head,
        host: Ipv4Addr,
        error: icmp4::Error,
    ) -> Result<(), Not> {
        let pool = turn.pool();
        let bytes = start(pool, packet, way);
        let ip = ipv4::Packet::new_checked(bytes, usize::MAX).map_err(|_| Not::Forbidden)?;
        let is_error = ip.protocol() == protocol::ICMP
            && ip.payload().first().is_none_or(|kind| !icmp4::is_query(*kind));
        if is_error || ip.fragment_offset() != 0 || martian::source4(host) {
            return Err(Not::Forbidden);
        }
        let (_, back) = self.next_hop_of(host.into(), bytes);
        match back {
            // Not one host, or ourselves.
            NextHop::Local => return Err(Not::Forbidden),
            NextHop::Forward { mac, .. } if mac.is_group() => return Err(Not::Forbidden),
            _ => {}
        }
        if !self.errors4.take(self.flow.of_host(host.to_bits().into()), turn.now()) {
            return Err(Not::Limited);
        }
        let out = back.interface().ok_or(Not::Failed)?;
        let source = self.lines.address4(out.get(), way.place).ok_or(Not::Failed)?;
        let quoted = (head.total as usize).min(icmp4::LONGEST - ipv4::HEADER - icmp4::HEADER);
        let message = icmp4::HEADER + quoted;
        let repr = ipv4::Repr {
            tos: CONTROL,
            // Not fragmented on the way, so the identification has no meaning (RFC 6864, 4.1).
            identification: 0,
            dont_fragment: true,
            ttl: HOPS,
            protocol: protocol::ICMP,
            source,
            destination: host,
            payload_len: message as u16,
        };
        let len = HEADER + ipv4::HEADER + message;
        let mut frame = turn.new_frame(len as u16).ok_or(Not::Failed)?;
        let made = pool.bytes_mut(&mut frame).get_mut(HEADER..).is_some_and(|ip| {
            let Some((header, message)) = ip.split_at_mut_checked(ipv4::HEADER) else { return false };
            copy_out(pool, packet, way.header(), &mut message[icmp4::HEADER..]);
            error.emit(message).and_then(|()| repr.emit(header)).is_ok()
        });
        self.send_own(turn, frame, made, out, None)
    }

    fn error6(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &Batch,
        way: Way,
        head: &Head,
        host: Ipv6Addr,
        error: icmp6::Error,
    ) -> Result<(), Not> {
        let pool = turn.pool();
        let bytes = start(pool, packet, way);
        let ip = ipv6::Packet::new_checked(bytes, usize::MAX).map_err(|_| Not::Forbidden)?;
        if ipv6::may_be_error(&ip) || martian::source6(host) {
            return Err(Not::Forbidden);
        }
        // A link-local host is where the packet came from; there is no other way to it.
        let (out, neighbour) = if host.is_unicast_link_local() {
            (InterfaceId::new(way.place), Some(sender(turn, packet)))
        } else {
            let (_, back) = self.next_hop_of(host.into(), bytes);
            if back == NextHop::Local {
                return Err(Not::Forbidden);
            }
            (back.interface(), None)
        };
        if !self.errors6.take(self.flow.of_host(host.to_bits()), turn.now()) {
            return Err(Not::Limited);
        }
        let out = out.ok_or(Not::Failed)?;
        let source = self.lines.address6(out.get(), way.place, host).ok_or(Not::Failed)?;
        let quoted = (head.total as usize).min(icmp6::LONGEST - ipv6::HEADER - icmp6::HEADER);
        let message = icmp6::HEADER + quoted;
        let repr = ipv6::Repr {
            traffic_class: CONTROL,
            flow_label: 0,
            payload_len: message as u16,
            next_header: protocol::ICMPV6,
            hop_limit: HOPS,
            source,
            destination: host,
        };
        let len = HEADER + ipv6::HEADER + message;
        let mut frame = turn.new_frame(len as u16).ok_or(Not::Failed)?;
        let made = pool.bytes_mut(&mut frame).get_mut(HEADER..).is_some_and(|ip| {
            let Some((header, message)) = ip.split_at_mut_checked(ipv6::HEADER) else { return false };
            copy_out(pool, packet, way.header(), &mut message[icmp6::HEADER..]);
            error.emit(source, host, message).and_then(|()| repr.emit(header)).is_ok()
        });
        self.send_own(turn, frame, made, out, neighbour)
    }

    /// Sends a packet that was made here: to a neighbour where that is known, or as the tables say.
    fn send_own(
        &mut self,
        turn: &mut Turn<'_>,
        frame: isoplane_memory::Frame,
        made: bool,
        out: InterfaceId,
        neighbour: Option<MacAddress>,
    ) -> Result<(), Not> {
        let mut packet = Batch::new();
        // An empty batch has room.
        let _ = packet.push(frame).map_err(|frame| turn.drop(frame, DropReason::NoFrame));
        let way = Way { place: out.get(), header: HEADER as u8, own: true };
        match (neighbour, head(turn.pool(), &packet, way).filter(|_| made)) {
            (_, None) => {
                turn.give_back(&mut packet);
                return Err(Not::Failed);
            }
            (None, Some(_)) => self.route(turn, &mut packet, way),
            (Some(mac), Some(head)) => {
                self.deliver(turn, &mut packet, way, &head, (out, NextHopId::NONE), mac);
            }
        }
        Ok(())
    }
}

/// Who has sent a packet on its link.
fn sender(turn: &Turn<'_>, packet: &Batch) -> MacAddress {
    let bytes = packet.as_slice().first().map_or(&[][..], |frame| turn.pool().bytes(frame));
    Packet::new_checked(bytes).map_or(MacAddress::default(), |ethernet| ethernet.source())
}

fn count(turn: &mut Turn<'_>, sent: Result<(), Not>, counter: usize) {
    let counter = match sent {
        Ok(()) => counter,
        Err(Not::Forbidden) => field::ICMP_FORBIDDEN,
        Err(Not::Limited) => field::ICMP_LIMITED,
        Err(Not::Failed) => field::ICMP_FAILED,
    };
    turn.count(counter, 1);
}
