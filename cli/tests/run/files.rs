//! Files with mistakes, and files without.

use crate::ISOPLANE;
use isoplane_lab::Namespace;
use std::path::Path;
use std::process::Command;

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
                "1:1: the file has no [bridge] and no [router]; expected what the workers shall run: [bridge] or [router]",
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
                "2:10: `device` is \"eth 1\"; expected an interface such as \"eth1\", a PCI address such as \"0000:01:00.0\", or a TAP to be made such as \"tap:tap0\"",
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
        // Routers.
        with("[router]\n", &["8:2: [router] beside [bridge]; expected one of the two"]),
        instead(
            "[bridge]",
            "[router]\ntable = \"mian\"\nageing = \"5s\"\nreverse-path = \"feasible\"\n[router.icmp]\nburst = 0\n\
             [router.resolution]\nretry = \"4s\"\n[router.tables]\nroutes-ipv4 = 5",
            &[
                "8:9: `table` is \"mian\"; expected \"main\", \"all\" or the number of a table",
                "9:1: [router] knows no key `ageing`; expected one of `table`, `reverse-path`, `forward-ipv4`, \
                 `forward-ipv6`, `redirects`, `directed-broadcast`, `tables`, `seed`, `icmp`, `punt`, `resolution`, \
                 `fragments-per-turn`, `reserve`, `source-route`, `record-route`, `router-alert` or `routing-header-0`",
                "10:16: `reverse-path` is \"feasible\"; expected one of \"kernel\", \"off\", \"strict\" or \"loose\"",
                "12:9: `burst` is 0; expected a number from 1 to 1000000",
                "14:9: `retry` is 4s, after `timeout`, 3s; expected a time before `timeout`",
                "16:15: `routes-ipv4` is 5; expected a number from 64 to 16777216",
            ],
        ),
        instead(
            "name = \"w0\"\n[bridge]",
            "name = \"w0\"\n[[worker]]\nname = \"w1\"\n[router]",
            &[
                "7:1: worker \"w1\" is the 2. and port \"eth1\" has 1 queues; expected a queue of every port for every worker",
                "7:1: worker \"w1\" is the 2. and port \"eth2\" has 1 queues; expected a queue of every port for every worker",
            ],
        ),
        instead(
            "device = \"eth1\"",
            "device = \"eth1\"\nhost = \"tap0\"",
            &[
                "3:8: `host` of port \"eth1\", and a bridge hands nothing to the kernel; expected no `host`, or a [router]",
            ],
        ),
        Case {
            file: GOOD
                .replace("\"eth1\"", "\"0000:01:00.0\"\nrings = 64")
                .replace("\"eth2\"", "\"tap:tap0\"")
                .replace("bridge", "router"),
            said: &[
                "2:10: port \"0000:01:00.0\" of a router has no addresses, since it is a PCI function; expected `host`, the interface that shall have them",
                "3:1: `rings` is for interfaces through AF_XDP, and this port is a PCI function; expected no `rings`",
                "5:10: port \"tap:tap0\" of a router has no addresses, since it is the kernel's neighbour; expected an interface or a PCI address, with `host`",
            ],
        },
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
    let shapes = [
        ("bridge.toml", "a bridge of 3 ports on 1 worker"),
        ("router.toml", "a router of 2 ports on 1 worker"),
    ];
    for (file, shape) in shapes {
        let (code, out, err) = check(&folder.join(file), &[]);
        assert_eq!(code, 0, "{err}");
        assert!(out.ends_with(&format!("{file}: no mistakes: {shape}\n")), "{out}");
    }
}

#[test]
fn a_file_that_is_not_there_is_said() {
    let (code, out, err) = check(Path::new("/nonexistent/a.toml"), &[]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("isoplane: /nonexistent/a.toml: cannot be read: No such file"), "{err}");
}
