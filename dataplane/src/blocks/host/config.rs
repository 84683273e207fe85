//! What a host is told, and what can be wrong with it.

use crate::app::PortId;
use crate::wire::ethernet::MacAddress;
use ipnet::IpNet;
use std::net::IpAddr;
use std::time::Duration;

/// How to make a [`Host`](super::Host).
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// The worker's port that it is on.
    pub port: PortId,
    /// Its VLAN; `None` for untagged frames.
    pub vlan: Option<u16>,
    /// Its Ethernet address: the port's.
    pub mac: MacAddress,
    /// Longest IP packet, in bytes: 576 to 9216, and no longer than a frame of the pool has room for.
    pub mtu: u16,
    /// Its addresses with the prefixes that are on the link; at most [`HostConfig::MOST_ADDRESSES`].
    pub addresses: Vec<IpNet>,
    /// Where packets to other addresses go, at most one for each IP version.
    pub gateways: Vec<IpAddr>,
    /// TCP ports that are listened on.
    pub listeners: Vec<Listener>,
    /// UDP ports that are open.
    pub datagrams: Vec<UdpPort>,
    /// Connections at the same time, those that are closing included.
    pub connections: u32,
    /// Bytes of a connection's receive buffer: the largest window it offers.
    pub receive_buffer: u32,
    /// Bytes of a connection's transmit buffer.
    pub transmit_buffer: u32,
    /// A peer that answers nothing for so long is gone; also how long a handshake may take.
    pub timeout: Duration,
    /// Asks a silent peer whether it is still there each time that it has said nothing for so long.
    pub keep_alive: Option<Duration>,
    /// How long an acknowledgement waits for data that could carry it; `None` for not at all.
    pub ack_delay: Option<Duration>,
    /// Holds small segments back while others are on their way (RFC 896). Off: what is written is sent.
    pub nagle: bool,
    /// Packets sent in a turn at most.
    pub burst: u32,
    /// Connections looked at in a turn at most because of their timers.
    pub timers_a_turn: u32,
    /// Makes initial sequence numbers and the hash of flows hard to guess; `None` takes it from the kernel.
    pub seed: Option<u64>,
}

/// A TCP port that is listened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    /// The port.
    pub port: u16,
    /// Connections whose handshake is not over, at most: beyond that the oldest of them makes room, so that a
    /// flood of SYNs leaves each of them the time that it takes to be answered.
    pub backlog: u32,
}

/// A UDP port that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpPort {
    /// The port.
    pub port: u16,
    /// Datagrams that wait at most, each way.
    pub datagrams: u32,
    /// Bytes that wait at most, each way.
    pub bytes: u32,
}

impl HostConfig {
    /// Addresses at most.
    pub const MOST_ADDRESSES: usize = 8;
    /// TCP and UDP ports at most, of each.
    pub const MOST_PORTS: usize = 64;

    /// A host with an Ethernet address on the worker's first port, and nothing else yet.
    #[must_use]
    pub const fn new(mac: MacAddress) -> Self {
        Self {
            port: PortId(0),
            vlan: None,
            mac,
            mtu: 1500,
            addresses: Vec::new(),
            gateways: Vec::new(),
            listeners: Vec::new(),
            datagrams: Vec::new(),
            connections: 1024,
            receive_buffer: 16 << 10,
            transmit_buffer: 16 << 10,
            timeout: Duration::from_secs(30),
            keep_alive: None,
            ack_delay: Some(Duration::from_millis(10)),
            nagle: false,
            burst: 256,
            timers_a_turn: 64,
            seed: None,
        }
    }

    /// Adds an address with the prefix that is on the link.
    #[must_use]
    pub fn address(mut self, address: IpNet) -> Self {
        self.addresses.push(address);
        self
    }

    /// Listens on a TCP port, with room for 256 handshakes.
    #[must_use]
    pub fn listen(mut self, port: u16) -> Self {
        self.listeners.push(Listener { port, backlog: 256 });
        self
    }

    /// Opens a UDP port, with room for 256 datagrams and 256 KiB each way.
    #[must_use]
    pub fn udp(mut self, port: u16) -> Self {
        self.datagrams.push(UdpPort { port, datagrams: 256, bytes: 256 << 10 });
        self
    }

    /// Checks what can be wrong.
    pub(super) fn check(&self) -> Result<(), HostError> {
        let range = |what, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(HostError::Range { what, value, least, most }),
        };
        if !self.mac.is_station() {
            return Err(HostError::Mac { mac: self.mac });
        }
        range("mtu", self.mtu.into(), 576, 9216)?;
        range("vlan", self.vlan.unwrap_or(1).into(), 1, 4094)?;
        range("connections", self.connections.into(), 1, 1 << 20)?;
        range("receive_buffer", self.receive_buffer.into(), 512, 1 << 26)?;
        range("transmit_buffer", self.transmit_buffer.into(), 512, 1 << 26)?;
        range("burst", self.burst.into(), 1, 4096)?;
        range("timers_a_turn", self.timers_a_turn.into(), 1, 4096)?;
        range("number of addresses", self.addresses.len() as u64, 0, Self::MOST_ADDRESSES as u64)?;
        range("number of listeners", self.listeners.len() as u64, 0, Self::MOST_PORTS as u64)?;
        range("number of UDP ports", self.datagrams.len() as u64, 0, Self::MOST_PORTS as u64)?;
        if let Some(v6) = self.addresses.iter().find(|a| matches!(a, IpNet::V6(_)) && self.mtu < 1280) {
            return Err(HostError::Mtu6 { mtu: self.mtu, address: *v6 });
        }
        for address in &self.addresses {
            let unicast = match address.addr() {
                IpAddr::V4(a) => !(a.is_unspecified() || a.is_broadcast() || a.is_multicast()),
                IpAddr::V6(a) => !(a.is_unspecified() || a.is_multicast()),
            };
            if !unicast {
                return Err(HostError::Address { address: *address });
            }
        }
        for (n, gateway) in self.gateways.iter().enumerate() {
            if self.gateways[..n].iter().any(|other| other.is_ipv4() == gateway.is_ipv4()) {
                return Err(HostError::Gateways { gateway: *gateway });
            }
            if !self.addresses.iter().any(|net| net.contains(gateway)) {
                return Err(HostError::GatewayOffLink { gateway: *gateway });
            }
        }
        let mut tcp: Vec<u16> = self.listeners.iter().map(|l| l.port).collect();
        let mut udp: Vec<u16> = self.datagrams.iter().map(|u| u.port).collect();
        for (protocol, ports) in [("TCP", &mut tcp), ("UDP", &mut udp)] {
            ports.sort_unstable();
            if ports.first() == Some(&0) {
                return Err(HostError::Port { protocol, port: 0 });
            }
            if let Some(pair) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(HostError::Port { protocol, port: pair[0] });
            }
        }
        for listener in &self.listeners {
            range("backlog", listener.backlog.into(), 1, self.connections.into())?;
        }
        for udp in &self.datagrams {
            range("datagrams of a UDP port", udp.datagrams.into(), 1, 1 << 16)?;
            range("bytes of a UDP port", udp.bytes.into(), 64, 1 << 26)?;
        }
        Ok(())
    }
}

/// What is wrong with a host's configuration.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostError {
    /// A number that makes no sense.
    #[error("host: {what} is {value}; it can be {least} to {most}")]
    Range {
        /// Which.
        what: &'static str,
        /// What it is.
        value: u64,
        /// The least.
        least: u64,
        /// The most.
        most: u64,
    },
    /// The Ethernet address is a group's, or zero.
    #[error("host: {mac} is not the address of a station; take the port's own")]
    Mac {
        /// The address.
        mac: MacAddress,
    },
    /// IPv6 wants 1280 bytes (RFC 8200 section 5).
    #[error("host: the MTU is {mtu}, but IPv6 ({address}) needs at least 1280")]
    Mtu6 {
        /// The MTU.
        mtu: u16,
        /// The address.
        address: IpNet,
    },
    /// Not an address of one host.
    #[error("host: {address} is not the address of a host")]
    Address {
        /// The address.
        address: IpNet,
    },
    /// Two gateways of one IP version.
    #[error("host: {gateway} is the second gateway of its IP version; one is enough")]
    Gateways {
        /// The second.
        gateway: IpAddr,
    },
    /// The gateway cannot be reached.
    #[error("host: the gateway {gateway} is in no prefix of the host's addresses")]
    GatewayOffLink {
        /// The gateway.
        gateway: IpAddr,
    },
    /// Port 0, or twice the same.
    #[error("host: {protocol} port {port} is there twice, or is 0")]
    Port {
        /// TCP or UDP.
        protocol: &'static str,
        /// The port.
        port: u16,
    },
    /// The kernel gives no random numbers.
    #[error("host: getrandom: {0}; set a seed")]
    Random(nix::errno::Errno),
}
