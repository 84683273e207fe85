//! What a packet asks of the kernel on its way out: a checksum, or the time when it left.
//!
//! Contract: the request lies in the 24 bytes before the packet, in the chunk's headroom (Linux 6.8,
//! Documentation/networking/xsk-tx-metadata.rst). A request that the kernel would refuse is not made:
//! its answer would be to leave the descriptor in the ring for ever.

use super::layout::{TX_METADATA_BYTES, TX_TIMESTAMP_AT, TXMD_CHECKSUM, TXMD_TIMESTAMP, TxMetadata};
use isoplane_memory::{BATCH, Batch, Frame, FrameCache, FrameFlags, Inbox, Pool, Taken};

/// Writes the request of a packet's first frame before it, if it makes one. False when it cannot be
/// fulfilled: no room, or a checksum outside the frame.
pub(super) fn write(pool: &Pool, packet: &mut [Frame]) -> bool {
    let Some(frame) = packet.first_mut() else { return false };
    let flags = frame.flags();
    let mut request = TxMetadata::default();
    if flags.contains(FrameFlags::TX_TIMESTAMP) {
        request.flags |= TXMD_TIMESTAMP;
    }
    if flags.contains(FrameFlags::TX_CHECKSUM) {
        let Some(meta) = pool.meta(frame).filter(|_| flags.contains(FrameFlags::META)) else { return false };
        let end = u32::from(meta.csum_start) + u32::from(meta.csum_offset) + 2;
        if end > u32::from(frame.len()) {
            return false;
        }
        request.flags |= TXMD_CHECKSUM;
        request.csum_start = meta.csum_start;
        request.csum_offset = meta.csum_offset;
    }
    if request.flags == 0 {
        return true;
    }
    const BYTES: u16 = TX_METADATA_BYTES as u16;
    if !pool.grow_front(frame, BYTES) {
        return false;
    }
    if let Some(to) = pool.bytes_mut(frame).get_mut(..usize::from(BYTES)) {
        to.copy_from_slice(bytemuck::bytes_of(&request));
    }
    frame.trim_front(BYTES);
    true
}

/// When a frame left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TxTime {
    /// The frame's chunk.
    pub chunk: u32,
    /// Nanoseconds: in copy mode of TAI, when the kernel was done with the packet; in zero-copy mode
    /// of the device's clock. 0 where the device does not tell.
    pub nanoseconds: u64,
}

/// Which frames on their way out asked for a time, and the answers.
#[derive(Debug)]
pub(super) struct TxTimes {
    /// One bit a chunk.
    asked: Box<[u64]>,
    outstanding: usize,
    ready: [TxTime; BATCH],
    first: usize,
    len: usize,
}

impl TxTimes {
    pub(super) fn new(chunks: u32) -> Self {
        let asked = vec![0; chunks.div_ceil(64) as usize].into_boxed_slice();
        Self { asked, outstanding: 0, ready: [TxTime::default(); BATCH], first: 0, len: 0 }
    }

    /// The frame in that chunk asks.
    pub(super) fn ask(&mut self, chunk: u32) {
        if let Some(word) = self.asked.get_mut(chunk as usize / 64)
            && *word & 1 << (chunk % 64) == 0
        {
            *word |= 1 << (chunk % 64);
            self.outstanding += 1;
        }
    }

    /// It does not after all, or has its answer; says whether it had asked.
    pub(super) fn forget(&mut self, chunk: u32) -> bool {
        let Some(word) = self.asked.get_mut(chunk as usize / 64) else { return false };
        let had = *word & 1 << (chunk % 64) != 0;
        if had {
            *word &= !(1 << (chunk % 64));
            self.outstanding -= 1;
        }
        had
    }

    /// Nobody has asked.
    pub(super) fn reset(&mut self) {
        self.asked.fill(0);
        (self.outstanding, self.len) = (0, 0);
    }

    /// Is there an answer to come?
    #[inline(always)]
    pub(super) const fn waiting(&self) -> bool {
        self.outstanding != 0
    }

    pub(super) fn pop(&mut self) -> Option<TxTime> {
        if self.len == 0 {
            return None;
        }
        let time = self.ready[self.first];
        self.first = (self.first + 1) % BATCH;
        self.len -= 1;
        Some(time)
    }

    fn push(&mut self, time: TxTime) {
        self.ready[(self.first + self.len) % BATCH] = time;
        if self.len == BATCH {
            self.first = (self.first + 1) % BATCH;
        } else {
            self.len += 1;
        }
    }

    /// Takes completions, and the times with them; says how many frames.
    #[cold]
    pub(super) fn reclaim(&mut self, completion: &mut Inbox<u64>, frames: &mut FrameCache) -> usize {
        let mut batch = Batch::new();
        let empty = |address| Taken { address, len: 0, flags: FrameFlags::empty() };
        let got = completion.take(frames, &mut batch, empty);
        for frame in batch.iter_mut() {
            if self.forget(frame.chunk()) {
                let nanoseconds = time_of(frames.pool(), frame);
                self.push(TxTime { chunk: frame.chunk(), nanoseconds });
            }
        }
        frames.put_batch(&mut batch);
        got
    }
}

/// Reads the kernel's answer from before a packet.
fn time_of(pool: &Pool, frame: &mut Frame) -> u64 {
    let at = TX_TIMESTAMP_AT as usize;
    if !pool.grow_front(frame, TX_METADATA_BYTES as u16) {
        return 0;
    }
    let word = pool.bytes(frame).get(at..at + 8).and_then(|b| b.try_into().ok());
    word.map_or(0, u64::from_ne_bytes)
}
