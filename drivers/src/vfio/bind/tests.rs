//! Binding and listing in trees of our own, in which a function plays the kernel.

use super::*;
use crate::vfio::{Kind, PcieLink};
use std::os::unix::fs::symlink;

pub(in crate::vfio) const NIC: &str = "0000:03:00.0";
pub(in crate::vfio) const OTHER: &str = "0000:03:00.1";
const DISK: &str = "0000:00:1f.2";

/// What the kernel does when its files are written to. A driver takes what it knows by `natural` and what it was
/// chosen for; one named `picky` takes nothing.
fn kernel(host: &Host, path: &Path, text: &str) -> io::Result<()> {
    let refused = |errno: Errno| Err(io::Error::from_raw_os_error(errno as i32));
    let address = text.trim();
    let attach = |driver: &str| match driver {
        "picky" => refused(Errno::ENODEV),
        driver => symlink(host.path("sys/bus/pci/drivers").join(driver), host.device(address).join("driver")),
    };
    let chosen = || host.driver_override(address);
    match path.file_name().and_then(|name| name.to_str()) {
        Some("driver_override") => fs::write(path, text),
        Some("unbind") => fs::remove_file(path.parent().unwrap()),
        Some("bind") => {
            let driver = path.parent().unwrap().file_name().unwrap().to_str().unwrap();
            let natural = host::text(&host.device(address).join("natural"));
            match chosen().or(natural).as_deref() == Some(driver) && path.parent().unwrap().exists() {
                true if host.device(address).join("refuses").exists() && driver == VFIO_PCI => {
                    refused(Errno::EINVAL)
                }
                true => attach(driver),
                false => refused(Errno::ENODEV),
            }
        }
        Some("drivers_probe") => match chosen().or_else(|| host::text(&host.device(address).join("natural")))
        {
            Some(driver) => attach(&driver),
            None => Ok(()),
        },
        _ => refused(Errno::ENOENT),
    }
}

pub(in crate::vfio) struct Tree {
    pub(in crate::vfio) host: Host,
    _dir: tempfile::TempDir,
}

impl Tree {
    /// A network device with two functions in one group, both with the driver `igb`, and a disk.
    pub(in crate::vfio) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut host = Host::at(dir.path());
        host.kernel = Some(kernel);
        let tree = Self { host, _dir: dir };
        for driver in ["vfio-pci", "igb", "ahci", "pcieport"] {
            fs::create_dir_all(tree.host.path("sys/bus/pci/drivers").join(driver)).unwrap();
        }
        tree.device(NIC, ("0x8086", "0x10d3", "0x020000"), Some(7), "igb");
        tree.device(OTHER, ("0x8086", "0x1521", "0x020000"), Some(7), "igb");
        tree.device("0000:00:03.0", ("0x8086", "0x3420", "0x060400"), Some(7), "pcieport");
        tree.device(DISK, ("0x8086", "0x2922", "0x010601"), Some(3), "ahci");
        tree.file(&format!("sys/bus/pci/devices/{NIC}/net/eth0/x"), "");
        tree
    }

    pub(in crate::vfio) fn file(&self, path: &str, text: &str) {
        let path = self.host.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn device(&self, address: &str, ids: (&str, &str, &str), group: Option<u32>, driver: &str) {
        let at = format!("sys/bus/pci/devices/{address}");
        for (name, text) in [
            ("vendor", ids.0),
            ("device", ids.1),
            ("class", ids.2),
            ("numa_node", "-1"),
            ("driver_override", "(null)\n"),
            ("natural", driver),
        ] {
            self.file(&format!("{at}/{name}"), text);
        }
        let device = self.host.device(address);
        symlink(self.host.path("sys/bus/pci/drivers").join(driver), device.join("driver")).unwrap();
        if let Some(group) = group {
            let group = self.host.path("sys/kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(group.join("devices")).unwrap();
            symlink(&device, group.join("devices").join(address)).unwrap();
            symlink(&group, device.join("iommu_group")).unwrap();
        }
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.host.driver_of(address)
    }
}

#[test]
fn a_device_is_bound_and_given_back() {
    let tree = Tree::new();
    let bound = tree.host.bind("03:00.0", false).unwrap();
    assert_eq!(bound.previous.as_deref(), Some("igb"));
    assert_eq!(bound.others, [(OTHER.to_owned(), "igb".to_owned())], "the group is named");
    assert_eq!(tree.driver(NIC).as_deref(), Some("vfio-pci"));
    // Again: nothing to do, and the note is not lost.
    assert_eq!(tree.host.bind(NIC, false).unwrap().previous.as_deref(), Some("igb"));
    assert_eq!(tree.host.unbind(NIC).unwrap().as_deref(), Some("igb"));
    assert_eq!(tree.host.driver_override(NIC), None);
    let error = tree.host.unbind(NIC).unwrap_err().to_string();
    assert!(error.contains("igb"), "{error}");
}

#[test]
fn a_choice_that_was_made_before_comes_back() {
    let tree = Tree::new();
    fs::create_dir_all(tree.host.path("sys/bus/pci/drivers/uio")).unwrap();
    let device = tree.host.device(NIC);
    tree.host.write(&device.join("driver/unbind"), NIC).unwrap();
    tree.host.write(&device.join("driver_override"), "uio").unwrap();
    tree.host.write(&tree.host.path("sys/bus/pci/drivers_probe"), NIC).unwrap();
    assert_eq!(tree.host.bind(NIC, false).unwrap().previous.as_deref(), Some("uio"));
    assert_eq!(tree.host.unbind(NIC).unwrap().as_deref(), Some("uio"));
    assert_eq!(tree.host.driver_override(NIC).as_deref(), Some("uio"));
}

#[test]
fn without_a_note_the_kernel_chooses() {
    let tree = Tree::new();
    tree.host.bind(NIC, false).unwrap();
    fs::remove_file(tree.host.note_path(NIC)).unwrap();
    assert_eq!(tree.host.unbind(NIC).unwrap().as_deref(), Some("igb"));
}

#[test]
fn a_device_that_vfio_does_not_take_is_where_it_was() {
    let tree = Tree::new();
    tree.file(&format!("sys/bus/pci/devices/{NIC}/refuses"), "");
    let error = tree.host.bind(NIC, false).unwrap_err();
    assert!(matches!(error, BindError::Refused { .. }), "{error}");
    assert_eq!(tree.driver(NIC).as_deref(), Some("igb"));
    assert_eq!(tree.host.driver_override(NIC), None);
    assert!(!tree.host.note_path(NIC).exists());
}

#[test]
fn default_routes_are_not_cut_without_force() {
    const FOUR: &str =
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
    let default = |name: &str| format!("{name}\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n");
    let net = |name: &str| format!("{name}\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n");
    let zeros = "0".repeat(32);
    let six = |name: &str, flags: &str| {
        format!("{zeros} 00 {zeros} 00 {zeros} 00000400 00000001 00000000 {flags} {name}\n")
    };
    for (four, six, refused) in [
        (default("eth0"), String::new(), Some("eth0")),
        (net("eth0") + &default("eth1"), six("lo", "00200200"), None),
        (net("eth0"), six("eth0", "00450003"), Some("eth0")),
        (net("eth0"), six("eth0", "00200200"), None),
        (default("bond0"), String::new(), Some("bond0")),
        (default("vlan9"), String::new(), Some("vlan9")),
    ] {
        let tree = Tree::new();
        tree.file("proc/net/route", &format!("{FOUR}{four}"));
        tree.file("proc/net/ipv6_route", &six);
        tree.file("sys/class/net/eth0/upper_bond0/x", "");
        tree.file("sys/class/net/bond0/upper_vlan9/x", "");
        tree.file("sys/class/net/bond0/upper_eth0/x", "");
        match (tree.host.bind(NIC, false), refused) {
            (Ok(_), None) => {}
            (Err(BindError::DefaultRoute { interface, route, .. }), Some(expected)) => {
                assert_eq!((interface.as_str(), route.as_str()), ("eth0", expected));
                assert_eq!(tree.driver(NIC).as_deref(), Some("igb"), "untouched");
                tree.host.bind(NIC, true).unwrap();
            }
            (other, _) => panic!("{four}{six}: {other:?}"),
        }
    }
}

#[test]
fn bad_wishes_are_refused_by_name() {
    let tree = Tree::new();
    let refusal = |address: &str| tree.host.bind(address, false).unwrap_err();
    assert!(matches!(refusal("eth0"), BindError::Device(VfioError::BadAddress { .. })));
    assert!(matches!(refusal("00:09.0"), BindError::Device(VfioError::Absent { .. })));
    assert!(matches!(refusal(DISK), BindError::NotNetwork { class: 0x01_0601, .. }));
    assert_eq!(tree.host.bind(DISK, true).unwrap().previous.as_deref(), Some("ahci"));
    fs::remove_file(tree.host.device(NIC).join("iommu_group")).unwrap();
    assert!(matches!(refusal(NIC), BindError::Device(VfioError::NoIommu { .. })));
    tree.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    tree.host.bind(NIC, false).unwrap();
    fs::remove_dir(tree.host.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    assert!(matches!(refusal(OTHER), BindError::NoDriver));
}

#[test]
fn what_is_there_is_listed() {
    let tree = Tree::new();
    for (name, text) in [
        ("numa_node", "1\n"),
        ("current_link_speed", "2.5 GT/s PCIe\n"),
        ("current_link_width", "1\n"),
        ("max_link_speed", "8.0 GT/s PCIe\n"),
        ("max_link_width", "4\n"),
    ] {
        tree.file(&format!("sys/bus/pci/devices/{NIC}/{name}"), text);
    }
    tree.file(&format!("sys/bus/pci/devices/{OTHER}/virtio0/net/ens5/x"), "");
    let all = tree.host.devices();
    let addresses: Vec<&str> = all.iter().map(|device| device.address.as_str()).collect();
    assert_eq!(addresses, ["0000:00:03.0", DISK, NIC, OTHER]);
    let (disk, nic, other) = (&all[1], &all[2], &all[3]);
    assert_eq!((nic.vendor, nic.device, nic.class), (0x8086, 0x10d3, 0x02_0000));
    assert_eq!((nic.kind, other.kind), (Some(Kind::E1000e), None));
    assert_eq!((nic.iommu_group, &nic.group_members), (Some(7), &vec![OTHER.to_owned()]));
    assert_eq!((nic.numa_node, other.numa_node), (Some(1), None));
    let link = PcieLink {
        speed: "2.5 GT/s PCIe".into(),
        width: 1,
        most_speed: "8.0 GT/s PCIe".into(),
        most_width: 4,
    };
    assert_eq!((nic.link.as_ref(), &other.link), (Some(&link), &None));
    assert_eq!((&nic.interfaces, &other.interfaces), (&vec!["eth0".to_owned()], &vec!["ens5".to_owned()]));
    assert!(nic.is_network() && !disk.is_network());
    assert!(tree.host.expect(NIC, Kind::E1000e).is_ok());
    let error = tree.host.expect(NIC, Kind::VirtioNet).unwrap_err().to_string();
    assert!(error.contains("8086:10d3") && error.contains("virtio-net"), "{error}");
}
