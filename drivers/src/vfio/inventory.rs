//! The machine's PCI functions: who has them, what they share, and which of them we can drive.
//!
//! Contract: reads sysfs and changes nothing. What the kernel does not tell is `None`.

use super::error::VfioError;
use super::host::{self, Host};

/// Kinds of devices that there are drivers for here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// virtio-net with a modern interface (virtio 1.2, section 4.1.2).
    VirtioNet,
    /// Intel 82574L.
    E1000e,
}

impl Kind {
    /// By vendor and device.
    #[must_use]
    pub const fn of(vendor: u16, device: u16) -> Option<Self> {
        match (vendor, device) {
            // A transitional function (0x1000) may offer the modern interface, too.
            (0x1af4, 0x1041 | 0x1000) => Some(Self::VirtioNet),
            (0x8086, 0x10d3) => Some(Self::E1000e),
            _ => None,
        }
    }

    /// Its name in messages and tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net",
            Self::E1000e => "e1000e",
        }
    }
}

/// A PCI Express link, as it is and as it could be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcieLink {
    /// Speed of a lane, such as `8.0 GT/s PCIe`.
    pub speed: String,
    /// Lanes.
    pub width: u8,
    /// Fastest that the function can.
    pub most_speed: String,
    /// Most lanes that it can.
    pub most_width: u8,
}

/// One function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciDevice {
    /// Domain, bus, device and function.
    pub address: String,
    /// Vendor.
    pub vendor: u16,
    /// Device of that vendor.
    pub device: u16,
    /// Class, subclass and interface in the lower 24 bits; 0x02 in the highest of these is a network device.
    pub class: u32,
    /// Which of the kernel's drivers has it.
    pub driver: Option<String>,
    /// Network interfaces that this driver makes of it, in this network namespace.
    pub interfaces: Vec<String>,
    /// IOMMU group.
    pub iommu_group: Option<u32>,
    /// The other functions of that group, but for bridges.
    pub group_members: Vec<String>,
    /// NUMA node, when the machine has several.
    pub numa_node: Option<u32>,
    /// PCI Express link; emulated and integrated functions have none.
    pub link: Option<PcieLink>,
    /// What we can drive it as.
    pub kind: Option<Kind>,
}

impl PciDevice {
    /// Is it a network device?
    #[must_use]
    pub const fn is_network(&self) -> bool {
        self.class >> 16 == 0x02
    }
}

impl Host {
    /// All functions, in the order of their addresses.
    #[must_use]
    pub fn devices(&self) -> Vec<PciDevice> {
        host::names(&self.device("")).iter().filter_map(|address| self.read_device(address)).collect()
    }

    /// One function.
    ///
    /// # Errors
    /// [`VfioError::BadAddress`], [`VfioError::Absent`].
    pub fn describe(&self, address: &str) -> Result<PciDevice, VfioError> {
        let address = self.find(address)?;
        self.read_device(&address).ok_or(VfioError::Absent { address })
    }

    /// Checks that a function is of this kind, before it is opened as such.
    ///
    /// # Errors
    /// [`VfioError::WrongDevice`], and those of [`Host::describe`].
    pub fn expect(&self, address: &str, kind: Kind) -> Result<(), VfioError> {
        let PciDevice { address, vendor, device, kind: found, .. } = self.describe(address)?;
        match found == Some(kind) {
            true => Ok(()),
            false => Err(VfioError::WrongDevice {
                address,
                found: format!("{vendor:04x}:{device:04x}"),
                wanted: kind.name(),
            }),
        }
    }

    fn read_device(&self, address: &str) -> Option<PciDevice> {
        let dir = self.device(address);
        let hex = |name: &str| {
            let text = host::text(&dir.join(name))?;
            u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
        };
        let (vendor, device) = (hex("vendor")? as u16, hex("device")? as u16);
        let node = host::text(&dir.join("numa_node"));
        Some(PciDevice {
            address: address.to_owned(),
            vendor,
            device,
            class: hex("class").unwrap_or(0),
            driver: self.driver_of(address),
            interfaces: self.interfaces_of(address),
            iommu_group: self.group_of(address),
            group_members: self.group_members(address),
            // -1 where there is but one node.
            numa_node: node.and_then(|node| node.parse().ok()),
            link: self.link_of(address),
            kind: Kind::of(vendor, device),
        })
    }

    fn link_of(&self, address: &str) -> Option<PcieLink> {
        let dir = self.device(address);
        let speed = |name: &str| host::text(&dir.join(name)).filter(|speed| !speed.starts_with("Unknown"));
        // 0 and 255 stand for "none" and "unknown".
        let width = |name: &str| {
            host::text(&dir.join(name))?.parse().ok().filter(|width| !matches!(*width, 0 | u8::MAX))
        };
        Some(PcieLink {
            speed: speed("current_link_speed")?,
            width: width("current_link_width")?,
            most_speed: speed("max_link_speed")?,
            most_width: width("max_link_width")?,
        })
    }
}
