//! The rehearsal: synthetic packets through the whole path of a worker, before it is isolated.
//!
//! Contract: an app sees synthetic packets only if it [wants](App::wants_rehearsal) to, and none of them
//! leaves the worker or shows in statistics: for as long as the rehearsal lasts each port's queue is
//! exchanged for one that leads nowhere, link states are unknown, and counters go where nobody reads.
//! Afterwards all of that is as it was, frames included, and the app has forgotten
//! ([`App::rehearsed`]). Work is bounded: [`TURNS`] turns with at most [`FRAMES_PER_TURN`] packets each
//! (measured with a bridge: 0.1 ms for 2 ports, 0.7 ms for 64). Nothing is isolated yet, so allocating and
//! system calls are fine.
//!
//! What is sent: well-formed Ethernet, to everybody, to a station on the next port (each port has one,
//! with a locally administered address) and to one that nobody knows; untagged, priority-tagged and in
//! VLAN 1; with the EtherType for local experiments, ARP, IPv4 and IPv6; short and long. IP addresses
//! are those for documentation (RFC 5737, RFC 3849), the UDP port is discard (RFC 863), and one hop is
//! all that a packet may travel.

use crate::app::App;
use crate::turns::Turns;
use crate::wire::{EtherType, MacAddress};
use isoplane_drivers::null::{NullConfig, NullError, NullPort};
use isoplane_drivers::{AnyRx, Port, Queue, RxQueue};
use isoplane_memory::{Batch, FrameCache, RegionError, Survey};
use std::time::Instant;

/// Turns of a rehearsal.
pub const TURNS: u32 = 8;
/// Packets that arrive in one of its turns at most, on all ports together.
pub const FRAMES_PER_TURN: usize = 256;

/// What a rehearsal did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rehearsal {
    /// Turns made; 0 when the app did not want any.
    pub turns: u32,
    /// Synthetic packets that the app was given.
    pub received: usize,
    /// Frames that it has kept, though its [`drain`](App::drain) was called. An app that sends them later
    /// sends synthetic packets.
    pub kept: usize,
}

/// Why there was no rehearsal. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RehearsalError {
    /// No memory for counters that nobody reads.
    #[error("no memory to count in: {0}")]
    Counters(#[from] RegionError),
    /// No queues that lead nowhere.
    #[error("no ports to rehearse with: {0}")]
    Ports(#[from] NullError),
}

/// Rehearses an app, if it wants to; `now` is the worker's time in nanoseconds. To be called between
/// turns, before any packet that matters has arrived.
///
/// # Errors
/// See [`RehearsalError`]. A worker can go without: what it touches for the first time with its first
/// packets may fault then.
pub fn rehearse<A: App>(
    app: &mut A,
    turns: &mut Turns,
    now: impl Fn() -> u64,
) -> Result<Rehearsal, RehearsalError> {
    if !app.wants_rehearsal() {
        return Ok(Rehearsal::default());
    }
    let start = Instant::now();
    let scene = turns.scene(queues(turns)?)?;
    let before = turns.free_frames();
    let mut received = 0;
    turns.on(scene, |turns| {
        for _ in 0..TURNS {
            received += turns.turn(app, now()).received;
        }
        turns.drain(app, now());
    });
    app.rehearsed();
    let kept = before.saturating_sub(turns.free_frames());
    if kept != 0 {
        tracing::warn!(
            kept,
            "the app has kept frames of its rehearsal: it wants one, so its `drain` must give all back"
        );
    }
    tracing::debug!(received, took = ?start.elapsed(), "rehearsed");
    Ok(Rehearsal { turns: TURNS, received, kept })
}

/// A queue for each port that receives synthetic packets and sends nothing.
fn queues(turns: &Turns) -> Result<Vec<Queue>, NullError> {
    let ports = turns.ports();
    let config = NullConfig { queues: ports as u16, frame_len: 0, batch: 0, ..NullConfig::new("rehearsal") };
    let mut nowhere = NullPort::open(turns.pool(), &config)?;
    let longest = turns.pool().max_frame() as usize;
    let queue = |port: u16| {
        let tx = nowhere.take_queue(port)?.tx;
        let packets = packets(port as u8, ports, longest);
        let share = (FRAMES_PER_TURN / ports).max(1);
        let rx: Box<dyn RxQueue> = Box::new(Source { packets, share, next: 0, uniform: false });
        Some(Queue { rx: AnyRx::from(rx), tx })
    };
    Ok((0..ports as u16).filter_map(queue).collect())
}

/// Receives synthetic packets.
struct Source {
    packets: Vec<Vec<u8>>,
    /// Packets in a turn.
    share: usize,
    next: usize,
    /// All packets of the batch are alike, so that an app's short cut for that is taken as well.
    uniform: bool,
}

impl RxQueue for Source {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        // The app needs some frames itself, to copy into.
        let wanted = self.share.min(batch.room()).min(frames.len() / 2);
        let mut received = 0;
        for _ in 0..wanted {
            let at = if self.uniform { 0 } else { self.next };
            let Some(packet) = self.packets.get(at) else { break };
            let Some(mut frame) = frames.get() else { break };
            self.next = if self.uniform { self.next } else { (at + 1) % self.packets.len() };
            if !frames.pool().reset(&mut frame, packet.len() as u16) {
                frames.put(frame);
                continue;
            }
            frames.pool().bytes_mut(&mut frame).copy_from_slice(packet);
            match batch.push(frame) {
                Ok(()) => received += 1,
                Err(frame) => frames.put(frame),
            }
        }
        self.uniform = !self.uniform;
        received
    }
    fn survey(&mut self, _survey: &mut Survey) {}
    fn stop(&mut self) {}
    fn sweep(&mut self) -> u32 {
        0
    }
}

#[derive(Clone, Copy)]
enum To {
    Everybody,
    /// The station on the next port; where there is no other port, as [`To::Nobody`].
    Neighbour,
    Nobody,
}

#[derive(Clone, Copy)]
enum Payload {
    Experiment,
    Arp,
    Ipv4,
    Ipv6,
}

/// In VLAN 1, which ports are in where nothing else is said.
const VLAN: Option<u16> = Some(1);
/// In no VLAN; priority 5.
const PRIORITY: Option<u16> = Some(5 << 13);

/// What each port receives, with the length of the frame. Uniform batches are of the first.
const KINDS: [(To, Option<u16>, Payload, usize); 13] = [
    (To::Neighbour, None, Payload::Experiment, 60),
    (To::Everybody, None, Payload::Experiment, 60),
    (To::Everybody, None, Payload::Arp, 60),
    (To::Nobody, None, Payload::Experiment, 128),
    (To::Everybody, VLAN, Payload::Experiment, 64),
    (To::Neighbour, VLAN, Payload::Experiment, 1518),
    (To::Nobody, VLAN, Payload::Experiment, 64),
    (To::Neighbour, PRIORITY, Payload::Experiment, 64),
    (To::Neighbour, None, Payload::Ipv4, 60),
    (To::Neighbour, VLAN, Payload::Ipv4, 1518),
    (To::Neighbour, None, Payload::Ipv6, 1514),
    (To::Everybody, None, Payload::Ipv6, 90),
    (To::Nobody, None, Payload::Ipv4, 594),
];

/// For local experiments (IEEE 802-2014, 9.2.4).
const EXPERIMENT: EtherType = EtherType(0x88b5);
/// Discard (RFC 863).
const DISCARD: u16 = 9;
const UDP: u8 = 17;

/// The station on a port.
const fn station(port: u8) -> MacAddress {
    MacAddress([0x02, b'i', b's', b'o', 0, port])
}

/// A station that is on no port.
const NOBODY: MacAddress = MacAddress([0x02, b'i', b's', b'o', 1, 0]);

/// What arrives on `port`, in frames of at most `longest` bytes; what does not fit one is left out.
fn packets(port: u8, ports: usize, longest: usize) -> Vec<Vec<u8>> {
    let next = ((usize::from(port) + 1) % ports) as u8;
    let packet = |(to, tci, payload, len): (To, Option<u16>, Payload, usize)| {
        let len = len.min(longest);
        let to = match to {
            To::Everybody => MacAddress::BROADCAST,
            To::Neighbour if next != port => station(next),
            To::Neighbour | To::Nobody => NOBODY,
        };
        let mut bytes = [to.0, station(port).0].concat();
        bytes.extend(tci.into_iter().flat_map(|tci| [EtherType::VLAN.0, tci]).flat_map(u16::to_be_bytes));
        let (ethertype, headers) = match payload {
            Payload::Experiment => (EXPERIMENT, Vec::new()),
            Payload::Arp => (EtherType::ARP, arp_request(port, next)),
            Payload::Ipv4 => (EtherType::IPV4, ipv4(port, next, len.checked_sub(bytes.len() + 2)?)?),
            Payload::Ipv6 => (EtherType::IPV6, ipv6(port, next, len.checked_sub(bytes.len() + 2)?)?),
        };
        bytes.extend(ethertype.0.to_be_bytes());
        bytes.extend(headers);
        let fits = bytes.len() <= len;
        bytes.resize(len, 0);
        fits.then_some(bytes)
    };
    KINDS.into_iter().filter_map(packet).collect()
}

/// Of the network that RFC 5737 keeps for documentation.
const fn ipv4_address(port: u8) -> [u8; 4] {
    [192, 0, 2, port]
}

/// Of the network that RFC 3849 keeps for documentation.
const fn ipv6_address(port: u8) -> [u8; 16] {
    [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, port]
}

/// RFC 826: who has the address of port `to`?
fn arp_request(from: u8, to: u8) -> Vec<u8> {
    // Ethernet, IPv4, their lengths, request.
    let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, 1];
    bytes.extend(station(from).0);
    bytes.extend(ipv4_address(from));
    bytes.extend([0; 6]);
    bytes.extend(ipv4_address(to));
    bytes
}

/// RFC 791, with an UDP header: `len` bytes, those that are zero at the end left out.
fn ipv4(from: u8, to: u8, len: usize) -> Option<Vec<u8>> {
    let total = u16::try_from(len).ok()?;
    let addresses = [ipv4_address(from), ipv4_address(to)].concat();
    let udp = udp(&addresses, total.checked_sub(20)?)?;
    let [high, low] = total.to_be_bytes();
    // Version and header words, no service class, length; no fragment; one hop.
    let mut bytes = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 1, UDP, 0, 0];
    bytes.extend(addresses);
    let sum = checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum);
    bytes.extend(udp);
    Some(bytes)
}

/// RFC 8200, as [`ipv4`].
fn ipv6(from: u8, to: u8, len: usize) -> Option<Vec<u8>> {
    let payload = u16::try_from(len).ok()?.checked_sub(40)?;
    let addresses = [ipv6_address(from), ipv6_address(to)].concat();
    let udp = udp(&addresses, payload)?;
    let [high, low] = payload.to_be_bytes();
    // Version, length, next header, one hop.
    let mut bytes = vec![0x60, 0, 0, 0, high, low, UDP, 1];
    bytes.extend(addresses);
    bytes.extend(udp);
    Some(bytes)
}

/// RFC 768: the header of a datagram of `len` bytes whose data are zero. The pseudo-headers of IPv4 and
/// IPv6 (RFC 8200, 8.1) add up to the same but for the addresses.
fn udp(addresses: &[u8], len: u16) -> Option<[u8; 8]> {
    let [high, low] = len.to_be_bytes();
    let [d1, d2] = DISCARD.to_be_bytes();
    let mut header = [d1, d2, d1, d2, high, low, 0, 0];
    let sum = checksum(&[addresses, &[0, UDP, high, low], &header].concat());
    // A sum of zero is sent as its other form; zero says that there is none.
    let sum = if sum == [0, 0] { [0xff, 0xff] } else { sum };
    header[6..].copy_from_slice(&sum);
    (len >= 8).then_some(header)
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
