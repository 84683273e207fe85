//! isoplane's network ports.
//!
//! | module | what it gives |
//! |---|---|
//! | [`port`] | the traits every driver implements: cold [`Port`], hot [`RxQueue`] and [`TxQueue`] |
//! | [`queue`] | one enum over all drivers' queues: one branch a batch |
//! | [`open`](mod@open) | ports by name: an interface, or a PCI function |
//! | [`decorated`] | any port with its queues wrapped, by the decorators below or by yours |
//! | [`fault`] | a decorator that injects faults |
//! | [`capture`] | decorators that record packets, for pcap files and traces |
//! | `conformance` (a feature) | the suite that every driver must pass |
//! | [`null`] | a source and sink that never leaves the worker |
//! | [`pci`] | what a driver sees of a PCI function: registers, DMA memory, configuration space |
//! | [`vfio`] | PCI functions through VFIO: bound, opened, mapped, given memory |
//! | [`e1000e`] | the Intel 82574L, driven without the kernel |
//! | [`virtio`] | virtio-net devices, through a PCI function |
//! | [`xdp`] | AF_XDP: a Linux interface through sockets that share memory with the kernel |
//! | [`tap`] | an interface of Linux whose other end is a worker |
//! | [`mod@pcap`] | plays a file, and writes what is transmitted to another |
//! | [`memory`] | two ports connected through shared memory, within a process or across processes |
#![deny(missing_docs, unsafe_code)]

pub mod capture;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod decorated;
pub mod e1000e;
pub mod fault;
pub mod memory;
pub mod null;
pub mod open;
pub mod pcap;
pub mod pci;
pub mod port;
pub mod queue;
#[cfg(test)]
mod sharing;
pub mod tap;
pub mod vfio;
pub mod virtio;
pub mod xdp;

pub use decorated::Decorated;
pub use e1000e::{E1000eConfig, E1000eError, E1000ePort};
pub use memory::MemoryPort;
pub use null::NullPort;
pub use open::{OpenError, Opener};
pub use pcap::{PcapConfig, PcapError, PcapPort};
pub use port::{
    Capabilities, KickError, KickTarget, Kicked, LinkState, Port, PortStatistics, RxQueue, TxQueue,
};
pub use queue::{AnyRx, AnyTx, Queue};
pub use tap::{TapConfig, TapError, TapPort};
pub use virtio::{VirtioConfig, VirtioError, VirtioNetPort};
pub use xdp::{XdpConfig, XdpError, XdpPort};
