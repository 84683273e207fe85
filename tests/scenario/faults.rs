//! Workers, zygote and program die; nothing is left behind and no frame is lost.

use crate::forwarding::{cross_connect, pass};
use crate::peer::{Peer, kill_worker, pool, wait_for};
use isoplane::blocks::CrossConnect;
use isoplane::drivers::memory::{MemoryConfig, MemoryPort};
use isoplane::memory::{Batch, Region};
use isoplane::{App, Dataplane, Failure, Idle, Placement, PortId, Restart, Turn, Worker, WorkerState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;

/// Receives whatever still comes until the worker has been idle for a while.
fn settle(peer: &mut Peer) {
    for _ in 0..200 {
        while peer.receive() != 0 {}
        std::thread::sleep(Duration::from_micros(500));
    }
}

pub(crate) fn worker_killed() {
    let (pool, running, mut left, mut right) = cross_connect(Placement::Process);
    pass(&mut left, &mut right, 1000);
    kill_worker(&running);
    // Nothing was in the dead worker's hands, so nothing is missing, and its successor forwards.
    pass(&mut left, &mut right, 1000);
    assert!(right.received.iter().copied().eq(0..2000));
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.workers[0].restarts, 1);
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// Kills the worker again and again while it forwards, wherever it happens to be.
pub(crate) fn worker_killed_in_many_places() {
    let (pool, running, mut left, mut right) = cross_connect(Placement::Process);
    for round in 0..30u64 {
        // Keep it busy, and kill it after a number of frames that differs from round to round.
        for _ in 0..(round * 7) % 23 + 1 {
            left.send(32);
            right.send(17);
            right.receive();
            left.receive();
        }
        let pid = running.worker_pid(0).expect("a process");
        let before = running.restarts(0);
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).expect("kill");
        wait_for("the worker to be started again", || {
            left.send(32);
            right.receive();
            running.restarts(0) > before && running.state(0) == Some(WorkerState::Running)
        });
    }
    settle(&mut right);
    settle(&mut left);
    for peer in [&left, &right] {
        let got = &peer.received;
        assert!(got.windows(2).all(|pair| pair[0] < pair[1]), "out of order or twice");
    }
    // A dead worker takes at most what it had in its hands with it: two batches.
    let lost = left.sent - right.received.len() as u64;
    assert!(lost <= 30 * 2 * 64 + 64, "{lost} of {} frames lost", left.sent);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// Forwards, but panics on a frame whose number is a multiple of 100.
struct Touchy;

impl App for Touchy {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for frame in batch.drain() {
            let bytes = turn.pool().bytes(&frame);
            let number = bytes.get(14..22).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
            assert!(!(number + 1).is_multiple_of(100), "number {number} frightens me");
            turn.send(PortId(from.0 ^ 1), frame);
        }
    }
}

pub(crate) fn worker_panics() {
    for placement in [Placement::Process, Placement::Thread] {
        let pool = pool("scenario", 4096);
        let (a, mut left) = Peer::new(&pool, "left");
        let (b, mut right) = Peer::new(&pool, "right");
        let mut plane = Dataplane::builder("scenario");
        let (a, b) = (plane.port(a), plane.port(b));
        plane.placement(placement);
        plane.worker(Worker::new("touchy").idle(Idle::Yield).queue(a, 0).queue(b, 0), |_| Touchy);
        let running = plane.launch().expect("launch");
        for panics in 1..=3 {
            pass(&mut left, &mut right, 99);
            while left.send(1) == 0 {}
            wait_for("the worker to be started again", || running.restarts(0) == Some(panics));
        }
        let report = running.stop();
        let end = &report.workers[0];
        assert_eq!((end.restarts, end.state), (3, WorkerState::Stopped), "{report:?}");
        let words = end.last_words.clone().unwrap_or_default();
        assert!(words.contains("frightens me"), "{words:?}");
        if placement == Placement::Process {
            assert!(words.contains("faults.rs:"), "no place in {words:?}");
        }
        left.close();
        right.close();
        assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
    }
}

pub(crate) fn worker_given_up() {
    let pool = pool("scenario", 4096);
    let (a, mut left) = Peer::new(&pool, "left");
    let (b, mut right) = Peer::new(&pool, "right");
    let mut plane = Dataplane::builder("scenario");
    let (a, b) = (plane.port(a), plane.port(b));
    plane.restart(Restart::Never);
    plane.worker(Worker::new("touchy").idle(Idle::Yield).queue(a, 0).queue(b, 0), |_| Touchy);
    let running = plane.launch().expect("launch");
    assert_eq!(running.failure(), None);
    pass(&mut left, &mut right, 99);
    while left.send(1) == 0 {}
    wait_for("the dataplane to fail", || running.failure().is_some());
    wait_for("the last words", || match running.failure() {
        Some(Failure::NoWorkers { last_words }) => last_words.contains("frightens me"),
        _ => false,
    });
    let report = running.stop();
    assert_eq!(report.workers[0].state, WorkerState::GivenUp);
    assert!(!report.is_clean());
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

pub(crate) fn zygote_killed() {
    let (pool, running, mut left, mut right) = cross_connect(Placement::Process);
    pass(&mut left, &mut right, 1000);
    let worker = running.worker_pid(0).expect("a process");
    kill(Pid::from_raw(running.zygote_pid().expect("a process") as i32), Signal::SIGKILL).expect("kill");
    wait_for("the failure to be seen", || running.failure() == Some(Failure::ZygoteDied));
    let report = running.stop();
    assert!(report.zygote_died && !report.is_clean(), "{report:?}");
    wait_for("the worker to be gone", || {
        let stat = std::fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z")
    });
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// Prints the process ids and forwards until somebody kills it.
pub(crate) fn run_until_killed() {
    let (_pool, running, mut left, mut right) = cross_connect(Placement::Process);
    pass(&mut left, &mut right, 100);
    println!("{} {}", running.zygote_pid().expect("zygote"), running.worker_pid(0).expect("worker"));
    loop {
        pass(&mut left, &mut right, 100);
    }
}

/// Never ends the turn in which a frame arrives.
struct Stuck;

impl App for Stuck {
    fn packets(&mut self, _: &mut Turn<'_>, _: PortId, _: &mut Batch) {
        loop {
            std::hint::spin_loop();
        }
    }
}

/// A worker that hangs is killed: stopping ends all the same, and every frame is back.
pub(crate) fn worker_hangs() {
    let pool = pool("scenario", 4096);
    let (a, mut left) = Peer::new(&pool, "left");
    let mut plane = Dataplane::builder("stuck");
    let a = plane.port(a);
    plane.worker(Worker::new("stuck").queue(a, 0), |_| Stuck);
    let running = plane.launch().expect("launch");
    let turns = |running: &isoplane::Running| running.statistics().total("turns");
    assert_eq!(left.send(10), 10);
    wait_for("the worker to hang", || {
        let before = turns(&running);
        std::thread::sleep(Duration::from_millis(20));
        turns(&running) == before
    });
    let report = running.stop();
    assert!(report.forced && !report.is_clean(), "{report:?}");
    left.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// One worker is killed again and again under load; the other one loses nothing.
pub(crate) fn one_dies_the_other_forwards() {
    let pool = pool("scenario", 8192);
    let mut plane = Dataplane::builder("two");
    let often = Duration::from_millis(1);
    plane.restart(Restart::BackOff { first: often, longest: often, limit: 1000 });
    let mut peers = Vec::new();
    for name in ["dies", "lives"] {
        let ((a, left), (b, right)) = (Peer::new(&pool, "left"), Peer::new(&pool, "right"));
        let (a, b) = (plane.port(a), plane.port(b));
        plane.worker(Worker::new(name).idle(Idle::Yield).queue(a, 0).queue(b, 0), |_| CrossConnect);
        peers.push((left, right));
    }
    let running = plane.launch().expect("launch");
    let (mut living, mut dying) = (peers.pop().expect("two"), peers.pop().expect("two"));
    for _ in 0..10 {
        dying.0.send(64);
        let starts = running.restarts(0);
        let pid = running.worker_pid(0).expect("a process");
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).expect("kill");
        pass(&mut living.0, &mut living.1, 5000);
        wait_for("the worker to be started again", || {
            running.restarts(0) > starts && running.state(0) == Some(WorkerState::Running)
        });
        dying.1.receive();
    }
    assert!(living.1.received.iter().copied().eq(0..50_000), "the other worker lost or reordered frames");
    assert_eq!(running.restarts(1), Some(0));
    settle(&mut dying.1);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    for peer in [&mut living.0, &mut living.1, &mut dying.0, &mut dying.1] {
        peer.close();
    }
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// A peer that writes impossible indices and descriptors into the link under a running worker: the lies
/// are counted where another process sees them, and the worker goes on.
pub(crate) fn peer_lies() {
    let pool = pool("scenario", 4096);
    let offered = MemoryPort::offer(&pool, &MemoryConfig::new("left")).expect("port");
    let link = offered.link_fd().try_clone_to_owned().expect("dup");
    let mut plane = Dataplane::builder("lies");
    let a = plane.port(offered);
    plane.worker(Worker::new("w0").idle(Idle::Yield).queue(a, 0), |_| CrossConnect);
    let running = plane.launch().expect("launch");
    let region = Region::from_fd(link, true).expect("the link");
    let word = |at: usize| region.slice::<u32>(at, 1).expect("inside the link");
    let magic = u32::from_be_bytes(*b"IRNG");
    // A producer far ahead of every consumer, in all rings of the link.
    for at in (0..region.len() - isoplane::memory::ring::HEADER_BYTES).step_by(64) {
        // SAFETY: inside the mapping and aligned; the worker reads these words as atomics.
        #[allow(unsafe_code, reason = "lying to the worker")]
        unsafe {
            if word(at).read_volatile() == magic {
                word(at + 128).write_volatile(0x8000_0000);
            }
        }
    }
    wait_for("the lies to be counted", || running.statistics().total("bad_descriptors") > 0);
    let turns = running.statistics().total("turns");
    wait_for("the worker to go on", || running.statistics().total("turns") > turns + 1000);
    assert_eq!(running.restarts(0), Some(0));
    drop(running.stop());
}
