//! Where the kernel tells about devices: sysfs, procfs and `/dev` below one root, which a test can replace.
//!
//! Contract: reading changes nothing; what writes says so. A file that is not there is `None`; what is in it is not trusted to
//! make sense.

use super::error::VfioError;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

#[cfg(test)]
pub(super) type Kernel = fn(&Host, &Path, &str) -> io::Result<()>;

/// The machine whose devices are meant.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
    /// Plays the kernel when something is written.
    #[cfg(test)]
    pub(super) kernel: Option<Kernel>,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Host {
    /// One with its `sys`, `proc`, `dev` and `run` below `root`.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            #[cfg(test)]
            kernel: None,
        }
    }

    /// A file of this machine, by its path from the root.
    pub(super) fn path(&self, of: &str) -> PathBuf {
        self.root.join(of.trim_start_matches('/'))
    }

    /// Writes to a file that is there, in one call.
    pub(super) fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        #[cfg(test)]
        if let Some(kernel) = self.kernel {
            return kernel(self, path, text);
        }
        fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }

    /// The directory of a PCI function.
    pub(super) fn device(&self, address: &str) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address)
    }

    /// Does it look like a PCI function's address, such as `0000:00:02.0` or `00:02.0`?
    #[must_use]
    pub fn is_address(name: &str) -> bool {
        canonical(name).is_some()
    }

    /// The address as the kernel writes it, of a function that is there.
    ///
    /// # Errors
    /// [`VfioError::BadAddress`], [`VfioError::Absent`].
    pub fn find(&self, address: &str) -> Result<String, VfioError> {
        let full = canonical(address).ok_or_else(|| VfioError::BadAddress { address: address.to_owned() })?;
        match self.device(&full).exists() {
            true => Ok(full),
            false => Err(VfioError::Absent { address: full }),
        }
    }

    /// Which driver has the function.
    pub(super) fn driver_of(&self, address: &str) -> Option<String> {
        link_name(&self.device(address).join("driver"))
    }

    /// Its IOMMU group.
    pub(super) fn group_of(&self, address: &str) -> Option<u32> {
        link_name(&self.device(address).join("iommu_group"))?.parse().ok()
    }

    /// Whether VFIO itself has made that group, for a device without an IOMMU.
    pub(super) fn group_without_iommu(&self, group: u32) -> bool {
        let name = self.path("sys/kernel/iommu_groups").join(group.to_string()).join("name");
        text(&name).is_some_and(|name| name == "vfio-noiommu")
    }

    /// The other functions of its IOMMU group, but for bridges, which VFIO leaves to the kernel.
    pub(super) fn group_members(&self, address: &str) -> Vec<String> {
        let mut all = names(&self.device(address).join("iommu_group/devices"));
        let bridge = |other: &str| {
            text(&self.device(other).join("class")).is_some_and(|class| class.starts_with("0x0604"))
        };
        all.retain(|other| other != address && !bridge(other));
        all
    }

    /// Network interfaces that its driver makes of it, as far as this network namespace has them.
    pub(super) fn interfaces_of(&self, address: &str) -> Vec<String> {
        let device = self.device(address);
        let mut all = names(&device.join("net"));
        // A virtio device is a device of its own below the function.
        for child in names(&device).iter().filter(|name| name.starts_with("virtio")) {
            all.extend(names(&device.join(child).join("net")));
        }
        all.sort();
        all
    }
}

/// `DDDD:BB:DD.F` in lower case; without the domain it is 0.
pub(super) fn canonical(address: &str) -> Option<String> {
    let (rest, function) = address.rsplit_once('.')?;
    let (rest, device) = rest.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0000", rest));
    let hex = |text: &str, digits: std::ops::RangeInclusive<usize>| {
        let good = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        good.then(|| u32::from_str_radix(text, 16).ok()).flatten()
    };
    // Domains beyond four digits exist (VMD, Hyper-V).
    let (domain, bus) = (hex(domain, 4..=8)?, hex(bus, 2..=2)?);
    let (device, function) = (hex(device, 2..=2)?, hex(function, 1..=1)?);
    (device < 32 && function < 8).then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

/// A file's text without white space around it.
pub(super) fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Last part of where a link leads.
pub(super) fn link_name(path: &Path) -> Option<String> {
    fs::read_link(path).ok()?.file_name().and_then(OsStr::to_str).map(str::to_owned)
}

/// Names in a directory, in order; none when there is no such directory.
pub(super) fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut all: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_in_one_way() {
        for (given, full) in [
            ("0000:00:02.0", Some("0000:00:02.0")),
            ("00:1F.7", Some("0000:00:1f.7")),
            ("10000:e1:00.0", Some("10000:e1:00.0")),
            ("", None),
            ("eth0", None),
            ("00:20.0", None),
            ("00:1f.8", None),
            ("0000:00:02", None),
            ("0000:00:02.0/../x", None),
            ("000:00:02.0", None),
            ("+000:00:02.0", None),
            ("é:00:02.0", None),
        ] {
            assert_eq!(canonical(given).as_deref(), full, "{given:?}");
        }
    }
}
