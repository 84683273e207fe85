//! Frames cross a worker, in order and all of them; stopping loses none.

use crate::peer::{Peer, pool, wait_for};
use isoplane::blocks::{Bridge, BridgeConfig, CrossConnect};
use isoplane::drivers::LinkState;
use isoplane::drivers::memory::{MemoryConfig, MemoryPort};
use isoplane::memory::stats::Field;
use isoplane::memory::{Batch, Pool};
use isoplane::{App, Dataplane, DropReason, Idle, Placement, PortId, Restart, Running, Turn, Worker};
use std::sync::Arc;
use std::time::Duration;

/// A cross-connect between two peers, in a process of its own.
pub(crate) fn cross_connect(placement: Placement) -> (Arc<Pool>, Running, Peer, Peer) {
    let pool = pool("scenario", 4096);
    let (a, left) = Peer::new(&pool, "left");
    let (b, right) = Peer::new(&pool, "right");
    let mut plane = Dataplane::builder("scenario");
    let (a, b) = (plane.port(a), plane.port(b));
    // Tests kill on purpose, more often than a worker that keeps dying by itself is tolerated.
    let often = Duration::from_millis(1);
    plane.restart(Restart::BackOff { first: often, longest: often, limit: 1000 });
    plane.placement(placement);
    let worker = Worker::new("w0").frames(1024).idle(Idle::Yield).queue(a, 0).queue(b, 0);
    plane.worker(worker, |_| CrossConnect);
    let running = plane.launch().expect("launch");
    (pool, running, left, right)
}

/// Frames on their way at a time: fewer than any ring on it holds, so that none can be full.
const WINDOW: u64 = 128;

/// Sends `n` frames and receives them at the other end, a few at a time.
pub(crate) fn pass(left: &mut Peer, right: &mut Peer, n: u64) {
    let (first, before) = (left.sent, right.received.len() as u64);
    wait_for("frames to cross the worker", || {
        let arrived = right.received.len() as u64 - before;
        let sent = left.sent - first;
        left.send((n - sent).min(WINDOW.saturating_sub(sent.saturating_sub(arrived))) as usize);
        right.receive();
        right.received.len() as u64 - before >= n
    });
}

fn check_end(pool: &Pool, running: Running, peers: [&mut Peer; 2]) {
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    for peer in peers {
        peer.close();
    }
    assert_eq!(pool.in_depot(), pool.chunks(), "frames are missing: {report:?}, {:?}", pool.census());
}

pub(crate) fn forwards_in_order() {
    for placement in [Placement::Process, Placement::Thread] {
        let (pool, running, mut left, mut right) = cross_connect(placement);
        pass(&mut left, &mut right, 20_000);
        pass(&mut right, &mut left, 20_000);
        for peer in [&left, &right] {
            assert!(peer.received.iter().copied().eq(0..20_000), "out of order or twice");
        }
        let statistics = running.statistics();
        assert_eq!(statistics.total("rx_frames"), 40_000);
        assert_eq!(statistics.total("tx_frames"), 40_000);
        assert_eq!(statistics.total("tx_bytes"), 40_000 * 64);
        check_end(&pool, running, [&mut left, &mut right]);
    }
}

/// Stopping while frames arrive: it ends within a second, and whatever did not get through is in a
/// ring, not lost.
pub(crate) fn stops_under_load() {
    let (pool, running, mut left, mut right) = cross_connect(Placement::Process);
    pass(&mut left, &mut right, 1000);
    while left.send(32) != 0 {}
    // Clean means that nobody was killed, so it ended within the 0.7 s that it is given.
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    while right.receive() != 0 {}
    assert!(right.received.iter().copied().eq(0..right.received.len() as u64), "out of order or twice");
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

pub(crate) fn stops_on_sigterm() {
    let (pool, running, mut left, mut right) = cross_connect(Placement::Process);
    pass(&mut left, &mut right, 100);
    let pids = [running.zygote_pid(), running.worker_pid(0)].map(|pid| pid.expect("a process"));
    let me = nix::unistd::getpid();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        nix::sys::signal::kill(me, nix::sys::signal::Signal::SIGTERM).expect("kill");
    });
    let report = running.run_until_signal().expect("signals");
    killer.join().expect("killer");
    assert!(report.is_clean(), "{report:?}");
    for pid in pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "{pid} is still there");
    }
    left.close();
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks());
}

/// Two workers, each with an outside port, joined by a memory link: frames change hands between
/// processes and each worker's number of frames stays what it was.
pub(crate) fn two_workers_joined() {
    let pool = pool("scenario", 8192);
    let (a, mut left) = Peer::new(&pool, "left");
    let (b, mut right) = Peer::new(&pool, "right");
    let (near, far) = MemoryPort::pair(&pool, &MemoryConfig::new("near"), "far").expect("memory port");
    let mut plane = Dataplane::builder("joined");
    let (a, b, near, far) = (plane.port(a), plane.port(b), plane.port(near), plane.port(far));
    let worker = |name| Worker::new(name).idle(Idle::Yield);
    plane.worker(worker("w0").queue(a, 0).queue(near, 0), |_| CrossConnect);
    plane.worker(worker("w1").queue(far, 0).queue(b, 0), |_| CrossConnect);
    let running = plane.launch().expect("launch");
    pass(&mut left, &mut right, 20_000);
    pass(&mut right, &mut left, 20_000);
    assert!(left.received.iter().copied().eq(0..20_000));
    assert!(right.received.iter().copied().eq(0..20_000));
    let drops: u64 = DropReason::NAMES.iter().map(|name| running.statistics().total(name)).sum();
    assert_eq!(drops, 0);
    check_end(&pool, running, [&mut left, &mut right]);
}

/// Reports what it knows of its port's link in a gauge.
struct LinkGauge;

impl App for LinkGauge {
    fn packets(&mut self, _: &mut Turn<'_>, _: PortId, _: &mut Batch) {}

    fn turn(&mut self, turn: &mut Turn<'_>) {
        turn.gauge(0, turn.link(PortId(0)) as u64);
    }
}

/// The watcher tells the apps when the other end of a port goes away.
pub(crate) fn app_sees_the_link() {
    let pool = pool("scenario", 4096);
    let (a, mut left) = Peer::new(&pool, "left");
    let mut plane = Dataplane::builder("links");
    let a = plane.port(a);
    let worker = Worker::new("w0").idle(Idle::Yield).queue(a, 0).counters(&[Field::gauge("seen")]);
    plane.worker(worker, |_| LinkGauge);
    let running = plane.launch().expect("launch");
    wait_for("the app to see the link up", || running.statistics().total("seen") == LinkState::Up as u64);
    left.close();
    wait_for("the app to see it gone", || running.statistics().total("seen") == LinkState::Gone as u64);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// A bridge learns a station, and forgets it when the watcher sees its port go away.
pub(crate) fn bridge_follows_links() {
    let pool = pool("scenario", 4096);
    let (a, mut left) = Peer::new(&pool, "left");
    let (b, mut right) = Peer::new(&pool, "right");
    let mut plane = Dataplane::builder("bridged");
    let (a, b) = (plane.port(a), plane.port(b));
    let worker = Worker::new("w0").idle(Idle::Yield).queue(a, 0).queue(b, 0).counters(&Bridge::FIELDS);
    plane.worker(worker, |_| Bridge::new(&BridgeConfig::new(2)).expect("a bridge of two ports"));
    let running = plane.launch().expect("launch");
    pass(&mut left, &mut right, 1000);
    assert!(right.received.iter().copied().eq(0..1000));
    wait_for("the bridge to learn", || running.statistics().total("stations") == 1);
    left.close();
    wait_for("the bridge to forget", || running.statistics().total("flushed") == 1);
    assert_eq!(running.statistics().total("stations"), 0);
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    right.close();
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}
