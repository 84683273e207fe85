//! Log lines of an isolated worker: the ordinary `tracing` macros, without a system call.
//!
//! ```text
//! worker                                   program (housekeeping)
//! tracing macro -> Recorder -> ring   ->   Drainer -> the program's own subscriber
//! ```
//!
//! | part | what it is |
//! |---|---|
//! | [`channel`] | makes both halves, before the fork |
//! | [`Recorder`] | the worker's half: installed on its thread, it writes each event as a binary record |
//! | [`Source`], [`Drainer`] | the program's half: turns records into ordinary events again |
//! | [`ThroughSlowPath`] | the other route: the program's subscriber is called in a visit to the kernel |
//!
//! Contract of the record path: no system call, no allocation, no lock, no panic, bounded work. It writes
//! one fixed-size slot, of which only the used part is touched. Integers, floats and booleans are stored
//! raw; strings, messages and `?`/`%` fields are formatted straight into the slot and cut at its end, on a
//! character boundary; an event that was cut says so (`truncated`). A full ring drops the newest event and
//! counts it. The first event of a callsite also announces the callsite in the ring, with everything that
//! the drainer must know about it, so the drainer never follows an address that a worker wrote.
//!
//! Spans are not recorded: a worker's span is disabled, its events are the roots of their own.
//!
//! What is *not* recorded, and why:
//! - An event within the formatting of another one (a `Debug` that logs), and one of a signal handler that
//!   interrupted an event: `tracing` itself withholds it before any subscriber sees it. What still arrives
//!   here, by a subscriber that was cloned, is dropped and counted as [`Lost::nested`].
//! - Events of the [`CALLSITES`]`+1`th callsite on, counted as [`Lost::callsites`].
//!
//! At the first event of each callsite `tracing` asks every subscriber that the process has for its
//! interest, and so asks the program's in a worker too; what that one never wants is not recorded. The
//! subscribers of `tracing-subscriber` answer without a system call; one of the program's own must do so too.

mod callsites;
mod decode;
mod drainer;
#[cfg(test)]
mod hostile;
mod layout;
mod recorder;
mod room;
mod sites;
mod through;

pub use drainer::{DrainReport, Drainer, Source};
pub use layout::{CALLSITES, MIN_CAPACITY, SLOT_BYTES};
pub use recorder::{InstallError, Lost, Recorder, Recording};
pub use through::{Gate, SlowPathRecording, ThroughSlowPath};

use crate::diagnostics::layout::{Head, RING_AT, Slot};
use isoplane_memory::ring::{self, Mapped, RingError};
use isoplane_memory::{Region, RegionConfig, RegionError};

/// Which way a worker's events take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Diagnostics {
    /// Through a ring to a drainer: no system call. The default.
    #[default]
    Ring,
    /// Through the allow-syscalls slow path, straight into the program's subscriber: the worker itself
    /// writes. Always taken for what cannot wait: a breach report, a panic.
    SlowPath,
}

/// Why a channel could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The capacity is unusable.
    #[error("log ring {name:?}: {capacity} records; take a power of two from {MIN_CAPACITY} to {}", 1 << 20)]
    Capacity {
        /// Name of the worker.
        name: String,
        /// What was asked for.
        capacity: u32,
    },
    /// The memory could not be had.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The ring could not be laid out.
    #[error("log ring {name:?}: {source}")]
    Ring {
        /// Name of the worker.
        name: String,
        /// Why.
        source: RingError,
    },
}

/// Makes a ring of `capacity` records of [`SLOT_BYTES`] for the worker `name`, and both its halves. Both
/// survive `fork`: the worker's process installs the first, the program keeps the second.
///
/// # Errors
/// See [`ChannelError`].
pub fn channel(name: &str, capacity: u32) -> Result<(Recorder, Source), ChannelError> {
    if !capacity.is_power_of_two() || !(MIN_CAPACITY..=1 << 20).contains(&capacity) {
        return Err(ChannelError::Capacity { name: name.to_owned(), capacity });
    }
    let bytes = RING_AT + ring::bytes_for::<Slot>(capacity);
    let region = Region::create(&RegionConfig::new(&format!("isoplane.log.{name}"), bytes))?;
    let failed = |source| ChannelError::Ring { name: name.to_owned(), source };
    let memory = Mapped::create(&region, RING_AT, capacity).map_err(failed)?;
    let other = memory.share();
    let head = Head::of(&region).ok_or_else(|| RegionError::Size { name: name.to_owned(), bytes })?;
    Ok((Recorder::new(memory, head.clone()), Source::new(name, other, head)))
}
