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
        && let Some(error) = too_much(&name, span.bytes, locked(), limit)
    {
        return error;
    }
    DmaError::Os { name, call, source }
}

/// Are so many bytes more than may be locked?
fn too_much(name: &str, bytes: u64, locked: u64, limit: u64) -> Option<DmaError> {
    let needed = locked.saturating_add(bytes);
    (needed > limit).then(|| DmaError::Memlock { name: name.to_owned(), bytes, needed, limit })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio::bind::tests::{NIC, OTHER, Tree};
    use std::ptr::NonNull;

    #[test]
    fn whoever_has_a_device_is_named() {
        let tree = Tree::new();
        let error = ready(&tree.host, NIC).unwrap_err();
        assert!(
            matches!(&error, VfioError::InUse { driver, interfaces, .. } if driver == "igb" && interfaces == &["eth0"]),
            "{error}"
        );
        let error = not_viable(&tree.host, NIC, 7);
        let VfioError::GroupNotViable { group: 7, others, .. } = &error else { panic!("{error}") };
        assert_eq!(others, &[(OTHER.to_owned(), "igb".to_owned())], "the bridge does no harm");
        tree.host.bind(NIC, false).unwrap();
        assert_eq!(ready(&tree.host, NIC).unwrap(), 7);
        tree.file("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
        assert!(matches!(ready(&tree.host, NIC), Err(VfioError::NoIommu { .. })));
        std::fs::remove_file(tree.host.device(NIC).join("iommu_group")).unwrap();
        assert!(matches!(ready(&tree.host, NIC), Err(VfioError::NoIommu { .. })));
        std::fs::remove_file(tree.host.device(NIC).join("driver")).unwrap();
        assert!(matches!(ready(&tree.host, NIC), Err(VfioError::NotBound { .. })));
        let error = open(&tree.host, NIC, "dev/vfio/7").unwrap_err();
        assert!(matches!(error, VfioError::Os { call: "open", source: Errno::ENOENT, .. }), "{error}");
    }

    #[test]
    fn how_much_must_be_lockable_is_said() {
        assert!(too_much("rings", 4096, 4096, 8192).is_none());
        let error = too_much("rings", 1 << 20, 4096, 65_536).unwrap();
        assert!(matches!(
            error,
            DmaError::Memlock { bytes: 1_048_576, needed: 1_052_672, limit: 65_536, .. }
        ));
        let text = error.to_string();
        assert!(text.contains("\"rings\"") && text.contains("1052672") && text.contains("65536"), "{text}");
        let span = Span { name: "rings", start: NonNull::dangling(), bytes: 4096, page: 4096 };
        let error = not_mapped(span, "a call", Errno::EEXIST);
        assert!(matches!(error, DmaError::Os { call: "a call", source: Errno::EEXIST, .. }), "{error}");
    }
}
