//! What to follow, and the kernel's parameters of interfaces.

use crate::app::PortId;
use crate::tables::interface::ReversePath;
use isoplane_drivers::xdp::XdpSteering;
use std::collections::BTreeMap;

/// Which of the kernel's routing tables count. Its table `local`, with the addresses of the machine, always
/// does.
///
/// Prefixes of several tables go into one: the longest wins, and of the same prefix the table that the
/// kernel's default rules look at first (`local`, `main`, others by number, `default`). Other rules
/// (`ip rule`) are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouteTable {
    /// `main`, and `default`.
    #[default]
    Main,
    /// All of them.
    All,
    /// This one, such as that of a VRF.
    One(u32),
}

/// What is said here goes; the rest is as the kernel's parameters of each interface say
/// (`/proc/sys/net/ipv4/conf/*`, `/proc/sys/net/ipv6/conf/*`), also when they change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Overrides {
    /// Filter of sources, for both IP versions; the kernel's `rp_filter` is for IPv4, and the larger of
    /// the interface's and that of `all`.
    pub reverse_path: Option<ReversePath>,
    /// Forwarding of IPv4; the kernel's `forwarding`.
    pub forward4: Option<bool>,
    /// Forwarding of IPv6, likewise.
    pub forward6: Option<bool>,
    /// ICMP redirects; the kernel's `send_redirects`. Off unless changed.
    pub redirects: Option<bool>,
    /// Forwarding to broadcast addresses; the kernel's `bc_forwarding`.
    pub directed_broadcast: Option<bool>,
}

impl Default for Overrides {
    fn default() -> Self {
        Self {
            reverse_path: None,
            forward4: None,
            forward6: None,
            redirects: Some(false),
            directed_broadcast: None,
        }
    }
}

/// What to follow.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SyncConfig {
    /// The router's ports, by the kernel's name of their interfaces. Their 802.1Q sub-interfaces are
    /// found by themselves.
    pub interfaces: BTreeMap<String, PortId>,
    /// Which routes count.
    pub table: RouteTable,
    /// What does not follow the kernel.
    pub overrides: Overrides,
    /// Bytes of events that may wait; more is an overrun, and everything is read again. 64 MiB unless
    /// changed; the kernel counts about a kilobyte for an event.
    pub receive_buffer: usize,
    /// AF_XDP ports that are to leave to the kernel what is the host's: everything but IP, multicast, broadcasts,
    /// link-local IPv6, and the router's own addresses as they change. Taken with
    /// [`XdpPort::steering`](isoplane_drivers::xdp::XdpPort::steering) before the port goes into the builder.
    pub steering: Vec<XdpSteering>,
    /// CPUs for the thread; none: wherever the calling thread may run. Name some that no worker spins on.
    pub cpus: Vec<usize>,
}

impl SyncConfig {
    /// To follow these interfaces, as the kernel calls them.
    #[must_use]
    pub fn new<N: Into<String>>(interfaces: impl IntoIterator<Item = (N, PortId)>) -> Self {
        Self {
            interfaces: interfaces.into_iter().map(|(name, port)| (name.into(), port)).collect(),
            table: RouteTable::default(),
            overrides: Overrides::default(),
            receive_buffer: 64 << 20,
            steering: Vec::new(),
            cpus: Vec::new(),
        }
    }
}

/// The kernel's parameters of interfaces, in the network namespace of the calling thread.
pub(super) mod parameters {
    use super::{Overrides, ReversePath};

    pub(in crate::sync) struct Parameters {
        pub(in crate::sync) forward4: bool,
        pub(in crate::sync) forward6: bool,
        pub(in crate::sync) reverse_path: ReversePath,
        pub(in crate::sync) redirects: bool,
        pub(in crate::sync) directed_broadcast: bool,
    }

    /// A number; 0 for what this kernel has not.
    fn value(version: &str, interface: &str, name: &str) -> u32 {
        let path = format!("/proc/sys/net/{version}/conf/{interface}/{name}");
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    pub(in crate::sync) fn read(interface: &str, overrides: &Overrides) -> Parameters {
        // How those of `all` and of the interface go together: Documentation/networking/ip-sysctl.rst.
        let (own, all) =
            (|name: &str| value("ipv4", interface, name), |name: &str| value("ipv4", "all", name));
        let reverse_path =
            overrides.reverse_path.unwrap_or_else(|| match own("rp_filter").max(all("rp_filter")) {
                0 => ReversePath::Off,
                1 => ReversePath::Strict,
                _ => ReversePath::Loose,
            });
        Parameters {
            forward4: overrides.forward4.unwrap_or_else(|| own("forwarding") != 0),
            forward6: overrides.forward6.unwrap_or_else(|| value("ipv6", interface, "forwarding") != 0),
            reverse_path,
            redirects: overrides
                .redirects
                .unwrap_or_else(|| own("send_redirects") != 0 || all("send_redirects") != 0),
            directed_broadcast: overrides
                .directed_broadcast
                .unwrap_or_else(|| own("bc_forwarding") != 0 && all("bc_forwarding") != 0),
        }
    }

    /// Are routes without carrier left out: IPv4, IPv6?
    pub(in crate::sync) fn ignore_without_carrier(interface: &str) -> [bool; 2] {
        ["ipv4", "ipv6"].map(|version| {
            [interface, "all"].iter().any(|of| value(version, of, "ignore_routes_with_linkdown") != 0)
        })
    }
}
