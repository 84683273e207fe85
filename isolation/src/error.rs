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
    /// The CPU has a tick that cannot be stopped.
    #[error(
        "{0} is not nohz_full, so its tick cannot be stopped: boot with nohz_full={n} rcu_nocbs={n}, or choose \
         the backend dispatch", n = .0.0
    )]
    NotNohzFull(Cpu),
    /// The kernel does not trust its clock.
    #[error(
        "the kernel does not trust its clock, so the tick has to go on: see `isoplane doctor` for why; where \
         the TSC is known to be good boot with tsc=reliable"
    )]
    ClockUnstable,
    /// Another thread wants to run on the CPU.
    #[error(
        "another thread is runnable on {0}, and went on to be: find it (ps -eLo psr,pid,tid,stat,comm) and move \
         it away (taskset -p, cpusets), or end it"
    )]
    NotAlone(Cpu),
    /// Something needs the tick.
    #[error(
        "the tick of {cpu} is needed by {by}: end what needs it (a CPU-time timer or limit, a perf event that \
         counts by frequency), or move it to another CPU"
    )]
    TickNeeded {
        /// The CPU.
        cpu: Cpu,
        /// What needs it.
        by: String,
    },
    /// A timer is armed on the CPU.
    #[error(
        "a timer is armed on {0} and did not run out in time: a thread that was there before, or a driver, will \
         be woken there; `isoplane doctor` says what keeps such work away"
    )]
    TimerArmed(Cpu),
    /// The kernel has work pending on the CPU.
    #[error(
        "{what} of {cpu} are pending: nothing to do where something else is in the way too; otherwise more kept \
         coming while they were seen to, so keep whatever causes them (device interrupts, other threads) away \
         from the CPU"
    )]
    WorkPending {
        /// The CPU.
        cpu: Cpu,
        /// Which.
        what: &'static str,
    },
    /// The deadline server for ordinary threads stays on.
    #[error(
        "the fair server of {0} cannot be switched off: somebody has set its parameters, or a thread waits for \
         it; look at /sys/kernel/debug/sched/fair_server/cpu{n}", n = .0.0
    )]
    FairServerStays(Cpu),
    /// Something that this version has no name for.
    #[error(
        "the kernel refuses to isolate for reasons that this program is too old to name (bits {bits:#x} of \
         PR_TASK_ISOLATION_UNMET): use a newer one"
    )]
    Unnamed {
        /// The kernel's bits.
        bits: u64,
    },
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
    /// The kernel could isolate, but not this thread.
    #[error(
        "the kernel has task isolation, and the backend is {backend} all the same, because {}: isolate the thread \
         on a nohz_full CPU (boot parameter nohz_full=)",
        match .cpu { Some(cpu) => format!("{cpu} is not nohz_full"), None => "the thread is not pinned".to_owned() }
    )]
    TaskIsolationUnused {
        /// The backend that was taken.
        backend: Backend,
        /// The CPU, unless the thread is not pinned.
        cpu: Option<Cpu>,
    },
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
