//! Prefixes of addresses, each with the next hop of its packets: longest-prefix match.
//!
//! Contract: a lookup takes a bounded time whatever the table holds, and says [`NextHopId::NONE`] when no
//! prefix matches. A reader sees each change whole: the prefix with its old next hop, or with the new one.
//! A change that does not fit is not made.
//!
//! The table is a trie of three kinds of steps at most: 16 bits of the address by a direct table, then a
//! byte at a time by nodes that keep one entry for each run of equal slots and find it by counting bits.
//! So an IPv4 address needs three reads that depend on each other (four below a /24), all of them in few
//! megabytes that stay in the caches.
//! A batch of lookups makes each of these steps for all its addresses before the next, so that they wait
//! for memory together: in registers of sixteen where the CPU has AVX-512, else one by one.

mod key;
mod shared;
mod space;
#[cfg(test)]
mod tests;
mod trie;
#[cfg(target_arch = "x86_64")]
mod vector;

use super::epochs::Epochs;
use super::next_hop::NextHopId;
use isoplane_memory::{BATCH, RegionError};
pub use key::Key;
use shared::Shared;
use std::marker::PhantomData;
use trie::{NoRoom, Trie};

/// Why a prefix could not be put in; the table is as it was.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FibError {
    /// No room is left.
    #[error(
        "{table}: no room for {prefix}: it holds {routes} prefixes in {used} of {bytes} bytes, of which \
         {retired} wait for workers; make the tables with more routes"
    )]
    Full {
        /// The table's name.
        table: String,
        /// The prefix.
        prefix: String,
        /// Prefixes that it holds.
        routes: usize,
        /// Bytes in use.
        used: usize,
        /// Bytes of the table.
        bytes: usize,
        /// Bytes in use that are free when the workers' turns have ended; see
        /// [`collect`](FibWriter::collect).
        retired: usize,
    },
}

/// How much memory a table takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FibMemory {
    /// Taken from the machine when the table was made.
    pub total: usize,
    /// In use of that.
    pub used: usize,
    /// In use only until every worker has ended its turn.
    pub retired: usize,
}

/// A worker's view of a table of prefixes.
#[derive(Debug, Clone)]
pub struct Fib<K> {
    shared: Shared,
    key: PhantomData<K>,
}

/// The program's side of a table of prefixes.
#[derive(Debug)]
pub struct FibWriter<K> {
    name: String,
    trie: Trie,
    key: PhantomData<K>,
}

/// IPv4 prefixes, as workers see them.
pub type Fib4 = Fib<u32>;
/// IPv4 prefixes, as the program changes them.
pub type Fib4Writer = FibWriter<u32>;
/// IPv6 prefixes, as workers see them.
pub type Fib6 = Fib<u128>;
/// IPv6 prefixes, as the program changes them.
pub type Fib6Writer = FibWriter<u128>;

impl<K: Key> Fib<K> {
    /// Makes an empty table with room for some `routes` prefixes. How many there is room for depends on
    /// their kind: see [`FibWriter::memory`]. In 2 MiB pages where there are, if it is that large.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str, routes: u32) -> Result<(FibWriter<K>, Self), RegionError> {
        let bytes = routes.max(64) as usize * K::BYTES_A_ROUTE as usize;
        let trie = Trie::create(name, bytes)?;
        let writer = FibWriter { name: name.to_owned(), trie, key: PhantomData };
        let reader = writer.reader();
        Ok((writer, reader))
    }

    /// The next hop of the longest prefix that holds `address`.
    #[inline]
    #[must_use]
    pub fn lookup(&self, address: K) -> NextHopId {
        self.shared.lookup(&address)
    }

    /// Looks up as many addresses as both slices have, [`BATCH`] at once: much faster than one by one, as
    /// they wait for memory together.
    #[inline]
    pub fn lookup_many(&self, addresses: &[K], next_hops: &mut [NextHopId]) {
        for (keys, found) in addresses.chunks(BATCH).zip(next_hops.chunks_mut(BATCH)) {
            if let (Ok(keys), Ok(found)) = (keys.try_into(), (&mut *found).try_into()) {
                self.shared.lookup_batch(keys, BATCH, found);
                continue;
            }
            let many = keys.len().min(found.len());
            let (mut padded, mut results) = ([K::default(); BATCH], [NextHopId::NONE; BATCH]);
            padded[..many].copy_from_slice(&keys[..many]);
            self.shared.lookup_batch(&padded, many, &mut results);
            found[..many].copy_from_slice(&results[..many]);
        }
    }
}

impl<K: Key> FibWriter<K> {
    /// Puts a prefix in, or changes its next hop; says what it was before.
    ///
    /// # Errors
    /// See [`FibError`].
    pub fn insert(&mut self, prefix: K::Net, to: NextHopId) -> Result<Option<NextHopId>, FibError> {
        let (bits, length) = K::bits_of(prefix);
        match self.trie.insert(bits, length, to.get()) {
            Ok(was) => Ok(was.map(NextHopId::from_low_bits)),
            Err(NoRoom) => {
                let FibMemory { total, used, retired } = self.memory();
                Err(FibError::Full {
                    table: self.name.clone(),
                    prefix: prefix.to_string(),
                    routes: self.len(),
                    used,
                    bytes: total,
                    retired,
                })
            }
        }
    }

    /// Takes a prefix away; says what its next hop was. Works in a full table too.
    pub fn remove(&mut self, prefix: K::Net) -> Option<NextHopId> {
        let (bits, length) = K::bits_of(prefix);
        self.trie.remove(bits, length).map(NextHopId::from_low_bits)
    }

    /// The next hop of exactly this prefix.
    #[must_use]
    pub fn get(&self, prefix: K::Net) -> Option<NextHopId> {
        let (bits, length) = K::bits_of(prefix);
        self.trie.get(bits, length).map(NextHopId::from_low_bits)
    }

    /// Calls `each` with every prefix and its next hop, in no order that means anything.
    pub fn for_each(&self, mut each: impl FnMut(K::Net, NextHopId)) {
        self.trie.for_each(|bits, length, to| {
            if let Some(net) = K::net_of(bits, length) {
                each(net, NextHopId::from_low_bits(to));
            }
        });
    }

    /// Number of prefixes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.trie.len()
    }

    /// True when no prefix is there.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What the table takes of the machine's memory, and what of that is in use.
    #[must_use]
    pub fn memory(&self) -> FibMemory {
        let (used, retired) = self.trie.used();
        FibMemory { total: self.trie.shared().bytes(), used, retired }
    }

    /// See [`TablesWriter::collect`](super::TablesWriter::collect).
    pub fn collect(&mut self, epochs: &dyn Epochs) {
        self.trie.collect(epochs);
    }

    /// The readers' view.
    #[must_use]
    pub fn reader(&self) -> Fib<K> {
        Fib { shared: self.trie.shared().clone(), key: PhantomData }
    }
}
