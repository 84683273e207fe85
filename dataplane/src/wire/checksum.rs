//! The Internet checksum: RFC 1071, and its incremental update, RFC 1624.
//!
//! Contract: values are as they stand in the header read in network order; a field that is not sent
//! counts as zeros.

use std::net::Ipv6Addr;

/// A sum of 16-bit words in ones' complement, not folded yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum(u64);

impl Sum {
    /// Of no words.
    pub const ZERO: Self = Self(0);

    /// Adds one word.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, word: u16) -> Self {
        Self(self.0 + word as u64)
    }

    /// Adds bytes; the last of an odd number counts as the upper half of a word, so only the last piece of a
    /// message may have an odd length.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        let pairs = bytes.chunks_exact(2);
        let last = pairs.remainder().first().map_or(0, |byte| u64::from(*byte) << 8);
        let sum: u64 = pairs.map(|pair| u64::from(pair[0]) << 8 | u64::from(pair[1])).sum();
        Self(self.0 + sum + last)
    }

    /// Adds the pseudo-header of RFC 8200, 8.1; `len` is that of the upper-layer packet.
    #[must_use]
    pub fn pseudo6(self, source: Ipv6Addr, destination: Ipv6Addr, len: u32, protocol: u8) -> Self {
        let sum = self.bytes(&source.octets()).bytes(&destination.octets());
        Self(sum.0 + u64::from(len) + u64::from(protocol))
    }

    /// Folded to 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn fold(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum = (sum >> 16) + (sum & 0xffff);
        sum as u16
    }

    /// What the checksum field of a message with this sum says; the field itself counted as zero.
    #[inline(always)]
    #[must_use]
    pub const fn checksum(self) -> u16 {
        !self.fold()
    }
}

/// The checksum of a message whose own field counts as zero.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    Sum::ZERO.bytes(bytes).checksum()
}

/// Is the sum of a message, its checksum included, what it should be?
#[must_use]
pub fn verify(bytes: &[u8]) -> bool {
    Sum::ZERO.bytes(bytes).fold() == 0xffff
}

/// As [`verify`] for an IPv4 header without options.
#[inline(always)]
#[must_use]
pub fn verify_20(header: &[u8; 20]) -> bool {
    // The sum does not depend on the byte order (RFC 1071, 2 (B)), nor on the width of the words added.
    let word = |at: usize| header[at..].first_chunk().map_or(0, |w| u64::from(u32::from_ne_bytes(*w)));
    let sum = word(0) + word(4) + word(8) + word(12) + word(16);
    // Five words of 32 bits: what is carried above the first fold is at most 1.
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum == 0xffff
}

/// The checksum after one word of the message has changed from `old` to `new` (RFC 1624, equation 3).
#[inline(always)]
#[must_use]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = !checksum as u32 + !old as u32 + new as u32;
    let sum = (sum >> 16) + (sum & 0xffff);
    !((sum >> 16) + sum) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::ZERO.bytes(&bytes).fold(), 0xddf2);
        assert_eq!(checksum(&bytes), !0xddf2);
        assert_eq!(Sum::ZERO.bytes(&[1, 2, 3]), Sum::ZERO.word(0x0102).word(0x0300));
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: the case that equation 2 of RFC 1141 gets wrong.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    proptest! {
        #[test]
        fn updates_are_what_counting_anew_gives(
            mut bytes in prop::collection::vec(any::<u8>(), 20),
            at in 0_usize..9,
            new in any::<u16>(),
        ) {
            // A header is never all zeros: its version is not.
            bytes[0] = 0x45;
            let at = if at >= 5 { at + 1 } else { at.max(1) };
            bytes[10..12].fill(0);
            let before = checksum(&bytes);
            let old = u16::from_be_bytes([bytes[at * 2], bytes[at * 2 + 1]]);
            bytes[at * 2..at * 2 + 2].copy_from_slice(&new.to_be_bytes());
            let after = update(before, old, new);
            prop_assert_eq!(after, checksum(&bytes));
            bytes[10..12].copy_from_slice(&after.to_be_bytes());
            prop_assert!(verify(&bytes));
            prop_assert!(verify_20(&bytes.clone().try_into().unwrap()));
            bytes[at * 2] ^= 1;
            prop_assert!(!verify(&bytes));
            prop_assert!(!verify_20(&bytes.try_into().unwrap()));
        }
    }
}
