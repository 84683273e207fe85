//! Packets that wait for neighbours whose Ethernet address is not known yet.
//!
//! Contract: everything is bounded and made beforehand. A neighbour that is waited for has its place until it is
//! resolved or given up: no other takes it away, so a scan of a large connected prefix finds the table full and
//! disturbs nobody. A quarter of the places are for gateways alone. Frames of a packet wait and leave together,
//! in order; when a neighbour has too many the oldest packet is dropped (RFC 1122, 2.3.2.2).

use super::config::ResolutionLimits;
use crate::tables::{InterfaceId, NextHopId};
use isoplane_memory::{Batch, Frame};
use std::net::IpAddr;

/// Who is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Neighbour {
    /// An address on a link.
    OnLink(InterfaceId, IpAddr),
    /// A next hop, mostly a gateway.
    NextHop(NextHopId),
}

/// Packets that wait for one neighbour.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) neighbour: Neighbour,
    /// When the first packet came.
    pub(super) since: u64,
    /// When the program was asked; `None` before.
    pub(super) asked: Option<u64>,
    queue: Queue,
    /// Its place in the list of those that are used.
    position: u16,
}

/// Frames in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Queue {
    first: u16,
    last: u16,
    frames: u16,
}

const NOTHING: u16 = u16::MAX;

impl Queue {
    const EMPTY: Self = Self { first: NOTHING, last: NOTHING, frames: 0 };
}

#[derive(Debug)]
struct Slot {
    frame: Option<Frame>,
    next: u16,
}

/// Entries of one hash share this many places.
const WAYS: usize = 8;

/// All of them.
#[derive(Debug)]
pub(super) struct Pending {
    /// In sets of [`WAYS`]; more than are used at most, so that a set is seldom full.
    entries: Box<[Option<Entry>]>,
    /// Places of those that are used.
    used: Vec<u16>,
    on_link: usize,
    slots: Box<[Slot]>,
    free: u16,
    held: u16,
    cursor: usize,
    most: usize,
    frames_each: u16,
}

/// Why a packet cannot wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// No neighbour more.
    Neighbours,
    /// No frame more.
    Frames,
}

impl Pending {
    pub(super) fn new(limits: &ResolutionLimits) -> Self {
        let most = usize::from(limits.neighbours);
        let places = (most * 2).next_power_of_two().max(WAYS);
        let frames = limits.frames;
        let slot = |at: u16| Slot { frame: None, next: if at + 1 == frames { NOTHING } else { at + 1 } };
        Self {
            entries: vec![None; places].into_boxed_slice(),
            used: Vec::with_capacity(most),
            on_link: 0,
            slots: (0..frames).map(slot).collect(),
            free: 0,
            held: 0,
            cursor: 0,
            most,
            frames_each: limits.frames_each.min(frames),
        }
    }

    /// Neighbours that are waited for.
    #[inline(always)]
    pub(super) const fn len(&self) -> usize {
        self.used.len()
    }

    /// Frames that wait.
    pub(super) const fn held(&self) -> usize {
        self.held as usize
    }

    /// Is this neighbour waited for?
    pub(super) fn has(&self, neighbour: Neighbour, hash: u32) -> bool {
        self.ways(hash).filter_map(|at| self.entries[at]).any(|entry| entry.neighbour == neighbour)
    }

    /// The places that a hash may have.
    fn ways(&self, hash: u32) -> std::ops::Range<usize> {
        let set = hash as usize & (self.entries.len() / WAYS - 1);
        set * WAYS..(set + 1) * WAYS
    }

    /// Finds a neighbour, or makes a place for it. `hash` is its own.
    pub(super) fn place(&mut self, neighbour: Neighbour, hash: u32, now: u64) -> Result<usize, Full> {
        let mut vacant = None;
        for at in self.ways(hash) {
            match &self.entries[at] {
                Some(entry) if entry.neighbour == neighbour => return Ok(at),
                Some(_) => {}
                None => vacant = vacant.or(Some(at)),
            }
        }
        let on_link = matches!(neighbour, Neighbour::OnLink(..));
        let at = vacant.filter(|_| self.used.len() < self.most && !(on_link && self.link_is_full()));
        let at = at.ok_or(Full::Neighbours)?;
        let position = self.used.len() as u16;
        self.used.push(at as u16);
        self.on_link += usize::from(on_link);
        self.entries[at] = Some(Entry { neighbour, since: now, asked: None, queue: Queue::EMPTY, position });
        Ok(at)
    }

    const fn link_is_full(&self) -> bool {
        self.on_link >= self.most - self.most / 4
    }

    pub(super) fn entry(&mut self, at: usize) -> Option<&mut Entry> {
        self.entries.get_mut(at)?.as_mut()
    }

    /// Lets a packet wait; what it makes room for goes to `dropped`.
    pub(super) fn push(
        &mut self,
        at: usize,
        packet: &mut Batch,
        mut dropped: impl FnMut(Frame),
    ) -> Result<(), Full> {
        let Some(mut queue) = self.entry(at).map(|entry| entry.queue) else { return Err(Full::Neighbours) };
        let frames = packet.len() as u16;
        if frames > self.frames_each {
            return Err(Full::Frames);
        }
        while queue.frames + frames > self.frames_each {
            self.drop_oldest(&mut queue, &mut dropped);
        }
        let fits = usize::from(self.held) + packet.len() <= self.slots.len();
        if fits {
            for frame in packet.drain() {
                if let Err(frame) = self.append(&mut queue, frame) {
                    // Not reached: there is a free slot for each frame.
                    dropped(frame);
                }
            }
        }
        if let Some(entry) = self.entry(at) {
            entry.queue = queue;
        }
        if fits { Ok(()) } else { Err(Full::Frames) }
    }

    fn drop_oldest(&mut self, queue: &mut Queue, dropped: &mut impl FnMut(Frame)) {
        while let Some(frame) = self.pop(queue) {
            let more = frame.has_more();
            dropped(frame);
            if !more {
                break;
            }
        }
    }

    fn append(&mut self, queue: &mut Queue, frame: Frame) -> Result<(), Frame> {
        let at = self.free;
        let Some(slot) = self.slots.get_mut(usize::from(at)) else { return Err(frame) };
        self.free = slot.next;
        *slot = Slot { frame: Some(frame), next: NOTHING };
        match self.slots.get_mut(usize::from(queue.last)) {
            Some(last) => last.next = at,
            None => queue.first = at,
        }
        queue.last = at;
        queue.frames += 1;
        self.held += 1;
        Ok(())
    }

    /// The first frame of a queue.
    pub(super) fn pop(&mut self, queue: &mut Queue) -> Option<Frame> {
        let at = queue.first;
        let slot = self.slots.get_mut(usize::from(at))?;
        let frame = slot.frame.take();
        queue.first = slot.next;
        slot.next = self.free;
        self.free = at;
        queue.frames -= 1;
        self.held -= 1;
        if queue.first == NOTHING {
            *queue = Queue::EMPTY;
        }
        frame
    }

    /// The next neighbour in turn; those that are waited for all get theirs.
    pub(super) fn next(&mut self) -> Option<(usize, Entry)> {
        if self.cursor >= self.used.len() {
            self.cursor = 0;
        }
        let at = usize::from(*self.used.get(self.cursor)?);
        self.cursor += 1;
        self.entries[at].map(|entry| (at, entry))
    }

    /// Waits no longer for a neighbour: its packets are the caller's, who pops them all.
    pub(super) fn remove(&mut self, at: usize) -> Queue {
        let Some(entry) = self.entries.get_mut(at).and_then(Option::take) else { return Queue::EMPTY };
        let position = usize::from(entry.position);
        self.used.swap_remove(position);
        if let Some(moved) = self.used.get(position).copied()
            && let Some(other) = self.entry(usize::from(moved))
        {
            other.position = entry.position;
        }
        self.on_link -= usize::from(matches!(entry.neighbour, Neighbour::OnLink(..)));
        // The one that took its place in the list is looked at next.
        self.cursor = position;
        entry.queue
    }
}
