//! How isolation is enforced here.
//!
//! Contract: [`Backend::Auto`] takes the strongest backend that works and says which; a backend that was
//! asked for by name is taken or refused, never replaced.

#[cfg(target_arch = "x86_64")]
pub(crate) mod dispatch;
#[cfg(target_arch = "x86_64")]
pub(crate) mod handlers;
#[cfg(target_arch = "x86_64")]
pub(crate) mod sys;
pub(crate) mod task_isolation;

use crate::error::{Unmet, Weakness};
use crate::mode::Quiesce;
use crate::prepare::cpu::{Cpu, Facts};
use crate::thread::{Gate, Page, Thread};
use std::fmt;
use std::time::Duration;

/// How isolation is enforced.
///
/// | backend | needs | enforces (breach) | observes (interruption) |
/// |---|---|---|---|
/// | `task-isolation` | a kernel with the task-isolation patches | everything but NMI; cause, address or syscall, and in debug mode the sender of an IPI, before user code resumes | NMI |
/// | `dispatch` | Linux >= 5.13, x86-64 | syscalls (syscall user dispatch: number and call address) and page faults (perf `sigtrap`: address) | ticks, IPIs, device interrupts, preemptions, migrations: counts by cause from a housekeeping sampler, sender where tracepoints may be read |
/// | `advisory` | Linux | nothing | counts |
///
/// `Auto` takes the first of these that works for the thread. `task-isolation` is for a thread that is pinned
/// to a `nohz_full` CPU; on a patched kernel any other thread gets `dispatch`, with a
/// [`Weakness`] that says why.
///
/// **What a visit is** differs: under `task-isolation` isolation is off during a visit to the slow path, so
/// nothing in it is a breach; under `dispatch` a page fault in it is one, as in the rest of the mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Backend {
    /// The strongest one that works here.
    #[default]
    Auto,
    /// The kernel does it all: needs the task-isolation patches.
    TaskIsolation,
    /// Syscall user dispatch and perf events: any kernel since 5.13.
    Dispatch,
    /// Nothing is enforced.
    Advisory,
}

impl Backend {
    /// Its name in messages, statistics and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::TaskIsolation => "task-isolation",
            Self::Dispatch => "dispatch",
            Self::Advisory => "advisory",
        }
    }

    /// Its number in the status block and in statistics.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::Auto => 0,
            Self::Advisory => 1,
            Self::Dispatch => 2,
            Self::TaskIsolation => 3,
        }
    }

    /// The backend of a number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Auto),
            1 => Some(Self::Advisory),
            2 => Some(Self::Dispatch),
            3 => Some(Self::TaskIsolation),
            _ => None,
        }
    }

    /// The backend that this choice comes to on the running machine, for a thread on the best CPU that it
    /// has. For a thread that is not isolated.
    ///
    /// # Errors
    /// [`Unmet::Backend`] when it is not to be had.
    pub fn probe(self) -> Result<Self, Unmet> {
        match self {
            Self::TaskIsolation => task_isolation::probe().map(|()| self),
            Self::Dispatch => probe_dispatch().map(|()| self),
            Self::Advisory => Ok(self),
            Self::Auto => {
                let quiet = crate::prepare::cpu::nohz_full().iter().next();
                Ok(Self::for_thread(quiet).0)
            }
        }
    }

    /// As [`Backend::probe`], for a thread that will be pinned to this CPU, and in which way that is less than
    /// the kernel could do.
    pub(crate) fn choose(self, cpu: Option<Cpu>) -> Result<(Self, Option<Weakness>), Unmet> {
        match self {
            Self::TaskIsolation if cpu.is_none() => Err(Unmet::Backend {
                backend: self,
                reason: "it isolates a CPU, and the thread is not pinned to one; use Isolation::on"
                    .to_owned(),
            }),
            Self::Auto => Ok(Self::for_thread(cpu)),
            named => named.probe().map(|backend| (backend, None)),
        }
    }

    fn for_thread(cpu: Option<Cpu>) -> (Self, Option<Weakness>) {
        let rest = if probe_dispatch().is_ok() { Self::Dispatch } else { Self::Advisory };
        if task_isolation::probe().is_err() {
            return (rest, None);
        }
        match cpu {
            Some(cpu) if Facts::of(cpu).nohz_full => (Self::TaskIsolation, None),
            cpu => (rest, Some(Weakness::TaskIsolationUnused { backend: rest, cpu })),
        }
    }

    /// What the gate of a thread is made of.
    pub(crate) const fn gate(self) -> Gate {
        match self {
            Self::TaskIsolation => Gate::Kernel,
            Self::Dispatch => Gate::Dispatch,
            Self::Auto | Self::Advisory => Gate::None,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Auto, Self::TaskIsolation, Self::Dispatch, Self::Advisory]
            .into_iter()
            .find(|backend| backend.name() == text)
            .ok_or_else(|| format!("no backend {text:?}; there are auto, task-isolation, dispatch, advisory"))
    }
}

#[cfg(target_arch = "x86_64")]
fn probe_dispatch() -> Result<(), Unmet> {
    dispatch::probe()
}

#[cfg(not(target_arch = "x86_64"))]
fn probe_dispatch() -> Result<(), Unmet> {
    Err(Unmet::Backend {
        backend: Backend::Dispatch,
        reason: "it is written for x86-64; elsewhere there is advisory only".to_owned(),
    })
}

/// What one prepared thread holds of its backend.
#[derive(Debug)]
pub(crate) enum Engine {
    #[cfg(target_arch = "x86_64")]
    TaskIsolation(task_isolation::Engine),
    #[cfg(target_arch = "x86_64")]
    Dispatch(dispatch::Engine),
    Advisory,
}

/// What a backend has to know of how isolation was asked for.
pub(crate) struct Wanted {
    pub(crate) cpu: Option<Cpu>,
    pub(crate) quiesce: Quiesce,
    pub(crate) settle: Duration,
}

impl Engine {
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "there is advisory only"))]
    pub(crate) fn prepare(
        backend: Backend,
        page: &Page,
        wanted: &Wanted,
        weaknesses: &mut Vec<Weakness>,
    ) -> Result<Self, Unmet> {
        match (backend, wanted.cpu) {
            #[cfg(target_arch = "x86_64")]
            (Backend::TaskIsolation, Some(cpu)) => {
                task_isolation::Engine::prepare(page, cpu, wanted.quiesce, wanted.settle)
                    .map(Self::TaskIsolation)
            }
            #[cfg(target_arch = "x86_64")]
            (Backend::Dispatch, _) => {
                weaknesses.push(Weakness::InterruptsObserved);
                dispatch::Engine::prepare(page, weaknesses).map(Self::Dispatch)
            }
            _ => {
                weaknesses.push(Weakness::NothingEnforced);
                Ok(Self::Advisory)
            }
        }
    }

    /// Page faults are enforced.
    pub(crate) fn sees_faults(&self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::TaskIsolation(_) => true,
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(engine) => engine.sees_faults(),
            Self::Advisory => false,
        }
    }

    /// Everything but isolating the thread itself.
    pub(crate) fn arm(&self, thread: &Thread) -> Result<(), Unmet> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::TaskIsolation(_) => {
                handlers::let_through(task_isolation::SIGNALS, 1..=libc::SIGRTMAX());
                handlers::keep_signals(thread, task_isolation::SIGNALS)
            }
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(engine) => engine.arm(thread),
            Self::Advisory => {
                let _ = thread;
                Ok(())
            }
        }
    }

    /// Makes sure, with the gate open, that the next breach will be ours to see.
    pub(crate) fn check(&self, thread: &Thread) -> Result<(), Unmet> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::TaskIsolation(_) => handlers::keep_signals(thread, task_isolation::SIGNALS),
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(_) => handlers::keep_signals(thread, dispatch::SIGNALS),
            Self::Advisory => {
                let _ = thread;
                Ok(())
            }
        }
    }

    pub(crate) fn disarm(&self) {
        match self {
            // Opening the gate was all.
            #[cfg(target_arch = "x86_64")]
            Self::TaskIsolation(_) => {}
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(engine) => engine.disarm(),
            Self::Advisory => {}
        }
    }

    pub(crate) fn unprepare(&self) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::TaskIsolation(engine) => engine.unprepare(),
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(engine) => engine.unprepare(),
            Self::Advisory => {}
        }
    }
}
