//! `[router]`: the settings of a router.

use super::config::{Device, Port};
use super::reader::{Change, Section, Wrong};
use super::source::At;
use super::values::number;
use isoplane::PortId;
use isoplane::blocks::router::{IcmpLimits, Limit, PuntLimits, ResolutionLimits, RouterConfig, RouterPort};
use isoplane::sync::{Overrides, RouteTable};
use isoplane::tables::interface::ReversePath;
use isoplane::tables::{InterfaceId, TablesConfig};
use std::time::Duration;
use toml::de::DeValue;

/// What a router is told.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    pub(crate) config: RouterConfig,
    pub(crate) tables: TablesConfig,
    /// Which routes of the kernel's count.
    pub(crate) routes: RouteTable,
    /// What does not follow the kernel.
    pub(crate) overrides: Overrides,
}

/// Reads the table. `None` when it is not there.
pub(crate) fn read(mut section: Section<'_, '_>, ports: &[Port]) -> Option<Router> {
    let findings = section.findings();
    if section.is_there() {
        for port in ports.iter().filter(|port| port.host.is_none()) {
            let (is, expected) = match port.device {
                Device::Interface { .. } => continue,
                Device::Pci(_) => ("a PCI function", "`host`, the interface that shall have them"),
                Device::Tap(_) => ("the kernel's neighbour", "an interface or a PCI address, with `host`"),
            };
            let what = format!("port {:?} of a router has no addresses, since it is {is}", port.name.value);
            findings.mistake(port.device_span.clone(), what, expected);
        }
        let hosts = ports.iter().filter(|port| port.host.is_some()).count();
        if ports.len() + hosts > 255 {
            let what = format!("a router of {} ports, those to the host included", ports.len() + hosts);
            findings.mistake(section.span(), what, "at most 255");
        }
    }
    let expected = "\"main\", \"all\" or the number of a table";
    let routes = section.setting("table", Change::Restart, expected, RouteTable::Main, |value| {
        match value.get_ref() {
            DeValue::String(text) if text == "main" => Ok(RouteTable::Main),
            DeValue::String(text) if text == "all" => Ok(RouteTable::All),
            DeValue::String(text) => Err(vec![Wrong::from(format!("is {text:?}"))]),
            _ => number(value, &(1..=u32::MAX)).map(RouteTable::One),
        }
    });
    let overrides = overrides(&mut section);
    let tables = tables(section.table("tables"));
    let default = RouterConfig::new(ports.len());
    let seed = section.maybe_number("seed", Change::Restart, 0..=u64::MAX);
    let live = Change::Live;
    let config = RouterConfig {
        icmp: icmp(section.table("icmp")),
        punt: punt(section.table("punt")),
        resolution: resolution(section.table("resolution")),
        fragments_per_turn: section
            .number("fragments-per-turn", live, 0..=65_536, default.fragments_per_turn)
            .value,
        reserve: section.number("reserve", live, 0..=1 << 20, default.reserve).value,
        source_route: section.flag("source-route", live, default.source_route).value,
        record_route: section.flag("record-route", live, default.record_route).value,
        router_alert: section.flag("router-alert", live, default.router_alert).value,
        routing_header_0: section.flag("routing-header-0", live, default.routing_header_0).value,
        seed: seed.map_or(default.seed, |At { value, .. }| value),
        ..default
    };
    let config = RouterConfig { ports: router_ports(ports), ..config };
    let there = section.is_there();
    section.finish();
    there.then_some(Router { config, tables, routes: routes.value, overrides })
}

/// The ports in the order of the file, and after them those to the host.
fn router_ports(ports: &[Port]) -> Vec<RouterPort> {
    let mut next = ports.len();
    let mut made = Vec::new();
    for port in ports {
        let punt = port.host.as_ref().map(|_| PortId(next as u8));
        next += usize::from(punt.is_some());
        made.push(RouterPort { punt });
    }
    made.resize(next, RouterPort::default());
    made
}

fn overrides(section: &mut Section<'_, '_>) -> Overrides {
    let follow = |section: &mut Section<'_, '_>, key, default| {
        let words = [("kernel", None), ("on", Some(true)), ("off", Some(false))];
        section.word(key, Change::Restart, &words, default).value
    };
    let filters = [
        ("kernel", None),
        ("off", Some(ReversePath::Off)),
        ("strict", Some(ReversePath::Strict)),
        ("loose", Some(ReversePath::Loose)),
    ];
    let mut overrides = Overrides::default();
    overrides.reverse_path = section.word("reverse-path", Change::Restart, &filters, None).value;
    overrides.forward4 = follow(section, "forward-ipv4", None);
    overrides.forward6 = follow(section, "forward-ipv6", None);
    overrides.redirects = follow(section, "redirects", overrides.redirects);
    overrides.directed_broadcast = follow(section, "directed-broadcast", None);
    overrides
}

fn tables(mut section: Section<'_, '_>) -> TablesConfig {
    let default = TablesConfig::default();
    let mut size = |key, least: u32, most: u32, default: u32| {
        section.number(key, Change::Restart, least..=most, default).value
    };
    let tables = TablesConfig {
        routes4: size("routes-ipv4", 64, 1 << 24, default.routes4),
        routes6: size("routes-ipv6", 64, 1 << 24, default.routes6),
        next_hops: size("next-hops", 64, 1 << 20, default.next_hops),
        group_buckets: size("group-buckets", 128, 1 << 22, default.group_buckets),
        interfaces: size("interfaces", 1, InterfaceId::MOST.into(), default.interfaces.into()) as u16,
    };
    section.finish();
    tables
}

/// `KEY-per-second` and `KEY-burst`.
fn limit(section: &mut Section<'_, '_>, keys: [&'static str; 2], default: Limit) -> Limit {
    Limit {
        per_second: section.number(keys[0], Change::Live, 0..=1_000_000_000, default.per_second).value,
        burst: section.number(keys[1], Change::Live, 1..=1_000_000, default.burst).value,
    }
}

fn icmp(mut section: Section<'_, '_>) -> IcmpLimits {
    let default = IcmpLimits::default();
    let limits = IcmpLimits {
        total: limit(&mut section, ["per-second", "burst"], default.total),
        host: limit(&mut section, ["host-per-second", "host-burst"], default.host),
    };
    section.finish();
    limits
}

fn punt(mut section: Section<'_, '_>) -> PuntLimits {
    let default = PuntLimits::default();
    let limits = PuntLimits {
        link: limit(&mut section, ["link-per-second", "link-burst"], default.link),
        local: limit(&mut section, ["local-per-second", "local-burst"], default.local),
    };
    section.finish();
    limits
}

fn resolution(mut section: Section<'_, '_>) -> ResolutionLimits {
    let default = ResolutionLimits::default();
    let (ms, minute) = (Duration::from_millis(1), Duration::from_secs(60));
    let mut size = |key, default: u16| section.number(key, Change::Restart, 1..=1 << 15, default).value;
    let (neighbours, frames_each) =
        (size("neighbours", default.neighbours), size("frames-each", default.frames_each));
    let frames = size("frames", default.frames);
    let retry = section.time("retry", Change::Live, ms..=minute, default.retry);
    let timeout = section.time("timeout", Change::Live, ms..=minute, default.timeout);
    if retry.value > timeout.value {
        let times = [retry.value, timeout.value].map(humantime::format_duration);
        let what = format!("`retry` is {}, after `timeout`, {}", times[0], times[1]);
        section.findings().mistake(retry.span.clone(), what, "a time before `timeout`");
    }
    let limits = ResolutionLimits {
        neighbours,
        frames_each,
        frames,
        retry: retry.value,
        timeout: timeout.value,
        requests: limit(&mut section, ["requests-per-second", "requests-burst"], default.requests),
    };
    section.finish();
    limits
}
