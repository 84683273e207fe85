//! How a worker's isolation is asked for, and how its loop lives under it.
//!
//! Contract: workers are isolated unless the builder is told otherwise. [`Guard`] is all that the loop
//! sees of it: one predictable branch a turn when nothing has happened.

use isoplane_isolation::diagnostics::{Diagnostics, Recorder, Recording, SlowPathRecording, ThroughSlowPath};
use isoplane_isolation::prepare::memory;
use isoplane_isolation::{
    Backend, Budget, Cpu, Isolation, Mode, OnBreach, Prepared, Privileges, Quiesce, Refused, Scheduling,
    Status, Strict, StrictError,
};
use isoplane_memory::Kernel;
use std::time::Duration;

/// What isolation the workers of a dataplane get. The default is strict, by the best backend there is.
#[derive(Debug, Clone)]
pub struct WorkerIsolation {
    /// How it is enforced.
    pub backend: Backend,
    /// What workers may do without a breach.
    pub mode: Mode,
    /// What is done about a breach. Under `Stop` the worker drains and ends, and is not started again.
    pub on_breach: OnBreach,
    /// What is finished on the CPU before a worker goes on.
    pub quiesce: Quiesce,
    /// How long after arming an interrupt counts as one that was on its way before, under the backend
    /// `task-isolation`: see [`Isolation::settle_window`].
    pub settle_window: Duration,
    /// How often a worker may visit the kernel.
    pub budget: Budget,
    /// Refuse to start where something would be weaker than full isolation.
    pub insist: bool,
    /// How workers are scheduled.
    pub scheduling: Scheduling,
    /// Who workers are, once they have what they need privileges for. For worker processes only. A worker
    /// keeps the descriptors of its own queues, and those that the program itself had open at the launch.
    pub privileges: Privileges,
    /// Bytes of stack that are pre-faulted.
    pub stack: usize,
    /// Bytes of the arena that a worker allocates from while it is isolated, in a program whose global
    /// allocator is [`WorkerAlloc`](isoplane_isolation::arena::WorkerAlloc); 0 for none.
    pub arena: usize,
    /// Name the senders of IPIs to the workers' CPUs, where tracepoints may be read (root): see
    /// [`Running::senders`](crate::Running::senders). Switching it on sends IPIs itself, and other CPUs
    /// become a little slower at sending them.
    pub name_senders: bool,
    /// Which way the log lines of workers take.
    pub diagnostics: Diagnostics,
    /// Log lines that may wait for the drainer in each worker's ring: a power of two.
    pub log_lines: u32,
}

impl Default for WorkerIsolation {
    fn default() -> Self {
        Self {
            backend: Backend::Auto,
            mode: Mode::STRICT,
            on_breach: OnBreach::Report,
            quiesce: Quiesce::default(),
            settle_window: Isolation::SETTLE_WINDOW,
            budget: Budget::UNLIMITED,
            insist: false,
            scheduling: Scheduling::Auto,
            privileges: Privileges::Keep,
            stack: memory::STACK,
            arena: 0,
            name_senders: false,
            diagnostics: Diagnostics::Ring,
            log_lines: 1024,
        }
    }
}

impl WorkerIsolation {
    /// Prepares the calling thread, which is the worker's.
    pub(crate) fn prepare(&self, cpu: Option<usize>, status: &Status) -> Result<Prepared, Refused> {
        let mut prepared = self.isolation(cpu, status).prepare()?;
        prepared
            .drop_privileges(self.privileges)
            .map_err(|error| Refused { cpu: cpu.map(Cpu), unmet: vec![error.into()] })?;
        Ok(prepared)
    }

    fn isolation(&self, cpu: Option<usize>, status: &Status) -> Isolation {
        cpu.map_or_else(Isolation::unpinned, |cpu| Isolation::on(Cpu(cpu)))
            .backend(self.backend)
            .mode(self.mode)
            .on_breach(self.on_breach)
            .quiesce(self.quiesce)
            .settle_window(self.settle_window)
            .budget(self.budget)
            .insist(self.insist)
            .scheduling(self.scheduling)
            .stack(self.stack)
            .arena(self.arena)
            .status(status.clone())
    }

    /// Lets the calling thread, which is prepared, log the way that its program chose.
    pub(crate) fn log(&self, recorder: &Recorder, cpu: Option<usize>) -> Logging {
        let cpu = cpu.map_or(u32::MAX, |cpu| cpu as u32);
        let installed = match self.diagnostics {
            Diagnostics::Ring => recorder.install(cpu).map(Logging::Ring),
            Diagnostics::SlowPath => {
                let program = tracing::dispatcher::get_default(Clone::clone);
                let route = ThroughSlowPath::new(program);
                route.install(Some(recorder), cpu).map(Logging::SlowPath)
            }
        };
        installed.unwrap_or_else(|error| {
            tracing::warn!("log lines of the worker take the program's way, by system calls: {error}");
            Logging::Program
        })
    }
}

/// Which way a worker's log lines take, while it lives.
#[derive(Debug)]
#[allow(dead_code, reason = "guards are held, not looked at")]
pub(crate) enum Logging {
    Ring(Recording),
    SlowPath(SlowPathRecording),
    /// The program's subscriber, as the worker inherited it.
    Program,
}

/// What the loop of a worker is under.
#[derive(Debug)]
pub(crate) enum Guard<'a> {
    /// Isolation.
    Strict(Strict<'a>),
    /// Nothing.
    Free,
}

impl<'a> Guard<'a> {
    /// Isolates the worker, if it was prepared for that.
    pub(crate) fn arm(prepared: Option<&'a mut Prepared>) -> Result<Self, Refused> {
        prepared.map_or(Ok(Self::Free), |prepared| prepared.arm().map(Self::Strict))
    }

    /// Once a turn.
    #[inline(always)]
    pub(crate) fn turn(&mut self) -> Result<(), StrictError> {
        match self {
            Self::Strict(strict) => strict.turn(),
            Self::Free => Ok(()),
        }
    }

    /// Enters the kernel: by the slow path under isolation. `None` when its budget is used up.
    #[inline]
    pub(crate) fn enter<R>(&mut self, visit: impl FnOnce(&Kernel) -> R) -> Option<R> {
        match self {
            Self::Strict(strict) => strict.slow_path(visit).ok(),
            Self::Free => Some(visit(&Kernel::outside_isolation())),
        }
    }
}
