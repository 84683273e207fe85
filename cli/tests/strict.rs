//! The demo is strict: no system call and no page fault in its worker's loop, by its own word and by that of
//! tracers outside. (`tests/strict.rs` of the end-to-end tests shows that these tracers see what there is.)

use isoplane_lab::{Seen, Witnesses};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ISOPLANE: &str = env!("CARGO_BIN_EXE_isoplane");

/// How long nothing may be seen.
const WATCH: Duration = Duration::from_secs(10);

/// Killed when the test ends early; what it started goes with it.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The demo of this process in what `isoplane top` shows.
fn shown(program: u32) -> Option<Value> {
    let output = Command::new(ISOPLANE).args(["top", "demo", "--once", "--json"]).output().unwrap();
    let all: Value = serde_json::from_slice(&output.stdout).ok()?;
    all["dataplanes"].as_array()?.iter().find(|d| d["pid"] == program).cloned()
}

/// Its worker, once that forwards.
fn worker(program: u32) -> Value {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < Duration::from_secs(30), "the demo does not forward");
        if let Some(worker) = shown(program).map(|d| d["workers"][0].clone())
            && worker["ports"][0]["tx_frames"].as_u64().is_some_and(|n| n > 100)
        {
            return worker;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether the kernel may stop the tick of some CPU, so that none need be seen.
fn may_be_tickless() -> bool {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/nohz_full").unwrap_or_default();
    !matches!(list.trim(), "" | "(null)")
}

#[test]
fn the_demo_enters_the_kernel_neither_by_its_word_nor_by_that_of_others() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: AF_XDP and network namespaces need root");
        return;
    }
    let cpus = sched_getaffinity(Pid::from_raw(0)).unwrap();
    if (0..CpuSet::count()).filter(|cpu| cpus.is_set(*cpu) == Ok(true)).count() < 2 {
        eprintln!("skipped: with one CPU the demo's worker has to give it away by system calls");
        return;
    }
    let child = Command::new(ISOPLANE)
        .args(["demo", "--seconds", "600", "--json", "--ports", "af-xdp"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut demo = Demo(child);
    let program = demo.0.id();
    let before = worker(program);
    if before["isolation"]["backend"] != "dispatch" {
        eprintln!("skipped: no backend here catches system calls and page faults");
        return;
    }
    let pid = before["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap();
    let witnesses = Witnesses::attach(pid).unwrap();
    std::thread::sleep(WATCH);
    assert_eq!(witnesses.detach().unwrap(), Seen::default());
    let after = worker(program);
    assert_eq!(after["pid"], before["pid"], "it was one worker all the time");
    let frames = |worker: &Value| worker["ports"][0]["tx_frames"].as_u64().unwrap();
    assert!(frames(&after) > frames(&before), "and it worked");

    kill(Pid::from_raw(program as i32), Signal::SIGINT).unwrap();
    let mut stdout = demo.0.stdout.take().unwrap();
    let report: Value = serde_json::from_reader(&mut stdout).unwrap();
    assert!(demo.0.wait().unwrap().success(), "{report:#}");
    assert_eq!(report["problems"], Value::Array(vec![]), "{report:#}");
    assert_eq!(report["backend"], "dispatch");
    for count in ["worker_syscalls", "worker_page_faults", "slow_path_visits", "worker_restarts"] {
        assert_eq!(report[count], 0, "{count}: {report:#}");
    }
    let breaches: Vec<u64> =
        report["breaches"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).collect();
    assert!(!breaches.is_empty() && breaches.iter().all(|n| *n == 0), "{report:#}");
    let interruptions = |cause: &str| report["interruptions"][cause].as_u64().unwrap();
    assert!(interruptions("timer_tick") > 0 || may_be_tickless(), "{report:#}");
    // And the tracer was not overlooked.
    assert_eq!(interruptions("ptrace"), 1, "{report:#}");
}
