//! An interface in a namespace.

use crate::netlink::Netlink;
use crate::{LabError, Namespace, sys};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, LinkXdp, State};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// An interface, by its index: it stays the same one when it is renamed, and is gone when deleted.
#[derive(Debug, Clone)]
pub struct Link<'a> {
    namespace: &'a Namespace,
    name: String,
    index: u32,
}

/// What the kernel tells about an interface; counters are totals since it was made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkStatus {
    /// Its name.
    pub name: String,
    /// Its index in its namespace.
    pub index: u32,
    /// Ethernet address, where there is one.
    pub mac: Option<[u8; 6]>,
    /// Longest packet, without the Ethernet header, in bytes.
    pub mtu: u32,
    /// Switched on by the administrator.
    pub up: bool,
    /// Switched on, and the other end is too.
    pub running: bool,
    /// Transmit queues that were made.
    pub tx_queues: u32,
    /// Receive queues that were made.
    pub rx_queues: u32,
    /// Number of the XDP program that is attached, in whatever mode.
    pub xdp_program: Option<u32>,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets dropped on receive.
    pub rx_dropped: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets dropped on transmit.
    pub tx_dropped: u64,
}

bitflags::bitflags! {
    /// Work that the kernel leaves to the interface. veth does none of it: frames cross with their
    /// checksum missing, or larger than the MTU, and the kernel at the other end knows. AF_XDP does
    /// not carry that knowledge, so a frame forwarded by it would be broken.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Transport checksums on transmit.
        const TX_CHECKSUM = 1 << 0;
        /// Transport checksums on receive.
        const RX_CHECKSUM = 1 << 1;
        /// Segmentation by the interface (TSO) and by the kernel just before it (GSO).
        const SEGMENTATION = 1 << 2;
        /// Joining of received segments (GRO).
        const RECEIVE_JOINING = 1 << 3;
    }
}

impl<'a> Link<'a> {
    pub(crate) fn new(namespace: &'a Namespace, name: &str, index: u32) -> Self {
        Self { namespace, name: name.to_owned(), index }
    }

    /// The name that it was asked for by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index in its namespace.
    #[must_use]
    pub const fn index(&self) -> u32 {
        self.index
    }

    /// The namespace that it is in.
    #[must_use]
    pub const fn namespace(&self) -> &'a Namespace {
        self.namespace
    }

    /// Asks the kernel about it.
    ///
    /// # Errors
    /// [`LabError::NoSuchLink`] when it was deleted.
    pub fn status(&self) -> Result<LinkStatus, LabError> {
        let mut question = LinkMessage::default();
        question.header.index = self.index;
        one_status(&Netlink::open(self.namespace)?, &self.name, question)
    }

    /// Waits until both ends are on, the kernel has noticed, and IPv6 addresses may be used: it does all
    /// that in the background, and drops what is sent before. False when `timeout` passes first.
    ///
    /// # Errors
    /// As [`Link::status`].
    pub fn wait_running(&self, timeout: Duration) -> Result<bool, LabError> {
        let deadline = Instant::now() + timeout;
        while !(self.status()?.running && self.addresses_usable()?) {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(true)
    }

    /// Switches it on. What is sent before [`Link::wait_running`] says yes may be lost.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn up(&self) -> Result<(), LabError> {
        self.flags("switching on", LinkFlags::Up, true)
    }

    /// Switches it off.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn down(&self) -> Result<(), LabError> {
        self.flags("switching off", LinkFlags::Up, false)
    }

    /// Receives frames for any address, or only its own again.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_promiscuous(&self, on: bool) -> Result<(), LabError> {
        self.flags("changing the promiscuous mode of", LinkFlags::Promisc, on)
    }

    /// Receives all multicast frames, or only those asked for again.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_all_multicast(&self, on: bool) -> Result<(), LabError> {
        self.flags("changing the multicast mode of", LinkFlags::Allmulti, on)
    }

    /// Sets the longest packet, in bytes without the Ethernet header.
    ///
    /// # Errors
    /// What the kernel said: an XDP program may limit it.
    pub fn set_mtu(&self, mtu: u32) -> Result<(), LabError> {
        self.set("setting the MTU of", LinkAttribute::Mtu(mtu))
    }

    /// Sets its Ethernet address.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<(), LabError> {
        self.set("setting the Ethernet address of", LinkAttribute::Address(mac.to_vec()))
    }

    /// Gives it an address. An IPv6 address can be used when [`Link::wait_running`] says so: at once in a
    /// namespace made by [`Namespace::new`], after duplicate address detection elsewhere.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add_address(&self, address: IpAddr, prefix_length: u8) -> Result<(), LabError> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix_length;
        message.header.scope = AddressScope::Universe;
        message.header.index = self.index;
        message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        let message = RouteNetlinkMessage::NewAddress(message);
        self.change("adding an address to", message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Tells the kernel the Ethernet address of a neighbour for good, so that it never asks.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add_neighbour(&self, address: IpAddr, mac: [u8; 6]) -> Result<(), LabError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = self.index;
        message.header.state = NeighbourState::Permanent;
        let to = match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        };
        message.attributes =
            vec![NeighbourAttribute::Destination(to), NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
        let message = RouteNetlinkMessage::NewNeighbour(message);
        self.change("adding a neighbour to", message, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Moves it into another namespace, where it is switched off and without addresses. A device's interface
    /// comes back to the first namespace of all when that one ends; others end with it.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn move_to<'b>(&self, namespace: &'b Namespace) -> Result<Link<'b>, LabError> {
        let fd = namespace.as_fd().as_raw_fd();
        self.set("moving", LinkAttribute::NetNsFd(fd))?;
        namespace.link(&self.name)
    }

    /// Deletes it; a veth's other end goes with it.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn delete(self) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        self.change("deleting", RouteNetlinkMessage::DelLink(message), 0)
    }

    /// Switches offloads on or off.
    ///
    /// # Errors
    /// [`LabError::Offload`] names the one that could not be switched.
    pub fn set_offloads(&self, which: Offloads, on: bool) -> Result<(), LabError> {
        let socket = self.ioctl_socket()?;
        // Segmentation needs checksums, so it goes first when off and last when on.
        let mut commands = vec![
            (Offloads::SEGMENTATION, "TCP segmentation (TSO)", sys::ETHTOOL_STSO),
            (Offloads::SEGMENTATION, "segmentation (GSO)", sys::ETHTOOL_SGSO),
            (Offloads::RECEIVE_JOINING, "receive joining (GRO)", sys::ETHTOOL_SGRO),
            (Offloads::RX_CHECKSUM, "receive checksums", sys::ETHTOOL_SRXCSUM),
            (Offloads::TX_CHECKSUM, "transmit checksums", sys::ETHTOOL_STXCSUM),
        ];
        if on {
            commands.reverse();
        }
        for (_, what, command) in commands.into_iter().filter(|c| which.contains(c.0)) {
            sys::ethtool_set(&socket, &self.name, command, u32::from(on))
                .map_err(|source| LabError::Offload { what, link: self.name.clone(), source })?;
        }
        Ok(())
    }

    /// Which offloads are on.
    ///
    /// # Errors
    /// [`LabError::Offload`].
    pub fn offloads(&self) -> Result<Offloads, LabError> {
        let socket = self.ioctl_socket()?;
        let mut on = Offloads::empty();
        for (offload, what, command) in [
            (Offloads::TX_CHECKSUM, "transmit checksums", sys::ETHTOOL_GTXCSUM),
            (Offloads::RX_CHECKSUM, "receive checksums", sys::ETHTOOL_GRXCSUM),
            (Offloads::SEGMENTATION, "TCP segmentation (TSO)", sys::ETHTOOL_GTSO),
            (Offloads::SEGMENTATION, "segmentation (GSO)", sys::ETHTOOL_GGSO),
            (Offloads::RECEIVE_JOINING, "receive joining (GRO)", sys::ETHTOOL_GGRO),
        ] {
            let value = sys::ethtool_get(&socket, &self.name, command)
                .map_err(|source| LabError::Offload { what, link: self.name.clone(), source })?;
            on.set(offload, on.contains(offload) || value != 0);
        }
        Ok(on)
    }

    /// An IPv6 address is tentative until the kernel, in the background, has joined the multicast group
    /// that neighbours ask for it in. (One added with `IFA_F_NODAD` never says that it is not there yet.)
    fn addresses_usable(&self) -> Result<bool, LabError> {
        let mut question = AddressMessage::default();
        question.header.family = AddressFamily::Inet6;
        question.header.index = self.index;
        let question = RouteNetlinkMessage::GetAddress(question);
        let netlink = Netlink::open(self.namespace)?;
        let answers = netlink.ask("asking about the addresses of", &self.name, question, NLM_F_DUMP)?;
        Ok(!answers.iter().any(|answer| match answer {
            RouteNetlinkMessage::NewAddress(address) => {
                address.header.index == self.index
                    && address.header.flags.contains(AddressHeaderFlags::Tentative)
            }
            _ => false,
        }))
    }

    fn ioctl_socket(&self) -> Result<std::net::UdpSocket, LabError> {
        let inside = self.namespace.enter()?;
        let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0));
        inside.leave()?;
        socket.map_err(|e| LabError::socket("opening a socket for interface requests", e))
    }

    fn flags(&self, what: &'static str, flag: LinkFlags, on: bool) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.change_mask = flag;
        message.header.flags = if on { flag } else { LinkFlags::empty() };
        self.change(what, RouteNetlinkMessage::SetLink(message), 0)
    }

    fn set(&self, what: &'static str, attribute: LinkAttribute) -> Result<(), LabError> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.attributes.push(attribute);
        self.change(what, RouteNetlinkMessage::SetLink(message), 0)
    }

    fn change(&self, what: &'static str, message: RouteNetlinkMessage, flags: u16) -> Result<(), LabError> {
        Netlink::open(self.namespace)?.change(what, &self.name, message, flags)
    }
}

const fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Makes an interface; see `veth`.
pub(crate) fn create(netlink: &Netlink, name: &str, message: LinkMessage) -> Result<(), LabError> {
    netlink.change("making", name, RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Asks about the interface of this name.
pub(crate) fn status_by_name(netlink: &Netlink, name: &str) -> Result<LinkStatus, LabError> {
    let mut question = LinkMessage::default();
    question.attributes.push(LinkAttribute::IfName(name.to_owned()));
    one_status(netlink, name, question)
}

/// Asks about all interfaces.
pub(crate) fn all(netlink: &Netlink) -> Result<Vec<LinkStatus>, LabError> {
    let question = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = netlink.ask("listing", "interfaces", question, NLM_F_DUMP)?;
    Ok(answers.iter().filter_map(parse).collect())
}

fn one_status(netlink: &Netlink, name: &str, question: LinkMessage) -> Result<LinkStatus, LabError> {
    const WHAT: &str = "asking about";
    let answers = netlink.ask(WHAT, name, RouteNetlinkMessage::GetLink(question), 0)?;
    answers.iter().find_map(parse).ok_or_else(|| LabError::Answer {
        what: WHAT,
        link: name.to_owned(),
        reason: "it does not describe an interface".to_owned(),
    })
}

fn parse(message: &RouteNetlinkMessage) -> Option<LinkStatus> {
    let RouteNetlinkMessage::NewLink(link) = message else { return None };
    let mut status = LinkStatus {
        index: link.header.index,
        up: link.header.flags.contains(LinkFlags::Up),
        running: link.header.flags.contains(LinkFlags::Running),
        ..LinkStatus::default()
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => status.name.clone_from(name),
            LinkAttribute::Address(mac) => status.mac = mac.as_slice().try_into().ok(),
            LinkAttribute::Mtu(mtu) => status.mtu = *mtu,
            LinkAttribute::OperState(State::Down | State::LowerLayerDown) => status.running = false,
            LinkAttribute::NumTxQueues(n) => status.tx_queues = *n,
            LinkAttribute::NumRxQueues(n) => status.rx_queues = *n,
            LinkAttribute::Xdp(xdp) => status.xdp_program = xdp_program(xdp),
            LinkAttribute::Stats64(stats) => {
                status.rx_packets = stats.rx_packets;
                status.rx_bytes = stats.rx_bytes;
                status.rx_dropped = stats.rx_dropped;
                status.tx_packets = stats.tx_packets;
                status.tx_bytes = stats.tx_bytes;
                status.tx_dropped = stats.tx_dropped;
            }
            _ => {}
        }
    }
    Some(status)
}

/// Is the XDP program of this number (see [`LinkStatus::xdp_program`]) still in the kernel? To be asked
/// after whoever attached it is gone.
///
/// # Errors
/// [`LabError::NotPermitted`] without `CAP_SYS_ADMIN`.
pub fn xdp_program_exists(id: u32) -> Result<bool, LabError> {
    sys::bpf_program_exists(id).map_err(|e| LabError::socket("asking for a BPF program", e))
}

fn xdp_program(attributes: &[LinkXdp]) -> Option<u32> {
    attributes.iter().find_map(|attribute| match attribute {
        LinkXdp::ProgId(id) | LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id)
            if *id != 0 =>
        {
            Some(*id)
        }
        _ => None,
    })
}
