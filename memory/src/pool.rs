//! A pool: a region cut in power-of-two chunks, and one owner byte for each of them.
//!
//! ```text
//! region  | header, 64 KiB                     | owner map | pad | chunk 0 | chunk 1 | ...
//!         | magic, geometry, owner count,      | 1 byte a  |     | aligned to 2 MiB when large,
//!         | one 64-byte journal line an owner  | chunk     |     | else to 4 KiB
//! chunk   | metadata, 64 bytes | headroom ... | packet ...                | tailroom |
//! ```
//!
//! Contract: each chunk has exactly one owner: the depot (nobody yet), a worker's
//! [`FrameCache`], or a [custody](crate::custody) (one direction
//! of a port queue). A [`Frame`]
//! exists only for chunks that a cache owns, so a chunk that is lent out cannot be reached, and an
//! address that comes back from a kernel, a device or another process becomes a frame only if the
//! owner byte agrees. The owner byte is shared memory: it survives the death of a worker, and
//! [`recovery`](crate::recovery) reads it.
#![allow(unsafe_code, reason = "chunk bytes and owner map in shared memory; see each block")]

mod config;
mod prepend;

pub use config::{PoolConfig, PoolError};
pub use prepend::Addresses;

use crate::batch::Batch;
use crate::cache::FrameCache;
use crate::custody::{Custody, Lender};
use crate::frame::{Frame, FrameMeta};
use crate::region::{Region, RegionConfig};
use crate::starts::Starts;
use bytemuck::{Pod, Zeroable};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// Bytes at the start of every chunk for [`FrameMeta`].
pub const META_BYTES: u32 = 64;
const HEADER_BYTES: usize = 65_536;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"ISOPOOL1");
const JOURNAL_AT: usize = 4096;
/// Owner 0: chunks that were never handed out.
const DEPOT: u8 = 0;
/// Owner ids that a pool can give out.
pub const MAX_OWNERS: u32 = 255;

const _: () = assert!(size_of::<FrameMeta>() <= META_BYTES as usize);

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: u64,
    chunks: u32,
    chunk_bytes: u32,
    headroom: u32,
    max_frame: u32,
    owners_at: u64,
    chunks_at: u64,
}
/// One bit for each owner id that is given out: four `AtomicU64` behind the header.
const OWNER_BITS_AT: usize = 64;

/// A region cut in chunks. Shared by all ports and workers that exchange frames.
#[derive(Debug)]
pub struct Pool {
    region: Arc<Region>,
    chunks_base: NonNull<u8>,
    owners: NonNull<AtomicU8>,
    journal: NonNull<u8>,
    chunks: u32,
    shift: u32,
    headroom: u32,
    max_frame: u32,
    colours: u32,
    tag: u16,
}

// SAFETY: the pointers lead into `region`, which the pool keeps mapped; owner bytes and journal are
// atomics, and chunk bytes are reached only through `&Frame`/`&mut Frame`, which are unique per chunk.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// Distinguishes the pools of a process (and of those forked from it), so that a frame of one pool
/// cannot be used with another. Zero is never given out.
static NEXT_TAG: AtomicU16 = AtomicU16::new(1);

/// The descriptor of the region behind the pool, to hand to another process. The region itself is not
/// handed out: a ring laid over a chunk would change bytes under somebody's frame.
impl AsFd for Pool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.region.as_fd()
    }
}

impl Pool {
    /// Makes a pool; all chunks belong to the depot.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn create(config: &PoolConfig) -> Result<Arc<Self>, PoolError> {
        let name = || config.name.clone();
        if !config.chunk_bytes.is_power_of_two() || !(2048..=65_536).contains(&config.chunk_bytes) {
            return Err(PoolError::ChunkSize { name: name(), bytes: config.chunk_bytes });
        }
        if !(1..=1 << 24).contains(&config.chunks) {
            return Err(PoolError::Chunks { name: name(), chunks: config.chunks });
        }
        let need = u64::from(META_BYTES) + u64::from(config.headroom) + u64::from(config.max_frame);
        if need > u64::from(config.chunk_bytes) || config.max_frame == 0 {
            return Err(PoolError::FrameSize {
                name: name(),
                max_frame: config.max_frame,
                headroom: config.headroom,
                chunk_bytes: config.chunk_bytes,
            });
        }
        let payload = config.chunks as usize * config.chunk_bytes as usize;
        let align = if payload >= 2 << 20 { 2 << 20 } else { 4096 };
        let chunks_at = (HEADER_BYTES + config.chunks as usize).next_multiple_of(align);
        let region = Region::create(&RegionConfig {
            name: config.name.clone(),
            bytes: chunks_at + payload,
            huge_pages: config.huge_pages,
            lock: config.lock,
            numa_node: config.numa_node,
        })?;
        let header = Header {
            magic: MAGIC,
            chunks: config.chunks,
            chunk_bytes: config.chunk_bytes,
            headroom: config.headroom,
            max_frame: config.max_frame,
            owners_at: HEADER_BYTES as u64,
            chunks_at: chunks_at as u64,
        };
        let at = region.slice::<Header>(0, 1).ok_or(PoolError::NotAPool)?;
        let owner_bits = region.slice::<u64>(OWNER_BITS_AT, 4).ok_or(PoolError::NotAPool)?;
        // SAFETY: `slice` checked bounds and alignment; nobody else has the region yet. Bit 0: depot.
        unsafe {
            owner_bits.write(1);
            at.write(header);
        }
        Self::in_region(region)
    }

    /// Finds the pool that another process made, in a descriptor it passed on.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn attach(fd: OwnedFd) -> Result<Arc<Self>, PoolError> {
        Self::in_region(Region::from_fd(fd, true)?)
    }

    fn in_region(region: Arc<Region>) -> Result<Arc<Self>, PoolError> {
        let at = region.slice::<Header>(0, 1).ok_or(PoolError::NotAPool)?;
        // SAFETY: inside the mapping and aligned; a volatile copy, since another process may write.
        let h = unsafe { at.read_volatile() };
        let valid = h.magic == MAGIC
            && h.chunk_bytes.is_power_of_two()
            && (2048..=65_536).contains(&h.chunk_bytes)
            && (1..=1 << 24).contains(&h.chunks)
            && h.headroom < h.chunk_bytes
            && h.max_frame != 0
            && h.max_frame < h.chunk_bytes
            && META_BYTES + h.headroom + h.max_frame <= h.chunk_bytes;
        if !valid {
            return Err(PoolError::NotAPool);
        }
        let spans = |at: u64, bytes: usize| {
            usize::try_from(at)
                .ok()
                .filter(|a| a.is_multiple_of(64))
                .and_then(|a| region.slice::<u8>(a, bytes))
        };
        let payload = h.chunks as usize * h.chunk_bytes as usize;
        // Header, owner map and chunks one after the other: bytes of a packet are never an owner byte.
        let chunks_from = HEADER_BYTES as u64 + u64::from(h.chunks);
        if h.owners_at != HEADER_BYTES as u64
            || h.chunks_at < chunks_from
            || !h.chunks_at.is_multiple_of(4096)
        {
            return Err(PoolError::NotAPool);
        }
        let owners = spans(h.owners_at, h.chunks as usize).ok_or(PoolError::NotAPool)?;
        let chunks_base = spans(h.chunks_at, payload).ok_or(PoolError::NotAPool)?;
        let journal = spans(JOURNAL_AT as u64, 256 * 64).ok_or(PoolError::NotAPool)?;
        // Never reused: a frame may outlive its pool, and must not fit another one then.
        let tag = NEXT_TAG
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |tag| tag.checked_add(1))
            .map_err(|_| PoolError::TooMany { name: region.name().to_owned() })?;
        let spare = h.chunk_bytes - META_BYTES - h.headroom - h.max_frame;
        // A power of two, so that choosing a colour is a mask; see `start_offset`.
        let colours = 1 << (spare / 64 + 1).min(16).ilog2();
        Ok(Arc::new(Self {
            chunks_base,
            owners: owners.cast(),
            journal,
            chunks: h.chunks,
            shift: h.chunk_bytes.trailing_zeros(),
            headroom: h.headroom,
            max_frame: h.max_frame,
            colours,
            tag,
            region,
        }))
    }

    /// Size of the region behind the pool, in bytes.
    #[must_use]
    pub fn region_bytes(&self) -> usize {
        self.region.len()
    }

    /// Bytes of one page of that region.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.region.page_bytes()
    }

    /// The region's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.region.name()
    }

    /// First byte of chunk 0; chunks follow each other without gaps, aligned to a page.
    #[must_use]
    pub const fn chunks_base(&self) -> NonNull<u8> {
        self.chunks_base
    }

    /// Number of chunks.
    #[inline(always)]
    #[must_use]
    pub const fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Size of a chunk in bytes.
    #[inline(always)]
    #[must_use]
    pub const fn chunk_bytes(&self) -> u32 {
        1 << self.shift
    }

    /// Size of a chunk as a power of two.
    #[inline(always)]
    #[must_use]
    pub const fn chunk_shift(&self) -> u32 {
        self.shift
    }

    /// Headroom before a packet that we make, beyond [`META_BYTES`] and the colour.
    #[must_use]
    pub const fn headroom(&self) -> u32 {
        self.headroom
    }

    /// Longest frame that fits any chunk at its coloured start.
    #[must_use]
    pub const fn max_frame(&self) -> u32 {
        self.max_frame
    }

    /// How many different 64-byte steps frame starts are spread over.
    #[must_use]
    pub const fn colours(&self) -> u32 {
        self.colours
    }

    /// Do two handles name the same memory?
    #[inline(always)]
    #[must_use]
    pub const fn same_as(&self, other: &Self) -> bool {
        self.tag == other.tag
    }

    /// Where a packet made by us starts in this chunk: metadata, headroom, then a colour, so that the
    /// headers of 32 frames in flight do not share two sets of the first-level cache.
    #[inline(always)]
    #[must_use]
    pub const fn start_offset(&self, chunk: u32) -> u16 {
        self.starts().offset(chunk)
    }

    /// The packet's bytes. Empty for a frame of another pool.
    #[inline(always)]
    #[must_use]
    pub const fn bytes<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        if frame.pool_tag() != self.tag {
            return &[];
        }
        // SAFETY: a frame with our tag was made by `frame_at` or `respan`, which keep chunk and span
        // inside the pool. It is the only frame of its chunk, so a shared borrow of it excludes a
        // writer in this process; other owners reach the chunk only after the frame is given back.
        unsafe { std::slice::from_raw_parts(self.start(frame).as_ptr(), frame.len() as usize) }
    }

    /// The packet's bytes, to be changed. Empty for a frame of another pool.
    #[inline(always)]
    #[must_use]
    pub const fn bytes_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        if frame.pool_tag() != self.tag {
            return &mut [];
        }
        // SAFETY: as in `bytes`; the unique borrow of the only frame makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start(frame).as_ptr(), frame.len() as usize) }
    }

    #[inline(always)]
    const fn start(&self, frame: &Frame) -> NonNull<u8> {
        let at = ((frame.chunk() as usize) << self.shift) + frame.offset() as usize;
        // SAFETY: chunk < chunks and offset <= chunk size (see `bytes`), so `at` is inside the pool.
        unsafe { self.chunks_base.add(at) }
    }

    /// Changes the bytes of each frame of a batch: as [`Pool::bytes_mut`] for each in turn, but the
    /// pool's geometry is read once.
    #[inline(always)]
    pub fn for_each_mut(&self, batch: &mut Batch, mut change: impl FnMut(&mut [u8])) {
        let (base, shift, tag) = (self.chunks_base, self.shift, self.tag);
        for frame in batch.iter_mut() {
            if frame.pool_tag() == tag {
                let at = ((frame.chunk() as usize) << shift) + frame.offset() as usize;
                // SAFETY: as in `bytes_mut`; base and shift are this pool's, and do not change.
                change(unsafe {
                    std::slice::from_raw_parts_mut(base.add(at).as_ptr(), frame.len() as usize)
                });
            }
        }
    }

    /// Asks the CPU to fetch the packet's first line.
    #[inline(always)]
    pub fn prefetch(&self, frame: &Frame) {
        #[cfg(target_arch = "x86_64")]
        if frame.pool_tag() == self.tag {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: prefetch has no effect but on caches, and SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.start(frame).as_ptr().cast()) };
        }
    }

    /// Makes the frame `len` bytes long at the pool's own start offset, for a packet about to be
    /// written. False, and unchanged, when `len` does not fit.
    #[inline(always)]
    pub const fn reset(&self, frame: &mut Frame, len: u16) -> bool {
        self.respan(frame, self.start_offset(frame.chunk()), len)
    }

    /// Moves the frame to any span inside its chunk behind the metadata. False, and unchanged, when
    /// it does not fit.
    #[inline(always)]
    pub const fn respan(&self, frame: &mut Frame, offset: u16, len: u16) -> bool {
        let fits = offset as u32 >= META_BYTES && offset as u32 + len as u32 <= self.chunk_bytes();
        if !fits || frame.pool_tag() != self.tag {
            return false;
        }
        frame.set_span(offset, len);
        true
    }

    /// Grows the frame by `n` bytes at the front (to push a header). False when there is no room.
    #[inline(always)]
    pub const fn grow_front(&self, frame: &mut Frame, n: u16) -> bool {
        if frame.offset() < n || frame.len() > u16::MAX - n {
            return false;
        }
        self.respan(frame, frame.offset() - n, frame.len() + n)
    }

    /// Grows the frame by `n` bytes at the end. False when there is no room.
    #[inline(always)]
    pub const fn grow_back(&self, frame: &mut Frame, n: u16) -> bool {
        if frame.len() > u16::MAX - n {
            return false;
        }
        self.respan(frame, frame.offset(), frame.len() + n)
    }

    /// Reads the frame's metadata.
    #[inline(always)]
    #[must_use]
    pub const fn meta(&self, frame: &Frame) -> Option<FrameMeta> {
        if frame.pool_tag() != self.tag {
            return None;
        }
        let at = (frame.chunk() as usize) << self.shift;
        // SAFETY: the first META_BYTES of the chunk are inside the pool, aligned to a page fraction,
        // and no span of a frame covers them (`respan`), so no byte slice aliases this copy.
        Some(unsafe { self.chunks_base.add(at).cast::<FrameMeta>().read() })
    }

    /// Writes the frame's metadata and marks it valid.
    #[inline(always)]
    pub fn set_meta(&self, frame: &mut Frame, meta: FrameMeta) {
        if frame.pool_tag() == self.tag {
            let at = (frame.chunk() as usize) << self.shift;
            // SAFETY: as in `meta`; `&mut Frame` is the only handle of the chunk.
            unsafe { self.chunks_base.add(at).cast::<FrameMeta>().write(meta) };
            frame.set_flags(frame.flags() | crate::FrameFlags::META);
        }
    }

    /// Makes a frame for a chunk that the caller has just become the owner of.
    #[inline(always)]
    pub(crate) const fn frame_at(&self, chunk: u32, offset: u16, len: u16) -> Frame {
        Frame::new(self.tag, chunk, offset, len)
    }

    /// What it takes to make many frames, read once.
    #[inline(always)]
    pub(crate) const fn starts(&self) -> Starts {
        Starts {
            tag: self.tag,
            first: META_BYTES + self.headroom,
            colour_mask: self.colours - 1,
            // Chunks within a page differ in the address bits that choose a cache set anyway.
            colour_shift: 12u32.saturating_sub(self.shift),
        }
    }

    /// What tells the frames of this pool from those of others.
    #[inline(always)]
    pub(crate) const fn tag(&self) -> u16 {
        self.tag
    }

    #[inline(always)]
    pub(crate) const fn owns(&self, frame: &Frame) -> bool {
        frame.pool_tag() == self.tag
    }

    /// The chunk's owner byte. `chunk` is below `chunks`.
    #[inline(always)]
    pub(crate) fn owner(&self, chunk: u32) -> &AtomicU8 {
        debug_assert!(chunk < self.chunks);
        // SAFETY: every caller has checked `chunk < chunks` (frames hold that as an invariant), and
        // the owner map has one byte a chunk.
        unsafe { self.owners.add(chunk as usize).as_ref() }
    }

    #[inline(always)]
    pub(crate) fn journal(&self, owner: u8) -> &AtomicU64 {
        // SAFETY: 256 lines of 64 bytes were checked in `in_region`; 64-byte aligned.
        unsafe { self.journal.add(usize::from(owner) * 64).cast::<AtomicU64>().as_ref() }
    }

    fn owner_bits(&self) -> [&AtomicU64; 4] {
        // SAFETY: the header page is inside the region (`in_region` checked beyond it), the words are
        // aligned, and after `create` they are only ever used as atomics.
        [0, 8, 16, 24]
            .map(|at| unsafe { self.region.base().add(OWNER_BITS_AT + at).cast::<AtomicU64>().as_ref() })
    }

    fn new_owner(&self) -> Result<u8, PoolError> {
        for (base, word) in [0_u8, 64, 128, 192].into_iter().zip(self.owner_bits()) {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != u64::MAX {
                let bit = bits.trailing_ones();
                let taken = bits | 1 << bit;
                match word.compare_exchange(bits, taken, Ordering::AcqRel, Ordering::Relaxed) {
                    Ok(_) => return Ok(base + bit as u8),
                    Err(now) => bits = now,
                }
            }
        }
        Err(PoolError::Owners { name: self.name().to_owned() })
    }

    /// Gives an owner id back; its chunks go to the depot. Says how many those were.
    pub(crate) fn retire_owner(&self, id: u8) -> u32 {
        let swept = self.sweep(id);
        let word = usize::from(id / 64);
        if id != DEPOT {
            self.journal(id).store(0, Ordering::Relaxed);
            self.owner_bits()[word].fetch_and(!(1 << (id % 64)), Ordering::AcqRel);
        }
        swept
    }

    /// Moves every chunk of an owner to the depot.
    pub(crate) fn sweep(&self, id: u8) -> u32 {
        let swap = |chunk: &u32| {
            self.owner(*chunk).compare_exchange(id, DEPOT, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        (0..self.chunks).filter(swap).count() as u32
    }

    /// Takes up to `n` chunks that nobody owns straight into custody: how a port fills its rings before
    /// there is a worker. Gives the chunks' addresses; none when the pools differ.
    #[must_use]
    pub fn draw(&self, lender: &Lender, n: usize) -> Vec<u64> {
        if !lender.pool().same_as(self) {
            return Vec::new();
        }
        let chunks = self.draw_for(lender.id(), n.min(self.chunks as usize) as u32);
        chunks.into_iter().map(|chunk| u64::from(chunk) << self.shift).collect()
    }

    /// A new custodian of frames, for one direction of a port queue: the end that takes frames from
    /// a worker and the end that gives them back.
    ///
    /// # Errors
    /// [`PoolError::Owners`] when the pool has given out all its owner ids.
    pub fn custody(self: &Arc<Self>) -> Result<Custody, PoolError> {
        let id = self.new_owner()?;
        Ok(crate::custody::open(self, id))
    }

    /// Both ends of a custody that was opened elsewhere, for a process that it was handed to (with its
    /// owner id) and for whoever clears up after both sides. `None` when no such id is given out.
    ///
    /// # Safety
    /// At any time at most one collector of an owner id is in use, in all processes together; the
    /// same goes for its lender.
    #[must_use]
    pub unsafe fn custody_of(self: &Arc<Self>, id: u8) -> Option<Custody> {
        let word = self.owner_bits()[usize::from(id / 64)].load(Ordering::Acquire);
        (id != DEPOT && word & 1 << (id % 64) != 0).then(|| crate::custody::open(self, id))
    }

    /// Gives a frame to the depot, for holders that have no cache at hand. Cold.
    ///
    /// # Errors
    /// The frame, when it is of another pool.
    pub fn surrender(&self, frame: Frame) -> Result<(), Frame> {
        if !self.owns(&frame) {
            return Err(frame);
        }
        self.owner(frame.chunk()).store(DEPOT, Ordering::Release);
        Ok(())
    }

    /// A worker's cache with `frames` frames from the depot.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] when fewer are left, [`PoolError::Owners`].
    pub fn cache(self: &Arc<Self>, who: &str, frames: u32) -> Result<FrameCache, PoolError> {
        let left = self.count(DEPOT);
        if frames > left {
            return Err(PoolError::Exhausted {
                name: self.name().to_owned(),
                who: who.to_owned(),
                wanted: frames,
                left,
                total: self.chunks,
            });
        }
        let mut cache = FrameCache::empty(Arc::clone(self), self.new_owner()?);
        cache.draw(frames);
        Ok(cache)
    }

    /// Moves up to `n` chunks from the depot to an owner.
    pub(crate) fn draw_for(&self, id: u8, n: u32) -> Vec<u32> {
        let mine = |chunk: &u32| {
            self.owner(*chunk).compare_exchange(DEPOT, id, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        (0..self.chunks).filter(mine).take(n as usize).collect()
    }

    pub(crate) fn count(&self, owner: u8) -> u32 {
        (0..self.chunks).filter(|c| self.owner(*c).load(Ordering::Relaxed) == owner).count() as u32
    }

    /// Chunks that nobody was given yet.
    #[must_use]
    pub fn in_depot(&self) -> u32 {
        self.count(DEPOT)
    }

    /// Chunks by owner id: index 0 is the depot, then caches and custodies in the order they were
    /// made. The sum is always [`Pool::chunks`].
    #[must_use]
    pub fn census(&self) -> Vec<u32> {
        let mut counts = vec![0; 256];
        for chunk in 0..self.chunks {
            counts[usize::from(self.owner(chunk).load(Ordering::Relaxed))] += 1;
        }
        counts
    }

    /// Chunk that an address lies in, when it is inside the pool.
    #[inline(always)]
    #[must_use]
    pub fn chunk_of(&self, address: u64) -> Option<u32> {
        u32::try_from(address >> self.shift).ok().filter(|c| *c < self.chunks)
    }
}
