//! Gates performance by instructions a packet, counted by valgrind: the same on every machine and under
//! any load, unlike time. Only release builds are counted (`cargo xtask test` makes one); in others the
//! numbers would say nothing about what is shipped.
#![cfg(not(debug_assertions))]

use std::process::Command;

/// Instructions that `count-turns KIND TURNS` takes, and frames that it forwards.
fn count(kind: &str, turns: u32) -> (u64, u64) {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", env!("CARGO_BIN_EXE_count-turns")])
        .args([kind, &turns.to_string()])
        .output()
        .expect("valgrind is installed (by cargo xtask test)");
    let (frames, report) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{report}");
    let collected = report.lines().find_map(|line| line.split_once("Collected : "));
    let instructions = collected.and_then(|(_, n)| n.trim().parse().ok());
    (instructions.expect(&report), frames.trim().parse().expect("a number of frames"))
}

/// Start-up drops out: what more turns cost, by what they make more.
fn each(kind: &str, few: u32, many: u32, a_turn: u64) -> f64 {
    let (less, more) = (count(kind, few), count(kind, many));
    assert_eq!(more.1 - less.1, u64::from(many - few) * a_turn, "what a turn makes");
    (more.0 - less.0) as f64 / (more.1 - less.1) as f64
}

#[track_caller]
fn at_most(kind: &str, instructions: f64, limit: f64, least: f64) {
    println!("{kind}: {instructions:.1} instructions each, {limit} allowed");
    assert!(instructions <= limit, "{kind}: {instructions:.1} instructions each, {limit} allowed");
    assert!(instructions >= least, "{kind}: {instructions:.1}: that is not the whole loop");
}

#[test]
fn mac_swap_between_null_ports() {
    // Two full batches a turn.
    at_most("null", each("null", 500, 1500, 128), 48.0, 4.0);
}

#[test]
fn forwarding_by_a_table_of_routes() {
    // The writing of the packets is among them: some 40.
    for (kind, limit) in [("router4", 500.0), ("router6", 610.0)] {
        at_most(kind, each(kind, 200, 600, 128), limit, 80.0);
    }
}

#[test]
fn log_events_of_a_worker() {
    for (kind, limit) in [("log-integers", 370.0), ("log-formatted", 550.0), ("log-message", 730.0)] {
        // The second batch: the first announces the callsite.
        at_most(kind, each(kind, 1, 2, 1024), limit, 100.0);
    }
}
