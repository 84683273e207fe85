//! The router's interfaces: a port or a VLAN of it, with what the kernel says about it.
//!
//! Contract: an interface is eight words, one cache line. Words are changed one at a time; the two
//! words of an IPv6 address are read together where that matters ([`Interfaces::get`]).

use crate::app::PortId;
use crate::wire::ethernet::MacAddress;
use isoplane_memory::RegionError;
use isoplane_memory::table::{Table, TableWriter};
use std::net::{Ipv4Addr, Ipv6Addr};

/// An interface, by its place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct InterfaceId(u16);

impl InterfaceId {
    /// Interfaces that a table holds at most: an id is 12 bits.
    pub const MOST: u16 = 1 << 12;

    /// The interface at a place; `None` for a place that no table has.
    #[inline(always)]
    #[must_use]
    pub const fn new(place: u16) -> Option<Self> {
        if place < Self::MOST { Some(Self(place)) } else { None }
    }

    pub(crate) const fn from_low_bits(bits: u64) -> Self {
        Self((bits & (Self::MOST as u64 - 1)) as u16)
    }

    /// Its place.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// As an index.
    #[inline(always)]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Whether the source of a packet must be reachable through the interface that it came in by (RFC 3704).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum ReversePath {
    /// Sources are not looked up.
    #[default]
    Off = 0,
    /// Through this interface.
    Strict = 1,
    /// Through any interface.
    Loose = 2,
}

/// What is known about an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Interface {
    /// The port, as workers number it.
    pub port: PortId,
    /// Its VLAN; `None` for untagged frames.
    pub vlan: Option<u16>,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Longest IP packet, in bytes.
    pub mtu: u16,
    /// Administratively up: packets may come in and go out.
    pub up: bool,
    /// Forwards IPv4 (the kernel's `forwarding` of the interface).
    pub forward4: bool,
    /// Forwards IPv6.
    pub forward6: bool,
    /// Filter of sources.
    pub reverse_path: ReversePath,
    /// Sends ICMP redirects.
    pub redirects: bool,
    /// Forwards packets to its broadcast addresses (RFC 2644: off).
    pub directed_broadcast: bool,
    /// The address that ICMP errors are sent from; `None` when it has none.
    pub address4: Option<Ipv4Addr>,
    /// The same for IPv6; its link-local address when it has no other.
    pub address6: Option<Ipv6Addr>,
}

const WORDS: usize = 8;

mod flag {
    pub(super) const PRESENT: u64 = 1 << 0;
    pub(super) const UP: u64 = 1 << 1;
    pub(super) const FORWARD4: u64 = 1 << 2;
    pub(super) const FORWARD6: u64 = 1 << 3;
    pub(super) const REDIRECTS: u64 = 1 << 4;
    pub(super) const DIRECTED_BROADCAST: u64 = 1 << 5;
    /// Two bits.
    pub(super) const REVERSE_PATH: u32 = 6;
}

impl Interface {
    /// Word 0: flags 0-7, port 8-15, VLAN 16-27, MTU 32-47. Word 1: MAC address.
    fn to_words(self) -> [u64; WORDS] {
        let mut head = flag::PRESENT | (self.reverse_path as u64) << flag::REVERSE_PATH;
        for (set, bit) in [
            (self.up, flag::UP),
            (self.forward4, flag::FORWARD4),
            (self.forward6, flag::FORWARD6),
            (self.redirects, flag::REDIRECTS),
            (self.directed_broadcast, flag::DIRECTED_BROADCAST),
        ] {
            head |= if set { bit } else { 0 };
        }
        head |= u64::from(self.port.0) << 8;
        head |= u64::from(self.vlan.unwrap_or(0) & 0xfff) << 16 | u64::from(self.mtu) << 32;
        let address6 = self.address6.map_or(0, Ipv6Addr::to_bits);
        let address4 = self.address4.map_or(0, Ipv4Addr::to_bits);
        [head, self.mac.to_bits(), u64::from(address4), (address6 >> 64) as u64, address6 as u64, 0, 0, 0]
    }

    fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let head = words[0];
        if head & flag::PRESENT == 0 {
            return None;
        }
        let address4 = words[2] as u32;
        let address6 = u128::from(words[3]) << 64 | u128::from(words[4]);
        let vlan = (head >> 16) as u16 & 0xfff;
        Some(Self {
            port: PortId((head >> 8) as u8),
            vlan: (vlan != 0).then_some(vlan),
            mac: MacAddress::from_bits(words[1]),
            mtu: (head >> 32) as u16,
            up: head & flag::UP != 0,
            forward4: head & flag::FORWARD4 != 0,
            forward6: head & flag::FORWARD6 != 0,
            reverse_path: match head >> flag::REVERSE_PATH & 3 {
                1 => ReversePath::Strict,
                2 => ReversePath::Loose,
                _ => ReversePath::Off,
            },
            redirects: head & flag::REDIRECTS != 0,
            directed_broadcast: head & flag::DIRECTED_BROADCAST != 0,
            address4: (address4 != 0).then(|| Ipv4Addr::from_bits(address4)),
            address6: (address6 != 0).then(|| Ipv6Addr::from_bits(address6)),
        })
    }
}

/// A worker's view of the interfaces.
#[derive(Debug, Clone)]
pub struct Interfaces {
    table: Table,
}

/// The program's side of the interfaces.
#[derive(Debug)]
pub struct InterfacesWriter {
    table: TableWriter,
}

impl Interfaces {
    /// Makes a table of `count` interfaces (at most [`InterfaceId::MOST`]), all absent.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str, count: u16) -> Result<(InterfacesWriter, Self), RegionError> {
        let count = usize::from(count.min(InterfaceId::MOST));
        let (writer, table) = Table::create(name, count * WORDS)?;
        Ok((InterfacesWriter { table: writer }, Self { table }))
    }

    /// Changes whenever an interface does, and is odd meanwhile: a worker keeps what it derived from
    /// [`Interfaces::get`] as long as this stays the same.
    #[inline(always)]
    #[must_use]
    pub fn version(&self) -> u64 {
        self.table.version()
    }

    /// How many the table holds at most.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.table.len() / WORDS
    }

    /// True for a table without room.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.table.len() == 0
    }

    /// An interface; `None` when there is none, or when it is being changed for longer than a reader
    /// may wait. Cold: a worker keeps what it needs a packet.
    #[must_use]
    pub fn get(&self, interface: InterfaceId) -> Option<Interface> {
        let base = interface.index() * WORDS;
        let words =
            self.table.consistent(64, |t| std::array::from_fn(|i| t.get(base + i).unwrap_or_default()))?;
        Interface::from_words(words)
    }
}

impl InterfacesWriter {
    /// Puts an interface in its place, or takes it away. False for a place that the table has not.
    pub fn set(&mut self, interface: InterfaceId, what: Option<&Interface>) -> bool {
        let base = interface.index() * WORDS;
        if base + WORDS > self.table.table().len() {
            return false;
        }
        let words = what.map_or([0; WORDS], |what| what.to_words());
        self.table.update(|t| words.iter().enumerate().all(|(i, word)| t.set(base + i, *word)))
    }

    /// The readers' view.
    #[must_use]
    pub fn reader(&self) -> Interfaces {
        Interfaces { table: self.table.table().clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_comes_out() {
        let (mut writer, reader) = Interfaces::create("test", 4).unwrap();
        let third = InterfaceId::new(3).unwrap();
        assert_eq!(reader.get(third), None);
        let what = Interface {
            port: PortId(7),
            vlan: Some(4094),
            mac: MacAddress([2, 1, 2, 3, 4, 5]),
            mtu: 9000,
            up: true,
            forward4: true,
            forward6: false,
            reverse_path: ReversePath::Loose,
            redirects: true,
            directed_broadcast: true,
            address4: Some(Ipv4Addr::new(192, 0, 2, 1)),
            address6: Some("2001:db8::1".parse().unwrap()),
        };
        let before = reader.version();
        assert!(writer.set(third, Some(&what)));
        assert_ne!(reader.version(), before);
        assert_eq!(reader.get(third), Some(what));
        assert!(writer.set(third, Some(&Interface::default())));
        assert_eq!(writer.reader().get(third), Some(Interface::default()));
        assert!(writer.set(third, None));
        assert_eq!(reader.get(third), None);
        assert!(!writer.set(InterfaceId::new(4).unwrap(), None));
        assert_eq!(InterfaceId::new(InterfaceId::MOST), None);
    }
}
