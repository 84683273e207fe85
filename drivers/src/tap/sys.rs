//! The seam: every system call of this driver, and where a chunk's bytes are.
//!
//! Contract: a wrapper takes and gives plain values and descriptors, checks nothing that the kernel checks, and
//! reports the kernel's answer as an [`Errno`].
#![allow(unsafe_code, reason = "system calls, and memory that they write; see each block")]

use super::layout::{HEADER_BYTES, VnetHeader};
use isoplane_memory::Pool;
use isoplane_memory::pool::META_BYTES;
use nix::errno::Errno;
use nix::{request_code_read, request_code_write};
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

/// Linux 6.18, `include/uapi/linux/if_tun.h`.
const TUNSETIFF: libc::Ioctl = request_code_write!(b'T', 202, size_of::<libc::c_int>()) as libc::Ioctl;
const TUNSETPERSIST: libc::Ioctl = request_code_write!(b'T', 203, size_of::<libc::c_int>()) as libc::Ioctl;
const TUNSETOFFLOAD: libc::Ioctl = request_code_write!(b'T', 208, size_of::<libc::c_uint>()) as libc::Ioctl;
const TUNGETIFF: libc::Ioctl = request_code_read!(b'T', 210, size_of::<libc::c_uint>()) as libc::Ioctl;
const TUNSETVNETHDRSZ: libc::Ioctl = request_code_write!(b'T', 216, size_of::<libc::c_int>()) as libc::Ioctl;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
/// Fail when there is one of that name.
const IFF_TUN_EXCL: libc::c_short = 0x8000_u16 as libc::c_short;
/// We take packets whose checksum is not finished.
const TUN_F_CSUM: libc::c_ulong = 1;

/// Where a part of a packet lies: inside one chunk, behind its metadata.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'p> {
    at: NonNull<u8>,
    len: usize,
    _pool: PhantomData<&'p Pool>,
}

impl<'p> Span<'p> {
    /// No bytes, nowhere.
    pub(super) const NONE: Self = Self { at: NonNull::dangling(), len: 0, _pool: PhantomData };

    /// `len` bytes from `address` (in bytes from chunk 0); `None` when they are not in one chunk of the pool, or touch
    /// its metadata.
    pub(super) fn of(pool: &'p Pool, address: u64, len: usize) -> Option<Self> {
        let chunk = u64::from(pool.chunk_bytes());
        let offset = address & (chunk - 1);
        pool.chunk_of(address)?;
        if offset < u64::from(META_BYTES) || offset + len as u64 > chunk {
            return None;
        }
        // SAFETY: chunks follow each other without gaps from `chunks_base` on, and the chunk exists.
        let at = unsafe { pool.chunks_base().byte_add(address as usize) };
        Some(Self { at, len, _pool: PhantomData })
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// The first `len` of its bytes.
    pub(super) const fn cut(self, len: usize) -> Self {
        Self { len: if len < self.len { len } else { self.len }, ..self }
    }

    /// Copies bytes out, from `from` on, as far as both reach; says how many.
    pub(super) fn copy_out(&self, from: usize, to: &mut [u8]) -> usize {
        let n = self.len.saturating_sub(from).min(to.len());
        // SAFETY: `n` bytes from `from` on lie inside the span, which lies inside the pool, which is mapped for 'p. The
        // chunk is in custody, so no frame lends its bytes; a process that breaks that protocol garbles a packet.
        unsafe { std::ptr::copy_nonoverlapping(self.at.as_ptr().wrapping_add(from), to.as_mut_ptr(), n) };
        n
    }

    /// Writes one byte; past the end, none.
    pub(super) fn set(&self, at: usize, value: u8) {
        if at < self.len {
            // SAFETY: inside the span; as in `copy_out`.
            unsafe { self.at.byte_add(at).write_volatile(value) };
        }
    }
}

/// Most spans of one packet.
pub(super) const MAX_SPANS: usize = super::config::MAX_SEGMENTS;

/// The header's vector, those of the spans, and one to spare.
fn vectors(header: *mut VnetHeader, spans: &[Span<'_>]) -> ([libc::iovec; MAX_SPANS + 2], usize) {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_SPANS + 2];
    vectors[0] = libc::iovec { iov_base: header.cast(), iov_len: HEADER_BYTES };
    let mut n = 1;
    for (vector, span) in vectors[1..].iter_mut().zip(spans.iter().take(MAX_SPANS)) {
        *vector = libc::iovec { iov_base: span.at.as_ptr().cast(), iov_len: span.len };
        n += 1;
    }
    (vectors, n)
}

/// readv(2): one packet and its header. Says how many bytes came, header included; one more than there is room for
/// when the packet was longer.
pub(super) fn read(fd: BorrowedFd<'_>, header: &mut VnetHeader, spans: &[Span<'_>]) -> Result<usize, Errno> {
    let mut spill = 0_u8;
    let (mut vectors, n) = vectors(header, spans);
    vectors[n] = libc::iovec { iov_base: (&raw mut spill).cast(), iov_len: 1 };
    // SAFETY: each vector names memory that is ours for the whole call: the header, one byte, and spans of the pool,
    // whose chunks are in custody. Any bytes are a valid header.
    let n = unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), n as libc::c_int + 1) };
    Errno::result(n).map(|n| n as usize)
}

/// writev(2): one packet and its header.
pub(super) fn write(fd: BorrowedFd<'_>, header: VnetHeader, spans: &[Span<'_>]) -> Result<usize, Errno> {
    let mut header = header;
    let (vectors, n) = vectors(&raw mut header, spans);
    // SAFETY: as in `read`; the kernel only reads.
    let n = unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), n as libc::c_int) };
    Errno::result(n).map(|n| n as usize)
}

/// Is there a process of that number?
pub(super) fn is_alive(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else { return false };
    // SAFETY: signal 0 is not sent; the kernel only looks.
    pid > 0 && (unsafe { libc::kill(pid, 0) } == 0 || Errno::last() != Errno::ESRCH)
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: `ifreq` is plain data; zeroes are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(fd: BorrowedFd<'_>, code: libc::Ioctl, request: &mut libc::ifreq) -> Result<(), Errno> {
    // SAFETY: each of the calls below takes an `ifreq`, which is valid for the whole call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(request)) }).map(drop)
}

fn ioctl_value(fd: BorrowedFd<'_>, code: libc::Ioctl, value: libc::c_ulong) -> Result<(), Errno> {
    // SAFETY: these take a number, not an address.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), code, value) }).map(drop)
}

/// Makes the tap of that name, or joins one more queue to it.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str, multi_queue: bool, new: bool) -> Result<(), Errno> {
    let mut request = request(name);
    let mut flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if multi_queue {
        flags |= IFF_MULTI_QUEUE;
    }
    if new {
        flags |= IFF_TUN_EXCL;
    }
    request.ifr_ifru.ifru_flags = flags;
    ioctl(fd, TUNSETIFF, &mut request)
}

/// Is the descriptor still that of an interface?
pub(super) fn is_attached(fd: BorrowedFd<'_>) -> bool {
    ioctl(fd, TUNGETIFF, &mut request("")) != Err(Errno::EBADFD)
}

pub(super) fn make_persistent(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    ioctl_value(fd, TUNSETPERSIST, 1)
}

/// Packets from the kernel may lack their checksum; they are never longer than the MTU allows.
pub(super) fn set_offloads(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut bytes = HEADER_BYTES as libc::c_int;
    // SAFETY: the kernel reads one `int`.
    let r = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw mut bytes) };
    Errno::result(r)?;
    ioctl_value(fd, TUNSETOFFLOAD, TUN_F_CSUM)
}

pub(super) fn set_mac(fd: BorrowedFd<'_>, name: &str, mac: [u8; 6]) -> Result<(), Errno> {
    let mut request = request(name);
    let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in address.sa_data.iter_mut().zip(mac) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_hwaddr = address;
    ioctl(fd, libc::SIOCSIFHWADDR as libc::Ioctl, &mut request)
}

pub(super) fn set_mtu(control: BorrowedFd<'_>, name: &str, mtu: u32) -> Result<(), Errno> {
    let mut request = request(name);
    request.ifr_ifru.ifru_mtu = libc::c_int::try_from(mtu).map_err(|_| Errno::EINVAL)?;
    ioctl(control, libc::SIOCSIFMTU as libc::Ioctl, &mut request)
}

pub(super) fn switch_on(control: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let mut request = request(name);
    ioctl(control, libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
    // SAFETY: the kernel has just filled in the flags, and any bits are flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(control, libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
}
