//! Reading the file again while the dataplane runs.
//!
//! Contract: a file with mistakes changes nothing. Of a good one, every key that differs is named: what can
//! change is changed, between two batches and without a packet lost; what cannot stays as it was, and is said
//! to need a restart, at each reload until then. The summary is said when all workers have carried out what
//! they were told. A worker that was started again since is told all of it once more.

use super::app::{Answer, Order, Words, bridge_words, router_words};
use super::config::{Config, Forwarder, Port};
use super::launch::ORDERS;
use super::reader::{Change as Kind, Settings};
use super::source::Source;
use isoplane::blocks::bridge::{BridgeConfig, Change, StaticStation};
use isoplane::blocks::router::change;
use isoplane::{Mailbox, PortId};
use std::collections::VecDeque;
use std::path::Path;

/// Something to tell a worker, and how that is called when it refuses.
#[derive(Debug, Clone)]
struct Instruction {
    words: Words,
    what: String,
}

/// The way to one worker.
struct Way {
    mailbox: Mailbox<Order, Answer>,
    waiting: VecDeque<Instruction>,
    /// Orders sent and not answered, the oldest first.
    sent: VecDeque<(u64, Instruction)>,
    next: u64,
}

/// What was launched, what was told since, and the ways to tell more.
pub(crate) struct Reloader {
    launched: Config,
    /// The file as it is in force: what needs a restart is as it was launched.
    current: Config,
    ways: Vec<Way>,
    /// Said when all orders are answered.
    summary: Option<String>,
}

impl Reloader {
    pub(crate) fn new(config: Config, mailboxes: Vec<Mailbox<Order, Answer>>) -> Self {
        let way = |mailbox| Way { mailbox, waiting: VecDeque::new(), sent: VecDeque::new(), next: 1 };
        Self {
            launched: config.clone(),
            current: config,
            ways: mailboxes.into_iter().map(way).collect(),
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
        let mut settings = self.current.settings.clone();
        for Difference { key, kind, was, is } in differences(&settings.clone(), &new.settings) {
            let [old, now] = [&was, &is].map(|value| value.as_deref().unwrap_or("absent"));
            match kind {
                Kind::Live => {
                    changed += 1;
                    crate::say(&format!("{file}: {key}: changed from {old} to {now}"));
                    match new.settings.get(&key) {
                        Some(setting) => settings.insert(key, setting.clone()),
                        None => settings.remove(&key),
                    };
                }
                Kind::Restart => {
                    refused += 1;
                    crate::say(&format!("{file}: {key}: stays {old}; {now} needs a restart"));
                }
            }
        }
        crate::log::prefer(new.log);
        let forwarder = in_force(&self.launched, &new);
        let told = instructions(&self.current.forwarder, &forwarder);
        self.ways.iter_mut().for_each(|way| way.waiting.extend(told.iter().cloned()));
        self.current = Config { forwarder, settings, log: new.log, ..self.launched.clone() };
        let needs = if refused == 1 { "needs" } else { "need" };
        self.summary = Some(format!("{file}: reloaded: {changed} changed, {refused} {needs} a restart"));
        self.pump();
    }

    /// Brings orders to the workers, and their answers back. To be called often.
    pub(crate) fn pump(&mut self) {
        for way in &mut self.ways {
            if way.answers() {
                // A worker begins as it was launched. What its predecessor has not answered is among this.
                way.sent.clear();
                way.waiting = instructions(&self.launched.forwarder, &self.current.forwarder).into();
            }
            way.send();
        }
        if self.ways.iter().all(|way| way.sent.is_empty() && way.waiting.is_empty())
            && let Some(summary) = self.summary.take()
        {
            crate::say(&summary);
        }
    }
}

impl Way {
    /// Hears what the worker says; true when it has started.
    fn answers(&mut self) -> bool {
        let mut started = false;
        while let Some(Answer { number, what }) = self.mailbox.receive() {
            started |= what == Answer::STARTED;
            while self.sent.front().is_some_and(|(sent, _)| *sent <= number) {
                let Some((sent, order)) = self.sent.pop_front() else { break };
                if sent == number && what == Answer::REFUSED {
                    crate::say(&format!("the worker has no room for this: {}", order.what));
                }
            }
        }
        started
    }

    fn send(&mut self) {
        while self.sent.len() < ORDERS as usize {
            let Some(order) = self.waiting.pop_front() else { return };
            if self.mailbox.send(Order { number: self.next, words: order.words }).is_err() {
                return self.waiting.push_front(order);
            }
            self.sent.push_back((self.next, order));
            self.next += 1;
        }
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

/// What runs, with the live settings of `new`: for the ports that were launched, in their order.
fn in_force(launched: &Config, new: &Config) -> Forwarder {
    match (&launched.forwarder, &new.forwarder) {
        (Forwarder::Bridge(before), Forwarder::Bridge(after)) => {
            let mut bridge = BridgeConfig { ports: before.ports.clone(), ..after.clone() };
            let moved = |port: PortId| {
                let name = &new.ports.get(port.index())?.name.value;
                place(&launched.ports, name).map(|index| PortId(index as u8))
            };
            bridge
                .stations
                .retain_mut(|station| moved(station.port).map(|port| station.port = port).is_some());
            for (port, settings) in new.ports.iter().zip(&after.ports) {
                if let Some(index) = place(&launched.ports, &port.name.value) {
                    bridge.ports[index] = *settings;
                }
            }
            Forwarder::Bridge(bridge)
        }
        (Forwarder::Router(_), Forwarder::Router(after)) => Forwarder::Router(after.clone()),
        // What runs cannot become something else.
        (before, _) => before.clone(),
    }
}

/// What to tell a worker that runs `old` so that it runs `new`.
fn instructions(old: &Forwarder, new: &Forwarder) -> Vec<Instruction> {
    match (old, new) {
        (Forwarder::Bridge(old), Forwarder::Bridge(new)) => {
            let instruction =
                |change| Instruction { words: bridge_words(change), what: format!("{change:?}") };
            bridge_changes(old, new).into_iter().map(instruction).collect()
        }
        (Forwarder::Router(old), Forwarder::Router(new)) => {
            let [old, new] = [old, new].map(|router| change::Settings::from(&router.config));
            let instruction = || Instruction { words: router_words(new), what: "settings".to_owned() };
            (old != new).then(instruction).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

fn bridge_changes(old: &BridgeConfig, new: &BridgeConfig) -> Vec<Change> {
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
