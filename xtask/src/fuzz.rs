//! The fuzz targets in `fuzz/`, each for some seconds.
//!
//! Contract: installs cargo-fuzz when it is missing; without a sanitizer, so that the stable toolchain does. What a
//! target found is in `fuzz/artifacts`, and its output says how to run that again. What new inputs reached is kept in
//! `fuzz/target`; the inputs that each run begins with are in `fuzz/seeds`.

use crate::report::Tally;
use std::path::Path;
use std::process::{Command, Stdio};

/// Seconds that each target runs.
const SECONDS: u32 = 20;
/// Seconds that each may take, compiling on a slow machine included.
const PATIENCE: &str = "2400";

/// Runs all targets; says whether none found anything, and counts them.
pub(crate) fn run() -> Result<(bool, Tally), String> {
    install()?;
    let fuzz = crate::root().join("fuzz");
    let list = cargo(&["fuzz", "list"]).output().map_err(|e| format!("cannot start cargo fuzz: {e}"))?;
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    let mut tally = Tally::default();
    for target in list.lines() {
        println!("fuzzing {target} for {SECONDS} s");
        if one(&fuzz, target)? {
            tally.passed += 1;
        } else {
            println!("fuzz target {target} FAILED");
            tally.failed += 1;
        }
    }
    if tally.passed + tally.failed == 0 {
        return Err("cargo fuzz lists no target".to_owned());
    }
    Ok((tally.failed == 0, tally))
}

fn one(fuzz: &Path, target: &str) -> Result<bool, String> {
    let corpus = fuzz.join("target/corpus").join(target);
    std::fs::create_dir_all(&corpus).map_err(|e| format!("{}: {e}", corpus.display()))?;
    let seeds = fuzz.join("seeds").join(target);
    let limit = format!("-max_total_time={SECONDS}");
    let mut run = Command::new("timeout");
    run.args(["--kill-after=10", PATIENCE, "cargo", "fuzz", "run", "--sanitizer", "none", target]);
    run.args([&corpus, &seeds]);
    // An input that takes ten seconds is a finding, too.
    run.args(["--", &limit, "-timeout=10", "-print_final_stats=1"]);
    let status = run.current_dir(crate::root()).stdin(Stdio::null()).status();
    Ok(status.map_err(|e| format!("cannot start cargo fuzz: {e}"))?.success())
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(crate::root()).stdin(Stdio::null());
    command
}

fn install() -> Result<(), String> {
    if cargo(&["fuzz", "--version"]).output().is_ok_and(|out| out.status.success()) {
        return Ok(());
    }
    eprintln!("installing cargo-fuzz");
    let installed =
        cargo(&["install", "cargo-fuzz", "--locked"]).status().is_ok_and(|status| status.success());
    if installed {
        Ok(())
    } else {
        Err("could not install it. By hand: cargo install cargo-fuzz --locked".to_owned())
    }
}
