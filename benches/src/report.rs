//! From samples to the table and the JSON.

use crate::comparison::{BenchError, Comparison, Sample, Target};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What became of one comparison.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Name of the comparison.
    pub name: String,
    /// Variant, or empty.
    pub case: String,
    /// Median of our runs.
    pub ours: f64,
    /// Median of the peer's runs.
    pub peer: f64,
    /// The peer.
    pub peer_name: String,
    /// What is counted.
    pub unit: String,
    /// Median of the ratios of neighbouring runs; above 1 we are ahead.
    pub ratio: f64,
    /// Smallest and largest of those ratios.
    pub spread: [f64; 2],
    /// What the ratio had to be, if anything.
    pub target: Option<Target>,
    /// Pairs of runs.
    pub runs: usize,
    /// Medians of the figures beside our runs, and the peer's.
    pub beside: BTreeMap<String, f64>,
    /// Every rate measured, ours and the peer's, in the order of the runs.
    pub samples: Vec<[f64; 2]>,
}

/// The middle value; of an even number the mean of the two in the middle. 0 of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

impl Row {
    /// Puts the samples of alternating runs together.
    ///
    /// # Errors
    /// A run that moved nothing has no ratio.
    pub fn of(comparison: &dyn Comparison, samples: &[(Sample, Sample)]) -> Result<Self, BenchError> {
        if samples.iter().any(|(ours, peer)| ours.rate <= 0.0 || peer.rate <= 0.0) {
            let what = format!("a run of {} moved nothing: {samples:?}", comparison.name());
            return Err(BenchError::Machine(what));
        }
        let column = |pick: &dyn Fn(&(Sample, Sample)) -> f64| samples.iter().map(pick).collect::<Vec<_>>();
        let ratios = column(&|(ours, peer)| ours.rate / peer.rate);
        let mut beside: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (ours, peer) in samples {
            for (name, value) in &ours.beside {
                beside.entry(name.clone()).or_default().push(*value);
            }
            for (name, value) in &peer.beside {
                beside.entry(format!("peer_{name}")).or_default().push(*value);
            }
        }
        Ok(Self {
            name: comparison.name().to_owned(),
            case: comparison.case().to_owned(),
            ours: median(&column(&|(ours, _)| ours.rate)),
            peer: median(&column(&|(_, peer)| peer.rate)),
            peer_name: comparison.peer_name().to_owned(),
            unit: comparison.unit().to_owned(),
            ratio: median(&ratios),
            spread: [
                ratios.iter().copied().fold(f64::INFINITY, f64::min),
                ratios.iter().copied().fold(0.0, f64::max),
            ],
            target: comparison.target(),
            runs: samples.len(),
            beside: beside.into_iter().map(|(name, values)| (name, median(&values))).collect(),
            samples: samples.iter().map(|(ours, peer)| [ours.rate, peer.rate]).collect(),
        })
    }

    /// The row's name and variant.
    #[must_use]
    pub fn title(&self) -> String {
        if self.case.is_empty() { self.name.clone() } else { format!("{} {}", self.name, self.case) }
    }
}

/// What came of all comparisons of a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Both sides had huge pages.
    pub huge_pages: bool,
    /// Those that could be made.
    pub comparisons: Vec<Row>,
    /// Why the others could not.
    pub failures: Vec<String>,
}

impl Report {
    /// Adds what came of a run elsewhere.
    pub fn add(&mut self, other: Self) {
        self.huge_pages &= other.huge_pages;
        self.comparisons.extend(other.comparisons);
        self.failures.extend(other.failures);
    }

    /// What makes it no success: comparisons that were not made, and targets that were missed.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let missed = self.comparisons.iter().filter_map(|row| {
            let target = row.target.filter(|target| !target.met(row.ratio))?;
            Some(format!("{}: the ratio is {:.3}, and has to be {target}", row.title(), row.ratio))
        });
        self.failures.iter().cloned().chain(missed).collect()
    }
}

/// The table for people.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut out = format!(
        "{:<18} {:>10} {:>10}  {:<14} {:>7}  {:<13} {:>4}  {}\n",
        "name", "ours", "peer", "unit", "ratio", "spread", "runs", "peer is"
    );
    for row in rows {
        let spread = format!("{:.2} - {:.2}", row.spread[0], row.spread[1]);
        out += &format!(
            "{:<18} {:>10.3} {:>10.3}  {:<14} {:>7.2}  {:<13} {:>4}  {}\n",
            row.title(),
            row.ours,
            row.peer,
            row.unit,
            row.ratio,
            spread,
            row.runs,
            row.peer_name
        );
        for (name, value) in &row.beside {
            out += &format!("    {name} {value:.3}\n");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake;
    impl Comparison for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }
        fn peer_name(&self) -> &'static str {
            "other"
        }
        fn unit(&self) -> &'static str {
            "things/s"
        }
        fn packages(&self) -> &'static [&'static str] {
            &[]
        }
        fn ours(&self) -> Result<Sample, BenchError> {
            Ok(Sample::default())
        }
        fn peer(&self) -> Result<Sample, BenchError> {
            Ok(Sample::default())
        }
    }

    fn sample(rate: f64) -> Sample {
        Sample { rate, beside: BTreeMap::from([("seen_count".to_owned(), rate * 2.0)]) }
    }

    #[test]
    fn the_ratio_is_of_neighbouring_runs_and_above_one_when_we_are_ahead() -> Result<(), BenchError> {
        let pairs = [(10.0, 5.0), (30.0, 10.0), (8.0, 8.0)].map(|(a, b)| (sample(a), sample(b)));
        let row = Row::of(&Fake, &pairs)?;
        assert_eq!((row.ours, row.peer, row.ratio, row.spread), (10.0, 8.0, 2.0, [1.0, 3.0]));
        assert_eq!(row.beside["seen_count"], 20.0);
        assert_eq!(row.beside["peer_seen_count"], 16.0);
        assert!(table(&[row]).contains("2.00"));
        Ok(())
    }

    #[test]
    fn a_run_that_moved_nothing_is_an_error_and_no_ratio() {
        assert!(Row::of(&Fake, &[(sample(1.0), sample(0.0))]).is_err());
    }

    #[test]
    fn a_missed_target_is_no_success() -> Result<(), BenchError> {
        let mut row = Row::of(&Fake, &[(sample(11.0), sample(10.0))])?;
        let mut report = |target| {
            row.target = target;
            Report { huge_pages: true, comparisons: vec![row.clone()], failures: vec![] }.complaints().len()
        };
        assert_eq!(report(None), 0);
        assert_eq!(report(Some(Target::AtLeast(1.1))), 0);
        assert_eq!(report(Some(Target::MoreThan(1.1))), 1);
        assert_eq!(report(Some(Target::AtLeast(1.2))), 1);
        Ok(())
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
