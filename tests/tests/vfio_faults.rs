//! Ports that drive QEMU's devices through VFIO when something goes wrong: DMA that is led astray, devices that are
//! unplugged, workers and programs that are killed. Only in the guest (`cargo xtask kernel test vfio_faults`);
//! elsewhere there is nothing to test.

#[path = "vfio/astray.rs"]
mod astray;
#[path = "vfio/dataplane.rs"]
mod dataplane;
#[path = "vfio/hub.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod hub;
#[path = "vfio/killed.rs"]
mod killed;
#[path = "vfio/nics.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod nics;
#[path = "vfio/shared.rs"]
mod shared;
#[path = "vfio/unplug.rs"]
mod unplug;
#[path = "vfio/worker.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod worker;
