//! Whole dataplanes, in processes of their own: see `scenario/`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn scenario(name: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_scenario")).arg(name).output().expect("run the scenario");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scenario {name}: {}\n{text}", output.status);
}

macro_rules! scenarios {
    ($($test:ident = $name:literal;)*) => {
        $(#[test] fn $test() { scenario($name); })*
    };
}

scenarios! {
    forwards_in_order = "forwards-in-order";
    stops_under_load = "stops-under-load";
    stops_on_sigterm = "stops-on-sigterm";
    two_workers_joined = "two-workers-joined";
    app_sees_the_link = "app-sees-the-link";
    bridge_follows_links = "bridge-follows-links";
    worker_killed = "worker-killed";
    worker_killed_in_many_places = "worker-killed-in-many-places";
    worker_panics = "worker-panics";
    worker_given_up = "worker-given-up";
    zygote_killed = "zygote-killed";
    bridge_over_af_xdp = "bridge-over-af-xdp";
    worker_killed_over_af_xdp = "worker-killed-over-af-xdp";
    program_killed_over_af_xdp = "program-killed-over-af-xdp";
    two_workers_on_two_queues = "two-workers-on-two-queues";
    sealed_bridge = "sealed-bridge";
    refused_frames_are_drops = "refused-frames-are-drops";
    worker_hangs = "worker-hangs";
    one_dies_the_other_forwards = "one-dies-the-other-forwards";
    peer_lies = "peer-lies";
    bridge_over_taps = "bridge-over-taps";
    sealed_bridge_over_taps = "sealed-bridge-over-taps";
    worker_killed_over_taps = "worker-killed-over-taps";
    tap_deleted = "tap-deleted";
    link_flaps = "link-flaps";
    interface_deleted = "interface-deleted";
    rebinds_at_once = "rebinds-at-once";
    shares_messages_counters_tables = "shares-messages-counters-tables";
    statistics_from_outside = "statistics-from-outside";
    rehearsed_bridge_starts_as_new = "rehearsed-bridge-starts-as-new";
    rehearsal_only_on_request = "rehearsal-only-on-request";
    rehearsed_first_packets_do_not_fault = "rehearsed-first-packets-do-not-fault";
    launch_refusals = "launch-refusals";
    launch_app_that_panics_at_once = "launch-app-that-panics-at-once";
}

/// `kill -9` of the program: zygote and worker are gone, too.
#[test]
fn program_killed() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_scenario"))
        .arg("run-until-killed")
        .stdout(Stdio::piped())
        .spawn()
        .expect("run the scenario");
    let mut line = String::new();
    BufReader::new(program.stdout.take().expect("stdout")).read_line(&mut line).expect("process ids");
    let pids: Vec<u32> = line.split_whitespace().map(|pid| pid.parse().expect("a pid")).collect();
    assert_eq!(pids.len(), 2, "{line:?}");
    program.kill().expect("kill");
    program.wait().expect("wait");
    let killed = Instant::now();
    let alive = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z")
    };
    while pids.iter().any(alive) {
        assert!(killed.elapsed() < Duration::from_secs(10), "a process of {pids:?} outlives its program");
        std::thread::sleep(Duration::from_millis(5));
    }
}
