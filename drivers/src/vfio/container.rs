//! VFIO's first interface: groups of devices in a container, with an IOMMU of type 1 version 2.
//!
//! Contract: a group is opened once in a domain, whatever number of its functions are used, and closed with the
//! domain, so after its devices. Source: `Documentation/driver-api/vfio.rst`, Linux 6.12.
#![allow(unsafe_code, reason = "passes on the promise of `Iommu::map`")]

use super::error::{DmaError, VfioError};
use super::host::Host;
use super::iommu::{Iommu, Limits, Span};
use super::{blame, ioctl, iova, layout};
use nix::errno::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// The container's file, from the root.
pub(super) const PATH: &str = "dev/vfio/vfio";

/// Groups that were opened, and whether they were put into the container.
#[derive(Debug, Default)]
pub(super) struct Groups(Mutex<Vec<(u32, OwnedFd)>>);

impl Groups {
    /// Opens a function of a group; the group too if it is not open yet. `join` puts it into the container.
    pub(super) fn device(
        &self,
        (host, address): (&Host, &str),
        (group, path): (u32, String),
        join: impl FnOnce(BorrowedFd<'_>) -> Result<(), VfioError>,
    ) -> Result<OwnedFd, VfioError> {
        let os = |call| move |source| VfioError::Os { address: address.to_owned(), call, source };
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = match open.iter().position(|(known, _)| *known == group) {
            Some(at) => at,
            None => {
                let fd = blame::open(host, address, &path)?;
                if !ioctl::group_is_viable(fd.as_fd()).map_err(os("VFIO_GROUP_GET_STATUS"))? {
                    return Err(blame::not_viable(host, address, group));
                }
                join(fd.as_fd())?;
                open.push((group, fd));
                open.len() - 1
            }
        };
        let name = CString::new(address).map_err(|_| os("a name")(Errno::EINVAL))?;
        ioctl::device(open[at].1.as_fd(), &name).map_err(|source| match source {
            Errno::EBUSY => VfioError::Busy { address: address.to_owned(), path },
            _ => os("VFIO_GROUP_GET_DEVICE_FD")(source),
        })
    }

    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, fd)| fd.as_raw_fd()).collect()
    }
}

/// A container.
#[derive(Debug)]
pub(super) struct Type1 {
    // Groups first: closed before the container.
    groups: Groups,
    container: OwnedFd,
}

/// Opens a container that knows this kind of IOMMU.
pub(super) fn open(host: &Host, kind: u64, what: &'static str) -> Result<OwnedFd, VfioError> {
    let missing = || VfioError::NoVfio {
        address: "any".to_owned(),
        what,
        path: format!("/{PATH}"),
        remedy: "load its modules (`modprobe vfio-pci`, `modprobe vfio_iommu_type1`), or take a kernel with CONFIG_VFIO_PCI",
    };
    let container = blame::open(host, "any", PATH).map_err(|error| match error {
        VfioError::Os { source: Errno::ENOENT | Errno::ENODEV, .. } => missing(),
        other => other,
    })?;
    match ioctl::container_knows(container.as_fd(), kind) {
        Ok(true) => Ok(container),
        _ => Err(missing()),
    }
}

impl Type1 {
    pub(super) fn new(host: &Host) -> Result<Self, VfioError> {
        let container = open(host, layout::TYPE1V2, "VFIO container of type 1 version 2")?;
        Ok(Self { groups: Groups::default(), container })
    }

    fn join(&self, address: &str, group: BorrowedFd<'_>) -> Result<(), VfioError> {
        let refused = |call| {
            move |source| match source {
                Errno::EPERM => VfioError::NoInterruptRemapping {
                    address: address.to_owned(),
                    module: "vfio_iommu_type1",
                },
                _ => VfioError::Os { address: address.to_owned(), call, source },
            }
        };
        ioctl::set_container(group, self.container.as_fd()).map_err(refused("VFIO_GROUP_SET_CONTAINER"))?;
        match ioctl::set_iommu(self.container.as_fd(), layout::TYPE1V2) {
            // Chosen already, with the first group.
            Err(Errno::EINVAL) if ioctl::iommu(self.container.as_fd()).is_ok() => Ok(()),
            other => other.map_err(refused("VFIO_SET_IOMMU")),
        }
    }
}

impl Iommu for Type1 {
    fn open(&self, host: &Host, address: &str) -> Result<OwnedFd, VfioError> {
        let group = blame::ready(host, address)?;
        self.groups.device((host, address), (group, format!("dev/vfio/{group}")), |fd| self.join(address, fd))
    }

    fn limits(&self) -> Result<Option<Limits>, VfioError> {
        let info = ioctl::iommu(self.container.as_fd()).map_err(|source| VfioError::Os {
            address: "any".to_owned(),
            call: "VFIO_IOMMU_GET_INFO",
            source,
        })?;
        let page = info.pages.filter(|pages| *pages != 0).map_or(4096, |pages| 1 << pages.trailing_zeros());
        Ok(Some(Limits { ranges: info.ranges.unwrap_or_else(|| vec![iova::NARROWEST]), page }))
    }

    unsafe fn map(&self, span: Span<'_>, iova: u64) -> Result<u64, DmaError> {
        // SAFETY: promised by the caller.
        unsafe { ioctl::dma_map(self.container.as_fd(), span.start, iova, span.bytes) }
            .map(|()| iova)
            .map_err(|source| blame::not_mapped(span, "VFIO_IOMMU_MAP_DMA", source))
    }

    fn unmap(&self, iova: u64, bytes: u64) -> bool {
        ioctl::dma_unmap(self.container.as_fd(), iova, bytes) == Ok(bytes)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let mut all = self.groups.descriptors();
        all.push(self.container.as_raw_fd());
        all
    }
}
