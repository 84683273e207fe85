//! The drainer: the housekeeping thread that turns the workers' log records into events of the program.
//!
//! Contract: it empties the rings every few milliseconds, and once more when the workers have stopped, so
//! that what a worker said before it ended is heard. Events lost to a full ring are said, once for each
//! time it happens, and counted in the statistics.

use isoplane_isolation::diagnostics::{Drainer, Source};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const DRAIN_EVERY: Duration = Duration::from_millis(5);
/// Looks at full rings before the thread sleeps, or ends.
const ROUNDS: u32 = 64;

/// Drains `sources` until `stop`, into the subscriber that the program had at the launch.
pub(crate) fn run(
    sources: Vec<Source>,
    clock: Option<isoplane_memory::Clock>,
    program: &tracing::Dispatch,
    stop: &AtomicBool,
) {
    let mut drainer = Drainer::new(clock);
    sources.into_iter().for_each(|source| drainer.add(source));
    let _default = tracing::dispatcher::set_default(program);
    loop {
        let last = stop.load(Ordering::Acquire);
        // Bounded, for a worker that logs faster than its lines can be written.
        for _ in 0..ROUNDS {
            if !drainer.drain().more {
                break;
            }
        }
        if last {
            return;
        }
        std::thread::sleep(DRAIN_EVERY);
    }
}
