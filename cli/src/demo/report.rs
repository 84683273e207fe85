//! What the demo found, as tables and as JSON.

use super::percentiles;
use crate::cpus::Cpus;
use crate::format::{bps, bytes, grouped, grouped_signed, pps, short_time};
use crate::top::{Snapshot, View, table, view};
use hdrhistogram::Histogram;
use isoplane::isolation::{Cause, Interruptions, Status};
use isoplane::memory::stats::SegmentReader;
use isoplane::{Kicks, StopReport};
use isoplane_lab::traffic::{FlowReport, round_trips};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

/// Drops that the bridge was told to make: not losses.
const POLICY: [&str; 3] = ["policy", "vlan", "storm"];

/// Why the demo ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// Its time was over.
    Time,
    /// Somebody asked it to end.
    Signal,
    /// The dataplane ended.
    Failure(String),
}

/// The two ends, for the picture.
#[derive(Debug, Clone)]
pub(super) struct Scenery {
    /// What is at each end.
    pub(super) ends: [String; 2],
    /// What connects an end with its port.
    pub(super) wire: &'static str,
}

/// What a report is made from.
pub(super) struct Facts<'a> {
    pub(super) driver: &'a str,
    pub(super) cpus: &'a Cpus,
    pub(super) kicks: Kicks,
    pub(super) elapsed: Duration,
    pub(super) ended: Ended,
    pub(super) reader: &'a SegmentReader,
    pub(super) flows: &'a [FlowReport],
    pub(super) stop: &'a StopReport,
    pub(super) status: &'a Status,
}

/// What the demo found. Times are in microseconds, rates per second.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    driver: String,
    placement: &'static str,
    /// Who told the kernel that rings had work: `inline` (the worker), `kicker`, or `none` where no kernel
    /// needs to be told.
    kicks: &'static str,
    worker_cpu: Option<usize>,
    #[serde(flatten)]
    isolation: Isolation,
    worker_restarts: u64,
    /// Why it ended: `time`, `signal` or `failure`.
    ended: &'static str,
    seconds: f64,
    frames_received: u64,
    frames_forwarded: u64,
    bytes_forwarded: u64,
    /// In, minus out, minus drops by policy.
    frames_lost: i64,
    pps: f64,
    bits_per_second: f64,
    /// Half of the ICMP and UDP round trips took no longer.
    rtt_p50_us: Option<f64>,
    /// 99 of 100 took no longer.
    rtt_p99_us: Option<f64>,
    /// Frames dropped, by reason; those of [`POLICY`] are not lost.
    drops: BTreeMap<String, u64>,
    ports: Vec<PortLine>,
    traffic: Vec<FlowLine>,
    /// Frames of the pool that nobody had in the end; anything but 0 is a leak.
    pool_frames_missing: i64,
    /// What went wrong, in words; the exit code is 0 when this is empty.
    pub(super) problems: Vec<String>,
}

/// How the worker was isolated, and what came of it.
#[derive(Debug, Serialize)]
struct Isolation {
    /// What enforced it.
    backend: &'static str,
    /// Kernel entries that were caught, by cause.
    breaches: BTreeMap<&'static str, u64>,
    /// Kernel entries that were only seen, by cause.
    interruptions: BTreeMap<&'static str, u64>,
    /// Visits to the kernel by permission.
    slow_path_visits: u64,
    /// System calls that the worker made outside of those.
    worker_syscalls: u64,
    /// Page faults that it took.
    worker_page_faults: u64,
}

impl Isolation {
    fn of(status: &Status) -> Self {
        let now = status.snapshot();
        let all = |counts: &Interruptions| counts.iter().map(|(cause, n)| (cause.name(), n)).collect();
        let seen = |cause| now.breaches.of(cause) + now.allowed.of(cause);
        Self {
            backend: status.backend().map_or("none", |backend| backend.name()),
            breaches: all(&now.breaches),
            interruptions: all(&now.interruptions),
            slow_path_visits: now.slow_path_visits,
            worker_syscalls: seen(Cause::Syscall),
            worker_page_faults: seen(Cause::PageFault),
        }
    }

    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let list = |counts: &BTreeMap<&str, u64>| {
            let some: Vec<String> = counts
                .iter()
                .filter(|(_, n)| **n > 0)
                .map(|(cause, n)| format!("{} {}", grouped(*n), cause.replace('_', " ")))
                .collect();
            if some.is_empty() { "none".to_owned() } else { some.join(", ") }
        };
        writeln!(out, "isolation by {}: breaches: {}", self.backend, list(&self.breaches))?;
        writeln!(out, "  interruptions seen on its CPU: {}", list(&self.interruptions))?;
        writeln!(
            out,
            "  system calls {} · page faults {} · slow-path visits {}",
            grouped(self.worker_syscalls),
            grouped(self.worker_page_faults),
            grouped(self.slow_path_visits)
        )
    }
}

#[derive(Debug, Serialize)]
struct PortLine {
    name: String,
    rx_frames: u64,
    rx_bytes: u64,
    tx_frames: u64,
    tx_bytes: u64,
}

#[derive(Debug, Serialize)]
struct FlowLine {
    protocol: &'static str,
    sent: u64,
    sent_bytes: u64,
    verified: u64,
    verified_bytes: u64,
    lost: u64,
    /// Messages with wrong bytes, at either end.
    corrupt: u64,
    late: u64,
    retransmitted: u64,
    rtt_p50_us: Option<f64>,
    rtt_p99_us: Option<f64>,
}

fn micros(nanos: Option<u64>) -> Option<f64> {
    nanos.map(|ns| ns as f64 / 1000.0)
}

impl Report {
    pub(super) fn new(facts: &Facts<'_>) -> Self {
        let now = Snapshot::of(facts.reader);
        let view = view(facts.reader, &now, &now);
        let ports: Vec<PortLine> = view
            .workers
            .iter()
            .flat_map(|worker| &worker.ports)
            .map(|port| PortLine {
                name: port.name.clone(),
                rx_frames: port.rx_frames,
                rx_bytes: port.rx_bytes,
                tx_frames: port.tx_frames,
                tx_bytes: port.tx_bytes,
            })
            .collect();
        let sum = |of: fn(&PortLine) -> u64| ports.iter().map(of).sum::<u64>();
        let (received, forwarded) = (sum(|p| p.rx_frames), sum(|p| p.tx_frames));
        let bytes_forwarded = sum(|p| p.tx_bytes);
        let drops = all_drops(&view);
        let by_policy: u64 = POLICY.iter().filter_map(|reason| drops.get(*reason)).sum();
        let seconds = facts.elapsed.as_secs_f64().max(1e-9);
        let (p50, p99) = percentiles(&round_trips(facts.flows));
        let mut report = Self {
            driver: facts.driver.to_owned(),
            placement: "process",
            kicks: match facts.kicks {
                _ if !needs_kicks(facts.driver) => "none",
                Kicks::Kicker => "kicker",
                Kicks::Inline => "inline",
            },
            worker_cpu: facts.cpus.worker,
            isolation: Isolation::of(facts.status),
            worker_restarts: view.workers.iter().map(|w| w.restarts).sum(),
            ended: match facts.ended {
                Ended::Time => "time",
                Ended::Signal => "signal",
                Ended::Failure(_) => "failure",
            },
            seconds,
            frames_received: received,
            frames_forwarded: forwarded,
            bytes_forwarded,
            frames_lost: received.cast_signed() - forwarded.cast_signed() - by_policy.cast_signed(),
            pps: forwarded as f64 / seconds,
            bits_per_second: bytes_forwarded as f64 * 8.0 / seconds,
            rtt_p50_us: micros(p50),
            rtt_p99_us: micros(p99),
            drops,
            ports,
            traffic: facts.flows.iter().map(flow_line).collect(),
            pool_frames_missing: facts.stop.pools.iter().map(|pool| pool.balance.missing).sum(),
            problems: Vec::new(),
        };
        report.problems = report.find_problems(facts);
        report
    }

    fn find_problems(&self, facts: &Facts<'_>) -> Vec<String> {
        let mut problems = Vec::new();
        if let Ended::Failure(reason) = &facts.ended {
            problems.push(reason.clone());
        }
        if self.frames_forwarded == 0 {
            problems.push("no frame was forwarded".to_owned());
        }
        if self.frames_lost != 0 {
            problems.push(format!("{} frames were lost", grouped_signed(self.frames_lost)));
        }
        let breaches: u64 = self.isolation.breaches.values().sum();
        if breaches > 0 {
            problems.push(format!("the worker's isolation was broken, {breaches} times"));
        }
        if self.worker_restarts > 0 {
            let times = if self.worker_restarts == 1 { "once" } else { "more than once" };
            problems.push(format!("the worker died and was started again, {times}"));
        }
        for flow in facts.flows {
            let (name, counts) = (flow.flow.protocol(), flow.counts);
            if counts.verified == 0 {
                problems.push(format!("{name}: nothing came through"));
            }
            if counts.lost > 0 {
                let what = if name == "TCP" { "bytes were" } else { "requests were" };
                problems.push(format!("{name}: {} {what} lost", grouped(counts.lost)));
            }
            if counts.corrupt > 0 {
                problems.push(format!("{name}: {} messages were corrupt", grouped(counts.corrupt)));
            }
            problems.extend(flow.errors.iter().cloned());
        }
        if self.pool_frames_missing != 0 {
            problems.push(format!("{} frames of the pool are missing", self.pool_frames_missing));
        }
        if facts.stop.forced {
            problems.push("the worker did not stop in time and was killed".to_owned());
        }
        problems
    }

    pub(super) fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        writeln!(out)
    }

    pub(super) fn write_tables(&self, out: &mut impl Write) -> io::Result<()> {
        let time = |us: Option<f64>| us.map_or_else(|| "-".to_owned(), |us| short_time((us * 1e3) as u64));
        let mut ports = table(&["port", "frames in", "frames out", "bytes out", "out/s", "rate out"]);
        for port in &self.ports {
            ports.add_row([
                port.name.clone(),
                grouped(port.rx_frames),
                grouped(port.tx_frames),
                bytes(port.tx_bytes),
                pps(port.tx_frames as f64 / self.seconds),
                bps(port.tx_bytes as f64 * 8.0 / self.seconds),
            ]);
        }
        ports.add_row([
            "total".to_owned(),
            grouped(self.frames_received),
            grouped(self.frames_forwarded),
            bytes(self.bytes_forwarded),
            pps(self.pps),
            bps(self.bits_per_second),
        ]);
        writeln!(out, "{ports}")?;
        let mut traffic =
            table(&["traffic", "sent", "verified", "payload", "lost", "corrupt", "rtt p50", "rtt p99"]);
        for flow in &self.traffic {
            // A stream has no messages: what one end writes at once, the other may read in pieces.
            let stream = flow.protocol == "TCP";
            traffic.add_row([
                flow.protocol.to_owned(),
                if stream { bytes(flow.sent_bytes) } else { grouped(flow.sent) },
                if stream { bytes(flow.verified_bytes) } else { grouped(flow.verified) },
                bytes(flow.sent_bytes + if stream { 0 } else { flow.verified_bytes }),
                grouped(flow.lost),
                grouped(flow.corrupt),
                time(flow.rtt_p50_us),
                time(flow.rtt_p99_us),
            ]);
        }
        writeln!(out, "{traffic}")?;
        let happened: Vec<_> = self.drops.iter().filter(|(_, count)| **count > 0).collect();
        if !happened.is_empty() {
            let mut drops = table(&["dropped because", "frames"]);
            for (reason, count) in happened {
                let policy = if POLICY.contains(&reason.as_str()) { " (as configured)" } else { "" };
                drops.add_row([format!("{reason}{policy}"), grouped(*count)]);
            }
            writeln!(out, "{drops}")?;
        }
        writeln!(
            out,
            "{} frames forwarded in {:.1} s · {} · {}",
            grouped(self.frames_forwarded),
            self.seconds,
            pps(self.pps),
            bps(self.bits_per_second),
        )?;
        writeln!(
            out,
            "round trips: rtt p50 {} · p99 {} · {} lost{}",
            time(self.rtt_p50_us),
            time(self.rtt_p99_us),
            grouped_signed(self.frames_lost),
            if self.drops.values().all(|n| *n == 0) { " · no drops" } else { "" },
        )?;
        self.isolation.write(out)
    }
}

fn flow_line(flow: &FlowReport) -> FlowLine {
    let times: &Histogram<u64> = &flow.round_trips;
    let (p50, p99) = percentiles(times);
    FlowLine {
        protocol: flow.flow.protocol(),
        sent: flow.counts.sent,
        sent_bytes: flow.counts.sent_bytes,
        verified: flow.counts.verified,
        verified_bytes: flow.counts.verified_bytes,
        lost: flow.counts.lost,
        corrupt: flow.counts.corrupt,
        late: flow.counts.late,
        retransmitted: flow.counts.retransmitted,
        rtt_p50_us: micros(p50),
        rtt_p99_us: micros(p99),
    }
}

/// Every reason, also those that never happened: the worker's, then what kernel or device counted.
fn all_drops(view: &View) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for (reason, count) in view.workers.iter().flat_map(|w| &w.drops) {
        *all.entry(reason.clone()).or_insert(0) += count;
    }
    for port in &view.ports {
        for reason in ["rx_ring_full", "rx_no_frames", "rx_dropped", "tx_invalid"] {
            *all.entry(reason.to_owned()).or_insert(0) += port.counts.get(reason).copied().unwrap_or(0);
        }
    }
    all
}

fn needs_kicks(driver: &str) -> bool {
    driver.starts_with("af_xdp")
}

/// Says what is about to run, with a picture.
pub(super) fn headline(driver: &str, cpus: &Cpus, kicks: Kicks, scenery: &Scenery, seconds: u64) -> String {
    let place = cpus.worker.map_or_else(|| "any CPU".to_owned(), |cpu| format!("CPU {cpu}"));
    let kicks = match (needs_kicks(driver), kicks, cpus.kicker) {
        (false, ..) => String::new(),
        (true, Kicks::Kicker, Some(cpu)) => format!(" · kicker on CPU {cpu}"),
        (true, Kicks::Kicker, None) => " · kicker".to_owned(),
        (true, Kicks::Inline, _) => " · inline kicks".to_owned(),
    };
    let [left, right] = &scenery.ends;
    let wire = scenery.wire;
    format!(
        "isoplane demo · {driver} · worker process on {place}{kicks} · {seconds} s\n\n  \
         {left} ──{wire}── [ bridge ] ──{wire}── {right}\n\n"
    )
}
