//! What others do to an isolated thread, one kind a case: the cause, what is known besides, and isolated
//! again afterwards.

use crate::common::Test;
use crate::helper::{
    Helper, assert_causes, disturbed, housekeeping, isolation, keep_to, move_to, process, tolerated,
};
use crate::lab::{self, OneArgument};
use isoplane_isolation::{Cause, Detail, Mode, OnBreach, State, Status, StrictError};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

pub(crate) const CASES: &[Test] = &[
    ("disturbances::none", none),
    ("disturbances::sibling_unmaps", sibling_unmaps),
    ("disturbances::membarrier", membarrier),
    ("disturbances::cpu_time_timer", cpu_time_timer),
    ("disturbances::preemption", preemption),
    ("disturbances::moved_away", moved_away),
    ("disturbances::signal", signal),
    ("disturbances::signal_of_another_process", signal_of_another_process),
    ("disturbances::forged_signal", forged_signal),
    ("disturbances::text_changes", text_changes),
    ("disturbances::every_cpu_is_stopped", every_cpu_is_stopped),
    ("disturbances::stop_and_continue", stop_and_continue),
    ("disturbances::debugger", debugger),
    ("disturbances::sibling_forks", sibling_forks),
    ("disturbances::stop_is_told_once", stop_is_told_once),
    ("disturbances::abort", abort),
];

/// Whole milliseconds of turns: not one breach, whatever ran on the other CPUs.
fn none() {
    let helper = Helper::new(|| {
        for _ in 0..20 {
            // Not of this process: that would be felt.
            assert!(std::process::Command::new("/bin/true").status().expect("true").success());
        }
    });
    let status = lab::isolated(isolation(), |strict, status| {
        // Starting a process forks this one, whose memory is then to be copied: in a visit.
        strict.slow_path(|_| helper.go_unseen()).expect("visit");
        for _ in 0..1_000_000 {
            strict.turn().expect("turn");
        }
        assert!(strict.is_armed());
        lab::assert_enforced(strict, status);
    });
    assert_eq!(status.breach_count(), 1, "{:x?}", status.breaches(0));
}

fn unmap() {
    let page = lab::pages(libc::PROT_READ | libc::PROT_WRITE);
    lab::store(page);
    let base = page.wrapping_sub(4096).cast();
    // SAFETY: the three pages just mapped.
    assert_eq!(unsafe { libc::munmap(base, 3 * 4096) }, 0);
}

fn sibling_unmaps() {
    let breaches = disturbed(unmap);
    assert_causes(&breaches, &[Cause::TlbShootdown]);
    assert!(matches!(breaches[0].detail, Detail::At { instruction } if instruction != 0));
    named(&breaches[0].sender);
}

/// Where the kernel names senders, it names this program, on a housekeeping CPU.
fn named(sender: &Option<isoplane_isolation::cause::Sender>) {
    let boot = std::fs::read_to_string("/proc/cmdline").expect("cmdline");
    if !boot.split_whitespace().any(|word| word.starts_with("task_isolation_debug")) {
        assert!(sender.is_none(), "{sender:?}");
        return;
    }
    let sender = sender.expect("a sender");
    assert!(housekeeping().contains(&(sender.cpu.expect("its CPU") as usize)), "{sender}");
    assert!(sender.pid.is_some() && !sender.comm().is_empty() && !sender.function().is_empty(), "{sender}");
}

fn membarrier() {
    const REGISTER_PRIVATE_EXPEDITED: u64 = 1 << 4;
    const PRIVATE_EXPEDITED: u64 = 1 << 3;
    assert_eq!(lab::syscall(libc::SYS_membarrier, [REGISTER_PRIVATE_EXPEDITED, 0, 0]), 0);
    let breaches = disturbed(|| {
        assert_eq!(lab::syscall(libc::SYS_membarrier, [PRIVATE_EXPEDITED, 0, 0]), 0);
    });
    assert_causes(&breaches, &[Cause::Membarrier]);
    assert_eq!(breaches.len(), 1);
}

/// A CPU-time timer of the process needs the tick wherever a thread of it runs: the CPU is told, and arming
/// again is refused as long as the timer is there.
fn cpu_time_timer() {
    let helper = Helper::new(|| {
        // Ten hours of CPU time from now.
        let never = libc::itimerval {
            it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
            it_value: libc::timeval { tv_sec: 36_000, tv_usec: 0 },
        };
        let timer = &raw const never;
        assert_eq!(lab::syscall(libc::SYS_setitimer, [libc::ITIMER_PROF as u64, timer as u64, 0]), 0);
    });
    let status = lab::isolated(isolation(), |strict, status| {
        helper.go_unseen();
        while strict.is_armed() {
            std::hint::spin_loop();
        }
        let error = strict.turn().unwrap_err();
        assert!(matches!(error, StrictError::Rearm(_)), "{error}");
        assert!(error.to_string().contains("a POSIX CPU timer"), "{error}");
        assert_eq!(status.state(), State::Broken);
        assert!(strict.turn().is_err());
    });
    let (_, breach) = status.breaches(0)[0];
    // IRQ work for another CPU travels as a function call.
    assert!(matches!(breach.cause, Cause::IrqWork | Cause::FunctionCall | Cause::TimerTick), "{breach}");
}

/// A real-time thread wakes on the CPU and has it for a moment.
fn preemption() {
    static TID: AtomicI32 = AtomicI32::new(0);
    static WAKE: AtomicU32 = AtomicU32::new(0);
    let futex = |operation: i32, value: u64| {
        lab::syscall(libc::SYS_futex, [WAKE.as_ptr() as u64, operation as u64, value, 0])
    };
    let cpu = lab::cpu().0;
    std::thread::spawn(move || {
        keep_to(&[cpu]);
        let priority = libc::sched_param { sched_priority: 50 };
        // SAFETY: reads one struct.
        assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) }, 0);
        TID.store(nix::unistd::gettid().as_raw(), Ordering::Release);
        loop {
            futex(libc::FUTEX_WAIT, 0);
        }
    });
    lab::until("sleeps there", || {
        let tid = TID.load(Ordering::Acquire);
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).unwrap_or_default();
        tid != 0 && stat.starts_with(&format!("{} ", libc::SYS_futex))
    });
    let breaches = disturbed(move || {
        assert_eq!(futex(libc::FUTEX_WAKE, 1), 1);
    });
    let tid = TID.load(Ordering::Relaxed) as u32;
    assert_eq!(breaches[0].cause, Cause::Preemption, "{breaches:x?}");
    assert!(matches!(breaches[0].detail, Detail::Task { pid, .. } if pid == tid), "{breaches:x?}");
}

/// Its CPU is taken from its affinity: it finds itself elsewhere, is told, and cannot be armed there.
fn moved_away() {
    let (tid, away) = (nix::unistd::gettid().as_raw(), housekeeping());
    let to = away[0] as u32;
    let helper = Helper::new(move || move_to(tid, &away));
    let status = lab::isolated(isolation(), |strict, status| {
        helper.go_unseen();
        while strict.is_armed() {
            std::hint::spin_loop();
        }
        assert_eq!(status.state(), State::Broken);
        let error = strict.turn().unwrap_err();
        assert!(matches!(error, StrictError::Rearm(_)), "{error}");
        assert!(error.to_string().contains(&format!("CPU {to} is not nohz_full")), "{error}");
        assert!(error.to_string().contains("the thread may run on"), "{error}");
    });
    let breach = lab::only_breach(&status);
    assert_eq!(breach.cause, Cause::AffinityChange, "{breach}");
    assert!(
        matches!(breach.detail, Detail::Moved { to: cpu, .. } if cpu == to || housekeeping().len() > 1),
        "{breach}"
    );
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn handles(_: libc::c_int) {
    // Isolation is off in it.
    lab::getppid();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// Signals that reach the thread, by `send`, one a breach: number and count.
fn signalled(times: usize, send: impl Fn() + Send + 'static) -> Status {
    lab::install(Signal::SIGUSR1, handles as OneArgument as usize, 0);
    let helpers: Vec<Helper> = {
        let send = std::sync::Arc::new(std::sync::Mutex::new(send));
        let one = || {
            let send = send.clone();
            Helper::new(move || send.lock().expect("send")())
        };
        (0..times).map(|_| one()).collect()
    };
    let mut prepared = lab::prepare(isolation());
    let status = prepared.status().clone();
    lab::unblock(&[Signal::SIGUSR1]);
    let mut strict = prepared.arm().expect("arm");
    for helper in &helpers {
        helper.go(&mut strict);
        assert!(strict.is_armed());
    }
    lab::assert_enforced(&mut strict, &status);
    drop(strict);
    assert_eq!(HANDLED.load(Ordering::Relaxed), times as u32);
    status
}

fn signal() {
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    let status = signalled(5, move || {
        // SAFETY: plain numbers.
        unsafe { libc::syscall(libc::SYS_tgkill, pid.as_raw(), tid.as_raw(), libc::SIGUSR1) };
    });
    let breaches = status.breaches(0);
    assert_eq!(breaches.len(), 6, "{breaches:x?}");
    for (_, breach) in &breaches[..5] {
        assert_eq!(breach.cause, Cause::Signal, "{breach}");
        assert!(matches!(breach.detail, Detail::Signal { number: 10, .. }), "{breach}");
    }
    assert_eq!(lab::reports()[0].fields["signal"], "10");
}

fn signal_of_another_process() {
    let pid = nix::unistd::getpid();
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors; the child makes two calls and ends.
    let child = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        libc::fork()
    };
    let [from, to] = ends;
    if child == 0 {
        let mut byte = 0u8;
        lab::syscall(libc::SYS_read, [from as u64, (&raw mut byte) as u64, 1]);
        // SAFETY: plain numbers.
        unsafe {
            libc::kill(pid.as_raw(), libc::SIGUSR1);
            libc::_exit(0);
        }
    }
    let status = signalled(1, move || {
        // The sibling blocks it, so the process's signal is the isolated thread's to take.
        nix::sys::signal::SigSet::all().thread_block().expect("block");
        lab::write_byte(to);
        lab::until("handled", || HANDLED.load(Ordering::Relaxed) == 1);
    });
    lab::ended_well(nix::unistd::Pid::from_raw(child));
    let signals = status.snapshot().breaches.of(Cause::Signal);
    assert_eq!(signals, 1, "{:x?}", status.breaches(0));
}

/// Anybody may queue a signal with the code of a breach. It is a signal like any other, and what it pretends
/// is not believed.
fn forged_signal() {
    let status = Status::create("forged").expect("status");
    let ours = isolation().status(status.clone());
    let child = lab::child(|| {
        lab::no_core();
        let (pid, tid) = (nix::unistd::getpid().as_raw(), nix::unistd::gettid().as_raw());
        let helper = Helper::new(move || {
            // signo, errno (the pretended cause), code, padding, pid and uid, value, ...
            let info: [i32; 32] = std::array::from_fn(|at| match at {
                0 => libc::SIGSYS,
                1 => 1,
                2 => -73,
                4 => pid,
                _ => 0,
            });
            let info = (&raw const info) as u64;
            lab::syscall(libc::SYS_rt_tgsigqueueinfo, [pid as u64, tid as u64, libc::SIGSYS as u64, info]);
        });
        lab::isolated(ours, |strict, _| helper.go(strict));
    });
    // While the handler of one SIGSYS runs, the breach's own is blocked, and kills.
    assert!(matches!(lab::ended(child), WaitStatus::Signaled(_, Signal::SIGSYS, _)));
    assert_eq!(status.snapshot().breaches.of(Cause::Syscall), 0, "{:x?}", status.breaches(0));
}

/// Somebody switches a tracepoint on and off: the kernel's code changes under every CPU.
fn text_changes() {
    let event = "/sys/kernel/tracing/events/sched/sched_process_exit/enable";
    if !std::path::Path::new(event).exists() {
        lab::not_here("tracefs is not mounted");
    }
    let status = tolerated(Mode::ALLOW_INTERRUPTS, move || {
        for value in ["1", "0"] {
            std::fs::write(event, value).expect("switch");
        }
    });
    assert!(status.snapshot().allowed.of(Cause::TextSync) > 0, "{:?}", status.snapshot().allowed);
}

/// Another CPU goes offline and comes back: all of them are stopped for that.
fn every_cpu_is_stopped() {
    let quiet = isoplane_isolation::prepare::cpu::nohz_full();
    let Some(other) = quiet.iter().find(|cpu| *cpu != lab::cpu()) else {
        lab::not_here("no other isolated CPU to take offline")
    };
    let online = format!("/sys/devices/system/cpu/cpu{}/online", other.0);
    let status = tolerated(Mode::ALLOW_INTERRUPTS, move || {
        for value in ["0", "1"] {
            std::fs::write(&online, value).expect("offline, online");
        }
    });
    // Work that precedes it may find the task still being quiesced when all are stopped.
    let allowed = status.snapshot().allowed;
    assert!(allowed.of(Cause::StopMachine) + allowed.of(Cause::IrqWork) > 0, "{allowed:?}");
}

fn stop_and_continue() {
    let pid = nix::unistd::getpid();
    // A stop is the whole process's, so who continues it is another.
    let child = process(|| {
        for _ in 0..3 {
            kill(pid, Signal::SIGSTOP).expect("stop");
            std::thread::sleep(Duration::from_millis(100));
            kill(pid, Signal::SIGCONT).expect("continue");
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    let status = lab::isolated(isolation(), |strict, status| {
        while status.breach_count() < 3 {
            strict.turn().expect("turn");
        }
        strict.turn().expect("turn");
        assert!(strict.is_armed());
    });
    lab::ended_well(child);
    let stops = status.breaches(0);
    let is_stop = |detail| matches!(detail, Detail::Signal { number: 19, .. });
    assert!(
        stops.iter().any(|(_, breach)| breach.cause == Cause::Signal && is_stop(breach.detail)),
        "{stops:?}"
    );
    // Being continued is a wake-up.
    let others = |cause| matches!(cause, Cause::Signal | Cause::Reschedule);
    assert!(stops.iter().all(|(_, breach)| others(breach.cause)), "{stops:?}");
}

/// A debugger attaches and goes: the program lives, and is told.
fn debugger() {
    let pid = nix::unistd::getpid();
    // SAFETY: any process may trace this one.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
    let child = process(|| {
        for _ in 0..3 {
            nix::sys::ptrace::attach(pid).expect("attach");
            // SAFETY: waits for the stop.
            unsafe { libc::waitpid(pid.as_raw(), std::ptr::null_mut(), libc::__WALL) };
            nix::sys::ptrace::detach(pid, None).expect("detach");
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    let status = lab::isolated(isolation(), |strict, status| {
        while status.breach_count() < 3 {
            strict.turn().expect("turn");
        }
        strict.turn().expect("turn");
        lab::assert_enforced(strict, status);
    });
    lab::ended_well(child);
    let breaches = status.breaches(0);
    let causes: Vec<Cause> = breaches.iter().map(|(_, breach)| breach.cause).collect();
    assert!(causes[..3].iter().all(|cause| matches!(cause, Cause::Ptrace | Cause::Signal)), "{breaches:x?}");
    assert!(causes.contains(&Cause::Ptrace), "{breaches:x?}");
}

/// A sibling's fork makes every private page one to be copied, and flushes what the CPU knew of them.
fn sibling_forks() {
    let breaches = disturbed(|| {
        // SAFETY: the child ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        lab::ended_well(nix::unistd::Pid::from_raw(child));
    });
    assert_causes(&breaches, &[Cause::TlbShootdown, Cause::PageFault, Cause::KernelTlbFlush]);
    assert!(breaches.iter().any(|breach| breach.cause == Cause::TlbShootdown), "{breaches:x?}");
}

fn stop_is_told_once() {
    let helper = Helper::new(unmap);
    let status = lab::isolated(isolation().on_breach(OnBreach::Stop), |strict, status| {
        helper.go_unseen();
        while strict.is_armed() {
            std::hint::spin_loop();
        }
        let error = strict.turn().unwrap_err();
        assert!(
            matches!(&error, StrictError::Breach(breach) if breach.cause == Cause::TlbShootdown),
            "{error}"
        );
        strict.turn().expect("told once");
        assert_eq!(status.state(), State::Off);
        strict.rearm().expect("rearm");
        assert!(strict.is_armed());
    });
    assert_eq!(status.breach_count(), 1);
    assert!(lab::reports().is_empty());
}

/// The process dies of the disturbance, and the block has why.
fn abort() {
    let status = Status::create("abort").expect("status");
    let ours = isolation().status(status.clone()).on_breach(OnBreach::Abort);
    let child = lab::child(|| {
        let helper = Helper::new(unmap);
        lab::isolated(ours, |strict, _| {
            helper.go(strict);
            unreachable!("it lives");
        });
    });
    assert_eq!(lab::ended(child), WaitStatus::Signaled(child, Signal::SIGKILL, false));
    assert_eq!(lab::only_recorded(&status).cause, Cause::TlbShootdown);
    assert_eq!(status.state(), State::Broken);
}
