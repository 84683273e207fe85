//! What a router is told when it is made, and errors.

use crate::app::PortId;
use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

/// How often something may happen: a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Times a second on average; 0 for never, at most 10^9.
    pub per_second: u32,
    /// Times at once after a quiet while.
    pub burst: u32,
}

/// One port of a router's worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RouterPort {
    /// The port that leads to the kernel of the host (a TAP): what is the host's goes out there unchanged, and
    /// what comes in there leaves by this port unchanged. `None` where the kernel gets it by itself, before the
    /// worker (steering of AF_XDP ports), or not at all.
    pub punt: Option<PortId>,
}

/// Limits of what is handed to the host, for each port that packets come in by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PuntLimits {
    /// What the link needs: ARP, neighbour discovery and everything else that is no IP, multicast and
    /// broadcast, link-local destinations.
    pub link: Limit,
    /// Packets to the router's own addresses, and those with router alerts.
    pub local: Limit,
}

impl Default for PuntLimits {
    /// 20 000 packets a second and 512 at once for the link, 50 000 and 1024 for own addresses: what a kernel
    /// takes without being busy.
    fn default() -> Self {
        Self {
            link: Limit { per_second: 20_000, burst: 512 },
            local: Limit { per_second: 50_000, burst: 1024 },
        }
    }
}

/// Limits of ICMP and ICMPv6 error messages (RFC 1812, 4.3.2.8; RFC 4443, 2.4 (f)), a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpLimits {
    /// To everybody together.
    pub total: Limit,
    /// To one host, where hosts share a limit with those that have the same hash: so that one of them does not
    /// take what all others need for path MTU discovery.
    pub host: Limit,
}

impl Default for IcmpLimits {
    /// 1000 a second and 100 at once; to one host 50, and 20 at once.
    fn default() -> Self {
        Self { total: Limit { per_second: 1000, burst: 100 }, host: Limit { per_second: 50, burst: 20 } }
    }
}

/// How packets wait for neighbours whose Ethernet address is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResolutionLimits {
    /// Neighbours that packets wait for at the same time; a quarter of them is kept for gateways, so that a
    /// scan of a connected prefix does not keep routes from working. Up to 2^15.
    pub neighbours: u16,
    /// Frames that wait for one neighbour; the oldest packet makes room for a new one (RFC 1122, 2.3.2.2).
    pub frames_each: u16,
    /// Frames that wait for all of them together. Up to 2^15.
    pub frames: u16,
    /// The program is asked again for a neighbour after this time.
    pub retry: Duration,
    /// Packets are given up after this time, with ICMP host unreachable.
    pub timeout: Duration,
    /// Requests to the program for neighbours that are on link: a scan of a large prefix asks no more often.
    pub requests: Limit,
}

impl Default for ResolutionLimits {
    /// 256 neighbours, 32 frames each, 512 together; again after 1 s, given up after 3 s as the kernel does;
    /// 1000 requests a second.
    fn default() -> Self {
        Self {
            neighbours: 256,
            frames_each: 32,
            frames: 512,
            retry: Duration::from_secs(1),
            timeout: Duration::from_secs(3),
            requests: Limit { per_second: 1000, burst: 256 },
        }
    }
}

/// What a router is told. [`RouterConfig::new`] gives a router that does what the RFCs say where nothing is
/// configured.
///
/// All workers of a router are given clones of one configuration: its seed is chosen once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterConfig {
    /// The worker's ports, those to the host included; at most 255.
    pub ports: Vec<RouterPort>,
    /// Limits of what is handed to the host.
    pub punt: PuntLimits,
    /// Limits of error messages.
    pub icmp: IcmpLimits,
    /// How packets wait for neighbours.
    pub resolution: ResolutionLimits,
    /// Fragments that a turn makes at most; a packet that would need more is dropped.
    pub fragments_per_turn: u32,
    /// Free frames that are left alone, for receiving, when packets are fragmented or held.
    pub reserve: u32,
    /// Forward packets with IPv4 source routes that do not name this router next? They are dropped otherwise, with
    /// ICMP "source route failed" (RFC 1812, 5.3.13.4; RFC 7126, 4.3).
    pub source_route: bool,
    /// Write the router's address into IPv4 record route options (RFC 1812, 5.3.13.5)?
    pub record_route: bool,
    /// Punt packets with router alerts (RFC 2113, RFC 2711)? They are forwarded as if they had none otherwise
    /// (RFC 6398, 4.2).
    pub router_alert: bool,
    /// Forward IPv6 packets with routing headers of type 0 (RFC 5095)?
    pub routing_header_0: bool,
    /// Seed of the flow hash that chooses among several next hops.
    pub seed: u64,
}

impl RouterConfig {
    /// For ports none of which has one to the host.
    #[must_use]
    pub fn new(ports: usize) -> Self {
        Self {
            ports: vec![RouterPort::default(); ports],
            punt: PuntLimits::default(),
            icmp: IcmpLimits::default(),
            resolution: ResolutionLimits::default(),
            fragments_per_turn: 1024,
            reserve: 128,
            source_route: false,
            record_route: true,
            router_alert: true,
            routing_header_0: false,
            // The standard library's hasher keys come from the operating system's random source.
            seed: std::collections::hash_map::RandomState::new().build_hasher().finish(),
        }
    }

    pub(super) fn check(&self) -> Result<(), RouterError> {
        if self.ports.is_empty() || self.ports.len() > MOST_PORTS {
            return Err(RouterError::Ports { found: self.ports.len() });
        }
        for (index, port) in self.ports.iter().enumerate() {
            let Some(punt) = port.punt else { continue };
            let wrong = |why| Err(RouterError::Punt { port: index, punt, why });
            match self.ports.get(punt.index()) {
                None => return wrong("there is no such port"),
                Some(_) if punt.index() == index => return wrong("that is the port itself"),
                Some(host) if host.punt.is_some() => return wrong("that port has one itself"),
                Some(_) => {}
            }
            if self.ports.iter().filter(|other| other.punt == Some(punt)).count() > 1 {
                return wrong("another port has the same");
            }
        }
        let resolution = &self.resolution;
        let limit = |name, value: u16, most| match value {
            1.. if value <= most => Ok(()),
            _ => Err(RouterError::Resolution { name, value, most }),
        };
        limit("neighbours", resolution.neighbours, 1 << 15)?;
        limit("frames_each", resolution.frames_each, 1 << 15)?;
        limit("frames", resolution.frames, 1 << 15)
    }
}

/// Ports of a worker; the last number is not used.
const MOST_PORTS: usize = 255;

/// Why a router could not be made.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RouterError {
    /// Too many ports, or none.
    #[error("a router has 1 to {MOST_PORTS} ports, not {found}")]
    Ports {
        /// How many were asked for.
        found: usize,
    },
    /// A port to the host that cannot be one.
    #[error("port {port} cannot hand packets to the host by port {}: {why}", .punt.0)]
    Punt {
        /// The port.
        port: usize,
        /// Its port to the host.
        punt: PortId,
        /// Why not.
        why: &'static str,
    },
    /// A size of the resolution queues.
    #[error("resolution: {name} is {value}; it must be 1 to {most}")]
    Resolution {
        /// Which.
        name: &'static str,
        /// What it is.
        value: u16,
        /// What it may be at most.
        most: u16,
    },
}
