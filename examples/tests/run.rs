//! Every example runs and says what its page promises.

use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, VethEnd, veth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Cargo builds the examples of this package next to its tests.
fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("this test has a path");
    path.pop();
    path.pop();
    path.join("examples").join(name)
}

fn run(name: &str, args: &[&str]) -> Output {
    let path = example(name);
    Command::new(&path).args(args).output().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn embedded_counts_what_it_echoed() {
    let output = run("embedded", &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("the app has seen 64 packets, 60 came back"), "{text}");
    assert!(text.contains("echoed 60, refused 4"), "{text}");
}

/// `l2fwd left right` in a namespace between two hosts: their pings pass, and Ctrl-C ends it cleanly.
#[test]
fn l2fwd_bridges_two_hosts() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: making network namespaces needs root");
        return;
    }
    let [left, right, middle] = [(); 3].map(|()| Namespace::new().expect("namespace"));
    let addresses = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
    for ((host, name), address) in [(&left, "left"), (&right, "right")].into_iter().zip(addresses) {
        let end = VethEnd::new(host, "eth0").address(address, 24);
        veth::pair(&end, &VethEnd::new(&middle, name)).expect("veth pair");
    }
    let l2fwd = {
        let _inside = middle.enter().expect("enter the namespace");
        Command::new(example("l2fwd")).args(["left", "right"]).stdout(Stdio::piped()).spawn().expect("l2fwd")
    };
    let ends = [
        Endpoint { namespace: &left, address: addresses[0].into() },
        Endpoint { namespace: &right, address: addresses[1].into() },
    ];
    let start = Instant::now();
    loop {
        let flow = Flow::Echo { window: 4, largest: 1400 };
        let traffic = Traffic::start(ends[0], ends[1], &[flow]).expect("traffic");
        std::thread::sleep(Duration::from_millis(200));
        let reports = traffic.stop();
        if reports[0].counts.verified > 0 && reports[0].counts.lost == 0 {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no answer through l2fwd: {reports:?}");
    }
    kill(Pid::from_raw(l2fwd.id() as i32), Signal::SIGINT).expect("SIGINT");
    let output = l2fwd.wait_with_output().expect("wait");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("18432 of 18432 frames accounted for"), "{text}");
}

#[test]
fn l2fwd_says_what_is_wrong() {
    let usage = run("l2fwd", &["only-one"]);
    assert!(!usage.status.success());
    assert!(String::from_utf8_lossy(&usage.stderr).contains("usage: l2fwd IFACE IFACE"));
    if nix::unistd::geteuid().is_root() {
        let unknown = run("l2fwd", &["nosuch0", "nosuch1"]);
        assert!(!unknown.status.success());
        assert!(
            String::from_utf8_lossy(&unknown.stderr).contains("l2fwd: there is no interface \"nosuch0\""),
            "{unknown:?}"
        );
    }
}
