//! `isoplane noise`: what is taken from a thread that spins on a CPU.
//!
//! Contract: the measuring process and the load end with this one, however it ends, and nothing else is
//! left. What cannot work (the CPU, the plot's file) is found before anything is measured. A measurement
//! that ends early, by a signal or a failure, still says what it found; a failure also shows in the exit
//! code. Results go to standard output, progress and reasons to standard error.

mod load;
mod observed;
mod place;
mod plot;
mod process;
mod report;
mod spinner;

use crate::format::{grouped, short_time};
use crate::progress;
use indicatif::ProgressBar;
use isoplane::memory::{Clock, ClockError};
use isoplane_isolation::Cpu;
use isoplane_isolation::observer::Senders;
use load::{Load, LoadError};
use observed::Observed;
use place::PlaceError;
use report::{Ended, Measurement, Report};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use spinner::{Spinner, SpinnerError, Task};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Arguments of `isoplane noise`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The CPU to measure.
    #[arg(long, value_name = "N")]
    cpu: usize,
    /// How long each mode is measured.
    #[arg(long, value_name = "S", default_value_t = 10, allow_negative_numbers = true,
          value_parser = parse_seconds)]
    seconds: u64,
    /// What to measure: a thread that is only pinned, one in strict isolation, or one after the other.
    #[arg(long, value_enum, default_value_t = Modes::Both)]
    mode: Modes,
    /// A command for sh, which runs on all the other CPUs meanwhile: once, from the start, in each mode.
    #[arg(long, value_name = "COMMAND")]
    load: Option<String>,
    /// Take a step longer than this for a gap, in nanoseconds; else ten median steps, at least 200.
    #[arg(long, value_name = "NS", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    threshold: Option<u64>,
    /// Draw the gaps of all modes into one picture.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

fn parse_seconds(text: &str) -> Result<u64, String> {
    let seconds = text.parse().ok().filter(|seconds| (1..=86_400).contains(seconds));
    seconds.ok_or_else(|| "not a whole number of seconds from 1 to 86400 (a day)".to_owned())
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Modes {
    /// A thread that is pinned, no more.
    None,
    /// A thread in strict isolation.
    Strict,
    /// First none, then strict.
    Both,
}

impl Modes {
    const fn each(self) -> &'static [Mode] {
        match self {
            Self::None => &[Mode::None],
            Self::Strict => &[Mode::Strict],
            Self::Both => &[Mode::None, Mode::Strict],
        }
    }
}

/// What is measured at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    None,
    Strict,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Strict => "strict",
        }
    }
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoiseError {
    /// The CPU.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The clock.
    #[error("cannot measure time: {0}")]
    Clock(#[from] ClockError),
    /// The measuring process.
    #[error(transparent)]
    Spinner(#[from] SpinnerError),
    /// It did not get so far.
    #[error("nothing was measured ({mode}): {why}")]
    NotStarted { mode: &'static str, why: String },
    /// The load.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The plot's file.
    #[error("cannot write the plot to {}: {source}", path.display())]
    PlotFile { path: PathBuf, source: std::io::Error },
    /// The plot itself.
    #[error("cannot draw the plot: {0}")]
    Plot(String),
    /// Signals or output.
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
}

/// How often the progress line changes and interruptions are looked for.
const TICK: Duration = Duration::from_millis(100);
/// How long the measuring process may take until it measures.
const PATIENCE: Duration = Duration::from_secs(30);

/// Everything that stays the same from mode to mode.
struct Plan<'a> {
    args: &'a Args,
    length: Duration,
    clock: Clock,
    stop: &'a AtomicBool,
    bar: Option<&'static ProgressBar>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, NoiseError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // The second one ends the program at once.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|source| NoiseError::Io { what: "cannot listen for signals", source })?;
    }
    if let Some(path) = &args.svg {
        try_to_write(path)?;
    }
    let housekeeping = place::make_room(Cpu(args.cpu))?;
    let clock = Clock::tsc()?;
    let modes = args.mode.each();
    let length = Duration::from_secs(args.seconds);
    let total = length * u32::try_from(modes.len()).unwrap_or(1);
    let bar = if args.json { None } else { progress::line(total) };
    let plan = Plan { args, length, clock, stop: &stop, bar };
    let mut measurements = Vec::new();
    let mut problems = Vec::new();
    let mut ended = Ended::Time;
    for (at, mode) in modes.iter().enumerate() {
        match measure(&plan, *mode, length * u32::try_from(at).unwrap_or(0), &mut problems) {
            Ok((measurement, end)) => {
                measurements.push(measurement);
                ended = end;
            }
            // What the first mode found is still worth something.
            Err(error @ NoiseError::NotStarted { .. }) if at > 0 => {
                problems.push(error.to_string());
                ended = Ended::Failure;
            }
            Err(error) => {
                progress::finish();
                return Err(error);
            }
        }
        if ended != Ended::Time {
            break;
        }
    }
    progress::finish();
    let report = Report::new(args, &housekeeping, ended, measurements, problems);
    if let Some(path) = &args.svg {
        write_plot(path, &report)?;
    }
    let mut out = std::io::stdout().lock();
    let written = if args.json { report.write_json(&mut out) } else { report.write_tables(&mut out) };
    crate::readers_end(written.and_then(|()| out.flush()))
        .map_err(|source| NoiseError::Io { what: "cannot write the results", source })?;
    for reason in &report.problems {
        crate::say(reason);
    }
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Measures one mode, after others that took `before`.
fn measure(
    plan: &Plan<'_>,
    mode: Mode,
    before: Duration,
    problems: &mut Vec<String>,
) -> Result<(Measurement, Ended), NoiseError> {
    let threshold = plan.args.threshold.map(Duration::from_nanos);
    let task = Task { cpu: Cpu(plan.args.cpu), mode, length: plan.length, threshold, clock: plan.clock };
    // Opening them interrupts every CPU, so this comes first; closing them too, so that comes last.
    let senders = Senders::open(&[u32::try_from(plan.args.cpu).unwrap_or(u32::MAX)]);
    let mut spinner = Spinner::start(&task)?;
    wait_for(&mut spinner, mode, plan.stop)?;
    let mut observed = Observed::start(mode.name(), &spinner.status, senders);
    let mut load = plan.args.load.as_deref().map(Load::start).transpose()?;
    let ended = watch(plan, mode, before, &mut spinner, load.as_mut(), &mut observed, problems);
    // While it still spins: what its end does is nobody's noise.
    observed.look();
    let load_ended = load.as_mut().and_then(Load::ended);
    spinner.gaps.ask_to_stop();
    if let Some(load) = load {
        load.end();
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    while !spinner.is_gone() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    if ended != Ended::Failure {
        // What it says about its own end, after it was asked to.
        problems.extend(spinner.failure());
        problems.extend(load_ended.and_then(load::failure));
    }
    let measurement = Measurement::new(
        &task,
        &mut spinner,
        &observed,
        plan.args.load.as_deref().map(|it| (it, load_ended)),
    );
    Ok((measurement, ended))
}

/// Waits until the loop runs.
fn wait_for(spinner: &mut Spinner, mode: Mode, stop: &AtomicBool) -> Result<(), NoiseError> {
    let not_started = |why: String| NoiseError::NotStarted { mode: mode.name(), why };
    let deadline = Instant::now() + PATIENCE;
    while !spinner.is_spinning() {
        if spinner.is_gone() {
            let why = spinner.failure().unwrap_or_else(|| "the measuring process ended".to_owned());
            return Err(not_started(why));
        }
        if stop.load(Ordering::Relaxed) {
            return Err(not_started("stopped by a signal".to_owned()));
        }
        if Instant::now() > deadline {
            return Err(not_started(format!("the measuring process was not ready after {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Shows progress until the time is over, a signal arrives, or something has failed.
fn watch(
    plan: &Plan<'_>,
    mode: Mode,
    before: Duration,
    spinner: &mut Spinner,
    mut load: Option<&mut Load>,
    observed: &mut Observed,
    problems: &mut Vec<String>,
) -> Ended {
    loop {
        let so_far = spinner.gaps.so_far();
        let watched = Duration::from_nanos(plan.clock.to_nanos(so_far.watched));
        let left = plan.length.saturating_sub(watched);
        if left.is_zero() {
            return Ended::Time;
        }
        if plan.stop.load(Ordering::Relaxed) {
            return Ended::Signal;
        }
        if spinner.is_gone() {
            let why = spinner.failure();
            problems.push(why.unwrap_or_else(|| "the measuring process ended before its time".to_owned()));
            return Ended::Failure;
        }
        if let Some(failure) = load.as_mut().and_then(|load| load.ended()).and_then(load::failure) {
            problems.push(failure);
            return Ended::Failure;
        }
        observed.look();
        if let Some(bar) = plan.bar {
            bar.set_position((before + watched.min(plan.length)).as_millis() as u64);
            let longest = short_time(plan.clock.to_nanos(so_far.longest));
            let (gaps, entries) = (grouped(so_far.count), grouped(observed.so_far()));
            bar.set_message(format!(
                "CPU {} · {} · {gaps} gaps, longest {longest} · {entries} interruptions",
                plan.args.cpu,
                mode.name()
            ));
        }
        std::thread::sleep(left.min(TICK));
    }
}

/// Finds out before the measurement whether its plot can be written; a file that was not there is not
/// there afterwards.
fn try_to_write(path: &Path) -> Result<(), NoiseError> {
    let failed = |source| NoiseError::PlotFile { path: path.to_owned(), source };
    let was_there = path.symlink_metadata().is_ok();
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(failed)?;
    if !was_there {
        std::fs::remove_file(path).map_err(failed)?;
    }
    Ok(())
}

fn write_plot(path: &Path, report: &Report) -> Result<(), NoiseError> {
    let svg = plot::draw(report).map_err(NoiseError::Plot)?;
    std::fs::write(path, svg).map_err(|source| NoiseError::PlotFile { path: path.to_owned(), source })
}
