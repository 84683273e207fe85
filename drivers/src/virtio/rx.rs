//! The receiving half.
//!
//! ```text
//! chunk | metadata | headroom | colour | header | packet ...            |
//!                                      ^ what the device is told: one buffer, one descriptor
//! ```
//!
//! Contract: no system call, allocation, lock, panic or log; at most two batches of work a call. The header comes
//! to lie where packets of ours start, if the chunk is long enough, so that it shares a line with the
//! packet's own headers. In plain mode it is not looked at.

use super::parse::{self, Parse};
use super::queue::{AnyRing, End, Parked, Path, WORK, with_ring};
use super::ring::{Cursor, Ring};
use super::transport::Doorbell;
use crate::pci::Registers;
use crate::port::RxQueue;
use isoplane_memory::{Batch, FrameCache, Survey};

/// The receiving half of a virtio-net queue.
#[derive(Debug)]
pub struct VirtioRx<R: Registers> {
    live: Option<RxLive<R>>,
    parked: Option<Parked>,
    queue: u16,
    end: End,
    bad: u64,
}

#[derive(Debug)]
struct RxLive<R> {
    ring: AnyRing,
    path: Path<R>,
    rules: RxRules,
}

/// How packets lie in chunks, and what is looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct RxRules {
    /// Bytes before a chunk's start offset that a buffer begins at.
    pub(super) lead: u32,
    /// Free entries that make refilling worth while.
    pub(super) refill: u16,
    /// What of headers counts; `None` is plain mode.
    pub(super) parse: Option<Parse>,
}

impl<R: Registers + Clone> VirtioRx<R> {
    pub(super) fn new(queue: u16, ring: AnyRing, path: Path<R>, rules: RxRules, end: End) -> Self {
        Self { live: Some(RxLive { ring, path, rules }), parked: None, queue, end, bad: 0 }
    }

    /// Fills the ring from the pool's depot, before the device runs; says how many frames that took.
    pub(super) fn prime(&mut self) -> usize {
        let Some(live) = &mut self.live else { return 0 };
        let RxLive { ring, path, rules } = live;
        with_ring!(ring, ring => {
            let pool = path.lender.pool();
            let drawn = pool.draw(&path.lender, usize::from(ring.free()));
            for (n, address) in (0..).zip(&drawn) {
                let chunk = (address >> pool.chunk_shift()) as u32;
                let start = address + u64::from(pool.start_offset(chunk));
                ring.cursor().write_buffer(n, path.base + start - u64::from(rules.lead));
            }
            ring.publish(drawn.len() as u16);
            drawn.len()
        })
    }

    /// Tells the device that there are buffers, once it runs.
    pub(super) fn doorbell(&self) -> Option<Doorbell<R>> {
        self.live.as_ref().map(|live| live.path.doorbell.clone())
    }
}

#[cfg(test)]
impl<R: Registers> VirtioRx<R> {
    /// Forgets what it did since it was launched.
    pub(super) fn forget(&mut self) {
        if let Some(RxLive { ring, path, .. }) = &mut self.live {
            with_ring!(ring, ring => ring.forget());
            (path.bad, path.told) = (0, 0);
        }
        self.bad = 0;
    }
}

/// Receives packets of one buffer each, headers unread.
#[inline(always)]
fn receive_plain<Q: Ring, R: Registers>(
    ring: &mut Q,
    path: &mut Path<R>,
    frames: &FrameCache,
    batch: &mut Batch,
) -> usize {
    let ready = ring.ready(batch.room() as u16);
    if ready == 0 {
        return 0;
    }
    let before = batch.len();
    let (cursor, header) = (ring.cursor(), path.header);
    let shift = path.base.wrapping_sub(header.into());
    let lies = path.collector.release_each(frames, batch, ready.into(), |n| {
        let used = cursor.used(n as u16);
        cursor.retire(n as u16, used.id);
        // One that is shorter than a header becomes one that is longer than a chunk.
        (cursor.address(used.id).wrapping_sub(shift), used.len.wrapping_sub(header))
    });
    path.bad += lies as u64;
    ring.consume(ready);
    batch.len() - before
}

/// Gives the device free frames, as far as there are any.
#[inline(always)]
fn refill<Q: Ring, R: Registers>(ring: &mut Q, path: &Path<R>, rules: RxRules, frames: &mut FrameCache) {
    let want = ring.free();
    if want < rules.refill {
        return;
    }
    let (cursor, shift) = (ring.cursor(), path.base.wrapping_sub(rules.lead.into()));
    let given = path.lender.lend_free(frames, want.min(WORK).into(), ring.position(), |n, address| {
        cursor.write_buffer(n as u16, shift.wrapping_add(address));
    }) as u16;
    if given != 0 {
        ring.publish(given);
        path.notify(ring, given);
    }
}

impl<R: Registers> RxQueue for VirtioRx<R> {
    #[inline(always)]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let Some(RxLive { ring, path, rules }) = &mut self.live else { return 0 };
        with_ring!(ring, ring => {
            let got = match rules.parse {
                None => receive_plain(ring, path, frames, batch),
                Some(parse) => parse::receive(ring, path, parse, frames, batch),
            };
            refill(ring, path, *rules, frames);
            path.tell_bad(ring);
            self.bad = path.told;
            got
        })
    }

    fn bad_descriptors(&self) -> u64 {
        self.bad
    }

    fn survey(&mut self, survey: &mut Survey) {
        if let Some(RxLive { ring, path, .. }) = &mut self.live {
            with_ring!(ring, ring => path.survey(ring, survey, |ring, id, see| see(ring.cursor().address(id.into()))));
            self.bad = path.told;
        }
    }

    fn stop(&mut self) {
        if let Some(RxLive { ring, path, .. }) = self.live.take() {
            self.end.stop(self.queue);
            self.parked = Some(Parked { custody: (path.lender, path.collector), _memory: (ring, None) });
        }
    }

    fn sweep(&mut self) -> u32 {
        self.parked.take().map_or(0, |parked| self.end.sweep(self.queue, parked))
    }
}
