//! Small programs to copy from. Each is one file beside this one:
//!
//! ```text
//! cargo run --release -p isoplane-examples --example l2fwd -- eth0 eth1
//! cargo run --release -p isoplane-examples --example tcp_echo -- eth0 192.0.2.1/24
//! cargo run --release -p isoplane-examples --example udp_echo -- eth0 192.0.2.1/24
//! cargo run --release -p isoplane-examples --example http -- eth0 192.0.2.1/24
//! cargo run --release -p isoplane-examples --example proxy -- eth0 192.0.2.1/24 80 192.0.2.20:8080
//! cargo run --release -p isoplane-examples --example embedded
//! cargo run --release -p isoplane-examples --example strict_loop -- --break
//! cargo run --release -p isoplane-examples --example slow_path
//! ```
//!
//! Here is what the host examples have in common: a strict worker with a host on an interface, from the command
//! line to a clean stop. `tcp_echo` has all of that in itself.

use isoplane::blocks::host::{Host, HostConfig, Service};
use isoplane::drivers::{Port, XdpConfig, XdpPort};
use isoplane::isolation::prepare::cpu;
use isoplane::memory::{Pool, PoolConfig};
use isoplane::wire::ethernet::MacAddress;
use isoplane::{Dataplane, Worker};
use std::error::Error;

/// Serves on `INTERFACE ADDRESS/LENGTH`, the first two of `args`, until Ctrl-C: `configure` says what else the
/// host shall be, and `make` makes its service whenever the worker starts.
///
/// # Errors
/// Whatever is wrong, in words.
pub fn serve<S: Service>(
    name: &str,
    args: &[String],
    configure: impl FnOnce(HostConfig) -> HostConfig,
    make: impl Fn(&HostConfig) -> S + Send + 'static,
) -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let [interface, address, ..] = args else { return Err("too few arguments".into()) };
    let pool = Pool::create(&PoolConfig::new(name, 16_384))?;
    let mut plane = Dataplane::builder(name);
    let port = XdpPort::open(&pool, &XdpConfig::new(interface))?;
    let mac = port.mac().ok_or("the interface has no Ethernet address")?;
    let config = configure(HostConfig::new(MacAddress(mac)).address(address.parse()?));
    Host::new(&config, make(&config))?;
    let mut worker = Worker::new("host").frames(4096).counters(&Host::<S>::FIELDS).queue(plane.port(port), 0);
    // The last CPU that we may use is the worker's, unless it is the only one.
    let cpus: Vec<_> = cpu::allowed().iter().collect();
    if let [_, .., last] = cpus[..] {
        worker = worker.cpu(last.0);
    }
    plane.worker(worker, move |_| Host::new(&config, make(&config)).expect("checked before launch"));
    let report = plane.launch()?.run_until_signal()?;
    if report.is_clean() { Ok(()) } else { Err(format!("not a clean stop: {report:?}").into()) }
}
