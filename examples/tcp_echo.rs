//! A TCP server that sends back what it is sent, on one strict worker: the smallest service.
//!
//! `tcp_echo INTERFACE ADDRESS/LENGTH [PORT]` (as root). The address is the server's own: the interface's kernel
//! side must not have it. Ctrl-C stops it; `isoplane top tcp_echo` watches it.

use isoplane::blocks::host::{Connection, Host, HostConfig, Service};
use isoplane::drivers::{Port, XdpConfig, XdpPort};
use isoplane::isolation::prepare::cpu;
use isoplane::memory::{Pool, PoolConfig};
use isoplane::wire::ethernet::MacAddress;
use isoplane::{Dataplane, Worker};
use std::error::Error;

/// Sends back what it reads; keeps nothing for a connection.
struct Echo;

impl Service for Echo {
    type State = ();

    fn accept(&mut self, _: &mut Connection<'_>) -> Option<()> {
        Some(())
    }

    fn readable(&mut self, connection: &mut Connection<'_>, _: &mut ()) {
        // What there is no room for stays unread: the peer's window closes, and `writable` goes on.
        connection.echo();
    }

    fn writable(&mut self, connection: &mut Connection<'_>, state: &mut ()) {
        self.readable(connection, state);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (interface, address, port) = match &args[..] {
        [interface, address] => (interface, address.parse()?, 7),
        [interface, address, port] => (interface, address.parse()?, port.parse()?),
        _ => return Err("usage: tcp_echo INTERFACE ADDRESS/LENGTH [PORT]".into()),
    };
    let pool = Pool::create(&PoolConfig::new("tcp_echo", 16_384))?;
    let mut plane = Dataplane::builder("tcp_echo");
    let xdp = XdpPort::open(&pool, &XdpConfig::new(interface))?;
    let mac = xdp.mac().ok_or("the interface has no Ethernet address")?;
    let config = HostConfig::new(MacAddress(mac)).address(address).listen(port);
    Host::new(&config, Echo)?;
    let mut worker =
        Worker::new("host").frames(2048).counters(&Host::<Echo>::FIELDS).queue(plane.port(xdp), 0);
    let cpus: Vec<_> = cpu::allowed().iter().collect();
    if let [_, .., last] = cpus[..] {
        worker = worker.cpu(last.0);
    }
    plane.worker(worker, move |_| Host::new(&config, Echo).expect("checked before launch"));
    let report = plane.launch()?.run_until_signal()?;
    if report.is_clean() { Ok(()) } else { Err(format!("not a clean stop: {report:?}").into()) }
}
