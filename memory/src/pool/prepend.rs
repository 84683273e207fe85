//! What drivers reach of a pool in their hot paths: owner bytes, and headers before packets, in place.

use super::{META_BYTES, Pool};
use crate::frame::Frame;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

impl Pool {
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
