//! The port on two fake devices that are connected: the conformance suite, and what is the driver's own.

use super::fake::{Card, Fake};
use super::{E1000eConfig, E1000ePort, RxDescriptors};
use crate::conformance::packet::split_mix;
use crate::conformance::{Fixture, Lies, Opened};
use crate::port::Port;
use isoplane_memory::{Pool, PoolConfig};
use std::sync::Arc;

/// Two devices with a cable between them.
pub(super) fn connected() -> [Card; 2] {
    let cards = [Card::new(Fake::new(1)), Card::new(Fake::new(2))];
    for (card, peer) in [(0, 1), (1, 0)] {
        let peer = cards[peer].clone();
        cards[card].device(|device, _| device.peer = Some(peer));
    }
    cards
}

pub(super) fn pool() -> Arc<Pool> {
    Pool::create(&PoolConfig::new("e1000e-test", 4096)).unwrap()
}

struct Cable {
    config: E1000eConfig,
    cards: Option<[Card; 2]>,
}

impl Cable {
    fn new(config: E1000eConfig) -> Self {
        Self { config, cards: None }
    }

    fn pull(&mut self) {
        for card in self.cards.take().into_iter().flatten() {
            card.device(|device, bus| {
                device.peer = None;
                assert_eq!(device.complaints, [""; 0], "what the device did not like");
                assert_eq!(bus.faults(), 0);
                assert_eq!(bus.live(), 0, "memory for rings is left behind");
            });
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.pull();
        }
    }
}

impl Fixture for Cable {
    fn pool(&mut self) -> Arc<Pool> {
        pool()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        self.pull();
        let cards = connected();
        let open = |card: &Card| {
            Box::new(E1000ePort::open(card.clone(), pool, &self.config).unwrap()) as Box<dyn Port>
        };
        let opened = Opened { a: open(&cards[0]), b: Some(open(&cards[1])) };
        self.cards = Some(cards);
        opened
    }
    /// Shorter ones are padded, as on any Ethernet.
    fn min_len(&self) -> u16 {
        60
    }
    fn drops_when_full(&self) -> bool {
        true
    }
    /// Plays a device gone mad: writes anything to rings and whatever lies behind them.
    fn lie(&mut self, _opened: &Opened, round: u64) -> Lies {
        let Some([card, _]) = &self.cards else { return Lies::CannotTell("not open") };
        card.device(|device, bus| device.rave(bus, round));
        Lies::Told
    }
}

fn rings() -> E1000eConfig {
    E1000eConfig::default().rings(256, 128)
}

mod extended {
    use super::*;
    crate::conformance_tests!(link, Cable::new(rings()));
}

mod legacy {
    use super::*;
    crate::conformance_tests!(link, Cable::new(rings().rx_descriptors(RxDescriptors::Legacy)));
}

mod long_packets {
    use super::*;
    crate::conformance_tests!(link, Cable::new(rings().rings(512, 128).mtu(9000)));
}

mod hashes {
    use super::*;
    crate::conformance_tests!(link, Cable::new(rings().rx_hash(true)));
}

impl Fake {
    /// Writes random descriptors, places and positions.
    pub(super) fn rave(&mut self, bus: &crate::pci::fake::Bus, seed: u64) {
        use super::layout::{BASE_HIGH, BASE_LOW, rx};
        let mut state = seed;
        let mut random = || {
            state = split_mix(state);
            state
        };
        let at = rx(0, 0);
        let base = u64::from(self.get(at + BASE_HIGH)) << 32 | u64::from(self.get(at + BASE_LOW));
        let words = (self.config_words() as u64).max(1);
        for _ in 0..random() % 400 {
            let to = base + random() % words * 8;
            let known = bus.get64(base + random() % words * 8);
            let word = match random() % 4 {
                0 => random(),
                // Done, whole or in pieces, of some length.
                1 => 1 | (random() & 0b10) | ((random() % 3000) << 32),
                2 => known,
                _ => known.wrapping_add(random() % 4096),
            };
            bus.write(to, &word.to_le_bytes());
        }
    }

    /// Words of DMA memory of queue 0: both rings, places, handover.
    fn config_words(&self) -> usize {
        use super::layout::{LENGTH, rx, tx};
        let (rx, tx) = (self.get(rx(0, LENGTH)) as usize / 16, self.get(tx(0, LENGTH)) as usize / 16);
        rx * 3 + tx * 2 + 32
    }
}
