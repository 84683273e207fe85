//! What to do about a check that is not good; doing it, and undoing it.
//!
//! Contract: a [`Fix`] is exact. A change names a file and what to write there; a boot parameter is one
//! word of the command line; an advice is for a person, with the command where there is one.
//! [`apply`] writes down what was there, and that on disk, before it writes anything; [`undo`] puts that
//! back, whenever and wherever a fix was interrupted. Neither overwrites what somebody else has set since,
//! unless forced to. Files outside of `/proc` and `/sys` are never written.

pub use super::record::StateError;

use super::record::{Entry, Record};
use super::seam::Found;
use super::{CpuSet, Host, Report};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;

/// How the values of a file are written, and when two of them mean the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// A word.
    Word,
    /// A number.
    Number,
    /// A list of CPUs: `0-1` is `0,1`.
    List,
    /// A mask of CPUs: `3` is `00000000,00000003`.
    Mask,
    /// Words, of which the one in brackets is chosen: `always [madvise] never`.
    Choice,
}

impl Form {
    /// What to write to get what `text` says.
    #[must_use]
    pub(super) fn value(self, text: &str) -> &str {
        let text = text.trim();
        match self {
            Self::Choice => super::memory::chosen(text).unwrap_or(text),
            Self::Word | Self::Number | Self::List | Self::Mask => text,
        }
    }

    /// Whether two texts mean the same.
    #[must_use]
    pub(super) fn same(self, a: &str, b: &str) -> bool {
        let (a, b) = (self.value(a), self.value(b));
        if a == b {
            return true;
        }
        let list = |text| CpuSet::parse_list(text, 0);
        match self {
            Self::Word | Self::Choice => false,
            Self::Number => matches!((a.parse::<i128>(), b.parse::<i128>()), (Ok(a), Ok(b)) if a == b),
            Self::List => matches!((list(a), list(b)), (Ok(a), Ok(b)) if a == b),
            Self::Mask => matches!((CpuSet::parse_mask(a), CpuSet::parse_mask(b)), (Ok(a), Ok(b)) if a == b),
        }
    }
}

/// A change that can be made while the host runs. It lasts until the next boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The file, below `/proc` or `/sys`.
    pub path: String,
    /// What to write there.
    pub content: String,
    /// How its values are written.
    #[serde(skip)]
    pub form: Form,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fix {
    /// A change at run time; the first thing that `--fix` would do.
    Change(Change),
    /// A parameter of the kernel's command line.
    Boot {
        /// The parameter, with its value.
        parameter: String,
    },
    /// Something that a person has to decide or do.
    Advice {
        /// What, with the exact command where there is one.
        text: String,
    },
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Change(change) => write!(f, "echo {} > {}", change.content, change.path),
            Self::Boot { parameter } => write!(f, "boot with {parameter}"),
            Self::Advice { text } => f.write_str(text),
        }
    }
}

/// Where the record is kept unless somebody says otherwise.
pub const STATE: &str = "/var/lib/isoplane/doctor-undo.json";

/// What came of a change, or of taking it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// Done: the file holds the new value.
    Changed,
    /// Taken back: the file holds what was there before the first fix.
    Restored,
    /// The file held that value already; nothing was written.
    Already,
    /// The kernel made something else of it.
    Adjusted {
        /// What the file holds now.
        now: String,
    },
    /// The kernel refused it, and the file is as it was.
    Refused {
        /// What the kernel said.
        why: String,
    },
    /// Somebody else has changed the file since; it was left alone.
    ChangedSince {
        /// What the file holds now.
        now: String,
    },
    /// There is no such file any more.
    Gone,
    /// The host was restarted since, which has undone it.
    Restarted,
}

impl Outcome {
    /// Whether the file holds what it should.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        matches!(self, Self::Changed | Self::Restored | Self::Already | Self::Restarted)
    }
}

/// One file, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Done {
    /// The check that asked for the change.
    pub check: String,
    /// The file.
    pub path: String,
    /// What it held.
    pub before: Option<String>,
    /// What it should hold.
    pub content: String,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, content, .. } = self;
        let before = self.before.as_deref().unwrap_or("nothing");
        match &self.outcome {
            Outcome::Changed => write!(f, "{path}: {before} -> {content}"),
            Outcome::Restored => write!(f, "{path}: {before} -> {content} again"),
            Outcome::Already => write!(f, "{path}: {content} already"),
            Outcome::Adjusted { now } => write!(f, "{path}: the kernel made {now} of {content}"),
            Outcome::Refused { why } => write!(f, "{path}: {content} was refused, {before} stays: {why}"),
            Outcome::ChangedSince { now } => write!(
                f,
                "{path}: somebody has changed it to {now} since; not set to {content} (--force does)"
            ),
            Outcome::Gone => write!(f, "{path}: there is no such file, so it cannot be set to {content}"),
            Outcome::Restarted => write!(f, "{path}: undone by the restart of the host since"),
        }
    }
}

/// The order of changes: what needs memory first, then what makes noise, then what moves work away, and
/// last what lifts a limit that protects the host. Undone the other way round.
const ORDER: [&str; 21] = [
    "clocksource",
    "hugepages",
    "damon",
    "ksm",
    "thp",
    "numa-balancing",
    "compaction",
    "timer-migration",
    "watchdog",
    "mce",
    "stat-interval",
    "workqueues",
    "irqaffinity",
    "irqs",
    "rps",
    "xps",
    "governor",
    "cstates",
    "perf",
    "rt-throttling",
    "fair-server",
];

fn place(check: &str) -> usize {
    ORDER.iter().position(|id| *id == check).unwrap_or(ORDER.len())
}

/// The record may have been written by others: no file but those of the kernel's settings is touched.
fn is_setting(path: &str) -> bool {
    (path.starts_with("/proc/") || path.starts_with("/sys/"))
        && !path.split('/').any(|part| part == "..")
        && !path.contains('\0')
}

fn open(host: &Host, state: &Path) -> Result<Record, StateError> {
    Record::open(state, host.text("/proc/sys/kernel/random/boot_id").unwrap_or_default())
}

/// What a file holds, or why that cannot be told.
fn current(host: &Host, path: &str, form: Form) -> Result<String, Outcome> {
    match host.read(path) {
        Found::Text(text) => Ok(form.value(&text).to_owned()),
        Found::Missing => Err(Outcome::Gone),
        Found::Unreadable(why) => Err(Outcome::Refused { why }),
    }
}

/// Makes the changes of a report, each of which is in the record `state` before it is made. What a second
/// fix finds in place of a first one's value is somebody else's, and stays unless `force`.
///
/// # Errors
/// [`StateError`], when the record cannot be kept: nothing is changed from then on.
pub fn apply(host: &Host, report: &Report, state: &Path, force: bool) -> Result<Vec<Done>, StateError> {
    let mut record = open(host, state)?;
    let mut changes: Vec<_> = report.changes().collect();
    changes.sort_by_key(|(check, _)| place(check.id));
    let mut all = Vec::new();
    for (check, change) in changes {
        let (before, outcome) = match current(host, &change.path, change.form) {
            Err(outcome) => (None, outcome),
            Ok(_) if !is_setting(&change.path) => {
                (None, Outcome::Refused { why: "not a file below /proc or /sys".to_owned() })
            }
            Ok(value) => {
                let outcome = change_one(host, &mut record, check.id, change, &value, force)?;
                (Some(value), outcome)
            }
        };
        all.push(Done {
            check: check.id.to_owned(),
            path: change.path.clone(),
            before,
            content: change.content.clone(),
            outcome,
        });
    }
    record.save()?;
    Ok(all)
}

/// Makes one change. The record is on disk before the write; what came of it is noted in memory, and on
/// disk with the next one: until then the entry is pending there, which is enough to undo it.
fn change_one(
    host: &Host,
    record: &mut Record,
    check: &str,
    change: &Change,
    value: &str,
    force: bool,
) -> Result<Outcome, StateError> {
    let Change { path, content, form } = change;
    let form = *form;
    if form.same(value, content) {
        return Ok(Outcome::Already);
    }
    let known = record.entries.iter().position(|entry| entry.path == *path);
    let at = match known {
        Some(at) => {
            let entry = &record.entries[at];
            if !force && !entry.pending && !form.same(value, &entry.before) && !entry.owns(value) {
                return Ok(Outcome::ChangedSince { now: value.to_owned() });
            }
            at
        }
        None => {
            record.entries.push(Entry {
                check: check.to_owned(),
                path: path.clone(),
                form,
                before: value.to_owned(),
                ours: Vec::new(),
                pending: true,
            });
            record.entries.len() - 1
        }
    };
    let previous = record.entries[at].clone();
    record.entries[at].own(content);
    record.entries[at].pending = true;
    record.save()?;
    let written = host.write(path, content);
    let now = current(host, path, form);
    let entry = &mut record.entries[at];
    Ok(match (written, now) {
        (Ok(()), Ok(now)) if form.same(&now, content) => {
            entry.pending = false;
            Outcome::Changed
        }
        // As it was: there is nothing to undo that was not there before.
        (written, Ok(now)) if form.same(&now, value) => {
            match known {
                Some(_) => *entry = previous,
                None => drop(record.entries.remove(at)),
            }
            Outcome::Refused { why: refusal(written) }
        }
        (_, Ok(now)) => {
            entry.pending = false;
            entry.own(&now);
            Outcome::Adjusted { now }
        }
        // Written, perhaps, and now unreadable: the entry stays pending.
        (_, Err(outcome)) => outcome,
    })
}

fn refusal(written: std::io::Result<()>) -> String {
    match written {
        Ok(()) => "the kernel took the value and kept the old one".to_owned(),
        Err(error) => match error.raw_os_error().map(nix::errno::Errno::from_raw) {
            // kernel/irq/proc.c, write_irq_affinity: EIO up to 6.3, EPERM from then on.
            Some(nix::errno::Errno::EIO | nix::errno::Errno::EPERM) => {
                format!("{error}: not root, or a setting that its driver or the kernel manages")
            }
            Some(nix::errno::Errno::EACCES | nix::errno::Errno::EROFS) => {
                format!("{error}: run as root, outside of a container")
            }
            _ => error.to_string(),
        },
    }
}

/// Puts back what was there before the first fix, the last change first. What cannot be put back stays in
/// the record. What somebody else has changed since stays as it is, unless `force`; `force` also forgets
/// files that are gone.
///
/// # Errors
/// [`StateError`], when the record cannot be read or written.
pub fn undo(host: &Host, state: &Path, force: bool) -> Result<Vec<Done>, StateError> {
    let mut record = open(host, state)?;
    let mut all = Vec::new();
    for entry in std::mem::take(&mut record.outlived) {
        all.push(done(&entry, None, Outcome::Restarted));
    }
    let mut kept = Vec::new();
    for mut entry in std::mem::take(&mut record.entries).into_iter().rev() {
        let (found, outcome) = if is_setting(&entry.path) {
            match current(host, &entry.path, entry.form) {
                Err(outcome) => (None, outcome),
                Ok(value) => (Some(value.clone()), restore(host, &mut entry, &value, force)),
            }
        } else {
            (None, Outcome::Refused { why: "not a file below /proc or /sys".to_owned() })
        };
        all.push(done(&entry, found, outcome.clone()));
        let forgotten = force && outcome == Outcome::Gone;
        if !outcome.is_done() && !forgotten {
            kept.push(entry);
        }
    }
    kept.reverse();
    record.entries = kept;
    // Until here the old record stands: if this is interrupted, what is back already is found to be so.
    record.save()?;
    Ok(all)
}

fn restore(host: &Host, entry: &mut Entry, value: &str, force: bool) -> Outcome {
    let form = entry.form;
    if form.same(value, &entry.before) {
        return Outcome::Already;
    }
    if !force && !entry.pending && !entry.owns(value) {
        return Outcome::ChangedSince { now: value.to_owned() };
    }
    let written = host.write(&entry.path, &entry.before);
    match current(host, &entry.path, form) {
        Ok(now) if form.same(&now, &entry.before) => Outcome::Restored,
        Ok(now) if form.same(&now, value) => Outcome::Refused { why: refusal(written) },
        Ok(now) => {
            entry.own(&now);
            Outcome::Adjusted { now }
        }
        Err(outcome) => outcome,
    }
}

fn done(entry: &Entry, before: Option<String>, outcome: Outcome) -> Done {
    Done {
        check: entry.check.clone(),
        path: entry.path.clone(),
        before,
        content: entry.before.clone(),
        outcome,
    }
}
