//! What devices may reach: a domain of one IOMMU, whichever interface the kernel has for it.
//!
//! Contract: a [`Domain`] is shared by the functions opened in it, and a pool is mapped once for all of them. A
//! [`Mapping`] keeps its memory until the IOMMU has let go of it; if that fails, for ever. Only the process that
//! made a domain changes it: workers that inherit it by fork use what is there, and their end ends nothing.
#![allow(unsafe_code, reason = "hands memory to devices; see each block")]

use super::error::{DmaError, VfioError};
use super::host::Host;
use super::iova::Allocator;
use super::{container, iommufd, noiommu};
use crate::pci::DmaMemory;
use isoplane_memory::{HugePages, Pool, Region, RegionConfig};
use std::ops::RangeInclusive;
use std::os::fd::{OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Which of the kernel's interfaces to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IommuChoice {
    /// A container if the kernel has them, else iommufd. Never without an IOMMU.
    #[default]
    Auto,
    /// Groups in a container, type 1 version 2.
    Type1,
    /// `/dev/iommu` and the device's own file (Linux 6.6).
    Iommufd,
    /// No IOMMU: the device gets physical addresses and **can read and write all memory of the machine**. The
    /// kernel must allow it, and is tainted by it.
    UnsafeNoIommu,
}

/// Memory on its way into a domain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) name: &'a str,
    pub(super) start: NonNull<u8>,
    pub(super) bytes: u64,
    /// Bytes of one page of it.
    pub(super) page: u64,
}

/// What an IOMMU takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limits {
    /// Addresses.
    pub(super) ranges: Vec<RangeInclusive<u64>>,
    /// Its smallest page.
    pub(super) page: u64,
}

/// One of the kernel's interfaces.
pub(super) trait Iommu: Send + Sync + std::fmt::Debug {
    /// Puts a function that VFIO has into the domain, and opens it.
    fn open(&self, host: &Host, address: &str) -> Result<OwnedFd, VfioError>;

    /// What it takes, now that it has a device. None: it translates nothing.
    fn limits(&self) -> Result<Option<Limits>, VfioError>;

    /// Lets devices reach the memory at `iova`, or says where else they find it.
    ///
    /// # Safety
    /// Until it is unmapped (where nothing is translated: while a device is open), the memory is mapped here and
    /// nobody takes it for anything but bytes that may change at any time.
    unsafe fn map(&self, span: Span<'_>, iova: u64) -> Result<u64, DmaError>;

    /// Takes it back; false if devices might reach it still.
    fn unmap(&self, iova: u64, bytes: u64) -> bool;

    /// What it holds open.
    fn descriptors(&self) -> Vec<RawFd>;
}

/// What keeps memory mapped.
#[derive(Debug, Clone)]
enum Backing {
    #[expect(dead_code, reason = "kept, not used")]
    Region(Arc<Region>),
    Pool(Arc<Pool>),
}

#[derive(Debug)]
struct State {
    /// None: nothing is translated. Empty ranges until there is a device.
    addresses: Option<Allocator>,
    page: u64,
    /// Pools that are mapped, for whoever comes next.
    pools: Vec<Weak<Mapping>>,
    /// Where devices cannot be kept from memory, it stays until they are closed.
    kept: Vec<Backing>,
}

/// Devices, and the memory that they reach.
#[derive(Debug)]
pub struct Domain {
    host: Host,
    state: Mutex<State>,
    iommu: Box<dyn Iommu>,
    process: u32,
}

impl Domain {
    /// An empty domain of this machine.
    ///
    /// # Errors
    /// [`VfioError::NoVfio`], [`VfioError::NotPermitted`]: the kernel's interface cannot be had.
    pub fn new(choice: IommuChoice) -> Result<Arc<Self>, VfioError> {
        Self::on(Host::default(), choice)
    }

    /// As [`Domain::new`], for another machine's tree.
    ///
    /// # Errors
    /// As [`Domain::new`].
    pub fn on(host: Host, choice: IommuChoice) -> Result<Arc<Self>, VfioError> {
        let containers = || host.path(container::PATH).exists();
        let iommu: Box<dyn Iommu> = match choice {
            IommuChoice::Auto if containers() || !host.path(iommufd::PATH).exists() => {
                Box::new(container::Type1::new(&host)?)
            }
            IommuChoice::Type1 => Box::new(container::Type1::new(&host)?),
            IommuChoice::Auto | IommuChoice::Iommufd => Box::new(iommufd::Ioas::new(&host)?),
            IommuChoice::UnsafeNoIommu => Box::new(noiommu::NoIommu::new(&host)?),
        };
        let addresses = (choice != IommuChoice::UnsafeNoIommu).then(|| Allocator::new(&[]));
        let state = State { addresses, page: 4096, pools: Vec::new(), kept: Vec::new() };
        Ok(Arc::new(Self { host, state: Mutex::new(state), iommu, process: std::process::id() }))
    }

    pub(super) const fn host(&self) -> &Host {
        &self.host
    }

    /// Is there an IOMMU between devices and memory?
    #[must_use]
    pub fn translates(&self) -> bool {
        self.state().addresses.is_some()
    }

    /// False in a process that inherited it.
    pub(super) fn is_ours(&self) -> bool {
        std::process::id() == self.process
    }

    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.iommu.descriptors()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a function in this domain.
    pub(super) fn open(&self, address: &str) -> Result<OwnedFd, VfioError> {
        let device = self.iommu.open(&self.host, address)?;
        if let Some(limits) = self.iommu.limits()? {
            let mut state = self.state();
            state.page = limits.page.max(4096);
            if let Some(addresses) = &mut state.addresses {
                addresses.restrict(&limits.ranges);
            }
        }
        Ok(device)
    }

    /// New memory for devices.
    pub(super) fn memory(
        self: &Arc<Self>,
        name: &str,
        bytes: usize,
        numa_node: Option<u32>,
    ) -> Result<Arc<Mapping>, DmaError> {
        let huge_pages = if self.translates() { HugePages::Never } else { HugePages::Require2M };
        let config = RegionConfig { huge_pages, numa_node, ..RegionConfig::new(name, bytes) };
        let region = Region::create(&config)?;
        let (start, bytes, page) = (region.base(), region.len() as u64, region.page_bytes() as u64);
        self.map(Span { name, start, bytes, page }, Backing::Region(Arc::clone(&region))).map(Arc::new)
    }

    /// The chunks of a pool, mapped once however often it is asked.
    pub(super) fn pool(self: &Arc<Self>, pool: &Arc<Pool>) -> Result<Arc<Mapping>, DmaError> {
        let known =
            |mapping: &Arc<Mapping>| matches!(&mapping.backing, Backing::Pool(known) if known.same_as(pool));
        // Out of the lock before one of them is dropped: that takes it, too.
        let mapped: Vec<_> = self.state().pools.iter().filter_map(Weak::upgrade).collect();
        if let Some(mapping) = mapped.into_iter().find(known) {
            return Ok(mapping);
        }
        let chunks = u64::from(pool.chunks()) * u64::from(pool.chunk_bytes());
        // The pool's region ends with whole pages, so the last page is there even if the last chunk does not fill it.
        let bytes = chunks.next_multiple_of(4096);
        let page = pool.page_bytes() as u64;
        let span = Span { name: pool.name(), start: pool.chunks_base(), bytes, page };
        let mapping = Arc::new(self.map(span, Backing::Pool(Arc::clone(pool)))?);
        let mut state = self.state();
        state.pools.retain(|known| known.strong_count() != 0);
        state.pools.push(Arc::downgrade(&mapping));
        Ok(mapping)
    }

    fn map(self: &Arc<Self>, span: Span<'_>, backing: Backing) -> Result<Mapping, DmaError> {
        // Aligned as the pages are, so that the IOMMU can use large ones, too.
        let align = [1 << 30, 1 << 21].into_iter().find(|&size| span.bytes >= size).unwrap_or(4096);
        let mut iova = 0;
        {
            let mut state = self.state();
            let page = state.page;
            if let Some(addresses) = &mut state.addresses {
                let bytes = span.bytes.next_multiple_of(page);
                let none = || DmaError::NoAddresses { name: span.name.to_owned(), bytes: span.bytes };
                iova = addresses.allocate(bytes, align.max(page)).ok_or_else(none)?;
            }
        }
        // SAFETY: regions and pools are shared memory that is used as atomics, or as chunks lent to a device and
        // not touched meanwhile; `Mapping` keeps the backing until `unmap` has said that no device can reach it,
        // and the domain does where nothing is translated.
        match unsafe { self.iommu.map(span, iova) } {
            Ok(iova) => {
                let (start, bytes) = (span.start, span.bytes);
                Ok(Mapping { start, bytes, iova, backing, domain: Arc::clone(self) })
            }
            Err(error) => {
                if let Some(addresses) = &mut self.state().addresses {
                    addresses.free(iova);
                }
                Err(error)
            }
        }
    }
}

/// Memory that the devices of a domain reach.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: u64,
    iova: u64,
    backing: Backing,
    domain: Arc<Domain>,
}

// SAFETY: addresses of shared memory that `backing` keeps mapped, itself `Send` and `Sync`.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing of it changes.
unsafe impl Sync for Mapping {}

// SAFETY: `start` to `start + bytes` is a region's mapping, shared across forks, kept by `backing`. A region that
// was made for a device is used as atomics by this trait's contract; a pool's chunks are not given out as such.
// `Drop` leaves the memory in place unless the IOMMU has let go of it.
unsafe impl DmaMemory for Mapping {
    fn start(&self) -> NonNull<u8> {
        self.start
    }

    fn bytes(&self) -> usize {
        self.bytes as usize
    }

    fn iova(&self) -> u64 {
        self.iova
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.domain.is_ours() {
            return;
        }
        let mut state = self.domain.state();
        let Some(addresses) = &mut state.addresses else {
            state.kept.push(self.backing.clone());
            return;
        };
        if self.domain.iommu.unmap(self.iova, self.bytes) {
            addresses.free(self.iova);
        } else {
            tracing::warn!(
                "the IOMMU does not let go of {} bytes at {:#x}; they stay as they are",
                self.bytes,
                self.iova
            );
            std::mem::forget(self.backing.clone());
        }
    }
}

#[cfg(test)]
mod tests;
