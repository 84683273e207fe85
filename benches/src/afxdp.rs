//! `afxdp`: forwarding between two veth pairs through AF_XDP sockets, inline kicks, one CPU for the
//! forwarder and one for the generator, counted at an XDP drop behind it.
//!
//! Ours is the worker's loop ([`Turns`]) with the cross-connect; the peer is testpmd with two
//! `net_af_xdp` ports and `--forward-mode=io`, which neither looks at packets. The kernel's copy-mode
//! transmit is most of the cost of both. Beside the rate are that of a worker whose kicks another
//! thread makes, on the generator's CPU since there are two, and the worker's own time for a packet.

use crate::comparison::{BenchError, Comparison, Sample};
use crate::testpmd::Testpmd;
use crate::wire::{Load, Wire};
use isoplane::blocks::CrossConnect;
use isoplane::turns::{Turns, WorkerBlocks};
use isoplane_drivers::xdp::{XdpConfig, XdpPort};
use isoplane_drivers::{KickTarget, Port};
use isoplane_memory::stats::SegmentBuilder;
use isoplane_memory::{Clock, Kernel, Pool, PoolConfig};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const WARM_UP: Duration = Duration::from_millis(500);
const MEASURED: Duration = Duration::from_secs(2);

/// The comparison under one kind of load.
#[derive(Debug)]
pub struct AfXdp(pub Load);

/// Who makes the kicks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kicks {
    Inline,
    Kicker,
}

/// What a forwarder's thread found out about itself.
struct Own {
    /// Nanoseconds in turns that moved something, kicks left out.
    busy_ns: u64,
    frames: u64,
}

impl AfXdp {
    fn failed(&self, error: impl std::fmt::Display) -> BenchError {
        BenchError::ours(&format!("afxdp {}", self.case()), error)
    }

    /// Forwards on this process's own wire; says the rate and the worker's own time for a packet.
    fn forward(&self, kicks: Kicks) -> Result<(f64, f64), BenchError> {
        let wire = Wire::new()?;
        let mut config = PoolConfig::new("forwarder", 16384);
        config.max_frame = 1522;
        let pool = Pool::create(&config).map_err(|e| self.failed(e))?;
        let inside = wire.forwarder.enter().map_err(|e| self.failed(e))?;
        let ports = Wire::PORTS.map(|name| XdpPort::open(&pool, &XdpConfig::new(name)));
        inside.leave().map_err(|e| self.failed(e))?;
        let [a, b] = ports;
        let mut ports = [a.map_err(|e| self.failed(e))?, b.map_err(|e| self.failed(e))?];
        let targets: Vec<_> = ports.iter().filter_map(|port| port.kick_target(0)).collect();
        let queues = ports.iter_mut().filter_map(|port| port.take_queue(0)).collect();
        let frames = pool.cache("forwarder", 8192).map_err(|e| self.failed(e))?;
        let mut segment = SegmentBuilder::default();
        let blocks = WorkerBlocks::declare(&mut segment, "worker0", &Wire::PORTS, &[]);
        let segment = segment.build("bench").map_err(|e| self.failed(e))?;
        let clock = Clock::tsc().map_err(|e| self.failed(e))?;

        let stop = Arc::new(AtomicBool::new(false));
        let helper = (kicks == Kicks::Kicker).then(|| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || kicker(targets, &stop))
        });
        let stopped = Arc::clone(&stop);
        let worker = std::thread::spawn(move || {
            work(Turns::new(queues, frames, &segment, &blocks), clock, kicks, &stopped)
        });
        let generator = wire.generate(self.0)?;
        std::thread::sleep(WARM_UP);
        let rate = wire.rate(MEASURED);
        stop.store(true, Ordering::Relaxed);
        generator.finish()?;
        let own = worker.join().map_err(|_| self.failed("the worker panicked"))??;
        if let Some(helper) = helper {
            helper.join().map_err(|_| self.failed("the kicker panicked"))??;
        }
        Ok((rate?, own.busy_ns as f64 / (own.frames.max(1)) as f64))
    }
}

/// The worker: the loop that a worker process runs.
fn work(mut turns: Turns, clock: Clock, kicks: Kicks, stop: &AtomicBool) -> Result<Own, BenchError> {
    crate::pin(crate::FORWARDER_CPU)?;
    let kernel = Kernel::outside_isolation();
    let (mut app, mut own) = (CrossConnect, Own { busy_ns: 0, frames: 0 });
    while !stop.load(Ordering::Relaxed) {
        let before = clock.nanos();
        let report = turns.turn(&mut app, before);
        if report.received != 0 {
            own.busy_ns += clock.nanos() - before;
            own.frames += report.received as u64;
        }
        if kicks == Kicks::Inline {
            turns.kick(&kernel);
        }
    }
    let (queues, frames) = turns.into_parts();
    for queue in queues {
        queue.close();
    }
    drop(frames);
    Ok(own)
}

fn kicker(mut targets: Vec<Box<dyn KickTarget>>, stop: &AtomicBool) -> Result<(), BenchError> {
    crate::pin(crate::OTHER_CPU)?;
    let kernel = Kernel::outside_isolation();
    while !stop.load(Ordering::Relaxed) {
        for target in &mut targets {
            // What fails now waits in the ring.
            let _ = target.poll(&kernel);
        }
        std::thread::yield_now();
    }
    Ok(())
}

impl Comparison for AfXdp {
    fn name(&self) -> &'static str {
        "afxdp"
    }

    fn case(&self) -> &'static str {
        match self.0 {
            Load::TxOnly => "txonly",
            Load::Overload => "overload",
        }
    }

    fn peer_name(&self) -> &'static str {
        "dpdk-testpmd, net_af_xdp, io"
    }

    fn unit(&self) -> &'static str {
        "Mpackets/s"
    }

    fn packages(&self) -> &'static [&'static str] {
        &["dpdk-dev"]
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        let (rate, own_ns) = self.forward(Kicks::Inline)?;
        let (kicker, _) = self.forward(Kicks::Kicker)?;
        let beside = BTreeMap::from([
            ("kicker_mpackets_per_s".to_owned(), kicker),
            ("outside_kernel_ns_per_packet".to_owned(), own_ns),
        ]);
        Ok(Sample { rate, beside })
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        let wire = Wire::new()?;
        let eal = ["--vdev=net_af_xdp0,iface=fwd0", "--vdev=net_af_xdp1,iface=fwd1"];
        let own = ["--forward-mode=io", "--burst=32", "--total-num-mbufs=16384"];
        // A child begins in the namespace of the thread that starts it.
        let inside = wire.forwarder.enter().map_err(|e| self.failed(e))?;
        let testpmd = Testpmd::start(crate::hugepages::available(), &eal, &own);
        inside.leave().map_err(|e| self.failed(e))?;
        let testpmd = testpmd?;
        let generator = wire.generate(self.0)?;
        std::thread::sleep(WARM_UP);
        let rate = wire.rate(MEASURED);
        generator.finish()?;
        drop(testpmd);
        Ok(Sample { rate: rate?, ..Sample::default() })
    }
}
