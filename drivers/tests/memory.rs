//! The in-memory port against the conformance suite.

use isoplane_drivers::conformance::packet::split_mix;
use isoplane_drivers::conformance::{Fixture, Lies, Opened};
use isoplane_drivers::memory::MemoryConfig;
use isoplane_drivers::{MemoryPort, Port};
use isoplane_memory::ring::HEADER_BYTES;
use isoplane_memory::{Pool, PoolConfig, Region};
use std::os::fd::OwnedFd;
use std::sync::Arc;

const RING: u32 = 128;

#[derive(Default)]
struct Pair {
    link: Option<OwnedFd>,
}

impl Fixture for Pair {
    fn pool(&mut self) -> Arc<Pool> {
        Pool::create(&PoolConfig::new("memory-test", 1024)).unwrap()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let config = MemoryConfig { ring: RING, ..MemoryConfig::new("mem-a") };
        let (a, b) = MemoryPort::pair(pool, &config, "mem-b").unwrap();
        self.link = Some(a.link_fd().try_clone_to_owned().unwrap());
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn window(&self) -> usize {
        100
    }
    fn max_packet(&self, _port: &dyn Port) -> u32 {
        9014
    }
    /// Plays a peer gone mad: writes random indices and descriptors in all four rings.
    fn lie(&mut self, _opened: &Opened, round: u64) -> Lies {
        let region = Region::from_fd(self.link.take().unwrap(), true).unwrap();
        let word = |at: usize| region.slice::<u32>(at, 1).unwrap();
        let magic = u32::from_be_bytes(*b"IRNG");
        let mut state = round;
        let mut random = || {
            state = split_mix(state);
            state
        };
        for at in (0..region.len() - HEADER_BYTES).step_by(64) {
            // SAFETY: aligned and inside the mapping; ports reach these words by atomics and volatile
            // copies only, as this does.
            unsafe {
                if word(at).read_volatile() != magic {
                    continue;
                }
                for index in [128, 256] {
                    let to = word(at + index);
                    match random() % 4 {
                        0 => to.write_volatile(random() as u32),
                        1 => to.write_volatile(to.read_volatile().wrapping_add(random() as u32 % 300)),
                        2 => to.write_volatile(to.read_volatile().wrapping_sub(random() as u32 % 300)),
                        _ => {}
                    }
                }
                for _ in 0..random() % 64 {
                    let slot = HEADER_BYTES + (random() as usize % (RING as usize * 2)) * 4;
                    // Addresses inside the pool, lengths and flags that may be right, and anything.
                    let value = match random() % 3 {
                        0 => random() as u32 % (1024 * 2048),
                        1 => random() as u32 % 2048,
                        _ => random() as u32,
                    };
                    word(at + slot).write_volatile(value);
                }
            }
        }
        Lies::Told
    }
}

isoplane_drivers::conformance_tests!(link, Pair::default());
