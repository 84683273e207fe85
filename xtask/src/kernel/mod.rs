//! `cargo xtask kernel`: builds the kernel of kernel/patches, boots it in QEMU and tests it there.
//!
//! Contract: what was built once is not built again as long as nothing that goes into it changes
//! (`recipe`, `cache`). A guest never outlives us, and never writes to the machine outside what it is
//! given (`guest`).

mod cache;
mod console;
mod guest;
mod nics;
mod programs;
mod recipe;
mod source;
mod suite;
mod tap;
mod tools;

use crate::report::Tally;
use cache::{Cache, Entry};
use clap::{Args, Subcommand};
use guest::{Job, Machine};
use recipe::{Choice, MODULE_KEPT, Recipe};
use std::path::PathBuf;
use std::time::Duration;
use suite::Installed;

pub(crate) use suite::Ask;

#[derive(Debug, Subcommand)]
pub(crate) enum Kernel {
    /// Builds the kernel, or finds it in the cache, and prints where it is.
    Build {
        #[command(flatten)]
        choice: Choice,
    },
    /// Boots the guest, runs a command as root on its CPU 0, and exits with the command's status.
    Boot {
        #[command(flatten)]
        choice: Choice,
        #[command(flatten)]
        options: Options,
        /// Ends the guest after so many seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        limit: u64,
        /// The command and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Boots the guest with an interactive shell; leaving the shell ends it.
    Shell {
        #[command(flatten)]
        choice: Choice,
        #[command(flatten)]
        options: Options,
    },
    /// Runs the kselftests of the series and the crates' tests for the guest.
    Test {
        #[command(flatten)]
        choice: Choice,
        #[command(flatten)]
        options: Options,
        /// The mutation check instead: leaves out one hook of the series after the other, and fails when no test
        /// notices. Takes the kernel of --switches.
        #[arg(long)]
        mutants: bool,
        /// Only those with one of these in their name, such as `task_isolation/calls`; everything otherwise.
        filters: Vec<String>,
    },
}

/// How to boot.
#[derive(Debug, Clone, Args)]
pub(crate) struct Options {
    /// CPUs; all but the first are isolated.
    #[arg(long, default_value_t = 4)]
    cpus: u32,
    /// Adds kernel parameters.
    #[arg(long, value_name = "PARAMETERS", allow_hyphen_values = true)]
    append: Vec<String>,
    /// Adds one argument for QEMU, such as `--qemu=-device --qemu=e1000e`.
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    qemu: Vec<String>,
    /// Adds the network devices of the tests: four of virtio-net, four 82574L, and more.
    #[arg(long)]
    nics: bool,
    /// Shows the kernel's console as it comes, on standard error.
    #[arg(long)]
    console: bool,
    /// Makes time the number of instructions executed, a nanosecond each: the TSC counts instructions.
    #[arg(long)]
    counted: bool,
    /// A directory to which the guest may write: its /run/results.
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        let (append, qemu) = (Vec::new(), Vec::new());
        Self { cpus: 4, append, qemu, nics: false, console: false, counted: false, results: None }
    }
}

/// Runs the command; the exit status is the guest's command's.
pub(crate) fn run(command: Kernel) -> Result<u8, String> {
    match command {
        Kernel::Build { choice } => {
            println!("{}", kernel(&choice)?.path("").display());
            Ok(0)
        }
        Kernel::Boot { choice, options, limit, command } => {
            let entry = kernel(&choice)?;
            let machine = machine(&entry, &options)?;
            let script = command.iter().map(|word| suite::quoted(word)).collect::<Vec<_>>().join(" ");
            let job = Job {
                script: &script,
                results: options.results.as_deref(),
                limit: Duration::from_secs(limit),
                silence: Duration::from_secs(limit),
            };
            let status = machine.run(&job, |line| println!("{line}"))?.status()?;
            // More than 255 does not come out of a shell.
            Ok(u8::try_from(status).unwrap_or(u8::MAX))
        }
        Kernel::Shell { choice, options } => {
            let entry = kernel(&choice)?;
            machine(&entry, &options)?.shell(options.results.as_deref()).map(|()| 0)
        }
        Kernel::Test { mut choice, options, mutants, filters } => {
            if mutants && choice.debug {
                return Err("--mutants takes a kernel of its own, without what --debug checks".into());
            }
            choice.switches |= mutants;
            let ask = match (mutants, choice.debug) {
                (true, _) => Ask::Mutants,
                (_, true) => Ask::DebugTests,
                _ => Ask::Tests,
            };
            let tally = test(&choice, &options, &filters, ask)?;
            for reason in &tally.skipped {
                println!("skipped: {reason}");
            }
            for reason in &tally.not_here {
                println!("nothing to test here: {reason}");
            }
            println!("\n{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped.len());
            Ok(u8::from(tally.failed > 0 || !tally.skipped.is_empty()))
        }
    }
}

/// Everything in the guest, for `cargo xtask test`.
pub(crate) fn test_all(ask: Ask) -> Result<Tally, String> {
    let choice = Choice { debug: ask == Ask::DebugTests, switches: ask == Ask::Mutants, ..Choice::default() };
    test(&choice, &Options::default(), &[], ask)
}

/// Where the guest finds the directory for results.
pub(crate) const RESULTS: &str = "/run/results";
/// A boot that ends before the command begins, as it does on a host with too much to do, is made again.
const BOOTS: u32 = 3;

/// Runs a bench in the guest, with its network devices, a CPU for the forwarder and one for everything else. What it
/// says goes to standard error; `results` is where it may leave files.
pub(crate) fn bench(
    program: &std::path::Path,
    args: &[String],
    results: &std::path::Path,
    counted: bool,
) -> Result<bool, String> {
    let entry = kernel(&Choice::default())?;
    let options =
        Options { cpus: 2, nics: true, counted, results: Some(results.to_owned()), ..Options::default() };
    let mut machine = machine(&entry, &options)?;
    machine.keep.extend(program.parent().map(std::path::Path::to_owned));
    let words = std::iter::once(program.to_string_lossy().into_owned()).chain(args.iter().cloned());
    let script = words.map(|word| suite::quoted(&word)).collect::<Vec<_>>().join(" ");
    let limit = Duration::from_secs(3600);
    let job = Job { script: &script, results: Some(results), limit, silence: Duration::from_secs(900) };
    let mut outcome = machine.run(&job, |line| eprintln!("{line}"))?;
    for _ in 1..BOOTS {
        if outcome.booted.is_some() {
            break;
        }
        eprintln!("the guest did not boot: once more");
        outcome = machine.run(&job, |line| eprintln!("{line}"))?;
    }
    Ok(outcome.status()? == 0)
}

fn test(choice: &Choice, options: &Options, filters: &[String], ask: Ask) -> Result<Tally, String> {
    let entry = kernel(choice)?;
    let kselftests = Recipe::new(choice)?.kselftests(&Cache::of_user()?)?;
    let mut machine = machine(&entry, options)?;
    let installed = Installed {
        kselftests: kselftests.as_ref().map(|entry| entry.path("")),
        module: entry.path(MODULE_KEPT),
    };
    machine.keep.extend(installed.kselftests.clone());
    suite::run(&machine, &installed, filters, ask)
}

/// The chosen kernel.
fn kernel(choice: &Choice) -> Result<Entry, String> {
    tools::to_build()?;
    Recipe::new(choice)?.kernel(&Cache::of_user()?)
}

fn machine(entry: &Entry, options: &Options) -> Result<Machine, String> {
    tools::to_boot()?;
    if !(1..=8).contains(&options.cpus) {
        return Err(format!("--cpus {}: the guest's kernel takes 1 to 8", options.cpus));
    }
    if let Some(dir) = options.results.as_deref().filter(|dir| !dir.is_dir()) {
        return Err(format!("--results {}: no such directory", dir.display()));
    }
    let mut machine = Machine::new(entry.path("bzImage"));
    machine.keep.push(entry.path(""));
    machine.cpus = options.cpus;
    machine.append.clone_from(&options.append);
    machine.qemu.clone_from(&options.qemu);
    machine.nics = options.nics;
    machine.console = options.console;
    machine.counted = options.counted;
    Ok(machine)
}
