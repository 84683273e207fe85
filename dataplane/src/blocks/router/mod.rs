//! A router: IPv4 and IPv6 forwarding after RFC 1812, RFC 8200 and RFC 4443, by the program's
//! [tables](crate::tables).
//!
//! | file | what is there |
//! |---|---|
//! | this one | the router, and its turn |
//! | `fast` | the way of most packets, in stages over a batch |
//! | `general` | the way of all others: each check, and what follows from it |
//! | `options` | IPv4 options, IPv6 extension headers |
//! | `icmp` | error messages: when, what, how often |
//! | `fragment` | IPv4 fragmentation |
//! | `pending`, `resolve` | packets that wait for neighbours |
//! | `lines` | what a worker keeps of each interface |
//! | `flow` | the hash that chooses among next hops |
//! | `martian` | addresses that are not forwarded |
//! | [`config`] | what a router is told, and errors |
//! | [`change`] | what a router at work is told anew |
//! | [`request`] | what a worker asks the program for |
//! | [`field`] | counters |
//!
//! Contract: no packet content makes it panic or do more than a bounded amount of work; it allocates when it is
//! made and never again. The frames of a packet share one fate. Every packet is forwarded, handed to the host,
//! held for a while, or dropped with a reason and a counter. ARP and neighbour discovery are the kernel's: the
//! router asks the program ([`request`]), and finds the answers in the tables.
//!
//! | packet | what becomes of it |
//! |---|---|
//! | to another Ethernet address | dropped, `Policy` |
//! | on a VLAN or port that is no interface, or one that is down | dropped, `NoInterface` |
//! | no IP; multicast; broadcast; IPv6 link-local | punted |
//! | with a header that is not valid | dropped, `Malformed` |
//! | with addresses that cannot be (RFC 1812, 5.3.7; RFC 6890) | dropped, `Martian` |
//! | to the router's own address | punted |
//! | without hops left | dropped, `HopLimit`; time exceeded |
//! | without a route, or with one that rejects | dropped, `NoRoute`; unreachable, but for blackholes |
//! | too long | fragmented; or dropped, `TooBig`, with what would have fit |
//! | to a neighbour that is not resolved | held; dropped, `Resolution`, when there is no answer, with unreachable |
//! | from the port of the host | sent by the port that it belongs to, unchanged |

pub mod change;
pub mod config;
mod fast;
pub mod field;
mod flow;
mod fragment;
mod general;
mod icmp;
mod limit;
mod lines;
mod martian;
mod options;
mod pending;
pub mod request;
mod resolve;

pub use config::{IcmpLimits, Limit, PuntLimits, ResolutionLimits, RouterConfig, RouterError, RouterPort};
pub use request::{Message, Request, RequestEnd, RequestMailbox, WorkerRequests};

use crate::app::{App, DropReason, PortId, Turn};
use crate::tables::Tables;
use fast::Work;
use flow::FlowHash;
use isoplane_memory::Batch;
use isoplane_memory::stats::Field;
use limit::{Bucket, Shared};
use lines::Lines;
use pending::Pending;

/// A port as the router sees it.
#[derive(Debug)]
struct Port {
    /// Where what is the host's goes.
    punt: Option<PortId>,
    /// For a port to the host: where what comes from there goes.
    belongs_to: Option<PortId>,
    link: Bucket,
    local: Bucket,
}

/// The router. Each worker runs one, with its own [`RequestEnd`]; they share the tables.
///
/// ```
/// use isoplane::PortId;
/// use isoplane::blocks::router::{Request, Router, RouterConfig, request};
/// use isoplane::tables::{Interface, InterfaceId, NextHop, Tables, TablesConfig};
///
/// let (mut writer, tables) = Tables::create("example", &TablesConfig::default())?;
/// let lan = InterfaceId::new(0).unwrap();
/// let interface = Interface {
///     port: PortId(0),
///     mac: "02:00:00:00:00:01".parse()?,
///     mtu: 1500,
///     up: true,
///     forward4: true,
///     address4: Some("192.0.2.1".parse()?),
///     ..Interface::default()
/// };
/// assert!(writer.interfaces.set(lan, Some(&interface)));
/// let on_link = writer.next_hops.add(NextHop::OnLink { interface: lan })?;
/// writer.fib4.insert("192.0.2.0/24".parse()?, on_link)?;
///
/// let (mut requests, worker_end) = request::requests("example", 256)?;
/// let router = Router::new(&RouterConfig::new(1), tables, worker_end.open())?;
/// // A worker that declared `Router::FIELDS` as its counters runs it: `turns.turn(&mut router, now)`.
/// // The program has the kernel resolve the neighbours that packets wait for.
/// while let Some(request) = requests.receive() {
///     println!("{:?}", request.parse());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Router {
    tables: Tables,
    requests: RequestEnd,
    config: RouterConfig,
    ports: Box<[Port]>,
    lines: Lines,
    flow: FlowHash,
    work: Box<Work>,
    errors4: Shared,
    errors6: Shared,
    pending: Pending,
    asks: Bucket,
    /// Next hops that have failed, when the program was asked again.
    failed: Box<[(u32, u64); resolve::FAILED]>,
    fragments_left: u32,
}

impl Router {
    /// The counters that a worker with a router declares.
    pub const FIELDS: [Field; field::FIELDS.len()] = field::FIELDS;

    /// Makes a router; allocates all that it will ever need.
    ///
    /// # Errors
    /// See [`RouterError`].
    pub fn new(config: &RouterConfig, tables: Tables, requests: RequestEnd) -> Result<Self, RouterError> {
        config.check()?;
        let mut router = Self {
            lines: Lines::new(&tables.interfaces, config.ports.len()),
            tables,
            requests,
            ports: Box::default(),
            flow: FlowHash(config.seed),
            work: Box::default(),
            errors4: Shared::new(config.icmp.total, config.icmp.host),
            errors6: Shared::new(config.icmp.total, config.icmp.host),
            pending: Pending::new(&config.resolution),
            asks: Bucket::new(config.resolution.requests),
            failed: Box::new([(0, 0); resolve::FAILED]),
            fragments_left: config.fragments_per_turn,
            config: config.clone(),
        };
        router.ports = router.make_ports();
        Ok(router)
    }

    fn make_ports(&self) -> Box<[Port]> {
        let ports = &self.config.ports;
        let belongs_to = |index: usize| {
            let port = ports.iter().position(|port| port.punt.is_some_and(|punt| punt.index() == index));
            port.map(|port| PortId(port as u8))
        };
        let port = |(index, port): (usize, &RouterPort)| Port {
            punt: port.punt,
            belongs_to: belongs_to(index),
            link: Bucket::new(self.config.punt.link),
            local: Bucket::new(self.config.punt.local),
        };
        ports.iter().enumerate().map(port).collect()
    }

    /// The limits as they were in the beginning.
    fn fill_limits(&mut self) {
        self.ports = self.make_ports();
        self.errors4 = Shared::new(self.config.icmp.total, self.config.icmp.host);
        self.errors6 = Shared::new(self.config.icmp.total, self.config.icmp.host);
        self.asks = Bucket::new(self.config.resolution.requests);
        self.failed.fill((0, 0));
        self.fragments_left = self.config.fragments_per_turn;
    }
}

impl App for Router {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        self.lines.refresh(&self.tables.interfaces);
        let Some(port) = self.ports.get(from.index()) else {
            return turn.drop_all(batch, DropReason::NoPort);
        };
        if let Some(port) = port.belongs_to {
            turn.count(field::FROM_HOST, batch.len() as u64);
            return turn.send_all(port, batch);
        }
        if self.pending.len() != 0 {
            // Before what follows them, as far as that can be.
            self.look_after(turn, resolve::PER_BATCH);
        }
        self.fast(turn, from, batch);
    }

    #[inline(always)]
    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.fragments_left = self.config.fragments_per_turn;
        if self.pending.len() != 0 {
            self.look_after(turn, resolve::PER_TURN);
        }
    }

    fn drain(&mut self, turn: &mut Turn<'_>) {
        self.give_up(turn);
    }

    /// Synthetic packets are to no address of ours, so nobody is asked for anything.
    fn wants_rehearsal(&self) -> bool {
        true
    }

    /// Limits are full again; packets that waited are given back by [`App::drain`].
    fn rehearsed(&mut self) {
        self.fill_limits();
    }
}
