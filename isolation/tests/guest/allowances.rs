//! What the modes allow of what comes from outside is counted, and the CPU is quiet again after it.

use crate::common::Test;
use crate::helper::{Helper, isolation, tolerated};
use crate::lab::{self, OneArgument, assert_enforced};
use isoplane_isolation::{Cause, Mode, State};
use nix::sys::signal::Signal;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub(crate) const CASES: &[Test] = &[
    ("allowances::interrupts_are_counted", interrupts_are_counted),
    ("allowances::interrupts_but_no_calls", interrupts_but_no_calls),
    ("allowances::signals_suspend", signals_suspend),
    ("allowances::handler_that_escapes", handler_that_escapes),
    ("allowances::oneshot_interrupt", oneshot_interrupt),
    ("allowances::oneshot_and_a_visit", oneshot_and_a_visit),
    ("allowances::races", races),
    ("allowances::writes_then_silence", writes_then_silence),
];

/// `times` times a TLB shootdown.
fn unmap(times: u32) {
    for _ in 0..times {
        let page = lab::pages(libc::PROT_READ | libc::PROT_WRITE);
        lab::store(page);
        let base = page.wrapping_sub(4096).cast();
        // SAFETY: the three pages just mapped.
        assert_eq!(unsafe { libc::munmap(base, 3 * 4096) }, 0);
        // So that each finds the thread in user mode.
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn interrupts_are_counted() {
    let status = tolerated(Mode::ALLOW_INTERRUPTS, || unmap(100));
    let allowed = status.snapshot().allowed;
    assert!(allowed.of(Cause::TlbShootdown) > 0, "{allowed:?}");
    assert_eq!(allowed.of(Cause::Syscall) + allowed.of(Cause::PageFault), 0, "{allowed:?}");
}

fn interrupts_but_no_calls() {
    let helper = Helper::new(|| unmap(10));
    let status = lab::isolated(isolation().mode(Mode::ALLOW_INTERRUPTS), |strict, status| {
        helper.go(strict);
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    assert_eq!(status.breach_count(), 1);
    assert!(status.snapshot().allowed.of(Cause::TlbShootdown) > 0);
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn handles(_: libc::c_int) {
    lab::getppid();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn escapes(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    lab::escape();
}

/// A signal's handler runs as it likes; isolation is back when it returns.
fn signals_suspend() {
    lab::install(Signal::SIGUSR1, handles as OneArgument as usize, 0);
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    let helper = Helper::new(move || {
        for n in 1..=20 {
            // SAFETY: plain numbers.
            unsafe { libc::syscall(libc::SYS_tgkill, pid.as_raw(), tid.as_raw(), libc::SIGUSR1) };
            lab::until("handled", || HANDLED.load(Ordering::Relaxed) == n);
        }
    });
    let mut prepared = lab::prepare(isolation().mode(Mode::ALLOW_INTERRUPTS));
    let status = prepared.status().clone();
    lab::unblock(&[Signal::SIGUSR1]);
    let mut strict = prepared.arm().expect("arm");
    helper.go(&mut strict);
    assert!(strict.is_armed());
    lab::no_breach(&status);
    assert_enforced(&mut strict, &status);
    drop(strict);
    assert!(status.snapshot().allowed.of(Cause::Signal) > 0, "{:?}", status.snapshot().allowed);
}

/// One that never returns leaves isolation suspended, until the next turn sees it.
fn handler_that_escapes() {
    let flags = libc::SA_NODEFER | libc::SA_ONSTACK;
    lab::install(Signal::SIGTRAP, escapes as OneArgument as usize, flags);
    let status = lab::isolated(isolation().mode(Mode::ALLOW_EXCEPTIONS), |strict, status| {
        for n in 1..=10 {
            assert!(lab::attempt_int3());
            assert_eq!(HANDLED.load(Ordering::Relaxed), n);
            strict.turn().expect("turn");
            assert!(strict.is_armed());
            lab::no_breach(status);
        }
        assert_enforced(strict, status);
    });
    assert_eq!(status.snapshot().allowed.of(Cause::Exception), 10);
}

/// The first interrupt ends isolation without a word; a turn sees that it is off.
fn oneshot_interrupt() {
    let helper = Helper::new(|| unmap(1));
    let mode = Mode::ALLOW_INTERRUPTS | Mode::ONESHOT;
    let status = lab::isolated(isolation().mode(mode), |strict, status| {
        helper.go_unseen();
        while strict.is_armed() {
            std::hint::spin_loop();
        }
        lab::getppid();
        strict.turn().expect("turn");
        // A visit does not bring it back.
        assert_eq!(strict.slow_path(|_| 7), Ok(7));
        assert_eq!(status.state(), State::Off);
        strict.rearm().expect("rearm");
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    assert_eq!(status.snapshot().allowed.total(), 1);
}

/// A visit does not bring it back where no turn has seen that it is off.
fn oneshot_and_a_visit() {
    let mode = Mode::ALLOW_SYSCALLS | Mode::ONESHOT;
    let status = lab::isolated(isolation().mode(mode), |strict, status| {
        lab::getppid();
        assert_eq!(isoplane_isolation::visit(|_| 7), Ok(7));
        assert_eq!(status.state(), State::Off);
        assert_eq!(status.snapshot().slow_path_visits, 0);
        strict.turn().expect("turn");
        assert!(!strict.is_armed());
    });
    lab::no_breach(&status);
}

/// Within the settle window an interrupt may have been sent before: counted apart, no breach.
fn races() {
    let helper = Helper::new(|| unmap(5));
    let settling = isolation().settle_window(Duration::from_secs(1));
    let status = lab::isolated(settling, |strict, _| {
        helper.go(strict);
        assert!(strict.is_armed());
    });
    lab::no_breach(&status);
    let snapshot = status.snapshot();
    assert!(snapshot.races > 0, "{snapshot:?}");
    assert_eq!(snapshot.allowed.total(), 0, "{:?}", snapshot.allowed);
}

/// Each call is quiesced behind, so nothing is left over that would come back.
fn writes_then_silence() {
    const N: u64 = 2000;
    // SAFETY: the path ends with a zero.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    let status = lab::isolated(isolation().mode(Mode::ALLOW_SYSCALLS), |strict, status| {
        for n in 0..N {
            assert_eq!(lab::write_byte(null), 1);
            if n % 100 == 0 {
                strict.turn().expect("turn");
            }
        }
        for _ in 0..1_000_000 {
            strict.turn().expect("turn");
        }
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), N);
    });
    lab::no_breach(&status);
    assert_eq!(status.snapshot().allowed.total(), N);
}
