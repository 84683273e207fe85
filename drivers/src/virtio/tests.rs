//! The port on fake devices: the conformance suite with each kind of ring.

use super::fake::{FakeNet, Traits, exchange};
use super::{Features, VirtioConfig, VirtioNetPort};
use crate::conformance::packet::split_mix;
use crate::conformance::{Fixture, Lies, Opened};
use crate::pci::fake::FakeFunction;
use crate::port::Port;
use crate::xdp::Want;
use isoplane_memory::{Pool, PoolConfig};
use std::sync::Arc;

/// Two devices with a wire between them.
struct Pair {
    traits: Traits,
    config: VirtioConfig,
    ends: Option<[FakeFunction<FakeNet>; 2]>,
}

impl Pair {
    fn new(change: impl FnOnce(&mut Traits, &mut VirtioConfig)) -> Self {
        let mut traits = Traits::default();
        let mut config = VirtioConfig { rx_ring: 128, tx_ring: 128, ..VirtioConfig::default() };
        change(&mut traits, &mut config);
        Self { traits, config, ends: None }
    }
}

impl Fixture for Pair {
    fn pool(&mut self) -> Arc<Pool> {
        Pool::create(&PoolConfig::new("virtio-test", 1024)).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        if let Some(before) = &self.ends {
            for end in before {
                assert_eq!((end.bus().live(), end.bus().faults()), (0, 0), "left behind");
            }
        }
        let ends = [FakeNet::new(self.traits.clone()), FakeNet::new(self.traits.clone())];
        let open =
            |end: &FakeFunction<FakeNet>| VirtioNetPort::open(end.clone(), pool, &self.config).unwrap();
        let (a, b) = (open(&ends[0]), open(&ends[1]));
        self.ends = Some(ends);
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn window(&self) -> usize {
        100
    }
    fn max_packet(&self, port: &dyn Port) -> u32 {
        port.max_frame().min(9014)
    }
    fn min_len(&self) -> u16 {
        1
    }
    fn idle(&mut self) {
        let [a, b] = self.ends.as_ref().unwrap();
        exchange(a, b);
    }
    /// Plays a device gone mad: writes to the rings of `a` whatever it likes.
    fn lie(&mut self, _opened: &Opened, round: u64) -> Lies {
        let mut state = round;
        let mut random = || {
            state = split_mix(state);
            state
        };
        let [a, b] = self.ends.as_ref().unwrap();
        exchange(a, b);
        a.device(|device, bus| {
            for queue in &device.queues[..2] {
                for area in [0, 1, 2, 2, 2] {
                    let entries = u64::from(queue.size);
                    let bytes = if area == 0 { entries * 16 } else { 4 + entries * 8 };
                    for _ in 0..random() % 24 {
                        let at = match random() % 4 {
                            0 => 0,
                            1 => random() % (bytes / 2) * 2,
                            _ => random() % 40 * 2,
                        };
                        let value = match random() % 4 {
                            0 => random() as u16,
                            1 => random() as u16 % 128,
                            2 => queue.next_used.wrapping_add(random() as u16 % 20),
                            _ => 1500,
                        };
                        bus.write(queue.at[area] + at.min(bytes - 2), &value.to_le_bytes());
                    }
                }
            }
        });
        Lies::Told
    }
}

mod split {
    use super::*;
    crate::conformance_tests!(link, Pair::new(|_, config| config.packed = Want::Never));
}

mod split_flags_out_of_order {
    use super::*;
    crate::conformance_tests!(
        link,
        Pair::new(|traits, config| {
            traits.shuffles = true;
            config.packed = Want::Never;
            config.event_index = Want::Never;
            (config.rx_ring, config.tx_ring) = (128, 256);
        })
    );
}

mod split_several_frames {
    use super::*;
    crate::conformance_tests!(
        link,
        Pair::new(|traits, config| {
            traits.mtu = 9000;
            traits.offered |= Features::MTU;
            config.packed = Want::Never;
            config.multi_buffer = true;
        })
    );
}

mod split_checksums {
    use super::*;
    crate::conformance_tests!(
        link,
        Pair::new(|_, config| {
            config.packed = Want::Never;
            config.rx_checksum = true;
        })
    );
}

fn packed(traits: &mut Traits, config: &mut VirtioConfig) {
    traits.offered |= Features::RING_PACKED;
    config.packed = Want::Require;
}

mod packed_rings {
    use super::*;
    crate::conformance_tests!(link, Pair::new(packed));
}

mod packed_flags_out_of_order {
    use super::*;
    crate::conformance_tests!(
        link,
        Pair::new(|traits, config| {
            packed(traits, config);
            traits.shuffles = true;
            config.event_index = Want::Never;
            (config.rx_ring, config.tx_ring) = (128, 256);
        })
    );
}

mod packed_several_frames {
    use super::*;
    crate::conformance_tests!(
        link,
        Pair::new(|traits, config| {
            packed(traits, config);
            traits.mtu = 9000;
            traits.offered |= Features::MTU;
            config.multi_buffer = true;
        })
    );
}
