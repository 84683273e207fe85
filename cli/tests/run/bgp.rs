//! The example of `examples/bgp`, as its files say: clients, servers, and two routers between them, each an
//! isoplane and a BIRD. BGP sessions over our ports, ECMP over both routers, and one of them killed.
//!
//! ```text
//!            .1.2 c1 ---- north  router 1  south ---- s1 .1.2
//! 198.18.0.1 clients                                   servers 198.18.1.1
//!            .2.2 c2 ---- north  router 2  south ---- s2 .2.2
//!              10.80.0.0/16                10.81.0.0/16
//! ```

use crate::process::{Run, Server, alone, run_in, succeed, total, wait_until};
use isoplane_lab::{Namespace, VethEnd, veth};
use nix::sys::signal::Signal;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 1);
const PORT: u16 = 7780;
/// Flows, each of its own UDP port.
const FLOWS: usize = 64;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/bgp")
}

/// Clients or servers: a host with a link to each router.
fn host(routers: &[Namespace; 2], [links, at_router]: [&str; 2], network: u8, own: Ipv4Addr) -> Namespace {
    let host = Namespace::new().unwrap();
    // Both ways are good for each packet, and a flow is its ports, too.
    for (key, value) in
        [("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0"), ("fib_multipath_hash_policy", "1")]
    {
        host.set_sysctl(&format!("ipv4/{key}"), value).unwrap();
    }
    for (number, router) in (1..).zip(routers) {
        let address = |last| IpAddr::from([10, network, number, last]);
        let end = VethEnd::new(&host, &format!("{links}{number}")).address(address(2), 24);
        veth::pair(&end, &VethEnd::new(router, at_router).address(address(1), 24)).unwrap();
    }
    succeed(&host, &format!("ip address add {own}/32 dev lo"));
    host
}

/// A BIRD in the foreground; gone when dropped. Its socket is in `sockets`.
fn bird(namespace: &Namespace, name: &str, sockets: &Path) -> Server {
    let (file, socket) = (folder().join(name), sockets.join(name));
    let (file, socket) = (file.with_extension("conf"), socket.display());
    Server::start(namespace, &format!("bird -f -c {} -s {socket} -P {socket}.pid", file.display()))
}

/// A router of the two: its data plane and its control plane.
struct Router {
    number: usize,
    plane: Run,
    bird: Server,
}

impl Router {
    fn start(number: usize, namespaces: &[Namespace; 2], sockets: &Path) -> Self {
        let name = format!("router{number}");
        let namespace = &namespaces[number - 1];
        let file = folder().join(format!("{name}.toml"));
        // The kernel frees the queues of one that was killed when it gets to it.
        let mut plane = None;
        wait_until("its ports are free", || {
            plane = Run::try_start(namespace, &file).inspect_err(|said| eprintln!("{said}")).ok();
            plane.is_some()
        });
        Self { number, plane: plane.expect("it runs"), bird: bird(namespace, &name, sockets) }
    }

    /// Packets that its worker has forwarded.
    fn forwarded(&self) -> u64 {
        total(&format!("bgp-router{}", self.number), self.plane.child.id(), "forwarded4")
    }

    /// `kill -9` of both.
    fn kill(mut self) {
        self.plane.child.kill().unwrap();
        self.bird.0.kill().unwrap();
        self.plane.child.wait().unwrap();
        self.bird.0.wait().unwrap();
    }
}

/// One socket a flow, all to the same server.
struct Flows(Vec<UdpSocket>);

impl Flows {
    fn new(clients: &Namespace) -> Self {
        let inside = clients.enter().unwrap();
        let socket = |_| {
            let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.connect((SERVER, PORT)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let sockets = (0..FLOWS).map(socket).collect();
        inside.leave().unwrap();
        Self(sockets)
    }

    /// A request on each flow; how many were answered. Of no answer we are sure after a second.
    fn round(&self, number: u32) -> usize {
        let request = number.to_be_bytes();
        // Without a route there is an error, which is no answer.
        let mut waiting: Vec<&UdpSocket> = self.0.iter().filter(|s| s.send(&request).is_ok()).collect();
        let end = Instant::now() + Duration::from_secs(1);
        let mut answered = 0;
        while !waiting.is_empty() && Instant::now() < end {
            waiting.retain(|socket| {
                let mut answer = [0; 8];
                let got = matches!(socket.recv(&mut answer), Ok(4)) && answer[..4] == request;
                answered += usize::from(got);
                !got
            });
            std::thread::sleep(Duration::from_millis(1));
        }
        answered
    }
}

/// Requests on all flows, one after the other without waiting for answers, and what came of them.
#[derive(Default)]
struct Pulse {
    stop: AtomicBool,
    sent: AtomicU64,
    answered: AtomicU64,
}

impl Pulse {
    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Sends a request on each flow every two milliseconds, until told to stop.
    fn beat(&self, flows: &Flows) {
        let mut last = None;
        while last.is_none_or(|end: Instant| Instant::now() < end) {
            if last.is_none() && self.stop.load(Ordering::Relaxed) {
                // What is on its way still counts.
                last = Some(Instant::now() + Duration::from_secs(1));
            }
            for socket in &flows.0 {
                let sent = last.is_none() && socket.send(&[0; 4]).is_ok();
                self.sent.fetch_add(u64::from(sent), Ordering::Relaxed);
                while socket.recv(&mut [0; 8]).is_ok() {
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Answers each datagram with itself, until told to stop.
fn serve(socket: &UdpSocket, stop: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut buffer = [0; 64];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let _ = socket.send_to(&buffer[..length], from);
    }
}

/// Whether the clients' kernel has a route to the server by these routers, and by no other.
fn routed_by(clients: &Namespace, routers: &[usize]) -> bool {
    let route = run_in(clients, &format!("ip route show {SERVER}")).1;
    [1, 2].iter().all(|number| route.contains(&format!("via 10.80.{number}.1")) == routers.contains(number))
}

#[test]
fn one_of_two_routers_is_killed_and_traffic_goes_on_by_the_other() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: AF_XDP and network namespaces need root");
        return;
    }
    let _alone = alone();
    let sockets = tempfile::tempdir().unwrap();
    let sockets = sockets.path();
    let routers: [Namespace; 2] = std::array::from_fn(|_| Namespace::new().unwrap());
    let clients = host(&routers, ["c", "north"], 80, CLIENT);
    let servers = host(&routers, ["s", "south"], 81, SERVER);
    let first = Router::start(1, &routers, sockets);
    let second = Router::start(2, &routers, sockets);
    let _birds = [bird(&clients, "clients", sockets), bird(&servers, "servers", sockets)];
    wait_until("routes by both routers", || routed_by(&clients, &[1, 2]));
    let birdc = |name: &str, what: &str| {
        succeed(&routers[0], &format!("birdc -s {} {what}", sockets.join(name).display()))
    };
    assert_eq!(birdc("router1", "show protocols").matches("Established").count(), 2);
    wait_until("BFD", || birdc("clients", "show bfd sessions").matches(" Up ").count() == 2);

    let inside = servers.enter().unwrap();
    let socket = UdpSocket::bind((SERVER, PORT)).unwrap();
    inside.leave().unwrap();
    let flows = Flows::new(&clients);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&socket, &stop));
        // The thread ends also when an assertion fails.
        let _ending = Ending(&stop);
        let mut round = 0;
        let mut next = || {
            round += 1;
            flows.round(round)
        };
        let mut all_answered = |what: &str| {
            let mut lost = 0;
            wait_until(what, || {
                let answered = next();
                lost += FLOWS - answered;
                answered == FLOWS
            });
            lost
        };
        all_answered("the way there and back");

        // Both routers have a share of the flows, and it is theirs alone: no kernel forwards.
        let before = [first.forwarded(), second.forwarded()];
        all_answered("a round");
        wait_until("counters", || {
            let passed = first.forwarded() + second.forwarded() - before[0] - before[1];
            passed >= 2 * FLOWS as u64
        });
        for (router, before) in [&first, &second].into_iter().zip(before) {
            let share = router.forwarded() - before;
            assert!(share >= 8, "router {} has forwarded {share} packets of {}", router.number, 2 * FLOWS);
        }

        // One is killed, with all that it is: its BGP sessions end with it.
        let pulse = Pulse::default();
        let other = Flows::new(&clients);
        std::thread::scope(|scope| {
            let beating = scope.spawn(|| pulse.beat(&other));
            let _ending = Ending(&pulse.stop);
            wait_until("a pulse", || pulse.answered() > 1000);
            first.kill();
            wait_until("the dead router has no route", || routed_by(&clients, &[2]));
            let now = pulse.answered();
            wait_until("the pulse goes on", || pulse.answered() > now + 1000);
            pulse.stop.store(true, Ordering::Relaxed);
            beating.join().unwrap();
        });
        let (sent, answered) = (pulse.sent.load(Ordering::Relaxed), pulse.answered());
        eprintln!("a router was killed: {sent} requests sent, {} lost", sent - answered);
        all_answered("traffic goes on by the other router");
        let before = second.forwarded();
        for _ in 0..10 {
            assert_eq!(all_answered("a round by one router"), 0, "nothing is lost any more");
        }
        wait_until("counters", || second.forwarded() >= before + 20 * FLOWS as u64);

        // It comes back, and has its share again.
        let first = Router::start(1, &routers, sockets);
        wait_until("routes by both routers again", || routed_by(&clients, &[1, 2]));
        wait_until("its share", || {
            all_answered("a round by both");
            first.forwarded() >= 8
        });

        // One falls silent, without a word on any session. Their hold time is minutes, so it is BFD that notices.
        wait_until("BFD", || birdc("clients", "show bfd sessions").matches(" Up ").count() == 2);
        first.bird.signal(Signal::SIGSTOP);
        wait_until("the silent router has no route", || routed_by(&clients, &[2]));
        all_answered("traffic goes on by the other router");
        first.bird.signal(Signal::SIGCONT);
        wait_until("routes by both routers once more", || routed_by(&clients, &[1, 2]));
        all_answered("a round by both");
        for router in [first, second] {
            let (good, said) = router.plane.stop();
            assert!(good, "{said}");
        }
    });
}

/// Says stop at the end.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
