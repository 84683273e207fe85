//! Runs comparisons: ours and the peer's in turn, each in a process of its own.
#![deny(unsafe_code)]

use clap::Parser;
use isoplane_benches::comparison::{BenchError, Comparison, Sample, all};
use isoplane_benches::hugepages::HugePages;
use isoplane_benches::report::{Row, table};
use std::process::{Command, ExitCode, Stdio};

#[derive(Parser)]
#[command(about = "Side-by-side comparisons of isoplane with its peers")]
struct Args {
    /// Which comparisons; all when none is named.
    names: Vec<String>,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// Alternating runs of each side.
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// Prints the Debian packages that the comparisons need, and does nothing else.
    #[arg(long)]
    packages: bool,
    /// Measures our side once, in this process, and prints the sample: `NAME` or `NAME CASE`.
    #[arg(long, hide = true, value_name = "TITLE")]
    ours: Option<String>,
}

fn title(comparison: &dyn Comparison) -> String {
    format!("{} {}", comparison.name(), comparison.case()).trim_end().to_owned()
}

/// Measures our side in a process of its own: an address space that nobody has used yet.
fn ours(comparison: &dyn Comparison) -> Result<Sample, BenchError> {
    let case = title(comparison);
    let failed = |what: String| BenchError::Ours { case: case.clone(), what };
    let program = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let output = Command::new(program)
        .args(["--ours", &case])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(format!("it ended with {}", output.status)));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| failed(format!("its sample: {e}")))
}

fn compare(comparison: &dyn Comparison, runs: u32) -> Result<Row, BenchError> {
    let mut samples = Vec::new();
    for run in 1..=runs {
        let pair = (ours(comparison)?, comparison.peer()?);
        eprintln!(
            "{}: run {run} of {runs}: ours {:.3}, peer {:.3} {}",
            title(comparison),
            pair.0.rate,
            pair.1.rate,
            comparison.unit()
        );
        samples.push(pair);
    }
    Row::of(comparison, &samples)
}

fn run(args: &Args) -> Result<bool, BenchError> {
    let every = all();
    if let Some(wanted) = &args.ours {
        let comparison = every.iter().find(|c| title(c.as_ref()) == *wanted);
        let comparison =
            comparison.ok_or_else(|| BenchError::Machine(format!("there is no comparison {wanted:?}")))?;
        let sample = comparison.ours()?;
        println!("{}", serde_json::to_string(&sample).map_err(|e| BenchError::Machine(e.to_string()))?);
        return Ok(true);
    }
    for name in &args.names {
        if !every.iter().any(|c| c.name() == name) {
            let mut known: Vec<_> = every.iter().map(|c| c.name()).collect();
            known.dedup();
            let known = known.join(", ");
            return Err(BenchError::Machine(format!("there is no comparison {name:?}; there are: {known}")));
        }
    }
    let chosen: Vec<_> =
        every.iter().filter(|c| args.names.is_empty() || args.names.iter().any(|n| n == c.name())).collect();
    if args.packages {
        let mut packages: Vec<_> = chosen.iter().flat_map(|c| c.packages()).collect();
        packages.sort_unstable();
        packages.dedup();
        for package in packages {
            println!("{package}");
        }
        return Ok(true);
    }
    let pages = HugePages::reserve(384);
    if pages.is_none() {
        eprintln!("no huge pages to be had: both sides run on small pages");
    }
    // A comparison that cannot be made does not stop the others.
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for comparison in chosen {
        match compare(comparison.as_ref(), args.runs.max(1)) {
            Ok(row) => rows.push(row),
            Err(error) => failures.push(format!("{}: {error}", title(comparison.as_ref()))),
        }
    }
    if args.json {
        let report = serde_json::json!({
            "huge_pages": pages.is_some(),
            "comparisons": rows,
            "failures": failures,
        });
        println!("{report}");
    } else {
        print!("{}", table(&rows));
    }
    for failure in &failures {
        eprintln!("error: {failure}");
    }
    Ok(failures.is_empty())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
