//! `isoplane run` as a user runs it: files with mistakes, files without, and files that change under traffic.

use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, VethEnd, veth};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const ISOPLANE: &str = env!("CARGO_BIN_EXE_isoplane");

/// Exit code, results, and everything else, of a check.
fn check(file: &Path, more: &[&str]) -> (i32, String, String) {
    let output = Command::new(ISOPLANE).args(["run", "--check"]).args(more).arg(file).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// A bridge of two ports, to be spoilt. Lines are counted from 1.
const GOOD: &str = r#"[[port]]
device = "eth1"
[[port]]
device = "eth2"
[[worker]]
name = "w0"
[bridge]
"#;

/// A file, and all that is said about it.
struct Case {
    file: String,
    said: &'static [&'static str],
}

/// The good file with lines after it.
fn with(lines: &str, said: &'static [&'static str]) -> Case {
    Case { file: format!("{GOOD}{lines}"), said }
}

/// The good file with something replaced.
fn instead(what: &str, by: &str, said: &'static [&'static str]) -> Case {
    assert!(GOOD.contains(what), "{what}");
    Case { file: GOOD.replacen(what, by, 1), said }
}

fn cases() -> Vec<Case> {
    vec![
        Case {
            file: String::new(),
            said: &[
                "1:1: the file has no [[port]]; expected at least one, with device = \"eth1\"",
                "1:1: the file has no [[worker]]; expected at least one, with name = \"w0\"",
                "1:1: the file has no [bridge]; expected what the workers shall run: [bridge]",
            ],
        },
        // TOML itself, and what is wrong behind that.
        instead(
            "name = \"w0\"\n[bridge]",
            "name = \"w0\ncpu = \"one\"\n[bridge]\nageing = 300",
            &[
                "6:11: invalid basic string; expected `\"`",
                "7:7: `cpu` is a string; expected a number from 0 to 1023",
                "9:10: `ageing` is a number; expected a time from \"1s\" to \"11days 13h 46m 40s\", such as \"30s\"",
            ],
        ),
        with("[bridge]\n", &["8:2: duplicate key; expected TOML 1.0"]),
        // Keys that nobody knows, near to one and near to none.
        with(
            "ageng = \"5s\"\nfrobnicate = 1\n",
            &[
                "8:1: [bridge] knows no key `ageng`; expected `ageing`",
                "9:1: [bridge] knows no key `frobnicate`; expected one of `capacity`, `ageing`, `when-full`, \
                 `forward-reserved`, `own`, `flood`, `ports` or `station`",
            ],
        ),
        with("[pol]\nframes = 100000\n", &["8:2: the file knows no key `pol`; expected `pool`"]),
        // Types, ranges, words.
        with(
            "capacity = 7\nwhen-full = \"panic\"\nown = [\"ff:ff:ff:ff:ff:ff\", 7, \"x\"]\nforward-reserved = [14, 1]\n",
            &[
                "8:12: `capacity` is 7; expected a number from 8 to 1048576",
                "9:13: `when-full` is \"panic\"; expected \"refuse\" or \"evict-oldest\"",
                "10:8: `own` has an item that is \"ff:ff:ff:ff:ff:ff\", which no station can have; expected an array of addresses, each a station's MAC address such as \"02:00:00:00:00:01\"",
                "10:29: `own` has an item that is a number; expected an array of addresses, each a station's MAC address such as \"02:00:00:00:00:01\"",
                "10:32: `own` has an item that is \"x\"; expected an array of addresses, each a station's MAC address such as \"02:00:00:00:00:01\"",
                "11:25: `forward-reserved` has an item that is 1; expected digits X of 01-80-C2-00-00-0X, 0 to 15 and not 1 (PAUSE)",
            ],
        ),
        instead(
            "device = \"eth1\"",
            "device = \"eth 1\"\nqueues = 99999999999999999999",
            &[
                "2:10: `device` is \"eth 1\"; expected an interface such as \"eth1\" or a PCI address such as \"0000:01:00.0\"",
                "3:10: `queues` is 99999999999999999999; expected a number from 1 to 64",
            ],
        ),
        instead(
            "[[port]]",
            "port = 7\n[[prt]]",
            &[
                "1:1: `port` is a number; expected tables, [[port]]",
                "2:3: the file knows no key `prt`; expected `port`",
                "4:3: duplicate key; expected TOML 1.0",
            ],
        ),
        // Names, devices and CPUs that are there twice.
        instead(
            "device = \"eth2\"",
            "device = \"eth2\"\nname = \"eth1\"",
            &["5:8: there is a port \"eth1\" already; expected a name of its own"],
        ),
        instead(
            "device = \"eth2\"",
            "device = \"eth1\"\nname = \"other\"",
            &["4:10: device \"eth1\" is that of port \"eth1\" already; expected a device for one port"],
        ),
        instead(
            "[[port]]\ndevice = \"eth1\"",
            "[[port]]\ndevice = \"01:00.0\"\n[[port]]\ndevice = \"0000:01:00.0\"",
            &[
                "4:10: device \"0000:01:00.0\" is that of port \"01:00.0\" already; expected a device for one port",
            ],
        ),
        instead(
            "name = \"w0\"",
            "name = \"w0\"\ncpu = 1\nqueues = { eth1 = 0, eth2 = 0 }\n[[worker]]\nname = \"w1\"\ncpu = 1\nqueues = { eth1 = 0, eht2 = 0, eth2 = 3 }",
            &[
                "9:1: a bridge is one worker's, and \"w1\" is another; expected one [[worker]]",
                "11:7: CPU 1 is worker \"w0\"'s already; expected a CPU for one worker",
                "12:19: queue 0 of port \"eth1\" is worker \"w0\"'s already; expected a queue for one worker",
                "12:22: there is no port \"eht2\"; expected `eth2`",
                "12:39: port \"eth2\" has no queue 3; expected one from 0 to 0, or more `queues` of the port",
            ],
        ),
        // Ports that no worker has, in part or as a whole.
        instead(
            "device = \"eth1\"",
            "device = \"eth1\"\nqueues = 2",
            &[
                "3:10: no worker has queue 1 of port \"eth1\"; expected a worker for each queue",
                "3:10: port \"eth1\" of a bridge has 2 queues; expected 1, since one worker runs it",
            ],
        ),
        instead(
            "name = \"w0\"",
            "name = \"w0\"\nqueues = { eth1 = 0 }",
            &[
                "3:1: no worker has queue 0 of port \"eth2\"; expected a worker for each queue",
                "5:1: worker \"w0\" has no queue of port \"eth2\"; expected one of each port, to send by",
            ],
        ),
        // Contradictions.
        instead(
            "device = \"eth1\"",
            "device = \"0000:01:00.0\"\nmode = \"copy\"",
            &[
                "3:1: `mode` is for interfaces through AF_XDP, and this port is a PCI function; expected no `mode`",
            ],
        ),
        instead(
            "name = \"w0\"",
            "name = \"w0\"\ncpu = 1\n[kicks]\ncpu = 1",
            &["9:7: CPU 1 is worker \"w0\"'s, which spins there; expected another CPU for the kicker"],
        ),
        with(
            "[kicks]\nby = \"workers\"\ncpu = 0\n",
            &[
                "10:1: `cpu` of a kicker, and `by` says that the workers kick; expected no `cpu`, or `by` = \"kicker\"",
            ],
        ),
        with(
            "[isolation]\nmode = \"off\"\non-breach = \"stop\"\n",
            &[
                "10:1: `on-breach` says how workers are isolated, and `mode` says that they are not; expected no `on-breach`, or another `mode`",
            ],
        ),
        with(
            "[isolation]\nbackend = \"advisory\"\ninsist = true\n",
            &[
                "10:10: `insist` with `backend` = \"advisory\", which enforces nothing; expected another `backend`, or neither key",
            ],
        ),
        with(
            "[isolation]\nmode = [\"oneshot\"]\n",
            &[
                "9:8: `mode` has \"oneshot\" without an allowance that it could be about; expected \"strict\", \"off\" or an array of allowances such as [\"allow-syscalls\"]",
            ],
        ),
        with(
            "[isolation]\nmode = [\"allow-syscals\", \"off\"]\n",
            &[
                "9:9: `mode` has an item that is \"allow-syscals\" (did you mean `allow-syscalls`?); expected \"strict\", \"off\" or an array of allowances such as [\"allow-syscalls\"]",
                "9:26: `mode` has \"off\" beside allowances; expected \"strict\", \"off\" or an array of allowances such as [\"allow-syscalls\"]",
            ],
        ),
        with(
            "[restart]\npolicy = \"never\"\nfirst = \"2s\"\n",
            &[
                "10:1: `first` says when workers start again, and `policy` that they never do; expected no `first`, or `policy` = \"back-off\"",
                "10:9: `first` is 2s, longer than `longest`, 1s; expected a first pause within the longest",
            ],
        ),
        with(
            "[pool]\nframes = 1000\nmax-frame = 2000\n",
            &[
                "9:10: `frames` is 1000, and rings and workers hold 6144 from the start; expected at least 6144, better 18432",
                "10:13: `max-frame` is 2000, which no chunk of 2048 bytes holds; expected at most 1920, or larger `chunk-bytes`",
            ],
        ),
        // VLANs and stations.
        with(
            "[bridge.ports.eth1]\nvlan = 10\n",
            &[
                "4:10: port \"eth2\" is in no VLAN, and other ports are; expected `vlan` or `trunk` in [bridge.ports.eth2]",
            ],
        ),
        with(
            "[bridge.ports.eth1]\nvlan = 4095\n[bridge.ports.eth2]\ntrunk = [1, \"20-10\"]\nnative = 7\n[bridge.ports.eth3]\nlearn = 1\n",
            &[
                "9:8: `vlan` is 4095; expected a VLAN from 1 to 4094",
                "11:13: `trunk` has an item that is neither a VLAN nor a range; expected \"all\", or an array of VLANs and ranges such as [10, \"100-199\"]",
                "12:1: `native` without `trunk`; expected a `trunk`, or no `native`",
                "13:15: there is no port \"eth3\"; expected `eth2`",
            ],
        ),
        with(
            "[bridge.ports.eth1]\ntrunk = \"all\"\nvlan = 1\n[bridge.ports.eth2]\ntrunk = [5]\nnative = 6\n",
            &[
                "9:9: `trunk` beside `vlan`; expected one of the two",
                "13:10: `native` is 6, which is not in `trunk`; expected one of the VLANs of `trunk`",
            ],
        ),
        with(
            "[[bridge.station]]\nmac = \"02:00:00:00:00:01\"\nport = \"eth1\"\n[[bridge.station]]\nmac = \"02:00:00:00:00:01\"\nport = \"eth9\"\n[[bridge.station]]\nport = \"eth1\"\n",
            &[
                "13:8: there is no port \"eth9\"; expected `eth2`",
                "14:1: [[bridge.station]] has no `mac`; expected `mac`: a station's MAC address such as \"02:00:00:00:00:01\"",
            ],
        ),
        with(
            "[[bridge.station]]\nmac = \"02:00:00:00:00:01\"\nport = \"eth1\"\nvlan = 7\n",
            &[
                "7:2: static station 02:00:00:00:00:01 on port 0: the bridge ignores VLANs; expected leave the VLAN out",
            ],
        ),
    ]
}

#[test]
fn every_mistake_is_said_with_its_place_and_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("bad.toml");
    let mut wrong = Vec::new();
    for Case { file: text, said } in cases() {
        std::fs::write(&file, &text).unwrap();
        let (code, out, err) = check(&file, &[]);
        let prefix = format!("{}:", file.display());
        let lines: Vec<&str> = err.lines().filter_map(|line| line.strip_prefix(&prefix)).collect();
        if lines != said {
            wrong.push(format!("{text}\nsaid: {lines:#?}\nexpected: {said:#?}"));
            continue;
        }
        let mistakes =
            if said.len() == 1 { "1 mistake".to_owned() } else { format!("{} mistakes", said.len()) };
        let end = format!("isoplane: {} {mistakes}; nothing was started\n", prefix);
        assert!(err.ends_with(&end), "{err}");
        assert_eq!((code, out.as_str()), (1, ""), "{text}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn what_the_machine_lacks_is_a_warning_unless_it_shall_run_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("there.toml");
    std::fs::write(&file, GOOD.replace("eth1", "isop-none").replace("\"w0\"", "\"w0\"\ncpu = 1023")).unwrap();
    let allowed: Vec<String> =
        isoplane::isolation::prepare::cpu::allowed().iter().map(|cpu| cpu.0.to_string()).collect();
    let absent = |line, name| {
        format!(
            "there.toml:{line}:10: warning: there is no interface {name:?} in this network namespace; expected a device that `isoplane ports` or `ip link` lists"
        )
    };
    let expected = [
        absent(2, "isop-none"),
        absent(4, "eth2"),
        format!(
            "there.toml:7:7: warning: there is no CPU 1023 here, or it is not ours; expected one of {}",
            allowed.join(", ")
        ),
    ];
    let empty = Namespace::new();
    // Without root there is no namespace without eth2: what is said of that line is not known then.
    let inside = empty.as_ref().ok().map(|namespace| namespace.enter().unwrap());
    let (code, out, err) = check(&file, &[]);
    let (strict, nothing, told) = check(&file, &["--here"]);
    if let Some(inside) = inside {
        inside.leave().unwrap();
        let lines: Vec<&str> = err.lines().map(|line| line.rsplit_once('/').unwrap().1).collect();
        assert_eq!(lines, expected);
    } else {
        eprintln!("skipped: an empty network namespace needs root");
    }
    assert_eq!(code, 0, "{err}");
    assert!(out.ends_with("there.toml: no mistakes: a bridge of 2 ports on 1 worker\n"), "{out}");
    assert_eq!((strict, nothing.as_str()), (1, ""));
    assert!(told.contains(&expected[0].replace("warning: ", "")), "{told}");
    assert!(told.contains(&expected[2].replace("warning: ", "")), "{told}");
}

#[test]
fn the_example_files_have_no_mistakes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let (code, out, err) = check(&folder.join("bridge.toml"), &[]);
    assert_eq!(code, 0, "{err}");
    assert!(out.ends_with("bridge.toml: no mistakes: a bridge of 3 ports on 1 worker\n"), "{out}");
}

#[test]
fn a_file_that_is_not_there_is_said() {
    let (code, out, err) = check(Path::new("/nonexistent/a.toml"), &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("isoplane: /nonexistent/a.toml: cannot be read: No such file"), "{err}");
}

/// `isoplane run` as a process; killed when the test ends early.
struct Run {
    child: Child,
    out: BufReader<ChildStdout>,
    err: BufReader<ChildStderr>,
}

impl Run {
    fn start(file: &Path) -> Self {
        let mut child = Command::new(ISOPLANE)
            .arg("run")
            .arg(file)
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        Self { child, out: BufReader::new(out), err: BufReader::new(err) }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The next line of the results.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    /// Lines of standard error of the form `isoplane: FILE: ...`, until one has `end` in it.
    fn said(&mut self, end: &str) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.err.read_line(&mut line).unwrap() > 0, "it ended before {end:?}: {said:?}");
            if let Some((_, what)) = line.trim_end().split_once(".toml:") {
                said.push(what.trim_start().to_owned());
            }
            if line.contains(end) {
                return said;
            }
        }
    }

    /// Stops it; the results that are left, and how it ended.
    fn stop(mut self) -> (bool, String) {
        self.signal(Signal::SIGTERM);
        let mut out = String::new();
        self.out.read_to_string(&mut out).unwrap();
        let mut err = String::new();
        self.err.read_to_string(&mut err).unwrap();
        (self.child.wait().unwrap().success(), out + &err)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);

/// Two hosts, and between them a namespace with the bridge's ports.
struct Hosts {
    client: Namespace,
    server: Namespace,
    middle: Namespace,
}

impl Hosts {
    /// `None`, said, where there is no root.
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: AF_XDP and network namespaces need root");
            return None;
        }
        let [client, server, middle] = std::array::from_fn(|_| Namespace::new().unwrap());
        middle.disable_ipv6().unwrap();
        for (host, address, port) in [(&client, CLIENT, "left"), (&server, SERVER, "right")] {
            let host = VethEnd::new(host, "eth0").address(address, 24);
            veth::pair(&host, &VethEnd::new(&middle, port)).unwrap();
        }
        Some(Self { client, server, middle })
    }

    /// Starts a dataplane in the middle, once it says that it runs.
    fn run(&self, file: &Path) -> Run {
        let inside = self.middle.enter().unwrap();
        let mut run = Run::start(file);
        inside.leave().unwrap();
        let line = run.line();
        if !line.contains(": running: ") {
            let mut err = String::new();
            run.err.read_to_string(&mut err).unwrap();
            panic!("{line}{err}");
        }
        run
    }

    fn traffic(&self) -> Traffic {
        let end = |namespace, address: Ipv4Addr| Endpoint { namespace, address: IpAddr::from(address) };
        let flows = [Flow::Echo { window: 4, largest: 1472 }, Flow::Datagrams { window: 16, largest: 1472 }];
        Traffic::start(end(&self.client, CLIENT), end(&self.server, SERVER), &flows).unwrap()
    }
}

/// A value of the dataplane of that name.
fn total(name: &str, program: u32, counter: &str) -> u64 {
    let found = isoplane::memory::stats::find(Some(name)).unwrap();
    found.iter().find(|f| f.pid == program).map_or(0, |f| f.reader.total(counter))
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn file_in(folder: &Path, text: &str) -> PathBuf {
    let file = folder.join("live.toml");
    std::fs::write(&file, text).unwrap();
    file
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
    let mut run = hosts.run(&file);
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
            "log: changed from LevelFilter::WARN to LevelFilter::DEBUG",
            "worker.bridge.idle: stays Yield; Spin needs a restart",
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
    let mut run = hosts.run(&file);
    let program = run.child.id();
    let station = "[[bridge.station]]\nmac = \"02:00:00:00:00:77\"\nport = \"right\"\n";
    file_in(folder.path(), &format!("{text}{station}"));
    run.signal(Signal::SIGHUP);
    run.said("reloaded: 1 changed, 0 need a restart");
    let stations = || total("run-again", program, "stations");
    wait_until("the station is known", || stations() == 1);

    let worker = || {
        let output = Command::new(ISOPLANE).args(["top", "run-again", "--once", "--json"]).output().unwrap();
        let all: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let plane = all["dataplanes"].as_array()?.iter().find(|d| d["pid"] == program)?.clone();
        plane["workers"][0]["pid"].as_i64()
    };
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
