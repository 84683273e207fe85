//! Giving functions to VFIO and back to the kernel's drivers.
//!
//! Contract: a function ends up with `vfio-pci` or, if that is refused, where it was. The driver that it had is
//! written down below `/run/isoplane/ports`, so that another process can give it back; without such a note the
//! kernel chooses. A function that carries a default route, or that is no network device, is taken by force only.

use super::blame::VFIO_PCI;
use super::error::VfioError;
use super::host::{self, Host};
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Why a function could not be given to VFIO, or back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// No such function, or none that VFIO can take.
    #[error(transparent)]
    Device(#[from] VfioError),
    /// The machine is reached through it, perhaps by you.
    #[error(
        "device {address} carries the default route (interface {interface}{}); without it the machine may not be \
         reached any more; force it if that is meant (--force)",
        if route == interface { String::new() } else { format!(", below {route}") }
    )]
    DefaultRoute {
        /// The function.
        address: String,
        /// Its interface.
        interface: String,
        /// The interface of the route: that one, or one that stands on it.
        route: String,
    },
    /// Not a network device.
    #[error("device {address} is no network device (class {class:06x}); force it if that is meant (--force)")]
    NotNetwork {
        /// The function.
        address: String,
        /// Its class.
        class: u32,
    },
    /// The kernel's driver for VFIO is not there.
    #[error(
        "the kernel's driver vfio-pci is not there; load it (`modprobe vfio-pci`), or take a kernel with CONFIG_VFIO_PCI"
    )]
    NoDriver,
    /// Another driver has it, which is not ours to take away.
    #[error(
        "device {address} belongs to the driver {driver}, not to vfio-pci: there is nothing to give back"
    )]
    NotOurs {
        /// The function.
        address: String,
        /// Its driver, or none.
        driver: String,
    },
    /// A program uses it, or one of its group.
    #[error("device {address} is in use through {path}; stop the program that has it")]
    InUse {
        /// The function.
        address: String,
        /// The group's file.
        path: String,
    },
    /// Writing to sysfs failed.
    #[error("device {address}: {what}: {source}{}", if source.kind() == io::ErrorKind::PermissionDenied { "; run as root" } else { "" })]
    Refused {
        /// The function.
        address: String,
        /// What was being done.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A function that now is VFIO's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    /// The function.
    pub address: String,
    /// The driver that had it, if one did.
    pub previous: Option<String>,
    /// Other functions of its IOMMU group that kernel drivers have, with these: until VFIO has them, too, the
    /// group cannot be used.
    pub others: Vec<(String, String)>,
}

impl Host {
    /// Gives a function to `vfio-pci`. One that has it already stays as it is.
    ///
    /// # Errors
    /// See [`BindError`]; the function is where it was then.
    pub fn bind(&self, address: &str, force: bool) -> Result<Bound, BindError> {
        let device = self.describe(address)?;
        let address = device.address.clone();
        if device.driver.as_deref() == Some(VFIO_PCI) {
            return Ok(self.bound(&address));
        }
        if !force {
            if !device.is_network() {
                return Err(BindError::NotNetwork { address, class: device.class });
            }
            if let Some((interface, route)) = self.default_route_over(&device.interfaces) {
                return Err(BindError::DefaultRoute { address, interface, route });
            }
        }
        if !self.path("sys/bus/pci/drivers").join(VFIO_PCI).exists() {
            return Err(BindError::NoDriver);
        }
        let unsafe_mode = self.path("sys/module/vfio/parameters/enable_unsafe_noiommu_mode");
        if device.iommu_group.is_none() && host::text(&unsafe_mode).as_deref() != Some("Y") {
            return Err(VfioError::NoIommu { address }.into());
        }
        let before = self.driver_override(&address);
        self.note(&address, device.driver.as_deref(), before.as_deref())?;
        let taken = self.take(&address, device.driver.as_deref());
        if let Err(error) = taken {
            // As it was, as far as that goes.
            let _ = self.give(&address, device.driver.as_deref(), before.as_deref());
            let _ = fs::remove_file(self.note_path(&address));
            return Err(error);
        }
        Ok(self.bound(&address))
    }

    /// Takes a function from `vfio-pci` and gives it back to the driver that it had, or to whichever the kernel
    /// chooses; says which.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn unbind(&self, address: &str) -> Result<Option<String>, BindError> {
        let address = self.find(address)?;
        let driver = self.driver_of(&address);
        if driver.as_deref() != Some(VFIO_PCI) {
            let driver = driver.unwrap_or_else(|| "none".to_owned());
            return Err(BindError::NotOurs { address, driver });
        }
        self.refuse_in_use(&address)?;
        let (previous, before) = self.noted(&address);
        let unbind = self.device(&address).join("driver/unbind");
        self.set(&address, &unbind, &address, "taking it from vfio-pci")?;
        self.give(&address, previous.as_deref(), before.as_deref())?;
        let _ = fs::remove_file(self.note_path(&address));
        Ok(self.driver_of(&address))
    }

    fn bound(&self, address: &str) -> Bound {
        let others = self.group_members(address).into_iter();
        let others = others.filter_map(|other| self.driver_of(&other).map(|driver| (other, driver)));
        Bound {
            address: address.to_owned(),
            previous: self.noted(address).0,
            others: others.filter(|(_, driver)| !matches!(driver.as_str(), VFIO_PCI | "pci-stub")).collect(),
        }
    }

    fn take(&self, address: &str, driver: Option<&str>) -> Result<(), BindError> {
        let device = self.device(address);
        self.set(address, &device.join("driver_override"), VFIO_PCI, "choosing vfio-pci for it")?;
        if let Some(driver) = driver {
            let what = format!("taking it from {driver}");
            self.set(address, &device.join("driver/unbind"), address, &what)?;
        }
        let bind = self.path("sys/bus/pci/drivers").join(VFIO_PCI).join("bind");
        self.set(address, &bind, address, "giving it to vfio-pci")
    }

    /// Lets a driver have it: this one, or one that the kernel chooses.
    fn give(&self, address: &str, driver: Option<&str>, before: Option<&str>) -> Result<(), BindError> {
        let overriding = self.device(address).join("driver_override");
        // An empty line is no choice.
        self.set(address, &overriding, before.unwrap_or("\n"), "choosing its driver again")?;
        if let Some(driver) = driver {
            let bind = self.path("sys/bus/pci/drivers").join(driver).join("bind");
            if self.write(&bind, address).is_ok() {
                return Ok(());
            }
        }
        let probe = self.path("sys/bus/pci/drivers_probe");
        self.set(address, &probe, address, "finding a driver for it")
    }

    fn driver_override(&self, address: &str) -> Option<String> {
        host::text(&self.device(address).join("driver_override"))
            .filter(|driver| !driver.is_empty() && driver != "(null)")
    }

    /// Taking a function from a program would wait for it without end.
    fn refuse_in_use(&self, address: &str) -> Result<(), BindError> {
        let Some(group) = self.group_of(address) else { return Ok(()) };
        let unguarded = if self.group_without_iommu(group) { "noiommu-" } else { "" };
        let path = format!("dev/vfio/{unguarded}{group}");
        match fs::OpenOptions::new().read(true).write(true).open(self.path(&path)) {
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                Err(BindError::InUse { address: address.to_owned(), path: format!("/{path}") })
            }
            // Not there, not allowed: what follows tells.
            _ => Ok(()),
        }
    }

    fn set(&self, address: &str, path: &Path, text: &str, what: &str) -> Result<(), BindError> {
        self.write(path, text).map_err(|source| BindError::Refused {
            address: address.to_owned(),
            what: what.to_owned(),
            source,
        })
    }

    fn note_path(&self, address: &str) -> PathBuf {
        self.path("run/isoplane/ports").join(address)
    }

    /// Writes down which driver has the function now.
    fn note(&self, address: &str, driver: Option<&str>, before: Option<&str>) -> Result<(), BindError> {
        let path = self.note_path(address);
        let text = format!("{}\n{}\n", driver.unwrap_or(""), before.unwrap_or(""));
        let write = || -> io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(&path))?;
            fs::write(&path, text)
        };
        write().map_err(|source| BindError::Refused {
            address: address.to_owned(),
            what: format!("noting its driver in {}", path.display()),
            source,
        })
    }

    fn noted(&self, address: &str) -> (Option<String>, Option<String>) {
        let text = fs::read_to_string(self.note_path(address)).unwrap_or_default();
        let mut lines = text.lines().map(|line| (!line.is_empty()).then(|| line.to_owned()));
        (lines.next().flatten(), lines.next().flatten())
    }

    /// The first of these interfaces over which a default route goes, and the route's own.
    fn default_route_over(&self, interfaces: &[String]) -> Option<(String, String)> {
        let routes = self.default_routes();
        interfaces.iter().find_map(|interface| {
            let route = self.stands_on(interface).into_iter().find(|name| routes.contains(name))?;
            Some((interface.clone(), route))
        })
    }

    /// An interface and those that stand on it: bonds, bridges, VLANs.
    fn stands_on(&self, interface: &str) -> BTreeSet<String> {
        let mut all = BTreeSet::from([interface.to_owned()]);
        let mut next = vec![interface.to_owned()];
        while let Some(name) = next.pop() {
            let upper = host::names(&self.path("sys/class/net").join(name));
            for upper in upper.iter().filter_map(|entry| entry.strip_prefix("upper_")) {
                if all.insert(upper.to_owned()) {
                    next.push(upper.to_owned());
                }
            }
        }
        all
    }

    /// Interfaces of default routes, IPv4 and IPv6, in this network namespace.
    fn default_routes(&self) -> BTreeSet<String> {
        const UP: u32 = 0x1;
        const REJECT: u32 = 0x200;
        let usable =
            |flags: &str| u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & (UP | REJECT) == UP);
        let read = |path: &str| fs::read_to_string(self.path(path)).unwrap_or_default();
        let (four, six) = (read("proc/net/route"), read("proc/net/ipv6_route"));
        let four = four.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let default = words.get(1) == Some(&"00000000") && words.get(7) == Some(&"00000000");
            (default && usable(words.get(3)?)).then(|| words[0].to_owned())
        });
        let six = six.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let default = words.get(1) == Some(&"00") && words.first()?.bytes().all(|b| b == b'0');
            (default && usable(words.get(8)?)).then(|| words.get(9).map(|&name| name.to_owned()))?
        });
        four.chain(six).collect()
    }
}

#[cfg(test)]
pub(super) mod tests;
