//! ICMP error messages.
//!
//! ```text
//! 0 | type | code | checksum                              |
//! 4 | rest of the header, by type                         |
//! 8 | the packet that it is about, as much as fits        |
//! ```
//!
//! Sources: RFC 792; RFC 1191 for the MTU; RFC 1812, 4.3 and 5.2.7 for codes and for how much is quoted.

use super::checksum;
use super::ethernet::Truncated;
use std::net::Ipv4Addr;

/// Bytes in front of the packet that a message is about.
pub const HEADER: usize = 8;

/// Longest IPv4 packet that an error message makes (RFC 1812, 4.3.2.3).
pub const LONGEST: usize = 576;

/// Message types.
pub mod kind {
    /// Echo reply.
    pub const ECHO_REPLY: u8 = 0;
    /// Destination unreachable.
    pub const UNREACHABLE: u8 = 3;
    /// Redirect.
    pub const REDIRECT: u8 = 5;
    /// Echo request.
    pub const ECHO: u8 = 8;
    /// Time exceeded.
    pub const TIME_EXCEEDED: u8 = 11;
    /// Parameter problem.
    pub const PARAMETER_PROBLEM: u8 = 12;
}

/// Queries and their replies; everything else is an error message, or may be one.
#[must_use]
pub const fn is_query(kind: u8) -> bool {
    matches!(kind, 0 | 8 | 9 | 10 | 13..=18)
}

/// An error message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// Destination unreachable: no route to its network (code 0).
    NetUnreachable,
    /// Destination unreachable: the host does not answer (code 1).
    HostUnreachable,
    /// Destination unreachable: too long, and must not be fragmented (code 4).
    FragmentationNeeded {
        /// What would have fit.
        mtu: u16,
    },
    /// Destination unreachable: source route failed (code 5).
    SourceRouteFailed,
    /// Destination unreachable: administratively prohibited (code 13).
    Prohibited,
    /// Redirect for the host (code 1).
    Redirect {
        /// The better gateway.
        gateway: Ipv4Addr,
    },
    /// Time to live exceeded in transit (code 0).
    TimeExceeded,
    /// Parameter problem (code 0).
    ParameterProblem {
        /// The byte that is wrong, counted from the packet's start.
        pointer: u8,
    },
}

impl Error {
    /// Type, code, and the rest of the header.
    #[must_use]
    pub const fn header(self) -> (u8, u8, [u8; 4]) {
        match self {
            Self::NetUnreachable => (kind::UNREACHABLE, 0, [0; 4]),
            Self::HostUnreachable => (kind::UNREACHABLE, 1, [0; 4]),
            Self::FragmentationNeeded { mtu } => {
                let [high, low] = mtu.to_be_bytes();
                (kind::UNREACHABLE, 4, [0, 0, high, low])
            }
            Self::SourceRouteFailed => (kind::UNREACHABLE, 5, [0; 4]),
            Self::Prohibited => (kind::UNREACHABLE, 13, [0; 4]),
            Self::Redirect { gateway } => (kind::REDIRECT, 1, gateway.octets()),
            Self::TimeExceeded => (kind::TIME_EXCEEDED, 0, [0; 4]),
            Self::ParameterProblem { pointer } => (kind::PARAMETER_PROBLEM, 0, [pointer, 0, 0, 0]),
        }
    }

    /// Writes the header in front of the quoted packet, which is there already, and the checksum over both.
    ///
    /// # Errors
    /// [`Truncated`], and nothing written, when it does not fit.
    pub fn emit(self, message: &mut [u8]) -> Result<(), Truncated> {
        let found = message.len();
        let header = message.first_chunk_mut::<HEADER>().ok_or(Truncated { needed: HEADER, found })?;
        let (kind, code, [a, b, c, d]) = self.header();
        *header = [kind, code, 0, 0, a, b, c, d];
        let sum = checksum::checksum(message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
        Ok(())
    }
}
