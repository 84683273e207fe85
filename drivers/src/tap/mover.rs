//! Moves packets between a lane and the tap's descriptor: the only place that makes system calls while a port is in
//! use.
//!
//! Contract: runs in the kicker, or in a worker that kicks itself, never in both at once (`lock`). One call moves at
//! most a batch of packets each way and never waits. A packet is finished before the next one is begun, by one change
//! of one word, so whoever dies in between has lost nothing; one that it had written and not finished is written
//! again. Entries are checked as if a stranger had made them, and so is what the kernel says of a packet.

use super::layout::{Count, DATA_VALID, Entry, HEADER_BYTES, Lane, NEEDS_CSUM, VnetHeader};
use super::lock::Held;
use super::packet::Packet;
use super::sys::{self, MAX_SPANS, Span};
use crate::port::KickError;
use isoplane_memory::ring::{Consumer, Producer, RingError};
use isoplane_memory::{BATCH, FrameFlags, Pool};
use nix::errno::Errno;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What became of a packet.
enum Step {
    /// It was moved.
    Moved,
    /// It was dropped or refused.
    Dropped,
    /// There is nothing to move, or no room, or the kernel has none now.
    Nothing,
}

/// The rings' ends of whoever moves packets.
#[derive(Debug)]
struct Rings {
    given: Consumer<Entry>,
    done: Producer<Entry>,
}

impl Rings {
    /// Makes `n` entries, written before, the worker's again.
    fn finish(&mut self, n: u32) {
        // Both store the same number to the same word.
        self.done.publish(n);
        self.given.release(n);
    }

    /// Gives the oldest `n` entries back without a packet.
    fn give_back(&mut self, n: u32) {
        for at in 0..n {
            let Entry { address, .. } = self.given.read(at);
            self.done.write(at, Entry { address, ..Entry::default() });
        }
        self.finish(n);
    }
}

/// Where packets are moved.
#[derive(Debug)]
struct Place {
    lane: Lane,
    pool: Arc<Pool>,
    /// Frames that a received packet may have.
    segments: usize,
}

/// Moves the packets of one lane.
#[derive(Debug)]
pub(super) struct Mover {
    place: Place,
    rings: Rings,
}

impl Mover {
    pub(super) fn new(lane: &Lane, pool: &Arc<Pool>, segments: usize) -> Result<Self, RingError> {
        let (given, done) = lane.mover()?;
        let segments = segments.clamp(1, MAX_SPANS);
        let place = Place { lane: lane.clone(), pool: Arc::clone(pool), segments };
        Ok(Self { place, rings: Rings { given, done } })
    }

    /// Packets from the kernel to the worker; says how many. Zero also when somebody else is at it.
    pub(super) fn receive(&mut self, fd: BorrowedFd<'_>) -> Result<u32, KickError> {
        self.work(|place, rings| place.read_one(rings, fd))
    }

    /// Packets from the worker to the kernel; says how many.
    pub(super) fn transmit(&mut self, fd: BorrowedFd<'_>) -> Result<u32, KickError> {
        self.work(|place, rings| place.write_one(rings, fd))
    }

    fn work(
        &mut self,
        mut step: impl FnMut(&Place, &mut Rings) -> Result<Step, Errno>,
    ) -> Result<u32, KickError> {
        let Self { place, rings } = self;
        let lane = &place.lane;
        if !lane.has_work() {
            return Ok(0);
        }
        let Some(_held) = Held::take(lane).filter(|_| !lane.is_stopped()) else { return Ok(0) };
        // Another process may have been at it since.
        rings.given.resync();
        rings.done.resync();
        let mut moved = 0;
        let mut failed = None;
        for _ in 0..BATCH {
            match step(place, rings) {
                Ok(Step::Moved) => moved += 1,
                Ok(Step::Dropped) => {}
                Ok(Step::Nothing) => break,
                Err(errno) => {
                    failed = verdict(errno);
                    break;
                }
            }
        }
        if moved != 0 || failed.is_some() {
            lane.count(Count::Kicks, 1);
        }
        match failed {
            Some(error) => {
                lane.count(Count::Errors, 1);
                Err(error)
            }
            None => Ok(moved),
        }
    }
}

impl Place {
    fn read_one(&self, rings: &mut Rings, fd: BorrowedFd<'_>) -> Result<Step, Errno> {
        let want = self.segments as u32;
        if rings.given.available(want).min(rings.done.free(want)) < want {
            return Ok(Step::Nothing);
        }
        let room = self.pool.max_frame() as usize;
        let mut addresses = [0; MAX_SPANS];
        let mut offered = Packet::new();
        for at in 0..want {
            let Entry { address, .. } = rings.given.read(at);
            let Some(span) = Span::of(&self.pool, address, room) else { break };
            addresses[at as usize] = address;
            offered.push(span);
        }
        if offered.parts().is_empty() {
            // The worker's collector finds that it is a lie, too, and has the last word.
            self.lane.count(Count::Bad, 1);
            rings.give_back(1);
            return Ok(Step::Dropped);
        }
        let mut header = VnetHeader::default();
        let n = sys::read(fd, &mut header, offered.parts())?;
        let len = n.checked_sub(HEADER_BYTES).filter(|len| (1..=offered.len()).contains(len));
        let packet = len.map(|len| offered.cut(len));
        let accepted = packet.and_then(|packet| Some((packet, accept(header, &packet)?)));
        let Some((packet, flags)) = accepted else {
            self.lane.count(Count::Dropped, 1);
            return Ok(Step::Dropped);
        };
        let last = packet.parts().len() - 1;
        for (at, part) in packet.parts().iter().enumerate() {
            let flags = if at == last { flags } else { flags | FrameFlags::MORE };
            let (address, len) = (addresses[at], part.len() as u16);
            rings.done.write(at as u32, Entry { address, len, flags: flags.bits(), ..Entry::default() });
        }
        rings.finish(last as u32 + 1);
        Ok(Step::Moved)
    }

    fn write_one(&self, rings: &mut Rings, fd: BorrowedFd<'_>) -> Result<Step, Errno> {
        let all = rings.given.capacity();
        let available = rings.given.available(all).min(rings.done.free(all));
        let mut packet = Packet::new();
        let mut header = VnetHeader::default();
        let (mut n, mut bytes, mut whole, mut good) = (0, 0, false, true);
        while n < available && !whole {
            let entry = rings.given.read(n);
            let flags = FrameFlags::from_bits_retain(entry.flags);
            if n == 0 && flags.contains(FrameFlags::TX_CHECKSUM) {
                header.flags = NEEDS_CSUM;
                (header.csum_start, header.csum_offset) = (entry.csum_start, entry.csum_offset);
            }
            match Span::of(&self.pool, entry.address, entry.len.into()) {
                Some(span) => good &= packet.push(span),
                None => {
                    self.lane.count(Count::Bad, 1);
                    good = false;
                }
            }
            whole = !flags.contains(FrameFlags::MORE);
            bytes += u64::from(entry.len);
            n += 1;
        }
        if !whole && n < all {
            // Nothing waits, or the end of a packet does not: whole ones are given, so that is a lie, or room is short.
            return Ok(Step::Nothing);
        }
        let sent = if whole && good { sys::write(fd, header, packet.parts()) } else { Err(Errno::EINVAL) };
        match sent {
            Ok(_) => {
                rings.give_back(n);
                Ok(Step::Moved)
            }
            // Shorter than an Ethernet header, or a checksum outside the packet.
            Err(Errno::EINVAL | Errno::EMSGSIZE | Errno::EFAULT) => {
                self.lane.count(Count::RefusedFrames, n.into());
                self.lane.count(Count::RefusedBytes, bytes);
                rings.give_back(n);
                Ok(Step::Dropped)
            }
            Err(errno) => Err(errno),
        }
    }
}

/// What an error of the kernel means; `None` when it will pass by itself.
fn verdict(errno: Errno) -> Option<KickError> {
    match errno {
        Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS | Errno::ENOMEM => None,
        // The interface is off: packets wait until it is on.
        Errno::EIO | Errno::ENETDOWN => Some(KickError::Down),
        Errno::EBADFD | Errno::ENODEV | Errno::ENXIO => Some(KickError::Gone),
        errno => Some(KickError::Os(errno)),
    }
}

/// Finishes a packet as its header asks; says what is known of it then. `None` when the header makes no sense.
fn accept(header: VnetHeader, packet: &Packet<'_>) -> Option<FrameFlags> {
    // Joined segments were not asked for.
    if header.gso_type != 0 {
        return None;
    }
    if header.flags & NEEDS_CSUM != 0 {
        let complete = packet.complete_checksum(header.csum_start.into(), header.csum_offset.into());
        return complete.then_some(FrameFlags::empty());
    }
    Some(if header.flags & DATA_VALID != 0 { FrameFlags::RX_CHECKSUM_GOOD } else { FrameFlags::empty() })
}
