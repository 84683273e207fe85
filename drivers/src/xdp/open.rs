//! Opening one queue: socket, rings, UMEM, bind.
//!
//! Contract: the fill ring is filled before the socket is bound, since some drivers look only then;
//! after it when the UMEM is shared, since only then the kernel gives the ring its device. A queue that
//! somebody has just closed is still taken for a while: bind is tried again for up to a second.
//! Whatever fails leaves nothing behind.

use super::bpf::Attachment;
use super::config::Want;
use super::error::XdpError;
use super::layout::{XDP_COPY, XDP_SHARED_UMEM, XDP_USE_NEED_WAKEUP, XDP_USE_SG, XDP_ZEROCOPY};
use super::queue::{TxRules, XdpRx, XdpTx};
use super::release::Probe;
use super::slot::Slot;
use super::socket::{RingSizes, Socket};
use super::sys;
use super::umem::Geometry;
use crate::queue::Queue;
use isoplane_memory::ring::{Consumer, Producer};
use isoplane_memory::{Custody, Inbox, Outbox, Pool};
use nix::errno::Errno;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long bind is tried again while the kernel still holds the queue of a socket that was closed.
const PATIENCE: Duration = Duration::from_secs(1);

/// What all queues of a port have in common.
pub(super) struct Plan<'a> {
    pub(super) interface: &'a str,
    pub(super) ifindex: u32,
    pub(super) pool: &'a Arc<Pool>,
    pub(super) attachment: &'a Arc<Attachment>,
    pub(super) geometry: Geometry,
    pub(super) sizes: RingSizes,
    pub(super) need_wakeup: bool,
    pub(super) multi_buffer: bool,
    /// Frames that a packet may have then.
    pub(super) segments: usize,
    pub(super) share: Want,
}

/// A queue that is open.
pub(super) struct Opened {
    pub(super) queue: Queue,
    pub(super) slot: Arc<Slot>,
    pub(super) shared: bool,
}

/// A bound socket whose UMEM others may use.
struct Shareable {
    pool: Weak<Pool>,
    socket: Weak<Socket>,
    geometry: Geometry,
    zero_copy: bool,
    need_wakeup: bool,
    multi_buffer: bool,
}

/// The sockets of this process whose UMEM may be shared. Cold: looked at when a port is opened.
static SHAREABLE: Mutex<Vec<Shareable>> = Mutex::new(Vec::new());

impl Plan<'_> {
    /// Opens a queue in zero-copy or copy mode.
    pub(super) fn open(&self, queue: u32, zero_copy: bool) -> Result<Opened, XdpError> {
        if self.share != Want::Never {
            for owner in self.owners(zero_copy) {
                match self.open_with(queue, zero_copy, Some(&owner)) {
                    // The owner's device is gone, or the device does not go with the owner's: the
                    // next one, or a UMEM of our own.
                    Err(XdpError::Os {
                        source: Errno::EBADF | Errno::EOPNOTSUPP | Errno::EINVAL, ..
                    }) => {}
                    done => return done,
                }
            }
        }
        if self.share == Want::Require && self.has_owners() {
            return Err(XdpError::Required {
                interface: self.interface.to_owned(),
                what: "sharing the pool's UMEM",
                why: "no open AF_XDP port on this pool has the same mode (zero-copy, need-wakeup, \
                      multi-buffer, chunk layout); open them alike"
                    .to_owned(),
            });
        }
        self.open_with(queue, zero_copy, None)
    }

    fn owners(&self, zero_copy: bool) -> Vec<Arc<Socket>> {
        let mut list = SHAREABLE.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|s| s.socket.strong_count() != 0 && s.pool.strong_count() != 0);
        let fits = |s: &&Shareable| {
            s.geometry == self.geometry
                && s.zero_copy == zero_copy
                && s.need_wakeup == self.need_wakeup
                && s.multi_buffer == self.multi_buffer
                && s.pool.upgrade().is_some_and(|pool| pool.same_as(self.pool))
        };
        list.iter().filter(fits).filter_map(|s| s.socket.upgrade()).collect()
    }

    fn has_owners(&self) -> bool {
        let list = SHAREABLE.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().any(|s| {
            s.socket.strong_count() != 0 && s.pool.upgrade().is_some_and(|pool| pool.same_as(self.pool))
        })
    }

    fn open_with(
        &self,
        queue: u32,
        zero_copy: bool,
        owner: Option<&Arc<Socket>>,
    ) -> Result<Opened, XdpError> {
        let fail = |call| XdpError::os(self.interface, call);
        let fd = sys::socket().map_err(|errno| match errno {
            Errno::EAFNOSUPPORT => XdpError::NoAfXdp,
            errno => XdpError::permission(self.interface, "opening an AF_XDP socket", "CAP_NET_RAW")(errno),
        })?;
        let (attachment, pool) = (Arc::clone(self.attachment), Arc::clone(self.pool));
        let socket = Socket::new(fd, queue, self.sizes, attachment, pool, self.need_wakeup)
            .map_err(|(call, errno)| fail(call)(errno))?;
        let socket = Arc::new(socket);
        if owner.is_none() {
            self.register(&socket)?;
        }
        let custody = || {
            let failed = |source| XdpError::Pool { interface: self.interface.to_owned(), source };
            self.pool.custody().map_err(failed)
        };
        let rx = custody()?;
        let tx = match custody() {
            Ok(tx) => tx,
            Err(error) => {
                let (lender, collector) = rx;
                isoplane_memory::custody::end(lender, collector);
                return Err(error);
            }
        };
        let mut opened = self.assemble(&socket, rx, tx)?;
        opened.shared = owner.is_some();
        // From here on closing the queue undoes everything.
        let bound = self.bind(&socket, zero_copy, owner, &mut opened);
        drop(socket);
        if let Err(error) = bound {
            opened.queue.close();
            return Err(error);
        }
        Ok(opened)
    }

    fn register(&self, socket: &Socket) -> Result<(), XdpError> {
        let interface = || self.interface.to_owned();
        let registration = self.geometry.registration(self.pool);
        socket.register(&registration).map_err(|errno| match errno {
            Errno::EINVAL if self.geometry.has_tx_metadata() => XdpError::Required {
                interface: interface(),
                what: "TX metadata",
                why: "the kernel knows it since Linux 6.8".to_owned(),
            },
            Errno::EINVAL => XdpError::ChunkSize {
                interface: interface(),
                chunk: self.geometry.chunk(),
                unaligned: self.geometry.unaligned(),
            },
            Errno::ENOBUFS => XdpError::LockedMemory {
                interface: interface(),
                pool: self.pool.name().to_owned(),
                bytes: registration.len,
            },
            errno => XdpError::os(self.interface, "setsockopt(XDP_UMEM_REG)")(errno),
        })
    }

    /// Puts rings and custodies together.
    pub(super) fn assemble(
        &self,
        socket: &Arc<Socket>,
        rx: Custody,
        tx: Custody,
    ) -> Result<Opened, XdpError> {
        let rings = socket.rings().map_err(|_| XdpError::os(self.interface, "ring sizes")(Errno::EINVAL))?;
        let slot = Slot::new(socket);
        let geometry = self.geometry;
        let rules = TxRules {
            room: geometry.tx_room(),
            segments: if self.multi_buffer { self.segments } else { 1 },
            metadata: geometry.has_tx_metadata(),
        };
        let rx_half = XdpRx::new(
            Outbox::new(Producer::new(rings.fill), rx.0),
            Inbox::new(Consumer::new(rings.rx), rx.1),
            geometry,
            Arc::clone(socket),
            Arc::clone(&slot),
        );
        let tx_half = XdpTx::new(
            Outbox::new(Producer::new(rings.tx), tx.0),
            Inbox::new(Consumer::new(rings.completion), tx.1),
            rules,
            Arc::clone(socket),
            Arc::clone(&slot),
        );
        Ok(Opened { queue: Queue { rx: rx_half.into(), tx: tx_half.into() }, slot, shared: false })
    }

    fn bind(
        &self,
        socket: &Arc<Socket>,
        zero_copy: bool,
        owner: Option<&Arc<Socket>>,
        opened: &mut Opened,
    ) -> Result<(), XdpError> {
        let mut flags = if zero_copy { XDP_ZEROCOPY } else { XDP_COPY };
        if self.need_wakeup {
            flags |= XDP_USE_NEED_WAKEUP;
        }
        if self.multi_buffer {
            flags |= XDP_USE_SG;
        }
        if owner.is_none() {
            self.prime(opened)?;
        } else {
            // The modes are the owner's; the kernel takes no others.
            flags = XDP_SHARED_UMEM;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match socket.bind(self.ifindex, flags, owner.map(|owner| owner.as_fd())) {
                Ok(()) => break,
                Err(Errno::EBUSY) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::EBUSY) => {
                    let interface = self.interface.to_owned();
                    return Err(XdpError::QueueBusy { interface, queue: socket.queue() });
                }
                Err(errno) => {
                    return Err(XdpError::permission(
                        self.interface,
                        "binding an AF_XDP socket",
                        "CAP_NET_RAW",
                    )(errno));
                }
            }
        }
        if socket.zero_copy() {
            let probe = Probe::new(self.ifindex, socket.queue());
            opened.slot.guard(probe.map_err(XdpError::os(self.interface, "a second AF_XDP socket"))?);
        }
        if owner.is_some() {
            self.prime(opened)?;
        } else {
            SHAREABLE.lock().unwrap_or_else(PoisonError::into_inner).push(Shareable {
                pool: Arc::downgrade(self.pool),
                socket: Arc::downgrade(socket),
                geometry: self.geometry,
                zero_copy: socket.zero_copy(),
                need_wakeup: self.need_wakeup,
                multi_buffer: self.multi_buffer,
            });
        }
        socket.enlist().map_err(XdpError::os(self.interface, "adding the socket to the map"))
    }

    fn prime(&self, opened: &mut Opened) -> Result<(), XdpError> {
        let crate::AnyRx::Xdp(rx) = &mut opened.queue.rx else { return Ok(()) };
        let primed = rx.prime(self.sizes.fill as usize) as u32;
        if primed < self.sizes.fill {
            return Err(XdpError::PoolTooSmall {
                interface: self.interface.to_owned(),
                queues: 1,
                fill: self.sizes.fill,
                needed: self.sizes.fill,
                pool: self.pool.name().to_owned(),
                left: primed + self.pool.in_depot(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
impl<'a> Plan<'a> {
    /// A plan for a socket on plain memory.
    pub(super) fn plain(
        pool: &'a Arc<Pool>,
        socket: &'a Socket,
        geometry: Geometry,
        sizes: RingSizes,
    ) -> Self {
        Plan {
            interface: "plain",
            ifindex: 0,
            pool,
            attachment: socket.attachment(),
            geometry,
            sizes,
            need_wakeup: true,
            multi_buffer: true,
            segments: 17,
            share: Want::Never,
        }
    }
}
