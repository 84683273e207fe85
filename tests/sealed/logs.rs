//! `sealed logs`: a forked worker logs under the filter and the counting allocator; the program, which has
//! an ordinary subscriber, drains. Two lives of the worker, each killed while it goes on logging.
//!
//! Prints `events N lost N started N allocations N`.
#![allow(unsafe_code, reason = "fork")]

use super::{PATIENCE, seal};
use isoplane_isolation::diagnostics::{DrainReport, Drainer, Recorder, channel};
use isoplane_memory::Clock;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::fmt;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tracing::{Level, debug, error, info, trace, warn};

/// What the program's subscriber has written.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Dotted([u8; 4]);

impl fmt::Display for Dotted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d] = self.0;
        write!(f, "{a}.{b}.{c}.{d}")
    }
}

/// The worker: one event of each kind, many of one, then the same for ever.
fn work(recorder: &Recorder) -> ! {
    let _recording = recorder.install(1).expect("it is not installed");
    seal::seal(&[]).expect("a seccomp filter");
    // First and second hit of each callsite.
    for round in 0..2_u32 {
        info!(round, negative = -1, wide = u128::MAX, float = 0.5, yes = true, "one of each");
        warn!(text = "plain", address = %Dotted([192, 0, 2, 1]), some = ?Some(round), "formatted {round}");
        error!(long = ?[round; 1000], "cut");
        debug!(target: "quiet", "filtered by the program's directives");
        trace!("filtered by the level");
        let _span = tracing::info_span!("not recorded", round).entered();
        info!(enabled = tracing::enabled!(Level::INFO), "in a span");
    }
    for burst in 0..10_000_u64 {
        info!(burst);
    }
    loop {
        info!(allocations = seal::allocations(), "done");
    }
}

/// One life: until everything has been heard, or it has died.
fn live(recorder: &Recorder, drainer: &mut Drainer, sum: &mut DrainReport) -> Result<u64, String> {
    // What the life before has left: a ring that is full of it would take nothing new.
    drain(drainer, sum);
    LOG.lock().unwrap_or_else(PoisonError::into_inner).clear();
    // SAFETY: the process has one thread, and the child runs `work` only, which does not return.
    let child = match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
        ForkResult::Child => work(recorder),
        ForkResult::Parent { child } => child,
    };
    let ended = listen(child, drainer, sum);
    // It spins under a filter that kills it at any call, so it cannot end by itself. The pid is not reused
    // before the wait.
    let _ = kill(child, Signal::SIGKILL);
    let status = waitpid(child, None).map_err(|e| format!("wait: {e}"));
    let allocations = ended?;
    match status? {
        WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(allocations),
        other => Err(format!("the worker ended by itself: {other:?}")),
    }
}

fn drain(drainer: &mut Drainer, sum: &mut DrainReport) {
    let report = drainer.drain();
    (sum.events, sum.lost) = (sum.events + report.events, sum.lost + report.lost);
    (sum.started, sum.malformed) = (sum.started + report.started, sum.malformed + report.malformed);
}

/// Drains until the worker says that it is done; how much it allocated until then.
fn listen(child: Pid, drainer: &mut Drainer, sum: &mut DrainReport) -> Result<u64, String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        drain(drainer, sum);
        let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&log);
        if let Some(done) = text.lines().find(|line| line.contains(" done ")) {
            heard(&text)?;
            let number = done.split("allocations=").nth(1).and_then(|n| n.split(' ').next()?.parse().ok());
            return number.ok_or_else(|| format!("no number of allocations in {done:?}"));
        }
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT | WaitPidFlag::WEXITED;
        let state = nix::sys::wait::waitid(nix::sys::wait::Id::Pid(child), flags);
        if !matches!(state, Ok(WaitStatus::StillAlive)) {
            return Err(format!("killed: the worker made a system call: {state:?}; it said: {text}"));
        }
        if Instant::now() > deadline {
            return Err(format!("the worker does not get done; it said: {text}"));
        }
    }
}

/// Is everything in the program's log that must be, once for each round?
fn heard(log: &str) -> Result<(), String> {
    let wanted = [
        "one of each round=0 negative=-1 wide=340282366920938463463374607431768211455 float=0.5 yes=true",
        "one of each round=1 ",
        "formatted 0 text=\"plain\" address=192.0.2.1 some=Some(0)",
        "formatted 1 text=\"plain\" address=192.0.2.1 some=Some(1)",
        "cut long=[0, 0, ",
        "cut long=[1, 1, ",
        "truncated=true",
        "in a span enabled=true",
        "worker=\"sealed\" cpu=1 ",
    ];
    for text in wanted {
        if !log.contains(text) {
            return Err(format!("{text:?} is missing in the log: {log}"));
        }
    }
    if log.contains("filtered") {
        return Err(format!("what is filtered is in the log: {log}"));
    }
    Ok(())
}

fn run() -> Result<(), String> {
    tracing_subscriber::fmt().with_env_filter("debug,quiet=warn").with_ansi(false).with_writer(|| Log).init();
    let (recorder, source) = channel("sealed", 256).map_err(|e| e.to_string())?;
    let mut drainer = Drainer::new(Clock::tsc().ok());
    drainer.add(source);
    let mut sum = DrainReport::default();
    let mut allocations = 0;
    for _ in 0..2 {
        allocations += live(&recorder, &mut drainer, &mut sum)?;
    }
    let DrainReport { events, lost, started, malformed, .. } = sum;
    if malformed != 0 {
        return Err(format!("{malformed} records made no sense"));
    }
    println!("events {events} lost {lost} started {started} allocations {allocations}");
    Ok(())
}

pub(crate) fn main() -> ! {
    let code = run().map_or_else(
        |error| {
            eprintln!("{error}");
            1
        },
        |()| 0,
    );
    std::process::exit(code)
}
