//! What stands in the way: said all at once, with the thread left as it was; what is weaker: said plainly.

use super::lab::{self, At, assert_enforced, assert_syscall, only_breach};
use crate::common::Test;
use isoplane_isolation::prepare::cpu::CpuError;
use isoplane_isolation::{Backend, Cpu, Isolation, Prepared, Refused, Unmet, Weakness};
use nix::errno::Errno;
use nix::sys::signal::SigSet;
use std::cell::RefCell;
use std::io::Write as _;
use std::sync::Mutex;

pub(crate) const CASES: &[Test] = &[
    ("preparing::no_such_cpu", no_such_cpu),
    ("preparing::offline_cpu", offline_cpu),
    ("preparing::cpu_that_is_not_ours", cpu_that_is_not_ours),
    ("preparing::everything_at_once", everything_at_once),
    ("preparing::twice", twice),
    ("preparing::twice_while_armed", twice_while_armed),
    ("preparing::perf_refused", perf_refused),
    ("preparing::perf_refused_and_insist", perf_refused_and_insist),
    ("preparing::dispatch_refused", dispatch_refused),
    ("preparing::signals_blocked_before", signals_blocked_before),
    ("preparing::signals_blocked_later", signals_blocked_later),
    ("preparing::everything_is_given_back", everything_is_given_back),
    ("preparing::kept_until_the_thread_ends", kept_until_the_thread_ends),
    ("preparing::fault_that_waits", fault_that_waits),
];

/// It was refused, and the thread is as it was: as free, and fit to be isolated where that is possible.
fn refused(isolation: Isolation) -> Refused {
    let before = (lab::allowed(), lab::blocked_signals(), lab::signal_stack());
    let refused = isolation.prepare().unwrap_err();
    assert_eq!((lab::allowed(), lab::blocked_signals(), lab::signal_stack()), before);
    assert!(refused.to_string().contains("cannot isolate"), "{refused}");
    refused
}

fn no_such_cpu() {
    for number in [1000, 1024, 8192, 1 << 20, usize::MAX] {
        let refused = refused(Isolation::on(Cpu(number)));
        let [Unmet::Cpu(CpuError::NoSuchCpu { cpu, .. })] = &refused.unmet[..] else { panic!("{refused}") };
        assert_eq!(*cpu, Cpu(number));
        assert!(refused.to_string().contains(&format!("no CPU {number}")), "{refused}");
    }
    lab::isolated(lab::isolation(), assert_enforced);
}

/// No CPU is taken away from whatever else runs here: in a mount namespace of its own this process finds
/// another list of those that are online.
fn offline_cpu() {
    use nix::mount::{MsFlags, mount};
    let [one, other, ..] = lab::allowed()[..] else { lab::skip("needs two CPUs") };
    if let Err(errno) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS) {
        lab::skip(&format!("a mount namespace needs root: {errno}"));
    }
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).expect("private mounts");
    let mut list = tempfile::NamedTempFile::new().expect("a file");
    writeln!(list, "{one}").expect("the list");
    let online = "/sys/devices/system/cpu/online";
    mount(Some(list.path()), online, nothing, MsFlags::MS_BIND, nothing).expect("bind the list");
    drop(list);
    let refused = refused(Isolation::on(Cpu(other)));
    assert!(matches!(refused.unmet[..], [Unmet::Cpu(CpuError::Offline { .. })]), "{refused}");
    assert!(
        refused.to_string().contains(&format!("echo 1 > /sys/devices/system/cpu/cpu{other}/online")),
        "{refused}"
    );
}

fn cpu_that_is_not_ours() {
    let [one, other, ..] = lab::allowed()[..] else { lab::skip("needs two CPUs") };
    let facts = isoplane_isolation::prepare::cpu::Facts::of(Cpu(other));
    if facts.isolated.is_some() || facts.nohz_full {
        lab::not_here("the other CPU is isolated, so it may be asked for from outside");
    }
    let mut only = nix::sched::CpuSet::new();
    only.set(one).expect("CPU");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &only).expect("affinity");
    let refused = refused(Isolation::on(Cpu(other)));
    assert!(matches!(refused.unmet[..], [Unmet::Cpu(CpuError::NotOurs { .. })]), "{refused}");
}

fn everything_at_once() {
    if Backend::TaskIsolation.probe().is_ok() {
        lab::not_here("this kernel has task isolation, so the backend is not in the way");
    }
    let refused = refused(Isolation::on(Cpu(5000)).backend(Backend::TaskIsolation));
    let [Unmet::Cpu(cpu), Unmet::Backend { reason, .. }] = &refused.unmet[..] else { panic!("{refused}") };
    let text = refused.to_string();
    assert!(text.contains(&cpu.to_string()) && text.contains(reason), "{text}");
    assert!(text.contains("(1)") && text.contains("(2)"), "{text}");
}

fn twice() {
    let mut prepared = lab::prepare(lab::isolation());
    let again = lab::isolation().prepare().unwrap_err();
    assert!(matches!(again.unmet[..], [Unmet::AlreadyPrepared]), "{again}");
    let status = prepared.status().clone();
    assert_enforced(&mut prepared.arm().expect("arm"), &status);
    drop(prepared);
    lab::isolated(lab::isolation(), |strict, _| assert!(strict.is_armed()));
}

/// Asking while isolated is answered without a system call.
fn twice_while_armed() {
    let another = lab::isolation();
    lab::isolated(lab::isolation(), |strict, status| {
        let again = another.prepare().unwrap_err();
        assert!(strict.is_armed());
        assert!(matches!(again.unmet[..], [Unmet::AlreadyPrepared]), "{again}");
        assert_eq!(status.breach_count(), 0);
        assert_enforced(strict, status);
    });
}

/// Without the right to perf events page faults are not caught, which is said, with what to do; system
/// calls are.
fn perf_refused() {
    lab::dispatch_only("it is about perf events, or syscall user dispatch");
    lab::filter(libc::SYS_perf_event_open, libc::SECCOMP_RET_ERRNO | libc::EACCES as u32);
    let page = lab::cold_page();
    let mut prepared = lab::isolation().prepare().expect("prepare");
    lab::cool();
    assert_eq!((prepared.backend(), prepared.sees_page_faults()), (Backend::Dispatch, false));
    let lost = Weakness::PageFaultsUnseen { errno: Errno::EACCES };
    assert!(prepared.weaknesses().contains(&lost), "{:?}", prepared.weaknesses());
    let said = lost.to_string();
    assert!(said.contains("page faults are counted, not caught") && said.contains("CAP_PERFMON"), "{said}");
    assert_eq!(lab::events().iter().filter(|event| event.message().contains(&said)).count(), 1);
    let status = prepared.status().clone();
    let mut strict = prepared.arm().expect("arm");
    lab::store(page);
    strict.turn().expect("turn");
    assert!(strict.is_armed());
    lab::no_breach(&status);
    lab::getppid();
    strict.turn().expect("turn");
    assert_syscall(&only_breach(&status), libc::SYS_getppid, At::Syscall);
}

fn perf_refused_and_insist() {
    lab::dispatch_only("it is about perf events, or syscall user dispatch");
    lab::filter(libc::SYS_perf_event_open, libc::SECCOMP_RET_ERRNO | libc::EACCES as u32);
    let refused = refused(lab::isolation().insist(true));
    let lost = |unmet: &Unmet| matches!(unmet, Unmet::Weak(Weakness::PageFaultsUnseen { .. }));
    assert_eq!(refused.unmet.iter().filter(|unmet| lost(unmet)).count(), 1, "{refused}");
}

/// A container that forbids prctl: `dispatch` is refused, `auto` goes on with what is left, and says so.
fn dispatch_refused() {
    lab::dispatch_only("it is about perf events, or syscall user dispatch");
    lab::filter(libc::SYS_prctl, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32);
    let refused = refused(lab::isolation());
    let [Unmet::Backend { backend: Backend::Dispatch, reason }] = &refused.unmet[..] else {
        panic!("{refused}")
    };
    assert!(reason.contains("user dispatch"), "{reason}");
    let prepared = Isolation::on(lab::cpu()).prepare().expect("prepare");
    assert_eq!(prepared.backend(), Backend::Advisory);
    assert!(prepared.weaknesses().contains(&Weakness::NothingEnforced));
}

fn signals_blocked_before() {
    SigSet::all().thread_block().expect("block");
    lab::isolated(lab::isolation(), assert_enforced);
    assert!(lab::blocked_signals().contains(nix::sys::signal::Signal::SIGSYS));
}

/// A trapped call with SIGSYS blocked would kill the process: arming and the end of a visit open it.
fn signals_blocked_later() {
    let page = lab::cold_page();
    let mut prepared = lab::prepare(lab::isolation());
    let status = prepared.status().clone();
    SigSet::all().thread_block().expect("block");
    let mut strict = prepared.arm().expect("arm");
    assert_enforced(&mut strict, &status);
    strict.slow_path(|_| SigSet::all().thread_block().expect("block")).expect("visit");
    assert_enforced(&mut strict, &status);
    lab::store(page);
    strict.turn().expect("turn");
    let (_, breach) = status.breaches(2)[0];
    lab::assert_fault(&breach, page);
}

fn everything_is_given_back() {
    let before = (lab::allowed(), lab::blocked_signals(), lab::signal_stack());
    let status = lab::isolated(lab::isolation(), |_, _| ());
    assert_eq!((lab::allowed(), lab::blocked_signals(), lab::signal_stack()), before);
    // Nothing is trapped or watched any more.
    lab::getppid();
    lab::store(lab::cold_page());
    lab::no_breach(&status);
}

/// The signal stack of a thread that has ended its own code.
static AT_THE_END: Mutex<Option<(usize, usize)>> = Mutex::new(None);

/// Dropped after what the thread has made later.
struct Last;

impl Drop for Last {
    fn drop(&mut self) {
        *AT_THE_END.lock().expect("the end") = Some(lab::signal_stack());
    }
}

thread_local! {
    static LAST: Last = const { Last };
    static KEPT: RefCell<Option<Prepared>> = const { RefCell::new(None) };
}

/// The runtime unmaps the thread's own signal stack before thread-locals are dropped: the kernel must not be
/// told of it again.
fn kept_until_the_thread_ends() {
    let thread = std::thread::spawn(|| {
        LAST.with(|_| ());
        let former = lab::signal_stack();
        let mut prepared = lab::prepare(lab::isolation());
        drop(prepared.arm().expect("arm"));
        KEPT.set(Some(prepared));
        former
    });
    let former = thread.join().expect("join");
    assert_ne!(former, (0, 0), "the runtime gives its threads a signal stack");
    assert_eq!(*AT_THE_END.lock().expect("the end"), Some((0, 0)));
}

/// A page fault while SIGTRAP is blocked is told later: at the latest when isolation is given back, not
/// when nobody is there any more who knows the signal.
fn fault_that_waits() {
    lab::dispatch_only("it is about perf events, or syscall user dispatch");
    let page = lab::cold_page();
    let mut prepared = lab::prepare(lab::isolation());
    let strict = prepared.arm().expect("arm");
    isoplane_isolation::release();
    SigSet::all().thread_block().expect("block");
    lab::store(page);
    drop(strict);
    drop(prepared);
    SigSet::all().thread_unblock().expect("unblock");
    assert!(lab::reports().is_empty());
}
