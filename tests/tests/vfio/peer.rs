//! Linux's own driver on the other end of a cable.

use crate::nics::{self, soon};
use crate::worker::{PATIENCE, is_test};
use isoplane_drivers::vfio::Host;
use isoplane_lab::{Link, Namespace, PacketSocket};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};

/// An interface of the kernel, switched on. Its driver begins anew when this is dropped: no address, filter or MTU
/// is left.
pub(crate) struct Peer {
    address: String,
    pub(crate) namespace: Namespace,
    pub(crate) interface: String,
    pub(crate) mac: [u8; 6],
}

impl Peer {
    pub(crate) const IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    /// `driver` must be what the kernel drives it with.
    pub(crate) fn new(id: &str, driver: &str) -> Self {
        let address = nics::address(id);
        let device = Host::default().describe(&address).expect("a device");
        // What the bus shows of a virtio device is the transport.
        let named = if driver == "virtio_net" { "virtio-pci" } else { driver };
        assert_eq!(device.driver.as_deref(), Some(named));
        let namespace = Namespace::current().expect("ours");
        let interface = device.interfaces[0].clone();
        let quiet = format!("ipv6/conf/{interface}/disable_ipv6");
        if namespace.has_sysctl(&quiet).expect("sysctl") {
            namespace.set_sysctl(&quiet, "1").expect("sysctl");
        }
        let link = namespace.link(&interface).expect("an interface");
        link.up().expect("up");
        let mac = link.status().expect("its state").mac.expect("Ethernet");
        Self { address, namespace, interface, mac }
    }

    pub(crate) fn link(&self) -> Link<'_> {
        self.namespace.link(&self.interface).expect("an interface")
    }

    pub(crate) fn wait_running(&self) {
        assert!(self.link().wait_running(PATIENCE).expect("its state"), "{}: no link", self.interface);
    }

    pub(crate) fn socket(&self) -> PacketSocket {
        PacketSocket::open(&self.link()).expect("a packet socket")
    }

    /// Gives it [`Peer::IP`], and a neighbour at this address of Ethernet.
    pub(crate) fn address_and_neighbour(&self, ip: Ipv4Addr, mac: [u8; 6]) {
        self.link().add_address(IpAddr::V4(Self::IP), 24).expect("an address");
        self.link().add_neighbour(IpAddr::V4(ip), mac).expect("a neighbour");
    }
}

/// Test packets from a socket.
pub(crate) fn receive(socket: &mut PacketSocket, n: usize) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    while got.len() < n {
        let next = socket.receive_matching(PATIENCE, is_test).expect("a packet socket");
        got.push(next.unwrap_or_else(|| panic!("{} of {n} packets have arrived", got.len())));
    }
    got
}

impl Drop for Peer {
    fn drop(&mut self) {
        let Ok(driver) = fs::canonicalize(format!("/sys/bus/pci/devices/{}/driver", self.address)) else {
            return;
        };
        let again = fs::write(driver.join("unbind"), &self.address)
            .and_then(|()| fs::write(driver.join("bind"), &self.address));
        let there =
            || Host::default().describe(&self.address).is_ok_and(|device| !device.interfaces.is_empty());
        if !std::thread::panicking() {
            again.expect("its driver again");
            assert!(soon(there), "its interface again");
        }
    }
}
