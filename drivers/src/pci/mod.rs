//! What a driver of ours sees of a PCI function: the seam at which a test puts a device of its own.
//!
//! Contract: a driver's logic is written against [`Function`] and knows nothing of VFIO. Registers are reached
//! through [`Registers`], which never fault: an offset outside gives all ones, as a device that is gone does.
//! Memory that a device reads and writes is shared with it as atomics only ([`DmaSlice`]), so that whatever
//! it does is a value and never undefined behaviour.
//!
//! After a fork the worker uses what it inherited: registers and DMA memory are mapped shared.

use crate::port::LinkState;
use isoplane_memory::Pool;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
pub(crate) mod qemu;
mod slice;

pub use slice::{DmaSlice, Shared, SliceError, Wrapped};

/// Registers of a device (a BAR or a part of one), little-endian. Each access is one access of that width;
/// a misaligned one, or one outside, reads all ones and writes nothing.
pub trait Registers: Send + Sync + 'static {
    /// Bytes that may be reached.
    fn bytes(&self) -> usize;
    /// One byte.
    fn read8(&self, offset: usize) -> u8;
    /// Two bytes.
    fn read16(&self, offset: usize) -> u16;
    /// Four bytes.
    fn read32(&self, offset: usize) -> u32;
    /// One byte.
    fn write8(&self, offset: usize, value: u8);
    /// Two bytes. What was stored to DMA memory before is there before it (release; x86 keeps the order of
    /// stores to write-back and to uncached memory).
    fn write16(&self, offset: usize, value: u16);
    /// Four bytes; as [`Registers::write16`].
    fn write32(&self, offset: usize, value: u32);
}

/// Memory that the device may read and write, contiguous for it and for us; zeroed when allocated.
///
/// # Safety
/// While the value lives, `start` to `start + bytes` is mapped, shared across a fork, and accessed by nobody
/// but as atomics and by devices; it may be dropped only when no device can reach it any more.
#[allow(unsafe_code, reason = "an implementation vouches for its memory")]
pub unsafe trait DmaMemory: Send + Sync + std::fmt::Debug {
    /// First byte, aligned to a page.
    fn start(&self) -> NonNull<u8>;
    /// How many.
    fn bytes(&self) -> usize;
    /// Where the device finds the first byte.
    fn iova(&self) -> u64;
}

/// Why something could not be had from a function. The driver puts the device's name before it.
pub type FunctionError = Box<dyn std::error::Error + Send + Sync>;

/// A PCI function that was opened: configuration space, BARs, DMA. All of it is cold; what is hot is in the
/// registers and the memory that it gives.
pub trait Function: Send {
    /// Its BARs as they are given out.
    type Bar: Registers + Clone;

    /// Domain, bus, device and function, such as `0000:00:02.0`.
    fn address(&self) -> &str;

    /// Four bytes of configuration space; all ones when there is no such register.
    fn config_read(&self, offset: u16, bytes: ConfigWidth) -> u32;
    /// Writes to configuration space; the kernel may virtualise what it does.
    fn config_write(&self, offset: u16, bytes: ConfigWidth, value: u32);

    /// A BAR, mapped whole or as far as the kernel lets us.
    ///
    /// # Errors
    /// No such BAR, not memory, or not mappable.
    fn bar(&self, index: u8) -> Result<Self::Bar, FunctionError>;

    /// DMA memory of at least `bytes`, zeroed, mapped for this device. Lives as long as the last clone.
    ///
    /// # Errors
    /// No memory, or the IOMMU refuses.
    fn dma(&self, name: &str, bytes: usize) -> Result<Arc<dyn DmaMemory>, FunctionError>;

    /// Maps a pool's chunks for this device and says where it finds byte 0 of chunk 0. A pool that is
    /// mapped already is not mapped twice.
    ///
    /// # Errors
    /// The IOMMU refuses, or the limit of locked memory is too low.
    fn map_pool(&self, pool: &Arc<Pool>) -> Result<u64, FunctionError>;

    /// Resets the device: no DMA and no interrupt afterwards, registers as after power-on.
    ///
    /// # Errors
    /// The device cannot be reset.
    fn reset(&self) -> Result<(), FunctionError>;

    /// Lets the device do DMA, or no more. On last when opening, off first when closing.
    fn bus_master(&self, on: bool);

    /// Gone (unplugged), as far as the kernel knows.
    fn gone(&self) -> bool;

    /// File descriptors that it holds.
    fn descriptors(&self) -> Vec<std::os::fd::RawFd>;
}

/// Width of an access to configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigWidth {
    /// One byte.
    Byte = 1,
    /// Two bytes.
    Word = 2,
    /// Four bytes.
    Dword = 4,
}

/// A capability in configuration space: its identity and where it starts. At most 48 are looked at, since a
/// device may make a loop of them (PCI 3.0, section 6.7).
#[must_use]
pub fn capabilities<F: Function + ?Sized>(function: &F) -> Vec<(u8, u16)> {
    const STATUS: u16 = 0x06;
    const POINTER: u16 = 0x34;
    let mut found = Vec::new();
    let status = function.config_read(STATUS, ConfigWidth::Word);
    if status == 0xffff || status & 1 << 4 == 0 {
        return found;
    }
    let mut at = function.config_read(POINTER, ConfigWidth::Byte) as u16 & 0xfc;
    while at >= 0x40 && found.len() < 48 {
        found.push((function.config_read(at, ConfigWidth::Byte) as u8, at));
        at = function.config_read(at + 1, ConfigWidth::Byte) as u16 & 0xfc;
    }
    found
}

/// A link state as drivers keep it, from whether the device says that the link is up.
#[must_use]
pub const fn link(gone: bool, up: Option<bool>) -> LinkState {
    match (gone, up) {
        (true, _) => LinkState::Gone,
        (false, Some(true)) => LinkState::Up,
        (false, Some(false)) => LinkState::Down,
        (false, None) => LinkState::Unknown,
    }
}
