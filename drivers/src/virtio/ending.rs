//! The device behind a port and its halves, and how it comes to an end.
//!
//! Contract: frames leave custody, and the memory of rings is freed, only when the device has let go: its queue
//! was reset, where it can do that for one, or all of it. So without that feature the frames of a queue stay
//! in custody until the last queue of the port is closed. A device that does not come to an end keeps both, and
//! that is said. Only the process that opened the device ends it; others that inherited it by fork do nothing.

use super::control::Control;
use super::queue::Parked;
use super::transport::{Doorbell, Transport};
use crate::pci::{DmaMemory, Function};
use isoplane_memory::custody;
use nix::unistd::{Pid, getpid};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How a half tells that it ends.
pub(super) trait Ending: Send + Sync + std::fmt::Debug {
    /// The half of this virtqueue will touch its ring no more.
    fn stop(&self, queue: u16);
    /// Ends the custody of a half, and those of halves before it that could not be ended yet. Says how many
    /// frames went to the depot.
    fn sweep(&self, queue: u16, parked: Parked) -> u32;
}

/// A device that runs.
pub(super) struct Device<F: Function> {
    opener: Pid,
    inner: Mutex<Inner<F>>,
}

impl<F: Function> std::fmt::Debug for Device<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("opener", &self.opener).finish_non_exhaustive()
    }
}

pub(super) struct Inner<F: Function> {
    pub(super) function: F,
    pub(super) transport: Transport<F::Bar>,
    pub(super) control: Option<Control<F::Bar>>,
    /// Doorbells of the TX rings.
    pub(super) senders: Vec<Doorbell<F::Bar>>,
    /// The configuration's generation when they were last rung for it.
    woken: Option<u8>,
    /// Queues can be reset one by one.
    ring_reset: bool,
    /// Halves that have not stopped.
    running: usize,
    /// Virtqueues that the device has let go of.
    quiet: Vec<u16>,
    /// The device has let go of everything.
    over: bool,
    /// The device does not come to an end.
    stuck: bool,
    parked: Vec<(u16, Parked)>,
    /// Rings and tables. Those of halves that were dropped and not closed, too, are the device's until it is over.
    pub(super) memory: Vec<Arc<dyn DmaMemory>>,
}

impl<F: Function> Device<F> {
    pub(super) fn new(function: F, transport: Transport<F::Bar>, ring_reset: bool) -> Self {
        let inner = Inner {
            function,
            transport,
            control: None,
            senders: Vec::new(),
            woken: None,
            ring_reset,
            running: 0,
            quiet: Vec::new(),
            over: false,
            stuck: false,
            parked: Vec::new(),
            memory: Vec::new(),
        };
        Self { opener: getpid(), inner: Mutex::new(inner) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner<F>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One half more is there to be stopped.
    pub(super) fn add_half(&self) {
        self.lock().running += 1;
    }

    pub(super) fn is_ours(&self) -> bool {
        self.opener == getpid()
    }
}

impl<F: Function> Inner<F> {
    /// Makes the device let go of everything.
    fn shut_down(&mut self) {
        if self.over || self.stuck {
            return;
        }
        self.function.bus_master(false);
        match end_device(&self.function, &self.transport) {
            Ok(()) => self.over = true,
            Err(error) => {
                self.stuck = true;
                let address = self.function.address();
                tracing::warn!(address, "frames and rings stay with the device: {error}");
            }
        }
    }

    /// The link is up: if the configuration has changed, it may have been down. QEMU (7.2) asks for no doorbells
    /// while it is, and of packed rings forgets to ask again, so that nothing would ever be sent.
    pub(super) fn wake_senders(&mut self) {
        let generation = Some(self.transport.generation());
        if self.woken != generation && !self.over {
            self.woken = generation;
            self.senders.iter().for_each(Doorbell::ring);
        }
    }

    fn end_parked(&mut self) -> u32 {
        let (over, quiet) = (self.over, std::mem::take(&mut self.quiet));
        let (done, rest) =
            std::mem::take(&mut self.parked).into_iter().partition(|(q, _)| over || quiet.contains(q));
        (self.parked, self.quiet) = (rest, quiet);
        let ended = |(_, parked): (u16, Parked)| custody::end(parked.custody.0, parked.custody.1);
        Vec::into_iter(done).map(ended).sum()
    }
}

/// Resets a device by its own register, or failing that by its function.
pub(super) fn end_device<F: Function>(
    function: &F,
    transport: &Transport<F::Bar>,
) -> Result<(), super::VirtioError> {
    let Err(error) = transport.reset() else { return Ok(()) };
    if function.gone() || function.reset().is_ok() { Ok(()) } else { Err(error) }
}

impl<F: Function + 'static> Ending for Device<F> {
    fn stop(&self, queue: u16) {
        if !self.is_ours() {
            return;
        }
        let mut inner = self.lock();
        inner.running = inner.running.saturating_sub(1);
        if inner.ring_reset && !inner.over {
            match inner.transport.reset_queue(queue) {
                Ok(()) => inner.quiet.push(queue),
                Err(error) => tracing::warn!(queue, "{error}"),
            }
        }
        if inner.running == 0 {
            inner.shut_down();
        }
    }

    fn sweep(&self, queue: u16, parked: Parked) -> u32 {
        if !self.is_ours() {
            // The opener has a copy of it, and ends that one.
            std::mem::forget(parked);
            return 0;
        }
        let mut inner = self.lock();
        inner.parked.push((queue, parked));
        inner.end_parked()
    }
}

impl<F: Function> Drop for Device<F> {
    fn drop(&mut self) {
        let ours = self.is_ours();
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        if ours {
            inner.shut_down();
            inner.end_parked();
        }
        if inner.stuck || !ours {
            // The device may still write to them.
            std::mem::forget(std::mem::take(&mut inner.parked));
            std::mem::forget(inner.control.take());
            std::mem::forget(std::mem::take(&mut inner.memory));
        }
    }
}
