//! What is done with a packet: forwarded to a neighbour, spread over several, delivered, dropped.
//!
//! Contract: a next hop is one word; changing it moves every prefix that names it. A group is a run of
//! buckets, each naming a next hop; a packet's flow hash picks the bucket. Groups are *resilient*: when
//! members change, a bucket keeps its member unless that is gone or has more than its share, so only
//! the flows that must move do.

use super::epochs::{Epochs, Limbo};
use super::interface::InterfaceId;
use crate::wire::ethernet::MacAddress;
use isoplane_memory::RegionError;
use isoplane_memory::table::{Table, TableWriter};
use std::net::{IpAddr, Ipv6Addr};

/// A next hop, by its place in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct NextHopId(u32);

impl NextHopId {
    /// Bits of an id.
    pub const BITS: u32 = 24;
    /// [`NextHop::None`]: what a lookup says when no prefix matches.
    pub const NONE: Self = Self(0);
    /// [`NextHop::Local`].
    pub const LOCAL: Self = Self(1);
    /// [`NextHop::Blackhole`].
    pub const BLACKHOLE: Self = Self(2);
    /// [`NextHop::Unreachable`].
    pub const UNREACHABLE: Self = Self(3);
    /// [`NextHop::Prohibit`].
    pub const PROHIBIT: Self = Self(4);
    /// The first that a writer hands out.
    const FIRST: u32 = 5;

    /// From the low [`BITS`](Self::BITS) of a number.
    #[inline(always)]
    #[must_use]
    pub const fn from_low_bits(bits: u32) -> Self {
        Self(bits & ((1 << Self::BITS) - 1))
    }

    /// Its place.
    #[inline(always)]
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// What is done with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NextHop {
    /// No route: ICMP destination unreachable.
    #[default]
    None,
    /// For the router itself: punted.
    Local,
    /// Dropped without a word.
    Blackhole,
    /// Dropped, with ICMP host unreachable.
    Unreachable,
    /// Dropped, with ICMP administratively prohibited.
    Prohibit,
    /// The destination is a neighbour on this interface that nobody has asked for yet.
    OnLink {
        /// Where it is.
        interface: InterfaceId,
    },
    /// A neighbour whose Ethernet address is being asked for.
    Waiting {
        /// Where it is.
        interface: InterfaceId,
    },
    /// A neighbour that did not answer: ICMP host unreachable, until it does.
    Failed {
        /// Where it was looked for.
        interface: InterfaceId,
    },
    /// A neighbour.
    Forward {
        /// Where it is.
        interface: InterfaceId,
        /// Its Ethernet address.
        mac: MacAddress,
    },
    /// Spread over several, by flow.
    Group(Group),
}

/// Where a group's buckets are; see [`NextHops::member`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    first: u32,
    log2: u8,
}

/// Tags in the low four bits of a word; interface in the next twelve; MAC address in the rest.
mod tag {
    pub(super) const NONE: u64 = 0;
    pub(super) const LOCAL: u64 = 1;
    pub(super) const BLACKHOLE: u64 = 2;
    pub(super) const UNREACHABLE: u64 = 3;
    pub(super) const PROHIBIT: u64 = 4;
    pub(super) const ON_LINK: u64 = 5;
    pub(super) const WAITING: u64 = 6;
    pub(super) const FAILED: u64 = 7;
    pub(super) const FORWARD: u64 = 8;
    pub(super) const GROUP: u64 = 9;
}

impl NextHop {
    const fn to_word(self) -> u64 {
        const fn at(tag: u64, interface: InterfaceId) -> u64 {
            tag | (interface.get() as u64) << 4
        }
        match self {
            Self::None => tag::NONE,
            Self::Local => tag::LOCAL,
            Self::Blackhole => tag::BLACKHOLE,
            Self::Unreachable => tag::UNREACHABLE,
            Self::Prohibit => tag::PROHIBIT,
            Self::OnLink { interface } => at(tag::ON_LINK, interface),
            Self::Waiting { interface } => at(tag::WAITING, interface),
            Self::Failed { interface } => at(tag::FAILED, interface),
            Self::Forward { interface, mac } => at(tag::FORWARD, interface) | mac.to_bits() << 16,
            Self::Group(group) => tag::GROUP | (group.log2 as u64) << 4 | (group.first as u64) << 16,
        }
    }

    #[inline(always)]
    const fn from_word(word: u64) -> Self {
        let interface = InterfaceId::from_low_bits(word >> 4);
        match word & 15 {
            tag::FORWARD => Self::Forward { interface, mac: MacAddress::from_bits(word >> 16) },
            tag::GROUP => Self::Group(Group { first: (word >> 16) as u32, log2: (word >> 4) as u8 & 31 }),
            tag::LOCAL => Self::Local,
            tag::BLACKHOLE => Self::Blackhole,
            tag::UNREACHABLE => Self::Unreachable,
            tag::PROHIBIT => Self::Prohibit,
            tag::ON_LINK => Self::OnLink { interface },
            tag::WAITING => Self::Waiting { interface },
            tag::FAILED => Self::Failed { interface },
            _ => Self::None,
        }
    }

    /// The interface that packets leave by, or would.
    #[must_use]
    pub const fn interface(self) -> Option<InterfaceId> {
        match self {
            Self::OnLink { interface }
            | Self::Waiting { interface }
            | Self::Failed { interface }
            | Self::Forward { interface, .. } => Some(interface),
            _ => None,
        }
    }
}

/// A next hop that is not taken apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Word(u64);

impl Word {
    /// Is it [`NextHop::Forward`], to one station?
    #[inline(always)]
    pub(crate) const fn is_station(self) -> bool {
        // The bit that says "group" is the lowest of an address's first byte.
        self.0 & (1 << 56 | 15) == tag::FORWARD
    }

    /// Where it is, if it is a group.
    #[inline(always)]
    pub(crate) const fn group(self) -> Option<Group> {
        match NextHop::from_word(self.0) {
            NextHop::Group(group) => Some(group),
            _ => None,
        }
    }

    /// Of [`NextHop::Forward`].
    #[inline(always)]
    pub(crate) const fn interface(self) -> InterfaceId {
        InterfaceId::from_low_bits(self.0 >> 4)
    }

    /// Of [`NextHop::Forward`], as [`MacAddress::to_bits`].
    #[inline(always)]
    pub(crate) const fn mac_bits(self) -> u64 {
        self.0 >> 16
    }
}

/// Why a next hop or group could not be made or changed; everything is as it was.
#[derive(Debug, thiserror::Error, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupError {
    /// No place is left.
    #[error("the table of next hops is full ({most}); make it with more next_hops")]
    Full {
        /// Places.
        most: u32,
    },
    /// No run of buckets is left.
    #[error("no {wanted} buckets side by side are left for a group; make the tables with more group_buckets")]
    Buckets {
        /// How many side by side.
        wanted: u32,
    },
    /// A group has 1 to [`NextHops::MOST_MEMBERS`] members of weights 1 to 256.
    #[error("a group has 1 to {} next hops, each with a weight of 1 to 256", NextHops::MOST_MEMBERS)]
    Members,
    /// A member is a group itself, or the id is not of a group.
    #[error("next hop {} is of the wrong kind", .id.get())]
    Kind {
        /// Which.
        id: NextHopId,
    },
}

/// A worker's view of the next hops.
#[derive(Debug, Clone)]
pub struct NextHops {
    words: Table,
    buckets: Table,
    /// IP addresses, two words each: IPv4 as IPv4-mapped, zero for unknown.
    addresses: Table,
}

/// The program's side of the next hops.
#[derive(Debug)]
pub struct NextHopsWriter {
    words: TableWriter,
    buckets: TableWriter,
    addresses: TableWriter,
    /// Ids that were used and are free again.
    free: Vec<NextHopId>,
    /// Ids from here on were never used.
    next: u32,
    /// Runs of buckets that are free, by the logarithm of their length.
    runs: [Vec<u32>; MAX_LOG2 as usize + 1],
    /// Buckets from here on were never used.
    next_bucket: u32,
    limbo: Limbo<Freed>,
}

#[derive(Debug)]
enum Freed {
    Id(NextHopId),
    Run { first: u32, log2: u8 },
}

const MIN_LOG2: u8 = 7;
const MAX_LOG2: u8 = 12;

impl NextHops {
    /// Members of a group at most.
    pub const MOST_MEMBERS: usize = 256;

    /// Makes a table of `count` next hops and `buckets` buckets for groups.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str, count: u32, buckets: u32) -> Result<(NextHopsWriter, Self), RegionError> {
        let count = count.clamp(NextHopId::FIRST, 1 << NextHopId::BITS);
        let (mut words, table) = Table::create(name, count as usize)?;
        let (buckets, bucket_table) = Table::create(&format!("{name}.groups"), buckets.max(1) as usize)?;
        let (addresses, address_table) = Table::create(&format!("{name}.addresses"), count as usize * 2)?;
        for (id, what) in [
            (NextHopId::LOCAL, NextHop::Local),
            (NextHopId::BLACKHOLE, NextHop::Blackhole),
            (NextHopId::UNREACHABLE, NextHop::Unreachable),
            (NextHopId::PROHIBIT, NextHop::Prohibit),
        ] {
            words.set(id.get() as usize, what.to_word());
        }
        let writer = NextHopsWriter {
            words,
            buckets,
            addresses,
            free: Vec::new(),
            next: NextHopId::FIRST,
            runs: Default::default(),
            next_bucket: 0,
            limbo: Limbo::default(),
        };
        Ok((writer, Self { words: table, buckets: bucket_table, addresses: address_table }))
    }

    /// What is done with packets of `id`, groups not looked into.
    #[inline(always)]
    #[must_use]
    pub fn get(&self, id: NextHopId) -> NextHop {
        NextHop::from_word(self.words.get(id.get() as usize).unwrap_or(tag::NONE))
    }

    /// The same as one word, for who looks at many.
    #[inline(always)]
    pub(crate) fn word(&self, id: NextHopId) -> Word {
        Word(self.words.get(id.get() as usize).unwrap_or(tag::NONE))
    }

    /// The member of a group for packets of a flow.
    #[inline(always)]
    #[must_use]
    pub fn member(&self, group: Group, hash: u32) -> NextHopId {
        let bucket = group.first as usize + (hash as usize & ((1 << group.log2) - 1));
        NextHopId::from_low_bits(self.buckets.get(bucket).unwrap_or(0) as u32)
    }

    /// What is done with a packet of `id` and a flow hash; never [`NextHop::Group`].
    #[inline(always)]
    #[must_use]
    pub fn resolve(&self, id: NextHopId, hash: u32) -> NextHop {
        match self.get(id) {
            NextHop::Group(group) => match self.get(self.member(group, hash)) {
                NextHop::Group(_) => NextHop::None,
                what => what,
            },
            what => what,
        }
    }

    /// The neighbour's IP address, where the program has said it: for redirects. Cold.
    #[must_use]
    pub fn address(&self, id: NextHopId) -> Option<IpAddr> {
        let at = id.get() as usize * 2;
        let (high, low) = self.addresses.consistent(64, |t| Some((t.get(at)?, t.get(at + 1)?)))??;
        let address = Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
        (!address.is_unspecified()).then(|| address.to_canonical())
    }

    /// Does any member of the next hop use this interface? For reverse-path filters; bounded by the
    /// group's buckets.
    #[must_use]
    pub fn uses(&self, id: NextHopId, interface: InterfaceId) -> bool {
        match self.get(id) {
            NextHop::Group(group) => (0..1 << group.log2)
                .any(|hash| self.get(self.member(group, hash)).interface() == Some(interface)),
            what => what.interface() == Some(interface),
        }
    }
}

impl NextHopsWriter {
    /// The readers' view.
    #[must_use]
    pub fn reader(&self) -> NextHops {
        NextHops {
            words: self.words.table().clone(),
            buckets: self.buckets.table().clone(),
            addresses: self.addresses.table().clone(),
        }
    }

    /// Adds a next hop that is not a group.
    ///
    /// # Errors
    /// [`GroupError::Full`], or [`GroupError::Kind`] for a group.
    pub fn add(&mut self, what: NextHop) -> Result<NextHopId, GroupError> {
        let most = self.words.table().len() as u32;
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.next < most => {
                self.next += 1;
                NextHopId(self.next - 1)
            }
            None => return Err(GroupError::Full { most }),
        };
        if matches!(what, NextHop::Group(_)) {
            self.free.push(id);
            return Err(GroupError::Kind { id });
        }
        self.words.set(id.get() as usize, what.to_word());
        Ok(id)
    }

    /// Changes a next hop that is not a group, for all prefixes and groups that name it.
    ///
    /// # Errors
    /// [`GroupError::Kind`] when either is a group, or the id is not one that [`add`](Self::add) gave.
    pub fn set(&mut self, id: NextHopId, what: NextHop) -> Result<(), GroupError> {
        let is_group = |what| matches!(what, NextHop::Group(_));
        if id.get() < NextHopId::FIRST || id.get() >= self.next || is_group(what) || is_group(self.get(id)) {
            return Err(GroupError::Kind { id });
        }
        self.words.set(id.get() as usize, what.to_word());
        Ok(())
    }

    /// Says which IP address a next hop's neighbour has; `None` when it has none any more.
    pub fn set_address(&mut self, id: NextHopId, address: Option<IpAddr>) {
        let bits = match address {
            Some(IpAddr::V4(address)) => address.to_ipv6_mapped().to_bits(),
            Some(IpAddr::V6(address)) => address.to_bits(),
            None => 0,
        };
        let at = id.get() as usize * 2;
        self.addresses.update(|t| t.set(at, (bits >> 64) as u64) && t.set(at + 1, bits as u64));
    }

    fn get(&self, id: NextHopId) -> NextHop {
        NextHop::from_word(self.words.table().get(id.get() as usize).unwrap_or(tag::NONE))
    }

    /// Takes a next hop or group away. Nothing may name it any more.
    pub fn remove(&mut self, id: NextHopId) {
        if id.get() < NextHopId::FIRST || id.get() >= self.next {
            return;
        }
        if let NextHop::Group(Group { first, log2 }) = self.get(id) {
            self.limbo.retire(Freed::Run { first, log2 });
        }
        self.set_address(id, None);
        self.limbo.retire(Freed::Id(id));
    }

    /// Adds a group of next hops with weights.
    ///
    /// # Errors
    /// See [`GroupError`].
    pub fn add_group(&mut self, members: &[(NextHopId, u16)]) -> Result<NextHopId, GroupError> {
        let log2 = self.check_members(members)?;
        let run = self.runs[usize::from(log2)].pop();
        let first = match run {
            Some(first) => first,
            None => {
                let end = self.next_bucket.checked_add(1 << log2);
                let room = self.buckets.table().len() as u32;
                let end = end.filter(|end| *end <= room).ok_or(GroupError::Buckets { wanted: 1 << log2 })?;
                std::mem::replace(&mut self.next_bucket, end)
            }
        };
        let id = match self.add(NextHop::None) {
            Ok(id) => id,
            Err(error) => {
                self.runs[usize::from(log2)].push(first);
                return Err(error);
            }
        };
        for bucket in first..first + (1 << log2) {
            self.buckets.set(bucket as usize, 0);
        }
        let group = Group { first, log2 };
        self.deal(group, members);
        self.words.set(id.get() as usize, NextHop::Group(group).to_word());
        Ok(id)
    }

    /// Changes the members of a group. Its size stays what the first members asked for.
    ///
    /// # Errors
    /// See [`GroupError`].
    pub fn set_group(&mut self, id: NextHopId, members: &[(NextHopId, u16)]) -> Result<(), GroupError> {
        self.check_members(members)?;
        let NextHop::Group(group) = self.get(id) else { return Err(GroupError::Kind { id }) };
        self.deal(group, members);
        Ok(())
    }

    /// Sixteen buckets a member make shares that are true to some percent.
    fn check_members(&self, members: &[(NextHopId, u16)]) -> Result<u8, GroupError> {
        if members.is_empty()
            || members.len() > NextHops::MOST_MEMBERS
            || members.iter().any(|(_, weight)| *weight == 0 || *weight > 256)
        {
            return Err(GroupError::Members);
        }
        for (id, _) in members {
            if id.get() >= self.next || matches!(self.get(*id), NextHop::Group(_)) {
                return Err(GroupError::Kind { id: *id });
            }
        }
        let wanted = (members.len() * 16).next_power_of_two().trailing_zeros() as u8;
        Ok(wanted.clamp(MIN_LOG2, MAX_LOG2))
    }

    /// Gives each member its share of the buckets; moves as few as that takes.
    fn deal(&mut self, group: Group, members: &[(NextHopId, u16)]) {
        let buckets = group.first..group.first + (1 << group.log2);
        let mut left = shares(members, 1 << group.log2);
        let mut vacant = Vec::new();
        for bucket in buckets {
            let now = NextHopId(self.buckets.table().get(bucket as usize).unwrap_or(0) as u32);
            let owner = members.iter().zip(&mut left).find(|((id, _), left)| *id == now && **left > 0);
            match owner {
                Some((_, left)) => *left -= 1,
                None => vacant.push(bucket),
            }
        }
        // In turn, so that neighbouring buckets go to different members.
        let mut turn = 0;
        for bucket in vacant {
            while left.get(turn % members.len()) == Some(&0) {
                turn += 1;
            }
            let member = turn % members.len();
            left[member] -= 1;
            self.buckets.set(bucket as usize, u64::from(members[member].0.get()));
            turn += 1;
        }
    }

    /// See [`TablesWriter::collect`](super::TablesWriter::collect).
    pub fn collect(&mut self, epochs: &dyn Epochs) {
        let Self { limbo, free, runs, words, .. } = self;
        limbo.collect(epochs, |freed| match freed {
            Freed::Id(id) => {
                words.set(id.get() as usize, tag::NONE);
                free.push(id);
            }
            Freed::Run { first, log2 } => runs[usize::from(log2)].push(first),
        });
    }

    /// Next hops and groups in use.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.next - NextHopId::FIRST - self.free.len() as u32
    }

    /// True when nothing but the fixed ones is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `total` split by weight: every member at least one, the sum exact (`total` is at least the number of
/// members), the largest remainders rounded up.
fn shares(members: &[(NextHopId, u16)], total: u32) -> Vec<u32> {
    let weights: u64 = members.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let exact = |weight: u16| u64::from(total) * u64::from(weight);
    let mut shares: Vec<u32> = members.iter().map(|(_, w)| ((exact(*w) / weights) as u32).max(1)).collect();
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by_key(|m| std::cmp::Reverse(exact(members[*m].1) % weights));
    let mut sum: u32 = shares.iter().sum();
    for member in order.iter().cycle() {
        if sum >= total {
            break;
        }
        shares[*member] += 1;
        sum += 1;
    }
    while sum > total {
        if let Some(most) = shares.iter_mut().max() {
            *most -= 1;
        }
        sum -= 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::super::epochs::Immediate;
    use super::*;

    fn neighbour(n: u16) -> NextHop {
        NextHop::Forward {
            interface: InterfaceId::new(n).unwrap(),
            mac: MacAddress([2, 0, 0, 0, 0, n as u8]),
        }
    }

    fn owners(table: &NextHops, group: NextHopId) -> Vec<NextHopId> {
        let NextHop::Group(group) = table.get(group) else { panic!("not a group") };
        (0..1 << group.log2).map(|hash| table.member(group, hash)).collect()
    }

    #[test]
    fn a_next_hop_survives_its_word() {
        let interface = InterfaceId::new(4095).unwrap();
        for what in [
            NextHop::None,
            NextHop::Local,
            NextHop::Blackhole,
            NextHop::Unreachable,
            NextHop::Prohibit,
            NextHop::OnLink { interface },
            NextHop::Waiting { interface },
            NextHop::Failed { interface },
            NextHop::Forward { interface, mac: MacAddress::BROADCAST },
            NextHop::Group(Group { first: u32::MAX, log2: 12 }),
        ] {
            assert_eq!(NextHop::from_word(what.to_word()), what);
        }
        let (writer, table) = NextHops::create("test", 0, 0).unwrap();
        assert_eq!(table.get(NextHopId::LOCAL), NextHop::Local);
        assert_eq!(table.get(NextHopId::from_low_bits(u32::MAX)), NextHop::None);
        assert!(writer.is_empty());
    }

    #[test]
    fn removing_one_of_n_moves_only_its_flows_and_adding_takes_only_a_share() {
        let (mut writer, table) = NextHops::create("test", 64, 1024).unwrap();
        let ids: Vec<_> = (0..5).map(|n| writer.add(neighbour(n)).unwrap()).collect();
        let members: Vec<_> = ids.iter().map(|id| (*id, 1)).collect();
        let group = writer.add_group(&members[..4]).unwrap();
        let before = owners(&table, group);
        for id in &ids[..4] {
            assert_eq!(before.iter().filter(|owner| *owner == id).count(), 32);
        }
        writer.set_group(group, &[members[0], members[2], members[3]]).unwrap();
        let after = owners(&table, group);
        for (was, is) in before.iter().zip(&after) {
            assert!(was == is || *was == ids[1], "a flow of a member that stays has moved");
            assert_ne!(*is, ids[1]);
        }
        for id in [ids[0], ids[2], ids[3]] {
            assert!((42..=43).contains(&after.iter().filter(|owner| **owner == id).count()));
        }
        writer.set_group(group, &[members[0], members[2], members[3], members[4]]).unwrap();
        let grown = owners(&table, group);
        assert_eq!(after.iter().zip(&grown).filter(|(was, is)| was != is).count(), 32);
        assert_eq!(table.resolve(group, 0).interface(), table.get(grown[0]).interface());
        assert!(table.uses(group, InterfaceId::new(4).unwrap()));
        assert!(!table.uses(group, InterfaceId::new(1).unwrap()));
    }

    #[test]
    fn weights_are_shares() {
        let (mut writer, table) = NextHops::create("test", 512, 8192).unwrap();
        let a = writer.add(neighbour(1)).unwrap();
        let b = writer.add(neighbour(2)).unwrap();
        let group = writer.add_group(&[(a, 3), (b, 1)]).unwrap();
        assert_eq!(owners(&table, group).iter().filter(|id| **id == a).count(), 96);
        let many: Vec<_> = (0..256).map(|n| (writer.add(neighbour(n)).unwrap(), n + 1)).collect();
        let group = writer.add_group(&many).unwrap();
        let owners = owners(&table, group);
        assert_eq!(owners.len(), 4096);
        for (id, _) in &many {
            assert!(owners.contains(id), "every member has a bucket");
        }
    }

    #[test]
    fn what_is_removed_is_used_again_only_after_its_epoch() {
        struct Never;
        impl Epochs for Never {
            fn now(&self) -> super::super::Epoch {
                super::super::Epoch::default()
            }
            fn passed(&self, _: &super::super::Epoch) -> bool {
                false
            }
        }
        let (mut writer, table) = NextHops::create("test", 7, 128).unwrap();
        let a = writer.add(neighbour(1)).unwrap();
        let group = writer.add_group(&[(a, 1)]).unwrap();
        assert_eq!(writer.add(neighbour(2)), Err(GroupError::Full { most: 7 }));
        assert_eq!(writer.add_group(&[(a, 1)]), Err(GroupError::Buckets { wanted: 128 }));
        writer.remove(group);
        writer.collect(&Never);
        assert_eq!(table.resolve(group, 9), neighbour(1), "a reader may still hold the group");
        assert_eq!(writer.add(neighbour(2)), Err(GroupError::Full { most: 7 }));
        writer.collect(&Immediate);
        assert_eq!(writer.len(), 1);
        assert_eq!(writer.add_group(&[(a, 1)]), Ok(group));
    }

    #[test]
    fn nonsense_is_refused() {
        let (mut writer, table) = NextHops::create("test", 64, 256).unwrap();
        let a = writer.add(neighbour(1)).unwrap();
        let group = writer.add_group(&[(a, 1)]).unwrap();
        assert_eq!(writer.add_group(&[]), Err(GroupError::Members));
        assert_eq!(writer.add_group(&[(a, 0)]), Err(GroupError::Members));
        assert_eq!(writer.add_group(&[(group, 1)]), Err(GroupError::Kind { id: group }));
        assert_eq!(writer.set(group, NextHop::Local), Err(GroupError::Kind { id: group }));
        assert_eq!(
            writer.set(NextHopId::LOCAL, neighbour(1)),
            Err(GroupError::Kind { id: NextHopId::LOCAL })
        );
        assert_eq!(writer.set_group(a, &[(a, 1)]), Err(GroupError::Kind { id: a }));
        let unknown = NextHopId::from_low_bits(99);
        assert_eq!(writer.add_group(&[(unknown, 1)]), Err(GroupError::Kind { id: unknown }));
        writer.remove(NextHopId::LOCAL);
        writer.remove(unknown);
        writer.collect(&Immediate);
        assert_eq!(table.get(NextHopId::LOCAL), NextHop::Local);
    }
}
