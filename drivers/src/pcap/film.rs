//! A recording in shared memory, and how far it has been played.
//!
//! ```text
//! region | words, 4 KiB: packets played, when the first one was | index: one entry a packet | bytes
//! ```
//!
//! Contract: index and bytes are written once, before anybody plays. Reading copies bytes out; what the index says is
//! checked again, since other processes have the memory.
#![allow(unsafe_code, reason = "words and bytes in shared memory; see each block")]

use super::recording::Recording;
use isoplane_memory::{Region, RegionConfig, RegionError};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const WORDS_BYTES: usize = 4096;
const PLAYED: usize = 0;
const STARTED: usize = 128;

/// Where a packet is, and when.
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Shot {
    /// Bytes from the start of the region.
    at: u64,
    /// Nanoseconds since the first packet; never less than the one before has.
    pub(super) time: u64,
    pub(super) len: u64,
}

/// A recording to be played.
#[derive(Debug, Clone)]
pub(super) struct Film {
    region: Arc<Region>,
    packets: u64,
    /// Nanoseconds from the first packet to the first one of the next round.
    period: u64,
}

impl Film {
    pub(super) fn new(name: &str, recording: &Recording<'_>) -> Result<Self, RegionError> {
        let index = recording.packets.len() * size_of::<Shot>();
        let bytes: usize = recording.packets.iter().map(|packet| packet.bytes.len()).sum();
        let region = RegionConfig::new(&format!("isoplane.pcap.{name}"), WORDS_BYTES + index + bytes);
        let region = Region::create(&region)?;
        let first = recording.packets.first().map_or(0, |packet| packet.time);
        let (mut at, mut time) = (WORDS_BYTES + index, 0);
        for (number, packet) in recording.packets.iter().enumerate() {
            time = packet.time.saturating_sub(first).max(time);
            let shot = Shot { at: at as u64, time, len: packet.bytes.len() as u64 };
            let entry = region.slice::<Shot>(WORDS_BYTES + number * size_of::<Shot>(), 1);
            let to = region.slice::<u8>(at, packet.bytes.len());
            if let Some((entry, to)) = entry.zip(to) {
                // SAFETY: both lie inside the region (`slice` has checked), which nobody else has yet.
                unsafe {
                    entry.write(shot);
                    std::ptr::copy_nonoverlapping(packet.bytes.as_ptr(), to.as_ptr(), packet.bytes.len());
                }
            }
            at += packet.bytes.len();
        }
        let packets = recording.packets.len() as u64;
        // The next round begins as long after the last packet as packets are apart, on average.
        let gap = time / packets.saturating_sub(1).max(1);
        Ok(Self { region, packets, period: time.saturating_add(gap) })
    }

    pub(super) const fn packets(&self) -> u64 {
        self.packets
    }

    pub(super) const fn period(&self) -> u64 {
        self.period
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        let word: NonNull<AtomicU64> = self.region.base().cast();
        // SAFETY: the first page of the region holds these words, aligned; only atomics touch them, and the region
        // stays mapped while `self` lives.
        unsafe { word.byte_add(at).as_ref() }
    }

    /// Packets played so far, by whichever worker.
    #[inline(always)]
    pub(super) fn played(&self) -> u64 {
        self.word(PLAYED).load(Ordering::Relaxed)
    }

    #[inline(always)]
    pub(super) fn set_played(&self, packets: u64) {
        self.word(PLAYED).store(packets, Ordering::Relaxed);
    }

    /// When the first packet was played; notes `now` if it was not. Not zero.
    #[inline(always)]
    pub(super) fn started(&self, now: u64) -> u64 {
        match self.word(STARTED).load(Ordering::Relaxed) {
            0 => {
                self.word(STARTED).store(now.max(1), Ordering::Relaxed);
                now.max(1)
            }
            then => then,
        }
    }

    /// A packet by its number from 0 on.
    #[inline(always)]
    pub(super) fn shot(&self, number: u64) -> Option<Shot> {
        let at = WORDS_BYTES + usize::try_from(number).ok()?.checked_mul(size_of::<Shot>())?;
        // SAFETY: inside the mapping and aligned; a volatile copy of plain data.
        Some(unsafe { self.region.slice::<Shot>(at, 1)?.read_volatile() })
    }

    /// Copies bytes of a packet, from `from` on, as many as `to` has. False when they are not in the region.
    #[inline(always)]
    pub(super) fn copy(&self, shot: &Shot, from: usize, to: &mut [u8]) -> bool {
        let at = usize::try_from(shot.at).ok().and_then(|at| at.checked_add(from));
        let Some(bytes) = at.and_then(|at| self.region.slice::<u8>(at, to.len())) else { return false };
        // SAFETY: `slice` has checked the bounds; nobody writes there after `new`, and a process that did would garble
        // a packet.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_mut_ptr(), to.len()) };
        true
    }
}
