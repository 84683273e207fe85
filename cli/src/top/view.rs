//! A statistics segment as a tree: workers with their ports, ports, the kicker; with rates.

use super::isolation::Isolation;
use isoplane::WorkerState;
use isoplane::drivers::LinkState;
use isoplane::memory::stats::{Kind, Row, SegmentReader};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Everything a segment says at one time.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    at: Instant,
    rows: Vec<Row>,
}

impl Snapshot {
    /// Reads it now.
    pub(crate) fn of(reader: &SegmentReader) -> Self {
        Self { at: Instant::now(), rows: reader.rows() }
    }

    /// Pretends that it was taken some time before `later`.
    #[cfg(test)]
    pub(super) fn shift(&mut self, later: &Self, by: Duration) {
        self.at = later.at - by;
    }
}

/// A dataplane.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct View {
    /// Its name.
    pub(crate) name: String,
    /// The program.
    pub(crate) pid: u32,
    /// Seconds since it was launched.
    pub(crate) uptime_s: f64,
    /// Seconds that the rates are an average over.
    pub(crate) interval_s: f64,
    /// Frames received by all workers, a second.
    pub(crate) rx_pps: f64,
    /// Frames sent by all workers, a second.
    pub(crate) tx_pps: f64,
    /// Its workers.
    pub(crate) workers: Vec<Worker>,
    /// Its ports, as the program sees them.
    pub(crate) ports: Vec<Port>,
    /// Its kicker, when it has one.
    pub(crate) kicker: Option<Kicker>,
}

/// A worker.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) state: &'static str,
    /// 0 for one in a thread.
    pub(crate) pid: u64,
    pub(crate) restarts: u64,
    pub(crate) turns: u64,
    pub(crate) busy_turns: u64,
    pub(crate) turns_per_second: f64,
    /// Turns that brought something, in percent of those in the interval.
    pub(crate) busy_percent: f64,
    pub(crate) free_frames: u64,
    /// Frames dropped, by reason.
    pub(crate) drops: BTreeMap<String, u64>,
    pub(crate) drops_per_second: f64,
    pub(crate) ports: Vec<WorkerPort>,
    /// The app's own counters and gauges.
    pub(crate) app: BTreeMap<String, u64>,
    /// Without a value in segments of programs that know of no isolation.
    pub(crate) isolation: Option<Isolation>,
}

/// A port as one of its workers sees it.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct WorkerPort {
    pub(crate) name: String,
    pub(crate) rx_frames: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_frames: u64,
    pub(crate) tx_bytes: u64,
    pub(crate) rx_pps: f64,
    pub(crate) tx_pps: f64,
    pub(crate) rx_bits_per_second: f64,
    pub(crate) tx_bits_per_second: f64,
    /// Counters beyond these.
    #[serde(flatten)]
    pub(crate) more: BTreeMap<String, u64>,
}

/// A port as the program sees it.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Port {
    pub(crate) name: String,
    pub(crate) link: &'static str,
    /// What the driver, the kernel or the device counted.
    #[serde(flatten)]
    pub(crate) counts: BTreeMap<String, u64>,
}

/// The kicker.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Kicker {
    pub(crate) kicks: u64,
    pub(crate) errors: u64,
    pub(crate) yields: u64,
    pub(crate) kicks_per_second: f64,
    /// Half of the kicks waited no longer than this; buckets are powers of two.
    pub(crate) delay_p50_ns: Option<u64>,
    /// 99 of 100 waited no longer than this.
    pub(crate) delay_p99_ns: Option<u64>,
}

const fn state_name(value: u64) -> &'static str {
    const NAMES: [(WorkerState, &str); 6] = [
        (WorkerState::Starting, "starting"),
        (WorkerState::Running, "running"),
        (WorkerState::Draining, "draining"),
        (WorkerState::Stopped, "stopped"),
        (WorkerState::Dead, "dead"),
        (WorkerState::GivenUp, "given up"),
    ];
    let mut at = 0;
    while at < NAMES.len() {
        if NAMES[at].0 as u64 == value {
            return NAMES[at].1;
        }
        at += 1;
    }
    "unknown"
}

const fn link_name(value: u64) -> &'static str {
    const NAMES: [(LinkState, &str); 3] =
        [(LinkState::Up, "up"), (LinkState::Down, "down"), (LinkState::Gone, "gone")];
    let mut at = 0;
    while at < NAMES.len() {
        if NAMES[at].0 as u64 == value {
            return NAMES[at].1;
        }
        at += 1;
    }
    "unknown"
}

/// The upper bound that `percent` of a histogram's values stay within.
fn percentile(buckets: &[u64], percent: u64) -> Option<u64> {
    // Wider than any sum of what a writer may have put there.
    let total: u128 = buckets.iter().map(|count| u128::from(*count)).sum();
    let wanted = (total * u128::from(percent)).div_ceil(100);
    let mut seen = 0;
    (total > 0).then_some(())?;
    buckets.iter().enumerate().find_map(|(bits, count)| {
        seen += u128::from(*count);
        (seen >= wanted).then(|| (1_u64 << bits.min(63)) - 1)
    })
}

/// The rows of one block, and how its counters moved.
pub(super) struct Block<'a> {
    worker: &'a str,
    port: &'a str,
    rows: Vec<(&'a Row, u64)>,
    /// Place of each name in `rows`: a writer may have made very many.
    places: HashMap<&'a str, usize>,
    interval: f64,
}

impl<'a> Block<'a> {
    fn push(&mut self, row: &'a Row, moved: u64) {
        self.places.insert(&row.name, self.rows.len());
        self.rows.push((row, moved));
    }

    fn find(&self, name: &str) -> Option<(&'a Row, u64)> {
        self.places.get(name).and_then(|at| self.rows.get(*at)).copied()
    }

    fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    pub(super) fn value(&self, name: &str) -> u64 {
        self.find(name).map_or(0, |(row, _)| first(row))
    }

    fn moved(&self, name: &str) -> u64 {
        self.find(name).map_or(0, |(_, moved)| moved)
    }

    pub(super) fn rate(&self, name: &str) -> f64 {
        self.moved(name) as f64 / self.interval
    }

    /// All values whose name starts with `prefix`, without it, but those named.
    fn rest(&self, prefix: &str, but: &[&str]) -> BTreeMap<String, u64> {
        let plain = self.rows.iter().filter(|(row, _)| row.kind != Kind::Log2Histogram);
        plain
            .filter(|(row, _)| !but.contains(&row.name.as_str()))
            .filter_map(|(row, _)| Some((row.name.strip_prefix(prefix)?.to_owned(), first(row))))
            .collect()
    }
}

fn first(row: &Row) -> u64 {
    row.values.first().copied().unwrap_or(0)
}

/// A sum that is 0 without anything to add: `sum` would make that -0.
fn total(rates: impl Iterator<Item = f64>) -> f64 {
    rates.fold(0.0, |sum, rate| sum + rate)
}

/// The tree, with rates between two snapshots of the same segment.
pub(crate) fn view(reader: &SegmentReader, before: &Snapshot, now: &Snapshot) -> View {
    let interval = now.at.saturating_duration_since(before.at).as_secs_f64().max(1e-9);
    let mut blocks: Vec<Block<'_>> = Vec::new();
    for (row, old) in now.rows.iter().zip(&before.rows) {
        // A counter that went back belongs to a worker that was started again.
        let moved = first(row).saturating_sub(first(old));
        // Rows come block by block; two queues of one port have blocks with the same labels.
        match blocks.last_mut().filter(|b| b.worker == row.worker && b.port == row.port && !b.has(&row.name))
        {
            Some(block) => block.push(row, moved),
            None => {
                let (rows, places) = (Vec::new(), HashMap::new());
                let mut block = Block { worker: &row.worker, port: &row.port, rows, places, interval };
                block.push(row, moved);
                blocks.push(block);
            }
        }
    }
    let launched = UNIX_EPOCH + Duration::from_nanos(reader.created_unix_ns());
    let mut view = View {
        name: reader.name().to_owned(),
        pid: reader.pid(),
        uptime_s: SystemTime::now().duration_since(launched).unwrap_or_default().as_secs_f64(),
        interval_s: interval,
        rx_pps: 0.0,
        tx_pps: 0.0,
        workers: Vec::new(),
        ports: Vec::new(),
        kicker: None,
    };
    for block in &blocks {
        if block.worker.is_empty() {
            view.program_block(block);
        } else {
            view.worker_block(block);
        }
    }
    let sum = |of: fn(&WorkerPort) -> f64| total(view.workers.iter().flat_map(|w| &w.ports).map(of));
    (view.rx_pps, view.tx_pps) = (sum(|p| p.rx_pps), sum(|p| p.tx_pps));
    view
}

impl View {
    fn program_block(&mut self, block: &Block<'_>) {
        if block.has("kicker_kicks") {
            let delay = block.find("kicker_delay_ns").map_or(&[][..], |(row, _)| &row.values);
            // Without anything to kick there is no kicker, and its block stays zero.
            let turned = block.value("kicker_kicks") > 0 || block.value("kicker_yields") > 0;
            self.kicker = turned.then(|| Kicker {
                kicks: block.value("kicker_kicks"),
                errors: block.value("kicker_errors"),
                yields: block.value("kicker_yields"),
                kicks_per_second: block.rate("kicker_kicks"),
                delay_p50_ns: percentile(delay, 50),
                delay_p99_ns: percentile(delay, 99),
            });
        } else if block.has("link") {
            self.ports.push(Port {
                name: block.port.to_owned(),
                link: link_name(block.value("link")),
                counts: block.rest("port_", &[]),
            });
        }
    }

    fn worker_block(&mut self, block: &Block<'_>) {
        let at = self.workers.iter().position(|w| w.name == block.worker).unwrap_or_else(|| {
            let name = block.worker.to_owned();
            self.workers.push(Worker { name, state: "unknown", ..Worker::default() });
            self.workers.len() - 1
        });
        let worker = &mut self.workers[at];
        if block.has("turns") {
            worker.turns = block.value("turns");
            worker.busy_turns = block.value("busy_turns");
            worker.turns_per_second = block.rate("turns");
            let turns = block.moved("turns").max(1);
            worker.busy_percent = block.moved("busy_turns") as f64 * 100.0 / turns as f64;
            worker.free_frames = block.value("free_frames");
            worker.drops = block.rest("drop_", &[]);
            let dropped = worker.drops.keys().map(|reason| block.rate(&format!("drop_{reason}")));
            worker.drops_per_second = total(dropped);
        } else if block.has("rx_frames") {
            let known = ["rx_frames", "rx_bytes", "tx_frames", "tx_bytes"];
            worker.ports.push(WorkerPort {
                name: block.port.to_owned(),
                rx_frames: block.value("rx_frames"),
                rx_bytes: block.value("rx_bytes"),
                tx_frames: block.value("tx_frames"),
                tx_bytes: block.value("tx_bytes"),
                rx_pps: block.rate("rx_frames"),
                tx_pps: block.rate("tx_frames"),
                rx_bits_per_second: block.rate("rx_bytes") * 8.0,
                tx_bits_per_second: block.rate("tx_bytes") * 8.0,
                more: block.rest("", &known),
            });
        } else if block.has("isolation_backend") {
            worker.isolation = Some(Isolation::new(block));
        } else if block.has("state") {
            worker.state = state_name(block.value("state"));
            worker.pid = block.value("pid");
            worker.restarts = block.value("restarts");
        } else if block.port == "app" {
            worker.app = block.rest("", &[]);
        }
    }

    /// Frames that all workers dropped, by reason; reasons that never happened are left out.
    pub(crate) fn drops(&self) -> BTreeMap<String, u64> {
        let mut all: BTreeMap<String, u64> = BTreeMap::new();
        // Wraps, as counters do: any writer's numbers are shown.
        let add = |all: &mut BTreeMap<String, u64>, reason: String, count: u64| {
            let sum = all.entry(reason).or_insert(0);
            *sum = sum.wrapping_add(count);
        };
        for (reason, count) in self.workers.iter().flat_map(|w| &w.drops).filter(|(_, n)| **n > 0) {
            add(&mut all, reason.clone(), *count);
        }
        // What the kernel or the device dropped before a worker could see it.
        for port in &self.ports {
            for reason in ["rx_ring_full", "rx_no_frames", "rx_dropped", "tx_invalid"] {
                let count = port.counts.get(reason).copied().unwrap_or(0);
                if count > 0 {
                    add(&mut all, format!("{reason} ({})", port.name), count);
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isoplane::memory::stats::{Field, SegmentBuilder};

    #[test]
    fn without_traffic_rates_are_zero_and_not_less() {
        let segment = SegmentBuilder::default().build("nothing").unwrap();
        let reader = segment.reader().unwrap();
        let now = Snapshot::of(&reader);
        let view = view(&reader, &now, &now);
        assert!(view.rx_pps.is_sign_positive() && view.tx_pps.is_sign_positive());
        assert_eq!(crate::format::pps(view.tx_pps), "0 pps");
    }

    #[test]
    fn any_numbers_can_be_shown() {
        let mut builder = SegmentBuilder::default();
        let counters = |names: &[&'static str]| names.iter().map(|n| Field::counter(n)).collect::<Vec<_>>();
        let mut blocks = Vec::new();
        for worker in ["w0", "w1"] {
            blocks.push(builder.block(worker, "", &counters(&["turns", "busy_turns", "drop_policy"])));
            blocks.push(builder.block(worker, "eth0", &counters(&["rx_frames", "tx_frames", "tx_bytes"])));
            blocks.push(builder.block(worker, "supervisor", &counters(&["state", "pid", "restarts"])));
        }
        blocks.push(builder.block("", "eth0", &counters(&["link", "port_rx_no_frames"])));
        let mut kicker = counters(&["kicker_kicks", "kicker_errors", "kicker_yields"]);
        kicker.push(Field::histogram("kicker_delay_ns"));
        blocks.push(builder.block("", "kicker", &kicker));
        let segment = builder.build("nasty").unwrap();
        let reader = segment.reader().unwrap();
        let before = Snapshot::of(&reader);
        for id in blocks {
            let block = segment.block(id).unwrap();
            (0..67).for_each(|at| block.set(at, u64::MAX));
        }
        let view = view(&reader, &before, &Snapshot::of(&reader));
        assert_eq!(view.drops()["policy"], u64::MAX.wrapping_mul(2));
        assert_eq!(view.kicker.as_ref().unwrap().delay_p50_ns, Some(u64::MAX >> 33));
        let mut text = Vec::new();
        crate::top::text::write(&mut text, &view).unwrap();
        assert!(String::from_utf8(text).unwrap().contains("w1"));
    }

    #[test]
    fn a_segment_becomes_a_tree_with_rates() {
        let mut builder = SegmentBuilder::default();
        let worker = builder.block(
            "w0",
            "",
            &[
                Field::counter("turns"),
                Field::counter("busy_turns"),
                Field::gauge("free_frames"),
                Field::counter("drop_policy"),
                Field::counter("drop_vlan"),
            ],
        );
        let names = ["rx_frames", "rx_bytes", "tx_frames", "tx_bytes", "kicks"];
        let port = builder.block("w0", "eth0", &names.map(Field::counter));
        let second = builder.block("w0", "eth0", &names.map(Field::counter));
        let app = builder.block("w0", "app", &[Field::counter("other")]);
        let supervisor = builder.block("w0", "supervisor", &["state", "pid", "restarts"].map(Field::gauge));
        let program = builder.block("", "eth0", &[Field::gauge("link"), Field::counter("port_rx_ring_full")]);
        let kicks = ["kicker_kicks", "kicker_errors", "kicker_yields"].map(Field::counter);
        let kicker =
            builder.block("", "kicker", &[&kicks[..], &[Field::histogram("kicker_delay_ns")]].concat());
        let segment = builder.build("tree").unwrap();
        let reader = segment.reader().unwrap();
        let block = |id| segment.block(id).unwrap();
        let set = |id, values: &[u64]| {
            for (at, value) in values.iter().enumerate() {
                block(id).set(at, *value);
            }
        };
        set(worker, &[100, 0, 50, 0, 0]);
        set(port, &[10, 1000, 0, 0, 5]);
        let mut before = Snapshot::of(&reader);
        set(worker, &[300, 50, 40, 3, 0]);
        set(port, &[30, 3000, 20, 2000, 6]);
        set(second, &[7]);
        set(app, &[1]);
        set(supervisor, &[1, 4711, 2]);
        set(program, &[2, 9]);
        set(kicker, &[3, 1, 2]);
        for delay in [100, 100, 5000] {
            block(kicker).record(3, delay);
        }
        let now = Snapshot::of(&reader);
        before.shift(&now, Duration::from_secs(2));

        let view = view(&reader, &before, &now);
        assert_eq!((view.name.as_str(), view.pid), ("tree", std::process::id()));
        assert_eq!((view.rx_pps, view.tx_pps), (13.5, 10.0));
        let w = &view.workers[0];
        assert_eq!((w.state, w.pid, w.restarts, w.free_frames), ("running", 4711, 2, 40));
        assert_eq!((w.turns_per_second, w.busy_percent, w.drops_per_second), (100.0, 25.0, 1.5));
        assert_eq!(w.ports.iter().map(|p| p.rx_frames).collect::<Vec<_>>(), [30, 7], "two queues");
        assert_eq!(w.app["other"], 1);
        assert_eq!((w.ports[0].rx_bits_per_second, w.ports[0].more["kicks"]), (8000.0, 6));
        assert_eq!((view.ports[0].link, view.ports[0].counts["rx_ring_full"]), ("down", 9));
        let kicker = view.kicker.as_ref().unwrap();
        assert_eq!((kicker.kicks, kicker.delay_p50_ns, kicker.delay_p99_ns), (3, Some(127), Some(8191)));
        let drops: Vec<_> = view.drops().into_iter().collect();
        assert_eq!(drops, [("policy".to_owned(), 3), ("rx_ring_full (eth0)".to_owned(), 9)]);
    }
}
