//! A virtio-net device on plain memory: what a device does with the registers and rings that a driver shows it.
//!
//! Contract: an implementation of the specification of its own, which shares numbers with the driver and no code.
//! It sleeps as real devices do: an entry that is published without a doorbell, where one was wanted,
//! stays where it is.

use super::layout::{Features, capability, common, header, net, status};
use crate::pci::fake::{Bus, Device, FakeFunction};
use std::collections::VecDeque;

/// BAR of everything, and where its structures are, as QEMU has them.
const BAR: u8 = 4;
const COMMON_AT: usize = 0;
pub(crate) const DEVICE_AT: usize = 0x2000;
const NOTIFY_AT: usize = 0x3000;
const BAR_BYTES: usize = 0x4000;
const MULTIPLIER: usize = 4;
/// Where the capabilities are: common, notify, device.
pub(crate) const CAPABILITIES: [usize; 3] = [0x40, 0x50, 0x64];

/// A command that was given: code and body.
pub(crate) type Command = ([u8; 2], Vec<u8>);

/// What the device is like.
#[derive(Debug, Clone)]
pub(crate) struct Traits {
    pub(crate) offered: Features,
    /// Features that it offers and then does not accept.
    pub(crate) refused: Features,
    pub(crate) most: u16,
    pub(crate) pairs: u16,
    pub(crate) mtu: u16,
    pub(crate) mac: [u8; 6],
    /// Gives entries back in another order than it got them.
    pub(crate) shuffles: bool,
    /// Does not come out of a reset.
    pub(crate) stuck: bool,
    /// The configuration changes so many times while it is read.
    pub(crate) unstable: u32,
    /// Answers to commands; nothing is no answer.
    pub(crate) answer: Option<u8>,
    /// What it says of hashes: bytes of a key, entries of the table, kinds.
    pub(crate) rss: (u8, u16, u32),
    /// The number of virtqueues that it says it has, when that is a lie.
    pub(crate) virtqueues: Option<u16>,
}

impl Default for Traits {
    fn default() -> Self {
        Self {
            offered: Features::VERSION_1
                | Features::ACCESS_PLATFORM
                | Features::MAC
                | Features::STATUS
                | Features::CTRL_VQ
                | Features::CTRL_RX
                | Features::CTRL_MAC_ADDR
                | Features::CTRL_VLAN
                | Features::CSUM
                | Features::GUEST_CSUM
                | Features::EVENT_IDX
                | Features::INDIRECT_DESC
                | Features::MRG_RXBUF,
            refused: Features::empty(),
            most: 256,
            pairs: 1,
            mtu: 1500,
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            shuffles: false,
            stuck: false,
            unstable: 0,
            answer: Some(0),
            rss: (40, 128, 0x3f),
            virtqueues: None,
        }
    }
}

/// One virtqueue.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queue {
    pub(crate) size: u16,
    pub(crate) enabled: bool,
    pub(crate) vector: u16,
    /// Addresses: descriptors, driver area, device area.
    pub(crate) at: [u64; 3],
    pub(crate) doorbells: u64,
    pub(crate) awake: bool,
    pub(crate) next_avail: u16,
    pub(crate) next_used: u16,
    avail_wrap: bool,
    used_wrap: bool,
    packed: bool,
    events: bool,
}

/// An entry that the device has taken: its id, the descriptors of the ring that it takes up, and its buffers:
/// address, length, writable.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    id: u16,
    slots: u16,
    buffers: Vec<(u64, u32, bool)>,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Entry {
    /// One that the device was never given, or was: it says that it is done with this id.
    pub(crate) fn forged(id: u16) -> Self {
        Self { id, slots: 1, buffers: Vec::new() }
    }

    /// Its buffers: address, length, writable.
    pub(crate) fn buffers(&self) -> &[(u64, u32, bool)] {
        &self.buffers
    }

    /// Where its first buffer is.
    pub(crate) fn address(&self) -> u64 {
        self.buffers[0].0
    }
}

impl Queue {
    /// The device's side of a ring that is already laid out.
    pub(crate) fn serving(size: u16, at: [u64; 3], packed: bool) -> Self {
        Self { size, at, packed, enabled: true, avail_wrap: true, used_wrap: true, ..Self::default() }
    }

    fn descriptor(bus: &Bus, at: u64) -> (u64, u32, u16, u16) {
        (bus.get64(at), bus.get32(at + 8), bus.get16(at + 12), bus.get16(at + 14))
    }

    fn table(bus: &Bus, at: u64, bytes: u32, linked: bool) -> Vec<(u64, u32, bool)> {
        let mut buffers = Vec::new();
        let mut n = 0;
        while n < u64::from(bytes / 16) && buffers.len() < 64 {
            let (address, len, flags, next) = Self::descriptor(bus, at + n * 16);
            buffers.push((address, len, flags & WRITE != 0));
            if linked && flags & NEXT == 0 {
                break;
            }
            n = if linked { next.into() } else { n + 1 };
        }
        buffers
    }

    fn pop_split(&mut self, bus: &Bus) -> Option<Entry> {
        if bus.get16(self.at[1] + 2) == self.next_avail {
            return None;
        }
        let slot = self.next_avail & (self.size - 1);
        let id = bus.get16(self.at[1] + 4 + u64::from(slot) * 2);
        self.next_avail = self.next_avail.wrapping_add(1);
        let (mut next, mut buffers) = (id, Vec::new());
        loop {
            let (address, len, flags, link) = Self::descriptor(bus, self.at[0] + u64::from(next) * 16);
            if flags & INDIRECT != 0 {
                buffers.extend(Self::table(bus, address, len, true));
                break;
            }
            buffers.push((address, len, flags & WRITE != 0));
            if flags & NEXT == 0 || buffers.len() > 64 {
                break;
            }
            next = link;
        }
        Some(Entry { id, slots: 1, buffers })
    }

    fn push_split(&mut self, bus: &Bus, entry: &Entry, len: u32) {
        let at = self.at[2] + 4 + u64::from(self.next_used & (self.size - 1)) * 8;
        bus.write(at, &u32::from(entry.id).to_le_bytes());
        bus.write(at + 4, &len.to_le_bytes());
        self.next_used = self.next_used.wrapping_add(1);
        bus.write(self.at[2] + 2, &self.next_used.to_le_bytes());
    }

    fn advance(next: &mut u16, wrap: &mut bool, slots: u16, size: u16) {
        *next += slots;
        if *next >= size {
            *next -= size;
            *wrap = !*wrap;
        }
    }

    fn pop_packed(&mut self, bus: &Bus) -> Option<Entry> {
        const AVAIL: u16 = 1 << 7;
        const USED: u16 = 1 << 15;
        let (mut slots, mut buffers) = (0, Vec::new());
        loop {
            let at = self.at[0] + u64::from(self.next_avail) * 16;
            let (address, len, id, flags) = Self::descriptor(bus, at);
            let there = (flags & AVAIL != 0) == self.avail_wrap && (flags & USED != 0) != self.avail_wrap;
            if slots == 0 && !there {
                return None;
            }
            assert!(there, "the descriptors of an entry become available before its first");
            slots += 1;
            Self::advance(&mut self.next_avail, &mut self.avail_wrap, 1, self.size);
            if flags & INDIRECT != 0 {
                buffers.extend(Self::table(bus, address, len, false));
            } else {
                buffers.push((address, len, flags & WRITE != 0));
            }
            if flags & NEXT == 0 {
                return Some(Entry { id, slots, buffers });
            }
        }
    }

    fn push_packed(&mut self, bus: &Bus, entry: &Entry, len: u32) {
        let at = self.at[0] + u64::from(self.next_used) * 16;
        // The address of a used descriptor means nothing.
        bus.write(at, &0xdead_beef_dead_beef_u64.to_le_bytes());
        bus.write(at + 8, &len.to_le_bytes());
        bus.write(at + 12, &entry.id.to_le_bytes());
        let flags: u16 = if self.used_wrap { 1 << 7 | 1 << 15 } else { 0 };
        bus.write(at + 14, &flags.to_le_bytes());
        Self::advance(&mut self.next_used, &mut self.used_wrap, entry.slots, self.size);
    }

    pub(crate) fn pop(&mut self, bus: &Bus) -> Option<Entry> {
        if self.packed { self.pop_packed(bus) } else { self.pop_split(bus) }
    }

    pub(crate) fn push(&mut self, bus: &Bus, entry: &Entry, len: u32) {
        if self.packed { self.push_packed(bus, entry, len) } else { self.push_split(bus, entry, len) }
    }

    /// Says whether doorbells are wanted: from the next entry on, or not at all.
    pub(crate) fn listen(&self, bus: &Bus, on: bool) {
        if self.packed {
            let flags: u16 = match (on, self.events) {
                (false, _) => 1,
                (true, false) => 0,
                (true, true) => 2,
            };
            let event = self.next_avail | u16::from(self.avail_wrap) << 15;
            bus.write(self.at[2], &event.to_le_bytes());
            bus.write(self.at[2] + 2, &flags.to_le_bytes());
        } else if self.events {
            // Off is an index that was passed long ago.
            let event = if on { self.next_avail } else { self.next_avail.wrapping_sub(0x4000) };
            bus.write(self.at[2] + 4 + u64::from(self.size) * 8, &event.to_le_bytes());
        } else {
            bus.write(self.at[2], &u16::from(!on).to_le_bytes());
        }
    }
}

/// The device.
pub(crate) struct FakeNet {
    pub(crate) traits: Traits,
    pub(crate) status: u8,
    pub(crate) chosen: Features,
    pub(crate) queues: Vec<Queue>,
    pub(crate) link_up: bool,
    pub(crate) generation: u8,
    pub(crate) commands: Vec<Command>,
    /// Packets that have come in and not yet been given to the driver, each for a pair of queues.
    pub(crate) inbound: VecDeque<(u16, Vec<u8>, [u8; 20])>,
    /// Packets that were sent: on which pair, header, bytes.
    pub(crate) outbound: VecDeque<(u16, Vec<u8>, Vec<u8>)>,
    /// Bus mastering was on when the driver said that it was ready.
    pub(crate) master_at_start: Option<bool>,
    selects: [u32; 3],
    master: bool,
}

impl FakeNet {
    pub(crate) fn new(traits: Traits) -> FakeFunction<Self> {
        let mut device = Self {
            traits,
            status: 0,
            chosen: Features::empty(),
            queues: Vec::new(),
            link_up: true,
            generation: 0,
            commands: Vec::new(),
            inbound: VecDeque::new(),
            outbound: VecDeque::new(),
            master_at_start: None,
            selects: [0; 3],
            master: false,
        };
        device.power_on();
        FakeFunction::new(device)
    }

    fn power_on(&mut self) {
        let several = self.traits.offered.intersects(Features::MQ | Features::RSS);
        let pairs = if several { self.traits.pairs } else { 1 };
        let n = usize::from(pairs) * 2 + 1;
        let queue = Queue { size: self.traits.most, avail_wrap: true, used_wrap: true, ..Queue::default() };
        self.queues = vec![queue; n];
        self.chosen = Features::empty();
    }

    fn queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.selects[2] as usize)
    }

    fn header_bytes(&self) -> usize {
        if self.chosen.contains(Features::HASH_REPORT) { header::BYTES_WITH_HASH } else { header::BYTES }
    }

    /// Lets the device work: it sends what it was told of, gives out what came in, and answers commands.
    pub(crate) fn step(&mut self, bus: &Bus) {
        if self.status & status::DRIVER_OK == 0 || !self.master {
            return;
        }
        let data = self.queues.len() - 1;
        for n in (1..data).step_by(2) {
            self.send(bus, n);
        }
        self.deliver(bus);
    }

    fn send(&mut self, bus: &Bus, n: usize) {
        if !self.queues[n].enabled || !std::mem::take(&mut self.queues[n].awake) {
            return;
        }
        let head = self.header_bytes();
        let mut done = Vec::new();
        self.queues[n].listen(bus, false);
        while let Some(entry) = self.queues[n].pop(bus) {
            let mut bytes = Vec::new();
            for (at, len, writable) in &entry.buffers {
                assert!(!writable, "a buffer to send from");
                let mut part = vec![0; *len as usize];
                bus.read(*at, &mut part);
                bytes.extend(part);
            }
            let packet = bytes.split_off(head.min(bytes.len()));
            self.outbound.push_back((n as u16 / 2, bytes, packet));
            done.push(entry);
        }
        if self.traits.shuffles {
            done.reverse();
        }
        for entry in done {
            self.queues[n].push(bus, &entry, 0);
        }
        self.queues[n].listen(bus, true);
    }

    fn deliver(&mut self, bus: &Bus) {
        let merges = self.chosen.contains(Features::MRG_RXBUF);
        let head = self.header_bytes();
        let mut kept = VecDeque::new();
        while let Some((pair, packet, meta)) = self.inbound.pop_front() {
            let Some(queue) = self.queues.get_mut(usize::from(pair) * 2).filter(|q| q.enabled) else {
                continue;
            };
            let saved = queue.clone();
            let mut bytes = meta[..head].to_vec();
            bytes.extend(&packet);
            let (mut entries, mut room) = (Vec::new(), 0);
            while room < bytes.len() {
                let Some(entry) = queue.pop(bus) else { break };
                let (_, len, writable) = entry.buffers[0];
                assert!(writable && entry.buffers.len() == 1, "a buffer to receive into");
                room += len as usize;
                entries.push(entry);
                if !merges {
                    break;
                }
            }
            if entries.is_empty() || merges && room < bytes.len() {
                // It looks again when the driver says that there is more.
                *queue = saved;
                queue.listen(bus, true);
                kept.push_back((pair, packet, meta));
                continue;
            }
            queue.listen(bus, false);
            if self.traits.shuffles {
                entries.reverse();
            }
            bytes.truncate(room);
            bytes[header::BUFFERS..][..2].copy_from_slice(&(entries.len() as u16).to_le_bytes());
            let mut rest = &bytes[..];
            for entry in &entries {
                let (at, len, _) = entry.buffers[0];
                let (part, after) = rest.split_at(rest.len().min(len as usize));
                bus.write(at, part);
                queue.push(bus, entry, part.len() as u32);
                rest = after;
            }
        }
        self.inbound = kept;
    }

    fn command(&mut self, bus: &Bus) {
        let n = self.queues.len() - 1;
        while let Some(entry) = self.queues[n].pop(bus) {
            let mut bytes = Vec::new();
            let mut answer_at = 0;
            for (at, len, writable) in &entry.buffers {
                if *writable {
                    answer_at = *at;
                } else {
                    let mut part = vec![0; *len as usize];
                    bus.read(*at, &mut part);
                    bytes.extend(part);
                }
            }
            let body = bytes.split_off(2);
            self.commands.push(([bytes[0], bytes[1]], body));
            let Some(answer) = self.traits.answer else { return };
            bus.write(answer_at, &[answer]);
            self.queues[n].push(bus, &entry, 1);
        }
    }

    fn doorbell(&mut self, bus: &Bus, n: usize) {
        let control = n + 1 == self.queues.len();
        let Some(queue) = self.queues.get_mut(n).filter(|queue| queue.enabled) else { return };
        queue.doorbells += 1;
        queue.awake = true;
        if control && self.status & status::DRIVER_OK != 0 && self.master {
            self.command(bus);
        }
    }

    fn common_read(&mut self, offset: usize) -> u32 {
        let most = self.traits.most;
        match offset {
            common::DEVICE_FEATURE => (self.traits.offered.bits() >> (32 * (self.selects[0] & 1))) as u32,
            common::NUM_QUEUES => self.traits.virtqueues.map_or(self.queues.len() as u32, u32::from),
            common::DEVICE_STATUS => self.status.into(),
            common::CONFIG_GENERATION => {
                if self.traits.unstable > 0 {
                    self.traits.unstable -= 1;
                    self.generation = self.generation.wrapping_add(1);
                }
                self.generation.into()
            }
            common::QUEUE_SIZE => {
                self.queue().map_or(0, |q| if q.enabled { q.size } else { q.size.min(most) }).into()
            }
            common::QUEUE_ENABLE => self.queue().is_some_and(|q| q.enabled).into(),
            common::QUEUE_NOTIFY_OFF => self.selects[2],
            common::QUEUE_RESET => 0,
            _ => 0,
        }
    }

    fn common_write(&mut self, offset: usize, value: u32) {
        let (packed, events) =
            (self.chosen.contains(Features::RING_PACKED), self.chosen.contains(Features::EVENT_IDX));
        match offset {
            common::DEVICE_FEATURE_SELECT => self.selects[0] = value,
            common::DRIVER_FEATURE_SELECT => self.selects[1] = value,
            common::DRIVER_FEATURE => {
                let shift = 32 * (self.selects[1] & 1);
                let kept = self.chosen.bits() & !(u64::from(u32::MAX) << shift);
                self.chosen = Features::from_bits_retain(kept | u64::from(value) << shift);
            }
            common::DEVICE_STATUS => self.set_status(value as u8),
            common::QUEUE_SELECT => self.selects[2] = value,
            common::QUEUE_SIZE => drop(self.queue().map(|q| q.size = value as u16)),
            common::QUEUE_MSIX_VECTOR => drop(self.queue().map(|q| q.vector = value as u16)),
            common::QUEUE_ENABLE => {
                if let Some(queue) = self.queue() {
                    (queue.enabled, queue.packed, queue.events) = (value == 1, packed, events);
                }
            }
            common::QUEUE_RESET => {
                let most = self.traits.most;
                if let Some(queue) = self.queue() {
                    *queue = Queue { size: most, avail_wrap: true, used_wrap: true, ..Queue::default() };
                }
            }
            // Three addresses, each in two halves.
            common::QUEUE_DESC..56 => {
                let (n, high) = ((offset - common::QUEUE_DESC) / 8, offset % 8 == 4);
                if let Some(queue) = self.queue() {
                    let word = &mut queue.at[n];
                    *word = if high {
                        *word & 0xffff_ffff | u64::from(value) << 32
                    } else {
                        *word & !0xffff_ffff | u64::from(value)
                    };
                }
            }
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            if !self.traits.stuck {
                self.status = 0;
                self.power_on();
            }
            return;
        }
        let new = value & !self.status;
        self.status = value;
        if new & status::FEATURES_OK != 0 {
            let unknown = self.chosen - self.traits.offered;
            if !unknown.is_empty() || self.chosen.intersects(self.traits.refused) {
                self.status &= !status::FEATURES_OK;
            }
        }
        if new & status::DRIVER_OK != 0 {
            self.master_at_start = Some(self.master);
        }
    }

    fn device_read(&self, offset: usize) -> u32 {
        let status = u16::from(self.link_up) * net::STATUS_LINK_UP;
        match offset {
            0..6 => self.traits.mac[offset].into(),
            net::STATUS => status.into(),
            net::MAX_PAIRS => self.traits.pairs.into(),
            net::MTU => self.traits.mtu.into(),
            net::RSS_MAX_KEY => self.traits.rss.0.into(),
            net::RSS_MAX_TABLE => self.traits.rss.1.into(),
            net::HASH_TYPES => self.traits.rss.2,
            _ => 0,
        }
    }
}

impl Device for FakeNet {
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        config[0x06] = 1 << 4;
        config[0x34] = CAPABILITIES[0] as u8;
        let all = [
            (capability::COMMON, COMMON_AT, 0x40, 16, CAPABILITIES[1]),
            (capability::NOTIFY, NOTIFY_AT, 0x1000, 20, CAPABILITIES[2]),
            (capability::DEVICE, DEVICE_AT, 0x40, 16, 0),
        ];
        for (at, (kind, offset, bytes, length, next)) in CAPABILITIES.into_iter().zip(all) {
            config[at..at + 5].copy_from_slice(&[9, next as u8, length, kind, BAR]);
            config[at + 8..at + 12].copy_from_slice(&(offset as u32).to_le_bytes());
            config[at + 12..at + 16].copy_from_slice(&(bytes as u32).to_le_bytes());
        }
        config[CAPABILITIES[1] + 16] = MULTIPLIER as u8;
        config
    }

    fn bar_bytes(&self, bar: u8) -> usize {
        if bar == BAR { BAR_BYTES } else { 0 }
    }

    fn read(&mut self, _bus: &Bus, _bar: u8, offset: usize, bytes: usize) -> u32 {
        match offset {
            COMMON_AT..0x40 => self.common_read(offset),
            DEVICE_AT..NOTIFY_AT => self.device_read(offset - DEVICE_AT),
            _ => u32::MAX >> (32 - 8 * bytes),
        }
    }

    fn write(&mut self, bus: &Bus, _bar: u8, offset: usize, _bytes: usize, value: u32) {
        match offset {
            COMMON_AT..0x40 => self.common_write(offset, value),
            NOTIFY_AT.. => {
                assert_eq!((offset - NOTIFY_AT) / MULTIPLIER, value as usize, "the doorbell of that queue");
                self.doorbell(bus, value as usize);
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.status = 0;
        self.power_on();
    }

    fn bus_master(&mut self, on: bool) {
        self.master = on;
    }
}

/// Lets two devices work, with a wire between them; what one sends on a pair of queues arrives at the same pair.
pub(crate) fn exchange(a: &FakeFunction<FakeNet>, b: &FakeFunction<FakeNet>) {
    for (from, to) in [(a, b), (b, a)] {
        let sent = from.device(|device, bus| {
            device.step(bus);
            std::mem::take(&mut device.outbound)
        });
        to.device(|device, bus| {
            device.inbound.extend(sent.into_iter().map(|(pair, _, packet)| (pair, packet, [0; 20])));
            device.step(bus);
        });
    }
}
