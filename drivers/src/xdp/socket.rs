//! One AF_XDP socket: its descriptor, its four rings, and telling the kernel that they have work.
//!
//! Contract: the rings stay mapped while the value lives, and are unmapped before the descriptor is
//! closed: the kernel keeps a queue as long as either is there. Indices and flags are only ever
//! touched as atomics. A kick does a bounded number of system calls.
#![allow(unsafe_code, reason = "ring memory that the kernel shares; see each block")]

use super::bpf::Attachment;
use super::layout::{
    MmapOffsets, RingOffset, Statistics, XDP_OPTIONS_ZEROCOPY, XDP_RING_NEED_WAKEUP, XdpDesc,
};
use super::layout::{SockaddrXdp, TX_BATCH, option, page_offset};
use super::sys;
use crate::KickError;
use isoplane_memory::Pool;
use isoplane_memory::ring::{Mapped, RingError};
use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::SndBuf;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Once};

/// Sizes of the four rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingSizes {
    pub(super) rx: u32,
    pub(super) tx: u32,
    pub(super) fill: u32,
    pub(super) completion: u32,
}

/// One mapped ring.
#[derive(Debug)]
struct RingMap {
    base: NonNull<u8>,
    bytes: usize,
    at: RingOffset,
    entries: u32,
}

// SAFETY: an address range that stays mapped for the value's life; what is in it is touched as
// atomics or by volatile copies only.
unsafe impl Send for RingMap {}
// SAFETY: as above.
unsafe impl Sync for RingMap {}

impl RingMap {
    fn map(
        fd: BorrowedFd<'_>,
        at: RingOffset,
        entries: u32,
        entry: usize,
        offset: i64,
    ) -> Result<Self, Errno> {
        let slots = entries as usize * entry;
        let bytes =
            usize::try_from(at.desc).ok().and_then(|d| d.checked_add(slots)).ok_or(Errno::EOVERFLOW)?;
        let inside = |offset: u64| offset.is_multiple_of(4) && offset.saturating_add(4) <= bytes as u64;
        if ![at.producer, at.consumer, at.flags].into_iter().all(inside) || !at.desc.is_multiple_of(8) {
            return Err(Errno::EPROTO);
        }
        let base = sys::map_ring(fd, bytes, offset)?;
        Ok(Self { base, bytes, at, entries })
    }

    fn word(&self, offset: u64) -> NonNull<u32> {
        // SAFETY: `map` has checked that the word lies inside the mapping, and is aligned.
        unsafe { self.base.add(offset as usize).cast() }
    }

    #[inline(always)]
    fn load(&self, offset: u64, order: Ordering) -> u32 {
        // SAFETY: as in `word`; the mapping lives as long as `self`, and the word is only ever used
        // as an atomic.
        unsafe { AtomicU32::from_ptr(self.word(offset).as_ptr()) }.load(order)
    }

    /// Entries that the producer has put in and the consumer not taken; a lie reads as a full ring.
    #[inline(always)]
    fn waiting(&self) -> u32 {
        let consumer = self.load(self.at.consumer, Ordering::Acquire);
        let producer = self.load(self.at.producer, Ordering::Acquire);
        producer.wrapping_sub(consumer).min(self.entries)
    }

    #[inline(always)]
    fn needs_wakeup(&self) -> bool {
        self.load(self.at.flags, Ordering::Relaxed) & XDP_RING_NEED_WAKEUP != 0
    }
}

impl Drop for RingMap {
    fn drop(&mut self) {
        // SAFETY: base and length are those of `map_ring`; whoever has a pointer into the mapping
        // keeps the socket, and so this value, alive.
        unsafe { sys::unmap(self.base, self.bytes) };
    }
}

/// The four rings, in the order in which they are unmapped.
#[derive(Debug)]
struct RingMaps {
    rx: RingMap,
    tx: RingMap,
    fill: RingMap,
    completion: RingMap,
}

/// Ring memory for the four sides that are ours.
pub(super) struct Rings {
    pub(super) rx: Mapped<XdpDesc>,
    pub(super) tx: Mapped<XdpDesc>,
    pub(super) fill: Mapped<u64>,
    pub(super) completion: Mapped<u64>,
}

/// A bound socket. Fields are dropped in this order: rings, descriptor, and then what it used.
#[derive(Debug)]
pub(super) struct Socket {
    rings: RingMaps,
    fd: OwnedFd,
    queue: u32,
    attachment: Arc<Attachment>,
    /// Keeps the UMEM's memory mapped as long as the kernel may write to it.
    _pool: Arc<Pool>,
    zero_copy: AtomicBool,
    need_wakeup: bool,
    /// Calls of send(2) that one kick may make.
    tries: u32,
    kicks: AtomicU64,
    kick_errors: AtomicU64,
    bad: [AtomicU64; 2],
    refused: AtomicU64,
}

impl Socket {
    /// Makes the rings of an open socket and maps them.
    pub(super) fn new(
        fd: OwnedFd,
        queue: u32,
        sizes: RingSizes,
        attachment: Arc<Attachment>,
        pool: Arc<Pool>,
        need_wakeup: bool,
    ) -> Result<Self, (&'static str, Errno)> {
        let f = fd.as_fd();
        for (name, call, entries) in [
            (option::UMEM_FILL_RING, "setsockopt(XDP_UMEM_FILL_RING)", sizes.fill),
            (option::UMEM_COMPLETION_RING, "setsockopt(XDP_UMEM_COMPLETION_RING)", sizes.completion),
            (option::RX_RING, "setsockopt(XDP_RX_RING)", sizes.rx),
            (option::TX_RING, "setsockopt(XDP_TX_RING)", sizes.tx),
        ] {
            sys::set_option(f, name, &entries).map_err(|e| (call, e))?;
        }
        let call = "getsockopt(XDP_MMAP_OFFSETS)";
        let (at, bytes) = sys::get_option::<MmapOffsets>(f, option::MMAP_OFFSETS).map_err(|e| (call, e))?;
        if bytes < size_of::<MmapOffsets>() {
            // Before 5.4 the kernel told no place for the flags.
            return Err((call, Errno::EPROTO));
        }
        let map_ring = |at, entries, entry, offset| {
            RingMap::map(f, at, entries, entry, offset).map_err(|e| ("mmap of a ring", e))
        };
        let rings = RingMaps {
            rx: map_ring(at.rx, sizes.rx, size_of::<XdpDesc>(), page_offset::RX)?,
            tx: map_ring(at.tx, sizes.tx, size_of::<XdpDesc>(), page_offset::TX)?,
            fill: map_ring(at.fill, sizes.fill, 8, page_offset::FILL)?,
            completion: map_ring(at.completion, sizes.completion, 8, page_offset::COMPLETION)?,
        };
        // One send passes on the whole ring where the kernel can do that, else 32 packets.
        let whole = sys::set_option(f, option::MAX_TX_SKB_BUDGET, &sizes.tx.max(TX_BATCH)).is_ok();
        // A kernel that copies and polls busily may never transmit (mended in 5.18), so the system's
        // default for that is not for this socket. Best effort: kernels without it need no telling.
        for name in [libc::SO_PREFER_BUSY_POLL, libc::SO_BUSY_POLL] {
            let _ = sys::set_option_at(f, libc::SOL_SOCKET, name, &0_i32);
        }
        // Copied packets count against the send buffer until the other side has taken them; its
        // default would throttle a full ring.
        let wanted = i32::try_from(u64::from(sizes.tx) * 4096).unwrap_or(i32::MAX);
        if let Err(got) = widen(f, wanted) {
            // Once, not for each queue.
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                tracing::warn!(
                    "the send buffers of AF_XDP sockets have {got} bytes instead of {wanted}, so full TX rings \
                     go out slowly in copy mode; set net.core.wmem_max to {wanted}, or give the program \
                     CAP_NET_ADMIN"
                );
            });
        }
        Ok(Self {
            rings,
            fd,
            queue,
            attachment,
            _pool: pool,
            zero_copy: AtomicBool::new(false),
            need_wakeup,
            tries: if whole { 2 } else { sizes.tx / TX_BATCH + 2 },
            kicks: AtomicU64::new(0),
            kick_errors: AtomicU64::new(0),
            bad: [AtomicU64::new(0), AtomicU64::new(0)],
            refused: AtomicU64::new(0),
        })
    }

    /// Binds to an interface's queue; afterwards `zero_copy` tells what the kernel chose.
    pub(super) fn bind(&self, ifindex: u32, flags: u16, shared: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        use std::os::fd::AsRawFd;
        let address = SockaddrXdp {
            family: super::layout::AF_XDP,
            flags,
            ifindex,
            queue_id: self.queue,
            shared_umem_fd: shared.map_or(0, |fd| fd.as_raw_fd() as u32),
        };
        sys::bind(self.fd.as_fd(), &address)?;
        let (options, _) = sys::get_option::<u32>(self.fd.as_fd(), option::OPTIONS)?;
        self.zero_copy.store(options & XDP_OPTIONS_ZEROCOPY != 0, Ordering::Relaxed);
        Ok(())
    }

    /// Registers memory as the socket's UMEM.
    pub(super) fn register(&self, umem: &super::layout::UmemReg) -> Result<(), Errno> {
        sys::set_option(self.fd.as_fd(), option::UMEM_REG, umem)
    }

    /// Ring memory; each ring keeps the socket alive.
    pub(super) fn rings(self: &Arc<Self>) -> Result<Rings, RingError> {
        let r = &self.rings;
        Ok(Rings {
            rx: self.ring(&r.rx)?,
            tx: self.ring(&r.tx)?,
            fill: self.ring(&r.fill)?,
            completion: self.ring(&r.completion)?,
        })
    }

    fn ring<T: isoplane_memory::Pod>(self: &Arc<Self>, map: &RingMap) -> Result<Mapped<T>, RingError> {
        let keep = Arc::clone(self);
        let (producer, consumer) = (map.word(map.at.producer), map.word(map.at.consumer));
        // SAFETY: `map` spans `desc` and `entries` entries of the size given to `RingMap::map`, which
        // is that of `T` (`rings` is the only caller), and `desc` was checked to be aligned to 8; the
        // mapping lives as long as `keep`, and nobody makes references to it.
        unsafe {
            let slots = map.base.add(map.at.desc as usize).cast();
            Mapped::from_raw(producer, consumer, slots, map.entries, keep)
        }
    }

    /// Sends the queue's packets to this socket.
    pub(super) fn enlist(&self) -> Result<(), Errno> {
        self.attachment.map.set(self.queue, self.fd.as_fd())
    }

    /// Ends that, for every process that has the socket.
    pub(super) fn delist(&self) {
        // It fails only when it is not there, which is what is wanted.
        let _ = self.attachment.map.clear(self.queue);
    }

    pub(super) const fn queue(&self) -> u32 {
        self.queue
    }

    #[inline(always)]
    pub(super) fn zero_copy(&self) -> bool {
        self.zero_copy.load(Ordering::Relaxed)
    }

    /// Does the kernel have to be told about what is in the TX ring?
    #[inline(always)]
    pub(super) fn tx_wants_kick(&self) -> bool {
        if self.rings.tx.waiting() == 0 {
            return false;
        }
        // Our index must be visible before we look at the flag, and the kernel does the reverse:
        // otherwise it may go to sleep without having seen the entry, and we not see that it did.
        fence(Ordering::SeqCst);
        !self.need_wakeup || self.rings.tx.needs_wakeup()
    }

    /// Does the kernel have to be told about what is in the fill ring? Only devices sleep on it; a
    /// kernel that copies looks each time.
    #[inline(always)]
    pub(super) fn rx_wants_kick(&self) -> bool {
        if !self.zero_copy() || !self.need_wakeup {
            return false;
        }
        fence(Ordering::SeqCst);
        self.rings.fill.needs_wakeup()
    }

    /// Tells the kernel that the TX ring has work, again while it takes entries and asks for more.
    pub(super) fn kick_tx(&self) -> Result<u32, KickError> {
        let before = self.rings.tx.waiting();
        let done = kick(self.tries, || self.rings.tx.waiting(), || sys::send(self.fd.as_fd()));
        self.count(done).map(|()| before)
    }

    /// Tells the kernel that the fill ring has chunks.
    pub(super) fn kick_rx(&self) -> Result<(), KickError> {
        self.count(kick(1, || 0, || sys::receive(self.fd.as_fd())))
    }

    fn count(&self, result: Result<(), KickError>) -> Result<(), KickError> {
        self.kicks.fetch_add(1, Ordering::Relaxed);
        if result.is_err() {
            self.kick_errors.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    /// Kicks made by this process, and those that failed.
    pub(super) fn kicks(&self) -> (u64, u64) {
        (self.kicks.load(Ordering::Relaxed), self.kick_errors.load(Ordering::Relaxed))
    }

    /// Notes how many lies one half has met in all.
    #[cold]
    pub(super) fn note_bad(&self, half: usize, total: u64) {
        if let Some(bad) = self.bad.get(half) {
            bad.store(total, Ordering::Relaxed);
        }
    }

    /// Notes how many frames were not sent since the kernel would not have taken them.
    #[cold]
    pub(super) fn note_refused(&self, total: u64) {
        self.refused.store(total, Ordering::Relaxed);
    }

    /// Frames of this process that were refused.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Lies that this process's halves have met.
    pub(super) fn bad(&self) -> u64 {
        self.bad.iter().map(|b| b.load(Ordering::Relaxed)).sum()
    }

    /// What the kernel has counted.
    pub(super) fn statistics(&self) -> Result<Statistics, Errno> {
        sys::get_option(self.fd.as_fd(), option::STATISTICS).map(|(statistics, _)| statistics)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes room for `wanted` bytes in the send buffer; without CAP_NET_ADMIN the system's limit applies,
/// which the kernel does not say. Gives the bytes there are when they are fewer.
fn widen(fd: BorrowedFd<'_>, wanted: i32) -> Result<(), usize> {
    if sys::set_option_at(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &wanted).is_err() {
        // Whether it worked is seen below.
        let _ = sys::set_option_at(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &wanted);
    }
    // The kernel doubles what it is told, for its own bookkeeping.
    let got = getsockopt(&fd, SndBuf).unwrap_or(0) / 2;
    if got < usize::try_from(wanted).unwrap_or(0) { Err(got) } else { Ok(()) }
}

/// The kick itself: `send` is made at most `tries` times, again only when the kernel said EAGAIN and
/// took entries meanwhile.
///
/// Passing conditions are not errors: EAGAIN (budget used up, completion ring or send buffer full),
/// EBUSY (the device's queue is full), ENOBUFS and ENOMEM (no memory just now), EINTR.
fn kick(
    tries: u32,
    waiting: impl Fn() -> u32,
    mut send: impl FnMut() -> Result<(), Errno>,
) -> Result<(), KickError> {
    let mut left = waiting();
    for _ in 0..tries {
        match send() {
            Ok(()) => return Ok(()),
            Err(Errno::EAGAIN) => {
                let now = waiting();
                if now == 0 || now >= left {
                    return Ok(());
                }
                left = now;
            }
            Err(Errno::EBUSY | Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR) => return Ok(()),
            Err(Errno::ENETDOWN) => return Err(KickError::Down),
            Err(Errno::ENXIO | Errno::ENODEV) => return Err(KickError::Gone),
            Err(other) => return Err(KickError::Os(other)),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod plain {
    //! A socket on plain memory, and a hand on the kernel's side of its rings.

    use super::*;
    use crate::xdp::bpf::Link;

    const PAGE: usize = 4096;

    fn map(entries: u32, entry: usize) -> RingMap {
        let bytes = (192 + entries as usize * entry).next_multiple_of(PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        let base = NonNull::new(base.cast()).filter(|_| base != libc::MAP_FAILED).expect("memory");
        let at = RingOffset { producer: 0, consumer: 64, flags: 128, desc: 192 };
        RingMap { base, bytes, at, entries }
    }

    fn nothing() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("/dev/null").into()
    }

    /// A socket with four empty rings and no kernel.
    pub(crate) fn socket(sizes: RingSizes, pool: &Arc<Pool>) -> Arc<Socket> {
        let rings = RingMaps {
            rx: map(sizes.rx, 16),
            tx: map(sizes.tx, 16),
            fill: map(sizes.fill, 8),
            completion: map(sizes.completion, 8),
        };
        let attachment = Attachment::new(Link::plain(nothing()), nothing().into(), nothing().into());
        Arc::new(Socket {
            rings,
            fd: nothing(),
            queue: 0,
            attachment: Arc::new(attachment),
            _pool: Arc::clone(pool),
            zero_copy: AtomicBool::new(false),
            need_wakeup: true,
            tries: 4,
            kicks: AtomicU64::new(0),
            kick_errors: AtomicU64::new(0),
            bad: [AtomicU64::new(0), AtomicU64::new(0)],
            refused: AtomicU64::new(0),
        })
    }

    /// Which ring.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Which {
        Rx,
        Tx,
        Fill,
        Completion,
    }

    impl Socket {
        pub(crate) fn attachment(&self) -> &Arc<Attachment> {
            &self.attachment
        }

        fn of(&self, which: Which) -> &RingMap {
            match which {
                Which::Rx => &self.rings.rx,
                Which::Tx => &self.rings.tx,
                Which::Fill => &self.rings.fill,
                Which::Completion => &self.rings.completion,
            }
        }

        /// Reads producer and consumer.
        pub(crate) fn indices(&self, which: Which) -> (u32, u32) {
            let ring = self.of(which);
            (ring.load(ring.at.producer, Ordering::Acquire), ring.load(ring.at.consumer, Ordering::Acquire))
        }

        /// Writes the index that is the kernel's, or any other word.
        pub(crate) fn set(&self, which: Which, word: &str, value: u32) {
            let ring = self.of(which);
            let at = match word {
                "producer" => ring.at.producer,
                "consumer" => ring.at.consumer,
                _ => ring.at.flags,
            };
            // SAFETY: as in `RingMap::load`.
            unsafe { AtomicU32::from_ptr(ring.word(at).as_ptr()) }.store(value, Ordering::Release);
        }

        /// Reads and writes slots as words of eight bytes.
        pub(crate) fn slot(&self, which: Which, index: u32) -> *mut [u64; 2] {
            let ring = self.of(which);
            let entry = if matches!(which, Which::Rx | Which::Tx) { 16 } else { 8 };
            let at = ring.at.desc as usize + (index & (ring.entries - 1)) as usize * entry;
            // SAFETY: the slot lies inside the mapping.
            unsafe { ring.base.as_ptr().add(at).cast() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    /// A kernel that takes 32 entries a send, gives the answers listed, then EAGAIN while entries wait.
    fn run(tries: u32, entries: u32, step: u32, answers: &[Errno]) -> (Result<(), KickError>, u32, u32) {
        let (left, sends) = (Cell::new(entries), Cell::new(0));
        let result = kick(
            tries,
            || left.get(),
            || {
                let n = sends.get();
                sends.set(n + 1);
                if let Some(errno) = answers.get(n as usize) {
                    return Err(*errno);
                }
                left.set(left.get().saturating_sub(step));
                if left.get() == 0 { Ok(()) } else { Err(Errno::EAGAIN) }
            },
        );
        (result, sends.get(), left.get())
    }

    #[test]
    fn a_send_buffer_that_stays_small_is_noticed() {
        let limit = std::fs::read_to_string("/proc/sys/net/core/wmem_max").unwrap();
        let limit: i32 = limit.trim().parse().unwrap();
        // Capabilities are a thread's own.
        let small = std::thread::spawn(move || {
            // `struct __user_cap_header_struct` (version 3, this thread) and two halves of three empty sets.
            let (header, none) = ([0x2008_0522_u32, 0], [0_u32; 6]);
            // SAFETY: capset(2) reads both, which are as long as version 3 says; giving up is always allowed.
            let rc = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
            assert_eq!(rc, 0);
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            (widen(socket.as_fd(), limit / 2), widen(socket.as_fd(), limit.saturating_add(4096)))
        });
        assert_eq!(small.join().unwrap(), (Ok(()), Err(limit as usize)));
        if nix::unistd::geteuid().is_root() {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            assert_eq!(widen(socket.as_fd(), limit.saturating_add(4096)), Ok(()), "with CAP_NET_ADMIN");
        }
    }

    #[test]
    fn a_kick_goes_on_until_the_ring_is_empty() {
        assert_eq!(run(100, 1024, 32, &[]), (Ok(()), 32, 0));
    }

    #[test]
    fn a_kick_ends_when_the_kernel_takes_nothing_more() {
        assert_eq!(run(100, 64, 0, &[]), (Ok(()), 1, 64));
    }

    #[test]
    fn a_kick_makes_no_more_calls_than_allowed() {
        assert_eq!(run(3, 1024, 1, &[]), (Ok(()), 3, 1021));
    }

    #[test]
    fn passing_conditions_are_not_errors() {
        for errno in [Errno::EBUSY, Errno::ENOBUFS, Errno::ENOMEM, Errno::EINTR, Errno::EAGAIN] {
            assert_eq!(run(8, 10, 1, &[errno]), (Ok(()), 1, 10), "{errno}");
        }
    }

    #[test]
    fn lasting_conditions_are_told_apart() {
        for (errno, error) in [
            (Errno::ENETDOWN, KickError::Down),
            (Errno::ENXIO, KickError::Gone),
            (Errno::ENODEV, KickError::Gone),
            (Errno::EPERM, KickError::Os(Errno::EPERM)),
        ] {
            assert_eq!(run(8, 10, 1, &[errno]), (Err(error), 1, 10));
        }
    }
}
