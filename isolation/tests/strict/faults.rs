//! Page faults: each is reported once, with the address that was touched and the instruction that
//! touched it, wherever the page went: never there, taken away, to be copied after a fork.

use super::lab::{self, At, assert_enforced, assert_fault, assert_syscall, only_breach};
use crate::common::Test;
use isoplane_isolation::{Cause, Detail, State, Status};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

pub(crate) const CASES: &[Test] = &[
    ("faults::first_touch", first_touch),
    ("faults::only_the_first_of_a_turn", only_the_first_of_a_turn),
    ("faults::then_a_system_call", then_a_system_call),
    ("faults::in_the_slow_path", in_the_slow_path),
    ("faults::in_the_slow_path_and_stop", in_the_slow_path_and_stop),
    ("faults::of_the_kernel_are_none", of_the_kernel_are_none),
    ("faults::sibling_unmaps", sibling_unmaps),
    ("faults::sibling_forks", sibling_forks),
    ("faults::two_isolated_threads", two_isolated_threads),
    ("faults::each_is_reported_once", each_is_reported_once),
];

fn first_touch() {
    let page = lab::cold_page();
    let address = page.wrapping_add(123);
    lab::isolated(lab::isolation(), |strict, status| {
        lab::store(address);
        assert_eq!(status.state(), State::Broken);
        strict.turn().expect("turn");
        lab::store(address);
        strict.turn().expect("turn");
        assert!(strict.is_armed());
        let breach = only_breach(status);
        assert_fault(&breach, address);
        assert!(!breach.in_slow_path);
        let report = &lab::reports()[0];
        assert_eq!(report.fields["address"], format!("{address:p}"));
        assert_eq!(report.fields["instruction"], format!("{:#x}", At::Store.address()));
        assert_enforced(strict, status);
    });
    // SAFETY: the case's own page.
    assert_eq!(unsafe { address.read_volatile() }, 1);
}

fn only_the_first_of_a_turn() {
    let pages = [lab::cold_page(), lab::cold_page()];
    let status = lab::isolated(lab::isolation(), |strict, _| {
        lab::store(pages[0]);
        lab::store(pages[1]);
        lab::getppid();
        strict.turn().expect("turn");
    });
    assert_fault(&only_breach(&status), pages[0]);
}

fn then_a_system_call() {
    let page = lab::cold_page();
    let status = lab::isolated(lab::isolation(), |strict, _| {
        lab::store(page);
        strict.turn().expect("turn");
        lab::getppid();
        strict.turn().expect("turn");
    });
    let breaches = status.breaches(0);
    assert_eq!(breaches.len(), 2);
    assert_fault(&breaches[0].1, page);
    assert_syscall(&breaches[1].1, libc::SYS_getppid, At::Syscall);
    assert_eq!(lab::reports().len(), 2);
}

fn in_the_slow_path() {
    lab::dispatch_only("a visit is outside isolation");
    let page = lab::cold_page();
    let parent = std::os::unix::process::parent_id();
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let answer = strict.slow_path(|_| {
            lab::getppid();
            lab::store(page);
            lab::getppid()
        });
        // Not isolated again behind the program's back: the breach is to be seen first.
        assert_eq!(status.state(), State::Broken);
        assert!(!strict.is_armed());
        strict.turn().expect("turn");
        strict.turn().expect("turn");
        assert!(strict.is_armed());
        assert_eq!(answer, Ok(i64::from(parent)));
        // No turn sees this one: it is reported when isolation is given back.
        lab::getppid();
    });
    let breaches = status.breaches(0);
    assert_eq!(breaches.len(), 2);
    assert_fault(&breaches[0].1, page);
    assert!(breaches[0].1.in_slow_path);
    assert_syscall(&breaches[1].1, libc::SYS_getppid, At::Syscall);
    let reports = lab::reports();
    assert_eq!(reports.len(), 2);
    assert!(reports[0].message().ends_with(", in the slow path"), "{reports:?}");
}

fn in_the_slow_path_and_stop() {
    lab::dispatch_only("a visit is outside isolation");
    let page = lab::cold_page();
    let stop = lab::isolation().on_breach(isoplane_isolation::OnBreach::Stop);
    let status = lab::isolated(stop, |strict, status| {
        strict.slow_path(|_| lab::store(page)).expect("visit");
        let error = strict.turn().unwrap_err();
        assert!(matches!(error, isoplane_isolation::StrictError::Breach(b) if b.in_slow_path), "{error}");
        assert_eq!(status.state(), State::Off);
        strict.turn().expect("once");
    });
    assert_fault(&lab::only_recorded(&status), page);
    assert!(lab::reports().is_empty());
}

/// What the kernel touches on the program's behalf in a visit is the visit's business.
fn of_the_kernel_are_none() {
    let page = lab::cold_page();
    let status = lab::isolated(lab::isolation(), |strict, _| {
        let read = strict.slow_path(|_| {
            let zero = lab::syscall(libc::SYS_open, [c"/dev/zero".as_ptr() as u64, 0]);
            let read = lab::syscall(libc::SYS_read, [zero as u64, page as u64, 100]);
            lab::syscall(libc::SYS_close, [zero as u64]);
            read
        });
        strict.turn().expect("turn");
        assert_eq!(read, Ok(100));
        lab::store(page);
        strict.turn().expect("turn");
    });
    lab::no_breach(&status);
}

/// A sibling that unmaps disturbs (by a TLB shootdown, which is observed) and breaks nothing.
fn sibling_unmaps() {
    lab::dispatch_only("what a sibling does to the memory map is a breach");
    const TIMES: u32 = 1000;
    static DONE: AtomicU32 = AtomicU32::new(0);
    static GO: AtomicBool = AtomicBool::new(false);
    let sibling = std::thread::spawn(|| {
        lab::until("isolated", || GO.load(Ordering::Acquire));
        for _ in 0..TIMES {
            let page = lab::pages(libc::PROT_READ | libc::PROT_WRITE);
            lab::store(page);
            let base = page.wrapping_sub(4096).cast();
            // SAFETY: the three pages just mapped.
            assert_eq!(unsafe { libc::munmap(base, 3 * 4096) }, 0);
            DONE.fetch_add(1, Ordering::Release);
        }
    });
    let status = lab::isolated(lab::isolation(), |strict, _| {
        GO.store(true, Ordering::Release);
        while DONE.load(Ordering::Acquire) < TIMES {
            strict.turn().expect("turn");
        }
        assert!(strict.is_armed());
    });
    sibling.join().expect("sibling");
    lab::no_breach(&status);
}

/// A sibling's fork makes every private page one to be copied: the worker's next write to each faults.
fn sibling_forks() {
    lab::dispatch_only("what a sibling does to the memory map is a breach");
    static STAGE: AtomicU32 = AtomicU32::new(0);
    let page = lab::pages(libc::PROT_READ | libc::PROT_WRITE);
    lab::store(page);
    let sibling = std::thread::spawn(|| {
        lab::until("isolated", || STAGE.load(Ordering::Acquire) == 1);
        // SAFETY: the child ends at once.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        STAGE.store(2, Ordering::Release);
        lab::ended_well(nix::unistd::Pid::from_raw(child));
    });
    let address = page.wrapping_add(8);
    let status = lab::isolated(lab::isolation(), |strict, _| {
        STAGE.store(1, Ordering::Release);
        while STAGE.load(Ordering::Acquire) != 2 {
            std::hint::spin_loop();
        }
        // The stack, what reports are made of, ... until nothing that a turn writes is left to copy.
        for _ in 0..1000 {
            strict.turn().expect("turn");
        }
        lab::store(address);
        strict.turn().expect("turn");
        lab::store(address);
        strict.turn().expect("turn");
    });
    sibling.join().expect("sibling");
    let breaches = status.breaches(0);
    assert!(breaches.iter().all(|(_, breach)| breach.cause == Cause::PageFault), "{breaches:x?}");
    let there = |detail| matches!(detail, Detail::Fault { address: at, .. } if at == address as u64);
    let ours: Vec<_> = breaches.iter().filter(|(_, breach)| there(breach.detail)).collect();
    assert_eq!(ours.len(), 1, "{breaches:x?}");
    assert_fault(&ours[0].1, address);
    assert_eq!(lab::reports().len() as u64, status.breach_count());
}

/// Only the thread that broke is told, and each counts for itself.
fn two_isolated_threads() {
    lab::dispatch_only("a CPU isolates one thread");
    const TURNS: usize = 50;
    static PAGE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
    PAGE.store(lab::cold_page(), Ordering::Relaxed);
    let statuses = [Status::create("one").expect("status"), Status::create("two").expect("status")];
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for (at, status) in statuses.iter().enumerate() {
            let (barrier, status) = (&barrier, status.clone());
            scope.spawn(move || {
                lab::isolated(lab::isolation().status(status), |strict, _| {
                    strict.slow_path(|_| barrier.wait()).expect("visit");
                    for turn in 0..TURNS {
                        match at {
                            0 => _ = lab::getppid(),
                            _ if turn == 7 => lab::store(PAGE.load(Ordering::Relaxed)),
                            _ => {}
                        }
                        strict.turn().expect("turn");
                    }
                    assert!(strict.is_armed());
                    strict.slow_path(|_| barrier.wait()).expect("visit");
                });
            });
        }
    });
    let [one, two] = statuses;
    assert_eq!(one.breach_count(), TURNS as u64);
    for (_, breach) in one.breaches(0) {
        assert_syscall(&breach, libc::SYS_getppid, At::Syscall);
    }
    assert_fault(&lab::only_recorded(&two), PAGE.load(Ordering::Relaxed));
    assert_eq!(lab::reports().len(), TURNS + 1);
    assert_ne!(one.thread(), two.thread());
    assert_eq!(one.snapshot().slow_path_visits, 2 + TURNS as u64);
    assert_eq!(two.snapshot().slow_path_visits, 2 + 1);
}

fn each_is_reported_once() {
    const N: usize = 100;
    let pages: Vec<*mut u8> = (0..N).map(|_| lab::cold_page()).collect();
    let status = lab::isolated(lab::isolation(), |strict, status| {
        for (n, page) in pages.iter().enumerate() {
            lab::store(*page);
            strict.turn().expect("turn");
            assert_eq!(status.breach_count(), n as u64 + 1);
        }
    });
    assert_eq!(status.snapshot().breaches.of(Cause::PageFault), N as u64);
    for (number, breach) in status.breaches(0) {
        assert_fault(&breach, pages[number as usize]);
    }
    assert_eq!(lab::reports().len(), N);
}
