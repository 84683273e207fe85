//! The words of a trie in shared memory: a direct table of the top bits, and nodes.
//!
//! Contract: whatever the words say, a lookup reads inside the region and nowhere else, so a word that
//! is overwritten by mistake costs wrong answers and never memory safety. The writer builds a node where
//! no reader is, and links it by one word; of a linked node only the entries change, each whole.
//!
//! An *entry* is a next hop (24 bits), or [`CHILD`] and the unit at which a node begins. A node is
//!
//! | bytes | what |
//! |---|---|
//! | 0-31 | 256 bits, one for each value of the next byte of the address: set where a run of equal entries begins; the first is always set |
//! | 32-35 | for each 64 of those bits, how many are set before them |
//! | 36- | the entries, one for each set bit |
//!
//! and takes whole units of 64 bytes, so what is read first is one cache line, and the first seven
//! entries are in it.
#![allow(unsafe_code, reason = "words in shared memory; see each block")]

use super::key::Key;
use crate::tables::next_hop::NextHopId;
use isoplane_memory::{BATCH, HugePages, Region, RegionConfig, RegionError};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Marks an entry that names a node.
pub(super) const CHILD: u32 = 1 << 31;
/// Bytes that a node's place is counted in: a cache line.
pub(super) const UNIT: usize = 64;
/// Bits of an address that the direct table takes.
pub(super) const DIRECT_BITS: u32 = 16;
/// Slots of the direct table.
const DIRECT: usize = 1 << DIRECT_BITS;
pub(super) const DIRECT_BYTES: usize = DIRECT * 4;
/// Where the counts are in a node.
pub(super) const COUNTS: usize = 32;
/// Where the entries are in a node.
const ENTRIES: usize = 36;
/// Set bits that a lookup can count, whatever a node says: a count of 8 bits and a word.
const MOST_COUNTED: usize = 255 + 64;
/// Bytes behind the start of the last unit that a lookup can reach.
const REACH: usize = COUNTS + 4 * MOST_COUNTED + 4;

/// Which of 256 slots begin a run.
pub(super) type Bits = [u64; 4];

/// Units of a node with so many entries.
pub(super) const fn units_of(entries: usize) -> u32 {
    ((ENTRIES + 4 * entries).div_ceil(UNIT)) as u32
}

/// Entries that a node of so many units has room for.
pub(super) const fn room_of(units: u32) -> usize {
    let room = (units as usize * UNIT - ENTRIES) / 4;
    if room < 256 { room } else { 256 }
}

/// Number of set bits.
pub(super) fn count(bits: &Bits) -> usize {
    bits.iter().map(|word| word.count_ones() as usize).sum()
}

/// Which entry holds a slot: the set bits up to it, less one.
pub(super) fn rank(bits: &Bits, slot: u8) -> usize {
    let word = usize::from(slot >> 6);
    let before: u32 = bits[..word].iter().map(|word| word.count_ones()).sum();
    (before + (bits[word] << (63 - (slot & 63))).count_ones()).saturating_sub(1) as usize
}

/// Where a node is: a byte of the region at which one fits.
#[derive(Debug, Clone, Copy, Default)]
struct Node(u32);

/// Where an entry is: a byte of the region that is known to be inside and aligned.
#[derive(Debug, Clone, Copy, Default)]
struct At(u32);

/// The words. The program stores, workers load.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    base: NonNull<u8>,
    /// Units at which a node may begin, less one: they are a power of two.
    mask: u32,
    region: Arc<Region>,
}

// SAFETY: only atomics are reached, in a region that the value keeps mapped.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Most units: the place of an entry is 32 bits.
    pub(super) const MOST_UNITS: u32 = 1 << 25;

    /// Takes memory for `units` units of nodes, or the next power of two; all direct slots say that there is no next hop.
    pub(super) fn create(name: &str, units: u32) -> Result<Self, RegionError> {
        let units = units.clamp(1, Self::MOST_UNITS).next_power_of_two();
        let bytes = DIRECT_BYTES + (units as usize - 1) * UNIT + REACH;
        // A table for a laboratory does not need a huge page of its own.
        let huge_pages = if bytes >= 1 << 21 { HugePages::Prefer2M } else { HugePages::Never };
        let region = Region::create(&RegionConfig { huge_pages, ..RegionConfig::new(name, bytes) })?;
        debug_assert!(region.len() >= bytes);
        Ok(Self { base: region.base(), mask: units - 1, region })
    }

    /// Units for nodes.
    pub(super) const fn units(&self) -> u32 {
        self.mask + 1
    }

    /// Bytes of the whole region.
    pub(super) fn bytes(&self) -> usize {
        self.region.len()
    }

    /// Bytes of the direct table.
    pub(super) const fn direct_bytes() -> usize {
        DIRECT_BYTES
    }

    /// The node that an entry names, wherever that is; the first unit's for a next hop.
    #[inline(always)]
    const fn node(&self, entry: u32) -> Node {
        // All ones for a child. Not a comparison: what the compiler makes a branch of cannot be foreseen.
        let child = (entry as i32 >> 31) as u32;
        Node((entry & child & self.mask) * UNIT as u32)
    }

    /// First byte of a node.
    #[inline(always)]
    const fn byte_of(node: Node) -> usize {
        DIRECT_BYTES + node.0 as usize
    }

    /// A word of the region.
    ///
    /// # Safety
    /// `at` is aligned for `T`, and `at + size_of::<T>()` is not past the end.
    #[inline(always)]
    unsafe fn word<T>(&self, at: usize) -> &T {
        // SAFETY: the caller says so; the region is page-aligned and lives as long as `self`. `T` is an
        // atomic in this module, for which every bit pattern is a value.
        unsafe { self.base.add(at).cast::<T>().as_ref() }
    }

    /// The entry of a direct slot.
    #[inline(always)]
    fn direct(&self, slot: u16) -> u32 {
        // SAFETY: there are 2^16 slots of four bytes at the start of the region.
        unsafe { self.word::<AtomicU32>(usize::from(slot) * 4) }.load(Ordering::Acquire)
    }

    /// Where a node keeps its entry for the next byte of an address.
    #[inline(always)]
    fn locate(&self, node: Node, byte: u8) -> At {
        let node = Self::byte_of(node);
        let group = usize::from(byte >> 6);
        // SAFETY: `node` is at most the start of the last unit, behind which `REACH` bytes are; node and
        // group are multiples of 8.
        let bits = unsafe { self.word::<AtomicU64>(node + group * 8) }.load(Ordering::Relaxed);
        // SAFETY: as above.
        let before = unsafe { self.word::<AtomicU8>(node + COUNTS + group) }.load(Ordering::Relaxed);
        let counted = u32::from(before) + (bits << (!byte & 63)).count_ones();
        // The first entry is behind the counts, and belongs to the first set bit. At most MOST_COUNTED.
        At((node + COUNTS) as u32 + counted * 4)
    }

    /// The entry there.
    #[inline(always)]
    fn entry(&self, at: At) -> u32 {
        // SAFETY: an `At` is zero, or `locate` made it in the same lookup, and it is inside as `REACH` says.
        unsafe { self.word::<AtomicU32>(at.0 as usize) }.load(Ordering::Acquire)
    }

    /// Fetches what [`locate`](Self::locate) will read.
    #[inline(always)]
    fn prefetch_node(&self, node: Node) {
        self.prefetch(Self::byte_of(node));
    }

    /// Fetches what [`entry`](Self::entry) will read.
    #[inline(always)]
    fn prefetch_entry(&self, at: At) {
        self.prefetch(at.0 as usize);
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: SSE is in every x86-64; a prefetch reads nothing that the program can see, and
            // cannot fault.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().wrapping_add(at).cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }

    /// The next hop of an address.
    #[inline(always)]
    fn find<K: Key>(&self, key: &K) -> NextHopId {
        let mut entry = self.direct(key.top());
        for level in 0..K::LEVELS {
            if entry & CHILD == 0 {
                break;
            }
            entry = self.entry(self.locate(self.node(entry), key.byte(level)));
        }
        NextHopId::from_low_bits(entry)
    }

    /// The next hops of the first `many` addresses: one level of the trie at a time, for all that are not
    /// done, so that they wait for memory together. No branch depends on what is found but the number of
    /// those that go on.
    #[inline(always)]
    fn find_batch<K: Key>(&self, keys: &[K; BATCH], many: usize, found: &mut [NextHopId; BATCH]) {
        // Which are not done, and where each has come to.
        let mut left = [0_u8; BATCH];
        let mut nodes = [Node(0); BATCH];
        let mut places = [At(0); BATCH];
        let mut pending = 0;
        for at in 0..many.min(BATCH) {
            let entry = self.direct(keys[at].top());
            found[at] = NextHopId::from_low_bits(entry);
            left[pending % BATCH] = at as u8;
            nodes[pending % BATCH] = self.node(entry);
            // Of those that are done it fetches the first unit; to ask first costs more.
            self.prefetch_node(nodes[pending % BATCH]);
            pending += usize::from(entry & CHILD != 0);
        }
        for level in 0..K::LEVELS {
            if pending == 0 {
                break;
            }
            for at in 0..pending.min(BATCH) {
                let key = &keys[usize::from(left[at]) % BATCH];
                places[at] = self.locate(nodes[at], key.byte(level));
                self.prefetch_entry(places[at]);
            }
            let mut still = 0;
            for at in 0..pending.min(BATCH) {
                let entry = self.entry(places[at]);
                let which = left[at];
                found[usize::from(which) % BATCH] = NextHopId::from_low_bits(entry);
                left[still % BATCH] = which;
                nodes[still % BATCH] = self.node(entry);
                self.prefetch_node(nodes[still % BATCH]);
                still += usize::from(entry & CHILD != 0);
            }
            pending = still;
        }
    }

    /// As [`find`](Self::find), for CPUs that count bits.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "popcnt")]
    fn find_popcnt<K: Key>(&self, key: &K) -> NextHopId {
        self.find(key)
    }

    /// As [`find_batch`](Self::find_batch), for CPUs that count bits and shift by any register.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "popcnt,bmi1,bmi2")]
    fn find_batch_popcnt<K: Key>(&self, keys: &[K; BATCH], many: usize, found: &mut [NextHopId; BATCH]) {
        self.find_batch(keys, many, found);
    }

    /// The next hop of an address.
    #[inline]
    pub(super) fn lookup<K: Key>(&self, key: &K) -> NextHopId {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("popcnt") {
            // SAFETY: the CPU was just asked.
            return unsafe { self.find_popcnt(key) };
        }
        self.find(key)
    }

    /// The next hops of the first `many` addresses.
    #[inline]
    pub(super) fn lookup_batch<K: Key>(
        &self,
        keys: &[K; BATCH],
        many: usize,
        found: &mut [NextHopId; BATCH],
    ) {
        #[cfg(target_arch = "x86_64")]
        if super::vector::available() {
            // SAFETY: the CPU was just asked, and the region is this one.
            return unsafe { super::vector::find_batch(self.base, self.mask, keys, many, found) };
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("popcnt")
            && std::arch::is_x86_feature_detected!("bmi1")
            && std::arch::is_x86_feature_detected!("bmi2")
        {
            // SAFETY: the CPU was just asked.
            return unsafe { self.find_batch_popcnt(keys, many, found) };
        }
        self.find_batch(keys, many, found);
    }

    /// Changes the entry of a direct slot.
    pub(super) fn set_direct(&self, slot: u16, entry: u32) {
        // SAFETY: as in `direct`.
        let word = unsafe { self.word::<AtomicU32>(usize::from(slot) * 4) };
        // A line that workers read is left alone when nothing changes.
        if word.load(Ordering::Relaxed) != entry {
            word.store(entry, Ordering::Release);
        }
    }

    /// Writes the head of a node that no reader can find. False when the node would be past the end.
    pub(super) fn write_head(&self, unit: u32, bits: &Bits) -> bool {
        if unit > self.mask {
            return false;
        }
        let node = Self::byte_of(self.node(CHILD | unit));
        let mut before = 0;
        for (group, word) in bits.iter().enumerate() {
            // SAFETY: as in `locate`.
            unsafe { self.word::<AtomicU64>(node + group * 8) }.store(*word, Ordering::Relaxed);
            // SAFETY: as in `locate`.
            unsafe { self.word::<AtomicU8>(node + COUNTS + group) }.store(before, Ordering::Relaxed);
            // At most 192 where it is stored.
            before = before.wrapping_add(word.count_ones() as u8);
        }
        true
    }

    /// Changes entry `index` of a node. False past the end of what a node can have.
    pub(super) fn set_entry(&self, unit: u32, index: usize, entry: u32) -> bool {
        if unit > self.mask || index >= 256 {
            return false;
        }
        // SAFETY: inside, as `index < MOST_COUNTED`.
        let word =
            unsafe { self.word::<AtomicU32>(Self::byte_of(self.node(CHILD | unit)) + ENTRIES + index * 4) };
        if word.load(Ordering::Relaxed) != entry {
            word.store(entry, Ordering::Release);
        }
        true
    }

    /// The answers of every way to look a batch up that this CPU has.
    #[cfg(test)]
    pub(super) fn every_way<K: Key>(&self, keys: &[K; BATCH]) -> Vec<[NextHopId; BATCH]> {
        let mut all = vec![std::array::from_fn(|at| self.find(&keys[at])); 2];
        self.find_batch(keys, BATCH, &mut all[1]);
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("bmi2") {
            all.push([NextHopId::NONE; BATCH]);
            // SAFETY: the CPU was just asked; what has BMI2 has the other two.
            unsafe { self.find_batch_popcnt(keys, BATCH, &mut all[2]) };
        }
        #[cfg(target_arch = "x86_64")]
        if super::vector::available() {
            let mut found = [NextHopId::NONE; BATCH];
            // SAFETY: the CPU was just asked, and the region is this one.
            unsafe { super::vector::find_batch(self.base, self.mask, keys, BATCH, &mut found) };
            all.push(found);
        }
        all
    }

    /// Overwrites a word of the region, as a fault would.
    #[cfg(test)]
    pub(super) fn spoil(&self, word: usize, value: u32) {
        let at = word * 4 % self.region.len();
        // SAFETY: a whole word, and inside; the region is whole pages.
        unsafe { self.word::<AtomicU32>(at) }.store(value, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_read_as_it_was_written() {
        let shared = Shared::create("test", 40).unwrap();
        assert_eq!(shared.units(), 64);
        let bits = [1 | 1 << 63, 0, 1, u64::MAX];
        assert!(shared.write_head(3, &bits));
        for index in 0..count(&bits) {
            assert!(shared.set_entry(3, index, 1000 + index as u32));
        }
        for slot in 0..=255 {
            let entry = shared.entry(shared.locate(shared.node(CHILD | 3), slot));
            assert_eq!(entry, 1000 + rank(&bits, slot) as u32, "slot {slot}");
        }
        assert_eq!((rank(&bits, 62), rank(&bits, 63), rank(&bits, 128), rank(&bits, 255)), (0, 1, 2, 66));
        assert!(!shared.write_head(64, &bits));
        assert!(!shared.set_entry(64, 0, 1));
        assert!(!shared.set_entry(0, 256, 1));
        assert_eq!((units_of(7), units_of(8), units_of(256)), (1, 2, 17));
        assert_eq!((room_of(1), room_of(2), room_of(17)), (7, 23, 256));
    }
}
