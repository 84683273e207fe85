//! Gaps: time that a spinning thread lost without seeing why.
//!
//! Contract: the loop reads a clock as fast as it can; a step that takes longer than a threshold is a
//! gap. It allocates nothing, makes no system call, takes no lock, cannot panic, and touches only memory
//! of its own and one shared block that was filled with pages when it was made, so what it finds is what
//! was done to it. It runs in slices, between which the caller may do a bounded something (see whether
//! isolation still holds, look at a flag); that time is watched too. Writing a gap down is the only thing that is
//! not: it is timed on its own.
//!
//! Anybody who maps the block may read it while the loop runs. The loop does not know causes: an
//! interruption that an observer counts shows up here as a gap, and so does what nothing in the kernel
//! accounts for (a system-management interrupt, a hypervisor that runs somebody else). See `oslat` and
//! the kernel's `osnoise` tracer for the same idea.
//!
//! ```
//! use isoplane_isolation::gaps::{self, Gaps};
//! use isoplane_memory::Clock;
//! use std::ops::ControlFlow;
//!
//! let gaps = Gaps::create("example")?;
//! let median = gaps::calibrate(Clock::ticks);
//! let mut spinner = gaps.spinner(Clock::ticks, 10 * median);
//! let _ = spinner.run(10_000_000, || ControlFlow::<()>::Continue(()));
//! let found = gaps.report();
//! println!("{} gaps, the longest of {} ticks", found.count, found.longest);
//! # assert!(found.watched >= 10_000_000 && found.steps > 0);
//! # Ok::<(), isoplane_memory::RegionError>(())
//! ```
#![allow(unsafe_code, reason = "atomics in shared memory; see each block")]

use isoplane_memory::{Clock, Region, RegionConfig, RegionError};
use std::ops::ControlFlow;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Gaps that are kept with their time: the longest.
pub const LONGEST: usize = 32;

/// Steps of a slice of [`Spinner::run`].
pub const SLICE: u32 = 1000;

/// Each power of two of ticks has 2^5 buckets, so a length is known to about 3 %.
const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;
/// Lengths below 2^5 ticks have a bucket each, and so has each thirty-second of the 59 powers above.
const BUCKETS: usize = SUB * (u64::BITS - SUB_BITS + 1) as usize;

/// The bucket of a length. Less than [`BUCKETS`] for every length.
#[inline]
const fn bucket(ticks: u64) -> usize {
    if ticks < SUB as u64 {
        return ticks as usize;
    }
    let power = ticks.ilog2() - SUB_BITS;
    let within = (ticks >> power) as usize & (SUB - 1);
    ((power as usize + 1) << SUB_BITS) | within
}

/// Shortest and longest length of a bucket, in ticks.
const fn bounds(bucket: usize) -> (u64, u64) {
    if bucket < SUB {
        return (bucket as u64, bucket as u64);
    }
    let power = (bucket >> SUB_BITS) as u32 - 1;
    let least = ((SUB | (bucket & (SUB - 1))) as u64) << power;
    (least, least + ((1 << power) - 1))
}

/// One of the longest gaps.
#[repr(C)]
struct Entry {
    at: AtomicU64,
    ticks: AtomicU64,
}

/// The words of a block; all zero: nothing was measured. One thread writes them.
#[repr(C, align(128))]
struct Words {
    /// Not 0: whoever watches wants the loop to end. The one word that others write.
    stop: AtomicU64,
    _apart: [u64; 15],
    threshold: AtomicU64,
    from: AtomicU64,
    until: AtomicU64,
    steps: AtomicU64,
    count: AtomicU64,
    lost: AtomicU64,
    longest: AtomicU64,
    unwatched: AtomicU64,
    backwards: AtomicU64,
    kept: [Entry; LONGEST],
    buckets: [AtomicU64; BUCKETS],
}

#[inline(always)]
fn get(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

/// One writer, so no locked instruction is needed.
#[inline(always)]
fn bump(word: &AtomicU64, n: u64) {
    word.store(get(word).wrapping_add(n), Ordering::Relaxed);
}

/// A block in shared memory that one [`Spinner`] at a time writes its gaps into. Clone it into whoever
/// wants to look.
#[derive(Debug, Clone)]
pub struct Gaps {
    words: NonNull<Words>,
    _region: Arc<Region>,
}

// SAFETY: only atomics are reached, in a region that the value keeps mapped.
unsafe impl Send for Gaps {}
// SAFETY: as above.
unsafe impl Sync for Gaps {}

/// A gap that was kept with its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// When it ended, in ticks of the loop's clock.
    pub at: u64,
    /// How long it was, in ticks.
    pub ticks: u64,
}

/// Gaps of about the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// The shortest that counts here, in ticks.
    pub least: u64,
    /// The longest that counts here, in ticks.
    pub most: u64,
    /// How many.
    pub count: u64,
}

/// How far a loop is. Times are in ticks of its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SoFar {
    /// A loop has started.
    pub started: bool,
    /// Time that it watched.
    pub watched: u64,
    /// Gaps that it found.
    pub count: u64,
    /// The longest of them; 0 when there is none.
    pub longest: u64,
}

/// What was measured. Times are in ticks of the loop's clock.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Report {
    /// A step that took longer than this is a gap.
    pub threshold: u64,
    /// From the first reading of the clock to the last one.
    pub watched: u64,
    /// Part of that in which gaps were written down and nothing could be seen.
    pub unwatched: u64,
    /// Steps of the loop.
    pub steps: u64,
    /// Gaps.
    pub count: u64,
    /// Sum of their lengths.
    pub lost: u64,
    /// The longest one; 0 when there was none.
    pub longest: u64,
    /// Steps in which the clock went backwards: the thread moved between CPUs whose counters differ.
    pub backwards: u64,
    /// When the measurement began, in ticks.
    pub from: u64,
    /// The longest gaps, in the order in which they happened.
    pub kept: Vec<Gap>,
    /// Gaps by length, shortest first, without the lengths that none had.
    pub histogram: Vec<Bucket>,
}

impl Report {
    /// The length that this share of the gaps (0 to 1) does not exceed, in ticks, to about 3 %; `None`
    /// without gaps.
    #[must_use]
    pub fn percentile(&self, share: f64) -> Option<u64> {
        let total: u64 = self.histogram.iter().map(|bucket| bucket.count).sum();
        // A share that is no number asks for the shortest.
        let rank = ((share.clamp(0.0, 1.0) * total as f64).ceil() as u64).max(1);
        let mut below = 0;
        for bucket in &self.histogram {
            below += bucket.count;
            if below >= rank {
                return Some(bucket.most.min(self.longest));
            }
        }
        // Read while a gap was being written: the one that is missing is as good as the longest.
        (total > 0).then_some(self.longest)
    }

    /// Lost time as a share of the time that was watched: 0 when nothing was lost.
    #[must_use]
    pub fn lost_share(&self) -> f64 {
        let watched = self.watched.saturating_sub(self.unwatched);
        if watched == 0 { 0.0 } else { self.lost as f64 / watched as f64 }
    }
}

impl Gaps {
    /// A block in a region of its own.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str) -> Result<Self, RegionError> {
        const BYTES: usize = size_of::<Words>();
        let region = Region::create(&RegionConfig::new(&format!("isoplane.gaps.{name}"), BYTES))?;
        let words = region
            .slice::<[u64; BYTES / 8]>(0, 1)
            .ok_or_else(|| RegionError::Size { name: name.to_owned(), bytes: BYTES })?
            .cast();
        Ok(Self { words, _region: region })
    }

    fn words(&self) -> &Words {
        // SAFETY: the region holds one block at its start, page-aligned and zeroed, and is mapped while
        // this value lives; only shared references to atomics are ever made.
        unsafe { self.words.as_ref() }
    }

    /// What there is so far; cheaper than a whole report. All is 0 until a loop starts.
    #[must_use]
    pub fn so_far(&self) -> SoFar {
        let w = self.words();
        let from = get(&w.from);
        SoFar {
            started: from != 0,
            watched: get(&w.until).wrapping_sub(from),
            count: get(&w.count),
            longest: get(&w.longest),
        }
    }

    /// Asks the loop to end: [`Spinner::run`] returns after the slice that it is in, and a loop that
    /// starts later ends after its first one.
    pub fn ask_to_stop(&self) {
        self.words().stop.store(1, Ordering::Relaxed);
    }

    /// Reads the block. Numbers of a loop that still runs may be from slightly different moments.
    #[must_use]
    pub fn report(&self) -> Report {
        let w = self.words();
        let mut kept: Vec<Gap> = w
            .kept
            .iter()
            .map(|entry| Gap { at: get(&entry.at), ticks: get(&entry.ticks) })
            .filter(|gap| gap.ticks != 0)
            .collect();
        let from = get(&w.from);
        kept.sort_by_key(|gap| gap.at.wrapping_sub(from));
        let histogram = w.buckets.iter().enumerate().filter_map(|(at, word)| {
            let (least, most) = bounds(at);
            let count = get(word);
            (count != 0).then_some(Bucket { least, most, count })
        });
        Report {
            threshold: get(&w.threshold),
            watched: get(&w.until).wrapping_sub(from),
            unwatched: get(&w.unwatched),
            steps: get(&w.steps),
            count: get(&w.count),
            lost: get(&w.lost),
            longest: get(&w.longest),
            backwards: get(&w.backwards),
            from,
            kept,
            histogram: histogram.collect(),
        }
    }

    /// A loop over a clock, which takes a step longer than `threshold` ticks for a gap. What the block
    /// held before is gone. Call it on the thread that will run the loop: it also touches the block, so
    /// that no first touch is left.
    pub fn spinner<C: FnMut() -> u64>(&self, mut clock: C, threshold: u64) -> Spinner<'_, C> {
        let words = self.words();
        for word in &words.buckets {
            word.store(0, Ordering::Relaxed);
        }
        for entry in &words.kept {
            entry.at.store(0, Ordering::Relaxed);
            entry.ticks.store(0, Ordering::Relaxed);
        }
        for word in
            [&words.steps, &words.count, &words.lost, &words.longest, &words.unwatched, &words.backwards]
        {
            word.store(0, Ordering::Relaxed);
        }
        words.threshold.store(threshold, Ordering::Relaxed);
        // A start at 0 would look like none.
        let last = clock().max(1);
        words.from.store(last, Ordering::Relaxed);
        words.until.store(last, Ordering::Relaxed);
        Spinner { words, clock, threshold, last, least_kept: 0 }
    }
}

/// The loop. See [`Gaps::spinner`].
#[derive(Debug)]
pub struct Spinner<'a, C> {
    words: &'a Words,
    clock: C,
    threshold: u64,
    last: u64,
    /// A gap no longer than this need not be kept.
    least_kept: u64,
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Words").field("count", &self.count).finish_non_exhaustive()
    }
}

impl<C: FnMut() -> u64> Spinner<'_, C> {
    /// Runs slices until this many ticks were watched, [`Gaps::ask_to_stop`] was called, or `between`
    /// breaks; it is called after each slice, about every twenty microseconds, and what it does is
    /// watched like everything else.
    pub fn run<B>(&mut self, ticks: u64, mut between: impl FnMut() -> ControlFlow<B>) -> ControlFlow<B> {
        let from = get(&self.words.from);
        loop {
            self.slice(SLICE);
            if let ControlFlow::Break(value) = between() {
                return ControlFlow::Break(value);
            }
            let watched = self.last.wrapping_sub(from);
            if get(&self.words.stop) != 0 || watched >= ticks {
                return ControlFlow::Continue(());
            }
        }
    }

    /// Runs this many steps.
    #[inline]
    pub fn slice(&mut self, steps: u32) {
        let (threshold, mut last) = (self.threshold, self.last);
        for _ in 0..steps {
            let now = (self.clock)();
            let step = now.wrapping_sub(last);
            last = now;
            if step > threshold {
                last = self.write_down(now, step);
            }
        }
        self.last = last;
        bump(&self.words.steps, u64::from(steps));
        self.words.until.store(last, Ordering::Relaxed);
    }

    /// The last reading of the clock.
    #[inline]
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// Writes a gap down and returns the time after that, from which the loop watches again.
    #[cold]
    #[inline(never)]
    fn write_down(&mut self, now: u64, step: u64) -> u64 {
        let words = self.words;
        // No measurement lasts half of what the counter can count.
        if step > u64::MAX / 2 {
            bump(&words.backwards, 1);
            return now;
        }
        bump(&words.count, 1);
        bump(&words.lost, step);
        if step > get(&words.longest) {
            words.longest.store(step, Ordering::Relaxed);
        }
        if let Some(word) = words.buckets.get(bucket(step)) {
            bump(word, 1);
        }
        if step > self.least_kept {
            self.keep(now, step);
        }
        let after = (self.clock)();
        bump(&words.unwatched, after.wrapping_sub(now).min(u64::MAX / 2));
        after
    }

    /// Puts a gap in the place of the shortest that is kept.
    fn keep(&mut self, at: u64, ticks: u64) {
        let Some(shortest) = self.words.kept.iter().min_by_key(|entry| get(&entry.ticks)) else { return };
        shortest.at.store(at, Ordering::Relaxed);
        shortest.ticks.store(ticks, Ordering::Relaxed);
        self.least_kept = self.words.kept.iter().map(|entry| get(&entry.ticks)).min().unwrap_or(0);
    }
}

/// Readings that [`calibrate`] takes.
const TRIES: usize = 4096;

/// The loop's own median step on this clock, in ticks; takes about a tenth of a millisecond. Nothing is
/// allocated; 32 KiB of stack are used.
pub fn calibrate(mut clock: impl FnMut() -> u64) -> u64 {
    let mut steps = [0; TRIES];
    let mut last = clock();
    for step in &mut steps {
        let now = clock();
        *step = now.wrapping_sub(last);
        last = now;
    }
    *steps.select_nth_unstable(TRIES / 2).1
}

/// The threshold to take where nobody chose one: ten median steps, and at least 200 ns. A kernel entry
/// costs more than that on any machine, and what a CPU does by itself (a cache miss, a divide) less.
#[must_use]
pub fn threshold(median: u64, clock: &Clock) -> u64 {
    median.saturating_mul(10).max(clock.to_ticks(std::time::Duration::from_nanos(200)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_has_one_bucket_and_it_is_narrow() {
        let mut next = 0;
        for at in 0..BUCKETS {
            let (least, most) = bounds(at);
            assert_eq!(least, next, "no hole before bucket {at}");
            assert_eq!((bucket(least), bucket(most)), (at, at));
            assert!((most - least) as f64 <= least as f64 / 32.0, "{least} to {most}");
            next = most.wrapping_add(1);
        }
        assert_eq!(next, 0, "the last one ends with the numbers");
    }
}
