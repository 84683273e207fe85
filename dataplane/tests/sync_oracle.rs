//! Random routes, and random addresses: our tables say what the kernel's own lookup says
//! (`ip route get`), before and after routes and links have changed.

#[path = "sync/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lab;

use lab::{Fate, Followed, Kernel, small};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const PORTS: u8 = 4;

/// Marsaglia's xorshift: the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn gateway(random: &mut Random, v4: bool) -> (u8, IpAddr) {
    let (port, host) = (random.below(u64::from(PORTS)) as u8, 9 + random.below(3) as u8);
    (port, at(port, host, v4))
}

fn at(port: u8, host: u8, v4: bool) -> IpAddr {
    if v4 {
        Ipv4Addr::new(10, port, 0, host).into()
    } else {
        Ipv6Addr::new(0x2001, 0xdb8, port.into(), 0, 0, 0, 0, host.into()).into()
    }
}

fn neighbours(kernel: &Kernel, port: u8, v4: bool) {
    let hosts = [9, 10, 11].map(|host| at(port, host, v4).to_string());
    kernel.neighbours(port, &hosts.each_ref().map(String::as_str));
}

/// Mostly near to each other, so that prefixes lie in each other.
fn address(random: &mut Random, v4: bool) -> IpAddr {
    if v4 {
        let base = [0x0a00_0000, 0xac10_0000, 0xc633_6400][random.below(3) as usize];
        let bits = [0xff, 0x3ff, 0x3_ffff][random.below(3) as usize];
        Ipv4Addr::from_bits(base | random.next() as u32 & bits).into()
    } else {
        let base = 0x2001_0db8_u128 << 96;
        // Seldom where the gateways are, which longer prefixes would hide.
        let away = u128::from(u16::from(random.below(8) != 0)) << 95;
        let low = away | u128::from(random.below(6)) << 80 | u128::from(random.below(3)) << 64;
        Ipv6Addr::from_bits(base | low | u128::from(random.below(16))).into()
    }
}

fn route(random: &mut Random, v4: bool) -> String {
    let net = address(random, v4);
    let length = if v4 { 8 + random.below(25) } else { 32 + random.below(97) };
    let net = ipnet::IpNet::new(net, length as u8).expect("a length").trunc();
    let metric = 100 * (1 + random.below(3));
    match random.below(20) {
        0 => format!("blackhole {net} metric {metric}"),
        1 => format!("unreachable {net} metric {metric}"),
        2 => format!("prohibit {net} metric {metric}"),
        3 => format!("{net} dev d{} metric {metric}", random.below(PORTS.into())),
        4..=7 => {
            let hops: BTreeSet<(u8, IpAddr)> =
                (0..2 + random.below(4)).map(|_| gateway(random, v4)).collect();
            let hops: String = hops
                .iter()
                .map(|(port, to)| format!(" nexthop via {to} dev d{port} weight {}", 1 + random.below(5)))
                .collect();
            format!("{net} metric {metric}{hops}")
        }
        _ => {
            let (port, to) = gateway(random, v4);
            format!("{net} via {to} dev d{port} metric {metric}")
        }
    }
}

fn compare(kernel: &Kernel, followed: &Followed, random: &mut Random, v4: bool, when: &str) {
    let addresses: BTreeSet<IpAddr> = (0..1000).map(|_| address(random, v4)).collect();
    let addresses: Vec<IpAddr> = addresses.into_iter().collect();
    let known = |port, address| (9..12).any(|host| at(port, host, v4) == address);
    let oracle = kernel.route_get(&addresses, known);
    let mut kinds = BTreeSet::new();
    for (address, fate) in addresses.iter().zip(oracle) {
        let ours = followed.fates_of(*address);
        assert!(ours.contains(&fate), "{when}: {address}: the kernel says {fate:?}, we {ours:?}");
        kinds.insert(match fate {
            Fate::To(..) => 0,
            Fate::OnLink(_) => 1,
            Fate::Blackhole | Fate::Unreachable | Fate::Prohibit => 2,
            _ => 3,
        });
    }
    assert!(kinds.len() >= 3, "{when}: the addresses find too few kinds of routes: {kinds:?}");
}

/// Waits until everything that the kernel has said before has been taken in: a last route is seen.
fn settle(kernel: &Kernel, followed: &Followed, mark: u32) {
    kernel.ip(&format!("route add blackhole 100.64.{}.{}/32", mark >> 8, mark & 255));
    followed.expect(&format!("100.64.{}.{}", mark >> 8, mark & 255), &[Fate::Blackhole]);
    followed.wait_for("the last resync", || {
        let before = followed.status().resyncs;
        std::thread::sleep(std::time::Duration::from_millis(300));
        followed.status().resyncs == before
    });
}

#[test]
fn lookups_say_what_the_kernel_says() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: making network namespaces needs root");
        return;
    }
    for (v4, seed) in [(true, 0x1234_5678_9abc_def1), (false, 0xfeed_f00d_1234_5671)] {
        let mut random = Random(seed);
        let kernel = Kernel::new(PORTS);
        for port in 0..PORTS {
            kernel.ip(&format!("addr add {}/{} dev d{port}", at(port, 1, v4), if v4 { 24 } else { 64 }));
            neighbours(&kernel, port, v4);
        }
        let mut routes: Vec<String> = (0..600).map(|_| route(&mut random, v4)).collect();
        let add = |routes: &[String]| {
            let commands: String = routes.iter().map(|route| format!("route add {route}\n")).collect();
            let (_, failures) = kernel.batch(&commands);
            // Some are there already; and to a gateway that another route hides there is no way.
            let expected = ["File exists", "No route to host", "Nexthop has invalid gateway"];
            let odd = failures.iter().find(|(_, reason)| !expected.iter().any(|e| reason.contains(e)));
            assert_eq!(odd, None);
            routes.len() - failures.len()
        };
        assert!(add(&routes[..300]) > 100);
        let followed = kernel.follow(&small());
        compare(&kernel, &followed, &mut random, v4, "at the start");
        assert!(add(&routes[300..]) > 100);
        settle(&kernel, &followed, 1);
        compare(&kernel, &followed, &mut random, v4, "with more routes");
        let commands: String = routes.drain(100..400).map(|route| format!("route del {route}\n")).collect();
        kernel.batch(&commands);
        settle(&kernel, &followed, 2);
        compare(&kernel, &followed, &mut random, v4, "with fewer");
        let commands: String = routes.drain(..100).map(|route| format!("route replace {route}\n")).collect();
        kernel.batch(&commands);
        kernel.ip("link set d1 down");
        settle(&kernel, &followed, 3);
        compare(&kernel, &followed, &mut random, v4, "with a link down");
        kernel.ip("link set d1 up");
        // They went with the link.
        neighbours(&kernel, 1, v4);
        add(&routes);
        settle(&kernel, &followed, 4);
        compare(&kernel, &followed, &mut random, v4, "with the link up again");
        assert_eq!(followed.status().full, 0);
    }
}
