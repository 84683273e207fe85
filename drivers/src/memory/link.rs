//! The shared memory of a connected pair: layout, who has claimed which side, when a direction is over.
//!
//! ```text
//! region | header, 4 KiB            | queue 0                          | queue 1 ...
//!        | magic, version, geometry,| direction A->B  | direction B->A |
//!        | pool identity, claims    |
//! direction | state, owner ids | refused | data ring | return ring |     (128-byte aligned each)
//! ```
//!
//! Contract: written once before the magic, then only the atomics and the rings change. Processes on
//! both sides share the pool, and with it they trust each other not to forge its owner map; what a
//! side reads here is checked all the same, so that a bug over there costs frames, not safety.
#![allow(unsafe_code, reason = "words in shared memory, custody in another process; see each block")]

use super::MemoryError;
use isoplane_memory::ring::{Mapped, bytes_for};
use isoplane_memory::{Custody, Pod, Pool, Region, RegionConfig, Zeroable, custody};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"ISOLINK1");
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
const CLAIMS_AT: usize = 128;
/// State, owner ids, refused: each on a cache-line pair of its own but for the ids, which are constant.
const CONTROL_BYTES: usize = 256;
const REFUSED_AT: usize = 128;
pub(super) const MAX_QUEUES: u16 = 32;
pub(super) const MAX_RING: u32 = 1 << 16;

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Header {
    magic: u64,
    version: u32,
    queues: u32,
    ring: u32,
    zero: u32,
    pool_device: u64,
    pool_inode: u64,
}

/// A frame that changes sides.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Descriptor {
    /// Address of the packet, in bytes from chunk 0.
    pub(super) address: u64,
    /// Bytes of the packet in this frame.
    pub(super) len: u32,
    /// `FrameFlags` bits.
    pub(super) flags: u32,
}

const _: () = assert!(size_of::<Descriptor>() == 16);

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Control {
    state: u32,
    data: u32,
    returns: u32,
}

/// The two sides of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    A = 0,
    B = 1,
}

impl Side {
    pub(super) const fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// The whole link, as one process maps it.
#[derive(Debug)]
pub(super) struct Link {
    region: Arc<Region>,
    claims: NonNull<AtomicU32>,
    queues: u16,
    ring: u32,
}

// SAFETY: the pointer leads to an atomic in the region that the value keeps mapped.
unsafe impl Send for Link {}
// SAFETY: as above.
unsafe impl Sync for Link {}

const fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(128)
}

const fn data_bytes(ring: u32) -> usize {
    align(bytes_for::<Descriptor>(ring))
}

const fn direction_bytes(ring: u32) -> usize {
    CONTROL_BYTES + data_bytes(ring) + align(bytes_for::<u64>(ring))
}

/// Device and inode of the memfd behind a pool: the same in every process.
fn identity(pool: &Pool) -> Result<(u64, u64), MemoryError> {
    let stat = nix::sys::stat::fstat(pool.as_fd()).map_err(MemoryError::Identity)?;
    Ok((stat.st_dev, stat.st_ino))
}

impl Link {
    pub(super) fn create(
        pool: &Arc<Pool>,
        name: &str,
        queues: u16,
        ring: u32,
    ) -> Result<Arc<Self>, MemoryError> {
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(MemoryError::Queues { name: name.to_owned(), queues });
        }
        if !ring.is_power_of_two() || !(2..=MAX_RING).contains(&ring) {
            return Err(MemoryError::Ring { name: name.to_owned(), ring });
        }
        let (pool_device, pool_inode) = identity(pool)?;
        let bytes = HEADER_BYTES + usize::from(queues) * 2 * direction_bytes(ring);
        let region = Region::create(&RegionConfig::new(&format!("isoplane.link.{name}"), bytes))?;
        let mut opened: Vec<Custody> = Vec::new();
        let mut lay_out = || {
            for at in Self::places(queues, ring) {
                let mut id = || {
                    // Noted at once: a later failure gives it back.
                    opened.push(pool.custody()?);
                    Ok::<_, MemoryError>(opened.last().map_or(0, |(lender, _)| lender.id().into()))
                };
                let control = Control { state: 0, data: id()?, returns: id()? };
                let place = region.slice::<Control>(at, 1).ok_or(MemoryError::NotALink)?;
                // SAFETY: inside the region and aligned; nobody else has the region yet.
                unsafe { place.write(control) };
                Mapped::<Descriptor>::create(&region, at + CONTROL_BYTES, ring)?;
                Mapped::<u64>::create(&region, at + CONTROL_BYTES + data_bytes(ring), ring)?;
            }
            Ok(())
        };
        if let Err(error) = lay_out() {
            for (lender, collector) in opened {
                custody::end(lender, collector);
            }
            return Err(error);
        }
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            queues: queues.into(),
            ring,
            zero: 0,
            pool_device,
            pool_inode,
        };
        let at = region.slice::<Header>(0, 1).ok_or(MemoryError::NotALink)?;
        // SAFETY: as above; whoever gets the descriptor gets it after this.
        unsafe { at.write(header) };
        Self::open(region, pool)
    }

    /// Finds a link in a region, and checks that it belongs to `pool`.
    pub(super) fn open(region: Arc<Region>, pool: &Pool) -> Result<Arc<Self>, MemoryError> {
        let at = region.slice::<Header>(0, 1).ok_or(MemoryError::NotALink)?;
        // SAFETY: inside the mapping and aligned; a volatile copy, since another process may write.
        let header = unsafe { at.read_volatile() };
        let queues = u16::try_from(header.queues).ok().filter(|q| (1..=MAX_QUEUES).contains(q));
        let queues = queues.ok_or(MemoryError::NotALink)?;
        if header.magic != MAGIC
            || header.version != VERSION
            || !header.ring.is_power_of_two()
            || header.ring > MAX_RING
        {
            return Err(MemoryError::NotALink);
        }
        if identity(pool)? != (header.pool_device, header.pool_inode) {
            return Err(MemoryError::OtherPool { pool: pool.name().to_owned() });
        }
        let claims = region.slice::<u32>(CLAIMS_AT, 1).ok_or(MemoryError::NotALink)?.cast();
        Ok(Arc::new(Self { claims, queues, ring: header.ring, region }))
    }

    fn places(queues: u16, ring: u32) -> impl Iterator<Item = usize> {
        (0..usize::from(queues) * 2).map(move |n| HEADER_BYTES + n * direction_bytes(ring))
    }

    pub(super) const fn queues(&self) -> u16 {
        self.queues
    }

    pub(super) const fn region(&self) -> &Arc<Region> {
        &self.region
    }

    const fn claims(&self) -> &AtomicU32 {
        // SAFETY: `open` checked bounds and alignment; the region lives as long as `self`.
        unsafe { self.claims.as_ref() }
    }

    /// Takes a side, once in all processes.
    pub(super) fn claim(&self, side: Side) -> bool {
        self.claims().fetch_or(side.bit(), Ordering::AcqRel) & side.bit() == 0
    }

    pub(super) fn claimed(&self, side: Side) -> bool {
        self.claims().load(Ordering::Acquire) & side.bit() != 0
    }

    /// The direction that `sender` sends in, of one queue.
    pub(super) fn direction(&self, queue: u16, sender: Side) -> Result<Direction, MemoryError> {
        let at = Self::places(self.queues, self.ring)
            .nth(usize::from(queue) * 2 + sender as usize)
            .ok_or(MemoryError::NotALink)?;
        let control = self.region.slice::<Control>(at, 1).ok_or(MemoryError::NotALink)?;
        // SAFETY: inside the mapping and aligned.
        let ids = unsafe { control.read_volatile() };
        let id = |id: u32| u8::try_from(id).map_err(|_| MemoryError::NotALink);
        let word =
            |at| self.region.slice::<u32>(at, 1).map(NonNull::cast::<AtomicU32>).ok_or(MemoryError::NotALink);
        let data = Mapped::attach(&self.region, at + CONTROL_BYTES)?;
        let returns = Mapped::attach(&self.region, at + CONTROL_BYTES + data_bytes(self.ring))?;
        Ok(Direction {
            state: word(at)?,
            refused: word(at + REFUSED_AT)?,
            data_id: id(ids.data)?,
            returns_id: id(ids.returns)?,
            rings: Some((data, returns)),
            _region: Arc::clone(&self.region),
        })
    }
}

/// The two halves at the ends of a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    /// The transmitting half of the side that sends.
    Tx = 0,
    /// The receiving half of the other.
    Rx = 1,
}

impl Half {
    pub(super) const fn stopped(self) -> u32 {
        1 << self as u32
    }
    const fn closing(self) -> u32 {
        4 << self as u32
    }
    const fn closed(self) -> u32 {
        16 << self as u32
    }
}

const BOTH_CLOSED: u32 = Half::Tx.closed() | Half::Rx.closed();

/// One direction of one queue, as one of its halves sees it.
#[derive(Debug)]
pub(super) struct Direction {
    state: NonNull<AtomicU32>,
    refused: NonNull<AtomicU32>,
    data_id: u8,
    returns_id: u8,
    rings: Option<(Mapped<Descriptor>, Mapped<u64>)>,
    _region: Arc<Region>,
}

// SAFETY: the pointers lead to atomics in the region that the value keeps mapped.
unsafe impl Send for Direction {}

impl Direction {
    /// The rings, once: data and returns.
    pub(super) fn rings(&mut self) -> Result<(Mapped<Descriptor>, Mapped<u64>), MemoryError> {
        self.rings.take().ok_or(MemoryError::NotALink)
    }

    /// Custody of the frames on their way, and of the empty ones on their way back. A transmitting
    /// half uses the lender of the first and the collector of the second, a receiving half the others.
    pub(super) fn custodies(&self, pool: &Arc<Pool>) -> Result<(Custody, Custody), MemoryError> {
        // SAFETY: these ids were opened for this direction alone. Of each side's claim there is one
        // in all processes (`Link::claim`), and each half uses only the ends that are its own.
        let ends = unsafe { (pool.custody_of(self.data_id), pool.custody_of(self.returns_id)) };
        ends.0.zip(ends.1).ok_or(MemoryError::NotALink)
    }

    #[inline(always)]
    const fn word(&self) -> &AtomicU32 {
        // SAFETY: `Link::direction` checked bounds and alignment; the region is kept mapped.
        unsafe { self.state.as_ref() }
    }

    /// Which halves have stopped: [`Half::stopped`] bits among others.
    #[inline(always)]
    pub(super) fn state(&self) -> u32 {
        self.word().load(Ordering::Acquire)
    }

    pub(super) fn stop(&self, half: Half) {
        self.word().fetch_or(half.stopped(), Ordering::AcqRel);
    }

    /// Descriptors that the receiving half refused, modulo 2^32.
    #[inline(always)]
    pub(super) fn refused(&self) -> u32 {
        // SAFETY: as in `word`.
        unsafe { self.refused.as_ref() }.load(Ordering::Acquire)
    }

    /// Only the receiving half writes it.
    pub(super) fn set_refused(&self, refused: u32) {
        // SAFETY: as in `word`.
        unsafe { self.refused.as_ref() }.store(refused, Ordering::Release);
    }

    /// Closes one half for good: `sweep` empties the custody that it collects from; the half that
    /// closes last also ends both custodies. Once in all processes; says how many frames went to the
    /// depot.
    pub(super) fn close(&self, pool: &Arc<Pool>, half: Half, sweep: impl FnOnce() -> u32) -> u32 {
        if self.word().fetch_or(half.closing(), Ordering::AcqRel) & half.closing() != 0 {
            return 0;
        }
        let mut swept = sweep();
        let state = self.word().fetch_or(half.closed(), Ordering::AcqRel) | half.closed();
        if state & BOTH_CLOSED == BOTH_CLOSED {
            for id in [self.data_id, self.returns_id] {
                // SAFETY: both halves have stopped and closed, here or in another process, and
                // exactly one of them sees the second `closed` bit appear: no end is in use.
                if let Some((lender, collector)) = unsafe { pool.custody_of(id) } {
                    swept += custody::end(lender, collector);
                }
            }
        }
        swept
    }
}
