//! From a configuration to a dataplane that runs.
//!
//! Contract: to be called while the process has one thread, since workers are forked.

use super::app::{Answer, Order, Ordered};
use super::check;
use super::config::{Config, Device, Forwarder, Port, RINGS};
use isoplane::PortId;
use isoplane::blocks::bridge::{Bridge, BridgeError};
use isoplane::blocks::router::{Router, RouterError, request};
use isoplane::drivers::tap::{TapConfig, TapPort};
use isoplane::drivers::xdp::{Steering, XdpSteering};
use isoplane::drivers::{OpenError, Opener, XdpConfig, XdpPort};
use isoplane::isolation::prepare::cpu;
use isoplane::memory::{Pool, PoolConfig, PoolError, RegionError};
use isoplane::message::MailboxError;
use isoplane::sync::{Sync, SyncConfig, SyncError};
use isoplane::tables::Tables;
use isoplane::{Builder, Dataplane, LaunchError, Mailbox, Running, Worker, mailbox};
use std::sync::Arc;

/// Orders that may be on their way to a worker.
pub(crate) const ORDERS: u32 = 1024;

/// Requests for neighbours that may be on their way from a worker.
const REQUESTS: u32 = 1024;

/// Why a dataplane could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot make the frame pool: {0}")]
    Pool(#[from] PoolError),
    #[error("cannot open port {port:?}: {source}")]
    Port { port: String, source: Box<OpenError> },
    #[error("cannot make the bridge: {0}")]
    Bridge(#[from] BridgeError),
    #[error("cannot make the router: {0}")]
    Router(#[from] RouterError),
    #[error("cannot make the router's tables: {0}")]
    Tables(#[from] RegionError),
    #[error("cannot follow the kernel's routes: {0}")]
    Sync(#[from] SyncError),
    #[error("cannot make the way to a worker: {0}")]
    Mailbox(#[from] MailboxError),
    #[error("cannot launch the dataplane: {0}")]
    Launch(#[from] LaunchError),
}

/// What runs, and the way to tell it something.
pub(crate) struct Launched {
    pub(crate) running: Running,
    /// One a worker.
    pub(crate) orders: Vec<Mailbox<Order, Answer>>,
    /// What keeps a router's tables as the kernel's.
    pub(crate) sync: Option<Sync>,
    /// The drivers of the ports, in the order of the file.
    pub(crate) drivers: Vec<&'static str>,
}

/// Opens ports and starts workers.
pub(crate) fn launch(config: &Config) -> Result<Launched, StartError> {
    let pool = pool(config)?;
    let mut builder = Dataplane::builder(&config.name);
    let mut opener = Opener::new(&pool).iommu(config.iommu);
    let (mut ports, mut hosts, mut drivers) = (Vec::new(), Vec::new(), Vec::new());
    let mut steering = Vec::new();
    for port in &config.ports {
        let open = open(config, &pool, &mut opener, port, &mut steering);
        let open = open
            .map_err(|source| StartError::Port { port: port.name.value.clone(), source: Box::new(source) })?;
        tracing::info!("port {:?} is open: {}", port.name.value, open.driver());
        drivers.push(open.driver());
        let mac = open.mac();
        ports.push(builder.boxed_port(open));
        if let Some(host) = &port.host {
            // The kernel speaks with the address that the others know.
            let made = tap(&pool, &host.value, port.queues.value, mac);
            let made = made
                .map_err(|source| StartError::Port { port: host.value.clone(), source: Box::new(source) })?;
            hosts.push((port, builder.boxed_port(made)));
        }
    }
    let workers = config.workers.iter().enumerate().map(|(index, worker)| {
        let mut made = Worker::new(&worker.name.value).frames(worker.frames).idle(worker.idle);
        if let Some(cpu) = &worker.cpu {
            made = made.cpu(cpu.value);
        }
        let queue_of = |port: &Port| match &worker.queues {
            Some(queues) => {
                queues.iter().find(|(name, _)| name.value == port.name.value).map(|(_, q)| q.value)
            }
            None => Some(index as u16),
        };
        // Ports in the order of the file, and after them those to the host.
        for (port, open) in
            config.ports.iter().zip(&ports).chain(hosts.iter().map(|(port, open)| (*port, open)))
        {
            if let Some(queue) = queue_of(port) {
                made = made.queue(*open, queue);
            }
        }
        made
    });
    let workers: Vec<Worker> = workers.collect();
    settings(&mut builder, config);
    let (mut orders, mut requests) = (Vec::new(), Vec::new());
    let mut tables = None;
    for (index, worker) in workers.into_iter().enumerate() {
        let (program, end) = mailbox::<Order, Answer>(&format!("{}.{index}", config.name), ORDERS)?;
        orders.push(program);
        match &config.forwarder {
            Forwarder::Bridge(bridge) => {
                Bridge::new(bridge)?;
                let bridge = bridge.clone();
                builder.worker(worker.counters(&Bridge::FIELDS), move |_| {
                    Ordered::new(Bridge::new(&bridge).expect("checked before the launch"), end.open())
                });
            }
            Forwarder::Router(router) => {
                if tables.is_none() {
                    tables = Some(Tables::create(&config.name, &router.tables)?);
                }
                let reader = tables.iter().map(|(_, reader)| reader.clone()).next().expect("made above");
                let (asked, asks) =
                    request::requests(&format!("{}.requests.{index}", config.name), REQUESTS)?;
                requests.push(asked);
                let router = router.config.clone();
                // What a worker would find wrong is found here.
                Router::new(&router, reader.clone(), asks.open())?;
                builder.worker(worker.counters(&Router::FIELDS), move |_| {
                    let router = Router::new(&router, reader.clone(), asks.open());
                    Ordered::new(router.expect("checked before the launch"), end.open())
                });
            }
        }
    }
    let running = builder.launch()?;
    let sync = match (&config.forwarder, tables) {
        (Forwarder::Router(router), Some((writer, _))) => {
            let mut follow = SyncConfig::new(interfaces(config));
            (follow.table, follow.overrides) = (router.routes, router.overrides);
            follow.cpus = housekeeping(config);
            follow.steering = steering;
            Some(Sync::start(follow, writer, requests, running.epochs())?)
        }
        _ => None,
    };
    Ok(Launched { running, orders, sync, drivers })
}

/// The kernel's interfaces behind the ports.
fn interfaces(config: &Config) -> Vec<(String, PortId)> {
    let name = |port: &Port| match &port.device {
        _ if port.host.is_some() => port.host.as_ref().map(|host| host.value.clone()),
        Device::Interface { name, .. } => Some(name.clone()),
        Device::Pci(_) | Device::Tap(_) => None,
    };
    (0..).zip(&config.ports).filter_map(|(id, port)| Some((name(port)?, PortId(id)))).collect()
}

/// CPUs that no worker spins on; none when there are no others.
fn housekeeping(config: &Config) -> Vec<usize> {
    let taken = |cpu: usize| config.workers.iter().any(|w| w.cpu.as_ref().is_some_and(|of| of.value == cpu));
    cpu::allowed().iter().map(|cpu| cpu.0).filter(|cpu| !taken(*cpu)).collect()
}

fn pool(config: &Config) -> Result<Arc<Pool>, PoolError> {
    let enough = check::frames(&config.ports, &config.workers);
    let frames = config.pool.frames.as_ref().map_or(enough, |frames| frames.value);
    Pool::create(&PoolConfig {
        chunk_bytes: config.pool.chunk_bytes,
        max_frame: config.pool.max_frame.value,
        huge_pages: config.pool.huge_pages,
        numa_node: config.pool.numa_node,
        ..PoolConfig::new(&config.name, frames)
    })
}

fn open(
    config: &Config,
    pool: &Arc<Pool>,
    opener: &mut Opener,
    port: &Port,
    steered: &mut Vec<XdpSteering>,
) -> Result<Box<dyn isoplane::drivers::Port>, OpenError> {
    match &port.device {
        Device::Pci(address) => opener.open(address, port.queues.value),
        Device::Tap(name) => tap(pool, name, port.queues.value, None),
        Device::Interface { name, zero_copy, attach, rings, allow_larger_mtu } => {
            let rings = rings.unwrap_or(RINGS);
            // With a host's interface the worker hands over itself what is the kernel's. Without one all is
            // the kernel's until the tables are filled and say what is the worker's.
            let follow = matches!(config.forwarder, Forwarder::Router(_)) && port.host.is_none();
            let steering = if follow { Steering::Matching(Vec::new()) } else { Steering::Everything };
            let config = XdpConfig::new(name)
                .steering(steering)
                .queues(port.queues.value)
                .zero_copy(*zero_copy)
                .attach(*attach)
                .allow_larger_mtu(*allow_larger_mtu)
                .rings(rings, rings);
            let port = XdpPort::open(pool, &config)?;
            if follow {
                steered.push(port.steering());
            }
            Ok(Box::new(port))
        }
    }
}

/// An interface whose other end is ours; one that is there already is taken.
fn tap(
    pool: &Arc<Pool>,
    name: &str,
    queues: u16,
    mac: Option<[u8; 6]>,
) -> Result<Box<dyn isoplane::drivers::Port>, OpenError> {
    let config = TapConfig { queues, mac, existing: true, ..TapConfig::new(name) };
    Ok(Box::new(TapPort::open(pool, &config)?))
}

fn settings(builder: &mut Builder, config: &Config) {
    builder.kicks(config.kicks).restart(config.restart).isolation(config.isolation.clone());
    if let Some(cpu) = &config.kicker_cpu {
        builder.kicker_cpu(cpu.value);
    }
}
