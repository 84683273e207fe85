//! `cargo xtask bench`: builds the comparisons of benches/ and runs them, here or in the guest.

use crate::{kernel, packages};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the named comparisons need.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    program: PathBuf,
    packages: Vec<String>,
    places: Vec<String>,
}

impl Plan {
    fn parse(text: &str) -> Self {
        let mut plan = Self::default();
        for (word, value) in text.lines().filter_map(|line| line.split_once(' ')) {
            match word {
                "program" => plan.program = value.into(),
                "package" => plan.packages.push(value.to_owned()),
                "place" => plan.places.push(value.to_owned()),
                _ => {}
            }
        }
        plan
    }
}

/// Runs the named comparisons, or all of them.
pub(crate) fn run(names: &[String], json: bool, runs: u32) -> Result<bool, String> {
    let mut plan = Command::new("cargo");
    plan.current_dir(crate::root()).args(["run", "--release", "--quiet"]);
    plan.args(["--package", "isoplane-benches", "--bin", "side-by-side", "--", "--plan"]).args(names);
    let plan = plan.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let plan = plan.map_err(|e| format!("cannot start cargo: {e}"))?;
    if !plan.status.success() {
        return Ok(false);
    }
    let plan = Plan::parse(&String::from_utf8_lossy(&plan.stdout));
    packages::ensure(&plan.packages.iter().map(String::as_str).collect::<Vec<_>>())?;

    let results = tempfile::Builder::new().prefix("isoplane-bench-").tempdir();
    let results = results.map_err(|e| format!("cannot make a temporary directory: {e}"))?;
    let mut show = Command::new(&plan.program);
    for place in &plan.places {
        let file = format!("{place}.json");
        let runs = runs.to_string();
        let args = |dir: &Path| {
            let out = dir.join(&file).to_string_lossy().into_owned();
            let own = ["--place", place, "--runs", &runs, "--out", &out].map(str::to_owned);
            own.into_iter().chain(names.iter().cloned()).collect::<Vec<_>>()
        };
        let well = if place == "here" {
            let status = Command::new(&plan.program).args(args(results.path())).stdin(Stdio::null()).status();
            status.map_err(|e| format!("cannot start {}: {e}", plan.program.display()))?.success()
        } else {
            let args = args(Path::new(kernel::RESULTS));
            kernel::bench(&plan.program, &args, results.path(), place == "counted")?
        };
        let file = results.path().join(file);
        if !well || !file.exists() {
            return Err(format!("the comparisons {place} were not made; see above"));
        }
        show.arg("--show").arg(file);
    }
    if json {
        show.arg("--json");
    }
    let status = show.stdin(Stdio::null()).status();
    Ok(status.map_err(|e| format!("cannot start {}: {e}", plan.program.display()))?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read() {
        let plan = Plan::parse("program /a b/c\npackage dpdk-dev\nplace here\nplace guest\nand more\n");
        let strings = |all: &[&str]| all.iter().map(|&one| one.to_owned()).collect::<Vec<_>>();
        assert_eq!(plan.program, Path::new("/a b/c"));
        assert_eq!(plan.packages, strings(&["dpdk-dev"]));
        assert_eq!(plan.places, strings(&["here", "guest"]));
    }
}
