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
    Command::new(&path)
        .args(args)
        .env("NO_COLOR", "1")
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn embedded_counts_what_it_echoed() {
    let output = run("embedded", &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("the app has seen 64 packets, 60 came back"), "{text}");
    assert!(text.contains("echoed 60, refused 4"), "{text}");
}

/// The number at the start of what follows `label` on its line.
fn count(text: &str, label: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(label));
    let number = line.and_then(|line| line[label.len()..].split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {label} in:\n{text}"))
}

/// Standard output and standard error of an example that ended well.
fn said(output: &Output) -> (String, String) {
    let [out, log] =
        [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{out}{log}");
    (out, log)
}

/// Whether the backend of this machine enforces; the reason not to look for breaches is printed.
fn enforces(text: &str) -> bool {
    let advisory = text.lines().any(|line| line.starts_with("backend") && line.ends_with("advisory"));
    if advisory {
        eprintln!("skipped: no breach is caught here, there is no backend but advisory");
    }
    !advisory
}

#[test]
fn strict_loop_makes_its_turns_without_a_breach() {
    let (text, log) = said(&run("strict_loop", &[]));
    assert!(text.contains("half of the turns are made"), "{text}");
    assert_eq!(count(&text, "breaches "), 0, "{text}{log}");
    assert_eq!(count(&text, "slow path "), 1, "{text}");
    // A machine may leave the CPU alone; what is counted by cause adds up all the same.
    let causes = text.lines().find(|line| line.starts_with("interruptions ")).expect("interruptions");
    let by_cause: u64 =
        causes.split(['{', ',', '}']).filter_map(|part| part.rsplit_once(": ")?.1.parse::<u64>().ok()).sum();
    assert_eq!(by_cause, count(&text, "interruptions "), "{text}");
}

#[test]
fn strict_loop_reports_the_call_that_breaks_it() {
    let (text, log) = said(&run("strict_loop", &["--break"]));
    if !enforces(&text) {
        return;
    }
    assert!(text.contains("breaches       1 {\"syscall\": 1}"), "{text}{log}");
    let reports: Vec<&str> = log.lines().filter(|line| line.contains("isolation was broken")).collect();
    assert_eq!(reports.len(), 1, "{log}");
    assert!(reports[0].contains("getppid") && reports[0].contains("system call 110 "), "{log}");
    // The report is a visit of its own, and the loop is strict again after it.
    assert_eq!(count(&text, "slow path "), 2, "{text}");
}

#[test]
fn strict_loop_says_what_is_wrong() {
    for (args, wrong) in
        [(["nosuch"], "usage: strict_loop [CPU] [--break]"), (["8191"], "there is no CPU 8191")]
    {
        let output = run("strict_loop", &args);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && log.contains(wrong), "{log}");
    }
}

#[test]
fn slow_path_logs_within_its_budget_and_goes_on() {
    let (text, log) = said(&run("slow_path", &[]));
    assert!(text.contains("5 errors: 3 logged, 2 over the budget"), "{text}");
    assert!(text.contains("slow path      3 visits, 2 refused"), "{text}");
    assert_eq!(count(&text, "breaches "), 0, "{text}{log}");
    assert!(text.contains("interruptions  "), "{text}");
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("this packet looks bad")).collect();
    assert_eq!(lines.len(), 3, "{log}");
    for (line, packet) in lines.into_iter().zip(["10000000", "20000000", "30000000"]) {
        assert!(line.contains(packet), "{log}");
    }
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
    assert!(String::from_utf8_lossy(&usage.stderr).contains("usage: l2fwd [--unsafe-noiommu] PORT PORT"));
    if nix::unistd::geteuid().is_root() {
        let unknown = run("l2fwd", &["nosuch0", "nosuch1"]);
        assert!(!unknown.status.success());
        assert!(
            String::from_utf8_lossy(&unknown.stderr).contains("l2fwd: there is no interface \"nosuch0\""),
            "{unknown:?}"
        );
    }
}

/// `l3fwd left right` between two networks: their hosts reach each other by the kernel's routes.
#[test]
fn l3fwd_routes_between_two_hosts() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: making network namespaces needs root");
        return;
    }
    let [left, right, middle] = [(); 3].map(|()| Namespace::new().expect("namespace"));
    middle.set_sysctl("ipv4/conf/all/forwarding", "1").expect("forwarding");
    let host = |network: u8| Ipv4Addr::new(198, 51, 100, network + 1);
    let router = |network: u8| Ipv4Addr::new(198, 51, 100, network + 2);
    for (namespace, name, network) in [(&left, "left", 0), (&right, "right", 128)] {
        let end = VethEnd::new(namespace, "eth0").address(host(network), 25);
        veth::pair(&end, &VethEnd::new(&middle, name).address(router(network), 25)).expect("veth pair");
        let _inside = namespace.enter().expect("enter the namespace");
        let gateway = router(network).to_string();
        let route = Command::new("ip").args(["route", "add", "default", "via", &gateway]).status();
        assert!(route.expect("ip").success());
    }
    let l3fwd = {
        let _inside = middle.enter().expect("enter the namespace");
        Command::new(example("l3fwd")).args(["left", "right"]).stdout(Stdio::piped()).spawn().expect("l3fwd")
    };
    let ends = [
        Endpoint { namespace: &left, address: host(0).into() },
        Endpoint { namespace: &right, address: host(128).into() },
    ];
    let pid = l3fwd.id();
    let forwarded = || {
        let found = isoplane::memory::stats::find(Some("l3fwd")).expect("statistics");
        found.iter().find(|f| f.pid == pid).map_or(0, |f| f.reader.total("forwarded4"))
    };
    let start = Instant::now();
    while forwarded() < 100 {
        // Linux forwards until the ports are open.
        let flow = Flow::Echo { window: 4, largest: 1400 };
        let traffic = Traffic::start(ends[0], ends[1], &[flow]).expect("traffic");
        std::thread::sleep(Duration::from_millis(200));
        let reports = traffic.stop();
        assert!(start.elapsed() < Duration::from_secs(30), "no answer through l3fwd: {reports:?}");
    }
    kill(Pid::from_raw(pid as i32), Signal::SIGINT).expect("SIGINT");
    let output = l3fwd.wait_with_output().expect("wait");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("18432 of 18432 frames accounted for"), "{text}");
}

#[test]
fn l3fwd_says_how_it_is_used() {
    let usage = run("l3fwd", &["only-one"]);
    assert!(!usage.status.success());
    assert!(String::from_utf8_lossy(&usage.stderr).contains("usage: l3fwd INTERFACE INTERFACE"));
}
