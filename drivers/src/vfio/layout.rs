//! What the kernel and we agree on, bit for bit: structures, numbers and constants of VFIO and iommufd.
//!
//! Contract: every structure has the size that the kernel expects, asserted when this is compiled, and no
//! padding. Source: `include/uapi/linux/vfio.h` and `iommufd.h` of Linux 6.12; where something came later than
//! Linux 5.10, it says since when.

use bytemuck::{Pod, Zeroable};

/// `_IO(';', nr)`: the type is in bits 8 to 15, and nothing says a size.
const fn number(nr: u64) -> u64 {
    (b';' as u64) << 8 | nr
}

/// ioctl numbers: on a container, a group, a device, and `/dev/iommu`.
pub(super) mod request {
    use super::number;
    pub(crate) const GET_API_VERSION: u64 = number(100);
    pub(crate) const CHECK_EXTENSION: u64 = number(101);
    pub(crate) const SET_IOMMU: u64 = number(102);
    pub(crate) const GROUP_GET_STATUS: u64 = number(103);
    pub(crate) const GROUP_SET_CONTAINER: u64 = number(104);
    pub(crate) const GROUP_GET_DEVICE_FD: u64 = number(106);
    pub(crate) const DEVICE_GET_INFO: u64 = number(107);
    pub(crate) const DEVICE_GET_REGION_INFO: u64 = number(108);
    pub(crate) const DEVICE_GET_IRQ_INFO: u64 = number(109);
    pub(crate) const DEVICE_SET_IRQS: u64 = number(110);
    pub(crate) const DEVICE_RESET: u64 = number(111);
    /// On a container.
    pub(crate) const IOMMU_GET_INFO: u64 = number(112);
    pub(crate) const IOMMU_MAP_DMA: u64 = number(113);
    pub(crate) const IOMMU_UNMAP_DMA: u64 = number(114);
    /// 6.6.
    pub(crate) const DEVICE_BIND_IOMMUFD: u64 = number(118);
    /// 6.6.
    pub(crate) const DEVICE_ATTACH_IOMMUFD_PT: u64 = number(119);
    /// On `/dev/iommu` (6.2), as all of `IOAS`.
    pub(crate) const IOAS_ALLOC: u64 = number(0x81);
    pub(crate) const IOAS_IOVA_RANGES: u64 = number(0x84);
    pub(crate) const IOAS_MAP: u64 = number(0x85);
    pub(crate) const IOAS_UNMAP: u64 = number(0x86);
}

/// `VFIO_API_VERSION`: what there is to be spoken.
pub(super) const API_VERSION: i32 = 0;
/// `VFIO_TYPE1v2_IOMMU`.
pub(super) const TYPE1V2: u64 = 3;
/// `VFIO_NOIOMMU_IOMMU`.
pub(super) const NOIOMMU: u64 = 8;

/// `VFIO_GROUP_FLAGS_VIABLE`.
pub(super) const GROUP_VIABLE: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_RESET`.
pub(super) const DEVICE_RESETS: u32 = 1 << 0;
/// `VFIO_DEVICE_FLAGS_PCI`.
pub(super) const DEVICE_PCI: u32 = 1 << 1;

/// `VFIO_REGION_INFO_FLAG_MMAP`.
pub(super) const REGION_MMAP: u32 = 1 << 2;
/// `VFIO_REGION_INFO_FLAG_CAPS`.
pub(super) const REGION_CAPS: u32 = 1 << 3;
/// `VFIO_PCI_CONFIG_REGION_INDEX`; BARs are 0 to 5.
pub(super) const REGION_CONFIG: u32 = 7;
/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`.
pub(super) const CAP_SPARSE_MMAP: u16 = 1;

/// `VFIO_PCI_MSIX_IRQ_INDEX`.
pub(super) const IRQ_MSIX: u32 = 2;
/// `VFIO_PCI_REQ_IRQ_INDEX`: the kernel wants the device back.
pub(super) const IRQ_REQUEST: u32 = 4;
/// `VFIO_IRQ_INFO_EVENTFD`.
pub(super) const IRQ_EVENTFD: u32 = 1 << 0;
/// `VFIO_IRQ_SET_DATA_NONE`.
pub(super) const IRQ_DATA_NONE: u32 = 1 << 0;
/// `VFIO_IRQ_SET_DATA_EVENTFD`.
pub(super) const IRQ_DATA_EVENTFD: u32 = 1 << 2;
/// `VFIO_IRQ_SET_ACTION_TRIGGER`.
pub(super) const IRQ_ACTION_TRIGGER: u32 = 1 << 5;

/// `VFIO_IOMMU_INFO_PGSIZES`.
pub(super) const IOMMU_PGSIZES: u32 = 1 << 0;
/// `VFIO_IOMMU_INFO_CAPS`.
pub(super) const IOMMU_CAPS: u32 = 1 << 1;
/// `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`.
pub(super) const CAP_IOVA_RANGE: u16 = 1;
/// `VFIO_DMA_MAP_FLAG_READ` and `_WRITE`.
pub(super) const DMA_READ_WRITE: u32 = 1 << 0 | 1 << 1;
/// `IOMMU_IOAS_MAP_FIXED_IOVA`, `_WRITEABLE` and `_READABLE`.
pub(super) const IOAS_FIXED_READ_WRITE: u32 = 1 << 0 | 1 << 1 | 1 << 2;

macro_rules! structures {
    ($($(#[$about:meta])* $name:ident: $bytes:literal { $($field:ident: $kind:ty),* $(,)? })*) => { $(
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Pod, Zeroable)]
        #[repr(C)]
        pub(super) struct $name { $(pub(crate) $field: $kind),* }
        const _: () = assert!(size_of::<$name>() == $bytes);
    )* };
}

structures! {
    /// `struct vfio_group_status`.
    GroupStatus: 8 { argsz: u32, flags: u32 }
    /// `struct vfio_device_info`.
    DeviceInfo: 24 { argsz: u32, flags: u32, regions: u32, irqs: u32, caps_at: u32, pad: u32 }
    /// `struct vfio_region_info`; capabilities follow.
    RegionInfo: 32 { argsz: u32, flags: u32, index: u32, caps_at: u32, bytes: u64, offset: u64 }
    /// `struct vfio_info_cap_header`: offsets count from the start of the whole answer.
    CapHeader: 8 { id: u16, version: u16, next: u32 }
    /// `struct vfio_region_info_cap_sparse_mmap` and `vfio_iommu_type1_info_cap_iova_range`, behind the header;
    /// pairs follow.
    CapPairs: 8 { count: u32, reserved: u32 }
    /// `struct vfio_irq_info`.
    IrqInfo: 16 { argsz: u32, flags: u32, index: u32, count: u32 }
    /// `struct vfio_irq_set`; data follow.
    IrqSet: 20 { argsz: u32, flags: u32, index: u32, start: u32, count: u32 }
    /// `struct vfio_iommu_type1_info`; capabilities follow. Without `pad` before Linux 6.3.
    IommuInfo: 24 { argsz: u32, flags: u32, page_sizes: u64, caps_at: u32, pad: u32 }
    /// `struct vfio_iommu_type1_dma_map`.
    DmaMap: 32 { argsz: u32, flags: u32, address: u64, iova: u64, bytes: u64 }
    /// `struct vfio_iommu_type1_dma_unmap`.
    DmaUnmap: 24 { argsz: u32, flags: u32, iova: u64, bytes: u64 }
    /// `struct vfio_device_bind_iommufd`.
    BindIommufd: 16 { argsz: u32, flags: u32, iommufd: i32, device: u32 }
    /// `struct vfio_device_attach_iommufd_pt`.
    AttachPt: 12 { argsz: u32, flags: u32, table: u32 }
    /// `struct iommu_ioas_alloc`.
    IoasAlloc: 12 { argsz: u32, flags: u32, ioas: u32 }
    /// `struct iommu_ioas_iova_ranges`.
    IoasRanges: 32 { argsz: u32, ioas: u32, count: u32, reserved: u32, ranges: u64, alignment: u64 }
    /// `struct iommu_ioas_map`.
    IoasMap: 40 { argsz: u32, flags: u32, ioas: u32, reserved: u32, address: u64, bytes: u64, iova: u64 }
    /// `struct iommu_ioas_unmap`.
    IoasUnmap: 24 { argsz: u32, ioas: u32, iova: u64, bytes: u64 }
}
