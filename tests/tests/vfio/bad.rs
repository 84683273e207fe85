//! What is refused, and how.

use crate::nics::{self, Nic, WAYS, booted_with, inside};
use isoplane_drivers::pci::Function;
use isoplane_drivers::vfio::{BindError, Domain, Host, IommuChoice, Kind, VfioError, VfioFunction};
use isoplane_memory::{HugePages, Pool, PoolConfig};
use std::fs;
use std::process::Command;

fn refusal(address: &str, way: IommuChoice) -> VfioError {
    match Domain::new(way).and_then(|domain| VfioFunction::open(address, &domain)) {
        Ok(_) => panic!("{address} was opened ({way:?})"),
        Err(error) => error,
    }
}

#[test]
fn what_is_not_there_or_not_ours_is_named() {
    if !inside() {
        return;
    }
    let address = nics::address("e1000e1");
    let interface = Host::default().describe(&address).unwrap().interfaces[0].clone();
    for way in WAYS {
        assert!(matches!(refusal("eth0", way), VfioError::BadAddress { .. }));
        assert!(matches!(refusal("0000:7f:00.0", way), VfioError::Absent { .. }));
        match refusal(&address, way) {
            VfioError::InUse { driver, interfaces, .. } => {
                assert_eq!((driver.as_str(), interfaces), ("e1000e", vec![interface.clone()]));
            }
            other => panic!("{other}"),
        }
    }
    fs::write(format!("/sys/bus/pci/devices/{address}/driver/unbind"), &address).unwrap();
    for way in WAYS {
        assert!(matches!(refusal(&address, way), VfioError::NotBound { .. }));
    }
    fs::write("/sys/bus/pci/drivers_probe", &address).unwrap();
    let error = Host::default().expect(&address, Kind::VirtioNet).unwrap_err();
    assert!(error.to_string().contains("8086:10d3"), "{error}");
}

#[test]
fn a_device_that_somebody_has_open_is_busy() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let function = nic.open(way);
        for other in WAYS {
            let error = refusal(&nic.address, other);
            assert!(matches!(error, VfioError::Busy { .. }), "{way:?}, then {other:?}: {error}");
        }
        let error = Host::default().unbind(&nic.address).unwrap_err();
        assert!(matches!(error, BindError::InUse { .. }), "{way:?}: {error}");
        drop(function);
    }
}

#[test]
fn a_group_that_the_kernel_shares_is_not_viable() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("spare0");
    let other = nics::address("spare1");
    for way in WAYS {
        match refusal(&nic.address, way) {
            VfioError::GroupNotViable { others, .. } => {
                assert_eq!(others, [(other.clone(), "virtio-pci".to_owned())], "{way:?}");
            }
            error => panic!("{way:?}: {error}"),
        }
    }
    // With both of them it is.
    let second = Nic::bound("spare1");
    for way in WAYS {
        let domain = Domain::new(way).unwrap();
        let both = [&nic, &second].map(|nic| VfioFunction::open(&nic.address, &domain).unwrap());
        assert!(both.iter().all(|function| nics::identity(function) == 0x1041_1af4));
    }
}

#[test]
fn bars_that_cannot_be_had_are_named() {
    if !inside() {
        return;
    }
    let address = nics::address("ports");
    assert!(matches!(Host::default().bind(&address, false), Err(BindError::NotNetwork { .. })));
    let nic = Nic::forced("ports", true);
    let function = nic.open(WAYS[0]);
    let said = |bar| function.bar(bar).unwrap_err().to_string();
    assert!(said(1).contains("I/O ports"), "{}", said(1));
    assert!(said(5).contains("BAR 5") && said(5).contains("none"), "{}", said(5));
    assert!(said(6).contains("BAR 6"), "{}", said(6));
    assert!(function.reset().is_err() || !function.gone());
}

#[test]
fn too_little_lockable_memory_says_how_much_is_needed() {
    if !inside() {
        return;
    }
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let domain = Domain::new(way).unwrap();
        let function = VfioFunction::open(&nic.address, &domain).unwrap();
        let config = PoolConfig::new("too large", 4096);
        let pool = Pool::create(&PoolConfig { lock: isoplane_memory::Lock::Never, ..config }).unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
        setrlimit(Resource::RLIMIT_MEMLOCK, 1 << 20, hard).unwrap();
        let said = std::thread::scope(|scope| {
            let work = || {
                // Of this thread alone.
                caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_IPC_LOCK).unwrap();
                function.map_pool(&pool).unwrap_err().to_string()
            };
            scope.spawn(work).join().unwrap()
        });
        setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard).unwrap();
        let needed = 4096 * 2048;
        assert!(said.contains("too large") && said.contains(&needed.to_string()), "{way:?}: {said}");
        assert!(said.contains("ulimit -l"), "{way:?}: {said}");
        function.map_pool(&pool).expect("with the limit as it was");
    }
}

#[test]
fn the_way_to_the_machine_is_not_cut() {
    if !inside() {
        return;
    }
    let host = Host::default();
    let address = nics::address("virtio3");
    let interface = host.describe(&address).unwrap().interfaces[0].clone();
    let ip = |arguments: &[&str]| {
        let status = Command::new("ip").args(arguments).status().expect("ip");
        assert!(status.success(), "ip {arguments:?}");
    };
    ip(&["link", "set", &interface, "up"]);
    ip(&["address", "add", "192.0.2.2/24", "dev", &interface]);
    ip(&["route", "add", "default", "via", "192.0.2.1"]);
    match host.bind(&address, false).unwrap_err() {
        BindError::DefaultRoute { interface: named, .. } => assert_eq!(named, interface),
        other => panic!("{other}"),
    }
    assert_eq!(host.describe(&address).unwrap().driver.as_deref(), Some("virtio-pci"));
    drop(Nic::forced("virtio3", true));
}

#[test]
fn an_iommu_is_not_given_up() {
    if !inside() {
        return;
    }
    const MODE: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
    let nic = Nic::bound("e1000e0");
    fs::write(MODE, "N").unwrap();
    let error = refusal(&nic.address, IommuChoice::UnsafeNoIommu);
    assert!(matches!(error, VfioError::NoIommuModeOff { .. }), "{error}");
    fs::write(MODE, "Y").unwrap();
    let error = refusal(&nic.address, IommuChoice::UnsafeNoIommu);
    fs::write(MODE, "N").unwrap();
    assert!(matches!(error, VfioError::IommuThere { .. }), "{error}");
}

#[test]
fn without_interrupt_remapping_nothing_is_opened() {
    if !inside() || !booted_with("intremap=off") {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let error = refusal(&nic.address, way);
        assert!(matches!(error, VfioError::NoInterruptRemapping { .. }), "{way:?}: {error}");
    }
}

#[test]
fn without_an_iommu_all_is_refused_until_it_is_asked_for() {
    if !inside() || !booted_with("intel_iommu=off") {
        return;
    }
    let address = nics::address("e1000e0");
    let host = Host::default();
    let error = host.bind(&address, false).unwrap_err();
    assert!(matches!(error, BindError::Device(VfioError::NoIommu { .. })), "{error}");
    assert_eq!(host.describe(&address).unwrap().driver.as_deref(), Some("e1000e"));

    fs::write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y").unwrap();
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let error = refusal(&nic.address, way);
        assert!(matches!(error, VfioError::NoIommu { .. }), "{way:?}: {error}");
    }
    let domain = Domain::new(IommuChoice::UnsafeNoIommu).unwrap();
    assert!(!domain.translates());
    let function = VfioFunction::open(&address, &domain).unwrap();
    let small = Pool::create(&PoolConfig::new("small pages", 16)).unwrap();
    let error = function.map_pool(&small).unwrap_err().to_string();
    assert!(error.contains("small pages") && error.contains("huge"), "{error}");
    // Rings are of huge pages, too, and there are none.
    let error = function.dma("ring", 4096).unwrap_err().to_string();
    assert!(error.contains("nr_hugepages"), "{error}");
    fs::write("/proc/sys/vm/nr_hugepages", "16").unwrap();
    let config = PoolConfig { huge_pages: HugePages::Require2M, ..PoolConfig::new("huge", 1024) };
    let pool = Pool::create(&config).unwrap();
    let data = function.map_pool(&pool).unwrap();
    function.reset().unwrap();
    let mut device = nics::ByHand::new(&function);
    function.bus_master(true);
    assert!(device.sends(data), "from physical memory");
    drop((device, function, domain, pool));
    drop(nic);
    fs::write("/proc/sys/vm/nr_hugepages", "0").unwrap();
}
