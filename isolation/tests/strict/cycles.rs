//! Over and over: nothing is left behind by arming, visiting and preparing; and panics, in the loop and
//! in a visit.

use super::lab::{self, assert_enforced};
use crate::common::Test;
use isoplane_isolation::State;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

pub(crate) const CASES: &[Test] = &[
    ("cycles::arm_and_disarm", arm_and_disarm),
    ("cycles::slow_path", slow_path),
    ("cycles::prepare_and_drop", prepare_and_drop),
    ("cycles::threads", threads),
    ("cycles::panic_while_armed", panic_while_armed),
    ("cycles::panic_without_release", panic_without_release),
    ("cycles::panic_in_a_visit", panic_in_a_visit),
];

const TIMES: u64 = 100_000;

/// What the process holds: open descriptors, mappings.
fn held() -> (usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("procfs").count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs").lines().count();
    (descriptors, maps)
}

fn arm_and_disarm() {
    let mut prepared = lab::prepare(lab::isolation());
    let status = prepared.status().clone();
    let before = held();
    for _ in 0..TIMES {
        let strict = prepared.arm().expect("arm");
        assert_eq!(status.state(), State::Armed);
        strict.disarm();
        assert_eq!(status.state(), State::Off);
    }
    assert_eq!(held(), before);
    assert_eq!(status.snapshot().armed, TIMES);
    lab::no_breach(&status);
    assert_enforced(&mut prepared.arm().expect("arm"), &status);
}

fn slow_path() {
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let before = strict.slow_path(|_| held());
        for n in 0..TIMES {
            assert_eq!(strict.slow_path(|_| n), Ok(n));
            strict.turn().expect("turn");
        }
        assert!(strict.is_armed());
        assert_eq!(strict.slow_path(|_| held()), before);
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    let snapshot = status.snapshot();
    assert_eq!(snapshot.slow_path_visits, TIMES + 3);
    assert_eq!(snapshot.visit_histogram.iter().sum::<u64>(), TIMES + 3);
}

fn prepare_and_drop() {
    let status = lab::isolated(lab::isolation(), |_, _| ());
    let before = held();
    for _ in 0..200 {
        lab::isolated(lab::isolation().status(status.clone()), |strict, _| {
            strict.turn().expect("turn");
        });
    }
    assert_eq!(held(), before);
    lab::no_breach(&status);
    assert_eq!(status.snapshot().armed, 201);
}

/// Threads that come and go, each isolated once.
fn threads() {
    let one = || {
        let thread = std::thread::spawn(|| {
            lab::isolated(lab::isolation(), |strict, status| {
                lab::getppid();
                strict.turn().expect("turn");
                assert_eq!(status.breach_count(), 1);
            });
        });
        thread.join().expect("join");
    };
    one();
    let (descriptors, _) = held();
    for _ in 0..50 {
        one();
    }
    assert_eq!(held().0, descriptors);
    assert_eq!(lab::reports().len(), 51);
}

static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A hook as a worker installs it: isolation off first, then whatever the message takes.
fn install_hook(release: bool) {
    std::panic::set_hook(Box::new(move |panic| {
        if release {
            isoplane_isolation::release();
        }
        eprintln!("{panic}");
        SAID.lock().expect("said").push(panic.to_string());
    }));
}

fn panic_while_armed() {
    install_hook(true);
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let ended = catch_unwind(AssertUnwindSafe(|| {
            for turn in 0.. {
                strict.turn().expect("turn");
                assert!(turn < 1000, "the worker's own words");
            }
        }));
        assert!(ended.is_err());
        assert_eq!(status.state(), State::Off);
        strict.turn().expect("turn");
        lab::no_breach(status);
        strict.rearm().expect("rearm");
        assert!(strict.is_armed());
    });
    lab::no_breach(&status);
    let said = SAID.lock().expect("said");
    assert_eq!(said.len(), 1);
    assert!(said[0].contains("the worker's own words") && said[0].contains("cycles.rs:"), "{said:?}");
}

/// Without that, the panic's own words break isolation, are reported as any breach, and arrive.
fn panic_without_release() {
    install_hook(false);
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let ended = catch_unwind(AssertUnwindSafe(|| panic!("the worker's own words")));
        assert!(ended.is_err());
        assert_eq!(status.state(), State::Broken);
        strict.turn().expect("turn");
        assert!(strict.is_armed());
    });
    lab::only_breach(&status);
    let said = SAID.lock().expect("said");
    assert!(said.len() == 1 && said[0].contains("the worker's own words"), "{said:?}");
}

/// Whoever catches it is not isolated, until it is armed again.
fn panic_in_a_visit() {
    install_hook(false);
    lab::isolated(lab::isolation(), |strict, status| {
        for _ in 0..10 {
            let ended = catch_unwind(AssertUnwindSafe(|| strict.slow_path(|_| panic!("in a visit"))));
            assert!(ended.is_err());
            assert!(!strict.is_armed());
            assert_eq!(status.state(), State::Off);
            strict.turn().expect("turn");
            lab::getppid();
            strict.rearm().expect("rearm");
        }
        assert!(strict.is_armed());
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    assert_eq!(SAID.lock().expect("said").len(), 10);
}
