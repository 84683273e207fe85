//! Neighbours: one next hop for each address on each link, whether routes lead to it or packets to
//! itself.
//!
//! Contract: the kernel resolves them. What is unresolved here is bounded, and asked for at most once a
//! second each; a neighbour that answered is kept until the kernel says otherwise.

use super::Model;
use super::routes::{host, range};
use crate::blocks::router::Request;
use crate::sync::decode::{NeighbourNews, nud};
use crate::sync::socket::Ask;
use crate::tables::{InterfaceId, NextHop, NextHopId};
use crate::wire::ethernet::MacAddress;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How long one that did not answer stays failed, before the next packet may ask again.
const FAILED_FOR: Duration = Duration::from_secs(3);
/// How long an answer is waited for; the kernel gives up after three seconds by default.
const WAIT_FOR: Duration = Duration::from_secs(10);
/// At most one question in this time for each neighbour.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Neighbours that are waited for, or failed, at most, gateways not counted; and questions that may wait.
const MOST_UNRESOLVED: usize = 4096;

type Key = (IpAddr, u32);

#[derive(Debug, Default)]
pub(super) struct Neighbours {
    known: BTreeMap<Key, Neighbour>,
    by_id: HashMap<NextHopId, Key>,
    to_ask: VecDeque<Key>,
    /// When to look at one again that is unresolved since then.
    deadlines: BTreeSet<(Instant, Key, Instant)>,
    unresolved: usize,
}

#[derive(Debug)]
struct Neighbour {
    id: Option<NextHopId>,
    state: State,
    since: Instant,
    /// Targets with it as a gateway.
    users: u32,
    learned: bool,
    /// The kernel keeps it alive because we asked it to.
    managed: bool,
    queued: bool,
    asked: Option<Instant>,
    seen: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The kernel has said nothing about it.
    Unknown,
    Waiting,
    Failed,
    Usable {
        mac: MacAddress,
        /// Put there for good; never to be asked for.
        fixed: bool,
    },
}

impl State {
    const fn is_unresolved(self) -> bool {
        matches!(self, Self::Waiting | Self::Failed)
    }
}

/// What came of a worker's request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::sync) enum Asked {
    /// It will be asked for, or was a moment ago.
    Yes,
    /// It makes no sense (any more).
    Refused,
    /// Too many are unresolved.
    Limited,
}

impl Neighbours {
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// The next hop of an address that the kernel knows as a neighbour, on a link where it may be.
    pub(super) fn known_at(&self, address: IpAddr, may_be: impl Fn(u32) -> bool) -> Option<NextHopId> {
        let all = self.known.range((address, 0)..=(address, u32::MAX));
        let known = |(_, n): &(&Key, &Neighbour)| n.state != State::Unknown;
        all.filter(known).find(|((_, link), _)| may_be(*link)).and_then(|(_, n)| n.id)
    }

    fn queue(&mut self, key: Key) {
        if self.to_ask.len() < MOST_UNRESOLVED
            && let Some(neighbour) = self.known.get_mut(&key)
            && !std::mem::replace(&mut neighbour.queued, true)
        {
            self.to_ask.push_back(key);
        }
    }
}

impl Model {
    /// The neighbour, with a next hop if there is room for one.
    fn known(&mut self, key: Key) -> &mut Neighbour {
        let seen = self.generation;
        let id = self.neighbours.known.get(&key).and_then(|neighbour| neighbour.id);
        let id = id.or_else(|| match self.tables.next_hops.add(NextHop::None) {
            Ok(id) => {
                self.hold(id);
                self.neighbours.by_id.insert(id, key);
                // For redirects.
                self.tables.next_hops.set_address(id, Some(key.0));
                Some(id)
            }
            Err(error) => {
                self.full(&error);
                None
            }
        });
        let neighbour = self.neighbours.known.entry(key).or_insert_with(|| Neighbour {
            id,
            state: State::Unknown,
            since: Instant::now(),
            users: 0,
            learned: false,
            managed: false,
            queued: false,
            asked: None,
            seen,
        });
        neighbour.id = id;
        neighbour
    }

    pub(super) fn use_gateway(&mut self, address: IpAddr, link: u32) {
        let key = (address, link);
        let neighbour = self.known(key);
        neighbour.users += 1;
        let (first, usable) = (neighbour.users == 1, matches!(neighbour.state, State::Usable { .. }));
        self.write(key);
        if first || !usable {
            self.neighbours.queue(key);
        }
    }

    pub(super) fn unuse_gateway(&mut self, address: IpAddr, link: u32) {
        let key = (address, link);
        let Some(neighbour) = self.neighbours.known.get_mut(&key) else { return };
        neighbour.users = neighbour.users.saturating_sub(1);
        if neighbour.users > 0 {
            return;
        }
        if neighbour.managed {
            // The kernel need not keep it alive any more.
            self.neighbours.queue(key);
        }
        self.forget_if_unknown(key);
    }

    pub(super) fn gateway_id(&self, address: IpAddr, link: u32) -> Option<NextHopId> {
        self.neighbours.known.get(&(address, link))?.id
    }

    /// Puts into the next hop's word what is known.
    fn write(&mut self, key: Key) {
        let Some(neighbour) = self.neighbours.known.get(&key) else { return };
        let (Some(id), state) = (neighbour.id, neighbour.state) else { return };
        let what = match (self.interface_of(key.1), state) {
            (None, _) => NextHop::None,
            (Some(interface), State::Unknown | State::Waiting) => NextHop::Waiting { interface },
            (Some(interface), State::Failed) => NextHop::Failed { interface },
            (Some(interface), State::Usable { mac, .. }) => NextHop::Forward { interface, mac },
        };
        if self.tables.next_hops.reader().get(id) != what
            && let Err(error) = self.tables.next_hops.set(id, what)
        {
            tracing::warn!("a neighbour's next hop could not be changed: {error}");
        }
    }

    fn set_state(&mut self, key: Key, state: State) {
        let now = Instant::now();
        let Some(neighbour) = self.neighbours.known.get_mut(&key) else { return };
        let was = std::mem::replace(&mut neighbour.state, state);
        if was == state {
            return;
        }
        neighbour.since = now;
        self.neighbours.unresolved += usize::from(state.is_unresolved());
        self.neighbours.unresolved -= usize::from(was.is_unresolved());
        match state {
            State::Waiting => drop(self.neighbours.deadlines.insert((now + WAIT_FOR, key, now))),
            State::Failed => drop(self.neighbours.deadlines.insert((now + FAILED_FOR, key, now))),
            State::Unknown | State::Usable { .. } => {}
        }
        self.write(key);
        if (was == State::Unknown) != (state == State::Unknown) {
            self.publish_neighbour(key.0);
        }
    }

    fn publish_neighbour(&mut self, address: IpAddr) {
        // A link's own addresses are in no table; gateways may have them.
        let link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        if !link_local {
            self.publish(host(address));
        }
    }

    pub(super) fn publish_neighbours_in(&mut self, prefix: IpNet) {
        if prefix.prefix_len() == prefix.max_prefix_len() {
            return;
        }
        let (first, last) = range(prefix);
        let within = self.neighbours.known.range((first, 0)..=(last, u32::MAX));
        let mut addresses: Vec<IpAddr> = within.map(|((address, _), _)| *address).collect();
        addresses.dedup();
        addresses.into_iter().for_each(|address| self.publish_neighbour(address));
    }

    pub(super) fn neighbour(&mut self, news: &NeighbourNews) {
        let key = (news.address, news.link);
        let broadcast = matches!(news.address, IpAddr::V4(address) if address.is_broadcast());
        if !self.is_ours(news.link) || news.address.is_multicast() || broadcast {
            return;
        }
        let state = match news.mac {
            Some(mac) if news.state & nud::VALID != 0 => {
                State::Usable { mac, fixed: news.state & (nud::PERMANENT | nud::NOARP) != 0 }
            }
            _ if news.state & nud::FAILED != 0 => State::Failed,
            _ if news.state & nud::INCOMPLETE != 0 => State::Waiting,
            _ => return,
        };
        let seen = self.generation;
        let neighbour = self.known(key);
        (neighbour.seen, neighbour.learned) = (seen, news.learned);
        let users = neighbour.users;
        if news.managed && users == 0 {
            // Somebody else's wish; it is not ours to end.
            neighbour.managed = false;
        }
        self.set_state(key, state);
        // One that is used by our packets only would never be asked again whether it is still there.
        if news.state & nud::STALE != 0 && !self.dumping && !news.learned {
            self.neighbours.queue(key);
        }
    }

    pub(super) fn neighbour_gone(&mut self, address: IpAddr, link: u32) {
        let key = (address, link);
        let Some(neighbour) = self.neighbours.known.get_mut(&key) else { return };
        neighbour.managed = false;
        let used = neighbour.users > 0;
        self.set_state(key, State::Unknown);
        if used {
            self.neighbours.queue(key);
        }
        self.forget_if_unknown(key);
    }

    fn forget_if_unknown(&mut self, key: Key) {
        let unknown = |n: &Neighbour| n.users == 0 && n.state == State::Unknown && !n.queued;
        if self.neighbours.known.get(&key).is_some_and(unknown)
            && let Some(neighbour) = self.neighbours.known.remove(&key)
            && let Some(id) = neighbour.id
        {
            self.neighbours.by_id.remove(&id);
            self.release(id);
        }
    }

    pub(super) fn forget_neighbours_of(&mut self, link: u32) {
        let of = |key: &&Key| key.1 == link;
        let keys: Vec<Key> = self.neighbours.known.keys().filter(of).copied().collect();
        for (address, link) in keys {
            self.neighbour_gone(address, link);
        }
    }

    /// The link's interface is another now.
    pub(super) fn rewrite_neighbours_of(&mut self, link: u32) {
        let of = |key: &&Key| key.1 == link;
        let keys: Vec<Key> = self.neighbours.known.keys().filter(of).copied().collect();
        keys.into_iter().for_each(|key| self.write(key));
    }

    pub(super) fn sweep_neighbours(&mut self, v4: bool) {
        let now = self.generation;
        let gone = |(key, n): &(&Key, &Neighbour)| {
            // What we have asked for may be younger than the dump.
            key.0.is_ipv4() == v4 && n.seen != now && !matches!(n.state, State::Unknown | State::Waiting)
        };
        let keys: Vec<Key> = self.neighbours.known.iter().filter(gone).map(|(key, _)| *key).collect();
        for (address, link) in keys {
            self.neighbour_gone(address, link);
        }
    }

    /// A worker wants a neighbour.
    pub(in crate::sync) fn request(&mut self, request: Request) -> Asked {
        let key = match request {
            Request::NextHop { id } => match self.neighbours.by_id.get(&id) {
                Some(key) => *key,
                None => return Asked::Refused,
            },
            Request::Neighbour { interface, address } => match self.may_ask(interface, address) {
                Some(link) => (address, link),
                None => return Asked::Refused,
            },
        };
        let state = self.neighbours.known.get(&key).map_or(State::Unknown, |neighbour| neighbour.state);
        if matches!(state, State::Usable { .. }) {
            return Asked::Yes;
        }
        if state == State::Unknown {
            if self.neighbours.unresolved >= MOST_UNRESOLVED {
                return Asked::Limited;
            }
            if self.known(key).id.is_none() {
                self.forget_if_unknown(key);
                return Asked::Limited;
            }
            self.set_state(key, State::Waiting);
        }
        self.neighbours.queue(key);
        Asked::Yes
    }

    /// The link, if the address can be a neighbour there: only what a route says is on the link.
    fn may_ask(&self, interface: InterfaceId, address: IpAddr) -> Option<u32> {
        let link = self.link_of(interface)?;
        if address.is_multicast() || address.is_unspecified() || address.is_loopback() {
            return None;
        }
        let target = self.best_of(address)?;
        self.targets.is_on_link(target, link).then_some(link)
    }

    /// The questions to the kernel that are due, at most so many.
    pub(in crate::sync) fn asks(&mut self, most: usize) -> Vec<Ask> {
        let now = Instant::now();
        self.expire(now);
        let mut asks = Vec::new();
        while asks.len() < most
            && let Some(key) = self.neighbours.to_ask.pop_front()
        {
            let up = self.is_up(key.1);
            let Some(neighbour) = self.neighbours.known.get_mut(&key) else { continue };
            neighbour.queued = false;
            let keep = neighbour.users > 0;
            let fixed = matches!(neighbour.state, State::Usable { fixed: true, .. });
            let recently = neighbour.asked.is_some_and(|asked| now.duration_since(asked) < ASK_EVERY);
            let same = neighbour.managed == keep;
            // One that only has to be let go is not to be made again.
            let (unknown, create) =
                (neighbour.state == State::Unknown, keep || neighbour.state.is_unresolved());
            let due = up && !fixed && !(recently && same);
            if due && (keep || !unknown || neighbour.managed) {
                neighbour.asked = Some(now);
                neighbour.managed = keep;
                let (address, link) = key;
                asks.push(Ask { link, address, managed: keep, learned: neighbour.learned, create });
            }
            if unknown && keep && up {
                self.set_state(key, State::Waiting);
            }
            self.forget_if_unknown(key);
        }
        asks
    }

    /// The kernel would not ask: its own table may be full.
    pub(in crate::sync) fn ask_failed(&mut self, ask: &Ask) {
        let key = (ask.address, ask.link);
        if let Some(neighbour) = self.neighbours.known.get_mut(&key) {
            neighbour.managed = false;
            if neighbour.state == State::Waiting {
                self.set_state(key, State::Failed);
            }
        }
    }

    /// Lets what did not answer be asked for again, or be forgotten.
    fn expire(&mut self, now: Instant) {
        while self.neighbours.deadlines.first().is_some_and(|(due, ..)| *due <= now)
            && let Some((_, key, since)) = self.neighbours.deadlines.pop_first()
        {
            let Some(neighbour) = self.neighbours.known.get(&key) else { continue };
            if neighbour.since != since || !neighbour.state.is_unresolved() {
                continue;
            }
            if neighbour.users > 0 {
                self.neighbours.queue(key);
            }
            self.set_state(key, State::Unknown);
            self.forget_if_unknown(key);
        }
    }

    /// Gateways that the kernel keeps alive for us: to be let go at the end.
    pub(in crate::sync) fn managed(&self) -> Vec<Ask> {
        let ours = self.neighbours.known.iter().filter(|(_, neighbour)| neighbour.managed);
        ours.map(|((address, link), neighbour)| Ask {
            link: *link,
            address: *address,
            managed: false,
            learned: neighbour.learned,
            create: false,
        })
        .collect()
    }
}
