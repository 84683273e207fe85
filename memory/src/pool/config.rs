//! What a pool is asked for, and why it may be refused.

use super::MAX_OWNERS;
use crate::region::{HugePages, Lock, RegionError};

/// How to make a [`Pool`](super::Pool).
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Name of the region behind it.
    pub name: String,
    /// Number of chunks.
    pub chunks: u32,
    /// Size of a chunk: 2048, 4096, ... 65536 bytes. AF_XDP takes 2048 or 4096.
    pub chunk_bytes: u32,
    /// Bytes kept free before a packet that *we* make, beyond [`META_BYTES`](super::META_BYTES).
    pub headroom: u32,
    /// Longest frame that must fit behind headroom and colour, in bytes.
    pub max_frame: u32,
    /// Page size.
    pub huge_pages: HugePages,
    /// Locking.
    pub lock: Lock,
    /// NUMA node.
    pub numa_node: Option<u32>,
}

impl PoolConfig {
    /// `chunks` chunks of 2048 bytes for Ethernet frames of up to 1522 bytes (1500, header, one VLAN tag).
    #[must_use]
    pub fn new(name: &str, chunks: u32) -> Self {
        Self {
            name: name.to_owned(),
            chunks,
            chunk_bytes: 2048,
            headroom: 64,
            max_frame: 1522,
            huge_pages: HugePages::Prefer2M,
            lock: Lock::Prefer,
            numa_node: None,
        }
    }
}

/// Why a pool could not be made, found or shared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The chunk size is not one we can cut.
    #[error("pool {name:?}: chunks of {bytes} bytes; take a power of two from 2048 to 65536")]
    ChunkSize {
        /// The pool's name.
        name: String,
        /// What was asked for.
        bytes: u32,
    },
    /// No chunks, or more than the handle can count.
    #[error("pool {name:?}: {chunks} chunks; take 1 to 16777216")]
    Chunks {
        /// The pool's name.
        name: String,
        /// What was asked for.
        chunks: u32,
    },
    /// The longest frame does not fit a chunk.
    #[error(
        "pool {name:?}: a frame of {max_frame} bytes with {headroom} bytes of headroom does not fit a \
         chunk of {chunk_bytes} bytes (64 are ours); take larger chunks"
    )]
    FrameSize {
        /// The pool's name.
        name: String,
        /// Longest frame wanted.
        max_frame: u32,
        /// Headroom wanted.
        headroom: u32,
        /// Size of a chunk.
        chunk_bytes: u32,
    },
    /// More frames wanted than the pool has left.
    #[error("pool {name:?}: {wanted} frames wanted for {who}, {left} of {total} left; make the pool larger")]
    Exhausted {
        /// The pool's name.
        name: String,
        /// For whom.
        who: String,
        /// Frames wanted.
        wanted: u32,
        /// Frames nobody owns yet.
        left: u32,
        /// Frames in all.
        total: u32,
    },
    /// All owner ids are given out.
    #[error("pool {name:?}: more than {MAX_OWNERS} workers and queue directions; use several pools")]
    Owners {
        /// The pool's name.
        name: String,
    },
    /// The process has made or attached more pools than the frame handle can tell apart.
    #[error("pool {name:?}: this process has already opened 65534 pools; keep pools open and share them")]
    TooMany {
        /// The pool's name.
        name: String,
    },
    /// The descriptor holds no pool of this version.
    #[error("the region holds no isoplane pool (or one of another version)")]
    NotAPool,
    /// The region could not be made or mapped.
    #[error(transparent)]
    Region(#[from] RegionError),
}
