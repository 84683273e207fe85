//! The bench of the `afxdp` comparison: a generator, two veth pairs with the forwarder between, and a
//! sink that counts.
//!
//! ```text
//! CPU 0                           CPU 1
//! generator -> gen0 ~~~~ fwd0 -> forwarder -> fwd1 ~~~~ sink0, XDP_DROP
//! ```
//!
//! Contract: everything is in anonymous namespaces and goes with the process. Both forwarders get the
//! same wire and the same generator; what counts is what arrives at the sink.

use crate::bpf::{Injector, Sink};
use crate::comparison::BenchError;
use isoplane_drivers::xdp::{XdpConfig, XdpPort};
use isoplane_drivers::{Port, TxQueue};
use isoplane_lab::veth::pair;
use isoplane_lab::{Link, Namespace, VethEnd};
use isoplane_memory::{BATCH, Batch, Kernel, Pool, PoolConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How frames get to the forwarder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// From an AF_XDP socket that only sends, as fast as the kernel takes them: as testpmd's `txonly`.
    TxOnly,
    /// Made by the kernel (`BPF_PROG_TEST_RUN` with live frames): several times what any forwarder
    /// here can take.
    Overload,
}

/// The wire and what is at its ends.
#[derive(Debug)]
pub struct Wire {
    generator: &'static Namespace,
    /// Where the forwarder's two interfaces are: [`Wire::PORTS`].
    pub forwarder: &'static Namespace,
    sink: Link<'static>,
    _drop: Sink,
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Machine(format!("the wire between generator and sink: {error}"))
}

impl Wire {
    /// The forwarder's interfaces: in and out.
    pub const PORTS: [&'static str; 2] = ["fwd0", "fwd1"];

    /// Lays the wire.
    ///
    /// # Errors
    /// See [`BenchError`]; root is needed.
    pub fn new() -> Result<Self, BenchError> {
        // A run is a process, and the kernel deletes them with it.
        let space = || Namespace::new().map(|space| -> &'static _ { Box::leak(Box::new(space)) });
        let [generator, forwarder, sink] =
            [space().map_err(failed)?, space().map_err(failed)?, space().map_err(failed)?];
        for space in [generator, forwarder, sink] {
            space.disable_ipv6().map_err(failed)?;
        }
        pair(&VethEnd::new(generator, "gen0"), &VethEnd::new(forwarder, "fwd0")).map_err(failed)?;
        let (_, sink) =
            pair(&VethEnd::new(forwarder, "fwd1"), &VethEnd::new(sink, "sink0")).map_err(failed)?;
        let inside = sink.namespace().enter().map_err(failed)?;
        let drop = Sink::attach(sink.index());
        inside.leave().map_err(failed)?;
        Ok(Self { generator, forwarder, sink, _drop: drop.map_err(failed)? })
    }

    /// Packets that have arrived at the sink.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn arrived(&self) -> Result<u64, BenchError> {
        self.sink.status().map(|status| status.rx_packets).map_err(failed)
    }

    /// Lets the wire run for a while and says the rate, in million packets a second.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn rate(&self, time: Duration) -> Result<f64, BenchError> {
        let (before, start) = (self.arrived()?, Instant::now());
        std::thread::sleep(time);
        let (after, elapsed) = (self.arrived()?, start.elapsed());
        Ok((after - before) as f64 / elapsed.as_secs_f64() / 1e6)
    }

    /// Starts the generator on its own CPU.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn generate(&self, load: Load) -> Result<Generator, BenchError> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let index = self.generator.link("gen0").map_err(failed)?.index();
        let work = move || {
            crate::pin(crate::OTHER_CPU)?;
            match load {
                Load::TxOnly => transmit(&stopped),
                Load::Overload => inject(index, &stopped),
            }
        };
        let thread = self.generator.spawn("generator", work).map_err(failed)?;
        Ok(Generator { stop, thread: Some(thread) })
    }
}

/// A running generator.
#[derive(Debug)]
pub struct Generator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<(), BenchError>>>,
}

impl Generator {
    /// Ends it; what went wrong in it comes out here.
    ///
    /// # Errors
    /// See [`BenchError`].
    pub fn finish(mut self) -> Result<(), BenchError> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().map(JoinHandle::join);
        thread.unwrap_or(Ok(Ok(()))).map_err(|_| failed("the generator panicked"))?
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A broadcast frame of an EtherType for experiments (IEEE 802).
fn frame() -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame
}

fn inject(interface: u32, stop: &AtomicBool) -> Result<(), BenchError> {
    let injector = Injector::new(interface).map_err(failed)?;
    while !stop.load(Ordering::Relaxed) {
        match injector.send(&frame(), 1 << 16) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(failed(error)),
            _ => {}
        }
    }
    Ok(())
}

fn transmit(stop: &AtomicBool) -> Result<(), BenchError> {
    let pool = Pool::create(&PoolConfig::new("generator", 8192)).map_err(failed)?;
    let mut port = XdpPort::open(&pool, &XdpConfig::new("gen0")).map_err(failed)?;
    let mut queue = port.take_queue(0).ok_or_else(|| failed("no queue"))?;
    let mut frames = pool.cache("generator", 4096).map_err(failed)?;
    let (mut batch, kernel) = (Batch::new(), Kernel::outside_isolation());
    while !stop.load(Ordering::Relaxed) {
        frames.get_batch(&mut batch, BATCH, 60);
        pool.for_each_mut(&mut batch, |packet| packet.copy_from_slice(&frame()));
        queue.tx.transmit(&mut batch);
        // What the kernel does not take now it takes later.
        let _ = queue.tx.kick(&kernel);
        queue.tx.reclaim(&mut frames);
    }
    frames.put_batch(&mut batch);
    queue.close();
    Ok(())
}
