//! `isoplane top`: the counters of running dataplanes.
//!
//! Contract: it only reads. It maps each statistics segment read-only, so it can neither disturb a
//! worker nor be disturbed by a program that dies; what it cannot inspect it does not list.

mod isolation;
mod screen;
mod text;
mod view;

use isoplane::memory::stats::{Found, find};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
pub(crate) use text::table;
pub(crate) use view::{Snapshot, View, view};

/// Arguments of `isoplane top`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only the dataplanes of this name.
    name: Option<String>,
    /// Print once and end, instead of watching.
    #[arg(long)]
    once: bool,
    /// Print JSON: one object, or without --once one a line and interval.
    #[arg(long)]
    json: bool,
    /// Seconds between looks; rates are averages over them.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = interval)]
    interval: f64,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give seconds from 0.05 to 3600".to_owned()),
    }
}

/// Rates of `--once` are averages over this time.
const ONCE: Duration = Duration::from_millis(250);

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TopError {
    /// None was found.
    #[error(
        "no dataplane is running{}{}",
        name.as_ref().map(|n| format!(" under the name {n:?}")).unwrap_or_default(),
        if *root { "; start one, for example with: isoplane demo" }
        else { " that this user may inspect; try it with sudo" }
    )]
    None {
        /// The name asked for.
        name: Option<String>,
        /// Could everything be inspected?
        root: bool,
    },
    /// `/proc` or the terminal failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl TopError {
    const fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// A dataplane that is watched.
pub(crate) struct Watched {
    found: Found,
    before: Snapshot,
    now: Snapshot,
}

impl Watched {
    fn new(found: Found) -> Self {
        let now = Snapshot::of(&found.reader);
        Self { before: now.clone(), now, found }
    }

    fn look(&mut self) {
        self.before = std::mem::replace(&mut self.now, Snapshot::of(&self.found.reader));
    }

    fn view(&self) -> View {
        view(&self.found.reader, &self.before, &self.now)
    }

    /// A segment outlives its program as long as we map it.
    fn runs(&self) -> bool {
        std::path::Path::new("/proc").join(self.found.pid.to_string()).exists()
    }
}

fn search(args: &Args) -> Result<Vec<Watched>, TopError> {
    let found = find(args.name.as_deref()).map_err(TopError::io("cannot look through /proc"))?;
    Ok(found.into_iter().map(Watched::new).collect())
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, TopError> {
    let mut watched = search(args)?;
    if watched.is_empty() {
        let root = nix::unistd::geteuid().is_root();
        return Err(TopError::None { name: args.name.clone(), root });
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))
            .map_err(TopError::io("cannot listen for signals"))?;
    }
    let interval = Duration::from_secs_f64(args.interval);
    if args.once {
        pause(ONCE.min(interval), &stop);
        watched.iter_mut().for_each(Watched::look);
        crate::readers_end(print(args, &watched)).map_err(TopError::io("cannot write"))?;
    } else if args.json || !std::io::stdout().is_terminal() {
        while !stop.load(Ordering::Relaxed) {
            pause(interval, &stop);
            watched.retain(Watched::runs);
            if watched.is_empty() {
                break;
            }
            watched.iter_mut().for_each(Watched::look);
            if crate::readers_end(print(args, &watched)).map_err(TopError::io("cannot write"))? {
                break;
            }
        }
    } else {
        screen::run(args, watched, interval, &stop).map_err(TopError::io("cannot use the terminal"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Sleeps, but not past a signal.
fn pause(time: Duration, stop: &AtomicBool) {
    let end = Instant::now() + time;
    while !stop.load(Ordering::Relaxed) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
}

/// The JSON object.
#[derive(serde::Serialize)]
struct All {
    dataplanes: Vec<View>,
}

fn print(args: &Args, watched: &[Watched]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let views: Vec<View> = watched.iter().map(Watched::view).collect();
    if args.json {
        let all = All { dataplanes: views };
        if args.once {
            serde_json::to_writer_pretty(&mut out, &all)?;
        } else {
            serde_json::to_writer(&mut out, &all)?;
        }
        writeln!(out)?;
    } else {
        for view in &views {
            text::write(&mut out, view)?;
        }
    }
    out.flush()
}
