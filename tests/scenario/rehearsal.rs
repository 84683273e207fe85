//! What is left of a rehearsal in a worker that goes on to real traffic: nothing but touched memory.

use crate::forwarding::pass;
use crate::peer::{Peer, kill_worker, pool, wait_for};
use caps::{CapSet, Capability};
use isoplane::blocks::{Bridge, BridgeConfig};
use isoplane::isolation::Cause;
use isoplane::memory::stats::Field;
use isoplane::memory::{Batch, Pool};
use isoplane::{App, Dataplane, DropReason, Idle, PortId, Running, Turn, Worker, WorkerIsolation};
use nix::sys::resource::{Resource, setrlimit};
use std::sync::Arc;

/// A worker between peers, one a port.
fn launch<A: App + 'static>(
    ports: usize,
    isolation: Option<WorkerIsolation>,
    fields: &[Field],
    app: impl Fn() -> A + Send + 'static,
) -> (Arc<Pool>, Running, Vec<Peer>) {
    let pool = pool("scenario", 4096);
    let mut plane = Dataplane::builder("rehearsed");
    let mut worker = Worker::new("w0").idle(Idle::Yield).counters(fields);
    let mut peers = Vec::new();
    for n in 0..ports {
        let (port, peer) = Peer::new(&pool, &format!("port{n}"));
        worker = worker.queue(plane.port(port), 0);
        peers.push(peer);
    }
    plane.isolation(isolation).worker(worker, move |_| app());
    let running = plane.launch().expect("launch");
    (pool, running, peers)
}

fn end(pool: &Pool, running: Running, peers: Vec<Peer>) {
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    peers.into_iter().for_each(|mut peer| peer.close());
    assert_eq!(pool.in_depot(), pool.chunks(), "frames are missing: {report:?}, {:?}", pool.census());
}

fn packets_counted(running: &Running) -> Vec<(&'static str, u64)> {
    let names = ["rx_frames", "rx_bytes", "tx_frames", "tx_bytes", "busy_turns", "kicks", "bad_descriptors"];
    let bridge = Bridge::FIELDS.map(|field| field.name);
    let all = names.into_iter().chain(DropReason::NAMES).chain(bridge);
    let statistics = running.statistics();
    all.map(|name| (name, statistics.total(name))).filter(|(_, n)| *n != 0).collect()
}

/// A bridge that was rehearsed starts with nothing counted and nobody known, the first time and after a
/// restart, and each frame is accounted for.
pub(crate) fn bridge_starts_as_new() {
    let bridge = || Bridge::new(&BridgeConfig::new(3)).expect("a bridge of three ports");
    let (pool, running, mut peers) = launch(3, Some(WorkerIsolation::default()), &Bridge::FIELDS, bridge);
    assert_eq!(packets_counted(&running), []);
    let statistics = running.statistics();
    for restarts in 0..3_u64 {
        let before = ["learned", "flooded", "copies", "unicast"].map(|name| statistics.total(name));
        wait_for("the first packet to be sent", || peers[0].send(1) == 1);
        wait_for("the first packet to be flooded", || {
            peers[1..].iter_mut().fold(true, |all, peer| {
                peer.receive();
                all && peer.received.last() == Some(&restarts)
            })
        });
        wait_for("the station to be counted", || statistics.total("learned") > before[0]);
        let after = ["learned", "flooded", "copies", "unicast"].map(|name| statistics.total(name));
        assert_eq!(after, [before[0] + 1, before[1] + 1, before[2] + 1, before[3]]);
        assert_eq!(statistics.total("stations"), 1, "only that of the first packet");
        kill_worker(&running);
    }
    assert!(peers[1..].iter().all(|peer| peer.received == [0, 1, 2]), "nothing but real packets arrived");
    assert_eq!(peers[0].receive(), 0);
    end(&pool, running, peers);
}

/// Publishes how many packets it saw in its life, rehearsals included.
struct Witness {
    wants: bool,
    seen: u64,
}

impl App for Witness {
    fn packets(&mut self, turn: &mut Turn<'_>, _: PortId, batch: &mut Batch) {
        self.seen += batch.len() as u64;
        turn.drop_all(batch, DropReason::Policy);
    }
    fn turn(&mut self, turn: &mut Turn<'_>) {
        turn.gauge(0, self.seen);
        turn.count(1, 1);
    }
    fn wants_rehearsal(&self) -> bool {
        self.wants
    }
}

/// Only an app that asks for it sees synthetic packets, and only in a worker that is isolated.
pub(crate) fn only_on_request() {
    for (wants, isolated) in [(false, true), (true, false), (true, true)] {
        let isolation = isolated.then(WorkerIsolation::default);
        let fields = [Field::gauge("seen"), Field::counter("app_turns")];
        let (pool, running, peers) = launch(2, isolation, &fields, move || Witness { wants, seen: 0 });
        let statistics = running.statistics();
        wait_for("turns", || statistics.total("app_turns") > 0);
        assert_eq!(statistics.total("seen") > 0, wants && isolated, "wants {wants}, isolated {isolated}");
        assert_eq!(packets_counted(&running), []);
        end(&pool, running, peers);
    }
}

/// Pages of a [`Ledger`]: more than the heap has left over, which was touched, and fewer than there are
/// packets in a rehearsal.
const PAGES: usize = 256;

/// Writes each packet's length on a page that nobody has touched before, and begins anew when it is full.
struct Ledger {
    wants: bool,
    pages: Vec<[u16; 2048]>,
}

impl Ledger {
    fn new(wants: bool) -> Self {
        Self { wants, pages: Vec::with_capacity(PAGES) }
    }
}

impl App for Ledger {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for frame in batch.iter() {
            if self.pages.len() == PAGES {
                self.pages.clear();
            }
            self.pages.push([frame.len(); 2048]);
        }
        turn.send_all(PortId(from.0 ^ 1), batch);
    }
    fn wants_rehearsal(&self) -> bool {
        self.wants
    }
    fn rehearsed(&mut self) {
        self.pages.clear();
    }
}

/// Page faults of a process by the kernel's own count: the sum of the fields `minflt` and `majflt` of
/// proc_pid_stat(5).
fn page_faults(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the worker is alive");
    let (_, rest) = stat.rsplit_once(')').expect("a name");
    let fields: Vec<&str> = rest.split_whitespace().collect();
    [fields[7], fields[9]].iter().map(|n| n.parse::<u64>().expect("a number")).sum()
}

/// Passes traffic both ways; says how many page faults that took by the kernel's count, and how many
/// the worker has been caught at since it was isolated.
fn faults_under_traffic<A: App + 'static>(
    fields: &[Field],
    app: impl Fn() -> A + Send + 'static,
) -> (u64, u64) {
    let (pool, running, mut peers) = launch(2, Some(WorkerIsolation::default()), fields, app);
    let pid = running.worker_pid(0).expect("a process");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker's status");
    assert!(status.contains("VmLck:\t       0 kB"), "memory is locked:\n{status}");
    let before = page_faults(pid);
    let [left, right] = &mut peers[..] else { panic!("two peers") };
    pass(left, right, 1000);
    pass(right, left, 1000);
    let faults = page_faults(pid) - before;
    let caught = running.isolation(0).expect("a status block").snapshot().breaches.of(Cause::PageFault);
    end(&pool, running, peers);
    (faults, caught)
}

/// What is touched for the first time is touched before isolation, also where the kernel lets nobody lock
/// memory, which touches it as well.
pub(crate) fn first_packets_do_not_fault() {
    for capability in [Capability::CAP_IPC_LOCK, Capability::CAP_SYS_RESOURCE] {
        for set in [CapSet::Effective, CapSet::Permitted] {
            caps::drop(None, set, capability).expect("give a capability up");
        }
    }
    setrlimit(Resource::RLIMIT_MEMLOCK, 0, 0).expect("lower the memlock limit");
    let (faults, _) = faults_under_traffic(&[], || Ledger::new(false));
    assert!(faults > 0, "a test that sees no fault of an app that was not rehearsed would see none at all");
    assert_eq!(faults_under_traffic(&[], || Ledger::new(true)), (0, 0));
    let bridge = || Bridge::new(&BridgeConfig::new(2)).expect("a bridge of two ports");
    assert_eq!(faults_under_traffic(&Bridge::FIELDS, bridge), (0, 0));
}
