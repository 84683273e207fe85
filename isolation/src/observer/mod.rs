//! The observer: attributes kernel entries to an isolated worker from a housekeeping CPU, by looking at
//! what the kernel counts. It never runs on, interrupts or otherwise touches the worker's CPU.
//!
//! What it sees are *interruptions*: observed afterwards, counted by cause, never enforced.
//!
//! # Precision
//! - An interval goes from one [`Observer::sample`] to the next. The first sample that finds a worker
//!   armed takes a *baseline*; what happened between arming and that sample is not seen. Nor is what
//!   happened between the last sample and disarming: a worker that is [`State::Off`] at a sample has
//!   nothing attributed to it. (Sample right before you disarm, if you need that too.) A worker that was
//!   restarted, or moved to another CPU by arming again, gets a new baseline.
//! - Interrupts, IPIs and soft interrupts are those of the *CPU* that the worker was armed on, whoever ran
//!   there: an upper bound for the worker. While it is seen on another CPU at both ends of an interval
//!   they are not counted; nor for a worker that has no CPU of its own.
//! - One kernel entry may show under several causes: a tick that runs a soft interrupt and then lets
//!   another thread run is a [`TimerTick`](crate::Cause::TimerTick), a [`Softirq`](crate::Cause::Softirq) and a
//!   [`Preemption`](crate::Cause::Preemption).
//! - A tracer that comes and goes between two samples leaves no trace, nor does a change of affinity that
//!   is undone, but for the switches and moves of such a moment. A move away and back is seen where the
//!   kernel has `/proc/PID/task/TID/sched`.
//! - A yield of the slow path that lets another thread run counts as a [`Preemption`](crate::Cause::Preemption).
//! - Time that the hypervisor took ([`Finding::steal`]) is a gap, not a cause.
//! - Who sent an IPI is said where tracepoints may be read: [`Senders`].
//! - Process ids are those of the observer's own pid namespace, and `/proc` must show that namespace.
//!
//! One sample of one worker takes about 100 us of CPU time (2 CPUs, 40 rows, Linux 6.18 in a virtual
//! machine); most of it is the kernel's, and grows with its CPUs and interrupt lines.
//!
//! | file (`Documentation/filesystems/proc.rst`) | what comes from it |
//! |---|---|
//! | `/proc/interrupts`, `/proc/softirqs` | the causes of the table below |
//! | `/proc/PID/task/TID/status` | preemptions (involuntary switches), stops (voluntary ones that nothing permits), affinity changes, tracers |
//! | `/proc/PID/task/TID/stat` | migrations, stops, page faults (user and kernel mode, a number of its own) |
//! | `/proc/PID/task/TID/sched` | how often it was moved (CONFIG_SCHED_DEBUG; always since 6.15) |
//! | `/proc/PID/task/TID/schedstat` | time spent waiting for the CPU |
//! | `/proc/stat` | steal |
//! | `/sys/devices/system/cpu/online` | hotplug: each one stops all CPUs (`stop_machine`) |
//!
//! # Causes
//! On x86, Linux 5.13 to 6.18 (`arch_show_interrupts()` in arch/x86/kernel/irq.c):
//!
//! | rows | cause |
//! |---|---|
//! | numbers | [`DeviceInterrupt`](crate::Cause::DeviceInterrupt), with the names of the line's users |
//! | `LOC` | [`TimerTick`](crate::Cause::TimerTick) |
//! | `RES` | [`Reschedule`](crate::Cause::Reschedule) |
//! | `TLB` | [`TlbShootdown`](crate::Cause::TlbShootdown) |
//! | `CAL` less `TLB` | [`FunctionCall`](crate::Cause::FunctionCall): since Linux 4.8 ("x86/irq: Do not substract irq_tlb_count from irq_call_count"; measured on 6.18: 5000 flushes are 5000 of each) `CAL` counts every function-call interrupt and `TLB` the flushes that they asked for. One interrupt may serve several requests, so the difference is a lower bound |
//! | `IWI` | [`IrqWork`](crate::Cause::IrqWork) |
//! | `NMI` | [`Nmi`](crate::Cause::Nmi); `PMI` is those among them that came from the performance monitor, so it is not counted again |
//! | `MCE`, `MCP`, `THR`, `DFR` | [`MachineCheck`](crate::Cause::MachineCheck): exceptions, polls, corrected and deferred errors |
//! | `TRM` | [`Thermal`](crate::Cause::Thermal) |
//! | `HYP`, `HRE`, `HVS`, `PIN`, `NPI`, `PIW` | [`Hypervisor`](crate::Cause::Hypervisor) |
//! | `RTR`, `ERR`, `MIS`, `PMN` | none: retries and errors are no entries, and what a posted-interrupt notification brings is counted in the rows of the devices |
//! | any other, `SPU` and `PLT` among them | [`Unknown`](crate::Cause::Unknown), with its name |
//! | every row of `/proc/softirqs` | [`Softirq`](crate::Cause::Softirq), with its name |

mod finding;
mod parse;
mod procfs;
pub mod senders;
mod table;
mod thread;
mod watch;

pub use finding::{Event, Finding, Line, Missing, PageFaults};
pub use procfs::ProcFs;
pub use senders::{Asked, Sender, SenderTally, Senders, SendersUnavailable};
pub use thread::Observing;

use crate::status::{State, Status};
use procfs::Kept;
use std::time::Instant;
use table::Table;
use watch::{Shared, Track};

/// A larger number of a CPU in a status block is not believed (x86 has at most 8192: `NR_CPUS`).
const MOST_CPUS: u32 = 8192;

/// A worker to look at.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its name in findings.
    pub name: String,
    /// Where it says what it is doing, and where interruptions are added.
    pub status: Status,
}

/// Looks at workers. See the [module](self) for what it sees and how precisely.
pub struct Observer {
    tracks: Vec<Track>,
    interrupts: Table,
    softirqs: Table,
    stat: Kept,
    online: Kept,
    senders: Option<Senders>,
    missing: Vec<Missing>,
    /// CPUs of isolated workers at this sample.
    cpus: Vec<u32>,
    /// Any worker is isolated, with a CPU of its own or without.
    isolated: bool,
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer")
            .field("workers", &self.tracks.len())
            .field("missing", &self.missing)
            .finish()
    }
}

impl Observer {
    /// An observer of the running kernel.
    #[must_use]
    pub fn new(watched: Vec<Watched>) -> Self {
        Self::with(watched, &ProcFs::default())
    }

    /// An observer of another tree.
    #[must_use]
    pub fn with(watched: Vec<Watched>, fs: &ProcFs) -> Self {
        Self {
            tracks: watched.into_iter().map(|one| Track::new(one, fs.clone())).collect(),
            interrupts: Table::new(fs.file("proc/interrupts"), table::interrupt),
            softirqs: Table::new(fs.file("proc/softirqs"), table::softirq),
            stat: fs.file("proc/stat"),
            online: fs.file("sys/devices/system/cpu/online"),
            senders: None,
            missing: Vec::new(),
            cpus: Vec::new(),
            isolated: false,
        }
    }

    /// Also names who sent IPIs. They must have been opened, for the CPUs of the workers, before those
    /// arm: see [`Senders`].
    #[must_use]
    pub fn with_senders(mut self, senders: Senders) -> Self {
        self.senders = Some(senders);
        self
    }

    /// Those that sent most IPIs to a worker while it was isolated, at most `n`.
    #[must_use]
    pub fn top_senders(&self, worker: &str, n: usize) -> Vec<Sender> {
        let track = self.tracks.iter().find(|track| track.watched.name == worker);
        track.map(|track| track.senders.top(n)).unwrap_or_default()
    }

    /// What could not be read so far, and is therefore not seen. Each was also logged once.
    #[must_use]
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// CPUs of the workers that were isolated at the last sample.
    #[must_use]
    pub fn cpus(&self) -> &[u32] {
        &self.cpus
    }

    /// Finds out on which CPUs workers are isolated now.
    fn locate(&mut self) {
        self.cpus.clear();
        self.isolated = false;
        for track in &self.tracks {
            if track.watched.status.state() == State::Off {
                continue;
            }
            self.isolated = true;
            if let Some(cpu) = track.watched.status.cpu()
                && cpu < MOST_CPUS
                && !self.cpus.contains(&cpu)
            {
                self.cpus.push(cpu);
            }
        }
    }

    /// Looks once: adds what came since the last time to each worker's status block, and returns it for
    /// those that are isolated and have a baseline.
    pub fn sample(&mut self) -> Vec<Finding> {
        self.locate();
        let (mut stat, mut online) = (&[][..], None);
        if !self.cpus.is_empty() {
            self.interrupts.read(&self.cpus, &mut self.missing);
            self.softirqs.read(&self.cpus, &mut self.missing);
            stat = self.stat.noted(&mut self.missing).unwrap_or_default();
        }
        if self.isolated {
            online = self.online.noted(&mut self.missing).map(parse::line);
        }
        let senders = self.senders.as_mut().map(Senders::drain).unwrap_or_default();
        let shared = Shared {
            senders: &senders,
            cpus: &self.cpus,
            interrupts: &self.interrupts,
            softirqs: &self.softirqs,
            stat,
            online,
            now: Instant::now(),
        };
        let missing = &mut self.missing;
        self.tracks.iter_mut().filter_map(|track| track.look(&shared, missing)).collect()
    }
}

#[cfg(test)]
mod tests;
