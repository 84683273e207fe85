//! What the observer finds out about the measuring process, added up.

use isoplane_isolation::observer::{Line, Missing};
use isoplane_isolation::{Interruptions, Observer, Status, Watched};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Events that are kept: a process that is moved about all the time has seen enough.
const EVENTS: usize = 100;

/// Sums since the start.
#[derive(Debug)]
pub(super) struct Observed {
    observer: Observer,
    pub(super) interruptions: Interruptions,
    pub(super) page_faults: u64,
    pub(super) run_delay: Duration,
    pub(super) steal: Duration,
    pub(super) events: Vec<String>,
    rows: BTreeMap<(&'static str, String, String), u64>,
}

/// A row of the kernel's tables of interrupts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Row {
    cause: &'static str,
    /// The kernel's label: a number, or a short name.
    label: String,
    /// Who uses it, or what the kernel says it is.
    name: String,
    count: u64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = crate::format::grouped(self.count);
        write!(f, "{count} of {} {}", self.cause.replace('_', " "), self.label)?;
        if self.label == self.name { Ok(()) } else { write!(f, " ({})", self.name) }
    }
}

impl Observed {
    /// Starts to look: what comes from now on is counted.
    pub(super) fn start(name: &str, status: &Status) -> Self {
        let watched = Watched { name: name.to_owned(), status: status.clone() };
        let mut new = Self {
            observer: Observer::new(vec![watched]),
            interruptions: Interruptions::default(),
            page_faults: 0,
            run_delay: Duration::ZERO,
            steal: Duration::ZERO,
            events: Vec::new(),
            rows: BTreeMap::new(),
        };
        new.look();
        new
    }

    /// Looks again.
    pub(super) fn look(&mut self) {
        for finding in self.observer.sample() {
            for (cause, n) in finding.interruptions.iter() {
                self.interruptions.add(cause, n);
            }
            self.page_faults += finding.page_faults.minor + finding.page_faults.major;
            self.run_delay += finding.run_delay;
            self.steal += finding.steal;
            let room = EVENTS.saturating_sub(self.events.len());
            self.events.extend(finding.events.iter().take(room).map(ToString::to_string));
            for Line { cause, label, name, count, .. } in finding.lines {
                *self.rows.entry((cause.name(), label, name)).or_insert(0) += count;
            }
        }
    }

    /// All interruptions until now.
    pub(super) fn so_far(&self) -> u64 {
        self.interruptions.total()
    }

    /// The rows behind the counts, most frequent first.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = self
            .rows
            .iter()
            .map(|((cause, label, name), count)| Row {
                cause,
                label: label.clone(),
                name: name.clone(),
                count: *count,
            })
            .collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.count));
        rows
    }

    /// What could not be looked at.
    pub(super) fn not_observed(&self) -> Vec<String> {
        let said = |missing: &Missing| {
            format!(
                "{} cannot be read ({}), so what it tells is not counted",
                missing.path.display(),
                missing.reason
            )
        };
        self.observer.missing().iter().map(said).collect()
    }
}
