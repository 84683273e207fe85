//! Sixteen lookups in a register: a batch of them on CPUs with AVX-512.
//!
//! Contract: the same words are read as by the lookups of [`shared`](super::shared), in the same places,
//! and so the same answers given; the bounds are those that hold there, whatever the words say.
#![allow(unsafe_code, reason = "gathers from words that change meanwhile; see each block")]

use super::key::Key;
use super::shared::{COUNTS, DIRECT_BITS, DIRECT_BYTES, UNIT};
use crate::tables::next_hop::NextHopId;
use isoplane_memory::BATCH;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ptr::NonNull;

/// Addresses in a register.
const LANES: usize = 16;
const GROUPS: usize = BATCH / LANES;

/// Can [`find_batch`] be called?
#[inline]
pub(super) fn available() -> bool {
    std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512vpopcntdq")
}

/// Words of 32 bits at `base + 4 * index`, for the lanes of `mask`; the others are taken from `rest`.
///
/// # Safety
/// All those words are in one mapping, aligned, and only ever written whole, or in parts that are each
/// written whole.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn gather32(base: *const u8, index: __m512i, mask: __mmask16, rest: __m512i) -> __m512i {
    let mut words = rest;
    // SAFETY: the caller says that the words are there. As assembly it is no access that the compiler
    // knows, so it may race with the program's stores; the CPU loads each aligned lane whole. Two
    // registers: `inout` never shares one with `in`.
    unsafe {
        asm!(
            "vpgatherdd {words}{{{mask}}}, [{base} + {index}*4]",
            words = inout(zmm_reg) words,
            mask = inout(kreg) mask => _,
            base = in(reg) base,
            index = in(zmm_reg) index,
            options(nostack, readonly, preserves_flags),
        );
    }
    words
}

/// Words of 64 bits at `base + 8 * index`, for the lanes of `mask`; the others are 0.
///
/// # Safety
/// As for [`gather32`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn gather64(base: *const u8, index: __m256i, mask: __mmask8) -> __m512i {
    let mut words = _mm512_setzero_si512();
    // SAFETY: as in `gather32`.
    unsafe {
        asm!(
            "vpgatherdq {words}{{{mask}}}, [{base} + {index}*8]",
            words = inout(zmm_reg) words,
            mask = inout(kreg) mask => _,
            base = in(reg) base,
            index = in(ymm_reg) index,
            options(nostack, readonly, preserves_flags),
        );
    }
    words
}

/// The same 32 bits of sixteen addresses; the highest are at 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn words_of<K: Key>(keys: &[K; BATCH], group: usize, which: usize) -> __m512i {
    let all: &[u32] = bytemuck::cast_slice(keys);
    let each = size_of::<K>() / 4;
    let first = group * LANES * each + (each - 1 - which % each);
    let words: [u32; LANES] =
        std::array::from_fn(|lane| all.get(first + lane * each).copied().unwrap_or_default());
    // SAFETY: it reads 64 bytes, wherever they are aligned.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// The next hops of a batch's first `many` addresses, in a trie whose first byte is at `base` and whose nodes begin at one of
/// `mask + 1` units.
///
/// # Safety
/// The CPU has what [`available`] asks for, and the region is as [`Shared`](super::shared::Shared) made it.
#[target_feature(enable = "avx512f,avx512vpopcntdq,popcnt,bmi1,bmi2")]
pub(super) unsafe fn find_batch<K: Key>(
    base: NonNull<u8>,
    mask: u32,
    keys: &[K; BATCH],
    many: usize,
    found: &mut [NextHopId; BATCH],
) {
    let groups = many.div_ceil(LANES).min(GROUPS);
    let base: *const u8 = base.as_ptr();
    let zero = _mm512_setzero_si512();
    let byte = _mm512_set1_epi32(255);
    let low = _mm512_set1_epi32(63);
    let units = _mm512_set1_epi32(mask as i32);
    let counts_at = _mm512_set1_epi32(((DIRECT_BYTES + COUNTS) / 4) as i32);
    let bits_at = _mm512_set1_epi32((DIRECT_BYTES / 8) as i32);

    let mut words: [__m512i; GROUPS] = [zero; GROUPS];
    let mut entries = [zero; GROUPS];
    let mut places = [zero; GROUPS];
    let mut left: [__mmask16; GROUPS] = [0; GROUPS];
    for group in 0..groups {
        words[group] = words_of(keys, group, 0);
        let slots = _mm512_srli_epi32::<{ 32 - DIRECT_BITS }>(words[group]);
        // SAFETY: there are 2^16 slots of four bytes at the start of the region.
        entries[group] = unsafe { gather32(base, slots, !0, zero) };
        // The highest bit marks a child.
        left[group] = _mm512_cmplt_epi32_mask(entries[group], zero);
    }
    for level in 0..K::LEVELS {
        if left.iter().all(|left| *left == 0) {
            break;
        }
        let at = DIRECT_BITS as usize / 8 + level;
        let shift = _mm_cvtsi32_si128(24 - 8 * (at as i32 % 4));
        for group in 0..groups {
            if left[group] == 0 {
                continue;
            }
            if at.is_multiple_of(4) {
                words[group] = words_of(keys, group, at / 4);
            }
            let slot = _mm512_and_si512(_mm512_srl_epi32(words[group], shift), byte);
            let unit = _mm512_and_si512(entries[group], units);
            let quarter = _mm512_srli_epi32::<6>(slot);
            // In words of 64 bits; fewer than 2^28.
            let bits = _mm512_add_epi32(_mm512_slli_epi32::<{ (UNIT / 8).ilog2() }>(unit), quarter);
            let bits = _mm512_add_epi32(bits, bits_at);
            let (first, second) = (_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64::<1>(bits));
            // SAFETY: a unit is at most the last, behind which there is what a lookup reaches; node and
            // quarter are whole words of 64 bits.
            let (first, second) = unsafe {
                (
                    gather64(base, first, left[group] as __mmask8),
                    gather64(base, second, (left[group] >> 8) as __mmask8),
                )
            };
            // In words of 32 bits; fewer than 2^29.
            let counts = _mm512_add_epi32(_mm512_slli_epi32::<{ (UNIT / 4).ilog2() }>(unit), counts_at);
            // SAFETY: as above; the four counts are one aligned word.
            let before = unsafe { gather32(base, counts, left[group], zero) };
            let before = _mm512_srlv_epi32(before, _mm512_slli_epi32::<3>(quarter));
            let before = _mm512_and_si512(before, byte);
            // The bits up to the slot: the others are shifted out.
            let out = _mm512_andnot_si512(slot, low);
            let first = _mm512_sllv_epi64(first, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(out)));
            let second =
                _mm512_sllv_epi64(second, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64::<1>(out)));
            let first = _mm512_cvtepi64_epi32(_mm512_popcnt_epi64(first));
            let second = _mm512_cvtepi64_epi32(_mm512_popcnt_epi64(second));
            let counted = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(first), second);
            places[group] = _mm512_add_epi32(_mm512_add_epi32(counts, before), counted);
        }
        for group in 0..groups {
            // SAFETY: at most a count of 8 bits and one of 64 bits behind the counts: what a lookup reaches.
            entries[group] = unsafe { gather32(base, places[group], left[group], entries[group]) };
            left[group] &= _mm512_cmplt_epi32_mask(entries[group], zero);
        }
    }
    let mut all = [[0_u32; LANES]; GROUPS];
    for (group, entries) in all.iter_mut().zip(entries) {
        // SAFETY: it writes 64 bytes, wherever they are aligned.
        unsafe { _mm512_storeu_si512(group.as_mut_ptr().cast(), entries) };
    }
    for (found, entry) in found.iter_mut().zip(all.as_flattened()) {
        *found = NextHopId::from_low_bits(*entry);
    }
}
