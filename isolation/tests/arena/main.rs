//! A program that installs `WorkerAlloc`: what isolated threads allocate, free and cannot have.

#[path = "../common/mod.rs"]
mod common;

use isoplane_isolation::arena::{self, ArenaStats, Exhausted, WorkerAlloc};
use isoplane_isolation::{Cause, Isolation, Mode, OnBreach, Prepared, Status, prepare};
use std::alloc::System;
use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: WorkerAlloc<System> = WorkerAlloc::new(System);

const MIB: usize = 1 << 20;

fn main() -> ExitCode {
    common::main(common::tests![
        collections_live_in_the_arena_without_a_breach,
        the_slow_path_does_the_frees_that_waited,
        what_does_not_fit_is_an_error_and_no_breach,
        a_box_that_does_not_fit_ends_the_program_and_is_counted,
        blocks_from_before_and_after_isolation_mix,
        other_threads_free_an_isolated_threads_blocks,
        a_forked_child_has_the_whole_heap,
        without_an_arena_nothing_changes,
    ])
}

fn now() -> ArenaStats {
    arena::stats().expect("an arena")
}

/// This thread with an arena, prepared on a CPU of ours.
fn prepared(bytes: usize, status: &Status) -> Prepared {
    let cpu = prepare::cpu::allowed().iter().next().expect("a CPU");
    arena::install(bytes).expect("an arena");
    assert_eq!(arena::is_global(), Some(true));
    // This program's own pages are not what is tested.
    prepare::memory::lock().expect("locked memory");
    prepare::memory::prefault_stack(MIB).expect("a stack");
    let isolation = Isolation::on(cpu).mode(Mode::STRICT).on_breach(OnBreach::Report);
    isolation.status(status.clone()).prepare().expect("prepared")
}

fn status() -> Status {
    Status::create("test").expect("a status block")
}

fn collections_live_in_the_arena_without_a_breach() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let mut prepared = prepared(8 * MIB, &status);
    // Once un-isolated: the random keys of a hash map come from the kernel, once for each thread.
    let mut map: HashMap<String, Vec<u64>> = HashMap::new();
    let before = now();
    let mut strict = prepared.arm().unwrap();
    for n in 0..2000_u64 {
        map.entry(format!("key {}", n % 100)).or_default().push(n);
        let tree: BTreeMap<u64, Box<u64>> = (0..n % 50).map(|m| (m, Box::new(m))).collect();
        assert_eq!(tree.values().map(|m| **m).sum::<u64>(), (0..n % 50).sum::<u64>());
        strict.turn().unwrap();
    }
    assert_eq!(map.values().map(Vec::len).sum::<usize>(), 2000);
    assert_eq!(map["key 7"][1], 107);
    let stats = now();
    assert!(stats.allocations > before.allocations + 2000 && stats.in_use > 16_000, "{stats:?}");
    drop(map);
    assert_eq!(now().in_use, before.in_use);
    strict.disarm();
    let said = status.snapshot();
    assert_eq!(said.breaches.total(), 0, "{:?}", status.breaches(0));
    assert_eq!((said.allocations, said.arena_in_use), (now().allocations, 0));
    assert_eq!((now().exhausted, now().leaked, now().nested), (0, 0, 0));
}

fn the_slow_path_does_the_frees_that_waited() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let mut prepared = prepared(MIB, &status);
    let early: Vec<Box<u64>> = (0..100).map(Box::new).collect();
    let mut strict = prepared.arm().unwrap();
    drop(early);
    assert_eq!(now().deferred, 101);
    strict.slow_path(|_| assert_eq!(now().deferred, 101, "they are done on the way back")).unwrap();
    assert_eq!(now().deferred, 0);
    strict.turn().unwrap();
    // And what the slow path allocates is not the arena's.
    let before = now().allocations;
    let kept = strict.slow_path(|_| std::hint::black_box(vec![1_u8; 1000])).unwrap();
    assert_eq!(now().allocations, before);
    drop(kept);
    assert_eq!(now().deferred, 1);
    strict.disarm();
    assert_eq!(now().deferred, 0);
    assert_eq!(status.snapshot().breaches.total(), 0);
}

fn what_does_not_fit_is_an_error_and_no_breach() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let mut prepared = prepared(MIB, &status);
    let mut strict = prepared.arm().unwrap();
    let mut large: Vec<u8> = Vec::new();
    assert!(large.try_reserve_exact(2 * MIB).is_err());
    let failure = arena::last_failure();
    strict.turn().unwrap();
    let Some(Exhausted { requested, capacity, .. }) = failure else { panic!("no record") };
    assert_eq!((requested, capacity), (2 * MIB, now().capacity));
    assert_eq!(status.snapshot().arena_exhausted, 1, "seen at once");
    large.try_reserve_exact(MIB / 2).unwrap();
    strict.turn().unwrap();
    strict.disarm();
    assert_eq!(status.snapshot().breaches.total(), 0);
}

fn a_box_that_does_not_fit_ends_the_program_and_is_counted() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let theirs = status.clone();
    let ended = common::in_child(move || {
        let mut prepared = prepared(MIB, &theirs);
        let _strict = prepared.arm().unwrap();
        drop(std::hint::black_box(Vec::<u8>::with_capacity(2 * MIB)));
    });
    assert_eq!(ended, 256 + libc::SIGABRT, "the standard library's answer");
    // Once for this, and for whatever it takes to say so.
    assert!(status.snapshot().arena_exhausted >= 1);
}

fn blocks_from_before_and_after_isolation_mix() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let mut prepared = prepared(4 * MIB, &status);
    let mut grown: Vec<u64> = (0..10).collect();
    let mut strict = prepared.arm().unwrap();
    grown.extend(10..20_000);
    strict.turn().unwrap();
    strict.disarm();
    // Outside isolation a block leaves the arena only when it does not fit.
    let in_use = now().in_use;
    assert!(in_use >= 160_000, "{in_use}");
    grown.extend(20_000..2_000_000);
    assert!(grown.iter().copied().eq(0..2_000_000));
    assert_eq!((now().in_use, now().exhausted), (0, 0));
    assert_eq!(status.snapshot().breaches.total(), 0);
}

fn other_threads_free_an_isolated_threads_blocks() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let (to, blocks) = std::sync::mpsc::channel::<Vec<Vec<u8>>>();
    let (done, from) = std::sync::mpsc::channel();
    let freer = std::thread::spawn(move || {
        for some in blocks {
            assert!(some.iter().enumerate().all(|(n, block)| block.iter().all(|byte| *byte == n as u8)));
            drop(some);
            done.send(()).unwrap();
        }
    });
    let mut prepared = prepared(MIB, &status);
    for _ in 0..20 {
        let mut strict = prepared.arm().unwrap();
        let some: Vec<Vec<u8>> = (0..100).map(|n| vec![n as u8; 5000]).collect();
        strict.turn().unwrap();
        strict.disarm();
        to.send(some).unwrap();
        from.recv().unwrap();
    }
    drop(to);
    freer.join().unwrap();
    // Twenty times half of it came back for the next time.
    assert!(now().reclaimed >= 19 * 101, "{:?}", now());
    assert_eq!((now().exhausted, status.snapshot().breaches.total()), (0, 0));
}

/// A child that an isolated thread may fork is not isolated: what it allocates is not the arena's.
fn a_forked_child_has_the_whole_heap() {
    if !common::root("locking memory") {
        return;
    }
    let status = status();
    let cpu = prepare::cpu::allowed().iter().next().expect("a CPU");
    // A fork leaves pages to be copied when they are written to, which faults.
    let mode = Mode::ALLOW_SYSCALLS | Mode::ALLOW_PAGE_FAULTS;
    let isolation = Isolation::on(cpu).mode(mode).arena(MIB).status(status.clone());
    let mut prepared = isolation.prepare().expect("prepared");
    let mut strict = prepared.arm().unwrap();
    let ended = common::in_child(|| {
        let mut large: Vec<u8> = Vec::new();
        large.try_reserve_exact(2 * MIB).expect("not from the arena");
    });
    assert_eq!(ended, 0);
    strict.turn().unwrap();
    let before = now().allocations;
    drop(std::hint::black_box(Box::new(1_u64)));
    assert_eq!(now().allocations, before + 1, "the thread itself is served from it again");
    strict.disarm();
    assert_eq!((now().exhausted, status.snapshot().breaches.total()), (0, 0));
}

fn without_an_arena_nothing_changes() {
    let status = status();
    let cpu = prepare::cpu::allowed().iter().next().expect("a CPU");
    let mut prepared = Isolation::on(cpu).status(status.clone()).prepare().unwrap();
    let mut strict = prepared.arm().unwrap();
    // More than malloc has at hand, so it asks the kernel: which is what the arena is for.
    let large = std::hint::black_box(vec![1_u8; 64 * MIB]);
    let _ = strict.turn();
    drop(large);
    strict.disarm();
    assert_eq!((arena::stats(), status.snapshot().allocations), (None, 0));
    if prepared.backend() == isoplane_isolation::Backend::Dispatch {
        assert!(status.snapshot().breaches.of(Cause::Syscall) > 0);
    }
}
