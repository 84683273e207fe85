//! A worker's turn makes no system call and allocates nothing: its loop runs with traffic under a
//! seccomp filter that kills the process at any system call, with an allocator that counts. The kicks
//! that AF_XDP needs are made by another thread.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

fn run(scenario: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sealed")).arg(scenario).output().expect("the scenario starts")
}

/// The number that follows `name` in the report.
fn number(report: &str, name: &str) -> u64 {
    let mut words = report.split_whitespace().skip_while(|word| *word != name);
    words.nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no {name} in {report:?}"))
}

#[track_caller]
fn forwards_alone(scenario: &str, frames: u64) {
    let output = run(scenario);
    let (report, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.signal(), None, "killed: the worker made a system call. {errors}");
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(number(&report, "forwarded") >= frames, "{report}");
    assert!(number(&report, "turns") > 0, "{report}");
    assert_eq!(number(&report, "allocations"), 0, "{report}");
}

#[test]
fn null_ports() {
    forwards_alone("null", 200_000 * 2 * 64);
}

#[test]
fn memory_ports() {
    forwards_alone("memory", 100_000);
}

#[test]
fn afxdp_ports_with_a_kicker() {
    forwards_alone("afxdp", 20_000);
}

/// A forked worker logs through its ring, twice: from the first event of each callsite on, and when the ring
/// is full. The program has an ordinary subscriber.
#[test]
fn log_events() {
    let output = run("logs");
    let (report, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert_eq!(number(&report, "started"), 2, "{report}");
    assert!(number(&report, "events") > 20 && number(&report, "lost") > 0, "{report}");
    assert_eq!(number(&report, "allocations"), 0, "{report}");
}

#[test]
fn a_system_call_in_a_turn_is_caught() {
    assert_eq!(run("enters-the-kernel").status.signal(), Some(31), "SIGSYS");
}

#[test]
fn an_allocation_in_a_turn_is_caught() {
    let output = run("allocates");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(number(&String::from_utf8_lossy(&output.stdout), "allocations"), 2, "made and freed");
}
