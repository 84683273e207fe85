//! Steering: which packets the XDP program takes. The kernel runs it on packets that etherparse made
//! (`BPF_PROG_TEST_RUN`), and its verdicts are compared with a table and with an oracle that reads the
//! same bytes in another way; then real traffic shows that the rest goes to the network stack.

mod afxdp;

use afxdp::{OURS, PATIENCE, THEIRS, Wires, Worker, config, pool};
use etherparse::{PacketBuilder, PacketBuilderStep, VlanId};
use isoplane_drivers::xdp::{Prefix, Rule, Steering, XdpError, XdpPort};
use isoplane_lab::PacketSocket;
use isoplane_memory::Pool;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

struct Lab {
    wires: Wires,
    pool: Arc<Pool>,
}

impl Lab {
    fn new() -> Self {
        let wires = Wires::new();
        wires.pair(1500, 1);
        Self { wires, pool: pool(512) }
    }

    fn open(&self, steering: Steering) -> XdpPort {
        self.wires.open(&self.pool, config("x0").steering(steering)).expect("a port")
    }

    fn verdicts(&self, steering: Steering, packets: &[Vec<u8>]) -> Vec<bool> {
        let port = self.open(steering);
        packets.iter().map(|p| port.would_take(p).expect("a verdict")).collect()
    }
}

fn ethernet() -> PacketBuilderStep<etherparse::Ethernet2Header> {
    PacketBuilder::ethernet2(THEIRS, OURS)
}

fn built<T>(write: impl FnOnce(&mut Vec<u8>) -> Result<(), T>) -> Vec<u8>
where
    T: std::fmt::Debug,
{
    let mut bytes = Vec::new();
    write(&mut bytes).expect("a packet");
    bytes
}

fn udp4(from: [u8; 4], to: [u8; 4], source: u16, destination: u16) -> Vec<u8> {
    built(|b| ethernet().ipv4(from, to, 64).udp(source, destination).write(b, &[7; 18]))
}

fn udp6(from: Ipv6Addr, to: Ipv6Addr, source: u16, destination: u16) -> Vec<u8> {
    built(|b| ethernet().ipv6(from.octets(), to.octets(), 64).udp(source, destination).write(b, &[7; 18]))
}

fn arp() -> Vec<u8> {
    let mut bytes = [OURS, THEIRS].concat();
    bytes.extend_from_slice(&[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    bytes.resize(60, 0);
    bytes
}

/// Puts a tag of that type behind the addresses.
fn tag(mut bytes: Vec<u8>, tpid: u16, id: u16) -> Vec<u8> {
    let id = VlanId::try_new(id).expect("a VLAN").value();
    bytes.splice(12..12, [tpid.to_be_bytes(), id.to_be_bytes()].concat());
    bytes
}

const V4A: [u8; 4] = [10, 1, 2, 3];
const V4B: [u8; 4] = [10, 1, 3, 4];

fn v6(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0x1234, 0x5678, 0, 0, 0, last)
}

/// Named packets.
fn zoo() -> Vec<(&'static str, Vec<u8>)> {
    let tcp4 = built(|b| ethernet().ipv4(V4A, V4B, 64).tcp(80, 443, 1, 2).write(b, &[7; 10]));
    let tcp6 =
        built(|b| ethernet().ipv6(v6(1).octets(), v6(2).octets(), 64).tcp(80, 443, 1, 2).write(b, &[]));
    let ping = built(|b| ethernet().ipv4(V4A, V4B, 64).icmpv4_echo_request(1, 2).write(b, &[1; 20]));
    let mut options = udp4(V4A, V4B, 1000, 53);
    options[14] = 0x47;
    options.splice(34..34, [1; 8]);
    let mut fragment = udp4(V4A, V4B, 1000, 53);
    fragment[21] = 0x10;
    let mut first = udp4(V4A, V4B, 1000, 53);
    first[20] = 0x20;
    vec![
        ("arp", arp()),
        ("udp4", udp4(V4A, V4B, 1000, 53)),
        ("udp4 back", udp4(V4B, V4A, 53, 1000)),
        ("tcp4", tcp4),
        ("ping", ping),
        ("udp6", udp6(v6(1), v6(2), 1000, 53)),
        ("tcp6", tcp6),
        ("options", options),
        ("fragment", fragment),
        ("first fragment", first),
        ("vlan udp4", tag(udp4(V4A, V4B, 1000, 53), 0x8100, 7)),
        ("qinq udp6", tag(tag(udp6(v6(1), v6(2), 1000, 53), 0x8100, 7), 0x88a8, 8)),
        ("three tags", tag(tag(tag(udp4(V4A, V4B, 1000, 53), 0x8100, 7), 0x8100, 8), 0x8100, 9)),
    ]
}

fn taken(lab: &Lab, steering: Steering) -> Vec<&'static str> {
    let zoo = zoo();
    let packets: Vec<Vec<u8>> = zoo.iter().map(|(_, p)| p.clone()).collect();
    let verdicts = lab.verdicts(steering, &packets);
    zoo.iter().zip(verdicts).filter(|(_, v)| *v).map(|((name, _), _)| *name).collect()
}

#[test]
fn each_kind_of_rule_takes_what_it_names() {
    let lab = Lab::new();
    let all: Vec<&str> = zoo().iter().map(|(name, _)| *name).collect();
    assert_eq!(taken(&lab, Steering::Everything), all);
    let v4 = |octets: [u8; 4]| IpAddr::V4(Ipv4Addr::from(octets));
    let dns4 = ["udp4", "options", "first fragment", "vlan udp4"];
    let table: [(Rule, &[&str]); 14] = [
        (Rule::ether_type(0x0806), &["arp"]),
        (Rule::ether_type(0x86dd), &["udp6", "tcp6", "qinq udp6"]),
        (Rule::ether_type(0x8100), &["vlan udp4", "three tags"]),
        (Rule::ether_type(0x88a8), &["qinq udp6"]),
        (Rule::protocol(6), &["tcp4", "tcp6"]),
        (Rule::protocol(1), &["ping"]),
        (Rule::tcp_port(443), &["tcp4", "tcp6"]),
        (Rule::udp_port(53), &["udp4", "udp6", "options", "first fragment", "vlan udp4", "qinq udp6"]),
        (Rule { source_port: Some(53), ..Rule::default() }, &["udp4 back"]),
        (
            Rule::to(v4([10, 1, 3, 0]), 24),
            &["udp4", "tcp4", "ping", "options", "fragment", "first fragment", "vlan udp4"],
        ),
        (Rule::from(v4(V4B), 32), &["udp4 back"]),
        (Rule::to(IpAddr::V6(v6(0)), 64), &["udp6", "tcp6", "qinq udp6"]),
        (Rule::to(IpAddr::V6(v6(1)), 128), &[]),
        (Rule { source: Some(Prefix { address: v4([0; 4]), length: 0 }), ..Rule::udp_port(53) }, &dns4),
    ];
    for (rule, expected) in table {
        assert_eq!(taken(&lab, Steering::Matching(vec![rule])), expected, "{rule:?}");
        let rest: Vec<&str> = all.iter().copied().filter(|name| !expected.contains(name)).collect();
        assert_eq!(taken(&lab, Steering::Excluding(vec![rule])), rest, "not {rule:?}");
    }
    let both = vec![Rule::ether_type(0x0806), Rule::protocol(1)];
    assert_eq!(taken(&lab, Steering::Matching(both)), ["arp", "ping"]);
    assert_eq!(taken(&lab, Steering::Matching(vec![])), [""; 0]);
    assert_eq!(taken(&lab, Steering::Excluding(vec![])), all);
}

/// What a rule says, read straight from the bytes.
fn oracle(rule: &Rule, packet: &[u8]) -> bool {
    let be16 = |at: usize| packet.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let Some(outer) = be16(12) else { return false };
    let (mut inner, mut l3) = (Some(outer), 14);
    for _ in 0..2 {
        if inner.is_some_and(|t| t == 0x8100 || t == 0x88a8) {
            if packet.len() < l3 + 4 {
                break;
            }
            inner = be16(l3 + 2);
            l3 += 4;
        }
    }
    let (mut version, mut protocol, mut ports, mut addresses) = (0, None, None, None::<(&[u8], &[u8])>);
    let has_ports = |protocol: u8| matches!(protocol, 6 | 17 | 132);
    let pair = |at: usize| Some((be16(at)?, be16(at + 2)?));
    match inner {
        Some(0x0800) if packet.len() >= l3 + 20 && packet[l3] >> 4 == 4 => {
            version = 4;
            protocol = Some(packet[l3 + 9]);
            let words = usize::from(packet[l3] & 15);
            let first = u16::from_be_bytes([packet[l3 + 6], packet[l3 + 7]]) & 0x1fff == 0;
            if first && words >= 5 && has_ports(packet[l3 + 9]) {
                ports = pair(l3 + words * 4);
            }
            addresses = Some((&packet[l3 + 12..l3 + 16], &packet[l3 + 16..l3 + 20]));
        }
        Some(0x86dd) if packet.len() >= l3 + 40 => {
            version = 6;
            protocol = Some(packet[l3 + 6]);
            if has_ports(packet[l3 + 6]) {
                ports = pair(l3 + 40);
            }
            addresses = Some((&packet[l3 + 8..l3 + 24], &packet[l3 + 24..l3 + 40]));
        }
        _ => {}
    }
    let inside = |prefix: Option<Prefix>, address: Option<&[u8]>| {
        prefix.is_none_or(|prefix| {
            let octets = match prefix.address {
                IpAddr::V4(a) if version == 4 => a.octets().to_vec(),
                IpAddr::V6(a) if version == 6 => a.octets().to_vec(),
                _ => return false,
            };
            let Some(address) = address else { return false };
            (0..usize::from(prefix.length)).all(|bit| {
                let get = |bytes: &[u8]| bytes[bit / 8] >> (7 - bit % 8) & 1;
                get(&octets) == get(address)
            })
        })
    };
    let is_ip = matches!(inner, Some(0x0800 | 0x86dd));
    rule.ether_type.is_none_or(|t| t == outer || Some(t) == inner)
        && !(rule.not_ip && is_ip)
        && rule.protocol.is_none_or(|p| protocol == Some(p))
        && rule.source_port.is_none_or(|p| ports.is_some_and(|(source, _)| source == p))
        && rule.destination_port.is_none_or(|p| ports.is_some_and(|(_, destination)| destination == p))
        && inside(rule.source, addresses.map(|(source, _)| source))
        && inside(rule.destination, addresses.map(|(_, destination)| destination))
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()].clone()
    }

    fn rule(&mut self) -> Rule {
        let mut rule = Rule::default();
        while rule == Rule::default() {
            let any = |r: &mut Self| r.next().is_multiple_of(4);
            if any(self) {
                rule.ether_type = Some(self.pick(&[0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8]));
            }
            if any(self) {
                rule.protocol = Some(self.pick(&[1, 6, 17, 58, 132]));
            }
            if any(self) {
                rule.source_port = Some(self.pick(&[53, 80, 1000]));
            }
            if any(self) {
                rule.destination_port = Some(self.pick(&[53, 443, 1000]));
            }
            if rule.protocol.or(rule.source_port.map(|_| 0)).or(rule.destination_port.map(|_| 0)).is_none()
                && !matches!(rule.ether_type, Some(0x0800 | 0x86dd))
                && any(self)
            {
                rule.not_ip = true;
                continue;
            }
            let six = self.next().is_multiple_of(2);
            for prefix in [&mut rule.source, &mut rule.destination] {
                if any(self) {
                    let length = self.next() as u8 % if six { 129 } else { 33 };
                    let (v4, v6) = (self.pick(&[V4A, V4B]), v6(self.pick(&[1, 2])));
                    let address = if six { IpAddr::from(v6) } else { IpAddr::from(v4) };
                    *prefix = Some(Prefix { address, length });
                }
            }
            let version =
                rule.source.or(rule.destination).map(|p| if p.address.is_ipv4() { 0x0800 } else { 0x86dd });
            if version.is_some() && rule.ether_type.is_some_and(|t| t < 0x8100 || t == 0x86dd) {
                // Another EtherType than the prefix's is refused.
                rule.ether_type = version;
            }
        }
        rule
    }
}

/// Random rules on packets whole, cut and damaged: the program decides as the oracle does.
#[test]
fn the_program_agrees_with_an_oracle() {
    let lab = Lab::new();
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut packets: Vec<Vec<u8>> = zoo().into_iter().map(|(_, packet)| packet).collect();
    for _ in 0..200 {
        let mut packet = random.pick(&packets[..13]);
        for _ in 0..random.next() % 4 {
            let at = 12 + random.next() as usize % (packet.len() - 12);
            packet[at] = random.next() as u8;
        }
        let len = 14 + random.next() as usize % (packet.len() - 13);
        packet.truncate(len);
        packets.push(packet);
    }
    for round in 0..60 {
        let rules: Vec<Rule> = (0..1 + random.next() % 6).map(|_| random.rule()).collect();
        let exclude = round % 2 == 1;
        let steering =
            if exclude { Steering::Excluding(rules.clone()) } else { Steering::Matching(rules.clone()) };
        let verdicts = lab.verdicts(steering, &packets);
        for (packet, verdict) in packets.iter().zip(verdicts) {
            let expected = rules.iter().any(|rule| oracle(rule, packet)) != exclude;
            assert_eq!(verdict, expected, "exclude {exclude}, {rules:?} on {packet:02x?}");
        }
    }
}

#[test]
fn the_longest_list_of_rules_loads_and_one_more_is_refused() {
    let lab = Lab::new();
    let address = |i: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, i, 0, 0, 0, 0, 1));
    let full = Rule {
        not_ip: false,
        ether_type: Some(0x86dd),
        protocol: Some(17),
        source_port: Some(1),
        destination_port: Some(2),
        source: Some(Prefix { address: address(0), length: 127 }),
        destination: None,
    };
    let mut rules: Vec<Rule> = (0..256)
        .map(|i| Rule { destination: Some(Prefix { address: address(i), length: 127 }), ..full })
        .collect();
    let last = Ipv6Addr::new(0x2001, 0xdb8, 255, 0, 0, 0, 0, 0);
    let packets = [
        udp6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), last, 1, 2),
        udp6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2), last, 1, 2),
    ];
    assert_eq!(lab.verdicts(Steering::Matching(rules.clone()), &packets), [true, false]);
    rules.push(full);
    let refused = lab.wires.open(&lab.pool, config("x0").steering(Steering::Matching(rules)));
    assert!(matches!(refused, Err(XdpError::TooManyRules { rules: 257, .. })), "{refused:?}");
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let lab = Lab::new();
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let mixed = Rule { source: Some(Prefix { address: IpAddr::V6(v6(1)), length: 1 }), ..Rule::to(v4, 8) };
    let wrong = Rule { ether_type: Some(0x86dd), ..Rule::to(v4, 8) };
    let never = Rule { not_ip: true, ..Rule::protocol(1) };
    for rule in [Rule::default(), Rule::to(v4, 33), mixed, wrong, never] {
        let steering = Steering::Matching(vec![Rule::protocol(1), rule]);
        let refused = lab.wires.open(&lab.pool, config("x0").steering(steering));
        assert!(matches!(refused, Err(XdpError::Rule { rule: 1, .. })), "{refused:?}");
    }
}

/// What is not taken goes to the network stack, what is taken does not.
#[test]
fn the_rest_goes_to_the_kernel() {
    let wires = Wires::new();
    let (x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let steering = Steering::Matching(vec![Rule::udp_port(53)]);
    let mut port = wires.open(&pool, config("x0").steering(steering)).expect("a port");
    let mut worker = Worker::new(&mut port, 0, 128);
    let mut stack = PacketSocket::open(&x).expect("a packet socket");
    let peer = PacketSocket::open(&y).expect("a packet socket");
    let mut ours = Vec::new();
    let mut kernels = Vec::new();
    for i in 0..30 {
        let one = udp4(V4A, V4B, i, if i % 3 == 0 { 53 } else { 54 });
        peer.send(&one).expect("sent");
        if i % 3 == 0 { ours.push(one) } else { kernels.push(one) }
    }
    let is_ours = |p: &[u8]| p.get(26..34) == Some(&[V4A, V4B].concat()[..]);
    let mut got = Vec::new();
    let deadline = std::time::Instant::now() + PATIENCE;
    while got.len() < ours.len() {
        assert!(std::time::Instant::now() < deadline, "{} of {} arrived", got.len(), ours.len());
        got.extend(worker.poll());
    }
    assert_eq!(got, ours);
    for expected in kernels {
        let seen = stack.receive_matching(PATIENCE, is_ours).expect("a packet socket");
        assert_eq!(seen, Some(expected));
    }
    worker.close();
}

/// What is steered changes while packets come: each goes one way or the other, none is lost or seen twice.
#[test]
fn steering_changes_between_two_packets() {
    let wires = Wires::new();
    let (x, y) = wires.pair(1500, 1);
    let pool = pool(512);
    let mut port = wires.open(&pool, config("x0")).expect("a port");
    let first = port.program_id().expect("a program");
    let steering = port.steering();
    let own = IpAddr::from(V4B);
    let away = Steering::Excluding(vec![Rule::not_ip(), Rule::to(own, 32)]);
    steering.set(&away).expect("other rules");
    assert_ne!(port.program_id().expect("a program"), first);
    assert_eq!(x.status().expect("the link").xdp_program, port.program_id().ok());
    assert!(!port.would_take(&udp4(V4A, V4B, 1, 53)).expect("a verdict"));
    assert!(!port.would_take(&arp()).expect("a verdict"));
    assert!(!port.would_take(&tag(arp(), 0x8100, 7)).expect("a verdict"));
    assert!(port.would_take(&udp4(V4B, V4A, 1, 53)).expect("a verdict"));
    assert!(port.would_take(&tag(udp6(v6(1), v6(2), 1, 53), 0x8100, 7)).expect("a verdict"));

    // The handle is another thread's.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let mut worker = Worker::new(&mut port, 0, 128);
    let mut stack = PacketSocket::open(&x).expect("a packet socket");
    let peer = PacketSocket::open(&y).expect("a packet socket");
    let (mut taken, mut passed) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let (stop, steering, away) = (&stop, steering.clone(), &away);
        scope.spawn(move || {
            let mut everything = false;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                everything = !everything;
                steering.set(if everything { &Steering::Everything } else { away }).expect("other rules");
            }
        });
        let is_ours = |p: &[u8]| p.get(26..34) == Some(&[V4A, V4B].concat()[..]);
        for i in 0..3000 {
            let packet = udp4(V4A, V4B, i, 53);
            peer.send(&packet).expect("sent");
            // Veth hands over in the background; wherever it comes out, it does so once.
            let deadline = std::time::Instant::now() + PATIENCE;
            loop {
                assert!(std::time::Instant::now() < deadline, "packet {i} is lost");
                let got = worker.poll();
                if !got.is_empty() {
                    assert_eq!(got, [packet]);
                    taken.push(i);
                    break;
                }
                if let Some(seen) = stack.receive_matching(Default::default(), is_ours).expect("a socket") {
                    assert_eq!(seen, packet);
                    passed.push(i);
                    break;
                }
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(taken.len() > 100 && passed.len() > 100, "{} taken, {} passed", taken.len(), passed.len());
    // Refused rules leave those that are.
    let now = port.program_id().expect("a program");
    let refused = steering.set(&Steering::Excluding(vec![Rule::default()]));
    assert!(matches!(refused, Err(XdpError::Rule { rule: 0, .. })), "{refused:?}");
    assert_eq!(port.program_id().expect("a program"), now);
    worker.close();
    drop(port);
    let closed = steering.set(&Steering::Everything);
    assert!(matches!(closed, Err(XdpError::Closed { .. })), "{closed:?}");
    assert_eq!(x.status().expect("the link").xdp_program, None);
}
