//! Several paths: multipath routes, next-hop objects and groups, IPv6 in its two styles, IPv4 over IPv6,
//! links that go down, and links that are not the router's.

#[path = "sync/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lab;

use isoplane::tables::NextHop;
use lab::{Fate, Followed, Kernel, small, to};

/// Only root can make network namespaces.
macro_rules! needs_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: making network namespaces needs root");
            return;
        }
    };
}

/// Three links with two gateways each, for both IP versions.
fn kernel() -> Kernel {
    let kernel = Kernel::new(3);
    for n in 0..3 {
        kernel.ip(&format!("addr add 10.0.{n}.1/24 dev d{n}"));
        kernel.ip(&format!("addr add 2001:db8:{n}::1/64 dev d{n}"));
        for host in [8, 9] {
            kernel.neighbours(n, &[&format!("10.0.{n}.{host}"), &format!("2001:db8:{n}::{host}")]);
        }
    }
    kernel
}

/// Shares of 1024 flows.
fn shares(followed: &Followed, address: &str) -> Vec<(Fate, usize)> {
    let id = match address.parse().expect("an address") {
        std::net::IpAddr::V4(address) => followed.tables.fib4.lookup(address.to_bits()),
        std::net::IpAddr::V6(address) => followed.tables.fib6.lookup(address.to_bits()),
    };
    let fates = followed.fates(address);
    let of = |fate: &Fate| {
        let same = |hash: &u32| match followed.tables.next_hops.resolve(id, *hash) {
            NextHop::Forward { interface, mac } => Fate::To(followed.port(interface), mac) == *fate,
            _ => false,
        };
        (0..1024).filter(same).count()
    };
    fates.iter().map(|fate| (*fate, of(fate))).collect()
}

#[test]
fn multipath_routes_are_groups_with_weights() {
    needs_root!();
    let kernel = kernel();
    let followed = kernel.follow(&small());
    for (net, at, [a, b, c]) in [
        ("192.0.2.0/24", "192.0.2.5", ["10.0.0.9", "10.0.1.9", "10.0.2.9"]),
        ("2001:db8:f::/48", "2001:db8:f::5", ["2001:db8:0::9", "2001:db8:1::9", "2001:db8:2::9"]),
    ] {
        kernel.ip(&format!("route add {net} nexthop via {a} weight 3 nexthop via {b} weight 1"));
        followed.expect(at, &[to(0, a), to(1, b)]);
        assert_eq!(shares(&followed, at), [(to(0, a), 768), (to(1, b), 256)]);
        kernel.ip(&format!("route replace {net} nexthop via {a} nexthop via {b} nexthop via {c}"));
        followed.expect(at, &[to(0, a), to(1, b), to(2, c)]);
        // A link goes down: its path is out at once, and back when the link is.
        kernel.ip("link set d1 down");
        followed.expect(at, &[to(0, a), to(2, c)]);
        kernel.ip("link set d1 up");
        // The kernel has thrown away what IPv6 had there, and the neighbours.
        kernel.ip("addr add 2001:db8:1::1/64 dev d1");
        kernel.neighbours(1, &["10.0.1.9", "2001:db8:1::9"]);
        if at.contains(':') {
            kernel.ip(&format!("route replace {net} nexthop via {a} nexthop via {b} nexthop via {c}"));
        }
        followed.expect(at, &[to(0, a), to(1, b), to(2, c)]);
        // Without carrier: not while there are better paths.
        kernel.far_ip("link set p2 down");
        followed.expect(at, &[to(0, a), to(1, b)]);
        kernel.far_ip("link set p2 up");
        followed.expect(at, &[to(0, a), to(1, b), to(2, c)]);
        kernel.ip(&format!("route del {net}"));
        followed.expect(at, &[Fate::None]);
    }
    assert_eq!(followed.status().full, 0);
}

#[test]
fn ipv6_paths_may_come_and_go_one_by_one() {
    needs_root!();
    let kernel = kernel();
    let followed = kernel.follow(&small());
    let at = "2001:db8:f::5";
    let [a, b, c] = ["2001:db8:0::9", "2001:db8:1::9", "2001:db8:2::9"];
    kernel.ip(&format!("-6 route append 2001:db8:f::/48 via {a}"));
    followed.expect(at, &[to(0, a)]);
    kernel.ip(&format!("-6 route append 2001:db8:f::/48 via {b}"));
    followed.expect(at, &[to(0, a), to(1, b)]);
    kernel.ip(&format!("-6 route append 2001:db8:f::/48 via {c}"));
    followed.expect(at, &[to(0, a), to(1, b), to(2, c)]);
    kernel.ip(&format!("-6 route del 2001:db8:f::/48 via {b}"));
    followed.expect(at, &[to(0, a), to(2, c)]);
    kernel.ip(&format!("-6 route del 2001:db8:f::/48 via {a}"));
    followed.expect(at, &[to(2, c)]);
    kernel.ip(&format!("-6 route del 2001:db8:f::/48 via {c}"));
    followed.expect(at, &[Fate::None]);
}

#[test]
fn next_hop_objects_and_groups_are_followed() {
    needs_root!();
    let kernel = kernel();
    let followed = kernel.follow(&small());
    kernel.ip("nexthop add id 1 via 10.0.0.9 dev d0");
    kernel.ip("nexthop add id 2 via 10.0.1.9 dev d1");
    kernel.ip("nexthop add id 3 via 10.0.2.9 dev d2");
    kernel.ip("nexthop add id 10 group 1,3/2,1");
    kernel.ip("nexthop add id 11 group 1/3 type resilient buckets 32");
    kernel.ip("nexthop add id 20 blackhole");
    kernel.ip("route add 192.0.2.0/24 nhid 1");
    kernel.ip("route add 192.0.3.0/24 nhid 10");
    kernel.ip("route add 192.0.4.0/24 nhid 11");
    kernel.ip("route add 192.0.5.0/24 nhid 20");
    followed.expect("192.0.2.1", &[to(0, "10.0.0.9")]);
    followed.expect("192.0.3.1", &[to(0, "10.0.0.9"), to(1, "10.0.1.9")]);
    assert_eq!(shares(&followed, "192.0.3.1"), [(to(0, "10.0.0.9"), 768), (to(1, "10.0.1.9"), 256)]);
    followed.expect("192.0.4.1", &[to(0, "10.0.0.9"), to(2, "10.0.2.9")]);
    followed.expect("192.0.5.1", &[Fate::Blackhole]);
    // An object changes: all that lead to it follow, routes untouched.
    kernel.ip("nexthop replace id 1 via 10.0.0.8 dev d0");
    followed.expect("192.0.2.1", &[to(0, "10.0.0.8")]);
    followed.expect("192.0.3.1", &[to(0, "10.0.0.8"), to(1, "10.0.1.9")]);
    followed.expect("192.0.4.1", &[to(0, "10.0.0.8"), to(2, "10.0.2.9")]);
    // A group changes, and resiliently: only flows of the member that is gone move.
    let id = followed.tables.fib4.lookup(u32::from_be_bytes([192, 0, 3, 1]));
    let before: Vec<NextHop> = (0..1024).map(|h| followed.tables.next_hops.resolve(id, h)).collect();
    kernel.ip("nexthop replace id 10 group 1/3");
    followed.expect("192.0.3.1", &[to(0, "10.0.0.8"), to(2, "10.0.2.9")]);
    let gone =
        |hop: &NextHop| matches!(hop, NextHop::Forward { mac, .. } if Fate::To(1, *mac) == to(1, "10.0.1.9"));
    let moved = (0..1024).filter(|h| followed.tables.next_hops.resolve(id, *h) != before[*h as usize]);
    // Shares were three to one, and are one to one: half a third of the first member's had to move too.
    assert_eq!(moved.count(), before.iter().filter(|hop| gone(hop)).count() + 256);
    // An object is deleted: its routes are gone, of which the kernel says nothing, and groups shrink.
    kernel.ip("nexthop del id 1");
    followed.expect("192.0.2.1", &[Fate::None]);
    followed.expect("192.0.3.1", &[to(2, "10.0.2.9")]);
    followed.expect("192.0.4.1", &[to(2, "10.0.2.9")]);
    let settled = || followed.status().objects == 5;
    followed.wait_for("five objects", settled);
}

#[test]
fn ipv4_goes_over_ipv6_gateways_and_on_link_ones() {
    needs_root!();
    let kernel = kernel();
    let followed = kernel.follow(&small());
    kernel.ip("route add 192.0.2.0/24 via inet6 2001:db8:1::9 dev d1");
    followed.expect("192.0.2.1", &[to(1, "2001:db8:1::9")]);
    // The gateway is in no prefix of the link.
    kernel.ip("neigh add 203.0.113.9 lladdr 02:00:00:00:00:42 dev d2 nud permanent");
    kernel.ip("route add 192.0.3.0/24 via 203.0.113.9 dev d2 onlink");
    let gateway = Fate::To(2, isoplane::wire::ethernet::MacAddress([2, 0, 0, 0, 0, 0x42]));
    followed.expect("192.0.3.1", &[gateway]);
    // Packets for the gateway itself do not go there: no route says so.
    assert_eq!(followed.fates("203.0.113.9"), [Fate::None].into());
    kernel.ip("route add 203.0.113.9/32 dev d2");
    followed.expect("203.0.113.9", &[gateway]);
    // A longer prefix elsewhere hides the link's neighbours.
    followed.expect("10.0.2.9", &[to(2, "10.0.2.9")]);
    kernel.ip("route add 10.0.2.8/31 via 10.0.0.9");
    followed.expect("10.0.2.9", &[to(0, "10.0.0.9")]);
    kernel.ip("route del 10.0.2.8/31");
    followed.expect("10.0.2.9", &[to(2, "10.0.2.9")]);
}

#[test]
fn what_leaves_by_other_links_is_punted() {
    needs_root!();
    let kernel = kernel();
    let followed = kernel.follow_with(&small(), |config| {
        config.interfaces.remove("d2");
    });
    kernel.ip("route add 192.0.2.0/24 via 10.0.2.9");
    followed.expect("192.0.2.1", &[Fate::Local]);
    followed.expect("10.0.2.77", &[Fate::Local]);
    kernel.ip("route add 192.0.3.0/24 nexthop via 10.0.2.9 nexthop via 10.0.1.9");
    followed.expect("192.0.3.1", &[Fate::Local, to(1, "10.0.1.9")]);
    assert!(followed.interface(2, None).is_none());
}

#[test]
fn tables_are_chosen_and_go_in_the_order_of_the_kernels_rules() {
    needs_root!();
    let kernel = kernel();
    kernel.ip("route add 192.0.2.0/24 via 10.0.0.9 table 100");
    kernel.ip("route add 192.0.3.0/24 via 10.0.1.9");
    kernel.ip("route add 192.0.3.0/24 via 10.0.2.9 table 100");
    use isoplane::sync::RouteTable;
    for (table, first, second) in [
        (RouteTable::Main, Fate::None, to(1, "10.0.1.9")),
        (RouteTable::All, to(0, "10.0.0.9"), to(1, "10.0.1.9")),
        (RouteTable::One(100), to(0, "10.0.0.9"), to(2, "10.0.2.9")),
    ] {
        let followed = kernel.follow_with(&small(), |config| config.table = table);
        followed.expect("192.0.2.1", &[first]);
        followed.expect("192.0.3.1", &[second]);
        followed.expect("10.0.0.1", &[Fate::Local]);
    }
}
