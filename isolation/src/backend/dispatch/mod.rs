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

use super::handlers;
use super::sys::{self, FaultEvent};
use crate::error::{Unmet, Weakness};
use crate::thread::Thread;
use nix::errno::Errno;
use std::sync::OnceLock;

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

/// The signals that breaches come as.
pub(crate) const SIGNALS: &[libc::c_int] = &[libc::SIGSYS, libc::SIGTRAP];

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
        thread.restorer.set(handlers::take_signals(SIGNALS).map_err(failed("sigaction"))?);
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
        handlers::keep_signals(thread, SIGNALS)?;
        handlers::let_through(SIGNALS, 1..=libc::SIGRTMAX());
        if let Some(faults) = &self.faults {
            // Off first: many faults in one tick throttle an event until the next one (Linux
            // kernel/events/core.c, `max_samples_per_tick`), and being switched on anew ends that.
            let result = faults.switch(false).and_then(|()| faults.switch(true));
            result.map_err(failed("switch the page-fault event on"))?;
        }
        sys::dispatch_on(&thread.selector, thread.restorer.get())
            .map_err(failed("prctl(PR_SET_SYSCALL_USER_DISPATCH)"))
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
        sys::unblock(handlers::mask(SIGNALS));
        self.stack.restore();
    }
}
