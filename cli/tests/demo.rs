//! The `isoplane` command as a user runs it: real processes, real signals, and nothing left behind.

use isoplane_lab::{Namespace, link};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const ISOPLANE: &str = env!("CARGO_BIN_EXE_isoplane");

/// Each demo has a worker that spins on the same CPU, so they run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The AF_XDP demo needs root. Elsewhere a test says that it did not run.
fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: AF_XDP and network namespaces need root");
    }
    root
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A demo that runs; killed when the test ends early, with everything it started.
struct Demo {
    child: Option<Child>,
}

impl Demo {
    fn start(args: &[&str]) -> Self {
        let child = Command::new(ISOPLANE)
            .arg("demo")
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child: Some(child) }
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Program, zygote and worker, once traffic is being forwarded.
    fn processes(&self) -> [u32; 3] {
        let program = self.pid();
        wait_until("forwarding", || {
            let found = isoplane::memory::stats::find(Some("demo")).unwrap();
            found.iter().any(|f| f.pid == program && f.reader.total("tx_frames") > 100)
        });
        let zygote = only_child(program);
        [program, zygote, only_child(zygote)]
    }

    fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    fn output(mut self) -> Output {
        self.child.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

/// Parent and state of a process, from `/proc/PID/stat`.
fn stat(pid: u32) -> Option<(u32, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut rest = stat.rsplit_once(')')?.1.split_whitespace();
    let state = rest.next()?.chars().next()?;
    Some((rest.next()?.parse().ok()?, state))
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").unwrap().flatten().filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn only_child(of: u32) -> u32 {
    let mut children = pids().filter(|pid| stat(*pid).is_some_and(|(parent, _)| parent == of));
    let child = children.next().expect("a child process");
    assert_eq!(children.next(), None, "of {of}");
    child
}

/// Dead, or dead and waiting for a parent that never asks.
fn is_gone(pid: u32) -> bool {
    stat(pid).is_none_or(|(_, state)| matches!(state, 'Z' | 'X'))
}

/// Things without a name that a process holds by descriptor.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    /// Network namespaces other than our own.
    namespaces: BTreeSet<u64>,
    /// Device and inode of memfds.
    memory: BTreeSet<(u64, u64)>,
}

impl Held {
    fn by(pid: u32) -> Self {
        let mut held = Self::default();
        let home = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let mut note = |path: &Path| {
            let (Ok(target), Ok(meta)) = (fs::read_link(path), fs::metadata(path)) else { return };
            let target = target.to_string_lossy();
            if target.starts_with("net:[") && meta.ino() != home {
                held.namespaces.insert(meta.ino());
            } else if target.starts_with("/memfd:") {
                held.memory.insert((meta.dev(), meta.ino()));
            }
        };
        let process = Path::new("/proc").join(pid.to_string());
        for directory in ["fd", "map_files"] {
            for entry in fs::read_dir(process.join(directory)).into_iter().flatten().flatten() {
                note(&entry.path());
            }
        }
        for task in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
            note(&task.path().join("ns/net"));
        }
        held
    }

    /// What of this any process still holds.
    fn remains(&self) -> Self {
        let mut remains = Self::default();
        for held in pids().map(Self::by) {
            remains.namespaces.extend(held.namespaces.intersection(&self.namespaces));
            remains.memory.extend(held.memory.intersection(&self.memory));
        }
        remains
    }
}

/// Numbers of the XDP programs in the namespaces that a process holds.
fn xdp_programs(pid: u32) -> BTreeSet<u32> {
    let home = Namespace::current().unwrap().inode();
    let mut programs = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("net:[") {
            let namespace = Namespace::open(&entry.path()).unwrap();
            if namespace.inode() != home {
                programs.extend(namespace.links().unwrap().iter().filter_map(|l| l.xdp_program));
            }
        }
    }
    programs
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!(
            "{error}\nstdout: {}\nstderr: {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

/// Everything that a report of a run without trouble says.
fn check_report(report: &Value, driver: &str) {
    assert_eq!(report["problems"], Value::Array(vec![]), "{report:#}");
    assert_eq!(report["frames_lost"], 0);
    assert!(report["frames_forwarded"].as_u64().unwrap() > 0);
    assert!(report["pps"].as_f64().unwrap() > 0.0);
    let (p50, p99) = (report["rtt_p50_us"].as_f64().unwrap(), report["rtt_p99_us"].as_f64().unwrap());
    assert!(0.0 < p50 && p50 <= p99);
    let by_policy: u64 =
        ["policy", "vlan", "storm"].iter().map(|name| report["drops"][name].as_u64().unwrap()).sum();
    assert_eq!(
        report["frames_received"].as_u64().unwrap(),
        report["frames_forwarded"].as_u64().unwrap() + by_policy
    );
    assert!(report["driver"].as_str().unwrap().starts_with(driver), "{}", report["driver"]);
    assert_eq!(report["placement"], "process");
    assert_eq!(report["pool_frames_missing"], 0);
    for flow in report["traffic"].as_array().unwrap() {
        assert!(flow["verified"].as_u64().unwrap() > 0, "{flow}");
        assert_eq!((&flow["lost"], &flow["corrupt"]), (&Value::from(0), &Value::from(0)), "{flow}");
    }
}

#[test]
fn the_demo_moves_kernel_traffic_and_says_so() {
    if !root() {
        return;
    }
    let _alone = alone();
    let output = Demo::start(&["--seconds", "2", "--json"]).output();
    let report = json(&output);
    check_report(&report, "af_xdp");
    assert!(output.status.success());
    assert_eq!(report["ended"], "time");
    assert!(report["seconds"].as_f64().unwrap() >= 2.0);
    let protocols: Vec<_> =
        report["traffic"].as_array().unwrap().iter().map(|f| f["protocol"].as_str().unwrap()).collect();
    assert_eq!(protocols, ["ICMP", "UDP", "TCP"]);
    // Requests and their answers all crossed the bridge, and the answers' bytes were as they should be.
    let messages = |at: usize| report["traffic"][at]["verified"].as_u64().unwrap();
    assert!(report["frames_forwarded"].as_u64().unwrap() >= 2 * (messages(0) + messages(1)));
}

#[test]
fn either_may_kick() {
    if !root() {
        return;
    }
    let _alone = alone();
    for kicks in ["inline", "kicker"] {
        let report = json(&Demo::start(&["--seconds", "1", "--json", "--kicks", kicks]).output());
        check_report(&report, "af_xdp");
        assert_eq!(report["kicks"], kicks);
    }
}

#[test]
fn the_tables_say_the_same() {
    if !root() {
        return;
    }
    let _alone = alone();
    let output = Demo::start(&["--seconds", "1"]).output();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    for part in ["af_xdp", "to-client", "to-server", "ICMP", "UDP", "TCP", "pps", "rtt p50", "0 lost"] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "", "nothing to say about a run without trouble");
}

#[test]
fn an_interrupt_ends_it_in_order() {
    if !root() {
        return;
    }
    let _alone = alone();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let demo = Demo::start(&["--seconds", "600", "--json"]);
        let [program, zygote, worker] = demo.processes();
        let held = Held::by(program);
        demo.signal(signal);
        let output = demo.output();
        let report = json(&output);
        check_report(&report, "af_xdp");
        assert_eq!(report["ended"], "signal");
        assert!(output.status.success());
        assert!(is_gone(zygote) && is_gone(worker));
        assert_eq!(held.remains(), Held::default());
    }
}

#[test]
fn nothing_is_left_when_any_of_its_processes_is_killed() {
    if !root() {
        return;
    }
    let _alone = alone();
    for victim in ["program", "zygote", "worker"] {
        let demo = Demo::start(&["--seconds", "600", "--json"]);
        let [program, zygote, worker] = demo.processes();
        let held = Held::by(program);
        assert_eq!(held.namespaces.len(), 3, "{victim}");
        assert!(held.memory.len() >= 2, "pool and statistics: {held:?}");
        let programs = xdp_programs(program);
        assert_eq!(programs.len(), 2, "one for each port");
        assert!(programs.iter().all(|id| link::xdp_program_exists(*id).unwrap()));
        match victim {
            "program" => {
                demo.signal(Signal::SIGKILL);
                assert!(demo.output().stdout.is_empty());
            }
            "zygote" => {
                send(zygote, Signal::SIGKILL);
                let output = demo.output();
                assert_eq!(output.status.code(), Some(1));
                let report = json(&output);
                assert_eq!(report["ended"], "failure");
                assert!(report["problems"][0].as_str().unwrap().contains("zygote"), "{report:#}");
            }
            _ => {
                send(worker, Signal::SIGKILL);
                // Another one takes its place, and its frames, and goes on forwarding.
                wait_until("a new worker", || {
                    let new = pids().find(|p| stat(*p).is_some_and(|(parent, _)| parent == zygote));
                    new.is_some_and(|pid| pid != worker)
                });
                let forwarded = || {
                    let found = isoplane::memory::stats::find(Some("demo")).unwrap();
                    let reader = found.into_iter().find(|f| f.pid == program);
                    reader.map_or(0, |f| f.reader.total("tx_frames"))
                };
                let before = forwarded();
                wait_until("forwarding again", || forwarded() > before + 1000);
                demo.signal(Signal::SIGINT);
                let report = json(&demo.output());
                assert_eq!(report["worker_restarts"], 1);
                assert_eq!(report["pool_frames_missing"], 0);
            }
        }
        wait_until("the end of all processes", || [program, zygote, worker].into_iter().all(is_gone));
        wait_until("the end of namespaces and memory", || held.remains() == Held::default());
        wait_until("the end of the XDP programs", || {
            !programs.iter().any(|id| link::xdp_program_exists(*id).unwrap())
        });
    }
    // And the next one starts as if nothing had happened.
    let output = Demo::start(&["--seconds", "1", "--json"]).output();
    check_report(&json(&output), "af_xdp");
}

#[test]
fn without_root_it_says_so_and_bridges_memory() {
    if !root() {
        return;
    }
    let _alone = alone();
    // Somewhere that everybody may read.
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = place.path().join("isoplane");
    fs::copy(ISOPLANE, &copy).unwrap();
    let output = Command::new(&copy)
        .args(["demo", "--seconds", "1", "--json"])
        .current_dir("/")
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    check_report(&json(&output), "memory");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("not root") && said.contains("in-memory"), "{said}");
    assert!(output.status.success());
    // Asked for by name it is refused, and told why.
    let output = Command::new(&copy)
        .args(["demo", "--seconds", "1", "--ports", "af-xdp"])
        .current_dir("/")
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("needs root") && said.contains("--ports memory"), "{said}");
}

/// Runs the demo as root without some capabilities, as a container does.
fn without(capabilities: &str, args: &[&str]) -> Output {
    Command::new("setpriv")
        .arg(format!("--bounding-set={capabilities}"))
        .args([ISOPLANE, "demo", "--seconds", "1"])
        .args(args)
        .output()
        .expect("setpriv, of util-linux")
}

#[test]
fn root_of_a_plain_container_gets_the_demo_too() {
    if !root() {
        return;
    }
    let _alone = alone();
    // Namespaces are refused; everything is; sockets are, once namespaces and links are made.
    for capabilities in ["-sys_admin", "-all", "-net_raw"] {
        let output = without(capabilities, &["--json"]);
        check_report(&json(&output), "memory");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.matches("in-memory").count(), 1, "{capabilities}: {said}");
        assert!(said.contains("CAP_"), "{capabilities}: the reason is not in: {said}");
        assert!(output.status.success());
        // Asked for by name it is refused, and told what would run.
        let output = without(capabilities, &["--ports", "af-xdp"]);
        assert_eq!(output.status.code(), Some(1), "{capabilities}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("CAP_") && said.contains("--ports memory"), "{capabilities}: {said}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let _alone = alone();
    // Ten minutes of tables that nobody sees are not run at all.
    for args in [
        &["demo", "--ports", "memory", "--seconds", "600"][..],
        &["demo", "--ports", "memory", "--seconds", "1", "--json"],
    ] {
        let mut child =
            Command::new(ISOPLANE).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut demo = Demo { child: Some(child) };
        wait_until("the end", || demo.child.as_mut().unwrap().try_wait().unwrap().is_some());
        let output = demo.output();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
        assert!(output.status.success(), "{args:?}: {:?}", output.status);
    }
    let demo = Demo::start(&["--seconds", "600", "--json", "--ports", "memory"]);
    demo.processes();
    for args in [&["top", "--once"][..], &["top", "--once", "--json"], &["top", "--interval", "0.05"]] {
        let mut child =
            Command::new(ISOPLANE).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
        assert!(output.status.success(), "{args:?}: {:?}", output.status);
    }
    demo.signal(Signal::SIGINT);
    check_report(&json(&demo.output()), "memory");
}

#[test]
fn memory_ports_need_nothing() {
    let _alone = alone();
    let output = Demo::start(&["--seconds", "1", "--json", "--ports", "memory"]).output();
    check_report(&json(&output), "memory");
    assert!(output.status.success());
}

fn top(args: &[&str]) -> Output {
    Command::new(ISOPLANE).arg("top").args(args).output().unwrap()
}

#[test]
fn top_shows_a_running_demo() {
    let _alone = alone();
    let demo = Demo::start(&["--seconds", "600", "--json", "--ports", "memory"]);
    let [program, _, worker] = demo.processes();
    let all = json(&top(&["demo", "--once", "--json"]));
    let shown = all["dataplanes"].as_array().unwrap().iter().find(|d| d["pid"] == program).unwrap();
    assert_eq!(shown["name"], "demo");
    assert!(shown["tx_pps"].as_f64().unwrap() > 0.0, "{shown:#}");
    let bridge = &shown["workers"][0];
    assert_eq!(
        (&bridge["name"], &bridge["state"], &bridge["pid"], &bridge["restarts"]),
        (&Value::from("bridge"), &Value::from("running"), &Value::from(worker), &Value::from(0))
    );
    assert!(bridge["turns_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(bridge["app"]["stations"], 2);
    assert_eq!(bridge["drops"]["malformed"], 0);
    let isolation = &bridge["isolation"];
    let backend = isolation["backend"].as_str().unwrap();
    assert!(["dispatch", "advisory", "task-isolation"].contains(&backend), "{isolation:#}");
    assert_eq!(isolation["breaches"]["total"], 0, "{isolation:#}");
    assert!(isolation["interruptions"]["total"].is_u64() && isolation["armed"] == 1, "{isolation:#}");
    let ports: Vec<_> = bridge["ports"].as_array().unwrap().iter().map(|p| p["name"].clone()).collect();
    assert_eq!(ports, ["to-client", "to-server"]);
    assert!(bridge["ports"][0]["rx_frames"].as_u64().unwrap() > 0);
    let text = String::from_utf8(top(&["--once"]).stdout).unwrap();
    let isolated = format!("bridge: isolation: backend {backend} · ");
    for part in ["demo", "bridge", "running", "to-client", "to-server", "drops: none", &isolated] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    // Without a terminal it prints again and again, until nobody reads any more or nothing runs.
    let mut stream = Command::new(ISOPLANE)
        .args(["top", "demo", "--json", "--interval", "0.05"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(stream.stdout.take().unwrap()));
    let mut frames = Vec::new();
    for line in lines {
        let all: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let shown = all["dataplanes"].as_array().unwrap().iter().find(|d| d["pid"] == program).unwrap();
        frames.push(shown["workers"][0]["ports"][0]["rx_frames"].as_u64().unwrap());
        // A busy machine may let the demo wait; in the end it moves on, and one line more is too many.
        if frames.len() > 2 && frames[0] < frames[frames.len() - 1] || frames.len() > 400 {
            break;
        }
    }
    assert!(frames.is_sorted() && frames[0] < frames[frames.len() - 1], "{frames:?}");
    assert!(stream.wait().unwrap().success());
    demo.signal(Signal::SIGINT);
    check_report(&json(&demo.output()), "memory");
}

#[test]
fn mistakes_are_explained() {
    let output = top(&["no-such-dataplane", "--once"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("no-such-dataplane"), "{said}");
    for args in [
        &["demo", "--seconds", "0"][..],
        &["demo", "--ports", "token-ring"],
        &["top", "--interval", "0"],
        &[],
    ] {
        let output = Command::new(ISOPLANE).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty());
    }
}
