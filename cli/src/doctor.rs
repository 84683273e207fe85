//! `isoplane doctor`: what stands between a host and quiet CPUs, and what to do about it.
//!
//! Contract: the exit status is the worst verdict: 0 good, 1 warnings, 2 cannot isolate; after `--fix`
//! that of the host as it is then. After `--undo` it is 0 when everything is as it was, and 1 otherwise.
//! It is [`USAGE`] when the command line made no sense, and [`FAILED`] when the doctor could not work
//! (the record of `--fix` cannot be kept, the report cannot be written). Without `--fix` and `--undo`
//! nothing is changed.

use crate::{readers_end, say};
use comfy_table::{Cell, Color, ContentArrangement, Table, presets};
use isoplane_isolation::host::fix::{self, Done, StateError};
use isoplane_isolation::host::{self, Check, Chosen, CpuSet, Fix, Host, Report, Request, Verdict};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// `EX_USAGE` of sysexits.h: apart from the verdicts.
pub(crate) const USAGE: u8 = 64;
/// `EX_SOFTWARE` of sysexits.h.
const FAILED: u8 = 70;
/// Columns of a table that no terminal shows.
const WIDTH: u16 = 160;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// CPUs for workers, as the kernel writes lists: 1-3,5. Default: the isolated ones, or all but the first.
    #[arg(long, value_name = "LIST", value_parser = str::parse::<CpuSet>)]
    cpu: Option<CpuSet>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Change what can be changed at run time, after writing down what was there.
    #[arg(long, conflicts_with = "undo")]
    fix: bool,
    /// Put back what was there before --fix.
    #[arg(long)]
    undo: bool,
    /// Also overwrite what somebody else has changed since the first --fix.
    #[arg(long)]
    force: bool,
    /// Where --fix writes down what was there [default: /var/lib/isoplane/doctor-undo.json].
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Look at the /proc and /sys below this directory instead of the real ones.
    #[arg(long, value_name = "DIR", hide = true)]
    root: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum DoctorError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot write the report: {0}")]
    Write(#[from] io::Error),
}

/// What `--json` prints.
#[derive(Serialize)]
struct Json<'a> {
    /// Why these CPUs: `asked`, `isolated` or `all_but_first`.
    chosen: &'static str,
    #[serde(flatten)]
    report: &'a Report,
    boot_line: String,
    /// What `--fix` did.
    changes: &'a [Done],
}

pub(crate) fn run(args: &Args, verbose: bool) -> ExitCode {
    examine(args, verbose).unwrap_or_else(|error| {
        say(&error.to_string());
        ExitCode::from(FAILED)
    })
}

fn examine(args: &Args, verbose: bool) -> Result<ExitCode, DoctorError> {
    let host = args.root.as_ref().map_or_else(Host::real, Host::at);
    let state = args.state.clone().unwrap_or_else(|| host.locate(fix::STATE));
    if args.undo {
        return undo(args, &host, &state);
    }
    let (cpus, chosen) = match (&args.cpu, host::default_cpus(&host)) {
        (Some(cpus), _) => (cpus.clone(), "asked"),
        (None, (cpus, Chosen::Isolated)) => (cpus, "isolated"),
        (None, (cpus, Chosen::AllButFirst)) => (cpus, "all_but_first"),
    };
    let request = Request::new(cpus);
    let mut report = host::check(&host, &request);
    let changes = if args.fix {
        let changes = fix::apply(&host, &report, &state, args.force)?;
        report = host::check(&host, &request);
        changes
    } else {
        Vec::new()
    };
    let written = if args.json {
        let json = Json { chosen, boot_line: report.boot_line(), report: &report, changes: &changes };
        print_json(&json)
    } else {
        print_report(chosen, &report, &changes, args.fix, verbose)
    };
    readers_end(written)?;
    Ok(ExitCode::from(match report.verdict {
        Verdict::NotApplicable | Verdict::Good => 0,
        Verdict::Warning => 1,
        Verdict::CannotIsolate => 2,
    }))
}

fn undo(args: &Args, host: &Host, state: &std::path::Path) -> Result<ExitCode, DoctorError> {
    let changes = fix::undo(host, state, args.force)?;
    let left = changes.iter().filter(|done| !done.outcome.is_done()).count();
    let written = if args.json {
        print_json(&serde_json::json!({ "changes": changes }))
    } else {
        let mut out = io::stdout().lock();
        changes.iter().try_for_each(|done| writeln!(out, "{done}")).and_then(|()| {
            match (changes.len(), left) {
                (0, _) => writeln!(out, "There is nothing to undo: {} has no record.", state.display()),
                (_, 0) => writeln!(out, "Everything is as it was before --fix."),
                (_, left) => writeln!(out, "{left} could not be put back, and stay in {}.", state.display()),
            }
        })
    };
    readers_end(written)?;
    Ok(ExitCode::from(u8::from(left != 0)))
}

fn print_json(value: &impl Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)
}

/// How a check can be mended, in a word for each way; [`to_copy`] has the exact text.
fn ways(check: &Check) -> String {
    let count = |of: fn(&Fix) -> bool| check.fix.iter().filter(|fix| of(fix)).count();
    let mut ways = Vec::new();
    match count(|fix| matches!(fix, Fix::Change(_))) {
        0 => {}
        1 => ways.push("--fix".to_owned()),
        files => ways.push(format!("--fix ({files} files)")),
    }
    if count(|fix| matches!(fix, Fix::Boot { .. })) > 0 {
        ways.push("boot".to_owned());
    }
    if count(|fix| matches!(fix, Fix::Advice { .. })) > 0 {
        ways.push("by hand".to_owned());
    }
    ways.join(", ")
}

/// The exact fixes of a check, a line each: a table would break commands in the middle. Of many files that
/// get the same treatment, the first two (all of them with `all`).
fn to_copy(check: &Check, all: bool) -> Vec<String> {
    let (changes, others): (Vec<&Fix>, Vec<&Fix>) =
        check.fix.iter().partition(|fix| matches!(fix, Fix::Change(_)));
    let shown = if all || changes.len() <= 3 { changes.len() } else { 2 };
    let mut lines: Vec<String> = changes[..shown].iter().map(ToString::to_string).collect();
    if shown < changes.len() {
        lines.push(format!("... and {} more such files (-v shows them)", changes.len() - shown));
    }
    lines.extend(others.iter().map(ToString::to_string));
    lines
}

fn table(report: &Report, verbose: bool) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED.with_rounded_corners())
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["check", "verdict", "found", "wanted", "why it matters", "fix"]);
    if !io::stdout().is_terminal() {
        table.set_width(WIDTH);
    }
    for check in &report.checks {
        let color = match check.verdict {
            Verdict::NotApplicable => Color::DarkGrey,
            Verdict::Good => Color::Green,
            Verdict::Warning => Color::Yellow,
            Verdict::CannotIsolate => Color::Red,
        };
        // Nobody reads why something is as it should be, unless they ask.
        let told = verbose || check.verdict >= Verdict::Warning;
        table.add_row([
            Cell::new(check.title),
            Cell::new(check.verdict).fg(color),
            Cell::new(check.reason.as_ref().unwrap_or(&check.found)),
            Cell::new(&check.wanted),
            Cell::new(if told { check.why } else { "" }),
            Cell::new(ways(check)),
        ]);
    }
    table
}

fn print_report(
    chosen: &str,
    report: &Report,
    changes: &[Done],
    fixed: bool,
    verbose: bool,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let why = match chosen {
        "asked" => "as asked",
        "isolated" => "those that are isolated already",
        _ => "all but the first, since none is isolated",
    };
    writeln!(
        out,
        "CPUs for workers: {} ({why}); housekeeping: {}",
        report.cpus,
        named(&report.housekeeping)
    )?;
    if fixed {
        for done in changes {
            writeln!(out, "{done}")?;
        }
    }
    writeln!(out, "{}", table(report, verbose))?;
    let count = |verdict| report.checks.iter().filter(|check| check.verdict == verdict).count();
    let open = report.changes().filter(|(check, _)| check.verdict >= Verdict::Warning).count();
    writeln!(
        out,
        "{} good, {} warnings, {} that keep it from isolating, {} not applicable",
        count(Verdict::Good),
        count(Verdict::Warning),
        count(Verdict::CannotIsolate),
        count(Verdict::NotApplicable),
    )?;
    if report.verdict >= Verdict::Warning {
        writeln!(out, "\nWhat to do, exactly:")?;
        for check in report.checks.iter().filter(|check| check.verdict >= Verdict::Warning) {
            writeln!(out, "  {}", check.title)?;
            to_copy(check, verbose).iter().try_for_each(|line| writeln!(out, "    {line}"))?;
        }
        writeln!(out, "\nBoot with: {}", report.boot_line())?;
    }
    if open > 0 && !fixed {
        writeln!(out, "{open} files can be changed now: --fix does it, --undo takes it back.")?;
    }
    Ok(())
}

fn named(cpus: &CpuSet) -> String {
    if cpus.is_empty() { "none".to_owned() } else { cpus.to_string() }
}
