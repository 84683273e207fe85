//! AF_XDP: a Linux network interface as a port, through sockets that share rings and memory with the
//! kernel.
//!
//! ```text
//!            fill: free chunks          TX: packets
//! worker  ------------------------>  ------------------->   kernel  ---> device
//!         <------------------------  <-------------------
//!            RX: packets                completion: sent chunks
//! ```
//!
//! | file | what is in it |
//! |---|---|
//! | `layout` | the kernel's structures and numbers |
//! | `sys` | every system call |
//! | `asm`, `program`, `bpf`, `steering` | from steering rules to an attached XDP program |
//! | `interface`, `features` | what the kernel says about an interface |
//! | `umem`, `socket`, `open` | the pool as UMEM, a socket and its rings, opening a queue |
//! | `queue`, `metadata` | the hot halves |
//! | `slot`, `release`, `port`, `config`, `error` | the cold half |
//!
//! Contract: nothing outlives the process, however it ends: the program is attached by a link, and
//! nothing is pinned. An interface that has another XDP program is left alone.
//!
//! # Kicks
//! The kernel moves packets out of the TX ring only in a system call: [`TxQueue::kick`](crate::TxQueue)
//! by the worker, once a turn, or [`KickTarget`](crate::KickTarget) by a thread elsewhere, in this
//! process or in one that it was forked from.
//!
//! # Requirements
//! Linux 5.9 (XDP links); packets of several frames 6.6, requests on transmit 6.8, sending a whole ring in
//! one call in copy mode 6.17. `CAP_NET_RAW`, `CAP_NET_ADMIN` and `CAP_BPF` to open; nothing to run.
//!
//! # Limits
//! IPv6 extension headers are not walked by steering. Times of *received* packets are not passed on.
//! Zero-copy mode needs a driver that offers it; veth and loopback do not, so the tests of this project
//! see it refused, never at work.

mod asm;
mod bpf;
mod config;
mod error;
mod features;
#[cfg(test)]
mod hostile;
pub(crate) mod interface;
mod layout;
mod metadata;
mod open;
mod port;
mod program;
mod queue;
mod release;
mod resteer;
mod slot;
mod socket;
mod steering;
mod sys;
mod umem;

pub use bpf::Attached;
pub use config::{Attach, Chunks, TxMetadata, Want, XdpConfig, ZeroCopy};
pub use error::XdpError;
pub use metadata::TxTime;
pub use port::XdpPort;
pub use queue::{XdpRx, XdpTx};
pub use resteer::XdpSteering;
pub use slot::XdpKick;
pub use steering::{Prefix, Rule, Steering};
