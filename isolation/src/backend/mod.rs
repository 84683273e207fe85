//! How isolation is enforced here.
//!
//! Contract: [`Backend::Auto`] takes the strongest backend that works and says which; a backend that was
//! asked for by name is taken or refused, never replaced.

#[cfg(target_arch = "x86_64")]
pub(crate) mod dispatch;

use crate::error::{Unmet, Weakness};
use crate::thread::{Page, Thread};
use std::fmt;

/// How isolation is enforced.
///
/// | backend | needs | enforces (breach) | observes (interruption) |
/// |---|---|---|---|
/// | `task-isolation` | a kernel with the task-isolation patches | everything but NMI; cause, address or syscall, and in debug mode the sender of an IPI, before user code resumes | NMI |
/// | `dispatch` | Linux >= 5.13, x86-64 | syscalls (syscall user dispatch: number and call address) and page faults (perf `sigtrap`: address) | ticks, IPIs, device interrupts, preemptions, migrations: counts by cause from a housekeeping sampler, sender where tracepoints may be read |
/// | `advisory` | Linux | nothing | counts |
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

    /// The backend that this choice comes to on the running machine. For a thread that is not isolated.
    ///
    /// # Errors
    /// [`Unmet::Backend`] when it is not to be had.
    pub fn probe(self) -> Result<Self, Unmet> {
        match self {
            Self::TaskIsolation => Err(Unmet::Backend {
                backend: self,
                reason:
                    "it needs a kernel with the task-isolation patches, and this version cannot use one yet"
                        .to_owned(),
            }),
            Self::Dispatch => probe_dispatch().map(|()| self),
            Self::Advisory => Ok(self),
            Self::Auto => Ok(if probe_dispatch().is_ok() { Self::Dispatch } else { Self::Advisory }),
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
    Dispatch(dispatch::Engine),
    Advisory,
}

impl Engine {
    pub(crate) fn prepare(
        backend: Backend,
        page: &Page,
        weaknesses: &mut Vec<Weakness>,
    ) -> Result<Self, Unmet> {
        match backend {
            #[cfg(target_arch = "x86_64")]
            Backend::Dispatch => {
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
            Self::Dispatch(engine) => engine.sees_faults(),
            Self::Advisory => false,
        }
    }

    pub(crate) fn arm(&self, thread: &Thread) -> Result<(), Unmet> {
        match self {
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
            Self::Dispatch(engine) => engine.keep_signals(thread),
            Self::Advisory => {
                let _ = thread;
                Ok(())
            }
        }
    }

    pub(crate) fn disarm(&self) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(engine) => engine.disarm(),
            Self::Advisory => {}
        }
    }

    pub(crate) fn unprepare(&self) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Dispatch(engine) => engine.unprepare(),
            Self::Advisory => {}
        }
    }
}
