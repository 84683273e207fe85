//! The places of TCP connections: sockets and buffers that are made once and used again and again.
//!
//! Contract: each place has a socket in a set of its own, so that smoltcp, which looks through all sockets of
//! a set, looks through one. A place is free, or has a flow that the table of flows knows. What the service
//! keeps for a connection is not here, so that it can look at one connection while it changes another.

use super::config::HostConfig;
use super::flows::{Flow, FlowTable};
use super::service::ConnectionId;
use smoltcp::iface::{SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp;
use std::collections::VecDeque;
use std::time::Duration;

/// What is going on in a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing.
    Free,
    /// A handshake that a peer began.
    HalfOpen,
    /// A handshake that we began.
    Connecting,
    /// The service knows it.
    Open,
    /// The service has been told that it is over, or never knew it.
    Closing,
}

/// One place.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) set: SocketSet<'static>,
    handle: SocketHandle,
    pub(super) flow: Option<Flow>,
    pub(super) stage: Stage,
    pub(super) generation: u32,
    /// Which listener it came by.
    pub(super) listener: u8,
    /// It is in the list of those that have something to send.
    pub(super) queued: bool,
    /// The service has met a full buffer.
    pub(super) wants_room: bool,
    /// The service was told that the peer is done.
    pub(super) told_finished: bool,
}

impl Place {
    fn new(config: &HostConfig) -> Self {
        let buffer = |bytes: u32| tcp::SocketBuffer::new(vec![0; bytes as usize]);
        let mut set = SocketSet::new(vec![SocketStorage::EMPTY]);
        let mut socket = tcp::Socket::new(buffer(config.receive_buffer), buffer(config.transmit_buffer));
        let duration = |d: Duration| smoltcp::time::Duration::from_micros(d.as_micros() as u64);
        socket.set_timeout(Some(duration(config.timeout)));
        socket.set_keep_alive(config.keep_alive.map(duration));
        socket.set_ack_delay(config.ack_delay.map(duration));
        socket.set_nagle_enabled(config.nagle);
        socket.set_congestion_control(tcp::CongestionControl::Cubic);
        let handle = set.add(socket);
        Self {
            set,
            handle,
            flow: None,
            stage: Stage::Free,
            generation: 0,
            listener: 0,
            queued: false,
            wants_room: false,
            told_finished: false,
        }
    }

    #[inline(always)]
    pub(super) fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.set.get_mut(self.handle)
    }
}

/// All places.
#[derive(Debug)]
pub(super) struct Connections {
    places: Vec<Place>,
    free: Vec<u32>,
    flows: FlowTable,
    /// Handshakes of each listener, oldest first; entries whose generation has passed are void.
    half_open: Vec<VecDeque<ConnectionId>>,
    /// Valid entries of each.
    half_open_count: Vec<u32>,
    /// Connections that wait for stray segments (TIME-WAIT), oldest first; as above.
    waiting: VecDeque<ConnectionId>,
}

impl Connections {
    pub(super) fn new(config: &HostConfig, seed: u64) -> Self {
        let most = config.connections;
        Self {
            places: (0..most).map(|_| Place::new(config)).collect(),
            free: (0..most).rev().collect(),
            flows: FlowTable::new(most as usize, seed),
            half_open: config.listeners.iter().map(|l| VecDeque::with_capacity(l.backlog as usize)).collect(),
            half_open_count: vec![0; config.listeners.len()],
            waiting: VecDeque::with_capacity(most as usize),
        }
    }

    /// Places in use.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    #[inline(always)]
    pub(super) fn get(&mut self, place: u32) -> Option<&mut Place> {
        self.places.get_mut(place as usize)
    }

    /// A place that is known to be there.
    #[inline(always)]
    pub(super) fn known(&mut self, place: u32) -> &mut Place {
        &mut self.places[place as usize]
    }

    /// The place of a connection that has not ended.
    #[inline(always)]
    pub(super) fn by_id(&mut self, id: ConnectionId) -> Option<&mut Place> {
        let there = |place: &&mut Place| place.generation == id.generation && place.stage != Stage::Free;
        self.get(id.place).filter(there)
    }

    /// The place of a flow.
    #[inline(always)]
    pub(super) fn find(&self, flow: &Flow) -> Option<u32> {
        self.flows.find(flow, |place| self.places.get(place as usize)?.flow)
    }

    /// Takes a place for a flow that has none; `None` when all are taken.
    pub(super) fn take(&mut self, flow: Flow, stage: Stage) -> Option<u32> {
        let at = self.free.pop()?;
        if !self.flows.add(&flow, at) {
            self.free.push(at);
            return None;
        }
        let place = &mut self.places[at as usize];
        place.flow = Some(flow);
        place.stage = stage;
        (place.wants_room, place.told_finished) = (false, false);
        // What the one before had left to send is forgotten.
        place.socket().abort();
        Some(at)
    }

    /// Takes a place for a handshake that a peer began.
    pub(super) fn open(&mut self, flow: Flow, listener: u8) -> Option<u32> {
        let at = self.take(flow, Stage::HalfOpen)?;
        let place = &mut self.places[at as usize];
        place.listener = listener;
        let id = ConnectionId { place: at, generation: place.generation };
        let queue = &mut self.half_open[usize::from(listener)];
        if queue.len() == queue.capacity() {
            // Void entries, or the caller has made room: this never pushes out a valid one.
            queue.pop_front();
        }
        queue.push_back(id);
        self.half_open_count[usize::from(listener)] += 1;
        Some(at)
    }

    /// Handshakes of a listener.
    pub(super) fn half_open(&self, listener: u8) -> u32 {
        self.half_open_count[usize::from(listener)]
    }

    /// The oldest handshake of a listener.
    pub(super) fn oldest_half_open(&mut self, listener: u8) -> Option<u32> {
        let Self { half_open, places, .. } = self;
        let queue = half_open.get_mut(usize::from(listener))?;
        while let Some(id) = queue.front() {
            let place = &places[id.place as usize];
            if place.generation == id.generation && place.stage == Stage::HalfOpen {
                return Some(id.place);
            }
            queue.pop_front();
        }
        None
    }

    /// The handshake of a place is over, well or not.
    pub(super) fn handshake_over(&mut self, at: u32, stage: Stage) {
        let place = &mut self.places[at as usize];
        if place.stage == Stage::HalfOpen {
            self.half_open_count[usize::from(place.listener)] -= 1;
        }
        place.stage = stage;
    }

    /// A connection waits for stray segments only, and may be cut short when places are short.
    pub(super) fn waits(&mut self, at: u32) {
        if self.waiting.len() == self.waiting.capacity() {
            self.waiting.pop_front();
        }
        self.waiting.push_back(ConnectionId { place: at, generation: self.places[at as usize].generation });
    }

    /// The connection that has waited longest for stray segments.
    pub(super) fn oldest_waiting(&mut self) -> Option<u32> {
        while let Some(id) = self.waiting.pop_front() {
            let place = &mut self.places[id.place as usize];
            if place.generation == id.generation && place.socket().state() == tcp::State::TimeWait {
                return Some(id.place);
            }
        }
        None
    }

    /// Gives a place back.
    pub(super) fn release(&mut self, at: u32) {
        self.handshake_over(at, Stage::Closing);
        if let Some(flow) = self.places[at as usize].flow {
            let Self { flows, places, .. } = self;
            flows.remove(&flow, |place| places.get(place as usize)?.flow);
        }
        let place = &mut self.places[at as usize];
        place.flow = None;
        place.stage = Stage::Free;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(at);
    }
}
