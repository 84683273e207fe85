//! The running kernel: what is done to a thread is found under the right cause. The oracle for counts
//! is another reading of the kernel's table by other means. Other work on the machine adds counts and
//! takes none away, so counts are asserted from below.

use super::*;
use crate::cause::{Cause, Interruptions};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid, gettid};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

/// A CPU for the worker and another one, or the reason why there are none, said aloud.
pub(super) fn cpus() -> Option<(u32, u32)> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut all = (0..CpuSet::count()).rev().filter(|cpu| set.is_set(*cpu).unwrap());
    let two = all.next().zip(all.next()).map(|(worker, other)| (worker as u32, other as u32));
    if two.is_none() {
        eprintln!("skipped: one CPU is not enough to have a worker and look at it from another CPU");
    }
    two
}

pub(super) fn pin(thread: Pid, cpu: u32) {
    let mut set = CpuSet::new();
    set.set(cpu as usize).unwrap();
    sched_setaffinity(thread, &set).unwrap();
}

/// A thread of this process that spins on a CPU.
pub(super) struct Spinner {
    tid: Pid,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Spinner {
    pub(super) fn on(cpu: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (send, tid) = channel();
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            pin(Pid::from_raw(0), cpu);
            send.send(gettid()).unwrap();
            while !seen.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        Self { tid: tid.recv().unwrap(), stop, thread: Some(thread) }
    }

    pub(super) fn id(&self) -> (u32, u32) {
        (getpid().as_raw() as u32, self.tid.as_raw() as u32)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(joined, Some(Ok(()))));
    }
}

/// A process that spins on a CPU, and dies with the thread that made it.
pub(super) struct Process(Child);

impl Process {
    pub(super) fn on(cpu: u32) -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "sh", "-c", "echo; while :; do :; done"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut process = Self(child);
        pin(process.pid(), cpu);
        // Its line says that it spins, and makes no system call from here on.
        let mut line = [0];
        std::io::Read::read_exact(process.0.stdout.as_mut().unwrap(), &mut line).unwrap();
        process
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }

    pub(super) fn id(&self) -> (u32, u32) {
        (self.0.id(), self.0.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A zombie can be killed, too: both can fail only when it was waited for.
        let killed = self.0.kill().and_then(|()| self.0.wait());
        assert!(std::thread::panicking() || killed.is_ok());
    }
}

/// A worker and its observer, past the baseline, and all that was found since.
struct Watch {
    status: Status,
    observer: Observer,
    seen: Interruptions,
    events: Vec<Event>,
    run_delay: Duration,
}

impl Watch {
    fn new(id: (u32, u32), cpu: u32) -> Self {
        let worker = watched("w");
        arm(&worker.status, id, cpu);
        let mut observer = Observer::new(vec![worker.clone()]);
        assert!(observer.sample().is_empty());
        let nothing = (Interruptions::default(), Vec::new(), Duration::ZERO);
        let (seen, events, run_delay) = nothing;
        Self { status: worker.status, observer, seen, events, run_delay }
    }

    fn look(&mut self) {
        for finding in self.observer.sample() {
            finding.interruptions.iter().for_each(|(cause, n)| self.seen.add(cause, n));
            self.events.extend(finding.events);
            self.run_delay += finding.run_delay;
        }
        assert_eq!(self.observer.missing(), []);
        assert_eq!(self.status.snapshot().interruptions, self.seen);
    }

    /// Looks until this many of the cause were seen.
    fn until(&mut self, cause: Cause, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.seen.of(cause) < count {
            assert!(Instant::now() < deadline, "{count} x {cause}: {:?} {:?}", self.seen, self.events);
            std::thread::sleep(Duration::from_millis(5));
            self.look();
        }
    }
}

/// Maps, touches and unmaps memory 500 times in a thread of this name on a CPU.
pub(super) fn unmap(name: &str, cpu: u32) {
    let work = move || {
        pin(Pid::from_raw(0), cpu);
        for _ in 0..500 {
            // Larger than what the allocator keeps.
            let mut memory = vec![0u8; 64 << 20];
            memory[0] = 1;
            std::hint::black_box(&memory);
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(work).unwrap().join().unwrap();
}

/// What the kernel's table says of a row and a CPU.
pub(super) fn interrupts(row: &str, cpu: u32) -> u64 {
    let table = std::fs::read_to_string("/proc/interrupts").unwrap();
    let column =
        table.lines().next().unwrap().split_whitespace().position(|c| c == format!("CPU{cpu}")).unwrap();
    let line = table.lines().find_map(|line| line.trim().strip_prefix(row)?.strip_prefix(':'));
    line.map_or(0, |line| line.split_whitespace().nth(column).unwrap().parse().unwrap())
}

#[test]
fn timer_ticks_are_counted() {
    let Some((cpu, _)) = cpus() else { return };
    let spinner = Spinner::on(cpu);
    let outer = interrupts("LOC", cpu);
    let mut watch = Watch::new(spinner.id(), cpu);
    let inner = interrupts("LOC", cpu);
    let deadline = Instant::now() + Duration::from_secs(10);
    while interrupts("LOC", cpu) < inner + 10 {
        if Instant::now() > deadline {
            eprintln!("not here: CPU {cpu} has no timer ticks (nohz_full?)");
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    watch.look();
    let ticks = watch.seen.of(Cause::TimerTick);
    assert!(ticks >= 10 && ticks <= interrupts("LOC", cpu) - outer, "{ticks}");
}

#[test]
fn moving_a_worker_away_is_an_affinity_change_and_a_migration() {
    let Some((cpu, other)) = cpus() else { return };
    let process = Process::on(cpu);
    let mut watch = Watch::new(process.id(), cpu);
    pin(process.pid(), other);
    watch.until(Cause::AffinityChange, 1);
    watch.until(Cause::Migration, 1);
    assert!(watch.events.contains(&Event::Migrated { from: cpu, to: other }), "{:?}", watch.events);
    let (from, to) = (cpu.to_string(), other.to_string());
    assert!(watch.events.contains(&Event::AffinityChanged { from, to }), "{:?}", watch.events);
    pin(process.pid(), cpu);
    watch.until(Cause::Migration, 2);
    assert_eq!((watch.seen.of(Cause::Migration), watch.seen.of(Cause::AffinityChange)), (2, 2));
}

#[test]
fn a_move_away_and_back_between_two_samples_is_seen() {
    let Some((cpu, other)) = cpus() else { return };
    let process = Process::on(cpu);
    let path = format!("/proc/{}/task/{}/sched", process.pid(), process.pid());
    if !std::fs::exists(path).unwrap() {
        eprintln!("not here: this kernel does not count moves (no CONFIG_SCHED_DEBUG)");
        return;
    }
    let mut watch = Watch::new(process.id(), cpu);
    // It has to run there to have been there.
    pin(process.pid(), other);
    let processor = || {
        let stat = std::fs::read(format!("/proc/{}/stat", process.pid())).unwrap();
        parse::thread_stat(&stat).unwrap().processor
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while processor() != other {
        assert!(Instant::now() < deadline);
    }
    pin(process.pid(), cpu);
    while processor() != cpu {
        assert!(Instant::now() < deadline);
    }
    watch.look();
    assert_eq!(watch.seen.of(Cause::Migration), 2);
    assert_eq!(watch.events, [Event::MovedAndBack { moves: 2 }]);
}

#[test]
fn each_stop_is_counted_once() {
    let Some((cpu, _)) = cpus() else { return };
    let process = Process::on(cpu);
    let mut watch = Watch::new(process.id(), cpu);
    for round in 1..=3 {
        kill(process.pid(), Signal::SIGSTOP).unwrap();
        watch.until(Cause::Stop, round);
        watch.look();
        watch.look();
        kill(process.pid(), Signal::SIGCONT).unwrap();
        watch.look();
        assert_eq!(watch.seen.of(Cause::Stop), round);
    }
}

#[test]
fn a_tracer_is_named() {
    let Some((cpu, _)) = cpus() else { return };
    let process = Process::on(cpu);
    let mut watch = Watch::new(process.id(), cpu);
    ptrace::seize(process.pid(), ptrace::Options::empty()).unwrap();
    watch.until(Cause::Ptrace, 1);
    watch.look();
    assert_eq!(watch.seen.of(Cause::Ptrace), 1);
    assert_eq!(watch.events, [Event::TracerAttached { tid: gettid().as_raw() as u32 }]);
}

#[test]
fn a_neighbour_on_the_cpu_preempts() {
    let Some((cpu, _)) = cpus() else { return };
    let (process, _neighbour) = (Process::on(cpu), Spinner::on(cpu));
    let mut watch = Watch::new(process.id(), cpu);
    watch.until(Cause::Preemption, 3);
    assert!(watch.run_delay > Duration::ZERO);
}

#[test]
fn a_dead_worker_is_gone() {
    let Some((cpu, _)) = cpus() else { return };
    let process = Process::on(cpu);
    let mut watch = Watch::new(process.id(), cpu);
    kill(process.pid(), Signal::SIGKILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !watch.events.contains(&Event::Gone) {
        assert!(Instant::now() < deadline);
        watch.look();
    }
    drop(process);
    watch.look();
    assert_eq!(watch.events.iter().filter(|event| **event == Event::Gone).count(), 1);
}

#[test]
fn a_sibling_that_unmaps_shoots_the_tlb_down() {
    let Some((cpu, other)) = cpus() else { return };
    let spinner = Spinner::on(cpu);
    let mut watch = Watch::new(spinner.id(), cpu);
    let before = interrupts("TLB", cpu);
    unmap("unmapper", other);
    let came = interrupts("TLB", cpu) - before;
    watch.look();
    if came == 0 {
        eprintln!(
            "not here: this machine flushes another CPU's TLB without an interrupt (hypervisor, INVLPGB)"
        );
        return;
    }
    assert!(watch.seen.of(Cause::TlbShootdown) >= came, "{came}: {:?}", watch.seen);
}
