//! Token buckets: how often something may happen.

use super::config::Limit;

/// A token bucket that counts in nanoseconds: each time costs some of them, time brings them back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    level: u64,
    cap: u64,
    cost: u64,
    last: u64,
}

impl Bucket {
    pub(super) fn new(limit: Limit) -> Self {
        if limit.per_second == 0 {
            return Self { level: 0, cap: 0, cost: 1, last: 0 };
        }
        let cost = 1_000_000_000 / u64::from(limit.per_second.min(1_000_000_000));
        let cap = cost * u64::from(limit.burst);
        Self { level: cap, cap, cost, last: 0 }
    }

    fn fill(&mut self, now: u64) {
        let passed = now.saturating_sub(self.last);
        self.level = self.level.saturating_add(passed).min(self.cap);
        self.last = self.last.max(now);
    }

    /// Once?
    pub(super) fn take(&mut self, now: u64) -> bool {
        self.fill(now);
        let enough = self.cost <= self.level;
        if enough {
            self.level -= self.cost;
        }
        enough
    }
}

/// Buckets for many, who share one with those that have the same hash; and one for all together.
#[derive(Debug)]
pub(super) struct Shared {
    total: Bucket,
    each: Box<[Bucket; Self::EACH]>,
}

impl Shared {
    const EACH: usize = 256;

    pub(super) fn new(total: Limit, each: Limit) -> Self {
        Self { total: Bucket::new(total), each: Box::new([Bucket::new(each); Self::EACH]) }
    }

    /// Other limits from now on, in the same memory.
    pub(super) fn set(&mut self, total: Limit, each: Limit) {
        self.total = Bucket::new(total);
        self.each.fill(Bucket::new(each));
    }

    /// Once for the one with this hash? What one may not have is left to the others.
    pub(super) fn take(&mut self, hash: u32, now: u64) -> bool {
        self.each[hash as usize % Self::EACH].take(now) && self.total.take(now)
    }
}
