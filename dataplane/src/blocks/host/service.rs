//! What a program does with a host's connections: the [`Service`] trait and what its calls are handed.
//!
//! Contract: calls are made within a worker's turn, so they must not wait, allocate, or enter the kernel.
//! Bytes are read where they were received and written where they are sent from. Nothing is lost when a call
//! does less than it could: `readable` comes again with the next packet, `writable` when there is room.

use super::connections::Place;
use super::flows::Flow;
use super::sockets::Sockets;
use smoltcp::socket::{tcp, udp};
use std::net::{IpAddr, SocketAddr};

/// A connection, for as long as it lasts; never used again after that within 2^32 connections of its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    pub(super) place: u32,
    pub(super) generation: u32,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Both sides had closed it.
    Closed,
    /// The peer reset it, it was aborted, or nothing came for longer than its timeout.
    Broken,
}

/// What serves connections and datagrams.
pub trait Service {
    /// What the service keeps for each connection.
    type State;

    /// A connection was made, by a peer or by [`Sockets::connect`]. `None` refuses it: it is reset.
    fn accept(&mut self, connection: &mut Connection<'_>) -> Option<Self::State>;

    /// Bytes have come. What is not [read](Connection::read) stays.
    fn readable(&mut self, connection: &mut Connection<'_>, state: &mut Self::State);

    /// There is room to write again, after a write that found too little.
    fn writable(&mut self, connection: &mut Connection<'_>, state: &mut Self::State) {
        let _ = (connection, state);
    }

    /// The peer will send no more, and everything that it sent was read. Closes our side, if not overridden.
    fn finished(&mut self, connection: &mut Connection<'_>, state: &mut Self::State) {
        let _ = state;
        connection.close();
    }

    /// The connection is over.
    fn closed(&mut self, sockets: &mut Sockets, id: ConnectionId, state: Self::State, how: Ending) {
        let _ = (sockets, id, state, how);
    }

    /// A connection that [`Sockets::connect`] began was refused, or nobody answered.
    fn failed(&mut self, sockets: &mut Sockets, id: ConnectionId) {
        let _ = (sockets, id);
    }

    /// Datagrams have come to a UDP port.
    fn datagrams(&mut self, sockets: &mut Sockets, port: u16) {
        let _ = (sockets, port);
    }

    /// Once a turn, after packets and timers: for what comes from elsewhere.
    fn turn(&mut self, sockets: &mut Sockets) {
        let _ = sockets;
    }
}

/// A TCP connection.
pub struct Connection<'a> {
    pub(super) sockets: &'a mut Sockets,
    pub(super) id: ConnectionId,
}

impl std::fmt::Debug for Connection<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Connection<'_> {
    /// Which it is.
    #[must_use]
    pub const fn id(&self) -> ConnectionId {
        self.id
    }

    /// The host's other sockets.
    pub const fn sockets(&mut self) -> &mut Sockets {
        self.sockets
    }

    #[inline(always)]
    fn place(&mut self) -> &mut Place {
        self.sockets.connections.known(self.id.place)
    }

    #[inline(always)]
    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.place().socket()
    }

    /// Both ends.
    #[must_use]
    pub fn flow(&mut self) -> Flow {
        self.place().flow.unwrap_or(Flow::NOWHERE)
    }

    /// Our end.
    #[must_use]
    pub fn local(&mut self) -> SocketAddr {
        let flow = self.flow();
        SocketAddr::new(flow.local, flow.local_port)
    }

    /// The peer's end.
    #[must_use]
    pub fn remote(&mut self) -> SocketAddr {
        let flow = self.flow();
        SocketAddr::new(flow.remote, flow.remote_port)
    }

    /// Shows bytes that have come, as many as lie side by side; `read` says how many of them it is done with.
    /// `None` when there are none. Where the buffer wraps, a second call shows the rest.
    pub fn read<R>(&mut self, read: impl FnOnce(&[u8]) -> (usize, R)) -> Option<R> {
        let socket = self.socket();
        if !socket.can_recv() {
            return None;
        }
        let within = |bytes: &mut [u8]| {
            let (done, result) = read(bytes);
            (done.min(bytes.len()), result)
        };
        socket.recv(within).ok()
    }

    /// Copies bytes that have come; says how many, 0 when there are none.
    pub fn receive(&mut self, into: &mut [u8]) -> usize {
        let socket = self.socket();
        if socket.can_recv() { socket.recv_slice(into).unwrap_or(0) } else { 0 }
    }

    /// Copies bytes that have come and leaves them there; says how many.
    pub fn peek(&mut self, into: &mut [u8]) -> usize {
        self.socket().peek_slice(into).unwrap_or(0)
    }

    /// Reads and forgets so many bytes that have come, or all there are.
    pub fn skip(&mut self, mut bytes: usize) {
        // Twice, where the buffer wraps.
        while bytes != 0 {
            let skipped = self.read(|there| {
                let skipped = there.len().min(bytes);
                (skipped, skipped)
            });
            match skipped {
                None | Some(0) => break,
                Some(skipped) => bytes -= skipped,
            }
        }
    }

    /// Asks for [`Service::writable`] when there is more room, as a write that found too little does.
    pub fn wants_room(&mut self) {
        self.place().wants_room = true;
    }

    /// Bytes that have come and were not read.
    #[must_use]
    pub fn unread(&mut self) -> usize {
        self.socket().recv_queue()
    }

    /// Will the peer send no more, and was all of it read?
    #[must_use]
    pub fn is_finished(&mut self) -> bool {
        !self.socket().may_recv()
    }

    /// Shows room for bytes to be sent, as much as lies side by side; `write` says how much of it it has filled.
    /// `None` when there is no room, or our side is closed; then [`Service::writable`] comes when there is.
    pub fn write<R>(&mut self, write: impl FnOnce(&mut [u8]) -> (usize, R)) -> Option<R> {
        if !self.socket().can_send() {
            self.place().wants_room = true;
            return None;
        }
        let within = |room: &mut [u8]| {
            let (done, result) = write(room);
            (done.min(room.len()), result)
        };
        self.socket().send(within).ok()
    }

    /// Copies bytes to be sent, as many as there is room for; says how many. When that is fewer than given,
    /// [`Service::writable`] comes when there is room.
    pub fn send(&mut self, mut bytes: &[u8]) -> usize {
        let given = bytes.len();
        let socket = self.socket();
        // Twice, where the buffer wraps.
        for _ in 0..2 {
            if bytes.is_empty() || !socket.can_send() {
                break;
            }
            let sent = socket.send_slice(bytes).unwrap_or(0);
            bytes = &bytes[sent..];
        }
        self.place().wants_room |= !bytes.is_empty();
        given - bytes.len()
    }

    /// Copies bytes that have come to what is to be sent, as many as there are and there is room for; says how
    /// many. When some had to stay, [`Service::writable`] comes when there is room.
    pub fn echo(&mut self) -> usize {
        let mut total = 0;
        // The two buffers are behind one interface: through the stack, a piece at a time.
        let mut piece = [0; 2048];
        loop {
            let wanted = self.room().min(piece.len());
            let taken = self.receive(&mut piece[..wanted]);
            if taken == 0 {
                break;
            }
            total += self.send(&piece[..taken]);
        }
        let unread = self.unread() != 0;
        self.place().wants_room |= unread;
        total
    }

    /// Room for bytes to be sent; 0 when our side is closed.
    #[must_use]
    pub fn room(&mut self) -> usize {
        let socket = self.socket();
        if socket.may_send() { socket.send_capacity() - socket.send_queue() } else { 0 }
    }

    /// Can anything still be sent?
    #[must_use]
    pub fn may_send(&mut self) -> bool {
        self.socket().may_send()
    }

    /// Has everything that was sent been acknowledged?
    #[must_use]
    pub fn is_flushed(&mut self) -> bool {
        self.socket().send_queue() == 0
    }

    /// Sends nothing more: what was written is sent, then the end of our side.
    pub fn close(&mut self) {
        self.socket().close();
    }

    /// Ends the connection at once, with a reset.
    pub fn abort(&mut self) {
        self.socket().abort();
    }
}

/// A UDP port.
pub struct Datagrams<'a> {
    pub(super) socket: &'a mut udp::Socket<'static>,
    pub(super) port: u16,
}

impl std::fmt::Debug for Datagrams<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Datagrams").field("port", &self.port).finish_non_exhaustive()
    }
}

/// Where a datagram came from, and which of our addresses it was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The peer.
    pub remote: SocketAddr,
    /// Our address, if it is known: answers come from there.
    pub local: Option<IpAddr>,
}

impl Datagrams<'_> {
    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Shows the datagram that came first, and takes it away; `None` when there is none.
    pub fn receive<R>(&mut self, read: impl FnOnce(&[u8], Ends) -> R) -> Option<R> {
        let (bytes, meta) = self.socket.recv().ok()?;
        let remote = SocketAddr::new(meta.endpoint.addr.into(), meta.endpoint.port);
        Some(read(bytes, Ends { remote, local: meta.local_address.map(Into::into) }))
    }

    /// Copies a datagram to be sent. False when there is no room for it, and it is lost.
    #[must_use]
    pub fn send(&mut self, bytes: &[u8], ends: Ends) -> bool {
        let mut meta: udp::UdpMetadata =
            (smoltcp::wire::IpAddress::from(ends.remote.ip()), ends.remote.port()).into();
        meta.local_address = ends.local.map(Into::into);
        self.socket.send_slice(bytes, meta).is_ok()
    }
}
