//! `cargo xtask bench`: builds the comparisons of benches/ and runs them.

use crate::packages;
use std::process::{Command, Stdio};

/// Runs the named comparisons, or all of them.
pub(crate) fn run(names: &[String], json: bool, runs: u32) -> Result<bool, String> {
    let cargo = |args: &[&str]| {
        let mut command = Command::new("cargo");
        command.current_dir(crate::root()).args(["run", "--release", "--quiet"]);
        command.args(["--package", "isoplane-benches", "--bin", "side-by-side", "--"]).args(args);
        command.args(names).stdin(Stdio::null()).stderr(Stdio::inherit());
        command
    };
    let listed = cargo(&["--packages"]).output().map_err(|e| format!("cannot start cargo: {e}"))?;
    if !listed.status.success() {
        return Ok(false);
    }
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    packages::ensure(&listed.split_whitespace().collect::<Vec<_>>())?;

    let runs = runs.to_string();
    let mut args = vec!["--runs", &runs];
    if json {
        args.push("--json");
    }
    let status = cargo(&args).status().map_err(|e| format!("cannot start cargo: {e}"))?;
    Ok(status.success())
}
