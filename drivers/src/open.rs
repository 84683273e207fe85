//! Ports by name: what a program's users type.
//!
//! Contract: `0000:00:02.0` or `00:02.0` is a PCI function, driven through VFIO by the driver that its vendor and
//! device ask for; `tap:NAME` is a tap that is made now; `pcap:IN,OUT` plays one file and
//! writes another; anything else is an interface of Linux, through AF_XDP. Nothing is guessed: a function that no
//! driver of ours knows, or one that belongs to another driver of the kernel, is an error that says so. Whoever
//! wants more than the defaults opens the port itself.

use crate::e1000e::{E1000eConfig, E1000eError, E1000ePort};
use crate::pcap::{PcapConfig, PcapError, PcapPort};
use crate::port::Port;
use crate::tap::{TapConfig, TapError, TapPort};
use crate::vfio::{Domain, Host, IommuChoice, Kind, VfioError, VfioFunction};
use crate::virtio::{VirtioConfig, VirtioError, VirtioNetPort};
use crate::xdp::{XdpConfig, XdpError, XdpPort};
use isoplane_memory::Pool;
use std::sync::Arc;

/// Why a port could not be opened by its name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// An interface of Linux.
    #[error(transparent)]
    Xdp(#[from] XdpError),
    /// A PCI function, before its driver saw it.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// A virtio-net device.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// An Intel 82574L.
    #[error(transparent)]
    E1000e(#[from] E1000eError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Files.
    #[error(transparent)]
    Pcap(#[from] PcapError),
    /// A PCI function of another kind.
    #[error(
        "device {address} is {found}, which no driver of ours knows; `isoplane ports` lists those that they know"
    )]
    Unknown {
        /// Its address.
        address: String,
        /// Vendor and device, such as `8086:10d3`.
        found: String,
    },
}

/// Opens ports that share one pool and one IOMMU domain.
#[derive(Debug)]
pub struct Opener {
    pool: Arc<Pool>,
    iommu: IommuChoice,
    domain: Option<Arc<Domain>>,
}

impl Opener {
    /// For ports with frames of `pool`.
    #[must_use]
    pub fn new(pool: &Arc<Pool>) -> Self {
        Self { pool: Arc::clone(pool), iommu: IommuChoice::Auto, domain: None }
    }

    /// Which of the kernel's interfaces to the IOMMU PCI functions are opened with.
    #[must_use]
    pub const fn iommu(mut self, choice: IommuChoice) -> Self {
        self.iommu = choice;
        self
    }

    /// Opens a port with `queues` queues.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(&mut self, name: &str, queues: u16) -> Result<Box<dyn Port>, OpenError> {
        if let Some(tap) = name.strip_prefix("tap:") {
            let config = TapConfig { queues, ..TapConfig::new(tap) };
            return Ok(Box::new(TapPort::open(&self.pool, &config)?));
        }
        if let Some(files) = name.strip_prefix("pcap:") {
            if queues != 1 {
                return Err(PcapError::Queues { name: files.to_owned(), queues }.into());
            }
            return Ok(Box::new(PcapPort::open(&self.pool, &PcapConfig::parse(files))?));
        }
        if !Host::is_address(name) {
            let config = XdpConfig::new(name).queues(queues);
            return Ok(Box::new(XdpPort::open(&self.pool, &config)?));
        }
        let device = Host::default().describe(name)?;
        let Some(kind) = device.kind else {
            let found = format!("{:04x}:{:04x}", device.vendor, device.device);
            return Err(OpenError::Unknown { address: device.address, found });
        };
        let domain = match &self.domain {
            Some(domain) => Arc::clone(domain),
            None => Arc::clone(self.domain.insert(Domain::new(self.iommu)?)),
        };
        let function = VfioFunction::open(&device.address, &domain)?;
        Ok(match kind {
            Kind::VirtioNet => {
                let config = VirtioConfig { queues, ..VirtioConfig::default() };
                Box::new(VirtioNetPort::open(function, &self.pool, &config)?)
            }
            Kind::E1000e => {
                let config = E1000eConfig::default().queues(queues);
                Box::new(E1000ePort::open(function, &self.pool, &config)?)
            }
        })
    }
}
