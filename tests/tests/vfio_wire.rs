//! Ports that drive QEMU's devices through VFIO, and what is on the other end of their cables: Linux's own drivers,
//! cables that are pulled or full, several queues, ports of other kinds. Only in the guest (`cargo xtask kernel test
//! vfio_wire`); elsewhere there is nothing to test.

#[path = "vfio/cable.rs"]
mod cable;
#[path = "vfio/hub.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod hub;
#[path = "vfio/kernel.rs"]
mod kernel;
#[path = "vfio/nics.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod nics;
#[path = "vfio/peer.rs"]
mod peer;
#[path = "vfio/queues.rs"]
mod queues;
#[path = "vfio/share.rs"]
mod share;
#[path = "vfio/worker.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod worker;
