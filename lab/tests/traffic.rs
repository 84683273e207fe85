//! Traffic across a plain veth pair, across one that goes away, and without a path.

use isoplane_lab::traffic::{self, Counts, Endpoint, Flow, Traffic};
use isoplane_lab::{Namespace, PacketSocket, VethEnd, veth};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

const FLOWS: [Flow; 3] = [
    Flow::Echo { window: 4, largest: 1400 },
    Flow::Datagrams { window: 32, largest: 1400 },
    Flow::Bulk { buffer: 64 << 10 },
];

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: making network namespaces needs root");
    }
    root
}

fn addresses(v6: bool) -> [IpAddr; 2] {
    [1, 2].map(|last| {
        if v6 {
            IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])
        } else {
            IpAddr::from(Ipv4Addr::new(10, 66, 0, last as u8))
        }
    })
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn every_flow_is_verified_over_both_families() {
    if !root() {
        return;
    }
    for v6 in [false, true] {
        let (left, right) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        let [one, two] = addresses(v6);
        let length = if v6 { 64 } else { 24 };
        veth::pair(
            &VethEnd::new(&left, "eth0").address(one, length),
            &VethEnd::new(&right, "eth0").address(two, length),
        )
        .unwrap();
        let client = Endpoint { namespace: &left, address: one };
        let server = Endpoint { namespace: &right, address: two };
        let traffic = Traffic::start(client, server, &FLOWS).unwrap();
        wait_until("traffic", || traffic.counts().iter().all(|(_, c)| c.verified >= 200));
        let reports = traffic.stop();
        for report in &reports {
            assert!(report.is_clean(), "IPv{}: {report:?}", if v6 { 6 } else { 4 });
            let Counts { sent, verified, late, .. } = report.counts;
            assert_eq!(late, 0);
            match report.flow {
                Flow::Bulk { .. } => assert!(report.round_trips.is_empty()),
                _ => {
                    assert_eq!(sent, verified);
                    assert_eq!(report.round_trips.len(), verified);
                }
            }
        }
        let all = traffic::round_trips(&reports);
        assert_eq!(all.len(), reports[0].counts.verified + reports[1].counts.verified);
    }
}

#[test]
fn what_is_lost_is_counted_and_nothing_hangs() {
    if !root() {
        return;
    }
    let (left, right) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let [one, two] = addresses(false);
    let (_link, other) = veth::pair(
        &VethEnd::new(&left, "eth0").address(one, 24),
        &VethEnd::new(&right, "eth0").address(two, 24),
    )
    .unwrap();
    let client = Endpoint { namespace: &left, address: one };
    let server = Endpoint { namespace: &right, address: two };
    let traffic = Traffic::start(client, server, &FLOWS).unwrap();
    wait_until("traffic", || traffic.counts().iter().all(|(_, c)| c.verified >= 20));
    // Cut the wire at the far end: what is sent goes nowhere, and nobody is told.
    other.down().unwrap();
    wait_until("loss", || traffic.counts()[1].1.lost > 0);
    let reports = traffic.stop_within(Duration::from_millis(100));
    let udp = reports[1].counts;
    assert_eq!(udp.sent, udp.verified + udp.lost, "{udp:?}");
    let tcp = &reports[2];
    assert!(tcp.counts.lost > 0 && !tcp.is_clean(), "{tcp:?}");
}

#[test]
fn without_a_path_it_stops_as_well() {
    if !root() {
        return;
    }
    let (left, right) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let [one, two] = addresses(false);
    let address = |ns| Endpoint { namespace: ns, address: if std::ptr::eq(ns, &left) { one } else { two } };
    for (ns, own) in [(&left, one), (&right, two)] {
        ns.link("lo").unwrap().add_address(own, 32).unwrap();
    }
    let flows = [Flow::Datagrams { window: 4, largest: 100 }, Flow::Bulk { buffer: 65_536 }];
    // No route: connecting the datagram socket says so at once, and the first flow's end is orderly.
    assert!(Traffic::start(address(&left), address(&right), &flows).is_err());
    let traffic = Traffic::start(address(&left), address(&right), &flows[1..]).unwrap();
    wait_until("an error", || !traffic.reports()[0].errors.is_empty());
    let reports = traffic.stop();
    assert_eq!(reports[0].counts.verified, 0);
    assert!(!reports[0].is_clean());
}

#[test]
fn frames_go_between_any_two_stations() {
    if !root() {
        return;
    }
    let (left, right) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    let (one, two) = veth::pair(&VethEnd::new(&left, "eth0"), &VethEnd::new(&right, "eth0")).unwrap();
    let client = PacketSocket::open(&one).unwrap();
    let server = PacketSocket::open(&two).unwrap();
    let traffic = Traffic::between(client, server, 16, 1400).unwrap();
    wait_until("traffic", || traffic.counts()[0].1.verified >= 500);
    let reports = traffic.stop();
    assert!(reports[0].is_clean(), "{reports:?}");
    assert_eq!(reports[0].counts.sent, reports[0].counts.verified);
}
