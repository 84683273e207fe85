//! Prefixes: the routes that the kernel has for each, and which of them counts.

use super::Model;
use crate::sync::config::RouteTable;
use crate::sync::decode::{How, Kind, Leg, RouteNews};
use crate::tables::{FibError, NextHopId};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What there is for a prefix.
#[derive(Debug, Default)]
pub(super) struct Entry {
    /// Best first.
    candidates: Vec<Candidate>,
    /// What our table says now.
    installed: NextHopId,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Which table is looked at first: lower.
    rank: u32,
    metric: u32,
    target: u32,
    seen: u32,
}

impl Candidate {
    fn order(self) -> (u32, u32) {
        (self.rank, self.metric)
    }
}

/// The kernel's rules look at the tables `local`, `main` and `default` in this order; others are
/// between the last two.
fn rank(table: u32, throw: bool) -> u32 {
    match table {
        _ if throw => u32::MAX,
        255 => 0,
        254 => 1,
        253 => u32::MAX - 1,
        other => other.saturating_add(2).min(u32::MAX - 2),
    }
}

pub(super) fn host(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

/// Multicast, and what never leaves its link, is for the kernel always.
fn never_routed(prefix: &IpNet) -> bool {
    match prefix {
        IpNet::V4(net) => net.prefix_len() >= 4 && net.addr().is_multicast(),
        IpNet::V6(net) => {
            net.prefix_len() >= 8 && net.addr().is_multicast()
                || net.prefix_len() >= 10 && net.addr().is_unicast_link_local()
        }
    }
}

const fn lengths_of(v4: bool) -> usize {
    if v4 { 0 } else { 1 }
}

impl Model {
    /// Puts the prefixes in that the kernel's tables do not have, or have for each interface.
    pub(in crate::sync) fn place_fixed(&mut self) {
        for prefix in ["224.0.0.0/4", "255.255.255.255/32", "ff00::/8", "fe80::/10"] {
            let Ok(prefix) = prefix.parse::<IpNet>() else { continue };
            let news = RouteNews {
                prefix,
                table: 255,
                metric: 0,
                kind: Kind::Fixed(NextHopId::LOCAL),
                how: How::Last,
                whole: true,
                throw: false,
            };
            self.add_route(&news);
        }
    }

    pub(super) fn rib_len(&self) -> usize {
        self.rib.len()
    }

    fn wants_table(&self, table: u32) -> bool {
        match self.config.table {
            RouteTable::All => true,
            RouteTable::Main => matches!(table, 253..=255),
            RouteTable::One(one) => table == one || table == 255,
        }
    }

    pub(super) fn route(&mut self, news: RouteNews) {
        if self.wants_table(news.table) && !never_routed(&news.prefix) {
            self.add_route(&news);
        }
    }

    fn add_route(&mut self, news: &RouteNews) {
        let (target, seen) = (self.target(&news.kind), self.generation);
        let order = (rank(news.table, news.throw), news.metric);
        let fresh = Candidate { rank: order.0, metric: order.1, target, seen };
        let same = |c: &Candidate| c.order() == order;
        let entry = self.rib.entry(news.prefix).or_default();
        let was_empty = entry.candidates.is_empty();
        if let Some(known) = entry.candidates.iter_mut().find(|c| same(c) && c.target == target) {
            known.seen = seen;
            self.release_target(target);
            return;
        }
        let merged = self.merged(news, order, target);
        let candidates = &mut self.rib.entry(news.prefix).or_default().candidates;
        let replaced = match merged {
            Some((at, with)) => {
                // The target of the message was only a part.
                let old = std::mem::replace(&mut candidates[at], Candidate { target: with, ..fresh });
                if with != target {
                    self.release_target(target);
                }
                Some(old.target)
            }
            None if news.how == How::Replace => {
                candidates.iter_mut().find(|c| same(c)).map(|c| std::mem::replace(c, fresh).target)
            }
            None => None,
        };
        if let Some(old) = replaced {
            self.release_target(old);
        } else {
            let entry = self.rib.entry(news.prefix).or_default();
            let at = match news.how {
                How::First => entry.candidates.partition_point(|c| c.order() < order),
                How::Last | How::Replace => entry.candidates.partition_point(|c| c.order() <= order),
            };
            // Most prefixes have one route, and there may be a million.
            entry.candidates.reserve_exact(1);
            entry.candidates.insert(at, fresh);
        }
        if was_empty {
            self.lengths[lengths_of(news.prefix.addr().is_ipv4())][usize::from(news.prefix.prefix_len())] +=
                1;
        }
        self.route_changed(news.prefix, news.kind == Kind::Fixed(NextHopId::LOCAL));
    }

    /// IPv6 gateways of the same prefix and metric are one route: whole in a message, or in one message
    /// each from older kernels. Says which candidate becomes what; the new target is held.
    fn merged(&mut self, news: &RouteNews, order: (u32, u32), target: u32) -> Option<(usize, u32)> {
        if news.prefix.addr().is_ipv4() || news.how == How::Replace {
            return None;
        }
        let with_gateways = |legs: &[Leg]| legs.iter().all(|leg| leg.gateway.is_some());
        let Kind::Legs(legs) = &news.kind else { return None };
        if !with_gateways(legs) {
            return None;
        }
        let entry = self.rib.get(&news.prefix)?;
        let is_route = |c: &Candidate| matches!(self.targets.kind(c.target), Some(Kind::Legs(legs)) if with_gateways(legs));
        let at = entry.candidates.iter().position(|c| c.order() == order && is_route(c))?;
        let known = entry.candidates[at];
        let Some(Kind::Legs(before)) = self.targets.kind(known.target) else { return None };
        if known.target == target {
            return None;
        }
        if news.whole || self.dumping && known.seen != self.generation {
            return Some((at, target));
        }
        let mut all = before.clone();
        all.extend(legs.iter().filter(|leg| !before.contains(leg)).cloned());
        let all = Kind::Legs(all);
        Some((at, self.target(&all)))
    }

    pub(super) fn route_gone(&mut self, news: &RouteNews) {
        if !self.wants_table(news.table) || never_routed(&news.prefix) {
            return;
        }
        let order = (rank(news.table, news.throw), news.metric);
        let Some(entry) = self.rib.get(&news.prefix) else { return };
        let exact = |c: &Candidate| {
            c.order() == order && self.targets.kind(c.target).is_some_and(|kind| *kind == news.kind)
        };
        if let Some(at) = entry.candidates.iter().position(exact) {
            return self.drop_candidate(news.prefix, at);
        }
        // One gateway of several of an IPv6 route.
        let part = match &news.kind {
            Kind::Legs(legs) if news.prefix.addr().is_ipv6() => legs.first(),
            _ => None,
        };
        let holds = |c: &Candidate| match (self.targets.kind(c.target), part) {
            (Some(Kind::Legs(legs)), Some(part)) => {
                legs.iter().any(|leg| (leg.link, leg.gateway) == (part.link, part.gateway))
            }
            _ => false,
        };
        let Some(at) = entry.candidates.iter().position(|c| c.order() == order && holds(c)) else {
            if entry.candidates.iter().any(|c| c.order() == order) {
                // Something that we know otherwise.
                self.doubtful = true;
            }
            return;
        };
        let known = entry.candidates[at];
        let (Some(Kind::Legs(legs)), Kind::Legs(gone)) = (self.targets.kind(known.target), &news.kind) else {
            return;
        };
        let mut left = legs.clone();
        left.retain(|leg| !gone.iter().any(|gone| (leg.link, leg.gateway) == (gone.link, gone.gateway)));
        if left.is_empty() {
            return self.drop_candidate(news.prefix, at);
        }
        let target = self.target(&Kind::Legs(left));
        if let Some(entry) = self.rib.get_mut(&news.prefix) {
            entry.candidates[at].target = target;
        }
        self.release_target(known.target);
        self.route_changed(news.prefix, false);
    }

    fn drop_candidate(&mut self, prefix: IpNet, at: usize) {
        let Some(entry) = self.rib.get_mut(&prefix) else { return };
        let gone = entry.candidates.remove(at);
        if entry.candidates.is_empty() {
            self.lengths[lengths_of(prefix.addr().is_ipv4())][usize::from(prefix.prefix_len())] -= 1;
        }
        let local = self.targets.kind(gone.target) == Some(&Kind::Fixed(NextHopId::LOCAL));
        self.release_target(gone.target);
        self.route_changed(prefix, local);
    }

    pub(super) fn sweep_routes(&mut self, v4: bool) {
        let now = self.generation;
        let mut gone = Vec::new();
        for (prefix, entry) in &self.rib {
            if prefix.addr().is_ipv4() == v4 && entry.candidates.iter().any(|c| c.seen != now) {
                gone.push(*prefix);
            }
        }
        for prefix in gone {
            if never_routed(&prefix) || prefix == IpNet::from(IpAddr::from([255; 4])) {
                continue;
            }
            while let Some(at) =
                self.rib.get(&prefix).and_then(|entry| entry.candidates.iter().position(|c| c.seen != now))
            {
                self.drop_candidate(prefix, at);
            }
            if self.changes >= super::COLLECT_EVERY {
                self.collect();
            }
        }
    }

    /// After a prefix has got or lost a route.
    fn route_changed(&mut self, prefix: IpNet, local: bool) {
        if local {
            let kind = |c: &Candidate| self.targets.kind(c.target);
            let is_local = |c: &Candidate| kind(c) == Some(&Kind::Fixed(NextHopId::LOCAL));
            let own = self.rib.get(&prefix).is_some_and(|entry| entry.candidates.iter().any(is_local));
            let changed = if own { self.own.insert(prefix) } else { self.own.remove(&prefix) };
            self.own_changed |= changed;
        }
        self.publish(prefix);
        self.publish_neighbours_in(prefix);
    }

    /// The target of the best route that leads anywhere now.
    fn best(&self, prefix: &IpNet) -> Option<u32> {
        let entry = self.rib.get(prefix)?;
        entry.candidates.iter().map(|c| c.target).find(|target| self.targets.id(*target).is_some())
    }

    /// The target that an address has when it has no route of its own.
    pub(super) fn cover(&self, address: IpAddr) -> Option<u32> {
        let full = host(address).prefix_len();
        let lengths = &self.lengths[lengths_of(address.is_ipv4())];
        (0..full).rev().filter(|length| lengths[usize::from(*length)] > 0).find_map(|length| {
            let prefix = IpNet::new(address, length).ok()?.trunc();
            self.best(&prefix)
        })
    }

    /// The target of an address.
    pub(super) fn best_of(&self, address: IpAddr) -> Option<u32> {
        self.best(&host(address)).or_else(|| self.cover(address))
    }

    /// What our table should say for a prefix; [`NextHopId::NONE`]: nothing.
    fn wanted(&self, prefix: &IpNet) -> NextHopId {
        let best = self.best(prefix);
        if prefix.prefix_len() == prefix.max_prefix_len() {
            let covering = best.or_else(|| self.cover(prefix.addr()));
            let on_link = |link| covering.is_some_and(|target| self.targets.is_on_link(target, link));
            if let Some(neighbour) = self.neighbours.known_at(prefix.addr(), on_link) {
                return neighbour;
            }
        }
        best.and_then(|target| self.targets.id(target)).unwrap_or_default()
    }

    /// Makes our table say what it should about a prefix.
    pub(super) fn publish(&mut self, prefix: IpNet) {
        let wanted = self.wanted(&prefix);
        let installed = self.rib.entry(prefix).or_default().installed;
        if wanted == installed {
            self.unplaced.remove(&prefix);
        } else if wanted == NextHopId::NONE {
            match prefix {
                IpNet::V4(net) => self.tables.fib4.remove(net),
                IpNet::V6(net) => self.tables.fib6.remove(net),
            };
            self.installed(prefix, NextHopId::NONE);
            self.unplaced.remove(&prefix);
            self.release(installed);
        } else {
            match self.insert(prefix, wanted) {
                Ok(()) => {
                    self.installed(prefix, wanted);
                    self.unplaced.remove(&prefix);
                    self.hold(wanted);
                    self.release(installed);
                }
                Err(error) => {
                    self.unplaced.insert(prefix);
                    self.full(&error);
                }
            }
        }
        if let Some(entry) = self.rib.get(&prefix)
            && entry.candidates.is_empty()
            && entry.installed == NextHopId::NONE
        {
            self.rib.remove(&prefix);
        }
    }

    fn installed(&mut self, prefix: IpNet, id: NextHopId) {
        self.changes += 1;
        if let Some(entry) = self.rib.get_mut(&prefix) {
            entry.installed = id;
        }
    }

    /// Puts a prefix in; while workers still hold what was unlinked, for a moment again.
    fn insert(&mut self, prefix: IpNet, to: NextHopId) -> Result<(), FibError> {
        /// Together more than the turn of a worker takes. One that hangs is not waited for each time.
        const TRIES: u32 = 20;
        const PAUSE: Duration = Duration::from_micros(100);
        const AFTER_A_HANG: Duration = Duration::from_millis(500);
        let hangs = self.hung.is_some_and(|since| since.elapsed() < AFTER_A_HANG);
        let mut tries = if hangs { 0 } else { TRIES };
        loop {
            let done = match prefix {
                IpNet::V4(net) => self.tables.fib4.insert(net, to),
                IpNet::V6(net) => self.tables.fib6.insert(net, to),
            };
            match done {
                Err(FibError::Full { retired, .. }) if retired > 0 && tries > 0 => {
                    tries -= 1;
                    self.collect();
                    std::thread::sleep(PAUSE);
                }
                Err(error) => {
                    if !hangs && matches!(error, FibError::Full { retired, .. } if retired > 0) {
                        self.hung = Some(Instant::now());
                    }
                    return Err(error);
                }
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Tries again what had no room.
    pub(in crate::sync) fn place_unplaced(&mut self) {
        /// What is tried in one go.
        const TRIES: usize = 64;
        let some: Vec<IpNet> = self.unplaced.iter().take(TRIES).copied().collect();
        for prefix in some {
            let wanted = self.wanted(&prefix);
            if wanted != NextHopId::NONE && self.insert(prefix, wanted).is_err() {
                // As full as before.
                return;
            }
            self.publish(prefix);
        }
        if self.unplaced.is_empty() {
            self.said_full = false;
        }
    }

    /// Publishes all prefixes with a route to one of these targets.
    pub(super) fn publish_targets(&mut self, changed: &HashSet<u32>) {
        let names = |entry: &Entry| entry.candidates.iter().any(|c| changed.contains(&c.target));
        let prefixes: Vec<IpNet> =
            self.rib.iter().filter(|(_, entry)| names(entry)).map(|(prefix, _)| *prefix).collect();
        for prefix in prefixes {
            self.publish(prefix);
            self.publish_neighbours_in(prefix);
            if self.changes >= super::COLLECT_EVERY {
                self.collect();
            }
        }
    }
}

/// The addresses of a prefix, first and last.
pub(super) fn range(prefix: IpNet) -> (IpAddr, IpAddr) {
    match prefix {
        IpNet::V4(net) => (Ipv4Net::network(&net).into(), Ipv4Net::broadcast(&net).into()),
        IpNet::V6(net) => (Ipv6Net::network(&net).into(), Ipv6Net::broadcast(&net).into()),
    }
}
