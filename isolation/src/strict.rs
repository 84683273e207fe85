//! A thread that is isolated, until it is disarmed.
//!
//! Contract: [`Strict::turn`] costs a few loads and two predictable branches when nothing has happened,
//! and no system call.
//! Everything else is cold. A `Strict` belongs to the thread that armed; a forked child or another
//! thread that gets at it is told so and changes nothing.

use crate::cause::{Breach, Detail};
use crate::error::{Refused, StrictError};
use crate::isolation::Prepared;
use crate::mode::OnBreach;
use crate::status::{State, Status};
use crate::thread::{SlowPathError, Thread};
use isoplane_memory::Kernel;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// An isolated thread's handle on its isolation. Made by [`Prepared::arm`]; dropping it disarms.
#[derive(Debug)]
pub struct Strict<'a> {
    prepared: &'a Prepared,
    thread: &'a Thread,
}

impl<'a> Strict<'a> {
    pub(crate) fn new(prepared: &'a Prepared) -> Self {
        Self { prepared, thread: prepared.page.thread() }
    }

    /// Looks whether isolation was broken, once a turn of the program's loop. After a breach under
    /// [`OnBreach::Report`] this reports it through the slow path and arms again.
    ///
    /// # Errors
    /// [`StrictError::Breach`] under [`OnBreach::Stop`], once; [`StrictError::Rearm`] when arming again was
    /// refused; in both cases isolation is off. [`StrictError::WrongThread`] as it says.
    #[inline(always)]
    pub fn turn(&mut self) -> Result<(), StrictError> {
        if self.thread.is_undisturbed() && self.thread.is_here() {
            return Ok(());
        }
        self.look()
    }

    #[cold]
    fn look(&mut self) -> Result<(), StrictError> {
        if !self.thread.is_here() {
            return Err(StrictError::WrongThread);
        }
        self.thread.look();
        match self.thread.state() {
            State::Armed | State::Off => Ok(()),
            // A system call that the mode allows and that needed its own frame: shut the gate behind it.
            State::SlowPath => Ok(self.prepared.shut_again()?),
            State::Broken => self.broken(),
        }
    }

    fn broken(&mut self) -> Result<(), StrictError> {
        let status = self.prepared.status();
        let breaches = status.breaches(status.reported());
        if self.thread.on_breach() == OnBreach::Stop {
            self.thread.release();
            status.set_reported();
            return match breaches.last() {
                Some((_, breach)) => Err(StrictError::Breach(*breach)),
                None => Ok(()),
            };
        }
        self.prepared.report(&breaches);
        Ok(self.prepared.isolate()?)
    }

    /// Visits the kernel by permission: system calls are allowed in `visit`, the rest of the mode holds.
    /// Afterwards the CPU is quiesced and the thread isolated again. Counted and timed.
    ///
    /// # Errors
    /// [`SlowPathError::OverBudget`] (`visit` has not run), [`SlowPathError::WrongThread`].
    pub fn slow_path<R>(&mut self, visit: impl FnOnce(&Kernel) -> R) -> Result<R, SlowPathError> {
        if !self.thread.is_here() {
            return Err(SlowPathError::WrongThread);
        }
        self.thread.visit(true, visit)
    }

    /// Whether the thread is isolated at this moment.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        // The kernel may have done something that no turn has seen yet: `ONESHOT` ends isolation silently.
        if self.thread.is_here() && !self.thread.is_undisturbed() {
            self.thread.look();
        }
        self.thread.is_here() && self.thread.state() == State::Armed
    }

    /// Arms again: after [`OnBreach::Stop`], after `ONESHOT` or [`release`](crate::release). A breach that no
    /// turn has seen is reported first.
    ///
    /// # Errors
    /// [`Refused`]. Arming what is armed is refused too.
    pub fn rearm(&mut self) -> Result<(), Refused> {
        if self.is_armed() {
            let unmet = vec![crate::error::Unmet::Armed];
            return Err(Refused { cpu: self.prepared.cpu(), unmet });
        }
        self.prepared.report_unseen();
        self.prepared.isolate()
    }

    /// What the thread was prepared with.
    #[must_use]
    pub const fn prepared(&self) -> &Prepared {
        self.prepared
    }

    /// Gives isolation back. Dropping does the same.
    pub fn disarm(self) {}
}

impl Drop for Strict<'_> {
    fn drop(&mut self) {
        self.prepared.report_unseen();
        self.prepared.give_back();
    }
}

impl Prepared {
    fn report(&self, breaches: &[(u64, Breach)]) {
        // Never refused: a breach that nobody hears of is worse than a visit too many.
        let _ = self.page.thread().visit(false, |_| {
            tracing::dispatcher::with_default(&self.reporter, || {
                report_all(self.status(), breaches);
            });
        });
    }

    /// Reports what no turn has seen: whatever the policy was, nobody would hear of it otherwise. For a
    /// thread whose isolation ends, or begins anew.
    pub(crate) fn report_unseen(&self) {
        let (thread, status) = (self.page.thread(), self.status());
        if thread.is_here() {
            thread.look();
        }
        if !thread.is_here() || status.reported() == status.breach_count() {
            return;
        }
        if thread.state() == State::Armed {
            thread.release();
        }
        let breaches = status.breaches(status.reported());
        if std::thread::panicking() {
            // A second panic would end the process before the first one is heard of.
            let _ = catch_unwind(AssertUnwindSafe(|| self.report(&breaches)));
        } else {
            self.report(&breaches);
        }
    }
}

/// Tells the program about breaches, and the block that it was told. For a thread that may enter the
/// kernel: one that is not isolated, or in the slow path.
pub(crate) fn report_all(status: &Status, breaches: &[(u64, Breach)]) {
    for (number, breach) in breaches {
        report(*number, breach);
    }
    status.set_reported();
}

fn report(number: u64, breach: &Breach) {
    let (cause, cpu, tsc) = (breach.cause.name(), breach.cpu, breach.tsc);
    let instruction = breach.detail.instruction().map(|at| tracing::field::display(format!("{at:#x}")));
    let sender = breach.sender.map(tracing::field::display);
    match breach.detail {
        Detail::Syscall { number: syscall, call_address, arch } => tracing::error!(
            number,
            cause,
            cpu,
            tsc,
            syscall,
            name = crate::cause::syscall_name(syscall, arch),
            call_address = format_args!("{call_address:#x}"),
            "isolation was broken: {breach}"
        ),
        Detail::Fault { address, instruction } => tracing::error!(
            number,
            cause,
            cpu,
            tsc,
            address = format_args!("{address:#x}"),
            instruction = format_args!("{instruction:#x}"),
            "isolation was broken: {breach}"
        ),
        Detail::Signal { number: signal, .. } => tracing::error!(
            number,
            cause,
            cpu,
            tsc,
            signal,
            instruction,
            sender,
            "isolation was broken: {breach}"
        ),
        Detail::Interrupt { irq, .. } => {
            tracing::error!(
                number,
                cause,
                cpu,
                tsc,
                irq,
                instruction,
                sender,
                "isolation was broken: {breach}"
            );
        }
        Detail::Task { pid, .. } => {
            tracing::error!(
                number,
                cause,
                cpu,
                tsc,
                pid,
                instruction,
                sender,
                "isolation was broken: {breach}"
            );
        }
        Detail::Moved { to, .. } => {
            tracing::error!(
                number,
                cause,
                cpu,
                tsc,
                to,
                instruction,
                sender,
                "isolation was broken: {breach}"
            );
        }
        Detail::At { .. } | Detail::Unquiet { .. } => {
            tracing::error!(number, cause, cpu, tsc, instruction, sender, "isolation was broken: {breach}");
        }
    }
}
