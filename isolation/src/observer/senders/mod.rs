//! Who sends IPIs to isolated CPUs: process and kernel function, where tracepoints may be read.
//!
//! Contract: perf events on the *housekeeping* CPUs (all that are online but the watched ones) record
//! each function call that is queued for a watched CPU, and each reschedule IPI sent to one; the kernel
//! filters by target before anything is written. What a watched CPU does is not recorded. Everything
//! hangs on file descriptors, so nothing is left behind by a process that is killed.
//!
//! **Open before workers arm, close after they disarmed**: switching a tracepoint on or off patches
//! kernel text, which sends an IPI to every CPU, the watched ones too.
//!
//! | tracepoint | filter | what it says |
//! |---|---|---|
//! | `csd:csd_queue_cpu` (Linux 6.5) | target CPU | a function call was queued: sender, call site, function. An IPI follows if the queue was empty, so there may be fewer interrupts than calls |
//! | `ipi:ipi_send_cpu` (Linux 6.4) | target CPU, no callback | a reschedule IPI: sender and call site. Those with a callback are function-call IPIs, known from the other one, as are all of `ipi:ipi_send_cpumask` |
//!
//! The process is the one that ran on the sending CPU. When the kernel sent from an interrupt
//! ([`Sender::in_interrupt`]), that process was merely interrupted.
//!
//! Needs `CAP_PERFMON` (or `kernel.perf_event_paranoid` = -1), and tracefs for the numbers and formats
//! of the tracepoints: the mounted one, or (with `CAP_SYS_ADMIN`) one of our own that is mounted
//! nowhere and vanishes with its descriptor. CPUs that come online later are not covered.

mod format;
mod perf;
mod record;
mod symbols;
mod tracefs;

use crate::host::CpuSet;
use format::Tracepoint;
use nix::errno::Errno;
use perf::{Event, Ring};
use record::Record;
use std::collections::HashMap;
use std::fmt;
use symbols::Symbols;
use tracefs::Tracefs;

/// Different senders that are told apart in one interval, or in one [`SenderTally`].
const MOST_SENDERS: usize = 1024;
/// Names of threads that are remembered, for those that are dead when they are asked about.
const MOST_NAMES: usize = 4096;

const CALLS: &str = "csd/csd_queue_cpu";
const RESCHEDULES: &str = "ipi/ipi_send_cpu";

/// Why senders of IPIs cannot be named here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendersUnavailable {
    /// Neither a mounted tracefs nor one of our own.
    #[error(
        "senders of IPIs are not named: tracefs is not mounted on /sys/kernel/tracing and cannot be opened \
         without mounting ({errno}); run with CAP_SYS_ADMIN, or mount it: mount -t tracefs tracefs \
         /sys/kernel/tracing"
    )]
    Tracefs {
        /// What the kernel said.
        errno: Errno,
    },
    /// A tracepoint is missing or may not be read.
    #[error(
        "senders of IPIs are not named: tracepoint {name} cannot be read ({reason}); it needs Linux 6.5 with \
         CONFIG_EVENT_TRACING, and root to read tracefs"
    )]
    Tracepoint {
        /// Its system and name.
        name: &'static str,
        /// Why not.
        reason: String,
    },
    /// A tracepoint has other fields than those that are known.
    #[error("senders of IPIs are not named: tracepoint {name} has no usable field {field} on this kernel")]
    Format {
        /// Its system and name.
        name: &'static str,
        /// The field that is missing or has another size.
        field: &'static str,
    },
    /// The kernel refused the event.
    #[error(
        "senders of IPIs are not named: {step} on CPU {cpu}: {errno}; run with CAP_PERFMON, or set \
         kernel.perf_event_paranoid to -1"
    )]
    Perf {
        /// What was refused.
        step: &'static str,
        /// The housekeeping CPU.
        cpu: u32,
        /// What the kernel said.
        errno: Errno,
    },
    /// No CPU is online but the watched ones.
    #[error("senders of IPIs are not named: all CPUs are watched, so none is left to record on")]
    NoHousekeeping,
    /// The CPUs that are online are not known.
    #[error("senders of IPIs are not named: /sys/devices/system/cpu/online cannot be read: {reason}")]
    Online {
        /// Why not.
        reason: String,
    },
}

/// What was asked of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Asked {
    /// To run a function.
    FunctionCall,
    /// To look at its run queue.
    Reschedule,
}

/// One sender of IPIs, and how many it sent.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sender {
    /// The watched CPU.
    pub to: u32,
    /// The CPU that the last one came from.
    pub from: u32,
    /// The process that ran there; 0 is the idle task.
    pub pid: u32,
    /// Its thread.
    pub tid: u32,
    /// The thread's name (its process's, when it ended and never had one of its own that was seen);
    /// empty when both ended before anybody could ask.
    pub comm: String,
    /// What was asked.
    pub asked: Asked,
    /// The kernel function that was to run, such as `flush_tlb_func`; its address when
    /// `kernel.kptr_restrict` hides the names; `None` for a reschedule.
    pub function: Option<String>,
    /// Where in the kernel it was asked for.
    pub callsite: String,
    /// The kernel was handling an interrupt or a soft interrupt, so the process is not the cause.
    pub in_interrupt: bool,
    /// How many.
    pub count: u64,
    /// When the last one was sent: nanoseconds of CLOCK_MONOTONIC_RAW.
    pub last: u64,
}

impl Sender {
    fn same(&self, other: &Self) -> bool {
        self.to == other.to
            && (self.pid, self.tid, self.asked, self.in_interrupt)
                == (other.pid, other.tid, other.asked, other.in_interrupt)
            && self.comm == other.comm
            && self.function == other.function
            && self.callsite == other.callsite
    }
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to, comm, pid, tid, count, callsite, .. } = self;
        let name = if comm.is_empty() { "(ended)" } else { comm };
        let interrupt = if self.in_interrupt { ", in an interrupt" } else { "" };
        match &self.function {
            Some(function) => write!(f, "{count} x {function} asked of CPU {to}")?,
            None => write!(f, "{count} x reschedule of CPU {to}")?,
        }
        write!(f, " by {name} (process {pid}, thread {tid}{interrupt}) at {callsite}")
    }
}

/// Senders with their sums. The first 1024 different ones are told apart, the rest is counted together.
#[derive(Debug, Clone, Default)]
pub struct SenderTally {
    senders: Vec<Sender>,
    others: u64,
}

impl SenderTally {
    /// Adds what was found.
    pub fn add<'a>(&mut self, senders: impl IntoIterator<Item = &'a Sender>) {
        for sender in senders {
            if let Some(known) = self.senders.iter_mut().find(|known| known.same(sender)) {
                known.count = known.count.saturating_add(sender.count);
                (known.from, known.last) = (sender.from, sender.last);
            } else if self.senders.len() < MOST_SENDERS {
                self.senders.push(sender.clone());
            } else {
                self.others = self.others.saturating_add(sender.count);
            }
        }
    }

    /// Those that sent most, at most `n`.
    #[must_use]
    pub fn top(&self, n: usize) -> Vec<Sender> {
        let mut all: Vec<_> = self.senders.iter().collect();
        all.sort_by_key(|sender| std::cmp::Reverse(sender.count));
        all.into_iter().take(n).cloned().collect()
    }

    /// IPIs of senders that did not fit.
    #[must_use]
    pub const fn others(&self) -> u64 {
        self.others
    }
}

/// What makes two samples the same, before names are looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    to: u32,
    pid: u32,
    tid: u32,
    asked: Asked,
    function: u64,
    callsite: u64,
    in_interrupt: bool,
}

/// The tracer.
#[derive(Debug)]
pub struct Senders {
    rings: Vec<Ring>,
    calls: Tracepoint,
    reschedules: Tracepoint,
    watched: Vec<u32>,
    symbols: Symbols,
    names: HashMap<u32, String>,
    lost: u64,
}

impl Senders {
    /// Starts to record who sends IPIs to these CPUs, from all others that are online.
    ///
    /// # Errors
    /// When that cannot be done here: why, and what to do about it.
    pub fn open(watched: &[u32]) -> Result<Self, SendersUnavailable> {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online")
            .map_err(|error| error.to_string())
            .and_then(|text| {
                CpuSet::parse_list(&text, crate::host::MAX_CPUS - 1).map_err(|error| error.to_string())
            })
            .map_err(|reason| SendersUnavailable::Online { reason })?;
        let housekeeping: Vec<u32> = online.iter().filter(|cpu| !watched.contains(cpu)).collect();
        if housekeeping.is_empty() {
            return Err(SendersUnavailable::NoHousekeeping);
        }
        let tracefs = Tracefs::open()?;
        let calls = Tracepoint::read(&tracefs, CALLS, "func")?;
        let reschedules = Tracepoint::read(&tracefs, RESCHEDULES, "callback")?;
        let target = format::target(watched);
        let events = [
            Event { id: calls.id, filter: target.clone(), names: true },
            Event { id: reschedules.id, filter: format!("({target}) && callback == 0"), names: false },
        ];
        let rings =
            housekeeping.iter().map(|cpu| Ring::open(*cpu, &events)).collect::<Result<Vec<_>, _>>()?;
        rings.iter().try_for_each(Ring::enable)?;
        let symbols = Symbols::load();
        if symbols.is_empty() {
            tracing::warn!(
                "kernel addresses are hidden: senders of IPIs are named with addresses instead of functions; \
                 set kernel.kptr_restrict to 0 or 1, and run with CAP_SYSLOG"
            );
        }
        let watched = watched.to_vec();
        let (names, lost) = (HashMap::new(), 0);
        Ok(Self { rings, calls, reschedules, watched, symbols, names, lost })
    }

    /// The CPUs that are watched.
    #[must_use]
    pub fn watched(&self) -> &[u32] {
        &self.watched
    }

    /// IPIs that were not recorded or not told apart, because more came between two calls than there is
    /// room for.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether functions are named; otherwise there are only addresses.
    #[must_use]
    pub fn names_functions(&self) -> bool {
        !self.symbols.is_empty()
    }

    /// What was sent since the last call, those that sent most first.
    pub fn drain(&mut self) -> Vec<Sender> {
        let mut found: HashMap<Key, (u64, u32, u64)> = HashMap::new();
        let Self { rings, calls, reschedules, watched, names, lost, .. } = self;
        for ring in rings {
            ring.drain(|record| match record {
                Record::Sample(sample) => {
                    let kind = if calls.is(sample.raw) {
                        (&*calls, Asked::FunctionCall)
                    } else if reschedules.is(sample.raw) {
                        (&*reschedules, Asked::Reschedule)
                    } else {
                        return;
                    };
                    let Some(sent) = kind.0.parse(sample.raw) else { return };
                    if !watched.contains(&sent.target) {
                        return;
                    }
                    let key = Key {
                        to: sent.target,
                        pid: sample.pid,
                        tid: sample.tid,
                        asked: kind.1,
                        function: sent.function,
                        callsite: sent.callsite,
                        in_interrupt: sent.in_interrupt,
                    };
                    if found.len() < MOST_SENDERS || found.contains_key(&key) {
                        let entry = found.entry(key).or_default();
                        *entry = (entry.0 + 1, sample.cpu, sample.time);
                    } else {
                        *lost += 1;
                    }
                }
                Record::Name { tid, comm } => {
                    if names.len() >= MOST_NAMES && !names.contains_key(&tid) {
                        names.clear();
                    }
                    names.insert(tid, comm);
                }
                Record::Lost(n) => *lost = lost.saturating_add(n),
            });
        }
        let mut found: Vec<_> = found.into_iter().collect();
        found.sort_by_key(|(key, (count, ..))| (std::cmp::Reverse(*count), *key));
        found.into_iter().map(|(key, (count, from, last))| self.sender(key, count, from, last)).collect()
    }

    fn sender(&self, key: Key, count: u64, from: u32, last: u64) -> Sender {
        let Key { to, pid, tid, asked, in_interrupt, .. } = key;
        let function = (asked == Asked::FunctionCall).then(|| self.symbols.name(key.function));
        let callsite = self.symbols.name(key.callsite);
        Sender {
            to,
            from,
            pid,
            tid,
            comm: self.comm(pid, tid),
            asked,
            function,
            callsite,
            in_interrupt,
            count,
            last,
        }
    }

    /// The name of a thread: as it is now; as it was last set on a housekeeping CPU, if it is dead; its
    /// process's name.
    fn comm(&self, pid: u32, tid: u32) -> String {
        if tid == 0 {
            return "idle".to_owned();
        }
        let read = |path: String| {
            let comm = std::fs::read(path).ok()?;
            Some(String::from_utf8_lossy(comm.trim_ascii_end()).into_owned())
        };
        read(format!("/proc/{pid}/task/{tid}/comm"))
            .or_else(|| self.names.get(&tid).cloned())
            .or_else(|| read(format!("/proc/{pid}/comm")))
            .unwrap_or_default()
    }
}
