//! Reading the file again while the dataplane runs.
//!
//! Contract: a file with mistakes changes nothing. Of a good one, every key that differs is named: what can
//! change is changed, between two batches and without a packet lost; what cannot stays as it was, and is said
//! to need a restart, at each reload until then. The summary is said when the workers have carried out what
//! they were told. A worker that was started again since is told all of it once more.

use super::app::{Answer, Order};
use super::config::{Config, Forwarder, Port};
use super::launch::ORDERS;
use super::reader::{Change as Kind, Settings};
use super::source::Source;
use isoplane::blocks::bridge::{BridgeConfig, Change, StaticStation, change};
use isoplane::{Mailbox, PortId};
use std::collections::VecDeque;
use std::path::Path;

/// What was launched, what was told since, and the way to tell more.
pub(crate) struct Reloader {
    launched: Config,
    current: Config,
    /// Keys as they are in force.
    settings: Settings,
    mailbox: Mailbox<Order, Answer>,
    waiting: VecDeque<Change>,
    /// Orders sent and not answered, the oldest first.
    sent: VecDeque<(u64, Change)>,
    next: u64,
    /// Said when all orders are answered.
    summary: Option<String>,
}

impl Reloader {
    pub(crate) fn new(config: Config, mailbox: Mailbox<Order, Answer>) -> Self {
        Self {
            settings: config.settings.clone(),
            launched: config.clone(),
            current: config,
            mailbox,
            waiting: VecDeque::new(),
            sent: VecDeque::new(),
            next: 1,
            summary: None,
        }
    }

    /// Reads the file again and gives orders.
    pub(crate) fn reload(&mut self, path: &Path) {
        let file = path.display();
        let source = match Source::read(path) {
            Ok(source) => source,
            Err(error) => {
                return crate::say(&format!("{file}: cannot be read: {error}; nothing was changed"));
            }
        };
        let new = match Config::read(&source) {
            Ok(new) => new,
            Err(mistakes) => {
                mistakes.iter().for_each(|mistake| crate::say_plainly(&source.say(mistake, "")));
                let count = super::plural(mistakes.len(), "mistake");
                return crate::say(&format!("{file}: {count}; nothing was changed"));
            }
        };
        let (mut changed, mut refused) = (0, 0);
        for difference in differences(&self.settings, &new.settings) {
            let Difference { key, kind, was, is } = difference;
            let [old, now] = [&was, &is].map(|value| value.as_deref().unwrap_or("absent"));
            match kind {
                Kind::Live => {
                    changed += 1;
                    crate::say(&format!("{file}: {key}: changed from {old} to {now}"));
                    match new.settings.get(&key) {
                        Some(setting) => self.settings.insert(key, setting.clone()),
                        None => self.settings.remove(&key),
                    };
                }
                Kind::Restart => {
                    refused += 1;
                    crate::say(&format!("{file}: {key}: stays {old}; {now} needs a restart"));
                }
            }
        }
        crate::log::prefer(new.log);
        self.waiting.extend(changes(&self.current, &new));
        // What needs a restart stays as it was launched.
        self.current = Config { ports: self.launched.ports.clone(), ..in_order_of(&self.launched, new) };
        let needs = if refused == 1 { "needs" } else { "need" };
        self.summary = Some(format!("{file}: reloaded: {changed} changed, {refused} {needs} a restart"));
        self.pump();
    }

    /// Brings orders to the worker, and its answers back. To be called often.
    pub(crate) fn pump(&mut self) {
        while let Some(Answer { number, what }) = self.mailbox.receive() {
            if what == Answer::STARTED {
                self.worker_started();
                continue;
            }
            while self.sent.front().is_some_and(|(sent, _)| *sent <= number) {
                let Some((sent, change)) = self.sent.pop_front() else { break };
                if sent == number && what == Answer::REFUSED {
                    crate::say(&format!("the bridge has no place in its table for this: {change:?}"));
                }
            }
        }
        while self.sent.len() < ORDERS as usize {
            let Some(change) = self.waiting.pop_front() else { break };
            let order = Order { number: self.next, change: change::Message::from(change) };
            if self.mailbox.send(order).is_err() {
                self.waiting.push_front(change);
                break;
            }
            self.sent.push_back((self.next, change));
            self.next += 1;
        }
        if self.sent.is_empty()
            && self.waiting.is_empty()
            && let Some(summary) = self.summary.take()
        {
            crate::say(&summary);
        }
    }

    /// A worker begins as it was launched. What its predecessor had not answered is among what is told now.
    fn worker_started(&mut self) {
        self.sent.clear();
        self.waiting = changes(&self.launched, &self.current).into();
    }
}

/// A key whose value is another now.
struct Difference {
    key: String,
    kind: Kind,
    was: Option<String>,
    is: Option<String>,
}

fn differences(old: &Settings, new: &Settings) -> Vec<Difference> {
    let added = new.keys().filter(|key| !old.contains_key(*key));
    let mut keys: Vec<&String> = old.keys().chain(added).collect();
    keys.sort();
    let difference = |key: &String| {
        let (was, is) = (old.get(key), new.get(key));
        let kind = was.or(is)?.change;
        let [was, is] = [was, is].map(|setting| setting.map(|setting| setting.value.clone()));
        (was != is).then(|| Difference { key: key.clone(), kind, was, is })
    };
    keys.into_iter().filter_map(difference).collect()
}

/// The place of a port that is called that.
fn place(ports: &[Port], name: &str) -> Option<usize> {
    ports.iter().position(|port| port.name.value == name)
}

/// The live settings of `new`, for the ports that were launched, in their order.
fn in_order_of(launched: &Config, mut new: Config) -> Config {
    let Forwarder::Bridge(bridge) = &mut new.forwarder;
    let Forwarder::Bridge(before) = &launched.forwarder;
    let moved = |port: PortId| {
        let name = &new.ports.get(port.index())?.name.value;
        place(&launched.ports, name).map(|index| PortId(index as u8))
    };
    bridge.stations.retain_mut(|station| moved(station.port).map(|port| station.port = port).is_some());
    let mut ports = before.ports.clone();
    for (port, settings) in new.ports.iter().zip(&bridge.ports) {
        if let Some(index) = place(&launched.ports, &port.name.value) {
            ports[index] = *settings;
        }
    }
    bridge.ports = ports;
    new
}

/// What to tell a bridge that is as in `old` so that it becomes as in `new`.
fn changes(old: &Config, new: &Config) -> Vec<Change> {
    let new = in_order_of(old, new.clone());
    let (Forwarder::Bridge(old), Forwarder::Bridge(new)) = (&old.forwarder, &new.forwarder);
    let mut changes = Vec::new();
    let mut when = |differs: bool, change: Change| {
        if differs {
            changes.push(change);
        }
    };
    let BridgeConfig { ageing, flood, forward_reserved, .. } = new;
    when(old.ageing != *ageing, Change::Ageing(*ageing));
    when(old.flood != *flood, Change::Flood(*flood));
    when(old.forward_reserved != *forward_reserved, Change::ForwardReserved(*forward_reserved));
    for (index, (was, is)) in old.ports.iter().zip(&new.ports).enumerate() {
        when(was != is, Change::Port { port: PortId(index as u8), config: *is });
    }
    let same = |one: &StaticStation, other: &StaticStation| one.mac == other.mac && one.vlan == other.vlan;
    for was in &old.stations {
        let stays = new.stations.iter().any(|is| same(was, is));
        when(!stays, Change::RemoveStation { vlan: was.vlan, mac: was.mac });
    }
    for is in &new.stations {
        // One that has moved takes its own place.
        when(!old.stations.contains(is), Change::AddStation(*is));
    }
    changes
}
