//! A learning bridge: IEEE 802.1D forwarding, with 802.1Q VLANs where they are configured.
//!
//! | file | what is there |
//! |---|---|
//! | this one | the decision for each packet, and carrying it out |
//! | [`fdb`] | the table of stations: learning, ageing, its bounds |
//! | [`vlan`] | a port's VLANs, tags pushed and popped |
//! | [`flood`] | limits of flooding |
//! | [`config`] | what a bridge is told, and errors |
//! | [`change`] | what a bridge at work is told anew |
//!
//! Contract: no packet content makes it panic or do more than a bounded amount of work; it allocates
//! when it is made and never again. The frames of a packet share one fate, decided on the first. What
//! it cannot or may not deliver is dropped with a reason:
//!
//! | packet | reason |
//! |---|---|
//! | shorter than its header, or cut off | `Malformed` |
//! | from a group address, zero, or one of ours; to one of ours; to a reserved group | `Policy` |
//! | to the port it came from; isolated port to isolated port; nobody to flood to | `Policy` |
//! | VLAN not allowed on the port; tagged on an access port; untagged without a native VLAN | `Vlan` |
//! | flooding beyond a limit | `Storm` |
//! | flooding would take the frames kept for receiving | `NoFrame` |
//! | a station on a port that is down, or from a port that the bridge does not have | `NoPort` |
//!
//! Cost: a batch of packets for one known port is two table look-ups a packet (none for a packet with
//! the header of the one before) and one move of the whole batch.

pub mod change;
pub mod config;
pub mod fdb;
pub mod flood;
pub mod vlan;

pub use change::Change;
pub use config::{BridgeConfig, BridgeError, BridgePort, StaticStation};
pub use fdb::{Fdb, Station, WhenFull};
pub use flood::FloodLimits;
pub use vlan::{PortVlans, VlanSet};

use crate::app::{App, DropReason, PortId, Turn};
use crate::wire::ethernet::{EtherType, HEADER, Packet, TAG, TagPacket};
use crate::wire::{MacAddress, VlanId};
use fdb::{Events, Key, Learned, MAX_PORTS, millis};
use flood::Budget;
use isoplane_drivers::LinkState;
use isoplane_memory::stats::Field;
use isoplane_memory::{BATCH, Batch, Frame};
use std::hash::{BuildHasher, Hasher};
use vlan::{Edit, Tagged};

/// Frames ahead of the one in hand whose headers are fetched.
const AHEAD: usize = 4;
/// Buckets that one turn sweeps, at most once a millisecond: 8192 stations in 0.5 s.
const SWEEP: usize = 4;

/// Counters of a bridge, to be declared for its worker; see [`Bridge::FIELDS`].
pub mod field {
    use super::Field;
    /// Stations learned.
    pub const LEARNED: usize = 0;
    /// Stations seen on another port than before.
    pub const MOVED: usize = 1;
    /// Stations forgotten because they were silent.
    pub const AGED: usize = 2;
    /// Stations forgotten because their port was flushed.
    pub const FLUSHED: usize = 3;
    /// Stations forgotten to make room.
    pub const EVICTED: usize = 4;
    /// Times a station was not learned because its place was taken.
    pub const TABLE_FULL: usize = 5;
    /// Times a station was not learned because its port had reached its limit.
    pub const PORT_LIMIT: usize = 6;
    /// Times a static station was seen on another port.
    pub const STATIC_CONFLICT: usize = 7;
    /// Frames for one known port.
    pub const UNICAST: usize = 8;
    /// Frames that were flooded.
    pub const FLOODED: usize = 9;
    /// Frames copied for that.
    pub const COPIES: usize = 10;
    /// Packets whose chunk had no room for a tag.
    pub const NO_ROOM: usize = 11;
    /// Stations in the table now.
    pub const STATIONS: usize = 12;
    /// The fields, in order.
    pub const FIELDS: [Field; 13] = [
        Field::counter("learned"),
        Field::counter("moved"),
        Field::counter("aged"),
        Field::counter("flushed"),
        Field::counter("evicted"),
        Field::counter("table_full"),
        Field::counter("port_limit"),
        Field::counter("static_conflict"),
        Field::counter("unicast"),
        Field::counter("flooded"),
        Field::counter("copies"),
        Field::counter("no_room"),
        Field::gauge("stations"),
    ];
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Forward { to: u8, edit: Edit, vid: u16 },
    Flood { tag: Tagged, vid: u16 },
    Drop(DropReason),
}

/// A port as the decision sees it.
#[derive(Debug, Clone, Copy)]
struct PortState {
    /// Ports that packets from here may leave by.
    reach: u64,
    /// VLAN of untagged frames, both ways; 0 for none (and on a bridge that ignores VLANs, where 0 is
    /// the one VLAN there is).
    native: u16,
    /// May tagged frames come in?
    tagged: bool,
    learn: bool,
    budget: Budget,
}

/// The learning bridge. One worker runs it over all its ports.
///
/// ```
/// use isoplane::blocks::bridge::{Bridge, BridgeConfig, PortVlans, VlanSet};
/// use isoplane::wire::VlanId;
///
/// // Two offices on one trunk: ports 0 and 1 are in VLAN 10 and 20, port 2 carries both.
/// let (ten, twenty) = (VlanId::new(10).unwrap(), VlanId::new(20).unwrap());
/// let bridge = Bridge::new(&BridgeConfig {
///     vlans: Some(vec![
///         PortVlans::Access(ten),
///         PortVlans::Access(twenty),
///         PortVlans::Trunk { allowed: VlanSet::from_iter([ten, twenty]), native: None },
///     ]),
///     ..BridgeConfig::new(3)
/// })?;
/// assert!(bridge.fdb().is_empty());
/// // A worker that declared `Bridge::FIELDS` as its counters runs it: `turns.turn(&mut bridge, now)`.
/// # Ok::<(), isoplane::blocks::bridge::BridgeError>(())
/// ```
#[derive(Debug)]
pub struct Bridge {
    fdb: Fdb,
    ports: Box<[PortState]>,
    /// Ports of each VLAN, as bits; VLAN 0 is the only one on a bridge that ignores VLANs.
    members: Box<[u64; 4096]>,
    vlans: bool,
    up: u64,
    /// Ports whose link the watcher saw go down.
    seen_down: u64,
    config: BridgeConfig,
    copies_left: u32,
    swept_ms: u64,
    fates: Box<[Fate; BATCH]>,
}

impl Bridge {
    /// The counters that a worker with a bridge declares.
    pub const FIELDS: [Field; field::FIELDS.len()] = field::FIELDS;

    /// Makes a bridge; allocates all that it will ever need.
    ///
    /// # Errors
    /// See [`BridgeError`].
    pub fn new(config: &BridgeConfig) -> Result<Self, BridgeError> {
        config.check()?;
        let all = u64::MAX >> (MAX_PORTS - config.ports.len());
        let isolated = ports_where(config, |p| p.isolated);
        let mut members = Box::new([0; 4096]);
        let mut ports = Vec::with_capacity(config.ports.len());
        members[0] = if config.vlans.is_none() { all } else { 0 };
        for (index, port) in config.ports.iter().enumerate() {
            let mut state = PortState {
                reach: all & !(1 << index) & if port.isolated { !isolated } else { u64::MAX },
                native: 0,
                tagged: false,
                learn: port.learn,
                budget: Budget::new(&config.flood),
            };
            match config.vlans.as_ref().map(|v| &v[index]) {
                None => {}
                Some(PortVlans::Access(vlan)) => {
                    members[usize::from(vlan.get())] |= 1 << index;
                    state.native = vlan.get();
                }
                Some(PortVlans::Trunk { allowed, native }) => {
                    allowed.iter().for_each(|vlan| members[usize::from(vlan.get())] |= 1 << index);
                    state.native = native.map_or(0, VlanId::get);
                    state.tagged = true;
                }
            }
            ports.push(state);
        }
        let seed = config.seed.unwrap_or_else(|| {
            // The standard library's hasher keys come from the operating system's random source.
            std::collections::hash_map::RandomState::new().build_hasher().finish()
        });
        let mut fdb = Fdb::new(config.capacity, config.ageing, config.when_full, seed);
        for (index, port) in (0..).zip(&config.ports) {
            fdb.set_limit(PortId(index), port.max_stations);
        }
        let mut bridge = Self {
            fdb,
            ports: ports.into_boxed_slice(),
            members,
            vlans: config.vlans.is_some(),
            up: all,
            seen_down: 0,
            config: config.clone(),
            copies_left: config.flood.copies_per_turn,
            swept_ms: 0,
            fates: Box::new([Fate::Drop(DropReason::Unhandled); BATCH]),
        };
        config.stations.iter().try_for_each(|station| bridge.add_station(*station, 0))?;
        Ok(bridge)
    }

    /// The table of stations.
    #[must_use]
    pub const fn fdb(&self) -> &Fdb {
        &self.fdb
    }

    /// Adds a static station, in place of a learned one with its address; `now` is the time of the
    /// worker's clock.
    ///
    /// # Errors
    /// [`BridgeError::Station`].
    pub fn add_station(&mut self, station: StaticStation, now: u64) -> Result<(), BridgeError> {
        self.config.check_station(&station)?;
        let key = Key::new(station.mac, station.vlan.map_or(0, VlanId::get));
        if self.fdb.pin(key, station.port, millis(now)) {
            return Ok(());
        }
        let why = "its place in the table is full of static stations; make the table larger";
        Err(BridgeError::Station { station, why })
    }

    /// Forgets a station, static or learned; says whether it was known.
    pub fn remove_station(&mut self, vlan: Option<VlanId>, mac: MacAddress) -> bool {
        self.fdb.remove(Key::new(mac, vlan.map_or(0, VlanId::get)))
    }

    /// Forgets all stations learned on a port; takes the same time for any number of them.
    pub fn flush_port(&mut self, port: PortId) {
        self.fdb.flush(port);
    }

    /// Tells the bridge that a port's link went down or up. While it is down nothing is sent there and
    /// nothing learned; going down flushes it. Where a watcher follows the links ([`Turn::link`]) the
    /// bridge sees each change by itself, within a millisecond of the watcher.
    pub fn set_link(&mut self, port: PortId, up: bool) {
        if port.index() >= self.ports.len() {
            return;
        }
        if up {
            self.up |= 1 << port.0;
        } else {
            self.up &= !(1 << port.0);
            self.fdb.flush(port);
        }
    }

    /// Follows what the watcher saw; a link that it did not see change stays as the program set it.
    fn follow_links(&mut self, turn: &Turn<'_>) {
        for index in 0..self.ports.len().min(turn.ports()) {
            let (port, bit) = (PortId(index as u8), 1 << index);
            let down = match turn.link(port) {
                LinkState::Down | LinkState::Gone => true,
                LinkState::Up => false,
                LinkState::Unknown => continue,
            };
            if down != (self.seen_down & bit != 0) {
                self.seen_down ^= bit;
                self.set_link(port, !down);
            }
        }
    }

    /// The VLAN that a packet is taken as, and the tag it came with.
    #[inline(always)]
    fn classify(
        &self,
        port: &PortState,
        from: u8,
        packet: &Packet<&[u8]>,
    ) -> Result<(u16, Tagged), DropReason> {
        if !self.vlans {
            return Ok((0, Tagged::No));
        }
        let (vid, tag) = if packet.ethertype() == EtherType::VLAN {
            let tag = TagPacket::new_checked(packet.payload()).map_err(|_| DropReason::Malformed)?.tag();
            match tag.vlan {
                0 => (port.native, Tagged::Priority),
                vid if port.tagged => (vid, Tagged::Vlan),
                _ => return Err(DropReason::Vlan),
            }
        } else {
            (port.native, Tagged::No)
        };
        // VLANs 0 and 4095 have no members.
        let member = self.members[usize::from(vid & 0xfff)] & 1 << (from & 63) != 0;
        if member { Ok((vid, tag)) } else { Err(DropReason::Vlan) }
    }

    /// Decides about one packet by its first frame. The second value says whether the next packet
    /// would meet the same fate if its header were the same.
    #[inline(always)]
    fn decide(&mut self, port: &PortState, from: u8, bytes: &[u8], now_ms: u64) -> (Fate, bool) {
        let Ok(packet) = Packet::new_checked(bytes) else {
            return (Fate::Drop(DropReason::Malformed), false);
        };
        let (vid, tag) = match self.classify(port, from, &packet) {
            Ok(class) => class,
            Err(reason) => return (Fate::Drop(reason), false),
        };
        let (destination, source) = (packet.destination(), packet.source());
        if !source.is_station() {
            return (Fate::Drop(DropReason::Policy), false);
        }
        if destination.is_group()
            && let Some(digit) = destination.reserved_group()
            && self.config.forward_reserved & 1 << digit == 0
        {
            return (Fate::Drop(DropReason::Policy), false);
        }
        let source_key = Key::new(source, vid);
        if !self.config.own.is_empty() && self.is_ours(source) {
            return (Fate::Drop(DropReason::Policy), false);
        }
        let settled = !port.learn
            || self.up & 1 << (from & 63) == 0
            || self.fdb.learn(source_key, from, now_ms) == Learned::Known;
        if destination.is_group() {
            return (Fate::Flood { tag, vid }, settled);
        }
        let Some(to) = self.fdb.port_of(Key::new(destination, vid), now_ms) else {
            if self.is_ours(destination) {
                return (Fate::Drop(DropReason::Policy), settled);
            }
            return (Fate::Flood { tag, vid }, settled);
        };
        let bit = 1 << (to & 63);
        let fate = if port.reach & bit == 0 {
            Fate::Drop(DropReason::Policy)
        } else if self.members[usize::from(vid & 0xfff)] & bit == 0 {
            Fate::Drop(DropReason::Vlan)
        } else if self.up & bit == 0 {
            Fate::Drop(DropReason::NoPort)
        } else {
            Fate::Forward { to, edit: self.edit(tag, vid, to), vid }
        };
        (fate, settled)
    }

    #[inline(always)]
    fn edit(&self, tag: Tagged, vid: u16, to: u8) -> Edit {
        let native = self.ports.get(usize::from(to)).map_or(0, |p| p.native);
        Edit::of(tag, native != vid)
    }

    #[inline(always)]
    fn is_ours(&self, mac: MacAddress) -> bool {
        self.config.own.contains(&mac)
    }

    /// Carries out the fates of a batch, packet by packet.
    fn carry_out(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        let pool = turn.pool();
        let mut index = 0;
        let mut unicast = 0;
        let mut drain = batch.drain();
        while let Some(mut frame) = drain.next() {
            let fate = self.fates[index % BATCH];
            index += 1;
            match fate {
                Fate::Drop(reason) => turn.drop(frame, reason),
                Fate::Forward { to, edit, vid } => {
                    let sent = edit.apply(pool, &mut frame, vid);
                    if !sent {
                        turn.count(field::NO_ROOM, 1);
                    }
                    loop {
                        let more = frame.has_more();
                        if sent {
                            unicast += 1;
                            turn.send(PortId(to), frame);
                        } else {
                            turn.drop(frame, DropReason::Malformed);
                        }
                        if !more {
                            break;
                        }
                        let Some(next) = drain.next() else { break };
                        frame = next;
                        index += 1;
                    }
                }
                Fate::Flood { tag, vid } => {
                    let mut packet = Batch::new();
                    loop {
                        let more = frame.has_more();
                        hold(turn, &mut packet, frame);
                        if !more {
                            break;
                        }
                        let Some(next) = drain.next() else { break };
                        frame = next;
                        index += 1;
                    }
                    self.flood(turn, from, tag, vid, &mut packet);
                }
            }
        }
        if unicast != 0 {
            turn.count(field::UNICAST, unicast);
        }
    }

    /// Sends one packet to every port of its VLAN that may have it, or drops it.
    fn flood(&mut self, turn: &mut Turn<'_>, from: PortId, tag: Tagged, vid: u16, packet: &mut Batch) {
        let Some(port) = self.ports.get_mut(from.index()) else {
            return turn.drop_all(packet, DropReason::NoPort);
        };
        let there = 1_u64.checked_shl(turn.ports() as u32).map_or(u64::MAX, |bit| bit - 1);
        let mut to = self.members[usize::from(vid & 0xfff)] & port.reach & self.up & there;
        if to == 0 {
            return turn.drop_all(packet, DropReason::Policy);
        }
        let copies = (to.count_ones() - 1) * packet.len() as u32;
        if copies != 0 {
            if turn.frames().len() < copies as usize + self.config.flood.reserve as usize {
                return turn.drop_all(packet, DropReason::NoFrame);
            }
            if copies > self.copies_left || !port.budget.take(copies, turn.now()) {
                return turn.drop_all(packet, DropReason::Storm);
            }
            self.copies_left -= copies;
            turn.count(field::COPIES, u64::from(copies));
        }
        turn.count(field::FLOODED, packet.len() as u64);
        while to & (to - 1) != 0 {
            let next = to.trailing_zeros() as u8;
            to &= to - 1;
            let mut copy = Batch::new();
            for frame in packet.iter() {
                match turn.copy(frame) {
                    Some(frame) => hold(turn, &mut copy, frame),
                    None => turn.count_drop(DropReason::NoFrame),
                }
            }
            if copy.len() == packet.len() {
                self.send(turn, tag, vid, next, &mut copy);
            } else {
                turn.give_back(&mut copy);
            }
        }
        self.send(turn, tag, vid, to.trailing_zeros() as u8, packet);
    }

    /// Sends one packet, with the tag that the port wants.
    fn send(&self, turn: &mut Turn<'_>, tag: Tagged, vid: u16, to: u8, packet: &mut Batch) {
        let edit = self.edit(tag, vid, to);
        let pool = turn.pool();
        if packet.as_mut_slice().first_mut().is_some_and(|frame| edit.apply(pool, frame, vid)) {
            return turn.send_all(PortId(to), packet);
        }
        turn.count(field::NO_ROOM, 1);
        turn.drop_all(packet, DropReason::Malformed);
    }

    fn count_events(&mut self, turn: &mut Turn<'_>) {
        let events = std::mem::take(&mut self.fdb.events);
        turn.count(field::LEARNED, events.learned);
        turn.count(field::MOVED, events.moved);
        turn.count(field::AGED, events.aged);
        turn.count(field::FLUSHED, events.flushed);
        turn.count(field::EVICTED, events.evicted);
        turn.count(field::TABLE_FULL, events.table_full);
        turn.count(field::PORT_LIMIT, events.port_limit);
        turn.count(field::STATIC_CONFLICT, events.static_conflict);
        turn.gauge(field::STATIONS, self.fdb.len() as u64);
    }
}

/// The ports for which `which` says yes, as bits.
fn ports_where(config: &BridgeConfig, which: impl Fn(&BridgePort) -> bool) -> u64 {
    (0..).zip(&config.ports).filter(|(_, p)| which(p)).fold(0, |bits, (i, _): (u32, _)| bits | 1 << i)
}

/// Adds a frame to a batch that has room: a packet has at most as many frames as a batch.
#[inline(always)]
fn hold(turn: &mut Turn<'_>, batch: &mut Batch, frame: Frame) {
    if let Err(frame) = batch.push(frame) {
        turn.drop(frame, DropReason::Malformed);
    }
}

impl App for Bridge {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        let Some(port) = self.ports.get(from.index()).copied() else {
            return turn.drop_all(batch, DropReason::NoPort);
        };
        let pool = turn.pool();
        let now_ms = millis(turn.now());
        // A header is repeated as long as addresses and, with VLANs, tag are those of the one before.
        const WHOLE: usize = HEADER + TAG;
        let same = if self.vlans { u128::MAX } else { u128::MAX << 32 };
        let mut before = None;
        let mut fate = Fate::Drop(DropReason::Malformed);
        let mut head = 0;
        let mut more = false;
        let mut uniform = true;
        for frame in batch.as_slice().iter().take(AHEAD) {
            pool.prefetch(frame);
        }
        for (index, frame) in batch.iter().enumerate() {
            if let Some(next) = batch.as_slice().get(index + AHEAD) {
                pool.prefetch(next);
            }
            if !more {
                head = index;
                let bytes = pool.bytes(frame);
                let header = bytes.first_chunk::<WHOLE>().and_then(|h| h.first_chunk::<16>());
                let header = header.map(|h| u128::from_be_bytes(*h) & same);
                if header.is_none() || header != before {
                    let (decided, settled) = self.decide(&port, from.0, bytes, now_ms);
                    fate = decided;
                    before = header.filter(|_| settled);
                }
            }
            more = frame.has_more();
            self.fates[index] = fate;
            uniform &= fate == self.fates[0];
        }
        if more {
            // The batch ends within a packet: its port broke the contract, and the rest is not to come.
            self.fates[head..batch.len()].fill(Fate::Drop(DropReason::Malformed));
            uniform = false;
        }
        match self.fates[0] {
            Fate::Forward { to, edit: Edit::None, .. } if uniform => {
                turn.count(field::UNICAST, batch.len() as u64);
                turn.send_all(PortId(to), batch);
            }
            _ => self.carry_out(turn, from, batch),
        }
    }

    #[inline(always)]
    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.copies_left = self.config.flood.copies_per_turn;
        let now_ms = millis(turn.now());
        if now_ms != self.swept_ms {
            self.swept_ms = now_ms;
            self.fdb.sweep(SWEEP, now_ms);
            self.follow_links(turn);
            turn.gauge(field::STATIONS, self.fdb.len() as u64);
        }
        if self.fdb.events != Events::default() {
            self.count_events(turn);
        }
    }

    fn wants_rehearsal(&self) -> bool {
        true
    }

    /// Learned stations, spent budgets and the place of the sweep are as in a new bridge; links that the
    /// program has set and static stations stay.
    fn rehearsed(&mut self) {
        self.fdb.forget_learned();
        for port in &mut self.ports {
            port.budget = Budget::new(&self.config.flood);
        }
        self.copies_left = self.config.flood.copies_per_turn;
        self.swept_ms = 0;
    }
}
