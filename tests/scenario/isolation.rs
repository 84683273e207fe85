//! Isolated workers: what breaks their isolation is caught, reported once and survived as the program
//! wants. Log lines and panics arrive; privileges are gone.
//!
//! What the program's subscriber heard is on standard error: `tests/isolation.rs` looks there.
#![allow(unsafe_code, reason = "misdeeds: system calls, mappings; see each block")]

use crate::forwarding::pass;
use crate::peer::{Peer, pool, wait_for};
use isoplane::isolation::diagnostics::Diagnostics;
use isoplane::isolation::{Backend, Budget, Cause, Detail, OnBreach, Privileges, Snapshot, State};
use isoplane::memory::{Batch, Pool};
use isoplane::{
    App, Dataplane, Idle, LaunchError, Placement, PortId, Restart, Running, StopReport, Turn, Worker,
    WorkerIsolation, WorkerState,
};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Duration;

/// Forwards; on the frame with this number it does something else first.
const TRIGGER: u64 = 100;

type Deed = fn(&Turn<'_>, Page);

struct Mischief {
    deed: Deed,
    page: Page,
}

/// A page that is mapped and has never been touched.
#[derive(Clone, Copy)]
struct Page(*mut u8);

impl Page {
    fn untouched() -> Self {
        // SAFETY: a fresh mapping of one page that nobody else knows; unlocked and dropped again, since a
        // worker's mappings are locked, and so touched, when they are made.
        unsafe {
            let (rights, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let page = libc::mmap(std::ptr::null_mut(), 4096, rights, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED);
            libc::munlock(page, 4096);
            assert_eq!(libc::madvise(page, 4096, libc::MADV_DONTNEED), 0);
            Self(page.cast())
        }
    }

    fn touch(self) {
        // SAFETY: the page is mapped for good.
        unsafe { self.0.write_volatile(1) };
    }
}

impl App for Mischief {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for frame in batch.drain() {
            let bytes = turn.pool().bytes(&frame);
            let number = bytes.get(14..22).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
            if number == TRIGGER {
                (self.deed)(turn, self.page);
            }
            turn.send(PortId(from.0 ^ 1), frame);
        }
    }
}

struct Plane {
    pool: Arc<Pool>,
    running: Running,
    left: Peer,
    right: Peer,
}

impl Plane {
    fn new(isolation: WorkerIsolation, deed: Deed) -> Self {
        Self::with(isolation, deed, |worker| worker)
    }

    fn with(isolation: WorkerIsolation, deed: Deed, also: impl FnOnce(Worker) -> Worker) -> Self {
        let pool = pool("scenario", 4096);
        let (a, left) = Peer::new(&pool, "left");
        let (b, right) = Peer::new(&pool, "right");
        let mut plane = Dataplane::builder("scenario");
        let (a, b) = (plane.port(a), plane.port(b));
        plane.isolation(isolation);
        let worker = Worker::new("w0").idle(Idle::Spin).queue(a, 0).queue(b, 0);
        plane.worker(also(worker), move |_| Mischief { deed, page: Page::untouched() });
        let running = plane.launch().expect("launch");
        Self { pool, running, left, right }
    }

    fn snapshot(&self) -> Snapshot {
        self.running.isolation(0).expect("worker 0").snapshot()
    }

    /// Sends frames up to the one that triggers the deed, and it.
    fn trigger(&mut self) {
        pass(&mut self.left, &mut self.right, TRIGGER);
        while self.left.send(1) == 0 {}
    }

    /// The worker goes on, isolated.
    fn goes_on(&mut self) {
        let so_far = self.right.received.len();
        wait_for("the trigger to come through", || self.right.receive() + so_far > TRIGGER as usize);
        pass(&mut self.left, &mut self.right, 500);
        assert_eq!(self.running.restarts(0), Some(0));
        assert_eq!(self.snapshot().state, State::Armed);
    }

    fn total(&self, name: &str) -> u64 {
        self.running.statistics().total(name)
    }

    /// Waits until housekeeping has published what the worker's block says.
    fn published(&self, name: &str, value: u64) {
        wait_for(name, || self.total(name) >= value);
        assert_eq!(self.total(name), value, "{name}");
    }

    fn end(mut self) -> StopReport {
        let report = self.running.stop();
        self.left.close();
        self.right.close();
        assert_eq!(self.pool.in_depot(), self.pool.chunks(), "{:?}", self.pool.census());
        report
    }
}

fn getppid(_: &Turn<'_>, _: Page) {
    // SAFETY: takes nothing and cannot fail.
    let parent = unsafe { libc::getppid() };
    assert!(parent > 0, "the call ran, and its answer is right");
}

fn touch(_: &Turn<'_>, page: Page) {
    page.touch();
}

pub(crate) fn breach_syscall() {
    let mut plane = Plane::new(WorkerIsolation::default(), getppid);
    plane.trigger();
    plane.goes_on();
    let status = plane.running.isolation(0).expect("worker 0");
    let [(0, breach)] = status.breaches(0)[..] else { panic!("{:?}", status.breaches(0)) };
    assert_eq!(breach.cause, Cause::Syscall);
    let Detail::Syscall { number, .. } = breach.detail else { panic!("{breach:?}") };
    assert_eq!(number, libc::SYS_getppid as u64);
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total(), now.slow_path_visits), (2, 1, 1));
    plane.published("breach_syscall", 1);
    plane.published("worker_syscalls", 1);
    assert!(plane.end().is_clean());
}

pub(crate) fn breach_page_fault() {
    let mut plane = Plane::new(WorkerIsolation::default(), touch);
    plane.trigger();
    plane.goes_on();
    let status = plane.running.isolation(0).expect("worker 0");
    let [(0, breach)] = status.breaches(0)[..] else { panic!("{:?}", status.breaches(0)) };
    assert_eq!(breach.cause, Cause::PageFault);
    plane.published("breach_page_fault", 1);
    assert_eq!(plane.total("worker_syscalls"), 0);
    assert!(plane.end().is_clean());
}

/// More than malloc has at hand: it asks the kernel.
pub(crate) fn breach_allocation() {
    let mut plane = Plane::new(WorkerIsolation::default(), |_, _| {
        let block = vec![1u8; 64 << 20];
        std::hint::black_box(&block);
    });
    plane.trigger();
    plane.goes_on();
    let status = plane.running.isolation(0).expect("worker 0");
    for (_, breach) in status.breaches(0) {
        let Detail::Syscall { number, .. } = breach.detail else { panic!("{breach:?}") };
        let known = [libc::SYS_brk, libc::SYS_mmap, libc::SYS_munmap].map(|call| call as u64);
        assert!(known.contains(&number), "{breach}");
    }
    assert_eq!(plane.snapshot().breaches.of(Cause::Syscall), 1);
    assert!(plane.end().is_clean());
}

pub(crate) fn breach_stops() {
    let isolation = WorkerIsolation { on_breach: OnBreach::Stop, ..WorkerIsolation::default() };
    let mut plane = Plane::new(isolation, getppid);
    plane.trigger();
    wait_for("the worker to end", || plane.running.state(0) == Some(WorkerState::Stopped));
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total(), now.state), (1, 1, State::Off));
    let report = plane.end();
    let end = &report.workers[0];
    assert_eq!((end.state, end.restarts), (WorkerState::Stopped, 0), "{report:?}");
    let words = end.last_words.clone().unwrap_or_default();
    assert!(words.contains("isolation was broken: system call 110"), "{words:?}");
}

pub(crate) fn breach_aborts() {
    let isolation = WorkerIsolation { on_breach: OnBreach::Abort, ..WorkerIsolation::default() };
    let mut plane = Plane::new(isolation, |_, _| {
        // SAFETY: writes bytes that live for ever to standard output.
        unsafe { libc::write(1, c"this was written".as_ptr().cast(), 16) };
    });
    plane.trigger();
    wait_for("the worker to be started again", || {
        plane.running.restarts(0) == Some(1) && plane.running.state(0) == Some(WorkerState::Running)
    });
    pass(&mut plane.left, &mut plane.right, 500);
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total(), now.state), (2, 1, State::Armed));
    let report = plane.end();
    assert_eq!(report.workers[0].state, WorkerState::Stopped, "{report:?}");
}

/// It lets itself run anywhere, so it cannot be isolated again as it is: a new one can.
pub(crate) fn breach_that_cannot_be_mended() {
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
    let cpus: Vec<_> = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect();
    let [.., _, last] = cpus[..] else {
        return eprintln!("skipped: there is one CPU only, so a worker cannot leave its own");
    };
    let leave = |_: &Turn<'_>, _: Page| {
        let mut all = CpuSet::new();
        (0..CpuSet::count()).for_each(|cpu| all.set(cpu).expect("it counts that far"));
        sched_setaffinity(Pid::from_raw(0), &all).expect("the call runs");
    };
    let mut plane = Plane::with(WorkerIsolation::default(), leave, |worker| worker.cpu(last));
    plane.trigger();
    wait_for("the worker to be started again", || {
        plane.running.restarts(0) == Some(1) && plane.running.state(0) == Some(WorkerState::Running)
    });
    pass(&mut plane.left, &mut plane.right, 500);
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total(), now.state), (2, 1, State::Armed));
    let report = plane.end();
    assert_eq!(report.workers[0].state, WorkerState::Stopped, "{report:?}");
    let words = report.workers[0].last_words.clone().unwrap_or_default();
    assert!(words.contains("after a breach: cannot isolate this thread"), "{words:?}");
}

/// One log line in the loop, by the route that the scenario is about.
fn logs(isolation: WorkerIsolation) -> Snapshot {
    let mut plane = Plane::new(isolation, |_, _| {
        tracing::info!(number = TRIGGER, text = "some \"words\"", "the worker says {}", 1 + 1);
    });
    plane.trigger();
    plane.goes_on();
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total()), (1, 0), "{now:?}");
    assert!(plane.end().is_clean());
    now
}

pub(crate) fn logs_by_the_ring() {
    let now = logs(WorkerIsolation::default());
    assert_eq!((now.slow_path_visits, now.records, now.records_lost), (0, 1, 0));
}

pub(crate) fn logs_by_the_slow_path() {
    let isolation = WorkerIsolation { diagnostics: Diagnostics::SlowPath, ..WorkerIsolation::default() };
    let now = logs(isolation);
    assert_eq!((now.slow_path_visits, now.records), (1, 0));
}

pub(crate) fn logs_too_much() {
    // Between two looks of the drainer the worker says far more than the ring takes.
    let isolation = WorkerIsolation { log_lines: 64, ..WorkerIsolation::default() };
    let mut plane = Plane::new(isolation, |_, _| {
        for n in 0..100_000 {
            tracing::info!(n, "many");
        }
    });
    plane.trigger();
    plane.goes_on();
    let now = plane.snapshot();
    assert_eq!(now.records + now.records_lost, 100_000, "{now:?}");
    assert!(now.records >= 32 && now.records_lost > 0, "{now:?}");
    assert_eq!((now.armed, now.breaches.total(), now.slow_path_visits), (1, 0, 0));
    plane.published("diagnostics_lost", now.records_lost);
    assert!(plane.end().is_clean());
}

pub(crate) fn slow_path_budget() {
    let budget = Budget::new(1, Duration::from_secs(3600));
    let isolation = WorkerIsolation { budget, ..WorkerIsolation::default() };
    let mut plane = Plane::new(isolation, |turn, _| {
        let visit = || turn.slow_path(|_| eprintln!("visited"));
        assert!(visit().is_ok());
        assert!(visit().is_err(), "the budget is one visit an hour");
    });
    plane.trigger();
    plane.goes_on();
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total()), (1, 0));
    assert_eq!((now.slow_path_visits, now.slow_path_refused), (1, 1));
    assert_eq!(now.visit_histogram.iter().sum::<u64>(), 1);
    plane.published("slow_path_refused", 1);
    let rows = plane.running.statistics().rows();
    let lengths = rows.iter().find(|row| row.name == "slow_path_visit_ns").expect("the histogram");
    assert_eq!(lengths.values.iter().sum::<u64>(), 1, "visits by length");
    assert!(plane.end().is_clean());
}

pub(crate) fn strict_worker_panics() {
    let mut plane = Plane::new(WorkerIsolation::default(), |_, _| panic!("frame {TRIGGER} frightens me"));
    plane.trigger();
    wait_for("the worker to be started again", || {
        plane.running.restarts(0) == Some(1) && plane.running.state(0) == Some(WorkerState::Running)
    });
    pass(&mut plane.left, &mut plane.right, 500);
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total(), now.state), (2, 0, State::Armed), "{now:?}");
    let report = plane.end();
    let words = report.workers[0].last_words.clone().unwrap_or_default();
    assert!(words.contains("frightens me") && words.contains("isolation.rs:"), "{words:?}");
}

fn nobody() -> WorkerIsolation {
    WorkerIsolation { privileges: Privileges::Drop { uid: 65534, gid: 65534 }, ..WorkerIsolation::default() }
}

fn status_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker's status")
}

pub(crate) fn worker_drops_privileges() {
    let mut plane = Plane::new(nobody(), |_, _| {});
    plane.trigger();
    plane.goes_on();
    let text = status_of(plane.running.worker_pid(0).expect("a process"));
    for line in ["Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534", "NoNewPrivs:\t1"] {
        assert!(text.contains(line), "no {line:?} in {text}");
    }
    // CAP_IPC_LOCK is capability 14, and the only one that is kept.
    assert!(text.contains("CapEff:\t0000000000004000"), "{text}");
    assert_eq!(plane.snapshot().breaches.total(), 0);
    assert!(plane.end().is_clean());
}

/// Prints the worker's process id and waits to be killed.
pub(crate) fn waits_without_privileges() {
    let plane = Plane::new(nobody(), |_, _| {});
    println!("{}", plane.running.worker_pid(0).expect("a process"));
    loop {
        std::thread::park();
    }
}

pub(crate) fn isolation_refusals() {
    let launch = |isolation: WorkerIsolation, placement, cpu: Option<usize>| {
        let pool = pool("scenario", 1024);
        let (port, mut peer) = Peer::new(&pool, "left");
        let mut plane = Dataplane::builder("scenario");
        let port = plane.port(port);
        plane.isolation(isolation).placement(placement);
        plane.restart(Restart::BackOff {
            first: Duration::from_secs(60),
            longest: Duration::from_secs(60),
            limit: 9,
        });
        let worker = Worker::new("w0").frames(64).queue(port, 0);
        let worker = cpu.map_or(worker.clone(), |cpu| worker.cpu(cpu));
        plane.worker(worker, |_| Mischief { deed: |_, _| {}, page: Page::untouched() });
        let error = plane.launch().expect_err("refused");
        peer.close();
        error
    };
    let defaults = WorkerIsolation::default;
    let patched = WorkerIsolation { backend: Backend::TaskIsolation, ..defaults() };
    let error = launch(patched, Placement::Process, None);
    assert!(matches!(error, LaunchError::Isolation(_)), "{error}");
    assert!(error.to_string().contains("task-isolation"), "{error}");
    let error = launch(nobody(), Placement::Thread, None);
    assert!(matches!(error, LaunchError::PrivilegesOfThreads), "{error}");
    // Nowhere without a patched kernel is there nothing to say; the worker is given up at once, although
    // the policy is to wait for a minute after a death.
    let insisting = WorkerIsolation { insist: true, ..defaults() };
    let error = launch(insisting, Placement::Process, Some(1)).to_string();
    for part in ["observed, not enforced", "Isolation::insist"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    let root = WorkerIsolation { privileges: Privileges::Drop { uid: 0, gid: 0 }, ..defaults() };
    let error = launch(root, Placement::Process, None).to_string();
    assert!(error.contains("one of them is root's"), "{error}");
}

/// A worker that is killed right after its breach, before it can report it.
pub(crate) fn killed_at_its_breach() {
    let mut plane = Plane::new(WorkerIsolation::default(), |_, page| {
        page.touch();
        // Within the same turn, so before the loop looks.
        // SAFETY: plain numbers.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    });
    plane.trigger();
    wait_for("the worker to be started again", || {
        plane.running.restarts(0) == Some(1) && plane.running.state(0) == Some(WorkerState::Running)
    });
    assert_eq!(plane.snapshot().breaches.of(Cause::PageFault), 1);
    // The successor reported it; so did nobody else.
    assert_eq!(plane.running.isolation(0).expect("worker 0").reported(), 1);
    assert_eq!(plane.end().workers[0].state, WorkerState::Stopped);
}

/// SIGSTOP and SIGCONT from outside: counted, no breach, and the worker goes on.
pub(crate) fn stopped_and_continued() {
    let mut plane = Plane::new(WorkerIsolation::default(), |_, _| {});
    plane.trigger();
    plane.goes_on();
    let pid = Pid::from_raw(plane.running.worker_pid(0).expect("a process") as i32);
    wait_for("a baseline", || plane.snapshot().samples >= 2);
    kill(pid, Signal::SIGSTOP).expect("stop it");
    wait_for("the stop to be seen", || plane.snapshot().interruptions.of(Cause::Stop) > 0);
    kill(pid, Signal::SIGCONT).expect("continue it");
    pass(&mut plane.left, &mut plane.right, 500);
    let now = plane.snapshot();
    assert_eq!((now.armed, now.breaches.total(), now.state), (1, 0, State::Armed));
    assert!(plane.end().is_clean());
}
