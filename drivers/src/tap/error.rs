//! What can go wrong when a tap is opened.
//!
//! Contract: an error names the interface, the reason, and what to do.

use isoplane_memory::ring::RingError;
use isoplane_memory::{PoolError, RegionError};
use nix::errno::Errno;

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// Linux would not take such a name.
    #[error(
        "tap {name:?}: a name of an interface has 1 to 15 bytes, none of them a space, a control character, \
         '/', ':' or '%', and is not \".\" or \"..\""
    )]
    Name {
        /// What was asked for.
        name: String,
    },
    /// There is an interface of that name.
    #[error(
        "tap {name:?}: there is an interface of that name; take another, delete it (`ip link del {name}`), or, if it is \
         a tap that nobody uses, ask for it with `existing`"
    )]
    Taken {
        /// The name.
        name: String,
    },
    /// There is an interface of that name, and it is of another kind.
    #[error(
        "tap {name:?}: the interface of that name is no tap, or one with another number of queues or without a \
         virtio-net header (`ip tuntap add dev {name} mode tap vnet_hdr` makes one; `multi_queue` for several queues)"
    )]
    OtherKind {
        /// The name.
        name: String,
    },
    /// The kernel has no tun driver, or this file system no node for it.
    #[error(
        "tap {name:?}: /dev/net/tun cannot be opened ({source}); load the driver (`modprobe tun`), or, in a container, \
         hand the device in"
    )]
    NoDevice {
        /// The name.
        name: String,
        /// What the kernel said.
        source: Errno,
    },
    /// The kernel does not let this process do that.
    #[error("tap {name:?}: {what} is not permitted; run as root or with CAP_NET_ADMIN")]
    NotPermitted {
        /// The name.
        name: String,
        /// What was refused.
        what: &'static str,
    },
    /// The kernel has no such address or MTU for a tap.
    #[error("tap {name:?}: {what}: the kernel takes {takes}")]
    Refused {
        /// The name.
        name: String,
        /// What was asked for.
        what: String,
        /// What it would take.
        takes: &'static str,
    },
    /// None, or more than a tap can have.
    #[error("tap {name:?}: {queues} queues; take 1 to {}", super::config::MAX_QUEUES)]
    Queues {
        /// The name.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// Not a usable ring size.
    #[error(
        "tap {name:?}: a {which} ring of {ring} entries; take a power of two from 64 to {}",
        super::config::MAX_RING
    )]
    Ring {
        /// The name.
        name: String,
        /// `rx` or `tx`.
        which: &'static str,
        /// What was asked for.
        ring: u32,
    },
    /// A packet of full length does not fit the frames that it may have.
    #[error(
        "tap {name:?}: with an MTU of {mtu} a packet has up to {packet} bytes, and it may take {frames} frame(s) of \
         {room}; lower the MTU, take larger chunks, or switch multi-buffer on"
    )]
    MtuTooLarge {
        /// The name.
        name: String,
        /// The MTU.
        mtu: u32,
        /// Longest packet: MTU, Ethernet header and a VLAN tag.
        packet: u32,
        /// Frames that a packet may have.
        frames: usize,
        /// Bytes of a packet that a frame holds.
        room: u32,
    },
    /// The pool has too few frames left to fill the rings.
    #[error(
        "tap {name:?}: {queues} queue(s) with a receive ring of {ring} take {needed} frames, and pool {pool:?} has \
         {left} left; make the pool larger or the rings smaller"
    )]
    PoolTooSmall {
        /// The name.
        name: String,
        /// Queues asked for.
        queues: u16,
        /// Entries of each receive ring.
        ring: u32,
        /// Frames that they take.
        needed: u32,
        /// The pool.
        pool: String,
        /// Frames it has left.
        left: u32,
    },
    /// The network namespace cannot be entered or left.
    #[error("tap {name:?}: {what}: {source}")]
    Namespace {
        /// The name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// Anything else the kernel says.
    #[error("tap {name:?}: {what}: {source}")]
    Os {
        /// The name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The rings could not be laid out.
    #[error(transparent)]
    Rings(#[from] RingError),
    /// The pool has no owner ids left.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The shared memory could not be made.
    #[error(transparent)]
    Region(#[from] RegionError),
}

impl TapError {
    /// What the kernel said, for `map_err`.
    pub(super) fn os(name: &str, what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| match source {
            Errno::EPERM | Errno::EACCES => Self::NotPermitted { name: name.to_owned(), what },
            source => Self::Os { name: name.to_owned(), what, source },
        }
    }
}
