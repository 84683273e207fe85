//! The ground floor of isoplane: everything that lives in memory which several processes, the
//! kernel or a device may see at the same time.
//!
//! | module | what it gives |
//! |---|---|
//! | [`region`] | locked, pre-faulted, shareable memory (memfd or hugetlb) |
//! | [`pool`], [`custody`] | a region cut in equal chunks, and who holds each of them |
//! | [`frame`], [`batch`], [`cache`] | an owned handle to a chunk, sixty-four of them, a worker's free ones |
//! | [`transfer`] | handing frames to somebody else and back, so that a crash at any point loses none |
//! | [`recovery`] | rebuilding a dead worker's free list; proving that every frame is accounted for |
//! | [`ring`] | the one single-producer single-consumer ring: kernel rings, links, messages |
//! | [`stats`] | counters that another process may map read-only |
//! | [`table`] | arrays of words that the program changes in place under a running worker |
//! | [`clock`] | time without the kernel |
//! | [`kernel`] | the token that says "this code may enter the kernel" |
//!
//! Nothing here trusts what it reads from shared memory: indices, lengths and addresses are checked
//! in every build, and a lie costs frames or counts, never memory safety.
#![deny(missing_docs, unsafe_code)]

pub mod batch;
mod bulk;
pub mod cache;
pub mod clock;
pub mod custody;
pub mod frame;
pub mod kernel;
pub mod pool;
pub mod recovery;
pub mod region;
pub mod ring;
mod starts;
pub mod stats;
pub mod table;
pub mod transfer;

pub use batch::{BATCH, Batch};
pub use cache::FrameCache;
pub use clock::{Clock, ClockError};
pub use custody::{Collector, Custody, Lender};
pub use frame::{Frame, FrameFlags, FrameMeta};
pub use kernel::Kernel;
pub use pool::{Pool, PoolConfig, PoolError};
pub use recovery::Survey;
pub use region::{HugePages, Lock, Region, RegionConfig, RegionError};
pub use transfer::{Inbox, Outbox, Taken};

/// Plain old data: any bit pattern is a value and there is no padding, so it may cross a process
/// boundary in shared memory. (Re-exported from `bytemuck`.)
pub use bytemuck::{Pod, Zeroable};
