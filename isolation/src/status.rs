//! The status block: what an isolated thread and its observer say about it, in shared memory.
//!
//! Contract: the isolated thread writes its part with plain stores and the observer (the housekeeping
//! sampler) writes the interruptions; anybody who maps the block may read it at any time, without a
//! lock and without disturbing the thread. The log of breaches keeps the last [`LOG`]; counts keep all.
//! What a reader finds is checked, not trusted: a torn or foreign value is skipped.
#![allow(unsafe_code, reason = "atomics in shared memory; see each block")]

use crate::backend::Backend;
use crate::cause::{Breach, Cause, Detail, Interruptions, Sender};
use isoplane_memory::{Region, RegionConfig, RegionError};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Breaches that the log keeps.
pub const LOG: usize = 32;
/// Buckets of the histogram of slow-path visits: bucket `n` counts visits of 2^n to 2^(n+1)-1 ticks.
pub const BUCKETS: usize = 40;

/// What an isolated thread is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum State {
    /// Not isolated: not armed yet, disarmed, or switched off by `ONESHOT`.
    Off = 0,
    /// Isolated.
    Armed = 1,
    /// Visiting the kernel by permission.
    SlowPath = 2,
    /// Isolation was broken; the program has not seen it yet, or chose to stop.
    Broken = 3,
}

impl State {
    pub(crate) const fn from_u32(value: u32) -> Self {
        match value {
            1 => Self::Armed,
            2 => Self::SlowPath,
            3 => Self::Broken,
            _ => Self::Off,
        }
    }

    /// Its name for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Armed => "armed",
            Self::SlowPath => "slow path",
            Self::Broken => "broken",
        }
    }

    /// The state of a number, as statistics have it; `None` when no state has it.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        [Self::Off, Self::Armed, Self::SlowPath, Self::Broken]
            .into_iter()
            .find(|state| *state as u64 == number)
    }
}

/// One entry of the log; `seq` is odd while it is written.
#[repr(C)]
struct Entry {
    seq: AtomicU64,
    /// Cause in bits 0-7, slow path in bit 8, kind of detail in bits 16-23, CPU in bits 32-63.
    what: AtomicU64,
    a: AtomicU64,
    b: AtomicU64,
    arch: AtomicU64,
    tsc: AtomicU64,
    /// CPU and thread of the sender, each plus one in its half; its name; its function.
    sender: [AtomicU64; SENDER],
}

/// Words that a sender takes.
const SENDER: usize = 8;

/// A sender as words; all zero for none.
fn to_words(sender: Option<Sender>) -> [u64; SENDER] {
    let Some(Sender { cpu, pid, comm, function }) = sender else { return [0; SENDER] };
    let plus_one = |n: Option<u32>| n.map_or(0, |n| u64::from(n.saturating_add(1)));
    let mut words = [0; SENDER];
    words[0] = plus_one(cpu) | plus_one(pid) << 32;
    let text = comm.chunks_exact(8).chain(function.chunks_exact(8));
    for (word, bytes) in words[1..].iter_mut().zip(text) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    words
}

fn from_words(words: [u64; SENDER]) -> Option<Sender> {
    if words == [0; SENDER] {
        return None;
    }
    let less_one = |n: u64| (n as u32).checked_sub(1);
    let mut sender = Sender { cpu: less_one(words[0]), pid: less_one(words[0] >> 32), ..Sender::default() };
    let text = sender.comm.chunks_exact_mut(8).chain(sender.function.chunks_exact_mut(8));
    for (bytes, word) in text.zip(&words[1..]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Some(sender)
}

/// The words of a block. All zero is a valid block: never armed.
#[repr(C, align(128))]
pub(crate) struct Words {
    // Written by the isolated thread.
    pub(crate) state: AtomicU32,
    pub(crate) backend: AtomicU32,
    pub(crate) cpu: AtomicU32,
    pub(crate) pid: AtomicU32,
    pub(crate) tid: AtomicU32,
    /// 1 when page faults are enforced.
    pub(crate) sees_faults: AtomicU32,
    /// Times armed.
    pub(crate) armed: AtomicU64,
    pub(crate) visits: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) visit_ticks: AtomicU64,
    pub(crate) longest_visit: AtomicU64,
    /// Served from the arena, bytes of it in use, and requests that did not fit.
    pub(crate) allocations: AtomicU64,
    pub(crate) arena_in_use: AtomicU64,
    pub(crate) arena_exhausted: AtomicU64,
    /// Diagnostic records written and lost.
    pub(crate) records: AtomicU64,
    pub(crate) records_lost: AtomicU64,
    /// Interrupts that came within the settle window: quiesced again, no breaches.
    pub(crate) races: AtomicU64,
    pub(crate) visit_histogram: [AtomicU64; BUCKETS],
    pub(crate) allowed: [AtomicU64; Cause::COUNT],
    pub(crate) breaches: [AtomicU64; Cause::COUNT],
    logged: AtomicU64,
    /// Breaches that were reported, of those logged.
    reported: AtomicU64,
    log: [Entry; LOG],
    _apart: [u8; 128],
    // Written by the observer.
    interruptions: [AtomicU64; Cause::COUNT],
    pub(crate) samples: AtomicU64,
}

/// Counts one more; one writer, so no locked instruction is needed.
#[inline(always)]
pub(crate) fn bump(word: &AtomicU64, n: u64) {
    word.store(word.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// What `seq` is once the breach with this number is written. Wraps: the number may be a lie.
const fn sequence(number: u64) -> u64 {
    number.wrapping_mul(2).wrapping_add(2)
}

impl Words {
    /// Appends a breach and counts it. Async-signal-safe: stores only.
    pub(crate) fn record(&self, breach: &Breach) {
        bump(&self.breaches[breach.cause as usize], 1);
        let at = self.logged.load(Ordering::Relaxed);
        let entry = &self.log[(at % LOG as u64) as usize];
        let (kind, a, b, arch) = match breach.detail {
            Detail::Syscall { number, call_address, arch } => (1u64, number, call_address, u64::from(arch)),
            Detail::Fault { address, instruction } => (2, address, instruction, 0),
            Detail::At { instruction } => (3, instruction, 0, 0),
            Detail::Signal { number, instruction } => (4, u64::from(number), instruction, 0),
            Detail::Interrupt { irq, instruction } => {
                (5, irq.map_or(0, |n| u64::from(n) + 1), instruction, 0)
            }
            Detail::Task { pid, instruction } => (6, u64::from(pid), instruction, 0),
            Detail::Moved { to, instruction } => (7, u64::from(to), instruction, 0),
            Detail::Unquiet { unmet } => (8, unmet, 0, 0),
        };
        let what = u64::from(breach.cause.number())
            | u64::from(breach.in_slow_path) << 8
            | kind << 16
            | u64::from(breach.cpu) << 32;
        entry.seq.store(sequence(at).wrapping_sub(1), Ordering::Relaxed);
        fence(Ordering::Release);
        entry.what.store(what, Ordering::Relaxed);
        entry.a.store(a, Ordering::Relaxed);
        entry.b.store(b, Ordering::Relaxed);
        entry.arch.store(arch, Ordering::Relaxed);
        entry.tsc.store(breach.tsc, Ordering::Relaxed);
        for (word, value) in entry.sender.iter().zip(to_words(breach.sender)) {
            word.store(value, Ordering::Relaxed);
        }
        entry.seq.store(sequence(at), Ordering::Release);
        self.logged.store(at.wrapping_add(1), Ordering::Release);
    }

    /// The breach with this number, while the log still has it whole.
    fn logged(&self, number: u64) -> Option<Breach> {
        let entry = &self.log[(number % LOG as u64) as usize];
        if entry.seq.load(Ordering::Acquire) != sequence(number) {
            return None;
        }
        let what = entry.what.load(Ordering::Relaxed);
        let (a, b) = (entry.a.load(Ordering::Relaxed), entry.b.load(Ordering::Relaxed));
        let (arch, tsc) = (entry.arch.load(Ordering::Relaxed), entry.tsc.load(Ordering::Relaxed));
        let sender = read(&entry.sender);
        fence(Ordering::Acquire);
        if entry.seq.load(Ordering::Relaxed) != sequence(number) {
            return None;
        }
        let detail = match (what >> 16) as u8 {
            1 => Detail::Syscall { number: a, call_address: b, arch: arch as u32 },
            2 => Detail::Fault { address: a, instruction: b },
            3 => Detail::At { instruction: a },
            4 => Detail::Signal { number: a as u32, instruction: b },
            5 => Detail::Interrupt { irq: (a as u32).checked_sub(1), instruction: b },
            6 => Detail::Task { pid: a as u32, instruction: b },
            7 => Detail::Moved { to: a as u32, instruction: b },
            8 => Detail::Unquiet { unmet: a },
            _ => return None,
        };
        Some(Breach {
            cause: Cause::from_number(what as u8)?,
            detail,
            cpu: (what >> 32) as u32,
            tsc,
            in_slow_path: what & 1 << 8 != 0,
            sender: from_words(sender),
        })
    }
}

/// A status block in shared memory. Clone it into whoever wants to look.
#[derive(Debug, Clone)]
pub struct Status {
    words: NonNull<Words>,
    _region: Arc<Region>,
}

// SAFETY: only atomics are reached, in a region that the value keeps mapped.
unsafe impl Send for Status {}
// SAFETY: as above.
unsafe impl Sync for Status {}

/// What a status block said at one time. Counts are since the block was made: they go on over arming
/// again and over restarts of the worker.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Snapshot {
    /// The backend of the thread that prepared last; `None` before the first time.
    pub backend: Option<Backend>,
    /// Page faults are breaches there; otherwise only an observer counts them.
    pub sees_page_faults: bool,
    /// What the thread is doing.
    pub state: State,
    /// Times it was armed.
    pub armed: u64,
    /// Visits to the slow path.
    pub slow_path_visits: u64,
    /// Visits that the budget refused.
    pub slow_path_refused: u64,
    /// Time spent in the slow path, in ticks of the TSC.
    pub slow_path_ticks: u64,
    /// Longest visit, in ticks.
    pub longest_visit_ticks: u64,
    /// Visits by length: bucket `n` counts those of 2^n to 2^(n+1)-1 ticks.
    pub visit_histogram: [u64; BUCKETS],
    /// Breaches by cause.
    pub breaches: Interruptions,
    /// Kernel entries that the mode allowed, as far as the backend sees them.
    pub allowed: Interruptions,
    /// Interrupts that came within the settle window after arming or after an allowed entry, so that they may
    /// have been on their way before: the CPU was quiesced again, and they are no breaches. Only the backend
    /// `task-isolation` sees them.
    pub races: u64,
    /// Kernel entries that the observer saw.
    pub interruptions: Interruptions,
    /// How often the observer has looked: while this is 0 nobody has, and no interruptions mean nothing.
    pub samples: u64,
    /// Allocations served from the arena.
    pub allocations: u64,
    /// Bytes of the arena in use, as of the last allocation or visit.
    pub arena_in_use: u64,
    /// Allocations that did not fit the arena, and failed.
    pub arena_exhausted: u64,
    /// Diagnostic records written.
    pub records: u64,
    /// Diagnostic records lost because their ring was full.
    pub records_lost: u64,
}

fn read<const N: usize>(words: &[AtomicU64; N]) -> [u64; N] {
    std::array::from_fn(|at| words[at].load(Ordering::Relaxed))
}

impl Status {
    /// Bytes of a block.
    pub const BYTES: usize = size_of::<Words>();

    /// A block in a region of its own.
    ///
    /// # Errors
    /// See [`RegionError`].
    pub fn create(name: &str) -> Result<Self, RegionError> {
        let config = RegionConfig::new(&format!("isoplane.status.{name}"), Self::BYTES);
        let region = Region::create(&config)?;
        let words = region
            .slice::<[u64; Self::BYTES / 8]>(0, 1)
            .ok_or_else(|| RegionError::Size { name: name.to_owned(), bytes: Self::BYTES })?
            .cast();
        Ok(Self { words, _region: region })
    }

    pub(crate) fn words(&self) -> &Words {
        // SAFETY: the region holds one block at its start, page-aligned and zeroed, and is mapped while
        // this value lives; only shared references to atomics are ever made.
        unsafe { self.words.as_ref() }
    }

    /// Reads the block.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let w = self.words();
        let get = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Snapshot {
            backend: self.backend(),
            sees_page_faults: self.sees_page_faults(),
            state: self.state(),
            armed: get(&w.armed),
            slow_path_visits: get(&w.visits),
            slow_path_refused: get(&w.refused),
            slow_path_ticks: get(&w.visit_ticks),
            longest_visit_ticks: get(&w.longest_visit),
            visit_histogram: read(&w.visit_histogram),
            breaches: read(&w.breaches).into(),
            allowed: read(&w.allowed).into(),
            races: get(&w.races),
            interruptions: read(&w.interruptions).into(),
            samples: get(&w.samples),
            allocations: get(&w.allocations),
            arena_in_use: get(&w.arena_in_use),
            arena_exhausted: get(&w.arena_exhausted),
            records: get(&w.records),
            records_lost: get(&w.records_lost),
        }
    }

    /// What the thread is doing.
    #[must_use]
    pub fn state(&self) -> State {
        State::from_u32(self.words().state.load(Ordering::Acquire))
    }

    /// Process and thread that armed last; zeroes before the first time.
    #[must_use]
    pub fn thread(&self) -> (u32, u32) {
        let w = self.words();
        (w.pid.load(Ordering::Acquire), w.tid.load(Ordering::Acquire))
    }

    /// The CPU that it was armed on last; `None` when it was not pinned, or not armed yet.
    #[must_use]
    pub fn cpu(&self) -> Option<u32> {
        let armed = self.words().armed.load(Ordering::Acquire) != 0;
        Some(self.words().cpu.load(Ordering::Acquire)).filter(|cpu| armed && *cpu != u32::MAX)
    }

    /// Breaches recorded so far: the number that the next one will have.
    #[must_use]
    pub fn breach_count(&self) -> u64 {
        self.words().logged.load(Ordering::Acquire)
    }

    /// Number of the first breach that has not been reported.
    #[must_use]
    pub fn reported(&self) -> u64 {
        self.words().reported.load(Ordering::Acquire).min(self.breach_count())
    }

    /// Says that all breaches so far were reported: by the isolated thread itself, or by its supervisor
    /// when it is dead.
    pub fn set_reported(&self) {
        self.words().reported.store(self.breach_count(), Ordering::Release);
    }

    /// The backend of the thread that prepared last; `None` before the first time.
    #[must_use]
    pub fn backend(&self) -> Option<Backend> {
        Backend::from_number(self.words().backend.load(Ordering::Acquire)).filter(|b| *b != Backend::Auto)
    }

    /// Whether page faults are breaches there; otherwise only an observer counts them.
    #[must_use]
    pub fn sees_page_faults(&self) -> bool {
        self.words().sees_faults.load(Ordering::Acquire) != 0
    }

    /// The breaches from number `since` on that the log still has, each with its number.
    #[must_use]
    pub fn breaches(&self, since: u64) -> Vec<(u64, Breach)> {
        let end = self.breach_count();
        let start = since.max(end.saturating_sub(LOG as u64));
        (start..end).filter_map(|n| self.words().logged(n).map(|breach| (n, breach))).collect()
    }

    /// Adds interruptions that an observer saw. There is one observer.
    pub fn add_interruptions(&self, seen: &Interruptions) {
        for (cause, n) in seen.iter().filter(|(_, n)| *n != 0) {
            bump(&self.words().interruptions[cause as usize], n);
        }
        bump(&self.words().samples, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_keeps_the_last_and_the_counts_keep_all() {
        let status = Status::create("test").unwrap();
        let breach = |n: u64| Breach {
            cause: Cause::PageFault,
            detail: Detail::Fault { address: n, instruction: n + 1 },
            cpu: 7,
            tsc: n,
            in_slow_path: n % 2 == 1,
            sender: None,
        };
        for n in 0..100 {
            status.words().record(&breach(n));
        }
        assert_eq!(status.snapshot().breaches.of(Cause::PageFault), 100);
        let log = status.breaches(0);
        assert_eq!(log.len(), LOG);
        assert_eq!(log.first().unwrap(), &(68, breach(68)));
        assert_eq!(status.breaches(99), [(99, breach(99))]);
        assert!(status.breaches(100).is_empty());
    }

    /// Whoever shares the block may have written anything into it.
    #[test]
    fn counts_that_are_lies_are_read_without_harm() {
        let status = Status::create("test").unwrap();
        let detail = Detail::At { instruction: 2 };
        let breach =
            Breach { cause: Cause::Signal, detail, cpu: 3, tsc: 4, in_slow_path: false, sender: None };
        for logged in [u64::MAX, u64::MAX / 2, u64::MAX - 40] {
            status.words().logged.store(logged, Ordering::Relaxed);
            status.words().reported.store(u64::MAX, Ordering::Relaxed);
            assert!(status.breaches(0).is_empty());
            assert_eq!(status.reported(), logged);
            status.words().record(&breach);
            assert_eq!(status.breach_count(), logged.wrapping_add(1));
            status.set_reported();
        }
    }

    #[test]
    fn each_detail_survives_the_log() {
        let status = Status::create("test").unwrap();
        let details = [
            Detail::Syscall { number: 39, call_address: 0x1000, arch: 0xc000_003e },
            Detail::Fault { address: u64::MAX, instruction: 1 },
            Detail::At { instruction: 2 },
            Detail::Signal { number: 10, instruction: 3 },
            Detail::Interrupt { irq: None, instruction: 4 },
            Detail::Interrupt { irq: Some(0), instruction: 5 },
            Detail::Task { pid: 77, instruction: 6 },
            Detail::Moved { to: 5, instruction: 7 },
            Detail::Unquiet { unmet: 1 << 63 | 1 },
        ];
        let mut function = [b'f'; 40];
        function[39] = 0;
        let known = Sender { cpu: Some(0), pid: Some(77), comm: *b"a name of sixte\0", function };
        let senders = [None, Some(known), Some(Sender { cpu: None, pid: Some(0), ..known })];
        for (detail, sender) in details.into_iter().flat_map(|detail| senders.map(|sender| (detail, sender)))
        {
            let breach =
                Breach { cause: Cause::Unknown, detail, cpu: 3, tsc: 4, in_slow_path: false, sender };
            let number = status.breach_count();
            status.words().record(&breach);
            assert_eq!(status.breaches(number), [(number, breach)]);
        }
    }

    /// A reader beside the writer gets whole entries or none: never one made of two.
    #[test]
    fn a_concurrent_reader_sees_no_torn_breach() {
        const N: u64 = 200_000;
        let status = Status::create("test").unwrap();
        let breach = |n: u64| Breach {
            cause: Cause::ALL[(n % Cause::COUNT as u64) as usize],
            detail: match n % 3 {
                0 => Detail::Syscall { number: n, call_address: !n, arch: n as u32 },
                1 => Detail::Fault { address: n, instruction: !n },
                _ => Detail::At { instruction: n },
            },
            cpu: n as u32,
            tsc: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            in_slow_path: n % 2 == 1,
            sender: n.is_multiple_of(2).then(|| Sender {
                cpu: Some(n as u32),
                comm: [n as u8; 16],
                ..Sender::default()
            }),
        };
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..N).for_each(|n| status.words().record(&breach(n))));
            let mut last = 0;
            while !writer.is_finished() {
                for (number, seen) in status.breaches(last) {
                    assert!(number >= last);
                    assert_eq!(seen, breach(number));
                    last = number;
                }
            }
        });
        assert_eq!(status.breach_count(), N);
        assert_eq!(status.snapshot().breaches.total(), N);
        let log = status.breaches(0);
        assert_eq!(log.len(), LOG);
        assert!(log.iter().all(|(number, seen)| *seen == breach(*number)));
    }
}
