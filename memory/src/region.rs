//! Shared, locked, pre-faulted memory: what pools, rings, tables and statistics are made of.
//!
//! Contract: a region is a memfd (or hugetlb memfd), mapped MAP_SHARED, so it crosses `fork` and can
//! be handed to another process by descriptor. It never shrinks or grows: the seals forbid it, so a
//! reader in another process cannot be sent SIGBUS. It is filled with zeroes, present and, where the
//! machine lets us, locked before anybody gets to see it. File-backed shared pages are not used:
//! they fault even when locked.
#![allow(unsafe_code, reason = "mmap, mlock and mbind; see each block")]

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mlock, mmap, munmap};
use std::ffi::{CString, c_void};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// Which page size a region shall use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// 4 KiB pages.
    #[default]
    Never,
    /// 2 MiB pages when the kernel has enough free, else 4 KiB with a warning.
    Prefer2M,
    /// 2 MiB pages or an error.
    Require2M,
    /// 1 GiB pages when the kernel has enough free, else 4 KiB with a warning.
    Prefer1G,
    /// 1 GiB pages or an error.
    Require1G,
}

impl HugePages {
    const fn shift(self) -> Option<u32> {
        match self {
            Self::Never => None,
            Self::Prefer2M | Self::Require2M => Some(21),
            Self::Prefer1G | Self::Require1G => Some(30),
        }
    }

    const fn required(self) -> bool {
        matches!(self, Self::Require2M | Self::Require1G)
    }
}

/// What to do when a region cannot be locked into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lock {
    /// Fail: an unlocked page may be reclaimed, and touching it again is a page fault.
    Require,
    /// Warn once and go on.
    #[default]
    Prefer,
    /// Do not try (for memory that only housekeeping touches).
    Never,
}

/// How to make a [`Region`].
#[derive(Debug, Clone)]
pub struct RegionConfig {
    /// Shown in `/proc/PID/fd` and `/proc/PID/maps` as `memfd:NAME`.
    pub name: String,
    /// Size in bytes; rounded up to whole pages.
    pub bytes: usize,
    /// Page size.
    pub huge_pages: HugePages,
    /// Locking.
    pub lock: Lock,
    /// NUMA node to place the pages on, when the machine has more than one.
    pub numa_node: Option<u32>,
}

impl RegionConfig {
    /// 4 KiB pages, locked if possible, placed where the kernel likes.
    #[must_use]
    pub fn new(name: &str, bytes: usize) -> Self {
        Self {
            name: name.to_owned(),
            bytes,
            huge_pages: HugePages::Never,
            lock: Lock::Prefer,
            numa_node: None,
        }
    }
}

/// Why a region could not be made or mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The size is zero or does not fit the address space.
    #[error("region {name:?}: {bytes} bytes is not a usable size")]
    Size {
        /// The region's name.
        name: String,
        /// What was asked for.
        bytes: usize,
    },
    /// The name holds a NUL byte or is longer than 200 bytes.
    #[error("region name {name:?}: at most 200 bytes and no NUL")]
    Name {
        /// The name.
        name: String,
    },
    /// Not enough huge pages.
    #[error(
        "region {name:?}: the kernel cannot give {bytes} bytes in {page_bytes}-byte pages ({source}); \
         reserve them in /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages, or do not require huge pages",
        page_bytes / 1024
    )]
    HugePages {
        /// The region's name.
        name: String,
        /// Size asked for.
        bytes: usize,
        /// Size of one page.
        page_bytes: usize,
        /// The kernel's answer.
        source: nix::Error,
    },
    /// Locking was required and refused.
    #[error(
        "region {name:?}: cannot lock {bytes} bytes ({source}); raise the memlock limit \
         (ulimit -l, LimitMEMLOCK=) or give the program CAP_IPC_LOCK"
    )]
    Lock {
        /// The region's name.
        name: String,
        /// Size of the region.
        bytes: usize,
        /// The kernel's answer.
        source: nix::Error,
    },
    /// A descriptor that is not one of our regions: it could shrink under us.
    #[error(
        "the descriptor is not an isoplane region: it must be a memfd sealed against shrinking and growing"
    )]
    NotSealed,
    /// Any other call that failed.
    #[error("region {name:?}: {call}: {source}")]
    Os {
        /// The region's name.
        name: String,
        /// Which call failed.
        call: &'static str,
        /// The kernel's answer.
        source: nix::Error,
    },
}

/// A piece of shared memory. Cheap to share in one process through `Arc`; unmapped with the last one.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    page: usize,
    locked: bool,
    writable: bool,
    name: String,
    fd: OwnedFd,
}

// SAFETY: a region is an address range that stays mapped for the value's life; it hands out only
// raw pointers, and whoever reads or writes through them argues for that access.
unsafe impl Send for Region {}
// SAFETY: as above; no method changes the region's own fields after it was made.
unsafe impl Sync for Region {}

/// Name of a region that another process made, in errors.
const ATTACHED: &str = "attached";

fn round_up(bytes: usize, to: usize) -> Option<usize> {
    bytes.checked_add(to - 1).map(|b| b & !(to - 1))
}

impl Region {
    /// Makes a region: memfd, sized, sealed, mapped, placed, filled with zeroes and locked.
    ///
    /// # Errors
    /// See [`RegionError`]. A preferred page size or lock that cannot be had is a `tracing` warning.
    pub fn create(config: &RegionConfig) -> Result<Arc<Self>, RegionError> {
        let size = || RegionError::Size { name: config.name.clone(), bytes: config.bytes };
        if config.bytes == 0 {
            return Err(size());
        }
        if let Some(shift) = config.huge_pages.shift() {
            let page = 1usize << shift;
            let len = round_up(config.bytes, page).ok_or_else(size)?;
            match Self::create_with(config, len, page, shift) {
                Ok(region) => return Ok(Arc::new(region)),
                Err(RegionError::Os { source, .. }) => {
                    let error = RegionError::HugePages {
                        name: config.name.clone(),
                        bytes: len,
                        page_bytes: page,
                        source,
                    };
                    if config.huge_pages.required() {
                        return Err(error);
                    }
                    tracing::warn!("{error}; using 4 KiB pages");
                }
                Err(other) => return Err(other),
            }
        }
        let len = round_up(config.bytes, 4096).ok_or_else(size)?;
        Self::create_with(config, len, 4096, 0).map(Arc::new)
    }

    fn create_with(config: &RegionConfig, len: usize, page: usize, shift: u32) -> Result<Self, RegionError> {
        let os = |call| move |source| RegionError::Os { name: config.name.clone(), call, source };
        let bad_name = || RegionError::Name { name: config.name.clone() };
        if config.name.len() > 200 {
            return Err(bad_name());
        }
        let c_name = CString::new(config.name.as_str()).map_err(|_| bad_name())?;
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if shift != 0 {
            // memfd_create(2): the page size is its log2, shifted by MFD_HUGE_SHIFT (26).
            flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(shift << 26);
        }
        let fd = memfd_create(c_name.as_c_str(), flags).map_err(os("memfd_create"))?;
        let length =
            i64::try_from(len).map_err(|_| RegionError::Size { name: config.name.clone(), bytes: len })?;
        nix::unistd::ftruncate(&fd, length).map_err(os("ftruncate"))?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(os("fcntl(F_ADD_SEALS)"))?;
        let mut region = Self::map(fd, len, page, true, &config.name)?;
        region.place(config.numa_node);
        region.prefault()?;
        region.lock(config.lock)?;
        Ok(region)
    }

    /// Maps a region that another process made, from a descriptor it passed or inherited.
    ///
    /// # Errors
    /// [`RegionError::NotSealed`] when the descriptor could shrink under us, and mapping errors.
    pub fn from_fd(fd: OwnedFd, writable: bool) -> Result<Arc<Self>, RegionError> {
        let region = Self::from_fd_lazily(fd, writable)?;
        region.prefault()?;
        Ok(region)
    }

    /// As [`from_fd`](Self::from_fd), but pages come when they are touched: for a housekeeping reader of
    /// memory whose maker it does not trust, and whose pages it would otherwise pay for.
    ///
    /// # Errors
    /// As for [`from_fd`](Self::from_fd).
    pub fn from_fd_lazily(fd: OwnedFd, writable: bool) -> Result<Arc<Self>, RegionError> {
        let (len, page) = Self::size_of_fd(&fd)?;
        Self::map(fd, len, page, writable, ATTACHED).map(Arc::new)
    }

    /// Size in bytes, and page size, of a region that another process made; checks that it keeps them.
    ///
    /// # Errors
    /// As for [`from_fd`](Self::from_fd).
    pub fn size_of_fd(fd: &OwnedFd) -> Result<(usize, usize), RegionError> {
        let os = |call| move |source| RegionError::Os { name: ATTACHED.to_owned(), call, source };
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|_| RegionError::NotSealed)?;
        let wanted = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        if !SealFlag::from_bits_retain(seals).contains(wanted) {
            return Err(RegionError::NotSealed);
        }
        let stat = nix::sys::stat::fstat(fd).map_err(os("fstat"))?;
        let len = usize::try_from(stat.st_size).unwrap_or(0);
        if len == 0 {
            return Err(RegionError::Size { name: ATTACHED.to_owned(), bytes: len });
        }
        Ok((len, usize::try_from(stat.st_blksize).unwrap_or(4096).max(4096)))
    }

    fn map(fd: OwnedFd, len: usize, page: usize, writable: bool, name: &str) -> Result<Self, RegionError> {
        let os = |call| move |source| RegionError::Os { name: name.to_owned(), call, source };
        let size =
            NonZeroUsize::new(len).ok_or_else(|| RegionError::Size { name: name.to_owned(), bytes: len })?;
        let mut prot = ProtFlags::PROT_READ;
        if writable {
            prot |= ProtFlags::PROT_WRITE;
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no existing one.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &fd, 0) }.map_err(os("mmap"))?;
        Ok(Self { base: base.cast(), len, page, locked: false, writable, name: name.to_owned(), fd })
    }

    /// Asks for a NUMA node before the first touch. A refusal costs speed only, so it is a warning.
    fn place(&self, node: Option<u32>) {
        let Some(node) = node else { return };
        let Some(mask) = 1_u64.checked_shl(node) else {
            // The kernel's own limit is higher (MAX_NUMNODES, 1024 at most); no machine we know comes near.
            let name = &self.name;
            tracing::warn!("region {name:?}: NUMA node {node} is ignored: nodes are numbered from 0 to 63");
            return;
        };
        const MPOL_PREFERRED: libc::c_int = 1; // linux/mempolicy.h
        // SAFETY: mbind(2) reads one word of `mask` and changes the policy of our own mapping only.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.len,
                MPOL_PREFERRED,
                &raw const mask,
                64,
                0,
            )
        };
        if rc != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!("region {:?}: cannot prefer NUMA node {node}: {error}", self.name);
        }
    }

    fn prefault(&self) -> Result<(), RegionError> {
        // MADV_POPULATE_* (Linux 5.14) reports a page that cannot be had as an error; touching it
        // ourselves would be a SIGBUS.
        let advice = if self.writable { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        // SAFETY: the range is exactly our mapping.
        let rc = unsafe { libc::madvise(self.base.as_ptr().cast::<c_void>(), self.len, advice) };
        if rc == 0 {
            return Ok(());
        }
        Err(RegionError::Os {
            name: self.name.clone(),
            call: "madvise(MADV_POPULATE)",
            source: nix::Error::last(),
        })
    }

    fn lock(&mut self, lock: Lock) -> Result<(), RegionError> {
        if lock == Lock::Never {
            return Ok(());
        }
        // SAFETY: the range is exactly our mapping.
        match unsafe { mlock(self.base.cast(), self.len) } {
            Ok(()) => {
                self.locked = true;
                Ok(())
            }
            Err(source) => {
                let error = RegionError::Lock { name: self.name.clone(), bytes: self.len, source };
                if lock == Lock::Require {
                    return Err(error);
                }
                tracing::warn!("{error}; its pages may be reclaimed and fault later");
                Ok(())
            }
        }
    }

    /// First byte of the mapping.
    #[inline(always)]
    #[must_use]
    pub const fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Size in bytes, whole pages.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Bytes per page.
    #[must_use]
    pub const fn page_bytes(&self) -> usize {
        self.page
    }

    /// Is the region locked into memory by this process?
    #[must_use]
    pub const fn is_locked(&self) -> bool {
        self.locked
    }

    /// May this mapping be written?
    #[must_use]
    pub const fn is_writable(&self) -> bool {
        self.writable
    }

    /// The name it was made with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A typed pointer to `count` values of `T` at `offset`, when they lie inside and are aligned.
    #[must_use]
    pub fn slice<T: crate::Pod>(&self, offset: usize, count: usize) -> Option<NonNull<T>> {
        let bytes = size_of::<T>().checked_mul(count)?;
        let end = offset.checked_add(bytes)?;
        if end > self.len || !(self.base.as_ptr() as usize + offset).is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: `offset <= len`, so the result is inside the mapping or one past its end.
        Some(unsafe { self.base.add(offset) }.cast())
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are the mapping made in `map`; everything that points into it
        // holds an `Arc<Region>`, so nothing does any more.
        if let Err(error) = unsafe { munmap(self.base.cast(), self.len) } {
            tracing::warn!("region {:?}: munmap: {error}", self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_mapping_of_the_descriptor_sees_the_first() {
        let region = Region::create(&RegionConfig::new("test", 10_000)).unwrap();
        assert_eq!(region.len(), 12_288);
        let other = Region::from_fd(region.as_fd().try_clone_to_owned().unwrap(), false).unwrap();
        // SAFETY: offset 9000 is inside both mappings.
        unsafe {
            region.base().add(9000).write_volatile(7);
            assert_eq!(other.base().add(9000).read_volatile(), 7);
        }
    }

    #[test]
    fn sealed_against_shrinking() {
        let region = Region::create(&RegionConfig::new("test", 4096)).unwrap();
        assert!(nix::unistd::ftruncate(region.as_fd(), 0).is_err());
        let plain = memfd_create(c"plain", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(matches!(Region::from_fd(plain, true), Err(RegionError::NotSealed)));
    }

    #[test]
    fn refusals_name_the_region() {
        let zero = Region::create(&RegionConfig::new("zero", 0)).unwrap_err();
        assert!(zero.to_string().contains("zero"));
        let huge = RegionConfig { huge_pages: HugePages::Require1G, ..RegionConfig::new("big", 1 << 45) };
        let error = Region::create(&huge).unwrap_err();
        assert!(error.to_string().contains("nr_hugepages"), "{error}");
        assert!(Region::create(&RegionConfig::new("a\0b", 1)).is_err());
    }

    /// What is said meanwhile.
    fn heard(what: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Ear(Arc<std::sync::Mutex<Vec<u8>>>);
        impl std::io::Write for Ear {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let ear = Ear::default();
        let writer = ear.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, what);
        String::from_utf8(ear.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_numa_node_that_cannot_be_named_is_not_ignored_in_silence() {
        for node in [64, u32::MAX] {
            let config = RegionConfig { numa_node: Some(node), ..RegionConfig::new("far", 4096) };
            let said = heard(|| drop(Region::create(&config).unwrap()));
            assert!(said.contains("far") && said.contains(&format!("NUMA node {node} is ignored")), "{said}");
        }
        let near = RegionConfig { numa_node: Some(0), ..RegionConfig::new("near", 4096) };
        let said = heard(|| drop(Region::create(&near).unwrap()));
        assert!(!said.contains("ignored"), "{said}");
    }

    #[test]
    fn typed_views_stay_inside() {
        let region = Region::create(&RegionConfig::new("test", 4096)).unwrap();
        assert!(region.slice::<u64>(0, 512).is_some());
        assert!(region.slice::<u64>(8, 512).is_none());
        assert!(region.slice::<u64>(4, 1).is_none());
        assert!(region.slice::<u64>(0, usize::MAX).is_none());
    }
}
