//! The cold half of a tap.

use super::config::{ETHERNET, TapConfig};
use super::error::TapError;
use super::layout::{Count, Lane, lane_bytes};
use super::mover::Mover;
use super::queue::{TapRx, TapTx};
use super::slot::{Half, Slot, TapKick};
use super::sys;
use crate::port::{Capabilities, KickTarget, LinkState, Port, PortStatistics};
use crate::queue::Queue;
use crate::xdp::interface::{Interface, Namespace, within};
use isoplane_memory::{Pool, Region, RegionConfig, custody};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// An interface of Linux whose other end is a worker. See the [module](super).
///
/// Close the queues that were taken ([`Queue::close`]) before the port is dropped; then the interface is gone, unless it
/// is persistent or another process that inherited the port by fork still runs.
#[derive(Debug)]
pub struct TapPort {
    interface: Interface,
    max_frame: u32,
    segments: usize,
    queues: Vec<Option<Queue>>,
    slots: Vec<Arc<Slot>>,
    namespace: Namespace,
    pool: Arc<Pool>,
    opener: nix::unistd::Pid,
}

impl TapPort {
    /// Makes the interface, or takes one that is there, and opens a port on it whose frames are of `pool`.
    ///
    /// # Errors
    /// See [`TapError`]. Nothing is left behind.
    pub fn open(pool: &Arc<Pool>, config: &TapConfig) -> Result<Self, TapError> {
        config.check(pool)?;
        let Some(namespace) = &config.namespace else { return Self::open_here(pool, config) };
        let opened = within(namespace, || Self::open_here(pool, config));
        opened.map_err(|(what, source)| TapError::Namespace { name: config.name.clone(), what, source })?
    }

    fn open_here(pool: &Arc<Pool>, config: &TapConfig) -> Result<Self, TapError> {
        let name = config.name.as_str();
        let namespace = Namespace::current().map_err(TapError::os(name, "opening a netlink socket"))?;
        let mut descriptors = Vec::new();
        for queue in 0..config.queues {
            descriptors.push(attach(config, queue)?);
        }
        let interface = configure(&namespace, &descriptors, config)?;

        let lanes = lane_bytes(config.rx_ring) + lane_bytes(config.tx_ring);
        let bytes = usize::from(config.queues) * lanes;
        let region = Region::create(&RegionConfig::new(&format!("isoplane.tap.{name}"), bytes))?;
        let mut port = Self {
            max_frame: config.mtu.saturating_add(ETHERNET - 4),
            interface,
            segments: config.segments(),
            queues: Vec::new(),
            slots: Vec::new(),
            namespace,
            pool: Arc::clone(pool),
            opener: nix::unistd::getpid(),
        };
        for (at, descriptor) in descriptors.into_iter().enumerate() {
            let rx = Lane::new(&region, at * lanes, config.rx_ring)?;
            let tx = Lane::new(&region, at * lanes + lane_bytes(config.rx_ring), config.tx_ring)?;
            let slot = Arc::new(Slot::new(descriptor, rx, tx));
            // When this fails the port is dropped, and the queues that were opened are closed.
            port.queues.push(Some(open_queue(&slot, pool, config.rx_ring, port.segments)?));
            port.slots.push(slot);
        }
        // Last, so that nothing is left when something fails.
        if let Some(slot) = port.slots.first().filter(|_| config.persist) {
            sys::make_persistent(slot.descriptor()).map_err(TapError::os(name, "making it persistent"))?;
        }
        Ok(port)
    }

    /// Index of the interface in its namespace.
    #[must_use]
    pub const fn interface_index(&self) -> u32 {
        self.interface.index
    }
}

/// Lays the halves of a queue over its lanes, the receiving one with frames to receive into.
pub(super) fn open_queue(
    slot: &Arc<Slot>,
    pool: &Arc<Pool>,
    rx_ring: u32,
    segments: usize,
) -> Result<Queue, TapError> {
    let mover = |half| Mover::new(slot.lane(half), pool, segments);
    let (rx_mover, tx_mover) = (mover(Half::Rx)?, mover(Half::Tx)?);
    let (rx_lender, rx_collector) = pool.custody()?;
    let (tx_lender, tx_collector) = match pool.custody() {
        Ok(ends) => ends,
        Err(error) => {
            custody::end(rx_lender, rx_collector);
            return Err(error.into());
        }
    };
    // The rings are where the movers found theirs, so these do not fail.
    let (given, done) = slot.lane(Half::Rx).worker(rx_lender, rx_collector)?;
    let mut rx = TapRx::new(given, done, rx_mover, slot);
    let (given, done) = slot.lane(Half::Tx).worker(tx_lender, tx_collector)?;
    let tx = TapTx::new(given, done, tx_mover, slot);
    rx.prime(rx_ring);
    Ok(Queue { rx: rx.into(), tx: tx.into() })
}

/// Opens the driver and makes the interface, or joins a queue to it.
fn attach(config: &TapConfig, queue: u16) -> Result<OwnedFd, TapError> {
    let name = config.name.as_str();
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let descriptor = open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            TapError::NoDevice { name: name.to_owned(), source: errno }
        }
        errno => TapError::os(name, "opening /dev/net/tun")(errno),
    })?;
    let new = queue == 0 && !config.existing;
    sys::attach(descriptor.as_fd(), name, config.queues > 1, new).map_err(|errno| match errno {
        Errno::EBUSY | Errno::EEXIST => TapError::Taken { name: name.to_owned() },
        Errno::EINVAL => TapError::OtherKind { name: name.to_owned() },
        errno => TapError::os(name, "making a tap")(errno),
    })?;
    Ok(descriptor)
}

/// Gives the interface its properties; says what it is then.
fn configure(
    namespace: &Namespace,
    descriptors: &[OwnedFd],
    config: &TapConfig,
) -> Result<Interface, TapError> {
    let name = config.name.as_str();
    let ask = || namespace.by_name(name).map_err(TapError::os(name, "asking for the interface"));
    let now = ask()?;
    for descriptor in descriptors {
        sys::set_offloads(descriptor.as_fd()).map_err(TapError::os(name, "setting its offloads"))?;
    }
    if let Some((mac, descriptor)) = config.mac.filter(|mac| now.mac != Some(*mac)).zip(descriptors.first()) {
        sys::set_mac(descriptor.as_fd(), name, mac).map_err(|errno| match errno {
            Errno::EINVAL | Errno::EADDRNOTAVAIL => TapError::Refused {
                name: name.to_owned(),
                what: format!("Ethernet address {}", mac.map(|byte| format!("{byte:02x}")).join(":")),
                takes: "a unicast address that is not all zeroes",
            },
            errno => TapError::os(name, "setting its Ethernet address")(errno),
        })?;
    }
    if now.mtu != config.mtu {
        sys::set_mtu(namespace.control(), name, config.mtu).map_err(|errno| match errno {
            Errno::EINVAL => TapError::Refused {
                name: name.to_owned(),
                what: format!("MTU {}", config.mtu),
                takes: "68 to 65521",
            },
            errno => TapError::os(name, "setting its MTU")(errno),
        })?;
    }
    if config.up && !now.up {
        sys::switch_on(namespace.control(), name).map_err(TapError::os(name, "switching it on"))?;
    }
    ask()
}

impl Drop for TapPort {
    fn drop(&mut self) {
        if nix::unistd::getpid() != self.opener {
            // A child's copy: what it shares with the opener is not its to end.
            return;
        }
        for queue in self.queues.iter_mut().filter_map(Option::take) {
            queue.close();
        }
    }
}

impl Port for TapPort {
    fn name(&self) -> &str {
        &self.interface.name
    }

    fn driver(&self) -> &'static str {
        "tap"
    }

    fn capabilities(&self) -> Capabilities {
        let mut can = Capabilities::KICKS | Capabilities::TX_CHECKSUM;
        if self.segments > 1 {
            can |= Capabilities::MULTI_BUFFER;
        }
        can
    }

    fn mac(&self) -> Option<[u8; 6]> {
        self.interface.mac
    }

    fn max_frame(&self) -> u32 {
        self.max_frame
    }

    /// Up when the interface is switched on; gone when somebody has deleted it.
    fn link(&self) -> LinkState {
        if self.slots.first().is_some_and(|slot| !sys::is_attached(slot.descriptor())) {
            return LinkState::Gone;
        }
        match self.namespace.by_index(self.interface.index) {
            Ok(now) => now.link(),
            // It was moved to another namespace, and works there.
            Err(_) => LinkState::Unknown,
        }
    }

    fn statistics(&self) -> PortStatistics {
        let sum = |which| self.slots.iter().map(|slot| slot.counted(which)).fold(0, u64::wrapping_add);
        // The kernel drops what its own queue of the tap has no room for.
        let now = self.namespace.by_index(self.interface.index).map_or(0, |now| now.tx_dropped);
        PortStatistics {
            rx_ring_full: now.saturating_sub(self.interface.tx_dropped),
            rx_dropped: sum(Count::Dropped),
            tx_invalid: sum(Count::RefusedFrames),
            bad_descriptors: sum(Count::Bad),
            kicks: sum(Count::Kicks),
            kick_errors: sum(Count::Errors),
            ..PortStatistics::default()
        }
    }

    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn take_queue(&mut self, index: u16) -> Option<Queue> {
        self.queues.get_mut(usize::from(index))?.take()
    }

    fn kick_target(&self, index: u16) -> Option<Box<dyn KickTarget>> {
        let slot = self.slots.get(usize::from(index))?;
        let mover = |half| Mover::new(slot.lane(half), &self.pool, self.segments).ok();
        Some(Box::new(TapKick::new(slot, mover(Half::Rx)?, mover(Half::Tx)?)))
    }

    fn descriptors(&self) -> Vec<(Option<u16>, RawFd)> {
        let whole = self.namespace.descriptors().into_iter().map(|fd| (None, fd));
        let queues = (0..).zip(&self.slots).map(|(queue, slot)| (Some(queue), slot.descriptor().as_raw_fd()));
        whole.chain(queues).collect()
    }
}
