//! Time without the kernel: the time-stamp counter, calibrated once.
//!
//! Contract: [`Clock::tsc`] is refused, with the reason, unless the kernel itself keeps time by the
//! TSC; a missing invariant bit is only a warning, since hypervisors hide it. After that, reading the
//! clock is one instruction and a multiplication, and never a call that might become a system call.
//! Sources: Intel SDM volume 3, 17.17 "Time-Stamp Counter"; Linux
//! Documentation/ABI/testing/sysfs-devices-system-clocksource.
#![allow(unsafe_code, reason = "rdtsc and cpuid")]

use std::time::{Duration, Instant};

const CLOCKSOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Why the time-stamp counter cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClockError {
    /// The kernel does not trust the TSC here.
    #[error(
        "the kernel keeps time by {found:?}, not by \"tsc\", so the TSC cannot be trusted; \
         boot with clocksource=tsc tsc=reliable if the machine's TSC is sound"
    )]
    Clocksource {
        /// The current clocksource.
        found: String,
    },
    /// The clocksource could not be read.
    #[error("cannot read {CLOCKSOURCE}: {0}")]
    Unknown(#[source] std::io::Error),
    /// Not an x86-64 machine.
    #[error("no TSC on this architecture")]
    Architecture,
    /// The counter did not advance while time did.
    #[error("the TSC did not advance in {0:?}")]
    Stuck(Duration),
}

/// A calibrated clock. Copy it freely; it survives fork.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// Ticks when the clock was made: the zero of [`Clock::nanos`].
    origin: u64,
    /// Nanoseconds per tick, as a 32.32 fixed-point number.
    scale: u64,
    hertz: u64,
}

impl Clock {
    /// Calibrates the TSC against the monotonic clock; takes about 20 ms.
    ///
    /// # Errors
    /// See [`ClockError`].
    pub fn tsc() -> Result<Self, ClockError> {
        if !cfg!(target_arch = "x86_64") {
            return Err(ClockError::Architecture);
        }
        let source = std::fs::read_to_string(CLOCKSOURCE).map_err(ClockError::Unknown)?;
        if source.trim() != "tsc" {
            return Err(ClockError::Clocksource { found: source.trim().to_owned() });
        }
        if !invariant() {
            tracing::warn!("the CPU does not announce an invariant TSC; using it because the kernel does");
        }
        let (start_time, start) = sample();
        std::thread::sleep(Duration::from_millis(20));
        let (end_time, end) = sample();
        let elapsed = end_time - start_time;
        let ticks = end.wrapping_sub(start);
        if ticks == 0 || ticks > u64::MAX / 2 {
            return Err(ClockError::Stuck(elapsed));
        }
        let nanos = elapsed.as_nanos();
        let scale = u64::try_from((nanos << 32) / u128::from(ticks)).unwrap_or(u64::MAX);
        let hertz = u64::try_from(u128::from(ticks) * 1_000_000_000 / nanos).unwrap_or(u64::MAX);
        Ok(Self { origin: end, scale: scale.max(1), hertz: hertz.max(1) })
    }

    /// Ticks now; one unserialised `rdtsc`.
    #[inline(always)]
    #[must_use]
    pub fn ticks() -> u64 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 CPU has rdtsc; Linux leaves it enabled for user mode unless the
        // process itself asked otherwise (PR_SET_TSC).
        return unsafe { std::arch::x86_64::_rdtsc() };
        #[cfg(not(target_arch = "x86_64"))]
        0
    }

    /// Nanoseconds since the clock was made.
    #[inline(always)]
    #[must_use]
    pub fn nanos(&self) -> u64 {
        self.to_nanos(Self::ticks().wrapping_sub(self.origin))
    }

    /// A number of ticks in nanoseconds.
    #[inline(always)]
    #[must_use]
    pub fn to_nanos(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }

    /// A duration in ticks.
    #[inline]
    #[must_use]
    pub fn to_ticks(&self, duration: Duration) -> u64 {
        u64::try_from(duration.as_nanos() * u128::from(self.hertz) / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// Ticks per second.
    #[must_use]
    pub const fn hertz(&self) -> u64 {
        self.hertz
    }
}

/// Time and ticks of the same moment: the try with the least time between two reads of the counter.
fn sample() -> (Instant, u64) {
    let mut best = (Instant::now(), Clock::ticks());
    let mut width = u64::MAX;
    for _ in 0..32 {
        let before = Clock::ticks();
        let now = Instant::now();
        let after = Clock::ticks();
        if after.wrapping_sub(before) < width {
            width = after.wrapping_sub(before);
            best = (now, before.wrapping_add(width / 2));
        }
    }
    best
}

#[cfg(target_arch = "x86_64")]
fn invariant() -> bool {
    use std::arch::x86_64::__cpuid;
    // CPUID 0x80000007 EDX bit 8: invariant TSC.
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & (1 << 8) != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn invariant() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_kernel_clock() {
        let clock = match Clock::tsc() {
            Ok(clock) => clock,
            Err(reason) => {
                // The refusal is the other half of the contract; it must say why.
                assert!(!reason.to_string().is_empty());
                return;
            }
        };
        let start = Instant::now();
        let zero = clock.nanos();
        std::thread::sleep(Duration::from_millis(50));
        let ours = clock.nanos() - zero;
        let kernel = start.elapsed().as_nanos() as u64;
        assert!(ours <= kernel && ours >= 49_000_000, "{ours} against {kernel}");
        let ticks = clock.to_ticks(Duration::from_secs(1));
        assert!(clock.to_nanos(ticks).abs_diff(1_000_000_000) < 1000);
    }
}
