//! Devices without an IOMMU, for machines that have none: opt-in, and dangerous.
//!
//! Contract: what a device is given are physical addresses, of huge pages only, since the kernel may move others.
//! **The device can read and write all memory of the machine**, and so can whoever programs it: nothing that this
//! project says about untrusted devices holds. The kernel must allow it (`enable_unsafe_noiommu_mode`), wants
//! CAP_SYS_RAWIO, and is tainted. Memory that a device was given stays until the device is closed.
#![allow(unsafe_code, reason = "implements `Iommu::map`, which is unsafe to call")]

use super::container::{self, Groups};
use super::error::{DmaError, VfioError};
use super::host::{self, Host};
use super::iommu::{Iommu, Limits, Span};
use super::{blame, ioctl, layout};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

/// Unit of physical addresses in pagemap.
const PAGE: u64 = 4096;

/// A container that translates nothing.
#[derive(Debug)]
pub(super) struct NoIommu {
    groups: Groups,
    container: OwnedFd,
}

impl NoIommu {
    pub(super) fn new(host: &Host) -> Result<Self, VfioError> {
        let off = host::text(&host.path("sys/module/vfio/parameters/enable_unsafe_noiommu_mode"));
        if off.as_deref() == Some("N") {
            return Err(VfioError::NoIommuModeOff { address: "any".to_owned() });
        }
        let container = container::open(host, layout::NOIOMMU, "operation without an IOMMU")?;
        tracing::warn!(
            "devices without an IOMMU: they can read and write all memory of this machine, by mistake or malice"
        );
        Ok(Self { groups: Groups::default(), container })
    }
}

impl Iommu for NoIommu {
    fn open(&self, host: &Host, address: &str) -> Result<OwnedFd, VfioError> {
        blame::bound(host, address)?;
        let group = host.group_of(address);
        let group = group.ok_or_else(|| VfioError::NoIommuModeOff { address: address.to_owned() })?;
        if !host.group_without_iommu(group) {
            return Err(VfioError::IommuThere { address: address.to_owned() });
        }
        self.groups.device((host, address), (group, format!("dev/vfio/noiommu-{group}")), |fd| {
            let os = |call| move |source| VfioError::Os { address: address.to_owned(), call, source };
            let container = self.container.as_fd();
            ioctl::set_container(fd, container).map_err(os("VFIO_GROUP_SET_CONTAINER"))?;
            match ioctl::set_iommu(container, layout::NOIOMMU) {
                // Chosen already, with the first group.
                Ok(()) | Err(Errno::EINVAL) => Ok(()),
                Err(error) => Err(os("VFIO_SET_IOMMU")(error)),
            }
        })
    }

    fn limits(&self) -> Result<Option<Limits>, VfioError> {
        Ok(None)
    }

    unsafe fn map(&self, span: Span<'_>, _: u64) -> Result<u64, DmaError> {
        let name = || span.name.to_owned();
        if span.page < 2 << 20 {
            return Err(DmaError::NotHuge { name: name(), page_bytes: span.page });
        }
        let os = |error: std::io::Error| DmaError::Os {
            name: name(),
            call: "/proc/self/pagemap",
            source: Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        };
        let pagemap = File::open("/proc/self/pagemap").map_err(os)?;
        let start = span.start.as_ptr() as u64;
        let mut first = None;
        for at in (0..span.bytes).step_by(span.page as usize) {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (start + at) / PAGE * 8).map_err(os)?;
            let frame =
                frame(u64::from_ne_bytes(entry)).ok_or_else(|| DmaError::NoPhysical { name: name() })?;
            let physical = frame * PAGE;
            if *first.get_or_insert(physical) + at != physical {
                return Err(DmaError::NotContiguous { name: name(), bytes: span.bytes });
            }
        }
        first.map(|first| first + start % PAGE).ok_or_else(|| DmaError::NoPhysical { name: name() })
    }

    fn unmap(&self, _: u64, _: u64) -> bool {
        false
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let mut all = self.groups.descriptors();
        all.push(self.container.as_raw_fd());
        all
    }
}

/// The page frame number in an entry of pagemap (`Documentation/admin-guide/mm/pagemap.rst`); none when the page is
/// not present, or when the kernel hides it behind a 0.
const fn frame(entry: u64) -> Option<u64> {
    let (present, frame) = (entry >> 63 != 0, entry & ((1 << 55) - 1));
    if present && frame != 0 { Some(frame) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isoplane_memory::{Region, RegionConfig};

    #[test]
    fn only_huge_pages_are_given_to_devices() {
        let container = File::open("/dev/null").unwrap().into();
        let iommu = NoIommu { groups: Groups::default(), container };
        let region = Region::create(&RegionConfig::new("small", 8192)).unwrap();
        let span = Span { name: "small", start: region.base(), bytes: 8192, page: 4096 };
        // SAFETY: no device is open.
        let error = unsafe { iommu.map(span, 0) }.unwrap_err();
        assert!(matches!(error, DmaError::NotHuge { page_bytes: 4096, .. }), "{error}");
        assert!(error.to_string().contains("hugepages"), "{error}");
    }

    #[test]
    fn page_frames_are_read_as_the_kernel_writes_them() {
        assert_eq!(frame(1 << 63 | 0x1234), Some(0x1234));
        assert_eq!(frame(1 << 63 | 1 << 55 | 0x1234), Some(0x1234), "soft-dirty is no part of it");
        assert_eq!(frame(1 << 63), None, "hidden");
        assert_eq!(frame(1 << 62 | 0x1234), None, "swapped");
    }
}
