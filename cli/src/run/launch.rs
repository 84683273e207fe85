//! From a configuration to a dataplane that runs.
//!
//! Contract: to be called while the process has one thread, since workers are forked.

use super::app::{Answer, Order, OrderedBridge};
use super::check;
use super::config::{Config, Device, Forwarder, Port, RINGS};
use isoplane::blocks::bridge::{Bridge, BridgeError};
use isoplane::drivers::{OpenError, Opener, XdpConfig, XdpPort};
use isoplane::memory::{Pool, PoolConfig, PoolError};
use isoplane::message::MailboxError;
use isoplane::{Builder, Dataplane, LaunchError, Mailbox, Running, Worker, mailbox};
use std::sync::Arc;

/// Orders that may be on their way to a worker.
pub(crate) const ORDERS: u32 = 1024;

/// Why a dataplane could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("cannot make the frame pool: {0}")]
    Pool(#[from] PoolError),
    #[error("cannot open port {port:?}: {source}")]
    Port { port: String, source: Box<OpenError> },
    #[error("cannot make the bridge: {0}")]
    Bridge(#[from] BridgeError),
    #[error("cannot make the way to the worker: {0}")]
    Mailbox(#[from] MailboxError),
    #[error("cannot launch the dataplane: {0}")]
    Launch(#[from] LaunchError),
}

/// What runs, and the way to tell it something.
pub(crate) struct Launched {
    pub(crate) running: Running,
    pub(crate) orders: Mailbox<Order, Answer>,
    /// The drivers of the ports, in the order of the file.
    pub(crate) drivers: Vec<&'static str>,
}

/// Opens ports and starts workers.
pub(crate) fn launch(config: &Config) -> Result<Launched, StartError> {
    let pool = pool(config)?;
    let mut builder = Dataplane::builder(&config.name);
    let mut opener = Opener::new(&pool).iommu(config.iommu);
    let (mut ports, mut drivers) = (Vec::new(), Vec::new());
    for port in &config.ports {
        let open = open(&pool, &mut opener, port);
        let open = open
            .map_err(|source| StartError::Port { port: port.name.value.clone(), source: Box::new(source) })?;
        tracing::info!("port {:?} is open: {}", port.name.value, open.driver());
        drivers.push(open.driver());
        ports.push(builder.boxed_port(open));
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
        for (port, open) in config.ports.iter().zip(&ports) {
            if let Some(queue) = queue_of(port) {
                made = made.queue(*open, queue);
            }
        }
        made
    });
    let workers: Vec<Worker> = workers.collect();
    settings(&mut builder, config);
    let orders = match &config.forwarder {
        Forwarder::Bridge(bridge) => {
            Bridge::new(bridge)?;
            let (orders, end) = mailbox::<Order, Answer>(&config.name, ORDERS)?;
            let mut end = Some(end);
            for worker in workers {
                // The file has one worker for a bridge.
                let Some(end) = end.take() else { break };
                let bridge = bridge.clone();
                builder.worker(worker.counters(&Bridge::FIELDS), move |_| {
                    OrderedBridge::new(Bridge::new(&bridge).expect("checked before the launch"), end.open())
                });
            }
            orders
        }
    };
    Ok(Launched { running: builder.launch()?, orders, drivers })
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
    pool: &Arc<Pool>,
    opener: &mut Opener,
    port: &Port,
) -> Result<Box<dyn isoplane::drivers::Port>, OpenError> {
    match &port.device {
        Device::Pci(address) => opener.open(address, port.queues.value),
        Device::Interface { name, zero_copy, attach, rings, allow_larger_mtu } => {
            let rings = rings.unwrap_or(RINGS);
            let config = XdpConfig::new(name)
                .queues(port.queues.value)
                .zero_copy(*zero_copy)
                .attach(*attach)
                .allow_larger_mtu(*allow_larger_mtu)
                .rings(rings, rings);
            Ok(Box::new(XdpPort::open(pool, &config)?))
        }
    }
}

fn settings(builder: &mut Builder, config: &Config) {
    builder.kicks(config.kicks).restart(config.restart).isolation(config.isolation.clone());
    if let Some(cpu) = &config.kicker_cpu {
        builder.kicker_cpu(cpu.value);
    }
}
