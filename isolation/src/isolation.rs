//! From asking for isolation to a thread that is ready for it.
//!
//! Contract: [`Isolation::prepare`] does to the calling thread what must be done before it can be
//! isolated, in an order in which each step can still do its work, and lists everything that is missing;
//! [`Prepared::arm`] isolates it. Both belong to that thread. Dropping a [`Prepared`] gives the thread
//! back its signal mask, signal stack, CPUs and scheduling.

use crate::arena;
use crate::backend::{Backend, Engine, Wanted};
use crate::budget::{Budget, Purse};
use crate::error::{Refused, Unmet, Weakness};
use crate::mode::{Mode, OnBreach, Quiesce};
use crate::prepare::cpu::{self, Cpu, FormerAffinity};
use crate::prepare::privileges::{self, PrivilegeError, Privileges};
use crate::prepare::scheduling::{self, Scheduling};
use crate::prepare::signals::{self, FormerMask};
use crate::prepare::{self, memory};
use crate::status::{State, Status, bump};
use crate::strict::Strict;
use crate::thread::{Gate, Page, Setup, Thread};
use isoplane_memory::Clock;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What isolation is asked for. Start with [`Isolation::on`].
#[derive(Debug, Clone)]
pub struct Isolation {
    cpu: Option<Cpu>,
    mode: Mode,
    on_breach: OnBreach,
    backend: Backend,
    quiesce: Quiesce,
    settle_window: Duration,
    budget: Budget,
    insist: bool,
    status: Option<Status>,
    scheduling: Scheduling,
    stack: usize,
    arena: usize,
}

impl Isolation {
    /// The settle window if nothing is said: longer than an IPI takes, shorter than anybody would call isolated.
    pub const SETTLE_WINDOW: Duration = Duration::from_micros(100);

    /// Strict isolation on this CPU, by the best backend there is.
    #[must_use]
    pub fn on(cpu: Cpu) -> Self {
        Self { cpu: Some(cpu), ..Self::unpinned() }
    }

    /// As [`Isolation::on`], wherever the scheduler puts the thread: what the thread itself does is
    /// enforced all the same; what is done to it cannot be told from what is done to others on its CPU.
    #[must_use]
    pub fn unpinned() -> Self {
        Self {
            cpu: None,
            mode: Mode::STRICT,
            on_breach: OnBreach::Report,
            backend: Backend::Auto,
            quiesce: Quiesce::default(),
            settle_window: Self::SETTLE_WINDOW,
            budget: Budget::UNLIMITED,
            insist: false,
            status: None,
            scheduling: Scheduling::Auto,
            stack: memory::STACK,
            arena: 0,
        }
    }

    /// What the thread may do without a breach.
    #[must_use]
    pub const fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// What is done about a breach.
    #[must_use]
    pub const fn on_breach(mut self, on_breach: OnBreach) -> Self {
        self.on_breach = on_breach;
        self
    }

    /// How it is enforced: this backend or none.
    #[must_use]
    pub const fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// What is finished on the CPU before user code goes on.
    #[must_use]
    pub const fn quiesce(mut self, quiesce: Quiesce) -> Self {
        self.quiesce = quiesce;
        self
    }

    /// How long after arming (and after an entry that the mode allows) an interrupt counts as one that was on
    /// its way before: the CPU is quiesced again, and it is counted among [`races`](crate::Snapshot::races)
    /// instead of being a breach. [`SETTLE_WINDOW`](Self::SETTLE_WINDOW) if nothing is said, one second at most. Only the backend
    /// `task-isolation` asks.
    #[must_use]
    pub const fn settle_window(mut self, window: Duration) -> Self {
        self.settle_window = window;
        self
    }

    /// How often the slow path may be taken.
    #[must_use]
    pub const fn budget(mut self, budget: Budget) -> Self {
        self.budget = budget;
        self
    }

    /// Refuse where something would be weaker than full isolation, instead of saying so and going on.
    #[must_use]
    pub const fn insist(mut self, insist: bool) -> Self {
        self.insist = insist;
        self
    }

    /// How the thread is scheduled.
    #[must_use]
    pub const fn scheduling(mut self, scheduling: Scheduling) -> Self {
        self.scheduling = scheduling;
        self
    }

    /// How many bytes of the stack are pre-faulted; 256 KiB if nothing is said.
    #[must_use]
    pub const fn stack(mut self, bytes: usize) -> Self {
        self.stack = bytes;
        self
    }

    /// Size of the arena that the thread allocates from while it is isolated, in a program whose global
    /// allocator is [`WorkerAlloc`](crate::arena::WorkerAlloc); 0, the default, for none.
    #[must_use]
    pub const fn arena(mut self, bytes: usize) -> Self {
        self.arena = bytes;
        self
    }

    /// Where counts and breaches go, for a block that somebody else (a supervisor, an observer) maps
    /// too. Without this the thread gets a block of its own: see [`Prepared::status`].
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.status = Some(status);
        self
    }

    /// What the thread does to itself, in the order that [`prepare`](crate::prepare) asks for. Says whether
    /// it is a real-time thread now.
    fn settle(&self, backend: Backend, weaknesses: &mut Vec<Weakness>) -> Result<(Former, bool), Unmet> {
        let mask = signals::block().map_err(|errno| Unmet::Call { call: "sigprocmask", errno })?;
        let process = std::process::id();
        let mut former = Former { mask, affinity: None, policy: None, arena: false, process };
        let mut facts = None;
        if let Some(cpu) = self.cpu {
            let (found, before) = cpu::pin(cpu)?;
            former.affinity = Some(before);
            weaknesses.extend(found.weaknesses().into_iter().map(Weakness::Thread));
            facts = Some(found);
        } else {
            weaknesses.push(Weakness::NotPinned);
        }
        let mut note = |result: Result<(), prepare::Weakness>| {
            weaknesses.extend(result.err().map(Weakness::Thread));
        };
        note(memory::tune_malloc());
        note(memory::disable_thp());
        note(memory::keep_pages_in_place());
        let locked = memory::lock();
        if matches!(locked, Err(prepare::Weakness::MemoryNotLocked { .. })) {
            memory::touch_all();
        }
        note(locked);
        note(memory::prefault_stack(self.stack).map(drop));
        memory::touch_clocks();
        let mut real_time = false;
        if let Some(facts) = facts {
            let scheduled = scheduling::apply(self.scheduling, &facts);
            former.policy = scheduled.former;
            real_time = scheduled.real_time;
            scheduled.weaknesses.into_iter().for_each(|weakness| note(Err(weakness)));
            // Under task isolation the kernel parks it.
            if backend != Backend::TaskIsolation {
                note(scheduling::fair_server(&facts));
            }
            // Looks at every thread of the machine, so only where the answer decides.
            if self.insist {
                note(cpu::alone(facts.cpu));
            }
        }
        if self.arena > 0 {
            let installed = arena::install(self.arena)?;
            former.arena = true;
            note(installed.weakness.map_or(Ok(()), Err));
            if arena::is_global() == Some(false) {
                weaknesses.push(Weakness::ArenaUnused);
            }
        }
        Ok((former, real_time))
    }

    /// Prepares the calling thread: pins it, locks and pre-faults memory, takes the signals and events of
    /// the backend.
    ///
    /// # Errors
    /// [`Refused`], with everything that is in the way; the thread is as it was then.
    pub fn prepare(self) -> Result<Prepared, Refused> {
        let cpu = self.cpu;
        let refused = |unmet| Refused { cpu, unmet };
        if Thread::current().is_some_and(Thread::is_alive) {
            // Nothing more may be tried: the thread may be isolated at this moment.
            return Err(refused(vec![Unmet::AlreadyPrepared]));
        }
        let mut unmet = Vec::new();
        if let Some(Err(error)) = cpu.map(cpu::check) {
            unmet.push(Unmet::Cpu(error));
        }
        let backend = self.backend.choose(cpu).map_err(|reason| unmet.push(reason)).ok();
        let status = match self.status.clone().map_or_else(|| Status::create("alone"), Ok) {
            Ok(status) => Some(status),
            Err(error) => {
                unmet.push(Unmet::Status(error));
                None
            }
        };
        let (Some((backend, unused)), Some(status), true) = (backend, status, unmet.is_empty()) else {
            return Err(refused(unmet));
        };
        let mut weaknesses: Vec<Weakness> = unused.into_iter().collect();
        let (former, real_time) =
            self.settle(backend, &mut weaknesses).map_err(|error| refused(vec![error]))?;
        let purse = match self.budget {
            Budget::UNLIMITED => Purse::new(self.budget, 1, 0),
            budget => Purse::new(budget, ticks_per_second(), Clock::ticks()),
        };
        let setup = Setup {
            mode: self.mode,
            on_breach: self.on_breach,
            quiesce: self.quiesce,
            real_time,
            gate: backend.gate(),
            purse,
        };
        let failed = |call| move |errno| refused(vec![Unmet::Call { call, errno }]);
        let page = Page::install(&setup, status.clone()).map_err(failed("map the thread's page"))?;
        let wanted = Wanted { cpu, quiesce: self.quiesce, settle: self.settle_window };
        let engine = Engine::prepare(backend, &page, &wanted, &mut weaknesses)
            .map_err(|error| refused(vec![error]))?;
        // What a predecessor on the same block was doing when it was killed is not what this thread does.
        page.thread().set_state(State::Off);
        status.words().backend.store(backend.number(), Ordering::Release);
        status.words().sees_faults.store(u32::from(engine.sees_faults()), Ordering::Release);
        let prepared = Prepared {
            engine,
            page,
            _former: former,
            cpu,
            backend,
            quiesce: self.quiesce,
            status,
            weaknesses,
            reporter: tracing::dispatcher::get_default(Clone::clone),
            _thread: PhantomData,
        };
        if self.insist && !prepared.weaknesses.is_empty() {
            let unmet = prepared.weaknesses.iter().cloned().map(Unmet::Weak).collect();
            return Err(refused(unmet));
        }
        prepared.say();
        prepared.report_left_over();
        Ok(prepared)
    }
}

/// What the thread had before it was prepared; given back when this is dropped.
#[derive(Debug)]
struct Former {
    mask: FormerMask,
    affinity: Option<FormerAffinity>,
    policy: Option<scheduling::Former>,
    /// The thread was given an arena.
    arena: bool,
    /// The process this belongs to; a forked child that drops its copy changes nothing.
    process: u32,
}

impl Drop for Former {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        if self.arena {
            arena::release();
        }
        // Each may be refused for a reason that is not ours (privileges were dropped, CPUs are gone).
        let policy = self.policy.take().map_or(Ok(()), |former| former.restore());
        let affinity = self.affinity.take().map_or(Ok(()), |former| former.restore());
        for (what, result) in [("scheduling", policy), ("CPUs", affinity), ("signals", self.mask.restore())] {
            if let Err(errno) = result {
                tracing::debug!("the thread does not get its former {what} back: {errno}");
            }
        }
    }
}

/// A thread that is ready to be isolated, by [`Prepared::arm`]. Belongs to the thread that made it.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) engine: Engine,
    pub(crate) page: Page,
    /// Dropped after engine and page: it opens signals again.
    _former: Former,
    cpu: Option<Cpu>,
    backend: Backend,
    quiesce: Quiesce,
    status: Status,
    weaknesses: Vec<Weakness>,
    /// Who is told about breaches: the subscriber that the thread had when it was prepared.
    pub(crate) reporter: tracing::Dispatch,
    /// Neither `Send` nor `Sync`.
    _thread: PhantomData<*const ()>,
}

impl Prepared {
    /// Drops privileges: after everything that needs them, before the program's own set-up. Says once what
    /// is weaker for it. The wish to die with a parent is forgotten by the kernel and must be made again:
    /// [`die_with_parent`](crate::prepare::privileges::die_with_parent).
    ///
    /// # Errors
    /// [`PrivilegeError`]; the process may be between identities then, and should end.
    pub fn drop_privileges(&mut self, privileges: Privileges) -> Result<(), PrivilegeError> {
        let applied = privileges::apply(privileges)?;
        for weakness in applied.weaknesses {
            tracing::warn!("after dropping privileges: {weakness}");
            self.weaknesses.push(Weakness::Thread(weakness));
        }
        Ok(())
    }

    /// The backend that was taken.
    #[must_use]
    pub const fn backend(&self) -> Backend {
        self.backend
    }

    /// What is weaker than full isolation here.
    #[must_use]
    pub fn weaknesses(&self) -> &[Weakness] {
        &self.weaknesses
    }

    /// Whether page faults are breaches (otherwise an observer counts them).
    #[must_use]
    pub fn sees_page_faults(&self) -> bool {
        self.engine.sees_faults()
    }

    /// Where counts and breaches are.
    #[must_use]
    pub const fn status(&self) -> &Status {
        &self.status
    }

    /// The CPU, unless it is not pinned.
    #[must_use]
    pub const fn cpu(&self) -> Option<Cpu> {
        self.cpu
    }

    /// Says once what was taken and what is weaker than asked.
    fn say(&self) {
        let weaker: Vec<String> = self.weaknesses.iter().map(ToString::to_string).collect();
        tracing::info!(cpu = self.cpu.map(|cpu| cpu.0), backend = %self.backend, "prepared for isolation; weaker than full isolation: {}",
            if weaker.is_empty() { "nothing".to_owned() } else { weaker.join("; ") });
    }

    /// What a predecessor on the same status block, a worker that died at its breach, could not report.
    fn report_left_over(&self) {
        let breaches = self.status.breaches(self.status.reported());
        if !breaches.is_empty() {
            tracing::warn!(
                "the thread that was isolated here before ended without reporting {} breaches:",
                breaches.len()
            );
            crate::strict::report_all(&self.status, &breaches);
        }
    }

    /// Quiesces the CPU and isolates the thread: from the return on, what the mode forbids is a breach.
    ///
    /// # Errors
    /// [`Refused`], with every unmet precondition; the thread is not isolated then.
    pub fn arm(&mut self) -> Result<Strict<'_>, Refused> {
        // A `Strict` that was leaked may have left the gate shut.
        if self.page.thread().is_here() {
            self.page.thread().release();
        }
        self.isolate()?;
        Ok(Strict::new(self))
    }

    /// Checks, quiesces, switches the backend on and shuts the gate.
    pub(crate) fn isolate(&self) -> Result<(), Refused> {
        let thread = self.page.thread();
        let refused = |unmet| Refused { cpu: self.cpu, unmet };
        if !thread.is_here() {
            return Err(refused(vec![Unmet::WrongThread]));
        }
        let mut unmet = Vec::new();
        // Where the kernel isolates, it says so itself, and all the rest that is missing with it.
        let kernel = thread.gate() == Gate::Kernel;
        if let Some(cpu) = self.cpu.filter(|_| !kernel) {
            let allowed = cpu::allowed();
            if !allowed.iter().eq([cpu]) {
                unmet.push(Unmet::AllowedCpus { cpu, allowed });
            }
        }
        if let Err(reason) = self.engine.check(thread) {
            unmet.push(reason);
        }
        if !unmet.is_empty() {
            return Err(refused(unmet));
        }
        if self.quiesce.contains(Quiesce::VMSTAT)
            && !kernel
            && let Err(error) = crate::quiesce::refresh_vmstat()
        {
            tracing::warn!(
                "cannot fold the kernel's per-CPU statistics (/proc/sys/vm/stat_refresh): {error}"
            );
        }
        thread.quiesce();
        let words = self.status.words();
        words.cpu.store(self.cpu.map_or(u32::MAX, |cpu| cpu.0 as u32), Ordering::Relaxed);
        words.pid.store(std::process::id(), Ordering::Relaxed);
        words.tid.store(nix::unistd::gettid().as_raw() as u32, Ordering::Relaxed);
        self.engine.arm(thread).map_err(|reason| refused(vec![reason]))?;
        thread.isolate().map_err(|refusal| refused(refusal.unmet()))?;
        bump(&words.armed, 1);
        Ok(())
    }

    /// Isolates again behind a system call that the mode allows, which may have changed the signal mask or
    /// handlers. Isolation is off when that is refused.
    pub(crate) fn shut_again(&self) -> Result<(), Refused> {
        let thread = self.page.thread();
        if let Err(reason) = self.engine.check(thread) {
            thread.release();
            return Err(Refused { cpu: self.cpu, unmet: vec![reason] });
        }
        thread.quiesce();
        thread.isolate().map_err(|refusal| {
            thread.release();
            Refused { cpu: self.cpu, unmet: refusal.unmet() }
        })
    }

    /// Gives isolation back.
    pub(crate) fn give_back(&self) {
        let thread = self.page.thread();
        if thread.is_here() {
            thread.release();
            thread.take_counts();
            self.engine.disarm();
            arena::settle();
            arena::publish(self.status.words());
        }
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if self.page.thread().is_here() {
            // A `Strict` that was leaked instead of dropped has left the gate shut.
            self.report_unseen();
            self.give_back();
            self.engine.unprepare();
        }
    }
}

/// For budgets, which need no precision: where the kernel does not trust the counter, 4 GHz, which few
/// CPUs have, so that a budget errs on the strict side.
fn ticks_per_second() -> u64 {
    Clock::tsc().map_or(4_000_000_000, |clock| clock.hertz())
}
