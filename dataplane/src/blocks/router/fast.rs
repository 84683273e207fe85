//! The way of most packets, in stages over a batch: parse and check, look up, rewrite, send.
//!
//! Contract: a packet that is not plain in every respect is left to the [general](super::general) way, which knows
//! all rules; this one knows what needs no rule. Plain is: one frame, to the interface's Ethernet address, no
//! options (IPv6: no hop-by-hop or routing header), lengths and checksum as they should be, addresses that
//! may be forwarded, hops left, a resolved neighbour, not too long for its link. Packets of a batch leave in the
//! order in which they came, by either way.

use super::lines::{FILTERED, FORWARD4, FORWARD6, Line, REDIRECTS, STRICT, UP};
use super::{Router, field, martian};
use crate::app::{PortId, Turn};
use crate::tables::{InterfaceId, NextHop, NextHopId};
use crate::wire::checksum;
use crate::wire::ethernet::{EtherType, HEADER, TAG};
use crate::wire::ipv6::next_header;
use isoplane_memory::{BATCH, Batch, Frame, Pool};

/// Frames ahead of the one in hand whose headers are fetched.
const AHEAD: usize = 4;
/// A packet that takes the general way; no port has this number.
const GENERAL: u8 = u8::MAX;
/// Frames of this length or less may be longer than their packet: Ethernet's least, with a tag.
const PADDED: usize = 64;

/// A plain packet.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(8))]
struct Plain {
    /// Its frame's place in the batch.
    at: u8,
    /// Bytes of its Ethernet header.
    header: u8,
    /// Place of the interface that it came in by.
    place: u16,
    /// Bytes of the IP packet.
    total: u16,
}

/// What stages hand to each other, one of each IP version.
#[derive(Debug)]
struct Stage<K> {
    destinations: [K; BATCH],
    sources: [K; BATCH],
    plain: [Plain; BATCH],
    next_hops: [NextHopId; BATCH],
    back: [NextHopId; BATCH],
}

impl<K: Copy + Default> Default for Stage<K> {
    fn default() -> Self {
        Self {
            destinations: [K::default(); BATCH],
            sources: [K::default(); BATCH],
            plain: [Plain::default(); BATCH],
            next_hops: [NextHopId::NONE; BATCH],
            back: [NextHopId::NONE; BATCH],
        }
    }
}

impl<K> Stage<K> {
    #[inline(always)]
    fn set(&mut self, at: usize, source: K, destination: K, plain: Plain) {
        self.destinations[at % BATCH] = destination;
        self.sources[at % BATCH] = source;
        self.plain[at % BATCH] = plain;
    }
}

/// Room for one batch.
#[derive(Debug)]
pub(super) struct Work {
    four: Stage<u32>,
    six: Stage<u128>,
    /// For each frame: the port that it leaves by, or [`GENERAL`].
    fates: [u8; BATCH],
}

impl Default for Work {
    fn default() -> Self {
        Self { four: Stage::default(), six: Stage::default(), fates: [GENERAL; BATCH] }
    }
}

/// What is plain in an IPv4 header: source, destination and total length.
#[inline(always)]
fn plain4(packet: &[u8], padded: bool) -> Option<(u32, u32, u16)> {
    let header = packet.first_chunk::<20>()?;
    let word = |at: usize| header[at..].first_chunk().map_or(0, |w| u32::from_be_bytes(*w));
    let (first, source, destination) = (word(0), word(12), word(16));
    let total = first as u16;
    let len = packet.len();
    // Each of them nearly always holds, so branches cost less than sums of conditions.
    let ok = first >> 24 == 0x45
        && usize::from(total) >= 20
        && (usize::from(total) == len || padded && usize::from(total) < len)
        && header[8] > 1
        && checksum::verify_20(header)
        && martian::plain4(source)
        && martian::plain4(destination);
    ok.then_some((source, destination, total))
}

/// The same for IPv6.
#[inline(always)]
fn plain6(packet: &[u8], padded: bool) -> Option<(u128, u128, u16)> {
    let header = packet.first_chunk::<40>()?;
    let address = |at: usize| header[at..].first_chunk().map_or(0, |w| u128::from_be_bytes(*w));
    let (source, destination) = (address(8), address(24));
    let total = usize::from(u16::from_be_bytes([header[4], header[5]])) + 40;
    let len = packet.len();
    let next = header[6];
    let ok = header[0] >> 4 == 6
        && (total == len || padded && total < len)
        && header[7] > 1
        && next != next_header::HOP_BY_HOP
        && next != next_header::ROUTING
        && martian::plain6(source)
        && martian::plain6(destination);
    // A frame has at most 65535 bytes, so the total fits.
    ok.then_some((source, destination, total as u16))
}

/// Moves the start of a packet for an Ethernet header of another length: `from` bytes there, `to` wanted. False,
/// and the frame as it was, when the chunk has no room.
#[inline(always)]
pub(super) fn resize_header(pool: &Pool, frame: &mut Frame, from: usize, to: usize) -> bool {
    from == to || resize(pool, frame, from, to)
}

#[inline(never)]
fn resize(pool: &Pool, frame: &mut Frame, from: usize, to: usize) -> bool {
    let len = usize::from(frame.len());
    if from > len {
        return false;
    }
    if from > to {
        frame.trim_front((from - to) as u16);
    } else if !pool.grow_front(frame, (to - from) as u16) {
        if !pool.grow_back(frame, (to - from) as u16) {
            return false;
        }
        pool.bytes_mut(frame).copy_within(from..len, to);
    }
    crate::blocks::bridge::vlan::shift_offsets(pool, frame, to as i16 - from as i16);
    true
}

impl Router {
    #[inline(always)]
    pub(super) fn fast(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        let pool = turn.pool();
        let (four, six) = self.parse(pool, from, batch);
        if four != 0 {
            let n = self.forward4(pool, batch, four);
            turn.count(field::FORWARDED4, n);
        }
        if six != 0 {
            let n = self.forward6(pool, batch, six);
            turn.count(field::FORWARDED6, n);
        }
        let first = self.work.fates[0];
        if first != GENERAL && self.work.fates.iter().take(batch.len()).all(|fate| *fate == first) {
            return turn.send_all(PortId(first), batch);
        }
        self.send_each(turn, from, batch);
    }

    /// Finds plain packets; says how many there are of each version.
    #[inline(always)]
    fn parse(&mut self, pool: &Pool, from: PortId, batch: &Batch) -> (usize, usize) {
        let Self { work, lines, .. } = self;
        let Work { four, six, fates } = &mut **work;
        *fates = [GENERAL; BATCH];
        for frame in batch.as_slice().iter().take(AHEAD) {
            pool.prefetch(frame);
        }
        let untagged = lines.place(from, 0);
        let untagged_line = lines.at(untagged);
        let (mut n4, mut n6) = (0, 0);
        let mut inside = false;
        for (at, frame) in batch.iter().enumerate() {
            if let Some(next) = batch.as_slice().get(at + AHEAD) {
                pool.prefetch(next);
            }
            let part = inside | frame.has_more();
            inside = frame.has_more();
            let bytes = pool.bytes(frame);
            let Some(start) = bytes.first_chunk::<{ HEADER + TAG }>() else { continue };
            let word = |at: usize| start[at..].first_chunk().map_or(0, |w| u64::from_be_bytes(*w));
            let (to, sender) = (word(0), word(6));
            let mut ethertype = EtherType(sender as u16);
            let (mut header, mut place, mut line) = (HEADER, untagged, untagged_line);
            if ethertype == EtherType::VLAN {
                let tag = word(10) as u32;
                ethertype = EtherType(tag as u16);
                (header, place) = (HEADER + TAG, lines.place(from, (tag >> 16) as u16));
                line = lines.at(place);
            }
            // In one frame, to us, from a station.
            if part || to >> 16 != line.mac || sender >> 56 & 1 != 0 || sender >> 16 == 0 {
                continue;
            }
            let Some(packet) = bytes.get(header..) else { continue };
            let padded = bytes.len() <= PADDED;
            let plain = |total| Plain { at: at as u8, header: header as u8, place, total };
            if ethertype == EtherType::IPV4 && line.has(UP | FORWARD4) {
                if let Some((source, destination, total)) = plain4(packet, padded) {
                    four.set(n4, source, destination, plain(total));
                    n4 += 1;
                }
            } else if ethertype == EtherType::IPV6
                && line.has(UP | FORWARD6)
                && let Some((source, destination, total)) = plain6(packet, padded)
            {
                six.set(n6, source, destination, plain(total));
                n6 += 1;
            }
        }
        (n4, n6)
    }

    /// Looks plain packets up and rewrites those for which all is well; says how many.
    #[inline(always)]
    fn forward4(&mut self, pool: &Pool, batch: &mut Batch, n: usize) -> u64 {
        let Self { work, tables, lines, flow, .. } = self;
        let Work { four, fates, .. } = &mut **work;
        let Stage { destinations, sources, plain, next_hops, back } = four;
        let n = n.min(BATCH);
        tables.fib4.lookup_many(&destinations[..n], &mut next_hops[..n]);
        if lines.filtered() {
            tables.fib4.lookup_many(&sources[..n], &mut back[..n]);
        }
        let frames = batch.as_mut_slice();
        let mut forwarded = 0;
        for i in 0..n {
            let plain = plain[i];
            let Some(frame) = frames.get_mut(usize::from(plain.at)) else { continue };
            let header = usize::from(plain.header);
            let mut next_hop = tables.next_hops.word(next_hops[i]);
            if !next_hop.is_station() {
                let Some(group) = next_hop.group() else { continue };
                let hash = flow.of4(pool.bytes(frame).get(header..).unwrap_or_default());
                next_hop = tables.next_hops.word(tables.next_hops.member(group, hash));
                if !next_hop.is_station() {
                    continue;
                }
            }
            let interface = next_hop.interface();
            if lines.filtered() && !reachable(tables, lines.at(plain.place).flags, plain.place, back[i]) {
                continue;
            }
            let out = lines.get(interface);
            if !leaves(out, &plain, interface) || !resize_header(pool, frame, header, out.header()) {
                continue;
            }
            let bytes = pool.bytes_mut(frame);
            out.write_header(bytes, next_hop.mac_bits(), EtherType::IPV4);
            if let Some(ip) = bytes.get_mut(out.header()..).and_then(|b| b.first_chunk_mut::<20>()) {
                // One hop less is 0x100 less in its word, whatever else that holds.
                let sum = checksum::update(u16::from_be_bytes([ip[10], ip[11]]), 0x100, 0);
                ip[8] = ip[8].wrapping_sub(1);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            fates[usize::from(plain.at) % BATCH] = out.port;
            forwarded += 1;
        }
        forwarded
    }

    /// The same for IPv6.
    #[inline(always)]
    fn forward6(&mut self, pool: &Pool, batch: &mut Batch, n: usize) -> u64 {
        let Self { work, tables, lines, flow, .. } = self;
        let Work { six, fates, .. } = &mut **work;
        let Stage { destinations, sources, plain, next_hops, back } = six;
        let n = n.min(BATCH);
        tables.fib6.lookup_many(&destinations[..n], &mut next_hops[..n]);
        if lines.filtered() {
            tables.fib6.lookup_many(&sources[..n], &mut back[..n]);
        }
        let frames = batch.as_mut_slice();
        let mut forwarded = 0;
        for i in 0..n {
            let plain = plain[i];
            let Some(frame) = frames.get_mut(usize::from(plain.at)) else { continue };
            let header = usize::from(plain.header);
            let mut next_hop = tables.next_hops.word(next_hops[i]);
            if !next_hop.is_station() {
                let Some(group) = next_hop.group() else { continue };
                let hash = flow.of6(pool.bytes(frame).get(header..).unwrap_or_default());
                next_hop = tables.next_hops.word(tables.next_hops.member(group, hash));
                if !next_hop.is_station() {
                    continue;
                }
            }
            let interface = next_hop.interface();
            if lines.filtered() && !reachable(tables, lines.at(plain.place).flags, plain.place, back[i]) {
                continue;
            }
            let out = lines.get(interface);
            if !leaves(out, &plain, interface) || !resize_header(pool, frame, header, out.header()) {
                continue;
            }
            let bytes = pool.bytes_mut(frame);
            out.write_header(bytes, next_hop.mac_bits(), EtherType::IPV6);
            if let Some(hops) = bytes.get_mut(out.header() + 7) {
                *hops = hops.wrapping_sub(1);
            }
            fates[usize::from(plain.at) % BATCH] = out.port;
            forwarded += 1;
        }
        forwarded
    }

    /// Frames part: by different ports, or some by the general way.
    fn send_each(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        let mut at = 0;
        let mut drain = batch.drain();
        while let Some(frame) = drain.next() {
            let fate = self.work.fates[at % BATCH];
            at += 1;
            if fate != GENERAL {
                turn.send(PortId(fate), frame);
                continue;
            }
            let mut packet = Batch::new();
            let mut frame = Some(frame);
            while let Some(part) = frame {
                let more = part.has_more();
                // A packet has at most as many frames as a batch.
                let _ = packet.push(part).map_err(|part| turn.drop(part, crate::DropReason::Malformed));
                frame = if more { drain.next() } else { None };
                at += usize::from(frame.is_some());
            }
            self.general(turn, from, &mut packet);
        }
    }
}

/// May a plain packet go out there: up, short enough, no redirect due?
#[inline(always)]
fn leaves(out: &Line, plain: &Plain, interface: InterfaceId) -> bool {
    out.has(UP) && plain.total <= out.mtu && !(out.has(REDIRECTS) && interface.get() == plain.place)
}

/// Is the source of a packet reached through where it came from (RFC 3704)?
#[inline(always)]
pub(super) fn reachable(tables: &crate::tables::Tables, flags: u8, place: u16, back: NextHopId) -> bool {
    flags & FILTERED == 0 || is_reached(tables, flags & STRICT != 0, place, back)
}

#[inline(never)]
fn is_reached(tables: &crate::tables::Tables, strict: bool, place: u16, back: NextHopId) -> bool {
    let next_hop = tables.next_hops.get(back);
    if strict {
        return InterfaceId::new(place).is_some_and(|interface| tables.next_hops.uses(back, interface));
    }
    matches!(next_hop, NextHop::Group(_)) || next_hop.interface().is_some()
}
