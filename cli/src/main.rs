//! The `isoplane` command.
//!
//! Contract: results go to standard output, everything else to standard error; with `--json` standard
//! output holds JSON and nothing else. The exit code is 0 when all went well, 1 when it did not, 2 when
//! the command line made no sense (`doctor` has verdicts in the place of these, and says there which); a
//! reader that goes away early is no error. Nothing is started before the command needs it: `demo` launches a
//! dataplane, which wants a process with one thread.
#![deny(unsafe_code)]

mod cpus;
mod demo;
mod doctor;
mod format;
mod log;
mod noise;
mod ports;
mod progress;
mod run;
mod top;

use clap::{Parser, Subcommand};
use std::io::Write;
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
    /// Check whether this host leaves CPUs alone; say what to do about it, or do it.
    ///
    /// Exit status: 0 good, 1 warnings, 2 cannot isolate, 64 bad usage, 70 the doctor itself failed.
    Doctor(doctor::Args),
    /// Measure what is taken from a thread that spins on a CPU, and by whom.
    Noise(noise::Args),
    /// List network devices; give one to VFIO, or back to the kernel.
    Ports(ports::Args),
    /// Run a bridge or a router from a configuration file.
    Run(run::Args),
    /// Show the counters of running dataplanes.
    Top(top::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log::init(cli.verbose);
    let result = match cli.command {
        Command::Demo(args) => demo::run(&args).map_err(|e| Box::new(e) as Box<dyn std::error::Error>),
        Command::Doctor(args) => return doctor::run(&args, cli.verbose > 0),
        Command::Noise(args) => noise::run(&args).map_err(Into::into),
        Command::Ports(args) => ports::run(&args).map_err(Into::into),
        Command::Run(args) => run::run(&args).map_err(Into::into),
        Command::Top(args) => top::run(&args).map_err(Into::into),
    };
    result.unwrap_or_else(|error| {
        // Each error's text has its cause in it.
        say(&error.to_string());
        ExitCode::FAILURE
    })
}

/// Prints what was wrong with the command line, or the help that was asked for.
fn usage(error: &clap::Error) -> ExitCode {
    // Where nobody reads it, there is nobody to tell.
    let _ = error.print();
    let command = std::env::args_os().skip(1).find(|word| !word.to_string_lossy().starts_with('-'));
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        // 2 is one of the doctor's verdicts.
        _ if command.is_some_and(|command| command == "doctor") => ExitCode::from(doctor::USAGE),
        code => ExitCode::from(u8::try_from(code).unwrap_or(1)),
    }
}

/// Writes a line to standard error that names its own origin, if anybody reads that.
fn say_plainly(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
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
