//! isoplane: a userspace network dataplane, one poll-mode worker per isolated core.
//!
//! A program describes its ports and workers ([`Dataplane::builder`] in a later step), each worker
//! runs an [`App`], and forwarding [`blocks`] are apps or parts of them.
//!
//! | module | what it gives |
//! |---|---|
//! | [`app`] | what a worker runs: the [`App`] trait and the [`Turn`] it is handed |
//! | [`turns`] | the loop itself: receive, app, transmit, reclaim, one kick, counters |
//! | [`blocks`] | reusable forwarding steps: cross-connect, learning bridge |
#![deny(missing_docs, unsafe_code)]

pub mod app;
pub mod blocks;
pub mod turns;

pub use app::{App, DropReason, PortId, Turn};
pub use isoplane_drivers as drivers;
pub use isoplane_memory as memory;
