//! Developer commands, run as `cargo xtask COMMAND` from anywhere in the work tree.
//!
//! Contract: a command does the set-up it needs, says what it installs, and exits non-zero when
//! anything failed or silently did less than it was asked to.
#![deny(unsafe_code)]

mod bench;
mod fuzz;
mod kernel;
mod packages;
mod parts;
mod report;
mod test;

use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer commands of isoplane")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Checks and tests everything; the last line is `N passed, N failed`.
    Test {
        /// Leaves a part out, and says so in the summary; may be given several times.
        #[arg(long, value_name = "PART", value_enum)]
        skip: Vec<parts::Part>,
        /// Adds what takes long: the guest with a kernel that checks itself, fuzzing, and the mutation check.
        #[arg(long)]
        full: bool,
    },
    /// Runs the side-by-side comparisons with peers.
    Bench {
        /// Which ones; all when none is named.
        names: Vec<String>,
        /// Prints one JSON object instead of a table.
        #[arg(long)]
        json: bool,
        /// Alternating runs of ours and the peer's; at least 5 for numbers worth quoting.
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
    /// Builds, boots and tests the kernel of kernel/patches, in QEMU.
    #[command(subcommand)]
    Kernel(kernel::Kernel),
}

/// The work tree's root: the directory above this package.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Test { skip, full } => test::run(&skip, full),
        Command::Bench { names, json, runs } => bench::run(&names, json, runs),
        Command::Kernel(command) => {
            return match kernel::run(command) {
                Ok(status) => ExitCode::from(status),
                Err(reason) => {
                    eprintln!("error: {reason}");
                    ExitCode::FAILURE
                }
            };
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::FAILURE
        }
    }
}
