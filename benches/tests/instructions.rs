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

/// Start-up drops out: what more turns cost, by the frames that they forward more.
fn per_frame(kind: &str) -> f64 {
    let (few, many) = (count(kind, 500), count(kind, 1500));
    assert_eq!(many.1 - few.1, 1000 * 128, "two full batches a turn");
    (many.0 - few.0) as f64 / (many.1 - few.1) as f64
}

#[track_caller]
fn at_most(kind: &str, limit: f64) {
    let instructions = per_frame(kind);
    println!("{kind}: {instructions:.1} instructions a frame, {limit} allowed");
    assert!(instructions <= limit, "{kind}: {instructions:.1} instructions a frame, {limit} allowed");
    assert!(instructions >= 4.0, "{kind}: {instructions:.1}: that is not the whole loop");
}

#[test]
fn mac_swap_between_null_ports() {
    at_most("null", 48.0);
}
