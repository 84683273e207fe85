//! Interfaces: which are the router's, and what the kernel says about them.

use super::Model;
use crate::app::PortId;
use crate::sync::config::parameters;
use crate::sync::decode::{AddressNews, LinkNews};
use crate::tables::{Interface, InterfaceId, NextHop, NextHopId};
use crate::wire::ethernet::MacAddress;
use std::net::IpAddr;

/// An interface of the kernel.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) index: u32,
    news: LinkNews,
    /// The router's, if it is one of them.
    ours: Option<Ours>,
    addresses: Vec<(AddressNews, u32)>,
    pub(super) seen: u32,
    /// Packets go nowhere from an interface without carrier, rather than into it: IPv4, IPv6.
    ignore_without_carrier: [bool; 2],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ours {
    id: InterfaceId,
    port: PortId,
    vlan: Option<u16>,
}

/// Where a path over an interface leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Nowhere now.
    Dead,
    /// To the kernel, which has interfaces that we have not.
    Kernel,
    Ours {
        interface: InterfaceId,
        carrier: bool,
    },
}

impl Model {
    /// Where paths over a link of the kernel lead.
    pub(super) fn way(&self, index: u32, v4: bool) -> Way {
        if index == crate::sync::decode::KERNEL {
            return Way::Kernel;
        }
        let Some(link) = self.links.get(&index) else { return Way::Dead };
        let carrier = link.news.carrier;
        match link.ours {
            _ if !link.news.up => Way::Dead,
            Some(_) if !carrier && link.ignore_without_carrier[usize::from(!v4)] => Way::Dead,
            Some(ours) => Way::Ours { interface: ours.id, carrier },
            None => Way::Kernel,
        }
    }

    pub(super) fn interface_of(&self, index: u32) -> Option<InterfaceId> {
        self.links.get(&index)?.ours.map(|ours| ours.id)
    }

    pub(super) fn is_up(&self, index: u32) -> bool {
        self.links.get(&index).is_some_and(|link| link.ours.is_some() && link.news.up)
    }

    pub(super) fn is_ours(&self, index: u32) -> bool {
        self.links.get(&index).is_some_and(|link| link.ours.is_some())
    }

    pub(super) fn link_of(&self, interface: InterfaceId) -> Option<u32> {
        let of = |link: &&Link| link.ours.is_some_and(|ours| ours.id == interface);
        self.links.values().find(of).map(|link| link.index)
    }

    /// The next hop of what is on an interface's link.
    pub(super) fn on_link(&mut self, interface: InterfaceId) -> Option<NextHopId> {
        if let Some(id) = self.on_link.get(&interface) {
            return Some(*id);
        }
        match self.tables.next_hops.add(NextHop::OnLink { interface }) {
            Ok(id) => {
                self.hold(id);
                self.on_link.insert(interface, id);
                Some(id)
            }
            Err(error) => {
                self.full(&error);
                None
            }
        }
    }

    pub(super) fn link(&mut self, news: LinkNews) {
        let index = news.index;
        let seen = self.generation;
        let link = self.links.entry(index).or_insert_with(|| Link {
            index,
            news: LinkNews::default(),
            ours: None,
            addresses: Vec::new(),
            seen,
            ignore_without_carrier: [false; 2],
        });
        link.seen = seen;
        if link.news == news {
            return;
        }
        let was = std::mem::replace(&mut link.news, news);
        let (up, carrier) = (link.news.up, link.news.carrier);
        if was.up && !up {
            // The kernel drops the IPv4 routes of the interface without a word.
            self.doubtful = true;
        }
        if (was.up, was.carrier) != (up, carrier) {
            self.links_changed(index);
        }
        self.identify(index);
        self.publish_link(index);
        // Sub-interfaces may have been there before.
        let above = |link: &&Link| link.news.vlan.is_some_and(|(below, _)| below == index);
        let above: Vec<u32> = self.links.values().filter(above).map(|link| link.index).collect();
        for index in above {
            self.identify(index);
            self.publish_link(index);
        }
    }

    /// Finds out whether a link is one of the router's interfaces.
    fn identify(&mut self, index: u32) {
        let Some(link) = self.links.get(&index) else { return };
        let found = match link.news.vlan {
            // As long as an interface lives the port is bound to it, whatever it is called.
            _ if link.ours.is_some_and(|ours| ours.vlan.is_none()) => return,
            Some((below, id)) => self
                .links
                .get(&below)
                .and_then(|below| below.ours)
                .filter(|below| below.vlan.is_none())
                .map(|below| (below.port, Some(id))),
            None => self.config.interfaces.get(&link.news.name).map(|port| (*port, None)),
        };
        // One that was made under a name that another still has as its port's is not the port's.
        let found = found.filter(|found| {
            !self.links.values().any(|other| {
                other.index != index && other.ours.is_some_and(|ours| (ours.port, ours.vlan) == *found)
            })
        });
        let ours = found.and_then(|(port, vlan)| Some(Ours { id: self.place(port, vlan)?, port, vlan }));
        let Some(link) = self.links.get_mut(&index) else { return };
        let was = std::mem::replace(&mut link.ours, ours);
        if was == ours {
            return;
        }
        if let Some(was) = was {
            self.tables.interfaces.set(was.id, None);
        }
        if ours.is_some() {
            self.read_ignoring(index);
        }
        self.rewrite_neighbours_of(index);
        // What was read about it before was read as that of a stranger.
        self.doubtful |= !self.dumping;
        self.links_changed(index);
    }

    /// The place of an interface in our table: the same each time.
    fn place(&mut self, port: PortId, vlan: Option<u16>) -> Option<InterfaceId> {
        if let Some(id) = self.places.get(&(port, vlan)) {
            return Some(*id);
        }
        let id = InterfaceId::new(u16::try_from(self.places.len()).ok()?)?;
        if id.index() >= self.tables.interfaces.reader().len() {
            self.full(&"no place is left for an interface; make the tables with more interfaces");
            return None;
        }
        self.places.insert((port, vlan), id);
        Some(id)
    }

    pub(super) fn link_gone(&mut self, index: u32) {
        let Some(link) = self.links.remove(&index) else { return };
        if let Some(ours) = link.ours {
            self.tables.interfaces.set(ours.id, None);
        }
        self.doubtful |= !self.dumping;
        self.links_changed(index);
        self.forget_neighbours_of(index);
        // Sub-interfaces of it are ours no more, and another link may have waited for its place.
        let concerned = |l: &&Link| l.ours.is_none_or(|ours| ours.vlan.is_some());
        let others: Vec<u32> = self.links.values().filter(concerned).map(|l| l.index).collect();
        for other in others {
            self.identify(other);
            self.publish_link(other);
        }
    }

    /// Reads the kernel's parameters of all our interfaces again.
    pub(super) fn read_parameters(&mut self) {
        let ours: Vec<u32> = self.links.values().filter(|l| l.ours.is_some()).map(|l| l.index).collect();
        for index in ours {
            self.read_ignoring(index);
            self.publish_link(index);
        }
    }

    fn read_ignoring(&mut self, index: u32) {
        let Some(link) = self.links.get_mut(&index) else { return };
        let ignore = parameters::ignore_without_carrier(&link.news.name);
        if std::mem::replace(&mut link.ignore_without_carrier, ignore) != ignore {
            self.links_changed(index);
        }
    }

    /// Puts what is known about a link of ours into our table.
    fn publish_link(&mut self, index: u32) {
        let Some(link) = self.links.get(&index) else { return };
        let Some(ours) = link.ours else { return };
        let parameters = parameters::read(&link.news.name, &self.config.overrides);
        let interface = Interface {
            port: ours.port,
            vlan: ours.vlan,
            mac: link.news.mac.unwrap_or(MacAddress([0; 6])),
            mtu: u16::try_from(link.news.mtu).unwrap_or(u16::MAX),
            up: link.news.up,
            forward4: parameters.forward4,
            forward6: parameters.forward6,
            reverse_path: parameters.reverse_path,
            redirects: parameters.redirects,
            directed_broadcast: parameters.directed_broadcast,
            address4: link.best_address(true).and_then(|address| match address {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            }),
            address6: link.best_address(false).and_then(|address| match address {
                IpAddr::V6(address) => Some(address),
                IpAddr::V4(_) => None,
            }),
        };
        if self.tables.interfaces.reader().get(ours.id) != Some(interface) {
            self.tables.interfaces.set(ours.id, Some(&interface));
        }
    }

    pub(super) fn address(&mut self, news: &AddressNews) {
        let seen = self.generation;
        let Some(link) = self.links.get_mut(&news.link) else { return };
        match link.addresses.iter_mut().find(|(known, _)| known.address == news.address) {
            Some(known) => *known = (news.clone(), seen),
            None => link.addresses.push((news.clone(), seen)),
        }
        self.publish_link(news.link);
    }

    pub(super) fn address_gone(&mut self, news: &AddressNews) {
        let Some(link) = self.links.get_mut(&news.link) else { return };
        link.addresses.retain(|(known, _)| known.address != news.address);
        // Routes that prefer it as their source go with it, without a word.
        self.doubtful = true;
        self.publish_link(news.link);
    }

    pub(super) fn sweep_addresses(&mut self) {
        let now = self.generation;
        let mut changed = Vec::new();
        for link in self.links.values_mut() {
            let before = link.addresses.len();
            link.addresses.retain(|(_, seen)| *seen == now);
            if link.addresses.len() != before {
                changed.push(link.index);
            }
        }
        changed.into_iter().for_each(|index| self.publish_link(index));
    }
}

impl Link {
    /// The address that errors are sent from: a primary one that is good beyond the link, if there is.
    fn best_address(&self, v4: bool) -> Option<IpAddr> {
        let usable = self.addresses.iter().map(|(news, _)| news);
        let usable = usable.filter(|news| news.address.is_ipv4() == v4 && !news.tentative);
        // The first of those that are equally good.
        usable.min_by_key(|news| (!news.global, news.secondary)).map(|news| news.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::SyncConfig;
    use crate::sync::decode::Event;
    use crate::tables::{Interfaces, Tables, TablesConfig};
    use std::sync::Arc;

    fn model() -> (Model, Interfaces) {
        let small =
            TablesConfig { routes4: 64, routes6: 64, next_hops: 64, group_buckets: 128, interfaces: 3 };
        let (writer, tables) = Tables::create("links", &small).unwrap();
        let config = SyncConfig::new([("no-such-if", PortId(3))]);
        (Model::new(config, writer, Arc::default()), tables.interfaces)
    }

    fn link(index: u32, name: &str, vlan: Option<(u32, u16)>) -> Event {
        let mac = Some(MacAddress([2, 0, 0, 0, 0, index as u8]));
        Event::Link(LinkNews {
            index,
            name: name.to_owned(),
            mac,
            mtu: 70_000,
            up: true,
            carrier: true,
            vlan,
        })
    }

    fn there(interfaces: &Interfaces) -> Vec<(u8, Option<u16>, u8)> {
        let all = (0..3).filter_map(|place| interfaces.get(InterfaceId::new(place)?));
        all.map(|interface| (interface.port.0, interface.vlan, interface.mac.0[5])).collect()
    }

    #[test]
    fn vlan_sub_interfaces_are_their_ports_whatever_comes_first() {
        let (mut model, interfaces) = model();
        model.apply(link(9, "first", Some((4, 77))));
        model.apply(link(5, "double", Some((9, 5))));
        model.settle();
        assert_eq!(there(&interfaces), []);
        model.apply(link(4, "no-such-if", None));
        model.settle();
        // A tag in a tag is the kernel's.
        assert_eq!(there(&interfaces), [(3, None, 4), (3, Some(77), 9)]);
        assert_eq!(interfaces.get(InterfaceId::default()).unwrap().mtu, u16::MAX);
        model.apply(link(6, "second", Some((4, 78))));
        model.settle();
        assert_eq!(there(&interfaces), [(3, None, 4), (3, Some(77), 9), (3, Some(78), 6)]);
        // No place for a third; and an interface keeps its place when it comes back.
        model.apply(link(7, "third", Some((4, 79))));
        model.apply(Event::LinkGone(9));
        model.settle();
        assert_eq!(there(&interfaces), [(3, None, 4), (3, Some(78), 6)]);
        model.apply(link(12, "again", Some((4, 77))));
        model.settle();
        assert_eq!(there(&interfaces), [(3, None, 4), (3, Some(77), 12), (3, Some(78), 6)]);
        assert!(model.counters.status().full > 0);
        // The port's interface goes, and its sub-interfaces are nobody's.
        model.apply(Event::LinkGone(4));
        model.settle();
        assert_eq!(there(&interfaces), []);
    }
}
