//! VFIO's second interface: the device's own file, bound to an address space of `/dev/iommu`.
//!
//! Contract: as [`Iommu`]. Needs Linux 6.6. Source: `Documentation/userspace-api/iommufd.rst` and
//! `Documentation/driver-api/vfio.rst`, Linux 6.12.
#![allow(unsafe_code, reason = "passes on the promise of `Iommu::map`")]

use super::error::{DmaError, VfioError};
use super::host::{self, Host};
use super::iommu::{Iommu, Limits, Span};
use super::{blame, ioctl};
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

/// The interface's file, from the root.
pub(super) const PATH: &str = "dev/iommu";

/// An address space.
#[derive(Debug)]
pub(super) struct Ioas {
    iommufd: OwnedFd,
    ioas: u32,
}

fn missing(address: &str, path: &str) -> VfioError {
    VfioError::NoVfio {
        address: address.to_owned(),
        what: "iommufd",
        path: format!("/{path}"),
        remedy: "take a kernel from 6.6 on with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV, or the container (type1)",
    }
}

impl Ioas {
    pub(super) fn new(host: &Host) -> Result<Self, VfioError> {
        let iommufd = blame::open(host, "any", PATH).map_err(|error| match error {
            VfioError::Os { source: Errno::ENOENT | Errno::ENODEV, .. } => missing("any", PATH),
            other => other,
        })?;
        let ioas = ioctl::ioas_alloc(iommufd.as_fd()).map_err(|_| missing("any", PATH))?;
        Ok(Self { iommufd, ioas })
    }
}

impl Iommu for Ioas {
    fn open(&self, host: &Host, address: &str) -> Result<OwnedFd, VfioError> {
        let group = blame::ready(host, address)?;
        let own = host::names(&host.device(address).join("vfio-dev"));
        let own = own.first().ok_or_else(|| missing(address, "dev/vfio/devices"))?;
        let path = format!("dev/vfio/devices/{own}");
        let device = blame::open(host, address, &path)?;
        ioctl::bind_iommufd(device.as_fd(), self.iommufd.as_fd()).map_err(|source| match source {
            // The kernel's drivers have others of the group, or the IOMMU lets interrupts through, or somebody
            // has this device.
            Errno::EPERM | Errno::EBUSY | Errno::EINVAL => match blame::not_viable(host, address, group) {
                VfioError::GroupNotViable { others, .. } if others.is_empty() => {
                    let address = address.to_owned();
                    match source {
                        Errno::EPERM => VfioError::NoInterruptRemapping { address, module: "iommufd" },
                        _ => VfioError::Busy { address, path: format!("/{path}") },
                    }
                }
                error => error,
            },
            _ => VfioError::Os { address: address.to_owned(), call: "VFIO_DEVICE_BIND_IOMMUFD", source },
        })?;
        ioctl::attach(device.as_fd(), self.ioas).map_err(|source| VfioError::Os {
            address: address.to_owned(),
            call: "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
            source,
        })?;
        Ok(device)
    }

    fn limits(&self) -> Result<Option<Limits>, VfioError> {
        let (alignment, ranges) = ioctl::ioas_ranges(self.iommufd.as_fd(), self.ioas).map_err(|source| {
            VfioError::Os { address: "any".to_owned(), call: "IOMMU_IOAS_IOVA_RANGES", source }
        })?;
        Ok(Some(Limits { ranges, page: alignment.max(1) }))
    }

    unsafe fn map(&self, span: Span<'_>, iova: u64) -> Result<u64, DmaError> {
        // SAFETY: promised by the caller.
        unsafe { ioctl::ioas_map(self.iommufd.as_fd(), self.ioas, span.start, iova, span.bytes) }
            .map(|()| iova)
            .map_err(|source| blame::not_mapped(span, "IOMMU_IOAS_MAP", source))
    }

    fn unmap(&self, iova: u64, bytes: u64) -> bool {
        ioctl::ioas_unmap(self.iommufd.as_fd(), self.ioas, iova, bytes) == Ok(bytes)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.iommufd.as_raw_fd()]
    }
}
