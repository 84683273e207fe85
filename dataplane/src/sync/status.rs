//! What has been done, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How a [`Sync`](super::Sync) is doing; counters are since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SyncStatus {
    /// Prefixes in our tables, neighbours and own addresses included.
    pub prefixes: u64,
    /// Neighbours, gateways included.
    pub neighbours: u64,
    /// Next-hop objects.
    pub objects: u64,
    /// Interfaces.
    pub interfaces: u64,
    /// Prefixes that are in our tables as they were, or not at all, for want of room.
    pub unplaced: u64,
    /// Events that were taken in, those of dumps not counted.
    pub events: u64,
    /// Times that everything was read from the kernel, the first one included.
    pub resyncs: u64,
    /// Dumps that the kernel said were torn by a change, and that were made again.
    pub torn: u64,
    /// Times that the kernel has thrown events away because they were not read fast enough.
    pub overruns: u64,
    /// Times that something had no room in our tables.
    pub full: u64,
    /// Requests of workers that were taken up.
    pub requests: u64,
    /// Requests that made no sense, or none any more.
    pub requests_refused: u64,
    /// Requests that were not taken up because too many neighbours are unresolved.
    pub requests_limited: u64,
    /// Questions to the kernel for a neighbour.
    pub asked: u64,
    /// Questions that the kernel did not take, such as when its own table of neighbours is full.
    pub ask_failures: u64,
    /// Times that an AF_XDP port's steering followed the router's own addresses.
    pub steered: u64,
    /// Times that it could not.
    pub steering_failures: u64,
    /// Own prefixes that have no room among the steering rules: their packets come to a worker.
    pub unsteered: u64,
    /// Errors of the kernel that made a resync fail; it is tried again.
    pub errors: u64,
    /// Since when there has been something to read, without a break: how far we may be behind.
    pub lag: Duration,
    /// The longest that ever was.
    pub worst_lag: Duration,
}

macro_rules! counters {
    ($($name:ident),* $(,)?) => {
        /// The same, being counted.
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($name: AtomicU64,)*
            prefixes: AtomicU64,
            neighbours: AtomicU64,
            objects: AtomicU64,
            interfaces: AtomicU64,
            unplaced: AtomicU64,
            unsteered: AtomicU64,
            lag: AtomicU64,
            worst_lag: AtomicU64,
        }

        impl Counters {
            $(pub(super) fn $name(&self) {
                self.$name.fetch_add(1, Ordering::Relaxed);
            })*

            pub(super) fn status(&self) -> SyncStatus {
                let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
                SyncStatus {
                    $($name: get(&self.$name),)*
                    prefixes: get(&self.prefixes),
                    neighbours: get(&self.neighbours),
                    objects: get(&self.objects),
                    interfaces: get(&self.interfaces),
                    unplaced: get(&self.unplaced),
                    unsteered: get(&self.unsteered),
                    lag: Duration::from_micros(get(&self.lag)),
                    worst_lag: Duration::from_micros(get(&self.worst_lag)),
                }
            }
        }
    };
}

counters!(
    events,
    resyncs,
    torn,
    overruns,
    full,
    requests,
    requests_refused,
    requests_limited,
    asked,
    ask_failures,
    errors,
    steered,
    steering_failures,
);

impl Counters {
    pub(super) fn tables(
        &self,
        prefixes: usize,
        neighbours: usize,
        objects: usize,
        interfaces: usize,
        unplaced: usize,
    ) {
        for (to, value) in [
            (&self.prefixes, prefixes),
            (&self.neighbours, neighbours),
            (&self.objects, objects),
            (&self.interfaces, interfaces),
            (&self.unplaced, unplaced),
        ] {
            to.store(value as u64, Ordering::Relaxed);
        }
    }

    pub(super) fn unsteered(&self, prefixes: usize) {
        self.unsteered.store(prefixes as u64, Ordering::Relaxed);
    }

    pub(super) fn lag(&self, behind: Duration) {
        let behind = u64::try_from(behind.as_micros()).unwrap_or(u64::MAX);
        self.lag.store(behind, Ordering::Relaxed);
        self.worst_lag.fetch_max(behind, Ordering::Relaxed);
    }
}
