//! Runs comparisons: ours and the peer's in turn, each in a process of its own.
#![deny(unsafe_code)]

use clap::Parser;
use isoplane_benches::comparison::{BenchError, Comparison, Place, Sample, all};
use isoplane_benches::hugepages::HugePages;
use isoplane_benches::report::{Report, Row, table};
use std::path::{Path, PathBuf};
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
    /// Says what the comparisons need, and does nothing else: this program's path, Debian packages, places.
    #[arg(long)]
    plan: bool,
    /// Makes those that belong to this place.
    #[arg(long, value_enum, default_value_t = Place::Here)]
    place: Place,
    /// Leaves the report in a file, for `--show`, and prints none.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Measures nothing, and prints what such files hold.
    #[arg(long, value_name = "FILE")]
    show: Vec<PathBuf>,
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

/// What [`Args::plan`] prints, a word and its value a line.
fn plan(chosen: &[&dyn Comparison]) -> Result<(), BenchError> {
    let program = std::env::current_exe().map_err(|e| BenchError::Machine(e.to_string()))?;
    println!("program {}", program.display());
    let mut packages: Vec<_> = chosen.iter().flat_map(|c| c.packages()).collect();
    packages.sort_unstable();
    packages.dedup();
    for package in packages {
        println!("package {package}");
    }
    let mut places: Vec<_> = chosen.iter().map(|c| c.place()).collect();
    places.sort_unstable();
    places.dedup();
    for place in places {
        println!("place {}", format!("{place:?}").to_lowercase());
    }
    Ok(())
}

fn load(path: &Path) -> Result<Report, BenchError> {
    let failed = |e: &dyn std::fmt::Display| BenchError::Machine(format!("{}: {e}", path.display()));
    let text = std::fs::read(path).map_err(|e| failed(&e))?;
    serde_json::from_slice(&text).map_err(|e| failed(&e))
}

/// Prints the report; says whether all of it is well.
fn show(report: &Report, json: bool) -> Result<bool, BenchError> {
    if json {
        println!("{}", serde_json::to_string(report).map_err(|e| BenchError::Machine(e.to_string()))?);
    } else {
        print!("{}", table(&report.comparisons));
    }
    let complaints = report.complaints();
    for complaint in &complaints {
        eprintln!("error: {complaint}");
    }
    Ok(complaints.is_empty())
}

fn run(args: &Args) -> Result<bool, BenchError> {
    if !args.show.is_empty() {
        let mut whole = Report { huge_pages: true, comparisons: vec![], failures: vec![] };
        for path in &args.show {
            whole.add(load(path)?);
        }
        return show(&whole, args.json);
    }
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
    let named = |c: &&dyn Comparison| args.names.is_empty() || args.names.iter().any(|n| n == c.name());
    let chosen: Vec<_> = every.iter().map(Box::as_ref).filter(named).collect();
    if args.plan {
        return plan(&chosen).map(|()| true);
    }
    let (chosen, elsewhere): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|c| c.place() == args.place);
    if chosen.is_empty() && !elsewhere.is_empty() {
        let what = "nothing of this is measured here; cargo xtask bench knows where to go";
        return Err(BenchError::Machine(what.to_owned()));
    }
    let pages = HugePages::reserve(384);
    if pages.is_none() {
        eprintln!("no huge pages to be had: both sides run on small pages");
    }
    // A comparison that cannot be made does not stop the others.
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for comparison in chosen {
        match compare(comparison, args.runs.max(1)) {
            Ok(row) => rows.push(row),
            Err(error) => failures.push(format!("{}: {error}", title(comparison))),
        }
    }
    let report = Report { huge_pages: pages.is_some(), comparisons: rows, failures };
    let Some(out) = &args.out else { return show(&report, args.json) };
    let text = serde_json::to_vec(&report).map_err(|e| BenchError::Machine(e.to_string()))?;
    std::fs::write(out, text).map_err(|e| BenchError::Machine(format!("{}: {e}", out.display())))?;
    Ok(true)
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
