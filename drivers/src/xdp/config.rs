//! What an AF_XDP port can be told.

use super::error::XdpError;
use super::steering::Steering;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Three ways to want something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Want {
    /// If it can be had; the reason why not is said once, in a warning and by
    /// [`XdpPort::mode_reason`](super::XdpPort::mode_reason).
    #[default]
    Prefer,
    /// Or fail.
    Require,
    /// Not at all.
    Never,
}

/// The device reads and writes our chunks itself, or the kernel copies.
pub type ZeroCopy = Want;

/// Where the XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Attach {
    /// In the driver if it can, else in the network stack, with a warning that says why.
    #[default]
    PreferNative,
    /// In the driver, or fail.
    Native,
    /// In the network stack.
    Generic,
}

/// How the pool's chunks are shown to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Chunks {
    /// Aligned where the pool's chunks are of 2048 or 4096 bytes, else unaligned.
    #[default]
    Auto,
    /// A UMEM chunk is a chunk of the pool, 2048 or 4096 bytes.
    Aligned,
    /// A UMEM chunk lies inside a larger chunk of the pool, at starts spread over the cache.
    Unaligned,
}

/// What packets may ask of the kernel when they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TxMetadata {
    /// Nothing.
    #[default]
    Off,
    /// Checksums and times, by the device or the layer below.
    On,
    /// As `On`, and in copy mode the kernel computes checksums itself before it passes packets on:
    /// for peers that look at them, such as a capture on a veth pair.
    SoftwareChecksum,
}

/// How to open an [`XdpPort`](super::XdpPort). Sizes are in entries.
#[derive(Debug, Clone)]
pub struct XdpConfig {
    /// Name of the interface.
    pub interface: String,
    /// Network namespace that the interface is in, when not that of the calling thread.
    pub namespace: Option<Arc<OwnedFd>>,
    /// Queues to open: 0 to `queues - 1`.
    pub queues: u16,
    /// Which packets to take.
    pub steering: Steering,
    /// Zero-copy mode.
    pub zero_copy: ZeroCopy,
    /// Where the program runs.
    pub attach: Attach,
    /// Let the kernel sleep and say so, instead of spinning; see the flag in the rings.
    pub need_wakeup: bool,
    /// Share one UMEM among all queues and ports on the pool, where their modes agree.
    pub share_umem: Want,
    /// Packets of several frames, both ways.
    pub multi_buffer: bool,
    /// Chunk layout.
    pub chunks: Chunks,
    /// Requests of packets sent.
    pub tx_metadata: TxMetadata,
    /// Take the interface even if its MTU allows packets that no chunk can hold: the kernel drops
    /// those, and counts them in `rx_dropped`.
    pub allow_larger_mtu: bool,
    /// Received packets waiting for us.
    pub rx_ring: u32,
    /// Packets waiting to be sent.
    pub tx_ring: u32,
    /// Free chunks waiting to be received into; at least the RX ring, better twice as many. So many
    /// frames of the pool each queue holds from the start.
    pub fill_ring: u32,
    /// Sent chunks waiting to be taken back; at least the TX ring.
    pub completion_ring: u32,
}

impl XdpConfig {
    /// One queue, all packets, everything else as the kernel and driver can do best.
    #[must_use]
    pub fn new(interface: &str) -> Self {
        Self {
            interface: interface.to_owned(),
            namespace: None,
            queues: 1,
            steering: Steering::Everything,
            zero_copy: ZeroCopy::Prefer,
            attach: Attach::PreferNative,
            need_wakeup: true,
            share_umem: Want::Prefer,
            multi_buffer: false,
            chunks: Chunks::Auto,
            tx_metadata: TxMetadata::Off,
            allow_larger_mtu: false,
            rx_ring: 1024,
            tx_ring: 1024,
            fill_ring: 2048,
            completion_ring: 1024,
        }
    }

    /// Opens queues 0 to `queues - 1`.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Takes these packets.
    #[must_use]
    pub fn steering(mut self, steering: Steering) -> Self {
        self.steering = steering;
        self
    }

    /// Wants zero-copy mode that much.
    #[must_use]
    pub fn zero_copy(mut self, want: ZeroCopy) -> Self {
        self.zero_copy = want;
        self
    }

    /// Attaches the program there.
    #[must_use]
    pub fn attach(mut self, attach: Attach) -> Self {
        self.attach = attach;
        self
    }

    /// Lets the kernel sleep, or not.
    #[must_use]
    pub fn need_wakeup(mut self, need_wakeup: bool) -> Self {
        self.need_wakeup = need_wakeup;
        self
    }

    /// Wants a shared UMEM that much.
    #[must_use]
    pub fn share_umem(mut self, want: Want) -> Self {
        self.share_umem = want;
        self
    }

    /// Allows packets of several frames.
    #[must_use]
    pub fn multi_buffer(mut self, multi_buffer: bool) -> Self {
        self.multi_buffer = multi_buffer;
        self
    }

    /// Lays chunks out that way.
    #[must_use]
    pub fn chunks(mut self, chunks: Chunks) -> Self {
        self.chunks = chunks;
        self
    }

    /// Allows packets to ask for that.
    #[must_use]
    pub fn tx_metadata(mut self, tx_metadata: TxMetadata) -> Self {
        self.tx_metadata = tx_metadata;
        self
    }

    /// Takes the interface whatever its MTU is.
    #[must_use]
    pub fn allow_larger_mtu(mut self, allow: bool) -> Self {
        self.allow_larger_mtu = allow;
        self
    }

    /// Sets the sizes of the RX and TX rings; the fill ring becomes twice the one, the completion ring
    /// as large as the other.
    #[must_use]
    pub fn rings(mut self, rx: u32, tx: u32) -> Self {
        (self.rx_ring, self.fill_ring) = (rx, rx.saturating_mul(2));
        (self.tx_ring, self.completion_ring) = (tx, tx);
        self
    }

    /// Opens in the network namespace behind this descriptor.
    #[must_use]
    pub fn namespace(mut self, namespace: OwnedFd) -> Self {
        self.namespace = Some(Arc::new(namespace));
        self
    }

    pub(super) fn check(&self) -> Result<(), XdpError> {
        let interface = || self.interface.clone();
        for (ring, size) in [
            ("RX", self.rx_ring),
            ("TX", self.tx_ring),
            ("fill", self.fill_ring),
            ("completion", self.completion_ring),
        ] {
            if !size.is_power_of_two() || !(32..=32768).contains(&size) {
                return Err(XdpError::RingSize { interface: interface(), ring, size });
            }
        }
        if !(1..=1024).contains(&self.queues) {
            return Err(XdpError::Queues { interface: interface(), queues: self.queues });
        }
        self.steering.check(&self.interface)
    }
}
