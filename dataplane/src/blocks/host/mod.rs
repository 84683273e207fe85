//! A TCP/IP host on a worker: smoltcp on frames in place, for services that a program embeds.
//!
//! | file | what is there |
//! |---|---|
//! | this one | the [`Host`]: packets to sockets, sockets to the [`Service`], timers |
//! | [`config`] | what a host is told, and errors |
//! | [`service`] | what a program implements, and what it is handed |
//! | `segment`, `flows`, `connections` | from a packet to the one socket that it is for |
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
mod timers;

pub use config::{HostConfig, HostError, Listener, UdpPort};
pub use flows::Flow;
pub use service::{Connection, ConnectionId, Datagrams, Ending, Ends, Service};

use crate::app::{App, DropReason, PortId, Turn};
use connections::{Connections, Stage};
use device::{Description, Wire, untag};
use ipnet::IpNet;
use isoplane_memory::stats::Field;
use isoplane_memory::{Batch, Frame};
use segment::For;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr, Ipv4Cidr, Ipv6Cidr};
use std::collections::VecDeque;
use std::net::IpAddr;
use timers::Timers;

/// Counters, in the order of [`Host::FIELDS`].
pub(crate) mod field {
    pub(crate) const ACCEPTED: usize = 0;
    pub(crate) const REFUSED: usize = 1;
    pub(crate) const CLOSED: usize = 2;
    pub(crate) const BROKEN: usize = 3;
    pub(crate) const SYN_DROPPED: usize = 4;
    pub(crate) const HANDSHAKE_CUT: usize = 5;
    pub(crate) const TIME_WAIT_CUT: usize = 6;
    pub(crate) const CONNECTIONS: usize = 7;
}

/// A UDP port.
#[derive(Debug)]
struct UdpPlace {
    set: SocketSet<'static>,
    handle: SocketHandle,
    port: u16,
}

/// A TCP/IP host with a service; an [`App`].
pub struct Host<S: Service> {
    config: HostConfig,
    interface: Interface,
    /// For what is no TCP or UDP of ours.
    nobody: SocketSet<'static>,
    connections: Connections<S::State>,
    datagrams: Vec<UdpPlace>,
    timers: Timers,
    /// Connections that have something to send and found the turn's budget used up.
    ready: VecDeque<u32>,
    /// Packets that this turn may still send.
    budget: u32,
    service: S,
}

impl<S: Service> std::fmt::Debug for Host<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("config", &self.config).finish_non_exhaustive()
    }
}

/// smoltcp's time of a turn's.
fn instant(nanos: u64) -> Instant {
    Instant::from_micros((nanos / 1000) as i64)
}

impl<S: Service> Host<S> {
    /// Counters to declare for a worker that runs a host, and nothing else that counts.
    pub const FIELDS: [Field; 8] = [
        Field::counter("tcp_accepted"),
        Field::counter("tcp_refused"),
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
        config.check()?;
        let seed = match config.seed {
            Some(seed) => seed,
            None => random()?,
        };
        let hardware = HardwareAddress::Ethernet(EthernetAddress(config.mac.0));
        let mut interface_config = Config::new(hardware);
        interface_config.random_seed = seed;
        let mut description = Description { max_frame: config.mtu + 14 };
        let mut interface = Interface::new(interface_config, &mut description, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            for address in &config.addresses {
                // `check` has counted them.
                let _ = addresses.push(cidr(*address));
            }
        });
        for gateway in &config.gateways {
            // One of each version has room.
            let _ = match gateway {
                IpAddr::V4(gateway) => interface.routes_mut().add_default_ipv4_route(*gateway).map(drop),
                IpAddr::V6(gateway) => interface.routes_mut().add_default_ipv6_route(*gateway).map(drop),
            };
        }
        let datagrams = config.datagrams.iter().map(UdpPlace::new).collect();
        Ok(Self {
            interface,
            nobody: SocketSet::new(Vec::new()),
            connections: Connections::new(config, seed.rotate_left(32)),
            datagrams,
            timers: Timers::new(config.connections as usize, 0),
            ready: VecDeque::with_capacity(config.connections as usize),
            budget: config.burst,
            config: config.clone(),
            service,
        })
    }

    /// The service.
    pub const fn service(&mut self) -> &mut S {
        &mut self.service
    }

    /// One packet, whole and without a tag.
    #[inline(always)]
    fn arrived(&mut self, turn: &mut Turn<'_>, frame: &Frame) {
        match segment::of(turn.pool().bytes(frame)) {
            For::Tcp { flow, opens } => self.segment(turn, frame, flow, opens),
            For::Udp { port } => match self.datagrams.iter().position(|place| place.port == port) {
                Some(at) => self.datagram(turn, frame, at),
                None => self.other(turn, frame),
            },
            For::Other => self.other(turn, frame),
        }
    }

    /// Shows a packet to smoltcp and one set of sockets.
    #[inline(always)]
    fn show(
        turn: &mut Turn<'_>,
        frame: &Frame,
        config: &HostConfig,
        interface: &mut Interface,
        budget: &mut u32,
        set: &mut SocketSet<'static>,
    ) {
        let now = instant(turn.now());
        let (port, vlan, max_frame) = (config.port, config.vlan, config.mtu + 14);
        let mut wire = Wire { turn, port, vlan, max_frame, budget, arrived: Some(frame) };
        interface.poll_ingress_single(now, &mut wire, set);
    }

    /// ARP, ICMP, neighbour discovery, and what nobody wants: smoltcp answers by itself.
    #[cold]
    fn other(&mut self, turn: &mut Turn<'_>, frame: &Frame) {
        let Self { config, interface, budget, nobody, .. } = self;
        Self::show(turn, frame, config, interface, budget, nobody);
    }

    fn datagram(&mut self, turn: &mut Turn<'_>, frame: &Frame, at: usize) {
        let Self { config, interface, budget, datagrams, service, .. } = self;
        let place = &mut datagrams[at];
        Self::show(turn, frame, config, interface, budget, &mut place.set);
        let UdpPlace { set, handle, port } = place;
        let socket = set.get_mut::<udp::Socket<'static>>(*handle);
        if socket.can_recv() {
            service.datagrams(&mut Datagrams { socket, port: *port });
        }
        Self::send(turn, config, interface, budget, set);
    }

    /// Sends what a set has to send, as far as the budget goes. True when there may be more.
    fn send(
        turn: &mut Turn<'_>,
        config: &HostConfig,
        interface: &mut Interface,
        budget: &mut u32,
        set: &mut SocketSet<'static>,
    ) -> bool {
        let now = instant(turn.now());
        let (port, vlan, max_frame) = (config.port, config.vlan, config.mtu + 14);
        while *budget != 0 {
            let mut wire = Wire { turn, port, vlan, max_frame, budget, arrived: None };
            if interface.poll_egress(now, &mut wire, set) == PollResult::None {
                return false;
            }
        }
        true
    }

    #[inline(always)]
    fn segment(&mut self, turn: &mut Turn<'_>, frame: &Frame, flow: Flow, opens: bool) {
        let mut found = self.connections.find(&flow);
        if let Some(place) = found
            && opens
            && self.waits(place)
        {
            // A new connection between the same ends (RFC 6191): the old one has nothing to say any more.
            self.end(turn, place);
            found = None;
        }
        let at = match found {
            Some(place) => place,
            None => {
                // smoltcp resets what is for nobody.
                let Some(listener) = self.listener(&flow).filter(|_| opens) else {
                    return self.other(turn, frame);
                };
                let Some(place) = self.open(turn, flow, listener) else { return };
                place
            }
        };
        let Self { config, interface, budget, connections, .. } = self;
        let Some(place) = connections.get(at) else { return };
        Self::show(turn, frame, config, interface, budget, &mut place.set);
        if place.socket().state() == tcp::State::Listen {
            // It was no SYN after all.
            return self.end(turn, at);
        }
        self.attend(turn, at);
    }

    /// Who listens for connections to this end.
    fn listener(&self, flow: &Flow) -> Option<u8> {
        let listener = self.config.listeners.iter().position(|listener| listener.port == flow.local_port)?;
        let ours = self.config.addresses.iter().any(|address| address.addr() == flow.local);
        ours.then_some(listener as u8)
    }

    /// Is this connection in TIME-WAIT?
    fn waits(&mut self, place: u32) -> bool {
        self.connections.get(place).is_some_and(|place| place.socket().state() == tcp::State::TimeWait)
    }

    /// A place for a new connection, listening; `None` when all are taken.
    fn open(&mut self, turn: &mut Turn<'_>, flow: Flow, at: u8) -> Option<u32> {
        let backlog = self.config.listeners.get(usize::from(at))?.backlog;
        if self.connections.half_open(at) >= backlog {
            self.cut_handshake(turn, at);
        }
        let place = match self.connections.open(flow, at) {
            Some(place) => Some(place),
            None => {
                if let Some(waiting) = self.connections.oldest_waiting() {
                    turn.count(field::TIME_WAIT_CUT, 1);
                    self.end(turn, waiting);
                } else {
                    self.cut_handshake(turn, at);
                }
                self.connections.open(flow, at)
            }
        };
        let Some(place) = place else {
            turn.count(field::SYN_DROPPED, 1);
            return None;
        };
        let socket = self.connections.get(place)?.socket();
        socket.abort();
        let listens = socket.listen((IpAddress::from(flow.local), flow.local_port));
        debug_assert_eq!(listens, Ok(()), "a socket that was aborted can listen");
        Some(place)
    }

    #[cold]
    fn cut_handshake(&mut self, turn: &mut Turn<'_>, listener: u8) {
        if let Some(oldest) = self.connections.oldest_half_open(listener) {
            turn.count(field::HANDSHAKE_CUT, 1);
            self.end(turn, oldest);
        }
    }

    /// After something happened to a connection: tells the service, sends, sets the timer.
    #[inline(always)]
    fn attend(&mut self, turn: &mut Turn<'_>, at: u32) {
        self.tell(turn, at);
        let Self { config, interface, budget, connections, timers, ready, .. } = self;
        let Some(place) = connections.get(at) else { return };
        let more = Self::send(turn, config, interface, budget, &mut place.set);
        if place.socket().state() == tcp::State::Closed {
            return self.end(turn, at);
        }
        if more {
            if !std::mem::replace(&mut place.queued, true) {
                ready.push_back(at);
            }
            return;
        }
        match interface.poll_at(instant(turn.now()), &place.set) {
            // Rounded up: a timer that comes up early has to be set again.
            Some(then) => timers.set(at, (then.total_micros().max(0) as u64).div_ceil(1000)),
            None => timers.cancel(at),
        }
    }

    /// Tells the service what has come of a connection.
    #[inline(always)]
    fn tell(&mut self, turn: &mut Turn<'_>, at: u32) {
        let Self { connections, service, .. } = self;
        let Some(place) = connections.get(at) else { return };
        let (state, stage) = (place.socket().state(), place.stage);
        let Some(flow) = place.flow else { return };
        let id = ConnectionId { place: at, generation: place.generation };
        if stage == Stage::HalfOpen {
            if matches!(state, tcp::State::Listen | tcp::State::SynReceived | tcp::State::Closed) {
                return;
            }
            connections.handshake_over(at, Stage::Open);
            let Some(place) = connections.get(at) else { return };
            let mut wants_room = false;
            let connection =
                &mut Connection { socket: place.socket(), id, flow, wants_room: &mut wants_room };
            place.state = match service.accept(connection) {
                Some(state) => {
                    turn.count(field::ACCEPTED, 1);
                    Some(state)
                }
                None => {
                    turn.count(field::REFUSED, 1);
                    place.stage = Stage::Closing;
                    place.socket().abort();
                    return;
                }
            };
            place.wants_room = wants_room;
        }
        let Some(place) = connections.get(at) else { return };
        if place.stage != Stage::Open {
            return;
        }
        let Some(mut kept) = place.state.take() else { return };
        let (mut wants_room, mut told) = (place.wants_room, place.told_finished);
        let socket = place.socket();
        if socket.can_recv() {
            let connection = &mut Connection { socket, id, flow, wants_room: &mut wants_room };
            service.readable(connection, &mut kept);
        }
        if wants_room && socket.can_send() {
            wants_room = false;
            let connection = &mut Connection { socket, id, flow, wants_room: &mut wants_room };
            service.writable(connection, &mut kept);
        }
        let peer_done = matches!(
            socket.state(),
            tcp::State::CloseWait | tcp::State::LastAck | tcp::State::Closing | tcp::State::TimeWait
        );
        if peer_done && !socket.can_recv() && !told {
            told = true;
            let connection = &mut Connection { socket, id, flow, wants_room: &mut wants_room };
            service.finished(connection, &mut kept);
        }
        let waits = socket.state() == tcp::State::TimeWait;
        (place.wants_room, place.told_finished) = (wants_room, told);
        if waits {
            // Nothing can happen to it that the service would want to know.
            place.stage = Stage::Closing;
            service.closed(id, kept, Ending::Closed);
            turn.count(field::CLOSED, 1);
            connections.waits(at);
        } else {
            place.state = Some(kept);
        }
    }

    /// Gives a connection's place back.
    fn end(&mut self, turn: &mut Turn<'_>, at: u32) {
        self.timers.cancel(at);
        let Some(place) = self.connections.get(at) else { return };
        let id = ConnectionId { place: at, generation: place.generation };
        let how = if place.told_finished { Ending::Closed } else { Ending::Broken };
        if let Some(state) = self.connections.release(at) {
            turn.count(if how == Ending::Closed { field::CLOSED } else { field::BROKEN }, 1);
            self.service.closed(id, state, how);
        }
    }
}

impl UdpPlace {
    fn new(config: &UdpPort) -> Self {
        let buffer = || {
            let metadata = vec![udp::PacketMetadata::EMPTY; config.datagrams as usize];
            udp::PacketBuffer::new(metadata, vec![0; config.bytes as usize])
        };
        let mut socket = udp::Socket::new(buffer(), buffer());
        let bound = socket.bind(config.port);
        debug_assert_eq!(bound, Ok(()), "the port is not 0, and the socket is new");
        let mut set = SocketSet::new(vec![SocketStorage::EMPTY]);
        let handle = set.add(socket);
        Self { set, handle, port: config.port }
    }
}

fn cidr(net: IpNet) -> IpCidr {
    match net {
        IpNet::V4(net) => Ipv4Cidr::new(net.addr(), net.prefix_len()).into(),
        IpNet::V6(net) => Ipv6Cidr::new(net.addr(), net.prefix_len()).into(),
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
        if from != self.config.port {
            return turn.drop_all(batch, DropReason::NoPort);
        }
        let pool = turn.pool();
        let mut rest_of_packet = false;
        for mut frame in batch.drain() {
            // smoltcp reads packets in one piece.
            let in_pieces = std::mem::replace(&mut rest_of_packet, frame.has_more()) || frame.has_more();
            if in_pieces {
                turn.drop(frame, DropReason::Malformed);
                continue;
            }
            if let Some(vlan) = self.config.vlan
                && !untag(pool, &mut frame, vlan)
            {
                turn.drop(frame, DropReason::Vlan);
                continue;
            }
            self.arrived(turn, &frame);
            turn.take_back(frame);
        }
    }

    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.budget = self.config.burst;
        for _ in 0..self.ready.len().min(self.config.burst as usize) {
            let Some(at) = self.ready.pop_front() else { break };
            if let Some(place) = self.connections.get(at) {
                place.queued = false;
                if place.stage != Stage::Free {
                    self.attend(turn, at);
                }
            }
        }
        let now = turn.now() / 1_000_000;
        for _ in 0..self.config.timers_a_turn {
            let Some(at) = self.timers.due(now) else { break };
            self.attend(turn, at);
        }
        turn.gauge(field::CONNECTIONS, self.connections.len() as u64);
    }
}
