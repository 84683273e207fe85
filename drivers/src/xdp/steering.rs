//! Which packets come to us; the rest goes to the Linux network stack.
//!
//! Contract: a rule matches a packet when all that it names holds; a [`Steering`] is a list of rules, any
//! of which may match. What is not named is not looked at. Packets too short to tell are the kernel's.

use super::error::XdpError;
use std::net::IpAddr;

/// Which packets a port takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Steering {
    /// All of them.
    #[default]
    Everything,
    /// Those that match one of the rules; with an empty list none, for a port that only sends.
    Matching(Vec<Rule>),
    /// Those that match none of the rules: the rest of the machine keeps what they name.
    Excluding(Vec<Rule>),
}

/// What a packet must have: everything that is set here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rule {
    /// EtherType: of the frame, or behind up to two VLAN tags. 0x8100 and 0x88a8 match tagged frames.
    pub ether_type: Option<u16>,
    /// An EtherType, behind up to two VLAN tags, that is neither IPv4's nor IPv6's: ARP, LLDP, and the like.
    pub not_ip: bool,
    /// IPv4 protocol, or IPv6 next header (extension headers are not walked).
    pub protocol: Option<u8>,
    /// Source port of TCP, UDP or SCTP. Fragments other than the first have none.
    pub source_port: Option<u16>,
    /// Destination port, likewise.
    pub destination_port: Option<u16>,
    /// Prefix of the source address.
    pub source: Option<Prefix>,
    /// Prefix of the destination address.
    pub destination: Option<Prefix>,
}

/// An IPv4 or IPv6 prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Any address in it.
    pub address: IpAddr,
    /// Leading bits that count: 0 to 32 or 128.
    pub length: u8,
}

impl Rule {
    /// All frames of an EtherType.
    #[must_use]
    pub const fn ether_type(ether_type: u16) -> Self {
        Self { ether_type: Some(ether_type), ..Self::any() }
    }

    /// All frames that are neither IPv4 nor IPv6 by their EtherType.
    #[must_use]
    pub const fn not_ip() -> Self {
        Self { not_ip: true, ..Self::any() }
    }

    /// All IP packets of a protocol.
    #[must_use]
    pub const fn protocol(protocol: u8) -> Self {
        Self { protocol: Some(protocol), ..Self::any() }
    }

    /// What goes to a TCP port.
    #[must_use]
    pub const fn tcp_port(port: u16) -> Self {
        Self { protocol: Some(6), destination_port: Some(port), ..Self::any() }
    }

    /// What goes to a UDP port.
    #[must_use]
    pub const fn udp_port(port: u16) -> Self {
        Self { protocol: Some(17), destination_port: Some(port), ..Self::any() }
    }

    /// What goes to an address in a prefix.
    #[must_use]
    pub const fn to(address: IpAddr, length: u8) -> Self {
        Self { destination: Some(Prefix { address, length }), ..Self::any() }
    }

    /// What comes from an address in a prefix.
    #[must_use]
    pub const fn from(address: IpAddr, length: u8) -> Self {
        Self { source: Some(Prefix { address, length }), ..Self::any() }
    }

    const fn any() -> Self {
        Self {
            ether_type: None,
            not_ip: false,
            protocol: None,
            source_port: None,
            destination_port: None,
            source: None,
            destination: None,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let prefixes = [self.source, self.destination];
        for prefix in prefixes.iter().flatten() {
            let bits = if prefix.address.is_ipv4() { 32 } else { 128 };
            if prefix.length > bits {
                return Err("the prefix is longer than the address; take at most 32 or 128 bits");
            }
        }
        if let [Some(a), Some(b)] = prefixes
            && a.address.is_ipv4() != b.address.is_ipv4()
        {
            return Err("source and destination are of different IP versions, so nothing can match");
        }
        let version =
            prefixes.iter().flatten().next().map(|p| if p.address.is_ipv4() { 0x0800 } else { 0x86dd });
        if let (Some(version), Some(ether_type)) = (version, self.ether_type)
            && version != ether_type
            && !is_vlan(ether_type)
        {
            return Err("the EtherType is not that of the prefix, so nothing can match");
        }
        let of_ip = version.is_some()
            || self.protocol.is_some()
            || self.source_port.is_some()
            || self.destination_port.is_some()
            || matches!(self.ether_type, Some(0x0800 | 0x86dd));
        if self.not_ip && of_ip {
            return Err("only IP packets have what it names, and it wants others, so nothing can match");
        }
        if *self == Self::any() {
            return Err("it names nothing; to take everything, use Steering::Everything");
        }
        Ok(())
    }
}

pub(super) const fn is_vlan(ether_type: u16) -> bool {
    matches!(ether_type, 0x8100 | 0x88a8)
}

impl Steering {
    /// Rules that a program holds at most.
    pub const MAX_RULES: usize = 256;

    pub(super) fn rules(&self) -> &[Rule] {
        match self {
            Self::Everything => &[],
            Self::Matching(rules) | Self::Excluding(rules) => rules,
        }
    }

    pub(super) fn check(&self, interface: &str) -> Result<(), XdpError> {
        let rules = self.rules();
        if rules.len() > Self::MAX_RULES {
            let interface = interface.to_owned();
            return Err(XdpError::TooManyRules { interface, rules: rules.len(), most: Self::MAX_RULES });
        }
        for (rule, what) in rules.iter().enumerate() {
            what.check().map_err(|why| XdpError::Rule { interface: interface.to_owned(), rule, why })?;
        }
        Ok(())
    }
}
