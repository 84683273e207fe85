//! The control region: what the program, the zygote and the workers tell each other about running.
//!
//! Contract: one slot of atomics per worker, in shared memory that is made before the first fork. The
//! program writes `command`; the worker that lives in the slot writes the rest, and the zygote writes
//! `state` when the worker is dead. A worker reads one line a turn and writes one.
#![allow(unsafe_code, reason = "slots of atomics in a region; see each block")]

use crate::tables::{Epoch, Epochs};
use isoplane_memory::{Region, RegionConfig, RegionError};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum WorkerState {
    /// Forked, building its app.
    Starting = 0,
    /// Making turns.
    Running = 1,
    /// Asked to stop; emptying its rings.
    Draining = 2,
    /// Stopped on request.
    Stopped = 3,
    /// Died; will be started again after a pause.
    Dead = 4,
    /// Died and will not be started again.
    GivenUp = 5,
}

impl WorkerState {
    const fn from_u32(value: u32) -> Self {
        match value {
            0 => Self::Starting,
            1 => Self::Running,
            2 => Self::Draining,
            3 => Self::Stopped,
            4 => Self::Dead,
            _ => Self::GivenUp,
        }
    }

    /// Neither working nor about to.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Stopped | Self::GivenUp)
    }
}

const MESSAGE_BYTES: usize = 1728;

/// One worker's slot. All zero is a valid slot: starting, told to run.
#[repr(C, align(128))]
pub(crate) struct Slot {
    // Read by the worker every turn, written once by the program.
    command: AtomicU32,
    _pad: [u8; 124],
    // Written by the worker every turn.
    turns: AtomicU64,
    _pad2: [u8; 120],
    // Written now and then.
    state: AtomicU32,
    pid: AtomicU32,
    starts: AtomicU32,
    in_hand: AtomicU32,
    message_len: AtomicU32,
    _pad3: [u8; 44],
    message: [AtomicU8; MESSAGE_BYTES],
}

const _: () = assert!(size_of::<Slot>() == 2048);

impl Slot {
    #[inline(always)]
    pub(crate) fn must_stop(&self) -> bool {
        self.command.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn ask_to_stop(&self) {
        self.command.store(1, Ordering::Release);
    }

    /// Publishes that a turn has ended: everything it read from tables is let go of.
    #[inline(always)]
    pub(crate) fn turn_ended(&self, turns: u64) {
        self.turns.store(turns, Ordering::Release);
    }

    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Acquire)
    }

    pub(crate) fn state(&self) -> WorkerState {
        WorkerState::from_u32(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn set_state(&self, state: WorkerState) {
        self.state.store(state as u32, Ordering::Release);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Acquire)
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Release);
    }

    /// How often a worker was started in this slot.
    pub(crate) fn starts(&self) -> u32 {
        self.starts.load(Ordering::Acquire)
    }

    pub(crate) fn count_start(&self) -> u32 {
        self.starts.fetch_add(1, Ordering::AcqRel)
    }

    /// Frames that the worker had in its hands when it stopped.
    pub(crate) fn in_hand(&self) -> u32 {
        self.in_hand.load(Ordering::Acquire)
    }

    pub(crate) fn set_in_hand(&self, frames: u32) {
        self.in_hand.store(frames, Ordering::Release);
    }

    /// The worker's last words (a panic's message and place), cut to what fits.
    pub(crate) fn say(&self, text: &str) {
        let bytes = text.as_bytes();
        let len = bytes.len().min(MESSAGE_BYTES);
        for (slot, byte) in self.message.iter().zip(bytes) {
            slot.store(*byte, Ordering::Relaxed);
        }
        self.message_len.store(len as u32, Ordering::Release);
    }

    /// As [`Slot::say`], unless something has been said already: a panic hook knows the place too.
    pub(crate) fn say_if_silent(&self, text: &str) {
        if self.message_len.load(Ordering::Acquire) == 0 {
            self.say(text);
        }
    }

    /// Takes the last words.
    pub(crate) fn hear(&self) -> Option<String> {
        let len = self.message_len.swap(0, Ordering::AcqRel) as usize;
        let bytes: Vec<u8> = self.message.iter().take(len).map(|b| b.load(Ordering::Relaxed)).collect();
        (!bytes.is_empty()).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The slots of all workers.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    slots: NonNull<Slot>,
    count: usize,
    _region: Arc<Region>,
}

// SAFETY: slots consist of atomics only, in a region that the value keeps mapped.
unsafe impl Send for Control {}
// SAFETY: as above.
unsafe impl Sync for Control {}

impl Control {
    pub(crate) fn create(name: &str, workers: usize) -> Result<Self, RegionError> {
        let bytes = workers.max(1) * size_of::<Slot>();
        let region = Region::create(&RegionConfig::new(&format!("isoplane.control.{name}"), bytes))?;
        // A region starts on a page and is filled with zeroes, which is a valid slot.
        Ok(Self { slots: region.base().cast(), count: workers, _region: region })
    }

    /// The slot of a worker that exists.
    #[inline(always)]
    pub(crate) fn slot(&self, worker: usize) -> &Slot {
        assert!(worker < self.count, "workers are numbered when slots are made");
        // SAFETY: the region holds `count` slots, aligned to a page and zeroed; only shared
        // references to atomics are ever made.
        unsafe { self.slots.add(worker).as_ref() }
    }

    pub(crate) fn epochs(&self) -> WorkerEpochs {
        WorkerEpochs { control: self.clone() }
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = &Slot> {
        (0..self.count).map(|worker| self.slot(worker))
    }
}

/// How far a dataplane's workers are; see [`Running::epochs`](crate::Running::epochs).
#[derive(Debug, Clone)]
pub struct WorkerEpochs {
    control: Control,
}

impl Epochs for WorkerEpochs {
    fn now(&self) -> Epoch {
        Epoch { workers: self.control.slots().map(|slot| (slot.turns(), slot.starts())).collect() }
    }

    fn passed(&self, then: &Epoch) -> bool {
        self.control.slots().zip(&then.workers).all(|(slot, (turns, starts))| {
            slot.turns() != *turns
                || slot.starts() != *starts
                || !matches!(slot.state(), WorkerState::Running | WorkerState::Draining)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_words_are_cut_and_taken_once() {
        let control = Control::create("test", 2).unwrap();
        let slot = control.slot(1);
        assert_eq!(slot.hear(), None);
        slot.say(&"x".repeat(5000));
        assert_eq!(slot.hear().map(|m| m.len()), Some(MESSAGE_BYTES));
        assert_eq!(slot.hear(), None);
        assert_eq!(control.slot(0).state(), WorkerState::Starting);
    }
}
