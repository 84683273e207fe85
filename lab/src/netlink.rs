//! Requests to rtnetlink and their answers, one at a time.

use crate::{LabError, Namespace};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

/// A netlink socket of one namespace. The kernel answers each request before `send` returns, so
/// receiving never waits.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// Opens a socket in `namespace`; the calling thread is back where it was afterwards.
    pub(crate) fn open(namespace: &Namespace) -> Result<Self, LabError> {
        let inside = namespace.enter()?;
        let socket = Socket::new(NETLINK_ROUTE).and_then(|socket| {
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.set_netlink_get_strict_chk(true)?;
            Ok(socket)
        });
        inside.leave()?;
        Ok(Self { socket: socket.map_err(|e| LabError::socket("opening a netlink socket", e))? })
    }

    /// Asks for a change and waits for the kernel's word on it.
    pub(crate) fn change(
        &self,
        what: &'static str,
        link: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), LabError> {
        self.exchange(what, link, message, NLM_F_ACK | flags).map(drop)
    }

    /// Asks a question; the answer is one message, or many when `flags` say `NLM_F_DUMP`.
    pub(crate) fn ask(
        &self,
        what: &'static str,
        link: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, LabError> {
        // With an acknowledgement the end of a single answer is as plain as the end of a dump.
        self.exchange(what, link, message, NLM_F_ACK | flags)
    }

    fn exchange(
        &self,
        what: &'static str,
        link: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, LabError> {
        let failed = |source: io::Error| match source.raw_os_error() {
            Some(libc::ENODEV) => LabError::NoSuchLink { name: link.to_owned() },
            Some(libc::EPERM | libc::EACCES) => LabError::NotPermitted { what },
            _ => LabError::Netlink { what, link: link.to_owned(), source },
        };
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map_err(failed)?;

        let mut answers = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full().map_err(failed)?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let garbled = |reason: String| LabError::Answer { what, link: link.to_owned(), reason };
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| garbled(e.to_string()))?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(answers),
                        Some(_) => return Err(failed(error.to_io())),
                    },
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Noop => {}
                    other => return Err(garbled(format!("{other:?}"))),
                }
                rest = rest.get(length.max(16)..).unwrap_or_default();
            }
        }
    }
}
