//! Finishing what the kernel has pending on this CPU, as far as a kernel without task isolation lets
//! a program do it.
//!
//! Contract: a fixed, small number of system calls, none of which waits for anything but the
//! scheduler; called with the gate open only. It cannot stop the tick and cannot prove that nothing is
//! left: that needs the kernel's help, and the backends that have none say so.
#![allow(unsafe_code, reason = "raw mlock and sched calls, also from a signal handler; see each block")]

use crate::mode::Quiesce;

/// Raw, so that it may be called in a signal handler and leaves `errno` alone.
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: libc::c_long, a: u64, b: u64, c: u64, d: u64) -> u64 {
    // SAFETY: forwarded to the caller, who passes calls that only read what he points them at.
    unsafe { crate::backend::sys::raw(number as u64, [a, b, c, d, 0, 0]) }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn call(number: libc::c_long, a: u64, b: u64, c: u64, d: u64) -> u64 {
    // SAFETY: as above; there are no handlers of ours on other architectures.
    unsafe { libc::syscall(number, a, b, c, d) as u64 }
}

/// Quiesces this CPU. `scratch` is a locked page that nothing else uses.
pub(crate) fn quiesce(what: Quiesce, scratch: *mut u8, real_time: bool) {
    if what.contains(Quiesce::LRU) {
        // Both directions walk the page under lru_add_drain() on this CPU (mm/mlock.c, since 5.18).
        // SAFETY: the page is mapped, ours, and holds nothing; locking does not change contents.
        unsafe {
            call(libc::SYS_munlock, scratch as u64, 1, 0, 0);
            call(libc::SYS_mlock, scratch as u64, 1, 0, 0);
        }
    }
    if what.contains(Quiesce::PENDING_WORK) {
        if real_time {
            let pause = libc::timespec { tv_sec: 0, tv_nsec: 1000 };
            // SAFETY: reads one timespec that lives until the call returns.
            unsafe {
                let clock = libc::CLOCK_MONOTONIC as u64;
                call(libc::SYS_clock_nanosleep, clock, 0, (&raw const pause) as u64, 0);
            }
        } else {
            // SAFETY: no arguments.
            unsafe { call(libc::SYS_sched_yield, 0, 0, 0, 0) };
        }
    }
}

/// Folds the per-CPU statistics of virtual memory, of every CPU: see [`Quiesce::VMSTAT`].
pub(crate) fn refresh_vmstat() -> std::io::Result<()> {
    std::fs::write("/proc/sys/vm/stat_refresh", "1")
}
