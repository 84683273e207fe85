//! Ethernet requests and responses between two stations that we are ourselves: traffic for ports that
//! have no kernel at the other end.

use super::datagrams::{LEAST, REQUEST, RESPONSE, number_of, write};
use super::exchange::{self, Arrival, Wire};
use super::{LOOK, Meter};
use crate::{LabError, PacketSocket};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Destination, source, EtherType.
const ETHERNET: usize = 14;
/// IEEE 802 local experimental EtherType 1.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SERVER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Something that sends and receives Ethernet frames. Dropped, in the thread that used it, when the
/// flow has ended.
pub trait Station: Send {
    /// Sends one frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room for it now; anything else is reported.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;

    /// Receives one frame into `buffer` and says how long it is; `None` when `patience` passes without.
    ///
    /// # Errors
    /// What is reported.
    fn receive(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<Option<usize>>;
}

impl Station for PacketSocket {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        Self::send(self, frame).map_err(into_io)
    }

    fn receive(&mut self, buffer: &mut [u8], patience: Duration) -> io::Result<Option<usize>> {
        let frame = Self::receive(self, patience).map_err(into_io)?;
        Ok(frame.map(|frame| {
            let length = frame.len().min(buffer.len());
            buffer[..length].copy_from_slice(&frame[..length]);
            length
        }))
    }
}

fn into_io(error: LabError) -> io::Error {
    match error {
        LabError::Socket { source, .. } => source,
        other => io::Error::other(other),
    }
}

/// Writes a frame with a message in it; says how long it is.
fn compose(frame: &mut [u8], to: [u8; 6], from: [u8; 6], number: u64, kind: u64, largest: usize) -> usize {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..ETHERNET].copy_from_slice(&ETHERTYPE);
    ETHERNET + write(&mut frame[ETHERNET..], number, kind, largest).len()
}

/// The message's number, of a frame of ours; `None` for a frame that is not, an inner `None` for one
/// with wrong bytes.
fn parse(frame: &[u8], to: [u8; 6], from: [u8; 6], kind: u64, largest: usize) -> Option<Option<u64>> {
    let (header, body) = frame.split_at_checked(ETHERNET)?;
    let ours = header[..6] == to && header[6..12] == from && header[12..] == ETHERTYPE;
    ours.then(|| number_of(body, kind, largest))
}

struct Client<S> {
    station: S,
    largest: usize,
    buffer: Vec<u8>,
}

impl<S: Station> Wire for Client<S> {
    fn send(&mut self, number: u64) -> io::Result<usize> {
        let length = compose(&mut self.buffer, SERVER, CLIENT, number, REQUEST, self.largest);
        self.station.send(&self.buffer[..length])?;
        Ok(length - ETHERNET)
    }

    fn receive(&mut self) -> io::Result<Arrival> {
        let Some(length) = self.station.receive(&mut self.buffer, LOOK)? else {
            return Ok(Arrival::Nothing);
        };
        Ok(match parse(&self.buffer[..length], CLIENT, SERVER, RESPONSE, self.largest) {
            Some(Some(number)) => Arrival::Answer(number, length - ETHERNET),
            Some(None) => Arrival::Corrupt,
            None => Arrival::Nothing,
        })
    }
}

pub(super) fn start(
    client: impl Station + 'static,
    server: impl Station + 'static,
    window: usize,
    largest: usize,
    meter: &Arc<Meter>,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<(), LabError> {
    let largest = largest.max(LEAST);
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(|e| LabError::socket("starting a traffic thread", e))
    };
    let buffer = || vec![0; ETHERNET + largest.max(2048)];
    let mut wire = Client { station: client, largest, buffer: buffer() };
    let (for_server, mut scratch) = (Arc::clone(meter), buffer());
    let serve = move || serve(server, largest, &mut scratch, &for_server);
    threads.push(spawn("lab-server", Box::new(serve))?);
    let meter = Arc::clone(meter);
    threads.push(spawn("lab-client", Box::new(move || exchange::run(&mut wire, window, &meter)))?);
    Ok(())
}

/// Answers until the client has what it waits for or has given up.
fn serve(mut station: impl Station, largest: usize, buffer: &mut [u8], meter: &Meter) {
    while !meter.finished() {
        match station.receive(buffer, LOOK) {
            Ok(Some(length)) => match parse(&buffer[..length], SERVER, CLIENT, REQUEST, largest) {
                Some(Some(number)) => {
                    let length = compose(buffer, CLIENT, SERVER, number, RESPONSE, largest);
                    if let Err(error) = station.send(&buffer[..length]) {
                        meter.error("respond", &error);
                    }
                }
                Some(None) => Meter::count(&meter.corrupt, 1),
                None => {}
            },
            Ok(None) => {}
            Err(error) => {
                meter.error("serve", &error);
                std::thread::sleep(LOOK);
            }
        }
    }
}
