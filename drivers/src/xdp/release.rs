//! Knowing when a device has let go of our chunks.
//!
//! In zero-copy mode the kernel takes a queue from the device some time after its socket was closed, and
//! not at all while another process still has the socket; until then the device may write to every
//! chunk that was in the fill ring. So frames stay in custody until somebody else could have the queue:
//! a second socket, made beforehand in the same namespace with a page of memory of its own, tries to
//! bind to it. Where the kernel copies, nothing is written after the close, and none of this is needed.

use super::layout::{MIN_CHUNK, SockaddrXdp, UmemReg, XDP_COPY, option};
use super::sys;
use isoplane_memory::{Region, RegionConfig};
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Entries of the probe's rings; it never moves a packet.
const ENTRIES: u32 = 2;
const BYTES: usize = 4096;

/// A socket that waits for its turn.
#[derive(Debug)]
pub(super) struct Probe {
    socket: OwnedFd,
    address: SockaddrXdp,
    /// Keeps the memory registered with the socket mapped; dropped after it.
    _memory: Arc<Region>,
}

impl Probe {
    /// For a queue of an interface of the calling thread's namespace.
    pub(super) fn new(ifindex: u32, queue: u32) -> Result<Self, Errno> {
        let memory = Region::create(&RegionConfig::new("xdp-probe", BYTES)).map_err(|_| Errno::ENOMEM)?;
        let socket = sys::socket()?;
        let umem = UmemReg {
            addr: memory.base().as_ptr() as u64,
            len: BYTES as u64,
            chunk_size: MIN_CHUNK,
            headroom: 0,
            flags: 0,
            tx_metadata_len: 0,
        };
        sys::set_option(socket.as_fd(), option::UMEM_REG, &umem)?;
        for ring in [option::UMEM_FILL_RING, option::UMEM_COMPLETION_RING, option::RX_RING] {
            sys::set_option(socket.as_fd(), ring, &ENTRIES)?;
        }
        let address = SockaddrXdp {
            family: super::layout::AF_XDP,
            flags: XDP_COPY,
            ifindex,
            queue_id: queue,
            shared_umem_fd: 0,
        };
        Ok(Self { socket, address, _memory: memory })
    }

    /// Waits until the queue is free, for at most `patience`; says whether it is.
    pub(super) fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match sys::bind(self.socket.as_fd(), &self.address) {
                // An interface or queue that is no more has no device that writes.
                Ok(()) | Err(Errno::ENODEV | Errno::ENXIO | Errno::EINVAL) => return true,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                Err(_) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};

    /// `lo` of a namespace of this thread's own: taken by one probe, then free again.
    #[test]
    fn a_queue_is_free_when_its_socket_is_closed() {
        std::thread::spawn(|| {
            if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
                eprintln!("skipped: a network namespace needs root ({errno})");
                return;
            }
            let first = Probe::new(1, 0).expect("a socket");
            let second = Probe::new(1, 0).expect("a socket");
            assert!(first.wait(Duration::ZERO), "nobody has it");
            assert!(!second.wait(Duration::from_millis(20)), "the first has it");
            drop(first);
            assert!(second.wait(Duration::from_secs(5)), "the first has closed");
            let nowhere = Probe::new(77, 0).expect("a socket");
            assert!(nowhere.wait(Duration::ZERO), "no interface, no device");
        })
        .join()
        .expect("the thread");
    }
}
