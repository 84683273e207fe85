//! Taps with a real kernel: the port conformance suite between two taps that a bridge of Linux joins, what the kernel's
//! own sockets send and get, and how an interface comes and goes.

use isoplane_drivers::conformance::{Fixture, Opened};
use isoplane_drivers::{
    Capabilities, LinkState, Opener, Port, Queue, RxQueue, TapConfig, TapError, TapPort, TxQueue,
};
use isoplane_lab::{Link, Namespace, PacketSocket};
use isoplane_memory::{Batch, FrameCache, FrameFlags, FrameMeta, HugePages, Kernel, Pool, PoolConfig};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const OURS: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0a];
const KERNELS: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0b];
const PATIENCE: Duration = Duration::from_secs(10);

fn pool() -> Arc<Pool> {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("tap-test", 2048) };
    Pool::create(&config).expect("a pool")
}

fn namespace() -> Namespace {
    let namespace = Namespace::new().expect("a namespace");
    namespace.disable_ipv6().expect("a sysctl");
    namespace
}

fn config(name: &str, namespace: &Namespace) -> TapConfig {
    let namespace = namespace.try_clone().expect("a descriptor").into();
    TapConfig { namespace: Some(Arc::new(namespace)), ..TapConfig::new(name) }
}

/// Runs `ip` in a namespace.
fn ip(namespace: &Namespace, arguments: &str) {
    let run = || Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    let output = namespace.run(run).expect("the namespace");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two taps on one bridge.
struct Bridged {
    namespace: Namespace,
    mtu: u32,
}

impl Bridged {
    fn new(mtu: u32) -> Self {
        let namespace = namespace();
        ip(
            &namespace,
            &format!("link add br0 mtu {mtu} type bridge stp_state 0 mcast_snooping 0 forward_delay 0"),
        );
        ip(&namespace, "link set br0 up");
        Self { namespace, mtu }
    }
}

impl Fixture for Bridged {
    fn pool(&mut self) -> Arc<Pool> {
        pool()
    }
    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let open = |name| {
            let config = TapConfig {
                mtu: self.mtu,
                multi_buffer: self.mtu > 1500,
                rx_ring: 128,
                tx_ring: 128,
                ..config(name, &self.namespace)
            };
            let port = TapPort::open(pool, &config).expect("a tap");
            ip(&self.namespace, &format!("link set {name} master br0"));
            port
        };
        let (a, b) = (open("tap0"), open("tap1"));
        for name in ["tap0", "tap1"] {
            let link = self.namespace.link(name).expect("a link");
            assert!(link.wait_running(PATIENCE).expect("its state"), "{name} is not up");
        }
        Opened { a: Box::new(a), b: Some(Box::new(b)) }
    }
    fn min_len(&self) -> u16 {
        14
    }
    fn drops_when_full(&self) -> bool {
        true
    }
    fn idle(&mut self) {
        std::thread::yield_now();
    }
    fn patience(&self) -> u32 {
        10_000
    }
}

mod single {
    use super::*;
    isoplane_drivers::conformance_tests!(link, Bridged::new(1500));
}

mod multi_buffer {
    use super::*;
    isoplane_drivers::conformance_tests!(link, Bridged::new(9000));
}

/// A tap with an address, and a worker in small.
struct Host<'n> {
    port: TapPort,
    queue: Queue,
    frames: FrameCache,
    link: Link<'n>,
    kernel: Kernel,
}

impl<'n> Host<'n> {
    fn new(namespace: &'n Namespace, config: &TapConfig) -> Self {
        let pool = pool();
        let mut port = TapPort::open(&pool, config).expect("a tap");
        let queue = port.take_queue(0).expect("a queue");
        let frames = pool.cache("worker", 200).expect("frames");
        let link = namespace.link(&config.name).expect("a link");
        Self { port, queue, frames, link, kernel: Kernel::outside_isolation() }
    }

    fn send(&mut self, packet: &[u8], checksum: Option<(u16, u16)>) {
        let pool = Arc::clone(self.port.pool());
        let mut frame = self.frames.get().expect("a frame");
        assert!(pool.reset(&mut frame, packet.len() as u16));
        pool.bytes_mut(&mut frame).copy_from_slice(packet);
        if let Some((csum_start, csum_offset)) = checksum {
            pool.set_meta(&mut frame, FrameMeta { csum_start, csum_offset, ..FrameMeta::default() });
            frame.set_flags(frame.flags() | FrameFlags::TX_CHECKSUM);
        }
        let mut batch = Batch::new();
        batch.push(frame).expect("room");
        assert_eq!(self.queue.tx.transmit(&mut batch), 1);
        self.queue.tx.kick(&self.kernel).expect("a kick");
        assert_eq!(self.queue.tx.reclaim(&mut self.frames), 1);
    }

    /// The next packet that `wanted` wants.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        let mut batch = Batch::new();
        let mut found = None;
        while found.is_none() {
            assert!(Instant::now() < deadline, "no such packet has arrived");
            self.queue.rx.kick(&self.kernel).expect("a kick");
            self.queue.rx.receive(&mut self.frames, &mut batch);
            let pool = self.port.pool();
            found = batch.iter().map(|frame| pool.bytes(frame).to_vec()).find(|bytes| wanted(bytes));
            self.frames.put_batch(&mut batch);
        }
        found.expect("the loop's condition")
    }

    fn close(self) {
        let Self { port, queue, frames, .. } = self;
        let pool = Arc::clone(port.pool());
        queue.close();
        drop(port);
        assert_eq!(frames.len() as u32 + pool.in_depot(), pool.chunks(), "frames after close");
    }
}

fn udp(payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ethernet2(OURS, KERNELS)
        .ipv4([10, 9, 0, 2], [10, 9, 0, 1], 64)
        .udp(7000, 7001)
        .write(&mut packet, payload)
        .expect("a packet");
    packet
}

#[test]
fn the_kernels_sockets_send_and_get_packets_with_good_checksums() {
    let namespace = namespace();
    let config = TapConfig { mac: Some(KERNELS), ..config("host0", &namespace) };
    let mut host = Host::new(&namespace, &config);
    assert_eq!(
        (host.port.mac(), host.port.name(), host.port.link()),
        (Some(KERNELS), "host0", LinkState::Up)
    );
    assert_eq!(host.link.status().expect("its state").mac, Some(KERNELS));
    let peer = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2));
    host.link.add_address(IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)), 24).expect("an address");
    host.link.add_neighbour(peer, OURS).expect("a neighbour");
    let socket =
        namespace.run(|| UdpSocket::bind("10.9.0.1:7001").expect("a socket")).expect("the namespace");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");

    for len in [0, 1, 100, 1471, 1472] {
        socket.send_to(&vec![len as u8; len], SocketAddr::new(peer, 7000)).expect("sent");
        let packet = host.receive(|bytes| bytes.get(23) == Some(&17));
        let parsed = etherparse::PacketHeaders::from_ethernet_slice(&packet).expect("a packet");
        let (Some(etherparse::NetHeaders::Ipv4(ip, _)), Some(etherparse::TransportHeader::Udp(udp))) =
            (parsed.net, parsed.transport)
        else {
            panic!("UDP over IPv4: {packet:?}");
        };
        let payload = &packet[packet.len() - len..];
        assert_eq!(udp.checksum, udp.calc_checksum_ipv4(&ip, payload).expect("a checksum"), "{len} bytes");
    }

    let mut buffer = [0; 2000];
    let whole = udp(b"checked");
    host.send(&whole, None);
    assert_eq!(socket.recv(&mut buffer).expect("received"), 7);
    // With the checksum left to the kernel; a wrong one without that is dropped.
    let mut partial = whole.clone();
    partial[40..42].copy_from_slice(&[0x12, 0x34]);
    host.send(&partial, None);
    host.send(&partial, Some((34, 6)));
    assert_eq!(socket.recv(&mut buffer).expect("received"), 7);
    assert_eq!(&buffer[..7], b"checked");
    socket.set_nonblocking(true).expect("nonblocking");
    assert!(socket.recv(&mut buffer).is_err(), "the one with a wrong checksum did not arrive");

    // What the kernel cannot take is refused, and does not stop what follows.
    host.send(&whole[..13], None);
    host.send(&partial, Some((2000, 6)));
    assert_eq!(host.queue.tx.refused(), (2, 13 + whole.len() as u64));
    host.send(&whole, None);
    socket.set_nonblocking(false).expect("blocking");
    assert_eq!(socket.recv(&mut buffer).expect("received"), 7);
    host.close();
    assert!(namespace.link("host0").is_err(), "the interface goes with the port");
}

#[test]
fn raw_packets_of_all_lengths_and_vlan_tags_arrive_as_they_are() {
    let namespace = namespace();
    let mut host = Host::new(&namespace, &config("raw0", &namespace));
    let link = namespace.link("raw0").expect("a link");
    assert!(link.wait_running(PATIENCE).expect("its state"));
    let socket = PacketSocket::open(&link).expect("a packet socket");
    for len in (14..200).chain([1513, 1514]) {
        let mut packet = vec![len as u8; len];
        packet[..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xb5]);
        socket.send(&packet).expect("sent");
        assert_eq!(host.receive(|bytes| bytes[12..14] == [0x88, 0xb5]), packet);
    }
    // The longest with a tag has four bytes more.
    let mut tagged = vec![7; 1518];
    tagged[..18].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x81, 0, 0x20, 5, 0x88, 0xb5]);
    socket.send(&tagged).expect("sent");
    assert_eq!(host.receive(|bytes| bytes[12..14] == [0x81, 0]), tagged);
    // The administrator allows longer packets than the port was opened for: they are dropped, and counted.
    link.set_mtu(3000).expect("an MTU");
    socket.send(&[0x55; 2000]).expect("sent");
    let mut small = vec![1; 60];
    small[12..14].copy_from_slice(&[0x88, 0xb5]);
    socket.send(&small).expect("sent");
    assert_eq!(host.receive(|bytes| bytes[12..14] == [0x88, 0xb5]), small);
    assert_eq!(host.port.statistics().rx_dropped, 1);
    host.close();
}

#[test]
fn the_link_goes_down_and_away() {
    let namespace = namespace();
    let mut host = Host::new(&namespace, &config("gone0", &namespace));
    assert_eq!(host.port.link(), LinkState::Up);
    host.link.down().expect("down");
    assert_eq!(host.port.link(), LinkState::Down);
    let pool = Arc::clone(host.port.pool());
    let mut frame = host.frames.get().expect("a frame");
    assert!(pool.reset(&mut frame, 60));
    let mut batch = Batch::new();
    batch.push(frame).expect("room");
    host.queue.tx.transmit(&mut batch);
    assert_eq!(host.queue.tx.kick(&host.kernel), Err(isoplane_drivers::KickError::Down));
    host.link.up().expect("up");
    assert_eq!(host.queue.tx.kick(&host.kernel), Ok(()), "what waited is sent");
    assert_eq!(host.queue.tx.reclaim(&mut host.frames), 1);
    ip(&namespace, "link set gone0 down");
    ip(&namespace, "link set gone0 name other0");
    ip(&namespace, "link set other0 up");
    assert_eq!(host.port.link(), LinkState::Up, "under another name");
    ip(&namespace, "link del other0");
    assert_eq!(host.port.link(), LinkState::Gone);
    assert_eq!(host.queue.rx.kick(&host.kernel), Err(isoplane_drivers::KickError::Gone));
    host.close();
}

#[test]
fn what_cannot_be_opened_says_why_and_leaves_nothing() {
    let namespace = namespace();
    let pool = pool();
    let open = |change: &dyn Fn(&mut TapConfig)| {
        let mut config = config("err0", &namespace);
        change(&mut config);
        TapPort::open(&pool, &config)
    };
    let held = open(&|_| {}).expect("a tap");
    assert!(matches!(open(&|_| {}), Err(TapError::Taken { .. })), "taken");
    assert!(matches!(open(&|c| c.existing = true), Err(TapError::Taken { .. })), "in use");
    assert!(matches!(open(&|c| c.name = "lo".into()), Err(TapError::Taken { .. })), "taken");
    let loopback = |c: &mut TapConfig| (c.name, c.existing) = ("lo".into(), true);
    assert!(matches!(open(&loopback), Err(TapError::OtherKind { .. })), "no tap");
    drop(held);
    for mac in [[1, 0, 0, 0, 0, 1], [0; 6]] {
        let error = open(&|c| c.mac = Some(mac)).expect_err("no such address");
        assert!(matches!(error, TapError::Refused { .. }), "{error}");
    }
    let error = open(&|c| c.mtu = 10).expect_err("no such MTU");
    assert!(error.to_string().contains("MTU 10: the kernel takes 68 to"), "{error}");
    assert!(namespace.link("err0").is_err(), "nothing is left");
    assert_eq!(pool.in_depot(), pool.chunks(), "no frame is missing");

    // Owner ids run out in the middle: all is given back.
    let mut ids = Vec::new();
    while let Ok(custody) = pool.custody() {
        ids.push(custody);
    }
    for (lender, collector) in ids.drain(..5) {
        isoplane_memory::custody::end(lender, collector);
    }
    let error = open(&|c| c.queues = 3).expect_err("six ids are needed");
    assert!(matches!(error, TapError::Pool(_)), "{error}");
    assert_eq!(pool.in_depot(), pool.chunks(), "no frame is missing");
    drop(open(&|c| c.queues = 2).expect("four ids are there again"));

    // Without the capability.
    let unprivileged = || {
        caps::clear(None, caps::CapSet::Effective).expect("fewer capabilities");
        let inside = TapConfig::new("err0");
        TapPort::open(&pool, &inside).map(drop)
    };
    let refused = namespace.run(unprivileged).expect("the namespace");
    assert!(matches!(refused, Err(TapError::NotPermitted { .. })), "{refused:?}");
}

#[test]
fn a_persistent_tap_stays_and_is_taken_again() {
    let namespace = namespace();
    let pool = pool();
    let first = TapConfig { persist: true, mac: Some(KERNELS), ..config("stay0", &namespace) };
    drop(TapPort::open(&pool, &first).expect("a tap"));
    let link = namespace.link("stay0").expect("it stays");
    let index = link.index();
    assert!(matches!(TapPort::open(&pool, &first), Err(TapError::Taken { .. })));
    let again = TapConfig { existing: true, ..config("stay0", &namespace) };
    let port = TapPort::open(&pool, &again).expect("the same tap");
    assert_eq!((port.interface_index(), port.mac()), (index, Some(KERNELS)));
    drop(port);
    link.delete().expect("deleted");
}

#[test]
fn several_queues_share_the_flows() {
    let namespace = namespace();
    let pool = pool();
    let config = TapConfig { queues: 3, ..config("many0", &namespace) };
    let mut port = TapPort::open(&pool, &config).expect("a tap");
    assert_eq!(port.queues(), 3);
    assert!(port.capabilities().contains(Capabilities::KICKS | Capabilities::TX_CHECKSUM));
    let mut kicks: Vec<_> = (0..3).map(|n| port.kick_target(n).expect("a target")).collect();
    assert!(port.kick_target(3).is_none());
    let mut queues: Vec<_> = (0..3).map(|n| port.take_queue(n).expect("a queue")).collect();
    let mut frames = pool.cache("worker", 100).expect("frames");
    let link = namespace.link("many0").expect("a link");
    link.add_address(IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1)), 24).expect("an address");
    link.add_neighbour(IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2)), OURS).expect("a neighbour");
    assert!(link.wait_running(PATIENCE).expect("its state"));
    let send = |port: u16| {
        let socket = UdpSocket::bind(("10.9.0.1", port)).expect("a socket");
        socket.send_to(b"flow", "10.9.0.2:7000").expect("sent");
    };
    namespace.run(|| (0..60).for_each(|n| send(8000 + n))).expect("the namespace");
    // All by kick targets, as a dataplane's kicker does.
    let kernel = Kernel::outside_isolation();
    let mut arrived = [0; 3];
    let deadline = Instant::now() + PATIENCE;
    while arrived.iter().sum::<u32>() < 60 {
        assert!(Instant::now() < deadline, "{arrived:?}");
        for ((kick, queue), arrived) in kicks.iter_mut().zip(&mut queues).zip(&mut arrived) {
            kick.poll(&kernel).expect("a kick");
            let mut batch = Batch::new();
            queue.rx.receive(&mut frames, &mut batch);
            *arrived += batch.iter().filter(|f| pool.bytes(f).get(23) == Some(&17)).count() as u32;
            frames.put_batch(&mut batch);
        }
    }
    assert!(arrived.iter().all(|n| *n > 0), "each queue has flows: {arrived:?}");
    assert!(port.statistics().kicks >= 3);
    for queue in queues {
        queue.close();
    }
    drop(port);
    assert_eq!(frames.len() as u32 + pool.in_depot(), pool.chunks(), "frames after close");
}

#[test]
fn a_tap_is_opened_by_its_name() {
    let namespace = namespace();
    let opened = namespace.run(|| {
        let pool = pool();
        let port = Opener::new(&pool).open("tap:byname0", 2).expect("a port");
        assert_eq!((port.name(), port.driver(), port.queues()), ("byname0", "tap", 2));
        let error = Opener::new(&pool).open("tap:", 1).err().expect("no name");
        assert!(error.to_string().contains("1 to 15 bytes"), "{error}");
    });
    opened.expect("the namespace");
}

/// What a killed program leaves: nothing. The program is this test, run again with a name in its environment.
#[test]
fn a_killed_program_leaves_no_interface() {
    const VARIABLE: &str = "ISOPLANE_TAP_TEST";
    if let Ok(name) = std::env::var(VARIABLE) {
        let _port = TapPort::open(&pool(), &TapConfig::new(&name)).expect("a tap");
        println!("open");
        loop {
            std::thread::park();
        }
    }
    let namespace = namespace();
    let mut child = namespace
        .run(|| {
            Command::new(std::env::current_exe().expect("this test"))
                .args(["--exact", "--nocapture", "a_killed_program_leaves_no_interface"])
                .env(VARIABLE, "killed0")
                .stdout(Stdio::null())
                .spawn()
                .expect("a child")
        })
        .expect("the namespace");
    let deadline = Instant::now() + PATIENCE;
    while !namespace.link("killed0").is_ok_and(|link| link.status().is_ok_and(|status| status.up)) {
        assert!(Instant::now() < deadline, "the child opens no tap");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("killed");
    child.wait().expect("its end");
    while namespace.link("killed0").is_ok() {
        assert!(Instant::now() < deadline, "the interface is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}
