//! A TCP/IP host on a worker: smoltcp on frames in place, for services that a program embeds.
//!
//! | file | what is there |
//! |---|---|
//! | this one | the [`Host`]: packets to sockets, sockets to the [`Service`], timers |
//! | [`config`] | what a host is told, and errors |
//! | [`service`] | what a program implements, and what it is handed |
//! | [`tasks`] | services written as futures, one a connection |
//! | `segment`, `flows`, `connections` | from a packet to the one socket that it is for |
//! | [`sockets`] | all sockets and the interface: what a service reaches beside the connection at hand |
//! | `timers` | when sockets want to be looked at again |
//! | `device` | what smoltcp sees of the port |
//!
//! smoltcp looks through all sockets for each packet and for each timer. Here each connection has a set of its
//! own, our table of flows finds it, and our wheel of timers knows when it wants something: what a packet costs
//! does not depend on how many connections there are.
//!
//! Contract: no packet makes it do more than a bounded amount of work; sockets, buffers and tables are made with
//! the host and used again, nothing is allocated later. When places are short, the connection that has waited
//! longest in TIME-WAIT makes room, then the oldest handshake of the same listener; else the SYN is dropped, and
//! counted.

pub mod config;
mod connections;
mod device;
mod flows;
mod segment;
pub mod service;
pub mod sockets;
pub mod tasks;
mod timers;

pub use config::{HostConfig, HostError, Listener, UdpPort};
pub use flows::Flow;
pub use service::{Connection, ConnectionId, Datagrams, Ending, Ends, Service};
pub use sockets::{ConnectError, Sockets};

use crate::app::{App, DropReason, PortId, Turn};
use connections::Stage;
use device::untag;
use isoplane_memory::stats::Field;
use isoplane_memory::{Batch, Frame};
use segment::For;
use smoltcp::socket::tcp;
use smoltcp::wire::IpAddress;

/// Counters, in the order of [`Host::FIELDS`].
mod field {
    pub(super) const ACCEPTED: usize = 0;
    pub(super) const CONNECTED: usize = 1;
    pub(super) const REFUSED: usize = 2;
    pub(super) const FAILED: usize = 3;
    pub(super) const CLOSED: usize = 4;
    pub(super) const BROKEN: usize = 5;
    pub(super) const SYN_DROPPED: usize = 6;
    pub(super) const HANDSHAKE_CUT: usize = 7;
    pub(super) const TIME_WAIT_CUT: usize = 8;
    pub(super) const CONNECTIONS: usize = 9;
}

/// A TCP/IP host with a service; an [`App`].
pub struct Host<S: Service> {
    sockets: Sockets,
    /// What the service keeps, by the place of the connection.
    states: Vec<Option<S::State>>,
    service: S,
}

impl<S: Service> std::fmt::Debug for Host<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("config", &self.sockets.config).finish_non_exhaustive()
    }
}

impl<S: Service> Host<S> {
    /// Counters to declare for a worker that runs a host, and nothing else that counts.
    pub const FIELDS: [Field; 10] = [
        Field::counter("tcp_accepted"),
        Field::counter("tcp_connected"),
        Field::counter("tcp_refused"),
        Field::counter("tcp_failed"),
        Field::counter("tcp_closed"),
        Field::counter("tcp_broken"),
        Field::counter("tcp_syn_dropped"),
        Field::counter("tcp_handshake_cut"),
        Field::counter("tcp_time_wait_cut"),
        Field::gauge("tcp_connections"),
    ];

    /// Makes a host, with all the memory that it will ever use.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn new(config: &HostConfig, service: S) -> Result<Self, HostError> {
        let seed = match config.seed {
            Some(seed) => seed,
            None => random()?,
        };
        let sockets = Sockets::new(config, seed)?;
        let states = (0..config.connections).map(|_| None).collect();
        Ok(Self { sockets, states, service })
    }

    /// The service and the sockets.
    pub const fn parts(&mut self) -> (&mut S, &mut Sockets) {
        (&mut self.service, &mut self.sockets)
    }

    /// One packet, whole and without a tag.
    #[inline(always)]
    fn arrived(&mut self, turn: &mut Turn<'_>, frame: &Frame) {
        match segment::of(turn.pool().bytes(frame)) {
            For::Tcp { flow, opens } => self.segment(turn, frame, flow, opens),
            For::Udp { port } => match self.sockets.datagrams.iter().position(|place| place.port == port) {
                Some(at) => {
                    self.sockets.show_datagram(turn, frame, at);
                    if self.sockets.datagrams.get_mut(at).is_some_and(|place| place.socket().can_recv()) {
                        self.service.datagrams(&mut self.sockets, port);
                    }
                }
                None => self.sockets.show_nobody(turn, frame),
            },
            For::Other => self.sockets.show_nobody(turn, frame),
        }
    }

    #[inline(always)]
    fn segment(&mut self, turn: &mut Turn<'_>, frame: &Frame, flow: Flow, opens: bool) {
        let mut found = self.sockets.connections.find(&flow);
        if let Some(place) = found
            && opens
            && self.state(place) == tcp::State::TimeWait
        {
            // A new connection between the same ends (RFC 6191): the old one has nothing to say any more.
            self.end(turn, place);
            found = None;
        }
        let at = match found {
            Some(place) => place,
            None => {
                let Some(listener) = self.listener(&flow).filter(|_| opens) else {
                    // smoltcp resets what is for nobody.
                    return self.sockets.show_nobody(turn, frame);
                };
                let Some(place) = self.open(turn, flow, listener) else { return };
                place
            }
        };
        self.sockets.show(turn, frame, at);
        if self.state(at) == tcp::State::Listen {
            // It was no SYN after all.
            return self.end(turn, at);
        }
        self.attend(turn, at);
    }

    /// What smoltcp calls the state of a place's connection.
    #[inline(always)]
    fn state(&mut self, at: u32) -> tcp::State {
        self.sockets.connections.known(at).socket().state()
    }

    /// Who listens for connections to this end.
    fn listener(&self, flow: &Flow) -> Option<u8> {
        let config = &self.sockets.config;
        let listener = config.listeners.iter().position(|listener| listener.port == flow.local_port)?;
        let ours = config.addresses.iter().any(|address| address.addr() == flow.local);
        ours.then_some(listener as u8)
    }

    /// A place for a new connection, listening; `None` when all are taken.
    fn open(&mut self, turn: &mut Turn<'_>, flow: Flow, at: u8) -> Option<u32> {
        let backlog = self.sockets.config.listeners.get(usize::from(at))?.backlog;
        if self.sockets.connections.half_open(at) >= backlog {
            self.cut_handshake(turn, at);
        }
        let place = match self.sockets.connections.open(flow, at) {
            Some(place) => Some(place),
            None => {
                if let Some(waiting) = self.sockets.connections.oldest_waiting() {
                    turn.count(field::TIME_WAIT_CUT, 1);
                    self.end(turn, waiting);
                } else {
                    self.cut_handshake(turn, at);
                }
                self.sockets.connections.open(flow, at)
            }
        };
        let Some(place) = place else {
            turn.count(field::SYN_DROPPED, 1);
            return None;
        };
        let socket = self.sockets.connections.known(place).socket();
        let listens = socket.listen((IpAddress::from(flow.local), flow.local_port));
        debug_assert_eq!(listens, Ok(()), "a socket that was aborted can listen");
        Some(place)
    }

    #[cold]
    fn cut_handshake(&mut self, turn: &mut Turn<'_>, listener: u8) {
        if let Some(oldest) = self.sockets.connections.oldest_half_open(listener) {
            turn.count(field::HANDSHAKE_CUT, 1);
            self.end(turn, oldest);
        }
    }

    /// After something happened to a connection: tells the service, sends, sets the timer.
    #[inline(always)]
    fn attend(&mut self, turn: &mut Turn<'_>, at: u32) {
        self.tell(turn, at);
        let more = self.sockets.send(turn, at);
        if self.state(at) == tcp::State::Closed {
            return self.end(turn, at);
        }
        if more {
            return self.sockets.touch(at);
        }
        match self.sockets.wakes(at) {
            Some(then) => self.sockets.timers.set(at, then),
            None => self.sockets.timers.cancel(at),
        }
    }

    /// Tells the service what has come of a connection.
    #[inline(always)]
    fn tell(&mut self, turn: &mut Turn<'_>, at: u32) {
        let state = self.state(at);
        let Self { sockets, service, states } = self;
        let place = sockets.connections.known(at);
        let id = ConnectionId { place: at, generation: place.generation };
        let Some(kept) = states.get_mut(at as usize) else { return };
        match place.stage {
            Stage::Open => {}
            Stage::HalfOpen | Stage::Connecting => {
                use tcp::State::{Closed, Listen, SynReceived, SynSent};
                if matches!(state, Listen | SynReceived | SynSent | Closed) {
                    return;
                }
                let ours = place.stage == Stage::Connecting;
                sockets.connections.handshake_over(at, Stage::Open);
                *kept = service.accept(&mut Connection { sockets, id });
                if kept.is_none() {
                    turn.count(field::REFUSED, 1);
                    sockets.connections.known(at).stage = Stage::Closing;
                    return sockets.connections.known(at).socket().abort();
                }
                turn.count(if ours { field::CONNECTED } else { field::ACCEPTED }, 1);
            }
            Stage::Free | Stage::Closing => return,
        }
        let Some(held) = kept.as_mut() else { return };
        if sockets.connections.known(at).socket().can_recv() {
            service.readable(&mut Connection { sockets, id }, held);
        }
        let place = sockets.connections.known(at);
        if place.wants_room && place.socket().can_send() {
            place.wants_room = false;
            service.writable(&mut Connection { sockets, id }, held);
        }
        let place = sockets.connections.known(at);
        let state = place.socket().state();
        let peer_done = {
            use tcp::State::{CloseWait, Closing, LastAck, TimeWait};
            matches!(state, CloseWait | LastAck | Closing | TimeWait)
        };
        if peer_done && !place.socket().can_recv() && !std::mem::replace(&mut place.told_finished, true) {
            service.finished(&mut Connection { sockets, id }, held);
        }
        if state == tcp::State::TimeWait {
            // Nothing can happen to it that the service would want to know.
            sockets.connections.known(at).stage = Stage::Closing;
            sockets.connections.waits(at);
            turn.count(field::CLOSED, 1);
            if let Some(kept) = kept.take() {
                service.closed(sockets, id, kept, Ending::Closed);
            }
        }
    }

    /// Gives a connection's place back.
    fn end(&mut self, turn: &mut Turn<'_>, at: u32) {
        let Self { sockets, service, states } = self;
        sockets.timers.cancel(at);
        let place = sockets.connections.known(at);
        let (id, stage) = (ConnectionId { place: at, generation: place.generation }, place.stage);
        let how = if place.told_finished { Ending::Closed } else { Ending::Broken };
        sockets.connections.release(at);
        if let Some(kept) = states.get_mut(at as usize).and_then(Option::take) {
            turn.count(if how == Ending::Closed { field::CLOSED } else { field::BROKEN }, 1);
            service.closed(sockets, id, kept, how);
        } else if stage == Stage::Connecting {
            turn.count(field::FAILED, 1);
            service.failed(sockets, id);
        }
    }

    /// Looks at the connections that were changed or have more to send, each of them once.
    fn look(&mut self, turn: &mut Turn<'_>) {
        for _ in 0..self.sockets.ready.len().min(self.sockets.config.burst as usize) {
            let Some(at) = self.sockets.ready.pop_front() else { break };
            let place = self.sockets.connections.known(at);
            place.queued = false;
            if place.stage != Stage::Free {
                self.attend(turn, at);
            }
        }
    }
}

/// A number that nobody can guess, from the kernel; when a host is made, not later.
fn random() -> Result<u64, HostError> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut bytes))
        .map_err(|error| HostError::Random(nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
    Ok(u64::from_ne_bytes(bytes))
}

impl<S: Service> App for Host<S> {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        if from != self.sockets.config.port {
            return turn.drop_all(batch, DropReason::NoPort);
        }
        self.sockets.now = turn.now();
        let (pool, vlan) = (turn.pool(), self.sockets.config.vlan);
        let mut rest_of_packet = false;
        for mut frame in batch.drain() {
            // smoltcp reads packets in one piece.
            let in_pieces = std::mem::replace(&mut rest_of_packet, frame.has_more()) || frame.has_more();
            if in_pieces {
                turn.drop(frame, DropReason::Malformed);
                continue;
            }
            if vlan.is_some_and(|vlan| !untag(pool, &mut frame, vlan)) {
                turn.drop(frame, DropReason::Vlan);
                continue;
            }
            self.arrived(turn, &frame);
            turn.take_back(frame);
        }
    }

    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.sockets.now = turn.now();
        let now = turn.now() / 1_000_000;
        for _ in 0..self.sockets.config.timers_a_turn {
            let Some(at) = self.sockets.timers.due(now) else { break };
            self.attend(turn, at);
        }
        self.service.turn(&mut self.sockets);
        self.look(turn);
        self.sockets.send_datagrams(turn);
        turn.gauge(field::CONNECTIONS, self.sockets.connections.len() as u64);
        self.sockets.budget = self.sockets.config.burst;
    }
}
