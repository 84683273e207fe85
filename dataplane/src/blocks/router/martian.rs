//! Addresses that are not forwarded: RFC 1812, 5.3.7; RFC 6890; RFC 4291.

use std::net::{Ipv4Addr, Ipv6Addr};

const FORBIDDEN4: [bool; 256] = {
    let mut table = [false; 256];
    table[0] = true;
    table[127] = true;
    let mut first = 224;
    while first < 256 {
        table[first] = true;
        first += 1;
    }
    table
};

/// May a packet with this source or destination be forwarded without a closer look? No for this network (0/8),
/// loopback, link-local (RFC 3927), multicast, reserved and broadcast.
#[inline(always)]
pub(super) fn plain4(address: u32) -> bool {
    !FORBIDDEN4[(address >> 24) as usize] & (address >> 16 != 0xa9fe)
}

/// The same. No for unspecified, loopback, IPv4-mapped and -compatible (all of ::/64), and for everything from
/// link-local (fe80::/10) on: site-local, multicast.
#[inline(always)]
pub(super) fn plain6(address: u128) -> bool {
    let high = (address >> 64) as u64;
    high != 0 && high < 0xfe80 << 48
}

/// Sources that no packet on a wire has (RFC 1812, 5.3.7; RFC 1122, 3.2.1.3).
pub(super) fn source4(address: Ipv4Addr) -> bool {
    FORBIDDEN4[usize::from(address.octets()[0])]
}

/// Destinations that no packet on a wire has; multicast and limited broadcast are not among them.
pub(super) fn destination4(address: Ipv4Addr) -> bool {
    source4(address) && !address.is_multicast() && !address.is_broadcast()
}

/// Sources that no packet on a wire has: loopback, multicast, IPv4-mapped, unspecified (but for neighbour
/// discovery, which is not forwarded).
pub(super) fn source6(address: Ipv6Addr) -> bool {
    address.is_multicast() || destination6(address)
}

/// Destinations that no packet on a wire has.
pub(super) fn destination6(address: Ipv6Addr) -> bool {
    address.is_unspecified() || address.is_loopback() || address.to_ipv4_mapped().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_table_and_by_name() {
        for first in 0..=255 {
            for second in [0, 168, 169, 254, 255] {
                let address = Ipv4Addr::new(first, second, 0, 1);
                let reserved = first == 0 || first >= 240 || address.is_loopback() || address.is_multicast();
                assert_eq!(source4(address), reserved, "{address}");
                assert_eq!(plain4(address.to_bits()), !reserved && !address.is_link_local(), "{address}");
                assert_eq!(destination4(address), reserved && !address.is_multicast(), "{address}");
            }
        }
        assert!(!destination4(Ipv4Addr::BROADCAST));
        for (text, plain, source, destination) in [
            ("2001:db8::1", true, false, false),
            ("64:ff9b::1", true, false, false),
            ("fd00::1", true, false, false),
            ("fe7f:ffff::1", true, false, false),
            ("::", false, true, true),
            ("::1", false, true, true),
            ("::ffff:192.0.2.1", false, true, true),
            ("fe80::1", false, false, false),
            ("ff02::1", false, true, false),
        ] {
            let address: Ipv6Addr = text.parse().unwrap();
            assert_eq!(plain6(address.to_bits()), plain, "{text}");
            assert_eq!(source6(address), source, "{text}");
            assert_eq!(destination6(address), destination, "{text}");
        }
    }
}
