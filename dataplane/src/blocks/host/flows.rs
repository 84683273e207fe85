//! Which connection a segment belongs to.
//!
//! Contract: a table of fixed size, made once; finding, adding and removing take a bounded number of steps
//! whatever peers send: the hash is seeded, and the table is at most half full. It holds places of
//! connections, and asks its owner for the flow of a place; so a flow is kept once, by the connection.

use std::net::{IpAddr, Ipv4Addr};

/// The four things that tell TCP connections and UDP conversations apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Our address.
    pub local: IpAddr,
    /// The peer's.
    pub remote: IpAddr,
    /// Our port.
    pub local_port: u16,
    /// The peer's.
    pub remote_port: u16,
}

impl Flow {
    /// Of a connection that is not there.
    pub(super) const NOWHERE: Self = Self {
        local: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        remote: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        local_port: 0,
        remote_port: 0,
    };

    /// A hash that peers who do not know the seed cannot aim.
    #[inline(always)]
    fn hash(&self, seed: u64) -> u64 {
        let words = |address: IpAddr| {
            let bits = match address {
                IpAddr::V4(v4) => u128::from(v4.to_bits()),
                IpAddr::V6(v6) => v6.to_bits(),
            };
            (bits >> 64) as u64 ^ (bits as u64).rotate_left(23)
        };
        let ports = u64::from(self.local_port) << 16 | u64::from(self.remote_port);
        let first = fold(words(self.remote) ^ seed, ports ^ 0x9e37_79b9_7f4a_7c15);
        fold(first ^ words(self.local), seed | 1)
    }
}

#[inline(always)]
const fn fold(a: u64, b: u64) -> u64 {
    let product = a as u128 * b as u128;
    (product >> 64) as u64 ^ product as u64
}

const VACANT: u32 = u32::MAX;

/// Places of connections by their flows: linear probing, removal by moving back what follows.
#[derive(Debug)]
pub(super) struct FlowTable {
    /// High half: bits of the hash. Low half: the place.
    slots: Vec<u64>,
    seed: u64,
    used: usize,
}

impl FlowTable {
    /// For at most `most` flows.
    pub(super) fn new(most: usize, seed: u64) -> Self {
        let slots = (most.max(8) * 2).next_power_of_two();
        Self { slots: vec![u64::from(VACANT); slots], seed, used: 0 }
    }

    const fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    /// Where a flow's slot is if it is anywhere, and the bits of its hash that the slot has.
    #[inline(always)]
    fn start(&self, flow: &Flow) -> (usize, u32) {
        let hash = flow.hash(self.seed);
        (hash as usize & self.mask(), (hash >> 32) as u32)
    }

    /// The slot of a flow.
    #[inline(always)]
    fn slot(&self, flow: &Flow, flow_of: impl Fn(u32) -> Option<Flow>) -> Option<usize> {
        let (start, tag) = self.start(flow);
        for step in 0..self.slots.len() {
            let at = (start + step) & self.mask();
            let slot = self.slots[at];
            let place = slot as u32;
            if place == VACANT {
                return None;
            }
            if (slot >> 32) as u32 == tag && flow_of(place).is_some_and(|other| other == *flow) {
                return Some(at);
            }
        }
        None
    }

    /// The place of a flow's connection.
    #[inline(always)]
    pub(super) fn find(&self, flow: &Flow, flow_of: impl Fn(u32) -> Option<Flow>) -> Option<u32> {
        self.slot(flow, flow_of).map(|at| self.slots[at] as u32)
    }

    /// Adds a flow that is not there. False, and nothing changed, when the table is as full as it may be.
    pub(super) fn add(&mut self, flow: &Flow, place: u32) -> bool {
        if self.used * 2 >= self.slots.len() || place == VACANT {
            return false;
        }
        let (start, tag) = self.start(flow);
        for step in 0..self.slots.len() {
            let at = (start + step) & self.mask();
            if self.slots[at] as u32 == VACANT {
                self.slots[at] = u64::from(tag) << 32 | u64::from(place);
                self.used += 1;
                return true;
            }
        }
        false
    }

    /// Takes a flow away; `flow_of` must still know the flows of all places, this one's too.
    pub(super) fn remove(&mut self, flow: &Flow, flow_of: impl Fn(u32) -> Option<Flow>) {
        let Some(mut hole) = self.slot(flow, &flow_of) else { return };
        self.used -= 1;
        let mut at = hole;
        for _ in 0..self.slots.len() {
            at = (at + 1) & self.mask();
            let place = self.slots[at] as u32;
            if place == VACANT {
                break;
            }
            let Some(other) = flow_of(place) else { continue };
            // It may move into the hole unless that is before its start.
            let distance = at.wrapping_sub(self.start(&other).0) & self.mask();
            if distance >= (at.wrapping_sub(hole) & self.mask()) {
                self.slots[hole] = self.slots[at];
                hole = at;
            }
        }
        self.slots[hole] = u64::from(VACANT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn flow(n: u16) -> Flow {
        Flow {
            local: IpAddr::from([192, 0, 2, 1]),
            remote: if n.is_multiple_of(2) {
                IpAddr::from([198, 51, 100, (n >> 8) as u8])
            } else {
                IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n])
            },
            local_port: 80,
            remote_port: n,
        }
    }

    proptest! {
        /// Against a map, in a table so small that most flows meet others.
        #[test]
        fn flows_are_found_until_they_are_removed(
            steps in proptest::collection::vec((any::<bool>(), 0_u16..24), 1..400),
            seed in any::<u64>(),
        ) {
            let mut table = FlowTable::new(12, seed);
            let mut model = HashMap::new();
            let flow_of = |place: u32| Some(flow(place as u16));
            for (add, n) in steps {
                if add && !model.contains_key(&n) {
                    let fits = model.len() < 16;
                    prop_assert_eq!(table.add(&flow(n), u32::from(n)), fits);
                    if fits {
                        model.insert(n, u32::from(n));
                    }
                } else if !add {
                    table.remove(&flow(n), flow_of);
                    model.remove(&n);
                }
                for n in 0..24 {
                    prop_assert_eq!(table.find(&flow(n), flow_of), model.get(&n).copied());
                }
            }
        }
    }
}
