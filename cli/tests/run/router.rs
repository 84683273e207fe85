//! A router between two kernels, driven by the kernel that it lives in: what hosts see of it with their own tools.

use crate::process::{Run, Server, alone, file_in, run_in, shown, succeed, total, wait_until};
use isoplane_lab::traffic::{Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, Seen, VethEnd, Witnesses, veth};
use nix::sys::signal::Signal;
use std::net::IpAddr;
use std::sync::MutexGuard;
use std::time::Duration;

/// A host's addresses, and the router's on its link; IPv4 and IPv6.
type Link = [[&'static str; 2]; 2];

const LEFT: Link = [["10.79.1.2", "10.79.1.1"], ["2001:db8:79:1::2", "2001:db8:79:1::1"]];
const RIGHT: Link = [["10.79.2.2", "10.79.2.1"], ["2001:db8:79:2::2", "2001:db8:79:2::1"]];

fn prefix_length(address: &str) -> u8 {
    if address.contains(':') { 64 } else { 24 }
}

/// Two hosts, and a router with an interface to each.
pub(crate) struct Network {
    pub(crate) left: Namespace,
    right: Namespace,
    pub(crate) router: Namespace,
    _alone: MutexGuard<'static, ()>,
}

impl Network {
    /// `None`, said, where there is no root.
    fn new() -> Option<Self> {
        Self::with_queues(1)
    }

    /// The same, with so many queues on each link.
    fn with_queues(queues: u32) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: AF_XDP and network namespaces need root");
            return None;
        }
        let alone = alone();
        let [left, right, router] = std::array::from_fn(|_| Namespace::new().unwrap());
        for namespace in [&left, &right, &router] {
            // Neighbour discovery speaks from link-local addresses.
            namespace.set_sysctl("ipv6/conf/default/addr_gen_mode", "0").unwrap();
        }
        for (host, port, link) in [(&left, "left", LEFT), (&right, "right", RIGHT)] {
            let of = |namespace, name| VethEnd::new(namespace, name).queues(queues, queues);
            let (mut end, mut ours) = (of(host, "eth0"), of(&router, port));
            for [theirs, own] in link {
                end = end.address(theirs.parse::<IpAddr>().unwrap(), prefix_length(theirs));
                ours = ours.address(own.parse::<IpAddr>().unwrap(), prefix_length(own));
            }
            veth::pair(&end, &ours).unwrap();
            for [_, gateway] in link {
                succeed(host, &format!("ip route add default via {gateway}"));
            }
        }
        for version in ["ipv4", "ipv6"] {
            router.set_sysctl(&format!("{version}/conf/all/forwarding"), "1").unwrap();
        }
        Some(Self { left, right, router, _alone: alone })
    }

    fn traffic(&self, version: usize, flows: &[Flow]) -> Traffic {
        let end = |namespace, link: Link| Endpoint { namespace, address: link[version][0].parse().unwrap() };
        Traffic::start(end(&self.left, LEFT), end(&self.right, RIGHT), flows).unwrap()
    }
}

/// A router for the network above, on the last CPU that there is.
fn file(name: &str, worker: &str) -> String {
    format!(
        r#"
name = "{name}"
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
name = "w0"
{worker}
[router]
[router.tables]
routes-ipv4 = 65536
routes-ipv6 = 65536
next-hops = 4096
"#
    )
}

/// A router that runs.
pub(crate) fn routed(name: &str) -> Option<(Network, Run, tempfile::TempDir)> {
    let network = Network::new()?;
    let folder = tempfile::tempdir().unwrap();
    let file = file_in(folder.path(), &file(name, "idle = \"yield\""));
    let run = Run::start(&network.router, &file);
    Some((network, run, folder))
}

/// Packets that the worker has forwarded.
fn forwarded(name: &str, run: &Run) -> u64 {
    ["forwarded4", "forwarded6"].iter().map(|counter| total(name, run.child.id(), counter)).sum()
}

pub(crate) fn end_well(run: Run) {
    let (good, said) = run.stop();
    assert!(good, "{said}");
}

const ECHO: Flow = Flow::Echo { window: 4, largest: 1400 };
const DATAGRAMS: Flow = Flow::Datagrams { window: 16, largest: 1400 };

#[test]
fn kernels_talk_through_it_in_both_versions() {
    let Some((network, run, _folder)) = routed("rt-talk") else { return };
    for version in [0, 1] {
        let traffic = network.traffic(version, &[ECHO, DATAGRAMS, Flow::Bulk { buffer: 64 << 10 }]);
        let before = forwarded("rt-talk", &run);
        wait_until("forwarding", || forwarded("rt-talk", &run) > before + 2000);
        for flow in traffic.stop() {
            assert!(flow.is_clean(), "{flow:?}");
        }
    }
    let router = &network.router;
    // The kernel has forwarded nothing: it was all ours.
    let by_kernel = succeed(router, "cat /proc/net/snmp");
    let mut ip = by_kernel.lines().filter(|line| line.starts_with("Ip:")).map(str::split_whitespace);
    let (mut names, mut values) = (ip.next().unwrap(), ip.next().unwrap());
    let place = names.position(|name| name == "ForwDatagrams").unwrap();
    assert_eq!(values.nth(place), Some("0"), "{by_kernel}");
    end_well(run);
}

#[test]
fn traceroute_and_pings_of_the_router_itself() {
    let Some((network, run, _folder)) = routed("rt-trace") else { return };
    for (version, flag) in ["-4", "-6"].into_iter().enumerate() {
        let ([_, ours], [theirs, far]) = (LEFT[version], RIGHT[version]);
        let hops = succeed(&network.left, &format!("traceroute {flag} -n -w 5 -q 1 {theirs}"));
        let hops: Vec<&str> =
            hops.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(hops, [ours, theirs]);
        for address in [ours, far] {
            succeed(&network.left, &format!("ping {flag} -c 2 -i 0.1 -W 5 {address}"));
        }
        let beyond = if version == 0 { "203.0.113.9" } else { "2001:db8:ffff::9" };
        let (good, text) = run_in(&network.left, &format!("ping {flag} -c 1 -W 5 {beyond}"));
        assert!(!good && text.contains("nreachable"), "{text}");
    }
    assert_eq!(total("rt-trace", run.child.id(), "icmp_time_exceeded"), 2);
    end_well(run);
}

#[test]
fn hosts_find_the_mtu_of_the_path() {
    let Some((network, run, _folder)) = routed("rt-mtu") else { return };
    for (namespace, link) in [(&network.router, "right"), (&network.right, "eth0")] {
        succeed(namespace, &format!("ip link set {link} mtu 1400"));
    }
    let wide = || run_in(&network.left, &format!("ping -c 1 -W 5 -M do -s 1472 {}", RIGHT[0][0])).1;
    let mut text = String::new();
    wait_until("the new MTU is known", || {
        text = wide();
        text.contains("mtu")
    });
    assert!(text.contains("mtu = 1400") || text.contains("mtu=1400"), "{text}");
    succeed(&network.left, &format!("ping -c 1 -W 5 -M do -s 1372 {}", RIGHT[0][0]));
    for (version, flag) in ["-4", "-6"].into_iter().enumerate() {
        let text = succeed(&network.left, &format!("tracepath {flag} -n {}", RIGHT[version][0]));
        assert!(text.contains("Resume: pmtu 1400 hops 2 back 2"), "{text}");
    }
    // Without DF it is cut, and the other kernel puts it together.
    succeed(&network.left, &format!("ping -c 3 -i 0.1 -W 5 -M dont -s 3000 {}", RIGHT[0][0]));
    assert!(total("rt-mtu", run.child.id(), "icmp_too_big") >= 2);
    end_well(run);
}

#[test]
fn iperf3_runs_through_it() {
    let Some((network, run, _folder)) = routed("rt-iperf") else { return };
    let _server = Server::start(&network.right, "iperf3 --server");
    for version in [0, 1] {
        let client = format!("iperf3 --client {} --bytes 8M --json", RIGHT[version][0]);
        let mut text = String::new();
        wait_until("iperf3", || {
            let (good, said) = run_in(&network.left, &client);
            text = said;
            good
        });
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        let received = report["end"]["sum_received"]["bytes"].as_u64().unwrap();
        // What was on its way when the client had sent enough is not counted.
        assert!(received >= 4 << 20, "{received} bytes received: {text}");
    }
    end_well(run);
}

#[test]
fn what_the_kernel_learns_it_does() {
    let Some((network, run, _folder)) = routed("rt-learn") else { return };
    let reaches = |address: &str| run_in(&network.left, &format!("ping -c 1 -W 1 {address}")).0;
    // A route.
    for address in ["203.0.113.1/32", "2001:db8:99::1/128"] {
        succeed(&network.right, &format!("ip address add {address} dev lo"));
    }
    assert!(!reaches("203.0.113.1") && !reaches("2001:db8:99::1"));
    for (to, version) in [("203.0.113.0/24", 0), ("2001:db8:99::/64", 1)] {
        succeed(&network.router, &format!("ip route add {to} via {}", RIGHT[version][0]));
    }
    wait_until("the IPv4 route", || reaches("203.0.113.1"));
    wait_until("the IPv6 route", || reaches("2001:db8:99::1"));
    succeed(&network.router, "ip route replace blackhole 203.0.113.0/24");
    wait_until("the blackhole", || !reaches("203.0.113.1"));
    // An address of its own, which the worker leaves to the kernel.
    succeed(&network.router, "ip address add 192.0.2.77/32 dev lo");
    wait_until("the address", || reaches("192.0.2.77"));
    end_well(run);
}

#[test]
fn a_vlan_of_a_port_is_an_interface_of_its_own() {
    let Some((network, run, _folder)) = routed("rt-vlan") else { return };
    let (there, text) = run_in(&network.left, "ip link add link eth0 name eth0.10 type vlan id 10");
    if !there {
        eprintln!("not here: this kernel has no VLAN interfaces: {text}");
        return;
    }
    succeed(&network.router, "ip link add link left name left.10 type vlan id 10");
    for (namespace, address, link) in [(&network.left, 2, "eth0.10"), (&network.router, 1, "left.10")] {
        succeed(namespace, &format!("ip address add 10.79.10.{address}/24 dev {link}"));
        succeed(namespace, &format!("ip link set {link} up"));
    }
    succeed(&network.left, "ip route add default via 10.79.10.1 table 10");
    succeed(&network.left, "ip rule add from 10.79.10.2 table 10");
    let before = forwarded("rt-vlan", &run);
    let through = format!("ping -c 1 -W 1 -I 10.79.10.2 {}", RIGHT[0][0]);
    wait_until("the VLAN", || run_in(&network.left, &through).0);
    assert!(forwarded("rt-vlan", &run) >= before + 2);
    end_well(run);
}

#[test]
fn several_workers_share_the_ports_and_the_tables() {
    let Some(network) = Network::with_queues(2) else { return };
    let folder = tempfile::tempdir().unwrap();
    let text = file("rt-two", "idle = \"yield\"\n[[worker]]\nname = \"w1\"\nidle = \"yield\"");
    let text = text.replace("mode = \"copy\"", "mode = \"copy\"\nqueues = 2");
    let run = Run::start(&network.router, &file_in(folder.path(), &text));
    let program = run.child.id();
    let received = |worker: usize| {
        let plane = shown("rt-two", program).unwrap();
        let ports = plane["workers"][worker]["ports"].as_array().unwrap().clone();
        ports.iter().map(|port| port["rx_frames"].as_u64().unwrap()).sum::<u64>()
    };
    // Neighbours are known first: only so many packets wait for one, and these would be more.
    for [address, _] in RIGHT {
        wait_until(address, || run_in(&network.left, &format!("ping -c 1 -W 1 {address}")).0);
    }
    // The kernel spreads flows over the queues by their ports; of so many both have some.
    let few = Flow::Datagrams { window: 4, largest: 1400 };
    let traffic: Vec<Traffic> = (0..8).map(|flow| network.traffic(flow % 2, &[few])).collect();
    wait_until("both workers have a share", || received(0) > 200 && received(1) > 200);
    for flow in traffic.into_iter().flat_map(Traffic::stop) {
        assert!(flow.is_clean(), "{flow:?}");
    }
    end_well(run);
}

#[test]
fn its_file_changes_under_traffic_without_a_packet_lost() {
    let Some((network, mut run, folder)) = routed("rt-live") else { return };
    let text = file("rt-live", "idle = \"yield\"");
    let traffic = [0, 1].map(|version| network.traffic(version, &[ECHO, DATAGRAMS]));
    wait_until("forwarding", || forwarded("rt-live", &run) > 1000);
    let other =
        "table = \"all\"\nrecord-route = false\n[router.icmp]\nper-second = 1\nburst = 1\n[router.tables]";
    let other = text.replace("[router.tables]", other);
    file_in(folder.path(), &other);
    run.signal(Signal::SIGHUP);
    assert_eq!(
        run.said("reloaded:"),
        [
            "router.icmp.burst: changed from 100 to 1",
            "router.icmp.per-second: changed from 1000 to 1",
            "router.record-route: changed from true to false",
            "router.table: stays Main; All needs a restart",
            "reloaded: 3 changed, 1 needs a restart",
        ]
    );
    for round in 0..20 {
        file_in(folder.path(), if round % 2 == 0 { &text } else { &other });
        run.signal(Signal::SIGHUP);
        run.said("reloaded: 3 changed");
    }
    let before = forwarded("rt-live", &run);
    wait_until("forwarding goes on", || forwarded("rt-live", &run) > before + 1000);
    for flow in traffic.into_iter().flat_map(Traffic::stop) {
        assert!(flow.is_clean(), "{flow:?}");
    }
    // The last limit counts: one error a second, of the three that are asked for at once.
    let ping = format!("ping -c 3 -i 0.01 -W 1 -t 1 {}", RIGHT[0][0]);
    let (_, text) = run_in(&network.left, &ping);
    assert!(total("rt-live", run.child.id(), "icmp_limited") >= 1, "{text}");
    end_well(run);
}

#[test]
fn the_worker_hands_to_the_kernel_what_is_its_own_where_nobody_else_does() {
    let Some(network) = Network::new() else { return };
    // The addresses move from the ports to TAPs that are made for them.
    for (port, [[_, v4], [_, v6]]) in [("left", LEFT), ("right", RIGHT)] {
        let router = &network.router;
        succeed(router, &format!("ip address flush dev {port} scope global"));
        succeed(router, &format!("ip tuntap add dev host-{port} mode tap"));
        for (address, length) in [(v4, 24), (v6, 64)] {
            succeed(router, &format!("ip address add {address}/{length} dev host-{port}"));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let mut text = file("rt-host", "idle = \"yield\"");
    for port in ["left", "right"] {
        let device = format!("device = \"{port}\"\n");
        text = text.replace(&device, &format!("{device}host = \"host-{port}\"\n"));
    }
    let run = Run::start(&network.router, &file_in(folder.path(), &text));
    for version in [0, 1] {
        for address in [LEFT[version][1], RIGHT[version][1], RIGHT[version][0]] {
            wait_until(address, || run_in(&network.left, &format!("ping -c 1 -W 1 {address}")).0);
        }
        let traffic = network.traffic(version, &[ECHO, DATAGRAMS]);
        let before = forwarded("rt-host", &run);
        wait_until("forwarding", || forwarded("rt-host", &run) > before + 500);
        for flow in traffic.stop() {
            assert!(flow.is_clean(), "{flow:?}");
        }
    }
    let handed = |counter| total("rt-host", run.child.id(), counter);
    assert!(handed("punted") > 4 && handed("from_host") > 4);
    assert_eq!(handed("punt_unavailable"), 0);
    end_well(run);
}

#[test]
fn it_is_strict_without_a_breach() {
    let Some(network) = Network::new() else { return };
    let allowed: Vec<usize> = isoplane::isolation::prepare::cpu::allowed().iter().map(|cpu| cpu.0).collect();
    let [_, .., last] = allowed[..] else {
        eprintln!("skipped: with one CPU a worker has to give it away by system calls");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let file = file_in(folder.path(), &file("rt-strict", &format!("cpu = {last}")));
    let run = Run::start(&network.router, &file);
    let program = run.child.id();
    let traffic = [0, 1].map(|version| network.traffic(version, &[ECHO, DATAGRAMS]));
    wait_until("forwarding", || forwarded("rt-strict", &run) > 200);
    let worker = || shown("rt-strict", program).unwrap()["workers"][0].clone();
    let before = worker();
    if before["isolation"]["backend"] != "dispatch" {
        eprintln!("skipped: no backend here catches system calls and page faults");
        return;
    }
    let pid = before["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap();
    let witnesses = Witnesses::attach(pid).unwrap();
    let start = forwarded("rt-strict", &run);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(witnesses.detach().unwrap(), Seen::default());
    let after = worker();
    assert_eq!(after["pid"], before["pid"], "it was one worker all the time");
    assert!(forwarded("rt-strict", &run) > start + 100, "and it worked");
    let found = &after["isolation"];
    assert_eq!(found["breaches"]["total"], 0, "{found:#}");
    for count in ["worker_syscalls", "worker_page_faults"] {
        assert_eq!(found[count], 0, "{count}: {found:#}");
    }
    assert_eq!(found["slow_path"]["visits"], 0, "{found:#}");
    // Those are counted, and the tracer was not overlooked.
    assert_eq!(found["interruptions"]["by_cause"]["ptrace"]["total"], 1, "{found:#}");
    for flow in traffic.into_iter().flat_map(Traffic::stop) {
        assert!(flow.is_clean(), "{flow:?}");
    }
    end_well(run);
}
