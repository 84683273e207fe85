//! The host examples serve clients of the kernel's own TCP/IP, and stay strict while they do.

use isoplane::isolation::Cause;
use isoplane::memory::stats::{SegmentReader, find};
use isoplane_lab::{Namespace, Seen, VethEnd, Witnesses, veth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
/// How long a client waits for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// Cargo builds the examples of this package next to its tests.
fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("this test has a path");
    path.pop();
    path.pop();
    path.join("examples").join(name)
}

/// An example that runs; killed when the test ends early.
struct Server {
    program: Child,
    statistics: SegmentReader,
    clients: Namespace,
    _servers: Namespace,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

impl Server {
    /// Starts `name eth0 ADDRESS PORT` at one end of a wire, with clients at the other.
    fn start(name: &str, address: &str, port: u16) -> Option<Self> {
        Self::start_with(name, address, port, &[])
    }

    fn start_with(name: &str, address: &str, port: u16, more: &[&str]) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: making network namespaces needs root");
            return None;
        }
        let [servers, clients] = [(); 2].map(|()| Namespace::new().expect("namespace"));
        let ends = [
            VethEnd::new(&clients, "eth0").address(CLIENT, 24).address(CLIENT6, 64),
            VethEnd::new(&servers, "eth0"),
        ];
        veth::pair(&ends[0], &ends[1]).expect("veth pair");
        let program = {
            let _inside = servers.enter().expect("enter the namespace");
            Command::new(example(name))
                .args(["eth0", address, &port.to_string()])
                .args(more)
                .stdout(Stdio::null())
                .spawn()
                .expect("start")
        };
        let start = Instant::now();
        loop {
            let found = find(Some(name)).expect("/proc").into_iter().find(|f| f.pid == program.id());
            if let Some(found) = found.filter(|f| f.reader.total("turns") > 0 && f.reader.total("pid") != 0) {
                return Some(Self { program, statistics: found.reader, clients, _servers: servers });
            }
            assert!(start.elapsed() < PATIENCE, "{name} does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn connect(&self, to: SocketAddr) -> TcpStream {
        let start = Instant::now();
        loop {
            // IPv6 addresses are tentative at first.
            match self.clients.run(|| TcpStream::connect_timeout(&to, PATIENCE)).expect("namespace") {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
                    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
                    stream.set_nodelay(true).expect("no delay");
                    return stream;
                }
                Err(error) => assert!(start.elapsed() < PATIENCE, "{to}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn count(&self, name: &str) -> u64 {
        self.statistics.total(name)
    }

    /// Ctrl-C, and a clean end.
    fn stop(mut self) {
        kill(Pid::from_raw(self.program.id() as i32), Signal::SIGINT).expect("SIGINT");
        assert!(self.program.wait().expect("wait").success());
    }
}

/// Bytes that do not repeat early.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Sends `bytes`, closes that half, and reads until the end: what came back.
fn echoed(stream: TcpStream, bytes: &[u8]) -> Vec<u8> {
    let mut back = Vec::new();
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone().expect("clone");
        scope.spawn(move || {
            writer.write_all(bytes).expect("write");
            writer.shutdown(Shutdown::Write).expect("half-close");
        });
        (&stream).read_to_end(&mut back).expect("read");
    });
    back
}

#[test]
fn tcp_echo_serves_kernel_clients_strictly() {
    let Some(server) = Server::start("tcp_echo", &format!("{SERVER}/24"), 7) else { return };
    let to = SocketAddr::from((SERVER, 7));
    // All that is new happens before anybody watches: the neighbour, the first connection.
    assert_eq!(echoed(server.connect(to), b"first"), b"first");
    let pid = u32::try_from(server.count("pid")).expect("a pid");
    let witnesses = Witnesses::attach(pid).expect("witnesses");
    let bulk = pattern(8 << 20);
    assert!(echoed(server.connect(to), &bulk) == bulk, "what came back is not what was sent");
    for n in 0..200_u32 {
        let message = n.to_be_bytes();
        assert_eq!(echoed(server.connect(to), &message), message);
    }
    let seen = witnesses.detach().expect("what they saw");
    assert_eq!(seen, Seen::default());
    assert_eq!(server.count("tcp_accepted"), 202);
    for cause in Cause::ALL {
        assert_eq!(server.count(&format!("breach_{cause}")), 0, "{cause}");
    }
    assert_eq!(server.count("slow_path_visits"), 0);
    server.stop();
}

#[test]
fn tcp_echo_speaks_ipv6_and_resets_what_it_does_not_serve() {
    let Some(server) = Server::start("tcp_echo", &format!("{SERVER6}/64"), 80) else { return };
    let to = SocketAddr::from((SERVER6, 80));
    assert_eq!(echoed(server.connect(to), b"over IPv6"), b"over IPv6");
    let nobody = SocketAddr::from((SERVER6, 81));
    let refused = server.clients.run(|| TcpStream::connect_timeout(&nobody, PATIENCE)).expect("namespace");
    assert_eq!(refused.expect_err("nobody listens").kind(), ErrorKind::ConnectionRefused);
    // A client that resets takes nothing with it.
    let rude = server.connect(to);
    (&rude).write_all(b"unread").expect("write");
    nix::sys::socket::setsockopt(&rude, nix::sys::socket::sockopt::Linger, &reset_on_close())
        .expect("linger");
    drop(rude);
    let start = Instant::now();
    while server.count("tcp_broken") == 0 {
        assert!(start.elapsed() < PATIENCE, "the reset was not seen");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(echoed(server.connect(to), b"still there"), b"still there");
    server.stop();
}

/// Closing sends a reset.
fn reset_on_close() -> nix::libc::linger {
    nix::libc::linger { l_onoff: 1, l_linger: 0 }
}

#[test]
fn udp_echo_answers_datagrams_of_every_length() {
    let Some(server) = Server::start("udp_echo", &format!("{SERVER}/24"), 7) else { return };
    let client = server.clients.run(|| UdpSocket::bind((CLIENT, 0))).expect("namespace").expect("bind");
    client.set_read_timeout(Some(Duration::from_millis(200))).expect("timeout");
    client.connect((SERVER, 7)).expect("connect");
    let bytes = pattern(1472);
    let mut back = [0; 2000];
    for len in (0..=1472).step_by(16) {
        let start = Instant::now();
        loop {
            // A datagram may be lost: the neighbour is asked for first.
            client.send(&bytes[..len]).expect("send");
            match client.recv(&mut back) {
                Ok(received) => {
                    assert_eq!(&back[..received], &bytes[..len]);
                    break;
                }
                Err(error) => assert!(start.elapsed() < PATIENCE, "{len} bytes: {error}"),
            }
        }
    }
    for cause in Cause::ALL {
        assert_eq!(server.count(&format!("breach_{cause}")), 0, "{cause}");
    }
    server.stop();
}

/// Reads one answer: its head and its body.
fn answer(stream: &mut TcpStream) -> (String, Vec<u8>) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(stream.read(&mut byte).expect("read"), 1, "the connection ended within an answer");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("text");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).expect("length");
    let mut body = vec![0; length.parse().expect("a number")];
    stream.read_exact(&mut body).expect("body");
    (head, body)
}

#[test]
fn http_keeps_connections_alive_and_answers_pipelined_requests_in_order() {
    let Some(server) = Server::start("http", &format!("{SERVER}/24"), 80) else { return };
    let to = SocketAddr::from((SERVER, 80));
    let mut stream = server.connect(to);
    let requests =
        ["/", "/nothing", "/metrics"].map(|path| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
    // 300 requests, more than the server's buffers hold; their ends fall anywhere.
    let all = requests.concat().repeat(100);
    let mut writer = stream.try_clone().expect("clone");
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for piece in all.as_bytes().chunks(977) {
                writer.write_all(piece).expect("write");
            }
        });
        for round in 0..100 {
            let (head, body) = answer(&mut stream);
            assert!(
                head.starts_with("HTTP/1.1 200 OK\r\n") && body.starts_with(b"<!doctype html>"),
                "{head}"
            );
            let (head, _) = answer(&mut stream);
            assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
            let (_, body) = answer(&mut stream);
            let metrics = String::from_utf8(body).expect("text");
            assert!(metrics.contains(&format!("http_requests_total {}\n", (round + 1) * 3)), "{metrics}");
        }
    });
    stream.write_all(b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\n\r\n").expect("write");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).expect("the end");
    assert!(rest.starts_with("HTTP/1.1 200 OK") && rest.ends_with("\r\n\r\n"), "{rest}");
    for (bad, status) in [
        ("nonsense\r\n\r\n".to_owned(), "400"),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello".to_owned(), "413"),
        ("DELETE / HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned(), "405"),
        (format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(8000)), "431"),
    ] {
        let mut stream = server.connect(to);
        stream.write_all(bad.as_bytes()).expect("write");
        let mut answer = Vec::new();
        // What was not read of a request may end the connection with a reset.
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bad:?}: {answer:?}");
    }
    for cause in Cause::ALL {
        assert_eq!(server.count(&format!("breach_{cause}")), 0, "{cause}");
    }
    server.stop();
}

/// A back-end of the kernel: says `name` to whoever connects, and echoes.
fn backend(clients: &Namespace, port: u16, name: &'static str, met: &Arc<AtomicU32>) -> TcpListener {
    let listener = clients.run(|| TcpListener::bind((CLIENT, port))).expect("namespace").expect("bind");
    let (accepting, met) = (listener.try_clone().expect("clone"), Arc::clone(met));
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = accepting.accept() {
            met.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || {
                let _ = stream.write_all(name.as_bytes());
                let mut bytes = [0; 4096];
                while let Ok(read @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..read]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    listener
}

#[test]
fn proxy_spreads_connections_over_the_back_ends_that_answer() {
    let backends = [format!("{CLIENT}:8001"), format!("{CLIENT}:8002")];
    let more: Vec<&str> = backends.iter().map(String::as_str).collect();
    let Some(server) = Server::start_with("proxy", &format!("{SERVER}/24"), 80, &more) else { return };
    let to = SocketAddr::from((SERVER, 80));
    let met = Arc::new(AtomicU32::new(0));
    let talk = |message: &[u8]| {
        let stream = server.connect(to);
        let mut back = vec![];
        std::thread::scope(|scope| {
            let mut writer = stream.try_clone().expect("clone");
            scope.spawn(move || {
                let _ = writer.write_all(message).and_then(|()| writer.shutdown(Shutdown::Write));
            });
            let _ = (&stream).read_to_end(&mut back);
        });
        back
    };
    let wait_for = |what: &str, is: &dyn Fn(&[Vec<u8>]) -> bool| {
        let start = Instant::now();
        loop {
            let answers: Vec<_> = (0..4).map(|_| talk(b"?")).collect();
            if is(&answers) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: {answers:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    // Nobody there: connections are reset.
    assert_eq!(talk(b"?"), b"");
    let _first = backend(&server.clients, 8001, "one ", &met);
    wait_for("the first alone", &|answers| answers.iter().all(|answer| answer == b"one ?"));
    let _second = backend(&server.clients, 8002, "two ", &met);
    wait_for("in turn", &|answers| {
        let ones = answers.iter().filter(|answer| *answer == b"one ?").count();
        ones == 2 && answers.iter().filter(|answer| *answer == b"two ?").count() == 2
    });
    let bulk = pattern(2 << 20);
    let back = talk(&bulk);
    assert!(back.get(4..) == Some(&bulk[..]), "{} bytes came back", back.len());
    for cause in Cause::ALL {
        assert_eq!(server.count(&format!("breach_{cause}")), 0, "{cause}");
    }
    assert!(met.load(Ordering::Relaxed) > 0 && server.count("tcp_connected") > 0);
    server.stop();
}
