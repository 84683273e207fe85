//! The decorators: whatever half they wrap, what passes it is recorded.

use super::{Direction, Recorder};
use crate::port::{KickError, RxQueue, TxQueue};
use isoplane_memory::{Batch, FrameCache, Kernel, Pool, Survey};
use std::sync::Arc;

/// A receiving half that records what arrives.
#[derive(Debug)]
pub struct CaptureRx<R> {
    inner: R,
    pool: Arc<Pool>,
    recorder: Recorder,
}

impl<R: RxQueue> CaptureRx<R> {
    /// Wraps a half. `pool` is that of its port.
    #[must_use]
    pub fn new(inner: R, pool: &Arc<Pool>, recorder: Recorder) -> Self {
        Self { inner, pool: Arc::clone(pool), recorder }
    }
}

impl<R: RxQueue> RxQueue for CaptureRx<R> {
    #[inline]
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let had = batch.len();
        let received = self.inner.receive(frames, batch);
        if let Some(arrived) = batch.as_slice().get(had..) {
            let staged = self.recorder.stage(&self.pool, arrived, Direction::Rx);
            self.recorder.publish(&staged, received);
        }
        received
    }
    fn wants_kick(&self) -> bool {
        self.inner.wants_kick()
    }
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        self.inner.kick(kernel)
    }
    fn bad_descriptors(&self) -> u64 {
        self.inner.bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.recorder.resync();
        self.inner.survey(survey);
    }
    fn stop(&mut self) {
        self.inner.stop();
    }
    fn sweep(&mut self) -> u32 {
        self.inner.sweep()
    }
}

/// A transmitting half that records what it sends.
///
/// A frame that was handed over cannot be read any more, and how many the inner half takes is known
/// only after: so all are recorded before, and only the records of those taken are made visible.
#[derive(Debug)]
pub struct CaptureTx<T> {
    inner: T,
    pool: Arc<Pool>,
    recorder: Recorder,
}

impl<T: TxQueue> CaptureTx<T> {
    /// Wraps a half. `pool` is that of its port.
    #[must_use]
    pub fn new(inner: T, pool: &Arc<Pool>, recorder: Recorder) -> Self {
        Self { inner, pool: Arc::clone(pool), recorder }
    }
}

impl<T: TxQueue> TxQueue for CaptureTx<T> {
    #[inline]
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        if batch.is_empty() {
            return 0;
        }
        let staged = self.recorder.stage(&self.pool, batch.as_slice(), Direction::Tx);
        let sent = self.inner.transmit(batch);
        self.recorder.publish(&staged, sent);
        sent
    }
    #[inline]
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        self.inner.reclaim(frames)
    }
    fn wants_kick(&self) -> bool {
        self.inner.wants_kick()
    }
    fn kick(&mut self, kernel: &Kernel) -> Result<(), KickError> {
        self.inner.kick(kernel)
    }
    fn refused(&self) -> (u64, u64) {
        self.inner.refused()
    }
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
    fn bad_descriptors(&self) -> u64 {
        self.inner.bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.recorder.resync();
        self.inner.survey(survey);
    }
    fn stop(&mut self) {
        self.inner.stop();
    }
    fn sweep(&mut self) -> u32 {
        self.inner.sweep()
    }
}
