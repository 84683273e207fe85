//! The gap-measuring loop against a clock whose gaps are known.

use isoplane_isolation::gaps::{Bucket, Gap, Gaps, LONGEST, SLICE, calibrate, threshold};
use isoplane_memory::Clock;
use proptest::prelude::*;
use std::cell::Cell;
use std::ops::ControlFlow;

/// Ticks of an ordinary step.
const STEP: u64 = 40;
const THRESHOLD: u64 = 400;

/// A clock that takes [`STEP`] between two readings, and longer where the script says so. The reading
/// that the loop takes after writing a gap down is one of them.
struct Script<'a> {
    now: Cell<u64>,
    reading: Cell<u64>,
    /// Reading, and how long the step before it takes; readings ascend.
    long: &'a [(u64, u64)],
    next: Cell<usize>,
}

impl<'a> Script<'a> {
    fn new(start: u64, long: &'a [(u64, u64)]) -> Self {
        Self { now: Cell::new(start), reading: Cell::new(0), long, next: Cell::new(0) }
    }

    fn read(&self) -> u64 {
        let reading = self.reading.get();
        let step = match self.long.get(self.next.get()) {
            Some((at, step)) if *at == reading => {
                self.next.set(self.next.get() + 1);
                *step
            }
            _ => STEP,
        };
        self.reading.set(reading + 1);
        self.now.set(self.now.get().wrapping_add(step));
        self.now.get()
    }
}

#[test]
fn known_gaps_are_found_exactly() {
    // The first reading starts the measurement; those after a gap end its writing down.
    let long = [(10, 5_000), (50, THRESHOLD), (60, THRESHOLD + 1), (200, 1_000_000)];
    let clock = Script::new(1 << 40, &long);
    let gaps = Gaps::create("known").unwrap();
    let mut spinner = gaps.spinner(|| clock.read(), THRESHOLD);
    for _ in 0..10 {
        spinner.slice(100);
    }
    let end = spinner.last();
    let report = gaps.report();
    assert_eq!(report.threshold, THRESHOLD);
    assert_eq!(report.steps, 1000);
    assert_eq!(report.count, 3, "a step as long as the threshold is none");
    assert_eq!(report.lost, 5_000 + THRESHOLD + 1 + 1_000_000);
    assert_eq!(report.longest, 1_000_000);
    assert_eq!(report.unwatched, 3 * STEP);
    assert_eq!(report.watched, end - report.from);
    assert_eq!(report.watched, report.lost + report.unwatched + 996 * STEP + THRESHOLD);
    assert_eq!(report.backwards, 0);
    let lengths: Vec<u64> = report.kept.iter().map(|gap| gap.ticks).collect();
    assert_eq!(lengths, [5_000, THRESHOLD + 1, 1_000_000], "in the order of time");
    let first = report.kept[0];
    assert_eq!(first, Gap { at: report.from + 9 * STEP + 5_000, ticks: 5_000 });
    let share = report.lost as f64 / (report.watched - report.unwatched) as f64;
    assert!((report.lost_share() - share).abs() < 1e-12);
    let so_far = gaps.so_far();
    assert_eq!((so_far.count, so_far.longest, so_far.watched), (3, 1_000_000, report.watched));
}

#[test]
fn time_between_slices_is_watched() {
    let clock = Script::new(7, &[]);
    let gaps = Gaps::create("between").unwrap();
    let mut spinner = gaps.spinner(|| clock.read(), THRESHOLD);
    spinner.slice(10);
    clock.now.set(clock.now.get() + 9_000);
    spinner.slice(10);
    let report = gaps.report();
    assert_eq!((report.count, report.longest), (1, 9_000 + STEP));
}

#[test]
fn it_runs_for_its_time_or_until_somebody_wants_an_end() {
    let clock = Script::new(0, &[]);
    let gaps = Gaps::create("run").unwrap();
    let go_on = || ControlFlow::<()>::Continue(());
    let slice = u64::from(SLICE) * STEP;
    assert!(gaps.spinner(|| clock.read(), THRESHOLD).run(5 * slice - 1, go_on).is_continue());
    assert_eq!(gaps.report().watched, 5 * slice);
    let mut slices = 0;
    let ended = gaps.spinner(|| clock.read(), THRESHOLD).run(u64::MAX, || {
        slices += 1;
        if slices == 3 { ControlFlow::Break("enough") } else { ControlFlow::Continue(()) }
    });
    assert_eq!(ended, ControlFlow::Break("enough"));
    assert_eq!(gaps.report().steps, 3 * u64::from(SLICE));
    let mut slices = 0;
    let ended = gaps.spinner(|| clock.read(), THRESHOLD).run(u64::MAX, || {
        slices += 1;
        if slices == 2 {
            gaps.ask_to_stop();
        }
        go_on()
    });
    assert!(ended.is_continue());
    assert_eq!(gaps.report().steps, 2 * u64::from(SLICE));
    assert!(gaps.spinner(|| clock.read(), THRESHOLD).run(u64::MAX, go_on).is_continue());
    assert_eq!(gaps.report().steps, u64::from(SLICE), "asked before it started");
}

#[test]
fn a_clock_that_goes_backwards_is_no_gap() {
    // A step of 2^64 - 500 is one of -500; the counter's own overflow is none.
    let long = [(5, 500u64.wrapping_neg()), (8, 7_000)];
    let clock = Script::new(u64::MAX - 10 * STEP, &long);
    let gaps = Gaps::create("backwards").unwrap();
    let mut spinner = gaps.spinner(|| clock.read(), THRESHOLD);
    spinner.slice(100);
    let report = gaps.report();
    assert_eq!((report.backwards, report.count, report.longest), (1, 1, 7_000));
    assert_eq!(report.watched, 7_000 + STEP + 98 * STEP - 500);
}

#[test]
fn only_the_longest_are_kept() {
    let long: Vec<(u64, u64)> = (1..=200).map(|n| (n * 3, 1_000 + n * 7919 % 1009)).collect();
    let clock = Script::new(0, &long);
    let gaps = Gaps::create("longest").unwrap();
    let mut spinner = gaps.spinner(|| clock.read(), THRESHOLD);
    spinner.slice(1000);
    let report = gaps.report();
    assert_eq!(report.count, 200);
    let mut expected: Vec<u64> = long.iter().map(|(_, ticks)| *ticks).collect();
    expected.sort_unstable();
    let expected = expected.split_off(200 - LONGEST);
    let mut kept: Vec<u64> = report.kept.iter().map(|gap| gap.ticks).collect();
    kept.sort_unstable();
    assert_eq!(kept, expected);
    assert!(report.kept.is_sorted_by_key(|gap| gap.at));
}

#[test]
fn a_new_loop_starts_from_nothing() {
    let gaps = Gaps::create("again").unwrap();
    let long = [(3, 5_000)];
    let clock = Script::new(0, &long);
    gaps.spinner(|| clock.read(), THRESHOLD).slice(10);
    assert_eq!(gaps.report().count, 1);
    let clock = Script::new(0, &[]);
    gaps.spinner(|| clock.read(), 2 * THRESHOLD).slice(10);
    let report = gaps.report();
    assert_eq!((report.count, report.lost, report.longest, report.unwatched), (0, 0, 0, 0));
    assert_eq!((report.threshold, report.steps, report.watched), (2 * THRESHOLD, 10, 10 * STEP));
    assert!(report.kept.is_empty() && report.histogram.is_empty());
    assert_eq!(report.percentile(0.5), None);
    assert!(report.lost_share() == 0.0);
}

#[test]
fn a_loop_is_watched_from_another_thread() {
    let gaps = Gaps::create("shared").unwrap();
    assert!(!gaps.so_far().started);
    let theirs = gaps.clone();
    let looping = std::thread::spawn(move || {
        let long = [(3, 5_000), (20, 6_000)];
        let clock = Script::new(0, &long);
        theirs.spinner(|| clock.read(), THRESHOLD).slice(50);
    });
    looping.join().unwrap();
    assert!(gaps.so_far().started);
    assert_eq!(gaps.report().count, 2);
}

#[test]
fn the_threshold_follows_the_clock() {
    let clock = Script::new(0, &[(5, 70), (6, 90), (100, 1 << 30)]);
    assert_eq!(calibrate(|| clock.read()), STEP, "the median, whatever a few steps were");
    let Ok(clock) = Clock::tsc() else {
        eprintln!("not here: this machine's kernel does not keep time by the TSC");
        return;
    };
    let floor = clock.to_ticks(std::time::Duration::from_nanos(200));
    assert_eq!(threshold(0, &clock), floor);
    assert_eq!(threshold(floor, &clock), 10 * floor);
    assert_eq!(threshold(u64::MAX, &clock), u64::MAX);
}

proptest! {
    /// Percentiles against the sorted lengths themselves.
    #[test]
    fn percentiles_are_right_to_three_percent(
        lengths in proptest::collection::vec(THRESHOLD + 1..1 << 40, 1..200),
        share in 0.0..=1.0f64,
    ) {
        let long: Vec<(u64, u64)> = lengths.iter().enumerate().map(|(n, l)| (3 * n as u64 + 1, *l)).collect();
        let clock = Script::new(0, &long);
        let gaps = Gaps::create("percentiles").unwrap();
        gaps.spinner(|| clock.read(), THRESHOLD).slice(1000);
        let report = gaps.report();
        let mut sorted = lengths.clone();
        sorted.sort_unstable();
        let rank = ((share * sorted.len() as f64).ceil() as usize).max(1);
        let exact = sorted[rank - 1];
        let found = report.percentile(share).unwrap();
        prop_assert!(found >= exact && found - exact <= exact / 32, "{found} for {exact}");
        prop_assert_eq!(report.percentile(1.0), sorted.last().copied());
        prop_assert_eq!(report.histogram.iter().map(|b: &Bucket| b.count).sum::<u64>(), sorted.len() as u64);
        for length in &sorted {
            prop_assert!(report.histogram.iter().any(|b| b.least <= *length && *length <= b.most));
        }
    }
}
