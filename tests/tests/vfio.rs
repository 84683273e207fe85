//! PCI functions through VFIO, with real devices behind a real IOMMU: only in the guest (`cargo xtask kernel test
//! vfio`); elsewhere there is nothing to test.

#[path = "vfio/bad.rs"]
mod bad;
#[path = "vfio/lifetime.rs"]
mod lifetime;
#[path = "vfio/nics.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod nics;
#[path = "vfio/open.rs"]
mod open;
