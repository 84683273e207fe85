//! The `dispatch` backend: strict mode on a stock kernel, Linux 5.13 or later, x86-64.
//!
//! Contract: it enforces system calls (syscall user dispatch: number and call address) and, where perf
//! events are allowed, page faults in user mode (a software event with `sigtrap`: address and
//! instruction). It enforces nothing else; interruptions are for an observer to count.
//!
//! | detail | why |
//! |---|---|
//! | the exempt range is the C library's signal restorer | any handler may return while the gate is shut; a handler's other restorer is sent through it |
//! | the gate is one byte that the thread itself writes | the slow path costs no system call to enter or leave |
//! | the thread's page is wiped by fork | neither trapping nor events are inherited, and a child must not think they are |

mod handlers;
pub(crate) mod sys;

use crate::error::{Unmet, Weakness};
use crate::thread::Thread;
use nix::errno::Errno;
use std::sync::OnceLock;
use sys::FaultEvent;

/// Whether the running kernel can do it, or why it cannot. The kernel is asked once, by the first thread
/// that wants to know, which is not isolated yet: the answer is a system call.
pub(crate) fn probe() -> Result<(), Unmet> {
    static ANSWER: OnceLock<Result<(), Errno>> = OnceLock::new();
    // Switching off what is off is allowed, and says whether the call is known.
    ANSWER.get_or_init(sys::dispatch_off).map_err(|errno| Unmet::Backend {
        backend: crate::Backend::Dispatch,
        reason: format!(
            "this kernel has no syscall user dispatch ({errno}); it needs Linux 5.11 or later on x86-64"
        ),
    })
}

/// SIGSYS and SIGTRAP, as a mask.
const OURS: u64 = 1 << (libc::SIGSYS - 1) | 1 << (libc::SIGTRAP - 1);

/// Opens the signals again if somebody has blocked them, also in handlers, and takes them back if somebody has installed
/// handlers of their own for them.
fn keep_signals(thread: &Thread) -> Result<(), Unmet> {
    sys::unblock(OURS);
    // The rest is blocked, unless the program has opened it: looked at when the thread arms.
    handlers::let_through([libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL]);
    if handlers::have_signals() {
        return Ok(());
    }
    tracing::warn!(
        "a handler for SIGSYS or SIGTRAP was installed over that of the isolation; it gets \
         what is not the isolation's, and the signals are the isolation's again"
    );
    let restorer = handlers::take_signals().map_err(|errno| Unmet::Call { call: "sigaction", errno })?;
    thread.restorer.set(restorer);
    Ok(())
}

/// Before the gate is shut behind a visit: the visit may have installed handlers.
pub(crate) fn after_visit(thread: &Thread) {
    if let Err(error) = keep_signals(thread) {
        tracing::warn!("cannot take SIGSYS and SIGTRAP back: {error}");
    }
}

/// What one prepared thread holds of the backend.
#[derive(Debug)]
pub(crate) struct Engine {
    faults: Option<FaultEvent>,
    stack: sys::SignalStack,
}

impl Engine {
    /// Takes the signals, puts the thread's handlers on its own stack, opens the fault event.
    pub(crate) fn prepare(page: &crate::thread::Page, weaknesses: &mut Vec<Weakness>) -> Result<Self, Unmet> {
        let failed = |call| move |errno: Errno| Unmet::Call { call, errno };
        let thread = page.thread();
        thread.restorer.set(handlers::take_signals().map_err(failed("sigaction"))?);
        let (base, bytes) = page.signal_stack();
        let stack = sys::SignalStack::set(base, bytes).map_err(failed("sigaltstack"))?;
        let faults = match FaultEvent::open(handlers::perf_data(thread)) {
            Ok(event) => Some(event),
            Err(errno) => {
                weaknesses.push(Weakness::PageFaultsUnseen { errno });
                None
            }
        };
        Ok(Self { faults, stack })
    }

    /// Page faults are enforced, not only counted.
    pub(crate) fn sees_faults(&self) -> bool {
        self.faults.is_some()
    }

    /// Everything but shutting the gate.
    pub(crate) fn arm(&self, thread: &Thread) -> Result<(), Unmet> {
        let failed = |call| move |errno: Errno| Unmet::Call { call, errno };
        keep_signals(thread)?;
        handlers::let_through(1..=libc::SIGRTMAX());
        if let Some(faults) = &self.faults {
            // Off first: many faults in one tick throttle an event until the next one (Linux
            // kernel/events/core.c, `max_samples_per_tick`), and being switched on anew ends that.
            let result = faults.switch(false).and_then(|()| faults.switch(true));
            result.map_err(failed("switch the page-fault event on"))?;
        }
        sys::dispatch_on(&thread.selector, thread.restorer.get())
            .map_err(failed("prctl(PR_SET_SYSCALL_USER_DISPATCH)"))
    }

    /// Takes the signals back if somebody has installed handlers of their own for them.
    pub(crate) fn keep_signals(&self, thread: &Thread) -> Result<(), Unmet> {
        keep_signals(thread)
    }

    /// The gate is open already; from here on the kernel does not look at it.
    pub(crate) fn disarm(&self) {
        // Neither can fail for a thread that has armed; if one did, the gate is open all the same.
        if let Err(errno) = sys::dispatch_off() {
            tracing::warn!("switching syscall user dispatch off: {errno}");
        }
        if let Some(faults) = &self.faults
            && let Err(errno) = faults.switch(false)
        {
            tracing::warn!("switching the page-fault event off: {errno}");
        }
    }

    /// Gives the thread its former signal stack back.
    pub(crate) fn unprepare(&self) {
        // A page fault that came while SIGTRAP was blocked waits still, and is nobody's after this.
        sys::unblock(OURS);
        self.stack.restore();
    }
}
