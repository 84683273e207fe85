//! What a segment says about the isolation of a worker, as a tree and in words.
//!
//! Contract: a number of breaches is never shown without the backend that counted them and what it could
//! only observe, the interruptions: "none" under `advisory` is not what it is under `dispatch`.

use super::view::Block;
use crate::format::{grouped, scaled, short_time};
use isoplane::isolation::{Backend, Cause, State};
use serde::Serialize;
use std::collections::BTreeMap;

/// The isolation of one worker.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Isolation {
    /// `none` for a worker that is not isolated.
    pub(crate) backend: &'static str,
    pub(crate) state: &'static str,
    /// Times armed.
    pub(crate) armed: u64,
    /// Forbidden kernel entries that the backend caught.
    pub(crate) breaches: Entries,
    /// Interrupts right after arming, which are no breaches (backend `task-isolation`).
    pub(crate) races: u64,
    /// Kernel entries that were observed from another CPU.
    pub(crate) interruptions: Entries,
    /// System calls outside the slow path.
    pub(crate) worker_syscalls: u64,
    /// Page faults that the backend saw.
    pub(crate) worker_page_faults: u64,
    /// Page faults that the kernel counted, those of visits too.
    pub(crate) kernel_page_faults: u64,
    pub(crate) slow_path: SlowPath,
    pub(crate) lost_time: LostTime,
    pub(crate) arena_allocations: u64,
    pub(crate) arena_exhausted: u64,
    pub(crate) diagnostics: u64,
    pub(crate) diagnostics_lost: u64,
}

/// Kernel entries.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Entries {
    pub(crate) total: u64,
    pub(crate) per_second: f64,
    /// Every cause, also those that never happened.
    pub(crate) by_cause: BTreeMap<&'static str, Count>,
}

/// Kernel entries of one cause.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Count {
    pub(crate) total: u64,
    pub(crate) per_second: f64,
}

/// Visits to the kernel by permission.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct SlowPath {
    pub(crate) visits: u64,
    pub(crate) visits_per_second: f64,
    /// Visits that the budget refused.
    pub(crate) refused: u64,
    /// Without a value before the first visit, and where the TSC is not trusted.
    pub(crate) longest_ns: Option<u64>,
    pub(crate) mean_ns: Option<u64>,
}

/// Time that the worker lost.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct LostTime {
    /// It wanted to run, and something else ran.
    pub(crate) run_delay_ns: u64,
    /// The hypervisor had the CPU: a gap.
    pub(crate) steal_ns: u64,
    /// Both of them, lost in each second of the interval.
    pub(crate) ns_per_second: f64,
}

fn backend_name(value: u64) -> &'static str {
    match u32::try_from(value).ok().and_then(Backend::from_number) {
        Some(Backend::Auto) => "none",
        Some(backend) => backend.name(),
        None => "unknown",
    }
}

impl Entries {
    fn new(block: &Block<'_>, prefix: &str) -> Self {
        let mut all = Self::default();
        for cause in Cause::ALL {
            let name = format!("{prefix}_{}", cause.name());
            let count = Count { total: block.value(&name), per_second: block.rate(&name) };
            // Wraps, as counters do.
            all.total = all.total.wrapping_add(count.total);
            all.per_second += count.per_second;
            all.by_cause.insert(cause.name(), count);
        }
        all
    }

    /// `2: syscall 1 · page_fault 1`, the most frequent first; `0` when there were none.
    fn in_words(&self) -> String {
        let mut causes: Vec<_> = self.by_cause.iter().filter(|(_, count)| count.total > 0).collect();
        causes.sort_by_key(|(_, count)| std::cmp::Reverse(count.total));
        let cause = |(name, count): (&&str, &Count)| match count.per_second {
            0.0 => format!("{name} {}", grouped(count.total)),
            rate => format!("{name} {} ({}/s)", grouped(count.total), scaled(rate).trim_end()),
        };
        match causes.is_empty() {
            true => grouped(self.total),
            false => {
                let causes: Vec<String> = causes.into_iter().map(cause).collect();
                format!("{}: {}", grouped(self.total), causes.join(" · "))
            }
        }
    }
}

impl Isolation {
    /// From the "isolation" block of a worker.
    pub(super) fn new(block: &Block<'_>) -> Self {
        let visits = block.value("slow_path_visits");
        let known = |ns: u64| (visits > 0 && ns > 0).then_some(ns);
        Self {
            backend: backend_name(block.value("isolation_backend")),
            state: State::from_number(block.value("isolation_state")).map_or("unknown", State::name),
            armed: block.value("armed"),
            breaches: Entries::new(block, "breach"),
            races: block.value("isolation_races"),
            interruptions: Entries::new(block, "interruption"),
            worker_syscalls: block.value("worker_syscalls"),
            worker_page_faults: block.value("worker_page_faults"),
            kernel_page_faults: block.value("kernel_page_faults"),
            slow_path: SlowPath {
                visits,
                visits_per_second: block.rate("slow_path_visits"),
                refused: block.value("slow_path_refused"),
                longest_ns: known(block.value("slow_path_longest_ns")),
                mean_ns: known(block.value("slow_path_ns").checked_div(visits).unwrap_or(0)),
            },
            lost_time: LostTime {
                run_delay_ns: block.value("run_delay_ns"),
                steal_ns: block.value("steal_ns"),
                ns_per_second: block.rate("run_delay_ns") + block.rate("steal_ns"),
            },
            arena_allocations: block.value("arena_allocations"),
            arena_exhausted: block.value("arena_exhausted"),
            diagnostics: block.value("diagnostics"),
            diagnostics_lost: block.value("diagnostics_lost"),
        }
    }

    /// A cell for each of [`HEADER`], but for the worker's name.
    fn cells(&self) -> [String; 8] {
        let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), short_time);
        [
            self.backend.to_owned(),
            self.state.to_owned(),
            grouped(self.breaches.total),
            grouped(self.interruptions.total),
            scaled(self.interruptions.per_second).trim_end().to_owned(),
            grouped(self.slow_path.visits),
            time(self.slow_path.longest_ns),
            short_time(self.lost_time.ns_per_second as u64),
        ]
    }

    /// Everything, in lines of a title and what there is to say. Counts that mean little while they are
    /// zero are left out.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), short_time);
        let times = |n: u64| if n == 1 { "once".to_owned() } else { format!("{} times", grouped(n)) };
        let SlowPath { visits, refused, longest_ns, mean_ns, .. } = self.slow_path;
        let mut lines = vec![
            (
                "isolation",
                format!("backend {} · state {} · armed {}", self.backend, self.state, times(self.armed)),
            ),
            ("breaches", self.breaches.in_words()),
            ("interruptions", self.interruptions.in_words()),
            (
                "slow path",
                format!(
                    "{} visits · mean {} · longest {}{}",
                    grouped(visits),
                    time(mean_ns),
                    time(longest_ns),
                    if refused > 0 { format!(" · refused {}", grouped(refused)) } else { String::new() }
                ),
            ),
            (
                "lost time",
                format!(
                    "run delay {} · steal {}",
                    short_time(self.lost_time.run_delay_ns),
                    short_time(self.lost_time.steal_ns)
                ),
            ),
        ];
        let mut more = |title, counts: &[(&str, u64)]| {
            if counts.iter().any(|(_, count)| *count > 0) {
                let counts: Vec<String> =
                    counts.iter().map(|(name, count)| format!("{name} {}", grouped(*count))).collect();
                lines.push((title, counts.join(" · ")));
            }
        };
        more("races", &[("interrupts right after arming", self.races)]);
        more("page faults", &[("caught", self.worker_page_faults), ("counted", self.kernel_page_faults)]);
        more("arena", &[("allocations", self.arena_allocations), ("exhausted", self.arena_exhausted)]);
        more("diagnostics", &[("records", self.diagnostics), ("lost", self.diagnostics_lost)]);
        lines
    }
}

/// Columns about isolation.
pub(super) const HEADER: [&str; 9] =
    ["worker", "backend", "state", "breaches", "interrupted", "/s", "visits", "longest", "lost/s"];

/// A row for each worker.
pub(super) fn rows(view: &super::View) -> Vec<[String; 9]> {
    let row = |worker: &super::view::Worker| {
        let none = || ["none", "-", "-", "-", "-", "-", "-", "-"].map(str::to_owned);
        let [a, b, c, d, e, f, g, h] = worker.isolation.as_ref().map_or_else(none, Isolation::cells);
        [worker.name.clone(), a, b, c, d, e, f, g, h]
    };
    view.workers.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::super::view::{Snapshot, view};
    use super::*;
    use isoplane::memory::stats::{Block, SegmentBuilder};
    use isoplane::observer::field;
    use std::time::Duration;

    /// What is made of a worker's block after `write` has moved it for two seconds.
    fn shown(write: impl Fn(&Block)) -> (super::super::View, String) {
        let mut builder = SegmentBuilder::default();
        let id = builder.block("w0", "isolation", field::fields());
        let segment = builder.build("isolated").unwrap();
        let reader = segment.reader().unwrap();
        let mut before = Snapshot::of(&reader);
        write(&segment.block(id).unwrap());
        let now = Snapshot::of(&reader);
        before.shift(&now, Duration::from_secs(2));
        let view = view(&reader, &before, &now);
        let mut text = Vec::new();
        super::super::text::write(&mut text, &view).unwrap();
        (view, String::from_utf8(text).unwrap())
    }

    fn cause(first: usize, cause: Cause) -> usize {
        first + usize::from(cause.number())
    }

    #[test]
    fn a_block_becomes_counts_by_cause_with_rates() {
        let (view, text) = shown(|block| {
            for (at, value) in [
                (field::BACKEND, 2),
                (field::STATE, 1),
                (field::ARMED, 3),
                (field::SYSCALLS, 2),
                (field::VISITS, 4),
                (field::REFUSED, 1),
                (field::VISIT_NS, 8000),
                (field::LONGEST_VISIT_NS, 5000),
                (field::RUN_DELAY_NS, 3_000_000),
                (field::STEAL_NS, 10_000_000),
                (field::RECORDS, 12),
                (cause(field::BREACHES, Cause::Syscall), 2),
                (cause(field::BREACHES, Cause::PageFault), 1),
                (cause(field::INTERRUPTIONS, Cause::TimerTick), 500),
                (cause(field::INTERRUPTIONS, Cause::Unknown), 1),
            ] {
                block.set(at, value);
            }
        });
        let json = serde_json::to_value(&view).unwrap();
        let isolation = &json["workers"][0]["isolation"];
        assert_eq!((&isolation["backend"], &isolation["state"]), (&"dispatch".into(), &"armed".into()));
        assert_eq!(isolation["breaches"]["total"], 3);
        assert_eq!(isolation["breaches"]["by_cause"]["syscall"]["total"], 2);
        assert_eq!(isolation["breaches"]["by_cause"]["nmi"]["total"], 0);
        assert_eq!(isolation["interruptions"]["total"], 501);
        assert_eq!(isolation["interruptions"]["per_second"], 250.5);
        assert_eq!(isolation["interruptions"]["by_cause"]["timer_tick"]["per_second"], 250.0);
        assert_eq!(isolation["interruptions"]["by_cause"].as_object().unwrap().len(), Cause::COUNT);
        assert_eq!(isolation["slow_path"]["mean_ns"], 2000);
        assert_eq!(isolation["slow_path"]["longest_ns"], 5000);
        assert_eq!(isolation["lost_time"]["ns_per_second"], 6_500_000.0);
        for part in [
            "backend dispatch · state armed · armed 3 times",
            "breaches: 3: syscall 2 (1/s) · page_fault 1 (0.50/s)",
            "interruptions: 501: timer_tick 500 (250/s) · unknown 1 (0.50/s)",
            "4 visits · mean 2.00 µs · longest 5.00 µs · refused 1",
            "run delay 3.00 ms · steal 10.0 ms",
            "diagnostics: records 12 · lost 0",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        assert!(!text.contains("arena"), "what never happened is left out:\n{text}");
    }

    #[test]
    fn zero_breaches_come_with_the_backend_and_the_interruptions() {
        for (number, name) in [(0, "none"), (1, "advisory"), (2, "dispatch"), (3, "task-isolation")] {
            let (view, text) = shown(|block| block.set(field::BACKEND, number));
            let isolation = view.workers[0].isolation.as_ref().unwrap();
            assert_eq!((isolation.backend, isolation.breaches.total), (name, 0));
            assert_eq!(isolation.slow_path.mean_ns, None);
            let row = text.lines().find(|line| line.contains("w0") && line.contains(name)).unwrap();
            let cells: Vec<&str> = row.split('┆').map(|cell| cell.trim_matches([' ', '│'])).collect();
            assert_eq!(cells, ["w0", name, "off", "0", "0", "0", "0", "-", "0 ns"], "{text}");
            assert!(text.contains(&format!("w0: isolation: backend {name}")), "{text}");
            assert!(text.contains("w0: interruptions: 0\n"), "{text}");
        }
    }

    #[test]
    fn a_writer_may_say_anything() {
        let (view, text) = shown(|block| (0..field::fields().len()).for_each(|at| block.set(at, u64::MAX)));
        let isolation = view.workers[0].isolation.as_ref().unwrap();
        assert_eq!((isolation.backend, isolation.state), ("unknown", "unknown"));
        assert_eq!(isolation.breaches.total, u64::MAX.wrapping_mul(Cause::COUNT as u64));
        assert!(text.contains("unknown"));
    }
}
