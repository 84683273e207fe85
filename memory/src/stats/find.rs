//! Finding the segments of other processes.
//!
//! Contract: whoever looks may be root, and any user may give a descriptor the name of a segment. So what
//! a link leads to is looked at before it is opened, nothing here waits, and what is found is bounded.

use super::{MAX_BYTES, PREFIX, SegmentReader, is_plain_memory, printable};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A running dataplane that [`find`] found.
#[derive(Debug)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// The program.
    pub pid: u32,
    /// Its segment.
    pub reader: SegmentReader,
}

/// Finds the segments of running dataplanes: memfds have no path, so this looks through the
/// descriptors of the processes that we may inspect (`/proc/PID/fd`). Each segment is listed once,
/// under the program that made it; one whose program is gone is not listed.
///
/// # Errors
/// When `/proc` cannot be read. Processes that we may not inspect are passed over.
pub fn find(name: Option<&str>) -> std::io::Result<Vec<Found>> {
    let mut found: Vec<Found> = Vec::new();
    let mut bytes = 0;
    'all: for process in std::fs::read_dir("/proc")? {
        let Ok(process) = process else { continue };
        let Some(pid) = process.file_name().to_str().and_then(|s| s.parse::<u32>().ok()) else { continue };
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
            let Some(target) = target.to_str().and_then(|t| t.strip_prefix("/memfd:")) else { continue };
            let Some(theirs) = target.strip_prefix(PREFIX) else { continue };
            let theirs = theirs.strip_suffix(" (deleted)").unwrap_or(theirs);
            if name.is_some_and(|wanted| wanted != theirs)
                || found.iter().any(|f| f.pid == pid && f.name == printable(theirs))
            {
                continue;
            }
            let Some(fd) = open_memory(&descriptor.path()) else { continue };
            let reader = match SegmentReader::attach(fd) {
                Ok(reader) => reader,
                Err(error) => {
                    tracing::debug!(pid, "passed over: {error}");
                    continue;
                }
            };
            // Workers inherit the descriptor; the header says whose it is.
            if reader.pid() != pid {
                continue;
            }
            bytes += reader.region.len();
            if bytes > MAX_BYTES {
                tracing::warn!("stopped looking: the segments found have more than {MAX_BYTES} bytes");
                break 'all;
            }
            found.push(Found { name: printable(theirs), pid, reader });
        }
    }
    found.sort_by_key(|f| f.pid);
    Ok(found)
}

/// Opens what a link in `/proc/PID/fd` leads to. Its name is no proof: looked at before it is opened.
fn open_memory(link: &Path) -> Option<OwnedFd> {
    let open = |path: &Path, flags| -> Option<OwnedFd> {
        // The standard library adds O_CLOEXEC.
        std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path).ok().map(OwnedFd::from)
    };
    let place = open(link, libc::O_PATH)?;
    if !is_plain_memory(&place) {
        return None;
    }
    open(&Path::new("/proc/self/fd").join(place.as_raw_fd().to_string()), libc::O_NONBLOCK)
}
