//! What a bridge is told, and what is wrong with it.

use super::fdb::{CAPACITY, MAX_PORTS, WhenFull};
use super::flood::FloodLimits;
use super::vlan::PortVlans;
use crate::app::PortId;
use crate::wire::{MacAddress, VlanId};
use std::time::Duration;

/// How to make a [`Bridge`](super::Bridge). Start from [`BridgeConfig::new`].
#[derive(Debug, Clone)]
pub struct BridgeConfig {
    /// The bridge's ports, in the order of the worker's: at most 64.
    pub ports: Vec<BridgePort>,
    /// One entry a port for a bridge that knows VLANs, each with its own stations. `None`: tags are
    /// payload, and all ports are one network.
    pub vlans: Option<Vec<PortVlans>>,
    /// How long a station stays known after its last packet: 1 s to 1 000 000 s, 300 s by default
    /// (IEEE 802.1Q-2022 table 8-8).
    pub ageing: Duration,
    /// Stations that fit; rounded up to a power of two, 8 to 1 048 576. 16 bytes each.
    pub capacity: usize,
    /// What happens to a new station when its place is taken.
    pub when_full: WhenFull,
    /// Seed of the table's hash. `None`: random, which is what protects from stations that choose
    /// their addresses to collide.
    pub seed: Option<u64>,
    /// Limits of flooding.
    pub flood: FloodLimits,
    /// Which reserved addresses 01-80-C2-00-00-0X are forwarded all the same: bit X. Bit 1 (PAUSE)
    /// cannot be set, IEEE 802.3 annex 31B forbids it. 0 by default: all of them are dropped.
    pub forward_reserved: u16,
    /// Addresses of our own: a packet from one is a loop or a lie, a packet to one is for nobody else;
    /// both are dropped.
    pub own: Vec<MacAddress>,
    /// Stations that are known from the start, never age and never move.
    pub stations: Vec<StaticStation>,
}

/// One port of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BridgePort {
    /// Isolated ports do not reach each other, only ports that are not isolated.
    pub isolated: bool,
    /// Are stations learned here?
    pub learn: bool,
    /// Stations that may be learned here at most, so that one port cannot take the whole table.
    pub max_stations: u32,
}

impl Default for BridgePort {
    /// Not isolated, learns without a limit of its own.
    fn default() -> Self {
        Self { isolated: false, learn: true, max_stations: u32::MAX }
    }
}

/// A station that is known from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StaticStation {
    /// Its address.
    pub mac: MacAddress,
    /// Its VLAN; `None` on a bridge that ignores VLANs.
    pub vlan: Option<VlanId>,
    /// Where it is.
    pub port: PortId,
}

impl BridgeConfig {
    /// A bridge of `ports` ports that ignores VLANs, for 8192 stations.
    #[must_use]
    pub fn new(ports: usize) -> Self {
        Self {
            ports: vec![BridgePort::default(); ports],
            vlans: None,
            ageing: Duration::from_secs(300),
            capacity: 8192,
            when_full: WhenFull::default(),
            seed: None,
            flood: FloodLimits::default(),
            forward_reserved: 0,
            own: Vec::new(),
            stations: Vec::new(),
        }
    }

    pub(super) fn check(&self) -> Result<(), BridgeError> {
        let ports = self.ports.len();
        if ports == 0 || ports > MAX_PORTS {
            return Err(BridgeError::Ports { ports });
        }
        if !CAPACITY.contains(&self.capacity) {
            return Err(BridgeError::Capacity { capacity: self.capacity });
        }
        self.check_limits()?;
        if let Some(mac) = self.own.iter().copied().find(|mac| !mac.is_station()) {
            return Err(BridgeError::Address { mac });
        }
        let vlans = self.vlans.as_deref();
        if vlans.is_some_and(|v| v.len() != ports) {
            return Err(BridgeError::Vlans { ports, vlans: vlans.map_or(0, <[_]>::len) });
        }
        for (port, vlans) in vlans.unwrap_or_default().iter().enumerate() {
            if let PortVlans::Trunk { allowed, native: Some(native) } = vlans
                && !allowed.contains(*native)
            {
                return Err(BridgeError::Native { port, native: *native });
            }
        }
        self.stations.iter().try_for_each(|station| self.check_station(station))
    }

    /// What a bridge at work may be told anew.
    pub(super) fn check_limits(&self) -> Result<(), BridgeError> {
        if !(Duration::from_secs(1)..=Duration::from_secs(1_000_000)).contains(&self.ageing) {
            return Err(BridgeError::Ageing { ageing: self.ageing });
        }
        if self.forward_reserved & 1 << 1 != 0 {
            return Err(BridgeError::Pause);
        }
        if !(1..=1_000_000_000).contains(&self.flood.copies_per_second) {
            return Err(BridgeError::FloodRate { rate: self.flood.copies_per_second });
        }
        let ports = self.ports.len();
        let needed = ports.saturating_sub(2) as u32;
        if self.flood.burst < needed || self.flood.copies_per_turn < needed {
            return Err(BridgeError::FloodSize { ports, needed });
        }
        Ok(())
    }

    pub(super) fn check_station(&self, station: &StaticStation) -> Result<(), BridgeError> {
        let error = |why| BridgeError::Station { station: *station, why };
        if !station.mac.is_station() || self.own.contains(&station.mac) {
            return Err(error("its address is a group's, zero or one of the bridge's own"));
        }
        if station.port.index() >= self.ports.len() {
            return Err(error("the bridge has no such port"));
        }
        let member = match (&self.vlans, station.vlan) {
            (None, None) => true,
            (None, Some(_)) => return Err(error("the bridge ignores VLANs; leave the VLAN out")),
            (Some(_), None) => return Err(error("the bridge knows VLANs; say in which one it is")),
            (Some(vlans), Some(vlan)) => match &vlans[station.port.index()] {
                PortVlans::Access(access) => *access == vlan,
                PortVlans::Trunk { allowed, .. } => allowed.contains(vlan),
            },
        };
        if member { Ok(()) } else { Err(error("its port is not in its VLAN")) }
    }
}

/// Why a bridge cannot be made, or a station not be added.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BridgeError {
    /// No ports, or too many.
    #[error("a bridge of {ports} ports; take 1 to {MAX_PORTS}")]
    Ports {
        /// Ports asked for.
        ports: usize,
    },
    /// A change of a port that is not there.
    #[error("the bridge has no port {}; it has {ports}", .port.0)]
    NoPort {
        /// The port.
        port: PortId,
        /// Ports that it has.
        ports: usize,
    },
    /// Not one VLAN entry a port.
    #[error("{vlans} VLAN entries for {ports} ports; give one for each port, in the same order")]
    Vlans {
        /// Ports.
        ports: usize,
        /// Entries.
        vlans: usize,
    },
    /// The native VLAN is not allowed.
    #[error("port {port}: native VLAN {native} is not among the allowed ones; allow it or choose another")]
    Native {
        /// The port.
        port: usize,
        /// The VLAN.
        native: VlanId,
    },
    /// An ageing time that makes no sense.
    #[error("an ageing time of {ageing:?}; take 1 s to 1000000 s (300 s is usual)")]
    Ageing {
        /// What was asked for.
        ageing: Duration,
    },
    /// A table too small or too large.
    #[error("a table for {capacity} stations; take {} to {}", CAPACITY.start(), CAPACITY.end())]
    Capacity {
        /// What was asked for.
        capacity: usize,
    },
    /// PAUSE frames shall be forwarded.
    #[error("forward_reserved has bit 1 (01-80-C2-00-00-01, PAUSE) set; no bridge may forward it: clear it")]
    Pause,
    /// A rate of copies that makes no sense.
    #[error("{rate} copies a second; take 1 to 1000000000")]
    FloodRate {
        /// What was asked for.
        rate: u32,
    },
    /// Limits under which no broadcast would ever pass.
    #[error(
        "flooding among {ports} ports takes {needed} copies; set `burst` and `copies_per_turn` to at least that"
    )]
    FloodSize {
        /// Ports.
        ports: usize,
        /// Copies that one broadcast of one frame takes.
        needed: u32,
    },
    /// An address that no station can have.
    #[error("{mac} is no station's address (a group address, or zero); leave it out of `own`")]
    Address {
        /// The address.
        mac: MacAddress,
    },
    /// A static station that cannot be.
    #[error("static station {} on port {}: {why}", .station.mac, .station.port.0)]
    Station {
        /// The station.
        station: StaticStation,
        /// What is wrong with it.
        why: &'static str,
    },
}
