//! IPv4 fragmentation (RFC 791, 3.2; RFC 1812, 4.2.2.7, 5.3.13).
//!
//! Contract: a packet is cut in as few fragments as carry it, in order, or dropped whole: when free frames are
//! short, when the turn has made enough fragments, or when its fragments could not say where they belong. A
//! fragment may be cut again. Options that must be are copied into every fragment, the others into the first. A
//! checksum that the port should have computed is computed first, since no fragment shows all of it.

use super::general::{Way, copy_out, start};
use super::lines::Line;
use super::{Router, field, options};
use crate::app::{DropReason, Turn};
use crate::wire::checksum::checksum;
use crate::wire::ethernet::{EtherType, MacAddress, array};
use crate::wire::ipv4::{self, HEADER, LONGEST_HEADER, option};
use isoplane_memory::{Batch, FrameFlags, Pool};

/// A header, options included.
#[derive(Debug, Clone, Copy)]
struct Header {
    bytes: [u8; LONGEST_HEADER],
    len: usize,
}

impl Header {
    fn of(bytes: &[u8]) -> Self {
        let mut header = Self { bytes: [0; LONGEST_HEADER], len: bytes.len().min(LONGEST_HEADER) };
        header.bytes[..header.len].copy_from_slice(&bytes[..header.len]);
        header
    }

    /// With the options that every fragment has.
    fn copied(&self) -> Self {
        let mut copied = Self::of(&self.bytes[..HEADER]);
        for option in ipv4::Options::new(&self.bytes[HEADER..self.len]).map_while(Result::ok) {
            let end = copied.len + option.bytes.len();
            if option.kind & option::COPIED != 0 && end <= LONGEST_HEADER {
                copied.bytes[copied.len..end].copy_from_slice(option.bytes);
                copied.len = end;
            }
        }
        // What is behind them is zero: end of the list.
        copied.len = copied.len.next_multiple_of(4).min(LONGEST_HEADER);
        copied.bytes[0] = 0x40 | (copied.len / 4) as u8;
        copied
    }

    /// Bytes of payload in a packet of this length, when others follow.
    const fn room(&self, mtu: usize) -> usize {
        mtu.saturating_sub(self.len) & !7
    }

    /// For `data` bytes of payload at `offset` units of eight.
    fn place(&mut self, data: usize, offset: u16, more: bool) {
        let total = (self.len + data) as u16;
        self.bytes[2..4].copy_from_slice(&total.to_be_bytes());
        let flags = offset & 0x1fff | if more { 0x2000 } else { 0 };
        self.bytes[6..8].copy_from_slice(&flags.to_be_bytes());
        self.bytes[10..12].fill(0);
        let sum = checksum(&self.bytes[..self.len]);
        self.bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Computes the checksum that the port was asked for. False where that cannot be.
fn finish_checksum(pool: &Pool, packet: &mut Batch) -> bool {
    let [frame] = packet.as_mut_slice() else { return false };
    let Some(meta) = pool.meta(frame).filter(|_| frame.flags().contains(FrameFlags::META)) else {
        return false;
    };
    let start = usize::from(meta.csum_start);
    let at = start + usize::from(meta.csum_offset);
    let bytes = pool.bytes_mut(frame);
    if at + 2 > bytes.len() {
        return false;
    }
    // The field holds the sum of the pseudo-header.
    let sum = match checksum(&bytes[start..]) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    frame.set_flags(frame.flags() - FrameFlags::TX_CHECKSUM);
    true
}

impl Router {
    /// Cuts a packet that is too long for `out`, and sends the fragments.
    pub(super) fn fragment(
        &mut self,
        turn: &mut Turn<'_>,
        packet: &mut Batch,
        way: Way,
        out: &Line,
        mac: MacAddress,
    ) {
        let pool = turn.pool();
        let wants_checksum = |f: &isoplane_memory::Frame| f.flags().contains(FrameFlags::TX_CHECKSUM);
        if packet.iter().any(wants_checksum) && !finish_checksum(pool, packet) {
            return turn.drop_all(packet, DropReason::Refused);
        }
        let bytes = start(pool, packet, way);
        let [first, _, high, low]: [u8; 4] = array(bytes, 0);
        let header = usize::from(first & 15) * 4;
        let data = usize::from(u16::from_be_bytes([high, low])).saturating_sub(header);
        let mut head = Header::of(bytes.get(..header).unwrap_or_default());
        if !way.own {
            options::pass(&self.config, &mut head.bytes[..head.len], out.address4);
        }
        let place = u16::from_be_bytes(array(bytes, 6));
        let (offset, more) = (usize::from(place & 0x1fff), place & 0x2000 != 0);
        let mtu = usize::from(out.mtu).min((pool.max_frame() as usize).saturating_sub(out.header()));
        let mut rest = head.copied();
        let (in_first, in_rest) = (head.room(mtu), rest.room(mtu));
        // What a reassembled packet could not hold; too little room for anything; a fragment in the middle that
        // does not end where another can begin.
        if offset * 8 + data + header > usize::from(u16::MAX) || in_rest < 8 || in_first < 8 {
            turn.count(field::BAD_HEADER, 1);
            return turn.drop_all(packet, DropReason::Malformed);
        }
        // The last one needs not end on a multiple of eight, so it may take some bytes more.
        let last = mtu - rest.len;
        let mut count = 1;
        let mut left = data.saturating_sub(in_first);
        while left > 0 {
            count += 1;
            left = if left <= last { 0 } else { left - in_rest };
        }
        let frames = turn.frames().len();
        if count > self.fragments_left || frames < (count + self.config.reserve) as usize {
            turn.count(field::FRAGMENT_LIMIT, 1);
            let reason = if count > self.fragments_left { DropReason::TooBig } else { DropReason::NoFrame };
            return turn.drop_all(packet, reason);
        }
        self.fragments_left -= count;
        let mut done = 0;
        while done < data {
            let header = if done == 0 { &mut head } else { &mut rest };
            let (room, left) = (if done == 0 { in_first } else { in_rest }, data - done);
            let now = if done != 0 && left <= last { left } else { room.min(left) };
            header.place(now, (offset + done / 8) as u16, more || done + now < data);
            let len = out.header() + header.len + now;
            let Some(mut frame) = turn.new_frame(len as u16) else {
                turn.count_drop(DropReason::NoFrame);
                break;
            };
            let to = pool.bytes_mut(&mut frame);
            out.write_header(to, mac.to_bits(), EtherType::IPV4);
            to[out.header()..out.header() + header.len].copy_from_slice(&header.bytes[..header.len]);
            let from = way.header() + usize::from(first & 15) * 4 + done;
            copy_out(pool, packet, from, &mut to[out.header() + header.len..]);
            turn.send(out.port(), frame);
            done += now;
        }
        turn.count(field::FRAGMENTED, 1);
        turn.count(field::FRAGMENTS, u64::from(count));
        turn.count(field::FORWARDED4, u64::from(!way.own));
        turn.give_back(packet);
    }
}
