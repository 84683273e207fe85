//! The router's tables follow the kernel's: routes of all kinds, links, addresses, neighbours and
//! next-hop objects, as `ip` changes them.

#[path = "sync/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lab;

use isoplane::tables::interface::ReversePath;
use isoplane::wire::ethernet::MacAddress;
use isoplane_lab::{VethEnd, veth};
use lab::{Fate, Kernel, small, to};

/// Only root can make network namespaces.
macro_rules! needs_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: making network namespaces needs root");
            return;
        }
    };
}

#[test]
fn routes_of_all_types_are_followed() {
    needs_root!();
    let kernel = Kernel::new(2);
    kernel.ip("addr add 10.0.0.1/24 dev d0");
    kernel.ip("addr add 10.0.1.1/24 dev d1");
    kernel.neighbours(0, &["10.0.0.9", "10.0.0.10"]);
    kernel.neighbours(1, &["10.0.1.9"]);
    // Half of it is there before, half comes later.
    kernel.ip("route add 192.0.2.0/24 via 10.0.0.9");
    kernel.ip("route add blackhole 198.51.100.0/24");
    let followed = kernel.follow(&small());
    assert_eq!(followed.fates("192.0.2.7"), [to(0, "10.0.0.9")].into());
    assert_eq!(followed.fates("198.51.100.1"), [Fate::Blackhole].into());
    assert_eq!(followed.fates("10.0.0.1"), [Fate::Local].into());
    assert_eq!(followed.fates("10.0.0.255"), [Fate::Local].into());
    assert_eq!(followed.fates("10.0.0.9"), [to(0, "10.0.0.9")].into());
    assert_eq!(followed.fates("10.0.0.77"), [Fate::OnLink(0)].into());
    assert_eq!(followed.fates("127.0.0.1"), [Fate::Local].into());
    assert_eq!(followed.fates("224.0.0.5"), [Fate::Local].into());
    assert_eq!(followed.fates("ff02::1"), [Fate::Local].into());
    assert_eq!(followed.fates("8.8.8.8"), [Fate::None].into());
    kernel.ip("route add unreachable 203.0.113.0/24");
    kernel.ip("route add prohibit 203.0.114.0/24");
    kernel.ip("route add throw 203.0.115.0/24");
    kernel.ip("route add default via 10.0.1.9");
    kernel.ip("route add 192.0.2.128/25 via 10.0.0.10");
    followed.expect("203.0.113.1", &[Fate::Unreachable]);
    followed.expect("203.0.114.1", &[Fate::Prohibit]);
    followed.expect("203.0.115.1", &[Fate::Unreachable]);
    followed.expect("8.8.8.8", &[to(1, "10.0.1.9")]);
    followed.expect("192.0.2.129", &[to(0, "10.0.0.10")]);
    followed.expect("192.0.2.127", &[to(0, "10.0.0.9")]);
    kernel.ip("route change 192.0.2.128/25 via 10.0.1.9");
    followed.expect("192.0.2.129", &[to(1, "10.0.1.9")]);
    kernel.ip("route del 192.0.2.128/25");
    followed.expect("192.0.2.129", &[to(0, "10.0.0.9")]);
    kernel.ip("route del default");
    followed.expect("8.8.8.8", &[Fate::None]);
}

#[test]
fn the_lowest_metric_wins_and_the_next_one_takes_over() {
    needs_root!();
    let kernel = Kernel::new(2);
    kernel.ip("addr add 10.0.0.1/24 dev d0");
    kernel.ip("addr add 10.0.1.1/24 dev d1");
    kernel.ip("addr add 2001:db8::1/64 dev d0");
    kernel.ip("addr add 2001:db8:0:1::1/64 dev d1");
    kernel.neighbours(0, &["10.0.0.9", "2001:db8::9"]);
    kernel.neighbours(1, &["10.0.1.9", "2001:db8:0:1::9"]);
    let followed = kernel.follow(&small());
    for (net, at, first, second) in [
        ("192.0.2.0/24", "192.0.2.5", "10.0.0.9", "10.0.1.9"),
        ("2001:db8:f::/48", "2001:db8:f::5", "2001:db8::9", "2001:db8:0:1::9"),
    ] {
        kernel.ip(&format!("route add {net} via {second} metric 200"));
        followed.expect(at, &[to(1, second)]);
        kernel.ip(&format!("route add {net} via {first} metric 100"));
        followed.expect(at, &[to(0, first)]);
        kernel.ip(&format!("route add blackhole {net} metric 300"));
        kernel.ip(&format!("route del {net} via {first} metric 100"));
        followed.expect(at, &[to(1, second)]);
        kernel.ip(&format!("route del {net} via {second} metric 200"));
        followed.expect(at, &[Fate::Blackhole]);
        kernel.ip(&format!("route del blackhole {net} metric 300"));
        followed.expect(at, &[Fate::None]);
    }
}

#[test]
fn neighbours_are_resolved_by_the_kernel_and_followed() {
    needs_root!();
    let kernel = Kernel::new(1);
    kernel.ip("addr add 10.0.0.1/24 dev d0");
    kernel.ip("addr add 2001:db8::1/64 dev d0");
    kernel.far_ip("addr add 10.0.0.2/24 dev p0");
    kernel.far_ip("addr add 2001:db8::2/64 dev p0");
    // Neighbour discovery asks from a link-local address, which the lab's interfaces do not have.
    kernel.ip("addr add fe80::1/64 dev d0");
    let followed = kernel.follow(&small());
    followed.expect("10.0.0.2", &[Fate::OnLink(0)]);
    // A gateway is asked for as soon as a route has it.
    kernel.ip("route add 192.0.2.0/24 via 10.0.0.2");
    kernel.ip("route add 2001:db8:f::/48 via 2001:db8::2");
    for address in ["192.0.2.1", "10.0.0.2", "2001:db8:f::1", "2001:db8::2"] {
        followed.expect(address, &[Fate::To(0, MacAddress([2, 0, 0, 0, 0xfe, 0]))]);
    }
    // What a redirect would name.
    let gateway = followed.tables.fib4.lookup(u32::from_be_bytes([192, 0, 2, 1]));
    assert_eq!(followed.tables.next_hops.address(gateway), Some([10, 0, 0, 2].into()));
    // Its address changes.
    kernel.ip("neigh replace 10.0.0.2 lladdr 02:00:00:00:00:77 dev d0 nud permanent");
    for address in ["192.0.2.1", "10.0.0.2"] {
        followed.expect(address, &[Fate::To(0, MacAddress([2, 0, 0, 0, 0, 0x77]))]);
    }
    // Nobody is there: failed, by the kernel's word.
    kernel.ip("route add 192.0.3.0/24 via 10.0.0.3");
    followed.expect("192.0.3.1", &[Fate::Failed(0)]);
    followed.expect("10.0.0.3", &[Fate::Failed(0)]);
    // Then somebody is.
    kernel.far_ip("addr add 10.0.0.3/24 dev p0");
    followed.expect("192.0.3.1", &[Fate::To(0, MacAddress([2, 0, 0, 0, 0xfe, 0]))]);
}

#[test]
fn interfaces_show_what_the_kernel_says_about_them() {
    needs_root!();
    let kernel = Kernel::new(2);
    let set = |path: &str, value: &str| kernel.namespace.set_sysctl(path, value).expect("a parameter");
    set("ipv4/conf/d0/forwarding", "1");
    set("ipv4/conf/d0/rp_filter", "2");
    kernel.ip("addr add 10.0.0.1/24 dev d0");
    let followed = kernel.follow(&small());
    let d0 = || followed.interface(0, None).expect("d0");
    assert_eq!((d0().mtu, d0().up, d0().forward4, d0().forward6), (1500, true, true, false));
    assert_eq!((d0().mac, d0().reverse_path), (MacAddress([2, 0, 0, 0, 0xff, 0]), ReversePath::Loose));
    assert_eq!((d0().address4, d0().address6), (Some([10, 0, 0, 1].into()), None));
    kernel.ip("addr add 2001:db8::1/64 dev d0");
    followed.wait_for("the IPv6 address", || d0().address6 == "2001:db8::1".parse().ok());
    kernel.ip("addr add 10.0.0.2/24 dev d0");
    kernel.ip("link set d0 address 02:00:00:00:00:55");
    kernel.ip("link set d0 mtu 1400");
    followed.wait_for("MAC and MTU", || (d0().mac.0[5], d0().mtu) == (0x55, 1400));
    // A second address is not the first choice, until the first is gone.
    assert_eq!(d0().address4, Some([10, 0, 0, 1].into()));
    set("ipv4/conf/d0/promote_secondaries", "1");
    kernel.ip("addr del 10.0.0.1/24 dev d0");
    followed.wait_for("the other address", || d0().address4 == Some([10, 0, 0, 2].into()));
    followed.expect("10.0.0.1", &[Fate::OnLink(0)]);
    // Parameters change without a link changing.
    set("ipv4/conf/d0/forwarding", "0");
    set("ipv6/conf/d0/forwarding", "1");
    followed.wait_for("forwarding", || (d0().forward4, d0().forward6) == (false, true));
    set("ipv4/conf/all/rp_filter", "1");
    set("ipv4/conf/d0/rp_filter", "0");
    followed.wait_for("the reverse-path filter", || d0().reverse_path == ReversePath::Strict);
    // Renamed, it is the same port; down, it has no routes; deleted, it is gone.
    kernel.ip("link set d0 down");
    followed.wait_for("down", || !d0().up);
    followed.expect("10.0.0.77", &[Fate::None]);
    kernel.ip("link set d0 name other");
    kernel.ip("link set other up");
    followed.wait_for("up again", || d0().up);
    followed.expect("10.0.0.77", &[Fate::OnLink(0)]);
    kernel.ip("link del other");
    followed.wait_for("nothing", || followed.interface(0, None).is_none());
    followed.expect("10.0.0.77", &[Fate::None]);
    // Another by the name that the configuration has.
    let near = VethEnd::new(&kernel.namespace, "d0").mac([2, 0, 0, 0, 0, 1]).address([10, 9, 0, 1], 24);
    veth::pair(&near, &VethEnd::new(&kernel.far, "new")).expect("a veth pair");
    followed.wait_for("the new one", || d0().mac.0[5] == 1);
    followed.expect("10.9.0.77", &[Fate::OnLink(0)]);
    assert!(followed.interface(1, None).is_some());
}
