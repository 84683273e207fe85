//! virtio-net: the network device of virtual machines, and of some cards, driven from user space.
//!
//! ```text
//!             RX ring: free chunks          TX ring: packets
//! worker  ------------------------>  ------------------------>  device
//!         <------------------------  <------------------------
//!              used: packets              used: sent chunks
//! ```
//!
//! | file | what is in it |
//! |---|---|
//! | `layout` | registers, structures, features, each with its section of the specification |
//! | `transport`, `negotiate` | the device's structures and status; which features to accept |
//! | `ring`, `split`, `packed` | what rings have in common, and the kinds of them |
//! | `queue`, `rx`, `parse`, `tx` | the hot halves |
//! | `control`, `spread` | commands: address, receive modes, VLANs, queues, RSS |
//! | `ending`, `port`, `config`, `error` | the cold half |
//!
//! Contract: the device is not trusted. Every number that it gives is checked, a wait for it is bounded, and a
//! lie costs frames or counts. What it may reach is the pool and the rings, by the IOMMU.
//!
//! # Doorbells
//! A doorbell is a write to a register, no system call: `transmit` and `receive` ring it themselves, once a
//! batch, when the device wants it. There are no kicks, and no interrupts.
//!
//! # Limits
//! No segmentation offload: no packet is longer than the MTU allows. No live migration announcements. A device that
//! needs a reset (it says so when it is confused) must be reopened: [`VirtioNetPort::needs_reset`].

mod config;
mod control;
mod ending;
mod error;
mod layout;
mod negotiate;
mod packed;
mod parse;
mod port;
mod queue;
mod ring;
mod rx;
mod split;
mod spread;
mod transport;
mod tx;

#[cfg(test)]
mod behaviour;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod reborn;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod tests;

pub use config::{Filter, VirtioConfig};
pub use error::{Structure, VirtioError};
pub use layout::Features;
pub use port::VirtioNetPort;
pub use rx::VirtioRx;
pub use tx::VirtioTx;
