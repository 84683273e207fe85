//! veth pairs: two interfaces that are each other's wire.

use crate::link::{self, Link, Offloads};
use crate::netlink::Netlink;
use crate::{LabError, Namespace};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// One end of a pair to be made.
///
/// Unless told otherwise an end has one queue each way, MTU 1500, an address chosen by the kernel, its
/// transmit checksums and segmentation done in software (see [`Offloads`]), and is switched on.
#[derive(Debug, Clone)]
pub struct VethEnd<'a> {
    namespace: &'a Namespace,
    name: String,
    mac: Option<[u8; 6]>,
    mtu: u32,
    rx_queues: u32,
    tx_queues: u32,
    addresses: Vec<(IpAddr, u8)>,
    offloads: bool,
    up: bool,
}

impl<'a> VethEnd<'a> {
    /// An end called `name` (at most 15 bytes) in `namespace`.
    #[must_use]
    pub fn new(namespace: &'a Namespace, name: &str) -> Self {
        Self {
            namespace,
            name: name.to_owned(),
            mac: None,
            mtu: 1500,
            rx_queues: 1,
            tx_queues: 1,
            addresses: Vec::new(),
            offloads: false,
            up: true,
        }
    }

    /// Its Ethernet address.
    #[must_use]
    pub const fn mac(mut self, mac: [u8; 6]) -> Self {
        self.mac = Some(mac);
        self
    }

    /// Its MTU, in bytes without the Ethernet header.
    #[must_use]
    pub const fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Queues each way. With an XDP program the kernel wants at least as many receive queues here as
    /// the other end has transmit queues.
    #[must_use]
    pub const fn queues(mut self, rx: u32, tx: u32) -> Self {
        self.rx_queues = rx;
        self.tx_queues = tx;
        self
    }

    /// One more IPv4 or IPv6 address.
    #[must_use]
    pub fn address(mut self, address: impl Into<IpAddr>, prefix_length: u8) -> Self {
        self.addresses.push((address.into(), prefix_length));
        self
    }

    /// Leaves checksum and segmentation offloads on, as the kernel makes them: what is sent here then
    /// reaches an AF_XDP port at the other end without its checksum.
    #[must_use]
    pub const fn with_offloads(mut self) -> Self {
        self.offloads = true;
        self
    }

    /// Leaves the end switched off.
    #[must_use]
    pub const fn down(mut self) -> Self {
        self.up = false;
        self
    }

    fn message(&self) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(self.name.clone()),
            LinkAttribute::Mtu(self.mtu),
            LinkAttribute::NumRxQueues(self.rx_queues),
            LinkAttribute::NumTxQueues(self.tx_queues),
            LinkAttribute::NetNsFd(self.namespace.as_fd().as_raw_fd()),
        ];
        message.attributes.extend(self.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
        message
    }

    fn finish(&self) -> Result<Link<'a>, LabError> {
        let link = self.namespace.link(&self.name)?;
        if !self.offloads {
            link.set_offloads(Offloads::TX_CHECKSUM | Offloads::SEGMENTATION, false)?;
        }
        if self.up {
            link.up()?;
        }
        for (address, prefix_length) in &self.addresses {
            link.add_address(*address, *prefix_length)?;
        }
        Ok(link)
    }
}

/// How long the kernel may take to notice that both ends are on and to make addresses usable.
const CARRIER: Duration = Duration::from_secs(5);

/// Makes the pair, each end straight in its namespace; says the two links in the order given, ready to
/// carry frames when both ends are on. When anything fails nothing is left.
///
/// # Errors
/// What the kernel said, naming the interface.
pub fn pair<'a, 'b>(one: &VethEnd<'a>, other: &VethEnd<'b>) -> Result<(Link<'a>, Link<'b>), LabError> {
    let mut message = one.message();
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other.message()))),
    ]));
    link::create(&Netlink::open(one.namespace)?, &one.name, message)?;
    let finished = one.finish().and_then(|first| {
        let second = other.finish()?;
        if one.up && other.up {
            for link in [&first, &second] {
                if !link.wait_running(CARRIER)? {
                    let source = std::io::ErrorKind::TimedOut.into();
                    let link = link.name().to_owned();
                    return Err(LabError::Netlink { what: "waiting for the carrier of", link, source });
                }
            }
        }
        Ok((first, second))
    });
    if finished.is_err()
        && let Ok(half) = one.namespace.link(&one.name)
    {
        // The first error is the one to report.
        let _ = half.delete();
    }
    finished
}
