//! What the kernel says, out of its messages (`linux/rtnetlink.h`, `linux/nexthop.h`).
//!
//! Contract: attributes that are not known are skipped, and a message that makes no sense is no event;
//! nothing in a message can panic or make work that its length does not pay for. (The crate that makes
//! our requests reads messages too, but refuses one for a single attribute that it finds odd, and knows
//! no next-hop objects.)

use crate::tables::NextHopId;
use crate::wire::ethernet::MacAddress;
use ipnet::IpNet;
use netlink_packet_core::NlasIterator;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An interface that a path cannot have: what goes there is the kernel's.
pub(super) const KERNEL: u32 = 0;

/// Something has changed, or is so (in an answer to a dump).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    Link(LinkNews),
    LinkGone(u32),
    Address(AddressNews),
    AddressGone(AddressNews),
    Neighbour(NeighbourNews),
    NeighbourGone {
        link: u32,
        address: IpAddr,
    },
    Route(RouteNews),
    RouteGone(RouteNews),
    Object {
        id: u32,
        what: ObjectNews,
    },
    ObjectGone(u32),
    /// Parameters of an interface (`/proc/sys/net/*/conf`).
    Parameters,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct LinkNews {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Option<MacAddress>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) carrier: bool,
    /// The interface below and the 802.1Q identifier, of a VLAN sub-interface.
    pub(super) vlan: Option<(u32, u16)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressNews {
    pub(super) link: u32,
    pub(super) address: IpAddr,
    pub(super) secondary: bool,
    /// Duplicate address detection has not said yes.
    pub(super) tentative: bool,
    /// Good beyond the link.
    pub(super) global: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NeighbourNews {
    pub(super) link: u32,
    pub(super) address: IpAddr,
    pub(super) mac: Option<MacAddress>,
    /// `NUD_*`.
    pub(super) state: u16,
    /// `NTF_EXT_LEARNED`: put there by a routing daemon.
    pub(super) learned: bool,
    pub(super) managed: bool,
}

/// `NUD_*` of `linux/neighbour.h`.
pub(super) mod nud {
    pub(in crate::sync) const INCOMPLETE: u16 = 0x01;
    pub(in crate::sync) const STALE: u16 = 0x04;
    pub(in crate::sync) const FAILED: u16 = 0x20;
    pub(in crate::sync) const NOARP: u16 = 0x40;
    pub(in crate::sync) const PERMANENT: u16 = 0x80;
    /// REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT.
    pub(in crate::sync) const VALID: u16 = 0x02 | STALE | 0x08 | 0x10 | NOARP | PERMANENT;
}

/// A way to a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Leg {
    /// Index of the interface; [`KERNEL`] for what only the kernel can do, such as tunnels.
    pub(super) link: u32,
    /// `None`: the destination is on the link.
    pub(super) gateway: Option<IpAddr>,
    pub(super) weight: u16,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Fixed(NextHopId),
    Legs(Vec<Leg>),
    /// A next-hop object.
    Object(u32),
}

/// How a route comes among those of the same prefix and metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    First,
    Last,
    Replace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RouteNews {
    pub(super) prefix: IpNet,
    pub(super) table: u32,
    pub(super) metric: u32,
    pub(super) kind: Kind,
    pub(super) how: How,
    /// The message had all next hops of the prefix, not one of several.
    pub(super) whole: bool,
    /// `throw`: this table has no answer.
    pub(super) throw: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ObjectNews {
    Blackhole,
    One(Leg),
    Group(Vec<(u32, u16)>),
}

/// The kernel's message types, and the flags of a message, that are looked at.
pub(super) mod message {
    pub(in crate::sync) const NEW_LINK: u16 = 16;
    const DEL_LINK: u16 = 17;
    const NEW_ADDRESS: u16 = 20;
    const DEL_ADDRESS: u16 = 21;
    const NEW_ROUTE: u16 = 24;
    const DEL_ROUTE: u16 = 25;
    pub(in crate::sync) const NEW_NEIGHBOUR: u16 = 28;
    const DEL_NEIGHBOUR: u16 = 29;
    const NEW_NETCONF: u16 = 80;
    const NEW_NEXT_HOP: u16 = 104;
    const DEL_NEXT_HOP: u16 = 105;
    const REPLACE: u16 = 0x100;
    const APPEND: u16 = 0x800;

    use super::{Event, How};

    /// Reads one; `None` for what does not concern us or makes no sense.
    pub(in crate::sync) fn read(kind: u16, flags: u16, dump: bool, body: &[u8]) -> Option<Event> {
        let how = match flags {
            _ if dump => How::Last,
            flags if flags & REPLACE != 0 => How::Replace,
            flags if flags & APPEND != 0 => How::Last,
            _ => How::First,
        };
        match kind {
            NEW_LINK => super::link(body).map(Event::Link),
            DEL_LINK => super::link(body).map(|link| Event::LinkGone(link.index)),
            NEW_ADDRESS => super::address(body).map(Event::Address),
            DEL_ADDRESS => super::address(body).map(Event::AddressGone),
            NEW_NEIGHBOUR => super::neighbour(body).map(Event::Neighbour),
            DEL_NEIGHBOUR => {
                super::neighbour(body).map(|n| Event::NeighbourGone { link: n.link, address: n.address })
            }
            NEW_ROUTE => super::route(body, how).map(Event::Route),
            DEL_ROUTE => super::route(body, how).map(Event::RouteGone),
            NEW_NEXT_HOP => super::object(body).map(|(id, what)| Event::Object { id, what }),
            DEL_NEXT_HOP => super::object_id(body).map(Event::ObjectGone),
            NEW_NETCONF => Some(Event::Parameters),
            _ => None,
        }
    }
}

fn each(attributes: &[u8], mut see: impl FnMut(u16, &[u8])) {
    for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
        see(attribute.kind(), attribute.value());
    }
}

fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.first_chunk().copied()?))
}

fn short(value: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(value.first_chunk().copied()?))
}

fn number_at(body: &[u8], at: usize) -> Option<u32> {
    number(body.get(at..)?)
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(Ipv4Addr::from(value.first_chunk::<4>().copied()?).into()),
        16 => Some(Ipv6Addr::from(value.first_chunk::<16>().copied()?).into()),
        _ => None,
    }
}

fn mac(value: &[u8]) -> Option<MacAddress> {
    value.try_into().ok().map(MacAddress)
}

const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;

fn is_ip(family: u8) -> bool {
    matches!(family, AF_INET | AF_INET6)
}

/// `struct ifinfomsg`: family, type, index, flags, change; then attributes.
fn link(body: &[u8]) -> Option<LinkNews> {
    if *body.first()? != libc::AF_UNSPEC as u8 {
        // A bridge's word about one of its ports.
        return None;
    }
    let flags = number_at(body, 8)?;
    let mut link = LinkNews {
        index: number_at(body, 4)?,
        up: flags & libc::IFF_UP as u32 != 0,
        carrier: flags & libc::IFF_LOWER_UP as u32 != 0,
        ..LinkNews::default()
    };
    let (mut below, mut vlan, mut elsewhere) = (None, None, false);
    each(body.get(16..)?, |kind, value| match kind {
        libc::IFLA_ADDRESS => link.mac = mac(value),
        libc::IFLA_IFNAME => {
            let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
            link.name = String::from_utf8_lossy(name).into_owned();
        }
        libc::IFLA_MTU => link.mtu = number(value).unwrap_or_default(),
        libc::IFLA_LINK => below = number(value),
        libc::IFLA_LINK_NETNSID => elsewhere = true,
        libc::IFLA_LINKINFO => vlan = vlan_id(value),
        _ => {}
    });
    if let (Some(below), Some(vlan), false) = (below, vlan, elsewhere) {
        link.vlan = Some((below, vlan));
    }
    Some(link)
}

/// The identifier, if the interface is an 802.1Q sub-interface.
fn vlan_id(info: &[u8]) -> Option<u16> {
    const IFLA_VLAN_ID: u16 = 1;
    const IFLA_VLAN_PROTOCOL: u16 = 5;
    let (mut is_vlan, mut id, mut protocol) = (false, None, 0x8100);
    each(info, |kind, value| match kind {
        libc::IFLA_INFO_KIND => is_vlan = value.strip_suffix(b"\0").unwrap_or(value) == b"vlan",
        libc::IFLA_INFO_DATA => each(value, |kind, value| match kind {
            IFLA_VLAN_ID => id = short(value),
            IFLA_VLAN_PROTOCOL => protocol = short(value).map_or(0, u16::from_be),
            _ => {}
        }),
        _ => {}
    });
    id.filter(|id| is_vlan && protocol == 0x8100 && (1..4095).contains(id))
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index; then attributes.
fn address(body: &[u8]) -> Option<AddressNews> {
    const SECONDARY: u32 = 0x01;
    const TENTATIVE: u32 = 0x40;
    const DAD_FAILED: u32 = 0x08;
    const SCOPE_UNIVERSE: u8 = 0;
    let family = *body.first()?;
    let (mut flags, scope, link) = (u32::from(*body.get(2)?), *body.get(3)?, number_at(body, 4)?);
    let (mut local, mut address) = (None, None);
    each(body.get(8..)?, |kind, value| match kind {
        libc::IFA_ADDRESS => address = ip(value),
        // Of a point-to-point interface the other is the peer's.
        libc::IFA_LOCAL => local = ip(value),
        libc::IFA_FLAGS => flags = number(value).unwrap_or(flags),
        _ => {}
    });
    let address = local.or(address)?;
    let v6 = address.is_ipv6();
    is_ip(family).then_some(AddressNews {
        link,
        address,
        // For IPv6 the same bit says "temporary", which is as good a reason to prefer another.
        secondary: flags & SECONDARY != 0,
        tentative: v6 && flags & (TENTATIVE | DAD_FAILED) != 0,
        global: scope == SCOPE_UNIVERSE,
    })
}

/// `struct ndmsg`: family, three bytes of padding, index, state, flags, type; then attributes.
fn neighbour(body: &[u8]) -> Option<NeighbourNews> {
    const NDA_DST: u16 = 1;
    const NDA_LLADDR: u16 = 2;
    const NDA_FLAGS_EXT: u16 = 15;
    const NTF_PROXY: u8 = 0x08;
    const NTF_EXT_LEARNED: u8 = 0x10;
    const NTF_EXT_MANAGED: u32 = 1;
    let (family, flags) = (*body.first()?, *body.get(10)?);
    if !is_ip(family) || flags & NTF_PROXY != 0 {
        return None;
    }
    let (mut destination, mut lladdr, mut extended) = (None, None, 0);
    each(body.get(12..)?, |kind, value| match kind {
        NDA_DST => destination = ip(value),
        NDA_LLADDR => lladdr = mac(value),
        NDA_FLAGS_EXT => extended = number(value).unwrap_or_default(),
        _ => {}
    });
    Some(NeighbourNews {
        link: number_at(body, 4)?,
        address: destination?,
        mac: lladdr,
        state: short(body.get(8..)?)?,
        learned: flags & NTF_EXT_LEARNED != 0,
        managed: extended & NTF_EXT_MANAGED != 0,
    })
}

/// `struct rtmsg`: family, lengths of destination and source, TOS, table, protocol, scope, type, flags;
/// then attributes.
fn route(body: &[u8], how: How) -> Option<RouteNews> {
    const RTM_F_CLONED: u32 = 0x200;
    let &[family, length, source_length, tos, table, _, _, kind] = body.first_chunk()?;
    // Routes by source or type of service, and what is a cache, are not the destination's.
    if !is_ip(family) || source_length != 0 || tos != 0 || number_at(body, 8)? & RTM_F_CLONED != 0 {
        return None;
    }
    let mut destination = None;
    let (mut table, mut metric, mut object, mut legs) = (u32::from(table), 0, None, Vec::new());
    let mut one = Leg { link: KERNEL, gateway: None, weight: 1 };
    let mut encapsulated = false;
    each(body.get(12..)?, |kind, value| match kind {
        libc::RTA_DST => destination = ip(value),
        libc::RTA_TABLE => table = number(value).unwrap_or(table),
        libc::RTA_PRIORITY => metric = number(value).unwrap_or_default(),
        libc::RTA_OIF => one.link = number(value).unwrap_or(KERNEL),
        libc::RTA_GATEWAY => one.gateway = gateway(value),
        libc::RTA_VIA => one.gateway = value.get(2..).and_then(gateway),
        libc::RTA_MULTIPATH => legs = paths(value),
        RTA_ENCAP => encapsulated = true,
        RTA_NH_ID => object = number(value),
        _ => {}
    });
    let any =
        if family == AF_INET { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let prefix = IpNet::new(destination.unwrap_or(any), length).ok()?.trunc();
    if prefix.addr().is_ipv4() != (family == AF_INET) {
        return None;
    }
    // IPv6 keeps the order in which routes of the same metric came.
    let how = if family == AF_INET6 && how == How::First { How::Last } else { how };
    let (whole, throw) = (!legs.is_empty() || object.is_some(), kind == libc::RTN_THROW);
    if encapsulated {
        one = Leg { link: KERNEL, gateway: None, weight: 1 };
    }
    let kind = match kind {
        libc::RTN_UNICAST => match object {
            Some(id) => Kind::Object(id),
            None if legs.is_empty() => Kind::Legs(vec![one]),
            None => Kind::Legs(legs),
        },
        libc::RTN_LOCAL | libc::RTN_BROADCAST | libc::RTN_ANYCAST => Kind::Fixed(NextHopId::LOCAL),
        libc::RTN_BLACKHOLE => Kind::Fixed(NextHopId::BLACKHOLE),
        libc::RTN_UNREACHABLE | libc::RTN_THROW => Kind::Fixed(NextHopId::UNREACHABLE),
        libc::RTN_PROHIBIT => Kind::Fixed(NextHopId::PROHIBIT),
        _ => return None,
    };
    Some(RouteNews { prefix, table, metric, kind, how, whole, throw })
}

const RTA_ENCAP: u16 = 22;
const RTA_NH_ID: u16 = 30;

fn gateway(value: &[u8]) -> Option<IpAddr> {
    ip(value).filter(|address| !address.is_unspecified())
}

/// `struct rtnexthop`: length, flags, weight - 1, index; then attributes. The flags about dead links
/// are not looked at: the kernel changes them without a word, and links are followed anyway.
fn paths(mut value: &[u8]) -> Vec<Leg> {
    let mut legs = Vec::new();
    while let Some(&[a, b, _, hops]) = value.first_chunk() {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(attributes) = value.get(8..length) else { break };
        let link = number_at(value, 4).unwrap_or(KERNEL);
        let mut leg = Leg { link, gateway: None, weight: u16::from(hops) + 1 };
        let mut encapsulated = false;
        each(attributes, |kind, value| match kind {
            libc::RTA_GATEWAY => leg.gateway = gateway(value),
            libc::RTA_VIA => leg.gateway = value.get(2..).and_then(gateway),
            RTA_ENCAP => encapsulated = true,
            _ => {}
        });
        if encapsulated {
            leg = Leg { link: KERNEL, gateway: None, weight: leg.weight };
        }
        legs.push(leg);
        value = value.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    legs
}

const NHA_ID: u16 = 1;

fn object_id(body: &[u8]) -> Option<u32> {
    let mut id = None;
    each(body.get(8..)?, |kind, value| {
        if kind == NHA_ID {
            id = number(value);
        }
    });
    id
}

/// `struct nhmsg`: family, scope, protocol, reserved, flags; then attributes.
fn object(body: &[u8]) -> Option<(u32, ObjectNews)> {
    const NHA_GROUP: u16 = 2;
    const NHA_BLACKHOLE: u16 = 4;
    const NHA_OIF: u16 = 5;
    const NHA_GATEWAY: u16 = 6;
    const NHA_ENCAP: u16 = 8;
    let id = object_id(body)?;
    let mut leg = Leg { link: KERNEL, gateway: None, weight: 1 };
    let (mut group, mut blackhole, mut encapsulated) = (None, false, false);
    each(body.get(8..)?, |kind, value| match kind {
        NHA_BLACKHOLE => blackhole = true,
        NHA_OIF => leg.link = number(value).unwrap_or(KERNEL),
        NHA_GATEWAY => leg.gateway = gateway(value),
        NHA_ENCAP => encapsulated = true,
        // `struct nexthop_grp`: id, low byte of weight - 1, high byte, reserved.
        NHA_GROUP => {
            let member = |entry: &[u8]| {
                let weight = u16::from_le_bytes([*entry.get(4)?, *entry.get(5)?]).saturating_add(1);
                Some((number(entry)?, weight))
            };
            group = Some(value.chunks_exact(8).filter_map(member).collect());
        }
        _ => {}
    });
    if encapsulated {
        leg = Leg { link: KERNEL, gateway: None, weight: 1 };
    }
    let what = match group {
        Some(members) => ObjectNews::Group(members),
        None if blackhole => ObjectNews::Blackhole,
        None => ObjectNews::One(leg),
    };
    Some((id, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable;
    use netlink_packet_route::link::{
        InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, VlanProtocol,
    };
    use proptest::prelude::*;

    fn vlan(id: u16, protocol: VlanProtocol) -> Event {
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        message.attributes = vec![
            LinkAttribute::IfName("eth0.5".to_owned()),
            LinkAttribute::Mtu(1496),
            LinkAttribute::Link(3),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vlan),
                LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(id), InfoVlan::Protocol(protocol)])),
            ]),
        ];
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        message::read(message::NEW_LINK, 0, false, &body).unwrap()
    }

    #[test]
    fn vlan_sub_interfaces_are_known_by_their_kind() {
        let news = LinkNews {
            index: 7,
            name: "eth0.5".to_owned(),
            mac: Some(MacAddress([2, 0, 0, 0, 0, 1])),
            mtu: 1496,
            up: true,
            carrier: true,
            vlan: Some((3, 5)),
        };
        assert_eq!(vlan(5, VlanProtocol::Ieee8021Q), Event::Link(news.clone()));
        // Not a tag of ours, and no identifier of a VLAN.
        let none = Event::Link(LinkNews { vlan: None, ..news });
        assert_eq!(vlan(5, VlanProtocol::Ieee8021Ad), none);
        assert_eq!(vlan(0, VlanProtocol::Ieee8021Q), none);
        assert_eq!(vlan(4095, VlanProtocol::Ieee8021Q), none);
    }

    proptest! {
        /// Whatever is in a message: no panic, and no prefix longer than its address.
        #[test]
        fn any_bytes_are_read_or_refused(
            kind in prop::sample::select(vec![16u16, 17, 20, 21, 24, 25, 28, 29, 80, 104, 105, 9]),
            flags: u16,
            dump: bool,
            head in prop::collection::vec(any::<u8>(), 0..16),
            attributes in prop::collection::vec((0u16..32, prop::collection::vec(any::<u8>(), 0..40)), 0..8),
            cut in 0usize..400,
        ) {
            let mut body = head;
            if let Some(family) = body.first_mut() {
                *family = [0, 2, 10, *family][usize::from(*family) % 4];
            }
            for (kind, value) in attributes {
                let length = value.len() as u16 + 4;
                body.extend(length.to_ne_bytes());
                body.extend(kind.to_ne_bytes());
                body.extend(value);
                body.resize(body.len().next_multiple_of(4), 0);
            }
            body.truncate(cut);
            if let Some(Event::Route(route)) = message::read(kind, flags, dump, &body) {
                prop_assert!(route.prefix.prefix_len() <= route.prefix.max_prefix_len());
                prop_assert_eq!(route.prefix, route.prefix.trunc());
            }
        }
    }
}
