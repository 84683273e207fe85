//! Cables between two of the guest's devices, and ports of ours on their ends.
//!
//! Contract: a device on QEMU's hub that cannot receive leaves packets with the hub, which hands them to whoever
//! drives the device next. So a port is opened with its cable pulled, which empties the hub, and given out when it
//! says that its link is up.

use crate::nics::{Nic, soon};
use isoplane_drivers::e1000e::{self, E1000eConfig, E1000ePort};
use isoplane_drivers::vfio::{Domain, IommuChoice, VfioFunction};
use isoplane_drivers::virtio::{self, VirtioConfig, VirtioNetPort};
use isoplane_drivers::{LinkState, Port};
use isoplane_lab::Machine;
use isoplane_memory::{HugePages, Pool, PoolConfig};
use std::sync::Arc;

/// Which driver, and what it is told.
#[derive(Debug, Clone)]
pub(crate) enum Driver {
    Virtio(VirtioConfig),
    E1000e(E1000eConfig),
}

/// A port of either driver.
pub(crate) enum Ours {
    Virtio(VirtioNetPort),
    E1000e(E1000ePort),
}

/// Which packets a port shall pass.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pass<'a> {
    Own(&'a [[u8; 6]]),
    AllMulticast,
    Everything,
}

impl Ours {
    pub(crate) fn port(&mut self) -> &mut dyn Port {
        match self {
            Self::Virtio(port) => port,
            Self::E1000e(port) => port,
        }
    }

    pub(crate) fn into_port(self) -> Box<dyn Port> {
        match self {
            Self::Virtio(port) => Box::new(port),
            Self::E1000e(port) => Box::new(port),
        }
    }

    pub(crate) fn link(&self) -> LinkState {
        match self {
            Self::Virtio(port) => port.link(),
            Self::E1000e(port) => port.link(),
        }
    }

    pub(crate) fn mac(&self) -> [u8; 6] {
        let mac = match self {
            Self::Virtio(port) => port.mac(),
            Self::E1000e(port) => port.mac(),
        };
        mac.expect("an address")
    }

    pub(crate) fn pass(&self, which: Pass<'_>) {
        let done = match self {
            Self::Virtio(port) => match which {
                Pass::Own(groups) => {
                    port.set_groups(groups).and_then(|()| port.set_filter(virtio::Filter::Own))
                }
                Pass::AllMulticast => port.set_filter(virtio::Filter::AllMulticast),
                Pass::Everything => port.set_filter(virtio::Filter::Promiscuous),
            }
            .map_err(|error| error.to_string()),
            Self::E1000e(port) => port
                .set_filter(&match which {
                    Pass::Own(groups) => e1000e::Filter::Own { groups: groups.to_vec() },
                    Pass::AllMulticast => e1000e::Filter::AllMulticast,
                    Pass::Everything => e1000e::Filter::Promiscuous,
                })
                .map_err(|error| error.to_string()),
        };
        done.unwrap_or_else(|error| panic!("{which:?}: {error}"));
    }
}

impl Driver {
    /// Both kinds, with nothing special.
    pub(crate) fn all() -> [Self; 2] {
        [Self::Virtio(VirtioConfig::default()), Self::E1000e(E1000eConfig::default())]
    }

    /// The devices on the two ends of the kind's first cable.
    pub(crate) const fn ends(&self) -> [&'static str; 2] {
        match self {
            Self::Virtio(_) => ["virtio0", "virtio1"],
            Self::E1000e(_) => ["e1000e0", "e1000e1"],
        }
    }

    /// Linux's driver for the same devices.
    pub(crate) const fn kernels(&self) -> &'static str {
        match self {
            Self::Virtio(_) => "virtio_net",
            Self::E1000e(_) => "e1000e",
        }
    }

    /// Opens a port as it is, whatever its link does.
    pub(crate) fn open_now(&self, address: &str, domain: &Arc<Domain>, pool: &Arc<Pool>) -> Ours {
        let function = VfioFunction::open(address, domain).unwrap_or_else(|error| panic!("{error}"));
        match self {
            Self::Virtio(config) => {
                let port = VirtioNetPort::open(function, pool, config);
                Ours::Virtio(port.unwrap_or_else(|error| panic!("{error}")))
            }
            Self::E1000e(config) => {
                let port = E1000ePort::open(function, pool, config);
                Ours::E1000e(port.unwrap_or_else(|error| panic!("{error}")))
            }
        }
    }

    /// Opens ports on devices that QEMU calls `ids`; what was on the way to them before is gone.
    pub(crate) fn open<const N: usize>(
        &self,
        ids: [&str; N],
        nics: [&Nic; N],
        domain: &Arc<Domain>,
        pool: &Arc<Pool>,
    ) -> [Ours; N] {
        let mut machine = Machine::open().expect("the monitor");
        let mut plug = |up| ids.map(|id| machine.set_link(id, up).expect("a cable"));
        plug(false);
        let ports = nics.map(|nic| self.open_now(&nic.address, domain, pool));
        plug(true);
        for (id, port) in ids.iter().zip(&ports) {
            assert!(soon(|| port.link() == LinkState::Up), "{id}: {:?}", port.link());
        }
        ports
    }
}

/// A pool of small pages.
pub(crate) fn pool(chunks: u32) -> Arc<Pool> {
    let config = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new("vfio-test", chunks) };
    Pool::create(&config).expect("a pool")
}

/// Both ends of a cable, VFIO's while it lives.
pub(crate) struct Hub {
    pub(crate) driver: Driver,
    pub(crate) way: IommuChoice,
    pub(crate) ids: [&'static str; 2],
    pub(crate) nics: [Nic; 2],
}

impl Hub {
    pub(crate) fn new(driver: Driver, way: IommuChoice) -> Self {
        let ids = driver.ends();
        Self { nics: ids.map(Nic::bound), driver, way, ids }
    }

    /// Opens a port on each end.
    pub(crate) fn ports(&self, pool: &Arc<Pool>) -> [Ours; 2] {
        let domain = Domain::new(self.way).unwrap_or_else(|error| panic!("{error}"));
        self.driver.open(self.ids, [&self.nics[0], &self.nics[1]], &domain, pool)
    }
}
