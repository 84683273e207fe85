//! The kernel's tables, followed: links, addresses, routes, neighbours and next-hop objects become the
//! router's [tables](crate::tables), so that `ip`, BIRD or FRR run it.
//!
//! A housekeeping thread of the program reads everything by rtnetlink, follows what changes, and makes the
//! kernel resolve the neighbours that workers [ask for](crate::blocks::router::Request). ARP and neighbour
//! discovery are the kernel's.
//!
//! ```no_run
//! use isoplane::sync::{Sync, SyncConfig};
//! use isoplane::tables::{Tables, TablesConfig};
//! use isoplane::PortId;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (writer, tables) = Tables::create("router", &TablesConfig::default())?;
//! let loaded = Sync::load(SyncConfig::new([("eth0", PortId(0)), ("eth1", PortId(1))]), writer)?;
//! // ... launch workers that read `tables` ...
//! # let (running, mailboxes): (isoplane::Running, Vec<isoplane::Mailbox<u64, _>>) = todo!();
//! let sync = loaded.start(mailboxes, running.epochs())?;
//! println!("{:?}", sync.status());
//! # Ok(()) }
//! ```
//!
//! What becomes of the kernel's things:
//!
//! | kernel | here |
//! |---|---|
//! | link of a port, 802.1Q sub-interface of one | [interface](crate::tables::interface); by its index while it lives, whatever it is renamed to |
//! | any other link | not ours: packets for it are punted, and the kernel forwards them |
//! | route: unicast, multipath, next-hop object or group | the neighbour's next hop, or a resilient group |
//! | route: local, broadcast, anycast | punted |
//! | route: blackhole, unreachable, prohibit; throw | the same; throw is unreachable, after other tables |
//! | route with encapsulation | punted |
//! | route by source or TOS, multicast route | not looked at; multicast is punted whole |
//! | several routes of a prefix | the lowest metric that has a path which is up |
//! | path over a link that is down | not used; without carrier: as `ignore_routes_with_linkdown` says, and not while the route has a path with carrier |
//! | neighbour, resolved (also stale) | forwarded to |
//! | neighbour, failed | failed for three seconds, then asked for again when a packet needs it |
//! | gateway of a route | resolved at once, and kept alive by the kernel (`NTF_EXT_MANAGED`, Linux 5.16) |
//!
//! Limits: rules (`ip rule`) are not followed, so a short prefix of the table `local` does not hide longer
//! ones of others; a gateway that does not answer stays in its groups, as with the kernel's
//! `fib_multipath_use_neigh` off; an interface needs an IPv6 link-local address for the kernel to resolve
//! IPv6 neighbours for us; on an AF_XDP port, packets for links that are not ours reach the kernel only by
//! a punt of the worker.
//!
//! Contract: no route is taken away that is still there, also while everything is read again: after an
//! overrun of the socket (`ENOBUFS`), and after changes of which the kernel says only half (an interface
//! that goes down takes its IPv4 routes along without a word). Workers are never waited for, nor made to
//! wait.

mod config;
mod decode;
mod follow;
mod model;
mod punt;
mod socket;
mod status;

pub use config::{Overrides, RouteTable, SyncConfig};
pub use status::SyncStatus;

use crate::blocks::router::Message;
use crate::housekeeping::{spawn, stay_on};
use crate::message::Mailbox;
use crate::tables::{Epochs, TablesWriter};
use bytemuck::Pod;
use follow::{Follower, Inbox};
use nix::errno::Errno;
use status::Counters;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Why the kernel's tables cannot be followed.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SyncError {
    /// The kernel does not let us.
    #[error("not permitted: {what}; this needs CAP_NET_ADMIN in the network namespace")]
    NotPermitted {
        /// What was tried.
        what: &'static str,
    },
    /// A system call failed.
    #[error("cannot {call}: {source}")]
    Os {
        /// What was tried.
        call: &'static str,
        /// The kernel's answer.
        source: Errno,
    },
}

/// Tables that hold what the kernel's do, not followed yet; made by [`Sync::load`].
pub struct Loaded {
    follower: Follower,
    counters: Arc<Counters>,
    cpus: Vec<usize>,
}

/// The thread that follows the kernel's tables. It ends when this is dropped; the tables stay as they are.
#[derive(Debug)]
pub struct Sync {
    counters: Arc<Counters>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Sync {
    /// Fills tables that nobody reads yet from the kernel's, in the network namespace of the calling
    /// thread, which is the only one needed: a dataplane can be launched afterwards, and changes in the
    /// meantime are not missed.
    ///
    /// Worker processes get a copy of all the memory that the program has when they are forked, so with tables
    /// of many routes better launch first, and [`start`](Self::start) then.
    ///
    /// # Errors
    /// See [`SyncError`].
    pub fn load(config: SyncConfig, tables: TablesWriter) -> Result<Loaded, SyncError> {
        let counters = Arc::new(Counters::default());
        let cpus = config.cpus.clone();
        let mut follower = Follower::open(config, tables, Arc::clone(&counters))?;
        follower.resync()?;
        Ok(Loaded { follower, counters, cpus })
    }

    /// Fills tables that workers read already, and follows. `mailboxes` are those that the workers' apps put
    /// their requests into; `epochs` are the running dataplane's.
    ///
    /// # Errors
    /// See [`SyncError`].
    pub fn start(
        config: SyncConfig,
        tables: TablesWriter,
        mailboxes: Vec<Mailbox<impl Pod + Send, Message>>,
        epochs: impl Epochs + Send + 'static,
    ) -> Result<Self, SyncError> {
        let counters = Arc::new(Counters::default());
        let cpus = config.cpus.clone();
        let mut follower = Follower::open(config, tables, Arc::clone(&counters))?;
        follower.set_epochs(Box::new(epochs));
        follower.resync()?;
        Loaded { follower, counters, cpus }.spawn(mailboxes)
    }

    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> SyncStatus {
        self.counters.status()
    }

    /// Ends the thread; the tables stay as they are.
    pub fn stop(mut self) -> SyncStatus {
        self.end();
        self.counters.status()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that follows the kernel's tables has panicked");
        }
    }
}

impl Drop for Sync {
    fn drop(&mut self) {
        self.end();
    }
}

impl Loaded {
    /// How it is doing.
    #[must_use]
    pub fn status(&self) -> SyncStatus {
        self.counters.status()
    }

    /// Follows from here on; see [`Sync::start`].
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn start(
        mut self,
        mailboxes: Vec<Mailbox<impl Pod + Send, Message>>,
        epochs: impl Epochs + Send + 'static,
    ) -> Result<Sync, SyncError> {
        self.follower.set_epochs(Box::new(epochs));
        self.spawn(mailboxes)
    }

    fn spawn(mut self, mailboxes: Vec<Mailbox<impl Pod + Send, Message>>) -> Result<Sync, SyncError> {
        let inbox = |mut mailbox: Mailbox<_, Message>| Box::new(move || mailbox.receive()) as Inbox;
        let mut inboxes: Vec<Inbox> = mailboxes.into_iter().map(inbox).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, counters) = (Arc::clone(&stop), Arc::clone(&self.counters));
        let thread = spawn("iso-sync", move || {
            stay_on(&self.cpus, "sync thread");
            self.follower.follow(&mut inboxes, &stopped);
        });
        match thread {
            Ok(thread) => Ok(Sync { counters, stop, thread: Some(thread) }),
            Err(_) => Err(SyncError::Os { call: "start a thread", source: Errno::EAGAIN }),
        }
    }
}
