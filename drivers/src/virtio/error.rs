//! Why a virtio-net port could not be opened or changed.

use super::layout::Features;
use crate::pci::{FunctionError, SliceError};
use isoplane_memory::PoolError;

/// A structure of the device that a capability leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Structure {
    /// Common configuration.
    Common,
    /// Doorbells.
    Notify,
    /// Network configuration.
    Device,
}

impl std::fmt::Display for Structure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Common => "common configuration",
            Self::Notify => "notification",
            Self::Device => "device configuration",
        })
    }
}

/// What can go wrong. `address` is the PCI function's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioError {
    /// Another device.
    #[error(
        "{address}: {vendor:04x}:{device:04x} is no virtio network device (1af4:1041 or 1af4:1000); use the driver \
         for it"
    )]
    WrongDevice {
        /// The function.
        address: String,
        /// PCI vendor.
        vendor: u16,
        /// PCI device.
        device: u16,
    },
    /// The function does not answer.
    #[error("{address}: the device reads as all ones; it is unplugged, or its memory is disabled")]
    Gone {
        /// The function.
        address: String,
    },
    /// A structure is missing, or all capabilities that lead to it are unusable.
    #[error(
        "{address}: no usable capability for the {structure} structure{why}; a device without it is older than \
         virtio 1.0 (QEMU: disable-legacy=on,disable-modern=off)"
    )]
    Structure {
        /// The function.
        address: String,
        /// Which.
        structure: Structure,
        /// What was wrong with the last one found.
        why: String,
    },
    /// A number in the device's registers makes no sense.
    #[error("{address}: {what} is {value}, which no device may say; the device is broken or hostile")]
    Absurd {
        /// The function.
        address: String,
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
    },
    /// The configuration kept changing while it was read.
    #[error(
        "{address}: the device configuration changed {tries} times while it was read; the device is broken"
    )]
    Unstable {
        /// The function.
        address: String,
        /// Times that it was read.
        tries: u32,
    },
    /// The device offers no feature that we cannot do without.
    #[error("{address}: the device does not offer {feature:?}: {why}")]
    Missing {
        /// The function.
        address: String,
        /// The feature.
        feature: Features,
        /// What it is for and what to do.
        why: &'static str,
    },
    /// The device did not accept the features that we chose among those that it had offered.
    #[error(
        "{address}: the device refused the features {chosen:?}, all of which it had offered; report it to its vendor"
    )]
    Refused {
        /// The function.
        address: String,
        /// What was chosen.
        chosen: Features,
    },
    /// The device does not come to an end.
    #[error(
        "{address}: {what} did not end within {milliseconds} ms; the device is stuck, reset it or its host"
    )]
    Stuck {
        /// The function.
        address: String,
        /// What was waited for.
        what: &'static str,
        /// How long.
        milliseconds: u64,
    },
    /// A queue that must be there is not, or its size is none that a ring may have.
    #[error(
        "{address}: queue {queue} has {size} entries at most; a ring takes a power of two from 2 to 32768"
    )]
    RingSize {
        /// The function.
        address: String,
        /// The virtqueue's number.
        queue: u16,
        /// What the device says.
        size: u16,
    },
    /// A doorbell outside of the structure that it belongs to.
    #[error(
        "{address}: the doorbell of queue {queue} is at {offset:#x} of {bytes:#x} bytes; the device is broken"
    )]
    Doorbell {
        /// The function.
        address: String,
        /// The virtqueue's number.
        queue: u16,
        /// Where it should be.
        offset: u64,
        /// Bytes of the structure.
        bytes: usize,
    },
    /// More queues than the device has.
    #[error("{address}: {wanted} queues wanted, the device has {available}{hint}")]
    Queues {
        /// The function.
        address: String,
        /// What was asked for.
        wanted: u16,
        /// Pairs of queues that there are.
        available: u16,
        /// What to do.
        hint: &'static str,
    },
    /// A number in the configuration that is out of range.
    #[error("{address}: {what} of {value}; take {range}")]
    Config {
        /// The function.
        address: String,
        /// Which.
        what: &'static str,
        /// What was asked for.
        value: u64,
        /// What can be had.
        range: &'static str,
    },
    /// The device passes packets that no chunk can hold.
    #[error(
        "{address}: packets of {frame} bytes may arrive (MTU {mtu}) and a chunk of pool {pool:?} has room for {room}; \
         allow packets of several frames (multi_buffer), or take larger chunks"
    )]
    MtuTooLarge {
        /// The function.
        address: String,
        /// The device's MTU.
        mtu: u16,
        /// Longest frame that may arrive.
        frame: u32,
        /// The pool's name.
        pool: String,
        /// What fits.
        room: u32,
    },
    /// No room for the header before a packet.
    #[error(
        "{address}: pool {pool:?} leaves {headroom} bytes before a packet, and the header of the device takes \
         {needed}; make the pool with more headroom"
    )]
    Headroom {
        /// The function.
        address: String,
        /// The pool's name.
        pool: String,
        /// Bytes before a packet.
        headroom: u32,
        /// Bytes of the header.
        needed: u32,
    },
    /// The pool has not enough free frames for the RX rings.
    #[error(
        "{address}: {queues} RX rings of {ring} take {needed} frames and pool {pool:?} has {left} left; make it larger"
    )]
    PoolTooSmall {
        /// The function.
        address: String,
        /// Queues.
        queues: u16,
        /// Entries of an RX ring.
        ring: u16,
        /// Frames needed.
        needed: u32,
        /// The pool's name.
        pool: String,
        /// Frames left.
        left: u32,
    },
    /// The device refused a command.
    #[error("{address}: the device refused to {what}")]
    Command {
        /// The function.
        address: String,
        /// What it should do.
        what: &'static str,
    },
    /// A command cannot be given, since the device has not offered what it takes.
    #[error("{address}: the device cannot {what}: it does not offer {feature:?}")]
    Unsupported {
        /// The function.
        address: String,
        /// What it should do.
        what: &'static str,
        /// What it takes.
        feature: Features,
    },
    /// The port could give no custody.
    #[error("{address}: {source}")]
    Pool {
        /// The function.
        address: String,
        /// The pool's error.
        source: PoolError,
    },
    /// The function could not give memory or a BAR, or could not be reset.
    #[error("{address}: {what}: {source}")]
    Function {
        /// The function.
        address: String,
        /// What was wanted.
        what: &'static str,
        /// Why not.
        source: FunctionError,
    },
    /// The memory that the function gave is too small or not aligned.
    #[error("{address}: {source}")]
    Memory {
        /// The function.
        address: String,
        /// How it does not fit.
        source: SliceError,
    },
}
