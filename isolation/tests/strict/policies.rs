//! What is done about breaches, how visits are counted and refused, and which backend is taken.

use super::lab::{self, At, assert_enforced, assert_syscall, only_recorded};
use crate::common::Test;
use isoplane_isolation::{
    Backend, Budget, Isolation, Mode, OnBreach, SlowPathError, State, Status, StrictError, Unmet, Weakness,
};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

pub(crate) const CASES: &[Test] = &[
    ("policies::stop", stop),
    ("policies::stop_that_nobody_sees", stop_that_nobody_sees),
    ("policies::abort", abort),
    ("policies::abort_of_an_init", abort_of_an_init),
    ("policies::budget_refuses", budget_refuses),
    ("policies::visits_are_counted", visits_are_counted),
    ("policies::visits_of_whoever_is_not_isolated", visits_of_whoever_is_not_isolated),
    ("policies::visits_within_visits", visits_within_visits),
    ("policies::release_and_rearm", release_and_rearm),
    ("policies::insist", insist),
    ("policies::task_isolation_is_refused", task_isolation_is_refused),
    ("policies::auto_takes_dispatch", auto_takes_dispatch),
    ("policies::advisory", advisory),
    ("policies::leaked_handle", leaked_handle),
    ("policies::armed_again_before_a_turn", armed_again_before_a_turn),
    ("policies::released_after_a_breach", released_after_a_breach),
    ("policies::dropped_in_a_visit", dropped_in_a_visit),
    ("policies::killed_and_followed", killed_and_followed),
];

fn stop() {
    let status = lab::isolated(lab::isolation().on_breach(OnBreach::Stop), |strict, status| {
        for n in 1..=3 {
            lab::getppid();
            let error = strict.turn().unwrap_err();
            let StrictError::Breach(breach) = error else { panic!("{error}") };
            assert_syscall(&breach, libc::SYS_getppid, At::Syscall);
            assert!(error.to_string().contains("system call 110"), "{error}");
            // Off, and silently so.
            assert!(!strict.is_armed());
            assert_eq!(status.state(), State::Off);
            lab::getppid();
            strict.turn().expect("told once");
            assert_eq!(status.breach_count(), n);
            strict.rearm().expect("rearm");
        }
        assert!(strict.is_armed());
    });
    assert_eq!((status.breach_count(), status.snapshot().armed), (3, 4));
    assert!(lab::reports().is_empty());
}

/// Without a turn after it nobody would hear of it: it is reported when isolation is given back.
fn stop_that_nobody_sees() {
    let status = lab::isolated(lab::isolation().on_breach(OnBreach::Stop), |_, _| {
        lab::getppid();
    });
    assert_syscall(&lab::only_breach(&status), libc::SYS_getppid, At::Syscall);
}

/// The process dies with the call unmade; the breach is in the block, and whoever goes on with it says so.
fn abort() {
    let status = Status::create("abort").expect("status");
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK) }, 0);
    let isolation = lab::isolation().on_breach(OnBreach::Abort).status(status.clone());
    let child = lab::child(|| {
        lab::isolated(isolation, |_, _| {
            lab::write_byte(ends[1]);
        });
    });
    assert_eq!(lab::ended(child), WaitStatus::Signaled(child, Signal::SIGKILL, false));
    let mut byte = 0u8;
    // SAFETY: one byte fits.
    assert_eq!(unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) }, -1);
    assert_eq!(std::io::Error::last_os_error().kind(), std::io::ErrorKind::WouldBlock);
    assert_syscall(&only_recorded(&status), libc::SYS_write, At::Syscall);
    assert_eq!(status.state(), State::Broken);
    assert!(lab::reports().is_empty());
    let next = lab::isolated(lab::isolation().status(status), |strict, _| strict.turn().expect("turn"));
    assert_syscall(&lab::only_breach(&next), libc::SYS_write, At::Syscall);
}

fn budget_refuses() {
    let budget = Budget::new(3, Duration::from_secs(1 << 20));
    let status = lab::isolated(lab::isolation().budget(budget), |strict, status| {
        let mut ran = 0;
        for n in 0..5 {
            let answer = strict.slow_path(|_| ran += 1);
            assert_eq!(answer, if n < 3 { Ok(()) } else { Err(SlowPathError::OverBudget) });
            assert!(strict.is_armed());
        }
        assert_eq!(isoplane_isolation::visit(|_| ran += 1), Err(SlowPathError::OverBudget));
        assert_eq!(ran, 3);
        let snapshot = status.snapshot();
        assert_eq!((snapshot.slow_path_visits, snapshot.slow_path_refused), (3, 3));
        // A breach is reported all the same.
        assert_enforced(strict, status);
    });
    let snapshot = status.snapshot();
    assert_eq!((snapshot.slow_path_visits, snapshot.slow_path_refused), (4, 3));
    assert_eq!(snapshot.visit_histogram.iter().sum::<u64>(), 4);
}

fn visits_are_counted() {
    const N: u64 = 1000;
    let parent = i64::from(std::os::unix::process::parent_id());
    let status = lab::isolated(lab::isolation(), |strict, status| {
        for n in 0..N {
            let answer = if n % 2 == 0 {
                strict.slow_path(|_| lab::getppid())
            } else {
                isoplane_isolation::visit(|_| lab::getppid())
            };
            assert_eq!(answer, Ok(parent));
            assert!(strict.is_armed());
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    let snapshot = status.snapshot();
    // One more for the report.
    assert_eq!(snapshot.slow_path_visits, N + 1);
    assert_eq!(snapshot.visit_histogram.iter().sum::<u64>(), N + 1);
    assert!(snapshot.slow_path_ticks >= snapshot.longest_visit_ticks);
    let longest = 63 - snapshot.longest_visit_ticks.leading_zeros() as usize;
    assert_eq!(snapshot.visit_histogram.iter().rposition(|n| *n != 0), Some(longest.min(39)));
}

/// It just runs, uncounted and whatever the budget: before arming, after release, after disarming.
fn visits_of_whoever_is_not_isolated() {
    assert_eq!(isoplane_isolation::visit(|_| 1), Ok(1));
    let nothing = Budget::new(0, Duration::from_secs(1));
    let mut prepared = lab::prepare(lab::isolation().budget(nothing));
    let status = prepared.status().clone();
    assert_eq!(isoplane_isolation::visit(|_| 2), Ok(2));
    let mut strict = prepared.arm().expect("arm");
    assert_eq!(isoplane_isolation::visit(|_| 3), Err(SlowPathError::OverBudget));
    isoplane_isolation::release();
    assert_eq!(isoplane_isolation::visit(|_| 4), Ok(4));
    assert_eq!(strict.slow_path(|_| 5), Ok(5));
    drop(strict);
    assert_eq!(isoplane_isolation::visit(|_| 6), Ok(6));
    let snapshot = status.snapshot();
    assert_eq!((snapshot.slow_path_visits, snapshot.slow_path_refused), (0, 1));
    lab::no_breach(&status);
}

fn visits_within_visits() {
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let answer = strict.slow_path(|_| {
            let inner = isoplane_isolation::visit(|_| isoplane_isolation::visit(|_| lab::getppid()));
            assert_eq!(status.state(), State::SlowPath);
            // Still open after the inner ones.
            assert_eq!(inner, Ok(Ok(lab::getppid())));
        });
        assert_eq!(answer, Ok(()));
        assert!(strict.is_armed());
        lab::no_breach(status);
        assert_eq!(status.snapshot().slow_path_visits, 1);
        assert_enforced(strict, status);
    });
    assert_eq!(status.snapshot().visit_histogram.iter().sum::<u64>(), 2);
}

fn release_and_rearm() {
    lab::isolated(lab::isolation(), |strict, status| {
        isoplane_isolation::release();
        assert_eq!(status.state(), State::Off);
        lab::getppid();
        strict.turn().expect("turn");
        assert!(!strict.is_armed());
        strict.rearm().expect("rearm");
        assert!(strict.is_armed());
        lab::no_breach(status);
        assert_enforced(strict, status);
        let refused = strict.rearm().unwrap_err();
        assert!(matches!(refused.unmet[..], [Unmet::Armed]), "{refused}");
        assert!(strict.is_armed());
        // Within a visit it lasts beyond the visit.
        strict.slow_path(|_| isoplane_isolation::release()).expect("visit");
        assert!(!strict.is_armed());
        strict.rearm().expect("rearm");
        assert!(strict.is_armed());
    });
    assert_eq!(lab::reports().len(), 1);
}

fn insist() {
    lab::dispatch_only("nothing is weaker there");
    let before = (lab::allowed(), lab::blocked_signals());
    let refused = lab::isolation().insist(true).prepare().unwrap_err();
    assert!(!refused.unmet.is_empty());
    let text = refused.to_string();
    for unmet in &refused.unmet {
        assert!(matches!(unmet, Unmet::Weak(_)), "{unmet}");
        assert!(text.contains(&unmet.to_string()), "{text}");
    }
    assert!(refused.unmet.iter().any(|unmet| matches!(unmet, Unmet::Weak(Weakness::InterruptsObserved))));
    // The thread is as it was, and may be prepared.
    assert_eq!((lab::allowed(), lab::blocked_signals()), before);
    lab::isolated(lab::isolation(), assert_enforced);
}

fn task_isolation_is_refused() {
    if Backend::TaskIsolation.probe().is_ok() {
        lab::not_here("this kernel has task isolation");
    }
    let refused = lab::isolation().backend(Backend::TaskIsolation).prepare().unwrap_err();
    let [Unmet::Backend { backend: Backend::TaskIsolation, reason }] = &refused.unmet[..] else {
        panic!("{refused}")
    };
    assert!(reason.contains("task-isolation patches"), "{reason}");
    lab::isolated(lab::isolation(), assert_enforced);
}

fn auto_takes_dispatch() {
    lab::dispatch_only("Auto takes task-isolation");
    let prepared = Isolation::on(lab::cpu()).prepare().expect("prepare");
    assert_eq!(prepared.backend(), Backend::Dispatch);
    assert!(prepared.weaknesses().contains(&Weakness::InterruptsObserved));
    let said =
        lab::events().iter().filter(|e| e.fields.get("backend").is_some_and(|b| b == "dispatch")).count();
    assert_eq!(said, 1);
}

fn advisory() {
    let page = lab::cold_page();
    let mut prepared =
        lab::isolation().backend(Backend::Advisory).mode(Mode::STRICT).prepare().expect("prepare");
    assert_eq!((prepared.backend(), prepared.sees_page_faults()), (Backend::Advisory, false));
    assert!(prepared.weaknesses().contains(&Weakness::NothingEnforced));
    lab::cool();
    let status = prepared.status().clone();
    let mut strict = prepared.arm().expect("arm");
    assert!(strict.is_armed());
    assert_eq!(status.state(), State::Armed);
    lab::getppid();
    lab::store(page);
    strict.turn().expect("turn");
    assert_eq!(strict.slow_path(|_| 1), Ok(1));
    assert!(strict.is_armed());
    drop(strict);
    assert_eq!(status.state(), State::Off);
    lab::no_breach(&status);
    assert_eq!((status.snapshot().armed, status.snapshot().slow_path_visits), (1, 1));
}

/// Leaking a handle is safe code: the thread may be armed again, and the rest goes as it must.
fn leaked_handle() {
    let before = lab::allowed();
    let mut prepared = lab::prepare(lab::isolation());
    let status = prepared.status().clone();
    std::mem::forget(prepared.arm().expect("arm"));
    let mut strict = prepared.arm().expect("arm");
    assert_enforced(&mut strict, &status);
    std::mem::forget(strict);
    drop(prepared);
    assert_eq!((status.breach_count(), status.state()), (1, State::Off));
    assert_eq!(lab::allowed(), before);
    lab::getppid();
    lab::isolated(lab::isolation(), assert_enforced);
}

/// Whoever arms again without a turn hears of the breach all the same, and once.
fn armed_again_before_a_turn() {
    for (n, on_breach) in [OnBreach::Report, OnBreach::Stop].into_iter().enumerate() {
        let status = lab::isolated(lab::isolation().on_breach(on_breach), |strict, status| {
            lab::getppid();
            strict.rearm().expect("rearm");
            assert!(strict.is_armed());
            assert_eq!((status.breach_count(), status.reported()), (1, 1));
        });
        assert_syscall(&only_recorded(&status), libc::SYS_getppid, At::Syscall);
        assert_eq!(lab::reports().len(), n + 1);
    }
    // And where the handle was leaked.
    let mut prepared = lab::prepare(lab::isolation());
    std::mem::forget(prepared.arm().expect("arm"));
    lab::getppid();
    drop(prepared);
    assert_eq!(lab::reports().len(), 3);
}

/// A panic hook releases: what broke before the panic is reported when isolation is given back.
fn released_after_a_breach() {
    let status = lab::isolated(lab::isolation(), |_, _| {
        lab::getppid();
        isoplane_isolation::release();
    });
    assert_syscall(&lab::only_breach(&status), libc::SYS_getppid, At::Syscall);
}

/// A visit may drop what the thread was prepared with, once the handle was leaked: it comes back to a
/// thread that is not isolated, and that may be prepared again.
fn dropped_in_a_visit() {
    for panics in [false, true] {
        let mut prepared = lab::prepare(lab::isolation());
        let status = prepared.status().clone();
        std::mem::forget(prepared.arm().expect("arm"));
        let ended = catch_unwind(AssertUnwindSafe(|| {
            isoplane_isolation::visit(|_| {
                drop(prepared);
                assert!(!panics, "in a visit");
                7
            })
        }));
        assert_eq!(ended.ok(), (!panics).then_some(Ok(7)));
        assert_eq!(status.state(), State::Off);
        lab::getppid();
        lab::no_breach(&status);
    }
    lab::isolated(lab::isolation(), assert_enforced);
}

/// Who comes after a worker that was killed is not isolated before it has armed.
fn killed_and_followed() {
    let status = Status::create("killed").expect("status");
    let isolation = lab::isolation().status(status.clone());
    let child = lab::child(|| {
        lab::isolated(isolation.clone().on_breach(OnBreach::Abort), |_, _| {
            lab::getppid();
        });
    });
    assert!(matches!(lab::ended(child), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    assert_eq!(status.state(), State::Broken);
    let mut prepared = lab::prepare(isolation);
    assert_eq!(status.state(), State::Off);
    let strict = prepared.arm().expect("arm");
    assert_eq!(status.state(), State::Armed);
    drop(strict);
}

/// The first process of a pid namespace, as the program in a container is, cannot kill itself; it dies all the
/// same, with the call unmade.
fn abort_of_an_init() {
    let status = Status::create("init").expect("status");
    let isolation = lab::isolation().on_breach(OnBreach::Abort).status(status.clone());
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWPID) {
        lab::skip(&format!("no pid namespace may be made here: {errno}"));
    }
    let child = lab::child(|| {
        assert_eq!(std::process::id(), 1);
        lab::isolated(isolation, |_, _| {
            lab::getppid();
        });
    });
    assert_eq!(lab::ended(child), WaitStatus::Exited(child, 137));
    assert_syscall(&only_recorded(&status), libc::SYS_getppid, At::Syscall);
}
