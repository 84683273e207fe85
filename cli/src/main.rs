//! The `isoplane` command.
//!
//! Contract: results go to standard output, everything else to standard error; with `--json` standard
//! output holds JSON and nothing else. The exit code is 0 when all went well, 1 when it did not, 2 when
//! the command line made no sense; a reader that goes away early is no error. Nothing is started before the command needs it: `demo` launches a
//! dataplane, which wants a process with one thread.
#![deny(unsafe_code)]

mod cpus;
mod demo;
mod format;
mod noise;
mod progress;
mod top;

use clap::{Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

/// A userspace dataplane made for task isolation.
#[derive(Debug, Parser)]
#[command(name = "isoplane", version, arg_required_else_help = true)]
struct Cli {
    /// Say more (twice: everything). RUST_LOG has the last word.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move real traffic between two network namespaces through a bridge on a worker.
    Demo(demo::Args),
    /// Measure what is taken from a thread that spins on a CPU, and by whom.
    Noise(noise::Args),
    /// Show the counters of running dataplanes.
    Top(top::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = ["warn", "info", "debug"][usize::from(cli.verbose.min(2))];
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(progress::above)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let result = match cli.command {
        Command::Demo(args) => demo::run(&args).map_err(|e| Box::new(e) as Box<dyn std::error::Error>),
        Command::Noise(args) => noise::run(&args).map_err(Into::into),
        Command::Top(args) => top::run(&args).map_err(Into::into),
    };
    result.unwrap_or_else(|error| {
        // Each error's text has its cause in it.
        say(&error.to_string());
        ExitCode::FAILURE
    })
}

/// Tells the user something on standard error, if anybody reads that.
fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "isoplane: {what}");
}

/// Whether writing results ended because their reader has enough (`| head`): no error, a quiet end.
fn readers_end(written: std::io::Result<()>) -> std::io::Result<bool> {
    match written {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(true),
        Err(error) => Err(error),
    }
}
