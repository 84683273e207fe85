//! IPv4 headers.
//!
//! ```text
//! 0 | version:4 words:4 | type of service | total length                  |
//! 4 | identification                      | 0 DF MF fragment offset:13    |
//! 8 | time to live      | protocol        | header checksum               |
//! 12| source                                                              |
//! 16| destination                                                         |
//! 20| options, to a whole number of words; payload                        |
//! ```
//!
//! Sources: RFC 791; RFC 1812, 5.2.2 for what makes a header valid; RFC 2474 for the type of service.

use super::checksum::{self, Sum};
use super::ethernet::{Truncated, array, put};
use std::net::Ipv4Addr;

/// Bytes of a header without options.
pub const HEADER: usize = 20;
/// Bytes of the longest header.
pub const LONGEST_HEADER: usize = 60;
/// Longest packet that every network must carry (RFC 791).
pub const LEAST_MTU: u16 = 68;

/// Protocol numbers that isoplane looks at.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;

    /// Does the payload begin with source and destination port?
    #[inline(always)]
    #[must_use]
    pub const fn has_ports(protocol: u8) -> bool {
        matches!(protocol, TCP | UDP | DCCP | SCTP | UDP_LITE)
    }
}

/// Why bytes are no valid IPv4 packet (RFC 1812, 5.2.2, in its order).
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderError {
    /// The link has not delivered what the header takes.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// Another version.
    #[error("IP version {0} where 4 is expected")]
    Version(u8),
    /// Fewer words than a header has.
    #[error("a header of {0} words, where 5 is the least")]
    HeaderLength(u8),
    /// The total length is less than the header's.
    #[error("a total length of {total} bytes behind a header of {header}")]
    TotalLength {
        /// Total length.
        total: u16,
        /// Bytes of the header.
        header: usize,
    },
    /// The header's checksum.
    #[error("a wrong header checksum")]
    Checksum,
}

/// A view of a packet: its header, and as much of its payload as the buffer holds.
#[derive(Debug, Clone, Copy)]
pub struct Packet<T> {
    buffer: T,
}

impl<T: AsRef<[u8]>> Packet<T> {
    /// Checks everything that RFC 1812, 5.2.2 asks for. `arrived` is the number of bytes that there are of the
    /// packet, in this buffer and behind it (in further frames).
    ///
    /// # Errors
    /// See [`HeaderError`].
    pub fn new_checked(buffer: T, arrived: usize) -> Result<Self, HeaderError> {
        let bytes = buffer.as_ref();
        let found = bytes.len();
        let Some(first) = bytes.first_chunk::<HEADER>() else {
            return Err(Truncated { needed: HEADER, found }.into());
        };
        if first[0] >> 4 != 4 {
            return Err(HeaderError::Version(first[0] >> 4));
        }
        let header = usize::from(first[0] & 15) * 4;
        if header < HEADER {
            return Err(HeaderError::HeaderLength(first[0] & 15));
        }
        let whole = bytes.get(..header).ok_or(Truncated { needed: header, found })?;
        if !checksum::verify(whole) {
            return Err(HeaderError::Checksum);
        }
        let total = u16::from_be_bytes([first[2], first[3]]);
        if usize::from(total) < header {
            return Err(HeaderError::TotalLength { total, header });
        }
        if usize::from(total) > arrived {
            return Err(Truncated { needed: usize::from(total), found: arrived }.into());
        }
        Ok(Self { buffer })
    }

    /// Bytes of the header.
    #[must_use]
    pub fn header_len(&self) -> usize {
        usize::from(self.bytes::<1>(0)[0] & 15) * 4
    }

    /// Type of service: DSCP and ECN.
    #[must_use]
    pub fn tos(&self) -> u8 {
        self.bytes::<1>(1)[0]
    }

    /// Bytes of the packet.
    #[must_use]
    pub fn total_len(&self) -> u16 {
        u16::from_be_bytes(self.bytes(2))
    }

    /// Identification, the same in all fragments.
    #[must_use]
    pub fn identification(&self) -> u16 {
        u16::from_be_bytes(self.bytes(4))
    }

    /// Must it not be fragmented?
    #[must_use]
    pub fn dont_fragment(&self) -> bool {
        self.bytes::<1>(6)[0] & 0x40 != 0
    }

    /// Do more fragments follow?
    #[must_use]
    pub fn more_fragments(&self) -> bool {
        self.bytes::<1>(6)[0] & 0x20 != 0
    }

    /// Where the fragment's payload is in the whole one, in bytes.
    #[must_use]
    pub fn fragment_offset(&self) -> u32 {
        u32::from(u16::from_be_bytes(self.bytes(6)) & 0x1fff) * 8
    }

    /// Is it a fragment?
    #[must_use]
    pub fn is_fragment(&self) -> bool {
        self.more_fragments() || self.fragment_offset() != 0
    }

    /// Hops that are left, this one included.
    #[must_use]
    pub fn ttl(&self) -> u8 {
        self.bytes::<1>(8)[0]
    }

    /// What the payload is.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        self.bytes::<1>(9)[0]
    }

    /// Checksum of the header.
    #[must_use]
    pub fn checksum(&self) -> u16 {
        u16::from_be_bytes(self.bytes(10))
    }

    /// Source address.
    #[must_use]
    pub fn source(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.bytes::<4>(12))
    }

    /// Destination address.
    #[must_use]
    pub fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.bytes::<4>(16))
    }

    /// The options, padding included.
    #[must_use]
    pub fn options(&self) -> &[u8] {
        self.buffer.as_ref().get(HEADER..self.header_len()).unwrap_or_default()
    }

    /// As much of the payload as the buffer holds; what the link added behind the packet is not of it.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        let bytes = self.buffer.as_ref();
        let end = bytes.len().min(usize::from(self.total_len()));
        bytes.get(self.header_len()..end).unwrap_or_default()
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        array(self.buffer.as_ref(), at)
    }
}

impl<T: AsRef<[u8]> + AsMut<[u8]>> Packet<T> {
    /// Takes one hop off, and changes the checksum accordingly.
    pub fn decrement_ttl(&mut self) {
        let [ttl, protocol] = self.bytes(8);
        let new = [ttl.wrapping_sub(1), protocol];
        let old = u16::from_be_bytes([ttl, protocol]);
        let checksum = checksum::update(self.checksum(), old, u16::from_be_bytes(new));
        put(self.buffer.as_mut(), 8, new);
        put(self.buffer.as_mut(), 10, checksum.to_be_bytes());
    }

    /// The options, to be changed; [`fill_checksum`](Self::fill_checksum) afterwards.
    pub fn options_mut(&mut self) -> &mut [u8] {
        let end = self.header_len();
        self.buffer.as_mut().get_mut(HEADER..end).unwrap_or_default()
    }

    /// Writes the header's checksum.
    pub fn fill_checksum(&mut self) {
        put(self.buffer.as_mut(), 10, [0, 0]);
        let end = self.header_len();
        let header = self.buffer.as_ref().get(..end).unwrap_or_default();
        let sum = Sum::ZERO.bytes(header).checksum();
        put(self.buffer.as_mut(), 10, sum.to_be_bytes());
    }
}

/// The value of a header without options, of a packet that is no fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Repr {
    /// Type of service.
    pub tos: u8,
    /// Identification.
    pub identification: u16,
    /// Must it not be fragmented?
    pub dont_fragment: bool,
    /// Hops.
    pub ttl: u8,
    /// What the payload is.
    pub protocol: u8,
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// Bytes of the payload.
    pub payload_len: u16,
}

impl Repr {
    /// Reads a header; options and fragmentation are left out.
    #[must_use]
    pub fn parse<T: AsRef<[u8]>>(packet: &Packet<T>) -> Self {
        Self {
            tos: packet.tos(),
            identification: packet.identification(),
            dont_fragment: packet.dont_fragment(),
            ttl: packet.ttl(),
            protocol: packet.protocol(),
            source: packet.source(),
            destination: packet.destination(),
            payload_len: packet.total_len().saturating_sub(packet.header_len() as u16),
        }
    }

    /// Writes the header, checksum included.
    ///
    /// # Errors
    /// [`Truncated`], and nothing written, when it does not fit.
    pub fn emit(&self, buffer: &mut [u8]) -> Result<(), Truncated> {
        let found = buffer.len();
        let header = buffer.first_chunk_mut::<HEADER>().ok_or(Truncated { needed: HEADER, found })?;
        let total = self.payload_len.saturating_add(HEADER as u16).to_be_bytes();
        *header = [0; HEADER];
        header[0] = 0x45;
        header[1] = self.tos;
        header[2..4].copy_from_slice(&total);
        header[4..6].copy_from_slice(&self.identification.to_be_bytes());
        header[6] = if self.dont_fragment { 0x40 } else { 0 };
        header[8] = self.ttl;
        header[9] = self.protocol;
        header[12..16].copy_from_slice(&self.source.octets());
        header[16..20].copy_from_slice(&self.destination.octets());
        let sum = checksum::checksum(header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        Ok(())
    }
}

/// An option of a header (RFC 791, 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Option<'a> {
    /// Its type: copied flag, class, number.
    pub kind: u8,
    /// Where it begins in the header, in bytes.
    pub at: usize,
    /// All of it, type and length included.
    pub bytes: &'a [u8],
}

/// Types of options.
pub mod option {
    /// End of the list.
    pub const END: u8 = 0;
    /// Nothing, one byte of it.
    pub const NOP: u8 = 1;
    /// Record route (RFC 791).
    pub const RECORD_ROUTE: u8 = 7;
    /// Internet timestamp (RFC 791).
    pub const TIMESTAMP: u8 = 68;
    /// Loose source and record route (RFC 791).
    pub const LOOSE_SOURCE_ROUTE: u8 = 131;
    /// Strict source and record route (RFC 791).
    pub const STRICT_SOURCE_ROUTE: u8 = 137;
    /// Router alert (RFC 2113).
    pub const ROUTER_ALERT: u8 = 148;
    /// Copied into every fragment.
    pub const COPIED: u8 = 0x80;
}

/// An option whose length cannot be; `at` is where it begins in the header.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[error("the option at byte {at} of the header has a length that cannot be")]
pub struct OptionError {
    /// Where it begins, in bytes from the header's start: the pointer of a parameter problem message.
    pub at: usize,
}

/// Walks the options of a header; ends after the first error.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    bytes: &'a [u8],
    next: usize,
}

impl<'a> Options<'a> {
    /// `bytes` is what [`Packet::options`] gave.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, next: 0 }
    }
}

impl<'a> Iterator for Options<'a> {
    type Item = Result<Ipv4Option<'a>, OptionError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let rest = self.bytes.get(self.next..)?;
            let kind = *rest.first()?;
            let at = HEADER + self.next;
            match kind {
                option::END => return None,
                option::NOP => self.next += 1,
                _ => {
                    let len = rest.get(1).map_or(0, |len| usize::from(*len));
                    let Some(bytes) = rest.get(..len).filter(|_| len >= 2) else {
                        self.bytes = &[];
                        return Some(Err(OptionError { at }));
                    };
                    self.next += len;
                    return Some(Ok(Ipv4Option { kind, at, bytes }));
                }
            }
        }
    }
}
