//! Copies of what passes a port: decorators that record packets into a ring, and readers that make a
//! pcap file ([`pcap`]) or log lines ([`trace`]) of them on a housekeeping thread, perhaps in another
//! process.
//!
//! ```text
//! worker: CaptureRx / CaptureTx -> ring of 64-byte cells in a region -> housekeeping: Records
//! ```
//!
//! Contract of the worker's side: a packet is copied as far as `snaplen` goes, in whole cells; when
//! the ring is full the packet is not recorded, and counted; it passes in any case. No allocation, no
//! system call. The reader trusts nothing in the ring: a record that makes no sense is counted and the
//! rest skipped.
//!
//! Times are ticks of the time-stamp counter, made into time of day by the reader.

mod halves;
pub mod pcap;
pub mod trace;

pub use halves::{CaptureRx, CaptureTx};

use isoplane_memory::ring::{self, Consumer, Producer, RingError};
use isoplane_memory::{BATCH, Clock, Frame, Pool, Region, RegionConfig, RegionError};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of a cell.
const CELL: usize = 64;
/// Bytes of a packet that are recorded at most: the length of a frame is 16 bits.
pub const MAX_SNAPLEN: u16 = u16::MAX;

/// First cell of each record.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Head {
    magic: u32,
    /// Bytes of the packet.
    len: u32,
    /// Bytes of it that follow.
    captured: u32,
    /// [`Direction`].
    direction: u32,
    ticks: u64,
    /// Packets that were not recorded so far.
    missed: u64,
    rest: [u64; 4],
}

const MAGIC: u32 = u32::from_be_bytes(*b"ICAP");

type Cell = [u64; CELL / 8];

const _: () = assert!(size_of::<Head>() == CELL && size_of::<Cell>() == CELL);

/// Which way a packet passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Direction {
    /// It was received.
    Rx = 0,
    /// It was handed to the transmit ring.
    Tx = 1,
}

/// How to record.
#[derive(Debug, Clone)]
pub struct CaptureConfig {
    /// Name of the region behind the ring.
    pub name: String,
    /// Bytes of each packet that are kept: 1 to 65535. 128 shows all headers.
    pub snaplen: u16,
    /// Size of the ring in cells of 64 bytes, a power of two; a record takes one, and one for every 64
    /// bytes of the packet.
    pub cells: u32,
}

impl CaptureConfig {
    /// Headers (128 bytes) of up to 5461 packets.
    #[must_use]
    pub fn headers(name: &str) -> Self {
        Self { name: name.to_owned(), snaplen: 128, cells: 16_384 }
    }

    /// Whole packets, in a ring of 4 MiB.
    #[must_use]
    pub fn whole(name: &str) -> Self {
        Self { name: name.to_owned(), snaplen: MAX_SNAPLEN, cells: 65_536 }
    }
}

/// Why a capture could not be made or attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Nothing would be recorded.
    #[error("capture {name:?}: a snaplen of 0 records nothing; take 1 to 65535")]
    Snaplen {
        /// The capture's name.
        name: String,
    },
    /// The ring is smaller than one record.
    #[error(
        "capture {name:?}: {cells} cells hold no packet of {snaplen} bytes; take at least {needed}, a power of two"
    )]
    Cells {
        /// The capture's name.
        name: String,
        /// What was asked for.
        cells: u32,
        /// What shall be recorded.
        snaplen: u16,
        /// Cells that one record takes.
        needed: u32,
    },
    /// The region could not be made or mapped.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The ring could not be laid out or found.
    #[error(transparent)]
    Ring(#[from] RingError),
}

/// Makes the two sides of a capture: the writing one for *one* decorator, and the reading one.
///
/// # Errors
/// See [`CaptureError`].
pub fn capture(config: &CaptureConfig) -> Result<(Recorder, Records), CaptureError> {
    let name = || config.name.clone();
    if config.snaplen == 0 {
        return Err(CaptureError::Snaplen { name: name() });
    }
    let needed = 1 + u32::from(config.snaplen).div_ceil(CELL as u32);
    if config.cells < needed {
        return Err(CaptureError::Cells {
            name: name(),
            cells: config.cells,
            snaplen: config.snaplen,
            needed,
        });
    }
    let bytes = ring::bytes_for::<Cell>(config.cells);
    let region = Region::create(&RegionConfig::new(&format!("isoplane.capture.{}", config.name), bytes))?;
    let (producer, consumer) = ring::channel(&region, 0, config.cells)?;
    let recorder = Recorder { ring: producer, snaplen: config.snaplen.into(), missed: 0 };
    Ok((recorder, Records::new(consumer, region)))
}

/// The worker's side.
#[derive(Debug)]
pub struct Recorder {
    ring: Producer<Cell>,
    snaplen: usize,
    missed: u64,
}

impl Recorder {
    /// Packets that were not recorded because the ring was full.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }

    /// After the worker died: goes on where its published records end.
    pub(crate) fn resync(&mut self) {
        self.ring.resync();
    }

    /// Are there records that nobody has read?
    #[inline]
    pub(crate) fn has_waiting(&self) -> bool {
        self.ring.pending() != Some(0)
    }

    /// Writes records of the packets of `frames`, which stay invisible until [`Recorder::publish`]. A
    /// packet in several frames is one record.
    #[inline]
    pub(crate) fn stage(&mut self, pool: &Pool, frames: &[Frame], direction: Direction) -> Staged {
        let ticks = Clock::ticks();
        let mut staged = Staged { after: [(0, 0); BATCH + 1] };
        let (mut cells, mut missed, mut start) = (0, 0, 0);
        for (at, frame) in frames.iter().enumerate().take(BATCH) {
            if !frame.has_more() {
                match self.packet(pool, &frames[start..=at], direction, ticks, (cells, missed)) {
                    Some(written) => cells += written,
                    None => missed += 1,
                }
                start = at + 1;
            }
            staged.after[at + 1] = (cells, missed);
        }
        staged
    }

    /// Makes the records of the first `frames` staged frames visible and forgets the others.
    #[inline]
    pub(crate) fn publish(&mut self, staged: &Staged, frames: usize) {
        let (cells, missed) = staged.after[frames.min(BATCH)];
        self.missed = self.missed.wrapping_add(missed);
        if cells != 0 {
            self.ring.publish(cells);
        }
    }

    /// Writes one record behind `cells` others; says how many cells it takes, `None` if too many.
    fn packet(
        &mut self,
        pool: &Pool,
        packet: &[Frame],
        direction: Direction,
        ticks: u64,
        (before, missed): (u32, u64),
    ) -> Option<u32> {
        let len: usize = packet.iter().map(|frame| usize::from(frame.len())).sum();
        let captured = len.min(self.snaplen);
        let cells = 1 + captured.div_ceil(CELL) as u32;
        if self.ring.free(before + cells) < before + cells {
            return None;
        }
        let head = Head {
            magic: MAGIC,
            len: len as u32,
            captured: captured as u32,
            direction: direction as u32,
            ticks,
            missed: self.missed.wrapping_add(missed),
            rest: [0; 4],
        };
        self.ring.write(before, bytemuck::cast(head));
        // Bytes go through one cell at a time: frames need not end on its boundary.
        let mut cell: Cell = [0; CELL / 8];
        let (mut at, mut left, mut slot) = (0, captured, before + 1);
        for frame in packet {
            let mut bytes = pool.bytes(frame);
            bytes = &bytes[..bytes.len().min(left)];
            left -= bytes.len();
            while !bytes.is_empty() {
                let n = bytes.len().min(CELL - at);
                bytemuck::cast_slice_mut::<u64, u8>(&mut cell)[at..at + n].copy_from_slice(&bytes[..n]);
                bytes = &bytes[n..];
                at += n;
                if at == CELL {
                    self.ring.write(slot, cell);
                    slot += 1;
                    at = 0;
                }
            }
        }
        if at != 0 {
            self.ring.write(slot, cell);
        }
        Some(cells)
    }
}

/// Cells written and packets missed up to and with each frame of a batch.
pub(crate) struct Staged {
    after: [(u32, u64); BATCH + 1],
}

impl Staged {
    /// Leading frames, of `frames`, none of which ends a packet that was missed.
    pub(crate) fn before_a_miss(&self, frames: usize) -> usize {
        self.after.iter().take(frames + 1).skip(1).take_while(|(_, missed)| *missed == 0).count()
    }
}

/// A recorded packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Time of day, since 1970.
    pub time: Duration,
    /// Which way it passed.
    pub direction: Direction,
    /// Its length in bytes.
    pub len: u32,
    /// Its first bytes.
    pub bytes: Vec<u8>,
}

/// The reader's side. Not for workers: it allocates.
#[derive(Debug)]
pub struct Records {
    ring: Consumer<Cell>,
    region: Arc<Region>,
    /// A pair of clock readings, and the TSC's rate where it can be used.
    anchor: (u64, Duration),
    clock: Option<Clock>,
    missed: u64,
    damaged: u64,
}

impl Records {
    fn new(ring: Consumer<Cell>, region: Arc<Region>) -> Self {
        let clock = Clock::tsc();
        if let Err(error) = &clock {
            tracing::warn!("capture {:?}: packets get the time they are read: {error}", region.name());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { ring, region, anchor: (Clock::ticks(), now), clock: clock.ok(), missed: 0, damaged: 0 }
    }

    /// Reads a capture whose region another process made; there must be one reader at a time.
    ///
    /// # Errors
    /// See [`CaptureError`].
    pub fn attach(fd: OwnedFd) -> Result<Self, CaptureError> {
        let region = Region::from_fd(fd, true)?;
        let consumer = Consumer::new(ring::Mapped::attach(&region, 0)?);
        Ok(Self::new(consumer, region))
    }

    /// Goes on where the last reader, perhaps in another process, has stopped.
    pub(crate) fn resync(&mut self) {
        self.ring.resync();
    }

    /// The region, to pass its descriptor on.
    #[must_use]
    pub const fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Packets that were not recorded for want of room, as far as records have told.
    #[must_use]
    pub const fn missed(&self) -> u64 {
        self.missed
    }

    /// Times that the ring held something that is no record.
    #[must_use]
    pub const fn damaged(&self) -> u64 {
        self.damaged + self.ring.corrupt()
    }

    fn time(&self, ticks: u64) -> Duration {
        let Some(clock) = &self.clock else {
            return SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        };
        let (then, time) = self.anchor;
        if ticks >= then {
            time.saturating_add(Duration::from_nanos(clock.to_nanos(ticks - then)))
        } else {
            time.saturating_sub(Duration::from_nanos(clock.to_nanos(then - ticks)))
        }
    }
}

impl Iterator for Records {
    type Item = Record;

    /// The next record; `None` when there is none yet.
    fn next(&mut self) -> Option<Record> {
        let available = self.ring.available(1);
        if available == 0 {
            return None;
        }
        let head: Head = bytemuck::cast(self.ring.read(0));
        let cells = 1 + u64::from(head.captured).div_ceil(CELL as u64);
        let direction = match head.direction {
            0 => Some(Direction::Rx),
            1 => Some(Direction::Tx),
            _ => None,
        };
        // A record is published whole.
        let whole = u64::from(self.ring.available(cells.min(u64::from(u32::MAX)) as u32)) >= cells;
        let Some(direction) = direction.filter(|_| {
            head.magic == MAGIC && whole && head.captured <= head.len && head.captured <= MAX_SNAPLEN.into()
        }) else {
            // Where the next one starts cannot be told: skip what is there.
            self.damaged += 1;
            self.ring.release(available);
            return None;
        };
        let mut bytes = Vec::with_capacity(cells as usize * CELL);
        for slot in 1..cells as u32 {
            bytes.extend_from_slice(bytemuck::bytes_of(&self.ring.read(slot)));
        }
        bytes.truncate(head.captured as usize);
        self.ring.release(cells as u32);
        self.missed = head.missed;
        Some(Record { time: self.time(head.ticks), direction, len: head.len, bytes })
    }
}
