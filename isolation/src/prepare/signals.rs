//! Which signals reach an isolated thread: those that its own instructions cause, and ours.
//!
//! Contract: SIGSYS and SIGTRAP are how the kernel tells a breach, and the rest of those left open are
//! answers to an instruction that cannot go on; blocking such a signal kills the process. Anything else
//! sent to the process goes to another of its threads or waits; SIGKILL and SIGSTOP cannot be blocked.
//! The C library keeps its own two signals (32 and 33) open.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};

/// Signals that an isolated thread still takes.
pub const OPEN: [Signal; 6] =
    [Signal::SIGSYS, Signal::SIGTRAP, Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL];

/// The signals that a thread had blocked before.
#[derive(Debug, Clone, Copy)]
pub struct FormerMask(SigSet);

impl FormerMask {
    /// Gives the calling thread, which must be the one that blocked, its former mask back. Signals that
    /// waited are delivered before this returns.
    ///
    /// # Errors
    /// None that the kernel documents for a mask that it once returned.
    pub fn restore(&self) -> Result<(), Errno> {
        self.0.thread_set_mask()
    }
}

/// Blocks every signal but [`OPEN`] for the calling thread; these it opens.
///
/// # Errors
/// None that the kernel documents for these arguments.
pub fn block() -> Result<FormerMask, Errno> {
    let mut blocked = SigSet::all();
    for signal in OPEN {
        blocked.remove(signal);
    }
    blocked.thread_swap_mask(SigmaskHow::SIG_SETMASK).map(FormerMask)
}
