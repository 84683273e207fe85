//! From the kernel's answers to errors that name the thing and the reason.

use super::error::{DmaError, VfioError};
use super::host::{self, Host};
use super::iommu::Span;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;

/// The driver that makes a device VFIO's.
pub(super) const VFIO_PCI: &str = "vfio-pci";

/// Opens a file of VFIO's for a device.
pub(super) fn open(host: &Host, address: &str, path: &str) -> Result<OwnedFd, VfioError> {
    let file = OpenOptions::new().read(true).write(true).open(host.path(path));
    file.map(Into::into).map_err(|error| {
        let (address, path) = (address.to_owned(), format!("/{path}"));
        match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::EACCES | Errno::EPERM => VfioError::NotPermitted { address, path },
            Errno::EBUSY => VfioError::Busy { address, path },
            source => VfioError::Os { address, call: "open", source },
        }
    })
}

/// Is the function VFIO's and behind an IOMMU? Says its group.
pub(super) fn ready(host: &Host, address: &str) -> Result<u32, VfioError> {
    bound(host, address)?;
    let none = || VfioError::NoIommu { address: address.to_owned() };
    let group = host.group_of(address).ok_or_else(none)?;
    if host.group_without_iommu(group) { Err(none()) } else { Ok(group) }
}

/// Is the function VFIO's?
pub(super) fn bound(host: &Host, address: &str) -> Result<(), VfioError> {
    let at = || address.to_owned();
    match host.driver_of(address) {
        Some(driver) if driver == VFIO_PCI => Ok(()),
        Some(driver) => {
            Err(VfioError::InUse { address: at(), driver, interfaces: host.interfaces_of(address) })
        }
        None => Err(VfioError::NotBound { address: at() }),
    }
}

/// The other devices of a group that are not VFIO's.
pub(super) fn not_viable(host: &Host, address: &str, group: u32) -> VfioError {
    let others = host.group_members(address).into_iter();
    let others = others.filter_map(|other| host.driver_of(&other).map(|driver| (other, driver)));
    // What pci-stub has, nobody uses.
    let others = others.filter(|(_, driver)| !matches!(driver.as_str(), VFIO_PCI | "pci-stub"));
    VfioError::GroupNotViable { address: address.to_owned(), group, others: others.collect() }
}

/// Why memory could not be mapped.
pub(super) fn not_mapped(span: Span<'_>, call: &'static str, source: Errno) -> DmaError {
    let name = span.name.to_owned();
    if source == Errno::ENOMEM
        && let Ok((limit, _)) = getrlimit(Resource::RLIMIT_MEMLOCK)
    {
        let needed = locked() + span.bytes;
        if needed > limit {
            return DmaError::Memlock { name, bytes: span.bytes, needed, limit };
        }
    }
    DmaError::Os { name, call, source }
}

/// Bytes that this process has locked or pinned by now.
fn locked() -> u64 {
    let status = host::text("/proc/self/status".as_ref()).unwrap_or_default();
    let kib = |line: &str| {
        let rest = line.strip_prefix("VmLck:").or_else(|| line.strip_prefix("VmPin:"))?;
        rest.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    status.lines().filter_map(kib).sum::<u64>() * 1024
}
