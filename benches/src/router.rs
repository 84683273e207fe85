//! `router4`, `router6`: full forwarding by the router block, between ports in memory, on one CPU, by a table of
//! the Internet's shape with 500 000 routes; 100 000 flows, each to an address in a route taken by chance.
//!
//! What is measured is everything that a worker does for a packet: take a frame, parse it, check it, look its
//! destination up, rewrite it for its next hop, count, send it by one of two ports, take the frame back; and
//! the writing of the packet, since somebody must: 64 bytes of headers with the addresses of the next flow.
//! [`Forwarding::sample`] measures that alone as well, by sending the same packets from port to port unlooked at.
//! There is no peer: the rate is held against a limit of nanoseconds a packet, of the forwarder's CPU time.

use crate::comparison::{BenchError, Comparison, Sample, Target};
use crate::routes;
use isoplane::blocks::CrossConnect;
use isoplane::blocks::router::{Router, RouterConfig, request};
use isoplane::tables::{
    Immediate, Interface, InterfaceId, NextHop, NextHopId, Tables, TablesConfig, TablesWriter,
};
use isoplane::turns::{Turns, WorkerBlocks};
use isoplane::wire::{MacAddress, ipv4, ipv6};
use isoplane::{App, PortId};
use isoplane_drivers::null::{NullConfig, NullPort};
use isoplane_drivers::{AnyRx, Port, Queue, RxQueue};
use isoplane_memory::stats::{Segment, SegmentBuilder};
use isoplane_memory::{BATCH, Batch, Clock, FrameCache, Pool, PoolConfig, Survey};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long is measured.
const MEASURED: Duration = Duration::from_secs(2);
/// And how long it runs before: some passes over all flows.
const WARM_UP: Duration = Duration::from_millis(500);
/// Next hops, on two interfaces.
const NEXT_HOPS: u32 = 256;
/// Bytes of each frame.
const FRAME: usize = 64;
/// The router's address on each of its two ports.
const ROUTER: [MacAddress; 2] = [MacAddress([2, 0, 0, 0, 0, 1]), MacAddress([2, 0, 0, 0, 0, 2])];

/// Which protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    Four,
    /// IPv6.
    Six,
}

/// Where the bytes of a flow go in a frame: checksum and addresses of IPv4, addresses of IPv6.
const FLOW4: usize = 14 + 10;
const FLOW6: usize = 14 + 8;

/// Receives packets of many flows, one after the other.
struct Flows {
    template: [u8; FRAME],
    four: Arc<[[u8; 10]]>,
    six: Arc<[[u8; 32]]>,
    next: usize,
}

impl Flows {
    #[inline(always)]
    fn fill<const N: usize>(
        pool: &Pool,
        batch: &mut Batch,
        template: &[u8; FRAME],
        flows: &[[u8; N]],
        at: usize,
        next: &mut usize,
    ) {
        let mut rest = flows[*next..].iter();
        pool.for_each_mut(batch, |packet| {
            let Some(frame) = packet.first_chunk_mut::<FRAME>() else { return };
            *frame = *template;
            let flow = rest.next().or_else(|| {
                rest = flows.iter();
                rest.next()
            });
            if let Some(flow) = flow {
                frame[at..at + N].copy_from_slice(flow);
            }
        });
        *next = flows.len() - rest.len();
    }
}

impl RxQueue for Flows {
    fn receive(&mut self, frames: &mut FrameCache, batch: &mut Batch) -> usize {
        let n = frames.get_batch(batch, BATCH, FRAME as u16);
        let Self { template, four, six, next } = self;
        if six.is_empty() {
            Self::fill(frames.pool(), batch, template, four, FLOW4, next);
        } else {
            Self::fill(frames.pool(), batch, template, six, FLOW6, next);
        }
        n
    }
    fn survey(&mut self, _survey: &mut Survey) {}
    fn stop(&mut self) {}
    fn sweep(&mut self) -> u32 {
        0
    }
}

/// A router in its worker's loop, with all that it works on.
pub struct Forwarding {
    turns: Turns,
    segment: Segment,
    router: Router,
    tables: TablesWriter,
    version: Version,
}

impl std::fmt::Debug for Forwarding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarding").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Forwarding {
    /// Makes tables, flows, ports and router.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn new(version: Version, route_count: usize, flow_count: usize) -> Result<Self, BenchError> {
        let failed = |e: &dyn std::fmt::Display| BenchError::ours("router", e);
        let config = TablesConfig { interfaces: 16, ..TablesConfig::default() };
        let (mut tables, reader) = Tables::create("bench", &config).map_err(|e| failed(&e))?;
        for (place, mac) in (0..).zip(ROUTER) {
            let interface = Interface {
                port: PortId(place as u8),
                mac,
                mtu: 1500,
                up: true,
                forward4: true,
                forward6: true,
                ..Interface::default()
            };
            tables.interfaces.set(InterfaceId::new(place).unwrap_or_default(), Some(&interface));
        }
        let next_hops: Result<Vec<NextHopId>, _> = (0..NEXT_HOPS)
            .map(|n| {
                let interface = InterfaceId::new(n as u16 % 2).unwrap_or_default();
                let mac = MacAddress([2, 1, 0, 0, (n >> 8) as u8, n as u8]);
                tables.next_hops.add(NextHop::Forward { interface, mac })
            })
            .collect();
        let next_hops = next_hops.map_err(|e| failed(&e))?;
        let mut source = Flows { template: [0; FRAME], four: Arc::new([]), six: Arc::new([]), next: 0 };
        match version {
            Version::Four => {
                let routes = routes::ipv4(route_count, NEXT_HOPS);
                for (at, (prefix, to)) in routes.iter().enumerate() {
                    let to = next_hops[*to as usize];
                    tables.fib4.insert(*prefix, to).map_err(|e| failed(&e))?;
                    collect(&mut tables, at);
                }
                let forwarded = |to: &Ipv4Addr| !to.is_loopback() && !to.is_link_local();
                let flows = routes::addresses4(&routes, flow_count + flow_count / 16);
                let flows = flows.into_iter().filter(forwarded).take(flow_count);
                source.four = flows.map(|to| header4(to, &mut source.template)).collect();
            }
            Version::Six => {
                let routes = routes::ipv6(route_count, NEXT_HOPS);
                for (at, (prefix, to)) in routes.iter().enumerate() {
                    let to = next_hops[*to as usize];
                    tables.fib6.insert(*prefix, to).map_err(|e| failed(&e))?;
                    collect(&mut tables, at);
                }
                let flows = routes::addresses6(&routes, flow_count).into_iter();
                source.six = flows.map(|to| header6(to, &mut source.template)).collect();
            }
        }
        tables.collect(&Immediate);
        let (turns, segment) = worker(&source)?;
        let (_, requests) = request::requests("bench", 64).map_err(|e| failed(&e))?;
        let config = RouterConfig { seed: 1, ..RouterConfig::new(2) };
        let router = Router::new(&config, reader, requests.open()).map_err(|e| failed(&e))?;
        Ok(Self { turns, segment, router, tables, version })
    }

    /// Makes turns: two batches each.
    pub fn turn(&mut self, turns: u64) {
        for now in 0..turns {
            self.turns.turn(&mut self.router, now);
        }
    }

    /// Frames sent so far.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn sent(&self) -> Result<u64, BenchError> {
        let reader = self.segment.reader().map_err(|e| BenchError::ours("router", e))?;
        Ok(reader.total("tx_frames"))
    }

    /// Measures the router, and then the ports without it.
    ///
    /// # Errors
    /// See [`BenchError`]; one of them is that not every packet was forwarded.
    pub fn sample(&mut self) -> Result<Sample, BenchError> {
        let failed = |e: &dyn std::fmt::Display| BenchError::ours("router", e);
        crate::pin(crate::FORWARDER_CPU)?;
        let clock = Clock::tsc().map_err(|e| failed(&e))?;
        let reader = self.segment.reader().map_err(|e| failed(&e))?;
        let nanos = run(&mut self.turns, &mut self.router, &clock)?;
        let totals = ["rx_frames", "tx_frames", "forwarded4", "forwarded6"].map(|name| reader.total(name));
        let [received, sent, four, six] = totals;
        if received != sent || received != four + six {
            return Err(failed(&format!("not every packet was forwarded: {totals:?}")));
        }
        let ports = run(&mut self.turns, &mut CrossConnect, &clock)?;
        let memory = match self.version {
            Version::Four => self.tables.fib4.memory(),
            Version::Six => self.tables.fib6.memory(),
        };
        let beside = [
            ("ns_per_packet", nanos),
            ("ns_ports_alone", ports),
            ("table_mib", memory.used as f64 / f64::from(1 << 20)),
        ];
        let beside = beside.map(|(name, value)| (name.to_owned(), value));
        Ok(Sample { rate: 1e3 / nanos, beside: BTreeMap::from(beside) })
    }
}

/// Nobody reads the tables yet: what changes leave behind is free at once.
fn collect(tables: &mut TablesWriter, at: usize) {
    if at.is_multiple_of(1024) {
        tables.collect(&Immediate);
    }
}

/// Nanoseconds of CPU time a packet.
fn run<A: App>(turns: &mut Turns, app: &mut A, clock: &Clock) -> Result<f64, BenchError> {
    let mut turn_for = |time: Duration| {
        let (start, mut received) = (Instant::now(), 0);
        while start.elapsed() < time {
            for _ in 0..1024 {
                received += turns.turn(app, clock.nanos()).received;
            }
        }
        received
    };
    turn_for(WARM_UP);
    let start = crate::cpu_time(std::process::id())?;
    let packets = turn_for(MEASURED);
    let used = crate::cpu_time(std::process::id())? - start;
    Ok(used.as_secs_f64() * 1e9 / packets as f64)
}

/// Two ports that receive the flows, each beginning elsewhere, and send to nowhere.
fn worker(source: &Flows) -> Result<(Turns, Segment), BenchError> {
    let failed = |e: &dyn std::fmt::Display| BenchError::ours("router", e);
    let config = PoolConfig { max_frame: 960, ..PoolConfig::new("bench", 2048) };
    let pool = Pool::create(&config).map_err(|e| failed(&e))?;
    let frames = pool.cache("bench", 2048).map_err(|e| failed(&e))?;
    let mut queues: Vec<Queue> = Vec::new();
    for (index, name) in ["null0", "null1"].into_iter().enumerate() {
        let nowhere = NullConfig { frame_len: 0, batch: 0, ..NullConfig::new(name) };
        let mut port = NullPort::open(&pool, &nowhere).map_err(|e| failed(&e))?;
        let mut template = source.template;
        template[..6].copy_from_slice(&ROUTER[index].0);
        let (four, six) = (Arc::clone(&source.four), Arc::clone(&source.six));
        let next = index * (four.len() + six.len()) / 2;
        let rx: Box<dyn RxQueue> = Box::new(Flows { template, four, six, next });
        queues.extend(port.take_queue(0).map(|queue| Queue { rx: AnyRx::from(rx), tx: queue.tx }));
    }
    let mut segment = SegmentBuilder::default();
    let blocks = WorkerBlocks::declare(&mut segment, "worker0", &["null0", "null1"], &Router::FIELDS);
    let segment = segment.build("bench").map_err(|e| failed(&e))?;
    let turns = Turns::new(queues, frames, &segment, &blocks);
    Ok((turns, segment))
}

fn ethernet(template: &mut [u8; FRAME], ethertype: u16) {
    template[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    template[12..14].copy_from_slice(&ethertype.to_be_bytes());
}

/// Writes a packet's headers; gives the part that differs between flows.
fn header4(to: Ipv4Addr, template: &mut [u8; FRAME]) -> [u8; 10] {
    ethernet(template, 0x0800);
    let repr = ipv4::Repr {
        tos: 0,
        identification: 0,
        dont_fragment: true,
        ttl: 64,
        protocol: ipv4::protocol::UDP,
        source: Ipv4Addr::new(9, 9, 9, 9),
        destination: to,
        payload_len: (FRAME - 14 - ipv4::HEADER) as u16,
    };
    // The template is long enough.
    let _ = repr.emit(&mut template[14..]);
    template[FLOW4..].first_chunk().copied().unwrap_or_default()
}

fn header6(to: Ipv6Addr, template: &mut [u8; FRAME]) -> [u8; 32] {
    ethernet(template, 0x86dd);
    let repr = ipv6::Repr {
        traffic_class: 0,
        flow_label: 0,
        payload_len: (FRAME - 14 - ipv6::HEADER) as u16,
        next_header: ipv4::protocol::UDP,
        hop_limit: 64,
        source: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9),
        destination: to,
    };
    let _ = repr.emit(&mut template[14..]);
    template[FLOW6..].first_chunk().copied().unwrap_or_default()
}

/// The measurement, as a comparison with its limit.
#[derive(Debug)]
pub struct Forward(pub Version);

impl Forward {
    /// Nanoseconds that a packet may take.
    const fn limit(&self) -> f64 {
        match self.0 {
            Version::Four => 45.0,
            Version::Six => 70.0,
        }
    }
}

impl Comparison for Forward {
    fn name(&self) -> &'static str {
        match self.0 {
            Version::Four => "router4",
            Version::Six => "router6",
        }
    }

    fn peer_name(&self) -> &'static str {
        match self.0 {
            Version::Four => "the limit: 45 ns a packet",
            Version::Six => "the limit: 70 ns a packet",
        }
    }

    fn unit(&self) -> &'static str {
        "Mpackets/s"
    }

    fn packages(&self) -> &'static [&'static str] {
        &[]
    }

    fn target(&self) -> Option<Target> {
        Some(Target::AtLeast(1.0))
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        Forwarding::new(self.0, 500_000, 100_000)?.sample()
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        let beside = BTreeMap::from([("ns_per_packet".to_owned(), self.limit())]);
        Ok(Sample { rate: 1e3 / self.limit(), beside })
    }
}
