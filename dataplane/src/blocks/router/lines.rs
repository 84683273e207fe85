//! What a worker keeps of each interface: what a packet needs, in half a cache line.
//!
//! Contract: made anew when [`Interfaces::version`] has changed; until then, and while the program is changing
//! an interface, it is what it was.

use crate::app::PortId;
use crate::tables::interface::ReversePath;
use crate::tables::{Interface, InterfaceId, Interfaces};
use crate::wire::ethernet::{EtherType, HEADER, TAG};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Administratively up.
pub(super) const UP: u8 = 1 << 0;
pub(super) const FORWARD4: u8 = 1 << 1;
pub(super) const FORWARD6: u8 = 1 << 2;
pub(super) const REDIRECTS: u8 = 1 << 3;
pub(super) const DIRECTED_BROADCAST: u8 = 1 << 4;
/// Sources are looked up.
pub(super) const FILTERED: u8 = 1 << 5;
/// They must be reached through this interface.
pub(super) const STRICT: u8 = 1 << 6;

/// An interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(32))]
pub(super) struct Line {
    /// Its address, as `MacAddress::to_bits` gives it; more than 48 bits for a line that is no interface, so that no
    /// frame is for it.
    pub(super) mac: u64,
    pub(super) mtu: u16,
    /// VLAN; 0 for none.
    pub(super) vlan: u16,
    pub(super) port: u8,
    pub(super) flags: u8,
    /// Bytes of its Ethernet headers.
    pub(super) header: u8,
    /// The address for error messages; 0 for none.
    pub(super) address4: u32,
}

impl Line {
    const ABSENT: Self =
        Self { mac: u64::MAX, mtu: 0, vlan: 0, port: 0, flags: 0, header: HEADER as u8, address4: 0 };

    fn of(interface: &Interface) -> Self {
        let mut flags = 0;
        for (set, flag) in [
            (interface.up, UP),
            (interface.forward4, FORWARD4),
            (interface.forward6, FORWARD6),
            (interface.redirects, REDIRECTS),
            (interface.directed_broadcast, DIRECTED_BROADCAST),
            (interface.reverse_path != ReversePath::Off, FILTERED),
            (interface.reverse_path == ReversePath::Strict, STRICT),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let vlan = interface.vlan.unwrap_or(0) & 0xfff;
        Self {
            mac: interface.mac.to_bits(),
            mtu: interface.mtu,
            vlan,
            port: interface.port.0,
            flags,
            header: (HEADER + if vlan == 0 { 0 } else { TAG }) as u8,
            address4: interface.address4.map_or(0, Ipv4Addr::to_bits),
        }
    }

    #[inline(always)]
    pub(super) const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    pub(super) const fn is_absent(&self) -> bool {
        self.mac == u64::MAX
    }

    pub(super) const fn port(&self) -> PortId {
        PortId(self.port)
    }

    pub(super) const fn header(&self) -> usize {
        self.header as usize
    }

    /// Writes the Ethernet header of a packet that goes out here into the front of its first frame; `to` is as
    /// `MacAddress::to_bits` gives it.
    #[inline(always)]
    pub(super) fn write_header(&self, bytes: &mut [u8], to: u64, ethertype: EtherType) {
        // Two overlapping words: destination and the first two bytes of the source, then all of the source and
        // the type.
        let head = to << 16 | self.mac >> 32;
        let outer = if self.vlan == 0 { ethertype } else { EtherType::VLAN };
        let tail = self.mac << 16 | u64::from(outer.0);
        let Some(header) = bytes.first_chunk_mut::<HEADER>() else { return };
        header[..8].copy_from_slice(&head.to_be_bytes());
        header[6..].copy_from_slice(&tail.to_be_bytes());
        if self.vlan != 0
            && let Some(tag) = bytes.get_mut(HEADER..HEADER + TAG)
        {
            let word = u32::from(self.vlan) << 16 | u32::from(ethertype.0);
            tag.copy_from_slice(&word.to_be_bytes());
        }
    }
}

/// The place that is no interface.
const ABSENT: usize = InterfaceId::MOST as usize;

/// VLANs of a port, 0 for untagged frames, each with its place among the lines.
pub(super) type Vlans = [u16; 4096];

/// All interfaces.
#[derive(Debug)]
pub(super) struct Lines {
    /// One for each place that a table may have, then one that is absent.
    lines: Box<[Line; ABSENT + 1]>,
    addresses6: Box<[Option<Ipv6Addr>]>,
    /// Of each port.
    vlans: Box<[Vlans]>,
    version: u64,
    /// Sources of packets that come in by some interface are looked up.
    filtered: bool,
    /// Addresses for error messages by interfaces that have none (RFC 1812, 2.2.7: the router id).
    any4: u32,
    any6: Option<Ipv6Addr>,
}

impl Lines {
    pub(super) fn new(interfaces: &Interfaces, ports: usize) -> Self {
        let mut lines = Self {
            lines: Box::new([Line::ABSENT; ABSENT + 1]),
            addresses6: vec![None; interfaces.len()].into_boxed_slice(),
            vlans: vec![[ABSENT as u16; 4096]; ports].into_boxed_slice(),
            version: 0,
            filtered: false,
            any4: 0,
            any6: None,
        };
        lines.read(interfaces);
        lines
    }

    /// Follows the program's changes.
    #[inline(always)]
    pub(super) fn refresh(&mut self, interfaces: &Interfaces) {
        if interfaces.version() != self.version {
            self.read(interfaces);
        }
    }

    #[cold]
    #[inline(never)]
    fn read(&mut self, interfaces: &Interfaces) {
        let version = interfaces.version();
        if version & 1 != 0 {
            return;
        }
        self.vlans.iter_mut().for_each(|vlans| vlans.fill(ABSENT as u16));
        (self.filtered, self.any4, self.any6) = (false, 0, None);
        for place in 0..self.addresses6.len() as u16 {
            let index = usize::from(place);
            match InterfaceId::new(place).and_then(|id| interfaces.get(id)) {
                Some(interface) => {
                    self.lines[index] = Line::of(&interface);
                    self.addresses6[index] = interface.address6;
                }
                // It may only be in the middle of a change: the version has changed then, and the next turn
                // looks again.
                None if interfaces.version() != version => {}
                None => {
                    self.lines[index] = Line::ABSENT;
                    self.addresses6[index] = None;
                }
            }
            let line = self.lines[index];
            if line.is_absent() {
                continue;
            }
            if let Some(vlans) = self.vlans.get_mut(usize::from(line.port)) {
                vlans[usize::from(line.vlan & 0xfff)] = place;
            }
            self.filtered |= line.has(FILTERED);
            if self.any4 == 0 {
                self.any4 = line.address4;
            }
            let global = self.addresses6[index].filter(|address| !address.is_unicast_link_local());
            self.any6 = self.any6.or(global);
        }
        self.version = version;
    }

    /// The place of the interface that frames of a VLAN (0: none) come in by.
    #[inline(always)]
    pub(super) fn place(&self, port: PortId, vlan: u16) -> u16 {
        match self.vlans.get(port.index()) {
            Some(vlans) => vlans[usize::from(vlan & 0xfff)],
            None => ABSENT as u16,
        }
    }

    #[inline(always)]
    pub(super) fn at(&self, place: u16) -> &Line {
        &self.lines[usize::from(place).min(ABSENT)]
    }

    #[inline(always)]
    pub(super) fn get(&self, interface: InterfaceId) -> &Line {
        &self.lines[interface.index() % ABSENT]
    }

    #[inline(always)]
    pub(super) const fn filtered(&self) -> bool {
        self.filtered
    }

    /// The address of an error message that goes out by `to`, about a packet that came in by `from`.
    pub(super) fn address4(&self, to: u16, from: u16) -> Option<Ipv4Addr> {
        let found = [self.at(to).address4, self.at(from).address4, self.any4].into_iter().find(|a| *a != 0);
        found.map(Ipv4Addr::from_bits)
    }

    /// The same. A link-local address serves hosts on that link only.
    pub(super) fn address6(&self, to: u16, from: u16, host: Ipv6Addr) -> Option<Ipv6Addr> {
        let of = |place: u16| self.addresses6.get(usize::from(place)).copied().flatten();
        let fits = |address: &Ipv6Addr| host.is_unicast_link_local() || !address.is_unicast_link_local();
        of(to).filter(fits).or_else(|| of(from).filter(fits)).or(self.any6)
    }
}
