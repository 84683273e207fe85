//! Where routes lead: each distinct set of paths once, whatever number of prefixes name it.
//!
//! Contract: a target with one path *is* the next hop of that path, so that a gateway's one word moves
//! all its routes; one with several is a group of them. A target with no path that is up has no next
//! hop, and routes to it do not count.

use super::links::Way;
use super::{BTreeSet, HashMap, HashSet, Model, ObjectNews};
use crate::sync::decode::{Kind, Leg};
use crate::tables::{NextHopId, NextHops};
use std::net::IpAddr;

#[derive(Debug, Default)]
pub(super) struct Targets {
    slots: Vec<Target>,
    by_kind: HashMap<Kind, u32>,
    free: Vec<u32>,
    /// To be looked at again.
    dirty: BTreeSet<u32>,
}

#[derive(Debug, Default)]
struct Target {
    /// `None` in a free slot.
    kind: Option<Kind>,
    /// Routes that lead here.
    users: u32,
    id: Option<NextHopId>,
    group: Option<NextHopId>,
    legs: Vec<Leg>,
}

enum Paths {
    Fixed(NextHopId),
    Legs(Vec<Leg>),
}

impl Targets {
    pub(super) fn kind(&self, target: u32) -> Option<&Kind> {
        self.slots.get(target as usize)?.kind.as_ref()
    }

    /// Its next hop; `None` when no path is up.
    pub(super) fn id(&self, target: u32) -> Option<NextHopId> {
        self.slots.get(target as usize)?.id
    }

    /// Are destinations of this target neighbours on a link?
    pub(super) fn is_on_link(&self, target: u32, link: u32) -> bool {
        let legs = self.slots.get(target as usize).map(|target| target.legs.as_slice()).unwrap_or_default();
        legs.iter().any(|leg| leg.link == link && leg.gateway.is_none())
    }

    fn mark(&mut self, concerned: impl Fn(&Target) -> bool) {
        let slots = self.slots.iter().zip(0..);
        self.dirty.extend(slots.filter(|(t, _)| t.kind.is_some() && concerned(t)).map(|(_, at)| at));
    }
}

/// Weights of at most 256, which is what a group of ours can have.
fn scaled(members: &mut [(NextHopId, u32)]) {
    let most = members.iter().map(|(_, weight)| *weight).max().unwrap_or(1);
    for (_, weight) in members {
        if most > 256 {
            *weight = (u64::from(*weight) * 256 / u64::from(most)) as u32;
        }
        *weight = (*weight).max(1);
    }
}

impl Model {
    /// The target of this kind, held once more.
    pub(super) fn target(&mut self, kind: &Kind) -> u32 {
        if let Some(at) = self.targets.by_kind.get(kind) {
            let at = *at;
            self.targets.slots[at as usize].users += 1;
            return at;
        }
        let target = Target { kind: Some(kind.clone()), users: 1, ..Target::default() };
        let at = match self.targets.free.pop() {
            Some(at) => {
                self.targets.slots[at as usize] = target;
                at
            }
            None => {
                self.targets.slots.push(target);
                self.targets.slots.len() as u32 - 1
            }
        };
        self.targets.by_kind.insert(kind.clone(), at);
        self.resolve(at);
        at
    }

    pub(super) fn release_target(&mut self, at: u32) {
        let Some(target) = self.targets.slots.get_mut(at as usize) else { return };
        target.users -= 1;
        if target.users > 0 {
            return;
        }
        let target = std::mem::take(target);
        if let Some(kind) = target.kind {
            self.targets.by_kind.remove(&kind);
        }
        self.targets.dirty.remove(&at);
        self.targets.free.push(at);
        self.drop_gateways(&target.legs);
        if let Some(group) = target.group {
            self.release(group);
        }
    }

    /// A link has come, gone, or changed: what leads over it is looked at when the batch is over.
    pub(super) fn links_changed(&mut self, link: u32) {
        self.targets.mark(|target| target.legs.iter().any(|leg| leg.link == link));
    }

    /// An object, and the groups that it is in.
    fn object_changed(&mut self, id: u32) {
        let groups: Vec<u32> = self
            .objects
            .iter()
            .filter(|(_, (what, _))| match what {
                ObjectNews::Group(members) => members.iter().any(|(member, _)| *member == id),
                _ => false,
            })
            .map(|(group, _)| *group)
            .collect();
        self.targets.mark(|target| match target.kind {
            Some(Kind::Object(object)) => object == id || groups.contains(&object),
            _ => false,
        });
    }

    pub(super) fn object(&mut self, id: u32, what: ObjectNews) {
        let seen = self.generation;
        let was = self.objects.insert(id, (what.clone(), seen));
        if was.is_none_or(|(was, _)| was != what) {
            self.object_changed(id);
        }
    }

    pub(super) fn object_gone(&mut self, id: u32) {
        if self.objects.remove(&id).is_some() {
            self.object_changed(id);
        }
    }

    fn paths(&self, kind: &Kind) -> Paths {
        let object = |id: u32| self.objects.get(&id).map(|(what, _)| what);
        match kind {
            Kind::Fixed(id) => Paths::Fixed(*id),
            Kind::Legs(legs) => Paths::Legs(legs.clone()),
            Kind::Object(id) => match object(*id) {
                None => Paths::Legs(Vec::new()),
                Some(ObjectNews::Blackhole) => Paths::Fixed(NextHopId::BLACKHOLE),
                Some(ObjectNews::One(leg)) => Paths::Legs(vec![leg.clone()]),
                Some(ObjectNews::Group(members)) => {
                    let mut legs = Vec::new();
                    for (id, weight) in members {
                        match object(*id) {
                            Some(ObjectNews::One(leg)) => legs.push(Leg { weight: *weight, ..leg.clone() }),
                            Some(ObjectNews::Blackhole) if members.len() == 1 => {
                                return Paths::Fixed(NextHopId::BLACKHOLE);
                            }
                            _ => {}
                        }
                    }
                    Paths::Legs(legs)
                }
            },
        }
    }

    /// Finds the next hop of a target; true when it is another than before.
    fn resolve(&mut self, at: u32) -> bool {
        let Some(kind) = self.targets.kind(at).cloned() else { return false };
        let legs = match self.paths(&kind) {
            Paths::Fixed(id) => {
                let target = &mut self.targets.slots[at as usize];
                let old = std::mem::take(&mut target.legs);
                let changed = target.id.replace(id) != Some(id);
                self.drop_gateways(&old);
                return changed;
            }
            Paths::Legs(legs) => legs,
        };
        // The new gateways first, so that one which stays is never gone.
        self.take_gateways(&legs);
        let old = std::mem::replace(&mut self.targets.slots[at as usize].legs, legs.clone());
        self.drop_gateways(&old);

        let v4 = |leg: &Leg| leg.gateway.is_none_or(|gateway| gateway.is_ipv4());
        let ways: Vec<(Way, &Leg)> = legs.iter().map(|leg| (self.way(leg.link, v4(leg)), leg)).collect();
        // A path without carrier is used only when there is no better one.
        let carrier = |way: Way| match way {
            Way::Kernel => true,
            Way::Ours { carrier, .. } => carrier,
            Way::Dead => false,
        };
        let any_carrier = ways.iter().any(|(way, _)| carrier(*way));
        let mut members: Vec<(NextHopId, u32)> = Vec::new();
        for (way, leg) in ways {
            let id = match way {
                _ if any_carrier && !carrier(way) => None,
                Way::Dead => None,
                Way::Kernel => Some(NextHopId::LOCAL),
                Way::Ours { interface, .. } => match leg.gateway {
                    None => self.on_link(interface),
                    Some(gateway) => self.gateway_id(gateway, leg.link),
                },
            };
            let Some(id) = id else { continue };
            match members.iter_mut().find(|(known, _)| *known == id) {
                Some((_, weight)) => *weight += u32::from(leg.weight),
                None => members.push((id, u32::from(leg.weight))),
            }
        }
        let id = self.group_of(at, members, legs.len() > 1);
        let target = &mut self.targets.slots[at as usize];
        std::mem::replace(&mut target.id, id) != id
    }

    /// The next hop of these members: the only one, or the target's group of them.
    fn group_of(&mut self, at: u32, mut members: Vec<(NextHopId, u32)>, several: bool) -> Option<NextHopId> {
        let first = members.first()?.0;
        scaled(&mut members);
        members.truncate(NextHops::MOST_MEMBERS);
        let members: Vec<(NextHopId, u16)> =
            members.into_iter().map(|(id, weight)| (id, weight.min(256) as u16)).collect();
        let group = self.targets.slots[at as usize].group;
        let made = match group {
            // Once a group, it stays one, so that its flows stay where they can.
            Some(group) => self.tables.next_hops.set_group(group, &members).map(|()| group),
            None if several => self.tables.next_hops.add_group(&members),
            None => return Some(first),
        };
        match made {
            Ok(made) => {
                if group.is_none() {
                    self.hold(made);
                    self.targets.slots[at as usize].group = Some(made);
                }
                Some(made)
            }
            Err(error) => {
                self.full(&error);
                group.or(Some(first))
            }
        }
    }

    fn take_gateways(&mut self, legs: &[Leg]) {
        for (gateway, link) in gateways(legs) {
            self.use_gateway(gateway, link);
        }
    }

    fn drop_gateways(&mut self, legs: &[Leg]) {
        for (gateway, link) in gateways(legs) {
            self.unuse_gateway(gateway, link);
        }
    }

    /// Resolves again what a batch has changed, and publishes what leads there.
    pub(super) fn settle_targets(&mut self) {
        let dirty = std::mem::take(&mut self.targets.dirty);
        let changed: HashSet<u32> = dirty.into_iter().filter(|at| self.resolve(*at)).collect();
        if !changed.is_empty() {
            self.publish_targets(&changed);
        }
    }
}

fn gateways(legs: &[Leg]) -> impl Iterator<Item = (IpAddr, u32)> {
    legs.iter().filter_map(|leg| Some((leg.gateway?, leg.link)))
}
