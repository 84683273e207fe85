//! How a pool's chunks look to the kernel as a UMEM.
//!
//! ```text
//! aligned    chunk = UMEM chunk    | meta 64 | ... headroom ... 256 | packet ... |
//! unaligned  chunk > UMEM chunk    | meta 64, colour x 64 | UMEM chunk: headroom, 256 | packet ... | spare |
//! ```
//!
//! Contract: addresses count in bytes from chunk 0 of the pool, and the UMEM starts there too, so that
//! an address means the same to both. In aligned mode the kernel rounds an address that it is given
//! down to a chunk of its own, which is one of ours. In unaligned mode it takes the address as it is,
//! so frame starts can be spread over the lines of the first-level cache, and chunks may be larger
//! than the page that the kernel limits its own chunks to; it gives a received packet's place as
//! start and, in the upper 16 bits, offset.

use super::layout::{
    MIN_CHUNK, PAGE, UNALIGNED_OFFSET_SHIFT, UmemReg, XDP_PACKET_HEADROOM, XDP_UMEM_TX_METADATA_LEN,
    XDP_UMEM_TX_SW_CSUM, XDP_UMEM_UNALIGNED_CHUNK,
};
use isoplane_memory::Pool;
use isoplane_memory::pool::META_BYTES;

/// How a pool is shown to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Size of a pool's chunk, as a power of two.
    shift: u32,
    unaligned: bool,
    chunk: u32,
    headroom: u32,
    /// Different starts, a power of two; 1 in aligned mode.
    colours: u32,
    tx_metadata: u32,
    software_checksum: bool,
}

impl Geometry {
    /// `None` when the kernel could not take the pool's chunks that way.
    pub(super) fn new(
        pool: &Pool,
        unaligned: bool,
        tx_metadata: u32,
        software_checksum: bool,
    ) -> Option<Self> {
        let stride = pool.chunk_bytes();
        let want = META_BYTES + pool.headroom();
        let (chunk, colours) = if unaligned {
            // The largest chunk that leaves room for metadata and sixteen colours, else fewer colours.
            let chunk = [PAGE, 3072, MIN_CHUNK]
                .into_iter()
                .find(|chunk| stride >= META_BYTES + 15 * 64 + chunk)
                .or((stride >= META_BYTES + MIN_CHUNK).then_some(MIN_CHUNK))?;
            let spare = stride - META_BYTES - chunk;
            (chunk, 1 << (spare / 64 + 1).min(16).ilog2())
        } else {
            if !(MIN_CHUNK..=PAGE).contains(&stride) {
                return None;
            }
            (stride, 1)
        };
        let before = if unaligned { META_BYTES } else { 0 };
        let headroom = want.saturating_sub(XDP_PACKET_HEADROOM + before).next_multiple_of(64);
        let shift = pool.chunk_shift();
        let geometry = Self { shift, unaligned, chunk, headroom, colours, tx_metadata, software_checksum };
        (headroom + XDP_PACKET_HEADROOM < chunk).then_some(geometry)
    }

    /// Bytes of packet that the kernel puts in one chunk.
    pub(super) const fn room(&self) -> u32 {
        self.chunk - self.headroom - XDP_PACKET_HEADROOM
    }

    /// Bytes of packet that one descriptor may have on transmit.
    pub(super) const fn tx_room(&self) -> u32 {
        // The kernel counts the request's bytes against an unaligned chunk, asked for or not
        // (xp_unaligned_validate_desc, Linux 6.8); a longer frame would never be completed.
        if self.unaligned { self.chunk - self.tx_metadata } else { self.chunk }
    }

    pub(super) const fn unaligned(&self) -> bool {
        self.unaligned
    }

    pub(super) const fn chunk(&self) -> u32 {
        self.chunk
    }

    pub(super) const fn has_tx_metadata(&self) -> bool {
        self.tx_metadata != 0
    }

    /// What the kernel is told.
    pub(super) fn registration(&self, pool: &Pool) -> UmemReg {
        let mut flags = 0;
        if self.unaligned {
            flags |= XDP_UMEM_UNALIGNED_CHUNK;
        }
        if self.tx_metadata != 0 {
            flags |= XDP_UMEM_TX_METADATA_LEN;
        }
        if self.software_checksum {
            flags |= XDP_UMEM_TX_SW_CSUM;
        }
        UmemReg {
            addr: pool.chunks_base().as_ptr() as u64,
            len: u64::from(pool.chunks()) << self.shift,
            chunk_size: self.chunk,
            headroom: self.headroom,
            flags,
            tx_metadata_len: self.tx_metadata,
        }
    }

    /// What goes into the fill ring for the chunk that `address` lies in.
    #[inline(always)]
    pub(super) const fn fill(&self, address: u64) -> u64 {
        let chunk = address >> self.shift;
        let base = chunk << self.shift;
        if self.unaligned {
            base + META_BYTES as u64 + (chunk & (self.colours as u64 - 1)) * 64
        } else {
            base
        }
    }

    /// Where the packet of a received descriptor lies. A lie gives an address that custody refuses.
    #[inline(always)]
    pub(super) const fn received(&self, address: u64) -> u64 {
        if self.unaligned {
            let base = address & ((1 << UNALIGNED_OFFSET_SHIFT) - 1);
            base + (address >> UNALIGNED_OFFSET_SHIFT)
        } else {
            address
        }
    }
}
