//! Forbidden system calls: each is reported once, with its number and the address it was made at, and
//! runs once, after isolation is off.

use super::lab::{self, At, I386, X86_64, assert_enforced, assert_syscall, only_breach, syscall};
use crate::common::Test;
use isoplane_isolation::{Breach, Cause, Detail, SlowPathError, State, Status, StrictError, Unmet};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

pub(crate) const CASES: &[Test] = &[
    ("syscalls::nothing_happens", nothing_happens),
    ("syscalls::getppid", getppid),
    ("syscalls::write_runs_once", write_runs_once),
    ("syscalls::errors_are_the_kernels", errors_are_the_kernels),
    ("syscalls::blocking_write_is_interrupted", blocking_write_is_interrupted),
    ("syscalls::each_is_reported_once", each_is_reported_once),
    ("syscalls::only_the_first_of_a_turn", only_the_first_of_a_turn),
    ("syscalls::numbers_that_are_none", numbers_that_are_none),
    ("syscalls::int80", int80),
    ("syscalls::fork", fork),
    ("syscalls::clone3", clone3),
    ("syscalls::vfork", vfork),
    ("syscalls::execve_that_fails", execve_that_fails),
    ("syscalls::execve", execve),
    ("syscalls::thread_spawn", thread_spawn),
    ("syscalls::exit", exit),
    ("syscalls::exit_group", exit_group),
    ("syscalls::allocation_beyond_malloc", allocation_beyond_malloc),
    ("syscalls::in_visits_processes_and_threads", in_visits_processes_and_threads),
    ("syscalls::vsyscall", vsyscall),
    ("syscalls::heap_growth", heap_growth),
    ("syscalls::reading_clocks", reading_clocks),
];

fn nothing_happens() {
    let status = lab::isolated(lab::isolation(), |strict, status| {
        for _ in 0..100_000 {
            strict.turn().expect("turn");
        }
        assert!(strict.is_armed());
        assert_eq!(status.state(), State::Armed);
    });
    lab::no_breach(&status);
    assert_eq!(status.state(), State::Off);
    let snapshot = status.snapshot();
    assert_eq!((snapshot.armed, snapshot.slow_path_visits, snapshot.allowed.total()), (1, 0, 0));
    assert_eq!(status.thread().0, std::process::id());
    assert_eq!(status.cpu(), Some(lab::cpu().0 as u32));
}

fn getppid() {
    let parent = i64::from(std::os::unix::process::parent_id());
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let answer = lab::getppid();
        assert_eq!(status.state(), State::Broken);
        assert!(lab::reports().is_empty());
        strict.turn().expect("turn");
        assert!(strict.is_armed());
        assert_eq!(answer, parent);
        assert_syscall(&only_breach(status), libc::SYS_getppid, At::Syscall);
        let report = &lab::reports()[0];
        assert_eq!(report.fields["syscall"], "110");
        assert_eq!(report.fields["name"], "getppid");
        assert_eq!(report.fields["call_address"], format!("{:#x}", At::Syscall.address()));
        assert_eq!(report.fields["cpu"], lab::cpu().0.to_string());
        assert_enforced(strict, status);
    });
    let snapshot = status.snapshot();
    assert_eq!(snapshot.breaches.of(Cause::Syscall), 2);
    // The reports are visits.
    assert_eq!((snapshot.armed, snapshot.slow_path_visits), (3, 2));
}

/// A pipe: its ends for reading and writing.
fn pipe() -> [i32; 2] {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) }, 0);
    ends
}

/// What can be read without waiting.
fn drain(fd: i32) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    // SAFETY: reads at most what fits.
    let n = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) };
    bytes.truncate(usize::try_from(n).unwrap_or(0));
    bytes
}

fn write_runs_once() {
    let [from, to] = pipe();
    let status = lab::isolated(lab::isolation(), |strict, status| {
        assert_eq!(lab::write_byte(to), 1);
        assert_eq!(drain(from), b"x");
        strict.turn().expect("turn");
        assert_syscall(&only_breach(status), libc::SYS_write, At::Syscall);
        for _ in 0..10 {
            strict.turn().expect("turn");
        }
    });
    assert!(drain(from).is_empty());
    assert_syscall(&only_breach(&status), libc::SYS_write, At::Syscall);
}

fn errors_are_the_kernels() {
    lab::isolated(lab::isolation(), |strict, status| {
        assert_eq!(lab::write_byte(-1), -i64::from(libc::EBADF));
        strict.turn().expect("turn");
        assert_syscall(&only_breach(status), libc::SYS_write, At::Syscall);
        // Through the C library, errno is right as well.
        // SAFETY: no descriptor is closed by this.
        let closed = unsafe { libc::close(-1) };
        let error = std::io::Error::last_os_error().raw_os_error();
        assert_eq!((closed, error), (-1, Some(libc::EBADF)));
        strict.turn().expect("turn");
        let (_, breach) = status.breaches(1)[0];
        assert!(matches!(breach.detail, Detail::Syscall { number: 3, arch: X86_64, .. }), "{breach}");
    });
    assert_eq!(lab::reports().len(), 2);
}

static HANDLED: AtomicU32 = AtomicU32::new(0);
static END: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

fn blocking_write_is_interrupted() {
    let [from, to] = pipe();
    // SAFETY: makes the writing end wait; installs a handler without SA_RESTART that only counts.
    unsafe {
        while libc::write(to, [0u8; 4096].as_ptr().cast(), 4096) > 0 {}
        assert_eq!(libc::fcntl(to, libc::F_SETFL, 0), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()), 0);
    }
    let full = status_of_pipe(from);
    let (pid, tid) = (nix::unistd::getpid(), nix::unistd::gettid());
    let other = std::thread::spawn(move || {
        let stat = format!("/proc/{pid}/task/{tid}/syscall");
        lab::until("blocked in write", || {
            std::fs::read_to_string(&stat).is_ok_and(|line| line.starts_with(&format!("1 {to:#x} ")))
        });
        // SAFETY: plain numbers; the handler above takes it.
        unsafe { libc::syscall(libc::SYS_tgkill, pid.as_raw(), tid.as_raw(), libc::SIGUSR1) };
        // Its end would disturb a thread that the kernel isolates.
        lab::until("the end", || END.load(Ordering::Relaxed) == 1);
    });
    let status = lab::isolated(lab::isolation(), |strict, _| {
        strict.slow_path(|_| lab::unblock(&[nix::sys::signal::Signal::SIGUSR1])).expect("visit");
        assert_eq!(lab::write_byte(to), -i64::from(libc::EINTR));
        strict.turn().expect("turn");
    });
    END.store(1, Ordering::Relaxed);
    other.join().expect("join");
    assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
    assert_eq!(status_of_pipe(from), full);
    assert_syscall(&only_breach(&status), libc::SYS_write, At::Syscall);
}

/// Bytes in a pipe.
fn status_of_pipe(fd: i32) -> i32 {
    let mut bytes = 0;
    // SAFETY: the kernel writes one int.
    assert_eq!(unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut bytes) }, 0);
    bytes
}

fn each_is_reported_once() {
    const N: usize = 100;
    let status = lab::isolated(lab::isolation(), |strict, _| {
        for _ in 0..N {
            lab::getppid();
            strict.turn().expect("turn");
            strict.turn().expect("turn");
        }
    });
    assert_eq!(status.breach_count(), N as u64);
    assert_eq!(status.snapshot().breaches.of(Cause::Syscall), N as u64);
    assert_eq!(status.snapshot().armed, N as u64 + 1);
    let numbers: Vec<String> = lab::reports().iter().map(|report| report.fields["number"].clone()).collect();
    assert_eq!(numbers, (0..N).map(|n| n.to_string()).collect::<Vec<_>>());
}

/// Isolation is off from the first one on, until the program looks.
fn only_the_first_of_a_turn() {
    let status = lab::isolated(lab::isolation(), |strict, _| {
        for _ in 0..100 {
            lab::getppid();
        }
        strict.turn().expect("turn");
    });
    assert_syscall(&only_breach(&status), libc::SYS_getppid, At::Syscall);
}

fn numbers_that_are_none() {
    // The last two: a call of the x32 interface, which shares the architecture's name, and -1.
    let numbers = [100_000u64, 0x4000_0000 + 39, 0xffff_ffff];
    let expected: Vec<i64> = numbers.iter().map(|n| syscall(*n as libc::c_long, [])).collect();
    let status = lab::isolated(lab::isolation(), |strict, _| {
        for (number, expected) in numbers.into_iter().zip(&expected) {
            let answer = syscall(number as libc::c_long, []);
            strict.turn().expect("turn");
            assert_eq!(answer, *expected, "{number:#x}");
        }
    });
    let breaches = status.breaches(0);
    assert_eq!(breaches.len(), numbers.len());
    for ((_, breach), number) in breaches.iter().zip(numbers) {
        assert_syscall(breach, number as libc::c_long, At::Syscall);
    }
    assert_eq!(lab::reports().len(), numbers.len());
    assert_eq!(lab::reports()[0].fields["name"], "unknown");
}

fn int80() {
    lab::needs_int80();
    let pid = std::process::id();
    lab::isolated(lab::isolation(), |strict, status| {
        let answer = lab::int80(lab::GETPID_32);
        strict.turn().expect("turn");
        assert_eq!(answer, pid as i32);
        let breach: Breach = only_breach(status);
        let call_address = At::Int80.address();
        let detail = Detail::Syscall { number: u64::from(lab::GETPID_32), call_address, arch: I386 };
        assert_eq!((breach.cause, breach.detail), (Cause::Syscall, detail));
        assert_eq!(lab::reports()[0].fields["name"], "of the 32-bit interface");
        assert_enforced(strict, status);
    });
}

/// A fork leaves pages to be copied, so the parent's next writes are breaches too: page faults. Goes on
/// until a system call is the one that breaks it again.
fn until_enforced_again(strict: &mut isoplane_isolation::Strict<'_>, status: &Status) {
    for _ in 0..100 {
        strict.turn().expect("turn");
        lab::getppid();
        strict.turn().expect("turn");
        if status.snapshot().breaches.of(Cause::Syscall) == 2 {
            return;
        }
    }
    panic!("{:x?}", status.breaches(0));
}

/// A forked child has the handle and is not the thread: it is told so and changes nothing.
fn child_knows(strict: &mut isoplane_isolation::Strict<'_>, status: &Status) -> bool {
    let count = status.breach_count();
    let wrong = matches!(strict.turn(), Err(StrictError::WrongThread))
        && strict.slow_path(|_| ()) == Err(SlowPathError::WrongThread)
        && !strict.is_armed()
        && matches!(strict.rearm().map_err(|refused| refused.unmet).unwrap_err()[..], [Unmet::WrongThread]);
    let free = isoplane_isolation::visit(|_| 7) == Ok(7);
    isoplane_isolation::release();
    lab::getppid();
    wrong && free && status.breach_count() == count && status.state() == State::Broken
}

fn forks(number: libc::c_long, call: impl Fn() -> i64) {
    let status = lab::isolated(lab::isolation(), |strict, status| {
        let child = call();
        if child == 0 {
            let ended =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| child_knows(strict, status)));
            // SAFETY: ends the child.
            unsafe { libc::_exit(if ended.unwrap_or(false) { 0 } else { 1 }) };
        }
        assert!(child > 0, "{child}");
        lab::ended_well(Pid::from_raw(child as i32));
        until_enforced_again(strict, status);
    });
    let breaches = status.breaches(0);
    assert_syscall(&breaches[0].1, number, At::Syscall);
    let others = breaches.iter().skip(1).filter(|(_, breach)| breach.cause != Cause::PageFault);
    let others: Vec<_> = others.collect();
    assert_eq!(others.len(), 1, "{breaches:x?}");
    assert_syscall(&others[0].1, libc::SYS_getppid, At::Syscall);
    assert_eq!(lab::reports().len() as u64, status.breach_count());
}

fn fork() {
    forks(libc::SYS_fork, || syscall(libc::SYS_fork, []));
}

fn clone3() {
    // `struct clone_args`, first version: flags, pidfd, child_tid, parent_tid, exit_signal, stack, ...
    let args = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0u64];
    forks(libc::SYS_clone3, || syscall(libc::SYS_clone3, [args.as_ptr() as u64, size_of_val(&args) as u64]));
}

fn vfork() {
    lab::isolated(lab::isolation(), |strict, status| {
        let child = lab::vfork();
        assert!(child > 0);
        let child = Pid::from_raw(child);
        assert_eq!(lab::ended(child), WaitStatus::Exited(child, 7));
        strict.turn().expect("turn");
        assert_syscall(&only_breach(status), libc::SYS_vfork, At::Vfork);
        assert_enforced(strict, status);
    });
}

/// Tries to become another program.
fn exec(path: &std::ffi::CStr, arguments: &[*const libc::c_char]) -> i64 {
    let none = [std::ptr::null::<libc::c_char>()];
    syscall(libc::SYS_execve, [path.as_ptr() as u64, arguments.as_ptr() as u64, none.as_ptr() as u64])
}

fn execve_that_fails() {
    lab::isolated(lab::isolation(), |strict, status| {
        let answer = exec(c"/nonexistent", &[std::ptr::null()]);
        strict.turn().expect("turn");
        assert_eq!(answer, -i64::from(libc::ENOENT));
        assert_syscall(&only_breach(status), libc::SYS_execve, At::Syscall);
        assert_enforced(strict, status);
    });
}

/// The new program is not isolated; the breach is in the status block for whoever shares it.
fn execve() {
    let status = Status::create("exec").expect("status");
    let isolation = lab::isolation().status(status.clone());
    let child = lab::child(|| {
        lab::isolated(isolation, |_, _| {
            let arguments = [c"sh", c"-c", c"exit 9"].map(std::ffi::CStr::as_ptr);
            exec(c"/bin/sh", &[arguments[0], arguments[1], arguments[2], std::ptr::null()]);
        });
    });
    assert_eq!(lab::ended(child), WaitStatus::Exited(child, 9));
    assert_syscall(&lab::only_recorded(&status), libc::SYS_execve, At::Syscall);
}

/// Gets a handle into another thread, as no safe code can.
struct Elsewhere<T>(T);

// SAFETY: the case uses it to see that the other thread is turned away; the owner waits meanwhile.
unsafe impl<T> Send for Elsewhere<T> {}

impl<T> Elsewhere<T> {
    fn get(self) -> T {
        self.0
    }
}

fn thread_spawn() {
    static CHILDS: AtomicI32 = AtomicI32::new(0);
    lab::isolated(lab::isolation(), |strict, status| {
        std::thread::scope(|scope| {
            let handle = Elsewhere(&mut *strict);
            let thread = scope.spawn(move || {
                let strict = handle.get();
                CHILDS.store(lab::getppid() as i32, Ordering::Relaxed);
                assert!(matches!(strict.turn(), Err(StrictError::WrongThread)));
                assert_eq!(strict.slow_path(|_| ()), Err(SlowPathError::WrongThread));
                assert!(!strict.is_armed());
                let refused = strict.rearm().unwrap_err();
                assert!(matches!(refused.unmet[..], [Unmet::WrongThread]), "{refused}");
                assert_eq!(isoplane_isolation::visit(|_| 7), Ok(7));
                isoplane_isolation::release();
            });
            thread.join().expect("join");
        });
        assert_eq!(status.state(), State::Broken);
        strict.turn().expect("turn");
        let breach = only_breach(status);
        assert_eq!(breach.cause, Cause::Syscall);
        assert_eq!(status.snapshot().slow_path_visits, 1);
        assert_eq!(CHILDS.load(Ordering::Relaxed) as u32, std::os::unix::process::parent_id());
        strict.turn().expect("turn");
        assert_enforced(strict, status);
    });
}

fn ends_itself(number: libc::c_long) {
    let status = Status::create("exit").expect("status");
    let isolation = lab::isolation().status(status.clone());
    let child = lab::child(|| {
        lab::isolated(isolation, |_, _| {
            syscall(number, [7]);
        });
    });
    assert_eq!(lab::ended(child), WaitStatus::Exited(child, 7));
    lab::no_breach(&status);
    // Where the kernel isolates, no code of ours runs any more that could say so.
    let state = if lab::is_kernel() { State::Armed } else { State::Off };
    assert_eq!((status.state(), status.snapshot().armed), (state, 1));
}

fn exit() {
    ends_itself(libc::SYS_exit);
}

fn exit_group() {
    ends_itself(libc::SYS_exit_group);
}

fn allocation_beyond_malloc() {
    lab::isolated(lab::isolation(), |strict, status| {
        let mut block = Vec::<u8>::with_capacity(64 << 20);
        block.push(7);
        strict.turn().expect("turn");
        assert_eq!(std::hint::black_box(&block), &[7]);
        let breach = only_breach(status);
        assert_eq!(breach.cause, Cause::Syscall);
        let name = lab::reports()[0].fields["name"].clone();
        assert!(["mmap", "brk"].contains(&name.as_str()), "{name}");
        std::mem::forget(block);
        assert_enforced(strict, status);
    });
}

/// A visit may start what it likes.
fn in_visits_processes_and_threads() {
    let status = lab::isolated(lab::isolation(), |strict, _| {
        for _ in 0..10 {
            let ended = strict.slow_path(|_| std::process::Command::new("true").status());
            assert!(ended.expect("visit").expect("true").success());
            let answer = strict.slow_path(|_| std::thread::spawn(lab::getppid).join().expect("join"));
            assert_eq!(answer, strict.slow_path(|_| lab::getppid()));
            strict.turn().expect("turn");
            assert!(strict.is_armed());
        }
    });
    lab::no_breach(&status);
    assert_eq!(status.snapshot().slow_path_visits, 30);
}

/// The page of old that the kernel emulates: no instruction of ours makes the call, but executing it
/// faults, and that is seen.
fn vsyscall() {
    const TIME: u64 = 0xffff_ffff_ff60_0400;
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    if !maps.contains("[vsyscall]") {
        lab::not_here("this kernel has no vsyscall page (vsyscall=none)");
    }
    // SAFETY: time(2) of the vsyscall page, by the C calling convention.
    let time: extern "C" fn(*mut i64) -> i64 = unsafe { std::mem::transmute(TIME as usize) };
    let before = time(std::ptr::null_mut());
    let status = lab::isolated(lab::isolation(), |strict, _| {
        let now = time(std::ptr::null_mut());
        strict.turn().expect("turn");
        assert!(now >= before);
    });
    let breach = only_breach(&status);
    assert_eq!(breach.cause, Cause::PageFault, "{breach}");
    // The kernel has emulated the call by then, and returned to the caller.
    assert!(matches!(breach.detail, Detail::Fault { address: TIME, .. }), "{breach}");
}

/// The vDSO's clocks are no system calls, and their pages are there.
fn reading_clocks() {
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = std::fs::read_to_string(source).unwrap_or_default();
    if source.trim() != "tsc" {
        lab::not_here(&format!("clocks are read by a system call here: the clocksource is {source:?}"));
    }
    let status = lab::isolated(lab::isolation(), |strict, _| {
        for _ in 0..1000 {
            std::hint::black_box((std::time::Instant::now(), std::time::SystemTime::now()));
            strict.turn().expect("turn");
        }
    });
    lab::no_breach(&status);
}

fn heap_growth() {
    let mut blocks: Vec<Vec<u8>> = Vec::with_capacity(100_000);
    lab::isolated(lab::isolation(), |strict, status| {
        while status.breach_count() == 0 {
            assert!(blocks.len() < blocks.capacity());
            blocks.push(Vec::with_capacity(1024));
        }
        strict.turn().expect("turn");
        let breach = only_breach(status);
        assert_eq!(lab::reports()[0].fields["name"], "brk", "{breach}");
        assert_enforced(strict, status);
    });
    drop(blocks);
}
