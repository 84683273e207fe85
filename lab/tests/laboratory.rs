//! Namespaces, links and packet sockets, against the kernel and against iproute2's view of it.

use isoplane_lab::{LabError, Namespace, Offloads, PacketSocket, VethEnd, veth};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// The lab needs root. Elsewhere a test says that it did not run.
fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: making network namespaces needs root");
    }
    root
}

fn thread_inode() -> u64 {
    std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Frames of a local experimental EtherType (IEEE 802, 0x88b5).
fn frame(to: [u8; 6], from: [u8; 6], body: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x88, 0xb5], body].concat()
}

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

#[test]
fn a_namespace_is_another_one_and_the_thread_comes_back() {
    if !root() {
        return;
    }
    let home = thread_inode();
    let one = Namespace::new().unwrap();
    let two = Namespace::new().unwrap();
    assert_eq!(thread_inode(), home);
    assert_eq!(Namespace::current().unwrap().inode(), home);
    assert_ne!(one.inode(), home);
    assert_ne!(one.inode(), two.inode());
    {
        let _outer = one.enter().unwrap();
        assert_eq!(thread_inode(), one.inode());
        {
            let _inner = two.enter().unwrap();
            assert_eq!(thread_inode(), two.inode());
        }
        assert_eq!(thread_inode(), one.inode());
    }
    assert_eq!(thread_inode(), home);
    assert_eq!(one.run(thread_inode).unwrap(), one.inode());
    assert_eq!(two.spawn("inside", thread_inode).unwrap().join().unwrap(), two.inode());
    assert_eq!(thread_inode(), home);
    // A panic inside comes out, and the caller is where it was.
    let inside = std::panic::catch_unwind(|| one.run(|| panic!("as asked")));
    assert!(inside.is_err());
    assert_eq!(thread_inode(), home);
}

#[test]
fn a_new_namespace_has_loopback_and_nothing_else() {
    if !root() {
        return;
    }
    let namespace = Namespace::new().unwrap();
    let links = namespace.links().unwrap();
    assert_eq!(links.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["lo"]);
    assert!(links[0].up);
    let _inside = namespace.enter().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    TcpStream::connect(listener.local_addr().unwrap()).unwrap();
}

#[test]
fn a_pair_is_what_was_asked_for_and_carries_traffic() {
    if !root() {
        return;
    }
    let left = Namespace::new().unwrap();
    let right = Namespace::new().unwrap();
    let v4 = |last| IpAddr::from(Ipv4Addr::new(10, 77, 0, last));
    let v6 = |last| IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, last]);
    let (one, other) = veth::pair(
        &VethEnd::new(&left, "one").mac(A).mtu(1400).queues(2, 3).address(v4(1), 24).address(v6(1), 64),
        &VethEnd::new(&right, "other").mac(B).mtu(1300).queues(3, 2).address(v4(2), 24).address(v6(2), 64),
    )
    .unwrap();
    let (s1, s2) = (one.status().unwrap(), other.status().unwrap());
    assert_eq!((s1.mac, s1.mtu, s1.rx_queues, s1.tx_queues), (Some(A), 1400, 2, 3));
    assert_eq!((s2.mac, s2.mtu, s2.rx_queues, s2.tx_queues), (Some(B), 1300, 3, 2));
    assert!(s1.up && s1.running && s2.up && s2.running);
    assert_eq!((s1.xdp_program, s2.xdp_program), (None, None));
    assert_eq!(one.offloads().unwrap() & (Offloads::TX_CHECKSUM | Offloads::SEGMENTATION), Offloads::empty());
    // An independent view: iproute2, run inside.
    let ip = left.run(|| std::process::Command::new("ip").args(["-d", "addr", "show", "one"]).output());
    let ip = String::from_utf8(ip.unwrap().unwrap().stdout).unwrap();
    for part in
        ["02:00:00:00:00:0a", "mtu 1400", "numtxqueues 3", "numrxqueues 2", "10.77.0.1/24", "fd77::1/64"]
    {
        assert!(ip.contains(part), "{part} is not in:\n{ip}");
    }
    for (from, to) in [(v4(1), v4(2)), (v6(1), v6(2))] {
        let server = {
            let _in = right.enter().unwrap();
            UdpSocket::bind((to, 7000)).unwrap()
        };
        let client = {
            let _in = left.enter().unwrap();
            UdpSocket::bind((from, 0)).unwrap()
        };
        server.set_read_timeout(Some(SECOND)).unwrap();
        client.send_to(b"over the wire", (to, 7000)).unwrap();
        let mut bytes = [0; 64];
        let (n, sender) = server.recv_from(&mut bytes).unwrap();
        assert_eq!((&bytes[..n], sender.ip()), (&b"over the wire"[..], from));
    }
    assert!(other.status().unwrap().rx_packets > s2.rx_packets);
    // Down at one end is not running at the other.
    other.down().unwrap();
    assert!(!other.status().unwrap().up);
    assert!(!one.status().unwrap().running);
    other.up().unwrap();
    assert!(one.wait_running(SECOND).unwrap());
    one.set_mtu(9000).unwrap();
    assert_eq!(one.status().unwrap().mtu, 9000);
    one.set_mac([2, 9, 9, 9, 9, 9]).unwrap();
    assert_eq!(one.status().unwrap().mac, Some([2, 9, 9, 9, 9, 9]));
    one.set_offloads(Offloads::TX_CHECKSUM | Offloads::SEGMENTATION, true).unwrap();
    assert!(one.offloads().unwrap().contains(Offloads::TX_CHECKSUM | Offloads::SEGMENTATION));
    one.delete().unwrap();
    assert!(matches!(other.status(), Err(LabError::NoSuchLink { .. })));
}

#[test]
fn raw_frames_arrive_byte_for_byte_and_nothing_else_does() {
    if !root() {
        return;
    }
    let left = Namespace::new().unwrap();
    let right = Namespace::new().unwrap();
    let (one, other) =
        veth::pair(&VethEnd::new(&left, "one").mac(A).down(), &VethEnd::new(&right, "other").mac(B).down())
            .unwrap();
    let sender = PacketSocket::open(&one).unwrap();
    let mut receiver = PacketSocket::open(&other).unwrap();
    one.up().unwrap();
    other.up().unwrap();
    assert!(one.wait_running(SECOND).unwrap() && other.wait_running(SECOND).unwrap());
    let tagged = [&B[..], &A, &[0x81, 0, 0x60, 7, 0x88, 0xb5], &[9; 46]].concat();
    let double = [&B[..], &A, &[0x88, 0xa8, 0, 5, 0x81, 0, 0x60, 7, 0x88, 0xb5], &[8; 46]].concat();
    let to_other = frame([2, 7, 7, 7, 7, 7], A, &[1; 1500]);
    for sent in [frame(B, A, b"x"), frame([0xff; 6], A, &[3; 46]), tagged, double, to_other] {
        sender.send(&sent).unwrap();
        let got = receiver.receive_matching(SECOND, |f| f[6..12] == A).unwrap();
        assert_eq!(got.as_deref(), Some(sent.as_slice()));
    }
    assert!(sender.send(&frame(B, A, &[0; 1600])).is_err(), "longer than the MTU");
    // Without addresses of IPv6's own making there is silence.
    assert_eq!(receiver.receive(Duration::from_millis(300)).unwrap(), None);
}

#[test]
fn a_namespace_is_gone_with_its_descriptor() {
    if !root() {
        return;
    }
    let stays = Namespace::new().unwrap();
    let goes = Namespace::new().unwrap();
    let (one, _other) = veth::pair(&VethEnd::new(&stays, "one"), &VethEnd::new(&goes, "other")).unwrap();
    let twin = goes.try_clone().unwrap();
    drop(goes);
    assert!(one.status().is_ok(), "the twin still holds it");
    drop(twin);
    // The kernel deletes it in the background.
    let deadline = Instant::now() + 10 * SECOND;
    while one.status().is_ok() {
        assert!(Instant::now() < deadline, "the namespace was not deleted");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn failures_name_the_thing() {
    if !root() {
        return;
    }
    let namespace = Namespace::new().unwrap();
    let missing = namespace.link("nosuch").unwrap_err();
    assert_eq!(missing.to_string(), "there is no interface nosuch in the namespace");
    let long =
        veth::pair(&VethEnd::new(&namespace, "a-name-that-is-too-long"), &VethEnd::new(&namespace, "b"));
    assert!(long.unwrap_err().to_string().contains("a-name-that-is-too-long"));
    // Made, but an address is refused: nothing of the pair stays.
    let bad = VethEnd::new(&namespace, "one").address(Ipv4Addr::new(10, 0, 0, 1), 99);
    assert!(veth::pair(&bad, &VethEnd::new(&namespace, "two")).is_err());
    assert_eq!(namespace.links().unwrap().len(), 1);
    let sysctl = namespace.set_sysctl("ipv4/no_such_parameter", "1").unwrap_err();
    assert!(sysctl.to_string().contains("/proc/sys/net/ipv4/no_such_parameter"));
    namespace.set_sysctl("ipv4/ip_forward", "1").unwrap();
    let elsewhere = Namespace::new().unwrap();
    let read =
        |n: &Namespace| n.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap()).unwrap();
    assert_eq!((read(&namespace).trim(), read(&elsewhere).trim()), ("1", "0"));
}

#[test]
fn no_thread_is_started_and_no_descriptor_stays_open() {
    if !root() {
        return;
    }
    // In a process of its own: the test harness has threads of its own that come and go.
    let me = std::env::current_exe().unwrap();
    let output = std::process::Command::new(me)
        .args(["--exact", "inside_a_process_of_its_own", "--nocapture", "--test-threads=1"])
        .env("ISOPLANE_LAB_ALONE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// The other half of the test above; alone it has nothing to say.
#[test]
fn inside_a_process_of_its_own() {
    if std::env::var_os("ISOPLANE_LAB_ALONE").is_none() {
        return;
    }
    let count = || (threads(), std::fs::read_dir("/proc/self/fd").unwrap().count());
    let before = count();
    {
        let left = Namespace::new().unwrap();
        let right = Namespace::new().unwrap();
        let (one, other) = veth::pair(&VethEnd::new(&left, "one"), &VethEnd::new(&right, "other")).unwrap();
        let _socket = PacketSocket::open(&one).unwrap();
        other.set_mtu(1400).unwrap();
        // Two namespaces and the socket; no thread.
        assert_eq!(count(), (before.0, before.1 + 3));
    }
    assert_eq!(count(), before);
}
