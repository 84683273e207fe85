//! What can go wrong when packets are read from a file, or a port is opened on one.
//!
//! Contract: an error names the file, the place in it, the reason, and what to do.

use isoplane_memory::{ClockError, RegionError};
use std::path::PathBuf;

/// Why bytes are no recording.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordingError {
    /// Neither format's magic number is at the start.
    #[error("it is neither a pcap nor a pcapng file (it begins with {start:02x?})")]
    Magic {
        /// The first bytes, at most four.
        start: Vec<u8>,
    },
    /// It ends in the middle of something.
    #[error("it ends in the middle of {what} at byte {at}; it was cut off")]
    Truncated {
        /// What is not whole.
        what: &'static str,
        /// Where that begins, in bytes from the start.
        at: usize,
    },
    /// Something in it makes no sense.
    #[error("at byte {at}: {what}")]
    Malformed {
        /// What is wrong.
        what: String,
        /// Where, in bytes from the start.
        at: usize,
    },
    /// The packets are not Ethernet frames.
    #[error("its packets are of link type {link_type}, not Ethernet (1)")]
    LinkType {
        /// As <https://www.tcpdump.org/linktypes.html> numbers them.
        link_type: u32,
    },
    /// Only the first bytes of a packet were recorded.
    #[error(
        "packet {number} was recorded only in part, {recorded} of {len} bytes; record whole packets (`tcpdump -s 0`), or \
         allow it with `partial`"
    )]
    Partial {
        /// The packet, counted from 1.
        number: usize,
        /// Bytes in the file.
        recorded: u32,
        /// Bytes that it had.
        len: u32,
    },
}

/// Why a [`PcapPort`](super::PcapPort) could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PcapError {
    /// Neither a file to play nor one to write.
    #[error("a pcap port needs a file to play or one to write: pcap:IN,OUT, either of which may be empty")]
    NoFile,
    /// It has one queue.
    #[error("pcap port {name:?}: {queues} queues; it has one, since a file has one order")]
    Queues {
        /// The port's name.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// Both names are those of one file.
    #[error("{}: a file cannot be played and written at once", path.display())]
    SameFile {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be opened, read or written.
    #[error("{}: {what}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The file is larger than the port may hold.
    #[error(
        "{}: {bytes} bytes are more than the {most} that are held in memory; play a part of it (`editcap -c`), or \
         raise `max_bytes`",
        path.display()
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// The file holds no recording.
    #[error("{}: {source}", path.display())]
    Recording {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: RecordingError,
    },
    /// There is nothing in it to play.
    #[error("{}: it holds no packet", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A packet does not fit the frames that it may have.
    #[error(
        "{}: packet {number} has {len} bytes, and it may take {frames} frame(s) of {room}; take larger chunks, or switch \
         multi-buffer on",
        path.display()
    )]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The packet, counted from 1.
        number: usize,
        /// Its length.
        len: usize,
        /// Frames that a packet may have.
        frames: usize,
        /// Bytes that a frame holds.
        room: u32,
    },
    /// The original times cannot be kept.
    #[error("original times need a clock: {0}")]
    Clock(#[from] ClockError),
    /// The ring of packets that wait to be written could not be made.
    #[error(transparent)]
    Capture(#[from] crate::capture::CaptureError),
    /// The shared memory could not be made.
    #[error(transparent)]
    Region(#[from] RegionError),
}

impl PcapError {
    /// What the kernel said, for `map_err`.
    pub(super) fn file(path: &std::path::Path, what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::File { path: path.to_owned(), what, source }
    }
}
