//! The forwarding database: which station was last seen on which port.
//!
//! Contract: a table of fixed size, allocated once. An address has its place in one of two buckets of
//! four entries, a cache line each, chosen by a keyed hash, so that nobody outside can aim at a bucket.
//! Every operation looks at two buckets at most, but for [`Fdb::iter`], which is cold, and the sweep,
//! which looks at a few a turn. When both buckets are full of live stations, [`WhenFull`] decides.
//!
//! An entry is *live* while it is static, or was seen within the ageing time and its port was not
//! flushed since. One that is not is never found, whether the sweep has reached it or not.
//! Sources: IEEE 802.1Q-2022 8.8 (filtering database), 8.8.3 (ageing).

use crate::app::PortId;
use crate::wire::{MacAddress, VlanId};
use std::time::Duration;

/// Ports that a table (and so a bridge) can tell apart.
pub const MAX_PORTS: usize = 64;
/// Entries in a bucket: a cache line.
const WAYS: usize = 4;
/// Smallest and largest table, in entries.
pub(super) const CAPACITY: std::ops::RangeInclusive<usize> = 8..=1 << 20;

/// What happens to a new station when both buckets of its address are full of live ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// It is not learned and its packets are flooded: stations that are known stay known, whatever
    /// floods the table with made-up addresses.
    #[default]
    Refuse,
    /// It takes the place of the one that was not seen for the longest time (never of a static one):
    /// for networks with more stations than entries, most of them quiet.
    EvictOldest,
}

/// What became of a source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learned {
    /// It was known on this port, or is now.
    Known,
    /// It was not learned: no room, over the port's limit, or static elsewhere.
    Refused,
}

/// Events since they were last taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Events {
    pub(super) learned: u64,
    pub(super) moved: u64,
    pub(super) aged: u64,
    pub(super) flushed: u64,
    pub(super) evicted: u64,
    pub(super) table_full: u64,
    pub(super) port_limit: u64,
    pub(super) static_conflict: u64,
}

/// A station, as a program sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Station {
    /// Its address.
    pub mac: MacAddress,
    /// Its VLAN; `None` on a bridge that ignores VLANs.
    pub vlan: Option<VlanId>,
    /// Where it is.
    pub port: PortId,
    /// Time since a packet from it came in; `None` for a static entry.
    pub age: Option<Duration>,
}

/// Keys and values of four entries. A key of 0 is a vacant entry.
#[derive(Clone)]
#[repr(align(64))]
struct Bucket {
    keys: [u64; WAYS],
    values: [Value; WAYS],
}

const _: () = assert!(size_of::<Bucket>() == 64);

/// Address and VLAN of a station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key(u64);

impl Key {
    #[inline(always)]
    pub(super) const fn new(mac: MacAddress, vid: u16) -> Self {
        Self(1 << 63 | (vid as u64 & 0xfff) << 48 | mac.to_bits())
    }
}

/// `| seen, in milliseconds: 39 bits (17 years) | static: 1 | generation of the port: 16 | port: 8 |`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value(u64);

impl Value {
    const STATIC: u64 = 1 << 24;

    #[inline(always)]
    const fn new(port: u8, generation: u16, seen: u64) -> Self {
        Self(seen << 25 | (generation as u64) << 8 | port as u64)
    }

    #[inline(always)]
    const fn port(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    const fn generation(self) -> u16 {
        (self.0 >> 8) as u16
    }

    #[inline(always)]
    const fn is_static(self) -> bool {
        self.0 & Self::STATIC != 0
    }

    #[inline(always)]
    const fn seen(self) -> u64 {
        self.0 >> 25
    }
}

/// Per-port state.
#[derive(Debug, Clone, Copy)]
struct PortState {
    /// Entries of other generations are dead; a flush is one increment.
    generation: u16,
    /// Entries learned in this generation, dead ones that were not reclaimed yet included.
    learned: u32,
    limit: u32,
}

/// The forwarding database. A [`Bridge`](super::Bridge) has one; programs read it.
pub struct Fdb {
    buckets: Box<[Bucket]>,
    mask: u64,
    seed: [u64; 4],
    ageing_ms: u64,
    when_full: WhenFull,
    ports: [PortState; MAX_PORTS],
    statics: u32,
    next_sweep: usize,
    pub(super) events: Events,
}

impl std::fmt::Debug for Fdb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fdb").field("len", &self.len()).field("capacity", &self.capacity()).finish()
    }
}

impl Fdb {
    /// A table for at least `capacity` stations (rounded up to a power of two).
    pub(super) fn new(capacity: usize, ageing: Duration, when_full: WhenFull, seed: u64) -> Self {
        let buckets = capacity.clamp(*CAPACITY.start(), *CAPACITY.end()).next_power_of_two() / WAYS;
        let empty = Bucket { keys: [0; WAYS], values: [Value(0); WAYS] };
        // SplitMix64 (Steele, Lea, Flood 2014) spreads the one seed over the four that the hash takes.
        let mut state = seed;
        let seed = std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ z >> 31) | 1
        });
        Self {
            buckets: vec![empty; buckets].into_boxed_slice(),
            mask: buckets as u64 - 1,
            seed,
            ageing_ms: u64::try_from(ageing.as_millis()).unwrap_or(u64::MAX),
            when_full,
            ports: [PortState { generation: 0, learned: 0, limit: u32::MAX }; MAX_PORTS],
            statics: 0,
            next_sweep: 0,
            events: Events::default(),
        }
    }

    /// How long stations stay known from now on, those that are known included.
    pub(super) const fn set_ageing(&mut self, ageing: Duration) {
        self.ageing_ms = ageing.as_millis() as u64;
    }

    pub(super) fn set_limit(&mut self, port: PortId, limit: u32) {
        if let Some(port) = self.ports.get_mut(port.index()) {
            port.limit = limit;
        }
    }

    /// Stations held: static ones, and learned ones that were not reclaimed yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.statics as usize + self.ports.iter().map(|p| p.learned as usize).sum::<usize>()
    }

    /// True when no station is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stations that fit at most; fixed when the bridge was made.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.buckets.len() * WAYS
    }

    /// Where a station is, at time `now` in nanoseconds of the worker's clock. `vlan` is `None` on a
    /// bridge that ignores VLANs.
    #[must_use]
    pub fn station(&self, vlan: Option<VlanId>, mac: MacAddress, now: u64) -> Option<Station> {
        let key = Key::new(mac, vlan.map_or(0, VlanId::get));
        let (bucket, slot) = self.find(key)?;
        self.station_at(bucket, slot, millis(now))
    }

    /// Walks all live stations, at time `now` in nanoseconds of the worker's clock. Cold: looks at the
    /// whole table.
    pub fn iter(&self, now: u64) -> impl Iterator<Item = Station> + '_ {
        let slots = (0..self.buckets.len()).flat_map(|b| (0..WAYS).map(move |slot| (b, slot)));
        slots.filter_map(move |(bucket, slot)| self.station_at(bucket, slot, millis(now)))
    }

    fn station_at(&self, bucket: usize, slot: usize, now_ms: u64) -> Option<Station> {
        let b = self.buckets.get(bucket)?;
        let (key, value) = (b.keys[slot], b.values[slot]);
        let age = Duration::from_millis(now_ms.saturating_sub(value.seen()));
        (key != 0 && self.live(value, now_ms)).then(|| Station {
            mac: MacAddress::from_bits(key & 0xffff_ffff_ffff),
            vlan: VlanId::new((key >> 48 & 0xfff) as u16),
            port: PortId(value.port()),
            age: (!value.is_static()).then_some(age),
        })
    }

    /// Two multiply-and-fold rounds over secret words: not a cryptographic hash, but without the seed
    /// nobody can compute which addresses share a bucket, and the table does not tell.
    #[inline(always)]
    fn places(&self, key: Key) -> (usize, usize) {
        let fold = |a: u64, b: u64| {
            let wide = u128::from(a) * u128::from(b);
            wide as u64 ^ (wide >> 64) as u64
        };
        let hash = fold(fold(key.0 ^ self.seed[0], self.seed[1]) ^ self.seed[2], self.seed[3]);
        ((hash & self.mask) as usize, (hash >> 32 & self.mask) as usize)
    }

    #[inline(always)]
    fn generation(&self, port: u8) -> u16 {
        self.ports[usize::from(port) % MAX_PORTS].generation
    }

    #[inline(always)]
    fn live(&self, value: Value, now_ms: u64) -> bool {
        value.is_static()
            || value.generation() == self.generation(value.port())
                && now_ms.saturating_sub(value.seen()) <= self.ageing_ms
    }

    /// Where an address is held. The entries of a bucket are compared without a branch between them:
    /// which of them matches cannot be predicted. That it is in the first bucket mostly can.
    #[inline(always)]
    fn find(&self, key: Key) -> Option<(usize, usize)> {
        let (first, second) = self.places(key);
        for place in [first, second] {
            let keys = &self.buckets[place].keys;
            let slot = usize::from(keys[1] == key.0)
                + 2 * usize::from(keys[2] == key.0)
                + 3 * usize::from(keys[3] == key.0);
            if keys[slot] == key.0 {
                return Some((place, slot));
            }
        }
        None
    }

    /// The port that packets for a station leave by.
    #[inline(always)]
    pub(super) fn port_of(&self, key: Key, now_ms: u64) -> Option<u8> {
        let (bucket, slot) = self.find(key)?;
        let value = self.buckets[bucket].values[slot];
        self.live(value, now_ms).then_some(value.port())
    }

    /// Notes that a packet from a station came in on `port`.
    #[inline(always)]
    pub(super) fn learn(&mut self, key: Key, port: u8, now_ms: u64) -> Learned {
        let value = Value::new(port, self.generation(port), now_ms);
        if let Some((bucket, slot)) = self.find(key) {
            let held = &mut self.buckets[bucket].values[slot];
            // The same port and generation, not static: all bits but the time agree.
            if (held.0 ^ value.0) & 0x1ff_ffff == 0 && now_ms.saturating_sub(held.seen()) <= self.ageing_ms {
                if *held != value {
                    *held = value;
                }
                return Learned::Known;
            }
            return self.relearn(key, value, bucket, slot, now_ms);
        }
        self.insert(key, value, now_ms)
    }

    /// The address has an entry, but it is static, on another port, or dead.
    #[cold]
    #[inline(never)]
    fn relearn(&mut self, key: Key, value: Value, bucket: usize, slot: usize, now_ms: u64) -> Learned {
        let held = self.buckets[bucket].values[slot];
        if held.is_static() {
            if held.port() == value.port() {
                return Learned::Known;
            }
            self.events.static_conflict += 1;
            return Learned::Refused;
        }
        if !self.live(held, now_ms) {
            self.reclaim(bucket, slot);
            return self.insert(key, value, now_ms);
        }
        if !self.admit(value.port()) {
            return Learned::Refused;
        }
        self.ports[usize::from(held.port()) % MAX_PORTS].learned -= 1;
        self.ports[usize::from(value.port()) % MAX_PORTS].learned += 1;
        self.buckets[bucket].values[slot] = value;
        self.events.moved += 1;
        Learned::Known
    }

    fn admit(&mut self, port: u8) -> bool {
        let port = &self.ports[usize::from(port) % MAX_PORTS];
        let admitted = port.learned < port.limit;
        self.events.port_limit += u64::from(!admitted);
        admitted
    }

    #[cold]
    #[inline(never)]
    fn insert(&mut self, key: Key, value: Value, now_ms: u64) -> Learned {
        if !self.admit(value.port()) {
            return Learned::Refused;
        }
        let Some((bucket, slot)) = self.vacate(key, now_ms, self.when_full) else {
            self.events.table_full += 1;
            return Learned::Refused;
        };
        self.buckets[bucket].keys[slot] = key.0;
        self.buckets[bucket].values[slot] = value;
        self.ports[usize::from(value.port()) % MAX_PORTS].learned += 1;
        self.events.learned += 1;
        Learned::Known
    }

    /// A vacant entry for an address: in the emptier of its two buckets, dead entries reclaimed.
    fn vacate(&mut self, key: Key, now_ms: u64, when_full: WhenFull) -> Option<(usize, usize)> {
        let (first, second) = self.places(key);
        let mut best = None;
        let mut most = 0;
        for place in [first, second] {
            let mut vacant = 0;
            let mut last = 0;
            for slot in 0..WAYS {
                if self.buckets[place].keys[slot] != 0 && !self.live(self.buckets[place].values[slot], now_ms)
                {
                    self.reclaim(place, slot);
                }
                if self.buckets[place].keys[slot] == 0 {
                    vacant += 1;
                    last = slot;
                }
            }
            if vacant > most {
                most = vacant;
                best = Some((place, last));
            }
        }
        if best.is_some() || when_full == WhenFull::Refuse {
            return best;
        }
        let all = [first, second].into_iter().flat_map(|b| (0..WAYS).map(move |slot| (b, slot)));
        let learned = all.filter(|(b, slot)| !self.buckets[*b].values[*slot].is_static());
        let oldest = learned.min_by_key(|(b, slot)| self.buckets[*b].values[*slot].seen())?;
        self.forget_at(oldest.0, oldest.1);
        self.events.evicted += 1;
        Some(oldest)
    }

    /// Empties an entry that is dead: aged, or flushed (which was counted then).
    fn reclaim(&mut self, bucket: usize, slot: usize) {
        let value = self.buckets[bucket].values[slot];
        if value.generation() == self.generation(value.port()) {
            self.events.aged += 1;
        }
        self.forget_at(bucket, slot);
    }

    fn forget_at(&mut self, bucket: usize, slot: usize) {
        let value = self.buckets[bucket].values[slot];
        self.buckets[bucket].keys[slot] = 0;
        if value.is_static() {
            self.statics -= 1;
        } else if value.generation() == self.generation(value.port()) {
            self.ports[usize::from(value.port()) % MAX_PORTS].learned -= 1;
        }
    }

    /// Puts a static entry in, in place of a learned one where it must. False when both buckets are
    /// full of static entries.
    pub(super) fn pin(&mut self, key: Key, port: PortId, now_ms: u64) -> bool {
        if let Some((bucket, slot)) = self.find(key) {
            self.forget_at(bucket, slot);
        }
        let Some((bucket, slot)) = self.vacate(key, now_ms, WhenFull::EvictOldest) else { return false };
        self.buckets[bucket].keys[slot] = key.0;
        self.buckets[bucket].values[slot] = Value(u64::from(port.0) | Value::STATIC);
        self.statics += 1;
        true
    }

    /// Takes a station out, static or learned; says whether it was there.
    pub(super) fn remove(&mut self, key: Key) -> bool {
        let found = self.find(key);
        if let Some((bucket, slot)) = found {
            self.forget_at(bucket, slot);
        }
        found.is_some()
    }

    /// Forgets all stations learned on a port, at once; static ones stay.
    ///
    /// The entries are reclaimed by later sweeps. A port's generation repeats after 65536 flushes: the
    /// entries of the first would be live again if no sweep had passed them in all that time.
    pub(super) fn flush(&mut self, port: PortId) {
        if let Some(port) = self.ports.get_mut(port.index()) {
            self.events.flushed += u64::from(port.learned);
            port.learned = 0;
            port.generation = port.generation.wrapping_add(1);
        }
    }

    /// Forgets all learned stations and the events about them; looks at the whole table. Of no use to a
    /// bridge at work: [`Fdb::flush`] is.
    pub(super) fn forget_learned(&mut self) {
        for bucket in &mut self.buckets {
            for (key, value) in bucket.keys.iter_mut().zip(&mut bucket.values) {
                if !value.is_static() {
                    (*key, *value) = (0, Value(0));
                }
            }
        }
        for port in &mut self.ports {
            port.learned = 0;
        }
        self.next_sweep = 0;
        self.events = Events::default();
    }

    /// Reclaims the dead entries of the next `buckets` buckets.
    #[inline(always)]
    pub(super) fn sweep(&mut self, buckets: usize, now_ms: u64) {
        for _ in 0..buckets.min(self.buckets.len()) {
            let at = self.next_sweep;
            self.next_sweep = (at + 1) % self.buckets.len();
            for slot in 0..WAYS {
                let b = &self.buckets[at];
                if b.keys[slot] != 0 && !self.live(b.values[slot], now_ms) {
                    self.reclaim(at, slot);
                }
            }
        }
    }
}

/// The table's time: milliseconds, from the worker's nanoseconds.
#[inline(always)]
pub(super) const fn millis(nanos: u64) -> u64 {
    nanos / 1_000_000
}
