//! A UDP server that sends back what it is sent, on one strict worker, written as a future.
//!
//! `udp_echo INTERFACE ADDRESS/LENGTH [PORT]` (as root). The address is the server's own: the interface's kernel
//! side must not have it.

use isoplane::blocks::host::tasks::{Tasks, TcpStream, UdpSocket};
use std::error::Error;
use std::future::{Ready, ready};

async fn echo(port: u16) {
    let socket = UdpSocket::open(port).expect("the configuration opens it");
    let mut datagram = [0; 1500];
    while let Ok((len, ends)) = socket.receive(&mut datagram).await {
        // What there is no room for is lost, as datagrams may be.
        let _ = socket.send(&datagram[..len], ends);
    }
}

/// Nobody listens, so there are no connections.
fn none(_: TcpStream) -> Ready<()> {
    ready(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let port = match args.get(2) {
        _ if !(2..=3).contains(&args.len()) => {
            return Err("usage: udp_echo INTERFACE ADDRESS/LENGTH [PORT]".into());
        }
        Some(port) => port.parse()?,
        None => 7,
    };
    isoplane_examples::serve(
        "udp_echo",
        &args,
        |host| host.udp(port),
        move |host| Tasks::with_background(host.connections, none, vec![Box::pin(echo(port))]),
    )
}
