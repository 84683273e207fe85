//! What an e1000e port can be told.

use super::error::E1000eError;
use super::layout::{MAX_MTU, QUEUES};

/// What a received descriptor looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RxDescriptors {
    /// Checksum status and RSS hash; several queues need it.
    #[default]
    Extended,
    /// Checksum status only, as the first chips of the family wrote it.
    Legacy,
}

/// Which packets are taken from the wire.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Filter {
    /// Everything: a port that forwards.
    #[default]
    Promiscuous,
    /// Those to the port's own address, broadcasts, and these multicast groups. The device compares 12 bits of a
    /// group's address, so others may come along.
    Own {
        /// Multicast addresses.
        groups: Vec<[u8; 6]>,
    },
    /// Those to the port's own address, broadcasts and all multicasts.
    AllMulticast,
}

/// How to open an [`E1000ePort`](super::E1000ePort).
#[derive(Debug, Clone)]
pub struct E1000eConfig {
    /// Queues: 1 or 2. With 2, flows are spread over them by RSS.
    pub queues: u16,
    /// Descriptors of each RX ring: a power of two from 64 to 4096. All but one hold a frame of the pool from
    /// the start.
    pub rx_ring: u32,
    /// Descriptors of each TX ring: a power of two from 64 to 4096.
    pub tx_ring: u32,
    /// Longest packet, Ethernet header and VLAN tag not counted: 68 to 9216 bytes. Packets longer than 1500
    /// may lie in several frames.
    pub mtu: u32,
    /// What is received.
    pub filter: Filter,
    /// Form of the RX descriptors.
    pub rx_descriptors: RxDescriptors,
    /// Write the RSS hash to the metadata of received frames: one more cache line a packet.
    pub rx_hash: bool,
    /// Use this Ethernet address and not the device's own.
    pub mac: Option<[u8; 6]>,
}

impl Default for E1000eConfig {
    fn default() -> Self {
        Self {
            queues: 1,
            rx_ring: 512,
            tx_ring: 512,
            mtu: 1500,
            filter: Filter::Promiscuous,
            rx_descriptors: RxDescriptors::Extended,
            rx_hash: false,
            mac: None,
        }
    }
}

impl E1000eConfig {
    /// Sets the number of queues.
    #[must_use]
    pub const fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Sets the sizes of the rings.
    #[must_use]
    pub const fn rings(mut self, rx: u32, tx: u32) -> Self {
        (self.rx_ring, self.tx_ring) = (rx, tx);
        self
    }

    /// Sets the MTU.
    #[must_use]
    pub const fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Sets what is received.
    #[must_use]
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Sets the form of the RX descriptors.
    #[must_use]
    pub const fn rx_descriptors(mut self, form: RxDescriptors) -> Self {
        self.rx_descriptors = form;
        self
    }

    /// Wants the RSS hash in the metadata.
    #[must_use]
    pub const fn rx_hash(mut self, on: bool) -> Self {
        self.rx_hash = on;
        self
    }

    pub(super) fn check(&self, address: &str) -> Result<(), E1000eError> {
        let address = || address.to_owned();
        if !(1..=QUEUES).contains(&self.queues) {
            return Err(E1000eError::Queues { address: address(), queues: self.queues });
        }
        for (ring, size) in [("RX", self.rx_ring), ("TX", self.tx_ring)] {
            if !size.is_power_of_two() || !(64..=4096).contains(&size) {
                return Err(E1000eError::RingSize { address: address(), ring, size });
            }
        }
        if !(68..=MAX_MTU).contains(&self.mtu) {
            return Err(E1000eError::Mtu { address: address(), mtu: self.mtu });
        }
        let hashes = self.queues > 1 || self.rx_hash;
        if hashes && self.rx_descriptors == RxDescriptors::Legacy {
            return Err(E1000eError::LegacyHash { address: address() });
        }
        if let Filter::Own { groups } = &self.filter
            && let Some(group) = groups.iter().find(|group| group[0] & 1 == 0)
        {
            return Err(E1000eError::NotMulticast { address: address(), group: *group });
        }
        Ok(())
    }
}
