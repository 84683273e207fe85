//! Takes packets out of the ring and writes them into the file: in the kicker, or in a worker that kicks itself.
//!
//! Contract: one call writes at most [`PACKETS`] packets and asks the kernel once, or not at all. What could not be
//! written stays, and the next call goes on there, so a file is whole but for its end. One writer at a time, in all
//! processes together: whoever kicks, and the port when it is closed.

use crate::capture::Records;
use crate::capture::pcap::PcapSink;
use crate::port::{KickError, KickTarget, Kicked};
use isoplane_memory::Kernel;
use nix::errno::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Packets that one call takes.
const PACKETS: usize = 64;

/// Bytes of the file that are not written yet.
#[derive(Debug, Clone, Default)]
struct Spool(Arc<Mutex<Vec<u8>>>);

impl Spool {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Spool {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Writer {
    records: Records,
    sink: PcapSink<Spool>,
    spool: Spool,
    file: File,
    kicks: u64,
    errors: u64,
}

impl Writer {
    /// Writes the file's header.
    pub(super) fn new(file: File, records: Records) -> io::Result<Self> {
        let spool = Spool::default();
        let sink = PcapSink::new(spool.clone()).map_err(io::Error::other)?;
        let mut writer = Self { records, sink, spool, file, kicks: 0, errors: 0 };
        writer.empty()?;
        Ok(writer)
    }

    /// Packets written, kicks, and those that failed.
    pub(super) const fn counts(&self) -> (u64, u64, u64) {
        (self.sink.packets(), self.kicks, self.errors)
    }

    /// Times that the ring held something that is no packet.
    pub(super) const fn damaged(&self) -> u64 {
        self.records.damaged()
    }

    /// Writes some packets; says how many it took.
    pub(super) fn some(&mut self) -> Result<u32, KickError> {
        // What an earlier call could not write goes first, or memory would have no bound.
        let written = self.empty().and_then(|()| {
            self.records.resync();
            let taken = self.sink.drain_some(&mut self.records, PACKETS).map_err(io::Error::other)?;
            self.empty()?;
            Ok(taken as u32)
        });
        if !matches!(written, Ok(0)) {
            self.kicks += 1;
        }
        written.map_err(|error| {
            self.errors += 1;
            KickError::Os(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
        })
    }

    fn empty(&mut self) -> io::Result<()> {
        let mut bytes = self.spool.bytes();
        while !bytes.is_empty() {
            match self.file.write(&bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => drop(bytes.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Writes some packets, unless somebody else is at it.
pub(super) fn write_some(writer: &Mutex<Writer>) -> Result<u32, KickError> {
    match writer.try_lock() {
        Ok(mut writer) => writer.some(),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner().some(),
        Err(std::sync::TryLockError::WouldBlock) => Ok(0),
    }
}

/// A pcap port as its kicker sees it: it writes the file.
#[derive(Debug)]
pub struct PcapKick {
    writer: Weak<Mutex<Writer>>,
}

impl PcapKick {
    pub(super) fn new(writer: &Arc<Mutex<Writer>>) -> Self {
        Self { writer: Arc::downgrade(writer) }
    }
}

impl KickTarget for PcapKick {
    fn poll(&mut self, _kernel: &Kernel) -> Result<Kicked, KickError> {
        let Some(writer) = self.writer.upgrade() else { return Ok(Kicked::Idle) };
        match write_some(&writer)? {
            0 => Ok(Kicked::Idle),
            waiting => Ok(Kicked::Kicked { waiting }),
        }
    }
}
