//! The port conformance suite between two ports that drive QEMU's devices through VFIO, one on each end of a cable:
//! virtio-net and e1000e with every kind of ring, each kind over both of the kernel's interfaces to the IOMMU, once
//! with long packets. Only in the guest (`cargo xtask kernel test vfio_conformance`); elsewhere there is nothing to
//! test.

#[path = "vfio/hub.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod hub;
#[path = "vfio/nics.rs"]
#[allow(dead_code, reason = "each test binary takes what it needs")]
mod nics;

use hub::{Driver, Hub, Ours};
use isoplane_drivers::conformance::{Fixture, Opened};
use isoplane_drivers::e1000e::{E1000eConfig, RxDescriptors};
use isoplane_drivers::virtio::VirtioConfig;
use isoplane_drivers::xdp::Want;
use isoplane_memory::Pool;
use std::sync::Arc;

impl Fixture for Hub {
    fn pool(&mut self) -> Arc<Pool> {
        hub::pool(2048)
    }

    fn open(&mut self, pool: &Arc<Pool>) -> Opened {
        let [a, b] = self.ports(pool).map(Ours::into_port);
        Opened { a, b: Some(b) }
    }

    fn min_len(&self) -> u16 {
        match self.driver {
            Driver::Virtio(_) => 14,
            // Shorter ones are padded.
            Driver::E1000e(_) => 60,
        }
    }

    fn idle(&mut self) {
        std::thread::yield_now();
    }

    fn patience(&self) -> u32 {
        100_000
    }
}

fn virtio(packed: Want) -> Driver {
    Driver::Virtio(VirtioConfig { packed, ..VirtioConfig::default() })
}

/// Long packets: indirect descriptors one way, merged buffers the other.
fn long_virtio(packed: Want) -> Driver {
    Driver::Virtio(VirtioConfig { packed, multi_buffer: true, mtu: Some(9000), ..VirtioConfig::default() })
}

fn e1000e(form: RxDescriptors) -> Driver {
    Driver::E1000e(E1000eConfig::default().rx_descriptors(form))
}

/// Long packets: several descriptors a packet, both ways.
fn long_e1000e(form: RxDescriptors) -> Driver {
    Driver::E1000e(E1000eConfig::default().rx_descriptors(form).mtu(9000))
}

macro_rules! suite {
    ($($name:ident over $way:ident: $driver:expr;)*) => {
        $(
            mod $name {
                use crate::*;
                isoplane_drivers::conformance_tests!(link, {
                    if !nics::inside() {
                        return;
                    }
                    Hub::new($driver, isoplane_drivers::vfio::IommuChoice::$way)
                });
            }
        )*
    };
}

suite! {
    virtio_split over Type1: virtio(Want::Never);
    virtio_split_long over Iommufd: long_virtio(Want::Never);
    virtio_packed over Iommufd: virtio(Want::Require);
    virtio_packed_long over Type1: long_virtio(Want::Require);
    e1000e_legacy over Iommufd: e1000e(RxDescriptors::Legacy);
    e1000e_legacy_long over Type1: long_e1000e(RxDescriptors::Legacy);
    e1000e_extended over Type1: e1000e(RxDescriptors::Extended);
    e1000e_extended_long over Iommufd: long_e1000e(RxDescriptors::Extended);
}
