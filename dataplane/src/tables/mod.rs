//! What a router knows, in shared memory: read-only to workers, changed in place by the program.
//!
//! | module | what is there |
//! |---|---|
//! | [`fib`] | prefixes of addresses, each with the next hop of its packets: longest match |
//! | [`next_hop`] | what to do with a packet: forward it to a neighbour, spread it over several, deliver, drop |
//! | [`interface`] | the router's interfaces: port, VLAN, MAC address, MTU, addresses |
//! | [`epochs`] | when what was unlinked may be used again |
//!
//! There is no table of neighbours of its own: a neighbour *is* a next hop, and one that is resolved has a
//! prefix of full length in the [`fib`]. So a packet needs one lookup, whether it goes to a gateway, to a
//! neighbour, or to the router itself, and one word changed moves all routes through a gateway.
//!
//! Contract: there is one writer, the program; workers read while it writes. A word is read and written
//! whole, each word makes sense alone, and what a reader may still hold is not used for something else
//! before every worker has ended the turn in which it could have read it. A full table keeps what it had
//! and says so.

pub mod epochs;
pub mod fib;
pub mod interface;
pub mod next_hop;

pub use epochs::{Epoch, Epochs, Immediate};
pub use fib::{Fib4, Fib4Writer, Fib6, Fib6Writer, FibError};
pub use interface::{Interface, InterfaceId, Interfaces, InterfacesWriter};
pub use next_hop::{Group, GroupError, NextHop, NextHopId, NextHops, NextHopsWriter};

use isoplane_memory::RegionError;

/// How much the tables hold; memory for all of it is taken when they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TablesConfig {
    /// IPv4 prefixes, neighbours and own addresses included.
    pub routes4: u32,
    /// IPv6 prefixes, likewise.
    pub routes6: u32,
    /// Next hops: neighbours and groups.
    pub next_hops: u32,
    /// Buckets of all groups together; a group of up to 8 next hops takes 128.
    pub group_buckets: u32,
    /// Interfaces, VLAN sub-interfaces included; at most [`InterfaceId::MOST`].
    pub interfaces: u16,
}

impl Default for TablesConfig {
    /// Room for a full table of the Internet, and then some.
    fn default() -> Self {
        Self {
            routes4: 1 << 21,
            routes6: 1 << 19,
            next_hops: 1 << 16,
            group_buckets: 1 << 17,
            interfaces: 1024,
        }
    }
}

/// A worker's view of all tables. Clone it into as many workers as need it.
#[derive(Debug, Clone)]
pub struct Tables {
    /// IPv4 prefixes.
    pub fib4: Fib4,
    /// IPv6 prefixes.
    pub fib6: Fib6,
    /// What to do with packets.
    pub next_hops: NextHops,
    /// Where they come in and go out.
    pub interfaces: Interfaces,
}

/// The program's side of all tables.
#[derive(Debug)]
pub struct TablesWriter {
    /// IPv4 prefixes.
    pub fib4: Fib4Writer,
    /// IPv6 prefixes.
    pub fib6: Fib6Writer,
    /// What to do with packets.
    pub next_hops: NextHopsWriter,
    /// Where they come in and go out.
    pub interfaces: InterfacesWriter,
}

impl Tables {
    /// Makes empty tables: every lookup says [`NextHop::None`]. `name` is shown with their memory.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str, config: &TablesConfig) -> Result<(TablesWriter, Self), RegionError> {
        let (fib4, fib4_reader) = Fib4::create(&format!("{name}.fib4"), config.routes4)?;
        let (fib6, fib6_reader) = Fib6::create(&format!("{name}.fib6"), config.routes6)?;
        let (next_hops, next_hops_reader) =
            NextHops::create(&format!("{name}.next_hops"), config.next_hops, config.group_buckets)?;
        let (interfaces, interfaces_reader) =
            Interfaces::create(&format!("{name}.interfaces"), config.interfaces)?;
        let reader = Self {
            fib4: fib4_reader,
            fib6: fib6_reader,
            next_hops: next_hops_reader,
            interfaces: interfaces_reader,
        };
        Ok((TablesWriter { fib4, fib6, next_hops, interfaces }, reader))
    }
}

impl TablesWriter {
    /// Lets go of everything that no worker can still be reading. Call it after some hundred changes and
    /// now and then: what waits for it takes memory of the tables.
    pub fn collect(&mut self, epochs: &dyn Epochs) {
        self.fib4.collect(epochs);
        self.fib6.collect(epochs);
        self.next_hops.collect(epochs);
    }
}
