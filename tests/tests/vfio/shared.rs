//! Memory that is shared with devices, found by its name as anybody else could: `/proc/self/maps` and `/proc/self/mem`.

use isoplane_memory::Pool;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

/// A mapping of this process.
pub(crate) struct Mapped {
    memory: File,
    start: u64,
    pub(crate) bytes: usize,
}

impl Mapped {
    /// The one whose name contains this.
    pub(crate) fn named(name: &str) -> Self {
        let maps = fs::read_to_string("/proc/self/maps").expect("maps");
        let line = maps.lines().find(|line| line.contains(name));
        let line = line.unwrap_or_else(|| panic!("no mapping is called {name}:\n{maps}"));
        let range = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
        let [start, end] = [range.0, range.1].map(|at| u64::from_str_radix(at, 16).expect("an address"));
        Self::at(start, (end - start) as usize)
    }

    /// The chunks of a pool.
    pub(crate) fn of_pool(pool: &Pool) -> Self {
        Self::at(pool.chunks_base().as_ptr() as u64, (pool.chunks() * pool.chunk_bytes()) as usize)
    }

    fn at(start: u64, bytes: usize) -> Self {
        let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem").expect("our memory");
        Self { memory, start, bytes }
    }

    pub(crate) fn read(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        self.memory.read_exact_at(&mut word, self.start + at as u64).expect("mapped");
        u64::from_le_bytes(word)
    }

    pub(crate) fn write(&self, at: usize, word: u64) {
        self.memory.write_all_at(&word.to_le_bytes(), self.start + at as u64).expect("mapped");
    }

    /// All of it, as it is now.
    pub(crate) fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes];
        self.memory.read_exact_at(&mut bytes, self.start).expect("mapped");
        bytes
    }
}
