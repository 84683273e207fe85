//! Strict workers, watched from outside: see `scenario/strict.rs` and `arena/`.

use std::process::Command;

/// Runs a scenario, passes on why it did not run, and returns what it logged.
fn run(program: &str, name: &str) -> String {
    let output = Command::new(program).arg(name).env("NO_COLOR", "1").output().expect("run the scenario");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "scenario {name}: {}\n{text}", output.status);
    for line in
        text.lines().filter(|line| ["skipped: ", "not here: "].iter().any(|why| line.starts_with(why)))
    {
        eprintln!("{line}");
    }
    text
}

fn scenario(name: &str) -> String {
    run(env!("CARGO_BIN_EXE_scenario"), name)
}

fn arena(name: &str) -> String {
    run(env!("CARGO_BIN_EXE_arena"), name)
}

#[test]
fn tracers_see_nothing_until_there_is_something() {
    scenario("witnesses-see");
}

#[test]
fn unmapping_threads_do_not_interrupt_a_process() {
    scenario("unmaps-beside-a-process");
}

#[test]
fn unmapping_threads_interrupt_a_thread() {
    scenario("unmaps-beside-a-thread");
}

#[test]
fn those_who_interrupt_are_named() {
    scenario("senders-of-unmaps");
}

#[test]
fn a_worker_without_privileges_bridges_strictly() {
    scenario("bridge-without-privileges");
}

#[test]
fn a_worker_routes_strictly() {
    scenario("strict-router");
}

#[test]
fn an_arena_that_serves_nothing_is_said() {
    let log = scenario("arena-without-its-allocator");
    if log.contains("skipped: ") {
        return;
    }
    let said =
        log.lines().filter(|line| line.contains("the arena that was asked for serves nothing")).count();
    assert_eq!(said, 1, "{log}");
}

#[test]
fn a_worker_allocates_from_its_arena() {
    arena("allocates-and-frees");
}

#[test]
fn more_than_the_arena_is_refused_and_counted() {
    arena("more-than-there-is");
}
