//! All sockets of a host, and the interface that they send through: what a service reaches beside the
//! connection that a call is about.
//!
//! Contract: a connection that is changed here is looked at again in the same turn or the next one: what was
//! written to it is sent, whichever connection the call was about.

use super::config::HostConfig;
use super::connections::{Connections, Stage};
use super::device::{Description, Wire};
use super::flows::Flow;
use super::service::{Connection, ConnectionId, Datagrams};
use super::timers::Timers;
use super::{HostError, UdpPort};
use crate::app::Turn;
use ipnet::IpNet;
use isoplane_memory::Frame;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::udp;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpListenEndpoint, Ipv4Cidr, Ipv6Cidr,
};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

/// The first of the ports that connections of ours start from (RFC 6335 section 6: dynamic ports).
const DYNAMIC: u16 = 49_152;
/// Ports that are tried for a connection.
const TRIES: u32 = 64;

/// Why a connection could not be begun.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectError {
    /// All places are taken.
    #[error("all connections of the host are in use; make it with more connections")]
    Full,
    /// The host has no address of that IP version.
    #[error("the host has no address to reach {remote} from")]
    NoAddress {
        /// Where to.
        remote: SocketAddr,
    },
    /// Not an address and port that can be connected to.
    #[error("{remote} is nothing to connect to")]
    Remote {
        /// Where to.
        remote: SocketAddr,
    },
    /// All ports that were tried are in use with that peer.
    #[error("no free port for a connection to {remote}")]
    Ports {
        /// Where to.
        remote: SocketAddr,
    },
}

/// A UDP port.
#[derive(Debug)]
pub(super) struct UdpPlace {
    pub(super) set: SocketSet<'static>,
    handle: SocketHandle,
    pub(super) port: u16,
    /// It is to be looked at: something was written.
    touched: bool,
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
        Self { set, handle, port: config.port, touched: false }
    }

    pub(super) fn socket(&mut self) -> &mut udp::Socket<'static> {
        self.set.get_mut(self.handle)
    }
}

/// All sockets of a host.
pub struct Sockets {
    pub(super) config: HostConfig,
    pub(super) interface: Interface,
    pub(super) connections: Connections,
    pub(super) datagrams: Vec<UdpPlace>,
    pub(super) timers: Timers,
    /// Connections to look at: they were changed, or found the turn's budget used up.
    pub(super) ready: VecDeque<u32>,
    /// For what is for no socket.
    nobody: SocketSet<'static>,
    /// Packets that this turn may still send.
    pub(super) budget: u32,
    /// Nanoseconds of this turn.
    pub(super) now: u64,
    next_port: u16,
}

impl std::fmt::Debug for Sockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sockets").field("connections", &self.connections.len()).finish_non_exhaustive()
    }
}

/// smoltcp's time of a turn's.
fn instant(nanos: u64) -> Instant {
    Instant::from_micros((nanos / 1000) as i64)
}

fn cidr(net: IpNet) -> IpCidr {
    match net {
        IpNet::V4(net) => Ipv4Cidr::new(net.addr(), net.prefix_len()).into(),
        IpNet::V6(net) => Ipv6Cidr::new(net.addr(), net.prefix_len()).into(),
    }
}

impl Sockets {
    pub(super) fn new(config: &HostConfig, seed: u64) -> Result<Self, HostError> {
        config.check()?;
        let mut interface_config = Config::new(HardwareAddress::Ethernet(EthernetAddress(config.mac.0)));
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
        Ok(Self {
            interface,
            connections: Connections::new(config, seed.rotate_left(32)),
            datagrams: config.datagrams.iter().map(UdpPlace::new).collect(),
            timers: Timers::new(config.connections as usize, 0),
            ready: VecDeque::with_capacity(config.connections as usize),
            nobody: SocketSet::new(Vec::new()),
            budget: config.burst,
            now: 0,
            next_port: DYNAMIC | (seed as u16 & (u16::MAX - DYNAMIC)),
            config: config.clone(),
        })
    }

    /// A connection, unless it has ended.
    #[must_use]
    pub fn get(&mut self, id: ConnectionId) -> Option<Connection<'_>> {
        self.connections.by_id(id)?;
        self.touch(id.place);
        Some(Connection { sockets: self, id })
    }

    /// A UDP port of the configuration.
    #[must_use]
    pub fn udp(&mut self, port: u16) -> Option<Datagrams<'_>> {
        let place = self.datagrams.iter_mut().find(|place| place.port == port)?;
        place.touched = true;
        Some(Datagrams { socket: place.socket(), port })
    }

    /// Connections in use, those that are beginning or ending included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The time of this turn, in nanoseconds since the worker's clock was made.
    #[must_use]
    pub const fn now(&self) -> u64 {
        self.now
    }

    /// Begins a connection. [`Service::accept`](super::Service::accept) is called when it is made,
    /// [`Service::failed`](super::Service::failed) when it cannot be.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub fn connect(&mut self, remote: SocketAddr) -> Result<ConnectionId, ConnectError> {
        let ip = remote.ip();
        if remote.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
            return Err(ConnectError::Remote { remote });
        }
        let local = self.interface.get_source_address(&IpAddress::from(ip)).map(IpAddr::from);
        let local =
            local.filter(|local| !local.is_unspecified()).ok_or(ConnectError::NoAddress { remote })?;
        let mut free = None;
        for _ in 0..TRIES {
            self.next_port = self.next_port.wrapping_add(1) | DYNAMIC;
            let flow = Flow { local, remote: ip, local_port: self.next_port, remote_port: remote.port() };
            let listened = self.config.listeners.iter().any(|listener| listener.port == flow.local_port);
            if !listened && self.connections.find(&flow).is_none() {
                free = Some(flow);
                break;
            }
        }
        let flow = free.ok_or(ConnectError::Ports { remote })?;
        let at = match self.connections.take(flow, Stage::Connecting) {
            Some(at) => at,
            None => {
                let waiting = self.connections.oldest_waiting().ok_or(ConnectError::Full)?;
                self.timers.cancel(waiting);
                self.connections.release(waiting);
                self.connections.take(flow, Stage::Connecting).ok_or(ConnectError::Full)?
            }
        };
        let Self { connections, interface, .. } = self;
        let Some(place) = connections.get(at) else { return Err(ConnectError::Full) };
        let to = IpEndpoint::new(ip.into(), remote.port());
        let from = IpListenEndpoint { addr: Some(local.into()), port: flow.local_port };
        let begun = place.socket().connect(interface.context(), to, from);
        debug_assert_eq!(begun, Ok(()), "a socket that was aborted, and ends that were checked");
        let id = ConnectionId { place: at, generation: place.generation };
        self.touch(at);
        Ok(id)
    }

    /// Puts a connection in the list of those to look at.
    pub(super) fn touch(&mut self, at: u32) {
        let Some(place) = self.connections.get(at) else { return };
        if !std::mem::replace(&mut place.queued, true) {
            self.ready.push_back(at);
        }
    }

    /// Shows a packet to the socket of a place.
    #[inline(always)]
    pub(super) fn show(&mut self, turn: &mut Turn<'_>, frame: &Frame, at: u32) {
        let Self { config, interface, budget, connections, now, .. } = self;
        let Some(place) = connections.get(at) else { return };
        let mut wire = Wire::new(turn, config, budget, Some(frame));
        interface.poll_ingress_single(instant(*now), &mut wire, &mut place.set);
    }

    /// Shows a packet to the socket of a UDP port.
    pub(super) fn show_datagram(&mut self, turn: &mut Turn<'_>, frame: &Frame, at: usize) {
        let Self { config, interface, budget, datagrams, now, .. } = self;
        let Some(place) = datagrams.get_mut(at) else { return };
        let mut wire = Wire::new(turn, config, budget, Some(frame));
        interface.poll_ingress_single(instant(*now), &mut wire, &mut place.set);
    }

    /// Shows a packet to no socket: smoltcp answers by itself what is to be answered.
    #[cold]
    pub(super) fn show_nobody(&mut self, turn: &mut Turn<'_>, frame: &Frame) {
        let Self { config, interface, budget, nobody, now, .. } = self;
        let mut wire = Wire::new(turn, config, budget, Some(frame));
        interface.poll_ingress_single(instant(*now), &mut wire, nobody);
    }

    /// Sends what a connection has to send, as far as the budget goes. True when there may be more.
    #[inline(always)]
    pub(super) fn send(&mut self, turn: &mut Turn<'_>, at: u32) -> bool {
        let Self { config, interface, budget, connections, now, .. } = self;
        let Some(place) = connections.get(at) else { return false };
        send(turn, config, interface, budget, *now, &mut place.set)
    }

    /// Sends the datagrams that were written.
    pub(super) fn send_datagrams(&mut self, turn: &mut Turn<'_>) {
        let Self { config, interface, budget, datagrams, now, .. } = self;
        for place in datagrams {
            if std::mem::take(&mut place.touched) {
                place.touched = send(turn, config, interface, budget, *now, &mut place.set);
            }
        }
    }

    /// When the socket of a place wants to be looked at again, in milliseconds, rounded up.
    pub(super) fn wakes(&mut self, at: u32) -> Option<u64> {
        let Self { interface, connections, now, .. } = self;
        let then = interface.poll_at(instant(*now), &connections.get(at)?.set)?;
        Some((then.total_micros().max(0) as u64).div_ceil(1000))
    }
}

/// Sends what a set of one socket has to send, as far as the budget goes. True when there may be more.
#[inline(always)]
fn send(
    turn: &mut Turn<'_>,
    config: &HostConfig,
    interface: &mut Interface,
    budget: &mut u32,
    now: u64,
    set: &mut SocketSet<'static>,
) -> bool {
    while *budget != 0 {
        let mut wire = Wire::new(turn, config, budget, None);
        if interface.poll_egress(instant(now), &mut wire, set) == PollResult::None {
            return false;
        }
    }
    true
}
