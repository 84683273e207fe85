//! The frame: an owned, 16-byte handle to one chunk of a pool.
//!
//! Contract: at most one `Frame` exists per chunk at any time, in all processes together. It is
//! made by a [`FrameCache`](crate::FrameCache) or a [`Collector`](crate::Collector), which check the
//! chunk's owner byte first, and it is used up by giving it back. It stays in the thread it was made in
//! (not `Send`), so that a worker that dies takes its frames with it. It is neither `Copy` nor `Clone`,
//! and it has no `Drop`: a dropped frame is a leak which the balance shows
//! ([`recovery`](crate::recovery)) and the next recovery repairs.
#![allow(unsafe_code, reason = "a frame is made of two words; see the block")]

use bytemuck::{Pod, Zeroable};
use std::marker::PhantomData;

/// What is known about a packet beside its bytes; lives in the first 64 bytes of the chunk, so that
/// the handle stays small. Valid when the frame carries [`FrameFlags::META`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct FrameMeta {
    /// When the packet arrived or left, in nanoseconds of the port's clock; 0 is unknown.
    pub timestamp: u64,
    /// Receive-side hash of the flow; 0 is unknown.
    pub hash: u32,
    /// VLAN tag control information that the port stripped, in host order.
    pub vlan_tci: u16,
    /// Where the transport checksum starts counting, in bytes from the packet's start.
    pub csum_start: u16,
    /// Where the checksum goes, in bytes from `csum_start`.
    pub csum_offset: u16,
    /// Zero.
    pub reserved: [u16; 3],
}

bitflags::bitflags! {
    /// What is known about a frame, beside its place and length.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct FrameFlags: u16 {
        /// The packet goes on in the next frame of the batch (multi-buffer). The last frame of a
        /// packet does not carry it.
        const MORE = 1 << 0;
        /// On transmit: the port shall compute a checksum as [`FrameMeta`]
        /// `csum_start` and `csum_offset` say. Only for ports with that capability.
        const TX_CHECKSUM = 1 << 1;
        /// On transmit: the port shall record when the frame left, where it can.
        const TX_TIMESTAMP = 1 << 2;
        /// On receive: the port has verified the transport checksum.
        const RX_CHECKSUM_GOOD = 1 << 3;
        /// The chunk's [`FrameMeta`] holds values for this packet.
        const META = 1 << 4;
    }
}

/// An owned handle to one chunk. See the [module](self) for the contract.
#[must_use = "a frame that is dropped leaks its chunk: give it to a FrameCache, a Batch or a port"]
#[derive(Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Frame {
    chunk: u32,
    offset: u16,
    len: u16,
    flags: FrameFlags,
    pool: u16,
    mark: u32,
    /// Not `Send`: a frame cannot be put aside in a static or a closure and outlive its worker.
    _stays: PhantomData<*const ()>,
}

const _: () = assert!(size_of::<Frame>() == 16);

impl Frame {
    /// Only pool, cache and custody make frames, after they checked the bounds and the owner.
    #[inline(always)]
    pub(crate) const fn new(pool: u16, chunk: u32, offset: u16, len: u16) -> Self {
        // As two words, since six narrow stores a frame are a third of a null port's cost.
        #[cfg(target_endian = "little")]
        {
            let place = chunk as u64 | (offset as u64) << 32 | (len as u64) << 48;
            // SAFETY: both types have 16 bytes and no padding, every bit pattern is a `Frame`, and the
            // words are laid out as the fields are on a little-endian machine.
            unsafe { std::mem::transmute::<[u64; 2], Self>([place, (pool as u64) << 16]) }
        }
        #[cfg(not(target_endian = "little"))]
        Self { chunk, offset, len, flags: FrameFlags::empty(), pool, mark: 0, _stays: PhantomData }
    }

    #[inline(always)]
    pub(crate) const fn pool_tag(&self) -> u16 {
        self.pool
    }

    #[inline(always)]
    pub(crate) const fn set_span(&mut self, offset: u16, len: u16) {
        self.offset = offset;
        self.len = len;
    }

    /// Index of the chunk in its pool.
    #[inline(always)]
    #[must_use]
    pub const fn chunk(&self) -> u32 {
        self.chunk
    }

    /// Where the packet starts, in bytes from the start of the chunk.
    #[inline(always)]
    #[must_use]
    pub const fn offset(&self) -> u16 {
        self.offset
    }

    /// Length of this frame's part of the packet, in bytes.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "an empty frame is not a special case")]
    pub const fn len(&self) -> u16 {
        self.len
    }

    /// What is known about the frame.
    #[inline(always)]
    #[must_use]
    pub const fn flags(&self) -> FrameFlags {
        self.flags
    }

    /// Replaces the flags.
    #[inline(always)]
    pub const fn set_flags(&mut self, flags: FrameFlags) {
        self.flags = flags;
    }

    /// Does the packet go on in the next frame?
    #[inline(always)]
    #[must_use]
    pub const fn has_more(&self) -> bool {
        self.flags.bits() & FrameFlags::MORE.bits() != 0
    }

    /// A word for the app's own use; kept while the frame stays within one worker.
    #[inline(always)]
    #[must_use]
    pub const fn mark(&self) -> u32 {
        self.mark
    }

    /// Sets the app's own word.
    #[inline(always)]
    pub const fn set_mark(&mut self, mark: u32) {
        self.mark = mark;
    }

    /// Shortens the frame to `len` bytes; a longer `len` changes nothing.
    #[inline(always)]
    pub const fn truncate(&mut self, len: u16) {
        if len < self.len {
            self.len = len;
        }
    }

    /// Drops the first `n` bytes (at most all of them).
    #[inline(always)]
    pub const fn trim_front(&mut self, n: u16) {
        let n = if n < self.len { n } else { self.len };
        // Only a frame that is trimmed to nothing at the end of a 64 KiB chunk can saturate.
        self.offset = self.offset.saturating_add(n);
        self.len -= n;
    }
}
