//! What a port and its hot halves share: the function, its registers, and when all of it ends.
//!
//! Contract: the 82574 cannot take descriptors back from one queue while others run. So chunks of a stopped half
//! stay in custody until all halves have stopped; then the device is reset, can reach nothing any more, and
//! all custodies end. Only the process that opened the port touches the device so: a forked child that drops
//! or closes its copies changes nothing.

use super::chip::Chip;
use super::stats::E1000eStatistics;
use crate::pci::{DmaMemory, Function, Registers};
use isoplane_memory::{Collector, Lender, custody};
use nix::unistd::{Pid, getpid};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a half tells when it ends.
pub(super) trait Holder: Send + Sync + std::fmt::Debug {
    /// A receiving half does not look at its ring any more.
    fn rx_stopped(&self);
    /// A transmitting half does not look at its ring any more.
    fn tx_stopped(&self);
    /// Ends a custody when the device can reach nothing any more, now or later; says how many frames went to
    /// the depot now.
    fn sweep(&self, custody: (Lender, Collector)) -> u32;
}

/// See the [module](self).
pub(super) struct Device<F: Function> {
    pub(super) function: Mutex<F>,
    pub(super) chip: Chip<F::Bar>,
    opener: Pid,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Halves that have not stopped.
    rx: u16,
    tx: u16,
    /// The device does no DMA any more.
    quiet: bool,
    parked: Vec<(Lender, Collector)>,
    /// Rings. The device reaches those of stopped queues, too, until it is quiet.
    memory: Vec<Arc<dyn DmaMemory>>,
    totals: E1000eStatistics,
}

impl<F: Function> std::fmt::Debug for Device<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("address", &self.chip.address).finish_non_exhaustive()
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<F: Function> Device<F> {
    /// Takes charge of a function for that many queues.
    pub(super) fn new(function: F, chip: Chip<F::Bar>, queues: u16) -> Self {
        let state = State { rx: queues, tx: queues, ..State::default() };
        Self { function: Mutex::new(function), chip, opener: getpid(), state: Mutex::new(state) }
    }

    /// Is this the process that opened the port?
    pub(super) fn is_ours(&self) -> bool {
        getpid() == self.opener
    }

    /// Keeps rings as long as the device may reach them.
    pub(super) fn keep(&self, memory: &Arc<dyn DmaMemory>) {
        locked(&self.state).memory.push(Arc::clone(memory));
    }

    /// The statistics registers, read and so cleared, with what was read before.
    pub(super) fn statistics(&self) -> E1000eStatistics {
        let mut state = locked(&self.state);
        if self.is_ours() && !state.quiet && self.chip.is_there() {
            state.totals.collect(&self.chip.bar);
        }
        state.totals
    }

    fn quiesce(&self, state: &mut State) {
        if state.quiet || !self.is_ours() {
            return;
        }
        if self.chip.is_there() {
            state.totals.collect(&self.chip.bar);
        }
        let function = locked(&self.function);
        function.bus_master(false);
        let stopped = self.chip.stop();
        if let Err(error) = stopped
            && !function.gone()
            && let Err(why) = function.reset()
        {
            tracing::warn!(
                "{error}; nor can it be reset from outside ({why}): its frames stay in custody, since it may \
                 still write to them"
            );
            return;
        }
        state.quiet = true;
        for (lender, collector) in state.parked.drain(..) {
            custody::end(lender, collector);
        }
    }
}

impl<F: Function> Holder for Device<F> {
    fn rx_stopped(&self) {
        let mut state = locked(&self.state);
        state.rx = state.rx.saturating_sub(1);
        if state.rx == 0 && self.is_ours() {
            self.chip.receive(false);
        }
        if state.rx + state.tx == 0 {
            self.quiesce(&mut state);
        }
    }

    fn tx_stopped(&self) {
        let mut state = locked(&self.state);
        state.tx = state.tx.saturating_sub(1);
        if state.rx + state.tx == 0 {
            self.quiesce(&mut state);
        }
    }

    fn sweep(&self, (lender, collector): (Lender, Collector)) -> u32 {
        let mut state = locked(&self.state);
        if state.quiet {
            return custody::end(lender, collector);
        }
        state.parked.push((lender, collector));
        0
    }
}

impl<F: Function> Drop for Device<F> {
    fn drop(&mut self) {
        // Halves that were dropped and not closed keep their frames in custody; the device must end anyway.
        let mut state = std::mem::take(self.state.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.quiesce(&mut state);
        if !state.quiet {
            // The device, or the process that opened it, goes on with them.
            std::mem::forget(state.memory);
        }
    }
}

/// Registers of a chip that may be gone: bits set, others kept.
pub(super) fn change<R: Registers>(bar: &R, register: usize, clear: u32, set: u32) {
    let value = bar.read32(register);
    bar.write32(register, value & !clear | set);
}
