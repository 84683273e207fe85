//! An 82574 on plain memory, as far as the driver uses one: what is sent on one arrives at its peer.
//!
//! Contract: written from the datasheet and not from the driver. It reacts to writes of registers at once, finds
//! descriptors and packets only over the bus, and writes nothing that it was not given.

use super::layout::*;
use super::{E1000eRx, E1000eTx};
use crate::conformance::packet::split_mix;
use crate::pci::fake::{Bus, Device, FakeBar, FakeFunction};
use crate::port::{RxQueue, TxQueue};
use crate::queue::{AnyRx, AnyTx};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use isoplane_memory::{Batch, FrameCache, Survey};

pub(crate) type Card = FakeFunction<Fake>;

/// A half whose worker's successor begins with what it was when it was made, as after a fork.
struct Reborn<H>(H);

impl RxQueue for Reborn<E1000eRx<FakeBar<Fake>>> {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        self.0.receive(frames, batch)
    }
    fn bad_descriptors(&self) -> u64 {
        self.0.bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.0.forget();
        self.0.survey(survey);
    }
    fn stop(&mut self) {
        self.0.stop();
    }
    fn sweep(&mut self) -> u32 {
        self.0.sweep()
    }
}

impl TxQueue for Reborn<E1000eTx<FakeBar<Fake>>> {
    fn transmit(&mut self, batch: &mut Batch) -> usize {
        self.0.transmit(batch)
    }
    fn reclaim(&mut self, frames: &mut FrameCache) -> usize {
        self.0.reclaim(frames)
    }
    fn refused(&self) -> (u64, u64) {
        self.0.refused()
    }
    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }
    fn bad_descriptors(&self) -> u64 {
        self.0.bad_descriptors()
    }
    fn survey(&mut self, survey: &mut Survey) {
        self.0.forget();
        self.0.survey(survey);
    }
    fn stop(&mut self) {
        self.0.stop();
    }
    fn sweep(&mut self) -> u32 {
        self.0.sweep()
    }
}

impl From<E1000eRx<FakeBar<Fake>>> for AnyRx {
    fn from(rx: E1000eRx<FakeBar<Fake>>) -> Self {
        Self::Dyn(Box::new(Reborn(rx)))
    }
}

impl From<E1000eTx<FakeBar<Fake>>> for AnyTx {
    fn from(tx: E1000eTx<FakeBar<Fake>>) -> Self {
        Self::Dyn(Box::new(Reborn(tx)))
    }
}

/// What does not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Defect {
    None,
    /// CTRL.RST stays.
    Reset,
    /// DMA goes on for ever.
    Master,
    /// The NVM is never read after reset.
    AutoRead,
    /// Registers read as anything, from this on.
    Random(u64),
}

/// The device. See the [module](self).
pub(crate) struct Fake {
    pub(crate) registers: Vec<u32>,
    pub(crate) ids: (u16, u16),
    pub(crate) bar_bytes: usize,
    pub(crate) defect: Defect,
    /// First words of the NVM: the Ethernet address.
    pub(crate) nvm: [u16; 3],
    /// The NVM was copied to the address registers.
    pub(crate) loads_address: bool,
    pub(crate) cable: bool,
    pub(crate) phy_control: u16,
    pub(crate) peer: Option<Card>,
    /// Contexts, by queue: start and place of the checksum.
    contexts: [Option<(usize, usize)>; 2],
    /// Packets of which not all pieces have come, by queue.
    pieces: [Vec<u8>; 2],
    /// Does the packet under way want its checksum, by queue.
    sums: [bool; 2],
    /// Descriptors that were no good, and writes that make no sense.
    pub(crate) complaints: Vec<String>,
    /// Contexts that were given.
    pub(crate) context_descriptors: usize,
    /// Writes of tail registers.
    pub(crate) doorbells: usize,
    /// The device reports nothing as sent.
    pub(crate) silent: bool,
    /// What it should have reported meanwhile.
    pub(crate) unreported: usize,
}

impl Fake {
    pub(crate) fn new(last: u8) -> Self {
        let mut fake = Self {
            registers: Vec::new(),
            ids: (VENDOR, DEVICE),
            bar_bytes: 0x2_0000,
            defect: Defect::None,
            nvm: [u16::from_le_bytes([0x02, 0]), 0, u16::from_le_bytes([0, last])],
            loads_address: true,
            cable: true,
            phy_control: PHY_NEGOTIATE,
            peer: None,
            contexts: [None; 2],
            pieces: [Vec::new(), Vec::new()],
            sums: [false; 2],
            complaints: Vec::new(),
            context_descriptors: 0,
            doorbells: 0,
            silent: false,
            unreported: 0,
        };
        fake.reset();
        fake
    }

    pub(crate) fn get(&self, register: usize) -> u32 {
        self.registers[register / 4]
    }

    pub(crate) fn set(&mut self, register: usize, value: u32) {
        self.registers[register / 4] = value;
    }

    fn count(&mut self, register: usize, n: u32) {
        let value = self.get(register);
        self.set(register, value.saturating_add(n));
    }

    fn count_wide(&mut self, register: usize, n: usize) {
        let value = u64::from(self.get(register + 4)) << 32 | u64::from(self.get(register));
        let value = value + n as u64;
        self.set(register, value as u32);
        self.set(register + 4, (value >> 32) as u32);
    }

    fn link_up(&self) -> bool {
        self.cable && self.get(CTRL) & CTRL_SLU != 0 && self.phy_control & (PHY_POWER_DOWN | PHY_ISOLATE) == 0
    }

    fn status(&self) -> u32 {
        let master = self.get(CTRL) & CTRL_MASTER_DISABLE == 0 || self.defect == Defect::Master;
        let link = if self.link_up() { STATUS_LINK_UP } else { 0 };
        link | 1 | 0b10 << STATUS_SPEED_SHIFT | if master { STATUS_MASTER_ENABLED } else { 0 }
    }

    /// Address and length in a descriptor of the first TX ring.
    pub(crate) fn sent_from(&self, bus: &Bus, index: u64) -> (u64, usize) {
        let at = self.ring(tx(0, 0)).0 + index * 16;
        (bus.get64(at), bus.get16(at + 8).into())
    }

    fn complain(&mut self, what: impl Into<String>) {
        self.complaints.push(what.into());
    }

    /// Address of the descriptor at `index`, and the ring's size, of the queue whose registers start at `at`.
    fn ring(&self, at: usize) -> (u64, u32) {
        let base = u64::from(self.get(at + BASE_HIGH)) << 32 | u64::from(self.get(at + BASE_LOW) & !0xf);
        (base, self.get(at + LENGTH) / 16)
    }

    /// Sends what is between head and tail.
    fn transmit(&mut self, bus: &Bus, queue: u16) {
        let at = tx(queue, 0);
        let (base, size) = self.ring(at);
        let tail = self.get(at + TAIL);
        if self.get(TCTL) & TCTL_EN == 0 || size == 0 {
            return;
        }
        if tail >= size {
            self.complain(format!("TX tail {tail} of {size}"));
            return;
        }
        while self.get(at + HEAD) != tail {
            let head = self.get(at + HEAD);
            let descriptor = base + u64::from(head) * 16;
            let mut bytes = [0; 16];
            if !bus.read(descriptor, &mut bytes) {
                self.complain("TX descriptor out of reach");
                return;
            }
            let first = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let word = u64::from_le_bytes(bytes[8..].try_into().unwrap());
            self.transmit_one(bus, queue, first, word);
            if word & TX_RS != 0 && self.silent {
                self.unreported += 1;
            } else if word & TX_RS != 0 {
                let done = (word >> 32) as u32 | 1;
                bus.write(descriptor + 12, &done.to_le_bytes());
            }
            self.set(at + HEAD, (head + 1) % size);
        }
    }

    fn transmit_one(&mut self, bus: &Bus, queue: u16, first: u64, word: u64) {
        let q = usize::from(queue);
        if is_context(word) {
            self.contexts[q] = Some(((first >> 32 & 0xff) as usize, (first >> 40 & 0xff) as usize));
            self.context_descriptors += 1;
            return;
        }
        let data = word & TX_EXTENDED != 0;
        let len = if data { word & 0xf_ffff } else { word & 0xffff } as usize;
        if self.pieces[q].is_empty() {
            self.sums[q] = data && word & TX_TRANSPORT_CHECKSUM != 0;
        }
        let from = self.pieces[q].len();
        self.pieces[q].resize(from + len, 0);
        if len == 0 || !bus.read(first, &mut self.pieces[q][from..]) {
            self.complain(format!("{len} bytes to send at {first:#x}"));
        }
        if word & TX_EOP == 0 {
            return;
        }
        let mut packet = std::mem::take(&mut self.pieces[q]);
        if packet.len() < MIN_PACKET as usize || word & TX_IFCS == 0 {
            self.complain(format!("packet of {} bytes, command {word:#x}", packet.len()));
        }
        if self.sums[q] {
            match self.contexts[q] {
                Some((start, place)) if place + 2 <= packet.len() => {
                    let sum = ones_complement(&packet[start..]);
                    packet[place..place + 2].copy_from_slice(&(!sum).to_be_bytes());
                }
                context => self.complain(format!("a checksum without a place: {context:?}")),
            }
        }
        if packet.len() < 60 && self.get(TCTL) & TCTL_PAD != 0 {
            packet.resize(60, 0);
        }
        self.count(0x4080, 1);
        self.count_wide(0x4090, packet.len() + 4);
        if self.link_up()
            && let Some(peer) = self.peer.clone()
        {
            peer.device(|peer, bus| peer.arrive(bus, &packet));
        }
    }

    fn accepts(&self, packet: &[u8]) -> bool {
        let rctl = self.get(RCTL);
        let to: [u8; 6] = packet[..6].try_into().unwrap();
        let own = self.get(RAH) & RAH_VALID != 0
            && self.get(RAL).to_le_bytes() == to[..4]
            && self.get(RAH).to_le_bytes()[..2] == to[4..];
        if to == [0xff; 6] {
            return rctl & RCTL_BROADCAST != 0;
        }
        if to[0] & 1 == 0 {
            return own || rctl & RCTL_UNICAST_PROMISCUOUS != 0;
        }
        let (high, low) = (u32::from(to[5]), u32::from(to[4]));
        let hash = (high << 8 | low) >> 4;
        let word = self.get(MTA + (hash >> 5) as usize * 4);
        rctl & RCTL_MULTICAST_PROMISCUOUS != 0 || word >> (hash & 31) & 1 != 0
    }

    fn buffer_bytes(&self) -> usize {
        let rctl = self.get(RCTL);
        match (rctl >> RCTL_FLXBUF_SHIFT & 0xf, rctl & RCTL_BSEX != 0, rctl >> RCTL_BSIZE_SHIFT & 3) {
            (flexible @ 1.., ..) => flexible as usize * 1024,
            (0, false, n) => 2048 >> n,
            (0, true, n) => 32_768 >> n,
        }
    }

    /// A packet comes from the wire.
    pub(crate) fn arrive(&mut self, bus: &Bus, packet: &[u8]) {
        if self.get(RCTL) & RCTL_EN == 0 || !self.link_up() || packet.len() < 14 {
            return;
        }
        let limit = if self.get(RCTL) & RCTL_LONG_PACKETS != 0 { 16_384 } else { 1522 };
        if packet.len() + 4 > limit {
            return self.count(0x40ac, 1);
        }
        if !self.accepts(packet) {
            return;
        }
        let extended = self.get(RFCTL) & RFCTL_EXTENDED != 0;
        let hashing = self.get(MRQC) & 0b11 == 0b01 && self.get(RXCSUM) & RXCSUM_HASH != 0 && extended;
        let hash = if hashing { self.hash(packet) } else { 0 };
        let entry = self.get(RETA + (hash as usize & 0x7c)).to_le_bytes()[hash as usize & 3];
        let queue = u16::from(hashing && entry & 0x80 != 0);
        let at = rx(queue, 0);
        let (base, size) = self.ring(at);
        let (head, tail) = (self.get(at + HEAD), self.get(at + TAIL));
        let pieces = packet.chunks(self.buffer_bytes());
        if size == 0 || tail >= size || (tail + size - head) % size < pieces.len() as u32 {
            self.count(0x40a0, 1);
            return self.count(0x4010, 1);
        }
        self.count(0x4074, 1);
        self.count_wide(0x4088, packet.len() + 4);
        let (good, bad) = check(packet);
        let last = pieces.len() - 1;
        for (n, piece) in pieces.enumerate() {
            let index = (head + n as u32) % size;
            let descriptor = base + u64::from(index) * 16;
            let buffer = bus.get64(descriptor);
            if !bus.write(buffer, piece) {
                self.complain(format!("receive buffer {buffer:#x}"));
            }
            let (len, end) = (piece.len() as u64, u64::from(n == last));
            let sums = if n == last { (u64::from(good || bad), u64::from(bad)) } else { (0, 0) };
            let words = if extended {
                let word = 1 | end << 1 | sums.0 << 5 | sums.1 << 29 | len << 32;
                [u64::from(hash) << 32 | u64::from(queue) << 8 | u64::from(hashing), word]
            } else {
                [buffer, len | 1 << 32 | end << 33 | sums.0 << 37 | sums.1 << 45]
            };
            bus.write(descriptor, &words[0].to_le_bytes());
            bus.write(descriptor + 8, &words[1].to_le_bytes());
        }
        self.set(at + HEAD, (head + last as u32 + 1) % size);
    }

    /// The Toeplitz hash, bit by bit, over the fields that the datasheet names for the packet (section 7.1.11).
    pub(crate) fn hash(&self, packet: &[u8]) -> u32 {
        let Some(input) = hash_input(packet) else { return 0 };
        let key: Vec<u8> = (0..10).flat_map(|n| self.get(RSSRK + n * 4).to_le_bytes()).collect();
        let bit = |bytes: &[u8], n: usize| bytes[n / 8] >> (7 - n % 8) & 1;
        let mut hash = 0;
        for n in (0..input.len() * 8).filter(|n| bit(&input, *n) == 1) {
            let window = (n..n + 32).fold(0_u32, |word, n| word << 1 | u32::from(bit(&key, n)));
            hash ^= window;
        }
        hash
    }
}

fn hash_input(packet: &[u8]) -> Option<Vec<u8>> {
    let sliced = SlicedPacket::from_ethernet(packet).ok()?;
    let mut input = Vec::new();
    match sliced.net? {
        NetSlice::Ipv4(ip) => {
            input.extend(ip.header().source());
            input.extend(ip.header().destination());
        }
        NetSlice::Ipv6(ip) => {
            input.extend(ip.header().source());
            input.extend(ip.header().destination());
        }
        NetSlice::Arp(_) => return None,
    }
    if let Some(TransportSlice::Tcp(tcp)) = sliced.transport {
        input.extend(tcp.source_port().to_be_bytes());
        input.extend(tcp.destination_port().to_be_bytes());
    }
    Some(input)
}

fn ones_complement(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Is the transport checksum right, or wrong? Neither when there is none to look at.
fn check(packet: &[u8]) -> (bool, bool) {
    let Ok(sliced) = SlicedPacket::from_ethernet(packet) else { return (false, false) };
    let Some(NetSlice::Ipv4(ip)) = &sliced.net else { return (false, false) };
    let header = ip.header().to_header();
    let right = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            tcp.to_header().calc_checksum_ipv4(&header, tcp.payload()).ok() == Some(tcp.checksum())
        }
        Some(TransportSlice::Udp(udp)) => {
            udp.to_header().calc_checksum_ipv4(&header, udp.payload()).ok() == Some(udp.checksum())
        }
        _ => return (false, false),
    };
    (right, !right)
}

impl Device for Fake {
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 256];
        config[..2].copy_from_slice(&self.ids.0.to_le_bytes());
        config[2..4].copy_from_slice(&self.ids.1.to_le_bytes());
        config
    }

    fn bar_bytes(&self, bar: u8) -> usize {
        if bar == BAR { self.bar_bytes } else { 0 }
    }

    fn read(&mut self, _bus: &Bus, _bar: u8, offset: usize, bytes: usize) -> u32 {
        if bytes != 4 {
            self.complain(format!("read of {bytes} bytes at {offset:#x}"));
            return u32::MAX;
        }
        if let Defect::Random(state) = &mut self.defect {
            *state = split_mix(*state);
            return (*state >> 20) as u32;
        }
        match offset {
            STATUS => self.status(),
            // Statistics are cleared by reading; of 64-bit ones both halves by the high one.
            0x4088 | 0x4090 => self.get(offset),
            0x408c | 0x4094 => {
                self.set(offset - 4, 0);
                std::mem::take(&mut self.registers[offset / 4])
            }
            0x4000..0x4200 => std::mem::take(&mut self.registers[offset / 4]),
            _ => self.get(offset),
        }
    }

    fn write(&mut self, bus: &Bus, _bar: u8, offset: usize, bytes: usize, value: u32) {
        if bytes != 4 {
            return self.complain(format!("write of {bytes} bytes at {offset:#x}"));
        }
        match offset {
            CTRL if value & CTRL_RST != 0 && self.defect == Defect::Reset => self.set(CTRL, value),
            CTRL if value & CTRL_RST != 0 => self.reset(),
            EERD if value & EERD_START != 0 => {
                let word = self.nvm.get((value >> EERD_ADDRESS_SHIFT) as usize & 0x3fff).copied();
                self.set(EERD, u32::from(word.unwrap_or(0xffff)) << EERD_DATA_SHIFT | EERD_DONE);
            }
            MDIC => {
                let (register, phy) = (value >> 16 & 0x1f, value >> 21 & 0x1f);
                if (register, phy) != (0, 1) {
                    return self.set(MDIC, value | MDIC_READY | MDIC_ERROR);
                }
                if value & MDIC_WRITE != 0 {
                    self.phy_control = value as u16;
                }
                self.set(MDIC, value & !0xffff | u32::from(self.phy_control) | MDIC_READY);
            }
            _ => self.set(offset, value),
        }
        for queue in 0..2 {
            if offset == tx(queue, TAIL) {
                self.doorbells += 1;
                self.transmit(bus, queue);
            }
            if offset == rx(queue, TAIL) {
                self.doorbells += 1;
                let size = self.ring(rx(queue, 0)).1;
                if value >= size {
                    self.complain(format!("RX tail {value} of {size}"));
                }
            }
        }
    }

    fn reset(&mut self) {
        self.registers = vec![0; 0x2_0000 / 4];
        self.set(EECD, if self.defect == Defect::AutoRead { 0 } else { EECD_AUTO_READ_DONE });
        self.set(CTRL, CTRL_FULL_DUPLEX);
        if self.loads_address {
            let [a, b, c] = self.nvm.map(u32::from);
            self.set(RAL, a | b << 16);
            self.set(RAH, c | RAH_VALID);
        }
        (self.contexts, self.pieces, self.sums) = ([None; 2], [Vec::new(), Vec::new()], [false; 2]);
    }
}
