//! The program's side of a trie: the prefixes, and the nodes that they make in shared memory.
//!
//! Contract: each node here is one node in shared memory, with the prefixes that end in its byte of the
//! address. So a change needs no second table to find out what a prefix hides or uncovers, and touches
//! the nodes below its own only where the answer changes. (A general map of prefixes would have to be
//! asked for every run of every node that is built again.)
//!
//! Where runs begin depends on prefixes alone, not on next hops. A changed next hop, and a shorter prefix
//! that comes or goes, thus never needs memory: entries change in place, each whole. Another prefix in a
//! node makes a fresh copy of it, which one word links; the old one is used again when every reader has
//! let go of it. Taking a prefix away works without memory too: then a node keeps a run more than it needs.

use super::shared::{Bits, CHILD, DIRECT_BITS, Shared, UNIT, count, rank, room_of, units_of};
use super::space::Space;
use crate::tables::epochs::{Epochs, Limbo};
use isoplane_memory::RegionError;

/// Slots of the direct table.
const DIRECT: usize = 1 << DIRECT_BITS;
/// The length of prefixes that the direct table takes.
const DIRECT_LENGTH: u8 = DIRECT_BITS as u8;
/// No prefix there; no next hop has so many bits.
const ABSENT: u32 = u32::MAX;
/// Nodes on the way to the longest prefix.
const MOST_LEVELS: usize = (128 - DIRECT_BITS as usize) / 8;
/// [`Item::kind`] of a child.
const IS_CHILD: u8 = 9;
/// [`Node::unit`] of a node that is not in shared memory yet.
const NOWHERE: u32 = u32::MAX;

/// No memory for a change, which was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NoRoom;

/// Something in a node. In order, a prefix comes before those that it holds, and before children.
#[derive(Debug, Clone, Copy)]
struct Item {
    /// The first slot.
    slot: u8,
    /// Bits of the slot that the prefix has, 1 to 8; or [`IS_CHILD`].
    kind: u8,
    /// Its next hop; or the child, by its place in [`Trie::nodes`].
    value: u32,
}

#[derive(Debug)]
struct Node {
    items: Vec<Item>,
    /// Where runs begin in the shared node: where its items need it, and perhaps elsewhere.
    bits: Bits,
    /// Where the shared node is.
    unit: u32,
    /// The next hop of what no prefix in this node holds.
    inherits: u32,
}

impl Node {
    fn find(&self, slot: u8, kind: u8) -> Result<usize, usize> {
        self.items.binary_search_by(|item| (item.slot, item.kind).cmp(&(slot, kind)))
    }

    fn child(&self, slot: u8) -> Option<u32> {
        self.find(slot, IS_CHILD).ok().map(|at| self.items[at].value)
    }

    /// The next hop of a slot, but for its child.
    fn value(&self, slot: u8) -> u32 {
        let longest_first = (1..=8).rev().filter_map(|kind| {
            let first = slot & (u8::MAX << (8 - kind));
            self.find(first, kind).ok().map(|at| self.items[at].value)
        });
        longest_first.into_iter().next().unwrap_or(self.inherits)
    }

    fn units(&self) -> u32 {
        if self.unit == NOWHERE { 0 } else { units_of(count(&self.bits)) }
    }
}

/// Where a prefix longer than the direct table's belongs.
struct Place {
    bits: u128,
    /// The level of its node.
    level: usize,
    slot: u8,
    kind: u8,
    /// The nodes on the way, as far as there are any.
    path: [u32; MOST_LEVELS],
    found: usize,
}

impl Place {
    const fn top(&self) -> usize {
        (self.bits >> (128 - DIRECT_BITS)) as usize
    }

    /// The byte of the address that a level takes.
    const fn byte(&self, level: usize) -> u8 {
        (self.bits >> (128 - DIRECT_BITS as usize - 8 - level * 8)) as u8
    }

    /// The node, when there is one.
    fn node(&self) -> Option<u32> {
        (self.found > self.level).then(|| self.path[self.level])
    }
}

/// See the module's documentation. Prefixes are their first address, its first bit the highest of 128,
/// with nothing behind their length.
pub(super) struct Trie {
    shared: Shared,
    space: Space,
    limbo: Limbo<(u32, u32)>,
    retired: u32,
    /// Next hops of prefixes up to the direct table's length: at 1 of /0, at 2n and 2n + 1 of its halves.
    top: Vec<u32>,
    /// The node of each direct slot; 0 for none.
    children: Vec<u32>,
    /// The first is not used.
    nodes: Vec<Node>,
    vacant: Vec<u32>,
    /// The entry of each slot of the node that is being built.
    slots: Box<[u32; 256]>,
    /// Nodes, and what they have to inherit from now on.
    stale: Vec<(u32, u32)>,
    len: usize,
}

impl std::fmt::Debug for Trie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trie").field("shared", &self.shared).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Trie {
    pub(super) fn create(name: &str, bytes: usize) -> Result<Self, RegionError> {
        let units = u32::try_from(bytes / UNIT).unwrap_or(u32::MAX);
        let shared = Shared::create(name, units)?;
        let unused = Node { items: Vec::new(), bits: [0; 4], unit: NOWHERE, inherits: 0 };
        Ok(Self {
            space: Space::new(shared.units()),
            shared,
            limbo: Limbo::default(),
            retired: 0,
            top: vec![ABSENT; DIRECT * 2],
            children: vec![0; DIRECT],
            nodes: vec![unused],
            vacant: Vec::new(),
            slots: Box::new([0; 256]),
            stale: Vec::new(),
            len: 0,
        })
    }

    pub(super) const fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Bytes that nodes and the direct table take, and those of them that wait for readers.
    pub(super) const fn used(&self) -> (usize, usize) {
        let nodes = (self.shared.units() - self.space.free()) as usize * UNIT;
        (Shared::direct_bytes() + nodes, self.retired as usize * UNIT)
    }

    /// Where a short prefix is in [`Trie::top`].
    const fn heap(bits: u128, length: u8) -> usize {
        // In two steps, as a shift by all bits is none.
        (1 << length) | ((bits >> 64) as u64 >> 32 >> (32 - length)) as usize
    }

    fn place(&self, bits: u128, length: u8) -> Place {
        let level = usize::from(length - DIRECT_LENGTH - 1) / 8;
        let kind = (length - DIRECT_LENGTH - 1) % 8 + 1;
        let mut place = Place { bits, level, slot: 0, kind, path: [0; MOST_LEVELS], found: 0 };
        place.slot = place.byte(level);
        let mut next = Some(self.children[place.top()]).filter(|node| *node != 0);
        while let Some(node) = next {
            place.path[place.found] = node;
            place.found += 1;
            if place.found > level {
                break;
            }
            next = self.nodes[node as usize].child(place.byte(place.found - 1));
        }
        place
    }

    /// The next hop of exactly this prefix.
    pub(super) fn get(&self, bits: u128, length: u8) -> Option<u32> {
        if length <= DIRECT_LENGTH {
            return Some(self.top[Self::heap(bits, length)]).filter(|value| *value != ABSENT);
        }
        let place = self.place(bits, length);
        let node = &self.nodes[place.node()? as usize];
        node.find(place.slot, place.kind).ok().map(|at| node.items[at].value)
    }

    /// Puts a prefix in; says what was there.
    pub(super) fn insert(&mut self, bits: u128, length: u8, to: u32) -> Result<Option<u32>, NoRoom> {
        let was = if length <= DIRECT_LENGTH {
            let heap = Self::heap(bits, length);
            let was = std::mem::replace(&mut self.top[heap], to);
            self.paint_top(heap, to);
            Some(was).filter(|value| *value != ABSENT)
        } else {
            let place = self.place(bits, length);
            match place.node() {
                Some(node) => self.insert_into(node, &place, to)?,
                None => self.insert_below(&place, to).map(|()| None)?,
            }
        };
        self.len += usize::from(was.is_none());
        Ok(was)
    }

    /// Into a node that there is.
    fn insert_into(&mut self, node: u32, place: &Place, to: u32) -> Result<Option<u32>, NoRoom> {
        let items = &mut self.nodes[node as usize];
        let was = match items.find(place.slot, place.kind) {
            Ok(at) => Some(std::mem::replace(&mut items.items[at].value, to)),
            Err(at) => {
                items.items.insert(at, Item { slot: place.slot, kind: place.kind, value: to });
                None
            }
        };
        match self.publish(place, place.level) {
            Ok(()) => Ok(was),
            Err(NoRoom) => {
                let items = &mut self.nodes[node as usize];
                if let Ok(at) = items.find(place.slot, place.kind) {
                    items.items.remove(at);
                }
                Err(NoRoom)
            }
        }
    }

    /// As a new node, and the ones on the way to it that there are not.
    fn insert_below(&mut self, place: &Place, to: u32) -> Result<(), NoRoom> {
        let above = place.found.checked_sub(1).map(|level| place.path[level]);
        let slot = place.byte(place.found.saturating_sub(1));
        let inherits = match above {
            Some(node) => self.nodes[node as usize].value(slot),
            None => self.top_value(DIRECT + place.top()),
        };
        // From below: nobody sees any of them before the last step.
        let mut made = [0; MOST_LEVELS];
        let mut item = Item { slot: place.slot, kind: place.kind, value: to };
        let mut done = Ok(());
        for level in (place.found..=place.level).rev() {
            let node = Node { items: vec![item], bits: [0; 4], unit: NOWHERE, inherits };
            let node = self.add_node(node);
            made[level] = node;
            done = self.build(node).map(|_| ());
            if done.is_err() {
                break;
            }
            item =
                Item { slot: if level > 0 { place.byte(level - 1) } else { 0 }, kind: IS_CHILD, value: node };
        }
        if done.is_ok() {
            match above {
                None => {
                    self.children[place.top()] = item.value;
                    let unit = self.nodes[item.value as usize].unit;
                    self.shared.set_direct(place.top() as u16, CHILD | unit);
                }
                Some(above) => {
                    let items = &mut self.nodes[above as usize];
                    let at = items.find(slot, IS_CHILD).unwrap_or_else(|at| at);
                    items.items.insert(at, item);
                    done = self.publish(place, place.found - 1);
                    if done.is_err() {
                        self.nodes[above as usize].items.remove(at);
                    }
                }
            }
        }
        if done.is_err() {
            for node in made.into_iter().filter(|node| *node != 0) {
                let (unit, units) = self.drop_node(node);
                if units > 0 {
                    self.space.give(unit, units);
                }
            }
        }
        done
    }

    /// Takes a prefix away; says what was there.
    pub(super) fn remove(&mut self, bits: u128, length: u8) -> Option<u32> {
        let was = if length <= DIRECT_LENGTH {
            let heap = Self::heap(bits, length);
            let was = Some(std::mem::replace(&mut self.top[heap], ABSENT)).filter(|was| *was != ABSENT)?;
            let value = self.top_value(heap);
            self.paint_top(heap, value);
            was
        } else {
            let place = self.place(bits, length);
            let node = &mut self.nodes[place.node()? as usize];
            let at = node.find(place.slot, place.kind).ok()?;
            let was = node.items.remove(at).value;
            self.shrink(&place);
            was
        };
        self.len -= 1;
        Some(was)
    }

    /// Publishes the node of a place without what was taken away; nodes that are empty go.
    fn shrink(&mut self, place: &Place) {
        for level in (0..=place.level).rev() {
            let node = place.path[level];
            if !self.nodes[node as usize].items.is_empty() {
                // Less than before fits in the old place, if there is no new one.
                let published = self.publish(place, level);
                debug_assert!(published.is_ok());
                return;
            }
            let inherits = self.nodes[node as usize].inherits;
            let (unit, units) = self.drop_node(node);
            self.retire(unit, units);
            if level == 0 {
                self.children[place.top()] = 0;
                self.shared.set_direct(place.top() as u16, inherits);
            } else {
                let above = &mut self.nodes[place.path[level - 1] as usize];
                if let Ok(at) = above.find(place.byte(level - 1), IS_CHILD) {
                    above.items.remove(at);
                }
            }
        }
    }

    fn retire(&mut self, unit: u32, units: u32) {
        if units > 0 {
            self.limbo.retire((unit, units));
            self.retired += units;
        }
    }

    pub(super) fn collect(&mut self, epochs: &dyn Epochs) {
        let Self { limbo, space, retired, .. } = self;
        limbo.collect(epochs, |(unit, units)| {
            space.give(unit, units);
            *retired -= units;
        });
    }

    fn add_node(&mut self, node: Node) -> u32 {
        if let Some(vacant) = self.vacant.pop() {
            self.nodes[vacant as usize] = node;
            return vacant;
        }
        self.nodes.push(node);
        (self.nodes.len() - 1) as u32
    }

    /// Forgets a node; says where its memory is.
    fn drop_node(&mut self, node: u32) -> (u32, u32) {
        let items = &mut self.nodes[node as usize];
        let place = (items.unit, items.units());
        (items.items, items.unit) = (Vec::new(), NOWHERE);
        self.vacant.push(node);
        place
    }

    /// The next hop that prefixes of the direct table give to one of them, or to a slot.
    fn top_value(&self, mut heap: usize) -> u32 {
        while heap > 0 {
            if self.top[heap] != ABSENT {
                return self.top[heap];
            }
            heap /= 2;
        }
        0
    }

    /// Gives a next hop to everything below a short prefix that no longer one holds.
    fn paint_top(&mut self, heap: usize, value: u32) {
        if let Some(slot) = heap.checked_sub(DIRECT) {
            match self.children[slot] {
                0 => self.shared.set_direct(slot as u16, value),
                child => {
                    self.stale.push((child, value));
                    self.freshen();
                }
            }
            return;
        }
        for half in [heap * 2, heap * 2 + 1] {
            if self.top[half] == ABSENT {
                self.paint_top(half, value);
            }
        }
    }

    /// Brings the shared node of a level up to date, and the word that names it, and what is below.
    fn publish(&mut self, place: &Place, level: usize) -> Result<(), NoRoom> {
        let node = place.path[level];
        if self.build(node)? {
            let entry = CHILD | self.nodes[node as usize].unit;
            if level == 0 {
                self.shared.set_direct(place.top() as u16, entry);
            } else {
                let above = &self.nodes[place.path[level - 1] as usize];
                let index = rank(&above.bits, place.byte(level - 1));
                self.shared.set_entry(above.unit, index, entry);
            }
        }
        self.freshen();
        Ok(())
    }

    /// Gives every node that has something new to inherit its new entries, in place.
    fn freshen(&mut self) {
        while let Some((node, inherits)) = self.stale.pop() {
            self.nodes[node as usize].inherits = inherits;
            self.paint(node);
            self.write(node);
        }
    }

    /// Works out the entry of each slot of a node, and where runs must begin; children that inherit
    /// something else from now on are noted in [`Trie::stale`].
    fn paint(&mut self, node: u32) -> Bits {
        let Self { nodes, slots, stale, .. } = self;
        let node = &nodes[node as usize];
        slots.fill(node.inherits);
        let mut bits = [1, 0, 0, 0];
        let mut begin = |slot: usize| {
            if let Some(word) = bits.get_mut(slot / 64) {
                *word |= 1 << (slot % 64);
            }
        };
        for item in &node.items {
            let first = usize::from(item.slot);
            let end = if item.kind == IS_CHILD {
                let child = &nodes[item.value as usize];
                if child.inherits != slots[first] {
                    stale.push((item.value, slots[first]));
                }
                slots[first] = CHILD | child.unit;
                first + 1
            } else {
                let end = first + (256 >> item.kind);
                slots[first..end].fill(item.value);
                end
            };
            begin(first);
            begin(end);
        }
        bits
    }

    /// Writes the entries of a node that was painted.
    fn write(&self, node: u32) {
        let node = &self.nodes[node as usize];
        let mut index = 0;
        for (group, word) in node.bits.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let slot = group * 64 + left.trailing_zeros() as usize;
                self.shared.set_entry(node.unit, index, self.slots[slot]);
                index += 1;
                left &= left - 1;
            }
        }
    }

    /// Brings a shared node up to date, in place where that can be. True when it is in a new place.
    fn build(&mut self, node: u32) -> Result<bool, NoRoom> {
        let noted = self.stale.len();
        let mut bits = self.paint(node);
        let now = &self.nodes[node as usize];
        let units = units_of(count(&bits));
        let (old, had) = (now.unit, now.units());
        let fits = bits.iter().zip(&now.bits).all(|(new, old)| new & !old == 0) && had > 0;
        let place = if fits && units == had { None } else { self.space.take(units) };
        let Some(unit) = place else {
            if !fits {
                self.stale.truncate(noted);
                return Err(NoRoom);
            }
            self.write(node);
            return Ok(false);
        };
        // Where prefixes are put in one after the other, the next ones will need these.
        let mut spare = room_of(units) - count(&bits);
        let end = self.nodes[node as usize].items.last().map_or(0, |item| usize::from(item.slot) + 1);
        for slot in (end..256).chain(0..end) {
            let (word, bit) = (&mut bits[slot / 64], 1 << (slot % 64));
            if spare == 0 {
                break;
            }
            spare -= usize::from(*word & bit == 0);
            *word |= bit;
        }
        self.shared.write_head(unit, &bits);
        let now = &mut self.nodes[node as usize];
        (now.unit, now.bits) = (unit, bits);
        self.write(node);
        self.retire(old, had);
        Ok(true)
    }

    /// Calls `each` with every prefix, in no order that means anything.
    pub(super) fn for_each(&self, mut each: impl FnMut(u128, u8, u32)) {
        for length in 0..=DIRECT_LENGTH {
            for at in 0..1_usize << length {
                let value = self.top[1 << length | at];
                if value != ABSENT {
                    // In two steps, as a shift by all bits is none.
                    each((at as u128) << (64 - length) << 64, length, value);
                }
            }
        }
        let mut left: Vec<(u32, u128, u8)> = Vec::new();
        for (slot, child) in self.children.iter().enumerate().filter(|(_, child)| **child != 0) {
            left.push((*child, (slot as u128) << (128 - DIRECT_BITS), DIRECT_LENGTH));
            while let Some((node, above, depth)) = left.pop() {
                for item in &self.nodes[node as usize].items {
                    let bits = above | u128::from(item.slot) << (120 - depth);
                    if item.kind == IS_CHILD {
                        left.push((item.value, bits, depth + 8));
                    } else {
                        each(bits, depth + item.kind, item.value);
                    }
                }
            }
        }
    }

    /// Units in use that do not wait for readers.
    #[cfg(test)]
    pub(super) const fn live_units(&self) -> u32 {
        self.shared.units() - self.space.free() - self.retired
    }
}
