//! ICMP echo: requests of ours, answered by the other kernel.

use super::exchange::{self, Arrival, Wire};
use super::{Endpoint, LOOK, Meter, content};
use crate::LabError;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Type, code, checksum, identifier, sequence number (RFC 792, RFC 4443 section 4.1).
const HEADER: usize = 8;
/// The request's full number, in front of the content.
const NUMBER: usize = 8;

struct Echo {
    socket: Socket,
    v6: bool,
    identifier: u16,
    largest: usize,
    buffer: Vec<u8>,
}

pub(super) fn start(
    client: Endpoint<'_>,
    server: Endpoint<'_>,
    window: usize,
    largest: usize,
    meter: &Arc<Meter>,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<(), LabError> {
    let v6 = server.address.is_ipv6();
    let inside = client.namespace.enter()?;
    let socket = open(client, server, v6);
    inside.leave()?;
    let socket = socket.map_err(|e| LabError::socket("opening a raw socket for ICMP echo", e))?;
    let mut echo = Echo {
        socket,
        v6,
        // Only its own answers pass the check on receive, also with several flows in a namespace.
        identifier: (Arc::as_ptr(meter) as usize >> 4) as u16,
        largest: largest.max(NUMBER),
        buffer: vec![0; 65_536],
    };
    let meter = Arc::clone(meter);
    threads.push(client.namespace.spawn("lab-icmp", move || exchange::run(&mut echo, window, &meter))?);
    Ok(())
}

fn open(client: Endpoint<'_>, server: Endpoint<'_>, v6: bool) -> io::Result<Socket> {
    let (domain, protocol) =
        if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.bind(&SockAddr::from(SocketAddr::new(client.address, 0)))?;
    socket.connect(&SockAddr::from(SocketAddr::new(server.address, 0)))?;
    socket.set_read_timeout(Some(LOOK))?;
    socket.set_write_timeout(Some(LOOK))?;
    socket.set_recv_buffer_size(4 << 20)?;
    Ok(socket)
}

impl Wire for Echo {
    fn send(&mut self, number: u64) -> io::Result<usize> {
        let length = HEADER + content::size(number, NUMBER, self.largest);
        let packet = &mut self.buffer[..length];
        packet[..HEADER].fill(0);
        packet[0] = if self.v6 { 128 } else { 8 };
        packet[4..6].copy_from_slice(&self.identifier.to_be_bytes());
        packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
        packet[HEADER..HEADER + NUMBER].copy_from_slice(&number.to_be_bytes());
        content::fill(number, &mut packet[HEADER + NUMBER..]);
        // The kernel fills ICMPv6 checksums in, and not ICMP's.
        if !self.v6 {
            let sum = checksum(packet).to_be_bytes();
            packet[2..4].copy_from_slice(&sum);
        }
        self.socket.send(packet).map(|length| length.saturating_sub(HEADER))
    }

    fn receive(&mut self) -> io::Result<Arrival> {
        let Some(length) = exchange::in_time((&self.socket).read(&mut self.buffer))? else {
            return Ok(Arrival::Nothing);
        };
        let packet = &self.buffer[..length];
        // IPv4 raw sockets deliver the IP header too.
        let ip = if self.v6 { 0 } else { packet.first().map_or(0, |b| usize::from(b & 0xf) * 4) };
        let answer = if self.v6 { 129 } else { 0 };
        let Some((header, body)) = packet.get(ip..).and_then(|icmp| icmp.split_at_checked(HEADER)) else {
            return Ok(Arrival::Nothing);
        };
        if header[0] != answer || header[4..6] != self.identifier.to_be_bytes() {
            return Ok(Arrival::Nothing);
        }
        let Some((number, bytes)) = body.split_first_chunk::<NUMBER>() else {
            return Ok(Arrival::Corrupt);
        };
        let number = u64::from_be_bytes(*number);
        let right = body.len() == content::size(number, NUMBER, self.largest)
            && header[6..8] == (number as u16).to_be_bytes()
            && content::is(number, bytes);
        Ok(if right { Arrival::Answer(number, body.len()) } else { Arrival::Corrupt })
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    /// The example of RFC 1071 section 3: the sum of these words is ddf2.
    #[test]
    fn checksum_of_the_rfc() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(super::checksum(&bytes), !0xddf2);
        assert_eq!(super::checksum(&bytes[..7]), super::checksum(&[&bytes[..7], &[0]].concat()));
    }
}
