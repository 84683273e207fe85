//! `isoplane noise` as a user runs it: real processes on a real CPU, and nothing left behind.

use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const ISOPLANE: &str = env!("CARGO_BIN_EXE_isoplane");

/// Each measurement wants the same CPU, so they run one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The CPU to measure, and one that is left for everybody else; `None`, with the reason said, where there
/// is no second one.
fn cpus() -> Option<(MutexGuard<'static, ()>, usize, usize)> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let ours: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    let [other, .., measured] = ours[..] else {
        eprintln!("skipped: a measurement needs a CPU of its own and one for everybody else");
        return None;
    };
    Some((ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner), measured, other))
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(ISOPLANE);
    command.arg("noise").args(args).stdin(Stdio::null());
    command
}

fn noise(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error} in {:?}; on standard error: {}", text(&output.stdout), text(&output.stderr))
    })
}

/// A command that runs; killed when the test ends early.
struct Running(Option<Child>);

impl Running {
    fn start(args: &[&str]) -> Self {
        let child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self(Some(child))
    }

    fn pid(&self) -> u32 {
        self.0.as_ref().unwrap().id()
    }

    fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    fn output(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

fn wait_until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Parent and state of a process, from `/proc/PID/stat`.
fn stat(pid: u32) -> Option<(u32, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut rest = stat.rsplit_once(')')?.1.split_whitespace();
    let state = rest.next()?.chars().next()?;
    Some((rest.next()?.parse().ok()?, state))
}

/// Dead, or dead and waiting for a parent that never asks.
fn is_gone(pid: u32) -> bool {
    stat(pid).is_none_or(|(_, state)| matches!(state, 'Z' | 'X'))
}

/// All that descends from a process now.
fn descendants(of: u32) -> BTreeSet<u32> {
    let all: Vec<(u32, u32)> = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?.0)))
        .collect();
    let mut found = BTreeSet::from([of]);
    loop {
        let more: Vec<u32> = all
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|it| it.0)
            .collect();
        if more.is_empty() {
            found.remove(&of);
            return found;
        }
        found.extend(more);
    }
}

/// The child that measures: the one that may run on that CPU and no other.
fn spinner(of: u32, cpu: usize) -> Option<u32> {
    descendants(of).into_iter().find(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == format!("Cpus_allowed_list:\t{cpu}"))
    })
}

/// Numbers that must agree with each other.
fn check(measurement: &Value, mode: &str) {
    assert_eq!(measurement["mode"], mode);
    let gaps = &measurement["gaps"];
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} in {measurement}"));
    let count = number(&gaps["count"]);
    let buckets = gaps["histogram"].as_array().unwrap();
    assert_eq!(buckets.iter().map(|bucket| number(&bucket["count"])).sum::<u64>(), count);
    let bounds: Vec<u64> =
        buckets.iter().flat_map(|bucket| [number(&bucket["from_ns"]), number(&bucket["to_ns"])]).collect();
    assert!(bounds.is_sorted(), "{bounds:?}");
    assert!(number(&gaps["steps"]) > 1000);
    assert!(number(&gaps["threshold_ns"]) >= 200);
    if count > 0 {
        let percentiles: Vec<u64> = ["p50_ns", "p99_ns", "p99_9_ns", "p99_99_ns", "max_ns"]
            .map(|name| number(&gaps["percentiles"][name]))
            .to_vec();
        assert!(percentiles.is_sorted(), "{percentiles:?}");
        assert!(number(&gaps["total_ns"]) >= percentiles[4]);
        let longest = gaps["longest"].as_array().unwrap();
        assert!(longest.iter().any(|gap| number(&gap["ns"]) == percentiles[4]));
        let seconds = measurement["seconds"].as_f64().unwrap();
        assert!(longest.iter().all(|gap| gap["at_seconds"].as_f64().unwrap() <= seconds));
    }
    for kind in ["interruptions", "breaches"] {
        let counts = measurement[kind].as_object().unwrap();
        for cause in ["syscall", "page_fault", "timer_tick", "reschedule", "tlb_shootdown", "preemption"] {
            assert!(counts[cause].is_u64(), "{kind}: {cause}");
        }
    }
    if mode == "none" {
        assert_eq!(measurement["backend"], Value::Null);
    } else {
        assert!(
            ["dispatch", "advisory", "task-isolation"].contains(&measurement["backend"].as_str().unwrap())
        );
        assert!(
            !measurement["weaknesses"].as_array().unwrap().is_empty()
                || measurement["backend"] == "task-isolation"
        );
    }
    // A loop that reads a clock does nothing that anybody could forbid.
    for cause in ["syscall", "page_fault"] {
        assert_eq!(measurement["breaches"][cause], 0, "{cause}");
    }
    assert_eq!(measurement["page_faults"], 0);
}

#[test]
fn one_mode_is_measured_and_said_in_json() {
    let Some((_alone, cpu, other)) = cpus() else { return };
    let output = noise(&["--cpu", &cpu.to_string(), "--seconds", "1", "--mode", "strict", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = json(&output);
    assert_eq!((&report["cpu"], &report["seconds"]), (&cpu.into(), &1.into()));
    assert_eq!(report["ended"], "time");
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0));
    let housekeeping = report["housekeeping_cpus"].as_array().unwrap();
    assert!(housekeeping.contains(&other.into()) && !housekeeping.contains(&cpu.into()));
    let [measurement] = &report["measurements"].as_array().unwrap()[..] else { panic!("{report}") };
    check(measurement, "strict");
    assert!(measurement["seconds"].as_f64().unwrap() >= 1.0);
    assert_eq!(measurement["load"], Value::Null);
}

#[test]
fn both_modes_are_drawn_into_one_picture() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("noise.svg");
    let number = cpu.to_string();
    let output = noise(&["--cpu", &number, "--seconds", "1", "--svg", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let header = said.lines().find(|line| line.contains("none")).unwrap_or_else(|| panic!("{said}"));
    assert!(header.contains("strict"), "{said}");
    for row in ["backend", "lost time", "gap p50", "gap p99.99", "longest gap"] {
        assert!(said.contains(row), "{row}: {said}");
    }
    let svg = fs::read_to_string(&file).unwrap();
    let document = roxmltree::Document::parse(&svg).unwrap();
    let texts: Vec<&str> = document
        .descendants()
        .filter(|node| node.has_tag_name("text"))
        .filter_map(|node| node.text())
        .collect();
    for part in [
        "none (no isolation): ",
        "strict (strict isolation): ",
        &format!("on CPU {number}"),
        "length of a gap",
    ] {
        assert!(texts.iter().any(|text| text.contains(part)), "{part}: {texts:?}");
    }
}

#[test]
fn a_competitor_on_the_cpu_is_counted() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let number = cpu.to_string();
    let competitor = format!("exec taskset -c {cpu} sh -c 'while :; do :; done'");
    let output =
        noise(&["--cpu", &number, "--seconds", "2", "--mode", "none", "--json", "--load", &competitor]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let measurement = &json(&output)["measurements"][0];
    check(measurement, "none");
    assert!(measurement["interruptions"]["preemption"].as_u64().unwrap() > 0, "{measurement}");
    assert!(measurement["run_delay_ns"].as_u64().unwrap() > 0, "{measurement}");
    assert!(measurement["gaps"]["count"].as_u64().unwrap() > 0);
    let load = &measurement["load"];
    assert_eq!((&load["command"], &load["exit_status"]), (&Value::from(competitor), &Value::Null));
    assert_eq!(load["ended_after_seconds"], Value::Null);
}

#[test]
fn who_sends_interrupts_is_named() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let number = cpu.to_string();
    // Wakes a sleeper on the measured CPU again and again, from another one.
    let load = format!("taskset -c {cpu} sleep 1000 & while :; do kill -STOP $!; kill -CONT $!; done");
    let output = noise(&["--cpu", &number, "--seconds", "2", "--mode", "none", "--json", "--load", &load]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let measurement = &json(&output)["measurements"][0];
    let sent = measurement["ipi_senders"].as_array().unwrap();
    let by_load = sent.iter().any(|it| it["comm"] == "sh" && it["count"].as_u64() > Some(0));
    let not_observed = measurement["not_observed"].as_array().unwrap();
    if not_observed.iter().any(|it| it.as_str().unwrap().starts_with("senders of IPIs are not named")) {
        assert!(sent.is_empty());
        eprintln!("skipped: {not_observed:?}");
    } else {
        assert!(by_load, "{sent:?}");
        let seen = &measurement["interruptions"];
        let of = |cause: &str| seen[cause].as_u64().unwrap();
        assert!(of("reschedule") + of("function_call") > 0, "{seen}");
    }
}

#[test]
fn the_load_runs_beside_and_ends_with_everything_it_started() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (own, strays) = (path("own"), path("strays"));
    let load = format!(
        "echo this is no result; grep Cpus_allowed_list: /proc/self/status > {own}; \
         sleep 1000 & echo $! >> {strays}; setsid sleep 1000 & (trap '' TERM; sleep 1000) & \
         sh -c 'setsid sleep 1000 & echo $! >> {strays}'; echo $$ >> {strays}; wait",
        own = own.display(),
        strays = strays.display(),
    );
    let number = cpu.to_string();
    let run =
        Running::start(&["--cpu", &number, "--seconds", "2", "--mode", "none", "--json", "--load", &load]);
    let found = wait_until("the load", || {
        let lines = fs::read_to_string(&strays).unwrap_or_default();
        (lines.lines().count() == 3).then(|| descendants(run.pid()))
    });
    // The measuring process, the keeper, sh, and its sleepers.
    assert!(found.len() >= 6, "{found:?}");
    let output = run.output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("this is no result"));
    let report = json(&output);
    let list = fs::read_to_string(&own).unwrap();
    let list = list.split_whitespace().nth(1).unwrap();
    let expected: Vec<String> =
        report["housekeeping_cpus"].as_array().unwrap().iter().map(ToString::to_string).collect();
    if let [only] = &expected[..] {
        assert_eq!(list, only);
    }
    assert_ne!(list, number);
    let named = fs::read_to_string(&strays).unwrap();
    for pid in found.into_iter().chain(named.lines().map(|pid| pid.parse().unwrap())) {
        assert!(is_gone(pid), "{pid} is left");
    }
}

#[test]
fn a_load_that_fails_is_an_error_with_its_reason() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let number = cpu.to_string();
    for (load, reason, status) in [
        ("exit 3", "the load ended with exit status 3", Value::from(3)),
        ("no-such-command-anywhere", "the load's command was not found", Value::from(127)),
        ("/", "the load's command cannot be executed", Value::from(126)),
        ("kill -KILL $$", "the load was killed by SIGKILL", Value::Null),
    ] {
        let output =
            noise(&["--cpu", &number, "--seconds", "60", "--mode", "none", "--json", "--load", load]);
        assert_eq!(output.status.code(), Some(1), "{load}");
        assert!(text(&output.stderr).contains(reason), "{load}: {}", text(&output.stderr));
        let report = json(&output);
        assert_eq!(report["ended"], "failure");
        assert!(report["problems"][0].as_str().unwrap().contains(reason), "{report}");
        let measurement = &report["measurements"][0];
        assert_eq!(measurement["load"]["exit_status"], status, "{load}");
        assert!(measurement["load"]["ended_after_seconds"].is_f64());
        assert!(measurement["seconds"].as_f64().unwrap() < 60.0);
    }
    let output = noise(&["--cpu", &number, "--seconds", "1", "--mode", "none", "--load", "true"]);
    assert_eq!(output.status.code(), Some(0), "a load may be done early");
    assert!(
        text(&output.stdout).contains("none: the load ended by itself after"),
        "{}",
        text(&output.stdout)
    );
}

#[test]
fn an_interrupt_ends_it_early_with_what_was_measured() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let number = cpu.to_string();
    let run =
        Running::start(&["--cpu", &number, "--seconds", "600", "--json", "--load", "echo begun; sleep 1000"]);
    let measuring = wait_until("the load", || {
        let all = descendants(run.pid());
        (all.len() >= 3).then_some(all)
    });
    run.signal(Signal::SIGINT);
    let output = run.output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report = json(&output);
    assert_eq!(report["ended"], "signal");
    let [measurement] = &report["measurements"].as_array().unwrap()[..] else { panic!("{report}") };
    check(measurement, "none");
    assert!(measurement["seconds"].as_f64().unwrap() < 600.0);
    for pid in measuring {
        assert!(is_gone(pid), "{pid} is left");
    }
}

#[test]
fn nothing_is_left_when_it_is_killed() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("noise.svg");
    let number = cpu.to_string();
    let load = "(trap '' TERM HUP; sleep 1000; sleep 1000) & setsid sleep 1000 & sleep 1000";
    let run = Running::start(&[
        "--cpu",
        &number,
        "--seconds",
        "600",
        "--load",
        load,
        "--svg",
        file.to_str().unwrap(),
    ]);
    // The measuring process, the keeper, sh, a subshell and three sleepers.
    let all = wait_until("the load", || {
        let all = descendants(run.pid());
        (all.len() >= 7).then_some(all)
    });
    run.signal(Signal::SIGKILL);
    assert!(!run.output().status.success());
    wait_until("everybody to be gone", || all.iter().all(|pid| is_gone(*pid)).then_some(()));
    assert!(!file.exists(), "no picture of nothing");
}

#[test]
fn the_measuring_process_that_dies_is_a_failure_with_what_it_had() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let number = cpu.to_string();
    let run = Running::start(&["--cpu", &number, "--seconds", "600", "--json", "--load", "sleep 1000"]);
    let all = wait_until("the load", || {
        let all = descendants(run.pid());
        (all.len() >= 3).then_some(all)
    });
    send(spinner(run.pid(), cpu).expect("a process on the CPU"), Signal::SIGKILL);
    let output = run.output();
    assert_eq!(output.status.code(), Some(1));
    let report = json(&output);
    assert_eq!(report["ended"], "failure");
    assert_eq!(report["problems"][0], "the measuring process was killed by SIGKILL");
    check(&report["measurements"][0], "none");
    assert!(all.into_iter().all(is_gone));
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_measured() {
    let Some((_alone, cpu, other)) = cpus() else { return };
    let (number, other) = (cpu.to_string(), other.to_string());
    let directory = tempfile::tempdir().unwrap();
    let no_directory = directory.path().join("no/noise.svg");
    let is_directory = directory.path();
    let refused = |args: &[&str], reason: &str| {
        let output = noise(&[args, &["--seconds", "600"]].concat());
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(text(&output.stderr).contains(reason), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "{args:?}");
    };
    refused(&["--cpu", "99999"], "there is no CPU 99999; this machine has");
    refused(&["--cpu", &number, "--svg", no_directory.to_str().unwrap()], "cannot write the plot to");
    refused(&["--cpu", &number, "--svg", is_directory.to_str().unwrap()], "cannot write the plot to");
    let within = |mask: &str, cpu: &str| {
        Command::new("taskset").args(["-c", mask, ISOPLANE, "noise", "--cpu", cpu]).output().unwrap()
    };
    let output = within(&number, &number);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("is the only one that this process may use"),
        "{}",
        text(&output.stderr)
    );
    if Path::new("/sys/devices/system/cpu/isolated").exists()
        && fs::read_to_string("/sys/devices/system/cpu/isolated").unwrap().trim().is_empty()
    {
        let output = within(&other, &number);
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.contains(&format!("CPU {number} is not ours")) && said.contains(&other), "{said}");
    } else {
        eprintln!("not here: with isolated CPUs, one that is not ours may still be asked for");
    }
    for (args, reason) in [
        (vec!["--seconds", "0", "--cpu", "0"], "from 1 to 86400"),
        (vec!["--seconds", "-1", "--cpu", "0"], "from 1 to 86400"),
        (vec!["--seconds", "86401", "--cpu", "0"], "from 1 to 86400"),
        (vec!["--seconds", "99999999999999999999", "--cpu", "0"], "from 1 to 86400"),
        (vec!["--seconds", "soon", "--cpu", "0"], "from 1 to 86400"),
        (vec!["--cpu", "-1"], "-1"),
        (vec!["--cpu", "one"], "one"),
        (vec![], "--cpu"),
        (vec!["--cpu", "0", "--mode", "some"], "none, strict, both"),
        (vec!["--cpu", "0", "--threshold", "0"], "--threshold"),
    ] {
        let output = noise(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(text(&output.stderr).contains(reason), "{args:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_picture_that_was_there_stays_until_there_is_a_new_one() {
    let Some((_alone, cpu, _)) = cpus() else { return };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("noise.svg");
    fs::write(&file, "the last one").unwrap();
    let number = cpu.to_string();
    let run = Running::start(&[
        "--cpu",
        &number,
        "--seconds",
        "600",
        "--load",
        "sleep 1000",
        "--svg",
        file.to_str().unwrap(),
    ]);
    wait_until("the load", || (descendants(run.pid()).len() >= 3).then_some(()));
    run.signal(Signal::SIGKILL);
    run.output();
    assert_eq!(fs::read_to_string(&file).unwrap(), "the last one");
}
