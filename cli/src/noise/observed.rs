//! What the observer finds out about the measuring process, added up.

use isoplane_isolation::observer::{Asked, Line, Missing, Sender, Senders, SendersUnavailable};
use isoplane_isolation::{Interruptions, Observer, Status, Watched};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// Events that are kept: a process that is moved about all the time has seen enough.
const EVENTS: usize = 100;

/// Senders of IPIs that are named.
const SENDERS: usize = 32;

/// Sums since the start.
#[derive(Debug)]
pub(super) struct Observed {
    observer: Observer,
    /// The measuring process's name with the observer.
    name: String,
    /// Why senders of IPIs are not named, if they are not.
    no_senders: Option<SendersUnavailable>,
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

/// Somebody who sent IPIs to the measured CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct IpiSender {
    /// What was asked: `function_call` or `reschedule`.
    asked: &'static str,
    /// The kernel function that was to run; `null` for a reschedule.
    function: Option<String>,
    /// Where in the kernel it was asked for.
    callsite: String,
    /// Name of the thread that ran there; empty when it ended before anybody could ask.
    comm: String,
    pid: u32,
    /// The kernel was handling an interrupt, so that thread is not the cause.
    in_interrupt: bool,
    count: u64,
    #[serde(skip)]
    text: String,
}

impl From<Sender> for IpiSender {
    fn from(sender: Sender) -> Self {
        let text = sender.to_string();
        let Sender { asked, function, callsite, comm, pid, in_interrupt, count, .. } = sender;
        let asked = match asked {
            Asked::Reschedule => "reschedule",
            _ => "function_call",
        };
        Self { asked, function, callsite, comm, pid, in_interrupt, count, text }
    }
}

impl fmt::Display for IpiSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Observed {
    /// Starts to look: what comes from now on is counted. The senders were opened before the measuring
    /// process was isolated, since opening them interrupts every CPU.
    pub(super) fn start(name: &str, status: &Status, senders: Result<Senders, SendersUnavailable>) -> Self {
        let watched = Watched { name: name.to_owned(), status: status.clone() };
        let observer = Observer::new(vec![watched]);
        let (observer, no_senders) = match senders {
            Ok(senders) => (observer.with_senders(senders), None),
            Err(reason) => (observer, Some(reason)),
        };
        let mut new = Self {
            observer,
            name: name.to_owned(),
            no_senders,
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

    /// Who sent IPIs to the CPU, most frequent first.
    pub(super) fn senders(&self) -> Vec<IpiSender> {
        self.observer.top_senders(&self.name, SENDERS).into_iter().map(IpiSender::from).collect()
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
        let files = self.observer.missing().iter().map(said);
        files.chain(self.no_senders.as_ref().map(ToString::to_string)).collect()
    }
}
