//! What watches a sealed worker: a seccomp filter that ends the process at any system call of the
//! calling thread, and an allocator that counts what that thread allocates and frees.
#![allow(unsafe_code, reason = "seccomp(2) and a global allocator; see each block")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

thread_local! {
    // Const and without a destructor: reading it neither allocates nor enters the kernel.
    static SEALED: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counting.
pub(crate) struct Counting;

fn count() {
    if SEALED.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to `System` unchanged; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: as above; `at` came from `System`.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Allocations, reallocations and frees of the sealed thread.
pub(crate) fn allocations() -> u64 {
    ALLOCATIONS.load(Ordering::Acquire)
}

/// From here on any system call of the calling thread but these ends the process with SIGSYS, returning
/// from the thread or the program too, and what it allocates is counted. There is no way back.
pub(crate) fn seal(but: &[libc::c_long]) -> std::io::Result<()> {
    let line = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let answer = |action| line(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    // The number is the first word of what a filter is shown.
    let mut program = vec![line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for number in but {
        program.push(line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, *number as u32));
        program.push(answer(libc::SECCOMP_RET_ALLOW));
    }
    program.push(answer(libc::SECCOMP_RET_KILL_PROCESS));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // Never freed: that would be counted.
    std::mem::forget(program);
    SEALED.set(true);
    // SAFETY: `filter` points to the instructions for the length of the calls; neither touches memory
    // of ours otherwise.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) != 0
    };
    if refused { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
