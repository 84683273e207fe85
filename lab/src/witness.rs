//! What others see of a thread: its system calls and page faults, told by tracers outside its process.
//!
//! Contract: nothing here asks the thread, so what it says about itself can be checked. Each witness sees
//! what happened between two moments that its user chooses. Everything hangs on a descriptor or a child
//! process: a tracer that dies sets the thread free. Needs root; [`Strace`] needs the program `strace`.
#![allow(unsafe_code, reason = "perf_event_open and one ioctl; see each block")]

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use perf_event_open_sys as sys;
use perf_event_open_sys::bindings::{
    PERF_COUNT_SW_PAGE_FAULTS, PERF_FLAG_FD_CLOEXEC, PERF_TYPE_SOFTWARE, PERF_TYPE_TRACEPOINT,
    perf_event_attr,
};
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time for `strace` to attach.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why nobody can watch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WitnessError {
    /// `strace` cannot be started, or did not attach.
    #[error("strace of thread {tid}: {reason}; it needs the package strace, and root or CAP_SYS_PTRACE")]
    Strace {
        /// The thread.
        tid: u32,
        /// What it said.
        reason: String,
    },
    /// The kernel has no such tracepoint, or hides it.
    #[error(
        "tracepoint {name} cannot be read: {reason}; it needs root and a kernel with CONFIG_EVENT_TRACING"
    )]
    Tracepoint {
        /// Its system and name.
        name: String,
        /// Why not.
        reason: io::Error,
    },
    /// The kernel refused the counter.
    #[error("counting {what} of thread {tid}: {errno}; it needs root or CAP_PERFMON")]
    Perf {
        /// What was to be counted.
        what: String,
        /// The thread.
        tid: u32,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// Counts one kind of event of a thread, from the moment that it is opened.
#[derive(Debug)]
pub struct Counter {
    what: String,
    tid: u32,
    event: OwnedFd,
}

impl Counter {
    /// Page faults of the thread.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn page_faults(tid: u32) -> Result<Self, WitnessError> {
        let config = PERF_COUNT_SW_PAGE_FAULTS.into();
        Self::open("page faults".to_owned(), tid, PERF_TYPE_SOFTWARE, config, None)
    }

    /// System calls that the thread enters. One that syscall user dispatch holds back is not entered;
    /// what its handler does is.
    ///
    /// # Errors
    /// When there is no such tracepoint, or the kernel refuses.
    pub fn system_calls(tid: u32) -> Result<Self, WitnessError> {
        Self::tracepoint(tid, "raw_syscalls/sys_enter", None)
    }

    /// Times that the thread passed a tracepoint, such as `tlb/tlb_flush`, also while an interrupt held it up.
    /// The filter is an expression over the tracepoint's fields (Documentation/trace/events.rst).
    ///
    /// # Errors
    /// When there is no such tracepoint, or the kernel refuses.
    pub fn tracepoint(tid: u32, name: &str, filter: Option<&str>) -> Result<Self, WitnessError> {
        let id = tracepoint_id(name)
            .map_err(|reason| WitnessError::Tracepoint { name: name.to_owned(), reason })?;
        Self::open(name.to_owned(), tid, PERF_TYPE_TRACEPOINT, id, filter)
    }

    fn open(
        what: String,
        tid: u32,
        kind: u32,
        config: u64,
        filter: Option<&str>,
    ) -> Result<Self, WitnessError> {
        let refused = |errno| WitnessError::Perf { what: what.clone(), tid, errno };
        let mut attr = perf_event_attr {
            type_: kind,
            size: size_of::<perf_event_attr>() as u32,
            config,
            ..perf_event_attr::default()
        };
        attr.set_disabled(1);
        let pid = i32::try_from(tid).map_err(|_| refused(Errno::ESRCH))?;
        // SAFETY: the attribute has the size it says; one thread on any CPU, no group.
        let fd = unsafe { sys::perf_event_open(&raw mut attr, pid, -1, -1, PERF_FLAG_FD_CLOEXEC.into()) };
        let fd = Errno::result(fd).map_err(refused)?;
        // SAFETY: the kernel just made this descriptor for us, and nobody else has it.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        if let Some(filter) = filter {
            let filter = CString::new(filter).map_err(|_| refused(Errno::EINVAL))?;
            // SAFETY: the kernel reads the string, which ends in NUL, and does not write.
            let set = unsafe { sys::ioctls::SET_FILTER(fd, filter.as_ptr().cast_mut()) };
            Errno::result(set).map_err(refused)?;
        }
        // SAFETY: no pointer is passed.
        let on = unsafe { sys::ioctls::ENABLE(event.as_raw_fd(), 0) };
        Errno::result(on).map_err(refused)?;
        Ok(Self { what, tid, event })
    }

    /// How many there were since it was opened.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn count(&self) -> Result<u64, WitnessError> {
        let mut value = [0; 8];
        let read = nix::unistd::read(&self.event, &mut value);
        match read.and_then(|n| if n == value.len() { Ok(()) } else { Err(Errno::EIO) }) {
            Ok(()) => Ok(u64::from_ne_bytes(value)),
            Err(errno) => Err(WitnessError::Perf { what: self.what.clone(), tid: self.tid, errno }),
        }
    }
}

/// The number of a tracepoint. Where tracefs is not mounted it is mounted for a moment, in a mount namespace
/// that only a thread of ours sees and that ends with it.
fn tracepoint_id(name: &str) -> io::Result<u64> {
    const TRACEFS: &str = "/sys/kernel/tracing";
    let path = Path::new(TRACEFS).join("events").join(name).join("id");
    let read = move || -> io::Result<u64> {
        let text = fs::read_to_string(&path)?;
        text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        known => return known,
    }
    let mounted = move || -> io::Result<u64> {
        let nothing = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
        mount(Some("tracefs"), TRACEFS, Some("tracefs"), MsFlags::MS_RDONLY, nothing)?;
        read()
    };
    std::thread::spawn(mounted).join().map_err(|_| io::Error::other("the thread that mounts panicked"))?
}

/// `strace`, attached to a thread.
#[derive(Debug)]
pub struct Strace {
    tid: u32,
    child: Child,
    /// What it writes is here; gone with this value.
    directory: PathBuf,
}

impl Strace {
    /// Attaches to a thread and all that it forks. It begins to see when the thread has stopped for it once,
    /// which may be a moment after this returns.
    ///
    /// # Errors
    /// When there is no `strace`, or it did not attach: what it said.
    pub fn attach(tid: u32) -> Result<Self, WitnessError> {
        let failed = |reason: String| WitnessError::Strace { tid, reason };
        let directory = std::env::temp_dir().join(format!("isoplane-strace-{}-{tid}", std::process::id()));
        fs::create_dir(&directory).map_err(|error| failed(format!("{}: {error}", directory.display())))?;
        let said = directory.join("stderr");
        let child = fs::File::create(&said).and_then(|stderr| {
            let mut strace = Command::new("strace");
            strace.args(["-f", "-p", &tid.to_string(), "-o"]).arg(directory.join("output"));
            strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn()
        });
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                return Err(failed(error.to_string()));
            }
        };
        let mut strace = Self { tid, child, directory };
        let start = Instant::now();
        loop {
            let words = fs::read_to_string(&said).unwrap_or_default();
            if words.contains("attached") && !words.contains("attach:") {
                return Ok(strace);
            }
            let ended = strace.child.try_wait().is_ok_and(|status| status.is_some());
            if ended || start.elapsed() > PATIENCE {
                return Err(failed(format!("it did not attach: {}", words.trim())));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has seen so far: a line for each system call and each signal.
    ///
    /// # Errors
    /// When its output cannot be read.
    pub fn seen(&self) -> Result<Vec<String>, WitnessError> {
        let text = fs::read_to_string(self.directory.join("output"))
            .map_err(|error| WitnessError::Strace { tid: self.tid, reason: error.to_string() })?;
        // It marks where it let go, with the thread's number before it. A call that was under way then has
        // its name in that line, and stays.
        let mark =
            |line: &&str| line.trim_start_matches(|c: char| c.is_ascii_digit()).trim() == "<detached ...>";
        Ok(text.lines().filter(|line| !mark(line)).map(str::to_owned).collect())
    }

    /// Detaches, and says what it saw, as [`seen`](Self::seen) does.
    ///
    /// # Errors
    /// When it does not end as it should.
    pub fn detach(mut self) -> Result<Vec<String>, WitnessError> {
        let tid = self.tid;
        let failed = |reason| WitnessError::Strace { tid, reason };
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT)
            .map_err(|errno| failed(errno.to_string()))?;
        self.child.wait().map_err(|error| failed(error.to_string()))?;
        self.seen()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Gone already, or no use to anybody: the thread is set free either way.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// All of them, around one thread.
#[derive(Debug)]
pub struct Witnesses {
    system_calls: Counter,
    page_faults: Counter,
    strace: Strace,
}

/// What [`Witnesses`] saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// System calls, by the tracepoint.
    pub system_calls: u64,
    /// Page faults, by the kernel's counter.
    pub page_faults: u64,
    /// System calls and signals, by `strace`.
    pub strace: Vec<String>,
}

impl Witnesses {
    /// Lets all of them watch a thread.
    ///
    /// # Errors
    /// When one of them cannot.
    pub fn attach(tid: u32) -> Result<Self, WitnessError> {
        let (system_calls, page_faults) = (Counter::system_calls(tid)?, Counter::page_faults(tid)?);
        Ok(Self { system_calls, page_faults, strace: Strace::attach(tid)? })
    }

    /// Ends the watch, and says what each of them saw.
    ///
    /// # Errors
    /// When one of them cannot say.
    pub fn detach(self) -> Result<Seen, WitnessError> {
        let strace = self.strace.detach()?;
        let (system_calls, page_faults) = (self.system_calls.count()?, self.page_faults.count()?);
        Ok(Seen { system_calls, page_faults, strace })
    }
}
