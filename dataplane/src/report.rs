//! What is said when a dataplane has stopped.

use crate::control::WorkerState;
use isoplane_memory::recovery::Balance;

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerEnd {
    /// Its name.
    pub name: String,
    /// Its last state: `Stopped` when all went well.
    pub state: WorkerState,
    /// How often it was started again.
    pub restarts: u32,
    /// What the last one that panicked said.
    pub last_words: Option<String>,
}

/// Where a pool's frames were in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolEnd {
    /// Its name.
    pub name: String,
    /// The count when the workers had stopped, before the queues were closed.
    pub balance: Balance,
    /// Frames that nobody owns now; all of them unless the program holds some itself.
    pub in_depot: u32,
}

/// What was found when the dataplane had stopped.
#[derive(Debug, Clone)]
pub struct StopReport {
    /// Each worker.
    pub workers: Vec<WorkerEnd>,
    /// Each pool.
    pub pools: Vec<PoolEnd>,
    /// Some worker did not stop in time and was killed.
    pub forced: bool,
    /// The zygote died before it was asked to.
    pub zygote_died: bool,
}

impl StopReport {
    /// Frames of all pools.
    #[must_use]
    pub fn frames(&self) -> u32 {
        self.pools.iter().map(|pool| pool.balance.total).sum()
    }

    /// Frames of all pools that were where they should be: all of them, unless some leaked.
    #[must_use]
    pub fn accounted(&self) -> u32 {
        let missing: i64 = self.pools.iter().map(|pool| pool.balance.missing.abs()).sum();
        self.frames().saturating_sub(u32::try_from(missing).unwrap_or(u32::MAX))
    }

    /// Every worker stopped by itself and no frame is missing.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        !self.forced
            && !self.zygote_died
            && self.workers.iter().all(|w| w.state == WorkerState::Stopped)
            && self.pools.iter().all(|pool| pool.balance.is_whole())
    }
}
