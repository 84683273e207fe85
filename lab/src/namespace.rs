//! Anonymous network namespaces.
//!
//! Contract: a [`Namespace`] is a descriptor and nothing else; the kernel deletes the namespace with
//! its interfaces when the last descriptor, socket and thread in it is gone. A namespace belongs to a
//! *thread* in Linux, so entering one changes the calling thread only and is undone on the same thread.

use crate::link::{Link, LinkStatus};
use crate::netlink::Netlink;
use crate::{LabError, link};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread::{self, JoinHandle};

/// A network namespace, held by descriptor (close-on-exec).
#[derive(Debug)]
pub struct Namespace {
    file: File,
    inode: u64,
}

/// The calling thread is in another namespace until this is dropped; made by [`Namespace::enter`].
///
/// Guards nest: drop them in the reverse order of their making, as scopes do.
#[derive(Debug)]
#[must_use = "the thread goes back at once when this is dropped"]
pub struct Entered<'a> {
    back: Option<File>,
    /// Not `Send`: the way back is this thread's.
    _here: PhantomData<(&'a Namespace, *const ())>,
}

impl Namespace {
    /// Makes a namespace with `lo` up, and without IPv6's talk of its own: no link-local addresses, no
    /// router solicitations, no duplicate address detection. What is then seen on a link is what was
    /// sent there (an IPv6 *address* that is added still joins its multicast group, with one report).
    ///
    /// The calling thread is in the new namespace for a moment and then back; no other thread is used,
    /// so that a program with one thread still has one.
    ///
    /// # Errors
    /// [`LabError::NotPermitted`] without `CAP_SYS_ADMIN`; otherwise what the kernel said.
    pub fn new() -> Result<Self, LabError> {
        let home = Self::current()?;
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|e| LabError::namespace("making a network namespace", e))?;
        let back = Entered { back: Some(home.file), _here: PhantomData };
        let new = Self::current();
        back.leave()?;
        let new = new?;
        for (name, value) in
            [("accept_ra", "0"), ("autoconf", "0"), ("addr_gen_mode", "1"), ("accept_dad", "0")]
        {
            for which in ["all", "default"] {
                let path = format!("ipv6/conf/{which}/{name}");
                // A kernel without IPv6 has none of these, and is as quiet as can be.
                if new.has_sysctl(&path)? {
                    new.set_sysctl(&path, value)?;
                }
            }
        }
        new.link("lo")?.up()?;
        Ok(new)
    }

    /// The namespace that the calling thread is in.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn current() -> Result<Self, LabError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// A namespace by a file that stands for it: `/proc/PID/ns/net`, or the `/proc/PID/fd/N` of somebody
    /// who holds it.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, LabError> {
        let failed = |e| LabError::namespace("opening a network namespace", e);
        let file = File::open(path).map_err(failed)?;
        let inode = file.metadata().map_err(failed)?.ino();
        Ok(Self { file, inode })
    }

    /// Its number in the kernel: what `readlink /proc/PID/ns/net` shows in brackets.
    #[must_use]
    pub const fn inode(&self) -> u64 {
        self.inode
    }

    /// Moves the calling thread into the namespace until the guard is dropped. Sockets opened, and
    /// ports bound, in between belong to the namespace for good.
    ///
    /// `/sys/class/net` keeps showing the namespace that sysfs was mounted in; `/proc/sys/net` and
    /// netlink follow the thread.
    ///
    /// # Errors
    /// [`LabError::NotPermitted`] without `CAP_SYS_ADMIN`; otherwise what the kernel said.
    pub fn enter(&self) -> Result<Entered<'_>, LabError> {
        let back = Self::current()?.file;
        setns(&self.file, CloneFlags::CLONE_NEWNET)
            .map_err(|e| LabError::namespace("entering a network namespace", e))?;
        Ok(Entered { back: Some(back), _here: PhantomData })
    }

    /// Runs `work` in a new thread inside the namespace and waits for it. A panic in there goes on in
    /// the caller.
    ///
    /// # Errors
    /// As [`Namespace::enter`], before `work` has begun.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        let inside = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .map_err(|e| LabError::namespace("entering a network namespace", e))?;
            Ok(work())
        };
        thread::scope(|scope| scope.spawn(inside).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Starts a named thread inside the namespace (the first 15 bytes of the name are what other
    /// programs see).
    ///
    /// # Errors
    /// When the kernel gives no thread, or as [`Namespace::enter`].
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, LabError> {
        // Threads begin in their maker's namespace, so there is no failure to report from inside.
        let inside = self.enter()?;
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .map_err(|e| LabError::namespace("starting a thread in a network namespace", e));
        inside.leave()?;
        thread
    }

    /// An interface of this namespace.
    ///
    /// # Errors
    /// [`LabError::NoSuchLink`]; otherwise what the kernel said.
    pub fn link(&self, name: &str) -> Result<Link<'_>, LabError> {
        let status = link::status_by_name(&Netlink::open(self)?, name)?;
        Ok(Link::new(self, name, status.index))
    }

    /// All interfaces of this namespace, in the order of their index.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn links(&self) -> Result<Vec<LinkStatus>, LabError> {
        link::all(&Netlink::open(self)?)
    }

    /// Sets a network parameter of this namespace; `path` is below `/proc/sys/net`, such as
    /// `ipv4/ip_forward`.
    ///
    /// # Errors
    /// [`LabError::Sysctl`] names the file and says why.
    pub fn set_sysctl(&self, path: &str, value: &str) -> Result<(), LabError> {
        let _inside = self.enter()?;
        let path = Path::new("/proc/sys/net").join(path);
        std::fs::write(&path, value).map_err(|source| LabError::Sysctl { path, source })
    }

    /// Is there such a parameter in this kernel? See [`Namespace::set_sysctl`].
    ///
    /// # Errors
    /// As [`Namespace::enter`].
    pub fn has_sysctl(&self, path: &str) -> Result<bool, LabError> {
        let _inside = self.enter()?;
        Ok(Path::new("/proc/sys/net").join(path).exists())
    }

    /// Takes IPv6 away from the interfaces that are here and those that will be made: for tests that
    /// count frames.
    ///
    /// # Errors
    /// [`LabError::Sysctl`].
    pub fn disable_ipv6(&self) -> Result<(), LabError> {
        for which in ["all", "default"] {
            let path = format!("ipv6/conf/{which}/disable_ipv6");
            if self.has_sysctl(&path)? {
                self.set_sysctl(&path, "1")?;
            }
        }
        Ok(())
    }

    /// Another descriptor of the same namespace.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, LabError> {
        let failed = |e| LabError::namespace("duplicating a network namespace's descriptor", e);
        Ok(Self { file: self.file.try_clone().map_err(failed)?, inode: self.inode })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Namespace> for OwnedFd {
    fn from(namespace: Namespace) -> Self {
        namespace.file.into()
    }
}

impl Entered<'_> {
    /// Goes back, and says whether that worked; dropping does the same but can only log.
    ///
    /// # Errors
    /// When the thread has lost `CAP_SYS_ADMIN` in the meantime: it is then still inside.
    pub fn leave(mut self) -> Result<(), LabError> {
        self.back.take().map_or(Ok(()), |back| go_back(&back))
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(back) = self.back.take()
            && let Err(error) = go_back(&back)
        {
            tracing::error!("this thread stays in the wrong network namespace: {error}");
        }
    }
}

fn go_back(to: &File) -> Result<(), LabError> {
    setns(to, CloneFlags::CLONE_NEWNET)
        .map_err(|e| LabError::namespace("going back to the thread's own network namespace", e))
}
