//! tracefs, mounted or not: reading the number and format of a tracepoint.
//!
//! Contract: nothing is mounted in anybody's tree. Where tracefs is not mounted, a mount of our own is
//! made that hangs on a descriptor only (fsopen and fsmount, Linux 5.2) and goes with it.
#![allow(unsafe_code, reason = "fsopen, fsconfig and fsmount have no wrappers; see each block")]

use super::SendersUnavailable;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const TRACEFS: &CStr = c"tracefs";
/// FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC, FSCONFIG_CMD_CREATE (include/uapi/linux/mount.h).
const CLOEXEC: libc::c_uint = 1;
const CMD_CREATE: libc::c_uint = 6;

/// The root of a tracefs.
#[derive(Debug)]
pub(super) struct Tracefs(OwnedFd);

impl Tracefs {
    pub(super) fn open() -> Result<Self, SendersUnavailable> {
        let mounted = File::open("/sys/kernel/tracing").map(|root| Self(root.into()));
        match mounted {
            // Without a mount this is an empty directory of sysfs.
            Ok(root) if root.directory("events").is_ok() => Ok(root),
            _ => detached().map(Self).map_err(|errno| SendersUnavailable::Tracefs { errno }),
        }
    }

    fn directory(&self, path: &str) -> Result<OwnedFd, Errno> {
        openat(&self.0, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
    }

    /// A file of it.
    pub(super) fn read(&self, path: &str) -> io::Result<String> {
        let file = openat(&self.0, path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        // Formats are below 4 KiB; nothing is read without end.
        File::from(file).take(1 << 20).read_to_string(&mut text)?;
        Ok(text)
    }
}

/// A mount that is nowhere in the tree.
fn detached() -> Result<OwnedFd, Errno> {
    // SAFETY: the name is a string that ends in NUL; the kernel only reads it.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, TRACEFS.as_ptr(), CLOEXEC) })?;
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value, and both are null as it asks for.
    let created =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CMD_CREATE, nothing, nothing, 0) };
    Errno::result(created)?;
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NOSUID;
    // SAFETY: all arguments are numbers.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, attributes) })
}

/// The descriptor that a call returned.
fn owned(returned: libc::c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(returned)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
