//! The kicker: a housekeeping thread that tells the kernel that rings have work, so that workers never
//! make that system call.
//!
//! Contract: it looks at each ring's shared indices in turn and kicks when there is something; after
//! [`SPINS`] looks at all rings without work it gives its CPU away once per look. The time between a
//! look that found nothing and the next one that found work bounds the delay that it adds; that time
//! is recorded.

use crate::worker::Time;
use isoplane_drivers::{KickError, KickTarget, Kicked};
use isoplane_memory::Kernel;
use isoplane_memory::stats::{Block, Field};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Looks without work before the kicker yields.
pub const SPINS: u32 = 1000;

/// Words of the kicker's counter block.
pub mod field {
    use super::Field;
    /// Kicks made.
    pub const KICKS: usize = 0;
    /// Kicks that failed for good.
    pub const ERRORS: usize = 1;
    /// Times it gave its CPU away.
    pub const YIELDS: usize = 2;
    /// Histogram: for each kick, the longest time that its work can have waited for it, in nanoseconds.
    pub const DELAY: usize = 3;
    /// The fields, in order.
    pub const FIELDS: [Field; 4] = [
        Field::counter("kicker_kicks"),
        Field::counter("kicker_errors"),
        Field::counter("kicker_yields"),
        Field::histogram("kicker_delay_ns"),
    ];
}

/// One queue to look after.
pub(crate) struct Target {
    pub(crate) port: String,
    pub(crate) kick: Box<dyn KickTarget>,
}

/// Looks after `targets` until `stop`.
pub(crate) fn run(targets: Vec<Target>, block: &Block, time: Time, stop: &Arc<AtomicBool>) {
    let kernel = Kernel::outside_isolation();
    let mut targets: Vec<(Target, u64, Option<KickError>)> =
        targets.into_iter().map(|target| (target, time.now(), None)).collect();
    let mut idle = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut worked = false;
        for (target, last_idle, last_error) in &mut targets {
            let now = time.now();
            match target.kick.poll(&kernel) {
                Ok(Kicked::Idle) => *last_idle = now,
                Ok(Kicked::Kicked { .. }) => {
                    worked = true;
                    block.add(field::KICKS, 1);
                    block.record(field::DELAY, now.saturating_sub(*last_idle));
                    *last_idle = now;
                    *last_error = None;
                }
                Err(error) => {
                    block.add(field::ERRORS, 1);
                    if *last_error != Some(error) {
                        tracing::warn!(port = target.port, "kick failed: {error}");
                        *last_error = Some(error);
                    }
                }
            }
        }
        if worked {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle > SPINS {
            block.add(field::YIELDS, 1);
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}
