//! `isoplane demo`: real traffic through a bridge on a worker.
//!
//! Contract: everything it makes is anonymous (namespaces and memory are descriptors), so nothing is
//! left however it ends. The dataplane is launched while the process has one thread; traffic and
//! progress come afterwards. Results go to standard output, progress and reasons to standard error.

mod kernel;
mod memory;
mod report;

use crate::cpus::Cpus;
use crate::format::{bps, grouped, pps, short_time};
use crate::progress;
use hdrhistogram::Histogram;
use isoplane::blocks::bridge::{Bridge, BridgeConfig, BridgeError};
use isoplane::drivers::xdp::XdpError;
use isoplane::memory::stats::{SegmentReader, StatsError};
use isoplane::memory::{HugePages, Pool, PoolConfig, PoolError};
use isoplane::{Builder, Dataplane, Kicks, LaunchError, PortRef, Running, Worker};
use isoplane_lab::LabError;
use isoplane_lab::traffic::{FlowReport, Traffic, round_trips};
use report::{Ended, Report, Scenery};
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Arguments of `isoplane demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How long traffic runs.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// What the bridge's ports are.
    #[arg(long, value_enum, default_value_t = Ports::Auto)]
    ports: Ports,
    /// Who tells the kernel that rings have work.
    #[arg(long, value_enum, default_value_t = WhoKicks::Kicker)]
    kicks: WhoKicks,
}

/// Who tells the kernel that rings have work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum WhoKicks {
    /// The worker itself, once a turn: each kick is a visit to the slow path.
    Inline,
    /// A housekeeping thread, so that the worker makes no system call.
    Kicker,
}

/// What the bridge's ports are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Ports {
    /// AF_XDP for root, in-memory for everybody else.
    Auto,
    /// AF_XDP on veth pairs, kernel traffic; needs root.
    AfXdp,
    /// In-memory ports, traffic made by this program; needs nothing.
    Memory,
}

/// Why the demo could not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// Namespaces, links or traffic.
    #[error("cannot set the namespaces up: {0}")]
    Lab(#[from] LabError),
    /// The pool.
    #[error("cannot make the frame pool: {0}")]
    Pool(#[from] PoolError),
    /// An AF_XDP port.
    #[error("cannot open an AF_XDP port: {0}")]
    Xdp(Box<XdpError>),
    /// The demo with AF_XDP, for one of the reasons here.
    #[error("{0} (isoplane demo --ports memory needs neither privileges nor AF_XDP)")]
    Kernel(Box<DemoError>),
    /// An in-memory port.
    #[error("cannot make an in-memory port: {0}")]
    Memory(#[from] isoplane::drivers::memory::MemoryError),
    /// The bridge.
    #[error("cannot make the bridge: {0}")]
    Bridge(#[from] BridgeError),
    /// The dataplane.
    #[error("cannot launch the dataplane: {0}")]
    Launch(#[from] LaunchError),
    /// Its statistics.
    #[error("cannot read the statistics: {0}")]
    Statistics(#[from] StatsError),
    /// Signals or output.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl DemoError {
    fn output(source: std::io::Error) -> Self {
        Self::Io { what: "cannot write the results", source }
    }

    /// Is it for lack of privileges?
    fn is_not_permitted(&self) -> bool {
        match self {
            Self::Lab(error) => error.is_not_permitted(),
            Self::Xdp(error) => matches!(**error, XdpError::NotPermitted { .. }),
            _ => false,
        }
    }
}

/// Two ports, and what will be sent between them.
struct Scene {
    builder: Builder,
    ports: [PortRef; 2],
    driver: String,
    scenery: Scenery,
    traffic: Box<dyn FnOnce() -> Result<Traffic, LabError>>,
    /// What must live as long as the dataplane; called when it has stopped.
    closing: Box<dyn FnOnce()>,
}

/// Frames of the worker, beyond those in rings.
const WORKER_FRAMES: u32 = 1024;

/// How often the progress line changes, and the end is looked for.
const TICK: Duration = Duration::from_millis(100);

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, DemoError> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The second one ends the program at once.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|source| DemoError::Io { what: "cannot listen for signals", source })?;
    }
    let root = nix::unistd::geteuid().is_root();
    let mut cpus = Cpus::share_out();
    let kicks = match args.kicks {
        WhoKicks::Kicker => Kicks::Kicker,
        WhoKicks::Inline => {
            cpus = cpus.without_kicker();
            Kicks::Inline
        }
    };
    let instead = |why: &str| {
        crate::say(&format!(
            "{why}; so this runs the same bridge over in-memory ports, with traffic of our own"
        ));
        memory::build()
    };
    let kernel = || kernel::build().map_err(|error| DemoError::Kernel(Box::new(error)));
    let scene = match args.ports {
        Ports::Memory => memory::build()?,
        Ports::Auto if !root => {
            instead("not root: namespaces and AF_XDP need it (sudo shows real kernel traffic)")?
        }
        Ports::AfXdp => kernel()?,
        Ports::Auto => match kernel() {
            // Root in a container may do less than its name says.
            Err(DemoError::Kernel(error)) if error.is_not_permitted() => instead(&error.to_string())?,
            other => other?,
        },
    };
    let Scene { mut builder, ports, driver, scenery, traffic, closing } = scene;
    let config = BridgeConfig::new(ports.len());
    Bridge::new(&config)?;
    let mut worker = Worker::new("bridge").frames(WORKER_FRAMES).idle(cpus.idle()).counters(&Bridge::FIELDS);
    if let Some(cpu) = cpus.worker {
        worker = worker.cpu(cpu);
    }
    for port in ports {
        worker = worker.queue(port, 0);
    }
    builder.kicks(kicks);
    if let Some(cpu) = cpus.kicker {
        builder.kicker_cpu(cpu);
    }
    // The same configuration made one just now, so it makes one again.
    builder.worker(worker, move |_| Bridge::new(&config).expect("checked before the launch"));
    let running = builder.launch()?;
    cpus.stay_off();
    let reader = running.segment().reader()?;
    let status = running.isolation(0).expect("there is one worker").clone();
    let mut reader_left = false;
    if !args.json {
        let headline = report::headline(&driver, &cpus, kicks, &scenery, args.seconds);
        let written = std::io::stdout().lock().write_all(headline.as_bytes());
        reader_left = crate::readers_end(written).map_err(DemoError::output)?;
        if reader_left {
            // Nobody is there to see more.
            stop.store(true, Ordering::Relaxed);
        }
    }
    let started = Instant::now();
    let traffic = traffic()?;
    let ended = watch(args, &running, &reader, &traffic, started, &stop);
    let flows = match ended {
        // Nobody is left to bring what is on its way.
        Ended::Failure(_) => traffic.stop_within(Duration::ZERO),
        _ => traffic.stop(),
    };
    let elapsed = started.elapsed();
    settle(&reader);
    let stop_report = running.stop();
    closing();
    let report = Report::new(&report::Facts {
        driver: &driver,
        cpus: &cpus,
        kicks,
        elapsed,
        ended,
        reader: &reader,
        flows: &flows,
        stop: &stop_report,
        status: &status,
    });
    progress::finish();
    if reader_left {
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = std::io::stdout().lock();
    let written = if args.json { report.write_json(&mut out) } else { report.write_tables(&mut out) };
    crate::readers_end(written.and_then(|()| out.flush())).map_err(DemoError::output)?;
    for reason in &report.problems {
        crate::say(reason);
    }
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The dataplane that both scenes put their ports in.
fn dataplane() -> Builder {
    Dataplane::builder("demo")
}

/// A few megabytes of frames: not worth pages that somebody would have to reserve first.
fn pool(frames: u32) -> Result<Arc<Pool>, PoolError> {
    Pool::create(&PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("demo", frames) })
}

/// Shows progress until the time is over, a signal arrives or the dataplane has ended.
fn watch(
    args: &Args,
    running: &Running,
    reader: &SegmentReader,
    traffic: &Traffic,
    started: Instant,
    stop: &AtomicBool,
) -> Ended {
    let length = Duration::from_secs(args.seconds);
    let bar = progress::line(length);
    let (mut frames, mut bytes, mut at) = (0, 0, started);
    loop {
        if stop.load(Ordering::Relaxed) {
            return Ended::Signal;
        }
        if let Some(failure) = running.failure() {
            return Ended::Failure(failure.to_string());
        }
        let left = length.saturating_sub(started.elapsed());
        if left.is_zero() {
            return Ended::Time;
        }
        std::thread::sleep(left.min(TICK));
        let Some(bar) = bar else { continue };
        let (now_frames, now_bytes) = (reader.total("tx_frames"), reader.total("tx_bytes"));
        let seconds = at.elapsed().as_secs_f64().max(1e-9);
        at = Instant::now();
        let rate = now_frames.saturating_sub(frames) as f64 / seconds;
        let bits = now_bytes.saturating_sub(bytes) as f64 * 8.0 / seconds;
        (frames, bytes) = (now_frames, now_bytes);
        bar.set_position(started.elapsed().min(length).as_millis() as u64);
        bar.set_message(line(rate, bits, &traffic.reports()));
    }
}

fn line(rate: f64, bits: f64, flows: &[FlowReport]) -> String {
    let (p50, p99) = percentiles(&round_trips(flows));
    let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), short_time);
    let lost: u64 = flows.iter().map(|f| f.counts.lost + f.counts.corrupt).sum();
    format!(
        "{:>9} · {:>10} · rtt {} (p99 {}) · {} lost",
        pps(rate),
        bps(bits),
        time(p50),
        time(p99),
        grouped(lost),
    )
}

/// The middle and the slow end of round trips, in nanoseconds.
fn percentiles(all: &Histogram<u64>) -> (Option<u64>, Option<u64>) {
    let at = |quantile| (!all.is_empty()).then(|| all.value_at_quantile(quantile));
    (at(0.5), at(0.99))
}

/// Waits until nothing moves any more: what the flows sent last is through.
fn settle(reader: &SegmentReader) {
    let now = || (reader.total("rx_frames"), reader.total("tx_frames"));
    let end = Instant::now() + Duration::from_secs(1);
    let mut last = now();
    let mut quiet = 0;
    while quiet < 3 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
        let next = now();
        quiet = if next == last { quiet + 1 } else { 0 };
        last = next;
    }
    // The watcher publishes what the kernel counted every 50 ms.
    std::thread::sleep(Duration::from_millis(60));
}
