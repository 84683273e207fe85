//! The device's registers as steps: stop and reset, address, link, filters, rings (datasheet section 4.6).
//!
//! Contract: cold. Every wait has an end. A device that reads as all ones is gone, and is told nothing.

use super::config::Filter;
use super::device::change;
use super::error::E1000eError;
use super::layout::*;
use super::rings::Ring;
use crate::pci::Registers;
use std::time::Duration;

/// The registers, and the name for messages.
#[derive(Debug)]
pub(super) struct Chip<R> {
    pub(super) bar: R,
    pub(super) address: String,
}

/// How long the device may take to end what it is doing.
const PATIENCE_MS: u64 = 100;
/// On-chip memory for received packets, in KiB of 40: what is left holds packets to be sent, at least one.
const RX_BUFFER: u32 = 32;
const RX_BUFFER_LONG: u32 = 20;

impl<R: Registers> Chip<R> {
    pub(super) fn is_there(&self) -> bool {
        self.bar.read32(STATUS) != u32::MAX
    }

    fn wait(&self, what: &'static str, done: impl Fn(&R) -> bool) -> Result<(), E1000eError> {
        for _ in 0..PATIENCE_MS {
            if done(&self.bar) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(E1000eError::Stuck { address: self.address.clone(), what, milliseconds: PATIENCE_MS })
    }

    /// Ends all DMA and interrupts and resets the device (sections 4.6.1, 5.2.5.4: master disable).
    pub(super) fn stop(&self) -> Result<(), E1000eError> {
        if !self.is_there() {
            return Err(E1000eError::Gone { address: self.address.clone() });
        }
        let bar = &self.bar;
        bar.write32(IMC, u32::MAX);
        bar.write32(RCTL, 0);
        bar.write32(TCTL, TCTL_PAD);
        change(bar, CTRL, 0, CTRL_MASTER_DISABLE);
        self.wait("DMA under way", |bar| bar.read32(STATUS) & STATUS_MASTER_ENABLED == 0)?;
        change(bar, CTRL, 0, CTRL_RST);
        // Registers may not be touched while the reset begins.
        std::thread::sleep(Duration::from_millis(1));
        self.wait("reset", |bar| bar.read32(CTRL) & CTRL_RST == 0)?;
        self.wait("reading the NVM after reset", |bar| bar.read32(EECD) & EECD_AUTO_READ_DONE != 0)?;
        // The reset has unmasked nothing, but firmware may have.
        bar.write32(IMC, u32::MAX);
        bar.write32(EIAC, 0);
        bar.write32(IAM, 0);
        bar.read32(ICR);
        if self.is_there() { Ok(()) } else { Err(E1000eError::Gone { address: self.address.clone() }) }
    }

    /// As [`Chip::stop`], with the on-chip memory divided for packets up to `mtu`: that takes effect at a reset.
    pub(super) fn reset(&self, mtu: u32) -> Result<(), E1000eError> {
        self.bar.write32(PBA, if mtu > 1500 { RX_BUFFER_LONG } else { RX_BUFFER });
        self.stop()?;
        change(&self.bar, CTRL_EXT, 0, CTRL_EXT_DRIVER_LOADED);
        Ok(())
    }

    /// The device's Ethernet address: what reset has put into the registers, else what the NVM has.
    pub(super) fn mac(&self) -> Result<[u8; 6], E1000eError> {
        let (low, high) = (self.bar.read32(RAL), self.bar.read32(RAH));
        let [a, b, c, d] = low.to_le_bytes();
        let [e, f, ..] = high.to_le_bytes();
        let mac = [a, b, c, d, e, f];
        if high & RAH_VALID != 0 && is_station(mac) {
            return Ok(mac);
        }
        let mut mac = [0; 6];
        for (word, bytes) in (0..).zip(mac.as_chunks_mut().0) {
            *bytes = self.nvm(word)?.to_le_bytes();
        }
        if is_station(mac) { Ok(mac) } else { Err(E1000eError::NoMac { address: self.address.clone() }) }
    }

    /// A word of the NVM (section 10.2.2, EERD).
    fn nvm(&self, word: u32) -> Result<u16, E1000eError> {
        self.bar.write32(EERD, word << EERD_ADDRESS_SHIFT | EERD_START);
        self.wait("reading the NVM", |bar| bar.read32(EERD) & EERD_DONE != 0)?;
        Ok((self.bar.read32(EERD) >> EERD_DATA_SHIFT) as u16)
    }

    /// Has the device find its link by itself: speed and duplex as negotiated, no pause frames.
    pub(super) fn link_on(&self) {
        let clear = CTRL_FORCE_SPEED | CTRL_FORCE_DUPLEX | CTRL_FLOW_CONTROL | CTRL_VME | CTRL_MASTER_DISABLE;
        change(&self.bar, CTRL, clear, CTRL_SLU | CTRL_ASDE | CTRL_FULL_DUPLEX);
        let Some(control) = self.phy(MDIC_READ | PHY_CONTROL << MDIC_REGISTER_SHIFT) else {
            tracing::warn!("{}: the PHY does not answer; the link is left as it is", self.address);
            return;
        };
        if control & (PHY_POWER_DOWN | PHY_ISOLATE) != 0 {
            let control = control & !(PHY_POWER_DOWN | PHY_ISOLATE) | PHY_NEGOTIATE | PHY_RESTART;
            self.phy(MDIC_WRITE | PHY_CONTROL << MDIC_REGISTER_SHIFT | u32::from(control));
        }
    }

    /// One access to a register of the PHY.
    fn phy(&self, command: u32) -> Option<u16> {
        self.bar.write32(MDIC, command | MDIC_PHY_1);
        self.wait("access to the PHY", |bar| bar.read32(MDIC) & MDIC_READY != 0).ok()?;
        let answer = self.bar.read32(MDIC);
        (answer & MDIC_ERROR == 0).then_some(answer as u16)
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        let [a, b, c, d, e, f] = mac;
        self.bar.write32(RAL, u32::from_le_bytes([a, b, c, d]));
        self.bar.write32(RAH, u32::from_le_bytes([e, f, 0, 0]) | RAH_VALID);
        for other in 1..16 {
            self.bar.write32(RAH + other * 8, 0);
        }
    }

    /// Says what is received; gives the bits of RCTL for it.
    pub(super) fn filter(&self, filter: &Filter) -> u32 {
        let mut table = [0_u32; MTA_WORDS];
        let mode = match filter {
            Filter::Promiscuous => RCTL_UNICAST_PROMISCUOUS | RCTL_MULTICAST_PROMISCUOUS,
            Filter::AllMulticast => RCTL_MULTICAST_PROMISCUOUS,
            Filter::Own { groups } => {
                for group in groups {
                    let (word, bit) = multicast_bit(*group);
                    table[word] |= bit;
                }
                0
            }
        };
        for (at, word) in table.into_iter().enumerate() {
            self.bar.write32(MTA + at * 4, word);
        }
        mode
    }

    /// Changes what is received while the device runs.
    pub(super) fn change_filter(&self, filter: &Filter) {
        let mode = self.filter(filter);
        change(&self.bar, RCTL, RCTL_UNICAST_PROMISCUOUS | RCTL_MULTICAST_PROMISCUOUS, mode);
    }

    /// Switches the receiver on or off.
    pub(super) fn receive(&self, on: bool) {
        if self.is_there() {
            change(&self.bar, RCTL, RCTL_EN, if on { RCTL_EN } else { 0 });
        }
    }

    /// Says where a receive ring is; nothing is posted yet.
    pub(super) fn rx_ring(&self, queue: u16, ring: &Ring) {
        self.ring(|register| rx(queue, register), ring);
        self.bar.write32(rx(queue, CONTROL), CONTROL_WRITE_BACK_EACH);
    }

    /// Says where a transmit ring is.
    pub(super) fn tx_ring(&self, queue: u16, ring: &Ring) {
        self.ring(|register| tx(queue, register), ring);
        self.bar.write32(tx(queue, CONTROL), CONTROL_WRITE_BACK_EACH | TXDCTL_RESERVED_1);
        change(&self.bar, tx(queue, ARBITRATION), 0, ARBITRATION_ENABLE);
    }

    fn ring(&self, register: impl Fn(usize) -> usize, ring: &Ring) {
        let iova = ring.iova();
        self.bar.write32(register(BASE_LOW), iova as u32);
        self.bar.write32(register(BASE_HIGH), (iova >> 32) as u32);
        self.bar.write32(register(LENGTH), ring.size() * DESCRIPTOR_BYTES as u32);
        self.bar.write32(register(HEAD), 0);
        self.bar.write32(register(TAIL), 0);
        self.bar.write32(register(DELAY), 0);
        self.bar.write32(register(ABSOLUTE_DELAY), 0);
    }

    /// Switches both directions on; `mode` is what RCTL has beyond that.
    pub(super) fn start(&self, mode: u32) {
        for word in 0..VFTA_WORDS {
            self.bar.write32(VFTA + word * 4, 0);
        }
        self.bar.write32(TIPG, TIPG_COPPER);
        self.bar.write32(TCTL, TCTL_EN | TCTL_PAD | TCTL_COLLISIONS | TCTL_RETRANSMIT);
        self.bar.write32(RCTL, RCTL_EN | RCTL_BROADCAST | RCTL_STRIP_CRC | mode);
    }
}

/// Can this be the address of a port?
pub(super) fn is_station(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// Where a group is in the multicast table: bits 47 to 36 of the address (section 10.2.5, MTA; RCTL.MO is 0).
pub(super) fn multicast_bit(group: [u8; 6]) -> (usize, u32) {
    let hash = (usize::from(group[4]) >> 4 | usize::from(group[5]) << 4) & 0xfff;
    (hash >> 5, 1 << (hash & 31))
}

/// The largest receive buffer that fits `room` bytes: the bits of RCTL for it, and its size. Packets that the
/// device drops when they are longer than 1522 bytes need no more room than that.
pub(super) fn rx_buffer(room: u32, mtu: u32) -> Option<(u32, u32)> {
    if mtu <= 1500 && room >= SHORT_PACKET {
        return Some((0, 2048));
    }
    let long = if mtu > 1500 { RCTL_LONG_PACKETS } else { 0 };
    let (bits, bytes) = match room {
        16_384.. => (RCTL_BSEX | 0b01 << RCTL_BSIZE_SHIFT, 16_384),
        1024.. => ((room / 1024) << RCTL_FLXBUF_SHIFT, room / 1024 * 1024),
        512.. => (0b10 << RCTL_BSIZE_SHIFT, 512),
        256.. => (0b11 << RCTL_BSIZE_SHIFT, 256),
        _ => return None,
    };
    Some((bits | long, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_fit_their_room() {
        assert_eq!(rx_buffer(1522, 1500), Some((0, 2048)));
        assert_eq!(rx_buffer(255, 1500), None);
        assert_eq!(rx_buffer(1521, 1500), Some((1 << 27, 1024)));
        assert_eq!(rx_buffer(4000, 9000), Some((3 << 27 | RCTL_LONG_PACKETS, 3072)));
        for room in 256..20_000 {
            for mtu in [1501, 9216] {
                let (bits, bytes) = rx_buffer(room, mtu).unwrap();
                assert!(bytes <= room && bytes >= room / 2 || room > 16_384);
                assert!(bits & RCTL_LONG_PACKETS != 0);
            }
        }
    }

    #[test]
    fn groups_are_found_where_the_datasheet_puts_them() {
        // 01-00-5e-00-00-fb: bits 47 to 36 are 0xfb0.
        assert_eq!(multicast_bit([0x01, 0, 0x5e, 0, 0, 0xfb]), (0xfb0 >> 5, 1 << (0xfb0 & 31)));
        assert_eq!(multicast_bit([0xff; 6]), (127, 1 << 31));
        assert!(is_station([2, 0, 0, 0, 0, 1]) && !is_station([0; 6]) && !is_station([1, 0, 0, 0, 0, 0]));
    }
}
