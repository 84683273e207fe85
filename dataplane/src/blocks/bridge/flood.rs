//! How much flooding a bridge does: copies cost frames and time, and a storm must cost neither the
//! receive side its frames nor known stations their packets.
//!
//! Contract: a packet is flooded to all its ports or to none; each of the limits can refuse it, before
//! anything is copied. The last port gets the packet itself, so a bridge of two ports never copies.

/// Limits of flooding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FloodLimits {
    /// Copied frames a second that the packets arriving on one port may cause, on average; 1 to 10^9.
    pub copies_per_second: u32,
    /// Copied frames that may be caused at once by a port that was quiet.
    pub burst: u32,
    /// Copied frames a turn, from all ports together: bounds the time that a turn takes.
    pub copies_per_turn: u32,
    /// Free frames that are left alone, for receiving.
    pub reserve: u32,
}

impl Default for FloodLimits {
    /// 100 000 copies a second and port, 2048 at once, 512 a turn, 128 free frames left alone.
    fn default() -> Self {
        Self { copies_per_second: 100_000, burst: 2048, copies_per_turn: 512, reserve: 128 }
    }
}

/// A token bucket that counts in nanoseconds: a copy costs `cost` of them, time brings them back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    level: u64,
    cap: u64,
    cost: u64,
    last: u64,
}

impl Budget {
    pub(super) fn new(limits: &FloodLimits) -> Self {
        let cost = 1_000_000_000 / u64::from(limits.copies_per_second.clamp(1, 1_000_000_000));
        let cap = cost * u64::from(limits.burst);
        Self { level: cap, cap, cost, last: 0 }
    }

    /// Takes the tokens for `n` copies, all or none.
    #[inline]
    pub(super) fn take(&mut self, n: u32, now: u64) -> bool {
        let passed = now.saturating_sub(self.last);
        self.level = self.level.saturating_add(passed).min(self.cap);
        self.last = self.last.max(now);
        let price = self.cost * u64::from(n);
        let enough = price <= self.level;
        if enough {
            self.level -= price;
        }
        enough
    }
}
