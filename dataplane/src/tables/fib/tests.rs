//! Against a list of prefixes that is asked one length after the other.

use super::super::epochs::{Epoch, Epochs, Immediate};
use super::*;
use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;
use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a table should hold: next hops by length and first address, the latter in the high bits.
#[derive(Debug, Clone, Default)]
struct Oracle {
    routes: HashMap<(u8, u128), NextHopId>,
}

impl Oracle {
    fn lookup(&self, bits: u128) -> NextHopId {
        let matching = (0..=128).rev().find_map(|length| self.routes.get(&(length, cut(bits, length))));
        matching.copied().unwrap_or(NextHopId::NONE)
    }
}

fn cut(bits: u128, length: u8) -> u128 {
    bits & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

fn id(n: u32) -> NextHopId {
    NextHopId::from_low_bits(n)
}

/// Both kinds of addresses, from the high bits of a number.
trait Width: Key {
    const BITS: u8;
    fn key(bits: u128) -> Self;
}

impl Width for u32 {
    const BITS: u8 = 32;
    fn key(bits: u128) -> Self {
        (bits >> 96) as Self
    }
}

impl Width for u128 {
    const BITS: u8 = 128;
    fn key(bits: u128) -> Self {
        bits
    }
}

fn net<K: Width>(bits: u128, length: u8) -> K::Net {
    K::net_of(cut(bits, length), length).unwrap()
}

/// Addresses that share many of their bits: each byte is one of few.
fn address() -> impl Strategy<Value = u128> {
    let byte = prop_oneof![4 => Just(0_u8), 2 => Just(255), 2 => Just(0x80), 1 => Just(63), 1 => Just(64),
        1 => any::<u8>()];
    proptest::collection::vec(byte, 16)
        .prop_map(|bytes| bytes.into_iter().fold(0, |bits, byte| bits << 8 | u128::from(byte)))
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u128, u8, u32),
    Remove(u128, u8),
    /// Removes one that is there.
    RemoveOne(prop::sample::Index),
    Collect,
}

fn step(most: u8) -> impl Strategy<Value = Step> {
    let length = prop_oneof![0..=most, prop::sample::select(vec![0, 8, 15, 16, 17, 23, 24, 25, 32, most])]
        .prop_map(move |length| length.min(most));
    let next_hop = prop_oneof![0_u32..8, Just((1 << 24) - 1), any::<u32>()];
    prop_oneof![
        6 => (address(), length.clone(), next_hop).prop_map(|(a, l, n)| Step::Insert(a, l, n)),
        1 => (address(), length).prop_map(|(a, l)| Step::Remove(a, l)),
        3 => any::<prop::sample::Index>().prop_map(Step::RemoveOne),
        1 => Just(Step::Collect),
    ]
}

/// First and last address of every prefix, the ones beside it, and more.
fn probes(oracle: &Oracle, more: &[u128]) -> Vec<u128> {
    let mut probes = more.to_vec();
    for (length, first) in oracle.routes.keys() {
        let last = first | !cut(u128::MAX, *length);
        probes.extend([*first, last, first.wrapping_sub(1), last.wrapping_add(1)]);
    }
    probes
}

fn agree<K: Width>(writer: &FibWriter<K>, oracle: &Oracle, more: &[u128]) -> Result<(), TestCaseError> {
    let reader = writer.reader();
    // Bits that the addresses have not are none.
    let probes: Vec<_> = probes(oracle, more).into_iter().map(|bits| cut(bits, K::BITS)).collect();
    let keys: Vec<K> = probes.iter().map(|bits| K::key(*bits)).collect();
    let mut found = vec![id(77); keys.len()];
    reader.lookup_many(&keys, &mut found);
    for (batch, found) in keys.chunks_exact(BATCH).zip(found.chunks_exact(BATCH)) {
        for way in reader.shared.every_way(batch.try_into().unwrap()) {
            prop_assert_eq!(way.as_slice(), found);
        }
    }
    for ((bits, key), found) in probes.iter().zip(keys).zip(found) {
        let right = oracle.lookup(*bits);
        prop_assert_eq!(reader.lookup(key), right, "address {:x}", bits);
        prop_assert_eq!(found, right, "address {:x}, one of many", bits);
    }
    let mut all = HashMap::new();
    writer.for_each(|net, to| {
        let (bits, length) = K::bits_of(net);
        assert_eq!(all.insert((length, bits), to), None, "{net} twice");
    });
    prop_assert_eq!(&all, &oracle.routes);
    prop_assert_eq!(writer.len(), all.len());
    Ok(())
}

fn behaves<K: Width>(steps: &[Step], more: &[u128], routes: u32) -> Result<(), TestCaseError> {
    let (mut writer, _) = Fib::<K>::create("test", routes).unwrap();
    let empty = writer.trie.live_units();
    let mut oracle = Oracle::default();
    for (at, step) in steps.iter().enumerate() {
        match step {
            Step::Insert(bits, length, to) => {
                let was = oracle.routes.get(&(*length, cut(*bits, *length))).copied();
                match writer.insert(net::<K>(*bits, *length), id(*to)) {
                    Ok(before) => {
                        prop_assert_eq!(before, was);
                        oracle.routes.insert((*length, cut(*bits, *length)), id(*to));
                    }
                    Err(FibError::Full { .. }) => prop_assert_eq!(was, None, "what is there can change"),
                }
            }
            Step::Remove(bits, length) => {
                let was = oracle.routes.remove(&(*length, cut(*bits, *length)));
                prop_assert_eq!(writer.remove(net::<K>(*bits, *length)), was);
            }
            Step::RemoveOne(which) => {
                let mut keys: Vec<_> = oracle.routes.keys().copied().collect();
                keys.sort_unstable();
                if !keys.is_empty() {
                    let (length, bits) = keys[which.index(keys.len())];
                    prop_assert_eq!(
                        writer.get(net::<K>(bits, length)),
                        oracle.routes.get(&(length, bits)).copied()
                    );
                    prop_assert_eq!(
                        writer.remove(net::<K>(bits, length)),
                        oracle.routes.remove(&(length, bits))
                    );
                }
            }
            Step::Collect => writer.collect(&Immediate),
        }
        if at % 16 == 0 {
            agree(&writer, &oracle, more)?;
        }
    }
    agree(&writer, &oracle, more)?;
    for (length, bits) in oracle.routes.keys() {
        writer.remove(net::<K>(*bits, *length));
    }
    writer.collect(&Immediate);
    prop_assert!(writer.is_empty());
    prop_assert_eq!(writer.trie.live_units(), empty, "an empty table holds no memory");
    agree(&writer, &Oracle::default(), more)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn ipv4_is_the_longest_match(
        steps in proptest::collection::vec(step(32), 1..120),
        more in proptest::collection::vec(address(), 70),
    ) {
        behaves::<u32>(&steps, &more, 1000)?;
    }

    #[test]
    fn ipv6_is_the_longest_match(
        steps in proptest::collection::vec(step(128), 1..120),
        more in proptest::collection::vec(address(), 70),
    ) {
        behaves::<u128>(&steps, &more, 1000)?;
    }

    /// 48 units of IPv4 nodes, 128 of IPv6: many of these do not fit.
    #[test]
    fn a_table_that_is_full_keeps_what_it_had(
        steps in proptest::collection::vec(step(32), 100..300),
        steps6 in proptest::collection::vec(step(128), 1..100),
        more in proptest::collection::vec(address(), 10),
    ) {
        behaves::<u32>(&steps, &more, 1)?;
        behaves::<u128>(&steps6, &more, 1)?;
    }
}

#[test]
fn full_is_said_with_what_to_do() {
    let (mut writer, reader) = Fib6::create("small", 1).unwrap();
    let host = |n: u128| Ipv6Net::new(Ipv6Addr::from_bits(n << 100 | 1), 128).unwrap();
    let first = (0..).find(|n| writer.insert(host(*n), id(5)).is_err()).unwrap();
    assert_eq!(writer.len() as u128, first);
    let error = writer.insert(host(first), id(6)).unwrap_err().to_string();
    for part in ["small", "/128", "more routes", &format!("holds {first} prefixes")] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(reader.lookup(first << 100 | 1), NextHopId::NONE);
    assert_eq!(reader.lookup((first - 1) << 100 | 1), id(5));
    // A next hop can change, and a short prefix be added, without memory.
    assert_eq!(writer.insert(host(0), id(7)), Ok(Some(id(5))));
    assert_eq!(writer.insert("::/0".parse().unwrap(), id(8)), Ok(None));
    assert_eq!((reader.lookup(1), reader.lookup(2), reader.lookup(first << 100 | 1)), (id(7), id(8), id(8)));
    // What is removed makes room when no worker reads it any more.
    assert_eq!(writer.remove(host(0)), Some(id(7)));
    assert!(writer.insert(host(first), id(9)).is_err());
    writer.collect(&Immediate);
    assert_eq!(writer.insert(host(first), id(9)), Ok(None));
    assert_eq!((reader.lookup(1), reader.lookup(first << 100 | 1)), (id(8), id(9)));
}

#[test]
fn as_many_are_looked_up_as_both_slices_have() {
    let (mut writer, reader) = Fib4::create("test", 1000).unwrap();
    for n in 0..200_u32 {
        writer.insert(Ipv4Net::new(Ipv4Addr::from_bits(n << 9), 24).unwrap(), id(n + 10)).unwrap();
        writer.collect(&Immediate);
    }
    let addresses: Vec<u32> = (0..200).map(|n| (n << 9) | (n % 256)).collect();
    for (given, wanted) in [(0, 5), (5, 0), (63, 64), (64, 63), (64, 64), (65, 65), (128, 200), (200, 130)] {
        let mut found = vec![id(3); wanted];
        reader.lookup_many(&addresses[..given], &mut found);
        for (n, found) in found.iter().enumerate() {
            assert_eq!(*found, if n < given { id(n as u32 + 10) } else { id(3) }, "{given} into {wanted}");
        }
    }
}

#[test]
fn a_million_flaps_take_no_memory() {
    let (mut writer, reader) = Fib4::create("test", 4000).unwrap();
    let (mut writer6, reader6) = Fib6::create("test6", 4000).unwrap();
    let net = |n: u32, length| Ipv4Net::new(Ipv4Addr::from_bits(n), length).unwrap();
    let net6 = |n: u32, length| Ipv6Net::new(Ipv6Addr::from_bits(u128::from(n) << 96), length).unwrap();
    for n in 0..1000 {
        writer.insert(net(0x0a00_0000 + (n << 8), 24), id(n)).unwrap();
        writer6.insert(net6(0x2001_0000 + (n << 8), 48), id(n)).unwrap();
        writer.collect(&Immediate);
        writer6.collect(&Immediate);
    }
    let before = (writer.memory(), writer6.memory());
    for n in 0..500_000_u32 {
        // Each of them in a node of its own, in nodes that grow, and a new /32 in each /24.
        let at = 0x0a00_0000 + (n.wrapping_mul(0x9e37_79b9) >> 14);
        assert_eq!(writer.insert(net(at, 32), id(n)), Ok(None));
        assert_eq!(writer6.insert(net6(at, 64), id(n)), Ok(None));
        assert_eq!(reader.lookup(at), id(n));
        assert_eq!(reader6.lookup(u128::from(at) << 96), id(n));
        assert_eq!(writer.remove(net(at, 32)), Some(id(n)));
        assert_eq!(writer6.remove(net6(at, 64)), Some(id(n)));
        if n % 64 == 0 {
            writer.collect(&Immediate);
            writer6.collect(&Immediate);
        }
    }
    writer.collect(&Immediate);
    writer6.collect(&Immediate);
    assert_eq!((writer.memory(), writer6.memory()), before);
}

#[test]
fn a_short_prefix_reaches_everything_below_it() {
    let (mut writer, reader) = Fib4::create("test", 100_000).unwrap();
    let net = |n: u32, length| Ipv4Net::new(Ipv4Addr::from_bits(n), length).unwrap();
    // A node in every direct slot.
    for n in 0..=u32::from(u16::MAX) {
        writer.insert(net(n << 16 | 0x0100, 24), id(9)).unwrap();
    }
    let every = |hole: NextHopId, inside: NextHopId| {
        for n in 0..=u32::from(u16::MAX) {
            assert_eq!(reader.lookup(n << 16 | 0x0101), id(9));
            let right = if n >> 8 == 10 { inside } else { hole };
            assert_eq!(reader.lookup(n << 16 | 0xffff), right);
        }
    };
    every(NextHopId::NONE, NextHopId::NONE);
    let used = writer.memory().used;
    assert_eq!(writer.insert(net(0, 0), id(20)), Ok(None));
    every(id(20), id(20));
    assert_eq!(writer.insert(net(10 << 24, 8), id(21)), Ok(None));
    every(id(20), id(21));
    assert_eq!(writer.insert(net(0, 0), id(22)), Ok(Some(id(20))));
    every(id(22), id(21));
    assert_eq!(writer.remove(net(10 << 24, 8)), Some(id(21)));
    every(id(22), id(22));
    assert_eq!(writer.remove(net(0, 0)), Some(id(22)));
    every(NextHopId::NONE, NextHopId::NONE);
    assert_eq!(writer.memory().used, used);
}

/// Words that make no sense, everywhere: a lookup ends, inside the region, whichever way it is made.
#[test]
fn a_spoiled_table_gives_answers_all_the_same() {
    let mut random = 0x1234_5678_9abc_def1_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (writer, reader) = Fib4::create("test", 64).unwrap();
    let (writer6, reader6) = Fib6::create("test6", 64).unwrap();
    let same = |ways: &[[NextHopId; BATCH]]| {
        assert!(ways.windows(2).all(|pair| pair[0] == pair[1]), "the same nonsense: {ways:?}");
    };
    for round in 0..60 {
        for shared in [writer.trie.shared(), writer6.trie.shared()] {
            for word in 0..shared.bytes() / 4 {
                shared.spoil(
                    word,
                    match round % 6 {
                        0 => u32::MAX,
                        1 => next() as u32 | 1 << 31,
                        2 => 1 << 31 | (next() as u32 & 63),
                        3 => 1 << 31,
                        _ => next() as u32,
                    },
                );
            }
        }
        for _ in 0..200 {
            let keys: [u32; BATCH] = std::array::from_fn(|_| next() as u32);
            let keys6 = keys.map(|key| u128::from(key) << 96 | u128::from(next()));
            same(&reader.shared.every_way(&keys));
            same(&reader6.shared.every_way(&keys6));
        }
    }
}

/// Readers that say how far they are: passed when each has ended the turn in which it was.
struct Turns(Vec<Arc<AtomicU64>>);

impl Epochs for Turns {
    fn now(&self) -> Epoch {
        std::sync::atomic::fence(Ordering::SeqCst);
        Epoch { workers: self.0.iter().map(|turns| (turns.load(Ordering::SeqCst), 0)).collect() }
    }

    fn passed(&self, then: &Epoch) -> bool {
        self.now().workers.iter().zip(&then.workers).all(|(now, then)| now.0 > then.0)
    }
}

/// Long turns, so that memory waits for long; every answer is one that the table gives at some time.
#[test]
fn readers_see_the_old_or_the_new_while_routes_flap() {
    let (mut writer, reader) = Fib4::create("test", 2000).unwrap();
    let (mut writer6, reader6) = Fib6::create("test6", 2000).unwrap();
    let net = |n: u32, length| Ipv4Net::new(Ipv4Addr::from_bits(n), length).unwrap();
    let net6 = |n: u32, length| Ipv6Net::new(Ipv6Addr::from_bits(u128::from(n) << 96), length).unwrap();
    // 256 /24s that stay, each with its own next hop; between them what flaps: a /25, a /32 and a /20
    // of the same next hop as what they are in, or one more.
    let own = |at: u32| 1000 + (at >> 9 & 255);
    for n in 0..256_u32 {
        writer.insert(net(n << 9, 24), id(1000 + n)).unwrap();
        writer6.insert(net6(n << 9, 24), id(1000 + n)).unwrap();
        writer.collect(&Immediate);
        writer6.collect(&Immediate);
    }
    let turns: Vec<_> = (0..2).map(|_| Arc::new(AtomicU64::new(0))).collect();
    let (stop, looked_up) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let readers: Vec<_> = turns
        .iter()
        .enumerate()
        .map(|(which, turn)| {
            let (turn, stop, looked_up) = (Arc::clone(turn), Arc::clone(&stop), Arc::clone(&looked_up));
            let (reader, reader6) = (reader.clone(), reader6.clone());
            std::thread::spawn(move || {
                let mut random = which as u32 + 1;
                let mut found = [NextHopId::NONE; BATCH];
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..8 {
                        let keys: [u32; BATCH] = std::array::from_fn(|_| {
                            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                            random >> 15
                        });
                        let keys6 = keys.map(|key| u128::from(key) << 96 | u128::from(random));
                        for six in [false, true] {
                            if six {
                                reader6.lookup_many(&keys6, &mut found);
                            } else {
                                reader.lookup_many(&keys, &mut found);
                            }
                            for (key, found) in keys.iter().zip(found) {
                                // In a /24 that stays: its own, or what flaps there. Beside: a /20's or none.
                                let right = if key >> 8 & 1 == 0 {
                                    [own(*key), 2000 + own(*key), 4000 + own(*key)].contains(&found.get())
                                } else {
                                    [0, 7, 8].contains(&found.get())
                                };
                                assert!(right, "{key:x} goes to {found:?}");
                            }
                        }
                        looked_up.fetch_add(2 * BATCH as u64, Ordering::Relaxed);
                    }
                    turn.fetch_add(1, Ordering::SeqCst);
                }
                // Passed for good.
                turn.store(u64::MAX, Ordering::SeqCst);
            })
        })
        .collect();
    let epochs = Turns(turns);
    let mut random = 99_u32;
    let mut flaps = 0;
    while flaps < 60_000 || looked_up.load(Ordering::Relaxed) < 200_000 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let at = (random >> 15) & !0x100;
        let change = random >> 7 & 7;
        let result = match change {
            0 => writer.insert(net(at, 25).trunc(), id(2000 + own(at))).map(|_| ()),
            1 => writer.insert(net(at, 32), id(4000 + own(at))).map(|_| ()),
            2 => writer.insert(net(at, 20).trunc(), id(7 + (random >> 4 & 1))).map(|_| ()),
            3 => writer6.insert(net6(at, 25).trunc(), id(2000 + own(at))).map(|_| ()),
            4 => writer6.insert(net6(at, 32), id(4000 + own(at))).map(|_| ()),
            5 => writer6.insert(net6(at, 20).trunc(), id(7 + (random >> 4 & 1))).map(|_| ()),
            _ => {
                for length in [20, 25, 32] {
                    writer.remove(net(at, length).trunc());
                    writer6.remove(net6(at, length).trunc());
                }
                Ok(())
            }
        };
        // While readers take their time there may be no memory; the table is as it was.
        if result.is_err() {
            std::thread::yield_now();
        }
        writer.collect(&epochs);
        writer6.collect(&epochs);
        flaps += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
}
