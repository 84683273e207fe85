//! A learning bridge between ports, on one worker: the smallest complete program.
//!
//! `l2fwd [--unsafe-noiommu] PORT PORT...` (as root). A port is an interface of Linux, driven through AF_XDP, or
//! the address of a PCI function that `isoplane ports bind` gave to VFIO, such as `0000:00:02.0`. Ctrl-C stops it;
//! `isoplane top l2fwd` watches it. With `--unsafe-noiommu` nothing stands between PCI functions and the machine's
//! memory: they can write to all of it.

use isoplane::blocks::bridge::{Bridge, BridgeConfig};
use isoplane::drivers::Opener;
use isoplane::drivers::vfio::IommuChoice;
use isoplane::isolation::prepare::cpu;
use isoplane::memory::{HugePages, Pool, PoolConfig};
use isoplane::{Dataplane, Worker};
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("l2fwd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut names: Vec<String> = std::env::args().skip(1).collect();
    let unguarded = names.first().is_some_and(|name| name == "--unsafe-noiommu");
    names.drain(..usize::from(unguarded));
    if names.len() < 2 || names.iter().any(|name| name.starts_with('-')) {
        return Err("usage: l2fwd [--unsafe-noiommu] PORT PORT...".into());
    }

    // All ports share one pool, so that forwarding moves a 16-byte handle and no payload.
    let frames = 8192 * names.len() as u32;
    let mut config = PoolConfig::new("l2fwd", frames + 2048);
    if unguarded {
        // Memory that stays where it is.
        config.huge_pages = HugePages::Require2M;
    }
    let pool = Pool::create(&config)?;
    let mut plane = Dataplane::builder("l2fwd");
    let mut worker = Worker::new("bridge").frames(2048).counters(&Bridge::FIELDS);
    // The last CPU that we may use is the worker's, unless it is the only one. `isoplane doctor` says what
    // makes it quiet.
    let cpus: Vec<_> = cpu::allowed().iter().collect();
    if let [_, .., last] = cpus[..] {
        worker = worker.cpu(last.0);
    }
    let mut opener = Opener::new(&pool);
    if unguarded {
        opener = opener.iommu(IommuChoice::UnsafeNoIommu);
    }
    for name in &names {
        let port = plane.boxed_port(opener.open(name, 1)?);
        worker = worker.queue(port, 0);
    }

    // Checked here, where an error can be returned; built again in the worker, whenever it starts.
    let config = BridgeConfig::new(names.len());
    Bridge::new(&config)?;
    plane.worker(worker, move |_| Bridge::new(&config).expect("checked before launch"));

    let report = plane.launch()?.run_until_signal()?;
    println!("{} of {} frames accounted for", report.accounted(), report.frames());
    if report.is_clean() { Ok(()) } else { Err(format!("not a clean stop: {report:?}").into()) }
}
