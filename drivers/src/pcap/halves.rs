//! The hot halves: packets copied out of the recording into frames, and out of frames into the ring of packets that
//! wait to be written.
//!
//! Contract: no system call but in `kick`; no allocation, lock, panic or log; at most a batch of packets a call. Frames
//! never leave the worker.

use super::film::Film;
use super::writer::Writer;
use crate::capture::{Direction, Recorder};
use crate::null::NullTx;
use crate::port::{KickError, RxQueue, TxQueue};
use isoplane_memory::{Batch, Clock, FrameCache, FrameFlags, Kernel, Pool, Survey};
use std::sync::{Arc, Mutex};

/// How a recording is played.
#[derive(Debug, Clone)]
pub(super) struct Show {
    pub(super) film: Film,
    /// Again and again, or once.
    pub(super) again: bool,
    /// With its own times, or as fast as they are taken.
    pub(super) clock: Option<Clock>,
}

/// The receiving half: plays the recording.
#[derive(Debug)]
pub struct PcapRx {
    show: Option<Show>,
    pool: Arc<Pool>,
}

impl PcapRx {
    pub(super) fn new(show: Option<Show>, pool: &Arc<Pool>) -> Self {
        Self { show, pool: Arc::clone(pool) }
    }
}

impl RxQueue for PcapRx {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let Some(show) = &self.show else { return 0 };
        let film = &show.film;
        let before = batch.len();
        let first = film.played();
        let (mut round, mut number) = (first / film.packets(), first % film.packets());
        let mut played = first;
        let elapsed = show.clock.map(|clock| {
            let now = clock.nanos();
            now.saturating_sub(film.started(now))
        });
        while batch.room() != 0 && (show.again || round == 0) {
            let Some(shot) = film.shot(number) else { break };
            let due = round.saturating_mul(film.period()).saturating_add(shot.time);
            if elapsed.is_some_and(|elapsed| elapsed < due) {
                break;
            }
            let step = self.pool.max_frame() as usize;
            let parts = (shot.len as usize).div_ceil(step);
            if parts > batch.room() || parts > frames.len() {
                break;
            }
            for part in 0..parts {
                let (from, Some(mut frame)) = (part * step, frames.get()) else { break };
                let len = step.min(shot.len as usize - from);
                // A part is no longer than a frame; if the recording is damaged the packet holds what the chunk held.
                self.pool.reset(&mut frame, len as u16);
                film.copy(&shot, from, self.pool.bytes_mut(&mut frame));
                if part + 1 < parts {
                    frame.set_flags(FrameFlags::MORE);
                }
                if let Err(frame) = batch.push(frame) {
                    frames.put(frame);
                }
            }
            played = played.wrapping_add(1);
            number += 1;
            if number == film.packets() {
                (round, number) = (round + 1, 0);
            }
        }
        if played != first {
            film.set_played(played);
        }
        batch.len() - before
    }

    fn survey(&mut self, _survey: &mut Survey) {}

    fn stop(&mut self) {
        self.show = None;
    }

    fn sweep(&mut self) -> u32 {
        0
    }
}

/// The transmitting half: copies packets for the writer, or swallows them when there is no file to write. A packet for
/// which there is no room stays in the batch.
#[derive(Debug)]
pub struct PcapTx {
    recorder: Option<Recorder>,
    writer: Option<Arc<Mutex<Writer>>>,
    sent: NullTx,
    pool: Arc<Pool>,
}

impl PcapTx {
    pub(super) fn new(output: Option<(Recorder, Arc<Mutex<Writer>>)>, pool: &Arc<Pool>) -> Self {
        let (recorder, writer) = output.unzip();
        Self { recorder, writer, sent: NullTx::new(pool), pool: Arc::clone(pool) }
    }
}

impl TxQueue for PcapTx {
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        let Some(recorder) = &mut self.recorder else { return self.sent.transmit(batch) };
        let staged = recorder.stage(&self.pool, batch.as_slice(), Direction::Tx);
        let fit = batch.whole_packets(staged.before_a_miss(batch.len()));
        if fit == batch.len() {
            let n = self.sent.transmit(batch);
            recorder.publish(&staged, n);
            return n;
        }
        // Those for which there is room go, and what they leave over comes back in front of the others.
        let mut first = Batch::new();
        batch.move_to(&mut first, fit);
        let n = self.sent.transmit(&mut first);
        recorder.publish(&staged, n);
        let rest = batch.len();
        batch.move_to(&mut first, rest);
        std::mem::swap(batch, &mut first);
        n
    }

    #[inline]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        self.sent.reclaim(frames)
    }

    #[inline]
    fn wants_kick(&self) -> bool {
        self.recorder.as_ref().is_some_and(Recorder::has_waiting)
    }

    fn kick(&mut self, _kernel: &Kernel) -> Result<(), KickError> {
        self.writer.as_ref().map_or(Ok(()), |writer| super::writer::write_some(writer).map(drop))
    }

    fn in_flight(&self) -> usize {
        self.sent.in_flight()
    }

    fn survey(&mut self, survey: &mut Survey) {
        if let Some(recorder) = &mut self.recorder {
            recorder.resync();
        }
        self.sent.survey(survey);
    }

    fn stop(&mut self) {
        self.sent.stop();
    }

    fn sweep(&mut self) -> u32 {
        self.sent.sweep()
    }
}
