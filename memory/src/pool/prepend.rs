//! What drivers reach of a pool in their hot paths: owner bytes, and headers before packets, in place.

use super::{META_BYTES, Pool};
use crate::frame::Frame;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

/// Where frames of a pool are; a copy of what does not change.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    tag: u16,
    shift: u32,
}

impl Addresses {
    /// Address of the frame's packet, in bytes from chunk 0, as [`Lender::address`](crate::Lender::address) says.
    /// `None` for a frame of another pool.
    #[inline(always)]
    #[must_use]
    pub const fn of(self, frame: &Frame) -> Option<u64> {
        if frame.pool_tag() != self.tag {
            return None;
        }
        Some(((frame.chunk() as u64) << self.shift) + frame.offset() as u64)
    }
}

impl Pool {
    /// What it takes to find frames in the pool, read once: for loops.
    #[inline(always)]
    #[must_use]
    pub const fn addresses(&self) -> Addresses {
        Addresses { tag: self.tag, shift: self.shift }
    }

    /// The owner bytes, one a chunk.
    #[inline(always)]
    pub(crate) const fn owners(&self) -> NonNull<AtomicU8> {
        self.owners
    }

    /// Writes `header` right before the packet; the frame stays as it is. False, and nothing written, when the
    /// frame has no room there (the metadata is kept) or is of another pool.
    #[inline(always)]
    #[must_use]
    pub const fn prepend<const N: usize>(&self, frame: &mut Frame, header: &[u8; N]) -> bool {
        if frame.pool_tag() != self.tag || (frame.offset() as usize) < META_BYTES as usize + N {
            return false;
        }
        // SAFETY: the frame has our tag, so its chunk and offset are inside the pool (see `bytes`), and the offset
        // is at least `N`, so the `N` bytes before the packet are in the same chunk, behind the metadata. No
        // reference to bytes of the chunk lives, since `frame` is its only handle and is borrowed uniquely.
        unsafe { self.start(frame).sub(N).cast::<[u8; N]>().write(*header) };
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::pool::{Pool, PoolConfig};

    #[test]
    fn addresses_are_what_the_lender_says() {
        let pools = ["a", "b"].map(|name| Pool::create(&PoolConfig::new(name, 8)).unwrap());
        let (lender, _collector) = pools[0].custody().unwrap();
        let mut frames = pools[0].cache("w", 8).unwrap();
        while let Some(frame) = frames.get() {
            assert_eq!(pools[0].addresses().of(&frame), lender.address(&frame));
            assert_eq!(pools[1].addresses().of(&frame), None);
        }
    }
}
