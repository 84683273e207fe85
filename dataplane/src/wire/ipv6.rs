//! IPv6 headers.
//!
//! ```text
//! 0 | version:4 traffic class:8 flow label:20                            |
//! 4 | payload length               | next header     | hop limit         |
//! 8 | source, 16 bytes                                                    |
//! 24| destination, 16 bytes                                               |
//! ```
//!
//! Sources: RFC 8200; RFC 5095 for routing headers; RFC 2711 for router alerts.

use super::ethernet::{Truncated, array, put};
use super::ipv4::protocol;
use std::net::Ipv6Addr;

/// Bytes of the header.
pub const HEADER: usize = 40;
/// Longest packet that every network must carry (RFC 8200, 5).
pub const LEAST_MTU: u16 = 1280;

/// Next-header values of extension headers (RFC 8200, 4; RFC 7045).
pub mod next_header {
    /// Hop-by-hop options: right behind the IPv6 header.
    pub const HOP_BY_HOP: u8 = 0;
    /// Routing.
    pub const ROUTING: u8 = 43;
    /// Fragment.
    pub const FRAGMENT: u8 = 44;
    /// Authentication.
    pub const AUTHENTICATION: u8 = 51;
    /// None: nothing follows.
    pub const NONE: u8 = 59;
    /// Destination options.
    pub const DESTINATION: u8 = 60;
    /// Mobility.
    pub const MOBILITY: u8 = 135;
    /// Host identity protocol.
    pub const HIP: u8 = 139;
    /// Shim6.
    pub const SHIM6: u8 = 140;
}

/// Hop-by-hop option: router alert (RFC 2711).
pub const ROUTER_ALERT: u8 = 5;

/// Why bytes are no valid IPv6 packet.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderError {
    /// The link has not delivered what the header says.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// Another version.
    #[error("IP version {0} where 6 is expected")]
    Version(u8),
}

/// A view of a packet: its header, and as much of its payload as the buffer holds.
#[derive(Debug, Clone, Copy)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Checks version and lengths. `arrived` is the number of bytes that there are of the packet, in this buffer
    /// and behind it (in further frames).
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn new_checked(buffer: T, arrived: usize) -> Result<Self, HeaderError> {
        let bytes = buffer.as_ref();
        let found = bytes.len();
        let Some(first) = bytes.first_chunk::<HEADER>() else {
            return Err(Truncated { needed: HEADER, found }.into());
        };
        if first[0] >> 4 != 6 {
            return Err(HeaderError::Version(first[0] >> 4));
        }
        let needed = HEADER + usize::from(u16::from_be_bytes([first[4], first[5]]));
        if needed > arrived {
            return Err(Truncated { needed, found: arrived }.into());
        }
        Ok(Self { buffer })
    }

    /// Traffic class: DSCP and ECN.
    #[must_use]
    pub fn traffic_class(&self) -> u8 {
        (u16::from_be_bytes(self.bytes(0)) >> 4) as u8
    }

    /// Flow label, 20 bits.
    #[must_use]
    pub fn flow_label(&self) -> u32 {
        u32::from_be_bytes(self.bytes(0)) & 0xf_ffff
    }

    /// Bytes behind the header.
    #[must_use]
    pub fn payload_len(&self) -> u16 {
        u16::from_be_bytes(self.bytes(4))
    }

    /// Bytes of the packet.
    #[must_use]
    pub fn total_len(&self) -> u32 {
        HEADER as u32 + u32::from(self.payload_len())
    }

    /// What follows the header.
    #[must_use]
    pub fn next_header(&self) -> u8 {
        self.bytes::<1>(6)[0]
    }

    /// Hops that are left, this one included.
    #[must_use]
    pub fn hop_limit(&self) -> u8 {
        self.bytes::<1>(7)[0]
    }

    /// Source address.
    #[must_use]
    pub fn source(&self) -> Ipv6Addr {
        Ipv6Addr::from(self.bytes::<16>(8))
    }

    /// Destination address.
    #[must_use]
    pub fn destination(&self) -> Ipv6Addr {
        Ipv6Addr::from(self.bytes::<16>(24))
    }

    /// As much of the payload as the buffer holds; what the link added behind the packet is not of it.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        let bytes = self.buffer.as_ref();
        let end = bytes.len().min(self.total_len() as usize);
        bytes.get(HEADER..end).unwrap_or_default()
    }

    /// Walks the extension headers.
    #[must_use]
    pub fn extensions(&self) -> Extensions<'_> {
        Extensions { next: self.next_header(), rest: self.payload(), at: HEADER, fragment: false, left: 16 }
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        array(self.buffer.as_ref(), at)
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Takes one hop off.
    pub fn decrement_hop_limit(&mut self) {
        let [hops] = self.bytes(7);
        put(self.buffer.as_mut(), 7, [hops.wrapping_sub(1)]);
    }
}

/// One extension header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extension<'a> {
    /// Which; see [`next_header`].
    pub kind: u8,
    /// Where it begins, in bytes from the start of the packet.
    pub at: usize,
    /// All of it.
    pub bytes: &'a [u8],
}

/// Walks extension headers as far as the buffer holds them and they can be told apart, at most 16.
/// [`upper`](Self::upper) says afterwards what they were in front of.
#[derive(Debug, Clone)]
pub struct Extensions<'a> {
    next: u8,
    rest: &'a [u8],
    at: usize,
    fragment: bool,
    left: u8,
}

impl<'a> Extensions<'a> {
    /// After the walk: the upper-layer protocol and as much of it as there is. `None` when the headers have not
    /// come to an end, and in fragments other than the first, which do not hold any.
    #[must_use]
    pub fn upper(&self) -> Option<(u8, &'a [u8])> {
        (!self.fragment && !is_extension(self.next)).then_some((self.next, self.rest))
    }
}

const fn is_extension(kind: u8) -> bool {
    use next_header::{AUTHENTICATION, DESTINATION, FRAGMENT, HIP, HOP_BY_HOP, MOBILITY, ROUTING, SHIM6};
    matches!(kind, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION | MOBILITY | HIP | SHIM6)
}

impl<'a> Iterator for Extensions<'a> {
    type Item = Extension<'a>;

    fn next(&mut self) -> Option<Extension<'a>> {
        if self.fragment || self.left == 0 || !is_extension(self.next) {
            return None;
        }
        let [next, len] = *self.rest.first_chunk()?;
        let bytes = match self.next {
            next_header::FRAGMENT => 8,
            next_header::AUTHENTICATION => (usize::from(len) + 2) * 4,
            _ => (usize::from(len) + 1) * 8,
        };
        let header = self.rest.get(..bytes)?;
        let extension = Extension { kind: self.next, at: self.at, bytes: header };
        // Behind the header of a fragment that is not the first there is no further header.
        self.fragment = self.next == next_header::FRAGMENT && u16::from_be_bytes(array(header, 2)) >> 3 != 0;
        (self.next, self.rest) = (next, self.rest.get(bytes..).unwrap_or_default());
        self.at += bytes;
        self.left -= 1;
        Some(extension)
    }
}

/// Is there an option of this type among hop-by-hop options? `header` is the whole extension header.
#[must_use]
pub fn has_option(header: &[u8], kind: u8) -> bool {
    let mut rest = header.get(2..).unwrap_or_default();
    while let Some(found) = rest.first() {
        if *found == kind {
            return true;
        }
        let len = match (*found, rest.get(1)) {
            (0, _) => 1,
            (_, Some(len)) => usize::from(*len) + 2,
            _ => return false,
        };
        rest = rest.get(len..).unwrap_or_default();
    }
    false
}

/// The value of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Traffic class.
    pub traffic_class: u8,
    /// Flow label; higher bits than 20 are not emitted.
    pub flow_label: u32,
    /// Bytes behind the header.
    pub payload_len: u16,
    /// What follows.
    pub next_header: u8,
    /// Hops.
    pub hop_limit: u8,
    /// Source address.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
}

impl Repr {
    /// Reads a header.
    #[must_use]
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Self {
        Self {
            traffic_class: packet.traffic_class(),
            flow_label: packet.flow_label(),
            payload_len: packet.payload_len(),
            next_header: packet.next_header(),
            hop_limit: packet.hop_limit(),
            source: packet.source(),
            destination: packet.destination(),
        }
    }

    /// Writes the header.
    ///
    /// # Errors
    /// [`Truncated`], and nothing written, when it does not fit.
    pub fn emit(&self, buffer: &mut [u8]) -> Result<(), Truncated> {
        let found = buffer.len();
        let header = buffer.first_chunk_mut::<HEADER>().ok_or(Truncated { needed: HEADER, found })?;
        let first = 6 << 28 | u32::from(self.traffic_class) << 20 | self.flow_label & 0xf_ffff;
        header[..4].copy_from_slice(&first.to_be_bytes());
        header[4..6].copy_from_slice(&self.payload_len.to_be_bytes());
        header[6] = self.next_header;
        header[7] = self.hop_limit;
        header[8..24].copy_from_slice(&self.source.octets());
        header[24..].copy_from_slice(&self.destination.octets());
        Ok(())
    }
}

/// Is the upper-layer message of this packet an ICMPv6 error or a redirect, or may it be one (RFC 4443, 2.4
/// (e.1), (e.2))? Where the headers do not come to an end it may.
#[must_use]
pub fn may_be_error<T: AsRef<[u8]>>(packet: &Packet<T>) -> bool {
    let mut extensions = packet.extensions();
    let fragment = extensions.by_ref().any(|e| e.kind == next_header::FRAGMENT && later(e.bytes));
    if fragment {
        return false;
    }
    match extensions.upper() {
        Some((protocol::ICMPV6, message)) => {
            message.first().is_none_or(|kind| *kind < 128 || *kind == super::icmp6::kind::REDIRECT)
        }
        Some(_) => false,
        None => true,
    }
}

fn later(fragment: &[u8]) -> bool {
    u16::from_be_bytes(array(fragment, 2)) >> 3 != 0
}
