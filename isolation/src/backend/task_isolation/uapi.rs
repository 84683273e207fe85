//! What the `task-isolation` backend says to the kernel, and what the kernel says back: layouts,
//! constants and the one call.
//!
//! Contract: byte for byte the kernel patches' include/uapi/linux/task_isolation.h, version 1 of the
//! interface. The kernel writes a [`Block`] only while its thread is in the kernel, so the thread itself
//! never sees one half written; all the same every word is an atomic, and no value in it is trusted.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// "ISOL".
#[cfg(target_arch = "x86_64")]
const PR_TASK_ISOLATION: u64 = 0x4953_4f4c;

/// Operations of the call.
#[derive(Debug, Clone, Copy)]
#[cfg(target_arch = "x86_64")]
pub(crate) enum Operation {
    /// Disarms; always succeeds.
    Off = 0,
    /// Quiesces and arms.
    Enable = 1,
    /// Reads the calling thread's status.
    Get = 2,
    /// Asks what the kernel can do.
    Features = 4,
}

/// Version of the interface that this is written for.
pub(crate) const VERSION: u32 = 1;

/// The allowances and ONESHOT have the numbers of [`Mode`](crate::Mode).
pub(crate) const FLAGS_OF_MODES: u64 = (1 << 5) - 1;

pub(crate) const Q_TICK: u64 = 1 << 0;
pub(crate) const Q_VMSTAT: u64 = 1 << 1;
pub(crate) const Q_LRU: u64 = 1 << 2;
pub(crate) const Q_SOFTIRQ: u64 = 1 << 3;
pub(crate) const Q_SCHED: u64 = 1 << 4;
pub(crate) const Q_SLAB: u64 = 1 << 5;

/// Longest settle window, in microseconds.
pub(crate) const SETTLE_US_MAX: u32 = 1_000_000;

pub(crate) const STATE_OFF: u32 = 0;
pub(crate) const STATE_ISOLATED: u32 = 2;

/// `si_code` of a breach's signal.
pub(crate) const SI_TASK_ISOLATION: libc::c_int = -73;

/// What the kernel cannot do without: bits of [`Args::unmet`].
pub(crate) mod unmet {
    pub(crate) const AFFINITY: u64 = 1 << 0;
    pub(crate) const NOHZ_FULL: u64 = 1 << 1;
    pub(crate) const CLOCK: u64 = 1 << 2;
    pub(crate) const ALONE: u64 = 1 << 4;
    pub(crate) const TICK: u64 = 1 << 5;
    pub(crate) const TIMER: u64 = 1 << 6;
    pub(crate) const VMSTAT: u64 = 1 << 7;
    pub(crate) const LRU: u64 = 1 << 8;
    pub(crate) const SOFTIRQ: u64 = 1 << 9;
    pub(crate) const FAIR_SERVER: u64 = 1 << 10;
}

/// `struct task_isolation_args`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Args {
    pub(crate) flags: u64,
    pub(crate) quiesce: u64,
    pub(crate) signo: u32,
    pub(crate) settle_us: u32,
    pub(crate) tries: u32,
    pub(crate) reserved: u32,
    pub(crate) status: u64,
    pub(crate) cookie: u64,
    /// Written by the kernel when it refuses.
    pub(crate) unmet: u64,
    pub(crate) tick_deps: u64,
}

const _: () = {
    assert!(size_of::<Args>() == 64);
    assert!(offset_of!(Args, signo) == 16);
    assert!(offset_of!(Args, status) == 32);
    assert!(offset_of!(Args, unmet) == 48);
};

/// `struct task_isolation_features`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Features {
    pub(crate) size: u32,
    pub(crate) version: u32,
    pub(crate) flags: u64,
    pub(crate) quiesce: u64,
    pub(crate) causes: u64,
    pub(crate) debug: u32,
    pub(crate) reserved: u32,
}

const _: () = assert!(size_of::<Features>() == 40);

/// Causes that a kernel may count.
pub(crate) const COUNTS: usize = 32;

/// `struct task_isolation_status`.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub(crate) struct Block {
    pub(crate) version: AtomicU32,
    pub(crate) size: AtomicU32,
    pub(crate) seq: AtomicU32,
    pub(crate) state: AtomicU32,
    pub(crate) cpu: AtomicU32,
    pub(crate) tries: AtomicU32,
    pub(crate) armed_ns: AtomicU64,
    pub(crate) breach_ns: AtomicU64,
    pub(crate) breaches: AtomicU64,
    pub(crate) races: AtomicU64,
    pub(crate) requiesces: AtomicU64,
    pub(crate) cause: AtomicU32,
    pub(crate) reserved: AtomicU32,
    pub(crate) causes: AtomicU64,
    pub(crate) detail: AtomicU64,
    pub(crate) addr: AtomicU64,
    pub(crate) sender_cpu: AtomicU32,
    pub(crate) sender_pid: AtomicU32,
    pub(crate) sender_comm: [AtomicU64; 2],
    pub(crate) sender_func: [AtomicU64; 5],
    pub(crate) count: [AtomicU64; COUNTS],
}

/// Bytes of the kernel's struct; ours is padded to its alignment.
pub(crate) const STATUS_SIZE: usize = 416;

const _: () = {
    assert!(offset_of!(Block, seq) == 8);
    assert!(offset_of!(Block, state) == 12);
    assert!(offset_of!(Block, armed_ns) == 24);
    assert!(offset_of!(Block, breaches) == 40);
    assert!(offset_of!(Block, cause) == 64);
    assert!(offset_of!(Block, causes) == 72);
    assert!(offset_of!(Block, addr) == 88);
    assert!(offset_of!(Block, sender_cpu) == 96);
    assert!(offset_of!(Block, sender_comm) == 104);
    assert!(offset_of!(Block, sender_func) == 120);
    assert!(offset_of!(Block, count) == 160);
    assert!(offset_of!(Block, count) + 8 * COUNTS == STATUS_SIZE);
    assert!(size_of::<Block>() >= STATUS_SIZE && align_of::<Block>() == 64);
};

impl Block {
    pub(crate) fn seq(&self) -> u32 {
        self.seq.load(Ordering::Relaxed)
    }

    pub(crate) fn state(&self) -> u32 {
        self.state.load(Ordering::Relaxed)
    }

    pub(crate) fn breaches(&self) -> u64 {
        self.breaches.load(Ordering::Relaxed)
    }
}

/// Makes the call; the kernel's answer, errors negative. Async-signal-safe.
///
/// # Safety
/// `address` is 0 with size 0, or that of `size` bytes which the operation may read and write, laid out as
/// it wants them. What `ENABLE` is told as the status block is written until isolation is off, so it must
/// be memory for that.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "a raw system call; see the block")]
pub(crate) unsafe fn prctl(operation: Operation, address: u64, size: usize) -> i64 {
    let arguments = [PR_TASK_ISOLATION, operation as u64, address, size as u64, 0, 0];
    // SAFETY: the caller's promise; it is neither a clone nor a return from a signal.
    unsafe { crate::backend::sys::raw(libc::SYS_prctl as u64, arguments) as i64 }
}
