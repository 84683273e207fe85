//! The seam: every system call of this driver, and nothing else.
//!
//! Contract: a wrapper takes and gives plain values and descriptors, checks nothing that the kernel
//! checks, and reports the kernel's answer as an [`Errno`]. Structures handed to the kernel are plain
//! old data of the size that `layout` asserts.
#![allow(unsafe_code, reason = "system calls and mappings; see each block")]

use super::layout::{AF_XDP, SOL_XDP, SockaddrXdp};
use bytemuck::{Pod, Zeroable};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// A new AF_XDP socket in the calling thread's network namespace.
pub(super) fn socket() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers are passed.
    let fd =
        Errno::result(unsafe { libc::socket(i32::from(AF_XDP), libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the kernel has just given us this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// setsockopt(2) at level `SOL_XDP`.
pub(super) fn set_option<T: Pod>(fd: BorrowedFd<'_>, name: i32, value: &T) -> Result<(), Errno> {
    set_option_at(fd, SOL_XDP, name, value)
}

/// setsockopt(2).
pub(super) fn set_option_at<T: Pod>(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &T,
) -> Result<(), Errno> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer is valid for `len` bytes for the whole call, and the kernel only reads them.
    let r = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), len) };
    Errno::result(r).map(drop)
}

/// getsockopt(2) at level `SOL_XDP`; says how many bytes the kernel filled, the rest are zero.
pub(super) fn get_option<T: Pod>(fd: BorrowedFd<'_>, name: i32) -> Result<(T, usize), Errno> {
    let mut value = T::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `value`; any bits are a `T`.
    let r = unsafe {
        libc::getsockopt(fd.as_raw_fd(), SOL_XDP, name, std::ptr::from_mut(&mut value).cast(), &raw mut len)
    };
    Errno::result(r).map(|_| (value, len as usize))
}

/// bind(2).
pub(super) fn bind(fd: BorrowedFd<'_>, address: &SockaddrXdp) -> Result<(), Errno> {
    let len = size_of::<SockaddrXdp>() as libc::socklen_t;
    // SAFETY: the pointer is valid for `len` bytes, which the kernel only reads.
    let r = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(address).cast(), len) };
    Errno::result(r).map(drop)
}

/// Maps one ring of a socket: shared, writable, present.
pub(super) fn map_ring(fd: BorrowedFd<'_>, bytes: usize, offset: i64) -> Result<NonNull<u8>, Errno> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd.as_raw_fd(), offset) };
    if base == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    NonNull::new(base.cast()).ok_or(Errno::EFAULT)
}

/// Ends a mapping.
///
/// # Safety
/// `base` and `bytes` are those of one [`map_ring`], and nothing points into it any more.
pub(super) unsafe fn unmap(base: NonNull<u8>, bytes: usize) {
    // SAFETY: promised by the caller. It can only fail for arguments that are wrong.
    unsafe { libc::munmap(base.as_ptr().cast(), bytes) };
}

/// Tells the kernel that the TX ring has work: an empty send that does not wait.
#[inline]
pub(super) fn send(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let none = std::ptr::null();
    // SAFETY: an empty message and no address: the kernel reads no memory of ours.
    Errno::result(unsafe { libc::sendto(fd.as_raw_fd(), none, 0, libc::MSG_DONTWAIT, none.cast(), 0) })
        .map(drop)
}

/// Tells the kernel that the fill ring has chunks: an empty receive that does not wait.
#[inline]
pub(super) fn receive(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let (none, no_len) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: no buffer and no address: the kernel writes no memory of ours.
    Errno::result(unsafe { libc::recvfrom(fd.as_raw_fd(), none, 0, libc::MSG_DONTWAIT, none.cast(), no_len) })
        .map(drop)
}

/// bpf(2): gives the call's result; the kernel may write into `attributes`.
///
/// # Safety
/// Every address and length in `attributes` names memory that the command may use in its way.
pub(super) unsafe fn bpf<T: Pod>(command: i32, attributes: &mut T) -> Result<i32, Errno> {
    // SAFETY: `attributes` is valid for its size; what it points to is the caller's promise.
    let r = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>() as libc::c_uint)
    };
    Errno::result(r).map(|r| r as i32)
}

/// As [`bpf`], for the commands that make a descriptor.
///
/// # Safety
/// As [`bpf`]; and `command` makes a new descriptor.
pub(super) unsafe fn bpf_fd<T: Pod>(command: i32, attributes: &mut T) -> Result<OwnedFd, Errno> {
    // SAFETY: promised by the caller.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the command has just made this descriptor; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `struct ethtool_channels` of `ETHTOOL_GCHANNELS`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct EthtoolChannels {
    command: u32,
    max: [u32; 4],
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// How many queues an interface has now: the larger of its RX and TX queues, as AF_XDP counts.
/// `socket` is any socket of the interface's namespace.
pub(super) fn queue_count(socket: BorrowedFd<'_>, interface: &str) -> Result<u32, Errno> {
    const ETHTOOL_GCHANNELS: u32 = 0x3c;
    let mut channels = EthtoolChannels { command: ETHTOOL_GCHANNELS, ..EthtoolChannels::zeroed() };
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if interface.len() >= request.ifr_name.len() {
        return Err(Errno::ENAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut channels).cast();
    // SAFETY: SIOCETHTOOL reads the request, and for this command reads and writes one
    // `ethtool_channels` at `ifru_data`, which lives until the call is over.
    let r = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &raw mut request) };
    Errno::result(r)?;
    Ok(channels.rx.max(channels.tx).saturating_add(channels.combined))
}

/// Limits how long a receive on a socket may wait.
pub(super) fn receive_timeout(fd: std::os::fd::RawFd, limit: libc::timeval) -> Result<(), Errno> {
    let len = size_of::<libc::timeval>() as libc::socklen_t;
    // SAFETY: the pointer is valid for `len` bytes, which the kernel only reads; a descriptor that is
    // not a socket is an error, nothing else.
    let r = unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, std::ptr::from_ref(&limit).cast(), len)
    };
    Errno::result(r).map(drop)
}

/// Numbers requests, so that an answer can be told from a late one.
pub(super) fn sequence() -> u32 {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Raises the limit on locked memory as far as it goes. Kernels before 5.11 count BPF objects against
/// it, and all of them the UMEM of a process without CAP_IPC_LOCK; whether that is enough shows when
/// the memory is registered.
pub(super) fn raise_memlock() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
    if setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_err()
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
    {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
    }
}
