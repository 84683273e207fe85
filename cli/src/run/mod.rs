//! `isoplane run FILE.toml`: a bridge or a router from a configuration file.
//!
//! | file | what is there |
//! |---|---|
//! | [`source`] | the file's text, lines and columns, how a mistake is said |
//! | [`reader`], [`values`] | tables of TOML and their values, read so that every mistake is found |
//! | [`config`], [`bridge`], [`router`] | the model of a file |
//! | [`check`], [`machine`] | what tables say about each other, and what they ask of this machine |
//! | [`launch`], [`app`] | from the model to a dataplane that runs |
//! | [`reload`] | the file read again at SIGHUP |
//!
//! Contract: nothing is started from a file with a mistake. SIGINT and SIGTERM stop; SIGHUP reloads.

mod app;
mod bridge;
mod check;
mod config;
mod launch;
mod machine;
mod reader;
mod reload;
mod router;
mod source;
mod values;

use config::{Config, Forwarder};
use launch::StartError;
use reload::Reloader;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use source::Source;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Arguments of `isoplane run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The configuration file.
    file: PathBuf,
    /// Only look for mistakes: exit status 0 when there is none, 1 otherwise.
    #[arg(long)]
    check: bool,
    /// With --check: devices and CPUs that are not there are mistakes too, not only warnings.
    #[arg(long, requires = "check")]
    here: bool,
}

/// Why a file could not be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error("{file}: cannot be read: {source}", file = file.display())]
    Unreadable { file: PathBuf, source: std::io::Error },
    #[error("{file}: {}; nothing was started", plural(*mistakes, "mistake"), file = file.display())]
    Mistakes { file: PathBuf, mistakes: usize },
    #[error(transparent)]
    Start(#[from] Box<StartError>),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
}

/// How often signals, orders and the dataplane's state are looked at.
const TICK: Duration = Duration::from_millis(20);

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, RunError> {
    let file = || args.file.clone();
    let source = Source::read(&args.file).map_err(|source| RunError::Unreadable { file: file(), source })?;
    let tell = |mistakes: &[source::Mistake], kind: &str| {
        mistakes.iter().for_each(|mistake| crate::say_plainly(&source.say(mistake, kind)));
        Err(RunError::Mistakes { file: file(), mistakes: mistakes.len() })
    };
    let config = match Config::read(&source) {
        Ok(config) => config,
        Err(mistakes) => return tell(&mistakes, ""),
    };
    let lacks = machine::lacks(&config);
    if args.check && !args.here {
        let _ = tell(&lacks, "warning: ");
        return print(&format!("{}: no mistakes: {}", args.file.display(), shape(&config)));
    }
    if !lacks.is_empty() {
        return tell(&lacks, "");
    }
    if args.check {
        return print(&format!("{}: no mistakes: {}", args.file.display(), shape(&config)));
    }
    serve(args, config)
}

/// Starts the dataplane, and stays until it ends.
fn serve(args: &Args, config: Config) -> Result<ExitCode, RunError> {
    crate::log::prefer(config.log);
    let (stop, again) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for (signal, flag) in [(SIGINT, &stop), (SIGTERM, &stop), (SIGHUP, &again)] {
        signal_hook::flag::register(signal, Arc::clone(flag))
            .map_err(|source| RunError::Io { what: "cannot listen for signals", source })?;
    }
    let launched = launch::launch(&config).map_err(Box::new)?;
    let running = launched.running;
    let drivers = launched.drivers.join(", ");
    print(&format!("{}: running: {} ({drivers})", config.name, shape(&config)))?;
    let mut reloader = Reloader::new(config, launched.orders);
    let mut failed = false;
    while !stop.load(Ordering::Relaxed) {
        if let Some(failure) = running.failure() {
            crate::say(&failure.to_string());
            failed = true;
            break;
        }
        if again.swap(false, Ordering::Relaxed) {
            reloader.reload(&args.file);
        }
        reloader.pump();
        std::thread::sleep(TICK);
    }
    if let Some(sync) = launched.sync {
        tracing::info!("the kernel's routes were followed: {:?}", sync.stop());
    }
    let report = running.stop();
    print(&format!("{} of {} frames accounted for", report.accounted(), report.frames()))?;
    if report.is_clean() && !failed {
        return Ok(ExitCode::SUCCESS);
    }
    crate::say(&format!("not a clean stop: {report:?}"));
    Ok(ExitCode::FAILURE)
}

/// What a file makes, in a few words.
fn shape(config: &Config) -> String {
    let what = match config.forwarder {
        Forwarder::Bridge(_) => "bridge",
        Forwarder::Router(_) => "router",
    };
    format!(
        "a {what} of {} on {}",
        plural(config.ports.len(), "port"),
        plural(config.workers.len(), "worker")
    )
}

/// So many of something.
fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Prints a line of results.
fn print(line: &str) -> Result<ExitCode, RunError> {
    let mut out = std::io::stdout().lock();
    let written = writeln!(out, "{line}").and_then(|()| out.flush());
    crate::readers_end(written)
        .map_err(|source| RunError::Io { what: "cannot write the results", source })?;
    Ok(ExitCode::SUCCESS)
}
