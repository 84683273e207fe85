//! Perf events of one CPU and the ring that they write to.
//!
//! Contract: the kernel writes records between tail and head and never beyond the tail that we gave
//! back; what it wrote is copied out before it is looked at. Its head is checked: one that cannot be
//! gives up what is in the ring, and counts as a loss. Layout: `struct perf_event_mmap_page`
//! (include/uapi/linux/perf_event.h).
#![allow(unsafe_code, reason = "perf events and their shared ring; see each block")]

use super::SendersUnavailable;
use super::record::{self, Record};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use perf_event_open_sys as sys;
use perf_event_open_sys::bindings::{
    PERF_FLAG_FD_CLOEXEC, PERF_SAMPLE_CPU, PERF_SAMPLE_RAW, PERF_SAMPLE_TID, PERF_SAMPLE_TIME,
    PERF_TYPE_TRACEPOINT, perf_event_attr, perf_event_mmap_page,
};
use std::ffi::{CString, c_void};
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of records that wait in a ring: about 1500 of them. A power of two.
const DATA: usize = 128 << 10;

/// A tracepoint to record.
pub(super) struct Event {
    pub(super) id: u64,
    /// Which of its records: an expression of the kernel's event filters.
    pub(super) filter: String,
    /// Record names that threads get, too.
    pub(super) names: bool,
}

/// Events of one CPU with their ring.
#[derive(Debug)]
pub(super) struct Ring {
    cpu: u32,
    events: Vec<OwnedFd>,
    map: NonNull<c_void>,
    /// Bytes of the kernel's page before the data.
    page: usize,
    /// Where we are, which the kernel does not get to change.
    tail: u64,
    copy: Vec<u8>,
}

// SAFETY: the mapping belongs to this value alone; only the kernel writes to it, from anywhere.
unsafe impl Send for Ring {}

impl Ring {
    /// Opens the events on a CPU, switched off.
    pub(super) fn open(cpu: u32, events: &[Event]) -> Result<Self, SendersUnavailable> {
        let failed = |step| move |errno| SendersUnavailable::Perf { step, cpu, errno };
        let mut open = Vec::new();
        for event in events {
            let fd = open_event(cpu, event).map_err(failed("perf_event_open of a tracepoint"))?;
            let filter =
                CString::new(event.filter.as_str()).map_err(|_| failed("an event filter")(Errno::EINVAL))?;
            // SAFETY: the kernel reads the string, which ends in NUL, and does not write.
            let set = unsafe { sys::ioctls::SET_FILTER(fd.as_raw_fd(), filter.as_ptr().cast_mut()) };
            Errno::result(set).map_err(failed("an event filter"))?;
            open.push(fd);
        }
        let Some((first, others)) = open.split_first() else {
            return Err(failed("a ring without events")(Errno::EINVAL));
        };
        let page = page_bytes();
        let bytes =
            NonZeroUsize::new(page + DATA).ok_or_else(|| failed("the ring of events")(Errno::EINVAL))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice; it replaces nothing.
        let map = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, first, 0) }
            .map_err(failed("mapping the ring of events (raise kernel.perf_event_mlock_kb)"))?;
        let mut ring = Self { cpu, map, page, tail: 0, copy: Vec::new(), events: Vec::new() };
        for other in others {
            // SAFETY: both are descriptors of perf events; no pointer is passed.
            let joined = unsafe { sys::ioctls::SET_OUTPUT(other.as_raw_fd(), first.as_raw_fd()) };
            Errno::result(joined).map_err(failed("joining events in one ring"))?;
        }
        ring.events = open;
        Ok(ring)
    }

    /// Switches the events on.
    pub(super) fn enable(&self) -> Result<(), SendersUnavailable> {
        for event in &self.events {
            // SAFETY: no pointer is passed.
            let on = unsafe { sys::ioctls::ENABLE(event.as_raw_fd(), 0) };
            Errno::result(on).map_err(|errno| SendersUnavailable::Perf {
                step: "switching an event on",
                cpu: self.cpu,
                errno,
            })?;
        }
        Ok(())
    }

    fn head(&self) -> &AtomicU64 {
        let page = self.map.cast::<perf_event_mmap_page>();
        // SAFETY: the mapping begins with this page, lives as long as `self`, and the word is aligned; the
        // kernel changes it at any time, so it is reached as an atomic only.
        unsafe { AtomicU64::from_ptr(&raw mut (*page.as_ptr()).data_head) }
    }

    fn tail(&self) -> &AtomicU64 {
        let page = self.map.cast::<perf_event_mmap_page>();
        // SAFETY: as in `head`.
        unsafe { AtomicU64::from_ptr(&raw mut (*page.as_ptr()).data_tail) }
    }

    /// The word of the data at a position of the stream.
    fn word(&self, at: u64) -> u64 {
        let at = (at % DATA as u64) as usize & !7;
        // SAFETY: the data follows the first page, has DATA bytes, and `at` is a multiple of 8 below that.
        // Another writer would be the kernel, so the word is reached as an atomic.
        let word = unsafe { AtomicU64::from_ptr(self.map.byte_add(self.page + at).cast().as_ptr()) };
        word.load(Ordering::Relaxed)
    }

    /// Takes out what was recorded.
    pub(super) fn drain(&mut self, mut found: impl FnMut(Record<'_>)) {
        // Pairs with the kernel's barrier after it wrote the records.
        let head = self.head().load(Ordering::Acquire);
        let length = head.wrapping_sub(self.tail);
        // Records are multiples of 8 bytes long, and no more than the ring holds.
        if length > DATA as u64 || !head.is_multiple_of(8) {
            found(Record::Lost(1));
        } else {
            let mut copy = std::mem::take(&mut self.copy);
            copy.clear();
            for at in (0..length).step_by(8) {
                copy.extend_from_slice(&self.word(self.tail.wrapping_add(at)).to_ne_bytes());
            }
            record::each(&copy, found);
            self.copy = copy;
        }
        self.tail = head & !7;
        // The loads above are done before the kernel may write there again.
        self.tail().store(self.tail, Ordering::Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, of this length, and no reference to it is left. It can fail
        // only for arguments that are no mapping.
        let unmapped = unsafe { munmap(self.map, self.page + DATA) };
        debug_assert!(unmapped.is_ok());
    }
}

fn open_event(cpu: u32, event: &Event) -> Result<OwnedFd, Errno> {
    let mut attr = perf_event_attr {
        type_: PERF_TYPE_TRACEPOINT,
        size: size_of::<perf_event_attr>() as u32,
        config: event.id,
        sample_type: u64::from(PERF_SAMPLE_TID | PERF_SAMPLE_TIME | PERF_SAMPLE_CPU | PERF_SAMPLE_RAW),
        clockid: libc::CLOCK_MONOTONIC_RAW,
        ..perf_event_attr::default()
    };
    attr.__bindgen_anon_1.sample_period = 1;
    attr.set_disabled(1);
    attr.set_use_clockid(1);
    attr.set_comm(u64::from(event.names));
    // Nobody waits for records, so nobody is to be woken before the ring is full.
    attr.set_watermark(1);
    attr.__bindgen_anon_2.wakeup_watermark = u32::MAX;
    let cpu = i32::try_from(cpu).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the attribute has the size it says; all processes on one CPU, no group.
    let fd = unsafe { sys::perf_event_open(&raw mut attr, -1, cpu, -1, PERF_FLAG_FD_CLOEXEC.into()) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Bytes of a page.
fn page_bytes() -> usize {
    // SAFETY: a number in, a number out.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}
