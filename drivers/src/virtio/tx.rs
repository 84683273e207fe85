//! The transmitting half.
//!
//! Contract: no system call, allocation, lock, panic or log; at most two batches of work a call. The header is
//! written into the chunk, right before the packet, so that a packet is one descriptor. What the device
//! could not send is never shown to it: such frames are counted and come back through `reclaim`.

use super::layout::header;
use super::queue::{AnyRing, End, Parked, Path, WORK, with_ring};
use super::ring::{Cursor, Ring, Word};
use crate::pci::{DmaSlice, Registers};
use crate::port::TxQueue;
use isoplane_memory::{Batch, Frame, FrameCache, FrameFlags, Pool, Survey};
use std::sync::atomic::{AtomicU64, Ordering};

/// Frames that a packet may have.
pub(super) const SEGMENTS: usize = 16;

/// The transmitting half of a virtio-net queue.
#[derive(Debug)]
pub struct VirtioTx<R: Registers> {
    live: Option<TxLive<R>>,
    parked: Option<Parked>,
    queue: u16,
    end: End,
    /// Frames that cannot be sent; `reclaim` gives them back.
    refused: Batch,
    /// Frames refused so far, and their bytes.
    refusals: (u64, u64),
    in_flight: usize,
    bad: u64,
}

// SAFETY: the frames inside stay with the half wherever it moves, and leave it only through its methods,
// to whoever has it then; everything else in it is `Send` by itself.
#[allow(unsafe_code, reason = "a half is handed to its worker's thread with what it holds")]
unsafe impl<R: Registers> Send for VirtioTx<R> {}

#[derive(Debug)]
struct TxLive<R> {
    ring: AnyRing,
    path: Path<R>,
    rules: TxRules,
    /// [`SEGMENTS`] descriptors for each id, when packets may have several frames.
    tables: Option<DmaSlice<AtomicU64>>,
}

/// What the device takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct TxRules {
    /// Bytes that a packet may have.
    pub(super) longest: u32,
    /// The device computes checksums.
    pub(super) checksum: bool,
}

/// What makes a frame take the slow path.
const ODD: FrameFlags = FrameFlags::MORE.union(FrameFlags::TX_CHECKSUM).union(FrameFlags::TX_TIMESTAMP);

impl<R: Registers> VirtioTx<R> {
    pub(super) fn new(
        queue: u16,
        ring: AnyRing,
        path: Path<R>,
        rules: TxRules,
        tables: Option<DmaSlice<AtomicU64>>,
        end: End,
    ) -> Self {
        let live = Some(TxLive { ring, path, rules, tables });
        let refused = Batch::new();
        Self { live, parked: None, queue, end, refused, refusals: (0, 0), in_flight: 0, bad: 0 }
    }
}

#[cfg(test)]
impl<R: Registers> VirtioTx<R> {
    /// Forgets what it did since it was launched.
    pub(super) fn forget(&mut self) {
        if let Some(TxLive { ring, path, .. }) = &mut self.live {
            with_ring!(ring, ring => ring.forget());
            (path.bad, path.told) = (0, 0);
        }
        self.bad = 0;
        self.refused = Batch::new();
        self.in_flight = 0;
    }
}

/// Sends single frames that want nothing special from the front of `batch`, up to the first that does or
/// until the ring is full; says how many.
#[inline(always)]
fn send_plain<const H: usize, Q: Ring, R: Registers>(
    ring: &mut Q,
    path: &Path<R>,
    rules: TxRules,
    batch: &mut Batch,
) -> u16 {
    let (cursor, base) = (ring.cursor(), path.base);
    let written = path.lender.head_each(batch, ring.free().into(), &[0; H], |n, frame, address| {
        let len = u32::from(frame.len());
        // An empty one is longer than all.
        let plain = !frame.flags().intersects(ODD) && len.wrapping_sub(1) < rules.longest;
        if plain {
            cursor.write_packet(n as u16, base + address, len + H as u32);
        }
        plain
    });
    if written != 0 {
        path.lender.lend_front(batch, written, ring.position(), written as u32);
        ring.publish(written as u16);
    }
    written as u16
}

/// What became of the first packet of a batch.
enum Sent {
    /// In the ring; so many frames.
    Frames(usize),
    /// It can never be sent; so many frames.
    Never(usize),
    /// It stays for now: the ring is full, or its end is not there.
    Stays,
}

/// Sends the first packet of a batch, whatever it is.
#[cold]
#[inline(never)]
fn send_odd<Q: Ring, R: Registers>(
    ring: &mut Q,
    path: &Path<R>,
    rules: TxRules,
    tables: Option<&DmaSlice<AtomicU64>>,
    batch: &mut Batch,
) -> Sent {
    let Some(last) = batch.iter().position(|frame| !frame.has_more()) else { return Sent::Stays };
    let packet = &mut batch.as_mut_slice()[..=last];
    let frames = packet.len();
    let pool = path.pool();
    let segments = if tables.is_some() { SEGMENTS } else { 1 };
    let bytes: u32 = packet.iter().map(|frame| u32::from(frame.len())).sum();
    let foreign = packet.iter().any(|frame| path.lender.address(frame).is_none());
    if foreign || ring.free() == 0 {
        // Wiring forbids frames of another pool.
        return Sent::Stays;
    }
    if frames > segments || bytes > rules.longest || packet.iter().any(|frame| frame.len() == 0) {
        return Sent::Never(frames);
    }
    let Some(header) = packet.first().and_then(|frame| header_of(pool, rules, frame)) else {
        return Sent::Never(frames);
    };
    let put = packet.first_mut().is_some_and(|frame| match path.header as usize {
        header::BYTES => {
            header.first_chunk().is_some_and(|h| put_header::<{ header::BYTES }>(pool, frame, h))
        }
        _ => put_header(pool, frame, &header),
    });
    if !put {
        return Sent::Never(frames);
    }
    let cursor = ring.cursor();
    let id = usize::from(cursor.id(0));
    let mut whole = (0, 0);
    for (n, frame) in packet.iter().enumerate() {
        let before = if n == 0 { path.header } else { 0 };
        let address = path.base + path.lender.address(frame).unwrap_or(0) - u64::from(before);
        let len = u32::from(frame.len()) + before;
        if let Some(tables) = tables.filter(|_| frames > 1) {
            let at = (id * SEGMENTS + n) * 2;
            tables.wrapped(at).store(address, Ordering::Relaxed);
            tables.wrapped(at + 1).store(Q::link(len, n as u16, n + 1 == frames), Ordering::Relaxed);
        }
        if n == 0 {
            whole = (address, len);
        }
    }
    match tables.filter(|_| frames > 1) {
        Some(tables) => {
            let at = tables.iova() + (id * SEGMENTS * 16) as u64;
            cursor.write_table(0, at, frames as u16);
        }
        None => cursor.write_packet(0, whole.0, whole.1),
    }
    path.lender.lend_front(batch, frames, ring.position(), 1);
    ring.publish(1);
    Sent::Frames(frames)
}

/// The header that a packet wants; `None` when that cannot be had.
fn header_of(pool: &Pool, rules: TxRules, first: &Frame) -> Option<[u8; header::BYTES_WITH_HASH]> {
    let mut bytes = [0; header::BYTES_WITH_HASH];
    if first.flags().contains(FrameFlags::TX_TIMESTAMP) {
        return None;
    }
    if first.flags().contains(FrameFlags::TX_CHECKSUM) {
        let meta = pool.meta(first).filter(|_| rules.checksum && first.flags().contains(FrameFlags::META))?;
        let end = u32::from(meta.csum_start) + u32::from(meta.csum_offset) + 2;
        if end > u32::from(first.len()) {
            return None;
        }
        bytes[0] = header::NEEDS_CHECKSUM;
        bytes[header::CHECKSUM_START..][..2].copy_from_slice(&meta.csum_start.to_le_bytes());
        bytes[header::CHECKSUM_OFFSET..][..2].copy_from_slice(&meta.csum_offset.to_le_bytes());
    }
    Some(bytes)
}

/// Writes the header before a packet; one that begins too far in front of its chunk is moved back.
fn put_header<const H: usize>(pool: &Pool, frame: &mut Frame, header: &[u8; H]) -> bool {
    if pool.prepend(frame, header) {
        return true;
    }
    let len = usize::from(frame.len());
    if !pool.grow_back(frame, H as u16) {
        return false;
    }
    let bytes = pool.bytes_mut(frame);
    if bytes.len() == len + H {
        bytes.copy_within(..len, H);
    }
    frame.trim_front(H as u16);
    pool.prepend(frame, header)
}

/// Shows every address that an id stands for.
fn addresses<Q: Ring>(ring: &Q, tables: Option<&DmaSlice<AtomicU64>>, id: u32, see: &mut dyn FnMut(u64)) {
    let segments = usize::from(ring.cursor().segments(id)).min(SEGMENTS);
    match tables.filter(|_| segments != 0) {
        Some(tables) => {
            let first = (id as usize & (usize::from(ring.size()) - 1)) * SEGMENTS;
            for n in first..first + segments {
                see(tables.wrapped(n * 2).load(Ordering::Relaxed));
            }
        }
        None => see(ring.cursor().address(id)),
    }
}

/// Takes back what the device is done with; says how many frames.
#[inline(always)]
fn collect<Q: Ring, R: Registers>(
    ring: &mut Q,
    path: &mut Path<R>,
    tables: Option<&DmaSlice<AtomicU64>>,
    frames: &mut FrameCache,
) -> usize {
    let ready = ring.ready(WORK);
    if ready == 0 {
        return 0;
    }
    let got = match tables {
        None => {
            let (cursor, base) = (ring.cursor(), path.base);
            let got = path.collector.collect_each(frames, ready.into(), |n| {
                let id = cursor.used(n as u16).id;
                cursor.retire(n as u16, id);
                cursor.address(id).wrapping_sub(base)
            });
            path.bad += u64::from(ready) - got as u64;
            got
        }
        Some(_) => (0..ready).map(|n| collect_one(ring, path, tables, n, frames)).sum(),
    };
    ring.consume(ready);
    got
}

/// Takes one entry back, which may stand for several frames.
#[inline(always)]
fn collect_one<Q: Ring, R: Registers>(
    ring: &Q,
    path: &mut Path<R>,
    tables: Option<&DmaSlice<AtomicU64>>,
    n: u16,
    frames: &mut FrameCache,
) -> usize {
    let id = ring.cursor().used(n).id;
    let mut got = 0;
    addresses(ring, tables, id, &mut |address| match path
        .collector
        .release_empty(frames, address.wrapping_sub(path.base))
    {
        Some(frame) => {
            frames.put(frame);
            got += 1;
        }
        None => path.bad += 1,
    });
    ring.cursor().retire(n, id);
    got
}

impl<R: Registers> TxQueue for VirtioTx<R> {
    #[inline(always)]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let Some(TxLive { ring, path, rules, tables }) = &mut self.live else { return 0 };
        with_ring!(ring, ring => {
            let (mut taken, mut entries) = (0, 0);
            while !batch.is_empty() {
                let plain = match path.header as usize {
                    header::BYTES => send_plain::<{ header::BYTES }, _, _>(ring, path, *rules, batch),
                    _ => send_plain::<{ header::BYTES_WITH_HASH }, _, _>(ring, path, *rules, batch),
                };
                taken += usize::from(plain);
                self.in_flight += usize::from(plain);
                entries += plain;
                if batch.is_empty() {
                    break;
                }
                match send_odd(ring, path, *rules, tables.as_ref(), batch) {
                    Sent::Frames(n) => {
                        taken += n;
                        self.in_flight += n;
                        entries += 1;
                    }
                    Sent::Never(n) if n <= self.refused.room() => {
                        let front = &batch.as_slice()[..n];
                        let bytes: u64 = front.iter().map(|frame| u64::from(frame.len())).sum();
                        self.refusals = (self.refusals.0 + n as u64, self.refusals.1 + bytes);
                        batch.move_to(&mut self.refused, n);
                        ring.shared().set(Word::Refused, self.refusals.0);
                        taken += n;
                    }
                    Sent::Never(_) | Sent::Stays => break,
                }
            }
            if entries != 0 {
                path.notify(ring, entries);
            }
            taken
        })
    }

    #[inline(always)]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        let Some(TxLive { ring, path, tables, .. }) = &mut self.live else { return 0 };
        let mut got = with_ring!(ring, ring => {
            let got = collect(ring, path, tables.as_ref(), frames);
            path.tell_bad(ring);
            got
        });
        self.bad = path.told;
        self.in_flight = self.in_flight.saturating_sub(got);
        if !self.refused.is_empty() {
            got += self.refused.len();
            frames.put_batch(&mut self.refused);
        }
        got
    }

    /// Frames that were empty, too long, of a packet in more frames than the port sends, or asking for what the
    /// device cannot do.
    #[inline(always)]
    fn refused(&self) -> (u64, u64) {
        self.refusals
    }

    #[inline(always)]
    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn bad_descriptors(&self) -> u64 {
        self.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        if let Some(TxLive { ring, path, tables, .. }) = &mut self.live {
            let tables = tables.as_ref();
            with_ring!(ring, ring => {
                path.survey(ring, survey, |ring, id, see| addresses(ring, tables, id.into(), see));
                self.refusals = (ring.shared().count(Word::Refused), 0);
            });
            self.bad = path.told;
            // The handles of refused frames died with the worker: the survey gives those back as free.
            self.refused = Batch::new();
            self.in_flight = survey.held(path.collector.id());
        }
    }

    fn stop(&mut self) {
        if let Some(TxLive { ring, path, tables, .. }) = self.live.take() {
            for frame in self.refused.drain() {
                // Into custody, which is swept. They are of this pool, or leak in their own.
                let _ = path.lender.commit(frame);
            }
            self.end.stop(self.queue);
            self.parked = Some(Parked { custody: (path.lender, path.collector), _memory: (ring, tables) });
        }
        self.in_flight = 0;
    }

    fn sweep(&mut self) -> u32 {
        self.parked.take().map_or(0, |parked| self.end.sweep(self.queue, parked))
    }
}
