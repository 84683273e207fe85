//! Requests and answers with a window: what ICMP echo and UDP have in common.

use super::{Meter, PATIENCE};
use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

/// What arrived.
pub(crate) enum Arrival {
    /// The answer to the request of this number, with so many bytes, all of them right.
    Answer(u64, usize),
    /// An answer of ours with wrong bytes.
    Corrupt,
    /// Nothing of ours, or nothing in time.
    Nothing,
}

/// How requests leave and answers arrive.
pub(crate) trait Wire {
    /// Sends the request of this number; says how many bytes its message has.
    fn send(&mut self, number: u64) -> io::Result<usize>;
    /// Waits a short time for an arrival.
    fn receive(&mut self) -> io::Result<Arrival>;
}

/// Keeps `window` requests on their way until told to stop, then waits for the last answers.
pub(crate) fn run(wire: &mut impl Wire, window: usize, meter: &Meter) {
    let mut waiting: BTreeMap<u64, Instant> = BTreeMap::new();
    let mut number = 0;
    let mut last_word = None;
    loop {
        if last_word.is_none() && meter.stopping() {
            last_word = Some(Instant::now() + meter.last_word());
        }
        if let Some(end) = last_word
            && (waiting.is_empty() || Instant::now() > end)
        {
            break;
        }
        while last_word.is_none() && waiting.len() < window {
            let sent = Instant::now();
            match wire.send(number) {
                Ok(bytes) => {
                    meter.sent(bytes);
                    waiting.insert(number, sent);
                    number += 1;
                }
                Err(error) => {
                    // Nothing was sent: this request is not lost, and the next round tries again.
                    if !passing(&error) {
                        meter.error("send", &error);
                    }
                    break;
                }
            }
        }
        match wire.receive() {
            Ok(Arrival::Answer(number, bytes)) => match waiting.remove(&number) {
                Some(sent) => {
                    meter.round_trip(sent.elapsed());
                    meter.verified(bytes);
                }
                None => Meter::count(&meter.late, 1),
            },
            Ok(Arrival::Corrupt) => Meter::count(&meter.corrupt, 1),
            Ok(Arrival::Nothing) => {}
            Err(error) => {
                meter.error("receive", &error);
                std::thread::sleep(super::LOOK);
            }
        }
        // Requests are sent in order, so the first one is the oldest.
        while let Some(oldest) = waiting.first_entry()
            && oldest.get().elapsed() > PATIENCE
        {
            oldest.remove();
            Meter::count(&meter.lost, 1);
        }
    }
    Meter::count(&meter.lost, waiting.len() as u64);
    meter.finish();
}

/// Conditions that end by themselves: a full queue, a link that is down for the moment.
fn passing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Turns a read that found nothing in time into `None`.
pub(crate) fn in_time(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(length) => Ok(Some(length)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
