//! Files as a port: plays a recording, and writes what is transmitted.
//!
//! ```text
//! file -> read and checked at the start -> shared memory -> frames: received by the worker
//! frames: transmitted by the worker -> ring in shared memory -> whoever kicks: written to a file
//! ```
//!
//! For tests that need the same packets each time, for replaying what was seen elsewhere, and for looking at what a
//! program makes of it, without a network. The worker makes no system call: the file to play is in memory, and the one
//! to write is written by the kicker ([`KickTarget`](crate::KickTarget)) or by a worker that kicks itself.
//!
//! Contract: a file is taken whole or refused with the place in it that is wrong. Nothing that was transmitted is left
//! out: when the writer cannot follow, packets wait with the worker. A worker that dies plays on where it had
//! published that it was; the packets of its last batch come again.
//!
//! What is played is Ethernet, without a frame check sequence. To *record* what passes any other port, see
//! [`capture`](crate::capture).

mod error;
mod film;
mod halves;
mod port;
mod recording;
#[cfg(test)]
mod tests;
mod writer;

pub use error::{PcapError, RecordingError};
pub use halves::{PcapRx, PcapTx};
pub use port::{Pace, PcapConfig, PcapPort, Rounds};
pub use recording::{Packet, Recording};
pub use writer::PcapKick;
