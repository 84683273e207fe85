//! What a program does with a host's connections: the [`Service`] trait and what its calls are handed.
//!
//! Contract: calls are made within a worker's turn, so they must not wait, allocate, or enter the kernel.
//! Bytes are read where they were received and written where they are sent from. Nothing is lost when a call
//! does less than it could: `readable` comes again with the next packet, `writable` when there is room.

use super::flows::Flow;
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

    /// A connection was made. `None` refuses it: it is reset.
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
    fn closed(&mut self, id: ConnectionId, state: Self::State, how: Ending) {
        let _ = (id, state, how);
    }

    /// Datagrams have come to a UDP port.
    fn datagrams(&mut self, socket: &mut Datagrams<'_>) {
        let _ = socket;
    }
}

/// A TCP connection.
pub struct Connection<'a> {
    pub(super) socket: &'a mut tcp::Socket<'static>,
    pub(super) id: ConnectionId,
    pub(super) flow: Flow,
    pub(super) wants_room: &'a mut bool,
}

impl std::fmt::Debug for Connection<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("id", &self.id).field("flow", &self.flow).finish_non_exhaustive()
    }
}

impl Connection<'_> {
    /// Which it is.
    #[must_use]
    pub const fn id(&self) -> ConnectionId {
        self.id
    }

    /// Our end.
    #[must_use]
    pub const fn local(&self) -> SocketAddr {
        SocketAddr::new(self.flow.local, self.flow.local_port)
    }

    /// The peer's end.
    #[must_use]
    pub const fn remote(&self) -> SocketAddr {
        SocketAddr::new(self.flow.remote, self.flow.remote_port)
    }

    /// Shows bytes that have come, as many as lie side by side; `read` says how many of them it is done with.
    /// `None` when there are none. Where the buffer wraps, a second call shows the rest.
    pub fn read<R>(&mut self, read: impl FnOnce(&[u8]) -> (usize, R)) -> Option<R> {
        if !self.socket.can_recv() {
            return None;
        }
        let within = |bytes: &mut [u8]| {
            let (done, result) = read(bytes);
            (done.min(bytes.len()), result)
        };
        self.socket.recv(within).ok()
    }

    /// Bytes that have come and were not read.
    #[must_use]
    pub fn unread(&self) -> usize {
        self.socket.recv_queue()
    }

    /// Shows room for bytes to be sent, as much as lies side by side; `write` says how much of it it has filled.
    /// `None` when there is no room, or our side is closed; then [`Service::writable`] comes when there is.
    pub fn write<R>(&mut self, write: impl FnOnce(&mut [u8]) -> (usize, R)) -> Option<R> {
        if !self.socket.can_send() {
            *self.wants_room = true;
            return None;
        }
        let within = |room: &mut [u8]| {
            let (done, result) = write(room);
            (done.min(room.len()), result)
        };
        self.socket.send(within).ok()
    }

    /// Copies bytes to be sent, as many as there is room for; says how many. When that is fewer than given,
    /// [`Service::writable`] comes when there is room.
    pub fn send(&mut self, mut bytes: &[u8]) -> usize {
        let given = bytes.len();
        // Twice, where the buffer wraps.
        for _ in 0..2 {
            if bytes.is_empty() || !self.socket.can_send() {
                break;
            }
            let sent = self.socket.send_slice(bytes).unwrap_or(0);
            bytes = &bytes[sent..];
        }
        *self.wants_room |= !bytes.is_empty();
        given - bytes.len()
    }

    /// Copies bytes that have come to what is to be sent, as many as there are and there is room for; says how
    /// many. When some had to stay, [`Service::writable`] comes when there is room.
    pub fn echo(&mut self) -> usize {
        let mut total = 0;
        while self.socket.can_recv() && self.socket.can_send() {
            // The two buffers are behind one interface: through the stack, a piece at a time.
            let mut piece = [0; 2048];
            let wanted = self.room().min(piece.len());
            let Ok(taken) = self.socket.recv_slice(&mut piece[..wanted]) else { break };
            total += self.send(&piece[..taken]);
        }
        *self.wants_room |= self.socket.can_recv();
        total
    }

    /// Room for bytes to be sent.
    #[must_use]
    pub fn room(&self) -> usize {
        self.socket.send_capacity() - self.socket.send_queue()
    }

    /// Sends nothing more: what was written is sent, then the end of our side.
    pub fn close(&mut self) {
        self.socket.close();
    }

    /// Ends the connection at once, with a reset.
    pub fn abort(&mut self) {
        self.socket.abort();
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
