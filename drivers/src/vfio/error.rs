//! What can go wrong with VFIO, kind by kind.
//!
//! Contract: an error names the thing, the reason, and what to do. Errors of opening and binding name the device;
//! those of an open function do not, since whoever asked puts its name before them.

use isoplane_memory::RegionError;
use nix::errno::Errno;

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VfioError {
    /// Not the address of a PCI function.
    #[error(
        "{address:?} is no PCI address; write it as 0000:00:02.0 (`isoplane ports` lists those there are)"
    )]
    BadAddress {
        /// What was given.
        address: String,
    },
    /// There is no such function.
    #[error("there is no PCI device {address}; `isoplane ports` lists those there are")]
    Absent {
        /// Its address.
        address: String,
    },
    /// It is there, and of another kind.
    #[error("device {address} is {found}, and no {wanted}")]
    WrongDevice {
        /// Its address.
        address: String,
        /// Vendor and device, such as `8086:10d3`.
        found: String,
        /// What was wanted.
        wanted: &'static str,
    },
    /// A kernel driver has it.
    #[error(
        "device {address} is in use by the kernel's driver {driver}{}; \
         give it to VFIO with `isoplane ports bind {address}`",
        if interfaces.is_empty() { String::new() } else { format!(" (interface {})", interfaces.join(", ")) }
    )]
    InUse {
        /// Its address.
        address: String,
        /// The driver.
        driver: String,
        /// Network interfaces that it makes of it.
        interfaces: Vec<String>,
    },
    /// No driver has it.
    #[error("device {address} has no driver; give it to VFIO with `isoplane ports bind {address}`")]
    NotBound {
        /// Its address.
        address: String,
    },
    /// Another process has it open.
    #[error("device {address}: {path} is open already; stop the program that has it")]
    Busy {
        /// Its address.
        address: String,
        /// The group's or the device's file.
        path: String,
    },
    /// Other devices of its IOMMU group belong to kernel drivers.
    #[error(
        "device {address}: IOMMU group {group} cannot be used, because the kernel's drivers have other devices of it: \
         {}; bind these, too (`isoplane ports bind`), or move the card to another slot",
        others.iter().map(|(other, driver)| format!("{other} ({driver})")).collect::<Vec<_>>().join(", ")
    )]
    GroupNotViable {
        /// Its address.
        address: String,
        /// The group's number.
        group: u32,
        /// The other devices, and who has them.
        others: Vec<(String, String)>,
    },
    /// No IOMMU looks after it.
    #[error(
        "device {address} is behind no IOMMU; switch it on (VT-d or AMD-Vi in the firmware, `intel_iommu=on` on the \
         kernel's command line). Without one the device can write to all memory: \
         IommuChoice::UnsafeNoIommu accepts that (l2fwd: --unsafe-noiommu), if the kernel's \
         /sys/module/vfio/parameters/enable_unsafe_noiommu_mode does, too"
    )]
    NoIommu {
        /// Its address.
        address: String,
    },
    /// The IOMMU does not check interrupts.
    #[error(
        "device {address}: the IOMMU does not remap interrupts, so that the device could send any interrupt to any \
         CPU; switch interrupt remapping on (firmware; no `intremap=off`), or accept that with \
         `allow_unsafe_interrupts=1` of the module {module}"
    )]
    NoInterruptRemapping {
        /// Its address.
        address: String,
        /// Which module to ask.
        module: &'static str,
    },
    /// The kernel has no VFIO, or not this kind.
    #[error(
        "device {address}: this kernel offers no {what} ({path} is not there or does not know it); {remedy}"
    )]
    NoVfio {
        /// Its address.
        address: String,
        /// What is missing.
        what: &'static str,
        /// Where it was looked for.
        path: String,
        /// What to do.
        remedy: &'static str,
    },
    /// Operation without an IOMMU was not asked for in the kernel.
    #[error(
        "device {address}: operation without an IOMMU is switched off in the kernel; \
         `echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode` before binding the device"
    )]
    NoIommuModeOff {
        /// Its address.
        address: String,
    },
    /// It is behind an IOMMU, and that is not to be given up.
    #[error(
        "device {address} is behind an IOMMU; take IommuChoice::Auto (l2fwd: leave --unsafe-noiommu out)"
    )]
    IommuThere {
        /// Its address.
        address: String,
    },
    /// The kernel does not let this process do that.
    #[error("device {address}: no permission for {path}; run as root, or let your user have that file")]
    NotPermitted {
        /// Its address.
        address: String,
        /// The file.
        path: String,
    },
    /// Any other call that failed.
    #[error("device {address}: {call}: {source}")]
    Os {
        /// Its address.
        address: String,
        /// Which call failed.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}

/// Why memory could not be given to a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// No memory.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The limit of locked memory.
    #[error(
        "DMA memory {name:?}: locking {bytes} bytes for the device is refused: this process would have {needed} bytes \
         locked, and its limit is {limit}; raise it (ulimit -l {}, LimitMEMLOCK={needed}) or give the program CAP_IPC_LOCK",
        needed.div_ceil(1024)
    )]
    Memlock {
        /// The memory's name.
        name: String,
        /// Its size.
        bytes: u64,
        /// How much would be locked in all.
        needed: u64,
        /// How much may be.
        limit: u64,
    },
    /// No free addresses.
    #[error("DMA memory {name:?}: the IOMMU has no {bytes} bytes of free addresses left")]
    NoAddresses {
        /// The memory's name.
        name: String,
        /// Its size.
        bytes: u64,
    },
    /// Without an IOMMU, memory must be of huge pages: others may move.
    #[error(
        "DMA memory {name:?} has pages of {page_bytes} bytes; without an IOMMU only huge pages stay where they are: \
         require them for this pool, and reserve some in /sys/kernel/mm/hugepages"
    )]
    NotHuge {
        /// The memory's name.
        name: String,
        /// Bytes of a page.
        page_bytes: u64,
    },
    /// Without an IOMMU, memory must be in one piece.
    #[error(
        "DMA memory {name:?}: its {bytes} bytes are not in one piece in physical memory; without an IOMMU they must be: \
         take a page of 1 GiB, or less memory"
    )]
    NotContiguous {
        /// The memory's name.
        name: String,
        /// Its size.
        bytes: u64,
    },
    /// Physical addresses are hidden.
    #[error("DMA memory {name:?}: /proc/self/pagemap tells no physical addresses; run with CAP_SYS_ADMIN")]
    NoPhysical {
        /// The memory's name.
        name: String,
    },
    /// Any other call that failed.
    #[error("DMA memory {name:?}: {call}: {source}")]
    Os {
        /// The memory's name.
        name: String,
        /// Which call failed.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}

/// Why a BAR could not be had.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BarError {
    /// The device has no such BAR.
    #[error("BAR {bar}: the device has none")]
    Missing {
        /// Its number.
        bar: u8,
    },
    /// It is I/O ports.
    #[error("BAR {bar} is of I/O ports, not of memory, and cannot be mapped")]
    Ports {
        /// Its number.
        bar: u8,
    },
    /// The kernel does not let us map it.
    #[error("BAR {bar}, {bytes} bytes: the kernel lets nothing of it be mapped")]
    NotMappable {
        /// Its number.
        bar: u8,
        /// Its size.
        bytes: u64,
    },
    /// Its pages cannot be had.
    #[error("BAR {bar}, page at {offset:#x}: {source}; the device's memory space is off, or it is gone")]
    Unreachable {
        /// Its number.
        bar: u8,
        /// The page.
        offset: usize,
        /// The kernel's answer.
        source: Errno,
    },
    /// Any other call that failed.
    #[error("BAR {bar}: {call}: {source}")]
    Os {
        /// Its number.
        bar: u8,
        /// Which call failed.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}

/// Why the device could not be reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// The kernel knows no way.
    #[error("the kernel knows no way to reset this function alone")]
    Unsupported,
    /// It failed.
    #[error("reset: {0}")]
    Os(Errno),
    /// What was mapped before is not there any more.
    #[error("after the reset: {0}")]
    Bar(#[from] BarError),
}

/// Why interrupts could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InterruptError {
    /// The device has not so many.
    #[error("{wanted} MSI-X interrupts: the device has {available}")]
    TooMany {
        /// What was asked for.
        wanted: u32,
        /// What there are.
        available: u32,
    },
    /// Any other call that failed.
    #[error("MSI-X: {call}: {source}")]
    Os {
        /// Which call failed.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}
