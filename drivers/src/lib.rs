//! isoplane's network ports.
//!
//! | module | what it gives |
//! |---|---|
//! | [`port`] | the traits every driver implements: cold [`Port`], hot [`RxQueue`] and [`TxQueue`] |
//! | [`queue`] | one enum over all drivers' queues: one branch a batch |
#![deny(missing_docs, unsafe_code)]

pub mod port;
pub mod queue;

pub use port::{
    Capabilities, KickError, KickTarget, Kicked, LinkState, Port, PortStatistics, RxQueue, TxQueue,
};
pub use queue::{AnyRx, AnyTx, Queue};
