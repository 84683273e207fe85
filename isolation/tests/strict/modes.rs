//! What the modes allow runs and is counted, and what they do not allow stays a breach.

use super::lab::{self, At, assert_enforced, assert_fault, assert_syscall, only_breach, syscall};
use crate::common::Test;
use isoplane_isolation::{Cause, Detail, Mode, State, Status};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::WaitStatus;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

pub(crate) const CASES: &[Test] = &[
    ("modes::allowed_writes", allowed_writes),
    ("modes::allowed_errors", allowed_errors),
    ("modes::allowed_six_arguments", allowed_six_arguments),
    ("modes::allowed_wait_is_interrupted", allowed_wait_is_interrupted),
    ("modes::allowed_wait_is_restarted", allowed_wait_is_restarted),
    ("modes::allowed_calls_that_need_their_frame", allowed_calls_that_need_their_frame),
    ("modes::allowed_int80", allowed_int80),
    ("modes::allowed_wait_left_sideways", allowed_wait_left_sideways),
    ("modes::allowed_signal_mask", allowed_signal_mask),
    ("modes::allowed_mask_of_everything", allowed_mask_of_everything),
    ("modes::allowed_handlers", allowed_handlers),
    ("modes::allowed_exit", allowed_exit),
    ("modes::allowed_calls_but_no_faults", allowed_calls_but_no_faults),
    ("modes::allowed_page_faults", allowed_page_faults),
    ("modes::allowed_exceptions", allowed_exceptions),
    ("modes::oneshot_syscall", oneshot_syscall),
    ("modes::oneshot_page_fault", oneshot_page_fault),
    ("modes::oneshot_exception", oneshot_exception),
    ("modes::oneshot_is_not_used_up_by_a_visit", oneshot_is_not_used_up_by_a_visit),
    ("modes::oneshot_alone_allows_nothing", oneshot_alone_allows_nothing),
];

/// Opens a file for reading and writing.
fn open(path: &std::ffi::CStr) -> i32 {
    // SAFETY: the path ends with a zero.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    assert!(fd >= 0);
    fd
}

/// When it is over.
fn allowed(status: &Status, cause: Cause) -> u64 {
    status.snapshot().allowed.of(cause)
}

fn allowed_writes() {
    const N: u64 = 10_000;
    let null = open(c"/dev/null");
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, status| {
        for n in 0..N {
            assert_eq!(lab::write_byte(null), 1);
            assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), n + 1);
            assert!(strict.is_armed());
            strict.turn().expect("turn");
        }
        // Each was trapped, so the gate is shut after each; and nothing but what the program did.
        assert_eq!(status.snapshot().slow_path_visits, 0);
        lab::getppid();
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), N + 1);
    });
    lab::no_breach(&status);
    assert_eq!(status.snapshot().armed, 1);
}

fn allowed_errors() {
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, _| {
        assert_eq!(lab::write_byte(-1), -i64::from(libc::EBADF));
        assert_eq!(syscall(100_000, []), -i64::from(libc::ENOSYS));
        // SAFETY: no descriptor is closed by this.
        let closed = unsafe { libc::close(-1) };
        assert_eq!((closed, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EBADF)));
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two descriptors, and bytes into one of them until it is full.
        unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK), 0);
            let bytes = [0u8; 4096];
            while libc::write(ends[1], bytes.as_ptr().cast(), bytes.len()) > 0 {}
        }
        assert_eq!(std::io::Error::last_os_error().kind(), std::io::ErrorKind::WouldBlock);
        assert_eq!(lab::write_byte(ends[1]), -i64::from(libc::EAGAIN));
        assert!(strict.is_armed());
    });
    lab::no_breach(&status);
}

/// All six arguments arrive: a mapping of a file's second page, at an address of the program's choice.
fn allowed_six_arguments() {
    use std::io::Write;
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(&[b'a'; 4096]).expect("write");
    file.write_all(&[b'b'; 4096]).expect("write");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let at = lab::pages(libc::PROT_READ);
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |_, _| {
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: replaces a page of the case's own.
        let mapped = unsafe { libc::mmap(at.cast(), 4096, libc::PROT_READ, flags, fd, 4096) };
        assert_eq!(mapped, at.cast());
        // SAFETY: mapped just now.
        assert_eq!(unsafe { at.read_volatile() }, b'b');
    });
    assert_eq!(allowed(&status, Cause::Syscall), 1);
    lab::no_breach(&status);
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    lab::getppid();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// A helper thread may end now: its end would disturb a thread that the kernel isolates.
static END: AtomicU32 = AtomicU32::new(0);

/// The last thing that a helper thread does.
fn wait_for_the_end() {
    lab::until("the end", || END.load(Ordering::Relaxed) == 1);
}

/// Reads one byte from an empty pipe under `flags` of SIGUSR1's handler, which a sibling sends; then,
/// where `feeds` says so, the byte comes. The answer of the read.
fn wait_for_a_byte(flags: i32, feeds: bool) -> i64 {
    static ANSWER: AtomicI32 = AtomicI32::new(0);
    lab::install(Signal::SIGUSR1, count as lab::OneArgument as usize, flags);
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let [from, to] = ends;
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    let sibling = std::thread::spawn(move || {
        let call = format!("/proc/{pid}/task/{tid}/syscall");
        lab::until("blocked in read", || {
            std::fs::read_to_string(&call).is_ok_and(|line| line.starts_with(&format!("0 {from:#x} ")))
        });
        // SAFETY: plain numbers; the handler above takes it.
        unsafe { libc::syscall(libc::SYS_tgkill, pid.as_raw(), tid.as_raw(), libc::SIGUSR1) };
        lab::until("handled", || HANDLED.load(Ordering::Relaxed) == 1);
        if feeds {
            lab::write_byte(to);
        }
        wait_for_the_end();
    });
    let mut prepared = lab::prepare(lab::isolation().mode(Mode::ALLOW_SYSCALLS));
    let status = prepared.status().clone();
    lab::unblock(&[Signal::SIGUSR1]);
    let mut strict = prepared.arm().expect("arm");
    let mut byte = 0u8;
    let answer = syscall(libc::SYS_read, [from as u64, (&raw mut byte) as u64, 1]);
    ANSWER.store(answer as i32, Ordering::Relaxed);
    assert!(strict.is_armed());
    strict.turn().expect("turn");
    // The handler ran within the call that was allowed, and so did its own. To the kernel a call that is
    // restarted is another one.
    let calls = if lab::is_kernel() && feeds { 2 } else { 1 };
    assert_eq!(lab::allowed_entries(&mut strict, &status, Cause::Syscall), calls);
    lab::getppid();
    assert_eq!(lab::allowed_entries(&mut strict, &status, Cause::Syscall), calls + 1);
    drop(strict);
    END.store(1, Ordering::Relaxed);
    sibling.join().expect("sibling");
    lab::no_breach(&status);
    assert_eq!(byte, if feeds { b'x' } else { 0 });
    i64::from(ANSWER.load(Ordering::Relaxed))
}

fn allowed_wait_is_interrupted() {
    assert_eq!(wait_for_a_byte(0, false), -i64::from(libc::EINTR));
}

fn allowed_wait_is_restarted() {
    assert_eq!(wait_for_a_byte(libc::SA_RESTART, true), 1);
}

/// A new process cannot start on a handler's stack: the call is made where it stands, and the gate stays
/// open until the next turn.
fn allowed_calls_that_need_their_frame() {
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, status| {
        let child = lab::vfork();
        // Where the kernel isolates, it quiesces behind these calls too.
        let open = u64::from(!lab::is_kernel());
        assert_eq!(status.state() == State::SlowPath, open == 1);
        lab::getppid();
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), 2 - open);
        strict.turn().expect("turn");
        assert_eq!(status.state(), State::Armed);
        lab::getppid();
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), 3 - open);
        let child = nix::unistd::Pid::from_raw(child);
        assert_eq!(lab::ended(child), WaitStatus::Exited(child, 7));
    });
    lab::no_breach(&status);
}

/// The 32-bit interface truncates its arguments, so its calls too are made where they stand.
fn allowed_int80() {
    lab::dispatch_only("calls of the 32-bit interface are never allowed");
    lab::needs_int80();
    let pid = std::process::id() as i32;
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, status| {
        assert_eq!(lab::int80(lab::GETPID_32), pid);
        assert_eq!(status.state(), State::SlowPath);
        strict.turn().expect("turn");
        assert_eq!(lab::int80(lab::GETPID_32), pid);
        strict.turn().expect("turn");
        assert!(strict.is_armed());
    });
    assert_eq!(allowed(&status, Cause::Syscall), 2);
    lab::no_breach(&status);
}

extern "C" fn leaves(_: libc::c_int) {
    lab::escape();
}

/// A handler jumps out of a call that waits, as siglongjmp would: the gate is open until the next turn
/// and shut after it.
fn allowed_wait_left_sideways() {
    let flags = libc::SA_NODEFER | libc::SA_ONSTACK;
    lab::install(Signal::SIGUSR1, leaves as lab::OneArgument as usize, flags);
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    let sibling = std::thread::spawn(move || {
        let call = format!("/proc/{pid}/task/{tid}/syscall");
        let pause = format!("{} ", libc::SYS_pause);
        lab::until("waits", || std::fs::read_to_string(&call).is_ok_and(|line| line.starts_with(&pause)));
        // SAFETY: plain numbers; the handler above takes it.
        unsafe { libc::syscall(libc::SYS_tgkill, pid.as_raw(), tid.as_raw(), libc::SIGUSR1) };
        wait_for_the_end();
    });
    let mut prepared = lab::prepare(lab::isolation().mode(Mode::ALLOW_SYSCALLS));
    let status = prepared.status().clone();
    lab::unblock(&[Signal::SIGUSR1]);
    let mut strict = prepared.arm().expect("arm");
    assert!(lab::attempt_to_pause());
    assert_eq!(lab::allowed_entries(&mut strict, &status, Cause::Syscall), 1);
    assert_eq!(status.state(), State::SlowPath);
    // As siglongjmp would: what the trapped call's handler blocked, the call had opened again.
    strict.turn().expect("turn");
    assert!(strict.is_armed());
    lab::getppid();
    assert_eq!(lab::allowed_entries(&mut strict, &status, Cause::Syscall), 2);
    drop(strict);
    END.store(1, Ordering::Relaxed);
    sibling.join().expect("sibling");
    lab::no_breach(&status);
}

/// A change of the signal mask is not undone when the handler that sees the call returns.
fn allowed_signal_mask() {
    let mask = 1u64 << (libc::SIGUSR1 - 1);
    let change = |how: libc::c_int| {
        let mut former = 0u64;
        let (new, old) = ((&raw const mask) as u64, (&raw mut former) as u64);
        assert_eq!(syscall(libc::SYS_rt_sigprocmask, [how as u64, new, old, 8]), 0);
        former & mask != 0
    };
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, _| {
        change(libc::SIG_UNBLOCK);
        strict.turn().expect("turn");
        assert!(!change(libc::SIG_BLOCK));
        strict.turn().expect("turn");
        assert!(change(libc::SIG_BLOCK));
        strict.turn().expect("turn");
        assert!(strict.is_armed());
    });
    assert_eq!(allowed(&status, Cause::Syscall), 3);
    lab::no_breach(&status);
}

/// A call that is trapped while SIGSYS is blocked would kill the process: the next turn opens it.
fn allowed_mask_of_everything() {
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, status| {
        for n in 1..=3 {
            SigSet::all().thread_block().expect("block");
            strict.turn().expect("turn");
            lab::getppid();
            assert!(strict.is_armed());
            assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), 2 * n);
        }
    });
    lab::no_breach(&status);
}

/// So would a call with a handler of the program's in the isolation's place: the next turn takes it back.
fn allowed_handlers() {
    lab::dispatch_only("allowed calls need no handler");
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, status| {
        lab::install(Signal::SIGSYS, handles as lab::OneArgument as usize, 0);
        assert_eq!(status.state(), State::SlowPath);
        strict.turn().expect("turn");
        let before = lab::allowed_entries(strict, status, Cause::Syscall);
        lab::getppid();
        assert!(strict.is_armed());
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), before + 1);
    });
    assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
    assert_eq!(lab::warnings().len(), 1);
    lab::no_breach(&status);
}

fn allowed_exit() {
    let status = Status::create("exit").expect("status");
    let isolation = lab::isolation().mode(Mode::ALLOW_SYSCALLS).status(status.clone());
    let child = lab::child(|| {
        lab::isolated(isolation, |_, _| {
            syscall(libc::SYS_exit_group, [7]);
        });
    });
    assert_eq!(lab::ended(child), WaitStatus::Exited(child, 7));
    lab::no_breach(&status);
}

fn allowed_calls_but_no_faults() {
    let page = lab::cold_page();
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_SYSCALLS), |strict, _| {
        lab::getppid();
        lab::store(page);
        strict.turn().expect("turn");
        assert!(strict.is_armed());
        lab::getppid();
    });
    assert_fault(&only_breach(&status), page);
    assert_eq!(allowed(&status, Cause::Syscall), 2);
}

fn allowed_page_faults() {
    const N: u64 = 100;
    let pages: Vec<*mut u8> = (0..N).map(|_| lab::cold_page()).collect();
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_PAGE_FAULTS), |strict, status| {
        for (n, page) in pages.iter().enumerate() {
            lab::store(*page);
            lab::store(*page);
            assert_eq!(lab::allowed_entries(strict, status, Cause::PageFault), n as u64 + 1);
            assert!(strict.is_armed());
            strict.turn().expect("turn");
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
    });
    assert_eq!(allowed(&status, Cause::PageFault), N);
    assert_syscall(&only_breach(&status), libc::SYS_getppid, At::Syscall);
}

extern "C" fn handles(_: libc::c_int) {
    lab::getppid();
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// The program's handler enters the kernel if it likes, and the thread is isolated again after it.
fn allowed_exceptions() {
    lab::install(Signal::SIGTRAP, handles as lab::OneArgument as usize, 0);
    let page = lab::cold_page();
    let status = lab::isolated(lab::isolation().mode(Mode::ALLOW_EXCEPTIONS), |strict, status| {
        for n in 1..=100 {
            lab::int3();
            assert_eq!(lab::allowed_entries(strict, status, Cause::Exception), n);
            assert!(strict.is_armed());
            strict.turn().expect("turn");
        }
        lab::no_breach(status);
        assert_enforced(strict, status);
        lab::store(page);
        strict.turn().expect("turn");
    });
    assert_eq!(HANDLED.load(Ordering::Relaxed), 100);
    let breaches = status.breaches(0);
    assert_eq!(breaches.len(), 2);
    assert_fault(&breaches[1].1, page);
}

fn oneshot_syscall() {
    let page = lab::cold_page();
    let mode = Mode::ALLOW_SYSCALLS | Mode::ONESHOT;
    let status = lab::isolated(lab::isolation().mode(mode), |strict, status| {
        let parent = lab::getppid();
        assert_eq!(lab::state(strict, status), State::Off);
        for _ in 0..10 {
            assert_eq!(lab::getppid(), parent);
            strict.turn().expect("turn");
        }
        assert!(!strict.is_armed());
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), 1);
        strict.rearm().expect("rearm");
        assert!(strict.is_armed());
        lab::no_breach(status);
        // What is forbidden stays a breach, and what breaks is armed again.
        lab::store(page);
        strict.turn().expect("turn");
        assert!(strict.is_armed());
        assert_fault(&only_breach(status), page);
    });
    assert_eq!(std::os::unix::process::parent_id() as i64, lab::getppid());
    assert_eq!(status.snapshot().breaches.total(), 1);
}

fn oneshot_page_fault() {
    let pages = [lab::cold_page(), lab::cold_page(), lab::cold_page()];
    let mode = Mode::ALLOW_PAGE_FAULTS | Mode::ONESHOT;
    let status = lab::isolated(lab::isolation().mode(mode), |strict, status| {
        lab::store(pages[0]);
        assert_eq!(
            (lab::state(strict, status), lab::allowed_entries(strict, status, Cause::PageFault)),
            (State::Off, 1)
        );
        lab::store(pages[1]);
        lab::getppid();
        strict.turn().expect("turn");
        assert_eq!(
            (lab::state(strict, status), lab::allowed_entries(strict, status, Cause::PageFault)),
            (State::Off, 1)
        );
        strict.rearm().expect("rearm");
        lab::getppid();
        strict.turn().expect("turn");
        assert_syscall(&only_breach(status), libc::SYS_getppid, At::Syscall);
        lab::store(pages[2]);
        assert_eq!(
            (lab::state(strict, status), lab::allowed_entries(strict, status, Cause::PageFault)),
            (State::Off, 2)
        );
    });
    assert_eq!(lab::reports().len(), 1);
    assert_eq!(status.breach_count(), 1);
}

fn oneshot_exception() {
    lab::install(Signal::SIGTRAP, handles as lab::OneArgument as usize, 0);
    let mode = Mode::ALLOW_EXCEPTIONS | Mode::ONESHOT;
    let status = lab::isolated(lab::isolation().mode(mode), |strict, status| {
        lab::int3();
        assert_eq!(
            (lab::state(strict, status), lab::allowed_entries(strict, status, Cause::Exception)),
            (State::Off, 1)
        );
        strict.turn().expect("turn");
        strict.rearm().expect("rearm");
        assert_enforced(strict, status);
    });
    let breach = only_breach(&status);
    assert!(matches!(breach.detail, Detail::Syscall { .. }));
    assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
}

fn oneshot_is_not_used_up_by_a_visit() {
    let page = lab::cold_page();
    let mode = Mode::ALLOW_SYSCALLS | Mode::ALLOW_PAGE_FAULTS | Mode::ONESHOT;
    let status = lab::isolated(lab::isolation().mode(mode), |strict, status| {
        strict
            .slow_path(|_| {
                lab::getppid();
                lab::store(page);
            })
            .expect("visit");
        assert!(strict.is_armed());
        assert_eq!(lab::allowed_entries(strict, status, Cause::Syscall), 0);
        lab::getppid();
        assert!(!strict.is_armed());
    });
    lab::no_breach(&status);
}

fn oneshot_alone_allows_nothing() {
    lab::isolated(lab::isolation().mode(Mode::ONESHOT), |strict, status| {
        lab::getppid();
        strict.turn().expect("turn");
        assert_syscall(&only_breach(status), libc::SYS_getppid, At::Syscall);
        assert_enforced(strict, status);
    });
}
