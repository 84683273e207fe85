//! Neighbours whose Ethernet address is not known: the program is asked, packets wait, and leave when the tables
//! say where to.
//!
//! Contract: a neighbour is asked for at once and then once in each retry interval; neighbours on a link within a
//! limit for all of them. A few that are waited for are looked up in each turn, in turn, so that many of them
//! cost the turn no more than a few.

use super::general::{Objection, Refusal, Way};
use super::pending::{Entry, Neighbour};
use super::request::Request;
use super::{Router, field};
use crate::app::{DropReason, Turn};
use crate::tables::{InterfaceId, NextHop, NextHopId};
use isoplane_memory::{Batch, Frame};
use std::net::IpAddr;
use std::time::Duration;

/// Neighbours looked up at the end of a turn.
pub(super) const PER_TURN: usize = 16;
/// And before each batch.
pub(super) const PER_BATCH: usize = 2;
/// Next hops that have failed of which it is known when they were asked for again.
pub(super) const FAILED: usize = 64;

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Router {
    /// Lets a packet wait for its neighbour, or drops it.
    pub(super) fn hold(&mut self, turn: &mut Turn<'_>, packet: &mut Batch, way: Way, neighbour: Neighbour) {
        let full = Objection::Drop(field::HELD_LIMIT, DropReason::Resolution);
        if turn.stopping() {
            return self.object(turn, packet, way, full);
        }
        let now = turn.now();
        let hash = self.hash_of(neighbour);
        let Ok(at) = self.pending.place(neighbour, hash, now) else {
            // It cannot wait, but those that come later may find the answer.
            self.ask(turn, neighbour);
            return self.object(turn, packet, way, full);
        };
        if self.pending.entry(at).is_some_and(|entry| entry.asked.is_none()) && self.ask(turn, neighbour) {
            self.asked(at, now);
        }
        if turn.frames().len() < self.config.reserve as usize {
            return self.object(turn, packet, way, full);
        }
        if let Some(first) = packet.as_mut_slice().first_mut() {
            first.set_mark(way.to_mark());
        }
        let mut dropped = 0;
        let result = self.pending.push(at, packet, |frame: Frame| {
            dropped += u64::from(!frame.has_more());
            turn.drop(frame, DropReason::Resolution);
        });
        turn.count(field::HELD_LIMIT, dropped);
        match result {
            Ok(()) => turn.count(field::HELD, 1),
            Err(_) => self.object(turn, packet, way, full),
        }
        self.show_pending(turn);
    }

    fn hash_of(&self, neighbour: Neighbour) -> u32 {
        match neighbour {
            Neighbour::OnLink(_, IpAddr::V4(address)) => self.flow.of_host(address.to_bits().into()),
            Neighbour::OnLink(_, IpAddr::V6(address)) => self.flow.of_host(address.to_bits()),
            Neighbour::NextHop(id) => self.flow.of_host(u128::MAX ^ u128::from(id.get())),
        }
    }

    /// Whom packets wait for that go by a next hop which is being asked for: a neighbour on link got its next
    /// hop while others waited, and they all leave in order.
    pub(super) fn waited_for(&self, id: NextHopId, interface: InterfaceId, address: IpAddr) -> Neighbour {
        let on_link = Neighbour::OnLink(interface, address);
        if self.pending.has(on_link, self.hash_of(on_link)) { on_link } else { Neighbour::NextHop(id) }
    }

    fn asked(&mut self, at: usize, now: u64) {
        if let Some(entry) = self.pending.entry(at) {
            entry.asked = Some(now);
        }
    }

    /// Asks the program for a neighbour; says whether that went well.
    fn ask(&mut self, turn: &mut Turn<'_>, neighbour: Neighbour) -> bool {
        let (request, allowed) = match neighbour {
            Neighbour::OnLink(interface, address) => {
                (Request::Neighbour { interface, address }, self.asks.take(turn.now()))
            }
            // There are only as many as the program has made.
            Neighbour::NextHop(id) => (Request::NextHop { id }, true),
        };
        let done = allowed && self.requests.send(request.into()).is_ok();
        turn.count(if done { field::REQUESTS } else { field::REQUESTS_LIMITED }, 1);
        done
    }

    /// Asks for a next hop that has failed, once in each retry interval.
    pub(super) fn ask_again(&mut self, turn: &mut Turn<'_>, id: NextHopId) {
        let (at, now) = (id.get() as usize % FAILED, turn.now());
        let (last, when) = self.failed[at];
        if last == id.get() && now.saturating_sub(when) < nanos(self.config.resolution.retry) {
            return;
        }
        if self.ask(turn, Neighbour::NextHop(id)) {
            self.failed[at] = (id.get(), now);
        }
    }

    /// Looks some of the neighbours up that packets wait for.
    #[cold]
    #[inline(never)]
    pub(super) fn look_after(&mut self, turn: &mut Turn<'_>, most: usize) {
        let (retry, timeout) = (nanos(self.config.resolution.retry), nanos(self.config.resolution.timeout));
        for _ in 0..most.min(self.pending.len()) {
            let Some((at, entry)) = self.pending.next() else { break };
            let now = turn.now();
            if !self.waits(&entry) {
                self.release(turn, at, None);
            } else if now.saturating_sub(entry.since) >= timeout {
                let none = Objection::Refuse(Refusal::NoAnswer, field::HELD_TIMEOUT, DropReason::Resolution);
                self.release(turn, at, Some(none));
            } else if entry.asked.is_none_or(|asked| now.saturating_sub(asked) >= retry)
                && self.ask(turn, entry.neighbour)
            {
                self.asked(at, now);
            }
        }
        self.show_pending(turn);
    }

    /// Is it still not known where packets for this neighbour go?
    fn waits(&self, entry: &Entry) -> bool {
        let next_hop = match entry.neighbour {
            Neighbour::NextHop(id) => {
                return matches!(self.tables.next_hops.get(id), NextHop::Waiting { .. });
            }
            Neighbour::OnLink(_, IpAddr::V4(address)) => self.tables.fib4.lookup(address.to_bits()),
            Neighbour::OnLink(_, IpAddr::V6(address)) => self.tables.fib6.lookup(address.to_bits()),
        };
        let next_hop = self.tables.next_hops.get(next_hop);
        matches!(next_hop, NextHop::OnLink { .. } | NextHop::Waiting { .. })
    }

    /// Ends the waiting for a neighbour: its packets are looked up anew, or meet an objection.
    fn release(&mut self, turn: &mut Turn<'_>, at: usize, objection: Option<Objection>) {
        let mut queue = self.pending.remove(at);
        let mut packet = Batch::new();
        while let Some(frame) = self.pending.pop(&mut queue) {
            let more = frame.has_more();
            // A packet has at most as many frames as a batch.
            let _ = packet.push(frame).map_err(|frame| turn.drop(frame, DropReason::Malformed));
            if more {
                continue;
            }
            let way = Way::from_mark(packet.as_slice().first().map_or(0, Frame::mark));
            match objection {
                Some(objection) => self.object(turn, &mut packet, way, objection),
                None => self.route(turn, &mut packet, way),
            }
        }
    }

    /// Drops everything that waits.
    pub(super) fn give_up(&mut self, turn: &mut Turn<'_>) {
        while let Some((at, _)) = self.pending.next() {
            self.release(turn, at, Some(Objection::Drop(field::HELD_LIMIT, DropReason::Resolution)));
        }
        self.show_pending(turn);
    }

    pub(super) fn show_pending(&self, turn: &mut Turn<'_>) {
        turn.gauge(field::WAITING_NEIGHBOURS, self.pending.len() as u64);
        turn.gauge(field::WAITING_FRAMES, self.pending.held() as u64);
    }
}
