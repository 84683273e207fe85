//! What stands in the way of isolation, and what is weaker than asked.
//!
//! Contract: a refusal lists every unmet precondition that can be looked at beforehand, not the first; a
//! step that fails when it is tried (an arena, a signal stack) is listed alone, since what comes after
//! it was not tried. A weakness does not refuse, it is said once, plainly, with what is lost and what to
//! do. Neither is ever silent.

use crate::backend::Backend;
use crate::cause::Breach;
use crate::prepare::cpu::{Cpu, CpuError, CpuList};
use crate::prepare::privileges::PrivilegeError;
use nix::errno::Errno;
use std::fmt;

/// One precondition that is not met.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unmet {
    /// The thread may run on more CPUs than one, or on another than the one it was prepared for.
    #[error(
        "the thread may run on {allowed}, not on {cpu} alone: something changed its affinity after it was \
         prepared; prepare it again"
    )]
    AllowedCpus {
        /// The CPU it was prepared for.
        cpu: Cpu,
        /// What it may run on.
        allowed: CpuList,
    },
    /// The CPU is not to be had.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The backend cannot work here.
    #[error("the backend {backend} is not to be had: {reason}")]
    Backend {
        /// Which one.
        backend: Backend,
        /// Why.
        reason: String,
    },
    /// The thread is prepared for isolation already.
    #[error("this thread is prepared for isolation already; drop that Prepared first, or use it")]
    AlreadyPrepared,
    /// Arming what is armed.
    #[error(
        "this thread is isolated already; arm again only after a breach under Stop, ONESHOT or release()"
    )]
    Armed,
    /// Not the thread that was prepared.
    #[error(
        "this is not the thread that was prepared (or it is a forked child of it); each thread prepares itself"
    )]
    WrongThread,
    /// The thread cannot have an arena.
    #[error(transparent)]
    Arena(#[from] crate::arena::ArenaError),
    /// Privileges could not be dropped.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// A step was refused by the kernel.
    #[error("{call}: {errno}")]
    Call {
        /// Which.
        call: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The status block could not be made.
    #[error(transparent)]
    Status(#[from] isoplane_memory::RegionError),
    /// A weakness, where the program insists that there be none.
    #[error("{0} (refused because of Isolation::insist)")]
    Weak(Weakness),
}

/// Something that is weaker than full isolation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Weakness {
    /// The backend enforces nothing.
    #[error(
        "nothing is enforced (backend advisory): system calls and page faults are counted at most, never \
         caught; use a kernel with syscall user dispatch (Linux 5.11 or later, x86-64)"
    )]
    NothingEnforced,
    /// Preparing the thread could not get everything.
    #[error(transparent)]
    Thread(#[from] crate::prepare::Weakness),
    /// An arena that nothing is served from.
    #[error(
        "the arena that was asked for serves nothing: the program's global allocator is not \
         isoplane_isolation::arena::WorkerAlloc, so allocations may still enter the kernel; install it"
    )]
    ArenaUnused,
    /// The thread has no CPU of its own.
    #[error(
        "the thread is not pinned to a CPU: the scheduler may move it, and interrupts cannot be counted for it; give it a CPU"
    )]
    NotPinned,
    /// Interrupts are observed, not enforced.
    #[error(
        "interrupts, IPIs and preemptions are observed, not enforced (backend dispatch): an observer counts \
         them by cause; only a kernel with the task-isolation patches enforces them"
    )]
    InterruptsObserved,
    /// Page faults are observed, not enforced.
    #[error(
        "page faults are counted, not caught: perf_event_open: {errno}; lower kernel.perf_event_paranoid to \
         2, allow the call in the seccomp filter, or give the program CAP_PERFMON"
    )]
    PageFaultsUnseen {
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Isolation was refused; nothing has changed.
#[derive(Debug)]
pub struct Refused {
    /// The CPU, when one was asked for.
    pub cpu: Option<Cpu>,
    /// Everything that is in the way.
    pub unmet: Vec<Unmet>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot isolate this thread")?;
        if let Some(cpu) = self.cpu {
            write!(f, " on {cpu}")?;
        }
        f.write_str(":")?;
        match self.unmet.as_slice() {
            [only] => write!(f, " {only}"),
            all => all.iter().enumerate().try_for_each(|(n, unmet)| write!(f, " ({}) {unmet};", n + 1)),
        }
    }
}

impl std::error::Error for Refused {}

/// What [`Strict::turn`](crate::Strict::turn) may have to say.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StrictError {
    /// A breach, under [`OnBreach::Stop`](crate::OnBreach::Stop). Isolation is off.
    #[error("isolation was broken: {0}")]
    Breach(Breach),
    /// Not the thread that was armed, or a forked child of it. Nothing has changed.
    #[error("this is not the thread that was isolated (or it is a forked child of it)")]
    WrongThread,
    /// A breach was reported, and arming again was refused.
    #[error("after a breach: {0}")]
    Rearm(#[from] Refused),
}
