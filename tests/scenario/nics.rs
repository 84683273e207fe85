//! A bridge between two PCI functions, which VFIO has, with a kernel at the other end of each one's cable:
//! `scenario NAME FUNCTION FUNCTION INTERFACE INTERFACE`, the interfaces being the other ends.

use crate::network::{Hosts, LEFT, Plane, RIGHT, assert_nothing_lost};
use crate::peer::{PATIENCE, kill_worker, pool, wait_for};
use isoplane::blocks::bridge::{Bridge, BridgeConfig};
use isoplane::drivers::{LinkState, Opener};
use isoplane::{Dataplane, Idle, Worker};
use isoplane_lab::Namespace;
use isoplane_lab::traffic::{Flow, Traffic};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::time::Duration;

/// What follows the scenario's name: functions and interfaces.
fn words() -> ([String; 2], [String; 2]) {
    let mut words = std::env::args().skip(2);
    let mut two = || [(); 2].map(|()| words.next().expect("two functions and two interfaces"));
    (two(), two())
}

/// The interfaces, each in a namespace of its own. The kernel takes them back with the namespaces.
fn hosts(interfaces: &[String; 2]) -> Hosts {
    let [left, right] = [(0, LEFT), (1, RIGHT)].map(|(n, address)| {
        let (namespace, name) = (Namespace::new().expect("namespace"), &interfaces[n]);
        let to = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd());
        let moved = Command::new("ip").args(["link", "set", name, "netns", &to]).status().expect("ip");
        assert!(moved.success(), "moving {name}");
        let link = namespace.link(name).expect("link");
        link.add_address(address, 24).expect("address");
        link.up().expect("up");
        assert!(link.wait_running(PATIENCE).expect("status"), "{name} has no link");
        namespace
    });
    Hosts::of(left, right)
}

fn bridge(functions: &[String; 2]) -> Plane {
    let pool = pool("bridge", 8192);
    let mut plane = Dataplane::builder("bridge");
    let mut opener = Opener::new(&pool);
    let ports = functions.each_ref().map(|function| {
        let port = opener.open(function, 1).expect("port");
        wait_for("the link", || port.link() == LinkState::Up);
        plane.boxed_port(port)
    });
    let worker =
        Worker::new("w0").idle(Idle::Yield).counters(&Bridge::FIELDS).queue(ports[0], 0).queue(ports[1], 0);
    plane.worker(worker, |_| Bridge::new(&BridgeConfig::new(2)).expect("bridge"));
    let running = plane.launch().expect("launch");
    Plane { pool, running, ports }
}

/// May the device read and write memory, by its command register?
fn masters(function: &String) -> bool {
    let config = std::fs::read(format!("/sys/bus/pci/devices/{function}/config")).expect("configuration");
    config[4] & 1 << 2 != 0
}

/// The worker is killed under traffic, again and again: its successor goes on with the rings as they are, and in the
/// end every frame is back.
pub(crate) fn worker_killed() {
    let (functions, interfaces) = words();
    let hosts = hosts(&interfaces);
    let plane = bridge(&functions);
    hosts.wait_for_traffic();
    for _ in 0..3 {
        let (left, right) = hosts.endpoints();
        let flow = Flow::Datagrams { window: 64, largest: 1472 };
        let traffic = Traffic::start(left, right, &[flow]).expect("traffic");
        wait_for("packets on their way", || traffic.reports()[0].counts.verified > 100);
        kill_worker(&plane.running);
        let before = traffic.reports()[0].counts.verified;
        wait_for("packets again", || traffic.reports()[0].counts.verified > before + 100);
        let reports = traffic.stop();
        // What was in the worker's hands is gone with it, no more: the window bounds it.
        assert!(reports[0].counts.lost <= 64 && reports[0].counts.corrupt == 0, "{reports:?}");
        assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    }
    assert_eq!(plane.running.restarts(0), Some(3));
    assert!(functions.iter().all(masters), "the devices have gone on");
    assert_eq!(plane.running.statistics().total("bad_descriptors"), 0);
    plane.end();
    assert!(!functions.iter().any(masters));
}

/// `kill -9` of the program: its processes and its devices stop, and a new one begins anew.
pub(crate) fn program_killed() {
    let (functions, interfaces) = words();
    let hosts = hosts(&interfaces);
    for _ in 0..2 {
        let (mut says, tell) = std::io::pipe().expect("pipe");
        // SAFETY: this process has one thread here: traffic threads of the last round were joined.
        #[allow(unsafe_code, reason = "fork")]
        match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                drop(says);
                let plane = bridge(&functions);
                let pids = [plane.running.zygote_pid(), plane.running.worker_pid(0)].map(|p| p.expect("pid"));
                std::io::Write::write_all(&mut &tell, bytemuck::cast_slice(&pids)).expect("tell");
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
            ForkResult::Parent { child } => {
                drop(tell);
                let mut pids = [0_u32; 2];
                let told = std::io::Read::read_exact(&mut says, bytemuck::cast_slice_mut(&mut pids));
                told.expect("the program starts, also right after the last one was killed");
                hosts.wait_for_traffic();
                kill(child, Signal::SIGKILL).expect("kill");
                waitpid(child, None).expect("wait");
                let gone = |pid: &u32| {
                    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                    stat.is_empty() || stat.contains(") Z")
                };
                wait_for("zygote and worker to be gone", || pids.iter().all(gone));
                wait_for("the devices to be quiet", || !functions.iter().any(masters));
            }
        }
    }
    let plane = bridge(&functions);
    hosts.wait_for_traffic();
    assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    plane.end();
}
