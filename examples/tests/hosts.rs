//! The host examples serve clients of the kernel's own TCP/IP, and stay strict while they do.

use isoplane::isolation::Cause;
use isoplane::memory::stats::{SegmentReader, find};
use isoplane_lab::{Namespace, Seen, VethEnd, Witnesses, veth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
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
