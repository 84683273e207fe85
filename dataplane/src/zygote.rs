//! The zygote: a single-threaded child that forks the workers, and forks them again when they die.
//!
//! Contract: it is forked while the program has one thread, so what its children inherit is whole; it
//! never runs an app, touches no frame and opens nothing. It dies with the program (PDEATHSIG and the
//! socket), and the workers die with it. Its only talk with the program is fixed-size [`Event`]s over a
//! socket pair; worker states are in the control region.
#![allow(unsafe_code, reason = "fork and prctl; see each block")]

use crate::builder::Restart;
use crate::control::{Control, WorkerState};
use crate::worker::{Body, End, Placement};
use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// What happened to a worker; sent to the program.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Event {
    pub(crate) kind: u32,
    pub(crate) worker: u32,
    pub(crate) pid: u32,
    /// Exit code, or 256 plus the signal's number.
    pub(crate) status: u32,
    /// Pause before the next start, in milliseconds.
    pub(crate) pause_ms: u32,
}

pub(crate) const STARTED: u32 = 1;
pub(crate) const DIED: u32 = 2;
pub(crate) const GIVEN_UP: u32 = 3;
pub(crate) const STOPPED: u32 = 4;
pub(crate) const FORK_FAILED: u32 = 5;

/// Exit code of a worker whose app panicked, or that could not be isolated again after a breach.
const FAILED: i32 = 101;
/// Exit code of a worker that could not be isolated: it would fare no better next time.
const REFUSED: i32 = 103;
/// Exit code of a worker whose parent was gone before it could ask to die with it.
const ORPHANED: i32 = 102;

/// The program's side of a zygote that was just forked.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) pid: Pid,
    pub(crate) events: OwnedFd,
}

/// Forks the zygote. The program must have one thread; the builder has made sure.
pub(crate) fn launch(bodies: &mut [Body], control: &Control, restart: Restart) -> Result<Handle, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    let program = getpid();
    // SAFETY: the process has one thread (checked by the builder just before), so the child may run
    // any code: no lock can be held by a thread that does not exist in it.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(theirs);
            Ok(Handle { pid: child, events: ours })
        }
        ForkResult::Child => {
            drop(ours);
            if !die_with(program) {
                exit_now(ORPHANED);
            }
            let zygote =
                Zygote { bodies, control, restart, events: theirs, signals: -1, children: Vec::new() };
            exit_now(contained(|| zygote.run()))
        }
    }
}

/// A panic must not unwind into the program's own code, of which this process has a copy.
fn contained(main: impl FnOnce() -> i32) -> i32 {
    catch_unwind(AssertUnwindSafe(main)).unwrap_or(FAILED)
}

/// Ends this process without running what the program registered for its own end.
fn exit_now(code: i32) -> ! {
    // SAFETY: _exit ends the process and returns to nobody.
    unsafe { libc::_exit(code) }
}

/// Asks the kernel to kill this process when its parent dies; false when the parent is gone already.
fn die_with(parent: Pid) -> bool {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_ok() && getppid() == parent
}

fn set_name(name: &str) {
    // The kernel keeps 15 bytes; a longer name is cut, never an error.
    let bytes: Vec<u8> = name.bytes().filter(|b| *b != 0).take(15).collect();
    if let Ok(name) = std::ffi::CString::new(bytes) {
        let _ = nix::sys::prctl::set_name(&name);
    }
}

struct Child {
    worker: usize,
    pid: Option<Pid>,
    since: Instant,
    failures: u32,
    start_at: Option<Instant>,
}

struct Zygote<'a> {
    bodies: &'a mut [Body],
    control: &'a Control,
    restart: Restart,
    events: OwnedFd,
    /// The descriptor by which it hears of dead workers; -1 before it has one.
    signals: RawFd,
    children: Vec<Child>,
}

impl Zygote<'_> {
    fn run(mut self) -> i32 {
        set_name("isoplane-zygote");
        // Signals are the program's business: Ctrl-C reaches the whole group, and stopping is asked
        // for through the control region.
        let all = SigSet::all();
        let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&all), None);
        // A program that ignores SIGCHLD would have the kernel reap our workers behind our back.
        // SAFETY: the default action is no handler of ours.
        let _ = unsafe { nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigDfl) };
        let mut child_signal = SigSet::empty();
        child_signal.add(Signal::SIGCHLD);
        let Ok(signals) = SignalFd::with_flags(&child_signal, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        else {
            return 1;
        };
        self.signals = signals.as_raw_fd();
        let now = Instant::now();
        self.children = (0..self.bodies.len())
            .map(|worker| Child { worker, pid: None, since: now, failures: 0, start_at: Some(now) })
            .collect();
        loop {
            while let Ok(Some(_)) = signals.read_signal() {}
            self.reap();
            self.start_due();
            if self.children.iter().all(|c| c.pid.is_none() && c.start_at.is_none()) {
                return 0;
            }
            let pause = self
                .children
                .iter()
                .filter_map(|c| c.start_at)
                .min()
                .map(|at| at.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
            // Also wake up now and then: a worker may be asked to stop while it waits for its restart.
            let pause = pause.unwrap_or(Duration::from_millis(100)).min(Duration::from_millis(100));
            let timeout = PollTimeout::try_from(pause).unwrap_or(PollTimeout::from(100u8));
            let mut fds = [
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            ];
            let _ = poll(&mut fds, timeout);
            let hung_up =
                fds[1].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR));
            if hung_up {
                // The program is gone; the workers follow when we do.
                return 0;
            }
        }
    }

    fn tell(&self, kind: u32, child: &Child, pid: u32, status: u32, pause: Duration) {
        let event = Event {
            kind,
            worker: child.worker as u32,
            pid,
            status,
            pause_ms: u32::try_from(pause.as_millis()).unwrap_or(u32::MAX),
        };
        // A program that does not listen loses events, not workers.
        let _ = send(
            self.events.as_raw_fd(),
            bytemuck::bytes_of(&event),
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        );
    }

    fn start_due(&mut self) {
        let now = Instant::now();
        let mut children = std::mem::take(&mut self.children);
        for child in &mut children {
            let slot = self.control.slot(child.worker);
            if child.start_at.is_some() && child.failures > 0 && slot.must_stop() {
                child.start_at = None;
                slot.set_state(WorkerState::GivenUp);
                self.tell(GIVEN_UP, child, 0, 0, Duration::ZERO);
            }
            if child.start_at.is_none_or(|at| at > now) {
                continue;
            }
            child.since = now;
            match self.fork_worker(child.worker) {
                Ok(pid) => {
                    child.pid = Some(pid);
                    child.start_at = None;
                    self.tell(STARTED, child, pid.as_raw() as u32, 0, Duration::ZERO);
                }
                Err(errno) => {
                    let pause = Duration::from_secs(1);
                    child.start_at = Some(now + pause);
                    self.tell(FORK_FAILED, child, 0, errno as u32, pause);
                }
            }
        }
        self.children = children;
    }

    fn fork_worker(&mut self, worker: usize) -> Result<Pid, Errno> {
        let zygote = getpid();
        // SAFETY: the zygote has one thread for its whole life.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(child),
            ForkResult::Child => exit_now(contained(|| self.become_worker(worker, zygote))),
        }
    }

    fn become_worker(&mut self, worker: usize, zygote: Pid) -> i32 {
        if !die_with(zygote) {
            return ORPHANED;
        }
        // The supervisor's descriptors, the zygote's, and those of other workers: this one has no business
        // with them. What else is open is the program's own: its subscriber and its closures may write
        // there. Nothing is dropped in this process, so nobody closes them twice.
        for fd in [self.events.as_raw_fd(), self.signals].iter().chain(&self.bodies[worker].not_its_own) {
            let _ = nix::unistd::close(*fd);
        }
        let control = self.control.clone();
        let slot = control.slot(worker);
        slot.set_pid(getpid().as_raw() as u32);
        // SAFETY: the body is moved out of memory that this process, a fresh copy of the zygote,
        // never looks at again: it leaves by `exit_now`, which runs no destructors.
        let mut body = unsafe { std::ptr::read(&raw const self.bodies[worker]) };
        isoplane_memory::cache::forked();
        // SAFETY: the cache was made for this worker: neither program nor zygote touch its copy, and
        // the worker that had it before was reaped.
        unsafe { body.frames.adopt() };
        set_name(&format!("iso-{}", body.name));
        report_panics_to(control.clone(), worker);
        let prepared = body.prepare(Placement::Process);
        // Whoever changes user or group is not asked to die with its parent any more.
        if !die_with(zygote) {
            return ORPHANED;
        }
        let (body, end) = body.live(slot, prepared);
        // The zygote's copy is the one that counts.
        std::mem::forget(body);
        match end {
            End::Stopped => 0,
            End::Failed => FAILED,
            End::Refused => REFUSED,
        }
    }

    fn reap(&mut self) {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code as u32),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 256 + signal as u32),
                Err(Errno::EINTR) => continue,
                Err(Errno::ECHILD) => return self.none_left(),
                Ok(_) | Err(_) => return,
            };
            let mut children = std::mem::take(&mut self.children);
            if let Some(child) = children.iter_mut().find(|c| c.pid == Some(pid)) {
                child.pid = None;
                self.ended(child, pid, status);
            }
            self.children = children;
        }
    }

    /// The kernel knows of no child: whoever is still on the list died unseen.
    fn none_left(&mut self) {
        let mut children = std::mem::take(&mut self.children);
        for child in &mut children {
            if let Some(pid) = child.pid.take() {
                self.ended(child, pid, 256 + Signal::SIGKILL as u32);
            }
        }
        self.children = children;
    }

    fn ended(&self, child: &mut Child, pid: Pid, status: u32) {
        let slot = self.control.slot(child.worker);
        let pid = pid.as_raw() as u32;
        if status == 0 && slot.state() == WorkerState::Stopped {
            return self.tell(STOPPED, child, pid, status, Duration::ZERO);
        }
        let pause = if slot.must_stop() || status == REFUSED as u32 {
            None
        } else {
            self.restart.pause(child.failures, child.since.elapsed())
        };
        match pause {
            Some(pause) => {
                let long_life = child.since.elapsed() > self.restart.forgive_after();
                child.failures = if long_life { 1 } else { child.failures + 1 };
                // A pause that no clock can count is as good as a day.
                child.start_at = Some(Instant::now() + pause.min(Duration::from_secs(86_400)));
                slot.set_state(WorkerState::Dead);
                self.tell(DIED, child, pid, status, pause);
            }
            None => {
                slot.set_state(WorkerState::GivenUp);
                self.tell(GIVEN_UP, child, pid, status, Duration::ZERO);
            }
        }
    }
}

/// A panic in the worker leaves its message and place in the control slot; the program reports it.
fn report_panics_to(control: Control, worker: usize) {
    std::panic::set_hook(Box::new(move |info| {
        // What follows a panic enters the kernel, and is no breach: the worker is about to end.
        isoplane_isolation::release();
        let text = info.payload_as_str().unwrap_or("panic");
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line()));
        control.slot(worker).say(&format!("{text}{}", place.unwrap_or_default()));
    }));
}
