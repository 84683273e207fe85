//! Changing a bridge that is at work: no packet is dropped for it, and learned stations stay.
//!
//! Contract: a [`Change`] is carried out between two batches, in a bounded time. As a [`Message`] it is plain
//! old data for a [`mailbox`](crate::message::mailbox); one that no program in its senses writes is no change.

use super::config::{BridgeError, BridgePort, StaticStation};
use super::fdb::MAX_PORTS;
use super::flood::{Budget, FloodLimits};
use super::{Bridge, ports_where};
use crate::app::PortId;
use crate::wire::{MacAddress, VlanId};
use bytemuck::{Pod, Zeroable};
use std::time::Duration;

/// What may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// [`BridgeConfig::ageing`](super::BridgeConfig::ageing), of all stations, known ones included.
    Ageing(Duration),
    /// [`BridgeConfig::flood`](super::BridgeConfig::flood); budgets start full.
    Flood(FloodLimits),
    /// [`BridgeConfig::forward_reserved`](super::BridgeConfig::forward_reserved).
    ForwardReserved(u16),
    /// An entry of [`BridgeConfig::ports`](super::BridgeConfig::ports). What a port has learned beyond a new
    /// limit stays until it ages.
    Port {
        /// Which.
        port: PortId,
        /// What it is from now on.
        config: BridgePort,
    },
    /// A static station more, in place of whatever had its address.
    AddStation(StaticStation),
    /// A station less.
    RemoveStation {
        /// Its VLAN, on a bridge that knows VLANs.
        vlan: Option<VlanId>,
        /// Its address.
        mac: MacAddress,
    },
}

/// A change, as it lies in a mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Message {
    kind: u32,
    port: u32,
    words: [u64; 2],
}

const AGEING: u32 = 1;
const FLOOD: u32 = 2;
const RESERVED: u32 = 3;
const PORT: u32 = 4;
const ADD: u32 = 5;
const REMOVE: u32 = 6;

const fn pair(high: u32, low: u32) -> u64 {
    (high as u64) << 32 | low as u64
}

const fn parts(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

fn number(mac: MacAddress) -> u64 {
    mac.0.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn address(number: u64) -> MacAddress {
    let [_, _, mac @ ..] = number.to_be_bytes();
    MacAddress(mac)
}

impl From<Change> for Message {
    fn from(change: Change) -> Self {
        let vlan = |vlan: Option<VlanId>| u64::from(vlan.map_or(0, VlanId::get));
        let (kind, port, words) = match change {
            Change::Ageing(ageing) => (AGEING, 0, [ageing.as_millis() as u64, 0]),
            Change::Flood(FloodLimits { copies_per_second, burst, copies_per_turn, reserve }) => {
                (FLOOD, 0, [pair(copies_per_second, burst), pair(copies_per_turn, reserve)])
            }
            Change::ForwardReserved(digits) => (RESERVED, 0, [digits.into(), 0]),
            Change::Port { port, config: BridgePort { isolated, learn, max_stations } } => {
                let flags = u32::from(isolated) | u32::from(learn) << 1;
                (PORT, port.0.into(), [pair(flags, max_stations), 0])
            }
            Change::AddStation(station) => {
                (ADD, station.port.0.into(), [number(station.mac), vlan(station.vlan)])
            }
            Change::RemoveStation { vlan: id, mac } => (REMOVE, 0, [number(mac), vlan(id)]),
        };
        Self { kind, port, words }
    }
}

impl Message {
    /// The change; `None` for what is none.
    #[must_use]
    pub fn parse(self) -> Option<Change> {
        let port = || u8::try_from(self.port).ok().map(PortId);
        let [first, second] = self.words;
        let vlan = || u16::try_from(second).ok().map(VlanId::new);
        Some(match self.kind {
            AGEING => Change::Ageing(Duration::from_millis(first)),
            FLOOD => {
                let (copies_per_second, burst) = parts(first);
                let (copies_per_turn, reserve) = parts(second);
                Change::Flood(FloodLimits { copies_per_second, burst, copies_per_turn, reserve })
            }
            RESERVED => Change::ForwardReserved(u16::try_from(first).ok()?),
            PORT => {
                let (flags, max_stations) = parts(first);
                let config = BridgePort { isolated: flags & 1 != 0, learn: flags & 2 != 0, max_stations };
                Change::Port { port: port()?, config }
            }
            ADD => Change::AddStation(StaticStation { mac: address(first), vlan: vlan()?, port: port()? }),
            REMOVE => Change::RemoveStation { vlan: vlan()?, mac: address(first) },
            _ => return None,
        })
    }
}

impl Bridge {
    /// Carries a change out; `now` is the time of the worker's clock.
    ///
    /// # Errors
    /// Those of [`Bridge::new`] for a configuration with this change; the bridge is as before then.
    pub fn change(&mut self, change: Change, now: u64) -> Result<(), BridgeError> {
        let (ageing, flood) = (self.config.ageing, self.config.flood);
        let reserved = self.config.forward_reserved;
        match change {
            Change::AddStation(station) => return self.add_station(station, now),
            Change::RemoveStation { vlan, mac } => {
                self.remove_station(vlan, mac);
                return Ok(());
            }
            Change::Port { port, config } => return self.set_port(port, config),
            Change::Ageing(ageing) => self.config.ageing = ageing,
            Change::Flood(flood) => self.config.flood = flood,
            Change::ForwardReserved(digits) => self.config.forward_reserved = digits,
        }
        if let Err(error) = self.config.check_limits() {
            (self.config.ageing, self.config.flood) = (ageing, flood);
            self.config.forward_reserved = reserved;
            return Err(error);
        }
        match change {
            Change::Ageing(ageing) => self.fdb.set_ageing(ageing),
            Change::Flood(limits) => {
                self.ports.iter_mut().for_each(|port| port.budget = Budget::new(&limits));
                self.copies_left = limits.copies_per_turn;
            }
            _ => {}
        }
        Ok(())
    }

    /// Who reaches whom depends on all ports, so all are looked at.
    fn set_port(&mut self, port: PortId, config: BridgePort) -> Result<(), BridgeError> {
        let ports = self.config.ports.len();
        let there = self.config.ports.get_mut(port.index());
        *there.ok_or(BridgeError::NoPort { port, ports })? = config;
        self.fdb.set_limit(port, config.max_stations);
        let all = u64::MAX >> (MAX_PORTS - ports);
        let isolated = ports_where(&self.config, |p| p.isolated);
        for (index, (state, config)) in self.ports.iter_mut().zip(&self.config.ports).enumerate() {
            state.reach = all & !(1 << index) & if config.isolated { !isolated } else { u64::MAX };
            state.learn = config.learn;
        }
        Ok(())
    }
}
