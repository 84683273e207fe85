//! The tap: an interface of Linux whose other end is a worker.
//!
//! What the kernel sends out of the interface the worker receives, and what the worker transmits the kernel receives
//! there: the way for packets between a port that Linux does not see and the network stack.
//!
//! ```text
//!            free frames, packets to send                    readv, writev
//! worker  --------------------------------->  whoever kicks <-------------->  kernel: interface "tap0"
//!         <---------------------------------
//!            packets received, sent frames
//! ```
//!
//! A tap has no rings that it shares with us, only a descriptor, so a system call is made for each packet: by the
//! kicker ([`KickTarget`](crate::KickTarget)), a housekeeping thread, so that an isolated worker makes none; or by a
//! worker that kicks itself. Worker and kicker share a pair of rings for each direction, across a fork. Rates are those
//! of system calls: a tap is for what is the host's, not for what is forwarded.
//!
//! | file | what is in it |
//! |---|---|
//! | `layout` | the header that the kernel has before packets; the rings |
//! | `sys` | every system call |
//! | `lock`, `mover`, `packet` | moving packets between rings and descriptor |
//! | `queue` | the hot halves |
//! | `slot`, `port`, `config`, `error` | the cold half, the kick target |
//!
//! Contract: the interface goes with the last process that has it open, however that ends, unless it is persistent.
//! Frames survive the death of a worker at any point; a packet that was being sent then may be sent twice.
//!
//! # Checksums and segments
//! The kernel leaves transport checksums to us (`TUN_F_CSUM`) and whoever kicks computes them, so frames that arrive are
//! complete. Segments are cut by the kernel. Transmitted frames may ask for a checksum (`FrameFlags::TX_CHECKSUM`),
//! which the kernel then takes as good or computes when the packet leaves the machine.
//!
//! # Requirements
//! Linux 4.8 (`TUNSETVNETHDRSZ`, rtnetlink's 64-bit counters); `/dev/net/tun`; `CAP_NET_ADMIN` to open, unless the
//! interface was made for the user; nothing to run.

mod config;
mod error;
mod layout;
mod lock;
mod mover;
mod packet;
mod port;
mod queue;
mod slot;
mod sys;
#[cfg(test)]
mod tests;

pub use config::{MAX_QUEUES, MAX_RING, MAX_SEGMENTS, TapConfig};
pub use error::TapError;
pub use port::TapPort;
pub use queue::{TapRx, TapTx};
pub use slot::TapKick;
