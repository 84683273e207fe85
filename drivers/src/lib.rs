//! isoplane's network ports.
//!
//! | module | what it gives |
//! |---|---|
//! | [`port`] | the traits every driver implements: cold [`Port`], hot [`RxQueue`] and [`TxQueue`] |
//! | [`queue`] | one enum over all drivers' queues: one branch a batch |
//! | `conformance` (a feature) | the suite that every driver must pass |
//! | [`null`] | a source and sink that never leaves the worker |
//! | [`xdp`] | AF_XDP: a Linux interface through sockets that share memory with the kernel |
//! | [`memory`] | two ports connected through shared memory, within a process or across processes |
#![deny(missing_docs, unsafe_code)]

#[cfg(feature = "conformance")]
pub mod conformance;
pub mod memory;
pub mod null;
pub mod port;
pub mod queue;
pub mod xdp;

pub use memory::MemoryPort;
pub use null::NullPort;
pub use port::{
    Capabilities, KickError, KickTarget, Kicked, LinkState, Port, PortStatistics, RxQueue, TxQueue,
};
pub use queue::{AnyRx, AnyTx, Queue};
pub use xdp::{XdpConfig, XdpError, XdpPort};
