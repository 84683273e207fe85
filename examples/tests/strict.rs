//! `l2fwd` is strict: no system call and no page fault in its worker's loop, by its own word and by that of
//! tracers outside. (`tests/strict.rs` of the end-to-end tests shows that these tracers see what there is.)

use isoplane::isolation::{Backend, Cause};
use isoplane::memory::stats::{SegmentReader, find};
use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, Seen, VethEnd, Witnesses, veth};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long nothing may be seen.
const WATCH: Duration = Duration::from_secs(10);

/// Cargo builds the examples of this package next to its tests.
fn l2fwd() -> PathBuf {
    let mut path = std::env::current_exe().expect("this test has a path");
    path.pop();
    path.pop();
    path.join("examples/l2fwd")
}

/// Killed when the test ends early; what it started goes with it.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn segment(program: u32) -> SegmentReader {
    let start = Instant::now();
    loop {
        let found = find(Some("l2fwd")).expect("/proc");
        if let Some(found) = found.into_iter().find(|f| f.pid == program)
            && found.reader.total("turns") > 0
            && found.reader.total("pid") != 0
            && found.reader.total("armed") != 0
        {
            return found.reader;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "l2fwd does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether the kernel may stop the tick of some CPU, so that none need be seen.
fn may_be_tickless() -> bool {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/nohz_full").unwrap_or_default();
    !matches!(list.trim(), "" | "(null)")
}

#[test]
fn l2fwd_enters_the_kernel_neither_by_its_word_nor_by_that_of_others() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: making network namespaces needs root");
        return;
    }
    let cpus = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
    if (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu) == Ok(true)).count() < 2 {
        eprintln!("skipped: with one CPU the worker has none of its own, and its ticks are not counted");
        return;
    }
    let [left, right, middle] = [(); 3].map(|()| Namespace::new().expect("namespace"));
    let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    for ((host, name), address) in [(&left, "left"), (&right, "right")].into_iter().zip(addresses) {
        let end = VethEnd::new(host, "eth0").address(address, 24);
        veth::pair(&end, &VethEnd::new(&middle, name)).expect("veth pair");
    }
    let child = {
        let _inside = middle.enter().expect("enter the namespace");
        Command::new(l2fwd()).args(["left", "right"]).stdout(Stdio::null()).spawn().expect("l2fwd")
    };
    let mut program = Program(child);
    let statistics = segment(program.0.id());
    let backend = u32::try_from(statistics.total("isolation_backend")).ok().and_then(Backend::from_number);
    if backend != Some(Backend::Dispatch) {
        eprintln!("skipped: no backend here catches system calls and page faults");
        return;
    }
    let pid = u32::try_from(statistics.total("pid")).expect("a pid");
    let ends = [
        Endpoint { namespace: &left, address: addresses[0].into() },
        Endpoint { namespace: &right, address: addresses[1].into() },
    ];
    let flows = [Flow::Echo { window: 4, largest: 1400 }, Flow::Datagrams { window: 8, largest: 1472 }];
    let traffic = Traffic::start(ends[0], ends[1], &flows).expect("traffic");
    let witnesses = Witnesses::attach(pid).expect("witnesses");
    std::thread::sleep(WATCH);
    let seen = witnesses.detach().expect("what they saw");
    let reports = traffic.stop();
    assert_eq!(seen, Seen::default());
    assert!(reports.iter().all(|r| r.counts.verified > 0 && r.counts.corrupt == 0), "{reports:?}");
    assert_eq!(statistics.total("pid"), u64::from(pid), "it was one worker all the time");
    // What the observer publishes is at most a moment old, and zero stays zero.
    for count in ["worker_syscalls", "worker_page_faults", "slow_path_visits"] {
        assert_eq!(statistics.total(count), 0, "{count}");
    }
    for cause in Cause::ALL {
        assert_eq!(statistics.total(&format!("breach_{cause}")), 0, "{cause}");
    }
    assert!(statistics.total("interruption_timer_tick") > 0 || may_be_tickless());
    // And the tracer was not overlooked.
    assert_eq!(statistics.total("interruption_ptrace"), 1);
    kill(Pid::from_raw(program.0.id() as i32), Signal::SIGINT).expect("SIGINT");
    assert!(program.0.wait().expect("wait").success());
}
