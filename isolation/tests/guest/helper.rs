//! Who disturbs: threads on housekeeping CPUs that wait until the thread under test is isolated.

use crate::lab;
use isoplane_isolation::prepare::cpu;
use isoplane_isolation::{Backend, Breach, Cause, Isolation, Mode, OnBreach, Status, Strict};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// First of all in a case: ends it where the kernel has no task isolation to test.
pub(crate) fn start() {
    lab::start();
    if let Err(reason) = Backend::TaskIsolation.probe() {
        lab::not_here(&reason.to_string());
    }
    if cpu::nohz_full().is_empty() {
        lab::not_here("no CPU is nohz_full");
    }
    assert!(lab::is_kernel(), "the backend under test is {}", lab::backend());
}

/// CPUs that are not nohz_full.
pub(crate) fn housekeeping() -> Vec<usize> {
    let (online, quiet) = (cpu::online().expect("online"), cpu::nohz_full());
    online.iter().filter(|cpu| !quiet.contains(*cpu)).map(|cpu| cpu.0).collect()
}

/// Lets the calling thread run on these CPUs only.
pub(crate) fn keep_to(cpus: &[usize]) {
    move_to(0, cpus);
}

/// Lets a thread run on these CPUs only.
pub(crate) fn move_to(tid: i32, cpus: &[usize]) {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu).expect("CPU"));
    sched_setaffinity(Pid::from_raw(tid), &set).expect("affinity");
}

/// Forks a process that disturbs from a housekeeping CPU and ends. To be made before the thread under test is
/// isolated.
pub(crate) fn process(deed: impl FnOnce()) -> Pid {
    lab::child(|| {
        keep_to(&housekeeping());
        std::thread::sleep(Duration::from_millis(500));
        deed();
    })
}

const READY: u32 = 1;
const GO: u32 = 2;
const DONE: u32 = 3;

/// A thread that does one thing when it is told, and stays until it is dropped: a thread that ends would
/// disturb by itself.
pub(crate) struct Helper {
    stage: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

const END: u32 = 4;

impl Helper {
    /// To be made before the thread under test prepares, which pins it.
    pub(crate) fn new(deed: impl FnOnce() + Send + 'static) -> Self {
        let stage = Arc::new(AtomicU32::new(0));
        let ours = stage.clone();
        let wait = move |stage: &AtomicU32, wanted: u32| {
            while ![wanted, END].contains(&stage.load(Ordering::Acquire)) {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let thread = std::thread::spawn(move || {
            keep_to(&housekeeping());
            ours.store(READY, Ordering::Release);
            wait(&ours, GO);
            if ours.load(Ordering::Acquire) == END {
                return;
            }
            // Past the settle window: what comes within it is a race, not a breach.
            std::thread::sleep(Duration::from_millis(50));
            deed();
            // Whoever has ended it meanwhile is not to be overruled.
            let _ = ours.compare_exchange(GO, DONE, Ordering::Release, Ordering::Relaxed);
            wait(&ours, END);
        });
        wait(&stage, READY);
        Self { stage, thread: Some(thread) }
    }

    /// Has it done, by memory alone; turns meanwhile.
    pub(crate) fn go(&self, strict: &mut Strict<'_>) {
        self.start();
        while self.stage.load(Ordering::Acquire) != DONE {
            strict.turn().expect("turn");
        }
        for _ in 0..1000 {
            strict.turn().expect("turn");
        }
    }

    /// Tells it, and does not wait.
    pub(crate) fn start(&self) {
        self.stage.store(GO, Ordering::Release);
    }

    /// As [`Helper::go`], without a turn.
    pub(crate) fn go_unseen(&self) {
        self.start();
        while self.stage.load(Ordering::Acquire) != DONE {
            std::hint::spin_loop();
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.stage.store(END, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            assert!(result.is_ok() || std::thread::panicking(), "a helper panicked");
        }
    }
}

/// Strict, each breach reported.
pub(crate) fn isolation() -> Isolation {
    lab::isolation().backend(Backend::TaskIsolation).on_breach(OnBreach::Report)
}

/// One helper disturbs a strict thread: the breaches, of which there is at least one, each reported; isolated
/// again after it.
pub(crate) fn disturbed(deed: impl FnOnce() + Send + 'static) -> Vec<Breach> {
    let helper = Helper::new(deed);
    let status = lab::isolated(isolation(), |strict, status| {
        helper.go(strict);
        assert!(strict.is_armed(), "{:x?}", status.breaches(0));
        // There may be many reports to look at: the memory for that is asked for by permission.
        strict.slow_path(|_| lab::reports().len()).expect("visit");
        lab::assert_enforced(strict, status);
    });
    let mut breaches: Vec<Breach> = status.breaches(0).into_iter().map(|(_, breach)| breach).collect();
    // Each was reported, also those that the log has no room for.
    assert_eq!(lab::reports().len() as u64, status.breach_count());
    // The last is that of `assert_enforced`.
    breaches.pop();
    assert!(!breaches.is_empty(), "nothing was noticed");
    for breach in &breaches {
        assert_eq!(breach.cpu as usize, lab::cpu().0, "{breach}");
    }
    breaches
}

/// The same disturbance under a mode that allows it: what was counted.
pub(crate) fn tolerated(mode: Mode, deed: impl FnOnce() + Send + 'static) -> Status {
    let helper = Helper::new(deed);
    let status = lab::isolated(isolation().mode(mode), |strict, _| {
        helper.go(strict);
        assert!(strict.is_armed());
    });
    lab::no_breach(&status);
    status
}

/// All of them are of these causes.
pub(crate) fn assert_causes(breaches: &[Breach], causes: &[Cause]) {
    for breach in breaches {
        assert!(causes.contains(&breach.cause), "{breach}: {breaches:x?}");
    }
}
