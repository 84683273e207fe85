//! `vfio-virtio`, `vfio-e1000e`: forwarding between two emulated devices through VFIO, in the guest of
//! `cargo xtask kernel`, one isolated CPU for the forwarder and one for everything else.
//!
//! ```text
//! CPU 1:  forwarder, every packet from one port to the other
//!            |      |
//!          port 0  port 1   two devices of a kind (xtask/src/kernel/nics.rs)
//!            |      |
//!            one hub        what one sends the other one receives
//! ```
//!
//! The forwarder sends `AROUND` packets from each port before it starts. From then on they go round,
//! both ways, for ever: there is no generator that could be the bottleneck, or take CPU time from either side, and
//! nothing waits but for the forwarder and the devices. Both sides send the same packets (those of testpmd's `txonly`)
//! with rings of the same sizes and leave them as they are; ours is the worker's loop ([`Turns`]) with its counters,
//! clock and the cross-connect, the peer is testpmd with `vfio-pci` and `--forward-mode=io`. Each takes as many packets
//! at a time as it does by default: testpmd 32, ours 64; testpmd with bursts of 64 is shown beside it.
//!
//! Two things are measured. The rate, of both directions together, includes what the emulated devices cost, which no
//! driver can change but by how it talks to them. Guest instructions a packet are those of the forwarder alone: QEMU
//! has no performance counters to offer, but with a clock that counts instructions the TSC is one. Both sides read it
//! before and after a turn and count turns that moved packets: testpmd's `record-core-cycles`, a turn of which is one
//! burst from one port to the other; and our loop, whose turn is both ports, counters included.

use crate::comparison::{BenchError, Comparison, Place, Sample, Target};
use crate::counted;
use crate::testpmd::{ForwardStats, PortTotals, Testpmd};
use isoplane::app::{App, PortId, Turn};
use isoplane::blocks::CrossConnect;
use isoplane::turns::{Turns, WorkerBlocks};
use isoplane_drivers::vfio::Host;
use isoplane_drivers::{LinkState, Opener, Port, Queue, TxQueue};
use isoplane_lab::Machine;
use isoplane_memory::stats::SegmentBuilder;
use isoplane_memory::{BATCH, Batch, Clock, FrameCache, Pool, PoolConfig};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Packets that go round in each direction; less than any ring holds, so none is lost.
const AROUND: usize = 128;
/// Packets that testpmd moves at a time, unless told otherwise.
const BURST: usize = 32;
/// Bytes of a packet, FCS not counted: testpmd's.
const BYTES: usize = 64;
/// How long a link may take to come up.
const LINK: Duration = Duration::from_secs(30);

/// Which devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nic {
    /// Virtio-net, modern, with packed rings on offer.
    Virtio,
    /// Intel 82574L.
    E1000e,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Packets a second.
    Rate,
    /// Guest instructions a packet.
    Instructions,
}

/// The comparison.
#[derive(Debug)]
pub struct Vfio(pub Nic, pub Measure);

/// What the worker's thread found out about itself.
#[derive(Default)]
struct Own {
    /// Ticks of turns that moved something.
    ticks: u64,
    packets: u64,
    /// Batches with something in them that a port received.
    bursts: u64,
}

/// The cross-connect, and how many batches it was given.
#[derive(Default)]
struct Counting(CrossConnect, u64);

impl App for Counting {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        self.1 += 1;
        self.0.packets(turn, from, batch);
    }
}

/// The packet that testpmd's `txonly` sends from port `from`: UDP from port 9 to port 9 between addresses for
/// benchmarks (RFC 2544).
fn packet(from: u8) -> [u8; BYTES] {
    let mut packet = [0; BYTES];
    packet[..6].copy_from_slice(&[2, 0, 0, 0, 0, from]);
    packet[6..14].copy_from_slice(&[2, 0, 0, 0, 1, from, 0x08, 0x00]);
    let (ip, udp) = ((BYTES - 14) as u8, (BYTES - 34) as u8);
    packet[14..34].copy_from_slice(&[0x45, 0, 0, ip, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2]);
    packet[34..42].copy_from_slice(&[0, 9, 0, 9, 0, udp, 0, 0]);
    let sum: u32 = packet[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[24..26].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    packet
}

/// Sends what is to go round from one port.
fn prime(queue: &mut Queue, from: u8, frames: &mut FrameCache) -> Result<(), String> {
    let pool = Arc::clone(frames.pool());
    let mut batch = Batch::new();
    for _ in 0..AROUND / BURST {
        frames.get_batch(&mut batch, BURST, BYTES as u16);
        pool.for_each_mut(&mut batch, |bytes| bytes.copy_from_slice(&packet(from)));
        if queue.tx.transmit(&mut batch) != BURST {
            frames.put_batch(&mut batch);
            return Err(format!("port {from} does not take {BURST} packets"));
        }
    }
    Ok(())
}

/// The worker: the loop that a worker process runs.
fn work(mut turns: Turns, clock: Clock, measure: Measure, stop: &AtomicBool) -> Result<Own, BenchError> {
    crate::pin(crate::FORWARDER_CPU)?;
    let (mut app, mut own) = (Counting::default(), Own::default());
    while !stop.load(Ordering::Relaxed) {
        let start = Clock::ticks();
        let report = turns.turn(&mut app, clock.to_nanos(start));
        own.packets += report.received as u64;
        if measure == Measure::Instructions && report.received != 0 {
            own.ticks += Clock::ticks() - start;
        }
    }
    own.bursts = app.1;
    let (queues, frames) = turns.into_parts();
    for queue in queues {
        queue.close();
    }
    drop(frames);
    Ok(own)
}

impl Vfio {
    fn failed(&self, error: impl std::fmt::Display) -> BenchError {
        BenchError::ours(self.name(), error)
    }

    /// How long it runs before it is measured, and while it is. Counted instructions take their time.
    fn times(&self) -> (Duration, Duration) {
        match self.1 {
            Measure::Rate => (Duration::from_millis(500), Duration::from_secs(2)),
            Measure::Instructions => (Duration::from_millis(20), Duration::from_millis(200)),
        }
    }

    /// The two devices, which VFIO has from now on: the guest ends with the run.
    fn devices(&self) -> Result<[String; 2], BenchError> {
        let mut machine = Machine::open().map_err(|e| self.failed(e))?;
        let ids = match self.0 {
            Nic::Virtio => ["virtio0", "virtio1"],
            Nic::E1000e => ["e1000e0", "e1000e1"],
        };
        let mut addresses = [String::new(), String::new()];
        for (id, address) in ids.iter().zip(&mut addresses) {
            *address = machine.address(id).map_err(|e| self.failed(e))?;
            Host::default().bind(address, false).map_err(|e| self.failed(e))?;
        }
        Ok(addresses)
    }

    /// Our sizes of RX and TX rings, which testpmd is given, too.
    fn rings(&self) -> &'static [&'static str] {
        match self.0 {
            Nic::Virtio => &["--rxd=256", "--txd=256"],
            Nic::E1000e => &["--rxd=512", "--txd=512"],
        }
    }

    /// What testpmd does with bursts of so many packets.
    fn testpmd(&self, burst: usize) -> Result<Sample, BenchError> {
        let addresses = self.devices()?;
        let eal = ["-a", &addresses[0], "-a", &addresses[1]];
        let bursts = format!("--burst={burst}");
        let own = [&["--forward-mode=io", &bursts, "--total-num-mbufs=8192"], self.rings()].concat();
        let mut testpmd = Testpmd::launch(crate::hugepages::available(), &eal, &own)?;
        if self.1 == Measure::Instructions {
            testpmd.say("set record-core-cycles on")?;
        }
        testpmd.forward(&format!("start tx_first {}", AROUND / burst))?;
        let (warm_up, measured) = self.times();
        std::thread::sleep(warm_up);
        testpmd.say("clear fwd stats all")?;
        let sum = |ports: &[PortTotals]| ports.iter().map(|port| port.tx).sum::<u64>();
        let (before, start) = (sum(&testpmd.totals(2)?), Instant::now());
        std::thread::sleep(measured);
        let (after, elapsed) = (sum(&testpmd.totals(2)?), start.elapsed());
        let mut forwarded = ForwardStats::default();
        if self.1 == Measure::Instructions {
            forwarded = testpmd.forward_stats()?;
        }
        // Afterwards, since counting them is work, too.
        testpmd.say("set record-core-cycles on")?;
        testpmd.say("set record-burst-stats on")?;
        testpmd.say("clear fwd stats all")?;
        std::thread::sleep(measured);
        let counted = testpmd.forward_stats()?;
        let rate = (after - before) as f64 / elapsed.as_secs_f64();
        let packets_a_burst = counted.packets as f64 / counted.bursts.max(1) as f64;
        Ok(self.sample(rate, forwarded.ticks as f64, forwarded.packets, packets_a_burst))
    }

    fn sample(&self, rate: f64, ticks: f64, packets: u64, packets_a_burst: f64) -> Sample {
        let mut beside = BTreeMap::from([("packets_per_burst".to_owned(), packets_a_burst)]);
        let rate = match self.1 {
            Measure::Rate => rate / 1e3,
            Measure::Instructions => {
                beside.insert("instructions_per_packet".to_owned(), ticks / packets as f64);
                packets as f64 * 1e3 / ticks
            }
        };
        Sample { rate, beside }
    }
}

/// Waits until packets can pass.
fn linked(ports: &[Box<dyn Port>]) -> bool {
    let deadline = Instant::now() + LINK;
    while ports.iter().any(|port| port.link() == LinkState::Down) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

impl Comparison for Vfio {
    fn name(&self) -> &'static str {
        match self.0 {
            Nic::Virtio => "vfio-virtio",
            Nic::E1000e => "vfio-e1000e",
        }
    }

    fn case(&self) -> &'static str {
        match self.1 {
            Measure::Rate => "rate",
            Measure::Instructions => "instr",
        }
    }

    fn peer_name(&self) -> &'static str {
        "dpdk-testpmd, vfio-pci, io"
    }

    fn unit(&self) -> &'static str {
        match self.1 {
            Measure::Rate => "kpackets/s",
            Measure::Instructions => "packets/kinstr",
        }
    }

    fn place(&self) -> Place {
        match self.1 {
            Measure::Rate => Place::Guest,
            Measure::Instructions => Place::Counted,
        }
    }

    fn target(&self) -> Option<Target> {
        Some(match self.1 {
            Measure::Rate => Target::AtLeast(1.2),
            Measure::Instructions => Target::MoreThan(1.0),
        })
    }

    fn packages(&self) -> &'static [&'static str] {
        &["dpdk-dev"]
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        if self.1 == Measure::Instructions {
            crate::pin(crate::FORWARDER_CPU)?;
            counted::check()?;
            crate::pin(crate::OTHER_CPU)?;
        }
        let addresses = self.devices()?;
        let pool = Pool::create(&PoolConfig::new("bench", 4096)).map_err(|e| self.failed(e))?;
        let mut opener = Opener::new(&pool);
        let mut ports = Vec::new();
        for address in &addresses {
            ports.push(opener.open(address, 1).map_err(|e| self.failed(e))?);
        }
        if !linked(&ports) {
            return Err(self.failed("no link"));
        }
        let mut frames = pool.cache("bench", 1024).map_err(|e| self.failed(e))?;
        let mut queues: Vec<Queue> = ports.iter_mut().filter_map(|port| port.take_queue(0)).collect();
        let mut segment = SegmentBuilder::default();
        let blocks = WorkerBlocks::declare(&mut segment, "worker0", &["port0", "port1"], &[]);
        let segment = segment.build("bench").map_err(|e| self.failed(e))?;
        let counters = segment.reader().map_err(|e| self.failed(e))?;
        let clock = Clock::tsc().map_err(|e| self.failed(e))?;
        for (from, queue) in (0..).zip(&mut queues) {
            prime(queue, from, &mut frames).map_err(|e| self.failed(e))?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, measure) = (Arc::clone(&stop), self.1);
        let worker = std::thread::spawn(move || {
            work(Turns::new(queues, frames, &segment, &blocks), clock, measure, &stopped)
        });
        let (warm_up, measured) = self.times();
        std::thread::sleep(warm_up);
        let (before, start) = (counters.total("tx_frames"), Instant::now());
        std::thread::sleep(measured);
        let (after, elapsed) = (counters.total("tx_frames"), start.elapsed());
        stop.store(true, Ordering::Relaxed);
        let own = worker.join().map_err(|_| self.failed("the worker panicked"))??;
        let rate = (after - before) as f64 / elapsed.as_secs_f64();
        Ok(self.sample(rate, own.ticks as f64, own.packets, own.packets as f64 / own.bursts.max(1) as f64))
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        let mut sample = self.testpmd(BURST)?;
        let wide = self.testpmd(BATCH)?;
        let (name, figure) = match self.1 {
            Measure::Rate => ("burst_64_kpackets_per_s", wide.rate),
            Measure::Instructions => ("burst_64_instructions_per_packet", 1e3 / wide.rate),
        };
        sample.beside.insert(name.to_owned(), figure);
        Ok(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::packet;

    #[test]
    fn packets_have_a_right_header_checksum() {
        let packet = packet(1);
        let sum: u32 =
            packet[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }
}
