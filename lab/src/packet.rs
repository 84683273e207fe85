//! Raw Ethernet frames in and out of an interface.

use crate::{LabError, Link, sys};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest frame that is received whole, in bytes.
const LONGEST: usize = 65_536 + 64;

/// A packet socket (`AF_PACKET`) bound to one interface. It sees what arrives there for any address,
/// and not what is sent from there.
///
/// Frames are the bytes on the wire without the FCS: the kernel takes the outer VLAN tag out of a frame
/// that it receives, and this puts it back.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl PacketSocket {
    /// Opens one on `link`, which becomes promiscuous while this lives and may still be switched off.
    ///
    /// # Errors
    /// [`LabError::NotPermitted`] without `CAP_NET_RAW`; otherwise what the kernel said.
    pub fn open(link: &Link<'_>) -> Result<Self, LabError> {
        let inside = link.namespace().enter()?;
        let socket = sys::packet_socket(link.index());
        inside.leave()?;
        let failed = |e| LabError::socket("opening a packet socket", e);
        let socket = socket.map_err(failed)?;
        sys::packet_promiscuous(&socket, link.index()).map_err(failed)?;
        // So that a burst that a test sends fits.
        sys::set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(16_i32 << 20)).map_err(failed)?;
        // On a link that is still off the kernel leaves an error for the next call; it means nothing yet.
        let _ = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::SocketError);
        Ok(Self { socket, buffer: vec![0; LONGEST] })
    }

    /// Sends one frame as it is.
    ///
    /// # Errors
    /// What the kernel said: `EMSGSIZE` when it is longer than MTU and headers, `ENETDOWN`, `ENOBUFS`
    /// when the interface's queue is full.
    pub fn send(&self, frame: &[u8]) -> Result<(), LabError> {
        nix::unistd::write(&self.socket, frame).map(drop).map_err(|e| LabError::socket("sending a frame", e))
    }

    /// Receives a frame; `None` when `timeout` passes without one.
    ///
    /// # Errors
    /// What the kernel said, such as `ENETDOWN` once after the interface went down.
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, LabError> {
        let failed = |e| LabError::socket("receiving a frame", e);
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((length, vlan)) =
                sys::packet_receive(&self.socket, &mut self.buffer).map_err(failed)?
            {
                let mut frame = self.buffer[..length.min(LONGEST)].to_vec();
                if let Some(vlan) = vlan {
                    let at = frame.len().min(12);
                    let tag = [vlan.tpid.to_be_bytes(), vlan.tci.to_be_bytes()].concat();
                    frame.splice(at..at, tag);
                }
                return Ok(Some(frame));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !sys::readable(&self.socket, left).map_err(failed)? {
                return Ok(None);
            }
        }
    }

    /// Receives until `wanted` says yes to a frame, passing others over; `None` when `timeout` passes
    /// first.
    ///
    /// # Errors
    /// As [`PacketSocket::receive`].
    pub fn receive_matching(
        &mut self,
        timeout: Duration,
        mut wanted: impl FnMut(&[u8]) -> bool,
    ) -> Result<Option<Vec<u8>>, LabError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.receive(left)? {
                Some(frame) if wanted(&frame) => return Ok(Some(frame)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
