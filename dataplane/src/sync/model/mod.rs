//! What is known of the kernel's tables, and how it is put into ours.
//!
//! Contract: [`Model::apply`] takes one event and changes our tables for it; what several events change
//! in common is put off to [`Model::settle`], which follows each batch. Every event may come twice, and
//! late. Between [`Model::begin`] and [`Model::sweep`] the same events are the answer to a dump: what is
//! not seen in between is gone.

mod links;
mod neighbours;
mod routes;
mod targets;

use super::config::SyncConfig;
use super::decode::{Event, ObjectNews};
use super::socket::Dump;
use super::status::Counters;
use crate::app::PortId;
use crate::tables::{Epochs, Immediate, InterfaceId, NextHopId, TablesWriter};
use ipnet::IpNet;
use links::Link;
use neighbours::Neighbours;
use routes::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;
use targets::Targets;

pub(super) use neighbours::Asked;

/// Changes of the tables between two looks at what may be used again.
const COLLECT_EVERY: u32 = 256;

pub(super) struct Model {
    tables: TablesWriter,
    /// How far the readers of the tables are.
    epochs: Box<dyn Epochs + Send>,
    config: SyncConfig,
    counters: Arc<Counters>,
    links: HashMap<u32, Link>,
    /// Places in the table of interfaces, for good.
    places: HashMap<(PortId, Option<u16>), InterfaceId>,
    /// What is on each interface's link and not resolved.
    on_link: HashMap<InterfaceId, NextHopId>,
    objects: HashMap<u32, (ObjectNews, u32)>,
    targets: Targets,
    neighbours: Neighbours,
    rib: HashMap<IpNet, Entry>,
    /// Prefixes with routes, by length.
    lengths: [Vec<u32>; 2],
    /// How many prefixes and other things name a next hop.
    holders: Vec<u32>,
    /// Prefixes whose routes are not in our tables for want of room.
    unplaced: HashSet<IpNet>,
    /// Prefixes that are the router's own, and whether they have changed.
    own: BTreeSet<IpNet>,
    own_changed: bool,
    /// Number of the dump that is under way, or of the last one.
    generation: u32,
    dumping: bool,
    /// The kernel may have dropped things without saying so.
    doubtful: bool,
    parameters_changed: bool,
    changes: u32,
    said_full: bool,
    /// When a worker did not end its turn although it was waited for.
    hung: Option<Instant>,
}

impl Model {
    pub(super) fn new(config: SyncConfig, tables: TablesWriter, counters: Arc<Counters>) -> Self {
        Self {
            tables,
            epochs: Box::new(Immediate),
            config,
            counters,
            links: HashMap::new(),
            places: HashMap::new(),
            on_link: HashMap::new(),
            objects: HashMap::new(),
            targets: Targets::default(),
            neighbours: Neighbours::default(),
            rib: HashMap::new(),
            lengths: [vec![0; 33], vec![0; 129]],
            holders: Vec::new(),
            unplaced: HashSet::new(),
            own: BTreeSet::new(),
            own_changed: true,
            generation: 0,
            dumping: false,
            doubtful: false,
            parameters_changed: false,
            changes: 0,
            said_full: false,
            hung: None,
        }
    }

    /// Workers read the tables from now on.
    pub(super) fn set_epochs(&mut self, epochs: Box<dyn Epochs + Send>) {
        self.epochs = epochs;
    }

    /// A dump begins.
    pub(super) fn begin(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.dumping = true;
        self.doubtful = false;
    }

    /// A dump has ended.
    pub(super) fn end(&mut self) {
        self.dumping = false;
    }

    /// Takes away what a dump did not show.
    pub(super) fn sweep(&mut self, what: Dump) {
        let now = self.generation;
        match what {
            Dump::Links => {
                let gone: Vec<u32> =
                    self.links.values().filter(|link| link.seen != now).map(|link| link.index).collect();
                gone.into_iter().for_each(|index| self.link_gone(index));
            }
            Dump::Addresses => self.sweep_addresses(),
            Dump::Objects => {
                let gone = self.objects.iter().filter(|(_, (_, seen))| *seen != now);
                let gone: Vec<u32> = gone.map(|(id, _)| *id).collect();
                gone.into_iter().for_each(|id| self.object_gone(id));
            }
            Dump::Routes4 => self.sweep_routes(true),
            Dump::Routes6 => self.sweep_routes(false),
            Dump::Neighbours4 => self.sweep_neighbours(true),
            Dump::Neighbours6 => self.sweep_neighbours(false),
        }
    }

    /// Takes what the kernel says.
    pub(super) fn apply(&mut self, event: Event) {
        match event {
            Event::Link(news) => self.link(news),
            Event::LinkGone(index) => self.link_gone(index),
            Event::Address(news) => self.address(&news),
            Event::AddressGone(news) => self.address_gone(&news),
            Event::Neighbour(news) => self.neighbour(&news),
            Event::NeighbourGone { link, address } => self.neighbour_gone(address, link),
            Event::Route(news) => self.route(news),
            Event::RouteGone(news) => self.route_gone(&news),
            Event::Object { id, what } => self.object(id, what),
            Event::ObjectGone(id) => {
                // Its routes go with it, and IPv4's without a word.
                self.doubtful = true;
                self.object_gone(id);
            }
            Event::Parameters => self.parameters_changed = true,
        }
        if self.changes >= COLLECT_EVERY {
            self.collect();
        }
    }

    /// Puts into the tables what the events of a batch have changed in common.
    pub(super) fn settle(&mut self) {
        if std::mem::take(&mut self.parameters_changed) {
            self.read_parameters();
        }
        self.settle_targets();
        self.place_unplaced();
        self.collect();
        self.counters.tables(
            self.rib_len(),
            self.neighbours.len(),
            self.objects.len(),
            self.places.len(),
            self.unplaced.len(),
        );
    }

    /// Is there anything that had no room?
    pub(super) fn has_unplaced(&self) -> bool {
        !self.unplaced.is_empty()
    }

    /// Does anything have to be read again from the kernel?
    pub(super) fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// The router's own prefixes, if they have changed since this was asked last.
    pub(super) fn own_if_changed(&mut self) -> Option<&BTreeSet<IpNet>> {
        std::mem::take(&mut self.own_changed).then_some(&self.own)
    }

    /// They are to be asked for once more.
    pub(super) fn own_not_taken(&mut self) {
        self.own_changed = true;
    }

    fn collect(&mut self) {
        self.changes = 0;
        self.tables.collect(self.epochs.as_ref());
    }

    /// Counts what names a next hop.
    fn hold(&mut self, id: NextHopId) {
        let at = id.get() as usize;
        if self.holders.len() <= at {
            self.holders.resize(at + 1, 0);
        }
        self.holders[at] += 1;
    }

    /// The next hop is taken away when nothing names it any more.
    fn release(&mut self, id: NextHopId) {
        if let Some(holders) = self.holders.get_mut(id.get() as usize)
            && *holders > 0
        {
            *holders -= 1;
            if *holders == 0 {
                self.changes += 1;
                self.tables.next_hops.remove(id);
            }
        }
    }

    /// No room: counted, and said once until there was room again.
    fn full(&mut self, why: &dyn std::fmt::Display) {
        self.counters.full();
        if !std::mem::replace(&mut self.said_full, true) {
            tracing::error!("a table is full, so packets go by what it had: {why}");
        }
    }
}
