//! A router's tables beside a kernel in a namespace of its own: made by `ip`, read through the tables'
//! readers, and compared with what `ip route get` says.

use isoplane::PortId;
use isoplane::sync::{Sync, SyncConfig, SyncStatus};
use isoplane::tables::{Immediate, Interface, InterfaceId, NextHop, Tables, TablesConfig};
use isoplane::wire::ethernet::MacAddress;
use isoplane_lab::{Namespace, VethEnd, veth};
use std::collections::BTreeSet;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A kernel with interfaces `d0`, `d1`, ... that are up, each of which is a port of the router; their
/// other ends `p0`, `p1`, ... are those of a second kernel.
pub(crate) struct Kernel {
    pub(crate) namespace: Namespace,
    pub(crate) far: Namespace,
}

impl Kernel {
    pub(crate) fn new(interfaces: u8) -> Self {
        let kernel = Self {
            namespace: Namespace::new().expect("namespace"),
            far: Namespace::new().expect("namespace"),
        };
        for n in 0..interfaces {
            let near = VethEnd::new(&kernel.namespace, &format!("d{n}")).mac([2, 0, 0, 0, 0xff, n]);
            let far = VethEnd::new(&kernel.far, &format!("p{n}")).mac([2, 0, 0, 0, 0xfe, n]);
            veth::pair(&near, &far).expect("a veth pair");
        }
        kernel
    }

    /// Runs `ip`.
    pub(crate) fn ip(&self, args: &str) {
        let (ok, said) = self.try_ip(args);
        assert!(ok, "ip {args}: {said}");
    }

    /// Runs `ip` at the other end.
    pub(crate) fn far_ip(&self, args: &str) {
        let (ok, said) = Self::ip_in(&self.far, args);
        assert!(ok, "far: ip {args}: {said}");
    }

    pub(crate) fn try_ip(&self, args: &str) -> (bool, String) {
        Self::ip_in(&self.namespace, args)
    }

    fn ip_in(namespace: &Namespace, args: &str) -> (bool, String) {
        let run = || {
            let out = Command::new("ip").args(args.split_whitespace()).output().expect("ip(8)");
            (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
        };
        namespace.run(run).expect("enter the namespace")
    }

    /// Runs many commands, whether they succeed or not; gives what was printed, and the lines of those
    /// that failed, with the reason.
    pub(crate) fn batch(&self, commands: &str) -> (String, Vec<(usize, String)>) {
        let run = || {
            let mut child = Command::new("ip")
                .args(["-oneline", "-force", "-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("ip(8)");
            let mut stdin = child.stdin.take().expect("stdin");
            std::thread::scope(|scope| {
                scope.spawn(move || stdin.write_all(commands.as_bytes()).expect("write"));
                child.wait_with_output().expect("ip(8)")
            })
        };
        let out = self.namespace.run(run).expect("enter the namespace");
        let mut failures = Vec::new();
        let mut reason = String::new();
        for line in String::from_utf8_lossy(&out.stderr).lines() {
            match line.strip_prefix("Command failed -:") {
                Some(number) => failures.push((number.parse().expect("a line"), std::mem::take(&mut reason))),
                None => reason.push_str(line),
            }
        }
        (String::from_utf8_lossy(&out.stdout).into_owned(), failures)
    }

    /// Where the kernel would send packets for these addresses. Of several paths it says one.
    pub(crate) fn route_get(&self, addresses: &[IpAddr], known: impl Fn(u8, IpAddr) -> bool) -> Vec<Fate> {
        let commands: String = addresses.iter().map(|address| format!("route get {address}\n")).collect();
        let (said, failures) = self.batch(&commands);
        let mut lines = said.lines();
        let answer = |(address, line): (&IpAddr, usize)| {
            if let Some((_, reason)) = failures.iter().find(|(failed, _)| *failed == line) {
                return match reason.rsplit(": ").next().unwrap_or_default() {
                    "Network is unreachable" => Fate::None,
                    "No route to host" => Fate::Unreachable,
                    "Permission denied" => Fate::Prohibit,
                    "Invalid argument" => Fate::Blackhole,
                    other => panic!("{address}: {other:?}"),
                };
            }
            let words: Vec<&str> = lines.next().expect("an answer").split_whitespace().collect();
            assert!(words[..2].contains(&address.to_string().as_str()), "{address}: {words:?}");
            if matches!(words[0], "local" | "broadcast" | "multicast" | "anycast") {
                return Fate::Local;
            }
            let after = |what: &str| words.iter().position(|word| *word == what).map(|at| words[at + 1]);
            let device = after("dev").and_then(|name| name.strip_prefix('d')?.parse().ok()).expect("a port");
            // A gateway of the other family has `inet6` before it.
            let gateway = after("via").map(|via| if via == "inet6" { after("inet6") } else { Some(via) });
            match gateway.flatten() {
                Some(gateway) => to(device, gateway),
                None if known(device, *address) => Fate::To(device, mac(device, *address)),
                None => Fate::OnLink(device),
            }
        };
        addresses.iter().zip(1..).map(answer).collect()
    }

    /// Permanent neighbours, each with an address of its own; see [`mac`].
    pub(crate) fn neighbours(&self, device: u8, addresses: &[&str]) {
        for address in addresses {
            let mac = mac(device, address.parse().expect("address"));
            self.ip(&format!("neigh replace {address} lladdr {mac} dev d{device} nud permanent"));
        }
    }

    /// Follows this kernel.
    pub(crate) fn follow(&self, config: &TablesConfig) -> Followed {
        self.follow_with(config, |_| {})
    }

    pub(crate) fn follow_with(
        &self,
        tables: &TablesConfig,
        change: impl FnOnce(&mut SyncConfig) + Send,
    ) -> Followed {
        let names = (0..8u8).map(|n| (format!("d{n}"), PortId(n)));
        let mut config = SyncConfig::new(names);
        change(&mut config);
        let (writer, tables) = Tables::create("test", tables).expect("tables");
        // The thread that follows lives in the namespace of the one that starts it.
        let start = || {
            let loaded = Sync::load(config, writer).expect("a first load");
            loaded.start(Vec::<isoplane::Mailbox<u64, _>>::new(), Immediate).expect("a thread")
        };
        Followed { sync: self.namespace.run(start).expect("enter the namespace"), tables }
    }
}

/// The Ethernet address that [`Kernel::neighbours`] gives.
pub(crate) fn mac(device: u8, address: IpAddr) -> MacAddress {
    let last = match address {
        IpAddr::V4(a) => a.octets()[1..4].try_into().expect("three"),
        IpAddr::V6(a) => {
            let o = a.octets();
            [o[1] ^ o[5], o[14], o[15]]
        }
    };
    let [a, b, c] = last;
    MacAddress([2, device, u8::from(address.is_ipv6()), a, b, c])
}

pub(crate) struct Followed {
    pub(crate) sync: Sync,
    pub(crate) tables: Tables,
}

/// What is done with a packet, with interfaces by their port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fate {
    None,
    Local,
    Blackhole,
    Unreachable,
    Prohibit,
    OnLink(u8),
    Waiting(u8),
    Failed(u8),
    To(u8, MacAddress),
}

impl Followed {
    /// All that may happen to packets for an address.
    pub(crate) fn fates(&self, address: &str) -> BTreeSet<Fate> {
        self.fates_of(address.parse().expect("address"))
    }

    pub(crate) fn fates_of(&self, address: IpAddr) -> BTreeSet<Fate> {
        let id = match address {
            IpAddr::V4(address) => self.tables.fib4.lookup(address.to_bits()),
            IpAddr::V6(address) => self.tables.fib6.lookup(address.to_bits()),
        };
        (0..1024).map(|hash| self.fate(self.tables.next_hops.resolve(id, hash))).collect()
    }

    pub(crate) fn port(&self, interface: InterfaceId) -> u8 {
        self.tables.interfaces.get(interface).expect("an interface that is there").port.0
    }

    fn fate(&self, what: NextHop) -> Fate {
        match what {
            NextHop::None => Fate::None,
            NextHop::Local => Fate::Local,
            NextHop::Blackhole => Fate::Blackhole,
            NextHop::Unreachable => Fate::Unreachable,
            NextHop::Prohibit => Fate::Prohibit,
            NextHop::OnLink { interface } => Fate::OnLink(self.port(interface)),
            NextHop::Waiting { interface } => Fate::Waiting(self.port(interface)),
            NextHop::Failed { interface } => Fate::Failed(self.port(interface)),
            NextHop::Forward { interface, mac } => Fate::To(self.port(interface), mac),
            NextHop::Group(_) => panic!("a group in a group"),
        }
    }

    /// Waits until packets for an address go exactly there.
    pub(crate) fn expect(&self, address: &str, fates: &[Fate]) {
        let want: BTreeSet<Fate> = fates.iter().copied().collect();
        self.wait(
            &format!("{address} -> {want:?}"),
            || self.fates(address) == want,
            || format!("{:?}", self.fates(address)),
        );
    }

    /// An interface by its port and VLAN.
    pub(crate) fn interface(&self, port: u8, vlan: Option<u16>) -> Option<Interface> {
        (0..64)
            .filter_map(|place| self.tables.interfaces.get(InterfaceId::new(place)?))
            .find(|interface| interface.port.0 == port && interface.vlan == vlan)
    }

    pub(crate) fn status(&self) -> SyncStatus {
        self.sync.status()
    }

    pub(crate) fn wait(&self, what: &str, is: impl Fn() -> bool, shown: impl Fn() -> String) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is() {
            assert!(Instant::now() < deadline, "{what}: not yet; {}; {:?}", shown(), self.status());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn wait_for(&self, what: &str, is: impl Fn() -> bool) {
        self.wait(what, is, String::new);
    }
}

/// Where a gateway's packets go.
pub(crate) fn to(device: u8, address: &str) -> Fate {
    Fate::To(device, mac(device, address.parse().expect("address")))
}

/// Small tables.
pub(crate) fn small() -> TablesConfig {
    TablesConfig { routes4: 4096, routes6: 4096, next_hops: 4096, group_buckets: 1 << 14, interfaces: 64 }
}
