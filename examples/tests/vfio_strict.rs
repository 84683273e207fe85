//! `l2fwd` over PCI functions for a minute, with Linux's own drivers at the other ends of the cables: only in the
//! guest (`cargo xtask kernel test vfio_strict`; with `--stock` on a kernel without the series).
//!
//! ```text
//! namespace left: kernel -- hub -- [l2fwd, strict] -- hub -- kernel: namespace right
//! ```
//!
//! Where the kernel has task isolation nothing may enter it on the worker's CPU, by the worker's word, by the
//! kernel's counters and by tracing. Elsewhere the worker does what it must not do either (nothing), and what is
//! done to it is counted. What was counted is printed: it is the table in README.md.

use isoplane::drivers::vfio::Host;
use isoplane::isolation::{Backend, Cause};
use isoplane::memory::stats::{SegmentReader, find};
use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{CpuWitness, FlowReport, Machine, Namespace};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long nothing may happen.
const WATCH: Duration = Duration::from_secs(60);
/// The worker's CPU, the guest's last.
const CPU: u32 = 3;

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

/// A function that VFIO has until this is dropped.
struct Bound(String);

impl Drop for Bound {
    fn drop(&mut self) {
        // Workers of a program that was killed have it for a moment still.
        let start = Instant::now();
        while let Err(error) = Host::default().unbind(&self.0) {
            if start.elapsed() > Duration::from_secs(20) {
                eprintln!("{error}");
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn segment(program: &mut Program) -> SegmentReader {
    let start = Instant::now();
    loop {
        let found = find(Some("l2fwd")).expect("/proc");
        if let Some(found) = found.into_iter().find(|f| f.pid == program.0.id())
            && found.reader.total("turns") > 0
            && found.reader.total("pid") != 0
            && found.reader.total("armed") != 0
        {
            return found.reader;
        }
        assert!(program.0.try_wait().expect("wait").is_none(), "l2fwd has ended");
        assert!(start.elapsed() < Duration::from_secs(60), "l2fwd does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn silent_over(kind: &str) {
    if std::env::var_os("ISOPLANE_GUEST").is_none() {
        println!("not here: this is about the guest, see cargo xtask kernel test");
        return;
    }
    let host = Host::default();
    let mut machine = Machine::open().expect("a monitor");
    let [left, ours, others, right] =
        [0, 1, 2, 3].map(|n| machine.address(&format!("{kind}{n}")).expect("a device of that name"));
    drop(machine);

    // Linux's ends.
    let [left_space, right_space] = [(); 2].map(|()| Namespace::new().expect("namespace"));
    let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    let home = Namespace::current().expect("a namespace");
    let ends = [(&left, &left_space, addresses[0]), (&right, &right_space, addresses[1])];
    let links = ends.map(|(device, space, address)| {
        let name = host.describe(device).expect("a device").interfaces.remove(0);
        let link = home.link(&name).and_then(|link| link.move_to(space)).expect("moved");
        link.add_address(address.into(), 24).expect("an address");
        link.up().expect("up");
        link
    });

    // Ours.
    let bound = [ours, others].map(|address| {
        host.bind(&address, false).unwrap_or_else(|error| panic!("{error}"));
        Bound(address)
    });
    // Before the worker is isolated: it would be told of it.
    let mut witness = CpuWitness::of(CPU).expect("a witness");
    let mut l2fwd_command = Command::new("taskset");
    l2fwd_command.args(["-c", &format!("0,{CPU}")]).arg(l2fwd()).args(bound.iter().map(|b| &b.0));
    let mut program = Program(l2fwd_command.stdout(Stdio::piped()).spawn().expect("taskset"));
    let statistics = segment(&mut program);
    for link in &links {
        assert!(link.wait_running(Duration::from_secs(30)).expect("a link"), "{}: no carrier", link.name());
    }
    let worker = statistics.total("pid");
    let number = u32::try_from(statistics.total("isolation_backend")).expect("a number");
    let backend = Backend::from_number(number).expect("a backend");

    let flows = [Flow::Echo { window: 4, largest: 1400 }, Flow::Datagrams { window: 8, largest: 1472 }];
    let end = |space, address: Ipv4Addr| Endpoint { namespace: space, address: address.into() };
    let [from, to] = [end(&left_space, addresses[0]), end(&right_space, addresses[1])];
    // The worker has come to its CPU in the meantime: the witness is not blind.
    let before = witness.seen().expect("what it saw");
    assert!(before.traced > 0 && before.interrupts() > 0, "{before:?}");
    witness.forget().expect("what it saw");
    let traffic = Traffic::start(from, to, &flows).expect("traffic");
    std::thread::sleep(WATCH);
    let reports = traffic.stop();
    let seen = witness.seen().expect("what it saw");

    let interruptions: Vec<String> = Cause::ALL
        .iter()
        .map(|cause| (cause, statistics.total(&format!("interruption_{cause}"))))
        .filter(|(_, count)| *count > 0)
        .map(|(cause, count)| format!("{count} {cause}"))
        .collect();
    let breaches: u64 = Cause::ALL.iter().map(|cause| statistics.total(&format!("breach_{cause}"))).sum();
    let verified: u64 = reports.iter().map(|report| report.counts.verified).sum();
    let (rx, tx) = (statistics.total("rx_frames"), statistics.total("tx_frames"));
    // Past the harness, which keeps what tests that pass print.
    let _ = writeln!(
        std::io::stderr(),
        "\n{kind} | {backend} | {} s | frames in {rx}, out {tx}, messages verified {verified} | \
         interrupts {:?} | trace events {} | breaches {breaches} | counted by isoplane: {interruptions:?}",
        WATCH.as_secs(),
        seen.interrupts,
        seen.traced,
    );

    // All came back; what came when it was no longer waited for says how busy this machine was.
    let whole = |report: &FlowReport| {
        let counts = &report.counts;
        counts.verified > 0 && counts.lost == counts.late && counts.corrupt == 0 && report.errors.is_empty()
    };
    assert!(reports.iter().all(whole), "{reports:?}");
    assert!(rx >= 2 * verified, "{rx} frames for {verified} messages with answers");
    assert_eq!(rx, tx, "what came in went out");
    assert_eq!(statistics.total("pid"), worker, "it was one worker all the time");
    for count in ["worker_syscalls", "worker_page_faults", "slow_path_visits", "bad_descriptors"] {
        assert_eq!(statistics.total(count), 0, "{count}");
    }
    for reason in isoplane::DropReason::NAMES {
        assert_eq!(statistics.total(reason), 0, "{reason}");
    }
    assert_eq!(breaches, 0);
    if backend == Backend::TaskIsolation {
        assert!(seen.interrupts.is_empty(), "{seen:?}\n{}", witness.trace(40).unwrap_or_default());
        assert_eq!(seen.traced, 0, "{}", witness.trace(40).unwrap_or_default());
        assert!(interruptions.is_empty(), "{interruptions:?}");
    }

    kill(Pid::from_raw(program.0.id().cast_signed()), Signal::SIGINT).expect("SIGINT");
    let mut said = String::new();
    program.0.stdout.take().expect("a pipe").read_to_string(&mut said).expect("its last words");
    assert!(program.0.wait().expect("wait").success(), "{said}");
    let words: Vec<&str> = said.split_whitespace().collect();
    assert!(words.len() > 2 && words[0] == words[2], "frames: {said}");
}

#[test]
fn l2fwd_over_virtio_net_is_left_alone() {
    silent_over("virtio");
}

#[test]
fn l2fwd_over_an_82574l_is_left_alone() {
    silent_over("e1000e");
}
