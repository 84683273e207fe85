//! Making many frames at once: where the packets of a pool's chunks start.
//!
//! Contract: frames are made only for chunks that the caller has just become the owner of, and are the
//! same however many are made at a time.
#![allow(unsafe_code, reason = "four frames are made in vector registers; see the block")]

use crate::frame::Frame;
use std::mem::MaybeUninit;

/// A pool's frame starts: see [`Pool::start_offset`](crate::Pool::start_offset).
#[derive(Clone, Copy)]
pub(crate) struct Starts {
    pub(crate) tag: u16,
    /// Offset of the first colour; with all colours added it is below the chunk size, so below 65536.
    pub(crate) first: u32,
    pub(crate) colour_mask: u32,
    pub(crate) colour_shift: u32,
}

impl Starts {
    /// A frame for a chunk.
    #[inline(always)]
    pub(crate) const fn frame(self, chunk: u32, len: u16) -> Frame {
        Frame::new(self.tag, chunk, self.offset(chunk), len)
    }

    #[inline(always)]
    pub(crate) const fn offset(self, chunk: u32) -> u16 {
        (self.first + ((chunk >> self.colour_shift) & self.colour_mask) * 64) as u16
    }

    /// Frames for as many chunks as there are slots; the slices are of one length.
    #[inline(always)]
    pub(crate) fn frames(self, chunks: &[u32], len: u16, slots: &mut [MaybeUninit<Frame>]) {
        let (fours, rest) = chunks.as_chunks::<4>();
        let (four_slots, rest_slots) = slots.as_chunks_mut::<4>();
        for (slots, chunks) in four_slots.iter_mut().zip(fours) {
            self.four(chunks, len, slots);
        }
        for (slot, chunk) in rest_slots.iter_mut().zip(rest) {
            slot.write(self.frame(*chunk, len));
        }
    }

    /// As [`Starts::frame`], four times: a third of the instructions.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn four(self, chunks: &[u32; 4], len: u16, slots: &mut [MaybeUninit<Frame>; 4]) {
        use std::arch::x86_64::{
            __m128i, _mm_add_epi32, _mm_and_si128, _mm_cvtsi32_si128, _mm_loadu_si128, _mm_set1_epi32,
            _mm_set1_epi64x, _mm_slli_epi32, _mm_srl_epi32, _mm_storeu_si128, _mm_unpackhi_epi32,
            _mm_unpackhi_epi64, _mm_unpacklo_epi32, _mm_unpacklo_epi64,
        };
        // SAFETY: SSE2 is part of x86-64. The load and the four stores cover just the arrays that the
        // references are to, unaligned. What is stored is a frame as `Frame::new` lays it out: chunk,
        // offset and length in the low word (the offset is below 65536, so adding it to the length
        // does not carry), pool tag in the high one.
        unsafe {
            let chunk = _mm_loadu_si128(chunks.as_ptr().cast());
            let colour = _mm_srl_epi32(chunk, _mm_cvtsi32_si128(self.colour_shift as i32));
            let colour = _mm_and_si128(colour, _mm_set1_epi32(self.colour_mask as i32));
            let base = _mm_set1_epi32((self.first | u32::from(len) << 16) as i32);
            let span = _mm_add_epi32(_mm_slli_epi32::<6>(colour), base);
            let (low, high) = (_mm_unpacklo_epi32(chunk, span), _mm_unpackhi_epi32(chunk, span));
            let rest = _mm_set1_epi64x(i64::from(self.tag) << 16);
            let to = slots.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(to, _mm_unpacklo_epi64(low, rest));
            _mm_storeu_si128(to.add(1), _mm_unpackhi_epi64(low, rest));
            _mm_storeu_si128(to.add(2), _mm_unpacklo_epi64(high, rest));
            _mm_storeu_si128(to.add(3), _mm_unpackhi_epi64(high, rest));
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[inline(always)]
    fn four(self, chunks: &[u32; 4], len: u16, slots: &mut [MaybeUninit<Frame>; 4]) {
        for (slot, chunk) in slots.iter_mut().zip(chunks) {
            slot.write(self.frame(*chunk, len));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_made_together_are_those_made_alone() {
        let chunks: Vec<u32> = (0..67_u32).map(|i| i.wrapping_mul(2_654_435_761) >> 8).collect();
        for (first, colour_mask, colour_shift, len) in
            [(128, 15, 0, 64), (128, 15, 1, 1514), (64, 0, 0, 0), (64_000, 15, 5, u16::MAX)]
        {
            let starts = Starts { tag: 0xbeef, first, colour_mask, colour_shift };
            for n in 0..chunks.len() {
                let mut slots = [const { MaybeUninit::uninit() }; 67];
                starts.frames(&chunks[..n], len, &mut slots[..n]);
                for (slot, chunk) in slots[..n].iter().zip(&chunks) {
                    // SAFETY: `frames` has written the first `n` slots.
                    assert_eq!(unsafe { slot.assume_init_ref() }, &starts.frame(*chunk, len));
                }
            }
        }
    }
}
