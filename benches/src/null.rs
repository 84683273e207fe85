//! `null`: MAC swap between two null ports, 64-byte packets, batches as each side likes them, one CPU.
//!
//! What is compared is everything that a worker does itself for a packet: take a frame, look at its
//! bytes and change them, send it, take it back. Ours is the worker's own loop ([`Turns`]) with its
//! counters and clock; the peer is testpmd with two `net_null` ports, which like ours hand out and take
//! back buffers without touching them. Counted are the packets sent, on both ports together, for each
//! second of the forwarder's CPU time: the same as wall time on an idle machine, and fair on a busy one.

use crate::comparison::{BenchError, Comparison, Sample};
use crate::testpmd::Testpmd;
use isoplane::app::{App, PortId, Turn};
use isoplane::turns::{Turns, WorkerBlocks};
use isoplane_drivers::null::{NullConfig, NullPort};
use isoplane_drivers::{Port, Queue};
use isoplane_memory::stats::{Segment, SegmentBuilder};
use isoplane_memory::{Batch, Clock, Pool, PoolConfig};
use std::time::{Duration, Instant};

/// How long each side is measured.
const MEASURED: Duration = Duration::from_secs(2);
/// And how long it runs before.
const WARM_UP: Duration = Duration::from_millis(300);

/// Swaps source and destination address and sends the packet out of the other port.
#[derive(Debug)]
pub struct MacSwap;

/// Swaps the addresses of every packet.
#[inline(always)]
fn swap(pool: &Pool, batch: &mut Batch) {
    pool.for_each_mut(batch, |packet| {
        // With the four bytes behind them the addresses are one vector register.
        if let Some(header) = packet.first_chunk_mut::<16>() {
            let [a, b, c, d, e, f, g, h]: [u16; 8] = bytemuck::cast(*header);
            *header = bytemuck::cast([d, e, f, a, b, c, g, h]);
        }
    });
}

/// As [`swap`], where one instruction shuffles a register; the peer is built for such CPUs only.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "ssse3")]
fn swap_ssse3(pool: &Pool, batch: &mut Batch) {
    use std::arch::x86_64::{__m128i, _mm_setr_epi8, _mm_shuffle_epi8};
    let order = _mm_setr_epi8(6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 12, 13, 14, 15);
    pool.for_each_mut(batch, |packet| {
        if let Some(header) = packet.first_chunk_mut::<16>() {
            let both: __m128i = bytemuck::cast(*header);
            *header = bytemuck::cast(_mm_shuffle_epi8(both, order));
        }
    });
}

impl App for MacSwap {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("ssse3") {
            // SAFETY: the CPU was just asked.
            #[allow(unsafe_code, reason = "calling a function for the CPU that there is")]
            unsafe {
                swap_ssse3(turn.pool(), batch);
            }
            return turn.send_all(PortId(from.0 ^ 1), batch);
        }
        swap(turn.pool(), batch);
        turn.send_all(PortId(from.0 ^ 1), batch);
    }
}

/// Two null ports and the worker's loop over them.
///
/// # Errors
/// See [`BenchError`].
pub fn worker(chunks: u32) -> Result<(Turns, Segment), BenchError> {
    let failed = |e: &dyn std::fmt::Display| BenchError::ours("null", e);
    // Chunks as everywhere, but packets short enough for all sixteen colours: 128 of them are in flight.
    let config = PoolConfig { max_frame: 960, ..PoolConfig::new("bench", chunks) };
    let pool = Pool::create(&config).map_err(|e| failed(&e))?;
    let frames = pool.cache("bench", chunks).map_err(|e| failed(&e))?;
    let mut queues: Vec<Queue> = Vec::new();
    for name in ["null0", "null1"] {
        let mut port = NullPort::open(&pool, &NullConfig::new(name)).map_err(|e| failed(&e))?;
        queues.extend(port.take_queue(0));
    }
    let mut segment = SegmentBuilder::default();
    let blocks = WorkerBlocks::declare(&mut segment, "worker0", &["null0", "null1"], &[]);
    let segment = segment.build("bench").map_err(|e| failed(&e))?;
    let turns = Turns::new(queues, frames, &segment, &blocks);
    Ok((turns, segment))
}

/// The comparison.
#[derive(Debug)]
pub struct Null;

impl Comparison for Null {
    fn name(&self) -> &'static str {
        "null"
    }

    fn peer_name(&self) -> &'static str {
        "dpdk-testpmd, net_null, macswap, burst 32"
    }

    fn unit(&self) -> &'static str {
        "Mpackets/s"
    }

    fn packages(&self) -> &'static [&'static str] {
        &["dpdk-dev"]
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        let failed = |e: &dyn std::fmt::Display| BenchError::ours("null", e);
        crate::pin(crate::FORWARDER_CPU).map_err(|e| failed(&e))?;
        let clock = Clock::tsc().map_err(|e| failed(&e))?;
        let (mut turns, segment) = worker(2048)?;
        let counters = segment.reader().map_err(|e| failed(&e))?;
        let mut app = MacSwap;
        let mut turn_for = |time: Duration| {
            let (before, start) = (counters.total("tx_frames"), Instant::now());
            while start.elapsed() < time {
                for _ in 0..4096 {
                    turns.turn(&mut app, clock.nanos());
                }
            }
            counters.total("tx_frames") - before
        };
        turn_for(WARM_UP);
        let start = crate::cpu_time(std::process::id())?;
        let packets = turn_for(MEASURED);
        let used = crate::cpu_time(std::process::id())? - start;
        Ok(Sample { rate: packets as f64 / used.as_secs_f64() / 1e6, ..Sample::default() })
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        let eal = ["--vdev=net_null0,size=64", "--vdev=net_null1,size=64"];
        let own = ["--forward-mode=macswap", "--burst=32", "--total-num-mbufs=8192"];
        let mut testpmd = Testpmd::start(crate::hugepages::available(), &eal, &own)?;
        std::thread::sleep(WARM_UP);
        let sum = |ports: &[crate::testpmd::PortTotals]| ports.iter().map(|p| p.tx).sum::<u64>();
        // The command line's own share of the CPU time is well below a thousandth.
        let (before, start) = (testpmd.totals(2)?, testpmd.cpu_time()?);
        std::thread::sleep(MEASURED);
        let (after, end) = (testpmd.totals(2)?, testpmd.cpu_time()?);
        let packets = sum(&after).saturating_sub(sum(&before));
        Ok(Sample { rate: packets as f64 / (end - start).as_secs_f64() / 1e6, ..Sample::default() })
    }
}
