//! How devices end: closed, inherited, killed, wanted back.

use crate::nics::{self, ByHand, Nic, WAYS, inside, soon};
use isoplane_drivers::pci::{Function, Registers};
use isoplane_drivers::vfio::{Domain, Host, VfioFunction};
use isoplane_memory::{Pool, PoolConfig};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use std::fs;
use std::time::Duration;

#[test]
fn a_closed_device_is_quiet_and_free() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in [WAYS[0], WAYS[1], WAYS[0]] {
        let function = nic.open(way);
        let pool = Pool::create(&PoolConfig::new("p", 64)).unwrap();
        let data = function.map_pool(&pool).unwrap();
        let mut device = ByHand::new(&function);
        function.bus_master(true);
        assert!(device.sends(data), "{way:?}");
        // Rings and registers may outlive the function; the device does nothing any more.
        drop(function);
        assert!(!nics::masters(&nic.address), "{way:?}");
        assert!(!device.sends(data), "{way:?}");
    }
    // It was reset, too, where the kernel's way of doing that is one.
    let nic = Nic::bound("virtio0");
    for way in WAYS {
        let function = nic.open(way);
        let (bar, status) = crate::open::status_of_virtio(&function);
        bar.write8(status, 1);
        assert_eq!(bar.read8(status), 1);
        drop(function);
        assert_eq!(bar.read8(status), 0, "{way:?}");
    }
}

#[test]
fn the_end_of_a_fork_ends_nothing() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    let function = nic.open(WAYS[0]);
    let ring = function.dma("ring", 4096).unwrap();
    let bar = function.bar(0).unwrap();
    function.bus_master(true);
    bar.write32(0x3800, 0x1000);
    // SAFETY: the child drops what it inherited and ends.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            drop((function, ring, bar));
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    };
    assert_eq!(bar.read32(0x3800), 0x1000, "no reset");
    assert!(nics::masters(&nic.address));
    let iova = ring.iova();
    drop(ring);
    assert_eq!(function.dma("ring", 4096).unwrap().iova(), iova, "still mapped until now");
}

#[test]
fn a_device_whose_program_is_killed_is_quiet_and_free() {
    if !inside() {
        return;
    }
    let nic = Nic::bound("e1000e0");
    for way in WAYS {
        // SAFETY: the child is this test's only thread then; what it inherits of locks is not held by this one.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let function = nic.open(way);
                let _device = ByHand::new(&function);
                function.bus_master(true);
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
            ForkResult::Parent { child } => {
                assert!(soon(|| nics::masters(&nic.address)), "{way:?}");
                kill(child, Signal::SIGKILL).unwrap();
                waitpid(child, None).unwrap();
            }
        }
        assert!(soon(|| !nics::masters(&nic.address)), "{way:?}");
        nic.open(way).reset().unwrap();
    }
}

#[test]
fn a_device_that_the_kernel_wants_back_is_gone() {
    if !inside() {
        return;
    }
    for way in WAYS {
        let nic = Nic::bound("e1000e0");
        let function = nic.open(way);
        assert!(!function.gone());
        let remove = format!("/sys/bus/pci/devices/{}/remove", nic.address);
        // It waits until we let go.
        let removing = std::thread::spawn(move || fs::write(remove, "1"));
        assert!(soon(|| function.gone()), "{way:?}");
        assert!(!removing.is_finished(), "{way:?}");
        drop(function);
        removing.join().unwrap().unwrap();
        let error = VfioFunction::open(&nic.address, &Domain::new(way).unwrap()).unwrap_err();
        assert!(error.to_string().contains("no PCI device"), "{error}");
        fs::write("/sys/bus/pci/rescan", "1").unwrap();
        // A new device: nobody has chosen a driver for it.
        let driver = || Host::default().describe(&nic.address).ok().and_then(|device| device.driver);
        assert!(soon(|| driver().as_deref() == Some("e1000e")), "{way:?}");
        std::mem::forget(nic);
    }
}
