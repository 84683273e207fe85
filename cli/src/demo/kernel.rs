//! The demo with real kernels at both ends: two client namespaces, and one for the bridge's ports.

use super::report::Scenery;
use super::{DemoError, Scene, WORKER_FRAMES, dataplane, pool};
use isoplane::drivers::Port;
use isoplane::drivers::xdp::{XdpConfig, XdpPort, ZeroCopy};
use isoplane::memory::Pool;
use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, VethEnd, veth};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// Together fewer frames than a veth's ring holds (256) in each direction, so nothing overflows:
/// 4 + 32 requests, and at most 128 KiB of TCP (the kernel doubles what a socket asks for).
const FLOWS: [Flow; 3] = [
    Flow::Echo { window: 4, largest: 1472 },
    Flow::Datagrams { window: 32, largest: 1472 },
    Flow::Bulk { buffer: 64 << 10 },
];

/// Makes namespaces, links and ports.
pub(super) fn build() -> Result<Scene, DemoError> {
    let client = Namespace::new()?;
    let server = Namespace::new()?;
    let middle = Namespace::new()?;
    // The bridge's ends belong to the bridge alone: no addresses, no talk of their own.
    middle.disable_ipv6()?;
    for (namespace, address, port) in [(&client, CLIENT, "to-client"), (&server, SERVER, "to-server")] {
        veth::pair(&VethEnd::new(namespace, "eth0").address(address, 24), &VethEnd::new(&middle, port))?;
    }
    let pool = pool(8 * WORKER_FRAMES)?;
    let inside = middle.enter()?;
    let to_client = open("to-client", &pool)?;
    let to_server = open("to-server", &pool)?;
    inside.leave()?;
    let driver = to_client.driver().to_owned();
    let mut builder = dataplane();
    let ports = [builder.port(to_client), builder.port(to_server)];
    let (from, to) = (client.try_clone()?, server.try_clone()?);
    Ok(Scene {
        builder,
        ports,
        driver,
        scenery: Scenery {
            ends: [format!("{CLIENT} (kernel)"), format!("{SERVER} (kernel)")],
            wire: " veth ",
        },
        traffic: Box::new(move || {
            let client = Endpoint { namespace: &from, address: IpAddr::from(CLIENT) };
            let server = Endpoint { namespace: &to, address: IpAddr::from(SERVER) };
            Traffic::start(client, server, &FLOWS)
        }),
        closing: Box::new(move || drop((client, server, middle))),
    })
}

fn open(interface: &str, pool: &Arc<Pool>) -> Result<XdpPort, DemoError> {
    // veth has no zero-copy mode; asking for it would only be refused.
    let config = XdpConfig { zero_copy: ZeroCopy::Never, ..XdpConfig::new(interface) };
    XdpPort::open(pool, &config).map_err(|error| DemoError::Xdp(Box::new(error)))
}
