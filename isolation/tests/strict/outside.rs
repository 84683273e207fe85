//! What other processes do to an isolated thread: stop it, trace it, move it, signal it. Under `dispatch` none
//! of that is a breach; under any backend none of it kills the thread, and it is enforced on afterwards as before.

use super::lab::{self, At, assert_syscall};
use crate::common::Test;
use isoplane_isolation::{Cause, OnBreach, State, Status, StrictError, Unmet};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

pub(crate) const CASES: &[Test] = &[
    ("outside::stop_and_continue", stop_and_continue),
    ("outside::signals_that_are_blocked", signals_that_are_blocked),
    ("outside::attach_and_detach", attach_and_detach),
    ("outside::seize_and_interrupt", seize_and_interrupt),
    ("outside::breach_under_a_tracer", breach_under_a_tracer),
    ("outside::traced_step_by_step", traced_step_by_step),
    ("outside::affinity_widened", affinity_widened),
    ("outside::affinity_widened_before_arming", affinity_widened_before_arming),
    ("outside::killed", killed),
];

/// What the worker and its parent tell each other.
#[repr(C)]
struct Shared {
    turns: AtomicU64,
    /// 1: make a forbidden call and go on; 2: end.
    order: AtomicU32,
    done: AtomicU32,
}

fn shared() -> &'static Shared {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a fresh shared mapping of zeroes, which are valid atomics; never unmapped.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED);
        &*at.cast::<Shared>()
    }
}

/// A worker in a process of its own, isolated and turning until it is told to end.
struct Worker {
    pid: Pid,
    shared: &'static Shared,
    status: Status,
}

impl Worker {
    fn start() -> Self {
        let (shared, status) = (shared(), Status::create("worker").expect("status"));
        let isolation = lab::isolation().status(status.clone()).on_breach(OnBreach::Report);
        let pid = lab::child(|| {
            lab::isolated(isolation, |strict, _| {
                loop {
                    match shared.order.swap(0, Ordering::AcqRel) {
                        1 => {
                            lab::getppid();
                            shared.done.fetch_add(1, Ordering::Release);
                        }
                        2 => break,
                        _ => {}
                    }
                    strict.turn().expect("turn");
                    shared.turns.fetch_add(1, Ordering::Release);
                }
            });
        });
        let worker = Self { pid, shared, status };
        worker.turns_on();
        worker
    }

    /// It goes on turning.
    fn turns_on(&self) {
        let now = self.shared.turns.load(Ordering::Acquire);
        lab::until("turns", || self.shared.turns.load(Ordering::Acquire) > now + 100);
    }

    /// Nothing that happened was a breach, and what is forbidden still is: it breaks once more, and ends.
    fn unharmed(&self) {
        self.turns_on();
        assert_eq!(self.status.state(), State::Armed);
        assert_eq!(self.status.breach_count(), 0, "{:x?}", self.status.breaches(0));
        self.shared.order.store(1, Ordering::Release);
        lab::until("made the call", || self.shared.done.load(Ordering::Acquire) == 1);
        self.turns_on();
        assert_syscall(&lab::only_recorded(&self.status), libc::SYS_getppid, At::Syscall);
        self.end();
    }

    fn end(&self) {
        self.shared.order.store(2, Ordering::Release);
        lab::ended_well(self.pid);
        assert_eq!(self.status.state(), State::Off);
    }
}

fn stop_and_continue() {
    lab::dispatch_only("stops are breaches");
    let worker = Worker::start();
    for _ in 0..20 {
        kill(worker.pid, Signal::SIGSTOP).expect("stop");
        let stopped = waitpid(worker.pid, Some(WaitPidFlag::WUNTRACED)).expect("wait");
        assert_eq!(stopped, WaitStatus::Stopped(worker.pid, Signal::SIGSTOP));
        // Stopped as it was: isolated.
        assert_eq!(worker.status.state(), State::Armed);
        kill(worker.pid, Signal::SIGCONT).expect("continue");
        worker.turns_on();
    }
    worker.unharmed();
}

/// Whatever others send waits, and does not disturb the worker; they take effect when it is given back.
fn signals_that_are_blocked() {
    let worker = Worker::start();
    for signal in [Signal::SIGUSR1, Signal::SIGHUP, Signal::SIGALRM, Signal::SIGWINCH] {
        kill(worker.pid, signal).expect("signal");
        worker.turns_on();
    }
    assert_eq!(worker.status.breach_count(), 0);
    assert_eq!(worker.status.state(), State::Armed);
    worker.shared.order.store(2, Ordering::Release);
    assert!(matches!(lab::ended(worker.pid), WaitStatus::Signaled(..)));
    lab::no_breach(&worker.status);
    assert_eq!(worker.status.state(), State::Off);
}

fn ptrace(request: libc::c_uint, pid: Pid, data: usize) {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: requests without addresses, to a child of ours.
    let result = unsafe { libc::ptrace(request, pid.as_raw(), none, data) };
    Errno::result(result).unwrap_or_else(|errno| panic!("ptrace {request}: {errno}"));
}

/// The raw status of the next stop.
fn next_stop(pid: Pid) -> i32 {
    let mut status = 0;
    // SAFETY: the kernel writes one status.
    let waited = unsafe { libc::waitpid(pid.as_raw(), &raw mut status, libc::__WALL) };
    assert_eq!(waited, pid.as_raw());
    assert!(libc::WIFSTOPPED(status), "{status:#x}");
    status
}

fn attach_and_detach() {
    lab::dispatch_only("stops are breaches");
    let worker = Worker::start();
    for _ in 0..100 {
        ptrace(libc::PTRACE_ATTACH, worker.pid, 0);
        assert_eq!(libc::WSTOPSIG(next_stop(worker.pid)), libc::SIGSTOP);
        assert_eq!(worker.status.state(), State::Armed);
        ptrace(libc::PTRACE_DETACH, worker.pid, 0);
        worker.turns_on();
    }
    worker.unharmed();
}

fn seize_and_interrupt() {
    lab::dispatch_only("stops are breaches");
    let worker = Worker::start();
    ptrace(libc::PTRACE_SEIZE, worker.pid, 0);
    for _ in 0..100 {
        ptrace(libc::PTRACE_INTERRUPT, worker.pid, 0);
        assert_eq!(next_stop(worker.pid) >> 16, libc::PTRACE_EVENT_STOP);
        ptrace(libc::PTRACE_CONT, worker.pid, 0);
        worker.turns_on();
    }
    ptrace(libc::PTRACE_INTERRUPT, worker.pid, 0);
    next_stop(worker.pid);
    ptrace(libc::PTRACE_DETACH, worker.pid, 0);
    worker.unharmed();
}

/// The tracer sees the isolation's signal as any other, passes it on, and the breach is the same.
fn breach_under_a_tracer() {
    let worker = Worker::start();
    ptrace(libc::PTRACE_SEIZE, worker.pid, 0);
    worker.shared.order.store(1, Ordering::Release);
    assert_eq!(libc::WSTOPSIG(next_stop(worker.pid)), libc::SIGSYS);
    assert_eq!(worker.status.breach_count(), 0);
    ptrace(libc::PTRACE_CONT, worker.pid, libc::SIGSYS as usize);
    lab::until("made the call", || worker.shared.done.load(Ordering::Acquire) == 1);
    worker.turns_on();
    ptrace(libc::PTRACE_INTERRUPT, worker.pid, 0);
    next_stop(worker.pid);
    ptrace(libc::PTRACE_DETACH, worker.pid, 0);
    worker.turns_on();
    if lab::is_kernel() {
        // Being stopped by the tracer is another one.
        assert_syscall(&worker.status.breaches(0)[0].1, libc::SYS_getppid, At::Syscall);
        assert_eq!(worker.status.snapshot().breaches.of(Cause::Syscall), 1);
    } else {
        assert_syscall(&lab::only_recorded(&worker.status), libc::SYS_getppid, At::Syscall);
    }
    worker.end();
}

/// Single steps raise SIGTRAP, which is the tracer's and never reaches the isolation.
fn traced_step_by_step() {
    lab::dispatch_only("stops are breaches");
    let worker = Worker::start();
    ptrace(libc::PTRACE_ATTACH, worker.pid, 0);
    next_stop(worker.pid);
    for _ in 0..1000 {
        ptrace(libc::PTRACE_SINGLESTEP, worker.pid, 0);
        assert_eq!(libc::WSTOPSIG(next_stop(worker.pid)), libc::SIGTRAP);
    }
    ptrace(libc::PTRACE_DETACH, worker.pid, 0);
    worker.unharmed();
}

/// All CPUs of this process, for another one.
fn widen(pid: Pid) {
    let mut all = CpuSet::new();
    for cpu in lab::allowed() {
        all.set(cpu).expect("CPU");
    }
    sched_setaffinity(pid, &all).expect("affinity");
}

/// Not seen by this backend until the thread arms again; then refused, with the CPUs.
fn affinity_widened() {
    if lab::allowed().len() < 2 {
        lab::skip("needs two CPUs");
    }
    static STEP: AtomicU32 = AtomicU32::new(0);
    let (tid, all) = (nix::unistd::gettid(), lab::allowed());
    let sibling = std::thread::spawn(move || {
        lab::until("armed", || STEP.load(Ordering::Acquire) == 1);
        let mut set = CpuSet::new();
        all.iter().for_each(|cpu| set.set(*cpu).expect("CPU"));
        sched_setaffinity(tid, &set).expect("affinity");
        STEP.store(2, Ordering::Release);
        // Its end would disturb a thread that the kernel isolates.
        lab::until("the end", || STEP.load(Ordering::Acquire) == 3);
        all
    });
    let mut prepared = lab::prepare(lab::isolation());
    let status = prepared.status().clone();
    let mut strict = prepared.arm().expect("arm");
    STEP.store(1, Ordering::Release);
    while STEP.load(Ordering::Acquire) != 2 {
        strict.turn().expect("turn");
    }
    for _ in 0..1000 {
        strict.turn().expect("turn");
    }
    assert!(strict.is_armed());
    assert_eq!(status.breach_count(), 0);
    lab::getppid();
    let error = strict.turn().unwrap_err();
    STEP.store(3, Ordering::Release);
    let all = sibling.join().expect("sibling");
    let StrictError::Rearm(refused) = error else { panic!("{error}") };
    // The kernel goes on to list what else is not as it should be.
    let [Unmet::AllowedCpus { cpu, allowed }, rest @ ..] = &refused.unmet[..] else { panic!("{refused}") };
    assert!(rest.is_empty() || lab::is_kernel(), "{refused}");
    assert_eq!(*cpu, lab::cpu());
    assert_eq!(allowed.iter().map(|cpu| cpu.0).collect::<Vec<_>>(), all);
    // The breach is reported all the same, and once: not again by the turns that find it still refused.
    assert!(!strict.is_armed());
    lab::getppid();
    strict.turn().unwrap_err();
    let mut only = CpuSet::new();
    only.set(lab::cpu().0).expect("CPU");
    sched_setaffinity(Pid::from_raw(0), &only).expect("affinity");
    strict.turn().expect("turn");
    assert!(strict.is_armed());
    assert_syscall(&lab::only_breach(&status), libc::SYS_getppid, At::Syscall);
}

fn affinity_widened_before_arming() {
    if lab::allowed().len() < 2 {
        lab::skip("needs two CPUs");
    }
    let all = lab::allowed();
    let mut prepared = lab::prepare(lab::isolation());
    let status = prepared.status().clone();
    let mut set = CpuSet::new();
    all.iter().for_each(|cpu| set.set(*cpu).expect("CPU"));
    sched_setaffinity(Pid::from_raw(0), &set).expect("affinity");
    let refused = prepared.arm().unwrap_err();
    assert!(matches!(refused.unmet[..], [Unmet::AllowedCpus { .. }, ..]), "{refused}");
    assert!(refused.unmet.len() == 1 || lab::is_kernel(), "{refused}");
    assert!(refused.to_string().contains("may run on 0-1") || all != [0, 1], "{refused}");
    assert_eq!((status.state(), status.snapshot().armed), (State::Off, 0));
    lab::getppid();
    lab::no_breach(&status);
}

/// Killed while isolated: nothing is left but the block, which says so to whoever looks.
fn killed() {
    let worker = Worker::start();
    widen(worker.pid);
    kill(worker.pid, Signal::SIGKILL).expect("kill");
    assert_eq!(lab::ended(worker.pid), WaitStatus::Signaled(worker.pid, Signal::SIGKILL, false));
    assert_eq!(worker.status.state(), State::Armed);
    assert_eq!(worker.status.thread().0 as i32, worker.pid.as_raw());
    lab::no_breach(&worker.status);
    let next = lab::isolated(lab::isolation().status(worker.status), |strict, _| assert!(strict.is_armed()));
    assert_eq!(next.thread().0, std::process::id());
    assert_eq!(next.snapshot().armed, 2);
}
