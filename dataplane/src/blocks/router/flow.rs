//! The flow hash: chooses among several next hops.
//!
//! Contract: the packets of a flow have one hash, in both directions and on every worker with the same seed, so
//! that state on the way sees both. It covers addresses, protocol and, where every packet of the flow shows them,
//! ports: not in fragments, and not behind extension headers. The IPv6 flow label is left out: the two directions
//! have labels of their own (RFC 6437).

use crate::wire::ethernet::array;
use crate::wire::ipv4::protocol::has_ports;

/// Hashes flows with a seed.
#[derive(Debug, Clone, Copy)]
pub(super) struct FlowHash(pub(super) u64);

/// Odd constants with half of their bits set: digits of the golden ratio and of the square root of three.
const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
const SECOND: u64 = 0xbb67_ae85_84ca_a73b;

/// Both halves of a product depend on all bits of both factors; together they are a hash.
#[inline(always)]
const fn mix(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    (product >> 64) as u64 ^ product as u64
}

impl FlowHash {
    #[inline(always)]
    fn of(self, ends: [(u128, u16); 2], protocol: u8) -> u32 {
        let [a, b] = ends;
        let (low, high) = if a <= b { (a, b) } else { (b, a) };
        let ports = u64::from(low.1) << 16 | u64::from(high.1) | u64::from(protocol) << 32;
        let hash = mix(self.0 ^ FIRST, ports ^ SECOND);
        let hash = mix(hash ^ low.0 as u64, (low.0 >> 64) as u64 ^ FIRST);
        let hash = mix(hash ^ high.0 as u64, (high.0 >> 64) as u64 ^ SECOND);
        let hash = mix(hash ^ FIRST, self.0 ^ SECOND);
        (hash >> 32) as u32 ^ hash as u32
    }

    /// Of an IPv4 packet whose header was checked.
    #[inline]
    pub(super) fn of4(self, packet: &[u8]) -> u32 {
        let [first, ..]: [u8; 1] = array(packet, 0);
        let [protocol]: [u8; 1] = array(packet, 9);
        let address = |at| u128::from(u32::from_be_bytes(array(packet, at)));
        let fragment = u16::from_be_bytes(array(packet, 6)) & 0x3fff != 0;
        let header = usize::from(first & 15) * 4;
        let show = has_ports(protocol) && !fragment;
        let port = |at: usize| if show { u16::from_be_bytes(array(packet, header + at)) } else { 0 };
        self.of([(address(12), port(0)), (address(16), port(2))], protocol)
    }

    /// Of an IPv6 packet whose header was checked.
    #[inline]
    pub(super) fn of6(self, packet: &[u8]) -> u32 {
        let [protocol]: [u8; 1] = array(packet, 6);
        let address = |at| u128::from_be_bytes(array(packet, at));
        let port =
            |at: usize| if has_ports(protocol) { u16::from_be_bytes(array(packet, 40 + at)) } else { 0 };
        self.of([(address(8), port(0)), (address(24), port(2))], protocol)
    }

    /// Of one host, for limits.
    pub(super) fn of_host(self, address: u128) -> u32 {
        self.of([(address, 0), (0, 0)], 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet4(source: [u8; 4], destination: [u8; 4], fragment: u16, ports: [u16; 2]) -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 28, 0, 0];
        bytes.extend(fragment.to_be_bytes());
        bytes.extend([64, 17, 0, 0]);
        bytes.extend([source, destination].concat());
        bytes.extend(ports.iter().flat_map(|p| p.to_be_bytes()));
        bytes.extend([0; 4]);
        bytes
    }

    #[test]
    fn both_directions_have_one_hash_and_ports_count_where_there_are_some() {
        let (hash, other) = (FlowHash(1), FlowHash(2));
        let (a, b) = ([192, 0, 2, 1], [198, 51, 100, 9]);
        let of = |s, d, f, p| hash.of4(&packet4(s, d, f, p));
        assert_eq!(of(a, b, 0, [1, 2]), of(b, a, 0, [2, 1]));
        assert_ne!(of(a, b, 0, [1, 2]), of(a, b, 0, [2, 1]));
        assert_ne!(of(a, b, 0, [1, 2]), other.of4(&packet4(a, b, 0, [1, 2])));
        // First, later and last fragment.
        let fragments = [0x2000, 0x2001, 5].map(|f| of(a, b, f, [f, 9]));
        assert_eq!(fragments, [fragments[0]; 3]);
        let dont_fragment = of(a, b, 0x4000, [1, 2]);
        assert_eq!(dont_fragment, of(a, b, 0, [1, 2]));
    }

    #[test]
    fn flows_are_spread_evenly() {
        let hash = FlowHash(7);
        let mut buckets = [0_u32; 16];
        for host in 0..4096_u32 {
            let [.., c, d] = host.to_be_bytes();
            let bytes = packet4([10, 0, c, d], [192, 0, 2, 1], 0, [1024, 80]);
            buckets[hash.of4(&bytes) as usize % 16] += 1;
        }
        // 256 each; five standard deviations.
        assert!(buckets.iter().all(|n| (176..=336).contains(n)), "{buckets:?}");
    }
}
