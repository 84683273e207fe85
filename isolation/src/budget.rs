//! How often an isolated thread may visit the kernel.
//!
//! Contract: a token bucket by the time-stamp counter; asking costs a few instructions and no call.

use std::time::Duration;

/// At most `visits` in any span of about `per`. The default is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    visits: u32,
    per: Duration,
}

impl Budget {
    /// No limit: visits are counted and timed all the same.
    pub const UNLIMITED: Self = Self { visits: u32::MAX, per: Duration::ZERO };

    /// At most `visits` at once, and as many again for each `per` that passes.
    #[must_use]
    pub const fn new(visits: u32, per: Duration) -> Self {
        Self { visits, per }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::UNLIMITED
    }
}

/// A budget that is being used up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Purse {
    /// Ticks that one visit costs; 0 for no limit.
    cost: u64,
    /// Most ticks that can be saved up.
    most: u64,
    saved: u64,
    last: u64,
}

impl Purse {
    /// `hertz` is that of the time-stamp counter.
    pub(crate) fn new(budget: Budget, hertz: u64, now: u64) -> Self {
        if budget == Budget::UNLIMITED {
            return Self { cost: 0, most: 0, saved: 0, last: now };
        }
        let span = (budget.per.as_nanos() * u128::from(hertz) / 1_000_000_000).max(1);
        let span = u64::try_from(span).unwrap_or(u64::MAX / 2).min(u64::MAX / 2);
        let Some(cost) = span.checked_div(u64::from(budget.visits)) else {
            // No visits at all: a price that nobody can ever pay.
            return Self { cost: u64::MAX, most: 0, saved: 0, last: now };
        };
        let cost = cost.max(1);
        let most = cost.saturating_mul(u64::from(budget.visits));
        Self { cost, most, saved: most, last: now }
    }

    /// Pays for one visit, if there is enough.
    #[inline]
    pub(crate) fn pay(&mut self, now: u64) -> bool {
        if self.cost == 0 {
            return true;
        }
        // A counter of another CPU may be behind, and so is a visit that a signal handler's overtook.
        let passed = now.saturating_sub(self.last);
        self.last = self.last.max(now);
        self.saved = self.saved.saturating_add(passed).min(self.most);
        if self.saved < self.cost {
            return false;
        }
        self.saved -= self.cost;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_for_each_share_of_the_span() {
        let mut purse = Purse::new(Budget::new(4, Duration::from_secs(1)), 1000, 0);
        assert_eq!((0..6).filter(|_| purse.pay(0)).count(), 4);
        assert!(!purse.pay(249));
        assert!(purse.pay(250));
        assert!(!purse.pay(499));
        assert!(purse.pay(500));
        // Long silence saves up no more than one burst.
        assert_eq!((0..6).filter(|_| purse.pay(1_000_000)).count(), 4);
    }

    #[test]
    fn time_that_goes_back_pays_for_nothing() {
        let mut purse = Purse::new(Budget::new(1, Duration::from_secs(1)), 1000, 5000);
        assert!(purse.pay(5000));
        assert!(!purse.pay(4999));
        assert!(!purse.pay(5999));
        assert!(purse.pay(6000));
    }

    #[test]
    fn none_and_any() {
        let mut none = Purse::new(Budget::new(0, Duration::from_secs(1)), 1000, 0);
        assert!(!none.pay(u64::MAX));
        let mut any = Purse::new(Budget::UNLIMITED, 1000, 0);
        assert!((0..1000).all(|_| any.pay(0)));
    }
}
