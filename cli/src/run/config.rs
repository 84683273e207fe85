//! What a configuration file says: its model, read from TOML.
//!
//! Contract: [`Config::read`] finds everything that can be known to be wrong without looking at the machine
//! (that is [`machine`](super::machine)'s). A [`Config`] exists only for a file without mistakes, so whoever
//! has one need not doubt it. The reference is `docs/run.md` and `docs/router.md`; a test
//! compares them with the keys that are read here.

use super::bridge;
use super::check;
use super::reader::{Change, Findings, Section, Settings, Wrong, nearest};
use super::router::{self, Router};
use super::source::{At, Mistake, Source};
use super::values::{NAME, items, name, number, string};
use isoplane::blocks::bridge::BridgeConfig;
use isoplane::drivers::vfio::{Host, IommuChoice};
use isoplane::drivers::xdp::{Attach, Want};
use isoplane::isolation::prepare::scheduling::Scheduling;
use isoplane::isolation::{Backend, Mode, OnBreach};
use isoplane::memory::HugePages;
use isoplane::{Idle, Kicks, Restart, WorkerIsolation};
use std::time::Duration;
use toml::de::DeTable;
use tracing::level_filters::LevelFilter;

/// A whole file.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) name: String,
    pub(crate) log: LevelFilter,
    pub(crate) pool: Pool,
    pub(crate) iommu: IommuChoice,
    pub(crate) ports: Vec<Port>,
    pub(crate) workers: Vec<Worker>,
    /// `None`: workers are not isolated.
    pub(crate) isolation: Option<WorkerIsolation>,
    pub(crate) kicks: Kicks,
    pub(crate) kicker_cpu: Option<At<usize>>,
    pub(crate) restart: Restart,
    pub(crate) forwarder: Forwarder,
    /// All keys, to compare with those of another version of the file.
    pub(crate) settings: Settings,
}

/// What the workers run.
#[derive(Debug, Clone)]
pub(crate) enum Forwarder {
    /// A learning bridge, whose ports are in the order of the file.
    Bridge(BridgeConfig),
    /// A router, likewise.
    Router(Box<Router>),
}

/// Memory for frames.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    /// Frames; `None`: enough for rings and workers.
    pub(crate) frames: Option<At<u32>>,
    pub(crate) chunk_bytes: u32,
    pub(crate) max_frame: At<u32>,
    pub(crate) huge_pages: HugePages,
    pub(crate) numa_node: Option<u32>,
}

/// A port.
#[derive(Debug, Clone)]
pub(crate) struct Port {
    pub(crate) name: At<String>,
    pub(crate) device: Device,
    /// Where the device is named.
    pub(crate) device_span: std::ops::Range<usize>,
    pub(crate) queues: At<u16>,
    /// The interface of the kernel (a TAP, made where there is none) that has a router's addresses on this port.
    pub(crate) host: Option<At<String>>,
}

/// What is behind a port.
#[derive(Debug, Clone)]
pub(crate) enum Device {
    /// An interface of Linux, through AF_XDP.
    Interface { name: String, zero_copy: Want, attach: Attach, rings: Option<u32>, allow_larger_mtu: bool },
    /// A PCI function, through VFIO.
    Pci(String),
    /// The other end of an interface that is made for it.
    Tap(String),
}

/// A worker.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    pub(crate) name: At<String>,
    pub(crate) cpu: Option<At<usize>>,
    pub(crate) frames: u32,
    pub(crate) idle: Idle,
    /// Port and queue; `None`: a queue of every port.
    pub(crate) queues: Option<Vec<(At<String>, At<u16>)>>,
    pub(crate) span: std::ops::Range<usize>,
}

/// Entries of AF_XDP rings when a file does not say.
pub(crate) const RINGS: u32 = 1024;

impl Config {
    /// Reads a file's text; every mistake in it otherwise, in their order.
    pub(crate) fn read(source: &Source) -> Result<Self, Vec<Mistake>> {
        let (table, broken) = DeTable::parse_recoverable(source.text());
        let findings = Findings::default();
        let config = Reading { top: Section::top(&findings, &table), source }.config();
        // What a broken line would have said is not known: only what is wrong elsewhere is.
        let broken: Vec<Mistake> = broken.iter().map(|error| syntax(source, error)).collect();
        let lines: Vec<usize> = broken.iter().map(|m| source.place(m.span.start).0).collect();
        let (mut mistakes, settings) = findings.into_parts();
        if !broken.is_empty() {
            mistakes
                .retain(|m| !m.wrong.contains(" has no ") && !lines.contains(&source.place(m.span.start).0));
            mistakes.extend(broken);
        }
        mistakes.sort_by_key(|mistake| mistake.span.start);
        mistakes.dedup();
        match config {
            Some(config) if mistakes.is_empty() => Ok(Self { settings, ..config }),
            _ => Err(mistakes),
        }
    }
}

/// What the TOML parser found wrong, in our form.
fn syntax(source: &Source, error: &toml::de::Error) -> Mistake {
    let span = error.span().unwrap_or(source.text().len()..source.text().len());
    let message = error.message().trim();
    let (wrong, expected) = message.split_once(", expected ").unwrap_or((message, "TOML 1.0"));
    Mistake::new(span, wrong.replace('\n', " "), expected.replace('\n', " "))
}

struct Reading<'s, 'f, 't> {
    top: Section<'f, 't>,
    source: &'s Source,
}

impl Reading<'_, '_, '_> {
    /// The model. `None` when something is missing without which there is none; that is among the findings.
    fn config(mut self) -> Option<Config> {
        let top = &mut self.top;
        let stem = self.source.stem();
        let called = top.setting("name", Change::Restart, NAME, stem, name);
        let levels = [
            ("off", LevelFilter::OFF),
            ("error", LevelFilter::ERROR),
            ("warn", LevelFilter::WARN),
            ("info", LevelFilter::INFO),
            ("debug", LevelFilter::DEBUG),
            ("trace", LevelFilter::TRACE),
        ];
        let log = top.word("log", Change::Live, &levels, LevelFilter::INFO).value;
        let pool = pool(top.table("pool"));
        let iommus = [
            ("auto", IommuChoice::Auto),
            ("type1", IommuChoice::Type1),
            ("iommufd", IommuChoice::Iommufd),
            ("unsafe-noiommu", IommuChoice::UnsafeNoIommu),
        ];
        let iommu = top.word("iommu", Change::Restart, &iommus, IommuChoice::Auto).value;
        let ports: Vec<Port> = top.tables("port").into_iter().filter_map(port).collect();
        let workers: Vec<Worker> = top.tables("worker").into_iter().filter_map(worker).collect();
        let isolation = isolation(top.table("isolation"));
        let (kicks, kicker_cpu) = kicks(top.table("kicks"));
        let restart = restart(top.table("restart"));
        for (key, what) in [("port", &"device = \"eth1\""), ("worker", &"name = \"w0\"")] {
            if top.key_span(key).is_none() {
                let whole = top.span();
                top.findings().mistake(
                    whole,
                    format!("the file has no [[{key}]]"),
                    format!("at least one, with {what}"),
                );
            }
        }
        let findings = top.findings();
        check::ports(findings, &ports, &pool);
        check::pool(findings, &ports, &workers, &pool);
        let order: Vec<&str> = ports.iter().map(|port| port.name.value.as_str()).collect();
        findings.setting("port".to_owned(), &order, Change::Restart);
        check::workers(findings, &ports, &workers, kicks, kicker_cpu.as_ref());
        let (bridge_span, router_span) = (top.key_span("bridge"), top.key_span("router"));
        let bridge = bridge::read(top.table("bridge"), &ports, &workers).map(Forwarder::Bridge);
        let router =
            router::read(top.table("router"), &ports).map(|router| Forwarder::Router(Box::new(router)));
        match (bridge_span, router_span) {
            (Some(_), Some(span)) => findings.mistake(span, "[router] beside [bridge]", "one of the two"),
            (None, None) => {
                let expected = "what the workers shall run: [bridge] or [router]";
                findings.mistake(top.span(), "the file has no [bridge] and no [router]", expected);
            }
            _ => {}
        }
        let forwarder = bridge.or(router)?;
        self.top.finish();
        Some(Config {
            name: called.value,
            log,
            pool,
            iommu,
            ports,
            workers,
            isolation,
            kicks,
            kicker_cpu,
            restart,
            forwarder,
            settings: Settings::new(),
        })
    }
}

fn pool(mut section: Section<'_, '_>) -> Pool {
    let pages = [
        ("never", HugePages::Never),
        ("prefer-2M", HugePages::Prefer2M),
        ("require-2M", HugePages::Require2M),
        ("prefer-1G", HugePages::Prefer1G),
        ("require-1G", HugePages::Require1G),
    ];
    let pool = Pool {
        frames: section.maybe_number("frames", Change::Restart, 64..=1 << 24),
        chunk_bytes: section
            .power_of_two("chunk-bytes", Change::Restart, 2048..=65536)
            .map_or(2048, |size| size.value),
        max_frame: section.number("max-frame", Change::Restart, 64..=16384, 1522),
        huge_pages: section.word("huge-pages", Change::Restart, &pages, HugePages::Prefer2M).value,
        numa_node: section.maybe_number("numa-node", Change::Restart, 0..=1023).map(|node| node.value),
    };
    section.finish();
    pool
}

/// What the device of a port may be.
const DEVICE: &str = "an interface such as \"eth1\", a PCI address such as \"0000:01:00.0\", or a TAP to be made such as \"tap:tap0\"";

/// What an interface may be called: the kernel's own rules (IFNAMSIZ, and what cannot be a file's name).
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
        && !matches!(name, "." | "..")
}

fn port(mut section: Section<'_, '_>) -> Option<Port> {
    let device = section.required("device", DEVICE, |value| {
        let name = string(value)?;
        let tap = name.strip_prefix("tap:").is_some_and(is_interface);
        let good = tap || Host::is_address(name) || is_interface(name);
        if good { Ok(name.to_owned()) } else { Err(vec![format!("is {name:?}").into()]) }
    });
    let called = section.read("name", NAME, name).or_else(|| device.clone());
    if let Some(called) = &called {
        section.call(format!("port.{}", called.value));
        let device = device.as_ref().map(|device| &device.value);
        section.findings().setting(format!("port.{}.device", called.value), &device, Change::Restart);
    }
    let queues = section.number("queues", Change::Restart, 1..=64, 1);
    let modes = [("auto", Want::Prefer), ("zero-copy", Want::Require), ("copy", Want::Never)];
    let zero_copy = section.word("mode", Change::Restart, &modes, Want::Prefer).value;
    let places = [("auto", Attach::PreferNative), ("native", Attach::Native), ("generic", Attach::Generic)];
    let attach = section.word("attach", Change::Restart, &places, Attach::PreferNative).value;
    let rings = section.power_of_two("rings", Change::Restart, 64..=16384).map(|size| size.value);
    let allow_larger_mtu = section.flag("allow-larger-mtu", Change::Restart, false).value;
    let host = section.setting("host", Change::Restart, "the name of an interface", None, |value| {
        let name = string(value)?;
        if is_interface(name) { Ok(Some(name.to_owned())) } else { Err(vec![format!("is {name:?}").into()]) }
    });
    let At { value: host, span: host_span } = host;
    let host = host.map(|value| At { value, span: host_span });
    let tap = device.as_ref().is_some_and(|device| device.value.starts_with("tap:"));
    let pci = device.as_ref().is_some_and(|device| Host::is_address(&device.value));
    for key in ["mode", "attach", "rings", "allow-larger-mtu"] {
        if let Some(span) = section.key_span(key).filter(|_| pci || tap) {
            let is = if pci { "a PCI function" } else { "a TAP" };
            let what = format!("`{key}` is for interfaces through AF_XDP, and this port is {is}");
            section.findings().mistake(span, what, format!("no `{key}`"));
        }
    }
    section.finish();
    let (At { value: device, span: device_span }, name) = (device?, called?);
    let device = if pci {
        Device::Pci(device)
    } else if let Some(tap) = device.strip_prefix("tap:") {
        Device::Tap(tap.to_owned())
    } else {
        Device::Interface { name: device, zero_copy, attach, rings, allow_larger_mtu }
    };
    Some(Port { name, device, device_span, queues, host })
}

fn worker(mut section: Section<'_, '_>) -> Option<Worker> {
    let called = section.required("name", NAME, name);
    if let Some(called) = &called {
        section.call(format!("worker.{}", called.value));
    }
    let cpu = section.maybe_number("cpu", Change::Restart, 0..=1023);
    let frames = section.number("frames", Change::Restart, 64..=1 << 20, 2048).value;
    let idles = [("spin", Idle::Spin), ("yield", Idle::Yield)];
    let idle = section.word("idle", Change::Restart, &idles, Idle::Spin).value;
    let expected = "\"all\", or a queue of each port as in { eth1 = 0, eth2 = 0 }";
    let queues = section.setting("queues", Change::Restart, expected, None, |value| {
        if let Some(table) = value.get_ref().as_table() {
            let (mut good, mut bad) = (Vec::new(), Vec::new());
            for (port, queue) in table {
                let port_name = At { value: port.get_ref().to_string(), span: port.span() };
                match number(queue, &(0..=63)) {
                    Ok(number) => good.push((port_name, At { value: number, span: queue.span() })),
                    Err(_) => {
                        let what = format!("gives port {:?} no queue from 0 to 63", port_name.value);
                        bad.push(Wrong::at(queue.span(), what));
                    }
                }
            }
            return if bad.is_empty() { Ok(Some(good)) } else { Err(bad) };
        }
        match string(value)? {
            "all" => Ok(None),
            other => Err(vec![format!("is {other:?}").into()]),
        }
    });
    let span = section.span();
    section.finish();
    Some(Worker { name: called?, cpu, frames, idle, queues: queues.value, span })
}

/// The modes, as the file calls them.
const MODES: [(&str, Mode); 7] = [
    ("strict", Mode::STRICT),
    ("allow-syscalls", Mode::ALLOW_SYSCALLS),
    ("allow-page-faults", Mode::ALLOW_PAGE_FAULTS),
    ("allow-exceptions", Mode::ALLOW_EXCEPTIONS),
    ("allow-interrupts", Mode::ALLOW_INTERRUPTS),
    ("oneshot", Mode::ONESHOT),
    ("off", Mode::all()),
];

fn isolation(mut section: Section<'_, '_>) -> Option<WorkerIsolation> {
    let names: Vec<&str> = MODES.iter().map(|(name, _)| *name).collect();
    let expected = "\"strict\", \"off\" or an array of allowances such as [\"allow-syscalls\"]";
    let word = |value| {
        let text = string(value)?;
        let found = MODES.iter().find(|(name, _)| *name == text).map(|(_, mode)| (text, *mode));
        found.ok_or_else(|| {
            vec![Wrong::from(format!("is {text:?} (did you mean {}?)", nearest(text, &names)))]
        })
    };
    let mode = section.setting("mode", Change::Restart, expected, Some(Mode::STRICT), |value| {
        if value.get_ref().is_str() {
            return match word(value)? {
                ("off", _) => Ok(None),
                ("oneshot", _) => {
                    Err(vec!["is \"oneshot\", which needs an allowance beside it".to_owned().into()])
                }
                (_, mode) => Ok(Some(mode)),
            };
        }
        let (mut mode, mut bad) = (Mode::STRICT, Vec::new());
        for item in items(value)? {
            match word(item) {
                Ok((name @ ("off" | "strict"), _)) => {
                    bad.push(Wrong::at(item.span(), format!("has {name:?} beside allowances")));
                }
                Ok((_, allowed)) => mode |= allowed,
                Err(wrong) => bad.extend(wrong.into_iter().map(|wrong| wrong.of_item(item.span()))),
            }
        }
        if mode == Mode::ONESHOT {
            bad.push("has \"oneshot\" without an allowance that it could be about".to_owned().into());
        }
        if bad.is_empty() { Ok(Some(mode)) } else { Err(bad) }
    });
    let backends = [
        ("auto", Backend::Auto),
        ("task-isolation", Backend::TaskIsolation),
        ("dispatch", Backend::Dispatch),
        ("advisory", Backend::Advisory),
    ];
    let backend = section.word("backend", Change::Restart, &backends, Backend::Auto);
    let policies = [("report", OnBreach::Report), ("stop", OnBreach::Stop), ("abort", OnBreach::Abort)];
    let on_breach = section.word("on-breach", Change::Restart, &policies, OnBreach::Report);
    let insist = section.flag("insist", Change::Restart, false);
    let fifo = section.maybe_number("fifo", Change::Restart, 1..=99);
    let name_senders = section.flag("name-senders", Change::Restart, false);
    let findings = section.findings();
    if mode.value.is_none() {
        for key in ["backend", "on-breach", "insist", "name-senders"] {
            if let Some(span) = section.key_span(key) {
                let what =
                    format!("`{key}` says how workers are isolated, and `mode` says that they are not");
                findings.mistake(span, what, format!("no `{key}`, or another `mode`"));
            }
        }
    }
    if backend.value == Backend::Advisory {
        let clash = |key: &str, span| {
            let what = format!("`{key}` with `backend` = \"advisory\", which enforces nothing");
            findings.mistake(span, what, "another `backend`, or neither key");
        };
        if insist.value {
            clash("insist", insist.span);
        }
        if let Some(span) = section.key_span("on-breach") {
            clash("on-breach", span);
        }
    }
    section.finish();
    mode.value.map(|mode| WorkerIsolation {
        mode,
        backend: backend.value,
        on_breach: on_breach.value,
        insist: insist.value,
        scheduling: fifo.map_or(Scheduling::Auto, |priority| Scheduling::Fifo(priority.value)),
        name_senders: name_senders.value,
        ..WorkerIsolation::default()
    })
}

fn kicks(mut section: Section<'_, '_>) -> (Kicks, Option<At<usize>>) {
    let who = [("kicker", Kicks::Kicker), ("workers", Kicks::Inline)];
    let by = section.word("by", Change::Restart, &who, Kicks::Kicker).value;
    let cpu = section.maybe_number("cpu", Change::Restart, 0..=1023);
    if let Some(span) = section.key_span("cpu").filter(|_| by == Kicks::Inline) {
        let what = "`cpu` of a kicker, and `by` says that the workers kick";
        section.findings().mistake(span, what, "no `cpu`, or `by` = \"kicker\"");
    }
    section.finish();
    (by, cpu)
}

fn restart(mut section: Section<'_, '_>) -> Restart {
    let policies = [("back-off", true), ("never", false)];
    let again = section.word("policy", Change::Restart, &policies, true).value;
    let (hour, ms) = (Duration::from_secs(3600), Duration::from_millis(1));
    let first = section.time("first", Change::Restart, ms..=hour, ms);
    let longest = section.time("longest", Change::Restart, ms..=hour, Duration::from_secs(1));
    let limit = section.number("limit", Change::Restart, 1..=1_000_000, 20).value;
    if first.value > longest.value {
        let times = [first.value, longest.value].map(humantime::format_duration);
        let what = format!("`first` is {}, longer than `longest`, {}", times[0], times[1]);
        section.findings().mistake(first.span, what, "a first pause within the longest");
    }
    for key in ["first", "longest", "limit"] {
        if let Some(span) = section.key_span(key).filter(|_| !again) {
            let what = format!("`{key}` says when workers start again, and `policy` that they never do");
            section.findings().mistake(span, what, format!("no `{key}`, or `policy` = \"back-off\""));
        }
    }
    section.finish();
    if again {
        Restart::BackOff { first: first.value, longest: longest.value, limit }
    } else {
        Restart::Never
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// All keys of a file that leaves nothing out that has settings.
    fn keys(file: &str) -> Vec<(String, Change)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(file);
        let source = Source::read(&path).unwrap();
        let config = Config::read(&source).unwrap_or_else(|mistakes| panic!("{mistakes:?}"));
        config.settings.into_iter().map(|(key, setting)| (key, setting.change)).collect()
    }

    #[test]
    fn the_chapters_name_every_key_and_which_of_them_are_live() {
        let docs = ["run.md", "router.md"].map(|file| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
            std::fs::read_to_string(path).unwrap()
        });
        let rows: Vec<&str> =
            docs.iter().flat_map(|doc| doc.lines()).filter(|l| l.starts_with('|')).collect();
        for (key, change) in [keys("bridge.toml"), keys("router.toml")].concat() {
            let parts: Vec<&str> = key.split('.').collect();
            let called = match parts[..] {
                ["bridge", "station", ..] => "station".to_owned(),
                // How the VLANs of a port are written is two keys.
                ["bridge", "ports", _, "vlans"] => "ports.NAME.vlan".to_owned(),
                ["bridge", "ports", _, key] => format!("ports.NAME.{key}"),
                ["bridge" | "router", ref rest @ ..] => rest.join("."),
                // The ports themselves.
                ["port"] => continue,
                [.., last] => last.to_owned(),
                [] => continue,
            };
            let named = |row: &&&str| {
                // In the first cell or, where that is a table's name or empty, in the second.
                let mut cells = row.split('|').skip(1).map(str::trim);
                let first = cells.next().unwrap_or_default();
                let cell =
                    if first.is_empty() || first.starts_with("`[") { cells.next() } else { Some(first) };
                cell.is_some_and(|cell| cell.contains(&format!("`{called}`")))
            };
            let found: Vec<_> = rows.iter().filter(named).collect();
            assert!(!found.is_empty(), "{key} (`{called}`) is in no table of docs/run.md or docs/router.md");
            let live = found.iter().any(|row| row.trim_end().ends_with("| live |"));
            assert_eq!(live, change == Change::Live, "{key}: {found:?}");
        }
    }
}
