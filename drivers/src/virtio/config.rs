//! What a virtio-net port can be told.

use super::error::VirtioError;
use super::layout::{MOST_DESCRIPTORS, net::LEAST_MTU};
use crate::xdp::Want;

/// Which packets the device passes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Filter {
    /// Everything: a port that forwards. Where the device has no such command, it passes what it likes.
    #[default]
    Promiscuous,
    /// Those to the port's own address, broadcasts, and all multicasts.
    AllMulticast,
    /// Those to the port's own address, broadcasts, and multicasts to groups that were asked for
    /// ([`set_groups`](super::VirtioNetPort::set_groups)).
    Own,
}

/// How to open a [`VirtioNetPort`](super::VirtioNetPort).
#[derive(Debug, Clone)]
pub struct VirtioConfig {
    /// Pairs of queues. With more than one, flows are spread over them: by RSS where the device has it, else as it
    /// likes.
    pub queues: u16,
    /// Entries of each RX ring, a power of two; less when the device cannot do that. All of them hold a frame
    /// of the pool from the start.
    pub rx_ring: u16,
    /// Entries of each TX ring, a power of two; less when the device cannot do that.
    pub tx_ring: u16,
    /// Packets of several frames, both ways: mergeable receive buffers and indirect descriptors.
    pub multi_buffer: bool,
    /// Longest packet expected, Ethernet header not counted, when not what the device says (and 1500 where it does
    /// not).
    pub mtu: Option<u16>,
    /// Take the device even if its MTU allows packets that no chunk can hold: it drops those.
    pub allow_larger_mtu: bool,
    /// Which packets are received.
    pub filter: Filter,
    /// Use this Ethernet address and not the device's own; the device must take one.
    pub mac: Option<[u8; 6]>,
    /// Only packets of these VLANs, and those without a tag, when not empty.
    pub vlans: Vec<u16>,
    /// Take packets whose transport checksum the device has verified, or left for us to complete: one look at
    /// the header of each. A packet that came with a partial checksum asks for it (`FrameFlags::TX_CHECKSUM`)
    /// when it is sent on.
    pub rx_checksum: bool,
    /// Write the RSS hash to the metadata of received frames: one more cache line a packet.
    pub rx_hash: bool,
    /// Packed rings.
    pub packed: Want,
    /// Doorbells only at the entry that the device names, instead of a flag. With packed rings only if required.
    pub event_index: Want,
    /// The device keeps to the IOMMU. One that does not would read and write anywhere in the machine's memory,
    /// at addresses that mean something else to it: only without an IOMMU may this be less than required.
    pub access_platform: Want,
}

impl Default for VirtioConfig {
    fn default() -> Self {
        Self {
            queues: 1,
            rx_ring: 256,
            tx_ring: 256,
            multi_buffer: false,
            mtu: None,
            allow_larger_mtu: false,
            filter: Filter::default(),
            mac: None,
            vlans: Vec::new(),
            rx_checksum: false,
            rx_hash: false,
            packed: Want::Prefer,
            event_index: Want::Prefer,
            access_platform: Want::Require,
        }
    }
}

impl VirtioConfig {
    pub(super) fn check(&self, address: &str) -> Result<(), VirtioError> {
        let wrong = |what, value, range| Err(wrong(address, what, value, range));
        for (what, size) in [("an RX ring", self.rx_ring), ("a TX ring", self.tx_ring)] {
            if !size.is_power_of_two() || !(2..=MOST_DESCRIPTORS).contains(&size) {
                return wrong(what, size.into(), "a power of two from 2 to 32768");
            }
        }
        if let Some(mtu) = self.mtu
            && mtu < LEAST_MTU
        {
            return wrong("an MTU", mtu.into(), "68 or more");
        }
        if !(1..=120).contains(&self.queues) {
            return wrong("a number of queues", self.queues.into(), "1 to 120");
        }
        for vlan in &self.vlans {
            check_vlan(address, *vlan)?;
        }
        if let Some(mac) = self.mac
            && (mac[0] & 1 != 0 || mac == [0; 6])
        {
            return wrong("an Ethernet address", number(mac), "one of a single station");
        }
        Ok(())
    }
}

fn wrong(address: &str, what: &'static str, value: u64, range: &'static str) -> VirtioError {
    VirtioError::Config { address: address.to_owned(), what, value, range }
}

/// An Ethernet address as a number.
fn number(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Is there such a VLAN?
pub(super) fn check_vlan(address: &str, vlan: u16) -> Result<(), VirtioError> {
    if vlan > 4094 { Err(wrong(address, "a VLAN", vlan.into(), "0 to 4094")) } else { Ok(()) }
}

/// Are these groups?
pub(super) fn check_groups(address: &str, groups: &[[u8; 6]]) -> Result<(), VirtioError> {
    match groups.iter().find(|group| group[0] & 1 == 0) {
        Some(group) => Err(wrong(address, "a group's address", number(*group), "one of several stations")),
        None => Ok(()),
    }
}
