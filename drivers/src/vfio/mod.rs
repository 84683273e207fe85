//! PCI functions through VFIO: what drivers of ours stand on.
//!
//! Contract: a function that is open here can do DMA to the memory that it was given and to nothing else, because
//! an IOMMU says so (but see [`IommuChoice::UnsafeNoIommu`]); what it does to that memory is a value and never
//! undefined behaviour. All of it is cold, but for [`Bar`]'s accesses, which never enter the kernel.
//!
//! ```no_run
//! use isoplane_drivers::pci::Function;
//! use isoplane_drivers::vfio::{Domain, IommuChoice, VfioFunction};
//!
//! let domain = Domain::new(IommuChoice::Auto)?;
//! let function = VfioFunction::open("0000:00:02.0", &domain)?;
//! function.reset()?;
//! let registers = function.bar(0)?;
//! let ring = function.dma("ring", 4096)?;
//! # let _ = (registers, ring);
//! function.bus_master(true);
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! A function must belong to the kernel's `vfio-pci` driver first: [`Host::bind`].

mod bar;
mod bind;
mod blame;
mod container;
mod device;
mod error;
mod host;
mod inventory;
mod ioctl;
mod iommu;
mod iommufd;
mod iova;
mod irq;
mod layout;
mod noiommu;

pub use bar::Bar;
pub use bind::{BindError, Bound};
pub use device::VfioFunction;
pub use error::{BarError, DmaError, InterruptError, ResetError, VfioError};
pub use host::Host;
pub use inventory::{Kind, PciDevice, PcieLink};
pub use iommu::{Domain, IommuChoice};
pub use irq::Interrupts;
