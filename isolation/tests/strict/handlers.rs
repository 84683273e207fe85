//! Signal handlers of the program's under isolation: those that run while the gate is shut, break it,
//! leave sideways, return by a restorer of their own, or want the signals that the isolation uses.

use super::lab::{
    self, At, OneArgument, ThreeArguments, assert_enforced, assert_fault, assert_syscall, install,
    only_breach,
};
use crate::common::Test;
use isoplane_isolation::{Cause, Detail, Mode, OnBreach, State, Status, Strict};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

pub(crate) const CASES: &[Test] = &[
    ("handlers::signal_from_a_sibling", signal_from_a_sibling),
    ("handlers::breach_in_a_handler", breach_in_a_handler),
    ("handlers::that_blocks_everything", that_blocks_everything),
    ("handlers::on_the_signal_stack", on_the_signal_stack),
    ("handlers::visit_in_a_handler", visit_in_a_handler),
    ("handlers::during_a_visit", during_a_visit),
    ("handlers::own_restorer", own_restorer),
    ("handlers::fault_and_call_in_a_handler", fault_and_call_in_a_handler),
    ("handlers::nested", nested),
    ("handlers::sigsegv_repaired", sigsegv_repaired),
    ("handlers::sigsegv_escaped", sigsegv_escaped),
    ("handlers::former_sigsys", former_sigsys),
    ("handlers::former_sigtrap", former_sigtrap),
    ("handlers::former_of_one_argument", former_of_one_argument),
    ("handlers::former_ignores", former_ignores),
    ("handlers::former_default_kills", former_default_kills),
    ("handlers::installed_later", installed_later),
    ("handlers::installed_in_a_visit", installed_in_a_visit),
    ("handlers::installed_in_a_visit_to_block_everything", installed_in_a_visit_to_block_everything),
    ("handlers::installed_later_and_chained", installed_later_and_chained),
];

static HANDLED: AtomicU32 = AtomicU32::new(0);
static PAGE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static CODE: AtomicU32 = AtomicU32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);

/// The kernel's form of a signal's action (asm/signal.h, x86-64).
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct KernelAction {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

fn install1(signal: Signal, handler: OneArgument) {
    install(signal, handler as usize, 0);
}

fn install3(signal: Signal, handler: ThreeArguments) {
    install(signal, handler as usize, libc::SA_SIGINFO);
}

/// Has a sibling thread send a signal to this one while it is isolated, and turns until it was handled.
fn signalled(strict: &mut Strict<'_>, sender: &Sender) {
    let before = HANDLED.load(Ordering::Relaxed);
    sender.0.store(1, Ordering::Release);
    while HANDLED.load(Ordering::Relaxed) == before {
        std::hint::spin_loop();
    }
    strict.turn().expect("turn");
}

/// Sends SIGUSR1 to the thread that made it, when told to.
struct Sender(std::sync::Arc<AtomicU32>);

fn sender() -> Sender {
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    let told = std::sync::Arc::new(AtomicU32::new(0));
    let ear = told.clone();
    std::thread::spawn(move || {
        loop {
            if ear.swap(0, Ordering::Acquire) == 1 {
                // SAFETY: plain numbers.
                unsafe { libc::syscall(libc::SYS_tgkill, pid.as_raw(), tid.as_raw(), libc::SIGUSR1) };
            }
            std::thread::yield_now();
        }
    });
    Sender(told)
}

/// Isolated with SIGUSR1 and SIGUSR2 let through.
fn isolated(mode: Mode, body: impl FnOnce(&mut Strict<'_>, &Status)) -> Status {
    let mut prepared = lab::prepare(lab::isolation().mode(mode));
    let status = prepared.status().clone();
    lab::unblock(&[Signal::SIGUSR1, Signal::SIGUSR2]);
    let mut strict = prepared.arm().expect("arm");
    body(&mut strict, &status);
    drop(strict);
    status
}

extern "C" fn quiet(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn calls(_: libc::c_int) {
    lab::getppid();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// A handler that makes no system call returns with the gate shut, which stays shut.
fn signal_from_a_sibling() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install1(Signal::SIGUSR1, quiet);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        for _ in 0..100 {
            signalled(strict, &sender);
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    assert_eq!(HANDLED.load(Ordering::Relaxed), 100);
}

fn breach_in_a_handler() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install1(Signal::SIGUSR1, calls);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        signalled(strict, &sender);
        assert_syscall(&only_breach(status), libc::SYS_getppid, At::Syscall);
        assert_enforced(strict, status);
    });
}

/// Installs a handler that blocks every signal while it runs.
fn block_everything(signal: Signal, handler: usize, flags: i32) {
    // SAFETY: all zero is a valid sigaction; the handler has the signature for `flags`.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        libc::sigfillset(&raw mut action.sa_mask);
        assert_eq!(libc::sigaction(signal as i32, &raw const action, std::ptr::null_mut()), 0);
    }
}

fn that_blocks_everything() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    block_everything(Signal::SIGUSR1, calls as OneArgument as usize, 0);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        signalled(strict, &sender);
        assert_syscall(&only_breach(status), libc::SYS_getppid, At::Syscall);
        assert_enforced(strict, status);
    });
}

/// The handler runs on the isolation's own signal stack, and the trapped call's handler below it.
fn on_the_signal_stack() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install(Signal::SIGUSR1, calls as OneArgument as usize, libc::SA_ONSTACK);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        signalled(strict, &sender);
        assert_syscall(&only_breach(status), libc::SYS_getppid, At::Syscall);
        assert_enforced(strict, status);
    });
}

extern "C" fn visits(_: libc::c_int) {
    isoplane_isolation::visit(|_| lab::getppid()).expect("visit");
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// A handler may ask for permission as anybody else, and returns with the gate shut.
fn visit_in_a_handler() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install1(Signal::SIGUSR1, visits);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        for n in 1..=100 {
            signalled(strict, &sender);
            assert!(strict.is_armed());
            assert_eq!(status.snapshot().slow_path_visits, n);
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
}

/// A handler that runs while the thread visits the kernel has the visit's permission; visits of its own
/// are part of it.
fn during_a_visit() {
    let sender = sender();
    for handler in [calls as OneArgument, visits] {
        install1(Signal::SIGUSR1, handler);
        let status = isolated(Mode::STRICT, |strict, _| {
            for _ in 0..100 {
                strict
                    .slow_path(|_| {
                        let before = HANDLED.load(Ordering::Relaxed);
                        sender.0.store(1, Ordering::Release);
                        lab::until("handled", || HANDLED.load(Ordering::Relaxed) != before);
                        lab::getppid();
                    })
                    .expect("visit");
                assert!(strict.is_armed());
            }
        });
        lab::no_breach(&status);
        assert_eq!(status.snapshot().slow_path_visits, 100);
    }
}

/// Installs a handler whose frame returns by the lab's restorer.
fn install_with_own_restorer(handler: OneArgument) {
    const SA_RESTORER: u64 = 0x0400_0000;
    let restorer = At::Restorer.address();
    let action = KernelAction { handler: handler as usize as u64, flags: SA_RESTORER, restorer, mask: 0 };
    let arguments = [libc::SIGUSR1 as u64, (&raw const action) as u64, 0, 8];
    assert_eq!(lab::syscall(libc::SYS_rt_sigaction, arguments), 0);
}

fn own_restorer() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install_with_own_restorer(quiet);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        for _ in 0..100 {
            signalled(strict, &sender);
            assert!(strict.is_armed());
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    isolated(Mode::ALLOW_SYSCALLS, |strict, status| {
        signalled(strict, &sender);
        assert_eq!(status.snapshot().allowed.total(), 0);
        lab::getppid();
        assert_eq!(status.snapshot().allowed.of(Cause::Syscall), 1);
        assert!(strict.is_armed());
    });
    assert_eq!(HANDLED.load(Ordering::Relaxed), 101);
}

extern "C" fn faults_and_calls(_: libc::c_int) {
    lab::store(PAGE.load(Ordering::Relaxed));
    lab::getppid();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

fn fault_and_call_in_a_handler() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install1(Signal::SIGUSR1, faults_and_calls);
    PAGE.store(lab::cold_page(), Ordering::Relaxed);
    let sender = sender();
    isolated(Mode::STRICT, |strict, status| {
        signalled(strict, &sender);
        assert_fault(&only_breach(status), PAGE.load(Ordering::Relaxed));
        // Now that the page is there, the handler's call is what breaks it.
        signalled(strict, &sender);
        let (_, breach) = status.breaches(1)[0];
        assert_syscall(&breach, libc::SYS_getppid, At::Syscall);
        assert_eq!((status.breach_count(), lab::reports().len()), (2, 2));
    });
    // With page faults allowed, the call is the first thing that is not.
    PAGE.store(lab::cold_page(), Ordering::Relaxed);
    let status = isolated(Mode::ALLOW_PAGE_FAULTS, |strict, _| signalled(strict, &sender));
    assert_syscall(&lab::only_recorded(&status), libc::SYS_getppid, At::Syscall);
    assert_eq!(status.snapshot().allowed.of(Cause::PageFault), 1);
}

extern "C" fn raises_another(_: libc::c_int) {
    lab::store(PAGE.load(Ordering::Relaxed));
    let (pid, tid) = (lab::syscall(libc::SYS_getpid, []), lab::syscall(libc::SYS_gettid, []));
    lab::syscall(libc::SYS_tgkill, [pid as u64, tid as u64, libc::SIGUSR2 as u64]);
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// A handler within a handler within a fault: isolation breaks once, at the first of them.
fn nested() {
    lab::dispatch_only("a signal is a breach itself, or suspends isolation");
    install1(Signal::SIGUSR2, calls);
    install(Signal::SIGUSR1, raises_another as OneArgument as usize, libc::SA_ONSTACK);
    PAGE.store(lab::cold_page(), Ordering::Relaxed);
    let sender = sender();
    let body = |strict: &mut Strict<'_>, _: &Status| {
        let before = HANDLED.load(Ordering::Relaxed);
        signalled(strict, &sender);
        lab::until("both handled", || HANDLED.load(Ordering::Relaxed) == before + 2);
    };
    let status = isolated(Mode::STRICT, body);
    assert_fault(&only_breach(&status), PAGE.load(Ordering::Relaxed));
}

extern "C" fn repairs(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel's siginfo for SIGSEGV has an address.
    ADDRESS.store(unsafe { (*info).si_addr() } as u64, Ordering::Relaxed);
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let page = PAGE.load(Ordering::Relaxed) as u64;
    lab::syscall(libc::SYS_mprotect, [page, 4096, protection]);
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// The program's SIGSEGV handler makes the page usable and returns, as a garbage collector's would.
fn sigsegv_repaired() {
    install3(Signal::SIGSEGV, repairs);
    let page = lab::pages(libc::PROT_NONE);
    PAGE.store(page, Ordering::Relaxed);
    let status = lab::isolated(lab::isolation(), |strict, status| {
        lab::store(page);
        strict.turn().expect("turn");
        assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
        assert_eq!(ADDRESS.load(Ordering::Relaxed), page as u64);
        let breach = only_breach(status);
        // The handler was entered first, so that is where the second signal found the thread.
        let instruction = repairs as ThreeArguments as usize as u64;
        assert_eq!(breach.detail, Detail::Fault { address: page as u64, instruction }, "{breach}");
        assert_enforced(strict, status);
    });
    assert_eq!(status.snapshot().breaches.of(Cause::PageFault), 1);
    // SAFETY: the case's own page, usable now.
    assert_eq!(unsafe { page.read_volatile() }, 1);
}

extern "C" fn escapes(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    lab::escape();
}

/// It leaves by a jump instead, never to return.
fn sigsegv_escaped() {
    install(Signal::SIGSEGV, escapes as OneArgument as usize, libc::SA_NODEFER | libc::SA_ONSTACK);
    let page = lab::pages(libc::PROT_NONE);
    let status = lab::isolated(lab::isolation(), |strict, status| {
        for n in 1..=10 {
            assert!(lab::attempt(page));
            strict.turn().expect("turn");
            assert_eq!(status.breach_count(), n);
        }
        assert_enforced(strict, status);
    });
    assert_eq!(status.snapshot().breaches.of(Cause::PageFault), 10);
    assert_eq!(HANDLED.load(Ordering::Relaxed), 10);
}

extern "C" fn notes(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: every siginfo has a code.
    CODE.store(unsafe { (*info).si_code } as u32, Ordering::Relaxed);
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// A seccomp filter that traps getppid, and the program's handler for it: isolation sees the call first,
/// the filter when it runs.
fn former_sigsys() {
    const SYS_SECCOMP: u32 = 1;
    install3(Signal::SIGSYS, notes);
    lab::filter(libc::SYS_getppid, libc::SECCOMP_RET_TRAP);
    lab::getppid();
    assert_eq!((HANDLED.load(Ordering::Relaxed), CODE.load(Ordering::Relaxed)), (1, SYS_SECCOMP));
    let status = lab::isolated(lab::isolation(), |strict, _| {
        lab::getppid();
        strict.turn().expect("turn");
        assert_eq!(HANDLED.load(Ordering::Relaxed), 2);
        strict.slow_path(|_| lab::getppid()).expect("visit");
    });
    let breaches = status.breaches(0);
    assert_syscall(&breaches[0].1, libc::SYS_getppid, At::Syscall);
    if lab::is_kernel() {
        // A visit is outside isolation.
        assert_eq!((breaches.len(), lab::reports().len()), (1, 1));
    } else {
        // In the slow path the signal is a breach: the mode does not allow it, nor exceptions.
        assert_eq!(breaches[1].1.cause, Cause::Exception);
        assert!(breaches[1].1.in_slow_path);
        assert_eq!((breaches.len(), lab::reports().len()), (2, 2));
    }
    assert_eq!((HANDLED.load(Ordering::Relaxed), CODE.load(Ordering::Relaxed)), (3, SYS_SECCOMP));
}

/// A breakpoint is an exception, so a breach, and the program's handler has it all the same.
fn former_sigtrap() {
    install3(Signal::SIGTRAP, notes);
    lab::isolated(lab::isolation(), |strict, status| {
        lab::int3();
        strict.turn().expect("turn");
        let breach = only_breach(status);
        // Where the kernel isolates, it may have entered the handler first.
        let handler = if lab::is_kernel() { notes as ThreeArguments as usize as u64 } else { 0 };
        assert_eq!(breach.cause, Cause::Exception);
        let Detail::At { instruction } = breach.detail else { panic!("{breach}") };
        assert!([At::Int3.address(), handler].contains(&instruction), "{breach}");
        assert_enforced(strict, status);
    });
    assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
    lab::int3();
    assert_eq!(HANDLED.load(Ordering::Relaxed), 2);
}

fn former_of_one_argument() {
    install1(Signal::SIGTRAP, calls);
    let status = lab::isolated(lab::isolation(), |strict, _| {
        lab::int3();
        strict.turn().expect("turn");
    });
    assert_eq!(only_breach(&status).cause, Cause::Exception);
    assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
}

fn former_ignores() {
    lab::dispatch_only("a visit is outside isolation");
    install(Signal::SIGTRAP, libc::SIG_IGN, 0);
    let (pid, tid) = (std::process::id() as u64, nix::unistd::gettid().as_raw() as u64);
    let status = lab::isolated(lab::isolation(), |strict, _| {
        strict
            .slow_path(|_| lab::syscall(libc::SYS_tgkill, [pid, tid, libc::SIGTRAP as u64]))
            .expect("visit");
        strict.turn().expect("turn");
    });
    let breach = only_breach(&status);
    assert_eq!((breach.cause, breach.in_slow_path), (Cause::Signal, true));
}

/// Nobody else wants the breakpoint: the program dies of it as it would have, the breach on record.
fn former_default_kills() {
    let status = Status::create("dies").expect("status");
    let isolation = lab::isolation().status(status.clone());
    let child = lab::child(|| {
        lab::no_core();
        lab::isolated(isolation, |_, _| lab::int3());
    });
    assert!(matches!(lab::ended(child), WaitStatus::Signaled(_, Signal::SIGTRAP, _)));
    if lab::is_kernel() {
        // It died in the kernel, and a breach is a return from there.
        lab::no_breach(&status);
    } else {
        assert_eq!(lab::only_recorded(&status).cause, Cause::Exception);
    }
}

/// The signals are taken back when the thread arms again, and that is said.
fn installed_later() {
    lab::isolated(lab::isolation().on_breach(OnBreach::Stop), |strict, status| {
        lab::getppid();
        strict.turn().unwrap_err();
        install3(Signal::SIGSYS, notes);
        install3(Signal::SIGTRAP, notes);
        assert!(lab::warnings().is_empty());
        strict.rearm().expect("rearm");
        lab::getppid();
        strict.turn().unwrap_err();
        assert_eq!((status.breach_count(), HANDLED.load(Ordering::Relaxed)), (2, 0));
        lab::int3();
        assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
    });
    let warnings = lab::warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("SIGSYS or SIGTRAP"), "{warnings:?}");
}

/// A library that installs handlers while the program visits the kernel does not get the next breach.
fn installed_in_a_visit() {
    PAGE.store(lab::cold_page(), Ordering::Relaxed);
    lab::isolated(lab::isolation(), |strict, status| {
        strict.slow_path(|_| install3(Signal::SIGSYS, notes)).expect("visit");
        assert_enforced(strict, status);
        strict.slow_path(|_| install3(Signal::SIGTRAP, notes)).expect("visit");
        lab::store(PAGE.load(Ordering::Relaxed));
        strict.turn().expect("turn");
        assert_eq!(status.snapshot().breaches.of(Cause::PageFault), 1);
        assert_eq!(status.state(), State::Armed);
    });
    assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
    // SIGTRAP is not the isolation's where the kernel isolates.
    assert_eq!(lab::warnings().len(), if lab::is_kernel() { 1 } else { 2 });
}

/// It would be killed by its first system call.
fn installed_in_a_visit_to_block_everything() {
    PAGE.store(lab::pages(libc::PROT_NONE), Ordering::Relaxed);
    lab::isolated(lab::isolation(), |strict, status| {
        let install =
            |_: &_| block_everything(Signal::SIGSEGV, repairs as ThreeArguments as usize, libc::SA_SIGINFO);
        strict.slow_path(install).expect("visit");
        lab::store(PAGE.load(Ordering::Relaxed));
        strict.turn().expect("turn");
        assert_eq!((HANDLED.load(Ordering::Relaxed), status.breach_count()), (1, 1));
        assert_enforced(strict, status);
    });
}

static FORMER: AtomicU64 = AtomicU64::new(0);

extern "C" fn chains(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    let former = FORMER.load(Ordering::Relaxed) as usize;
    // SAFETY: the handler that was there before, which takes three arguments.
    let former: ThreeArguments = unsafe { std::mem::transmute(former) };
    former(signal, info, context);
}

/// A crash reporter that passes on what is not its own to whoever was there before: the isolation.
/// Whatever neither wants does what it did before both came: here, the program's first handler.
fn installed_later_and_chained() {
    install3(Signal::SIGTRAP, notes);
    lab::isolated(lab::isolation(), |strict, status| {
        strict
            .slow_path(|_| {
                let former = install(Signal::SIGTRAP, chains as ThreeArguments as usize, libc::SA_SIGINFO);
                FORMER.store(former.sa_sigaction as u64, Ordering::Relaxed);
            })
            .expect("visit");
        lab::int3();
        strict.turn().expect("turn");
        assert_eq!(only_breach(status).cause, Cause::Exception);
        assert_enforced(strict, status);
    });
    // The reporter's handler, then the first one.
    assert_eq!(HANDLED.load(Ordering::Relaxed), 2);
}
