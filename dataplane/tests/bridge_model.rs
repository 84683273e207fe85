//! The bridge against a reference that shares nothing with it: hash maps, whole packets, one at a time.
//! Random ports, VLANs, packets, link changes and time; every packet out and every drop must agree.

mod common;

use common::{Bench, Frames, Size, mac};
use isoplane::app::PortId;
use isoplane::blocks::bridge::{
    Bridge, BridgeConfig, BridgePort, FloodLimits, PortVlans, StaticStation, VlanSet,
};
use isoplane::wire::{MacAddress, VlanId};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

const PORTS: usize = 4;
const AGEING_MS: u64 = 10_000;
const RATE: u64 = 100;
const BURST: u64 = 20;
const PER_TURN: u64 = 12;

#[derive(Debug, Clone)]
struct Port {
    /// VLANs that come in and go out tagged.
    tagged: Vec<u16>,
    /// The VLAN of untagged frames.
    untagged: Option<u16>,
    trunk: bool,
    isolated: bool,
    learn: bool,
}

#[derive(Debug, Clone)]
struct Packet {
    port: usize,
    to: [u8; 6],
    from: [u8; 6],
    tci: Option<u16>,
    /// Rest of the first frame, and further frames.
    rest: Vec<u8>,
    more: Vec<Vec<u8>>,
    /// Cuts the first frame off.
    cut: Option<usize>,
}

impl Packet {
    fn frames(&self) -> Frames {
        let mut first = encode(self.to, self.from, self.tci, &self.rest);
        first.truncate(self.cut.unwrap_or(usize::MAX));
        [vec![first], self.more.clone()].concat()
    }
}

fn encode(to: [u8; 6], from: [u8; 6], tci: Option<u16>, rest: &[u8]) -> Vec<u8> {
    let tag = tci.map_or(vec![], |tci| vec![0x81, 0, (tci >> 8) as u8, tci as u8]);
    [&to[..], &from, &tag, rest].concat()
}

#[derive(Debug, Clone)]
struct Step {
    wait_ms: u64,
    flush: Option<usize>,
    link: Option<(usize, bool)>,
    packets: Vec<Packet>,
}

struct Reference {
    ports: Vec<Port>,
    vlans: bool,
    own: [u8; 6],
    fixed: HashMap<(u16, [u8; 6]), usize>,
    seen: HashMap<(u16, [u8; 6]), (usize, u64)>,
    down: Vec<bool>,
    /// Copies a port may cause, times a thousand; when that was so.
    tokens: Vec<(u64, u64)>,
    turn_copies: u64,
    drops: BTreeMap<String, u64>,
}

impl Reference {
    fn member(&self, port: usize, vid: u16) -> bool {
        let port = &self.ports[port];
        !self.vlans || port.untagged == Some(vid) || port.tagged.contains(&vid)
    }

    fn drop(&mut self, why: &str, frames: &Frames) {
        *self.drops.entry(format!("drop_{why}")).or_default() += frames.len() as u64;
    }

    fn packet(&mut self, from: usize, frames: &Frames, now_ms: u64) -> Vec<(usize, Frames)> {
        match self.decide(from, frames, now_ms) {
            Ok(out) => out,
            Err(why) => {
                self.drop(why, frames);
                vec![]
            }
        }
    }

    fn decide(
        &mut self,
        from: usize,
        frames: &Frames,
        now_ms: u64,
    ) -> Result<Vec<(usize, Frames)>, &'static str> {
        let first = &frames[0];
        if first.len() < 14 {
            return Err("malformed");
        }
        let to: [u8; 6] = first[..6].try_into().unwrap();
        let source: [u8; 6] = first[6..12].try_into().unwrap();
        let mut tci = None;
        let mut rest = &first[12..];
        if self.vlans && rest[..2] == [0x81, 0] {
            if rest.len() < 6 {
                return Err("malformed");
            }
            tci = Some(u16::from_be_bytes([rest[2], rest[3]]));
            rest = &rest[4..];
        }
        let vid = match tci.map(|tci| tci % 4096) {
            _ if !self.vlans => 0,
            None | Some(0) => self.ports[from].untagged.ok_or("vlan")?,
            Some(vid) if self.ports[from].trunk && self.member(from, vid) => vid,
            Some(_) => return Err("vlan"),
        };
        let group = |mac: [u8; 6]| mac[0] % 2 == 1;
        let reserved = to[..5] == [1, 0x80, 0xc2, 0, 0] && to[5] < 16;
        if group(source) || source == [0; 6] || source == self.own || to == self.own || reserved {
            // A packet to us teaches where its sender is; the others teach nothing.
            if to == self.own && !(group(source) || source == [0; 6] || source == self.own) {
                self.learn(from, vid, source, now_ms);
            }
            return Err("policy");
        }
        self.learn(from, vid, source, now_ms);
        let known = self.fixed.get(&(vid, to)).copied().or_else(|| {
            let (port, at) = self.seen.get(&(vid, to))?;
            (now_ms - at <= AGEING_MS).then_some(*port)
        });
        let reaches =
            |this: &Self, to: usize| to != from && !(this.ports[from].isolated && this.ports[to].isolated);
        let send = |this: &Self, port: usize| {
            let leaves_tagged = this.vlans && this.ports[port].untagged != Some(vid);
            let tci = leaves_tagged.then(|| tci.unwrap_or(0) & 0xf000 | vid);
            let mut out = frames.clone();
            out[0] = encode(to, source, tci, rest);
            (port, out)
        };
        if let Some(port) = known.filter(|_| !group(to)) {
            return match () {
                () if !reaches(self, port) => Err("policy"),
                () if !self.member(port, vid) => Err("vlan"),
                () if self.down[port] => Err("no_port"),
                () => Ok(vec![send(self, port)]),
            };
        }
        let to: Vec<usize> =
            (0..PORTS).filter(|p| reaches(self, *p) && self.member(*p, vid) && !self.down[*p]).collect();
        if to.is_empty() {
            return Err("policy");
        }
        let copies = ((to.len() - 1) * frames.len()) as u64;
        if copies > 0 {
            if self.turn_copies + copies > PER_TURN {
                return Err("storm");
            }
            let (tokens, at) = self.tokens[from];
            let tokens = (tokens + (now_ms - at) * RATE).min(BURST * 1000);
            self.tokens[from] = (tokens, now_ms);
            if tokens < copies * 1000 {
                return Err("storm");
            }
            self.tokens[from].0 -= copies * 1000;
            self.turn_copies += copies;
        }
        Ok(to.into_iter().map(|port| send(self, port)).collect())
    }

    fn learn(&mut self, port: usize, vid: u16, source: [u8; 6], now_ms: u64) {
        if self.ports[port].learn && !self.down[port] && !self.fixed.contains_key(&(vid, source)) {
            self.seen.insert((vid, source), (port, now_ms));
        }
    }

    fn flush(&mut self, port: usize) {
        self.seen.retain(|_, (at, _)| *at != port);
    }
}

fn port() -> impl Strategy<Value = Port> {
    let vid = prop::sample::select(vec![1_u16, 10, 20, 4094]);
    let trunk = prop::collection::vec(vid.clone(), 0..4).prop_flat_map(|tagged| {
        let native = prop::sample::select([vec![None], tagged.iter().copied().map(Some).collect()].concat());
        (Just(tagged), native)
    });
    let access = vid.prop_map(|vid| (vec![], Some(vid)));
    let kind = prop_oneof![access.prop_map(|(t, u)| (false, t, u)), trunk.prop_map(|(t, u)| (true, t, u))];
    (kind, prop::bool::weighted(0.2), prop::bool::weighted(0.9)).prop_map(
        |((trunk, tagged, untagged), isolated, learn)| Port { tagged, untagged, trunk, isolated, learn },
    )
}

fn packet() -> impl Strategy<Value = Packet> {
    let station = || (1..6_u8).prop_map(mac);
    let odd = || {
        prop::sample::select(vec![
            [0xff; 6],
            [1, 0, 0x5e, 0, 0, 1],
            [1, 0x80, 0xc2, 0, 0, 0],
            [1, 0x80, 0xc2, 0, 0, 0x0f],
            [1, 0x80, 0xc2, 0, 0, 0x10],
            [0; 6],
            mac(77),
            mac(88),
        ])
    };
    let address = move || prop_oneof![5 => station(), 2 => odd()];
    let vid = prop::sample::select(vec![0_u16, 1, 10, 20, 30, 4094, 4095]);
    let tci = prop::option::of((vid, 0..16_u16).prop_map(|(vid, top)| top << 12 | vid));
    let rest = prop_oneof![
        Just(vec![0x88, 0xb5, 1, 2, 3, 4]),
        Just(vec![0x88, 0xa8, 0, 10, 0x81, 0, 0, 20, 8, 0]),
        Just(vec![0x81, 0, 0, 20, 8, 0, 9]),
        prop::collection::vec(any::<u8>(), 2..40),
    ];
    let more = prop_oneof![
        4 => Just(vec![]),
        1 => prop::collection::vec(prop::collection::vec(any::<u8>(), 0..30), 1..4),
    ];
    let cut = prop_oneof![9 => Just(None), 1 => (0..20_usize).prop_map(Some)];
    (0..PORTS, address(), prop_oneof![8 => station(), 1 => odd()], tci, rest, more, cut)
        .prop_map(|(port, to, from, tci, rest, more, cut)| Packet { port, to, from, tci, rest, more, cut })
}

fn step() -> impl Strategy<Value = Step> {
    let wait = prop_oneof![4 => 0..5_u64, 3 => 0..500_u64, 1 => 9_000..11_000_u64];
    let flush = prop::option::weighted(0.05, 0..PORTS);
    let link = prop::option::weighted(0.1, (0..PORTS, prop::bool::weighted(0.6)));
    // Runs of the same packet, as real traffic has them.
    let run = (packet(), 1..4_usize).prop_map(|(packet, n)| vec![packet; n]);
    let packets = prop::collection::vec(run, 0..12).prop_map(|runs| runs.concat());
    (wait, flush, link, packets).prop_map(|(wait_ms, flush, link, packets)| Step {
        wait_ms,
        flush,
        link,
        packets,
    })
}

fn agree(ports: &[Port], vlans: bool, steps: &[Step]) {
    let vlan = |vid| VlanId::new(vid).unwrap();
    let fixed: Vec<StaticStation> = (0..PORTS)
        .filter(|_| !vlans)
        .take(1)
        .map(|port| StaticStation { mac: MacAddress(mac(88)), vlan: None, port: PortId(port as u8) })
        .collect();
    let config = BridgeConfig {
        ports: ports
            .iter()
            .map(|p| BridgePort { isolated: p.isolated, learn: p.learn, ..BridgePort::default() })
            .collect(),
        vlans: vlans.then(|| {
            let of = |p: &Port| match p.untagged {
                Some(vid) if !p.trunk => PortVlans::Access(vlan(vid)),
                native => PortVlans::Trunk {
                    allowed: VlanSet::from_iter(p.tagged.iter().map(|v| vlan(*v))),
                    native: native.map(vlan),
                },
            };
            ports.iter().map(of).collect()
        }),
        ageing: Duration::from_millis(AGEING_MS),
        capacity: 1024,
        seed: Some(1),
        flood: FloodLimits {
            copies_per_second: RATE as u32,
            burst: BURST as u32,
            copies_per_turn: PER_TURN as u32,
            reserve: 64,
        },
        own: vec![MacAddress(mac(77))],
        stations: fixed.clone(),
        ..BridgeConfig::new(PORTS)
    };
    let size = Size { frames: 2048, ..Size::ports(PORTS) };
    let mut bench = Bench::new(&size, &Bridge::FIELDS, Bridge::new(&config).unwrap());
    let mut reference = Reference {
        ports: ports.to_vec(),
        vlans,
        own: mac(77),
        fixed: fixed.iter().map(|s| ((0, s.mac.0), s.port.index())).collect(),
        seen: HashMap::new(),
        down: vec![false; PORTS],
        tokens: vec![(BURST * 1000, 0); PORTS],
        turn_copies: 0,
        drops: BTreeMap::new(),
    };
    for (index, step) in steps.iter().enumerate() {
        bench.now += step.wait_ms * 1_000_000;
        let now_ms = bench.now / 1_000_000;
        if let Some(port) = step.flush {
            bench.app.flush_port(PortId(port as u8));
            reference.flush(port);
        }
        if let Some((port, up)) = step.link {
            bench.app.set_link(PortId(port as u8), up);
            reference.down[port] = !up;
            if !up {
                reference.flush(port);
            }
        }
        step.packets.iter().for_each(|p| bench.put_frames(p.port, p.frames()));
        reference.turn_copies = 0;
        let mut expected: Vec<Vec<Frames>> = vec![vec![]; PORTS];
        // A turn takes the ports in order; a step's packets for one port fit one batch, or not: then
        // the turn after it starts with a fresh allowance.
        let mut left: Vec<Vec<Frames>> = (0..PORTS)
            .map(|port| step.packets.iter().filter(|p| p.port == port).map(Packet::frames).collect())
            .collect();
        while left.iter().any(|l| !l.is_empty()) {
            for (port, left) in left.iter_mut().enumerate() {
                let mut room = 64;
                while left.first().is_some_and(|p| p.len() <= room) {
                    let packet = left.remove(0);
                    room -= packet.len();
                    for (to, frames) in reference.packet(port, &packet, now_ms) {
                        expected[to].push(frames);
                    }
                }
            }
            reference.turn_copies = 0;
        }
        bench.run();
        assert_eq!(bench.take(), expected, "step {index}: {step:?}");
        assert_eq!(bench.drops(), reference.drops, "step {index}: {step:?}");
        let mut ours: Vec<_> = bench
            .app
            .fdb()
            .iter(bench.now)
            .filter_map(|s| s.age.map(|age| (s.vlan.map_or(0, VlanId::get), s.mac.0, s.port.index(), age)))
            .collect();
        ours.sort();
        let mut theirs: Vec<_> = reference
            .seen
            .iter()
            .filter(|(_, (_, at))| now_ms - at <= AGEING_MS)
            .map(|((vid, mac), (port, at))| (*vid, *mac, *port, Duration::from_millis(now_ms - at)))
            .collect();
        theirs.sort();
        assert_eq!(ours, theirs, "step {index}: {step:?}");
    }
    bench.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_reference(
        ports in prop::collection::vec(port(), PORTS),
        vlans in any::<bool>(),
        steps in prop::collection::vec(step(), 1..25),
    ) {
        agree(&ports, vlans, &steps);
    }
}
