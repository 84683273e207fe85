//! Strict workers under the eyes of others: what they do not do is checked from outside, and each witness
//! is shown to see it when they do.

use crate::network::{Hosts, Plane, assert_nothing_lost};
use crate::peer::{Peer, pool, wait_for};
use isoplane::blocks::CrossConnect;
use isoplane::blocks::bridge::{Bridge, BridgeConfig};
use isoplane::drivers::xdp::{XdpConfig, XdpPort};
use isoplane::isolation::{Backend, Cause, Privileges};
use isoplane::memory::{Batch, HugePages, Pool, PoolConfig};
use isoplane::{
    App, AppEnd, Dataplane, Mailbox, Placement, PortId, Running, Setup, Turn, Worker, WorkerIsolation,
    mailbox,
};
use isoplane_lab::{Counter, Strace};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// The worker's CPU, and those of everybody else; `None` (and why) when there is only one.
pub(crate) fn cpus() -> Option<(usize, Vec<usize>)> {
    let set = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
    let mut all: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).collect();
    let worker = all.pop().filter(|_| !all.is_empty());
    if worker.is_none() {
        eprintln!("skipped: a strict worker wants a CPU of its own, and there is only one");
    }
    worker.map(|worker| (worker, all))
}

fn stay_on(cpus: &[usize]) {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| set.set(*cpu).expect("a CPU"));
    sched_setaffinity(Pid::from_raw(0), &set).expect("affinity");
}

/// Whether the worker is strict by a backend that catches system calls and page faults.
pub(crate) fn enforced(running: &Running) -> bool {
    let enforced = running.isolation(0).and_then(|status| status.backend()) == Some(Backend::Dispatch);
    if !enforced {
        eprintln!("skipped: the backend here is not dispatch, so nothing is caught");
    }
    enforced
}

fn breaches(running: &Running, cause: Cause) -> u64 {
    running.isolation(0).expect("worker 0").snapshot().breaches.of(cause)
}

pub(crate) fn assert_no_breach(running: &Running) {
    let status = running.isolation(0).expect("worker 0");
    assert_eq!(status.snapshot().breaches.total(), 0, "{:?}", status.breaches(0));
}

/// What the program asks of [`Wicked`].
const GETPPID: u64 = 1;
const TOUCH: u64 = 2;

/// Does what a strict worker must not, when asked.
struct Wicked {
    program: AppEnd<u64, u64>,
    cold: *mut u8,
}

impl Wicked {
    fn new(program: AppEnd<u64, u64>) -> Self {
        Self { program, cold: cold_page() }
    }
}

/// A page that is not there, although all memory of the worker is locked.
#[allow(unsafe_code, reason = "a mapping; see the block")]
fn cold_page() -> *mut u8 {
    // SAFETY: a fresh anonymous page, never unmapped, that nothing points into.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        Errno::result(libc::munlock(page, 4096)).expect("munlock");
        Errno::result(libc::madvise(page, 4096, libc::MADV_DONTNEED)).expect("madvise");
        page.cast()
    }
}

impl App for Wicked {
    fn packets(&mut self, turn: &mut Turn<'_>, _: PortId, batch: &mut Batch) {
        turn.give_back(batch);
    }

    #[allow(unsafe_code, reason = "what it is asked for; see each block")]
    fn turn(&mut self, _: &mut Turn<'_>) {
        match self.program.receive() {
            Some(GETPPID) => {
                // SAFETY: takes nothing and touches nothing.
                unsafe { libc::getppid() };
            }
            Some(TOUCH) => {
                // SAFETY: the page is mapped for writing and this value's alone.
                unsafe { self.cold.write_volatile(1) };
            }
            _ => {}
        }
    }
}

struct Watched {
    running: Running,
    program: Mailbox<u64, u64>,
    _left: Peer,
}

/// A worker with one port that nobody sends to, and its app.
fn launch<A: App + 'static>(
    cpu: usize,
    placement: Placement,
    isolation: WorkerIsolation,
    app: impl Fn(&Setup<'_>, AppEnd<u64, u64>) -> A + Send + 'static,
) -> Watched {
    let pool = pool("strict", 4096);
    let (port, left) = Peer::new(&pool, "left");
    let (program, end) = mailbox::<u64, u64>("orders", 16).expect("mailbox");
    let mut plane = Dataplane::builder("strict");
    let port = plane.port(port);
    plane.placement(placement).isolation(isolation);
    plane.worker(Worker::new("w0").cpu(cpu).queue(port, 0), move |setup| app(setup, end.open()));
    Watched { running: plane.launch().expect("launch"), program, _left: left }
}

/// Both tracers see nothing of a strict worker, and both see what it is made to do: one system call, one
/// page fault, each of which the backend catches too.
pub(crate) fn witnesses_see() {
    let Some((cpu, others)) = cpus() else { return };
    let Watched { running, mut program, _left } =
        launch(cpu, Placement::Process, WorkerIsolation::default(), |_, end| Wicked::new(end));
    stay_on(&others);
    if !enforced(&running) {
        return;
    }
    let status = running.isolation(0).expect("worker 0");
    let tid = status.thread().1;
    assert_eq!(Some(tid), running.worker_pid(0), "the worker is a process with one thread");
    let calls = Counter::system_calls(tid).expect("tracepoint");
    let faults = Counter::page_faults(tid).expect("perf");
    wait_for("turns", || running.statistics().total("turns") > 100_000);
    assert_eq!((calls.count().unwrap(), faults.count().unwrap()), (0, 0));

    program.send(TOUCH).expect("room");
    wait_for("the page fault to be caught", || breaches(&running, Cause::PageFault) == 1);
    assert_eq!(faults.count().unwrap(), 1, "as often as the backend says");
    wait_for("its report", || status.snapshot().armed == 2);
    let before = calls.count().unwrap();
    program.send(GETPPID).expect("room");
    wait_for("the system call to be caught", || breaches(&running, Cause::Syscall) == 1);
    wait_for("its report", || status.snapshot().armed == 3);
    assert!(calls.count().unwrap() > before, "the forbidden call runs, once, when isolation is off");

    let strace = Strace::attach(tid).expect("strace");
    // It begins to see when the worker has stopped for it.
    let mut caught = breaches(&running, Cause::Syscall);
    wait_for("strace to see a getppid", || {
        program.send(GETPPID).expect("room");
        caught += 1;
        wait_for("the system call to be caught", || breaches(&running, Cause::Syscall) == caught);
        wait_for("its report", || status.snapshot().armed == caught + 2);
        strace.seen().unwrap().iter().any(|line| line.contains("getppid("))
    });
    let seen = strace.detach().expect("strace ends");
    assert!(seen.iter().any(|line| line.contains("SIGSYS")), "{seen:#?}");
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
}

/// Threads that change the program's memory map all the time, away from the worker's CPU.
struct Unmappers {
    stop: Arc<AtomicBool>,
    unmaps: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Unmappers {
    const NAME: &'static str = "unmapper";

    fn start(cpus: &[usize]) -> Self {
        let (stop, unmaps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = || {
            let (stop, unmaps, cpus) = (Arc::clone(&stop), Arc::clone(&unmaps), cpus.to_vec());
            let run = move || {
                stay_on(&cpus);
                while !stop.load(Ordering::Relaxed) {
                    map_and_unmap();
                    unmaps.fetch_add(1, Ordering::Relaxed);
                }
            };
            std::thread::Builder::new().name(Self::NAME.to_owned()).spawn(run).expect("a thread")
        };
        let threads = (0..2).map(|_| thread()).collect();
        Self { stop, unmaps, threads }
    }

    /// Waits for as many more unmaps.
    fn wait(&self, unmaps: u64) {
        let target = self.unmaps.load(Ordering::Relaxed) + unmaps;
        wait_for("unmaps", || {
            std::thread::sleep(std::time::Duration::from_millis(1));
            self.unmaps.load(Ordering::Relaxed) >= target
        });
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("unmapper"));
    }
}

/// Touches sixteen new pages, so that there is something to flush.
#[allow(unsafe_code, reason = "a mapping; see the block")]
fn map_and_unmap() {
    const BYTES: usize = 16 * 4096;
    // SAFETY: a fresh mapping that nothing points into when it goes.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let pages = libc::mmap(std::ptr::null_mut(), BYTES, access, flags, -1, 0);
        assert_ne!(pages, libc::MAP_FAILED);
        for page in 0..16 {
            pages.cast::<u8>().add(page * 4096).write_volatile(1);
        }
        Errno::result(libc::munmap(pages, BYTES)).expect("munmap");
    }
}

/// Unmaps while a worker is watched.
const UNMAPS: u64 = 2000;

/// `TLB_REMOTE_SHOOTDOWN` of the kernel's `enum tlb_flush_reason` (include/linux/mm_types.h): another CPU asked
/// for a flush of the memory map that is in use here.
const REMOTE_SHOOTDOWN: &str = "reason == 1";

/// TLB shootdowns that interrupted the worker while the program's threads unmapped.
fn shootdowns(placement: Placement, cpu: usize, others: &[usize]) -> u64 {
    let isolation = WorkerIsolation::default();
    let Watched { running, _left, .. } = launch(cpu, placement, isolation, |_, _| CrossConnect);
    stay_on(others);
    let tid = running.isolation(0).expect("worker 0").thread().1;
    let unmappers = Unmappers::start(others);
    // What the program's threads left behind on the worker's CPU before it had it is over by then.
    unmappers.wait(UNMAPS / 10);
    let flushes = Counter::tracepoint(tid, "tlb/tlb_flush", Some(REMOTE_SHOOTDOWN)).expect("tracepoint");
    unmappers.wait(UNMAPS);
    let count = flushes.count().expect("a count");
    unmappers.stop();
    assert_no_breach(&running);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    count
}

/// Threads of the program unmap all the time: a worker in a process of its own does not notice.
pub(crate) fn unmaps_beside_a_process() {
    let Some((cpu, others)) = cpus() else { return };
    assert_eq!(shootdowns(Placement::Process, cpu, &others), 0);
}

/// The same beside a worker in a thread: each unmap may interrupt it. This is what shows that the other test
/// sees TLB interrupts.
pub(crate) fn unmaps_beside_a_thread() {
    let Some((cpu, others)) = cpus() else { return };
    if shootdowns(Placement::Thread, cpu, &others) == 0 {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let without_ipi = ["invlpgb", "hypervisor"].iter().find(|flag| info.contains(**flag));
        let flag = without_ipi.expect("no TLB interrupt although this CPU has no other way to flush");
        eprintln!("not here: TLBs are flushed without interrupts here (CPU flag {flag})");
    }
}

/// Who sent these interrupts is named: this program's threads, and the function that flushes.
pub(crate) fn senders_of_unmaps() {
    let Some((cpu, others)) = cpus() else { return };
    let isolation = WorkerIsolation { name_senders: true, ..WorkerIsolation::default() };
    let Watched { running, _left, .. } = launch(cpu, Placement::Thread, isolation, |_, _| CrossConnect);
    stay_on(&others);
    let tid = running.isolation(0).expect("worker 0").thread().1;
    let flushes = Counter::tracepoint(tid, "tlb/tlb_flush", Some(REMOTE_SHOOTDOWN)).expect("tracepoint");
    let unmappers = Unmappers::start(&others);
    unmappers.wait(UNMAPS);
    unmappers.stop();
    if flushes.count().expect("a count") == 0 {
        eprintln!("not here: no TLB interrupt is sent here, so nobody is to be named");
        return;
    }
    let named = || {
        running.senders(1000).into_iter().find(|sender| {
            sender.pid == std::process::id()
                && sender.comm == Unmappers::NAME
                && sender.function.as_deref() == Some("flush_tlb_func")
        })
    };
    wait_for("the sender to be named", || named().is_some());
    let sender = named().expect("it was there");
    assert!(sender.count > 0 && sender.to == cpu as u32 && !sender.in_interrupt, "{sender}");
    assert!(others.contains(&(sender.from as usize)), "{sender}");
    assert_no_breach(&running);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
}

/// A bridge over AF_XDP whose worker is nobody: kernel traffic passes, and it is strict all the time.
pub(crate) fn bridge_without_privileges() {
    const NOBODY: u32 = 65_534;
    let Some((cpu, others)) = cpus() else { return };
    let hosts = Hosts::new();
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("nobody", 8192) };
    let pool = Pool::create(&config).expect("pool");
    let mut plane = Dataplane::builder("nobody");
    let inside = hosts.middle.enter().expect("enter the namespace");
    let ports =
        ["left", "right"].map(|name| plane.port(XdpPort::open(&pool, &XdpConfig::new(name)).expect("port")));
    inside.leave().expect("leave the namespace");
    let worker = Worker::new("w0").cpu(cpu).counters(&Bridge::FIELDS).queue(ports[0], 0).queue(ports[1], 0);
    let privileges = Privileges::Drop { uid: NOBODY, gid: NOBODY };
    plane.isolation(WorkerIsolation { privileges, ..WorkerIsolation::default() });
    plane.worker(worker, |_| Bridge::new(&BridgeConfig::new(2)).expect("bridge"));
    let running = plane.launch().expect("launch");
    stay_on(&others);
    if !enforced(&running) {
        return;
    }
    let pid = running.worker_pid(0).expect("a process");
    let said = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    for ids in ["Uid:\t65534\t65534\t65534\t65534", "Gid:\t65534\t65534\t65534\t65534"] {
        assert!(said.contains(ids), "{said}");
    }
    let (calls, faults) =
        (Counter::system_calls(pid).expect("perf"), Counter::page_faults(pid).expect("perf"));
    assert_nothing_lost(&hosts.converse(std::time::Duration::from_millis(500)));
    assert_eq!((calls.count().unwrap(), faults.count().unwrap()), (0, 0));
    assert_no_breach(&running);
    assert!(running.statistics().total("kicker_kicks") > 0);
    assert!(running.statistics().total("rx_frames") > 0);
    Plane { pool, running, ports }.end();
}

/// An arena in a program whose allocator is not the one that serves from it: that is said.
pub(crate) fn arena_without_its_allocator() {
    let Some((cpu, _)) = cpus() else { return };
    let isolation = WorkerIsolation { arena: 1 << 20, ..WorkerIsolation::default() };
    let Watched { running, _left, .. } = launch(cpu, Placement::Process, isolation, |_, _| CrossConnect);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
}
