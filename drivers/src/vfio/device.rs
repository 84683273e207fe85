//! A PCI function that VFIO has opened.
//!
//! Contract: what [`Function`] says. It opens with bus mastering off, so the device does nothing until its driver
//! says so last of all. It closes in this order: no bus mastering, whatever is under way comes to its end, reset,
//! memory out of the IOMMU's tables as its owners let go of it, the device with the last [`Bar`], its group. All of that in the process
//! that opened it; in those forked from it, a value that is dropped ends nothing. Should the process be killed,
//! the kernel does the same with the last descriptor.

use super::bar::{Bar, Pieces};
use super::error::{BarError, InterruptError, ResetError, VfioError};
use super::iommu::{Domain, Mapping};
use super::irq::{Interrupts, Request};
use super::{host, ioctl, layout};
use crate::pci::{ConfigWidth, DmaMemory, Function, FunctionError, capabilities};
use isoplane_memory::Pool;
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Registers of configuration space (PCI 3.0, section 6.1).
mod register {
    pub(super) const COMMAND: u16 = 0x04;
    pub(super) const REVISION: u16 = 0x08;
    pub(super) const BAR0: u16 = 0x10;
}
/// Bits of the command register (PCI 3.0, section 6.2.2).
mod command {
    pub(super) const MEMORY_SPACE: u32 = 1 << 1;
    pub(super) const BUS_MASTER: u32 = 1 << 2;
    pub(super) const INTX_DISABLE: u32 = 1 << 10;
}
/// PCI Express capability, and in it the bit "transactions pending" of the device status register (PCIe 5.0,
/// section 7.5.3.5).
const CAP_EXPRESS: u8 = 0x10;
const DEVICE_STATUS: u16 = 0x0a;
const PENDING: u32 = 1 << 5;
/// How long transactions may take to come to their end.
const PATIENCE: Duration = Duration::from_millis(100);

/// An open function.
#[derive(Debug)]
pub struct VfioFunction {
    address: String,
    numa_node: Option<u32>,
    /// Where configuration space is in the device's file, and its size.
    config: (u64, u64),
    resets: bool,
    request: Option<Request>,
    /// BARs that were mapped, to be touched again after a reset.
    bars: Mutex<Vec<(u8, Arc<Pieces>)>>,
    pools: Mutex<Vec<Arc<Mapping>>>,
    // In this order: the device is closed before its group.
    device: Arc<OwnedFd>,
    domain: Arc<Domain>,
}

impl VfioFunction {
    /// Opens the function at `address` in `domain`.
    ///
    /// # Errors
    /// See [`VfioError`].
    pub fn open(address: &str, domain: &Arc<Domain>) -> Result<Self, VfioError> {
        let address = domain.host().find(address)?;
        let device = domain.open(&address).map_err(|error| named(error, &address))?;
        let os = |call| {
            let address = address.clone();
            move |source| VfioError::Os { address, call, source }
        };
        let flags = ioctl::device_flags(device.as_fd()).map_err(os("VFIO_DEVICE_GET_INFO"))?;
        if flags & layout::DEVICE_PCI == 0 {
            return Err(os("VFIO_DEVICE_GET_INFO (not PCI)")(Errno::ENODEV));
        }
        let config = ioctl::region(device.as_fd(), layout::REGION_CONFIG);
        let config = config.map_err(os("VFIO_DEVICE_GET_REGION_INFO"))?;
        let node = host::text(&domain.host().device(&address).join("numa_node"));
        let function = Self {
            numa_node: node.and_then(|node| node.parse().ok()),
            config: (config.offset, config.bytes),
            resets: flags & layout::DEVICE_RESETS != 0,
            request: Request::of(device.as_fd()),
            bars: Mutex::default(),
            pools: Mutex::default(),
            device: Arc::new(device),
            domain: Arc::clone(domain),
            address,
        };
        function.ready();
        Ok(function)
    }

    /// Registers can be reached; no DMA, no interrupt by wire.
    fn ready(&self) {
        self.change_command(command::MEMORY_SPACE | command::INTX_DISABLE, command::BUS_MASTER);
    }

    fn change_command(&self, set: u32, clear: u32) {
        let now = self.config_read(register::COMMAND, ConfigWidth::Word);
        // All ones: nobody is there to be told.
        if now != 0xffff {
            self.config_write(register::COMMAND, ConfigWidth::Word, (now | set) & !clear);
        }
    }

    fn bars(&self) -> MutexGuard<'_, Vec<(u8, Arc<Pieces>)>> {
        self.bars.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map_bar(&self, index: u8) -> Result<Bar, BarError> {
        if index > 5 {
            return Err(BarError::Missing { bar: index });
        }
        let known = self.bars().iter().find(|(bar, _)| *bar == index).map(|(_, pieces)| Arc::clone(pieces));
        let pieces = match known {
            Some(pieces) => pieces,
            None => {
                let pieces = Pieces::map(self.device.as_fd(), index).map_err(|error| match error {
                    BarError::NotMappable { bar, .. } if self.is_ports(bar) => BarError::Ports { bar },
                    other => other,
                })?;
                pieces.touch()?;
                self.bars().push((index, Arc::clone(&pieces)));
                pieces
            }
        };
        Bar::new(&pieces).ok_or(BarError::Missing { bar: index })
    }

    /// Is this BAR of I/O ports (PCI 3.0, section 6.2.5.1)?
    fn is_ports(&self, bar: u8) -> bool {
        self.config_read(register::BAR0 + 4 * u16::from(bar), ConfigWidth::Dword) & 1 != 0
    }

    fn reset_device(&self) -> Result<(), ResetError> {
        if !self.resets {
            return Err(ResetError::Unsupported);
        }
        ioctl::reset(self.device.as_fd()).map_err(ResetError::Os)?;
        // The kernel has put configuration space back as it was; bus mastering, for one, is to be off.
        self.ready();
        // It has also taken the pages of all BARs away.
        let mapped: Vec<_> = self.bars().iter().map(|(_, pieces)| Arc::clone(pieces)).collect();
        for pieces in mapped {
            pieces.touch()?;
        }
        Ok(())
    }

    /// Waits until the device has nothing under way, if it says.
    fn settle(&self) {
        let express = capabilities(self).into_iter().find(|(id, _)| *id == CAP_EXPRESS);
        let Some((_, at)) = express else { return };
        let start = Instant::now();
        while self.config_read(at + DEVICE_STATUS, ConfigWidth::Word) & PENDING != 0
            && !self.gone()
            && start.elapsed() < PATIENCE
        {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// MSI-X interrupts `0..count` as eventfds: to wait for them while idle, or for changes of the link.
    ///
    /// # Errors
    /// See [`InterruptError`].
    pub fn interrupts(&self, count: u16) -> Result<Interrupts, InterruptError> {
        Interrupts::new(&self.device, count)
    }

    /// The domain it was opened in.
    #[must_use]
    pub const fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }
}

/// Errors of a whole domain come up when a device is opened in it.
fn named(error: VfioError, address: &str) -> VfioError {
    match error {
        VfioError::Os { call, source, .. } => VfioError::Os { address: address.to_owned(), call, source },
        other => other,
    }
}

impl Function for VfioFunction {
    type Bar = Bar;

    fn address(&self) -> &str {
        &self.address
    }

    fn config_read(&self, offset: u16, bytes: ConfigWidth) -> u32 {
        let width = bytes as usize;
        let none = u32::MAX >> (32 - 8 * width);
        let (start, size) = self.config;
        if u64::from(offset) + width as u64 > size || !usize::from(offset).is_multiple_of(width) {
            return none;
        }
        let mut value = [0; 4];
        match pread(self.device.as_fd(), &mut value[..width], (start + u64::from(offset)) as i64) {
            Ok(read) if read == width => u32::from_le_bytes(value),
            _ => none,
        }
    }

    fn config_write(&self, offset: u16, bytes: ConfigWidth, value: u32) {
        let width = bytes as usize;
        let (start, size) = self.config;
        if u64::from(offset) + width as u64 > size || !usize::from(offset).is_multiple_of(width) {
            return;
        }
        let at = (start + u64::from(offset)) as i64;
        if let Err(error) = pwrite(self.device.as_fd(), &value.to_le_bytes()[..width], at) {
            tracing::debug!("device {}: configuration space at {offset:#x}: {error}", self.address);
        }
    }

    fn bar(&self, index: u8) -> Result<Bar, FunctionError> {
        self.map_bar(index).map_err(Into::into)
    }

    fn dma(&self, name: &str, bytes: usize) -> Result<Arc<dyn DmaMemory>, FunctionError> {
        Ok(self.domain.memory(name, bytes, self.numa_node)?)
    }

    fn map_pool(&self, pool: &Arc<Pool>) -> Result<u64, FunctionError> {
        let mapping = self.domain.pool(pool)?;
        let iova = mapping.iova();
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if !pools.iter().any(|known| Arc::ptr_eq(known, &mapping)) {
            pools.push(mapping);
        }
        Ok(iova)
    }

    fn reset(&self) -> Result<(), FunctionError> {
        Ok(self.reset_device()?)
    }

    fn bus_master(&self, on: bool) {
        match on {
            true => self.change_command(command::BUS_MASTER, 0),
            false => self.change_command(0, command::BUS_MASTER),
        }
    }

    fn gone(&self) -> bool {
        // Neither vendor nor device: VFIO tells these from memory.
        let revision = self.config_read(register::REVISION, ConfigWidth::Dword);
        revision == u32::MAX || self.request.as_ref().is_some_and(Request::came)
    }

    fn descriptors(&self) -> Vec<RawFd> {
        let mut all = self.domain.descriptors();
        all.push(self.device.as_raw_fd());
        all.extend(self.request.as_ref().map(Request::descriptor));
        all
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        if !self.domain.is_ours() {
            return;
        }
        self.bus_master(false);
        self.settle();
        // Its registers are not needed again: no BAR is touched.
        self.bars().clear();
        match self.reset_device() {
            // Without bus mastering it does no harm.
            Ok(()) | Err(ResetError::Unsupported) => {}
            Err(error) if self.gone() => tracing::debug!("device {}: {error}", self.address),
            Err(error) => tracing::warn!("device {}: {error}", self.address),
        }
    }
}
