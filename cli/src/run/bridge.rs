//! `[bridge]`: the settings of a learning bridge.

use super::config::{Port, Worker};
use super::reader::{Change, Findings, Section, Wrong, nearest};
use super::values::{MAC, NAME, VLAN, integer, items, list, mac, name, vlan};
use isoplane::PortId;
use isoplane::blocks::bridge::{
    Bridge, BridgeConfig, BridgePort, FloodLimits, PortVlans, StaticStation, VlanSet, WhenFull,
};
use isoplane::wire::VlanId;
use std::ops::Range;
use std::time::Duration;
use toml::de::DeValue;

/// Reads the table. `None` when there is no bridge to be made of it, which is among the findings.
pub(crate) fn read(mut section: Section<'_, '_>, ports: &[Port], workers: &[Worker]) -> Option<BridgeConfig> {
    let findings = section.findings();
    let span = section.span();
    if section.is_there() {
        check_shape(findings, &span, ports, workers);
    }
    let default = BridgeConfig::new(ports.len());
    let (second, million) = (Duration::from_secs(1), Duration::from_secs(1_000_000));
    let capacity = section.number("capacity", Change::Restart, 8..=1 << 20, default.capacity).value;
    let ageing = section.time("ageing", Change::Live, second..=million, default.ageing).value;
    let policies = [("refuse", WhenFull::Refuse), ("evict-oldest", WhenFull::EvictOldest)];
    let when_full = section.word("when-full", Change::Restart, &policies, WhenFull::Refuse).value;
    let expected = "digits X of 01-80-C2-00-00-0X, 0 to 15 and not 1 (PAUSE)";
    let forward_reserved = section.setting("forward-reserved", Change::Live, expected, 0, |value| {
        let digits = list(value, |item| match integer(item)? {
            digit @ (0 | 2..=15) => Ok(1_u16 << digit),
            other => Err(vec![format!("is {other}").into()]),
        })?;
        Ok(digits.into_iter().fold(0, |all, digit| all | digit))
    });
    let expected = format!("an array of addresses, each {MAC}");
    let own = section.setting("own", Change::Restart, &expected, Vec::new(), |value| list(value, mac)).value;
    let flood = flood(section.table("flood"), ports.len());
    let (per_port, vlans) = bridge_ports(section.table("ports"), ports);
    let mut config = BridgeConfig {
        ports: per_port,
        vlans,
        ageing,
        capacity,
        when_full,
        flood,
        forward_reserved: forward_reserved.value,
        own,
        ..default
    };
    stations(&mut section, ports, &mut config);
    let there = section.is_there();
    section.finish();
    if there && findings.is_clean() {
        // What no key alone shows is said with the words of the bridge.
        if let Err(error) = Bridge::new(&config) {
            let text = error.to_string();
            let (wrong, expected) = text.split_once("; ").unwrap_or((&text, "a bridge that can be made"));
            findings.mistake(span, wrong, expected);
        }
    }
    there.then_some(config)
}

/// One worker runs a bridge over all its ports.
fn check_shape(findings: &Findings, span: &Range<usize>, ports: &[Port], workers: &[Worker]) {
    if let Some(worker) = workers.get(1) {
        let what = format!("a bridge is one worker's, and {:?} is another", worker.name.value);
        findings.mistake(worker.span.clone(), what, "one [[worker]]");
    }
    for port in ports.iter().filter(|port| port.queues.value > 1) {
        let what = format!("port {:?} of a bridge has {} queues", port.name.value, port.queues.value);
        findings.mistake(port.queues.span.clone(), what, "1, since one worker runs it");
    }
    for port in ports {
        if let Some(host) = &port.host {
            let what =
                format!("`host` of port {:?}, and a bridge hands nothing to the kernel", port.name.value);
            findings.mistake(host.span.clone(), what, "no `host`, or a [router]");
        }
    }
    if ports.len() > 64 {
        findings.mistake(span.clone(), format!("a bridge of {} ports", ports.len()), "at most 64");
    }
}

fn flood(mut section: Section<'_, '_>, ports: usize) -> FloodLimits {
    let FloodLimits { copies_per_second, burst, copies_per_turn, reserve } = FloodLimits::default();
    // A broadcast of one frame is copied for all ports but two.
    let least = ports.saturating_sub(2) as u32;
    let limits = FloodLimits {
        copies_per_second: section
            .number("copies-per-second", Change::Live, 1..=1_000_000_000, copies_per_second)
            .value,
        burst: section.number("burst", Change::Live, least..=1_000_000, burst).value,
        copies_per_turn: section
            .number("copies-per-turn", Change::Live, least..=65_536, copies_per_turn)
            .value,
        reserve: section.number("reserve", Change::Live, 0..=1 << 20, reserve).value,
    };
    section.finish();
    limits
}

/// `[bridge.ports.NAME]`, in the order of the ports; VLANs when any port has one.
fn bridge_ports(mut section: Section<'_, '_>, ports: &[Port]) -> (Vec<BridgePort>, Option<Vec<PortVlans>>) {
    let findings = section.findings();
    let names: Vec<&str> = ports.iter().map(|port| port.name.value.as_str()).collect();
    let mut settings: Vec<(BridgePort, Option<PortVlans>)> = vec![(BridgePort::default(), None); ports.len()];
    for (name, table) in section.named_tables() {
        let Some(index) = names.iter().position(|port| *port == name.value) else {
            findings.mistake(
                name.span,
                format!("there is no port {:?}", name.value),
                nearest(&name.value, &names),
            );
            continue;
        };
        settings[index] = bridge_port(table);
    }
    // Ports that are not named have settings too: the defaults.
    for (port, (settings, vlans)) in names.iter().zip(&settings) {
        let BridgePort { isolated, learn, max_stations } = settings;
        findings.setting(format!("bridge.ports.{port}.isolated"), isolated, Change::Live);
        findings.setting(format!("bridge.ports.{port}.learn"), learn, Change::Live);
        findings.setting(format!("bridge.ports.{port}.max-stations"), max_stations, Change::Live);
        findings.setting(format!("bridge.ports.{port}.vlans"), vlans, Change::Restart);
    }
    let (ports_of, vlans): (Vec<_>, Vec<_>) = settings.into_iter().unzip();
    if vlans.iter().all(Option::is_none) {
        return (ports_of, None);
    }
    for (port, vlans) in ports.iter().zip(&vlans) {
        if vlans.is_none() {
            let what = format!("port {:?} is in no VLAN, and other ports are", port.name.value);
            let expected = format!("`vlan` or `trunk` in [bridge.ports.{}]", port.name.value);
            findings.mistake(port.name.span.clone(), what, expected);
        }
    }
    (ports_of, vlans.into_iter().collect())
}

fn bridge_port(mut section: Section<'_, '_>) -> (BridgePort, Option<PortVlans>) {
    let findings = section.findings();
    let port = BridgePort {
        isolated: section.flag("isolated", Change::Live, false).value,
        learn: section.flag("learn", Change::Live, true).value,
        max_stations: section
            .maybe_number("max-stations", Change::Live, 0..=1 << 20)
            .map_or(u32::MAX, |most| most.value),
    };
    let access = section.read("vlan", VLAN, vlan);
    let expected = "\"all\", or an array of VLANs and ranges such as [10, \"100-199\"]";
    let trunk = section.read("trunk", expected, trunk);
    let native = section.read("native", VLAN, vlan);
    if let (Some(_), Some(trunk)) = (&access, &trunk) {
        findings.mistake(trunk.span.clone(), "`trunk` beside `vlan`", "one of the two");
    }
    let vlans = match (access, trunk) {
        (Some(access), _) => Some(PortVlans::Access(access.value)),
        (None, Some(trunk)) => {
            let allowed = trunk.value;
            if let Some(native) = native.as_ref().filter(|native| !allowed.contains(native.value)) {
                let what = format!("`native` is {}, which is not in `trunk`", native.value);
                findings.mistake(native.span.clone(), what, "one of the VLANs of `trunk`");
            }
            Some(PortVlans::Trunk { allowed, native: native.as_ref().map(|native| native.value) })
        }
        (None, None) => None,
    };
    if let Some(span) = section.key_span("native").filter(|_| !matches!(vlans, Some(PortVlans::Trunk { .. })))
    {
        findings.mistake(span, "`native` without `trunk`", "a `trunk`, or no `native`");
    }
    section.finish();
    (port, vlans)
}

/// VLANs of a trunk.
fn trunk(value: &super::reader::Value<'_>) -> Result<VlanSet, Vec<Wrong>> {
    match value.get_ref() {
        DeValue::String(text) if text == "all" => return Ok(VlanSet::ALL),
        DeValue::String(text) => return Err(vec![format!("is {text:?}").into()]),
        _ => {}
    }
    let (mut set, mut bad) = (VlanSet::EMPTY, Vec::new());
    for item in items(value)? {
        let range = match item.get_ref() {
            DeValue::String(text) => range(text),
            _ => integer(item).ok().and_then(one).map(|vlan| (vlan, vlan)),
        };
        match range {
            Some((first, last)) => {
                (first.get()..=last.get()).filter_map(VlanId::new).for_each(|vlan| set.insert(vlan));
            }
            None => {
                bad.push(Wrong::at(item.span(), "has an item that is neither a VLAN nor a range".to_owned()))
            }
        }
    }
    if bad.is_empty() { Ok(set) } else { Err(bad) }
}

fn one(number: i128) -> Option<VlanId> {
    u16::try_from(number).ok().and_then(VlanId::new)
}

fn range(text: &str) -> Option<(VlanId, VlanId)> {
    let (first, last) = text.split_once('-')?;
    let [first, last] = [first, last].map(|end| end.trim().parse::<u16>().ok().and_then(VlanId::new));
    first.zip(last).filter(|(first, last)| first <= last)
}

/// `[[bridge.station]]`.
fn stations(section: &mut Section<'_, '_>, ports: &[Port], config: &mut BridgeConfig) {
    let findings = section.findings();
    let names: Vec<&str> = ports.iter().map(|port| port.name.value.as_str()).collect();
    for mut table in section.tables("station") {
        let address = table.required("mac", MAC, mac);
        let id = table.read("vlan", VLAN, vlan);
        let port = table.required("port", NAME, name);
        table.finish();
        let (Some(address), Some(port)) = (address, port) else { continue };
        let Some(index) = names.iter().position(|name| *name == port.value) else {
            findings.mistake(
                port.span,
                format!("there is no port {:?}", port.value),
                nearest(&port.value, &names),
            );
            continue;
        };
        let vlan = id.map(|vlan| vlan.value);
        let same = |s: &&StaticStation| s.mac == address.value && s.vlan == vlan;
        if config.stations.iter().find(same).is_some() {
            let what = format!("there is a station {} already", address.value);
            findings.mistake(address.span, what, "an address, or a VLAN, of its own");
            continue;
        }
        let id = vlan.map_or_else(String::new, |vlan| format!("@{vlan}"));
        findings.setting(format!("bridge.station.{}{id}", address.value), &port.value, Change::Live);
        config.stations.push(StaticStation { mac: address.value, vlan, port: PortId(index as u8) });
    }
}
