//! e1000e: the Intel 82574L driven from user space, as one finds it in QEMU (`-device e1000e`) and on boards.
//!
//! | module | what it does |
//! |---|---|
//! | `layout` | registers and descriptors, with the datasheet's section beside each |
//! | `chip` | reset, address, link, filters, where rings are |
//! | `rss` | which queue a flow comes to |
//! | `rings` | the memory that a queue shares with the device and with its successor |
//! | `rx`, `tx` | the hot halves |
//! | `device` | what all of them share, and how it ends |
//! | `stats` | the device's counters |
//! | `port` | opening and the cold half |
//!
//! Contract: the driver is written against [`pci`](crate::pci) and has no access to memory but through it. The
//! device is not trusted: what it writes can cost packets and frames, never memory. Interrupts stay masked.
//! Positions and chunks in the rings are in shared memory, so a worker's successor goes on where it died.

mod chip;
mod config;
mod device;
mod error;
mod layout;
mod port;
mod rings;
mod rss;
mod rx;
mod stats;
mod tx;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use config::{E1000eConfig, Filter, RxDescriptors};
pub use error::E1000eError;
pub use port::E1000ePort;
pub use rx::E1000eRx;
pub use stats::E1000eStatistics;
pub use tx::E1000eTx;
