//! A bridge over AF_XDP between two kernels: traffic passes, whatever dies or flaps meanwhile.

use crate::peer::{kill_worker, wait_for};
use isoplane::blocks::CrossConnect;
use isoplane::blocks::bridge::{Bridge, BridgeConfig};
use isoplane::drivers::LinkState;
use isoplane::drivers::xdp::{XdpConfig, XdpPort};
use isoplane::isolation::Quiesce;
use isoplane::memory::Batch;
use isoplane::memory::stats::Field;
use isoplane::memory::{HugePages, Pool, PoolConfig};
use isoplane::{
    App, Builder, Dataplane, Idle, Kicks, PortId, PortRef, Restart, Running, Turn, Worker, WorkerIsolation,
    WorkerState,
};
use isoplane_lab::traffic::{Endpoint, Flow, FlowReport, Traffic};
use isoplane_lab::{Namespace, VethEnd, veth};
use std::mem::ManuallyDrop;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

pub(crate) const LEFT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub(crate) const RIGHT: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// Two hosts and the namespace between them.
pub(crate) struct Hosts {
    left: Namespace,
    right: Namespace,
    pub(crate) middle: Namespace,
}

impl Hosts {
    pub(crate) fn new() -> Self {
        Self::with_queues(1)
    }

    /// Hosts that are there, with interfaces of [`LEFT`] and [`RIGHT`]. Nothing is between them.
    pub(crate) fn of(left: Namespace, right: Namespace) -> Self {
        Self { left, right, middle: Namespace::new().expect("namespace") }
    }

    fn with_queues(queues: u32) -> Self {
        let hosts = Self {
            left: Namespace::new().expect("namespace"),
            right: Namespace::new().expect("namespace"),
            middle: Namespace::new().expect("namespace"),
        };
        hosts.connect(&hosts.left, "left", LEFT, queues);
        hosts.connect(&hosts.right, "right", RIGHT, queues);
        hosts
    }

    fn connect(&self, host: &Namespace, name: &str, address: IpAddr, queues: u32) {
        let end = VethEnd::new(host, "eth0").address(address, 24).queues(queues, queues);
        let port = VethEnd::new(&self.middle, name).queues(queues, queues);
        veth::pair(&end, &port).expect("veth pair");
    }

    pub(crate) fn endpoints(&self) -> (Endpoint<'_>, Endpoint<'_>) {
        let left = Endpoint { namespace: &self.left, address: LEFT };
        (left, Endpoint { namespace: &self.right, address: RIGHT })
    }

    /// ICMP and UDP, a few requests at a time: nothing may get lost.
    fn exchange(&self, time: Duration) -> Vec<FlowReport> {
        let traffic = self.start();
        std::thread::sleep(time);
        traffic.stop()
    }

    fn start(&self) -> Traffic {
        let (left, right) = self.endpoints();
        let flows = [Flow::Echo { window: 4, largest: 1400 }, Flow::Datagrams { window: 8, largest: 1472 }];
        Traffic::start(left, right, &flows).expect("traffic")
    }

    /// Exchanges for at least that long, and until each flow has been answered: on a busy machine a
    /// generator may not run for a while.
    pub(crate) fn converse(&self, time: Duration) -> Vec<FlowReport> {
        let traffic = self.start();
        std::thread::sleep(time);
        wait_for("each flow to be answered", || {
            std::thread::sleep(Duration::from_millis(5));
            traffic.reports().iter().all(|report| report.counts.verified > 0)
        });
        traffic.stop()
    }

    /// Exchanges until every flow has been answered: a link has come back, a worker has learned.
    pub(crate) fn wait_for_traffic(&self) {
        wait_for("traffic to pass", || {
            let reports = self.exchange(Duration::from_millis(100));
            reports.iter().all(|r| r.counts.verified > 0)
        });
    }
}

pub(crate) fn assert_nothing_lost(reports: &[FlowReport]) {
    for report in reports {
        let counts = report.counts;
        assert!(counts.verified > 0, "{report:?}");
        assert_eq!((counts.lost, counts.corrupt, counts.late), (0, 0, 0), "{report:?}");
    }
}

pub(crate) struct Plane {
    pub(crate) pool: Arc<Pool>,
    pub(crate) running: Running,
    pub(crate) ports: [PortRef; 2],
}

fn bridge(hosts: &Hosts, kicks: Kicks) -> Plane {
    bridge_over(kicks, |pool, plane| af_xdp(hosts, pool, plane))
}

/// The two ports in the middle.
fn af_xdp(hosts: &Hosts, pool: &Arc<Pool>, plane: &mut Builder) -> [PortRef; 2] {
    let inside = hosts.middle.enter().expect("enter the namespace");
    let ports = ["left", "right"].map(|name| {
        let port = XdpPort::open(pool, &XdpConfig::new(name)).expect("port");
        plane.port(port)
    });
    inside.leave().expect("leave the namespace");
    ports
}

/// A bridge between two ports that `open` opens.
pub(crate) fn bridge_over(
    kicks: Kicks,
    open: impl FnOnce(&Arc<Pool>, &mut Builder) -> [PortRef; 2],
) -> Plane {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("bridge", 8192) };
    let pool = Pool::create(&config).expect("pool");
    let mut plane = Dataplane::builder("bridge");
    let ports = open(&pool, &mut plane);
    let worker =
        Worker::new("w0").idle(Idle::Yield).counters(&Bridge::FIELDS).queue(ports[0], 0).queue(ports[1], 0);
    plane.worker(worker, |_| Bridge::new(&BridgeConfig::new(2)).expect("bridge"));
    plane.kicks(kicks);
    let running = plane.launch().expect("launch");
    Plane { pool, running, ports }
}

impl Plane {
    /// Stops, and every frame is back.
    pub(crate) fn end(self) {
        let report = self.running.stop();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(self.pool.in_depot(), self.pool.chunks(), "{report:?} {:?}", self.pool.census());
    }
}

/// Nothing is lost with a kicker, and the worker makes no kick itself; nor with inline kicks.
pub(crate) fn bridge_over_af_xdp() {
    for kicks in [Kicks::Kicker, Kicks::Inline] {
        let hosts = Hosts::new();
        let plane = bridge(&hosts, kicks);
        assert_nothing_lost(&hosts.converse(Duration::from_millis(500)));
        let statistics = plane.running.statistics();
        assert!(statistics.total("rx_frames") > 0);
        assert_eq!(statistics.total("bad_descriptors"), 0);
        let (by_worker, by_kicker) = (statistics.total("kicks"), statistics.total("kicker_kicks"));
        match kicks {
            Kicks::Kicker => assert!(by_worker == 0 && by_kicker > 0, "{by_worker} {by_kicker}"),
            Kicks::Inline => assert!(by_worker > 0 && by_kicker == 0, "{by_worker} {by_kicker}"),
        }
        plane.end();
    }
}

/// The worker is killed under traffic, again and again: it passes again each time, and in the end every
/// frame is back.
pub(crate) fn worker_killed_over_af_xdp() {
    let hosts = Hosts::new();
    let plane = bridge(&hosts, Kicks::Kicker);
    for _ in 0..5 {
        let (left, right) = hosts.endpoints();
        let flow = Flow::Datagrams { window: 64, largest: 1472 };
        let traffic = Traffic::start(left, right, &[flow]).expect("traffic");
        std::thread::sleep(Duration::from_millis(100));
        kill_worker(&plane.running);
        std::thread::sleep(Duration::from_millis(100));
        let reports = traffic.stop();
        // What was in the worker's hands is gone with it, no more: the window bounds it.
        assert!(reports[0].counts.lost <= 64 && reports[0].counts.corrupt == 0, "{reports:?}");
        assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    }
    assert_eq!(plane.running.restarts(0), Some(5));
    plane.end();
}

/// A link goes down and comes back, on our side and on the other; traffic passes again.
pub(crate) fn link_flaps() {
    let hosts = Hosts::new();
    let plane = bridge(&hosts, Kicks::Kicker);
    assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    let link = |plane: &Plane| plane.running.with_port(plane.ports[0], |port| port.link());
    for (namespace, name) in [(&hosts.middle, "left"), (&hosts.left, "eth0")] {
        let interface = namespace.link(name).expect("link");
        interface.down().expect("down");
        wait_for("the port to be down", || link(&plane) == Some(LinkState::Down));
        std::thread::sleep(Duration::from_millis(100));
        interface.up().expect("up");
        wait_for("the port to be up", || link(&plane) == Some(LinkState::Up));
        hosts.wait_for_traffic();
        assert_nothing_lost(&hosts.converse(Duration::from_millis(200)));
    }
    plane.end();
}

/// An interface is deleted under a running worker: the port says so, the worker goes on, and stopping
/// finds every frame.
pub(crate) fn interface_deleted() {
    let hosts = Hosts::new();
    let plane = bridge(&hosts, Kicks::Kicker);
    assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    hosts.middle.link("left").expect("link").delete().expect("delete");
    let link = |port| plane.running.with_port(plane.ports[port], |port| port.link());
    wait_for("the port to be gone", || link(0) == Some(LinkState::Gone));
    assert_eq!(link(1), Some(LinkState::Up));
    // The other host goes on sending into the void; the worker keeps making turns.
    let turns = plane.running.statistics().total("turns");
    wait_for("the worker to go on", || plane.running.statistics().total("turns") > turns + 1000);
    plane.end();
}

/// Starts again at once on the same interfaces after each stop.
pub(crate) fn rebinds_at_once() {
    let hosts = Hosts::new();
    for _ in 0..5 {
        let plane = bridge(&hosts, Kicks::Kicker);
        assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
        plane.end();
    }
    for name in ["left", "right"] {
        let status = hosts.middle.link(name).expect("link").status().expect("status");
        assert_eq!(status.xdp_program, None, "a program is left on {name}");
    }
}

/// `kill -9` of a program that bridges: its XDP programs are gone and a new one binds (which it tries for a
/// second, no longer).
/// The namespaces are this process's, the program is a child of it.
pub(crate) fn program_killed_over_af_xdp() {
    let hosts = Hosts::new();
    for _ in 0..2 {
        let (mut says, tell) = std::io::pipe().expect("pipe");
        // SAFETY: this process has one thread here: traffic threads of the last round were joined.
        #[allow(unsafe_code, reason = "fork")]
        match unsafe { nix::unistd::fork() }.expect("fork") {
            nix::unistd::ForkResult::Child => {
                drop(says);
                let plane = bridge(&hosts, Kicks::Kicker);
                let pids = [plane.running.zygote_pid(), plane.running.worker_pid(0)].map(|p| p.expect("pid"));
                std::io::Write::write_all(&mut &tell, bytemuck::cast_slice(&pids)).expect("tell");
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
            nix::unistd::ForkResult::Parent { child } => {
                drop(tell);
                let mut pids = [0u32; 2];
                let told = std::io::Read::read_exact(&mut says, bytemuck::cast_slice_mut(&mut pids));
                told.expect("the program starts, also right after the last one was killed");
                assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
                nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).expect("kill");
                nix::sys::wait::waitpid(child, None).expect("wait");
                let gone = |pid: &u32| {
                    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                    stat.is_empty() || stat.contains(") Z")
                };
                wait_for("zygote and worker to be gone", || pids.iter().all(gone));
                wait_for("the XDP programs to be gone", || {
                    ["left", "right"].iter().all(|name| {
                        let link = hosts.middle.link(name).expect("link");
                        link.status().expect("status").xdp_program.is_none()
                    })
                });
            }
        }
    }
    let plane = bridge(&hosts, Kicks::Kicker);
    assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    plane.end();
}

/// Two workers, one for each pair of queues: flows go to either, and nothing is lost.
pub(crate) fn two_workers_on_two_queues() {
    let hosts = Hosts::with_queues(2);
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("queues", 16_384) };
    let pool = Pool::create(&config).expect("pool");
    let mut plane = Dataplane::builder("queues");
    let inside = hosts.middle.enter().expect("enter the namespace");
    let [a, b] = ["left", "right"]
        .map(|name| plane.port(XdpPort::open(&pool, &XdpConfig::new(name).queues(2)).expect("port")));
    inside.leave().expect("leave the namespace");
    for queue in 0..2 {
        let worker = Worker::new(&format!("w{queue}")).idle(Idle::Yield).queue(a, queue).queue(b, queue);
        plane.worker(worker, |_| CrossConnect);
    }
    let running = plane.launch().expect("launch");
    for worker in 0..2 {
        let pid = running.worker_pid(worker).expect("a process");
        let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").flatten();
        let links: Vec<_> = links.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
        let count = |kind: &str| links.iter().filter(|link| link.to_string_lossy().contains(kind)).count();
        // Its own two sockets, and nothing of the ports or of the other worker.
        assert_eq!((count("bpf"), count("signalfd"), count("socket:")), (0, 0, 2), "{links:?}");
    }
    // The kernel chooses a queue by the flow's hash: different ports, until both have been used.
    let used = |name: &str| {
        let rows = running.statistics().rows();
        let frames = rows.iter().filter(|row| row.worker == name && row.name == "rx_frames");
        frames.map(|row| row.values[0]).sum::<u64>()
    };
    wait_for("both workers to see traffic", || {
        assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
        used("w0") > 0 && used("w1") > 0
    });
    Plane { pool, running, ports: [a, b] }.end();
}

/// A bridge that seals its worker's process at its first turn: from then on any system call kills it,
/// and what it allocates is counted.
struct Sealed {
    /// Never dropped: freeing it could be a system call.
    bridge: ManuallyDrop<Bridge>,
    turns: u64,
}

impl App for Sealed {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        self.bridge.packets(turn, from, batch);
    }

    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.turns += 1;
        // Not before the worker is isolated: that takes system calls.
        if self.turns == 1000 {
            // At its end the slow path looks whether its signals are still open, and its own.
            turn.slow_path(|_| {
                crate::seal::seal(&[libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask])
                    .expect("a seccomp filter")
            })
            .expect("no budget");
        }
        self.bridge.turn(turn);
        turn.gauge(Bridge::FIELDS.len(), crate::seal::allocations());
    }

    fn wants_rehearsal(&self) -> bool {
        self.bridge.wants_rehearsal()
    }

    fn rehearsed(&mut self) {
        self.turns = 0;
        self.bridge.rehearsed();
    }
}

/// The real loop of a worker process, with the bridge, over AF_XDP with a kicker: no system call and no
/// allocation while traffic passes.
pub(crate) fn sealed_bridge() {
    let hosts = Hosts::new();
    sealed_bridge_over(&hosts, |pool, plane| af_xdp(&hosts, pool, plane));
}

/// The same between two ports that `open` opens.
pub(crate) fn sealed_bridge_over(hosts: &Hosts, open: impl FnOnce(&Arc<Pool>, &mut Builder) -> [PortRef; 2]) {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("sealed", 8192) };
    let pool = Pool::create(&config).expect("pool");
    let mut plane = Dataplane::builder("sealed");
    let [a, b] = open(&pool, &mut plane);
    // Idle::Yield would be a system call. The kicker has the other CPU.
    let mut worker = Worker::new("w0").idle(Idle::Spin).queue(a, 0).queue(b, 0);
    worker = worker.counters(&Bridge::FIELDS).counters(&[Field::gauge("allocations")]);
    plane.restart(Restart::Never);
    // Quiescing after the slow path makes system calls too.
    plane.isolation(WorkerIsolation { quiesce: Quiesce::empty(), ..WorkerIsolation::default() });
    plane.worker(worker, |_| Sealed {
        bridge: ManuallyDrop::new(Bridge::new(&BridgeConfig::new(2)).expect("bridge")),
        turns: 0,
    });
    let running = plane.launch().expect("launch");
    assert_nothing_lost(&hosts.converse(Duration::from_millis(500)));
    assert_eq!(running.state(0), Some(WorkerState::Running), "killed: the worker made a system call");
    assert_eq!(running.statistics().total("allocations"), 0);
    // Nor the calls that the filter lets pass.
    assert_eq!(running.isolation(0).expect("worker 0").snapshot().breaches.total(), 0);
    let pid = running.worker_pid(0).expect("a process");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the worker's status");
    assert!(status.contains("Seccomp:\t2"), "the worker was not sealed");
    // Ending is a system call too: this is how the filter shows that it works.
    let report = running.stop();
    assert_eq!(report.workers[0].state, WorkerState::GivenUp, "{report:?}");
    assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
}

/// Sends an empty frame for each packet that arrives: no port can send that.
struct Nothing;

impl App for Nothing {
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        for mut frame in batch.drain() {
            frame.truncate(0);
            turn.send(from, frame);
        }
    }
}

/// What a port refuses to send is a counted drop, not a transmission.
pub(crate) fn refused_frames_are_drops() {
    let hosts = Hosts::new();
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("refused", 8192) };
    let pool = Pool::create(&config).expect("pool");
    let mut plane = Dataplane::builder("refused");
    let inside = hosts.middle.enter().expect("enter the namespace");
    let port = plane.port(XdpPort::open(&pool, &XdpConfig::new("left")).expect("port"));
    inside.leave().expect("leave the namespace");
    plane.worker(Worker::new("w0").idle(Idle::Yield).queue(port, 0), |_| Nothing);
    let running = plane.launch().expect("launch");
    let statistics = running.statistics();
    wait_for("refusals", || {
        hosts.exchange(Duration::from_millis(50));
        statistics.total("drop_refused") >= 3
    });
    let (arrived, refused) = (statistics.total("rx_frames"), statistics.total("drop_refused"));
    assert!(refused <= arrived, "{refused} of {arrived}");
    assert_eq!((statistics.total("tx_frames"), statistics.total("tx_bytes")), (0, 0));
    Plane { pool, running, ports: [port, port] }.end();
}
