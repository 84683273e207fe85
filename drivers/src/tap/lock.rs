//! Who moves packets: a kicker of the program, or the worker itself, never both at once.
//!
//! Contract: a word in shared memory that holds the process id of whoever works. Nobody waits for it but who closes or
//! surveys a queue. One whose holder has died is taken over: what it had not finished is still given, see `layout`.

use super::layout::Lane;
use super::sys;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long one who closes waits for one who moves packets, at most a batch of them.
const PATIENCE: Duration = Duration::from_secs(1);

/// The right to move a lane's packets, until it is dropped.
#[derive(Debug)]
pub(super) struct Held<'l> {
    lane: &'l Lane,
    me: u32,
}

impl<'l> Held<'l> {
    /// Takes it if nobody alive has it.
    pub(super) fn take(lane: &'l Lane) -> Option<Self> {
        let me = std::process::id();
        let word = lane.lock();
        let swap = |from| word.compare_exchange(from, me, Ordering::AcqRel, Ordering::Acquire);
        let holder = match swap(0) {
            Ok(_) => return Some(Self { lane, me }),
            Err(holder) => holder,
        };
        // Another thread of this process is alive as long as this one is.
        if holder == me || sys::is_alive(holder) {
            return None;
        }
        swap(holder).is_ok().then_some(Self { lane, me })
    }

    /// Takes it, and waits for it; `None` after a second.
    pub(super) fn wait(lane: &'l Lane) -> Option<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(held) = Self::take(lane) {
                return Some(held);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Only if it is still ours: one that thought us dead keeps it.
        let _ = self.lane.lock().compare_exchange(self.me, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}
