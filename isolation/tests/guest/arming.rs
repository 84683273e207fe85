//! Who may be isolated: what the kernel refuses is refused with everything that is in the way, what `Auto`
//! takes, and how isolation is left and entered again.

use crate::common::Test;
use crate::helper::{Helper, housekeeping, isolation, keep_to};
use crate::lab::{self, assert_enforced};
use isoplane_isolation::{Backend, Cause, Cpu, Detail, Isolation, Mode, Scheduling, State, Unmet, Weakness};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

pub(crate) const CASES: &[Test] = &[
    ("arming::auto_takes_it", auto_takes_it),
    ("arming::auto_elsewhere", auto_elsewhere),
    ("arming::unpinned", unpinned),
    ("arming::insist", insist),
    ("arming::housekeeping_cpu", housekeeping_cpu),
    ("arming::another_is_runnable", another_is_runnable),
    ("arming::two_on_one_cpu", two_on_one_cpu),
    ("arming::affinity_widened", affinity_widened),
    ("arming::cpu_time_timer", cpu_time_timer),
    ("arming::unprivileged", unprivileged),
    ("arming::ordinary_scheduling", ordinary_scheduling),
    ("arming::visits", visits),
    ("arming::visit_that_leaves_somebody_behind", visit_that_leaves_somebody_behind),
    ("arming::children_are_not_isolated", children_are_not_isolated),
    ("arming::left_by_the_program", left_by_the_program),
];

fn auto_takes_it() {
    let mut prepared = Isolation::on(lab::cpu()).prepare().expect("prepare");
    assert_eq!((prepared.backend(), prepared.sees_page_faults()), (Backend::TaskIsolation, true));
    assert!(!prepared.weaknesses().contains(&Weakness::InterruptsObserved), "{:?}", prepared.weaknesses());
    let said = |event: &&lab::Event| event.fields.get("backend").is_some_and(|name| name == "task-isolation");
    assert_eq!(lab::events().iter().filter(said).count(), 1);
    let status = prepared.status().clone();
    assert_eq!(status.backend(), Some(Backend::TaskIsolation));
    assert_enforced(&mut prepared.arm().expect("arm"), &status);
}

/// On a CPU that the kernel cannot isolate the next best is taken, and that is said.
fn auto_elsewhere() {
    let cpu = Cpu(housekeeping()[0]);
    let prepared = Isolation::on(cpu).prepare().expect("prepare");
    assert_eq!(prepared.backend(), Backend::Dispatch);
    let unused = Weakness::TaskIsolationUnused { backend: Backend::Dispatch, cpu: Some(cpu) };
    assert!(prepared.weaknesses().contains(&unused), "{:?}", prepared.weaknesses());
    assert!(lab::events().iter().any(|event| event.message().contains("is not nohz_full")));
}

fn unpinned() {
    let refused = Isolation::unpinned().backend(Backend::TaskIsolation).prepare().unwrap_err();
    assert!(matches!(refused.unmet[..], [Unmet::Backend { .. }]), "{refused}");
    let prepared = Isolation::unpinned().prepare().expect("prepare");
    assert_eq!(prepared.backend(), Backend::Dispatch);
    let unused = Weakness::TaskIsolationUnused { backend: Backend::Dispatch, cpu: None };
    assert!(prepared.weaknesses().contains(&unused), "{:?}", prepared.weaknesses());
}

/// Nothing is weaker than full isolation here.
fn insist() {
    let mut prepared = isolation().insist(true).prepare().expect("prepare");
    assert!(prepared.weaknesses().is_empty());
    let status = prepared.status().clone();
    assert_enforced(&mut prepared.arm().expect("arm"), &status);
}

/// By name, on a CPU with a tick: refused when it comes to it, with all the reasons, and nothing changes.
fn housekeeping_cpu() {
    let cpu = Cpu(housekeeping()[0]);
    let mut prepared = Isolation::on(cpu).backend(Backend::TaskIsolation).prepare().expect("prepare");
    let status = prepared.status().clone();
    let refused = prepared.arm().unwrap_err();
    assert!(refused.unmet.iter().any(|unmet| matches!(unmet, Unmet::NotNohzFull(_))), "{refused}");
    assert_eq!((status.state(), status.snapshot().armed), (State::Off, 0));
    // Two things are in the way: both are said.
    keep_to(&[cpu.0, lab::cpu().0]);
    let refused = prepared.arm().unwrap_err();
    for wanted in ["may run on", "not nohz_full"] {
        assert!(refused.to_string().contains(wanted), "{refused}");
    }
    lab::getppid();
    lab::no_breach(&status);
}

/// A thread on the CPU that never sleeps: arming gives up after a bounded number of tries, and says why.
fn another_is_runnable() {
    static END: AtomicBool = AtomicBool::new(false);
    let cpu = lab::cpu().0;
    let other = std::thread::spawn(move || {
        keep_to(&[cpu]);
        while !END.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    });
    let mut prepared = lab::prepare(isolation());
    let status = prepared.status().clone();
    for _ in 0..3 {
        let refused = prepared.arm().unwrap_err();
        assert!(refused.unmet.iter().any(|unmet| matches!(unmet, Unmet::NotAlone(_))), "{refused}");
        assert_eq!(status.state(), State::Off);
    }
    END.store(true, Ordering::Relaxed);
    drop(prepared);
    other.join().expect("join");
    lab::isolated(isolation(), assert_enforced);
}

/// The second thread on a CPU is refused, and the first one may say so of it.
fn two_on_one_cpu() {
    static STAGE: AtomicU32 = AtomicU32::new(0);
    let second = Helper::new(|| {
        let mut prepared = isolation().prepare().expect("prepare");
        let refused = prepared.arm().map(drop);
        STAGE.store(1 + u32::from(refused.is_err()), Ordering::Release);
    });
    let mut prepared = lab::prepare(isolation());
    // Not isolated, and spinning: the second one shares the CPU with it.
    let start = std::time::Instant::now();
    second.start();
    while STAGE.load(Ordering::Acquire) == 0 && start.elapsed().as_secs() < 60 {
        std::thread::yield_now();
    }
    assert_eq!(STAGE.load(Ordering::Acquire), 2, "both are isolated, or the second one waits for ever");
    let status = prepared.status().clone();
    drop(second);
    assert_enforced(&mut prepared.arm().expect("arm"), &status);
}

fn affinity_widened() {
    let both = [lab::cpu().0, housekeeping()[0]];
    let mut prepared = lab::prepare(isolation());
    let status = prepared.status().clone();
    let mut strict = prepared.arm().expect("arm");
    strict.slow_path(|_| keep_to(&both)).expect("visit");
    // Behind the visit the kernel refuses, which is a breach; so does the turn, as long as it is so.
    assert_eq!(status.state(), State::Broken);
    let error = strict.turn().unwrap_err();
    assert!(error.to_string().contains("may run on"), "{error}");
    keep_to(&both[..1]);
    strict.rearm().expect("rearm");
    assert_enforced(&mut strict, &status);
    let (_, breach) = status.breaches(0)[0];
    assert_eq!((breach.cause, breach.in_slow_path), (Cause::Quiesce, true), "{breach}");
    assert!(matches!(breach.detail, Detail::Unquiet { unmet } if unmet & 1 == 1), "{breach}");
}

fn cpu_time_timer() {
    let set = |seconds: i64| {
        let timer = [0, 0, seconds, 0];
        let arguments = [libc::ITIMER_PROF as u64, timer.as_ptr() as u64, 0];
        assert_eq!(lab::syscall(libc::SYS_setitimer, arguments), 0);
    };
    let mut prepared = lab::prepare(isolation());
    set(36_000);
    let refused = prepared.arm().unwrap_err();
    let by = |unmet: &Unmet| matches!(unmet, Unmet::TickNeeded { by, .. } if by.contains("POSIX CPU timer"));
    assert!(refused.unmet.iter().any(by), "{refused}");
    assert_eq!(prepared.status().snapshot().armed, 0);
    // The kernel may need the tick for the process from here on, timer or not.
    set(0);
}

/// No privilege is needed to be left alone.
fn unprivileged() {
    let mut prepared = lab::prepare(isolation());
    let nobody = isoplane_isolation::Privileges::Drop { uid: 65534, gid: 65534 };
    prepared.drop_privileges(nobody).expect("drop");
    let status = prepared.status().clone();
    assert_enforced(&mut prepared.arm().expect("arm"), &status);
}

/// The fair server, which would come by each second, is parked.
fn ordinary_scheduling() {
    let status = lab::isolated(isolation().scheduling(Scheduling::Keep), |strict, _| {
        let start = std::time::Instant::now();
        while start.elapsed().as_secs() < 5 {
            strict.turn().expect("turn");
        }
        assert!(strict.is_armed());
    });
    lab::no_breach(&status);
}

fn visits() {
    const N: u64 = 2000;
    let status = lab::isolated(isolation(), |strict, status| {
        for n in 0..N {
            assert_eq!(strict.slow_path(|_| lab::getppid().min(0) + n as i64), Ok(n as i64));
            strict.turn().expect("turn");
            assert!(strict.is_armed());
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    let snapshot = status.snapshot();
    assert_eq!((snapshot.slow_path_visits, snapshot.allowed.of(Cause::Syscall)), (N + 1, 0));
}

/// A visit starts a thread that goes on spinning on the same CPU: nobody is isolated behind it, and that is
/// said, at once and until it ends.
fn visit_that_leaves_somebody_behind() {
    static END: AtomicBool = AtomicBool::new(false);
    let keep = isolation().scheduling(Scheduling::Keep);
    let status = lab::isolated(keep, |strict, status| {
        let other = strict.slow_path(|_| {
            std::thread::spawn(|| {
                while !END.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        });
        let other = other.expect("visit");
        assert_eq!(status.state(), State::Broken);
        let error = strict.turn().unwrap_err();
        assert!(error.to_string().contains("another thread is runnable"), "{error}");
        END.store(true, Ordering::Relaxed);
        other.join().expect("join");
        strict.rearm().expect("rearm");
        assert_enforced(strict, status);
    });
    let (_, breach) = status.breaches(0)[0];
    assert_eq!(breach.cause, Cause::Quiesce, "{breach}");
    assert!(breach.to_string().contains("another thread is runnable there"), "{breach}");
}

/// A fork breaks the parent, as any call, and the child has a life of its own, on another CPU.
fn children_are_not_isolated() {
    let away = housekeeping();
    let status = lab::isolated(isolation(), |strict, status| {
        let child = lab::syscall(libc::SYS_fork, []);
        if child == 0 {
            keep_to(&away);
            for _ in 0..1000 {
                lab::getppid();
            }
            let nobodys = !strict.is_armed() && isoplane_isolation::visit(|_| 7) == Ok(7);
            // SAFETY: ends the child.
            unsafe { libc::_exit(if nobodys { 0 } else { 1 }) };
        }
        lab::ended_well(Pid::from_raw(child as i32));
        for _ in 0..100 {
            strict.turn().expect("turn");
        }
        assert!(strict.is_armed());
        let before = status.breach_count();
        lab::getppid();
        strict.turn().expect("turn");
        assert_eq!(status.breach_count(), before + 1);
    });
    let (_, breach) = status.breaches(0)[0];
    assert!(matches!(breach.detail, Detail::Syscall { number: 57, .. }), "{breach}");
}

/// The kernel's own call is exempt: a program that switches isolation off behind our back is not isolated, and
/// is not told that it is.
fn left_by_the_program() {
    const PR_TASK_ISOLATION: u64 = 0x4953_4f4c;
    let status = lab::isolated(isolation().mode(Mode::STRICT), |strict, status| {
        assert_eq!(lab::syscall(libc::SYS_prctl, [PR_TASK_ISOLATION, 0, 0, 0, 0]), 0);
        assert!(!strict.is_armed());
        lab::getppid();
        strict.turn().expect("turn");
        assert_eq!(status.state(), State::Off);
        lab::no_breach(status);
        strict.rearm().expect("rearm");
        assert_enforced(strict, status);
    });
    assert_eq!(status.breach_count(), 1);
}
