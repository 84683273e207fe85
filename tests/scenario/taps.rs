//! A bridge over taps between two kernels: the hosts' own interfaces are our ports, so the kicker in the program moves
//! every packet between the kernel and the rings that it shares with the worker's process.

use crate::network::{Hosts, LEFT, Plane, RIGHT, assert_nothing_lost, bridge_over, sealed_bridge_over};
use crate::peer::{kill_worker, wait_for};
use isoplane::drivers::{LinkState, TapConfig, TapPort};
use isoplane::memory::Pool;
use isoplane::{Builder, Kicks, PortRef};
use isoplane_lab::Namespace;
use isoplane_lab::traffic::{Flow, Traffic};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// A host whose interface is a tap.
struct Host {
    namespace: Namespace,
    address: IpAddr,
}

fn hosts() -> ([Host; 2], Hosts) {
    let made = [LEFT, RIGHT].map(|address| {
        let namespace = Namespace::new().expect("namespace");
        namespace.disable_ipv6().expect("a sysctl");
        Host { namespace, address }
    });
    let [left, right] = [0, 1].map(|at: usize| made[at].namespace.try_clone().expect("a descriptor"));
    (made, Hosts::of(left, right))
}

/// Makes the hosts' interfaces.
fn open(hosts: &[Host; 2], pool: &Arc<Pool>, plane: &mut Builder) -> [PortRef; 2] {
    [0, 1].map(|at: usize| {
        let Host { namespace, address } = &hosts[at];
        let descriptor = namespace.try_clone().expect("a descriptor").into();
        let config = TapConfig { namespace: Some(Arc::new(descriptor)), ..TapConfig::new("eth0") };
        let port = TapPort::open(pool, &config).expect("a tap");
        let link = namespace.link("eth0").expect("its interface");
        link.add_address(*address, 24).expect("an address");
        plane.port(port)
    })
}

/// Nothing is lost with a kicker, and the worker makes no kick itself; nor with inline kicks.
pub(crate) fn bridge() {
    for kicks in [Kicks::Kicker, Kicks::Inline] {
        let (made, hosts) = hosts();
        let plane = bridge_over(kicks, |pool, plane| open(&made, pool, plane));
        assert_nothing_lost(&hosts.converse(Duration::from_millis(500)));
        let statistics = plane.running.statistics();
        let (by_worker, by_kicker) = (statistics.total("kicks"), statistics.total("kicker_kicks"));
        match kicks {
            Kicks::Kicker => assert!(by_worker == 0 && by_kicker > 0, "{by_worker} {by_kicker}"),
            Kicks::Inline => assert!(by_worker > 0 && by_kicker == 0, "{by_worker} {by_kicker}"),
        }
        assert_eq!(statistics.total("bad_descriptors"), 0);
        plane.end();
    }
}

/// A worker whose ports are taps makes no system call and no allocation while traffic passes.
pub(crate) fn sealed_bridge() {
    let (made, hosts) = hosts();
    sealed_bridge_over(&hosts, |pool, plane| open(&made, pool, plane));
}

/// The worker is killed under traffic, again and again: it passes again each time, and in the end every frame is back.
pub(crate) fn worker_killed() {
    for kicks in [Kicks::Kicker, Kicks::Inline] {
        let (made, hosts) = hosts();
        let plane = bridge_over(kicks, |pool, plane| open(&made, pool, plane));
        for _ in 0..5 {
            let (left, right) = hosts.endpoints();
            let flow = Flow::Datagrams { window: 64, largest: 1472 };
            let traffic = Traffic::start(left, right, &[flow]).expect("traffic");
            std::thread::sleep(Duration::from_millis(100));
            kill_worker(&plane.running);
            std::thread::sleep(Duration::from_millis(100));
            let reports = traffic.stop();
            // What was in the worker's hands is gone with it, no more: the window bounds it.
            assert!(reports[0].counts.lost <= 64 && reports[0].counts.corrupt == 0, "{reports:?}");
            assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
        }
        assert_eq!(plane.running.restarts(0), Some(5));
        plane.end();
    }
}

/// A tap is deleted under a running worker: the port says so, the worker goes on, and stopping finds every frame.
pub(crate) fn deleted() {
    let (made, hosts) = hosts();
    let plane = bridge_over(Kicks::Kicker, |pool, plane| open(&made, pool, plane));
    assert_nothing_lost(&hosts.converse(Duration::from_millis(100)));
    made[0].namespace.link("eth0").expect("link").delete().expect("delete");
    let link = |plane: &Plane, port: usize| plane.running.with_port(plane.ports[port], |port| port.link());
    wait_for("the port to be gone", || link(&plane, 0) == Some(LinkState::Gone));
    assert_eq!(link(&plane, 1), Some(LinkState::Up));
    let turns = plane.running.statistics().total("turns");
    wait_for("the worker to go on", || plane.running.statistics().total("turns") > turns + 1000);
    plane.end();
}
