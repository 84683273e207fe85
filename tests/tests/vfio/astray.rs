//! Devices that are led astray: a descriptor that names memory which is not theirs.

use crate::hub::{self, Driver, Hub};
use crate::nics::{WAYS, inside, soon};
use crate::shared::Mapped;
use crate::worker::{self, Worker, packet};
use isoplane_drivers::virtio::VirtioConfig;
use isoplane_drivers::xdp::Want;
use std::process::Command;

/// What the driver has handed to the device for the first packets is changed to this address, which nobody has
/// mapped.
const NOWHERE: u64 = 1 << 38;
/// Descriptors that are changed, of the ring's.
const ASTRAY: usize = 8;

/// What the kernel has said about DMA of this device.
fn complaints(address: &str) -> usize {
    let said = Command::new("dmesg").output().expect("dmesg").stdout;
    let device = address.trim_start_matches("0000:");
    let about = |line: &&str| line.contains("DMAR") && line.contains(device) && line.contains("fault addr");
    String::from_utf8_lossy(&said).lines().filter(about).count()
}

#[test]
fn dma_outside_of_the_pool_is_blocked_and_reported_and_work_goes_on() {
    if !inside() {
        return;
    }
    let [virtio, e1000e] = Driver::all();
    let split = Driver::Virtio(VirtioConfig { packed: Want::Never, ..VirtioConfig::default() });
    for (driver, way) in [virtio, split, e1000e].into_iter().zip([WAYS[0], WAYS[1], WAYS[0]]) {
        let hub = Hub::new(driver, way);
        let pool = hub::pool(2048);
        let mut ports = hub.ports(&pool);
        let mut workers = [0, 1].map(|end| Worker::new(ports[end].port(), 0, 512));
        let address = hub.nics[0].address.clone();
        // The receiving ring is what comes first in this memory; a descriptor begins with its address.
        let ring = Mapped::named(&match hub.driver {
            Driver::Virtio(_) => format!("isoplane.virtio.{address}.ring0"),
            Driver::E1000e(_) => format!("isoplane.e1000e.{address}.0"),
        });
        let chunks = Mapped::of_pool(&pool);
        for n in 0..ASTRAY {
            let at = ring.read(16 * n);
            assert!(at != 0 && at < NOWHERE, "a chunk's: {at:#x}");
            ring.write(16 * n, NOWHERE + 4096 * n as u64);
        }
        let (before, memory) = (complaints(&address), chunks.snapshot());
        let lost: Vec<_> = (0..ASTRAY as u32).map(|n| packet(ports[0].mac(), n, 1000)).collect();
        workers[1].send(&lost);
        assert!(soon(|| complaints(&address) > before), "{:?}: the IOMMU says nothing", hub.driver);
        // Nothing of them is anywhere but where the sender has put it.
        let after = chunks.snapshot();
        for bytes in &lost {
            let find = |memory: &[u8]| memory.windows(64).filter(|part| *part == &bytes[..64]).count();
            assert_eq!((find(&memory), find(&after)), (0, 1), "{:?}", hub.driver);
        }
        // What the device says has arrived is either what lay there before, or known to be no chunk of the ring's.
        let got = workers[0].poll();
        assert!(got.iter().all(|packet| !lost.contains(&packet.bytes)), "{:?}", hub.driver);
        let lies = ports[0].port().statistics().bad_descriptors;
        assert_eq!(got.len() as u64 + lies, ASTRAY as u64, "{:?}", hub.driver);
        let sent: Vec<_> = (100..400).map(|n| packet(ports[0].mac(), n, 1000)).collect();
        for some in sent.chunks(50) {
            workers[1].send(some);
            assert_eq!(workers[0].receive_tests(50), some, "{:?}", hub.driver);
        }
        worker::close(workers);
        assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", hub.driver);
    }
}
