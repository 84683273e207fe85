//! UDP requests of ours to a server of ours, which answers with other bytes.

use super::exchange::{self, Arrival, Wire};
use super::{Endpoint, LOOK, Meter, content};
use crate::LabError;
use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A request's number and what it is: in front of the content.
pub(super) const HEADER: usize = 16;
pub(super) const LEAST: usize = HEADER + 2;
pub(super) const REQUEST: u64 = 0x7265_7175_6573_7421;
pub(super) const RESPONSE: u64 = 0x7265_7370_6f6e_7365;

/// A message of one kind, checked byte for byte; `None` when it is not one.
pub(super) fn number_of(message: &[u8], kind: u64, largest: usize) -> Option<u64> {
    let (number, rest) = message.split_first_chunk::<8>()?;
    let (found, content) = rest.split_first_chunk::<8>()?;
    let number = u64::from_be_bytes(*number);
    let right = u64::from_be_bytes(*found) == kind
        && message.len() == length(number, kind, largest)
        && content::is(number ^ kind, content);
    right.then_some(number)
}

/// Requests and responses have different sizes.
fn length(number: u64, kind: u64, largest: usize) -> usize {
    content::size(number ^ kind, LEAST, largest)
}

/// Writes a message of one kind; it is as long as its number says.
pub(super) fn write(buffer: &mut [u8], number: u64, kind: u64, largest: usize) -> &[u8] {
    let message = &mut buffer[..length(number, kind, largest)];
    message[..8].copy_from_slice(&number.to_be_bytes());
    message[8..HEADER].copy_from_slice(&kind.to_be_bytes());
    content::fill(number ^ kind, &mut message[HEADER..]);
    message
}

struct Client {
    socket: UdpSocket,
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
    let largest = largest.max(LEAST);
    let open = |end: Endpoint<'_>| -> Result<UdpSocket, LabError> {
        let inside = end.namespace.enter()?;
        let socket = UdpSocket::bind((end.address, 0)).and_then(|socket| {
            socket.set_read_timeout(Some(LOOK))?;
            socket.set_write_timeout(Some(LOOK))?;
            socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
            Ok(socket)
        });
        inside.leave()?;
        socket.map_err(|e| LabError::socket("opening a UDP socket", e))
    };
    let responder = open(server)?;
    let requester = open(client)?;
    let address = responder.local_addr().and_then(|address| requester.connect(address));
    address.map_err(|e| LabError::socket("connecting a UDP socket", e))?;
    let for_server = Arc::clone(meter);
    threads.push(server.namespace.spawn("lab-udp-server", move || serve(&responder, largest, &for_server))?);
    let mut wire = Client { socket: requester, largest, buffer: vec![0; 65_536] };
    let meter = Arc::clone(meter);
    threads.push(client.namespace.spawn("lab-udp-client", move || exchange::run(&mut wire, window, &meter))?);
    Ok(())
}

impl Wire for Client {
    fn send(&mut self, number: u64) -> io::Result<usize> {
        let message = write(&mut self.buffer, number, REQUEST, self.largest);
        self.socket.send(message)
    }

    fn receive(&mut self) -> io::Result<Arrival> {
        let Some(length) = exchange::in_time(self.socket.recv(&mut self.buffer))? else {
            return Ok(Arrival::Nothing);
        };
        Ok(match number_of(&self.buffer[..length], RESPONSE, self.largest) {
            Some(number) => Arrival::Answer(number, length),
            None => Arrival::Corrupt,
        })
    }
}

/// Answers until the client has what it waits for or has given up.
fn serve(socket: &UdpSocket, largest: usize, meter: &Meter) {
    let mut buffer = vec![0; 65_536];
    while !meter.finished() {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => match number_of(&buffer[..length], REQUEST, largest) {
                Some(number) => {
                    let answer = write(&mut buffer, number, RESPONSE, largest);
                    if let Err(error) = socket.send_to(answer, from) {
                        meter.error("respond", &error);
                    }
                }
                None => Meter::count(&meter.corrupt, 1),
            },
            Err(error) => {
                if let Err(error) = exchange::in_time(Err(error)) {
                    meter.error("serve", &error);
                    std::thread::sleep(LOOK);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_any_byte_changed_is_not_one() {
        let mut buffer = vec![0; 300];
        for number in 0..20 {
            let message = write(&mut buffer, number, REQUEST, 300).to_vec();
            assert_eq!(number_of(&message, REQUEST, 300), Some(number));
            assert_eq!(number_of(&message, RESPONSE, 300), None);
            assert_eq!(number_of(&message[..message.len() - 1], REQUEST, 300), None);
            for at in 0..message.len() {
                let mut damaged = message.clone();
                damaged[at] ^= 0x10;
                assert_eq!(number_of(&damaged, REQUEST, 300), None, "byte {at}");
            }
        }
    }
}
