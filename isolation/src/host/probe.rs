//! What the kernel says when asked, where no file says it.
//!
//! Contract: asking changes nothing, neither in the kernel nor in the calling thread: every call either
//! only reads, or is made with arguments that a kernel which knows it refuses. These are system calls:
//! never ask from an isolated thread.
#![allow(unsafe_code, reason = "prctl(2) has no safe wrapper for these operations; see each block")]

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// An answer of the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Answer {
    /// Nobody asked, or this architecture cannot say.
    #[default]
    Unknown,
    /// It has it.
    Yes,
    /// It has not: the error it gave.
    No(String),
}

/// What the hypervisor says about itself (`cpuid` leaves 0x4000_0000 and following).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hypervisor {
    /// Its signature, such as `KVMKVMKVM`.
    pub signature: String,
    /// Whether guests flush the TLB of a preempted CPU by asking the hypervisor rather than with an IPI
    /// (`KVM_FEATURE_PV_TLB_FLUSH`, bit 9 of leaf 0x4000_0001).
    pub pv_tlb_flush: bool,
}

/// The answers that the checks want. By default nothing is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Probes {
    /// Sockets of the family `AF_XDP`.
    pub af_xdp: Answer,
    /// Syscall user dispatch (Linux 5.11, x86-64; 5.13 for all that the `dispatch` backend uses).
    pub syscall_dispatch: Answer,
    /// The task-isolation `prctl` of this project's kernel patches.
    pub task_isolation: Answer,
    /// The hypervisor, in a virtual machine.
    pub hypervisor: Option<Hypervisor>,
}

impl Probes {
    /// Asks the kernel of this machine.
    #[must_use]
    pub fn ask() -> Self {
        Self {
            af_xdp: af_xdp(),
            syscall_dispatch: syscall_dispatch(),
            task_isolation: task_isolation(),
            hypervisor: hypervisor(),
        }
    }
}

fn af_xdp() -> Answer {
    let family = AddressFamily::from_i32(libc::AF_XDP);
    // nix knows the families that libc knows; this one it may not.
    if let Some(family) = family {
        return match socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, None) {
            Ok(_) => Answer::Yes,
            Err(error) => refused(error),
        };
    }
    // SAFETY: plain numbers in, a descriptor or -1 out.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    match Errno::result(fd) {
        Ok(fd) => {
            // SAFETY: the descriptor is new and nobody else has it.
            drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
            Answer::Yes
        }
        Err(error) => refused(error),
    }
}

/// Without the right to make such a socket the kernel has said that it knows the family.
fn refused(error: Errno) -> Answer {
    match error {
        Errno::EPERM | Errno::EACCES => Answer::Yes,
        error => Answer::No(error.to_string()),
    }
}

fn syscall_dispatch() -> Answer {
    // Linux include/uapi/linux/prctl.h.
    const PR_SET_SYSCALL_USER_DISPATCH: libc::c_int = 59;
    const PR_SYS_DISPATCH_ON: libc::c_ulong = 1;
    // A selector that no process can have: a kernel that knows the operation refuses the address (EFAULT)
    // and switches nothing on; one that does not refuses the operation (EINVAL).
    let nowhere = libc::c_ulong::MAX;
    // SAFETY: no memory is passed; the kernel checks the address before it keeps it.
    let result = unsafe {
        libc::prctl(
            PR_SET_SYSCALL_USER_DISPATCH,
            PR_SYS_DISPATCH_ON,
            0 as libc::c_ulong,
            0 as libc::c_ulong,
            nowhere,
        )
    };
    match Errno::result(result) {
        Err(Errno::EFAULT) => Answer::Yes,
        Err(error) => Answer::No(error.to_string()),
        Ok(_) => {
            // It took the impossible selector: take it back before a system call follows it.
            // SAFETY: plain numbers.
            unsafe { libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, 0 as libc::c_ulong, 0, 0, 0) };
            Answer::Yes
        }
    }
}

fn task_isolation() -> Answer {
    // "ISOL": `PR_TASK_ISOLATION` of the kernel patches, operation `FEATURES`.
    const PR_TASK_ISOLATION: libc::c_int = 0x4953_4f4c;
    const FEATURES: libc::c_ulong = 4;
    let zero: libc::c_ulong = 0;
    // SAFETY: plain numbers; there is no memory that the kernel could write to.
    let result = unsafe { libc::prctl(PR_TASK_ISOLATION, FEATURES, zero, zero, zero) };
    match Errno::result(result) {
        Ok(_) => Answer::Yes,
        // EINVAL of a kernel that does not know it; a seccomp filter has other answers.
        Err(error) => Answer::No(error.to_string()),
    }
}

#[cfg(target_arch = "x86_64")]
fn hypervisor() -> Option<Hypervisor> {
    use std::arch::x86_64::__cpuid;
    // Intel SDM, CPUID leaf 1: bit 31 of ECX is kept for hypervisors to say that they are there.
    if __cpuid(1).ecx & 1 << 31 == 0 {
        return None;
    }
    // Linux Documentation/virt/kvm/x86/cpuid.rst.
    let leaf = __cpuid(0x4000_0000);
    let bytes: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].iter().flat_map(|word| word.to_le_bytes()).collect();
    let signature: String =
        bytes.iter().filter(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect();
    // Old versions of KVM leave the largest leaf 0 and have 0x4000_0001.
    let kvm = signature == "KVMKVMKVM" && (leaf.eax == 0 || leaf.eax >= 0x4000_0001);
    let pv_tlb_flush = kvm && __cpuid(0x4000_0001).eax & 1 << 9 != 0;
    Some(Hypervisor { signature, pv_tlb_flush })
}

#[cfg(not(target_arch = "x86_64"))]
fn hypervisor() -> Option<Hypervisor> {
    None
}
