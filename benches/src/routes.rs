//! Routes with the shape of the Internet's tables, and addresses to look up in them.
//!
//! Contract: the same routes on every machine and in every run, each prefix once, in no order, the way
//! that updates come. Lengths follow what route collectors publish (RouteViews, RIPE RIS: about 60 % of
//! IPv4 prefixes are /24, almost none longer; half of the IPv6 ones are /48, then /32, /44, /40, /36);
//! places follow how addresses are handed out: networks of a few to a few hundred neighbouring prefixes,
//! most of them to the same next hop, inside the registries' blocks.

use ipnet::{Ipv4Net, Ipv6Net};
use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Numbers that look random and are the same every time (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.number()) * u128::from(limit)) >> 64) as u64
    }

    /// One of the lengths, as often as its share of all shares says.
    fn length(&mut self, shares: &[(u8, u32)]) -> u8 {
        let total: u32 = shares.iter().map(|(_, share)| share).sum();
        let mut left = self.below(u64::from(total)) as u32;
        for (length, share) in shares {
            if left < *share {
                return *length;
            }
            left -= share;
        }
        0
    }

    fn shuffle<T>(&mut self, what: &mut [T]) {
        for last in (1..what.len()).rev() {
            what.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

/// Lengths of IPv4 prefixes and how many of ten thousand have them.
const LENGTHS4: [(u8, u32); 20] = [
    (8, 1),
    (10, 1),
    (11, 1),
    (12, 3),
    (13, 6),
    (14, 12),
    (15, 20),
    (16, 140),
    (17, 85),
    (18, 145),
    (19, 260),
    (20, 450),
    (21, 530),
    (22, 1150),
    (23, 1050),
    (24, 6100),
    (25, 8),
    (27, 8),
    (29, 10),
    (32, 20),
];

/// The same of IPv6 prefixes.
const LENGTHS6: [(u8, u32); 20] = [
    (20, 2),
    (28, 60),
    (29, 350),
    (30, 80),
    (32, 1250),
    (33, 250),
    (34, 150),
    (35, 130),
    (36, 550),
    (38, 150),
    (40, 850),
    (42, 250),
    (44, 1000),
    (45, 120),
    (46, 250),
    (47, 250),
    (48, 4500),
    (56, 40),
    (64, 30),
    (128, 8),
];

/// First 16 bits of the registries' larger IPv6 blocks, from and to.
const BLOCKS6: [(u64, u64); 8] = [
    (0x2001, 0x2001),
    (0x2400, 0x240f),
    (0x2600, 0x2610),
    (0x2620, 0x2620),
    (0x2800, 0x2806),
    (0x2a00, 0x2a14),
    (0x2c0e, 0x2c0f),
    (0x2001, 0x2001),
];

/// A network's next hop, and now and then another.
fn next_hop(random: &mut Random, own: u32, next_hops: u32) -> u32 {
    if random.below(8) == 0 { random.below(u64::from(next_hops)) as u32 } else { own }
}

/// `count` IPv4 routes to `next_hops` next hops, numbered from 0.
#[must_use]
pub fn ipv4(count: usize, next_hops: u32) -> Vec<(Ipv4Net, u32)> {
    let mut random = Random(4);
    let mut seen = HashSet::new();
    let mut routes = Vec::new();
    let (mut at, mut own, mut left) = (0_u64, 0, 0_u64);
    while routes.len() < count {
        if left == 0 {
            // A network: somewhere in unicast space, a few prefixes, rarely hundreds.
            at = (1 << 24) + random.below(223 << 24);
            own = random.below(u64::from(next_hops)) as u32;
            left = 1 + random.below(6) * random.below(6);
            if random.below(64) == 0 {
                left += random.below(400);
            }
        }
        left -= 1;
        let length = random.length(&LENGTHS4);
        let size = 1_u64 << (32 - length);
        let first = at & !(size - 1);
        if length >= 16 {
            // The next one follows, or begins where this one does.
            at = if random.below(5) == 0 { first } else { first + size };
        }
        let reserved = matches!(first >> 24, 0 | 10 | 127) || first >> 24 > 223;
        let to = next_hop(&mut random, own, next_hops);
        if let Ok(net) = Ipv4Net::new(Ipv4Addr::from_bits(first as u32), length)
            && !reserved
            && seen.insert(net)
        {
            routes.push((net, to));
        }
    }
    random.shuffle(&mut routes);
    routes
}

/// `count` IPv6 routes to `next_hops` next hops, numbered from 0.
#[must_use]
pub fn ipv6(count: usize, next_hops: u32) -> Vec<(Ipv6Net, u32)> {
    let mut random = Random(6);
    let mut seen = HashSet::new();
    let mut routes = Vec::new();
    while routes.len() < count {
        // A network: a /29 of a registry's block.
        let (from, to) = BLOCKS6[random.below(BLOCKS6.len() as u64) as usize];
        let top = from + random.below(to - from + 1);
        let network = top << 48 | random.below(1 << 13) << 35;
        let own = random.below(u64::from(next_hops)) as u32;
        // In one /32 of it, from a place that people choose: low, round, or any.
        let second = random.below(4) / 3 * random.below(8);
        let site = network | second << 32;
        let mut at = site
            | match random.below(4) {
                0 => 0,
                1 => random.below(16) << 28,
                2 => random.below(256) << 24,
                _ => random.below(1 << 16) << 16,
            };
        let mut left = 1 + random.below(5) * random.below(5);
        if random.below(64) == 0 {
            left += random.below(300);
        }
        for nth in 0..left {
            // What was handed out comes first, then what is made of it.
            let shares = if nth == 0 { &LENGTHS6[1..5] } else { &LENGTHS6 };
            let length = random.length(shares);
            let place = if length <= 32 { site } else { at };
            let mut bits = u128::from(place) << 64;
            if length > 64 {
                bits |= u128::from(random.below(1 << 16));
            }
            let to = next_hop(&mut random, own, next_hops);
            let Ok(net) = Ipv6Net::new(Ipv6Addr::from_bits(bits), length) else { continue };
            if (33..=48).contains(&length) {
                // The next one follows, in the same /32.
                at = site | (at + (1 << (64 - length))) & 0xffff_0000;
            }
            if routes.len() < count && seen.insert(net.trunc()) {
                routes.push((net.trunc(), to));
            }
        }
    }
    random.shuffle(&mut routes);
    routes
}

/// Addresses, each in a route taken by chance.
#[must_use]
pub fn addresses4(routes: &[(Ipv4Net, u32)], count: usize) -> Vec<Ipv4Addr> {
    let mut random = Random(44);
    let mut one = || {
        let (net, _) = routes[random.below(routes.len() as u64) as usize];
        Ipv4Addr::from_bits(net.network().to_bits() | random.number() as u32 & net.hostmask().to_bits())
    };
    (0..count).map(|_| one()).collect()
}

/// Addresses, any of the unicast ones.
#[must_use]
pub fn any_addresses4(count: usize) -> Vec<Ipv4Addr> {
    let mut random = Random(444);
    (0..count).map(|_| Ipv4Addr::from_bits(((1 << 24) + random.below(223 << 24)) as u32)).collect()
}

/// Addresses, each in a route taken by chance.
#[must_use]
pub fn addresses6(routes: &[(Ipv6Net, u32)], count: usize) -> Vec<Ipv6Addr> {
    let mut random = Random(66);
    let mut one = || {
        let (net, _) = routes[random.below(routes.len() as u64) as usize];
        let any = u128::from(random.number()) << 64 | u128::from(random.number());
        Ipv6Addr::from_bits(net.network().to_bits() | any & net.hostmask().to_bits())
    };
    (0..count).map(|_| one()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_have_the_shape_of_the_internet() {
        let routes = ipv4(100_000, 1000);
        let unique: HashSet<_> = routes.iter().map(|(net, _)| net).collect();
        assert_eq!(unique.len(), 100_000);
        assert_eq!(routes, ipv4(100_000, 1000), "the same every time");
        let share = |length| routes.iter().filter(|(net, _)| net.prefix_len() == length).count();
        assert!((55_000..65_000).contains(&share(24)), "{} of 100000 are /24", share(24));
        assert!(share(8) < 100 && share(16) > 500 && share(32) > 10);
        assert!(routes.iter().all(|(net, to)| *net == net.trunc() && *to < 1000));
        let addresses = addresses4(&routes, 1000);
        assert!(addresses.iter().all(|address| (1..=223).contains(&address.octets()[0])));
    }

    #[test]
    fn ipv6_routes_too() {
        let routes = ipv6(50_000, 2);
        let unique: HashSet<_> = routes.iter().map(|(net, _)| net).collect();
        assert_eq!(unique.len(), 50_000);
        let share = |length| routes.iter().filter(|(net, _)| net.prefix_len() == length).count();
        assert!((20_000..30_000).contains(&share(48)), "{} of 50000 are /48", share(48));
        assert!(share(32) > 3_000 && share(40) > 1_000 && share(128) > 5);
        assert!(routes.iter().all(|(net, to)| net.network().segments()[0] >> 12 == 2 && *to < 2));
    }
}
