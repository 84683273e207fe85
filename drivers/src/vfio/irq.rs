//! Interrupts as eventfds: the device's MSI-X, for link state and for waiting while idle, and the kernel's request
//! to give the device back.
//!
//! Contract: no interrupt comes before one was asked for, nor after [`Interrupts::mask`]. Under strict isolation
//! they are masked: a worker polls.

use super::error::InterruptError;
use super::{ioctl, layout};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

/// An eventfd that does not block.
fn eventfd() -> Result<EventFd, InterruptError> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|source| InterruptError::Os { call: "eventfd", source })
}

/// Some of a function's MSI-X interrupts, from the first on. One owner at a time: whoever comes later takes them
/// over. Off again when dropped, by the process that asked for them.
#[derive(Debug)]
pub struct Interrupts {
    device: Arc<OwnedFd>,
    events: Vec<EventFd>,
    process: u32,
}

impl Interrupts {
    pub(super) fn new(device: &Arc<OwnedFd>, count: u16) -> Result<Self, InterruptError> {
        let os = |call| move |source| InterruptError::Os { call, source };
        let available = ioctl::interrupts(device.as_fd(), layout::IRQ_MSIX);
        let available = available.map_err(os("VFIO_DEVICE_GET_IRQ_INFO"))?;
        let wanted = u32::from(count);
        if wanted == 0 || wanted > available {
            return Err(InterruptError::TooMany { wanted, available });
        }
        let events = (0..count).map(|_| eventfd()).collect::<Result<Vec<_>, _>>()?;
        let interrupts = Self { device: Arc::clone(device), events, process: std::process::id() };
        interrupts.unmask()?;
        Ok(interrupts)
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.events.len()
    }

    /// The eventfd of one, to wait for.
    #[must_use]
    pub fn event(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.events.get(index).map(AsFd::as_fd)
    }

    /// How often one came since it was last asked.
    #[must_use]
    pub fn take(&self, index: usize) -> u64 {
        self.events.get(index).and_then(|event| event.read().ok()).unwrap_or(0)
    }

    /// Lets none come: MSI-X is switched off.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn mask(&self) -> Result<(), InterruptError> {
        self.set(&[])
    }

    /// Lets them come.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unmask(&self) -> Result<(), InterruptError> {
        let all: Vec<RawFd> = self.events.iter().map(|event| event.as_fd().as_raw_fd()).collect();
        self.set(&all)
    }

    fn set(&self, to: &[RawFd]) -> Result<(), InterruptError> {
        ioctl::set_interrupts(self.device.as_fd(), layout::IRQ_MSIX, to)
            .map_err(|source| InterruptError::Os { call: "VFIO_DEVICE_SET_IRQS", source })
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        if self.process == std::process::id()
            && let Err(error) = self.mask()
        {
            tracing::debug!("{error}");
        }
    }
}

/// The kernel's request to give the device back, as when it is unplugged.
#[derive(Debug)]
pub(super) struct Request(EventFd);

impl Request {
    /// None when the kernel does not tell (before 4.0).
    pub(super) fn of(device: BorrowedFd<'_>) -> Option<Self> {
        let event = eventfd().ok()?;
        let fd = event.as_fd().as_raw_fd();
        let set = ioctl::set_interrupts(device, layout::IRQ_REQUEST, &[fd]);
        set.is_ok().then_some(Self(event))
    }

    /// Has it come? Not taken from the eventfd, so that each process that asks sees it.
    pub(super) fn came(&self) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                other => return other.is_ok_and(|ready| ready > 0),
            }
        }
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
