//! Numbers and structures of virtio over PCI, as facts.
//!
//! Source: OASIS Virtual I/O Device (VIRTIO) 1.2; the number beside each group is its section. All fields are
//! little-endian.

/// PCI vendor of all virtio devices (4.1.2).
pub(super) const VENDOR: u16 = 0x1af4;
/// PCI device of a modern network device: 0x1040 and the device type 1 (4.1.2.1, 5.1.1).
pub(super) const DEVICE_MODERN: u16 = 0x1041;
/// PCI device of one that old drivers know too; it has the modern registers as well (4.1.2.3).
pub(super) const DEVICE_TRANSITIONAL: u16 = 0x1000;

/// Vendor capabilities in configuration space (4.1.4).
pub(super) mod capability {
    /// Identity of a vendor-specific capability.
    pub(in super::super) const VENDOR_SPECIFIC: u8 = 0x09;
    pub(in super::super) const LENGTH: u16 = 2;
    pub(in super::super) const TYPE: u16 = 3;
    pub(in super::super) const BAR: u16 = 4;
    pub(in super::super) const OFFSET: u16 = 8;
    pub(in super::super) const BYTES: u16 = 12;
    /// Only of the notify capability (4.1.4.4).
    pub(in super::super) const MULTIPLIER: u16 = 16;
    pub(in super::super) const COMMON: u8 = 1;
    pub(in super::super) const NOTIFY: u8 = 2;
    pub(in super::super) const DEVICE: u8 = 4;
    /// Greater BAR numbers are reserved.
    pub(in super::super) const LAST_BAR: u8 = 5;
}

/// Common configuration (4.1.4.3).
pub(super) mod common {
    pub(in super::super) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(in super::super) const DEVICE_FEATURE: usize = 4;
    pub(in super::super) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(in super::super) const DRIVER_FEATURE: usize = 12;
    pub(in super::super) const CONFIG_MSIX_VECTOR: usize = 16;
    pub(in super::super) const NUM_QUEUES: usize = 18;
    pub(in super::super) const DEVICE_STATUS: usize = 20;
    pub(in super::super) const CONFIG_GENERATION: usize = 21;
    pub(in super::super) const QUEUE_SELECT: usize = 22;
    pub(in super::super) const QUEUE_SIZE: usize = 24;
    pub(in super::super) const QUEUE_MSIX_VECTOR: usize = 26;
    pub(in super::super) const QUEUE_ENABLE: usize = 28;
    pub(in super::super) const QUEUE_NOTIFY_OFF: usize = 30;
    pub(in super::super) const QUEUE_DESC: usize = 32;
    pub(in super::super) const QUEUE_DRIVER: usize = 40;
    pub(in super::super) const QUEUE_DEVICE: usize = 48;
    /// What every device has; `QUEUE_RESET` is behind it.
    pub(in super::super) const BYTES: usize = 56;
    /// With `RING_RESET`.
    pub(in super::super) const QUEUE_RESET: usize = 58;
    /// No interrupt for a queue or for changes of the configuration (4.1.5.1.2).
    pub(in super::super) const NO_VECTOR: u16 = 0xffff;
}

/// Device status (2.1).
pub(super) mod status {
    pub(in super::super) const ACKNOWLEDGE: u8 = 1;
    pub(in super::super) const DRIVER: u8 = 2;
    pub(in super::super) const DRIVER_OK: u8 = 4;
    pub(in super::super) const FEATURES_OK: u8 = 8;
    pub(in super::super) const NEEDS_RESET: u8 = 64;
    pub(in super::super) const FAILED: u8 = 128;
}

/// Network device configuration (5.1.4).
pub(super) mod net {
    pub(in super::super) const MAC: usize = 0;
    pub(in super::super) const STATUS: usize = 6;
    pub(in super::super) const MAX_PAIRS: usize = 8;
    pub(in super::super) const MTU: usize = 10;
    pub(in super::super) const RSS_MAX_KEY: usize = 17;
    pub(in super::super) const RSS_MAX_TABLE: usize = 18;
    pub(in super::super) const HASH_TYPES: usize = 20;
    pub(in super::super) const STATUS_LINK_UP: u16 = 1;
    /// Pairs of queues that a device may have (5.1.4.2).
    pub(in super::super) const MOST_PAIRS: u16 = 0x8000;
    /// Smallest MTU of a device (5.1.4.1).
    pub(in super::super) const LEAST_MTU: u16 = 68;
}

/// The largest ring (2.7, 2.8.10).
pub(super) const MOST_DESCRIPTORS: u16 = 32_768;

/// Descriptors of split rings (2.7.5).
pub(super) const DESCRIPTOR_BYTES: usize = 16;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Split rings (2.7.6, 2.7.8): words in front of the entries.
pub(super) mod split {
    /// In the driver's flags: do not interrupt.
    pub(in super::super) const NO_INTERRUPT: u16 = 1;
    /// In the device's flags: doorbells are not needed.
    pub(in super::super) const NO_NOTIFY: u16 = 1;
}

/// Packed rings (2.8).
pub(super) mod packed {
    pub(in super::super) const AVAIL: u16 = 1 << 7;
    pub(in super::super) const USED: u16 = 1 << 15;
    /// Event suppression flags (2.8.14); 0 is on.
    pub(in super::super) const EVENTS_OFF: u16 = 1;
    pub(in super::super) const EVENTS_AT: u16 = 2;
}

/// The header before each packet (5.1.6): flags, gso type, header length, gso size, checksum start and offset,
/// number of buffers.
pub(super) mod header {
    pub(in super::super) const BYTES: usize = 12;
    /// With `HASH_REPORT`: hash value, kind of hash, padding.
    pub(in super::super) const BYTES_WITH_HASH: usize = 20;
    pub(in super::super) const NEEDS_CHECKSUM: u8 = 1;
    pub(in super::super) const CHECKSUM_VALID: u8 = 2;
    pub(in super::super) const CHECKSUM_START: usize = 6;
    pub(in super::super) const CHECKSUM_OFFSET: usize = 8;
    pub(in super::super) const BUFFERS: usize = 10;
    pub(in super::super) const HASH: usize = 12;
    pub(in super::super) const HASH_KIND: usize = 16;
}

/// Hashes (5.1.6.4.3) and RSS (5.1.6.5.7).
pub(super) mod spread {
    /// IPv4 and IPv6, alone and with TCP and UDP.
    pub(in super::super) const KINDS: u32 = 0x3f;
    pub(in super::super) const KEY_BYTES: usize = 40;
    /// Entries of the longest table that we give.
    pub(in super::super) const MOST_TABLE: u16 = 128;
}

/// Commands of the control queue (5.1.6.5): class and command.
pub(super) mod command {
    pub(in super::super) const PROMISCUOUS: [u8; 2] = [0, 0];
    pub(in super::super) const ALL_MULTICAST: [u8; 2] = [0, 1];
    pub(in super::super) const MAC_TABLE: [u8; 2] = [1, 0];
    pub(in super::super) const MAC_ADDRESS: [u8; 2] = [1, 1];
    pub(in super::super) const VLAN_ADD: [u8; 2] = [2, 0];
    pub(in super::super) const VLAN_REMOVE: [u8; 2] = [2, 1];
    pub(in super::super) const PAIRS: [u8; 2] = [4, 0];
    pub(in super::super) const RSS: [u8; 2] = [4, 1];
    pub(in super::super) const HASH: [u8; 2] = [4, 2];
    pub(in super::super) const ACK_OK: u8 = 0;
    pub(in super::super) const ACK_ERROR: u8 = 1;
}

bitflags::bitflags! {
    /// Features that a device may offer and a driver accept (5.1.3, 6).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Features: u64 {
        /// The device computes checksums on transmit.
        const CSUM = 1 << 0;
        /// The driver takes packets whose checksum is partial or was verified.
        const GUEST_CSUM = 1 << 1;
        /// The device tells the largest MTU.
        const MTU = 1 << 3;
        /// The device has an Ethernet address.
        const MAC = 1 << 5;
        /// A received packet may lie in several buffers.
        const MRG_RXBUF = 1 << 15;
        /// The device tells the state of the link.
        const STATUS = 1 << 16;
        /// There is a control queue.
        const CTRL_VQ = 1 << 17;
        /// The control queue takes receive modes.
        const CTRL_RX = 1 << 18;
        /// The control queue takes VLAN filters.
        const CTRL_VLAN = 1 << 19;
        /// There are several pairs of queues.
        const MQ = 1 << 22;
        /// The control queue takes an Ethernet address.
        const CTRL_MAC_ADDR = 1 << 23;
        /// A descriptor may name a table of descriptors.
        const INDIRECT_DESC = 1 << 28;
        /// Both sides say at which entry they want to be told.
        const EVENT_IDX = 1 << 29;
        /// Virtio 1.0 or later.
        const VERSION_1 = 1 << 32;
        /// The device finds memory where the platform's IOMMU says.
        const ACCESS_PLATFORM = 1 << 33;
        /// Rings in one piece that both sides write.
        const RING_PACKED = 1 << 34;
        /// Memory needs ordering as between the driver and a real device.
        const ORDER_PLATFORM = 1 << 36;
        /// A queue may be reset alone.
        const RING_RESET = 1 << 40;
        /// The device writes the hash of received packets.
        const HASH_REPORT = 1 << 57;
        /// The device spreads received packets by hash.
        const RSS = 1 << 60;
    }
}
