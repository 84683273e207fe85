//! Receiving with headers read: packets in several buffers, checksums, hashes.
//!
//! Contract: as in `rx`. A packet comes out whole or stays in the ring until all of it is there and the batch has
//! room for it. One that says it is in no buffer, in more than a batch holds, or whose parts are lies is
//! dropped, and its good frames are free again.

use super::layout::{Features, header};
use super::queue::Path;
use super::ring::{Cursor, Ring};
use crate::pci::Registers;
use isoplane_memory::{BATCH, Batch, Frame, FrameCache, FrameFlags, FrameMeta, Pool};

/// What of the header counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parse {
    merges: bool,
    checksums: bool,
    hashes: bool,
}

impl Parse {
    /// `None` when nothing does: plain mode.
    pub(super) fn new(features: Features) -> Option<Self> {
        let parse = Self {
            merges: features.contains(Features::MRG_RXBUF),
            checksums: features.contains(Features::GUEST_CSUM),
            hashes: features.contains(Features::HASH_REPORT),
        };
        (parse.merges || parse.checksums || parse.hashes).then_some(parse)
    }
}

/// Receives packets; says how many frames.
#[inline(always)]
pub(super) fn receive<Q: Ring, R: Registers>(
    ring: &mut Q,
    path: &mut Path<R>,
    parse: Parse,
    frames: &mut FrameCache,
    batch: &mut Batch,
) -> usize {
    let before = batch.len();
    let ready = ring.ready(BATCH as u16);
    let most = ring.size().min(BATCH as u16);
    let mut at = 0;
    while at < ready && batch.room() != 0 {
        let Some(mut first) = take(ring, path, frames, at, path.header) else {
            path.bad += 1;
            retire(ring, at);
            at += 1;
            continue;
        };
        let pool = path.lender.pool();
        let buffers = if parse.merges { word(header_of(pool, &first), header::BUFFERS) } else { 1 };
        if buffers == 0 || buffers > most {
            path.bad += 1;
            frames.put(first);
            retire(ring, at);
            at += 1;
            continue;
        }
        if buffers > ready - at || usize::from(buffers) > batch.room() {
            // Back into custody, where it came from.
            let _ = path.lender.commit(first);
            break;
        }
        note(pool, parse, path.header, &mut first);
        push(frames, batch, first, buffers > 1);
        let mut whole = true;
        for part in 1..buffers {
            match take(ring, path, frames, at + part, 0) {
                Some(frame) => push(frames, batch, frame, part + 1 < buffers),
                None => whole = false,
            }
        }
        if !whole {
            drop_last(frames, batch);
            path.bad += 1;
        }
        for part in at..at + buffers {
            retire(ring, part);
        }
        at += buffers;
    }
    if at != 0 {
        ring.consume(at);
    }
    batch.len() - before
}

/// The frame of an entry, header and all; `None` when the entry is a lie, one that is too short for `header` bytes
/// included. (Then the frame, if there is one, is free.)
#[inline(always)]
fn take<Q: Ring, R>(
    ring: &Q,
    path: &Path<R>,
    frames: &mut FrameCache,
    at: u16,
    header: u32,
) -> Option<Frame> {
    let cursor = ring.cursor();
    let used = cursor.used(at);
    let address = cursor.address(used.id).wrapping_sub(path.base);
    let frame = path.collector.release(frames, address, used.len)?;
    if used.len < header {
        frames.put(frame);
        return None;
    }
    Some(frame)
}

#[inline(always)]
fn retire<Q: Ring>(ring: &Q, at: u16) {
    let cursor = ring.cursor();
    cursor.retire(at, cursor.used(at).id);
}

#[inline(always)]
fn push(frames: &mut FrameCache, batch: &mut Batch, mut frame: Frame, more: bool) {
    if more {
        frame.set_flags(frame.flags() | FrameFlags::MORE);
    }
    // There is room: it was counted.
    if let Err(frame) = batch.push(frame) {
        frames.put(frame);
    }
}

/// Frees the frames of the packet at the end of a batch, all of which are marked to have more behind them but
/// perhaps the last.
#[cold]
fn drop_last(frames: &mut FrameCache, batch: &mut Batch) {
    let mut last = true;
    while batch.as_slice().last().is_some_and(|frame| last || frame.has_more()) {
        last = false;
        if let Some(frame) = batch.pop() {
            frames.put(frame);
        }
    }
}

/// The header that a frame begins with; zeroes if it is too short.
#[inline(always)]
fn header_of(pool: &Pool, frame: &Frame) -> [u8; header::BYTES] {
    let bytes = pool.bytes(frame).first_chunk::<{ header::BYTES }>();
    bytes.copied().unwrap_or_default()
}

#[inline(always)]
fn word(header: [u8; header::BYTES], at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}

/// Notes what the header says with the frame, and takes the header off.
#[inline(always)]
fn note(pool: &Pool, parse: Parse, header_bytes: u32, frame: &mut Frame) {
    let header = header_of(pool, frame);
    let (mut meta, mut flags, mut known) = (FrameMeta::default(), FrameFlags::empty(), false);
    if parse.hashes
        && let Some(hash) = pool.bytes(frame).get(header::HASH..header::BYTES_WITH_HASH)
        && hash[header::HASH_KIND - header::HASH] != 0
    {
        meta.hash = u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]);
        known = true;
    }
    frame.trim_front(header_bytes as u16);
    if parse.checksums && header[0] & header::NEEDS_CHECKSUM != 0 {
        let (start, offset) = (word(header, header::CHECKSUM_START), word(header, header::CHECKSUM_OFFSET));
        // A place outside of the packet is a lie, which costs the checksum.
        if u32::from(start) + u32::from(offset) + 2 <= u32::from(frame.len()) {
            (meta.csum_start, meta.csum_offset) = (start, offset);
            flags = FrameFlags::TX_CHECKSUM | FrameFlags::RX_CHECKSUM_GOOD;
            known = true;
        }
    } else if parse.checksums && header[0] & header::CHECKSUM_VALID != 0 {
        flags = FrameFlags::RX_CHECKSUM_GOOD;
    }
    frame.set_flags(flags);
    if known {
        pool.set_meta(frame, meta);
    }
}
