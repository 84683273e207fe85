//! What was measured, as tables and as JSON.

use super::load::Ended as LoadEnded;
use super::observed::{IpiSender, Observed, Row};
use super::spinner::{Spinner, Task};
use super::{Args, Mode};
use crate::format::{grouped, short_time};
use crate::top::table;
use isoplane::memory::Clock;
use isoplane_isolation::Interruptions;
use isoplane_isolation::gaps;
use isoplane_isolation::prepare::cpu::CpuList;
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

/// Why the measurement ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Ended {
    /// Its time was over.
    Time,
    /// Somebody asked it to end.
    Signal,
    /// The measuring process or the load failed.
    Failure,
}

/// What was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The CPU that was measured.
    pub(super) cpu: usize,
    /// The CPUs that everything of ours was on meanwhile.
    housekeeping_cpus: Vec<usize>,
    /// How long each mode was to be measured.
    seconds: u64,
    ended: Ended,
    /// One for each mode, in the order of time.
    pub(super) measurements: Vec<Measurement>,
    /// What went wrong, in words; the exit code is 0 when this is empty.
    pub(super) problems: Vec<String>,
}

/// One mode's.
#[derive(Debug, Serialize)]
pub(super) struct Measurement {
    pub(super) mode: &'static str,
    /// How isolation was enforced; `null` without isolation.
    backend: Option<String>,
    /// What is weaker than full isolation, in words.
    weaknesses: Vec<String>,
    /// How long was measured.
    pub(super) seconds: f64,
    pub(super) gaps: Gaps,
    /// Kernel entries that the backend enforces, by cause.
    breaches: BTreeMap<&'static str, u64>,
    /// Kernel entries that the backend can only observe, by cause, of the whole CPU. One entry may have
    /// several causes.
    interruptions: BTreeMap<&'static str, u64>,
    /// The kernel's rows behind those causes that have many, most frequent first.
    interruption_rows: Vec<Row>,
    /// Who sent IPIs to the CPU, most frequent first, where the kernel says so.
    ipi_senders: Vec<IpiSender>,
    /// Faults that the kernel counted for the measuring thread.
    page_faults: u64,
    /// Time that the thread wanted to run and did not.
    run_delay_ns: u64,
    /// Time that the hypervisor says it gave to others (in steps of 10 ms).
    steal_ns: u64,
    /// What else was done to the thread, in words.
    events: Vec<String>,
    /// What could not be observed, in words.
    not_observed: Vec<String>,
    load: Option<LoadLine>,
}

/// Lost time. A gap's cause is not known; interruptions in the same time explain some of them.
#[derive(Debug, Serialize)]
pub(super) struct Gaps {
    pub(super) count: u64,
    total_ns: u64,
    /// Lost time as a share of all.
    lost_share: f64,
    /// A step of the loop that took longer is a gap.
    pub(super) threshold_ns: u64,
    /// The loop's median step.
    step_ns: f64,
    steps: u64,
    percentiles: Percentiles,
    /// By length, shortest first; lengths that none had are left out.
    pub(super) histogram: Vec<Bucket>,
    /// The longest, in the order of time.
    longest: Vec<Gap>,
    /// Time in which gaps were written down and nothing was watched.
    unwatched_ns: u64,
    /// Steps in which the clock went backwards.
    clock_backwards: u64,
}

/// Lengths that this share of the gaps does not exceed; `null` without gaps.
#[derive(Debug, Clone, Serialize)]
struct Percentiles {
    p50_ns: Option<u64>,
    p99_ns: Option<u64>,
    p99_9_ns: Option<u64>,
    p99_99_ns: Option<u64>,
    max_ns: Option<u64>,
}

/// Gaps of about the same length: from this to that, both included.
#[derive(Debug, Serialize)]
pub(super) struct Bucket {
    pub(super) from_ns: u64,
    pub(super) to_ns: u64,
    pub(super) count: u64,
}

#[derive(Debug, Serialize)]
struct Gap {
    /// When it ended, after the start.
    at_seconds: f64,
    ns: u64,
}

#[derive(Debug, Serialize)]
struct LoadLine {
    command: String,
    /// When it ended by itself; `null`: it ran to the end.
    ended_after_seconds: Option<f64>,
    /// Its exit status then; `null` too when a signal killed it.
    exit_status: Option<i32>,
}

impl Gaps {
    fn new(found: &gaps::Report, step: u64, clock: &Clock) -> Self {
        let ns = |ticks: u64| clock.to_nanos(ticks);
        let exact = |ticks: u64| ticks as f64 * 1e9 / clock.hertz() as f64;
        let at = |share| found.percentile(share).map(ns);
        Self {
            count: found.count,
            total_ns: ns(found.lost),
            lost_share: found.lost_share(),
            threshold_ns: exact(found.threshold).round() as u64,
            step_ns: exact(step),
            steps: found.steps,
            percentiles: Percentiles {
                p50_ns: at(0.5),
                p99_ns: at(0.99),
                p99_9_ns: at(0.999),
                p99_99_ns: at(0.9999),
                max_ns: at(1.0),
            },
            histogram: found
                .histogram
                .iter()
                .map(|b| Bucket { from_ns: ns(b.least), to_ns: ns(b.most), count: b.count })
                .collect(),
            longest: found
                .kept
                .iter()
                .map(|gap| Gap {
                    at_seconds: ns(gap.at.wrapping_sub(found.from)) as f64 / 1e9,
                    ns: ns(gap.ticks),
                })
                .collect(),
            unwatched_ns: ns(found.unwatched),
            clock_backwards: found.backwards,
        }
    }

    /// The longest; `None` without gaps.
    pub(super) const fn longest_ns(&self) -> Option<u64> {
        self.percentiles.max_ns
    }

    /// Those at least `from` and shorter than `to` nanoseconds long.
    fn between(&self, from: u64, to: u64) -> u64 {
        let within = |bucket: &&Bucket| from <= bucket.from_ns && bucket.from_ns < to;
        self.histogram.iter().filter(within).map(|bucket| bucket.count).sum()
    }
}

impl Measurement {
    pub(super) fn new(
        task: &Task,
        spinner: &mut Spinner,
        observed: &Observed,
        load: Option<(&str, Option<LoadEnded>)>,
    ) -> Self {
        let found = spinner.gaps.report();
        let setup = spinner.setup();
        let now = spinner.status.snapshot();
        Self {
            mode: task.mode.name(),
            backend: setup.backend,
            weaknesses: setup.weaknesses,
            seconds: task.clock.to_nanos(found.watched) as f64 / 1e9,
            gaps: Gaps::new(&found, setup.step, &task.clock),
            breaches: by_name(&now.breaches),
            interruptions: by_name(&observed.interruptions),
            interruption_rows: observed.rows(),
            ipi_senders: observed.senders(),
            page_faults: observed.page_faults,
            run_delay_ns: nanos(observed.run_delay),
            steal_ns: nanos(observed.steal),
            events: observed.events.clone(),
            not_observed: observed.not_observed(),
            load: load.map(|(command, ended)| LoadLine {
                command: command.to_owned(),
                ended_after_seconds: ended.map(|it| it.after.as_secs_f64()),
                exit_status: ended.and_then(|it| it.status.code()),
            }),
        }
    }

    fn backend_or_none(&self) -> String {
        self.backend.clone().unwrap_or_else(|| "-".to_owned())
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Every cause, also those that did not happen.
fn by_name(counts: &Interruptions) -> BTreeMap<&'static str, u64> {
    counts.iter().map(|(cause, n)| (cause.name(), n)).collect()
}

/// Rows of interruptions that the text names; JSON has all.
const ROWS: usize = 5;

/// Lengths of gaps in the table, in nanoseconds.
const RANGES: [(u64, u64, &str); 6] = [
    (0, 1_000, "up to 1 µs"),
    (1_000, 10_000, "1 µs to 10 µs"),
    (10_000, 100_000, "10 µs to 100 µs"),
    (100_000, 1_000_000, "100 µs to 1 ms"),
    (1_000_000, 10_000_000, "1 ms to 10 ms"),
    (10_000_000, u64::MAX, "10 ms and more"),
];

impl Report {
    pub(super) fn new(
        args: &Args,
        housekeeping: &CpuList,
        ended: Ended,
        measurements: Vec<Measurement>,
        problems: Vec<String>,
    ) -> Self {
        Self {
            cpu: args.cpu,
            housekeeping_cpus: housekeeping.iter().map(|cpu| cpu.0).collect(),
            seconds: args.seconds,
            ended,
            measurements,
            problems,
        }
    }

    pub(super) fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        writeln!(out)
    }

    pub(super) fn write_tables(&self, out: &mut impl Write) -> io::Result<()> {
        let Some(first) = self.measurements.first() else { return Ok(()) };
        let step = short_time(first.gaps.step_ns.round() as u64);
        let threshold = short_time(first.gaps.threshold_ns);
        writeln!(
            out,
            "isoplane noise · CPU {} · a gap is a step of more than {threshold} (median {step})",
            self.cpu
        )?;
        let mut header = vec![""];
        header.extend(self.measurements.iter().map(|m| m.mode));
        let mut rows = table(&header);
        let mut row = |name: &str, of: &dyn Fn(&Measurement) -> String| {
            rows.add_row(std::iter::once(name.to_owned()).chain(self.measurements.iter().map(of)));
        };
        let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), short_time);
        row("backend", &Measurement::backend_or_none);
        row("measured", &|m| format!("{:.1} s", m.seconds));
        row("lost time", &|m| short_time(m.gaps.total_ns));
        row("lost share", &|m| share(m.gaps.lost_share));
        row("waited to run", &|m| short_time(m.run_delay_ns));
        row("stolen by the hypervisor", &|m| short_time(m.steal_ns));
        row("gaps", &|m| grouped(m.gaps.count));
        row("gap p50", &|m| time(m.gaps.percentiles.p50_ns));
        row("gap p99", &|m| time(m.gaps.percentiles.p99_ns));
        row("gap p99.9", &|m| time(m.gaps.percentiles.p99_9_ns));
        row("gap p99.99", &|m| time(m.gaps.percentiles.p99_99_ns));
        row("longest gap", &|m| time(m.gaps.percentiles.max_ns));
        for (from, to, name) in RANGES {
            if self.measurements.iter().any(|m| m.gaps.between(from, to) > 0) {
                row(&format!("gaps {name}"), &|m| grouped(m.gaps.between(from, to)));
            }
        }
        writeln!(out, "{rows}")?;
        self.write_causes(out)?;
        self.write_notes(out)
    }

    /// Kernel entries that happened, by cause.
    fn write_causes(&self, out: &mut impl Write) -> io::Result<()> {
        let mut header = vec!["kernel entries"];
        header.extend(self.measurements.iter().map(|m| m.mode));
        let mut rows = table(&header);
        let mut any = false;
        for (kind, of) in KINDS {
            let causes: Vec<&str> =
                self.measurements.first().map_or_else(Vec::new, |m| of(m).keys().copied().collect());
            for cause in causes {
                let counts: Vec<u64> =
                    self.measurements.iter().map(|m| of(m).get(cause).copied().unwrap_or(0)).collect();
                if counts.iter().any(|n| *n > 0) {
                    any = true;
                    let name = format!("{kind}: {}", cause.replace('_', " "));
                    rows.add_row(std::iter::once(name).chain(counts.into_iter().map(grouped)));
                }
            }
        }
        if any { writeln!(out, "{rows}") } else { writeln!(out, "no kernel entry was seen") }
    }

    fn write_notes(&self, out: &mut impl Write) -> io::Result<()> {
        for m in &self.measurements {
            if let Some(load) = &m.load
                && let Some(after) = load.ended_after_seconds
            {
                writeln!(
                    out,
                    "{}: the load ended by itself after {after:.1} s of {:.1} s",
                    m.mode, m.seconds
                )?;
            }
            if m.gaps.clock_backwards > 0 {
                writeln!(
                    out,
                    "{}: the clock went backwards {} times",
                    m.mode,
                    grouped(m.gaps.clock_backwards)
                )?;
            }
            for row in m.interruption_rows.iter().take(ROWS) {
                writeln!(out, "{}: {row}", m.mode)?;
            }
            for sender in m.ipi_senders.iter().take(ROWS) {
                writeln!(out, "{}: {sender}", m.mode)?;
            }
            for event in &m.events {
                writeln!(out, "{}: {event}", m.mode)?;
            }
        }
        // What both modes have to say is said once.
        let mut said: Vec<(&str, Vec<&str>)> = Vec::new();
        for m in &self.measurements {
            for what in m.weaknesses.iter().chain(&m.not_observed) {
                match said.iter_mut().find(|(known, _)| known == what) {
                    Some((_, modes)) => modes.push(m.mode),
                    None => said.push((what, vec![m.mode])),
                }
            }
        }
        for (what, modes) in said {
            writeln!(out, "{}: {what}", modes.join(", "))?;
        }
        if self.ended == Ended::Signal {
            writeln!(out, "ended early by a signal")?;
        }
        Ok(())
    }
}

type Counts = fn(&Measurement) -> &BTreeMap<&'static str, u64>;

const KINDS: [(&str, Counts); 2] = [("breach", |m| &m.breaches), ("interruption", |m| &m.interruptions)];

/// A share that may be very small.
fn share(share: f64) -> String {
    match share * 100.0 {
        0.0 => "0 %".to_owned(),
        percent if percent < 0.001 => format!("{:.2} ppm", share * 1e6),
        percent => format!("{percent:.3} %"),
    }
}

impl Mode {
    /// What a plot calls it.
    pub(super) fn described(name: &str) -> &'static str {
        if name == Self::Strict.name() { "strict isolation" } else { "no isolation" }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A measurement with these buckets: from, to, count.
    pub(in super::super) fn measurement(
        mode: &'static str,
        seconds: f64,
        threshold_ns: u64,
        buckets: &[(u64, u64, u64)],
    ) -> Measurement {
        let max_ns = buckets.last().map(|bucket| bucket.1);
        Measurement {
            mode,
            backend: None,
            weaknesses: vec!["a weakness".to_owned()],
            seconds,
            gaps: Gaps {
                count: buckets.iter().map(|bucket| bucket.2).sum(),
                total_ns: 1_500_000,
                lost_share: 0.000_15,
                threshold_ns,
                step_ns: 20.4,
                steps: 1,
                percentiles: Percentiles {
                    p50_ns: max_ns,
                    p99_ns: max_ns,
                    p99_9_ns: max_ns,
                    p99_99_ns: max_ns,
                    max_ns,
                },
                histogram: buckets
                    .iter()
                    .map(|(from_ns, to_ns, count)| Bucket { from_ns: *from_ns, to_ns: *to_ns, count: *count })
                    .collect(),
                longest: Vec::new(),
                unwatched_ns: 0,
                clock_backwards: 0,
            },
            breaches: by_name(&Interruptions::default()),
            interruptions: by_name(&Interruptions::default()),
            interruption_rows: Vec::new(),
            ipi_senders: Vec::new(),
            page_faults: 0,
            run_delay_ns: 0,
            steal_ns: 0,
            events: Vec::new(),
            not_observed: Vec::new(),
            load: None,
        }
    }

    pub(in super::super) fn report(cpu: usize, measurements: Vec<Measurement>) -> Report {
        Report {
            cpu,
            housekeeping_cpus: vec![0],
            seconds: 10,
            ended: Ended::Time,
            measurements,
            problems: Vec::new(),
        }
    }

    #[test]
    fn the_tables_say_what_happened_and_leave_out_what_did_not() {
        let none =
            measurement("none", 10.0, 200, &[(300, 310, 1_234), (900, 930, 1), (2_000_000, 2_050_000, 2)]);
        let mut strict = measurement("strict", 10.0, 200, &[]);
        strict.breaches.insert("page_fault", 3);
        strict.not_observed.push("not seen".to_owned());
        let mut out = Vec::new();
        report(3, vec![none, strict]).write_tables(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let row = |name: &str| -> Vec<String> {
            let line =
                text.lines().find(|line| line.contains(name)).unwrap_or_else(|| panic!("{name}: {text}"));
            line.split(['│', '┆'])
                .map(|cell| cell.trim().to_owned())
                .filter(|cell| !cell.is_empty())
                .collect()
        };
        assert_eq!(row(" gaps  "), ["gaps", "1,237", "0"]);
        assert_eq!(row("gaps up to 1 µs"), ["gaps up to 1 µs", "1,235", "0"]);
        assert_eq!(row("gaps 1 ms to 10 ms"), ["gaps 1 ms to 10 ms", "2", "0"]);
        assert_eq!(row("longest gap"), ["longest gap", "2.05 ms", "-"]);
        assert_eq!(row("lost share"), ["lost share", "0.015 %", "0.015 %"]);
        assert_eq!(row("breach: page fault"), ["breach: page fault", "0", "3"]);
        assert!(!text.contains("10 µs to 100 µs") && !text.contains("syscall"), "{text}");
        assert!(text.contains("a gap is a step of more than 200 ns (median 20 ns)"), "{text}");
        assert!(text.contains("\nnone, strict: a weakness\nstrict: not seen\n"), "{text}");
    }

    #[test]
    fn small_shares_are_told_apart_from_none() {
        for (value, text) in [(0.0, "0 %"), (2.5e-7, "0.25 ppm"), (0.000_15, "0.015 %"), (0.5, "50.000 %")] {
            assert_eq!(share(value), text);
        }
    }
}
