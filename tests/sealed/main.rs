//! `sealed SCENARIO`: a worker makes turns with traffic under a seccomp filter that kills at any system
//! call, with an allocator that counts. `tests/no_syscalls.rs` runs it and looks at how it ended.
//!
//! The sealed worker is the main thread, which can end no more: another thread makes the traffic, kicks,
//! ends the process and prints `forwarded N turns N allocations N`.

mod logs;
mod seal;

use isoplane::app::{App, PortId, Turn};
use isoplane::blocks::CrossConnect;
use isoplane::turns::{Turns, WorkerBlocks};
use isoplane_drivers::memory::{MemoryConfig, MemoryPort};
use isoplane_drivers::null::{NullConfig, NullPort};
use isoplane_drivers::xdp::{XdpConfig, XdpPort};
use isoplane_drivers::{KickTarget, Port, Queue, RxQueue, TxQueue};
use isoplane_lab::veth::pair;
use isoplane_lab::{Namespace, PacketSocket, VethEnd};
use isoplane_memory::stats::{SegmentBuilder, SegmentReader};
use isoplane_memory::{Batch, HugePages, Kernel, Pool, PoolConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: seal::Counting = seal::Counting;

/// Longer than any of this takes; then something hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// What worker and traffic tell each other.
#[derive(Default)]
struct Shared {
    turns: AtomicU64,
    stop: AtomicBool,
    stopped: AtomicBool,
}

/// Makes the traffic; says how many frames the worker must have forwarded.
type Traffic = Box<dyn FnOnce(&Shared) -> u64 + Send>;

struct Scenario {
    queues: Vec<Queue>,
    traffic: Traffic,
    /// What must live as long as the scenario does.
    _keep: Vec<Box<dyn std::any::Any>>,
}

fn pool() -> Arc<Pool> {
    let mut config = PoolConfig::new("sealed", 8192);
    config.huge_pages = HugePages::Never;
    Pool::create(&config).expect("a pool")
}

fn queue(port: &mut dyn Port) -> Queue {
    port.take_queue(0).expect("a queue")
}

/// Two null ports: traffic without end.
fn null(pool: &Arc<Pool>) -> Scenario {
    let mut ports = ["null0", "null1"].map(|n| NullPort::open(pool, &NullConfig::new(n)).expect("a port"));
    Scenario {
        queues: ports.iter_mut().map(|port| queue(port)).collect(),
        traffic: Box::new(|shared| {
            let deadline = Instant::now() + PATIENCE;
            while shared.turns.load(Ordering::Acquire) < 200_000 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            200_000 * 2 * 64
        }),
        _keep: Vec::new(),
    }
}

/// Two memory links; the other ends are another thread's.
fn memory(pool: &Arc<Pool>) -> Scenario {
    let link = |name: &str| MemoryPort::pair(pool, &MemoryConfig::new(name), "peer").expect("a link");
    let ((mut a, mut far_a), (mut b, mut far_b)) = (link("a"), link("b"));
    let queues = vec![queue(&mut a), queue(&mut b)];
    let mut far = [queue(&mut far_a), queue(&mut far_b)];
    let mut frames = pool.cache("peer", 1024).expect("frames");
    Scenario {
        queues,
        traffic: Box::new(move |_| {
            const FRAMES: usize = 100_000;
            let deadline = Instant::now() + PATIENCE;
            let (mut batch, mut sent, mut back) = (Batch::new(), 0, 0);
            while back < FRAMES && Instant::now() < deadline {
                frames.get_batch(&mut batch, 32.min(FRAMES - sent).min(256 - (sent - back)), 60);
                sent += far[0].tx.transmit(&mut batch);
                frames.put_batch(&mut batch);
                far[1].rx.receive(&mut frames, &mut batch);
                back += batch.len();
                frames.put_batch(&mut batch);
                for one in &mut far {
                    one.tx.reclaim(&mut frames);
                }
                // Gives frames back to the worker's side, as every receiver does.
                far[0].rx.receive(&mut frames, &mut batch);
                frames.put_batch(&mut batch);
            }
            FRAMES as u64
        }),
        _keep: vec![Box::new(a), Box::new(b), Box::new(far_a), Box::new(far_b)],
    }
}

/// Two AF_XDP ports on veth pairs with the kernel at the other ends, and a kicker that is not the worker.
fn afxdp(pool: &Arc<Pool>) -> Scenario {
    let space = || -> &'static Namespace { Box::leak(Box::new(Namespace::new().expect("a namespace"))) };
    let (ours, theirs) = (space(), space());
    let wire = |near: &str, far: &str| {
        pair(&VethEnd::new(ours, near), &VethEnd::new(theirs, far)).expect("a veth pair").1
    };
    let (far_a, far_b) = (wire("a", "far-a"), wire("b", "far-b"));
    let inside = ours.enter().expect("our namespace");
    let mut ports =
        ["a", "b"].map(|name| XdpPort::open(pool, &XdpConfig::new(name).rings(256, 256)).expect("a port"));
    inside.leave().expect("back");
    let queues = ports.iter_mut().map(|port| queue(port)).collect();
    let mut kicks: Vec<Box<dyn KickTarget>> =
        ports.iter().map(|port| port.kick_target(0).expect("something to kick")).collect();
    let (from, mut to) =
        (PacketSocket::open(&far_a).expect("a socket"), PacketSocket::open(&far_b).expect("a socket"));
    Scenario {
        queues,
        traffic: Box::new(move |_| {
            const WINDOW: u64 = 16;
            const FRAMES: u64 = 20_000;
            let kernel = Kernel::outside_isolation();
            let mut frame = [0_u8; 64];
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
            frame[6..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
            let deadline = Instant::now() + PATIENCE;
            let mut back = 0;
            while back < FRAMES && Instant::now() < deadline {
                for number in back..back + WINDOW {
                    frame[14..22].copy_from_slice(&number.to_be_bytes());
                    from.send(&frame).expect("the kernel sends");
                }
                let window = back + WINDOW;
                while back < window && Instant::now() < deadline {
                    for kick in &mut kicks {
                        kick.poll(&kernel).expect("a kick");
                    }
                    while let Some(got) = to.receive(Duration::ZERO).expect("the kernel receives") {
                        if got.get(12..14) != Some(&[0x88, 0xb5]) {
                            continue;
                        }
                        assert_eq!(got[14..22], back.to_be_bytes(), "in order and whole");
                        back += 1;
                    }
                }
            }
            FRAMES
        }),
        _keep: ports.into_iter().map(|port| Box::new(port) as Box<dyn std::any::Any>).collect(),
    }
}

/// An app that does what a worker must not, at its thousandth turn.
struct Culprit(u64, fn());

impl App for Culprit {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        CrossConnect.packets(turn, from, batch);
    }
    fn turn(&mut self, _turn: &mut Turn<'_>) {
        self.0 += 1;
        if self.0 == 1000 {
            (self.1)();
        }
    }
}

/// The worker: seals itself and makes turns, until it is told to stop and for ever after.
fn work(mut turns: Turns, mut app: impl App, shared: &Shared) -> ! {
    seal::seal(&[]).expect("a seccomp filter");
    while !shared.stop.load(Ordering::Acquire) {
        // Any number will do for the time: none of these apps looks at it.
        let now = shared.turns.fetch_add(1, Ordering::Release);
        turns.turn(&mut app, now);
    }
    shared.stopped.store(true, Ordering::Release);
    loop {
        std::hint::spin_loop();
    }
}

fn drive(traffic: Traffic, counters: &SegmentReader, shared: &Shared) -> i32 {
    let expected = traffic(shared);
    shared.stop.store(true, Ordering::Release);
    let deadline = Instant::now() + PATIENCE;
    while !shared.stopped.load(Ordering::Acquire) {
        if Instant::now() > deadline {
            eprintln!("the worker does not stop");
            return 1;
        }
        std::thread::yield_now();
    }
    let forwarded = counters.total("tx_frames");
    let turns = shared.turns.load(Ordering::Acquire);
    println!("forwarded {forwarded} turns {turns} allocations {}", seal::allocations());
    if forwarded < expected {
        eprintln!("{forwarded} frames forwarded, {expected} expected");
        return 1;
    }
    0
}

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    if name == "logs" {
        logs::main();
    }
    let pool = pool();
    let scenario = match name.as_str() {
        "memory" => memory(&pool),
        "afxdp" => afxdp(&pool),
        _ => null(&pool),
    };
    let mut segment = SegmentBuilder::default();
    let blocks = WorkerBlocks::declare(&mut segment, "worker0", &["port0", "port1"], &[]);
    let segment = segment.build("sealed").expect("a segment");
    let counters = segment.reader().expect("a reader");
    let frames = pool.cache("worker", 1024).expect("frames");
    let turns = Turns::new(scenario.queues, frames, &segment, &blocks);
    let shared = Arc::new(Shared::default());
    let theirs = Arc::clone(&shared);
    std::thread::spawn(move || {
        // A panic of this thread must not leave a worker that spins for ever.
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drive(scenario.traffic, &counters, &theirs)
        }));
        std::process::exit(code.unwrap_or(101));
    });
    match name.as_str() {
        "null" | "memory" | "afxdp" => work(turns, CrossConnect, &shared),
        "enters-the-kernel" => {
            let culprit = Culprit(0, || {
                nix::unistd::getppid();
            });
            work(turns, culprit, &shared)
        }
        "allocates" => {
            let culprit = Culprit(0, || drop(std::hint::black_box(Box::new(1_u64))));
            work(turns, culprit, &shared)
        }
        _ => {
            eprintln!("no scenario {name:?}");
            std::process::exit(2)
        }
    }
}
