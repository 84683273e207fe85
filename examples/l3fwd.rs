//! A router between interfaces, on one worker, that does what the kernel's routing table says.
//!
//! `l3fwd INTERFACE INTERFACE...` (as root). Give the interfaces addresses and switch forwarding on, as for a router
//! that is Linux alone; `ip route`, BIRD or FRR run it. Ctrl-C stops it; `isoplane top l3fwd` watches it. For a router
//! with more to say (VLANs, tables, limits, several workers) there is `isoplane run` with a file like `router.toml`.

use isoplane::blocks::router::{Router, RouterConfig, request};
use isoplane::drivers::xdp::Steering;
use isoplane::drivers::{XdpConfig, XdpPort};
use isoplane::isolation::prepare::cpu;
use isoplane::memory::{Pool, PoolConfig};
use isoplane::sync::{Sync, SyncConfig};
use isoplane::tables::{Tables, TablesConfig};
use isoplane::{Dataplane, PortId, Worker};
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("l3fwd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    if names.len() < 2 || names.iter().any(|name| name.starts_with('-')) {
        return Err("usage: l3fwd INTERFACE INTERFACE...".into());
    }

    let pool = Pool::create(&PoolConfig::new("l3fwd", 8192 * names.len() as u32 + 2048))?;
    let mut plane = Dataplane::builder("l3fwd");
    let mut worker = Worker::new("router").frames(2048).counters(&Router::FIELDS);
    if let [_, .., last] = cpu::allowed().iter().collect::<Vec<_>>()[..] {
        worker = worker.cpu(last.0);
    }
    let mut steering = Vec::new();
    for name in &names {
        // Nothing is taken from the kernel until the tables say what is ours.
        let port = XdpPort::open(&pool, &XdpConfig::new(name).steering(Steering::Matching(Vec::new())))?;
        steering.push(port.steering());
        worker = worker.queue(plane.port(port), 0);
    }

    // The worker reads the tables and asks for neighbours; the program writes the tables and answers.
    let (writer, tables) = Tables::create("l3fwd", &TablesConfig::default())?;
    let (requests, end) = request::requests("l3fwd", 1024)?;
    let config = RouterConfig::new(names.len());
    Router::new(&config, tables.clone(), end.open())?;
    plane.worker(worker, move |_| {
        Router::new(&config, tables.clone(), end.open()).expect("checked before launch")
    });
    let running = plane.launch()?;

    // From here on the kernel's routes, neighbours and addresses are the router's, and the kernel is left what is for it.
    let mut follow = SyncConfig::new(names.into_iter().zip((0..).map(PortId)));
    follow.steering = steering;
    let sync = Sync::start(follow, writer, vec![requests], running.epochs())?;
    println!("{} prefixes", sync.status().prefixes);

    let report = running.run_until_signal()?;
    println!("{} of {} frames accounted for", report.accounted(), report.frames());
    if report.is_clean() { Ok(()) } else { Err(format!("not a clean stop: {report:?}").into()) }
}
