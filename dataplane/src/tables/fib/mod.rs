//! Prefixes of addresses, each with the next hop of its packets: longest-prefix match.
//!
//! Contract: a lookup takes a bounded time whatever the table holds, and says [`NextHopId::NONE`] when no
//! prefix matches. A reader sees each change whole: the prefix with its old next hop, or with the new one.

use super::epochs::Epochs;
use super::next_hop::NextHopId;
use ipnet::{Ipv4Net, Ipv6Net};
use isoplane_memory::RegionError;
use isoplane_memory::table::{Table, TableWriter};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Why a prefix could not be put in; the table is as it was.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FibError {
    /// No room is left.
    #[error("{table}: no room for {prefix}: it holds {routes} prefixes; make the tables with more routes")]
    Full {
        /// The table's name.
        table: String,
        /// The prefix.
        prefix: String,
        /// Prefixes that it holds.
        routes: u32,
    },
}

macro_rules! fib {
    ($reader:ident, $writer:ident, $net:ty, $addr:ty, $key:ty) => {
        /// A worker's view of a table of prefixes.
        #[derive(Debug, Clone)]
        pub struct $reader {
            table: Table,
        }

        /// The program's side of a table of prefixes.
        #[derive(Debug)]
        pub struct $writer {
            name: String,
            table: TableWriter,
            routes: Vec<($net, NextHopId)>,
        }

        impl $reader {
            /// Makes an empty table with room for some `routes` prefixes.
            ///
            /// # Errors
            /// See [`RegionError`].
            pub fn create(name: &str, routes: u32) -> Result<($writer, Self), RegionError> {
                let (table, reader) = Table::create(name, (routes as usize).min(4096) * 4)?;
                Ok(($writer { name: name.to_owned(), table, routes: Vec::new() }, Self { table: reader }))
            }

            /// The next hop of the longest prefix that holds `address`.
            #[inline]
            #[must_use]
            pub fn lookup(&self, address: $key) -> NextHopId {
                let mut best = (0, NextHopId::NONE);
                for at in 0..self.table.len() / 4 {
                    let word = |i| self.table.get(at * 4 + i).unwrap_or(0);
                    let head = word(0);
                    let length = (head >> 32) as u32;
                    if length == 0 {
                        break;
                    }
                    let key = (u128::from(word(1)) << 64 | u128::from(word(2))) as $key;
                    let length = length - 1;
                    let differ = (address ^ key).leading_zeros();
                    if differ >= length && length >= best.0 {
                        best = (length, NextHopId::from_low_bits(head as u32));
                    }
                }
                best.1
            }

            /// As many lookups at once as there are addresses, at most a batch of them.
            #[inline]
            pub fn lookup_many(&self, addresses: &[$key], next_hops: &mut [NextHopId]) {
                for (address, next_hop) in addresses.iter().zip(next_hops) {
                    *next_hop = self.lookup(*address);
                }
            }
        }

        impl $writer {
            /// Puts a prefix in, or changes its next hop; says what it was before.
            ///
            /// # Errors
            /// See [`FibError`].
            pub fn insert(&mut self, prefix: $net, to: NextHopId) -> Result<Option<NextHopId>, FibError> {
                let prefix = prefix.trunc();
                let before = self.remove(prefix);
                if (self.routes.len() + 1) * 4 > self.table.table().len() {
                    return Err(FibError::Full {
                        table: self.name.clone(),
                        prefix: prefix.to_string(),
                        routes: self.routes.len() as u32,
                    });
                }
                self.routes.push((prefix, to));
                self.publish();
                Ok(before)
            }

            /// Takes a prefix away; says what its next hop was.
            pub fn remove(&mut self, prefix: $net) -> Option<NextHopId> {
                let prefix = prefix.trunc();
                let at = self.routes.iter().position(|(net, _)| *net == prefix)?;
                let (_, was) = self.routes.swap_remove(at);
                self.publish();
                Some(was)
            }

            /// The next hop of exactly this prefix.
            #[must_use]
            pub fn get(&self, prefix: $net) -> Option<NextHopId> {
                let prefix = prefix.trunc();
                self.routes.iter().find(|(net, _)| *net == prefix).map(|(_, to)| *to)
            }

            /// Number of prefixes.
            #[must_use]
            pub fn len(&self) -> usize {
                self.routes.len()
            }

            /// True when no prefix is there.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.routes.is_empty()
            }

            /// See [`TablesWriter::collect`](super::TablesWriter::collect).
            pub fn collect(&mut self, _epochs: &dyn Epochs) {}

            /// The readers' view.
            #[must_use]
            pub fn reader(&self) -> $reader {
                $reader { table: self.table.table().clone() }
            }

            fn publish(&mut self) {
                let Self { table, routes, .. } = self;
                table.update(|table| {
                    for (at, (net, to)) in routes.iter().enumerate() {
                        let key = <$addr>::to_bits(net.network()) as u128;
                        table.set(at * 4 + 1, (key >> 64) as u64);
                        table.set(at * 4 + 2, key as u64);
                        table.set(at * 4, u64::from(net.prefix_len() + 1) << 32 | u64::from(to.get()));
                    }
                    table.set(routes.len() * 4, 0);
                });
            }
        }
    };
}

fib!(Fib4, Fib4Writer, Ipv4Net, Ipv4Addr, u32);
fib!(Fib6, Fib6Writer, Ipv6Net, Ipv6Addr, u128);
