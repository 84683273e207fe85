//! What a port, its two hot halves and its kickers share about one queue.
//!
//! Contract: the socket is closed when both halves have stopped, even though the port lives on and a
//! kicker may look at any time; frames leave custody only after it is closed.

use super::layout::Statistics;
use super::release::Probe;
use super::socket::Socket;
use crate::port::{KickError, KickTarget, Kicked};
use isoplane_memory::{Collector, Kernel, Lender};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// One queue.
#[derive(Debug)]
pub(super) struct Slot {
    /// `None` once both halves have stopped.
    socket: Mutex<Option<Arc<Socket>>>,
    alive: Weak<Socket>,
    halves: AtomicU32,
    last: Mutex<Totals>,
    /// In zero-copy mode: tells when the device has let go.
    probe: Mutex<Option<Probe>>,
}

/// How long the frames of a closed queue are waited for.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a queue counted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) kernel: Statistics,
    pub(super) kicks: u64,
    pub(super) kick_errors: u64,
    pub(super) bad: u64,
    pub(super) refused: u64,
}

impl Slot {
    pub(super) fn new(socket: &Arc<Socket>) -> Arc<Self> {
        Arc::new(Self {
            socket: Mutex::new(Some(Arc::clone(socket))),
            alive: Arc::downgrade(socket),
            halves: AtomicU32::new(2),
            last: Mutex::new(Totals::default()),
            probe: Mutex::new(None),
        })
    }

    /// One half has let go of rings and socket.
    pub(super) fn half_stopped(&self) {
        if self.halves.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.totals();
            // Dropped here: rings unmapped, descriptor closed.
            self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    /// The socket's descriptor, while a half is open.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.as_ref().map(|socket| socket.as_fd().as_raw_fd())
    }

    /// From now on a custody ends only when the probe has found the queue free.
    pub(super) fn guard(&self, probe: Probe) {
        *self.probe.lock().unwrap_or_else(PoisonError::into_inner) = Some(probe);
    }

    /// Ends a custody once nobody in this process has the socket any more (a kicker holds it for no
    /// longer than one look), nor the device the chunks.
    pub(super) fn sweep(&self, custody: Option<(Lender, Collector)>) -> u32 {
        let Some((lender, collector)) = custody else { return 0 };
        let deadline = Instant::now() + PATIENCE;
        while self.alive.strong_count() != 0 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let mut probe = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.alive.strong_count() == 0 && probe.as_ref().is_none_or(|probe| probe.wait(PATIENCE));
        if !free {
            tracing::warn!(
                frames = collector.held(),
                "an AF_XDP queue that was closed is still in use; its frames stay in custody"
            );
            return 0;
        }
        // The other half finds it free too.
        *probe = None;
        drop(probe);
        isoplane_memory::custody::end(lender, collector)
    }

    /// Totals, now or when the queue was closed.
    pub(super) fn totals(&self) -> Totals {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = &*self.socket.lock().unwrap_or_else(PoisonError::into_inner) {
            let (kicks, kick_errors) = socket.kicks();
            let kernel = socket.statistics().unwrap_or(last.kernel);
            *last = Totals { kernel, kicks, kick_errors, bad: socket.bad(), refused: socket.refused() };
        }
        *last
    }

    pub(super) fn kick_target(self: &Arc<Self>) -> XdpKick {
        XdpKick { socket: Weak::clone(&self.alive) }
    }
}

/// A queue as its kicker sees it. Works in any process that has the socket.
#[derive(Debug)]
pub struct XdpKick {
    socket: Weak<Socket>,
}

impl KickTarget for XdpKick {
    fn poll(&mut self, _kernel: &Kernel) -> Result<Kicked, KickError> {
        let Some(socket) = self.socket.upgrade() else { return Ok(Kicked::Idle) };
        let fill = if socket.rx_wants_kick() { socket.kick_rx() } else { Ok(()) };
        if socket.tx_wants_kick() {
            let waiting = socket.kick_tx()?;
            return fill.map(|()| Kicked::Kicked { waiting });
        }
        fill.map(|()| Kicked::Idle)
    }
}
