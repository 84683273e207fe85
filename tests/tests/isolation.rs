//! Isolated workers, in processes of their own: see `scenario/isolation.rs`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs a scenario; gives what it and its worker wrote, without colours.
fn scenario(name: &str) -> (String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_scenario")).arg(name).output().expect("run the scenario");
    let text = String::from_utf8_lossy(&stderr).into_owned();
    assert!(status.success(), "scenario {name}: {status}\n{text}");
    (String::from_utf8_lossy(&stdout).into_owned(), text)
}

/// The only line with these words.
fn only<'a>(text: &'a str, words: &str) -> &'a str {
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(words)).collect();
    assert_eq!(lines.len(), 1, "lines with {words:?} in:\n{text}");
    lines[0]
}

#[test]
fn a_forbidden_system_call_is_reported_once_and_survived() {
    let (_, text) = scenario("breach-syscall");
    let line = only(&text, "isolation was broken");
    for part in ["ERROR", "syscall=110", "name=\"getppid\"", "cause=\"syscall\"", "call_address=0x"] {
        assert!(line.contains(part), "no {part} in {line}");
    }
}

#[test]
fn a_page_fault_is_reported_once_and_survived() {
    let (_, text) = scenario("breach-page-fault");
    let line = only(&text, "isolation was broken");
    assert!(line.contains("cause=\"page_fault\"") && line.contains("address=0x"), "{line}");
}

#[test]
fn an_allocation_that_needs_the_kernel_is_a_breach() {
    only(&scenario("breach-allocation").1, "isolation was broken");
}

#[test]
fn a_worker_that_shall_stop_at_its_breach_drains_and_ends() {
    scenario("breach-stops");
}

#[test]
fn a_worker_that_shall_die_at_its_breach_makes_no_call_and_is_started_again() {
    let (out, text) = scenario("breach-aborts");
    assert_eq!(out, "", "the forbidden call ran");
    only(&text, "isolation was broken");
}

#[test]
fn a_worker_that_cannot_be_isolated_again_is_started_again() {
    only(&scenario("breach-that-cannot-be-mended").1, "isolation was broken");
}

#[test]
fn a_breach_that_its_worker_could_not_report_is_reported_all_the_same() {
    // The call that ends the worker is a breach in itself, but isolation is off by then.
    only(&scenario("killed-at-its-breach").1, "isolation was broken");
}

#[test]
fn log_lines_take_the_ring() {
    let (_, text) = scenario("logs-by-the-ring");
    let line = only(&text, "the worker says 2");
    for part in ["INFO", "number=100", "some \\\"words\\\"", "worker=\"w0\"", "time="] {
        assert!(line.contains(part), "no {part} in {line}");
    }
}

#[test]
fn log_lines_take_the_slow_path() {
    let (_, text) = scenario("logs-by-the-slow-path");
    assert!(only(&text, "the worker says 2").contains("number=100"));
}

#[test]
fn lost_log_lines_are_counted_and_said() {
    let (_, text) = scenario("logs-too-much");
    assert!(text.contains("log lines were lost"), "{text}");
}

#[test]
fn visits_over_the_budget_are_refused() {
    assert_eq!(scenario("slow-path-budget").1.matches("visited").count(), 1);
}

#[test]
fn a_panic_under_strict_mode_is_no_breach() {
    let (_, text) = scenario("strict-worker-panics");
    assert!(only(&text, "worker died").contains("frightens me"), "{text}");
}

#[test]
fn privileges_are_dropped() {
    scenario("worker-drops-privileges");
}

#[test]
fn impossible_isolation_is_refused_with_its_reason() {
    let start = Instant::now();
    scenario("isolation-refusals");
    assert!(start.elapsed() < Duration::from_secs(50), "refused only after retries");
}

#[test]
fn a_stop_from_outside_is_counted() {
    scenario("stopped-and-continued");
}

/// A change of user makes the kernel forget who wants to die with its parent; it must be said again.
#[test]
fn a_worker_without_privileges_dies_with_its_program() {
    let mut program = Command::new(env!("CARGO_BIN_EXE_scenario"))
        .arg("waits-without-privileges")
        .stdout(Stdio::piped())
        .spawn()
        .expect("run the scenario");
    let mut line = String::new();
    BufReader::new(program.stdout.take().expect("piped")).read_line(&mut line).expect("the worker's pid");
    let worker: u32 = line.trim().parse().expect("a number");
    let alive = || {
        let stat = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
    };
    assert!(alive());
    program.kill().expect("kill the program");
    program.wait().expect("reap it");
    let start = Instant::now();
    while alive() {
        assert!(start.elapsed() < Duration::from_secs(20), "the worker outlives its program");
        std::thread::sleep(Duration::from_millis(5));
    }
}
