//! The statistics segment: counters that workers write without synchronisation and that another
//! process may map read-only.
//!
//! ```text
//! header | block records | field records | values of block 0 | values of block 1 | ...
//!        | worker, port, | name, kind,   | 64-byte aligned: one writer a block
//!        | where         | words         |
//! ```
//!
//! Contract: the directory is complete before the segment is published and never changes after; a
//! value is a 64-bit word with one writer, written with a relaxed store, so a reader sees each word
//! whole and some time old. A reader trusts nothing, since it may be root's and the segment anybody's:
//! it checks version, seals and every offset, what it keeps is no larger than the segment, and no text
//! that it hands out can steer a terminal. The version changes when the layout does; a reader of another
//! version is refused.
#![allow(unsafe_code, reason = "words in shared memory; see each block")]

mod find;

pub use find::{Found, find};

use crate::region::{Lock, Region, RegionConfig, RegionError};
use bytemuck::{Pod, Zeroable};
use nix::sys::stat::fstat;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Version of the segment's layout.
pub const VERSION: u32 = 1;
const MAGIC: u64 = u64::from_le_bytes(*b"ISOSTATS");
const PREFIX: &str = "isoplane.stats.";
const LABEL: usize = 32;
// Far more than any dataplane needs (a worker with a port has two blocks of about 40 fields and 4 KiB in
// all), and few enough for a reader to hold and sort in a moment, whoever wrote them.
const MAX_BLOCKS: usize = 1 << 13;
const MAX_FIELDS: usize = 1 << 15;
const MAX_BYTES: usize = 64 << 20;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: u64,
    version: u32,
    pid: u32,
    created_unix_ns: u64,
    blocks: u32,
    fields: u32,
    blocks_at: u64,
    fields_at: u64,
    name: [u8; 64],
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BlockRecord {
    worker: [u8; LABEL],
    port: [u8; LABEL],
    first_field: u32,
    fields: u32,
    values_at: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct FieldRecord {
    name: [u8; 40],
    kind: u32,
    words: u32,
}

/// What a value means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Only grows, but for a restart of its writer.
    Counter = 0,
    /// Goes up and down.
    Gauge = 1,
    /// Bucket `i` counts values `v` with `2^(i-1) <= v < 2^i` (bucket 0: zero).
    Log2Histogram = 2,
}

/// One named value (or array of values) of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Name, at most 40 bytes; the unit is its suffix (`_ns`, `_bytes`) where it is not a count.
    pub name: &'static str,
    /// What it means.
    pub kind: Kind,
    /// Words it takes; 1 but for histograms.
    pub words: u32,
}

impl Field {
    /// A counter.
    #[must_use]
    pub const fn counter(name: &'static str) -> Self {
        Self { name, kind: Kind::Counter, words: 1 }
    }

    /// A gauge.
    #[must_use]
    pub const fn gauge(name: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, words: 1 }
    }

    /// A histogram with a bucket for each power of two up to 2^62.
    #[must_use]
    pub const fn histogram(name: &'static str) -> Self {
        Self { name, kind: Kind::Log2Histogram, words: 64 }
    }
}

/// Why a segment could not be made or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatsError {
    /// A label that does not fit its record.
    #[error("statistics label {label:?} is longer than {max} bytes")]
    Label {
        /// The label.
        label: String,
        /// Bytes it may have.
        max: usize,
    },
    /// Not a segment.
    #[error("the descriptor holds no isoplane statistics segment")]
    NotASegment,
    /// Made by another version.
    #[error(
        "the statistics segment has version {found}, this program reads {VERSION}; use the isoplane command that belongs to it"
    )]
    Version {
        /// The segment's version.
        found: u32,
    },
    /// Larger than any writer makes it.
    #[error(
        "the statistics segment is too large: {what} {found}, and at most {max} are allowed; \
         use fewer workers, ports or fields"
    )]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// What there is.
        found: usize,
        /// What there may be.
        max: usize,
    },
    /// The directory contradicts itself.
    #[error("the statistics segment is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// The region could not be made or mapped.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// Lays out a segment.
#[derive(Debug, Default)]
pub struct SegmentBuilder {
    blocks: Vec<(String, String, Vec<Field>)>,
}

/// Names a block of the segment being laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockId(usize);

impl SegmentBuilder {
    /// Adds a block: the values that one writer writes about one thing. `worker` and `port` are
    /// labels of at most 32 bytes; empty means "the program" and "no port".
    pub fn block(&mut self, worker: &str, port: &str, fields: &[Field]) -> BlockId {
        self.blocks.push((worker.to_owned(), port.to_owned(), fields.to_vec()));
        BlockId(self.blocks.len() - 1)
    }

    /// Makes the segment. Other processes find it by `name` (see [`find`]).
    ///
    /// # Errors
    /// See [`StatsError`].
    pub fn build(self, name: &str) -> Result<Segment, StatsError> {
        let align = |n: usize| n.next_multiple_of(64);
        let words = |fields: &[Field]| fields.iter().map(|f| f.words as usize).sum::<usize>();
        let fields = self.blocks.iter().map(|b| b.2.len()).sum::<usize>();
        let blocks_at = align(size_of::<Header>());
        let fields_at = align(blocks_at + self.blocks.len() * size_of::<BlockRecord>());
        let mut at = align(fields_at + fields * size_of::<FieldRecord>());
        let mut block_records = Vec::with_capacity(self.blocks.len());
        let mut field_records = Vec::with_capacity(fields);
        let mut places = Vec::with_capacity(self.blocks.len());
        for (worker, port, fields) in &self.blocks {
            block_records.push(BlockRecord {
                worker: label(worker)?,
                port: label(port)?,
                first_field: field_records.len() as u32,
                fields: fields.len() as u32,
                values_at: at as u64,
            });
            for field in fields {
                field_records.push(FieldRecord {
                    name: label(field.name)?,
                    kind: field.kind as u32,
                    words: field.words,
                });
            }
            places.push((at, words(fields)));
            // A line between blocks keeps the prefetcher of one writer off the next one's values.
            at = align(at + words(fields) * 8) + 64;
        }
        let header = Header {
            magic: 0,
            version: VERSION,
            pid: std::process::id(),
            created_unix_ns: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| d.as_nanos() as u64),
            blocks: block_records.len() as u32,
            fields: field_records.len() as u32,
            blocks_at: blocks_at as u64,
            fields_at: fields_at as u64,
            name: label(name)?,
        };
        bounded(block_records.len(), field_records.len(), at)?;
        let config = RegionConfig { lock: Lock::Prefer, ..RegionConfig::new(&format!("{PREFIX}{name}"), at) };
        let region = Region::create(&config)?;
        write(&region, 0, &[header])?;
        write(&region, blocks_at, &block_records)?;
        write(&region, fields_at, &field_records)?;
        word(&region, 0).ok_or(StatsError::NotASegment)?.store(MAGIC, Ordering::Release);
        Ok(Segment { region, places })
    }
}

fn bounded(blocks: usize, fields: usize, bytes: usize) -> Result<(), StatsError> {
    let all = [("blocks", blocks, MAX_BLOCKS), ("fields", fields, MAX_FIELDS), ("bytes", bytes, MAX_BYTES)];
    match all.into_iter().find(|(_, found, max)| found > max) {
        Some((what, found, max)) => Err(StatsError::TooLarge { what, found, max }),
        None => Ok(()),
    }
}

/// Is it what memfds are: a plain file on tmpfs? Opening anything else may wait (a FIFO) or do something
/// (a device), and pages of hugetlb can be taken away from under a mapping.
fn is_plain_memory(fd: &OwnedFd) -> bool {
    let is_file = fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG);
    is_file && fstatfs(fd).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC)
}

fn label<const N: usize>(text: &str) -> Result<[u8; N], StatsError> {
    let mut bytes = [0; N];
    let slot =
        bytes.get_mut(..text.len()).ok_or_else(|| StatsError::Label { label: text.to_owned(), max: N })?;
    slot.copy_from_slice(text.as_bytes());
    Ok(bytes)
}

/// A label, with what is no text in it replaced: a terminal obeys control characters, and the reader
/// may be somebody with more rights than the writer.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    printable(&String::from_utf8_lossy(&bytes[..end]))
}

fn printable(text: &str) -> String {
    // Marks that turn the direction of writing could show one name as another.
    let obeyed = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if obeyed(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

fn write<T: Pod>(region: &Region, at: usize, values: &[T]) -> Result<(), StatsError> {
    let to = region.slice::<T>(at, values.len()).ok_or(StatsError::NotASegment)?;
    // SAFETY: `slice` checked bounds and alignment; the region is new and ours alone.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to.as_ptr(), values.len()) };
    Ok(())
}

fn read<T: Pod>(region: &Region, at: u64, count: u32) -> Option<Vec<T>> {
    let from = region.slice::<T>(usize::try_from(at).ok()?, count as usize)?;
    // SAFETY: bounds and alignment were checked; a volatile copy of `Pod` tolerates a hostile writer.
    Some((0..count as usize).map(|i| unsafe { from.add(i).read_volatile() }).collect())
}

fn word(region: &Region, at: usize) -> Option<&AtomicU64> {
    // SAFETY: bounds and alignment were checked, and the region lives as long as the reference.
    region.slice::<u64>(at, 1).map(|p| unsafe { p.cast::<AtomicU64>().as_ref() })
}

/// A segment that this process made and writes.
#[derive(Debug)]
pub struct Segment {
    region: Arc<Region>,
    places: Vec<(usize, usize)>,
}

impl Segment {
    /// The values of a block, for its writer.
    #[must_use]
    pub fn block(&self, id: BlockId) -> Option<Block> {
        let (at, words) = *self.places.get(id.0)?;
        let values = self.region.slice::<u64>(at, words)?.cast();
        Some(Block { values, words, _region: Arc::clone(&self.region) })
    }

    /// The region, to pass its descriptor on.
    #[must_use]
    pub const fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Reads it back, as another process would.
    ///
    /// # Errors
    /// See [`StatsError`].
    pub fn reader(&self) -> Result<SegmentReader, StatsError> {
        let fd = self.region.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|_| StatsError::NotASegment)?;
        SegmentReader::attach(fd)
    }
}

/// One writer's values. Words are numbered through the block's fields, in order.
#[derive(Debug, Clone)]
pub struct Block {
    values: NonNull<AtomicU64>,
    words: usize,
    _region: Arc<Region>,
}

// SAFETY: only atomics are reached, in a region that the block keeps mapped.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// Blocks as large as these in a region of their own: what is counted there is not published.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn unpublished<'a>(like: impl IntoIterator<Item = &'a Self>) -> Result<Vec<Self>, RegionError> {
        let sizes: Vec<usize> = like.into_iter().map(|block| block.words).collect();
        let bytes = sizes.iter().map(|words| words * 8).sum::<usize>().max(8);
        let config = RegionConfig { lock: Lock::Never, ..RegionConfig::new("isoplane.unpublished", bytes) };
        let region = Region::create(&config)?;
        let mut at = 0;
        let block = |words: usize| {
            let values = region.slice::<u64>(at, words)?.cast();
            at += words * 8;
            Some(Self { values, words, _region: Arc::clone(&region) })
        };
        Ok(sizes.into_iter().filter_map(block).collect())
    }

    #[inline(always)]
    fn word(&self, at: usize) -> Option<&AtomicU64> {
        // SAFETY: `at` is below the number of words that `Segment::block` checked.
        (at < self.words).then(|| unsafe { self.values.add(at).as_ref() })
    }

    /// Adds to a word that nobody else writes: a plain load and store, no locked instruction.
    #[inline(always)]
    pub fn add(&self, at: usize, n: u64) {
        if let Some(word) = self.word(at) {
            word.store(word.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        }
    }

    /// Sets a word.
    #[inline(always)]
    pub fn set(&self, at: usize, value: u64) {
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Reads a word; 0 past the end.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, at: usize) -> u64 {
        self.word(at).map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Counts `value` in the [`Kind::Log2Histogram`] whose first word is `at`.
    #[inline(always)]
    pub fn record(&self, at: usize, value: u64) {
        self.add(at + (64 - value.leading_zeros() as usize).min(63), 1);
    }
}

/// One value of a segment, with its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Who writes it; empty: the program.
    pub worker: String,
    /// Which port it is about; empty: none.
    pub port: String,
    /// The field's name.
    pub name: String,
    /// What it means.
    pub kind: Kind,
    /// Value, or buckets.
    pub values: Vec<u64>,
}

/// A segment that somebody else writes, mapped read-only.
#[derive(Debug)]
pub struct SegmentReader {
    region: Arc<Region>,
    name: String,
    pid: u32,
    created_unix_ns: u64,
    /// Labels, kind, place and words of each field.
    fields: Vec<(Row, usize)>,
}

impl SegmentReader {
    /// Maps a segment from its descriptor.
    ///
    /// # Errors
    /// See [`StatsError`].
    pub fn attach(fd: OwnedFd) -> Result<Self, StatsError> {
        // Looked at before it is mapped, and mapped without being filled: a sparse one may say terabytes.
        if !is_plain_memory(&fd) {
            return Err(StatsError::NotASegment);
        }
        let (bytes, _) = Region::size_of_fd(&fd)?;
        bounded(0, 0, bytes)?;
        let region = Region::from_fd_lazily(fd, false)?;
        let header = read::<Header>(&region, 0, 1).and_then(|h| h.first().copied());
        let header = header.filter(|h| h.magic == MAGIC).ok_or(StatsError::NotASegment)?;
        if header.version != VERSION {
            return Err(StatsError::Version { found: header.version });
        }
        let damaged = |what| StatsError::Damaged { what };
        bounded(header.blocks as usize, header.fields as usize, 0)?;
        let blocks = read::<BlockRecord>(&region, header.blocks_at, header.blocks);
        let blocks = blocks.ok_or_else(|| damaged("block records outside the segment"))?;
        let records = read::<FieldRecord>(&region, header.fields_at, header.fields);
        let records = records.ok_or_else(|| damaged("field records outside the segment"))?;
        // No two blocks share fields or values, so what is kept is bounded by the segment.
        if blocks.iter().map(|b| u64::from(b.fields)).sum::<u64>() > u64::from(header.fields) {
            return Err(damaged("blocks that name more fields than there are"));
        }
        let mut words = region.len() / size_of::<u64>();
        let mut fields = Vec::with_capacity(header.fields as usize);
        for block in blocks {
            let first = block.first_field as usize;
            let of_block = first
                .checked_add(block.fields as usize)
                .and_then(|end| records.get(first..end))
                .ok_or_else(|| damaged("a block names fields that do not exist"))?;
            let mut at = usize::try_from(block.values_at).map_err(|_| damaged("a block's place"))?;
            for field in of_block {
                let kind = match field.kind {
                    0 => Kind::Counter,
                    1 => Kind::Gauge,
                    2 => Kind::Log2Histogram,
                    _ => return Err(damaged("a field of unknown kind")),
                };
                let of_field = field.words as usize;
                if region.slice::<u64>(at, of_field).is_none() {
                    return Err(damaged("values outside the segment"));
                }
                words = words
                    .checked_sub(of_field)
                    .ok_or_else(|| damaged("more values than the segment has room for"))?;
                let row = Row {
                    worker: text(&block.worker),
                    port: text(&block.port),
                    name: text(&field.name),
                    kind,
                    values: vec![0; of_field],
                };
                fields.push((row, at));
                at += of_field * size_of::<u64>();
            }
        }
        Ok(Self {
            name: text(&header.name),
            pid: header.pid,
            created_unix_ns: header.created_unix_ns,
            region,
            fields,
        })
    }

    /// The dataplane's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The program that made it.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// When it was made, in nanoseconds since 1970.
    #[must_use]
    pub const fn created_unix_ns(&self) -> u64 {
        self.created_unix_ns
    }

    /// All values as they are now.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let now = |(row, at): &(Row, usize)| {
            let values = (0..row.values.len())
                .map(|i| word(&self.region, at + i * 8).map_or(0, |w| w.load(Ordering::Acquire)))
                .collect();
            Row { values, ..row.clone() }
        };
        self.fields.iter().map(now).collect()
    }

    /// The sum of all counters or gauges with this name; wraps, as counters do.
    #[must_use]
    pub fn total(&self, name: &str) -> u64 {
        let rows = self.rows();
        let values = rows.iter().filter(|r| r.name == name).flat_map(|r| &r.values);
        values.fold(0, |sum, value| sum.wrapping_add(*value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (Segment, BlockId, BlockId) {
        let mut builder = SegmentBuilder::default();
        let port = builder.block("w0", "eth0", &[Field::counter("rx_frames"), Field::histogram("wait_ns")]);
        let worker = builder.block("w0", "", &[Field::gauge("state")]);
        (builder.build("unit-test").unwrap(), port, worker)
    }

    #[test]
    fn another_mapping_reads_what_the_writer_wrote() {
        let (segment, port, worker) = sample();
        let block = segment.block(port).unwrap();
        block.add(0, 40);
        block.add(0, 2);
        block.record(1, 0);
        block.record(1, 1000);
        block.record(1, u64::MAX);
        segment.block(worker).unwrap().set(0, 3);
        block.add(9999, 1); // past the end: nothing happens
        let reader = segment.reader().unwrap();
        let rows = reader.rows();
        assert_eq!(reader.name(), "unit-test");
        assert_eq!(
            (rows[0].worker.as_str(), rows[0].port.as_str(), rows[0].name.as_str()),
            ("w0", "eth0", "rx_frames")
        );
        assert_eq!(rows[0].values, [42]);
        assert_eq!((rows[1].values[0], rows[1].values[10], rows[1].values[63]), (1, 1, 1));
        assert_eq!((rows[2].kind, rows[2].values[0]), (Kind::Gauge, 3));
        assert_eq!(reader.total("rx_frames"), 42);
    }

    #[test]
    fn found_by_name_among_the_processes() {
        let (_segment, ..) = sample();
        let found = find(Some("unit-test")).unwrap();
        assert!(found.iter().any(|f| f.pid == std::process::id()));
        assert!(find(Some("no-such-dataplane")).unwrap().is_empty());
    }

    #[test]
    fn a_damaged_segment_is_refused_not_followed() {
        // Every 8-byte word of header and directory, replaced by nasty values.
        for at in (0..512).step_by(8) {
            for value in [0, 1, u64::MAX, 1 << 31, 1 << 63] {
                let (segment, ..) = sample();
                word(segment.region(), at).unwrap().store(value, Ordering::Release);
                if let Ok(reader) = segment.reader() {
                    let _ = reader.rows();
                }
            }
        }
        let plain = Region::create(&RegionConfig::new("plain", 4096)).unwrap();
        let fd = plain.as_fd().try_clone_to_owned().unwrap();
        assert!(matches!(SegmentReader::attach(fd), Err(StatsError::NotASegment)));
    }

    #[test]
    fn labels_have_bounds() {
        let mut builder = SegmentBuilder::default();
        builder.block(&"x".repeat(33), "", &[]);
        assert!(matches!(builder.build("name"), Err(StatsError::Label { .. })));
    }
}
