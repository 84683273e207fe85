//! An AF_XDP port leaves to the kernel what is the host's, as its addresses come and go.

#[path = "sync/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lab;

use etherparse::PacketBuilder;
use isoplane::drivers::xdp::{XdpConfig, XdpPort};
use isoplane::memory::{HugePages, Pool, PoolConfig};
use lab::{Kernel, small};
use std::net::IpAddr;

fn udp(to: &str) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let mut bytes = Vec::new();
    match to.parse().expect("an address") {
        IpAddr::V4(to) => {
            let packet = ethernet.ipv4([198, 51, 100, 1], to.octets(), 64).udp(1, 2);
            packet.write(&mut bytes, &[0; 20]).expect("a packet");
        }
        IpAddr::V6(to) => {
            let from: std::net::Ipv6Addr = "2001:db8:ffff::1".parse().expect("an address");
            let packet = ethernet.ipv6(from.octets(), to.octets(), 64).udp(1, 2);
            packet.write(&mut bytes, &[0; 20]).expect("a packet");
        }
    }
    bytes
}

#[test]
fn steering_follows_own_addresses() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: making network namespaces needs root");
        return;
    }
    let kernel = Kernel::new(2);
    kernel.ip("addr add 10.0.0.1/24 dev d0");
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("steering", 2048) };
    let pool = Pool::create(&config).expect("a pool");
    let inside = kernel.namespace.enter().expect("enter the namespace");
    let port = XdpPort::open(&pool, &XdpConfig::new("d0").rings(64, 64)).expect("a port");
    inside.leave().expect("leave the namespace");
    let taken = |to: &str| port.would_take(&udp(to)).expect("a verdict");
    assert!(taken("10.0.0.1"), "before, everything is the port's");
    let steering = port.steering();
    let followed = kernel.follow_with(&small(), |config| config.steering = vec![steering]);
    let mut arp = udp("192.0.2.1");
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    assert!(!port.would_take(&arp).expect("a verdict"));
    for kernels in ["10.0.0.1", "10.0.0.255", "224.0.0.5", "255.255.255.255", "ff02::1", "fe80::1"] {
        assert!(!taken(kernels), "{kernels}");
    }
    for ours in ["10.0.0.2", "192.0.2.1", "2001:db8::1", "10.0.1.1"] {
        assert!(taken(ours), "{ours}");
    }
    // Addresses come, on any interface, and go.
    kernel.ip("addr add 2001:db8::1/64 dev d0");
    kernel.ip("addr add 10.0.1.1/24 dev d1");
    kernel.ip("addr add 203.0.113.1/32 dev lo");
    for kernels in ["2001:db8::1", "10.0.1.1", "203.0.113.1"] {
        followed.wait_for(kernels, || !taken(kernels));
    }
    kernel.ip("addr del 10.0.1.1/24 dev d1");
    followed.wait_for("the address to be gone", || taken("10.0.1.1"));
    assert!(!taken("203.0.113.1"));
    // More than a program has room for: said, counted, and the first are there.
    let commands: String =
        (0..300).map(|n| format!("addr add 10.7.{}.{}/32 dev lo\n", n >> 7, (n << 1) & 255)).collect();
    assert!(kernel.batch(&commands).1.is_empty());
    followed.wait_for("too many", || followed.status().unsteered > 0);
    assert!(!taken("10.7.0.0") && !taken("224.0.0.5") && !taken("fe80::1"));
    assert_eq!(followed.status().steering_failures, 0);
    kernel.ip("addr flush dev lo");
    followed.wait_for("room", || followed.status().unsteered == 0 && taken("10.7.0.0"));
}
