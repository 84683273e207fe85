//! What a router's worker asks the program for.
//!
//! Contract: plain old data for a [`mailbox`]. Asking is best effort: a request
//! that finds its mailbox full is made again by the next packet that needs it.

use crate::message::{AppEnd, AppMailbox, Mailbox, MailboxError, mailbox};
use crate::tables::{InterfaceId, NextHopId};
use bytemuck::{Pod, Zeroable};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A request, as it lies in the mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Message {
    kind: u32,
    what: u32,
    address: [u8; 16],
}

/// The program's end of a worker's requests. Nothing is ever sent to the worker: the answers are in the tables.
pub type RequestMailbox = Mailbox<Message, Message>;
/// The worker's end, captured by the closure that builds its router.
pub type WorkerRequests = AppMailbox<Message, Message>;
/// The worker's end, in its router.
pub type RequestEnd = AppEnd<Message, Message>;

/// Makes the mailbox for one worker's requests, for `capacity` of them (a power of two).
///
/// # Errors
/// See [`MailboxError`].
pub fn requests(name: &str, capacity: u32) -> Result<(RequestMailbox, WorkerRequests), MailboxError> {
    mailbox(name, capacity)
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Packets wait for this neighbour, which is [on link](crate::tables::NextHop::OnLink): ask for its
    /// Ethernet address.
    Neighbour {
        /// Where it is.
        interface: InterfaceId,
        /// Its address.
        address: IpAddr,
    },
    /// Packets wait for this next hop, which is [waiting](crate::tables::NextHop::Waiting).
    NextHop {
        /// Which.
        id: NextHopId,
    },
}

const NEIGHBOUR4: u32 = 4;
const NEIGHBOUR6: u32 = 6;
const NEXT_HOP: u32 = 1;

impl From<Request> for Message {
    fn from(request: Request) -> Self {
        match request {
            Request::Neighbour { interface, address: IpAddr::V4(address) } => {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&address.octets());
                Self { kind: NEIGHBOUR4, what: u32::from(interface.get()), address: bytes }
            }
            Request::Neighbour { interface, address: IpAddr::V6(address) } => {
                Self { kind: NEIGHBOUR6, what: u32::from(interface.get()), address: address.octets() }
            }
            Request::NextHop { id } => Self { kind: NEXT_HOP, what: id.get(), address: [0; 16] },
        }
    }
}

impl Message {
    /// The request; `None` for what no worker in its senses writes.
    #[must_use]
    pub fn parse(self) -> Option<Request> {
        let interface = || u16::try_from(self.what).ok().and_then(InterfaceId::new);
        let [a, b, c, d, ..] = self.address;
        match self.kind {
            NEIGHBOUR4 => Some(Request::Neighbour {
                interface: interface()?,
                address: Ipv4Addr::new(a, b, c, d).into(),
            }),
            NEIGHBOUR6 => Some(Request::Neighbour {
                interface: interface()?,
                address: Ipv6Addr::from_octets(self.address).into(),
            }),
            NEXT_HOP if self.what < 1 << NextHopId::BITS => {
                Some(Request::NextHop { id: NextHopId::from_low_bits(self.what) })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_mailbox() {
        let interface = InterfaceId::new(9).unwrap();
        for request in [
            Request::Neighbour { interface, address: IpAddr::from([192, 0, 2, 9]) },
            Request::Neighbour { interface, address: IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9]) },
            Request::NextHop { id: NextHopId::from_low_bits(77) },
        ] {
            assert_eq!(Message::from(request).parse(), Some(request));
        }
        for (kind, what) in [(0, 0), (4, 1 << 12), (6, u32::MAX), (1, 1 << 24), (7, 0)] {
            assert_eq!(Message { kind, what, address: [255; 16] }.parse(), None);
        }
    }
}
