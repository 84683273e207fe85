//! A worker that meets an error now and then, logs it through the slow path, and goes on. Needs no
//! privileges: its port is a null port, which hands out frames without end.
//!
//! Log lines of a worker go through a ring by default, for housekeeping to write, and need nothing of this.
//! This worker writes them itself (`Diagnostics::SlowPath`), as a program would whose lines must be out before
//! the next packet is looked at.
//!
//! What to copy: `turn.slow_path(|kernel| ...)` around what enters the kernel; a budget, so that a flood of
//! errors cannot turn the worker into a logger; counting what the budget refused.

use isoplane::drivers::null::{NullConfig, NullPort};
use isoplane::isolation::diagnostics::Diagnostics;
use isoplane::isolation::prepare::cpu;
use isoplane::isolation::{Budget, Cpu};
use isoplane::memory::stats::Field;
use isoplane::memory::{Batch, HugePages, Pool, PoolConfig};
use isoplane::{App, Dataplane, DropReason, PortId, Turn, Worker, WorkerIsolation};
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// One packet in so many is taken for a bad one.
const BAD_EVERY: u64 = 10_000_000;
/// Errors that the worker meets before it is content with everything.
const ERRORS: u64 = 5;
/// Lines that it may log in an hour; what is over that is counted, not logged.
const LINES: u32 = 3;

/// Places of the app's counters, in the order in which the worker declares them.
const LOGGED: usize = 0;
const NOT_LOGGED: usize = 1;
const FIELDS: [Field; 2] = [Field::counter("logged"), Field::counter("not_logged")];

struct Inspect {
    packets: u64,
    errors: u64,
}

impl App for Inspect {
    fn packets(&mut self, turn: &mut Turn<'_>, _from: PortId, batch: &mut Batch) {
        for frame in batch.drain() {
            self.packets += 1;
            if self.packets.is_multiple_of(BAD_EVERY) && self.errors < ERRORS {
                self.error(turn);
            }
            turn.drop(frame, DropReason::Policy);
        }
    }
}

impl Inspect {
    /// Cold, and the only place of this app that enters the kernel. It is strict again when this returns.
    #[cold]
    fn error(&mut self, turn: &mut Turn<'_>) {
        self.errors += 1;
        let packet = self.packets;
        match turn.slow_path(|_kernel| tracing::error!(packet, "this packet looks bad")) {
            Ok(()) => turn.count(LOGGED, 1),
            // It was not logged, and nothing has entered the kernel.
            Err(_over_budget) => turn.count(NOT_LOGGED, 1),
        }
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("slow_path: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let pool =
        Pool::create(&PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("slow_path", 1024) })?;
    let mut plane = Dataplane::builder("slow_path");
    let port = plane.port(NullPort::open(&pool, &NullConfig::new("null"))?);
    plane.isolation(WorkerIsolation {
        budget: Budget::new(LINES, Duration::from_secs(3600)),
        diagnostics: Diagnostics::SlowPath,
        ..WorkerIsolation::default()
    });
    let mut worker = Worker::new("inspect").queue(port, 0).counters(&FIELDS);
    // On a CPU of its own, what interrupts the worker can be counted.
    if let Some(Cpu(cpu)) = cpu::allowed().iter().last() {
        worker = worker.cpu(cpu);
    }
    plane.worker(worker, |setup| {
        // Not isolated yet: the first line of a subscriber touches memory that no later one does.
        tracing::info!(worker = setup.worker, "ready");
        Inspect { packets: 0, errors: 0 }
    });
    let running = plane.launch()?;

    let statistics = running.statistics();
    let start = Instant::now();
    while statistics.total("logged") + statistics.total("not_logged") < ERRORS {
        if let Some(failure) = running.failure() {
            return Err(failure.to_string().into());
        }
        if start.elapsed() > Duration::from_secs(30) {
            return Err("the worker met too few errors in 30 s".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let (logged, not_logged) = (statistics.total("logged"), statistics.total("not_logged"));
    let status = running.isolation(0).ok_or("the worker is not isolated")?.clone();
    let report = running.stop();

    let found = status.snapshot();
    println!("{ERRORS} errors: {logged} logged, {not_logged} over the budget");
    println!("slow path      {} visits, {} refused", found.slow_path_visits, found.slow_path_refused);
    println!("backend        {}", status.backend().map_or("none", |backend| backend.name()));
    println!("breaches       {} {:?}", found.breaches.total(), found.breaches);
    println!("interruptions  {} {:?}", found.interruptions.total(), found.interruptions);
    if report.is_clean() { Ok(()) } else { Err(format!("not a clean stop: {report:?}").into()) }
}
