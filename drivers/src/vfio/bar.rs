//! A BAR, mapped: registers that are read and written without the kernel.
//!
//! Contract: each access is one access of its width to the device, or none. What the kernel lets be mapped of a
//! BAR may be several pieces; the largest is reached without a search, holes between them read as ones. Pages are
//! present once touched; a reset, or memory space switched off, takes them away in every process, so that they
//! must be touched again.
#![allow(unsafe_code, reason = "volatile accesses to mapped registers; see each block")]

use super::error::BarError;
use super::ioctl::{self, Window};
use crate::pci::Registers;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

/// The mapped pieces of a BAR.
#[derive(Debug)]
pub(super) struct Pieces {
    bar: u8,
    /// Offset in the BAR, and what is mapped there; the largest first.
    all: Vec<(usize, Window)>,
    bytes: usize,
}

impl Pieces {
    /// Maps what may be mapped of a BAR.
    pub(super) fn map(device: BorrowedFd<'_>, bar: u8) -> Result<Arc<Self>, BarError> {
        let os = |call| move |source| BarError::Os { bar, call, source };
        let region = ioctl::region(device, u32::from(bar)).map_err(os("VFIO_DEVICE_GET_REGION_INFO"))?;
        let bytes = usize::try_from(region.bytes).unwrap_or(0);
        if bytes == 0 {
            return Err(BarError::Missing { bar });
        }
        let mut all = Vec::new();
        for (offset, size) in region.areas {
            // The kernel gives whole pages inside the BAR; anything else is not taken.
            let inside = offset.checked_add(size).is_some_and(|end| end <= region.bytes);
            if inside && size != 0 && offset.is_multiple_of(4096) {
                let window = Window::map(device, region.offset + offset, size as usize);
                all.push((offset as usize, window.map_err(os("mmap"))?));
            }
        }
        if all.is_empty() {
            return Err(BarError::NotMappable { bar, bytes: region.bytes });
        }
        all.sort_by_key(|(_, window)| std::cmp::Reverse(window.bytes()));
        Ok(Arc::new(Self { bar, all, bytes }))
    }

    /// Makes all pages present.
    pub(super) fn touch(&self) -> Result<(), BarError> {
        for (at, window) in &self.all {
            for page in (0..window.bytes()).step_by(4096) {
                window.touch(page).map_err(|source| BarError::Unreachable {
                    bar: self.bar,
                    offset: at + page,
                    source,
                })?;
            }
        }
        Ok(())
    }
}

/// A BAR of a function that VFIO has opened; clones are the same registers.
#[derive(Debug, Clone)]
pub struct Bar {
    /// First byte of the largest piece.
    base: NonNull<u8>,
    /// Where that piece is in the BAR.
    start: usize,
    end: usize,
    pieces: Arc<Pieces>,
}

// SAFETY: a range of addresses that `pieces` keeps mapped; accesses are volatile, aligned and single, as to any
// device that several CPUs share.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

impl Bar {
    pub(super) fn new(pieces: &Arc<Pieces>) -> Option<Self> {
        let (start, window) = pieces.all.first()?;
        Some(Self {
            base: window.base(),
            start: *start,
            end: start + window.bytes(),
            pieces: Arc::clone(pieces),
        })
    }

    /// Makes all pages present, so that no access faults: reads four bytes at the start of each. It is done when
    /// the BAR is given out and after each reset, in the process that does that; a worker that was forked before
    /// the last reset calls it.
    ///
    /// # Errors
    /// [`BarError::Unreachable`].
    pub fn touch(&self) -> Result<(), BarError> {
        self.pieces.touch()
    }

    /// Where a value of `T` at `offset` is.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let inside = offset >= self.start && offset < self.end && self.end - offset >= size_of::<T>();
        if inside && offset.is_multiple_of(size_of::<T>()) {
            // SAFETY: `offset - start` is less than the piece's size.
            return Some(unsafe { self.base.add(offset - self.start) }.cast());
        }
        self.elsewhere(offset)
    }

    /// In one of the other pieces.
    #[cold]
    fn elsewhere<T>(&self, offset: usize) -> Option<NonNull<T>> {
        if !offset.is_multiple_of(size_of::<T>()) {
            return None;
        }
        let end = offset.checked_add(size_of::<T>())?;
        let piece = |(at, window): &&(usize, Window)| offset >= *at && end <= at + window.bytes();
        let (at, window) = self.pieces.all.iter().skip(1).find(piece)?;
        // SAFETY: inside that piece.
        Some(unsafe { window.base().add(offset - at) }.cast())
    }
}

macro_rules! accesses {
    ($($read:ident $write:ident $kind:ty;)*) => { $(
        #[inline(always)]
        fn $read(&self, offset: usize) -> $kind {
            let Some(at) = self.at::<$kind>(offset) else { return <$kind>::MAX };
            // SAFETY: mapped while `pieces` lives, aligned; any bits are an integer.
            let value = <$kind>::from_le(unsafe { at.read_volatile() });
            // What the device wrote to memory before it changed the register is seen after this.
            fence(Ordering::Acquire);
            value
        }

        #[inline(always)]
        fn $write(&self, offset: usize, value: $kind) {
            let Some(at) = self.at::<$kind>(offset) else { return };
            fence(Ordering::Release);
            // SAFETY: as for the read, and mapped writable. What a register does is the device's affair: it
            // reaches memory through the IOMMU alone.
            unsafe { at.write_volatile(value.to_le()) };
        }
    )* };
}

impl Registers for Bar {
    #[inline(always)]
    fn bytes(&self) -> usize {
        self.pieces.bytes
    }

    accesses! {
        read8 write8 u8;
        read16 write16 u16;
        read32 write32 u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// Pieces of a file, as of a device.
    fn bar(pieces: &[(usize, usize)], bytes: usize) -> Bar {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes as u64).unwrap();
        let window = |&(at, size): &(usize, usize)| (at, Window::map(file.as_fd(), at as u64, size).unwrap());
        let mut all: Vec<_> = pieces.iter().map(window).collect();
        all.sort_by_key(|(_, window)| std::cmp::Reverse(window.bytes()));
        Bar::new(&Arc::new(Pieces { bar: 0, all, bytes })).unwrap()
    }

    #[test]
    fn registers_are_little_endian_and_of_their_width() {
        let bar = bar(&[(0, 4096)], 4096);
        bar.write32(8, 0x1122_3344);
        assert_eq!((bar.read8(8), bar.read16(10), bar.read32(8)), (0x44, 0x1122, 0x1122_3344));
        bar.write16(8, 0xaabb);
        bar.write8(11, 0xcc);
        assert_eq!(bar.read32(8), 0xcc22_aabb);
        assert_eq!(bar.bytes(), 4096);
    }

    #[test]
    fn what_is_misaligned_outside_or_a_hole_reads_as_ones() {
        // Around an MSI-X table, as kernels before 4.16 gave it.
        let bar = bar(&[(0, 4096), (8192, 8192)], 16384);
        for good in [0, 4092, 8192, 16380] {
            bar.write32(good, 0x0102_0304);
            assert_eq!(bar.read32(good), 0x0102_0304, "{good}");
        }
        for bad in [1, 4094, 4096, 8188, 16384, 16381, usize::MAX, usize::MAX - 3] {
            bar.write32(bad, 0);
            assert_eq!(bar.read32(bad), u32::MAX, "{bad}");
        }
        assert_eq!((bar.read16(16383), bar.read8(16384)), (u16::MAX, u8::MAX));
        assert_eq!(bar.read32(4092), 0x0102_0304, "nothing was written");
        bar.touch().unwrap();
    }
}
