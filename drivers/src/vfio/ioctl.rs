//! The seam: every ioctl and mapping of VFIO and iommufd, and nothing else.
//!
//! Contract: a wrapper takes and gives plain values and descriptors, checks nothing that the kernel checks, and
//! reports the kernel's answer as an [`Errno`]. What the kernel says about sizes and offsets of its own answers
//! is checked all the same.
#![allow(unsafe_code, reason = "system calls and mappings; see each block")]

use super::layout::{self, request};
use bytemuck::{Pod, Zeroable, pod_read_unaligned};
use nix::errno::Errno;
use std::ffi::CStr;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

/// An ioctl whose argument is a number.
fn with_number(fd: BorrowedFd<'_>, request: u64, number: u64) -> Result<i32, Errno> {
    // SAFETY: all requests used with this take a number or nothing: the kernel reaches no memory of ours.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, number) })
}

/// An ioctl whose argument is a structure.
///
/// # Safety
/// `request` uses a `T`, or as much as its first field says of the bytes that it starts; and whatever addresses
/// in it name memory that the request may use in its way.
unsafe fn with<T: ?Sized>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> Result<i32, Errno> {
    let argument = std::ptr::from_mut(argument).cast::<libc::c_void>();
    // SAFETY: promised by the caller; the memory lives until the call is over.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) })
}

const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// Does the container speak our version, and know this kind of IOMMU?
pub(super) fn container_knows(container: BorrowedFd<'_>, kind: u64) -> Result<bool, Errno> {
    let version = with_number(container, request::GET_API_VERSION, 0)?;
    Ok(version == layout::API_VERSION && with_number(container, request::CHECK_EXTENSION, kind)? > 0)
}

/// Chooses the container's kind of IOMMU, once it has a group.
pub(super) fn set_iommu(container: BorrowedFd<'_>, kind: u64) -> Result<(), Errno> {
    with_number(container, request::SET_IOMMU, kind).map(drop)
}

/// Are all devices of the group VFIO's, or nobody's?
pub(super) fn group_is_viable(group: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut status = layout::GroupStatus { argsz: argsz::<layout::GroupStatus>(), flags: 0 };
    // SAFETY: the request fills this structure.
    unsafe { with(group, request::GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags & layout::GROUP_VIABLE != 0)
}

/// Puts the group into a container.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut fd: i32 = container.as_raw_fd();
    // SAFETY: the request reads one descriptor.
    unsafe { with(group, request::GROUP_SET_CONTAINER, &mut fd) }.map(drop)
}

/// Opens a device of the group.
pub(super) fn device(group: BorrowedFd<'_>, address: &CStr) -> Result<OwnedFd, Errno> {
    let name = address.as_ptr();
    // SAFETY: the request reads a string that ends with a zero.
    let fd =
        Errno::result(unsafe { libc::ioctl(group.as_raw_fd(), request::GROUP_GET_DEVICE_FD as _, name) })?;
    // SAFETY: the kernel has just given us this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_FLAGS_*` of the device.
pub(super) fn device_flags(device: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut info =
        layout::DeviceInfo { argsz: argsz::<layout::DeviceInfo>(), ..layout::DeviceInfo::zeroed() };
    // SAFETY: the request fills this structure.
    unsafe { with(device, request::DEVICE_GET_INFO, &mut info) }?;
    Ok(info.flags)
}

/// An answer that is as long as the kernel wants: a `T` and what follows it.
fn long_answer<T: Pod>(fd: BorrowedFd<'_>, request: u64, index: u32) -> Result<(T, Vec<u8>), Errno> {
    // More than any of them needs; a device cannot make the kernel answer without end.
    const MOST: usize = 1 << 16;
    let mut bytes = size_of::<T>();
    loop {
        let mut words = vec![0_u64; bytes.div_ceil(8)];
        let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        buffer[..4].copy_from_slice(&(bytes as u32).to_ne_bytes());
        // Third word of every request that has an index; the IOMMU's has none and ignores it.
        buffer[8..12].copy_from_slice(&index.to_ne_bytes());
        // SAFETY: the first field says how many bytes there are, and at least so many there are.
        unsafe { with(fd, request, buffer) }?;
        let needs = pod_read_unaligned::<u32>(&buffer[..4]) as usize;
        if needs <= bytes || bytes >= MOST {
            buffer[..4].copy_from_slice(&(bytes as u32).to_ne_bytes());
            return Ok((pod_read_unaligned(&buffer[..size_of::<T>()]), buffer[..bytes].to_vec()));
        }
        bytes = needs.min(MOST);
    }
}

/// Pairs of 64-bit numbers in the capability `id` of an answer whose capabilities start at `first`.
fn pairs(answer: &[u8], first: u32, id: u16) -> Option<Vec<(u64, u64)>> {
    let read = |at: usize, bytes: usize| answer.get(at..at.checked_add(bytes)?);
    let mut at = first as usize;
    // The chain is the kernel's, and has few links.
    for _ in 0..64 {
        if at == 0 {
            return None;
        }
        let header: layout::CapHeader = pod_read_unaligned(read(at, 8)?);
        if header.id == id {
            let start = at + 8;
            let count = pod_read_unaligned::<layout::CapPairs>(read(start, 8)?).count as usize;
            let all = read(start + 8, count.checked_mul(16)?)?;
            return Some(all.chunks_exact(16).map(pod_read_unaligned::<[u64; 2]>).map(Into::into).collect());
        }
        at = header.next as usize;
    }
    None
}

/// A region of a device: a BAR or its configuration space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Region {
    /// Its size; 0 when there is none.
    pub(super) bytes: u64,
    /// Where it starts in the device's file.
    pub(super) offset: u64,
    /// What may be mapped of it: offset and size. Empty when nothing may.
    pub(super) areas: Vec<(u64, u64)>,
}

/// Asks about a region.
pub(super) fn region(device: BorrowedFd<'_>, index: u32) -> Result<Region, Errno> {
    let (info, answer) = long_answer::<layout::RegionInfo>(device, request::DEVICE_GET_REGION_INFO, index)?;
    let caps = info.flags & layout::REGION_CAPS != 0;
    let sparse = caps.then(|| pairs(&answer, info.caps_at, layout::CAP_SPARSE_MMAP)).flatten();
    let areas = match sparse {
        _ if info.flags & layout::REGION_MMAP == 0 => Vec::new(),
        Some(areas) => areas,
        None => vec![(0, info.bytes)],
    };
    Ok(Region { bytes: info.bytes, offset: info.offset, areas })
}

/// How many interrupts of a kind can be had as eventfds.
pub(super) fn interrupts(device: BorrowedFd<'_>, index: u32) -> Result<u32, Errno> {
    let mut info = layout::IrqInfo { argsz: argsz::<layout::IrqInfo>(), flags: 0, index, count: 0 };
    // SAFETY: the request fills this structure.
    unsafe { with(device, request::DEVICE_GET_IRQ_INFO, &mut info) }?;
    Ok(if info.flags & layout::IRQ_EVENTFD == 0 { 0 } else { info.count })
}

/// Sends the first interrupts of a kind to these eventfds; with none of them, switches that kind off.
pub(super) fn set_interrupts(device: BorrowedFd<'_>, index: u32, to: &[RawFd]) -> Result<(), Errno> {
    let data = if to.is_empty() { layout::IRQ_DATA_NONE } else { layout::IRQ_DATA_EVENTFD };
    let set = layout::IrqSet {
        argsz: argsz::<layout::IrqSet>() + size_of_val(to) as u32,
        flags: data | layout::IRQ_ACTION_TRIGGER,
        index,
        start: 0,
        count: to.len() as u32,
    };
    let mut bytes = bytemuck::bytes_of(&set).to_vec();
    bytes.extend_from_slice(bytemuck::cast_slice(to));
    // SAFETY: the first field says how many bytes there are; the kernel reads them.
    unsafe { with(device, request::DEVICE_SET_IRQS, bytes.as_mut_slice()) }.map(drop)
}

/// Resets the function.
pub(super) fn reset(device: BorrowedFd<'_>) -> Result<(), Errno> {
    with_number(device, request::DEVICE_RESET, 0).map(drop)
}

/// What a type1 container says of its IOMMU.
pub(super) struct IommuInfo {
    /// Sizes of pages as a mask, if it says.
    pub(super) pages: Option<u64>,
    /// Addresses that it takes (5.4).
    pub(super) ranges: Option<Vec<RangeInclusive<u64>>>,
}

/// Asks about the container's IOMMU.
pub(super) fn iommu(container: BorrowedFd<'_>) -> Result<IommuInfo, Errno> {
    let (info, answer) = long_answer::<layout::IommuInfo>(container, request::IOMMU_GET_INFO, 0)?;
    let pages = (info.flags & layout::IOMMU_PGSIZES != 0).then_some(info.page_sizes);
    let caps = info.flags & layout::IOMMU_CAPS != 0;
    let ranges = caps.then(|| pairs(&answer, info.caps_at, layout::CAP_IOVA_RANGE)).flatten();
    let ranges = ranges.map(|all| all.into_iter().map(|(start, end)| start..=end).collect());
    Ok(IommuInfo { pages, ranges })
}

/// Lets the container's devices reach memory of ours.
///
/// # Safety
/// Until [`dma_unmap`], `address` to `address + bytes` is memory that nobody takes for anything but bytes which
/// may change at any time.
pub(super) unsafe fn dma_map(
    container: BorrowedFd<'_>,
    address: NonNull<u8>,
    iova: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let argsz = argsz::<layout::DmaMap>();
    let address = address.as_ptr() as u64;
    let mut map = layout::DmaMap { argsz, flags: layout::DMA_READ_WRITE, address, iova, bytes };
    // SAFETY: the request reads this structure; what the devices do with the memory is the caller's promise.
    unsafe { with(container, request::IOMMU_MAP_DMA, &mut map) }.map(drop)
}

/// Takes back what [`dma_map`] gave; says how many bytes that were.
pub(super) fn dma_unmap(container: BorrowedFd<'_>, iova: u64, bytes: u64) -> Result<u64, Errno> {
    let mut unmap = layout::DmaUnmap { argsz: argsz::<layout::DmaUnmap>(), flags: 0, iova, bytes };
    // SAFETY: the request uses this structure alone.
    unsafe { with(container, request::IOMMU_UNMAP_DMA, &mut unmap) }?;
    Ok(unmap.bytes)
}

/// Binds a device's own file to `/dev/iommu`.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut bind = layout::BindIommufd {
        argsz: argsz::<layout::BindIommufd>(),
        flags: 0,
        iommufd: iommufd.as_raw_fd(),
        device: 0,
    };
    // SAFETY: the request uses this structure alone.
    unsafe { with(device, request::DEVICE_BIND_IOMMUFD, &mut bind) }.map(drop)
}

/// A new address space.
pub(super) fn ioas_alloc(iommufd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut alloc = layout::IoasAlloc { argsz: argsz::<layout::IoasAlloc>(), flags: 0, ioas: 0 };
    // SAFETY: the request uses this structure alone.
    unsafe { with(iommufd, request::IOAS_ALLOC, &mut alloc) }?;
    Ok(alloc.ioas)
}

/// Attaches a bound device to an address space.
pub(super) fn attach(device: BorrowedFd<'_>, ioas: u32) -> Result<(), Errno> {
    let mut attach = layout::AttachPt { argsz: argsz::<layout::AttachPt>(), flags: 0, table: ioas };
    // SAFETY: the request uses this structure alone.
    unsafe { with(device, request::DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }.map(drop)
}

/// An address space's ranges, and what mappings in it are aligned to.
pub(super) fn ioas_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
) -> Result<(u64, Vec<RangeInclusive<u64>>), Errno> {
    let mut pairs = vec![[0_u64; 2]; 8];
    loop {
        let mut ask = layout::IoasRanges {
            argsz: argsz::<layout::IoasRanges>(),
            ioas,
            count: pairs.len() as u32,
            reserved: 0,
            ranges: pairs.as_mut_ptr() as u64,
            alignment: 0,
        };
        // SAFETY: the request uses this structure, and writes at most `count` pairs to `ranges`.
        let result = unsafe { with(iommufd, request::IOAS_IOVA_RANGES, &mut ask) };
        let count = ask.count as usize;
        match result {
            Err(Errno::EMSGSIZE) if count > pairs.len() && count <= 1 << 16 => {
                pairs.resize(count, [0; 2]);
            }
            Err(error) => return Err(error),
            Ok(_) => {
                pairs.truncate(count);
                return Ok((ask.alignment, pairs.iter().map(|&[start, last]| start..=last).collect()));
            }
        }
    }
}

/// As [`dma_map`], into an address space.
///
/// # Safety
/// As [`dma_map`], until [`ioas_unmap`].
pub(super) unsafe fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    address: NonNull<u8>,
    iova: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let mut map = layout::IoasMap {
        argsz: argsz::<layout::IoasMap>(),
        flags: layout::IOAS_FIXED_READ_WRITE,
        ioas,
        reserved: 0,
        address: address.as_ptr() as u64,
        bytes,
        iova,
    };
    // SAFETY: the request uses this structure; what the devices do with the memory is the caller's promise.
    unsafe { with(iommufd, request::IOAS_MAP, &mut map) }.map(drop)
}

/// Takes back what [`ioas_map`] gave; says how many bytes that were.
pub(super) fn ioas_unmap(iommufd: BorrowedFd<'_>, ioas: u32, iova: u64, bytes: u64) -> Result<u64, Errno> {
    let mut unmap = layout::IoasUnmap { argsz: argsz::<layout::IoasUnmap>(), ioas, iova, bytes };
    // SAFETY: the request uses this structure alone.
    unsafe { with(iommufd, request::IOAS_UNMAP, &mut unmap) }?;
    Ok(unmap.bytes)
}

/// A part of a device's file, mapped shared; unmapped when dropped. The pages come when they are touched.
#[derive(Debug)]
pub(super) struct Window {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a range of addresses that stays mapped for the value's life; whoever reads or writes there argues
// for that access.
unsafe impl Send for Window {}
// SAFETY: as above; nothing of it changes.
unsafe impl Sync for Window {}

impl Window {
    /// Maps `bytes` from `offset` on.
    pub(super) fn map(fd: BorrowedFd<'_>, offset: u64, bytes: usize) -> Result<Self, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (none, fd) = (std::ptr::null_mut(), fd.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let base = unsafe { libc::mmap(none, bytes, protection, libc::MAP_SHARED, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::EFAULT)?, bytes })
    }

    /// First byte.
    pub(super) const fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How many.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes the page at `offset` present by having the kernel read four bytes there: where the device does not
    /// answer, an error and no SIGBUS.
    ///
    /// # Errors
    /// `EFAULT`: the page cannot be had, as when the device's memory space is off.
    pub(super) fn touch(&self, offset: usize) -> Result<(), Errno> {
        if offset + 4 > self.bytes {
            return Err(Errno::EFAULT);
        }
        // A futex that nobody waits for is read and compared, nothing else; nor would we wait.
        let at = self.base.as_ptr().wrapping_add(offset);
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
        // SAFETY: the kernel reads four aligned bytes of our mapping, and the time limit.
        let r = unsafe { libc::syscall(libc::SYS_futex, at, operation, u32::MAX, &raw const now) };
        match Errno::result(r) {
            Ok(_) | Err(Errno::EAGAIN | Errno::ETIMEDOUT | Errno::EINTR) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; whoever has a pointer into it also holds the window.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer of 32 bytes, then a chain of capabilities: something else, then sparse areas.
    fn answer(areas: &[[u64; 2]]) -> Vec<u8> {
        let mut bytes = vec![0; 32];
        bytes.extend_from_slice(bytemuck::bytes_of(&layout::CapHeader { id: 3, version: 1, next: 40 }));
        bytes.extend_from_slice(bytemuck::bytes_of(&layout::CapHeader { id: 1, version: 1, next: 0 }));
        let count = layout::CapPairs { count: areas.len() as u32, reserved: 0 };
        bytes.extend_from_slice(bytemuck::bytes_of(&count));
        bytes.extend_from_slice(bytemuck::cast_slice(areas));
        bytes
    }

    #[test]
    fn capabilities_are_found_in_their_chain() {
        let bytes = answer(&[[0, 0x1000], [0x3000, 0x2000]]);
        assert_eq!(pairs(&bytes, 32, 1), Some(vec![(0, 0x1000), (0x3000, 0x2000)]));
        assert_eq!(pairs(&bytes, 32, 9), None);
        assert_eq!(pairs(&bytes, 0, 1), None, "no chain");
        assert_eq!(pairs(&answer(&[]), 32, 1), Some(vec![]));
    }

    #[test]
    fn a_chain_that_leads_outside_or_in_a_circle_ends() {
        let mut bytes = answer(&[[0, 0x1000]]);
        for at in [1, 60, 71, 72, u32::MAX] {
            assert_eq!(pairs(&bytes, at, 1), None, "{at}");
        }
        // More pairs than there are bytes.
        bytes[48] = 200;
        assert_eq!(pairs(&bytes, 32, 1), None);
        // The second capability leads back to the first.
        bytes[44] = 32;
        assert_eq!(pairs(&bytes, 32, 9), None);
    }

    #[test]
    fn a_page_that_cannot_be_had_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        use std::os::fd::AsFd;
        let window = Window::map(file.as_fd(), 0, 8192).unwrap();
        assert_eq!(window.touch(0), Ok(()));
        assert_eq!(window.touch(4096), Err(Errno::EFAULT), "behind the file's end: SIGBUS for whoever reads");
        assert_eq!(window.touch(8190), Err(Errno::EFAULT));
    }
}
