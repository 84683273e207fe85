//! The watcher: the housekeeping thread that reports what happened to workers, follows the links and
//! publishes port statistics.
//!
//! Contract: it reads events of the zygote, control slots and ports, and writes the program's blocks of
//! the statistics segment; workers never wait for it.

use crate::control::{Control, Slot};
use crate::zygote::{self, Event};
use bytemuck::Zeroable;
use isoplane_drivers::{LinkState, Port, PortStatistics};
use isoplane_memory::stats::{Block, Field};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Program-written values about a worker.
pub(crate) const WORKER_FIELDS: [Field; 3] =
    [Field::gauge("state"), Field::gauge("pid"), Field::counter("restarts")];

/// Program-written values about a port; see [`PortStatistics`] and [`LinkState`].
pub(crate) const PORT_FIELDS: [Field; 9] = [
    Field::gauge("link"),
    Field::counter("port_rx_ring_full"),
    Field::counter("port_rx_no_frames"),
    Field::counter("port_rx_dropped"),
    Field::counter("port_tx_invalid"),
    Field::counter("port_tx_ring_empty"),
    Field::counter("port_bad_descriptors"),
    Field::counter("port_kicks"),
    Field::counter("port_kick_errors"),
];

const WATCH_EVERY: Duration = Duration::from_millis(50);

/// What the program's threads share.
pub(crate) struct Shared {
    pub(crate) names: Vec<String>,
    pub(crate) control: Control,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) zygote_dead: AtomicBool,
    pub(crate) ports: Mutex<Vec<Box<dyn Port>>>,
    pub(crate) last_words: Mutex<Vec<Option<String>>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Housekeeping data stays valid whatever panicked while it was locked.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Watches until `stop`.
    pub(crate) fn watch(&self, events: Option<&OwnedFd>, workers: &[Block], ports: &[Block]) {
        let mut links = vec![LinkState::Unknown; ports.len()];
        while !self.stop.load(Ordering::Relaxed) {
            match events {
                Some(events) => self.listen(events, WATCH_EVERY),
                None => std::thread::sleep(WATCH_EVERY),
            }
            self.publish(workers, ports, &mut links);
        }
    }

    /// Waits up to `patience` for events of the zygote and reports them.
    fn listen(&self, events: &OwnedFd, patience: Duration) {
        if self.zygote_dead.load(Ordering::Acquire) {
            std::thread::sleep(patience);
            return;
        }
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::from(50u8));
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut fds, timeout), Ok(n) if n > 0) {
            return;
        }
        loop {
            let mut event = Event::zeroed();
            match recv(events.as_raw_fd(), bytemuck::bytes_of_mut(&mut event), MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return self.zygote_ended(),
                Ok(_) => self.report(&event),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(_) => return self.zygote_ended(),
            }
        }
    }

    /// The zygote's end of the socket is closed: it has ended, as asked or not.
    fn zygote_ended(&self) {
        let all_final = self.control.slots().all(|slot| slot.state().is_final());
        let asked = self.control.slots().all(Slot::must_stop);
        if all_final || asked {
            // As asked; stop reading.
            std::thread::sleep(Duration::from_millis(5));
            return;
        }
        tracing::error!("the zygote died unasked, and the workers with it");
        self.zygote_dead.store(true, Ordering::Release);
    }

    fn report(&self, event: &Event) {
        let index = event.worker as usize;
        let Some(worker) = self.names.get(index) else { return };
        let how = match event.status {
            signal @ 256.. => format!("signal {}", signal - 256),
            code => format!("exit code {code}"),
        };
        let words = if matches!(event.kind, zygote::DIED | zygote::GIVEN_UP) {
            let words = self.control.slot(index).hear();
            if words.is_some() {
                lock(&self.last_words)[index].clone_from(&words);
            }
            words.unwrap_or_default()
        } else {
            String::new()
        };
        let (pid, pause) = (event.pid, event.pause_ms);
        match event.kind {
            zygote::STARTED => tracing::debug!(worker, pid, "started"),
            zygote::STOPPED => tracing::debug!(worker, pid, "stopped"),
            zygote::DIED => {
                tracing::warn!(worker, pid, "worker died ({how}); starting it again in {pause} ms. {words}");
            }
            zygote::GIVEN_UP => tracing::error!(worker, pid, "worker died ({how}); given up. {words}"),
            zygote::FORK_FAILED => {
                let errno = Errno::from_raw(event.status as i32);
                tracing::error!(worker, "cannot fork the worker ({errno}); trying again in {pause} ms");
            }
            _ => {}
        }
    }

    fn publish(&self, workers: &[Block], ports: &[Block], links: &mut [LinkState]) {
        for (slot, block) in self.control.slots().zip(workers) {
            block.set(0, u64::from(slot.state() as u32));
            block.set(1, u64::from(slot.pid()));
            block.set(2, u64::from(slot.starts().saturating_sub(1)));
        }
        for ((port, block), last) in lock(&self.ports).iter().zip(ports).zip(links) {
            let link = port.link();
            if link != *last {
                match link {
                    LinkState::Gone => tracing::error!(port = port.name(), "the interface is gone"),
                    LinkState::Down => tracing::warn!(port = port.name(), "link down"),
                    _ if *last == LinkState::Unknown => tracing::debug!(port = port.name(), "link {link:?}"),
                    LinkState::Up | LinkState::Unknown => tracing::info!(port = port.name(), "link {link:?}"),
                }
                *last = link;
            }
            let PortStatistics {
                rx_ring_full,
                rx_no_frames,
                rx_dropped,
                tx_invalid,
                tx_ring_empty,
                bad_descriptors,
                kicks,
                kick_errors,
            } = port.statistics();
            let values = [
                link as u64,
                rx_ring_full,
                rx_no_frames,
                rx_dropped,
                tx_invalid,
                tx_ring_empty,
                bad_descriptors,
                kicks,
                kick_errors,
            ];
            for (at, value) in values.into_iter().enumerate() {
                block.set(at, value);
            }
        }
    }
}
