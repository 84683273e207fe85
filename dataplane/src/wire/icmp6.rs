//! ICMPv6 error messages.
//!
//! ```text
//! 0 | type | code | checksum                              |
//! 4 | rest of the header, by type                         |
//! 8 | the packet that it is about, as much as fits        |
//! ```
//!
//! Source: RFC 4443.

use super::checksum::Sum;
use super::ethernet::Truncated;
use super::ipv4::protocol;
use std::net::Ipv6Addr;

/// Bytes in front of the packet that a message is about.
pub const HEADER: usize = 8;

/// Longest IPv6 packet that an error message makes (RFC 4443, 2.4 (c)).
pub const LONGEST: usize = super::ipv6::LEAST_MTU as usize;

/// Message types.
pub mod kind {
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 1;
    /// Packet too big.
    pub const PACKET_TOO_BIG: u8 = 2;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 3;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 4;
    /// Redirect (RFC 4861), an error message in all but number.
    pub const REDIRECT: u8 = 137;
}

/// An error message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Destination unreachable: no route (code 0).
    NoRoute,
    /// Destination unreachable: administratively prohibited (code 1).
    Prohibited,
    /// Destination unreachable: beyond the scope of the source address (code 2).
    BeyondScope,
    /// Destination unreachable: the address does not answer (code 3).
    AddressUnreachable,
    /// Destination unreachable: a route that rejects (code 6).
    RejectRoute,
    /// Too long for the next link.
    PacketTooBig {
        /// What would have fit.
        mtu: u32,
    },
    /// Hop limit exceeded in transit (code 0).
    TimeExceeded,
}

impl Error {
    /// Type, code, and the rest of the header.
    #[must_use]
    pub const fn header(self) -> (u8, u8, u32) {
        match self {
            Self::NoRoute => (kind::UNREACHABLE, 0, 0),
            Self::Prohibited => (kind::UNREACHABLE, 1, 0),
            Self::BeyondScope => (kind::UNREACHABLE, 2, 0),
            Self::AddressUnreachable => (kind::UNREACHABLE, 3, 0),
            Self::RejectRoute => (kind::UNREACHABLE, 6, 0),
            Self::PacketTooBig { mtu } => (kind::PACKET_TOO_BIG, 0, mtu),
            Self::TimeExceeded => (kind::TIME_EXCEEDED, 0, 0),
        }
    }

    /// Writes the header in front of the quoted packet, which is there already, and the checksum over both and
    /// the addresses.
    ///
    /// # Errors
    /// [`Truncated`], and nothing written, when it does not fit.
    pub fn emit(self, source: Ipv6Addr, destination: Ipv6Addr, message: &mut [u8]) -> Result<(), Truncated> {
        let found = message.len();
        let header = message.first_chunk_mut::<HEADER>().ok_or(Truncated { needed: HEADER, found })?;
        let (kind, code, rest) = self.header();
        let [a, b, c, d] = rest.to_be_bytes();
        *header = [kind, code, 0, 0, a, b, c, d];
        let sum = Sum::ZERO.pseudo6(source, destination, found as u32, protocol::ICMPV6).bytes(message);
        message[2..4].copy_from_slice(&sum.checksum().to_be_bytes());
        Ok(())
    }
}
