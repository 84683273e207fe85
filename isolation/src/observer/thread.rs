//! A housekeeping thread that samples, for programs that have none of their own.

use super::{Finding, Observer};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// A thread that samples until this handle is dropped.
#[derive(Debug)]
pub struct Observing {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Observer>>,
}

impl Observer {
    /// Samples every `period` in a thread of its own and hands each finding to `found`. The thread may run
    /// where its maker may, but for the CPUs of isolated workers: it leaves those, also when a worker
    /// arms on another one later. A panic of `found` ends it.
    ///
    /// # Errors
    /// When the thread cannot be made.
    pub fn spawn(
        mut self,
        period: Duration,
        mut found: impl FnMut(&Finding) + Send + 'static,
    ) -> io::Result<Observing> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = Builder::new().name("observer".to_owned()).spawn(move || {
            let mut left = Vec::new();
            let mut next = Instant::now();
            while !seen.load(Ordering::Acquire) {
                self.locate();
                if self.cpus() != left {
                    left.clear();
                    left.extend_from_slice(self.cpus());
                    leave(&left);
                }
                self.sample().iter().for_each(&mut found);
                // Samples that were missed are not made up for. A period without end is one of an hour.
                let now = Instant::now();
                next = next.checked_add(period).unwrap_or(now + Duration::from_secs(3600)).max(now);
                while !seen.load(Ordering::Acquire) {
                    let rest = next.saturating_duration_since(Instant::now());
                    if rest.is_zero() {
                        break;
                    }
                    std::thread::park_timeout(rest);
                }
            }
            self
        })?;
        Ok(Observing { stop, thread: Some(thread) })
    }
}

/// Keeps the calling thread off these CPUs.
fn leave(cpus: &[u32]) {
    let me = Pid::from_raw(0);
    let result = sched_getaffinity(me).and_then(|mut set: CpuSet| {
        for cpu in cpus {
            set.unset(*cpu as usize)?;
        }
        sched_setaffinity(me, &set)
    });
    if let Err(error) = result {
        tracing::warn!(?cpus, %error, "the observer's thread may run on the CPUs of isolated workers: give its maker another CPU");
    }
}

impl Observing {
    /// Ends the thread and gives the observer back; `None` when the thread had panicked.
    #[must_use]
    pub fn stop(mut self) -> Option<Observer> {
        self.end()
    }

    fn end(&mut self) -> Option<Observer> {
        self.stop.store(true, Ordering::Release);
        let thread = self.thread.take()?;
        thread.thread().unpark();
        thread.join().ok()
    }
}

impl Drop for Observing {
    fn drop(&mut self) {
        self.end();
    }
}
