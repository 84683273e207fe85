//! The load: a command of the user's that runs while the CPU is measured, on all the other CPUs.
//!
//! Contract: it runs in a process group of its own, under a keeper, a child that does nothing else. The
//! keeper ends the whole group, and whoever of its processes left that, when it is told to, and also
//! when the program that told it has gone away without a word, however that happened. Standard output
//! belongs to the results, so the load's goes to standard error; its input is empty.

use super::process::{self, Child, ForkError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, setpgid};
use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long the load may take to end when asked to.
const GRACE: Duration = Duration::from_millis(500);
/// How long killed processes may take to be gone.
const GONE: Duration = Duration::from_secs(2);
/// How often the keeper looks after the load.
const LOOK: Duration = Duration::from_millis(10);

/// Why there is no load.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// No keeper.
    #[error("cannot start a process for the load: {0}")]
    Fork(#[from] ForkError),
    /// No pipe to it.
    #[error("cannot make a pipe for the load: {0}")]
    Pipe(#[source] std::io::Error),
}

/// A load that was started.
#[derive(Debug)]
pub(super) struct Load {
    keeper: Child,
    /// Closed to end the load.
    orders: Option<PipeWriter>,
    news: PipeReader,
    started: Instant,
    ended: Option<Ended>,
}

/// How the load ended by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Ended {
    /// As `waitpid` says it.
    pub(super) status: ExitStatus,
    /// When, after its start.
    pub(super) after: Duration,
}

impl Load {
    /// Starts `sh -c command`.
    pub(super) fn start(command: &str) -> Result<Self, LoadError> {
        let (ours, orders) = pipe().map_err(LoadError::Pipe)?;
        let (news, theirs) = pipe().map_err(LoadError::Pipe)?;
        let kept_here = [orders.as_raw_fd(), news.as_raw_fd()];
        let keeper = process::fork_child(move || {
            for fd in kept_here {
                // The keeper's copies: while it has one, it would not see that the program has gone.
                let _ = nix::unistd::close(fd);
            }
            keep(command, &ours, theirs)
        })?;
        Ok(Self { keeper, orders: Some(orders), news, started: Instant::now(), ended: None })
    }

    /// How it ended, if it did so by itself.
    pub(super) fn ended(&mut self) -> Option<Ended> {
        if self.ended.is_none() && readable(&self.news, PollTimeout::ZERO) {
            let mut raw = [0; 12];
            self.ended = Some(match self.news.read_exact(&mut raw) {
                Ok(()) => {
                    let [s0, s1, s2, s3, nanos @ ..] = raw;
                    Ended {
                        status: ExitStatus::from_raw(i32::from_ne_bytes([s0, s1, s2, s3])),
                        after: Duration::from_nanos(u64::from_ne_bytes(nanos)),
                    }
                }
                // Without a word: the keeper was killed, and the load with it.
                Err(_) => Ended {
                    status: ExitStatus::from_raw(Signal::SIGKILL as i32),
                    after: self.started.elapsed(),
                },
            });
        }
        self.ended
    }

    /// Ends it, with everything that it started.
    pub(super) fn end(mut self) {
        self.order_end();
    }

    fn order_end(&mut self) {
        self.orders = None;
        let deadline = Instant::now() + GRACE + 2 * GONE;
        while self.keeper.ended().is_none() && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.order_end();
    }
}

/// Whether a read would not wait: there is something, or nobody will ever write.
fn readable(pipe: &PipeReader, timeout: PollTimeout) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, timeout), Ok(n) if n > 0)
}

/// The keeper's life.
fn keep(command: &str, orders: &PipeReader, mut news: PipeWriter) -> i32 {
    // Neither the terminal's signals nor its end are for us: the pipe says when it is over.
    let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
    // Whoever of the load's processes loses its parent becomes our child, to be found and ended.
    let _ = nix::sys::prctl::set_child_subreaper(true);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).stdin(Stdio::null()).stdout(std::io::stderr()).process_group(0);
    process::dies_with_us(&mut shell);
    let started = Instant::now();
    let mut tell = |status: i32| {
        let nanos = started.elapsed().as_nanos() as u64;
        let _ = news.write_all(&[&status.to_ne_bytes()[..], &nanos.to_ne_bytes()].concat());
    };
    let group = match shell.spawn() {
        Ok(child) => Pid::from_raw(child.id().cast_signed()),
        Err(error) => {
            tracing::error!("cannot run sh for the load: {error}");
            tell(127 << 8);
            return 1;
        }
    };
    // The leader stays unreaped to the end, and so the group's id stays its own.
    let mut told = false;
    let look = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
    while !readable(orders, look) {
        reap_others(group);
        if !told && let Some(status) = leader_ended(group) {
            told = true;
            tell(status);
        }
    }
    let _ = killpg(group, Signal::SIGTERM);
    if !all_gone_within(GRACE, group) {
        let _ = killpg(group, Signal::SIGKILL);
        let deadline = Instant::now() + GONE;
        while !all_gone_within(LOOK, group) {
            if Instant::now() > deadline {
                return 1;
            }
            for pid in children() {
                // A child that was not reaped, so the id is still its own.
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    }
    let _ = waitpid(group, Some(WaitPidFlag::WNOHANG));
    0
}

/// How the group's leader ended, as waitpid(2) has it; leaves it to be reaped.
fn leader_ended(leader: Pid) -> Option<i32> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(leader), flags) {
        Ok(WaitStatus::Exited(_, code)) => Some(code << 8),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(signal as i32),
        _ => None,
    }
}

fn reap_others(leader: Pid) {
    for pid in children().into_iter().filter(|pid| *pid != leader) {
        let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
    }
}

/// Waits until the leader is dead and nobody else is left: the oldest of whoever is left would be our
/// child.
fn all_gone_within(time: Duration, leader: Pid) -> bool {
    let deadline = Instant::now() + time;
    loop {
        reap_others(leader);
        if leader_ended(leader).is_some() && children().iter().all(|pid| *pid == leader) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK / 2);
    }
}

/// Our children that were not reaped.
fn children() -> Vec<Pid> {
    let text = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok().map(Pid::from_raw)).collect()
}

/// What an end means that nobody asked for, if it is a failure.
pub(super) fn failure(ended: Ended) -> Option<String> {
    let after = ended.after.as_secs_f64();
    match (ended.status.code(), ended.status.signal()) {
        (Some(0), _) => None,
        (Some(127), _) => Some("the load's command was not found (sh ended with exit status 127)".to_owned()),
        (Some(126), _) => {
            Some("the load's command cannot be executed (sh ended with exit status 126)".to_owned())
        }
        (Some(code), _) => Some(format!("the load ended with exit status {code} after {after:.1} s")),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal).map_or_else(|_| signal.to_string(), |s| s.to_string());
            Some(format!("the load was killed by {name} after {after:.1} s"))
        }
        (None, None) => Some(format!("the load ended after {after:.1} s ({})", ended.status)),
    }
}
