//! What a device's driver can do with XDP, as the kernel's `netdev` family of generic netlink tells
//! (Linux 6.3; `include/uapi/linux/netdev.h`).
//!
//! Contract: an older kernel, or an answer that is not understood, is "not known", never an error.

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};
use std::os::fd::AsRawFd;

/// What the driver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Features {
    xdp: u64,
    xsk: u64,
    zero_copy_segments: u32,
}

// `enum netdev_xdp_act` and `enum netdev_xsk_flags`.
const ACT_BASIC: u64 = 1 << 0;
const ACT_REDIRECT: u64 = 1 << 1;
const ACT_XSK_ZEROCOPY: u64 = 1 << 3;
const XSK_TX_TIMESTAMP: u64 = 1 << 0;
const XSK_TX_CHECKSUM: u64 = 1 << 1;

const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// `struct nlmsghdr` and `struct genlmsghdr`.
const HEADERS: usize = 16 + 4;
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_A_DEV_XDP_ZC_MAX_SEGS: u16 = 4;
const NETDEV_A_DEV_XSK_FEATURES: u16 = 6;

impl Features {
    /// Why zero-copy cannot be had; `None` when it might.
    pub(super) const fn zero_copy_refusal(&self, multi_buffer: bool) -> Option<&'static str> {
        let need = ACT_BASIC | ACT_REDIRECT | ACT_XSK_ZEROCOPY;
        if self.xdp & need != need {
            return Some("the interface's driver does not offer it");
        }
        if multi_buffer && self.zero_copy_segments <= 1 {
            return Some("the interface's driver does not offer it together with multi-buffer");
        }
        None
    }

    /// Frames that a packet may have in zero-copy mode.
    pub(super) const fn zero_copy_segments(&self) -> u32 {
        self.zero_copy_segments
    }

    pub(super) const fn tx_checksum(&self) -> bool {
        self.xsk & XSK_TX_CHECKSUM != 0
    }

    pub(super) const fn tx_timestamp(&self) -> bool {
        self.xsk & XSK_TX_TIMESTAMP != 0
    }
}

/// Asks about an interface of the calling thread's namespace; `None` when the kernel does not tell.
pub(super) fn of(ifindex: u32) -> Option<Features> {
    let mut socket = Socket::new(NETLINK_GENERIC).ok()?;
    socket.bind_auto().ok()?;
    socket.connect(&SocketAddr::new(0, 0)).ok()?;
    let second = libc::timeval { tv_sec: 1, tv_usec: 0 };
    super::sys::receive_timeout(socket.as_raw_fd(), second).ok()?;
    let family = ask(&socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0")?;
    let family = number(attribute(&family, CTRL_ATTR_FAMILY_ID)?)?;
    let family = u16::try_from(family).ok()?;
    let index = ifindex.to_ne_bytes();
    let device = ask(&socket, family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &index)?;
    let value = |kind| attribute(&device, kind).and_then(number);
    Some(Features {
        xdp: value(NETDEV_A_DEV_XDP_FEATURES)?,
        xsk: value(NETDEV_A_DEV_XSK_FEATURES).unwrap_or(0),
        zero_copy_segments: value(NETDEV_A_DEV_XDP_ZC_MAX_SEGS).unwrap_or(1) as u32,
    })
}

/// One request with one attribute; gives the attributes of the answer.
fn ask(socket: &Socket, family: u16, command: u8, kind: u16, value: &[u8]) -> Option<Vec<u8>> {
    let length = 4 + value.len();
    let total = HEADERS + length.next_multiple_of(4);
    let mut message = Vec::with_capacity(total);
    message.extend_from_slice(&(total as u32).to_ne_bytes());
    message.extend_from_slice(&family.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&super::sys::sequence().to_ne_bytes());
    // Port 0: the kernel fills ours in. Then command, version 1, two reserved bytes.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&[command, 1, 0, 0]);
    message.extend_from_slice(&(length as u16).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(total, 0);
    socket.send(&message, 0).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    let end = number(answer.get(..4)?)? as usize;
    let answered = number(answer.get(4..6)?)? as u16;
    if answered == NLMSG_ERROR {
        return None;
    }
    answer.get(HEADERS..end.min(answer.len())).map(<[u8]>::to_vec)
}

/// The value of the first attribute of that kind.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = number(attributes.get(..2)?)? as usize;
        // The two upper bits of the kind are flags.
        let kind = number(attributes.get(2..4)?)? as u16 & 0x3fff;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// A number of two, four or eight bytes.
fn number(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        2 => bytes.try_into().ok().map(u16::from_ne_bytes).map(u64::from),
        4 => bytes.try_into().ok().map(u32::from_ne_bytes).map(u64::from),
        8 => bytes.try_into().ok().map(u64::from_ne_bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_garbage_is_not_read() {
        // Length 8, kind 1; length 6, kind 3 with a flag set, padded; length 12, kind 5.
        let mut bytes = vec![8, 0, 1, 0, 1, 2, 3, 4, 6, 0, 3, 0x80, 9, 8, 0, 0, 12, 0, 5, 0];
        bytes.extend_from_slice(&7_u64.to_ne_bytes());
        assert_eq!(attribute(&bytes, 1), Some(&[1, 2, 3, 4][..]));
        assert_eq!(attribute(&bytes, 3), Some(&[9, 8][..]));
        assert_eq!(attribute(&bytes, 5).and_then(number), Some(7));
        assert_eq!(attribute(&bytes, 9), None);
        for cut in 0..bytes.len() {
            let _ = attribute(&bytes[..cut], 5);
        }
        // A length too short to be one must not keep us here.
        assert_eq!(attribute(&[0, 0, 1, 0, 0, 0, 0, 0], 2), None);
        assert_eq!(attribute(&[3, 0, 1, 0, 0, 0, 0, 0], 2), None);
    }

    #[test]
    fn a_driver_without_all_of_it_has_no_zero_copy() {
        let mut features = Features { xdp: ACT_BASIC | ACT_REDIRECT, xsk: 0, zero_copy_segments: 1 };
        assert!(features.zero_copy_refusal(false).is_some());
        features.xdp |= ACT_XSK_ZEROCOPY;
        assert_eq!(features.zero_copy_refusal(false), None);
        assert!(features.zero_copy_refusal(true).is_some());
        features.zero_copy_segments = 8;
        assert_eq!(features.zero_copy_refusal(true), None);
    }
}
