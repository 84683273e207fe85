//! What the kernel says about a network interface, asked over rtnetlink and ethtool.
//!
//! Contract: the sockets here belong to the network namespace of the thread that made them and keep
//! answering for it from any other thread, so a port can be asked for its link state after the thread
//! that opened it has left the namespace. Cold: each question is one request and its answer.

use super::sys;
use crate::LinkState;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, LinkXdp};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Mutex;

/// An interface as it was when it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) mtu: u32,
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) up: bool,
    pub(crate) carrier: bool,
    /// Queues as far as rtnetlink knows: those allocated, of which some may be switched off.
    queues: u32,
    /// Id of the XDP program that is attached.
    pub(crate) prog_id: Option<u32>,
    /// Packets of the kernel's that it could not hand over.
    pub(crate) tx_dropped: u64,
}

impl Interface {
    pub(crate) const fn link(&self) -> LinkState {
        if self.up && self.carrier { LinkState::Up } else { LinkState::Down }
    }
}

/// The way to ask about interfaces of one namespace.
#[derive(Debug)]
pub(crate) struct Namespace {
    netlink: Mutex<Socket>,
    ethtool: OwnedFd,
}

impl Namespace {
    /// Its descriptors.
    pub(crate) fn descriptors(&self) -> [RawFd; 2] {
        let netlink = self.netlink.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        [netlink.as_raw_fd(), self.ethtool.as_raw_fd()]
    }

    /// A socket in it, for requests that need any one.
    pub(crate) fn control(&self) -> BorrowedFd<'_> {
        self.ethtool.as_fd()
    }

    /// Of the calling thread.
    pub(crate) fn current() -> Result<Self, Errno> {
        let mut netlink = Socket::new(NETLINK_ROUTE).map_err(errno)?;
        netlink.bind_auto().map_err(errno)?;
        netlink.connect(&SocketAddr::new(0, 0)).map_err(errno)?;
        // The kernel answers within the request; the limit only keeps a surprise from hanging us.
        let second = libc::timeval { tv_sec: 1, tv_usec: 0 };
        let fd = netlink.as_raw_fd();
        sys::receive_timeout(fd, second)?;
        let ethtool = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .or_else(|_| socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, None))?;
        Ok(Self { netlink: Mutex::new(netlink), ethtool })
    }

    /// Asks by name.
    pub(crate) fn by_name(&self, name: &str) -> Result<Interface, Errno> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::IfName(name.to_owned()));
        self.ask(link)
    }

    /// Asks by index.
    pub(crate) fn by_index(&self, index: u32) -> Result<Interface, Errno> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        self.ask(link)
    }

    /// State of the link with that index, now.
    pub(crate) fn link(&self, index: u32) -> LinkState {
        match self.by_index(index) {
            Ok(interface) => interface.link(),
            Err(Errno::ENODEV | Errno::ENXIO) => LinkState::Gone,
            Err(_) => LinkState::Unknown,
        }
    }

    /// Queues that AF_XDP can bind to.
    pub(crate) fn queues(&self, interface: &Interface) -> u32 {
        match sys::queue_count(self.ethtool.as_fd(), &interface.name) {
            Ok(queues) if queues > 0 => queues,
            // Loopback and others have no such operation; they use all that they allocated.
            _ => interface.queues.max(1),
        }
    }

    fn ask(&self, link: LinkMessage) -> Result<Interface, Errno> {
        // A thread that panicked while asking leaves at worst an answer that we skip below.
        let socket = self.netlink.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::GetLink(link));
        message.header.flags = NLM_F_REQUEST;
        message.header.sequence_number = sys::sequence();
        let sequence = message.header.sequence_number;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        socket.send(&bytes, 0).map_err(errno)?;
        // An answer to an earlier question may still be there if that one timed out.
        for _ in 0..64 {
            let (answer, _) = socket.recv_from_full().map_err(errno)?;
            let message =
                NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(|_| Errno::EBADMSG)?;
            if message.header.sequence_number != sequence {
                continue;
            }
            return match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(read(&link)),
                NetlinkPayload::Error(error) => Err(Errno::from_raw(error.raw_code().saturating_neg())),
                _ => Err(Errno::EBADMSG),
            };
        }
        Err(Errno::ETIMEDOUT)
    }
}

/// Does `work` in another namespace: in this thread and back, so that a program with one thread has one all the time.
///
/// # Errors
/// What could not be done, and what the kernel said.
pub(crate) fn within<T>(namespace: &OwnedFd, work: impl FnOnce() -> T) -> Result<T, (&'static str, Errno)> {
    let home = File::open("/proc/thread-self/ns/net")
        .map_err(|e| ("opening the thread's network namespace", errno(e)))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|e| ("entering the network namespace", e))?;
    let done = work();
    setns(&home, CloneFlags::CLONE_NEWNET).map_err(|e| ("leaving the network namespace", e))?;
    Ok(done)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn read(link: &LinkMessage) -> Interface {
    let flags = link.header.flags;
    let mut interface = Interface {
        name: String::new(),
        index: link.header.index,
        mtu: 0,
        mac: None,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        queues: 1,
        prog_id: None,
        tx_dropped: 0,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::Address(address) => interface.mac = address.as_slice().try_into().ok(),
            LinkAttribute::NumRxQueues(n) | LinkAttribute::NumTxQueues(n) => {
                interface.queues = interface.queues.max(*n);
            }
            LinkAttribute::Stats64(stats) => interface.tx_dropped = stats.tx_dropped,
            LinkAttribute::Xdp(xdp) => {
                for what in xdp {
                    if let LinkXdp::ProgId(id)
                    | LinkXdp::DrvProgId(id)
                    | LinkXdp::SkbProgId(id)
                    | LinkXdp::HwProgId(id) = what
                    {
                        interface.prog_id = interface.prog_id.or((*id != 0).then_some(*id));
                    }
                }
            }
            _ => {}
        }
    }
    interface
}
