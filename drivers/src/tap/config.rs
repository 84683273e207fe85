//! What a tap can be told.

use super::error::TapError;
use isoplane_memory::Pool;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Queues that a tap can have; each takes two of the pool's owner ids. Linux allows 256.
pub const MAX_QUEUES: u16 = 32;
/// Entries that a ring can have.
pub const MAX_RING: u32 = 1 << 15;
/// Frames that a packet may have with multi-buffer.
pub const MAX_SEGMENTS: usize = 16;
/// Entries that a ring must have: a batch.
const MIN_RING: u32 = 64;
/// Ethernet header and one VLAN tag.
pub(super) const ETHERNET: u32 = 18;

/// How to open a [`TapPort`](super::TapPort).
#[derive(Debug, Clone)]
pub struct TapConfig {
    /// Name of the interface, 1 to 15 bytes.
    pub name: String,
    /// Network namespace to make it in, when not that of the calling thread.
    pub namespace: Option<Arc<OwnedFd>>,
    /// Ethernet address of the interface: the kernel's end. `None` for one that the kernel makes up.
    pub mac: Option<[u8; 6]>,
    /// MTU of the interface: longest packet without its Ethernet header.
    pub mtu: u32,
    /// Switch the interface on.
    pub up: bool,
    /// Leave the interface when the process has ended. Otherwise it goes with the last descriptor, however the
    /// process ends.
    pub persist: bool,
    /// Take a tap of that name that is there already and that nobody uses. Its address and MTU are changed only if
    /// they are not as asked for, so an unprivileged process can use one that was made for its user.
    pub existing: bool,
    /// Queues; the kernel chooses among them by a hash of the flow.
    pub queues: u16,
    /// Packets in several frames, both ways, for MTUs that a frame cannot hold.
    pub multi_buffer: bool,
    /// Free frames that wait to be received into, and received packets that wait for the worker: a power of two. So
    /// many frames of the pool each queue holds from the start.
    pub rx_ring: u32,
    /// Packets that wait to be sent, and sent frames that wait to be taken back: a power of two.
    pub tx_ring: u32,
}

impl TapConfig {
    /// One queue, MTU 1500, rings of 256, on, gone with the process.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: None,
            mac: None,
            mtu: 1500,
            up: true,
            persist: false,
            existing: false,
            queues: 1,
            multi_buffer: false,
            rx_ring: 256,
            tx_ring: 256,
        }
    }

    /// Frames that a packet may have.
    pub(super) const fn segments(&self) -> usize {
        if self.multi_buffer { MAX_SEGMENTS } else { 1 }
    }

    /// Checks what needs no kernel.
    pub(super) fn check(&self, pool: &Pool) -> Result<(), TapError> {
        let name = || self.name.clone();
        if !is_name(&self.name) {
            return Err(TapError::Name { name: name() });
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(TapError::Queues { name: name(), queues: self.queues });
        }
        for (which, ring) in [("rx", self.rx_ring), ("tx", self.tx_ring)] {
            if !ring.is_power_of_two() || !(MIN_RING..=MAX_RING).contains(&ring) {
                return Err(TapError::Ring { name: name(), which, ring });
            }
        }
        let packet = self.mtu.saturating_add(ETHERNET);
        let (frames, room) = (self.segments(), pool.max_frame());
        if u64::from(packet) > frames as u64 * u64::from(room) {
            return Err(TapError::MtuTooLarge { name: name(), mtu: self.mtu, packet, frames, room });
        }
        let (needed, left) = (u32::from(self.queues) * self.rx_ring, pool.in_depot());
        if needed > left {
            let pool = pool.name().to_owned();
            let (queues, ring) = (self.queues, self.rx_ring);
            return Err(TapError::PoolTooSmall { name: name(), queues, ring, needed, pool, left });
        }
        Ok(())
    }
}

/// As `dev_valid_name` of Linux 6.18 has it, less '%', which asks for a number.
fn is_name(name: &str) -> bool {
    let bad = |b: u8| b.is_ascii_whitespace() || b.is_ascii_control() || b == 0xb || b"/:%".contains(&b);
    (1..libc::IFNAMSIZ).contains(&name.len()) && name != "." && name != ".." && !name.bytes().any(bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use isoplane_memory::PoolConfig;

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let pool = Pool::create(&PoolConfig::new("tap-config", 512)).unwrap();
        let check = |change: fn(&mut TapConfig)| {
            let mut config = TapConfig::new("tap0");
            change(&mut config);
            config.check(&pool).err().map(|e| e.to_string())
        };
        assert_eq!(check(|_| {}), None);
        for name in ["", ".", "..", "a/b", "a b", "a:1", "tap%d", "a\u{b}", "0123456789abcdef", "a\n"] {
            let config = TapConfig::new(name);
            assert!(matches!(config.check(&pool), Err(TapError::Name { .. })), "{name:?}");
        }
        let says = |error: Option<String>, what: &str| {
            assert!(error.as_deref().is_some_and(|e| e.contains(what)), "{error:?} does not say {what:?}");
        };
        says(check(|c| c.queues = 0), "0 queues");
        says(check(|c| c.queues = 33), "33 queues");
        says(check(|c| c.rx_ring = 100), "rx ring of 100");
        says(check(|c| c.tx_ring = 32), "tx ring of 32");
        says(check(|c| c.rx_ring = 1024), "take 1024 frames, and pool \"tap-config\" has 512 left");
        says(check(|c| c.mtu = 9000), "MTU of 9000 a packet has up to 9018 bytes");
        says(check(|c| c.mtu = u32::MAX), "multi-buffer");
        assert_eq!(check(|c| (c.mtu, c.multi_buffer) = (9000, true)), None);
        says(check(|c| (c.mtu, c.multi_buffer) = (65_535, true)), "16 frame(s)");
    }
}
