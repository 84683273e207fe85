//! `cargo xtask test`: every check and test, one part after the other, then a table.
//!
//! Contract: a part that fails does not stop the others. The exit status is non-zero when anything
//! failed, and when anything was left out that `--skip` did not name.

use crate::fuzz;
use crate::kernel;
use crate::packages;
use crate::parts::Part;
use crate::report::{Reader, Tally};
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

enum Ran {
    Passed,
    Failed,
    /// By `--skip`.
    Asked,
    Skipped,
}

struct Row {
    part: Part,
    ran: Ran,
    took: Duration,
    tally: Tally,
}

/// Runs the parts; says whether all is well.
pub(crate) fn run(skip: &[Part], full: bool) -> Result<bool, String> {
    for tool in ["fmt", "clippy"] {
        let found = Command::new("cargo").args([tool, "--version"]).output();
        if !found.is_ok_and(|out| out.status.success()) {
            return Err(format!("cargo {tool} is missing. Run: rustup component add rustfmt clippy"));
        }
    }
    let parts: Vec<Part> = Part::all(full).collect();
    let mut needed: Vec<&str> =
        parts.iter().filter(|p| !skip.contains(p)).flat_map(|p| p.packages()).copied().collect();
    needed.dedup();
    packages::ensure(&needed)?;

    let rows: Vec<Row> = parts
        .into_iter()
        .map(|part| {
            if skip.contains(&part) {
                return Row { part, ran: Ran::Asked, took: Duration::ZERO, tally: Tally::default() };
            }
            println!("\n== {}", part.name());
            one(part, skip.contains(&Part::Namespaces))
        })
        .collect();
    Ok(summary(&rows))
}

/// Runs a part. Tests elsewhere that need root too are skipped as asked when the namespaces are.
fn one(part: Part, without_root: bool) -> Row {
    let start = Instant::now();
    if let Some(reason) = part.obstacle() {
        println!("skipped: {reason}");
        let tally = Tally { skipped: vec![reason], ..Tally::default() };
        return Row { part, ran: Ran::Skipped, took: start.elapsed(), tally };
    }
    let outcome = match part.guest() {
        Some(ask) => kernel::test_all(ask).map(|tally| (tally.failed == 0, tally)),
        None if part == Part::Fuzz => fuzz::run(),
        None => execute(part).map_err(|error| format!("cannot start cargo: {error}")),
    };
    let (success, mut tally) = outcome.unwrap_or_else(|reason| {
        println!("{reason}");
        (false, Tally::default())
    });
    if !part.counts() {
        tally = Tally { passed: u64::from(success), failed: u64::from(!success), ..Tally::default() };
    } else if !success && tally.failed == 0 {
        // It did not build, or a test binary was killed before it could count.
        tally.failed = 1;
    }
    let ran = match (&tally, success) {
        (_, false) => Ran::Failed,
        (tally, true) if !tally.skipped.iter().all(|why| without_root && why.contains("root")) => {
            Ran::Skipped
        }
        (tally, true) if !tally.skipped.is_empty() => Ran::Asked,
        _ => Ran::Passed,
    };
    Row { part, ran, took: start.elapsed(), tally }
}

/// Seconds that a part may take, compiling on a slow machine included.
const PATIENCE: &str = "2400";

/// Runs cargo, shows its output as it comes, and counts.
fn execute(part: Part) -> std::io::Result<(bool, Tally)> {
    let (cargo, harness) = part.cargo();
    // A test that hangs ends the part, and all that it has started.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", PATIENCE, "cargo"]);
    command.current_dir(crate::root()).args(&cargo).stdin(Stdio::null());
    if !harness.is_empty() {
        command.arg("--").args(&harness);
    }
    if part == Part::Rustdoc {
        command.env("RUSTDOCFLAGS", "-D warnings");
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let reader = Mutex::new(Reader::default());
    std::thread::scope(|scope| {
        if let Some(errors) = child.stderr.take() {
            scope.spawn(|| follow(errors, &reader, std::io::stderr()));
        }
        if let Some(output) = child.stdout.take() {
            follow(output, &reader, std::io::stdout());
        }
    });
    let success = child.wait()?.success();
    let tally = reader.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).finish();
    Ok((success, tally))
}

fn follow(from: impl Read, reader: &Mutex<Reader>, mut to: impl Write) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|n| n != 0) {
        let show = {
            let mut reader = reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            reader.line(&String::from_utf8_lossy(&line))
        };
        if show {
            // Nobody reading is no reason to stop testing.
            let _ = to.write_all(&line).and_then(|()| to.flush());
        }
        line.clear();
    }
}

fn summary(rows: &[Row]) -> bool {
    println!("\n{:<14} {:<18} {:>8} {:>8} {:>8} {:>9}", "part", "", "passed", "failed", "skipped", "seconds");
    let mut total = Tally::default();
    let mut well = true;
    for row in rows {
        let state = match row.ran {
            Ran::Passed => "ok",
            Ran::Failed => "FAILED",
            Ran::Asked => "skipped as asked",
            Ran::Skipped => "SKIPPED",
        };
        well &= matches!(row.ran, Ran::Passed | Ran::Asked);
        println!(
            "{:<14} {:<18} {:>8} {:>8} {:>8} {:>9.1}",
            row.part.name(),
            state,
            row.tally.passed,
            row.tally.failed,
            row.tally.skipped.len(),
            row.took.as_secs_f64()
        );
        total.add(&row.tally);
    }
    for row in rows {
        for reason in &row.tally.skipped {
            println!("skipped in {}: {reason}", row.part.name());
        }
        for reason in &row.tally.not_here {
            println!("nothing to test here in {}: {reason}", row.part.name());
        }
    }
    print!("\n{} passed, {} failed", total.passed, total.failed);
    if !total.skipped.is_empty() {
        print!(", {} skipped", total.skipped.len());
    }
    println!();
    well && total.failed == 0
}
