//! What an observer found out about one worker in one interval.

use super::senders::Sender;
use crate::cause::{Cause, Interruptions};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What came in one interval.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Finding {
    /// The worker.
    pub worker: String,
    /// Process and thread.
    pub thread: (u32, u32),
    /// The CPU that it was armed on; `None`: it has none of its own.
    pub cpu: Option<u32>,
    /// How long the interval was.
    pub interval: Duration,
    /// Kernel entries by cause. They were added to the worker's status block.
    pub interruptions: Interruptions,
    /// The rows behind the causes that have many: devices, soft interrupts, unknown ones.
    pub lines: Vec<Line>,
    /// Who sent IPIs to the CPU, those that sent most first; empty when that is not known (see
    /// [`Senders`](super::Senders)).
    pub senders: Vec<Sender>,
    /// What else happened, in words.
    pub events: Vec<Event>,
    /// Faults that the kernel counted for the thread, in user mode and inside system calls.
    pub page_faults: PageFaults,
    /// Time that the thread wanted to run and did not.
    pub run_delay: Duration,
    /// Time that the hypervisor gave the CPU to somebody else (steps of 10 ms): a gap.
    pub steal: Duration,
}

impl Finding {
    /// Whether there is nothing to tell.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.interruptions.total() == 0
            && self.events.is_empty()
            && self.page_faults == PageFaults::default()
            && self.run_delay.is_zero()
            && self.steal.is_zero()
    }
}

/// Page faults of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageFaults {
    /// Without input or output.
    pub minor: u64,
    /// With it.
    pub major: u64,
}

/// One row of `/proc/interrupts` or `/proc/softirqs` that grew.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Line {
    /// What it counts as.
    pub cause: Cause,
    /// How the kernel labels it: `36`, `HYP`, `NET_RX`.
    pub label: String,
    /// The users of a device's interrupt (`virtio1-req.0`), or the kernel's description.
    pub name: String,
    /// By how much it grew.
    pub count: u64,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cause, label, name, count } = self;
        if label == name {
            write!(f, "{cause} {label}: {count}")
        } else {
            write!(f, "{cause} {label} ({name}): {count}")
        }
    }
}

/// Something that happened to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The set of CPUs that it may run on was changed.
    AffinityChanged {
        /// As the kernel lists CPUs: `0-3,7`.
        from: String,
        /// The same now.
        to: String,
    },
    /// It runs on another CPU than at the last sample.
    Migrated {
        /// The CPU then.
        from: u32,
        /// The CPU now.
        to: u32,
    },
    /// It was moved to other CPUs, and is back where it was at the last sample.
    MovedAndBack {
        /// How often it was moved.
        moves: u64,
    },
    /// It is stopped by a signal, or by its tracer.
    Stopped {
        /// By its tracer.
        traced: bool,
    },
    /// A tracer is attached.
    TracerAttached {
        /// The thread that traces it (`TracerPid`: the thread that attached, which need not be the
        /// first of its process).
        tid: u32,
    },
    /// A CPU of the machine went offline or came online.
    CpusOnline {
        /// The CPUs that were, as the kernel lists them.
        from: String,
        /// The CPUs that are.
        to: String,
    },
    /// The thread does not exist any more, and its status block says that it is isolated.
    Gone,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AffinityChanged { from, to } => write!(f, "affinity changed from CPUs {from} to {to}"),
            Self::Migrated { from, to } => write!(f, "migrated from CPU {from} to CPU {to}"),
            Self::MovedAndBack { moves } => write!(f, "moved to another CPU and back ({moves} moves)"),
            Self::Stopped { traced: true } => f.write_str("stopped by its tracer"),
            Self::Stopped { traced: false } => f.write_str("stopped"),
            Self::TracerAttached { tid } => write!(f, "thread {tid} traces it"),
            Self::CpusOnline { from, to } => write!(f, "CPUs online changed from {from} to {to}"),
            Self::Gone => f.write_str("the thread ended without disarming"),
        }
    }
}

/// A source that could not be read, and so is not seen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Missing {
    /// The file; those of threads have `PID` and `TID` in the place of numbers.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

impl Missing {
    /// Remembers it, and logs it the first time.
    pub(super) fn note(all: &mut Vec<Self>, path: &Path, reason: String) {
        if all.iter().any(|one| one.path == path) {
            return;
        }
        tracing::warn!(path = %path.display(), reason, "cannot be read: what it tells of interruptions is not counted");
        all.push(Self { path: path.to_owned(), reason });
    }
}
