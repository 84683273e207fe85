//! Pools: sharing, bounds, owner ids, damaged headers.

use isoplane_memory::recovery::Balance;
use isoplane_memory::{Batch, FrameFlags, FrameMeta, Pool, PoolConfig, PoolError, Region, custody};
use proptest::prelude::*;
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

fn pool(chunks: u32) -> Arc<Pool> {
    Pool::create(&PoolConfig::new("pool-test", chunks)).unwrap()
}

fn fd(pool: &Pool) -> OwnedFd {
    pool.as_fd().try_clone_to_owned().unwrap()
}

#[test]
fn another_mapping_shares_chunks_and_owners() {
    let first = pool(8);
    let second = Pool::attach(fd(&first)).unwrap();
    assert!(!first.same_as(&second), "frames of one mapping are not mixed up with another's");
    assert_eq!((second.chunks(), second.max_frame()), (first.chunks(), first.max_frame()));
    let mut a = first.cache("a", 5).unwrap();
    let error = second.cache("b", 4).unwrap_err();
    assert!(matches!(error, PoolError::Exhausted { wanted: 4, left: 3, total: 8, .. }), "{error}");
    let mut b = second.cache("b", 3).unwrap();
    assert_ne!(a.id(), b.id());
    let mut chunks = HashSet::new();
    while let Some(frame) = a.get().or_else(|| b.get()) {
        assert!(chunks.insert(frame.chunk()));
    }
    assert_eq!(chunks.len(), 8);
}

#[test]
fn frames_of_another_pool_are_of_no_use() {
    let (ours, theirs) = (pool(4), pool(4));
    let mut frame = theirs.cache("t", 1).unwrap().get().unwrap();
    assert!(theirs.reset(&mut frame, 60));
    assert!(ours.bytes(&frame).is_empty() && ours.bytes_mut(&mut frame).is_empty());
    assert!(!ours.reset(&mut frame, 10) && ours.meta(&frame).is_none());
    let (lender, collector) = ours.custody().unwrap();
    assert_eq!(lender.address(&frame), None);
    let frame = lender.commit(frame).unwrap_err();
    let frame = ours.surrender(frame).unwrap_err();
    assert_eq!(ours.in_depot(), 4);
    let cache = theirs.cache("u", 1).unwrap();
    assert!(collector.release(&cache, 128, 60).is_none());
    theirs.surrender(frame).unwrap();
}

#[test]
fn custody_gives_back_only_what_it_has_once_and_inside_the_chunk() {
    let pool = pool(4);
    let mut cache = pool.cache("w", 2).unwrap();
    let (lender, collector) = pool.custody().unwrap();
    let mut frame = cache.get().unwrap();
    assert!(pool.reset(&mut frame, 100));
    let (at, chunk) = (lender.address(&frame).unwrap(), u64::from(frame.chunk()));
    assert!(collector.release(&cache, at, 100).is_none(), "not lent yet");
    lender.commit(frame).unwrap();
    assert_eq!((lender.held(), cache.owned()), (1, 1));
    let start = chunk * 2048;
    for (address, len) in [
        (start, 10),                      // the metadata
        (start + 63, 10),                 // its last byte
        (start + 2047, 2),                // past the end
        (start + 64, 1985),               // past the end
        (start + 64, u32::MAX),           // far past the end
        (4 * 2048, 10),                   // past the pool
        (u64::MAX, 10),                   // past everything
        ((start + 2048) % 8192 + 64, 10), // another chunk
    ] {
        assert!(collector.release(&cache, address, len).is_none(), "{address} {len}");
    }
    let back = collector.release(&cache, start + 64, 1984).unwrap();
    assert_eq!((back.offset(), back.len()), (64, 1984));
    assert!(collector.release(&cache, at, 100).is_none(), "once");
    assert!(collector.release_empty(&cache, at).is_none(), "once");
    cache.put(back);
    assert_eq!((lender.held(), cache.owned()), (0, 2));
}

#[test]
fn owner_ids_run_out_with_a_reason_and_are_used_again() {
    let pool = pool(16);
    let mut custodies: Vec<_> = (0..255).map(|_| pool.custody().unwrap()).collect();
    let ids: HashSet<u8> = custodies.iter().map(|(lender, _)| lender.id()).collect();
    assert_eq!(ids.len(), 255);
    let error = pool.custody().unwrap_err();
    assert!(matches!(error, PoolError::Owners { .. }) && error.to_string().contains("pool-test"));
    assert!(matches!(pool.cache("late", 1), Err(PoolError::Owners { .. })));
    assert_eq!(pool.in_depot(), 16, "a refusal takes nothing");
    let (lender, collector) = custodies.pop().unwrap();
    let id = lender.id();
    assert_eq!(pool.draw(&lender, 3).len(), 3);
    lender.journal(7, 3);
    let (other, _) = custodies.pop().unwrap();
    let (_, stranger) = custodies.pop().unwrap();
    assert_eq!(custody::end(other, stranger), 0, "ends that do not belong together");
    assert_eq!(custody::end(lender, collector), 3);
    let (again, _) = pool.custody().unwrap();
    assert_eq!((again.id(), again.held(), again.journaled()), (id, 0, (0, 0)));
    for _ in 0..10_000 {
        let (lender, collector) = custodies.pop().unwrap();
        custody::end(lender, collector);
        custodies.push(pool.custody().unwrap());
    }
}

#[test]
fn spans_keep_inside_the_chunk_up_to_64_kib() {
    let config =
        PoolConfig { chunk_bytes: 65_536, headroom: 0, max_frame: 65_472, ..PoolConfig::new("big", 2) };
    let pool = Pool::create(&config).unwrap();
    let mut cache = pool.cache("w", 2).unwrap();
    let mut frame = cache.get().unwrap();
    assert!(pool.reset(&mut frame, 65_472));
    pool.bytes_mut(&mut frame).fill(7);
    assert!(!pool.grow_back(&mut frame, 1) && !pool.grow_front(&mut frame, 1));
    frame.trim_front(65_472);
    assert_eq!((frame.len(), pool.bytes(&frame).len()), (0, 0));
    assert!(pool.reset(&mut frame, 0) && !pool.reset(&mut frame, 65_473));
    assert!(pool.grow_back(&mut frame, 65_472));
    frame.trim_front(100);
    assert!(pool.grow_front(&mut frame, 100) && !pool.grow_front(&mut frame, 1));
    frame.truncate(10);
    assert_eq!(frame.len(), 10);
    cache.put(frame);
}

#[test]
fn starts_are_spread_and_leave_room_for_the_longest_frame() {
    for (chunk_bytes, headroom, max_frame) in
        [(2048, 64, 1522), (2048, 0, 900), (4096, 256, 1522), (2048, 0, 1984)]
    {
        let config = PoolConfig { chunk_bytes, headroom, max_frame, ..PoolConfig::new("colours", 64) };
        let pool = Pool::create(&config).unwrap();
        let starts: HashSet<u16> = (0..64).map(|chunk| pool.start_offset(chunk)).collect();
        assert_eq!(starts.len() as u32, pool.colours());
        for start in starts {
            assert!(u32::from(start) >= 64 + headroom && u32::from(start) + max_frame <= chunk_bytes);
        }
        let mut cache = pool.cache("w", 64).unwrap();
        let mut batch = Batch::new();
        cache.get_batch(&mut batch, 64, max_frame as u16);
        for frame in batch.iter() {
            assert_eq!(
                (frame.offset(), u32::from(frame.len())),
                (pool.start_offset(frame.chunk()), max_frame)
            );
        }
        cache.put_batch(&mut batch);
    }
}

#[test]
fn metadata_lies_beside_the_packet() {
    let pool = pool(1);
    let mut frame = pool.cache("w", 1).unwrap().get().unwrap();
    assert!(pool.respan(&mut frame, 64, 1984));
    pool.bytes_mut(&mut frame).fill(0xff);
    let meta = FrameMeta { timestamp: 5, hash: 6, vlan_tci: 7, ..FrameMeta::default() };
    pool.set_meta(&mut frame, meta);
    assert!(frame.flags().contains(FrameFlags::META));
    assert!(pool.bytes(&frame).iter().all(|byte| *byte == 0xff));
    assert_eq!(pool.meta(&frame), Some(meta));
    assert!(!pool.respan(&mut frame, 63, 10), "the metadata is not part of any span");
}

#[test]
fn a_leak_shows_in_the_balance() {
    let pool = pool(16);
    let mut cache = pool.cache("w", 10).unwrap();
    let balance =
        |cache: &isoplane_memory::FrameCache| Balance::of(&pool, &[(cache.id(), cache.len() as u32)]);
    assert!(balance(&cache).is_whole());
    let _leaked = cache.get();
    let found = balance(&cache);
    assert!(!found.is_whole());
    assert_eq!((found.missing, found.total, found.depot), (1, 16, 6));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// A damaged header is refused, or gives a pool whose every byte is inside the mapping.
    #[test]
    fn damaged_headers_are_refused_or_harmless(
        damage in prop::collection::vec((0_usize..96, any::<u8>()), 1..4),
    ) {
        let pool = pool(64);
        let region = Region::from_fd(fd(&pool), true).unwrap();
        for (at, value) in damage {
            let byte = region.slice::<u8>(at, 1).unwrap();
            // SAFETY: inside the region, and no reference into the header exists.
            unsafe { byte.write_volatile(value) };
        }
        if let Ok(other) = Pool::attach(fd(&pool)) {
            prop_assert!(other.chunks() as usize * other.chunk_bytes() as usize <= pool.region_bytes());
            let want = other.in_depot().min(100);
            if let Ok(mut cache) = other.cache("w", want) {
                while let Some(mut frame) = cache.get() {
                    prop_assert!(frame.chunk() < other.chunks());
                    let longest = (other.chunk_bytes() - u32::from(frame.offset())).min(65_535) as u16;
                    let start = frame.offset();
                    other.respan(&mut frame, start, longest);
                    other.bytes_mut(&mut frame).fill(1);
                }
            }
        }
    }
}

#[test]
fn a_header_goes_before_the_packet_and_never_over_the_metadata() {
    let pool = Pool::create(&PoolConfig::new("prepend", 4)).unwrap();
    let other = Pool::create(&PoolConfig::new("other", 4)).unwrap();
    let mut cache = pool.cache("test", 4).unwrap();
    let mut frame = cache.get().unwrap();
    let meta = FrameMeta { hash: 7, ..FrameMeta::default() };
    pool.set_meta(&mut frame, meta);
    assert!(pool.respan(&mut frame, 64 + 12, 4));
    pool.bytes_mut(&mut frame).copy_from_slice(b"tail");
    assert!(pool.prepend(&mut frame, b"twelve bytes"));
    assert_eq!((frame.offset(), frame.len(), pool.bytes(&frame)), (76, 4, &b"tail"[..]));
    assert!(!pool.prepend(&mut frame, b"thirteen byte"));
    assert!(!other.prepend(&mut frame, b"no"));
    assert!(pool.grow_front(&mut frame, 12));
    assert_eq!((pool.bytes(&frame), pool.meta(&frame)), (&b"twelve bytestail"[..], Some(meta)));
    cache.put(frame);
}
