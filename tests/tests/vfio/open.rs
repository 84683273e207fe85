//! Devices that are opened, looked at, given memory and closed.

use crate::nics::{self, ByHand, KINDS, Nic, WAYS, inside, soon};
use isoplane_drivers::pci::{ConfigWidth, DmaSlice, Function, Registers, capabilities};
use isoplane_drivers::vfio::{Bar, Domain, Host, Kind, VfioFunction};
use isoplane_lab::Machine;
use isoplane_memory::{Pool, PoolConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

fn pool(name: &str, chunks: u32) -> Arc<Pool> {
    Pool::create(&PoolConfig::new(name, chunks)).expect("a pool")
}

#[test]
fn all_devices_are_listed() {
    if !inside() {
        return;
    }
    let all = Host::default().devices();
    let of = |kind| all.iter().filter(|device| device.kind == Some(kind)).count();
    // Those with several queues may not be there.
    let virtio = of(Kind::VirtioNet);
    assert!(virtio == 6 || virtio == 8, "{virtio}");
    assert_eq!(of(Kind::E1000e), 4);
    let first = nics::address("e1000e0");
    let nic = all.iter().find(|device| device.address == first).expect("listed");
    assert_eq!((nic.vendor, nic.device, nic.is_network()), (0x8086, 0x10d3, true));
    assert_eq!(nic.driver.as_deref(), Some("e1000e"));
    assert_eq!(nic.interfaces.len(), 1, "{nic:?}");
    let link = nic.link.as_ref().expect("PCI Express");
    assert_eq!(link.speed, "2.5 GT/s PCIe");
    let spare = nics::address("spare0");
    let spare = all.iter().find(|device| device.address == spare).expect("listed");
    assert_eq!(spare.group_members, [nics::address("spare1")]);
}

#[test]
fn interfaces_go_and_come_back_with_their_driver() {
    if !inside() {
        return;
    }
    for id in KINDS {
        let host = Host::default();
        let before = host.describe(&nics::address(id)).unwrap();
        let nic = Nic::bound(id);
        let bound = host.describe(&nic.address).unwrap();
        assert_eq!((bound.driver.as_deref(), bound.interfaces.len()), (Some("vfio-pci"), 0));
        assert_eq!(nic.previous, before.driver);
        drop(nic);
        let after = host.describe(&before.address).unwrap();
        assert_eq!((after.driver, after.interfaces.len()), (before.driver, 1));
    }
}

#[test]
fn registers_and_capabilities_are_read_both_ways() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let function = nic.open(way);
        assert_eq!(nics::identity(&function), 0x10d3_8086);
        assert_eq!(function.config_read(0x1000, ConfigWidth::Dword), u32::MAX, "no such register");
        let caps: Vec<u8> = capabilities(&function).into_iter().map(|(id, _)| id).collect();
        assert!(caps.contains(&0x11) && caps.contains(&0x10), "MSI-X and PCI Express: {caps:x?}");
        function.reset().unwrap();
        let bar = function.bar(0).unwrap();
        assert_eq!(bar.bytes(), 128 * 1024);
        bar.write32(0x3800, 0xabcd_e000);
        assert_eq!(bar.read32(0x3800), 0xabcd_e000);
        // The same registers.
        let again = function.bar(0).unwrap();
        assert_eq!(again.read32(0x3800), 0xabcd_e000);
        again.write32(0x3800, 0x1000);
        assert_eq!(bar.read32(0x3800), 0x1000);
        assert!(!function.gone());
        assert_eq!(bar.read32(128 * 1024), u32::MAX);
        assert!(function.descriptors().len() >= 3);
    }
}

/// Where the device status of a virtio device is (virtio 1.2, section 4.1.4: in the configuration of type 1).
pub(crate) fn status_of_virtio(function: &VfioFunction) -> (Bar, usize) {
    let common = capabilities(function)
        .into_iter()
        .find(|&(id, at)| id == 0x09 && function.config_read(at + 3, ConfigWidth::Byte) == 1);
    let (_, at) = common.expect("a common configuration");
    let bar = function.config_read(at + 4, ConfigWidth::Byte) as u8;
    let offset = function.config_read(at + 8, ConfigWidth::Dword) as usize;
    (function.bar(bar).unwrap(), offset + 20)
}

#[test]
fn a_virtio_device_offers_its_features_both_ways() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("virtio0");
    for way in WAYS {
        let function = nic.open(way);
        assert_eq!(nics::identity(&function), 0x1041_1af4);
        let (bar, at) = status_of_virtio(&function);
        let offset = at - 20;
        function.reset().unwrap();
        let (status, queues) = (bar.read8(offset + 20), bar.read16(offset + 18));
        assert_eq!(status, 0);
        assert!((2..=3).contains(&queues), "one pair and perhaps a control queue: {queues}");
        bar.write32(offset, 1);
        let high = bar.read32(offset + 4);
        assert_eq!(high & 0b111, 0b111, "version 1, behind the IOMMU, packed rings: {high:#x}");
        bar.write8(offset + 20, 1);
        assert_eq!(bar.read8(offset + 20), 1);
        function.reset().unwrap();
        assert_eq!(bar.read8(offset + 20), 0, "reset");
    }
}

/// Page faults of this process so far.
fn faults() -> i64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
    usage.minor_page_faults() + usage.major_page_faults()
}

/// Faults while each page of the BAR is read and written.
fn faults_over(bar: &impl Registers) -> i64 {
    faults();
    let before = faults();
    let mut sum = 0_u32;
    for page in (0..bar.bytes()).step_by(4096) {
        // Receive address registers: harmless wherever they repeat.
        sum = sum.wrapping_add(bar.read32(page));
    }
    bar.write32(0x3800, sum & !15);
    faults() - before
}

#[test]
fn registers_are_reached_without_page_faults() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let function = nic.open(way);
        let bar = function.bar(0).unwrap();
        assert_eq!(faults_over(&bar), 0, "as given out");
        function.reset().unwrap();
        assert_eq!(faults_over(&bar), 0, "after a reset");
        // SAFETY: the child reads registers and ends; it takes no lock and allocates nothing.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                // What the child has of its own (stack, libc) faults the first time.
                faults_over(&bar);
                let faults = faults_over(&bar);
                // SAFETY: ends the process at once.
                unsafe { libc::_exit(faults as i32) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0), "in a fork");
            }
        }
    }
}

#[test]
fn memory_and_pools_are_mapped_once_where_the_iommu_takes_them() {
    if !inside() {
        return;
    }
    let nics = [Nic::bound("e1000e0"), Nic::bound("virtio0")];
    for way in WAYS {
        let domain = Domain::new(way).unwrap();
        assert!(domain.translates());
        let both: Vec<_> =
            nics.iter().map(|nic| VfioFunction::open(&nic.address, &domain).unwrap()).collect();
        let shared = pool("shared", 3001);
        let at = both[0].map_pool(&shared).unwrap();
        assert_eq!(at, both[0].map_pool(&shared).unwrap());
        assert_eq!(at, both[1].map_pool(&shared).unwrap(), "one mapping for all of the domain");
        let other = pool("other", 100);
        assert_ne!(at, both[1].map_pool(&other).unwrap());
        let memory = both[0].dma("ring", 100).unwrap();
        assert_eq!(memory.bytes(), 4096);
        assert!(memory.iova().is_multiple_of(4096) && memory.iova() >= 1 << 20);
        let words = DmaSlice::<AtomicU32>::new(&memory, 0, 1024).unwrap();
        assert!(words.iter().all(|word| word.load(Ordering::Relaxed) == 0));
        // What is let go of can be had again.
        let first = memory.iova();
        drop((words, memory));
        assert_eq!(both[1].dma("ring", 4096).unwrap().iova(), first);
    }
}

#[test]
fn dma_goes_where_it_may_and_nowhere_else() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        let function = nic.open(way);
        function.reset().unwrap();
        let packets = pool("packets", 16);
        let data = function.map_pool(&packets).unwrap();
        let mut device = ByHand::new(&function);
        assert!(!nics::masters(&nic.address), "not before it is asked for");
        function.bus_master(true);
        assert!(nics::masters(&nic.address));
        assert!(device.sends(data), "{way:?}: from the pool");
        assert!(device.sends(data + 15 * 2048), "{way:?}: from its last chunk");
        function.bus_master(false);
        assert!(!device.sends(data), "{way:?}: without bus mastering");
        // Back to where it began, with a ring that nobody has mapped: the IOMMU says no, and all goes on.
        function.reset().unwrap();
        let mut device = ByHand::new(&function);
        device.move_ring(1 << 36);
        function.bus_master(true);
        assert!(!device.sends(data), "{way:?}: a ring outside");
        assert!(!function.gone());
        function.reset().unwrap();
        assert!(!nics::masters(&nic.address), "a reset ends it");
        let mut device = ByHand::new(&function);
        function.bus_master(true);
        assert!(device.sends(data), "{way:?}: as good as new");
    }
}

#[test]
fn a_pulled_cable_is_seen_and_interrupts() {
    if !inside() {
        return;
    }
    /// 82574L datasheet, chapter 10.2.4: cause, throttling, mask set, mask clear; "link status change" and "other".
    const ICR: usize = 0xc0;
    const ITR: usize = 0xc4;
    const IMS: usize = 0xd0;
    const IMC: usize = 0xd8;
    const IVAR: usize = 0xe4;
    const EITR: usize = 0xe8;
    const LSC: u32 = 1 << 2;
    const OTHER: u32 = 1 << 24;
    let nic = Nic::bound("e1000e0");
    let mut machine = Machine::open().unwrap();
    for way in WAYS {
        let function = nic.open(way);
        function.reset().unwrap();
        let device = ByHand::new(&function);
        let up = || device.bar.read32(nics::STATUS) & nics::LINK_UP != 0;
        function.bus_master(true);
        assert!(soon(up), "{way:?}");
        // No throttling: QEMU's timers for that fall over when MSI-X is switched while they run.
        for throttle in [ITR, EITR, EITR + 4, EITR + 8, EITR + 12, EITR + 16] {
            device.bar.write32(throttle, 0);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        let interrupts = function.interrupts(1).unwrap();
        assert_eq!(interrupts.count(), 1);
        assert!(interrupts.event(0).is_some() && interrupts.event(1).is_none());
        // Vector 0 for "other" causes.
        device.bar.write32(IVAR, 1 << 19);
        // Forgets causes so far; with MSI-X, reading does that only while all are masked.
        device.bar.read32(ICR);
        device.bar.write32(IMS, LSC | OTHER);
        let _ = interrupts.take(0);
        machine.set_link("e1000e0", false).unwrap();
        assert!(soon(|| !up()), "{way:?}");
        assert!(soon(|| interrupts.take(0) > 0), "{way:?}: an interrupt");
        // The device first: with MSI-X off it would raise its wire, and QEMU's falls over that later.
        device.bar.write32(IMC, u32::MAX);
        interrupts.mask().unwrap();
        machine.set_link("e1000e0", true).unwrap();
        assert!(soon(up), "{way:?}");
        assert_eq!(interrupts.take(0), 0, "{way:?}: masked");
        device.bar.read32(ICR);
        interrupts.unmask().unwrap();
        device.bar.write32(IMS, LSC | OTHER);
        machine.set_link("e1000e0", false).unwrap();
        assert!(soon(|| interrupts.take(0) > 0), "{way:?}: again");
        machine.set_link("e1000e0", true).unwrap();
        device.bar.write32(IMC, u32::MAX);
        let many = function.interrupts(2000).unwrap_err().to_string();
        assert!(many.contains("2000") && many.contains('5'), "{many}");
    }
}
