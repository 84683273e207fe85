//! Child processes that are forks of ours, and the things around them that need unsafe code.
//!
//! Contract: a fork is refused unless this process has one thread, so a child may run any code. A
//! [`Child`] that goes out of scope is killed and reaped. A child that asks to [`die_with`] its parent
//! does so however the parent ends.
#![allow(unsafe_code, reason = "fork, _exit and pre_exec; see each block")]

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getppid};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

/// Exit code of a child that panicked.
pub(super) const PANICKED: i32 = 101;
/// Exit code of a child whose parent was gone before it could ask to die with it.
pub(super) const ORPHANED: i32 = 102;

/// Why no child was made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForkError {
    /// Somebody started threads.
    #[error("this process has {0} threads; a fork needs one that is alone")]
    Threads(usize),
    /// The kernel's answer.
    #[error("fork: {0}")]
    Os(#[from] Errno),
}

/// A child that was forked.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    /// How it ended, once that is known.
    ended: Option<WaitStatus>,
}

/// Forks; the child runs `main`, and exits with what that returns.
pub(super) fn fork_child(main: impl FnOnce() -> i32) -> Result<Child, ForkError> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads != 1 {
        return Err(ForkError::Threads(threads));
    }
    // SAFETY: the process has one thread, so no lock is held by one that the child does not have: the
    // child may run any code.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Child { pid: child, ended: None }),
        ForkResult::Child => {
            // A panic must not unwind into the program's own code, of which this process has a copy.
            let code = catch_unwind(AssertUnwindSafe(main)).unwrap_or(PANICKED);
            // SAFETY: _exit ends the process and returns to nobody.
            unsafe { libc::_exit(code) }
        }
    }
}

impl Child {
    /// How it ended, if it did.
    pub(super) fn ended(&mut self) -> Option<WaitStatus> {
        if self.ended.is_none() {
            self.ended = match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => None,
                Ok(status) => Some(status),
                // Somebody else reaped it: all that is known is that it is gone.
                Err(_) => Some(WaitStatus::Exited(self.pid, 0)),
            };
        }
        self.ended
    }

    /// Kills it, and waits until it is gone.
    pub(super) fn end(&mut self) {
        if self.ended().is_none() {
            // Not reaped, so the id is still its own.
            let _ = kill(self.pid, Signal::SIGKILL);
            while matches!(waitpid(self.pid, None), Err(Errno::EINTR)) {}
            self.ended = Some(WaitStatus::Signaled(self.pid, Signal::SIGKILL, false));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.end();
    }
}

/// Asks the kernel to kill this process when its parent dies; false when the parent is gone already.
pub(super) fn die_with(parent: Pid) -> bool {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_ok() && getppid() == parent
}

/// Lets the program that a command starts be killed when this process dies.
pub(super) fn dies_with_us(command: &mut Command) {
    let us = nix::unistd::getpid();
    // SAFETY: between fork and exec only prctl, getppid and an error without allocation are used: all
    // async-signal-safe.
    unsafe {
        command.pre_exec(move || if die_with(us) { Ok(()) } else { Err(Errno::ESRCH.into()) });
    }
}
