//! Netlink sockets: one that is told of changes, one that asks.
//!
//! Contract: reading events never waits; a dump is waited for. Both belong to the network namespace of
//! the thread that opened them.

use super::SyncError;
use super::decode::{Event, message};
use netlink_packet_core::{
    NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

/// More than the kernel puts into one datagram.
const DATAGRAM: usize = 1 << 18;

const NLM_F_DUMP_INTR: u16 = 0x10;

/// Multicast groups: links, neighbours, addresses, routes, parameters, next-hop objects.
const GROUPS: [(u32, bool); 9] = [
    (libc::RTNLGRP_LINK, true),
    (libc::RTNLGRP_NEIGH, true),
    (libc::RTNLGRP_IPV4_IFADDR, true),
    (libc::RTNLGRP_IPV6_IFADDR, true),
    (libc::RTNLGRP_IPV4_ROUTE, true),
    (libc::RTNLGRP_IPV6_ROUTE, true),
    (libc::RTNLGRP_IPV4_NETCONF, true),
    (libc::RTNLGRP_IPV6_NETCONF, true),
    // Since Linux 5.3.
    (libc::RTNLGRP_NEXTHOP, false),
];

/// What can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dump {
    Links,
    Addresses,
    Objects,
    Routes4,
    Routes6,
    Neighbours4,
    Neighbours6,
}

impl Dump {
    /// In this order each finds what it refers to.
    pub(super) const ALL: [Self; 7] = [
        Self::Links,
        Self::Addresses,
        Self::Objects,
        Self::Routes4,
        Self::Routes6,
        Self::Neighbours4,
        Self::Neighbours6,
    ];

    /// Type of the request, family, and length of its header.
    const fn request(self) -> (u16, i32, usize) {
        match self {
            Self::Links => (libc::RTM_GETLINK, libc::AF_UNSPEC, 16),
            Self::Addresses => (libc::RTM_GETADDR, libc::AF_UNSPEC, 8),
            Self::Objects => (106, libc::AF_UNSPEC, 8),
            Self::Routes4 => (libc::RTM_GETROUTE, libc::AF_INET, 12),
            Self::Routes6 => (libc::RTM_GETROUTE, libc::AF_INET6, 12),
            Self::Neighbours4 => (libc::RTM_GETNEIGH, libc::AF_INET, 12),
            Self::Neighbours6 => (libc::RTM_GETNEIGH, libc::AF_INET6, 12),
        }
    }

    /// May a kernel not have this at all?
    const fn optional(self) -> bool {
        matches!(self, Self::Objects | Self::Routes6 | Self::Neighbours6)
    }
}

/// A neighbour to be resolved by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ask {
    pub(super) link: u32,
    pub(super) address: IpAddr,
    /// To be kept alive by the kernel from now on, or no longer (since Linux 5.16; before, ignored).
    pub(super) managed: bool,
    /// The entry has this flag, which would else be taken from it.
    pub(super) learned: bool,
    /// Also when the kernel does not know it.
    pub(super) create: bool,
}

/// How a datagram was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// It was appended.
    Some,
    /// There is none now.
    None,
    /// The kernel has thrown events away.
    Overrun,
}

fn failed(call: &'static str) -> impl Fn(std::io::Error) -> SyncError {
    move |error| {
        let source = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        match source {
            Errno::EPERM | Errno::EACCES => SyncError::NotPermitted { what: call },
            source => SyncError::Os { call, source },
        }
    }
}

fn open() -> Result<Socket, SyncError> {
    let socket = Socket::new(NETLINK_ROUTE).map_err(failed("open a netlink socket"))?;
    // Filters that a kernel does not know it then refuses rather than ignores; before Linux 4.20 it
    // knows no such option, and we filter ourselves anyway.
    let _ = socket.set_netlink_get_strict_chk(true);
    Ok(socket)
}

/// The socket that is told of changes.
#[derive(Debug)]
pub(super) struct Events {
    socket: Socket,
}

impl Events {
    /// With room for `buffer` bytes of events that were not read yet.
    pub(super) fn open(buffer: usize) -> Result<Self, SyncError> {
        let mut socket = open()?;
        let forced = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &buffer);
        if forced.is_err() {
            socket.set_rx_buf_sz(buffer as libc::c_int).map_err(failed("set a receive buffer"))?;
            tracing::warn!(
                "the netlink receive buffer may be less than {buffer} bytes without CAP_NET_ADMIN: \
                 bursts of changes will be read again as a whole"
            );
        }
        socket.bind_auto().map_err(failed("bind a netlink socket"))?;
        for (group, needed) in GROUPS {
            let joined = socket.add_membership(group);
            if needed {
                joined.map_err(failed("join a netlink group"))?;
            }
        }
        socket.set_non_blocking(true).map_err(failed("make a netlink socket non-blocking"))?;
        Ok(Self { socket })
    }

    /// Reads a datagram, if there is one, to the end of `into`.
    pub(super) fn read(&self, into: &mut Vec<u8>) -> Result<Read, SyncError> {
        into.reserve(DATAGRAM);
        loop {
            let before = into.len();
            return match self.socket.recv(into, libc::MSG_TRUNC) {
                // A part is as bad as nothing.
                Ok(length) if length > into.len() - before => {
                    into.truncate(before);
                    Ok(Read::Overrun)
                }
                Ok(_) => {
                    // Messages begin at multiples of four, also behind this one.
                    into.resize(into.len().next_multiple_of(4), 0);
                    Ok(Read::Some)
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(Read::None),
                    Some(libc::ENOBUFS) => Ok(Read::Overrun),
                    Some(libc::EINTR) => continue,
                    _ => Err(failed("read netlink events")(error)),
                },
            };
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The messages of a datagram: type, flags, body.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = NetlinkBuffer::new_checked(datagram).ok()?;
        let length = header.length() as usize;
        let body = datagram.get(16..length)?;
        let found = (header.message_type(), header.flags(), body);
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(found)
    })
}

/// The socket that asks.
#[derive(Debug)]
pub(super) struct Query {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// How a dump ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dumped {
    Whole,
    /// Something changed meanwhile; what was listed may be neither old nor new.
    Torn,
}

impl Query {
    pub(super) fn open() -> Result<Self, SyncError> {
        let socket = open()?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect a netlink socket"))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Lists what there is. `see` gets each thing, `between` is called after each datagram.
    pub(super) fn dump(
        &mut self,
        what: Dump,
        mut see: impl FnMut(Event),
        mut between: impl FnMut() -> Result<(), SyncError>,
    ) -> Result<Dumped, SyncError> {
        const CALL: &str = "list the kernel's tables";
        let (kind, family, length) = what.request();
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = vec![0u8; 16 + length];
        let total = request.len() as u32;
        request[..4].copy_from_slice(&total.to_ne_bytes());
        request[4..6].copy_from_slice(&kind.to_ne_bytes());
        request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        request[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        request[16] = family as u8;
        self.socket.send(&request, 0).map_err(failed(CALL))?;
        let mut end = Dumped::Whole;
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error) => return Err(failed(CALL)(error)),
            }
            for (kind, flags, body) in messages(&self.buffer) {
                if flags & NLM_F_DUMP_INTR != 0 {
                    end = Dumped::Torn;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(end),
                    libc::NLMSG_ERROR => {
                        let code = body.first_chunk().map_or(-libc::EIO, |code| i32::from_ne_bytes(*code));
                        return match Errno::from_raw(-code) {
                            Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT if what.optional() => Ok(end),
                            // The kernel could not go on where it was.
                            Errno::EINTR | Errno::EAGAIN => Ok(Dumped::Torn),
                            source => Err(SyncError::Os { call: CALL, source }),
                        };
                    }
                    _ => {
                        if let Some(event) = message::read(kind, flags, true, body) {
                            see(event);
                        }
                    }
                }
            }
            between()?;
        }
    }
}

/// The socket that asks for neighbours; answers are only errors.
#[derive(Debug)]
pub(super) struct Resolver {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Resolver {
    pub(super) fn open() -> Result<Self, SyncError> {
        let socket = open()?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed("connect a netlink socket"))?;
        socket.set_non_blocking(true).map_err(failed("make a netlink socket non-blocking"))?;
        Ok(Self { socket, buffer: Vec::with_capacity(DATAGRAM) })
    }

    /// Makes the kernel ask for a neighbour; false when it would not.
    pub(super) fn ask(&mut self, ask: &Ask) -> bool {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = ask.link;
        message.header.flags = NeighbourFlags::Use;
        if ask.learned {
            message.header.flags |= NeighbourFlags::ExtLearned;
        }
        let to = match ask.address {
            IpAddr::V4(address) => {
                message.header.family = AddressFamily::Inet;
                NeighbourAddress::Inet(address)
            }
            IpAddr::V6(address) => {
                message.header.family = AddressFamily::Inet6;
                NeighbourAddress::Inet6(address)
            }
        };
        message.attributes.push(NeighbourAttribute::Destination(to));
        if ask.managed {
            message.attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        }
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | if ask.create { NLM_F_CREATE } else { 0 };
        let inner = RouteNetlinkMessage::NewNeighbour(message);
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(inner));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        if self.socket.send(&bytes, 0).is_err() {
            return false;
        }
        // The kernel has answered, if it had to, before the send returned.
        self.buffer.clear();
        self.socket.recv(&mut self.buffer, 0).is_err()
    }
}
