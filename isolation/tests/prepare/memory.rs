//! Memory: after preparing memory nothing faults, whoever may lock how much. Judged by the kernel's own counts.

use crate::common::{bytes, faults, root, status};
use isoplane_isolation::prepare::{Weakness, memory, privileges};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::hint::black_box;
use std::sync::atomic::{AtomicU8, Ordering};

const MIB: usize = 1024 * 1024;

static BSS: [AtomicU8; MIB] = [const { AtomicU8::new(0) }; MIB];

fn touch(bytes: &mut [u8]) {
    for byte in bytes.iter_mut().step_by(4096) {
        *byte = black_box(1);
    }
    black_box(bytes);
}

fn touch_bss() {
    for byte in BSS.iter().step_by(4096) {
        byte.store(1, Ordering::Relaxed);
    }
}

/// Uses this much of the stack.
#[inline(never)]
fn deep(frames: usize) {
    let mut frame = black_box([1_u8; 4096]);
    if frames > 1 {
        deep(frames - 1);
    }
    black_box(&mut frame);
}

/// No capability, and this limit in bytes.
fn unprivileged(limit: u64) {
    setrlimit(Resource::RLIMIT_MEMLOCK, limit, limit).unwrap();
    privileges::apply(privileges::Privileges::Drop { uid: 65534, gid: 65534 }).unwrap();
    caps::clear(None, caps::CapSet::Effective).unwrap();
    caps::clear(None, caps::CapSet::Permitted).unwrap();
}

pub(crate) fn nothing_faults_after_preparing() {
    if !root("locking memory to come") {
        return;
    }
    memory::tune_malloc().unwrap();
    memory::disable_thp().unwrap();
    memory::keep_pages_in_place().unwrap();
    memory::lock().unwrap();
    assert_eq!(memory::prefault_stack(MIB).unwrap(), MIB);
    // A mapping that is made now is populated when it is made.
    let mut heap = vec![0_u8; 8 * MIB];
    let before = faults();
    touch_bss();
    touch(&mut heap);
    deep(200);
    assert_eq!(faults() - before, 0);
    assert!(bytes("VmLck") >= 9 * MIB as u64, "{}", status("VmLck"));
    assert_eq!(status("THP_enabled"), "0");
}

pub(crate) fn without_preparing_the_same_faults() {
    let mut heap = vec![0_u8; 8 * MIB];
    let before = faults();
    touch_bss();
    touch(&mut heap);
    deep(200);
    assert!(faults() - before > 100, "the tests that see none would see these");
}

pub(crate) fn malloc_gives_nothing_back() {
    memory::tune_malloc().unwrap();
    let blocks: Vec<Vec<u8>> = (0..64).map(|_| vec![1_u8; MIB]).collect();
    let before = bytes("VmData");
    drop(black_box(blocks));
    assert!(bytes("VmData") + MIB as u64 > before, "the heap shrank");
    let faulted = faults();
    drop(black_box(vec![1_u8; 32 * MIB]));
    assert!(faults() - faulted < 8, "{} faults on memory that was there", faults() - faulted);
}

pub(crate) fn over_a_finite_limit_malloc_still_works() {
    if !root("giving up privileges") {
        return;
    }
    let limit = 8 * MIB as u64;
    unprivileged(limit);
    assert!(!memory::unlimited());
    // The limit holds for what is there too, and this program may be larger than what we may set.
    match memory::lock() {
        Err(Weakness::FutureNotLocked { limit: said }) => {
            assert_eq!(said, limit);
            assert!(bytes("VmSize") <= limit && bytes("VmLck") > 0);
        }
        Err(Weakness::MemoryNotLocked { .. }) => assert!(bytes("VmSize") > limit && bytes("VmLck") == 0),
        other => panic!("{other:?}"),
    }
    let mut block: Vec<u8> = Vec::new();
    block.try_reserve_exact(64 * MIB).expect("malloc above the limit");
}

pub(crate) fn a_limit_below_what_is_there_is_said_and_nothing_is_locked() {
    if !root("giving up privileges") {
        return;
    }
    unprivileged(64 * 1024);
    let weakness = memory::lock().unwrap_err();
    assert!(matches!(weakness, Weakness::MemoryNotLocked { limit: Some(65536), .. }), "{weakness}");
    for part in ["65536 bytes", "ulimit -l", "LimitMEMLOCK=", "CAP_IPC_LOCK"] {
        assert!(weakness.to_string().contains(part), "{weakness}");
    }
    assert_eq!(bytes("VmLck"), 0);
}

pub(crate) fn a_limit_of_nothing_is_no_matter_for_who_has_the_capability() {
    if !root("CAP_IPC_LOCK") {
        return;
    }
    setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).unwrap();
    let mapped = bytes("VmSize");
    assert!(memory::unlimited());
    assert_eq!(bytes("VmSize"), mapped, "the try leaves a mapping behind");
    memory::lock().unwrap();
    assert!(memory::unlimited(), "nor does it mind what is locked");
    assert!(bytes("VmLck") > 0);
}

pub(crate) fn the_limit_is_raised_as_far_as_it_may_be() {
    if !root("giving up privileges") {
        return;
    }
    let hard = 4 * MIB as u64;
    unprivileged(hard);
    setrlimit(Resource::RLIMIT_MEMLOCK, 64 * 1024, hard).unwrap();
    // Whether that suffices is another matter.
    let _ = memory::lock();
    assert_eq!(getrlimit(Resource::RLIMIT_MEMLOCK).unwrap(), (hard, hard));
}

pub(crate) fn a_small_stack_is_touched_to_its_end_and_no_further() {
    let small = std::thread::Builder::new().stack_size(256 * 1024);
    let thread = small.spawn(|| {
        let weakness = memory::prefault_stack(MIB).unwrap_err();
        let Weakness::StackNotPrefaulted { wanted, touched } = weakness else { panic!("{weakness}") };
        assert_eq!(wanted, MIB);
        let before = faults();
        deep(touched / 4096 - 4);
        assert_eq!(faults() - before, 0);
        touched
    });
    let touched = thread.unwrap().join().unwrap();
    assert!((128 * 1024..256 * 1024).contains(&touched), "{touched}");
}

pub(crate) fn the_main_stack_is_touched_within_its_limit() {
    setrlimit(Resource::RLIMIT_STACK, 2 * MIB as u64, 2 * MIB as u64).unwrap();
    assert_eq!(memory::prefault_stack(MIB).unwrap(), MIB);
    assert!(memory::prefault_stack(1 << 40).is_err());
}
