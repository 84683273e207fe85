//! Registers and descriptors of the 82574, as facts.
//!
//! Source: Intel 82574 GbE Controller Family datasheet (revision 3.4). The number beside each group is the
//! section that describes it. All registers are 32 bits wide and little-endian, and lie in BAR 0.

use std::sync::atomic::AtomicU64;

/// PCI vendor (section 9.1.1).
pub(super) const VENDOR: u16 = 0x8086;
/// PCI device: 82574L (section 9.1.1).
pub(super) const DEVICE: u16 = 0x10d3;
/// BAR of the registers, and how many bytes of it we reach (section 9.1.1: 128 KiB).
pub(super) const BAR: u8 = 0;
pub(super) const BAR_BYTES: usize = 0x6000;
/// Queues of each direction (sections 7.1.11, 7.2.5).
pub(super) const QUEUES: u16 = 2;

/// General registers (section 10.2.2).
pub(super) const CTRL: usize = 0x0000;
pub(super) const CTRL_FULL_DUPLEX: u32 = 1 << 0;
pub(super) const CTRL_MASTER_DISABLE: u32 = 1 << 2;
pub(super) const CTRL_ASDE: u32 = 1 << 5;
pub(super) const CTRL_SLU: u32 = 1 << 6;
pub(super) const CTRL_FORCE_SPEED: u32 = 1 << 11;
pub(super) const CTRL_FORCE_DUPLEX: u32 = 1 << 12;
pub(super) const CTRL_RST: u32 = 1 << 26;
pub(super) const CTRL_FLOW_CONTROL: u32 = 0b11 << 27;
pub(super) const CTRL_VME: u32 = 1 << 30;
pub(super) const STATUS: usize = 0x0008;
pub(super) const STATUS_LINK_UP: u32 = 1 << 1;
pub(super) const STATUS_SPEED_SHIFT: u32 = 6;
pub(super) const STATUS_MASTER_ENABLED: u32 = 1 << 19;
pub(super) const EECD: usize = 0x0010;
/// The NVM was read into the registers after reset.
pub(super) const EECD_AUTO_READ_DONE: u32 = 1 << 9;
pub(super) const EERD: usize = 0x0014;
pub(super) const EERD_START: u32 = 1 << 0;
pub(super) const EERD_DONE: u32 = 1 << 1;
pub(super) const EERD_ADDRESS_SHIFT: u32 = 2;
pub(super) const EERD_DATA_SHIFT: u32 = 16;
pub(super) const CTRL_EXT: usize = 0x0018;
/// Tells the firmware that a driver has the device.
pub(super) const CTRL_EXT_DRIVER_LOADED: u32 = 1 << 28;
pub(super) const MDIC: usize = 0x0020;
pub(super) const MDIC_REGISTER_SHIFT: u32 = 16;
pub(super) const MDIC_PHY_1: u32 = 1 << 21;
pub(super) const MDIC_WRITE: u32 = 0b01 << 26;
pub(super) const MDIC_READ: u32 = 0b10 << 26;
pub(super) const MDIC_READY: u32 = 1 << 28;
pub(super) const MDIC_ERROR: u32 = 1 << 30;
pub(super) const PBA: usize = 0x1000;

/// PHY control register (section 10.2.9, IEEE 802.3 clause 22.2.4.1).
pub(super) const PHY_CONTROL: u32 = 0;
pub(super) const PHY_RESTART: u16 = 1 << 9;
pub(super) const PHY_ISOLATE: u16 = 1 << 10;
pub(super) const PHY_POWER_DOWN: u16 = 1 << 11;
pub(super) const PHY_NEGOTIATE: u16 = 1 << 12;

/// Interrupt registers (section 10.2.4).
pub(super) const ICR: usize = 0x00c0;
pub(super) const IMC: usize = 0x00d8;
pub(super) const EIAC: usize = 0x00dc;
pub(super) const IAM: usize = 0x00e0;

/// Receive registers (section 10.2.5).
pub(super) const RCTL: usize = 0x0100;
pub(super) const RCTL_EN: u32 = 1 << 1;
pub(super) const RCTL_UNICAST_PROMISCUOUS: u32 = 1 << 3;
pub(super) const RCTL_MULTICAST_PROMISCUOUS: u32 = 1 << 4;
/// Packets longer than 1522 bytes are received; without it they are dropped.
pub(super) const RCTL_LONG_PACKETS: u32 = 1 << 5;
pub(super) const RCTL_BROADCAST: u32 = 1 << 15;
pub(super) const RCTL_BSIZE_SHIFT: u32 = 16;
pub(super) const RCTL_BSEX: u32 = 1 << 25;
pub(super) const RCTL_STRIP_CRC: u32 = 1 << 26;
pub(super) const RCTL_FLXBUF_SHIFT: u32 = 27;
pub(super) const RXCSUM: usize = 0x5000;
pub(super) const RXCSUM_IP: u32 = 1 << 8;
pub(super) const RXCSUM_TCP_UDP: u32 = 1 << 9;
/// No packet checksum, but the RSS hash, in the descriptor.
pub(super) const RXCSUM_HASH: u32 = 1 << 13;
pub(super) const RFCTL: usize = 0x5008;
/// Extended receive descriptors.
pub(super) const RFCTL_EXTENDED: u32 = 1 << 15;
/// Multicast table: 128 registers.
pub(super) const MTA: usize = 0x5200;
pub(super) const MTA_WORDS: usize = 128;
pub(super) const RAL: usize = 0x5400;
pub(super) const RAH: usize = 0x5404;
pub(super) const RAH_VALID: u32 = 1 << 31;
pub(super) const VFTA: usize = 0x5600;
pub(super) const VFTA_WORDS: usize = 128;
pub(super) const MRQC: usize = 0x5818;
pub(super) const MRQC_RSS: u32 = 0b01;
/// TCP/IPv4, IPv4, TCP/IPv6, IPv6 with extensions, IPv6.
pub(super) const MRQC_ALL_FIELDS: u32 = 0b1_1111 << 16;
/// Redirection table: 32 registers of four entries.
pub(super) const RETA: usize = 0x5c00;
pub(super) const RETA_WORDS: usize = 32;
/// In an entry: queue 1.
pub(super) const RETA_QUEUE_1: u8 = 1 << 7;
pub(super) const RSSRK: usize = 0x5c80;
pub(super) const RSSRK_WORDS: usize = 10;

/// Registers of receive queue `n`.
pub(super) const fn rx(queue: u16, register: usize) -> usize {
    0x2800 + queue as usize * 0x100 + register
}
/// Registers of transmit queue `n` (section 10.2.6).
pub(super) const fn tx(queue: u16, register: usize) -> usize {
    0x3800 + queue as usize * 0x100 + register
}
/// Of a queue, either way: where the ring starts, how many bytes it has, head, tail, and control.
pub(super) const BASE_LOW: usize = 0x00;
pub(super) const BASE_HIGH: usize = 0x04;
pub(super) const LENGTH: usize = 0x08;
pub(super) const HEAD: usize = 0x10;
pub(super) const TAIL: usize = 0x18;
pub(super) const DELAY: usize = 0x20;
pub(super) const CONTROL: usize = 0x28;
pub(super) const ABSOLUTE_DELAY: usize = 0x2c;
/// Transmit arbitration (TARC).
pub(super) const ARBITRATION: usize = 0x40;
pub(super) const ARBITRATION_ENABLE: u32 = 1 << 10;
/// Thresholds count descriptors, and write back each that is done.
pub(super) const CONTROL_WRITE_BACK_EACH: u32 = 1 << 24 | 1 << 16;
/// In TXDCTL: reserved, to be written as 1.
pub(super) const TXDCTL_RESERVED_1: u32 = 1 << 22;

/// Transmit registers (section 10.2.6).
pub(super) const TCTL: usize = 0x0400;
pub(super) const TCTL_EN: u32 = 1 << 1;
pub(super) const TCTL_PAD: u32 = 1 << 3;
/// Collision threshold 15 and distance 63, for half duplex.
pub(super) const TCTL_COLLISIONS: u32 = 15 << 4 | 63 << 12;
pub(super) const TCTL_RETRANSMIT: u32 = 1 << 24;
pub(super) const TIPG: usize = 0x0410;
/// Gaps of 8, 8 and 6: the datasheet's values for IEEE 802.3 on copper.
pub(super) const TIPG_COPPER: u32 = 8 | 8 << 10 | 6 << 20;

/// A descriptor: 16 bytes.
pub(super) type Descriptor = [AtomicU64; 2];
pub(super) const DESCRIPTOR_BYTES: usize = 16;
const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR_BYTES);

/// How a received descriptor is read. Its second word is `done` and what the device wrote with it; before
/// that it is zero, as we posted it. The first word is the buffer's address when posted.
pub(super) trait RxFormat {
    /// Bits that say that the device is done, and that the packet ends here.
    const DONE: u64;
    const END: u64;
    /// Bits that say that the packet is damaged; such packets we have asked not to see (RCTL.SBP).
    const DAMAGED: u64;
    /// One of them: a transport checksum was looked at. None of the others: it is right.
    const CHECKED: u64;
    const CHECK_FAILED: u64;
    /// Bytes in this buffer.
    fn len(word: u64) -> u16;
}

/// Legacy receive descriptor (section 7.1.3): length, checksum, status, errors, VLAN tag.
pub(super) struct Legacy;

impl RxFormat for Legacy {
    const DONE: u64 = 1 << 32;
    const END: u64 = 1 << 33;
    const DAMAGED: u64 = 0b1001_0111 << 40;
    /// UDPCS, TCPCS.
    const CHECKED: u64 = 0b11 << 36;
    /// IXSM: what CHECKED says is to be ignored; TCPE, IPE.
    const CHECK_FAILED: u64 = 1 << 34 | 0b11 << 45;
    #[inline(always)]
    fn len(word: u64) -> u16 {
        word as u16
    }
}

/// Extended receive descriptor (section 7.1.4): extended status and errors, length, VLAN tag.
pub(super) struct Extended;

impl RxFormat for Extended {
    const DONE: u64 = 1 << 0;
    const END: u64 = 1 << 1;
    const DAMAGED: u64 = 0b1001_0111 << 24;
    const CHECKED: u64 = 0b11 << 4;
    const CHECK_FAILED: u64 = 1 << 2 | 0b11 << 29;
    #[inline(always)]
    fn len(word: u64) -> u16 {
        (word >> 32) as u16
    }
}

/// Transmit descriptors, second word (section 7.2.10): command bits of all three kinds.
pub(super) const TX_EOP: u64 = 1 << 24;
pub(super) const TX_IFCS: u64 = 1 << 25;
pub(super) const TX_RS: u64 = 1 << 27;
/// Not a legacy descriptor.
pub(super) const TX_EXTENDED: u64 = 1 << 29;
/// With `TX_EXTENDED`: data; without: a context.
pub(super) const TX_DATA: u64 = 1 << 20;
/// The device is done with this descriptor and all before it.
pub(super) const TX_DONE: u64 = 1 << 32;
/// In a data descriptor: insert the transport checksum (POPTS.TXSM).
pub(super) const TX_TRANSPORT_CHECKSUM: u64 = 1 << 41;
/// In a context: TCP rather than UDP (TUCMD.TCP).
pub(super) const TX_CONTEXT_TCP: u64 = 1 << 24;

/// Context descriptor, first word (section 7.2.10): the checksum covers the packet from `start` to its end and
/// goes to `at`, both in bytes from the packet's start.
#[inline(always)]
pub(super) const fn context(start: u8, at: u8) -> u64 {
    (start as u64) << 32 | (at as u64) << 40
}

/// Is this second word that of a context?
#[inline(always)]
pub(super) const fn is_context(word: u64) -> bool {
    word & (TX_EXTENDED | TX_DATA) == TX_EXTENDED
}

/// Shortest packet that the device may be given (section 7.2.1, TCTL.PSP): it pads to 64 bytes itself.
pub(super) const MIN_PACKET: u32 = 17;
/// Bytes of an Ethernet header and one VLAN tag.
pub(super) const HEADER_BYTES: u32 = 18;
/// Largest MTU: the device passes packets of 9234 bytes with their FCS.
pub(super) const MAX_MTU: u32 = 9216;
/// Longest packet with FCS that is received without `RCTL_LONG_PACKETS`.
pub(super) const SHORT_PACKET: u32 = 1522;
