//! The observer: the housekeeping thread that counts what interrupted isolated workers, and publishes
//! what their status blocks say.
//!
//! Contract: it looks every 50 ms, from a CPU that is not a worker's, and disturbs none of them; it
//! writes the workers' "isolation" blocks of the statistics segment, and a line of log for each event
//! that a user may want to know of. Workers report their breaches themselves; those of a worker that
//! is dead and will not be started again are reported here.

use crate::control::Control;
use crate::watcher::lock;
use crate::worker::Time;
use isoplane_isolation::observer::{Event, Finding, Observer, SenderTally, Senders, Watched};
use isoplane_isolation::{Cause, State, Status};
use isoplane_memory::stats::{Block, Field};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Words of a worker's "isolation" block: these, then `breach_CAUSE` and `interruption_CAUSE` for each
/// [`Cause`] in the order of their numbers, then the histogram of visits.
pub mod field {
    use super::{Cause, Field, LazyLock};
    /// [`Backend::number`](isoplane_isolation::Backend::number); 0 for a worker that is not isolated.
    pub const BACKEND: usize = 0;
    /// [`State`](isoplane_isolation::State).
    pub const STATE: usize = 1;
    /// Times armed.
    pub const ARMED: usize = 2;
    /// System calls outside the slow path that the backend caught: breaches, and those that the mode allows.
    /// Between a breach and the worker's next look at its isolation nothing is caught.
    pub const SYSCALLS: usize = 3;
    /// Page faults that the backend caught, and those that the kernel counted where it cannot.
    pub const PAGE_FAULTS: usize = 4;
    /// Visits to the slow path.
    pub const VISITS: usize = 5;
    /// Visits that the budget refused.
    pub const REFUSED: usize = 6;
    /// Time spent in the slow path.
    pub const VISIT_NS: usize = 7;
    /// Longest visit.
    pub const LONGEST_VISIT_NS: usize = 8;
    /// Time that the worker wanted to run and did not.
    pub const RUN_DELAY_NS: usize = 9;
    /// Time that the hypervisor took: a gap.
    pub const STEAL_NS: usize = 10;
    /// Faults that the kernel counted for the worker while it was isolated: in user mode and in visits.
    pub const KERNEL_PAGE_FAULTS: usize = 11;
    /// Allocations served from the arena.
    pub const ALLOCATIONS: usize = 12;
    /// Allocations that did not fit it.
    pub const ARENA_EXHAUSTED: usize = 13;
    /// Diagnostic records written.
    pub const RECORDS: usize = 14;
    /// Diagnostic records lost.
    pub const RECORDS_LOST: usize = 15;
    /// Interrupts within the settle window: quiesced again, no breaches (backend `task-isolation`).
    pub const RACES: usize = 16;
    /// First of the breaches by cause.
    pub const BREACHES: usize = 17;
    /// First of the interruptions by cause.
    pub const INTERRUPTIONS: usize = BREACHES + Cause::COUNT;
    /// Histogram of the lengths of visits, after those.
    pub const VISIT_LENGTHS: usize = INTERRUPTIONS + Cause::COUNT;

    /// The fields, in order.
    #[must_use]
    pub fn fields() -> &'static [Field] {
        static FIELDS: LazyLock<Vec<Field>> = LazyLock::new(|| {
            let mut fields = vec![
                Field::gauge("isolation_backend"),
                Field::gauge("isolation_state"),
                Field::counter("armed"),
                Field::counter("worker_syscalls"),
                Field::counter("worker_page_faults"),
                Field::counter("slow_path_visits"),
                Field::counter("slow_path_refused"),
                Field::counter("slow_path_ns"),
                Field::gauge("slow_path_longest_ns"),
                Field::counter("run_delay_ns"),
                Field::counter("steal_ns"),
                Field::counter("kernel_page_faults"),
                Field::counter("arena_allocations"),
                Field::counter("arena_exhausted"),
                Field::counter("diagnostics"),
                Field::counter("diagnostics_lost"),
                Field::counter("isolation_races"),
            ];
            for prefix in ["breach", "interruption"] {
                // Made once, and names of fields live as long as the program.
                let name = |cause: Cause| &*String::leak(format!("{prefix}_{}", cause.name()));
                fields.extend(Cause::ALL.map(|cause| Field::counter(name(cause))));
            }
            fields.push(Field::histogram("slow_path_visit_ns"));
            fields
        });
        &FIELDS
    }
}

/// One worker, as the observer knows it.
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) cpu: Option<usize>,
    pub(crate) status: Status,
    pub(crate) block: Block,
}

/// Looks at the workers until `stop`, and once more then.
pub(crate) fn run(
    workers: &[Worker],
    control: &Control,
    time: Time,
    tally: Option<&Mutex<SenderTally>>,
    stop: &AtomicBool,
) {
    let mut senders = tally.and_then(|tally| Some((open_senders(workers)?, tally)));
    let watched = |w: &Worker| Watched { name: w.name.clone(), status: w.status.clone() };
    let mut observer = Observer::new(workers.iter().map(watched).collect());
    loop {
        let last = stop.load(Ordering::Acquire);
        for finding in observer.sample() {
            if let Some(worker) = workers.iter().find(|w| w.name == finding.worker) {
                add(worker, &finding);
            }
        }
        if let Some((senders, tally)) = &mut senders {
            lock(tally).add(&senders.drain());
        }
        for (worker, slot) in workers.iter().zip(control.slots()) {
            publish(worker, time);
            if slot.state().is_final() || last {
                // One that was killed could not say that it is not isolated any more.
                worker.block.set(field::STATE, State::Off as u64);
                report_left_over(worker);
            }
        }
        if last {
            workers.iter().for_each(sum_up);
            return;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Starts to trace who sends IPIs to the workers' CPUs, or says why that cannot be done here.
fn open_senders(workers: &[Worker]) -> Option<Senders> {
    let cpus: Vec<u32> = workers.iter().filter_map(|w| w.cpu).map(|cpu| cpu as u32).collect();
    if cpus.is_empty() {
        tracing::warn!("senders of IPIs are not named: no worker has a CPU of its own");
        return None;
    }
    Senders::open(&cpus).inspect_err(|why| tracing::warn!("{why}")).ok()
}

/// Adds what only the finding tells, and says what happened.
fn add(worker: &Worker, finding: &Finding) {
    let block = &worker.block;
    block.add(field::RUN_DELAY_NS, finding.run_delay.as_nanos() as u64);
    block.add(field::STEAL_NS, finding.steal.as_nanos() as u64);
    block.add(field::KERNEL_PAGE_FAULTS, finding.page_faults.minor + finding.page_faults.major);
    for event in &finding.events {
        match event {
            // The watcher reports deaths, with their reason.
            Event::Gone => {}
            event => tracing::warn!(worker = worker.name, "an isolated worker was disturbed: {event}"),
        }
    }
}

fn publish(worker: &Worker, time: Time) {
    let (status, block) = (&worker.status, &worker.block);
    let now = status.snapshot();
    let ns = |ticks| match time {
        Time::Tsc(clock) => clock.to_nanos(ticks),
        // Ticks of a counter whose rate nobody vouches for.
        Time::Kernel(_) => 0,
    };
    let seen = |cause| now.breaches.of(cause).wrapping_add(now.allowed.of(cause));
    let values = [
        u64::from(status.backend().map_or(0, isoplane_isolation::Backend::number)),
        now.state as u64,
        now.armed,
        seen(Cause::Syscall),
        if status.sees_page_faults() { seen(Cause::PageFault) } else { block.get(field::KERNEL_PAGE_FAULTS) },
        now.slow_path_visits,
        now.slow_path_refused,
        ns(now.slow_path_ticks),
        ns(now.longest_visit_ticks),
    ];
    for (at, value) in values.into_iter().enumerate() {
        block.set(at, value);
    }
    block.set(field::ALLOCATIONS, now.allocations);
    block.set(field::ARENA_EXHAUSTED, now.arena_exhausted);
    block.set(field::RECORDS, now.records);
    block.set(field::RECORDS_LOST, now.records_lost);
    block.set(field::RACES, now.races);
    // A block counts visits by powers of two of ticks; in nanoseconds a bucket is one such power, too.
    let mut lengths = [0u64; 64];
    if let Time::Tsc(clock) = time {
        for (bucket, visits) in now.visit_histogram.into_iter().enumerate() {
            let at = clock.to_nanos(1 << bucket).max(1).ilog2() as usize;
            lengths[at] = lengths[at].wrapping_add(visits);
        }
    }
    for (bucket, visits) in lengths.into_iter().enumerate() {
        block.set(field::VISIT_LENGTHS + bucket, visits);
    }
    for (cause, n) in now.breaches.iter() {
        block.set(field::BREACHES + usize::from(cause.number()), n);
    }
    for (cause, n) in now.interruptions.iter() {
        block.set(field::INTERRUPTIONS + usize::from(cause.number()), n);
    }
}

/// What became of a worker's isolation, in one line: no breach is nothing without what else was seen.
fn sum_up(worker: &Worker) {
    let Some(backend) = worker.status.backend() else { return };
    let now = worker.status.snapshot();
    let (breaches, interruptions) = (now.breaches, now.interruptions);
    tracing::info!(
        worker = worker.name,
        %backend,
        breaches = breaches.total(),
        interruptions = interruptions.total(),
        races = now.races,
        slow_path_visits = now.slow_path_visits,
        "isolation ended; breaches {breaches:?}; interruptions {interruptions:?}"
    );
}

/// A worker that ended at its breach had no chance to report it.
fn report_left_over(worker: &Worker) {
    for (number, breach) in worker.status.breaches(worker.status.reported()) {
        let cause = breach.cause.name();
        tracing::error!(
            worker = worker.name,
            number,
            cause,
            "isolation was broken, and the worker ended: {breach}"
        );
    }
    worker.status.set_reported();
}
