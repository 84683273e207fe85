//! A bridge whose file changes under traffic.

use crate::process::{Run, alone, file_in, shown, total, wait_until};
use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, VethEnd, veth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::MutexGuard;

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

/// Two hosts, and between them a namespace with the bridge's ports.
struct Hosts {
    client: Namespace,
    server: Namespace,
    middle: Namespace,
    _alone: MutexGuard<'static, ()>,
}

impl Hosts {
    /// `None`, said, where there is no root.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: AF_XDP and network namespaces need root");
            return None;
        }
        let alone = alone();
        let [client, server, middle] = std::array::from_fn(|_| Namespace::new().unwrap());
        middle.disable_ipv6().unwrap();
        for (host, address, port) in [(&client, CLIENT, "left"), (&server, SERVER, "right")] {
            let host = VethEnd::new(host, "eth0").address(address, 24);
            veth::pair(&host, &VethEnd::new(&middle, port)).unwrap();
        }
        Some(Self { client, server, middle, _alone: alone })
    }

    fn traffic(&self) -> Traffic {
        let end = |namespace, address: Ipv4Addr| Endpoint { namespace, address: IpAddr::from(address) };
        let flows = [Flow::Echo { window: 4, largest: 1472 }, Flow::Datagrams { window: 16, largest: 1472 }];
        Traffic::start(end(&self.client, CLIENT), end(&self.server, SERVER), &flows).unwrap()
    }
}

/// A bridge for the hosts above.
const LIVE: &str = r#"
name = "run-live"
log = "warn"
[pool]
huge-pages = "never"
[[port]]
device = "left"
mode = "copy"
[[port]]
device = "right"
mode = "copy"
[[worker]]
name = "bridge"
idle = "yield"
[bridge]
"#;

#[test]
fn a_file_that_changes_under_traffic_is_followed_without_a_packet_lost() {
    let Some(hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = file_in(folder.path(), LIVE);
    let mut run = Run::start(&hosts.middle, &file);
    let program = run.child.id();
    let traffic = hosts.traffic();
    let moved = || total("run-live", program, "tx_frames");
    wait_until("forwarding", || moved() > 500);

    // What can change does, and what cannot is said.
    let station = "[[bridge.station]]\nmac = \"02:00:00:00:00:77\"\nport = \"right\"\n";
    let live = format!(
        "{}ageing = \"1min\"\n[bridge.flood]\nburst = 100\n{station}",
        LIVE.replace("\"warn\"", "\"debug\"").replace("\"yield\"", "\"spin\"")
    );
    file_in(folder.path(), &live);
    run.signal(Signal::SIGHUP);
    assert_eq!(
        run.said("reloaded:"),
        [
            "bridge.ageing: changed from 300s to 60s",
            "bridge.flood.burst: changed from 2048 to 100",
            "bridge.station.02:00:00:00:00:77: changed from absent to \"right\"",
            "log: changed from \"warn\" to \"debug\"",
            "worker.bridge.idle: stays \"yield\"; \"spin\" needs a restart",
            "reloaded: 4 changed, 1 needs a restart",
        ]
    );
    wait_until("the station is known", || total("run-live", program, "stations") == 3);

    // A file with mistakes changes nothing.
    file_in(folder.path(), &live.replace("\"1min\"", "\"1parsec\""));
    run.signal(Signal::SIGHUP);
    let said = run.said("nothing was changed");
    assert!(said[0].contains("`ageing` is \"1parsec\"; expected a time"), "{said:?}");
    assert_eq!(said[1], "1 mistake; nothing was changed");

    // Many more, one after the other; what came goes.
    for round in 0..50 {
        let burst = if round % 2 == 0 { "burst = 200" } else { "burst = 100" };
        let without = live.replace(station, "").replace("burst = 100", burst);
        file_in(folder.path(), if round % 2 == 0 { &without } else { &live });
        run.signal(Signal::SIGHUP);
        run.said("reloaded: 2 changed, 1 needs a restart");
    }
    let before = moved();
    wait_until("forwarding goes on", || moved() > before + 500);
    for flow in traffic.stop() {
        assert!(flow.is_clean(), "{flow:?}");
    }
    for counter in ["drop_tx_full", "drop_no_frame", "drop_malformed", "drop_no_port", "drop_storm"] {
        assert_eq!(total("run-live", program, counter), 0, "{counter}");
    }
    let (good, said) = run.stop();
    assert!(good, "{said}");
}

#[test]
fn a_worker_that_starts_again_is_told_what_has_changed_since_the_launch() {
    let Some(hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = LIVE.replace("run-live", "run-again");
    let file = file_in(folder.path(), &text);
    let mut run = Run::start(&hosts.middle, &file);
    let program = run.child.id();
    let station = "[[bridge.station]]\nmac = \"02:00:00:00:00:77\"\nport = \"right\"\n";
    file_in(folder.path(), &format!("{text}{station}"));
    run.signal(Signal::SIGHUP);
    run.said("reloaded: 1 changed, 0 need a restart");
    let stations = || total("run-again", program, "stations");
    wait_until("the station is known", || stations() == 1);

    let worker = || shown("run-again", program)?["workers"][0]["pid"].as_i64();
    let mut first = None;
    wait_until("a worker", || {
        first = worker();
        first.is_some()
    });
    kill(Pid::from_raw(first.unwrap() as i32), Signal::SIGKILL).unwrap();
    wait_until("another worker", || worker().is_some_and(|pid| Some(pid) != first));
    // The counter is the dead worker's until the new one sets it; a change shows that it is the new one's.
    let traffic = hosts.traffic();
    wait_until("the station is known again, and the hosts are", || stations() == 3);
    for flow in traffic.stop() {
        assert!(flow.is_clean(), "{flow:?}");
    }
    let (good, said) = run.stop();
    assert!(said.contains("frames accounted for"), "{said}");
    assert!(good, "{said}");
}
