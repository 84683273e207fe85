//! When what was unlinked from a table may be used again.
//!
//! Contract: a worker holds nothing of a table beyond the turn in which it read it. So whatever was
//! unlinked before [`Epochs::now`] is free once [`Epochs::passed`] says that every worker which was in a
//! turn then has ended it, died or stopped.

use std::collections::VecDeque;

/// A moment; see [`Epochs::now`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Epoch {
    /// For each worker: turns made and how often it was started.
    pub(crate) workers: Vec<(u64, u32)>,
}

impl Epoch {
    /// The moment at which readers have made so many turns each.
    #[must_use]
    pub fn of(turns: impl IntoIterator<Item = u64>) -> Self {
        Self { workers: turns.into_iter().map(|turns| (turns, 0)).collect() }
    }
}

/// Knows how far the readers of a table are.
pub trait Epochs {
    /// This moment.
    fn now(&self) -> Epoch;

    /// Has every reader ended what it was doing at `then`? Never waits.
    fn passed(&self, then: &Epoch) -> bool;
}

/// For tables that nobody reads yet (before the launch, in tests): everything is free at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Immediate;

impl Epochs for Immediate {
    fn now(&self) -> Epoch {
        Epoch::default()
    }

    fn passed(&self, _: &Epoch) -> bool {
        true
    }
}

/// Things that were unlinked, until they are free.
#[derive(Debug)]
pub(crate) struct Limbo<T> {
    fresh: Vec<T>,
    waiting: VecDeque<(Epoch, Vec<T>)>,
}

impl<T> Default for Limbo<T> {
    fn default() -> Self {
        Self { fresh: Vec::new(), waiting: VecDeque::new() }
    }
}

impl<T> Limbo<T> {
    /// Takes something that no reader will find any more.
    pub(crate) fn retire(&mut self, what: T) {
        self.fresh.push(what);
    }

    /// Hands over what no reader holds any more.
    pub(crate) fn collect(&mut self, epochs: &dyn Epochs, mut free: impl FnMut(T)) {
        if !self.fresh.is_empty() {
            self.waiting.push_back((epochs.now(), std::mem::take(&mut self.fresh)));
        }
        while let Some((_, things)) = self.waiting.pop_front_if(|(then, _)| epochs.passed(then)) {
            things.into_iter().for_each(&mut free);
        }
    }
}
