//! Both routes in a thread that is isolated for real: the ring without a breach and without a visit, the
//! slow path with one visit an event and without a breach.

#[path = "../common/mod.rs"]
mod common;
#[path = "../ear/mod.rs"]
mod ear;

use common::tests;
use isoplane_isolation::diagnostics::{Drainer, ThroughSlowPath, channel};
use isoplane_isolation::{Budget, Isolation, Status};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::fmt;
use std::io::{Read, Seek};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tracing::{info, warn};

fn main() -> ExitCode {
    common::main(tests![
        the_ring_costs_no_breach_and_no_visit,
        the_slow_path_costs_a_visit_an_event,
        a_first_event_while_armed_asks_the_program_without_a_breach,
        an_event_of_a_signal_handler_leaves_the_interrupted_one_whole,
    ])
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

fn status() -> Status {
    Status::create("test").expect("a status block")
}

fn the_ring_costs_no_breach_and_no_visit() {
    if !common::root("locking memory") {
        return;
    }
    let (recorder, source) = channel("strict", 512).expect("a channel");
    let mut drainer = Drainer::new(None);
    drainer.add(source);
    let status = status();
    let mut prepared = Isolation::unpinned().status(status.clone()).prepare().expect("prepared");
    let recorder = recorder.level(tracing::level_filters::LevelFilter::DEBUG).status(status.clone());
    let recording = recorder.install(0).expect("it installs");
    let mut strict = prepared.arm().expect("armed");
    for turn in 0..200_u64 {
        info!(turn, even = turn % 2 == 0, "turn {turn} of {}", 200);
        if turn % 2 == 0 {
            warn!(half = turn as f64 / 2.0, list = ?[turn; 300]);
        }
        strict.turn().expect("no breach");
    }
    strict.disarm();
    drop(recording);
    let said = status.snapshot();
    assert_eq!(said.breaches.total(), 0, "{:?}", status.breaches(0));
    assert_eq!((said.slow_path_visits, said.records, said.records_lost), (0, 300, 0));
    let heard = ear::listen(|| while drainer.drain().more {});
    assert_eq!(heard.len(), 300);
    let turns: Vec<_> = heard.iter().filter_map(|h| h.field("turn").map(str::to_owned)).collect();
    assert_eq!(turns, (0..200).map(|n| format!("u64 {n}")).collect::<Vec<_>>());
    assert_eq!(heard[0].field("message"), Some("debug turn 0 of 200"));
}

fn the_slow_path_costs_a_visit_an_event() {
    if !common::root("locking memory") {
        return;
    }
    let mut file = tempfile::tempfile().expect("a file");
    let writer = file.try_clone().expect("a second descriptor");
    tracing_subscriber::fmt().with_ansi(false).with_writer(writer).init();
    let program = tracing::dispatcher::get_default(Clone::clone);
    let (recorder, source) = channel("strict", 64).expect("a channel");
    let status = status();
    let isolation = Isolation::unpinned().budget(Budget::new(10, Duration::from_secs(3600)));
    let mut prepared = isolation.status(status.clone()).prepare().expect("prepared");
    let recording = ThroughSlowPath::new(program).install(Some(&recorder), 0).expect("it installs");
    let mut strict = prepared.arm().expect("armed");
    for number in 0..15 {
        info!(number, "written by the worker itself");
        strict.turn().expect("no breach");
    }
    strict.disarm();
    assert_eq!(recording.refused(), 5);
    drop(recording);
    let said = status.snapshot();
    assert_eq!(said.breaches.total(), 0, "{:?}", status.breaches(0));
    assert_eq!((said.slow_path_visits, said.slow_path_refused), (10, 5));
    assert_eq!(source.recorded(), 5, "what the budget refused is in the ring");
    file.rewind().expect("the start");
    let mut text = String::new();
    file.read_to_string(&mut text).expect("text");
    let lines: Vec<_> = text.lines().filter(|line| line.contains("written by the worker itself")).collect();
    assert_eq!(lines.len(), 10, "{text}");
    assert!(lines.iter().enumerate().all(|(n, line)| line.ends_with(&format!("number={n}"))), "{text}");
}

/// `tracing` asks every subscriber for its interest in a new callsite, so the program's too; the usual ones
/// answer without the kernel.
fn a_first_event_while_armed_asks_the_program_without_a_breach() {
    if !common::root("locking memory") {
        return;
    }
    tracing_subscriber::fmt().with_env_filter("info,quiet=off").with_writer(std::io::sink).init();
    let (recorder, source) = channel("strict", 64).expect("a channel");
    let status = status();
    let mut prepared = Isolation::unpinned().status(status.clone()).prepare().expect("prepared");
    let recording = recorder.install(0).expect("it installs");
    let mut strict = prepared.arm().expect("armed");
    info!("the first of its callsite");
    tracing::error!(target: "quiet", "the program's directives say no");
    tracing::debug!("below the program's level");
    strict.turn().expect("no breach");
    strict.disarm();
    drop(recording);
    assert_eq!(status.snapshot().breaches.total(), 0, "{:?}", status.breaches(0));
    assert_eq!(source.recorded(), 1);
}

/// Raises a signal while it is formatted.
struct Interrupted;

impl fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("before ")?;
        nix::sys::signal::raise(Signal::SIGUSR1).expect("raised");
        f.write_str("after")
    }
}

extern "C" fn logs(_signal: i32) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    info!("from the handler");
}

fn an_event_of_a_signal_handler_leaves_the_interrupted_one_whole() {
    let action = SigAction::new(SigHandler::Handler(logs), SaFlags::empty(), SigSet::empty());
    // SAFETY: recording allocates nothing, takes no lock and does not block.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.expect("a handler");
    let (recorder, source) = channel("signal", 64).expect("a channel");
    let mut drainer = Drainer::new(None);
    drainer.add(source);
    let recording =
        recorder.level(tracing::level_filters::LevelFilter::INFO).install(0).expect("it installs");
    info!(x = ?Interrupted, y = 1);
    nix::sys::signal::raise(Signal::SIGUSR1).expect("raised");
    drop(recording);
    assert_eq!(HANDLED.load(Ordering::Relaxed), 2);
    let heard = ear::listen(|| assert_eq!(drainer.drain().malformed, 0));
    let fields: Vec<_> = heard.iter().map(|h| (h.field("x"), h.field("message"))).collect();
    // The handler's first event came within another one; its second stands alone.
    assert_eq!(fields, [(Some("debug before after"), None), (None, Some("debug from the handler"))]);
}
