//! What the `dispatch` backend says to the kernel, and what every backend needs of signals: constants,
//! layouts and raw calls.
//!
//! Sources: Linux Documentation/admin-guide/syscall-user-dispatch.rst (5.11), include/uapi/linux/prctl.h,
//! include/uapi/asm-generic/siginfo.h, include/uapi/linux/perf_event.h (`sigtrap`: 5.13).
#![allow(unsafe_code, reason = "prctl, rt_sigaction, perf_event_open, raw syscalls; see each block")]

use nix::errno::Errno;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

const PR_SET_SYSCALL_USER_DISPATCH: libc::c_int = 59;
const PR_SYS_DISPATCH_OFF: libc::c_ulong = 0;
const PR_SYS_DISPATCH_ON: libc::c_ulong = 1;

/// `si_code` of a SIGSYS from syscall user dispatch.
pub(crate) const SYS_USER_DISPATCH: libc::c_int = 2;
/// `si_code` of a SIGTRAP from a perf event.
pub(crate) const TRAP_PERF: libc::c_int = 6;

/// Bytes from a restorer's start that may make a system call while the gate is shut: it loads
/// rt_sigreturn's number (5 or 7 bytes) and executes `syscall` (2), and the kernel looks at the address
/// after that, which must be inside.
const RESTORER_BYTES: libc::c_ulong = 10;

/// Traps this thread's system calls, but those from `restorer`, while `selector` says BLOCK.
pub(crate) fn dispatch_on(selector: &AtomicU8, restorer: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads the selector's byte on each system call of this thread, until
    // `dispatch_off`; the thread page that holds it outlives that (see `Thread`). Should it vanish, the
    // kernel kills the process; it never writes there.
    let result = unsafe {
        libc::prctl(
            PR_SET_SYSCALL_USER_DISPATCH,
            PR_SYS_DISPATCH_ON,
            restorer as libc::c_ulong,
            RESTORER_BYTES,
            selector.as_ptr(),
        )
    };
    Errno::result(result).map(drop)
}

/// Traps no more.
pub(crate) fn dispatch_off() -> Result<(), Errno> {
    // SAFETY: no pointers.
    let result = unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_OFF, 0, 0, 0) };
    Errno::result(result).map(drop)
}

/// The kernel's own form of a signal's action; the C library hides the restorer.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct KernelAction {
    pub(crate) handler: u64,
    pub(crate) flags: u64,
    pub(crate) restorer: u64,
    pub(crate) mask: u64,
}

/// Reads a signal's action as the kernel has it.
pub(crate) fn action_of(signal: libc::c_int) -> Result<KernelAction, Errno> {
    let mut action = KernelAction::default();
    // SAFETY: the kernel writes one action of this layout (asm/signal.h, x86-64) and reads none.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigaction, signal, std::ptr::null::<KernelAction>(), &raw mut action, 8)
    };
    Errno::result(result).map(|_| action)
}

/// Sets a signal's action as the kernel has it, with its own restorer.
pub(crate) fn set_action(signal: libc::c_int, action: &KernelAction) -> Result<(), Errno> {
    // SAFETY: the kernel reads one action of this layout, which came from `action_of`, and writes none.
    let result = unsafe {
        let none = std::ptr::null_mut::<KernelAction>();
        libc::syscall(libc::SYS_rt_sigaction, signal, std::ptr::from_ref(action), none, 8)
    };
    Errno::result(result).map(drop)
}

/// Sets the calling thread's signal mask. Async-signal-safe.
pub(crate) fn set_mask(mask: u64) {
    change_mask(libc::SIG_SETMASK, mask);
}

/// Opens signals of the calling thread.
pub(crate) fn unblock(signals: u64) {
    change_mask(libc::SIG_UNBLOCK, signals);
}

fn change_mask(how: libc::c_int, mask: u64) {
    // SAFETY: the kernel reads eight bytes that live until the call returns; it cannot fail with these.
    unsafe { raw(libc::SYS_rt_sigprocmask as u64, [how as u64, (&raw const mask) as u64, 0, 8, 0, 0]) };
}

/// The first part of the kernel's siginfo for SIGSYS.
#[repr(C)]
pub(crate) struct SigsysInfo {
    signo: libc::c_int,
    errno: libc::c_int,
    pub(crate) code: libc::c_int,
    _pad: libc::c_int,
    pub(crate) call_address: u64,
    pub(crate) syscall: libc::c_int,
    pub(crate) arch: u32,
}

/// The first part of the kernel's siginfo for a SIGTRAP of a perf event.
#[repr(C)]
pub(crate) struct PerfTrapInfo {
    signo: libc::c_int,
    errno: libc::c_int,
    pub(crate) code: libc::c_int,
    _pad: libc::c_int,
    pub(crate) address: u64,
    pub(crate) data: u64,
    pub(crate) kind: u32,
}

/// A system call with six arguments, as the caller's registers had them; the result is the kernel's,
/// errors negative. Never touches `errno`, so it may be used in a signal handler.
///
/// # Safety
/// As for the system call itself: its pointers must be what it wants them to be, and it must not be
/// one that ends or duplicates this stack frame (clone, vfork, rt_sigreturn, execve).
pub(crate) unsafe fn raw(number: u64, args: [u64; 6]) -> u64 {
    let result;
    // SAFETY: the kernel's calling convention for x86-64; it clobbers rcx and r11 and nothing else.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

const PERF_TYPE_SOFTWARE: u32 = 1;
const PERF_COUNT_SW_PAGE_FAULTS: u64 = 2;
const PERF_SAMPLE_ADDR: u64 = 1 << 3;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const PERF_EVENT_IOC_ENABLE: libc::c_ulong = 0x2400;
const PERF_EVENT_IOC_DISABLE: libc::c_ulong = 0x2401;
// Bits of the attribute's flag word.
const DISABLED: u64 = 1 << 0;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const EXCLUDE_HV: u64 = 1 << 6;
const REMOVE_ON_EXEC: u64 = 1 << 36;
const SIGTRAP: u64 = 1 << 37;

/// `struct perf_event_attr` up to and with `sig_data` (PERF_ATTR_SIZE_VER7, Linux 5.13).
#[repr(C)]
#[derive(Default)]
struct PerfAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
    config2: u64,
    branch_sample_type: u64,
    sample_regs_user: u64,
    sample_stack_user: u32,
    clockid: i32,
    sample_regs_intr: u64,
    aux_watermark: u32,
    sample_max_stack: u16,
    _reserved2: u16,
    aux_sample_size: u32,
    _reserved3: u32,
    sig_data: u64,
}

const _: () = assert!(size_of::<PerfAttr>() == 128);

/// A perf event that sends this thread a SIGTRAP at each page fault it takes in user mode.
#[derive(Debug)]
pub(crate) struct FaultEvent(OwnedFd);

impl FaultEvent {
    /// Opens the event, switched off. `data` comes back in the signal.
    pub(crate) fn open(data: u64) -> Result<Self, Errno> {
        let attr = PerfAttr {
            kind: PERF_TYPE_SOFTWARE,
            size: size_of::<PerfAttr>() as u32,
            config: PERF_COUNT_SW_PAGE_FAULTS,
            sample_period: 1,
            sample_type: PERF_SAMPLE_ADDR,
            flags: DISABLED | EXCLUDE_KERNEL | EXCLUDE_HV | REMOVE_ON_EXEC | SIGTRAP,
            sig_data: data,
            ..PerfAttr::default()
        };
        // SAFETY: the kernel reads `size` bytes of the attribute; the rest are plain numbers: this
        // thread, any CPU, no group.
        let fd = unsafe {
            libc::syscall(libc::SYS_perf_event_open, &raw const attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC)
        };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    pub(crate) fn switch(&self, on: bool) -> Result<(), Errno> {
        let request = if on { PERF_EVENT_IOC_ENABLE } else { PERF_EVENT_IOC_DISABLE };
        // SAFETY: these requests take no pointer.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), request, 0) }).map(drop)
    }
}

/// A thread's former signal stack, while ours is in its place.
#[derive(Debug)]
pub(crate) struct SignalStack {
    ours: NonNull<c_void>,
    former: libc::stack_t,
}

impl SignalStack {
    /// Makes `bytes` from `base` the calling thread's signal stack.
    pub(crate) fn set(base: NonNull<c_void>, bytes: usize) -> Result<Self, Errno> {
        let ours = libc::stack_t { ss_sp: base.as_ptr(), ss_flags: 0, ss_size: bytes };
        let mut former = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
        // SAFETY: the memory is the page's and outlives this value's owner, which restores first.
        Errno::result(unsafe { libc::sigaltstack(&raw const ours, &raw mut former) })?;
        Ok(Self { ours: base, former })
    }

    /// Puts the former one back, for the calling thread. Where somebody has changed it since, the former
    /// one may be gone, and stays so: Rust's runtime unmaps its own when a thread ends, before the last
    /// thread-locals are dropped.
    pub(crate) fn restore(&self) {
        let mut now = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
        // SAFETY: the kernel writes one struct, and takes back what it gave us as the thread's own stack
        // before; not running on ours.
        unsafe {
            if libc::sigaltstack(std::ptr::null(), &raw mut now) == 0 && now.ss_sp == self.ours.as_ptr() {
                libc::sigaltstack(&raw const self.former, std::ptr::null_mut());
            }
        }
    }
}
