//! The port on two fake devices that are connected: the conformance suite, and what is the driver's own.

mod cold;
mod hostile;
mod hot;
mod qemu;

use super::fake::{Card, Fake};
use super::{E1000eConfig, E1000ePort, RxDescriptors};
use crate::conformance::packet::split_mix;
use crate::conformance::{Fixture, Lies, Opened};
use crate::port::{Port, RxQueue, TxQueue};
use crate::queue::Queue;
use isoplane_memory::{Batch, FrameCache, Pool, PoolConfig};
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

/// Two open ports with a worker each.
struct Pair {
    pool: Arc<Pool>,
    cards: [Card; 2],
    ports: [E1000ePort<Card>; 2],
    queues: [Vec<Queue>; 2],
    frames: [FrameCache; 2],
}

impl Pair {
    fn open(config: &E1000eConfig) -> Self {
        let pool = pool();
        let cards = connected();
        let mut ports = cards.each_ref().map(|card| E1000ePort::open(card.clone(), &pool, config).unwrap());
        let queues = ports
            .each_mut()
            .map(|port| (0..port.queues()).map(|n| port.take_queue(n).unwrap()).collect::<Vec<_>>());
        let frames = ["a", "b"].map(|name| pool.cache(name, 300).unwrap());
        Self { pool, cards, ports, queues, frames }
    }

    /// Puts a packet into the batch, in pieces of at most `step` bytes.
    fn add(&mut self, batch: &mut Batch, packet: &[u8], step: usize) {
        use isoplane_memory::FrameFlags;
        let pieces = packet.chunks(step);
        let last = pieces.len() - 1;
        for (n, piece) in pieces.enumerate() {
            let mut frame = self.frames[0].get().unwrap();
            assert!(self.pool.reset(&mut frame, piece.len() as u16));
            self.pool.bytes_mut(&mut frame).copy_from_slice(piece);
            if n != last {
                frame.set_flags(FrameFlags::MORE);
            }
            batch.push(frame).unwrap();
        }
    }

    /// Port 0 sends packets, each in one frame.
    fn send(&mut self, queue: usize, packets: &[Vec<u8>]) {
        for packets in packets.chunks(32) {
            let mut batch = Batch::new();
            for packet in packets {
                self.add(&mut batch, packet, 1600);
            }
            assert_eq!(self.queues[0][queue].tx.transmit(&mut batch), packets.len());
            self.queues[0][queue].tx.reclaim(&mut self.frames[0]);
        }
    }

    /// What has arrived at a queue of port 1, whole packets.
    fn received(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let (mut packets, mut packet) = (Vec::new(), Vec::new());
        loop {
            let mut batch = Batch::new();
            if self.queues[1][queue].rx.receive(&mut self.frames[1], &mut batch) == 0 {
                return packets;
            }
            for frame in batch.drain() {
                packet.extend(self.pool.bytes(&frame));
                if !frame.has_more() {
                    packets.push(std::mem::take(&mut packet));
                }
                self.frames[1].put(frame);
            }
            assert!(packet.is_empty(), "a packet is split");
        }
    }

    /// Closes all and checks that all frames are there.
    fn close(self) {
        for queue in self.queues.into_iter().flatten() {
            queue.close();
        }
        drop(self.ports);
        let free: u32 = self.frames.iter().map(|frames| frames.len() as u32).sum();
        assert_eq!(free + self.pool.in_depot(), self.pool.chunks(), "frames after close");
        unplugged(self.cards);
    }
}

/// The devices have nothing to complain of, and are quiet.
fn unplugged(cards: [Card; 2]) {
    for card in cards {
        card.device(|device, bus| {
            device.peer = None;
            assert_eq!(device.complaints, [""; 0], "what the device did not like");
            assert!(!bus.is_master());
            assert_eq!((bus.faults(), bus.live()), (0, 0), "faults, memory left behind");
        });
    }
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
        if let Some(cards) = self.cards.take() {
            unplugged(cards);
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
        Pool::create(&PoolConfig::new("e1000e-suite", 2048)).unwrap()
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
