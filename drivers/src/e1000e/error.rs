//! Why an e1000e port could not be opened or changed.

use super::layout::MAX_MTU;
use crate::pci::FunctionError;

/// Why a port for an 82574L could not be opened or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum E1000eError {
    /// Another device.
    #[error("{address}: device {vendor:04x}:{device:04x} is no 82574L (8086:10d3); use the driver for it")]
    WrongDevice {
        /// The function's address.
        address: String,
        /// PCI vendor.
        vendor: u16,
        /// PCI device.
        device: u16,
    },
    /// The function does not answer.
    #[error(
        "{address}: the device reads as all ones; it is unplugged, powered down or its memory is disabled"
    )]
    Gone {
        /// The function's address.
        address: String,
    },
    /// The registers could not be mapped.
    #[error("{address}: BAR 0 with the registers cannot be had: {source}")]
    Bar {
        /// The function's address.
        address: String,
        /// Why.
        source: FunctionError,
    },
    /// The BAR does not have all registers.
    #[error("{address}: BAR 0 has {bytes} bytes and the registers take {needed}; this is no 82574L")]
    BarTooSmall {
        /// The function's address.
        address: String,
        /// Bytes that can be reached.
        bytes: usize,
        /// Bytes that are needed.
        needed: usize,
    },
    /// The device does not come to an end.
    #[error("{address}: {what} did not end within {milliseconds} ms; power-cycle the device")]
    Stuck {
        /// The function's address.
        address: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        milliseconds: u64,
    },
    /// Neither the registers nor the NVM have an Ethernet address.
    #[error(
        "{address}: no valid Ethernet address in the registers or the NVM; give one in the configuration"
    )]
    NoMac {
        /// The function's address.
        address: String,
    },
    /// The address given is a group's or zero.
    #[error("{address}: {mac:02x?} cannot be a port's Ethernet address; take a unicast one")]
    BadMac {
        /// The function's address.
        address: String,
        /// What was asked for.
        mac: [u8; 6],
    },
    /// Not a number of queues that the device has.
    #[error("{address}: {queues} queues; the 82574L has 1 or 2")]
    Queues {
        /// The function's address.
        address: String,
        /// What was asked for.
        queues: u16,
    },
    /// Not a usable ring size.
    #[error("{address}: {ring} ring of {size} descriptors; take a power of two from 64 to 4096")]
    RingSize {
        /// The function's address.
        address: String,
        /// Which ring.
        ring: &'static str,
        /// What was asked for.
        size: u32,
    },
    /// Not a possible MTU.
    #[error("{address}: an MTU of {mtu}; take 68 to {MAX_MTU}")]
    Mtu {
        /// The function's address.
        address: String,
        /// What was asked for.
        mtu: u32,
    },
    /// Legacy descriptors have no hash.
    #[error(
        "{address}: several queues and RSS hashes need extended RX descriptors; legacy ones have no hash"
    )]
    LegacyHash {
        /// The function's address.
        address: String,
    },
    /// An address in the multicast list is none.
    #[error("{address}: {group:02x?} is no multicast address")]
    NotMulticast {
        /// The function's address.
        address: String,
        /// The address.
        group: [u8; 6],
    },
    /// The pool's chunks have no room for the smallest buffer.
    #[error(
        "{address}: chunks of pool {pool:?} have {room} bytes behind headroom and colours, and the smallest \
         receive buffer has 256; take larger chunks or less headroom"
    )]
    ChunkRoom {
        /// The function's address.
        address: String,
        /// The pool's name.
        pool: String,
        /// Bytes of room.
        room: u32,
    },
    /// The RX rings would not be full.
    #[error(
        "{address}: {queues} RX rings take {needed} frames, pool {pool:?} has {left} left; make the pool larger \
         or the rings smaller"
    )]
    PoolTooSmall {
        /// The function's address.
        address: String,
        /// Queues wanted.
        queues: u16,
        /// Frames that they take.
        needed: u32,
        /// The pool's name.
        pool: String,
        /// Frames that nobody has.
        left: u32,
    },
    /// Memory for rings, or the pool's, could not be shared with the device.
    #[error("{address}: {what}: {source}")]
    Dma {
        /// The function's address.
        address: String,
        /// What it is for.
        what: &'static str,
        /// Why.
        source: FunctionError,
    },
    /// The pool could give no custody.
    #[error("{address}: {source}")]
    Pool {
        /// The function's address.
        address: String,
        /// The pool's error.
        source: isoplane_memory::PoolError,
    },
}
