//! Traffic from one kernel to another, sent and verified by us: what crosses a forwarder under test.
//!
//! | flow | what it does |
//! |---|---|
//! | [`Flow::Echo`] | ICMP echo requests that the other kernel answers; every byte of the answer is checked |
//! | [`Flow::Datagrams`] | UDP requests that a server of ours checks and answers with other bytes, of all sizes |
//! | [`Flow::Bulk`] | one TCP connection, both ways at full speed; every byte is checked |
//! | [`Flow::Frames`] | Ethernet frames between two stations of any kind: see [`frames`] |
//!
//! Contract: at most a *window* of packets (or bytes) of a flow is on its way at any time, so a
//! forwarder and rings that keep up lose nothing. Nothing waits without a limit: what has no answer
//! after [`PATIENCE`] counts as lost, and [`Traffic::stop`] returns within about [`LAST_WORD`] whatever
//! happened to the path. Flows run in threads of the calling process, inside the two namespaces.

mod bulk;
mod content;
mod datagrams;
mod echo;
mod exchange;
pub mod frames;

use crate::{LabError, Namespace};
use hdrhistogram::Histogram;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// A request without an answer for this long is lost. Long, since a busy machine may let a thread wait
/// for its CPU, and that is no loss.
pub const PATIENCE: Duration = Duration::from_secs(4);

/// Longest time that stopping flows wait for what is still on its way, unless told otherwise.
pub const LAST_WORD: Duration = Duration::from_secs(8);

/// How often a waiting thread looks whether it should stop.
const LOOK: Duration = Duration::from_millis(20);

/// A kind of traffic, and how much of it is on its way at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// ICMP echo (ICMPv6 between IPv6 addresses), payloads of 8 to `largest` bytes.
    Echo {
        /// Requests without an answer yet.
        window: usize,
        /// Largest payload in bytes, from 8 on; MTU less 28 (IPv4) or 48 (IPv6) fills a packet.
        largest: usize,
    },
    /// UDP requests and responses, payloads of 18 to `largest` bytes.
    Datagrams {
        /// Requests without a response yet.
        window: usize,
        /// Largest payload in bytes, from 18 on; MTU less 28 (IPv4) or 48 (IPv6) fills a packet.
        largest: usize,
    },
    /// A TCP connection, both ways.
    Bulk {
        /// Socket buffers in bytes: the most that is on its way in each direction.
        buffer: usize,
    },
    /// Ethernet requests and responses, started by [`Traffic::between`]; bodies of 18 to `largest`
    /// bytes.
    Frames {
        /// Requests without a response yet.
        window: usize,
        /// Largest body in bytes, from 18 on.
        largest: usize,
    },
}

impl Flow {
    /// The protocol's usual name.
    #[must_use]
    pub const fn protocol(&self) -> &'static str {
        match self {
            Self::Echo { .. } => "ICMP",
            Self::Datagrams { .. } => "UDP",
            Self::Bulk { .. } => "TCP",
            Self::Frames { .. } => "Ethernet",
        }
    }
}

/// One end of a flow.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint<'a> {
    /// Where it is.
    pub namespace: &'a Namespace,
    /// An address of it.
    pub address: IpAddr,
}

/// What a flow did so far. A *message* is an echo request, a datagram, or for TCP one write or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Messages sent: requests, or writes of both ends.
    pub sent: u64,
    /// Bytes in them, without headers.
    pub sent_bytes: u64,
    /// Messages that came back, or were read, with every byte as it should be.
    pub verified: u64,
    /// Bytes in the verified messages, without headers.
    pub verified_bytes: u64,
    /// Requests without an answer in time; for TCP, bytes that were sent and never read.
    pub lost: u64,
    /// Messages with wrong bytes, at either end.
    pub corrupt: u64,
    /// Answers that came twice, or after they were counted as lost.
    pub late: u64,
    /// Segments that TCP had to send again.
    pub retransmitted: u64,
}

/// What a flow did, and how long answers took.
#[derive(Clone)]
pub struct FlowReport {
    /// The flow.
    pub flow: Flow,
    /// Its counts.
    pub counts: Counts,
    /// Round-trip times in nanoseconds; empty for TCP.
    pub round_trips: Histogram<u64>,
    /// Socket errors, each once.
    pub errors: Vec<String>,
}

impl std::fmt::Debug for FlowReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowReport")
            .field("flow", &self.flow)
            .field("counts", &self.counts)
            // A histogram shows all of its thousands of buckets.
            .field("round_trips", &self.round_trips.len())
            .field("errors", &self.errors)
            .finish()
    }
}

impl FlowReport {
    /// Something came through, nothing was lost or corrupt, and no socket failed.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.counts.verified > 0
            && self.counts.lost == 0
            && self.counts.corrupt == 0
            && self.errors.is_empty()
    }
}

/// Flows that are running.
#[derive(Debug)]
pub struct Traffic {
    flows: Vec<Arc<Meter>>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<Stop>,
}

/// What tells flows to stop.
#[derive(Debug, Default)]
struct Stop {
    asked: AtomicBool,
    /// Milliseconds that they may wait for what is on its way.
    last_word_ms: AtomicU64,
}

/// What the threads of one flow share with the one who asks.
pub(crate) struct Meter {
    flow: Flow,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    verified: AtomicU64,
    verified_bytes: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) corrupt: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) retransmitted: AtomicU64,
    round_trips: Mutex<Histogram<u64>>,
    errors: Mutex<Vec<String>>,
    stop: Arc<Stop>,
    /// The client expects nothing any more.
    finished: AtomicBool,
}

/// Longest round trip that is told from longer ones.
const LONGEST_NS: u64 = 60_000_000_000;

fn histogram() -> Histogram<u64> {
    // 1 ns to a minute with three digits: bounds that the crate accepts.
    Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("constant bounds are valid")
}

impl std::fmt::Debug for Meter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.report().fmt(f)
    }
}

impl Meter {
    fn new(flow: Flow, stop: Arc<Stop>) -> Self {
        Self {
            flow,
            sent: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            verified_bytes: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            late: AtomicU64::new(0),
            retransmitted: AtomicU64::new(0),
            round_trips: Mutex::new(histogram()),
            errors: Mutex::new(Vec::new()),
            stop,
            finished: AtomicBool::new(false),
        }
    }

    pub(crate) fn finished(&self) -> bool {
        self.finished.load(Ordering::Relaxed)
    }

    pub(crate) fn finish(&self) {
        self.finished.store(true, Ordering::Relaxed);
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.asked.load(Ordering::Acquire)
    }

    /// How long to wait for what is on its way, once [`Meter::stopping`] says yes.
    pub(crate) fn last_word(&self) -> Duration {
        Duration::from_millis(self.stop.last_word_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn count(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn sent(&self, bytes: usize) {
        Self::count(&self.sent, 1);
        Self::count(&self.sent_bytes, bytes as u64);
    }

    pub(crate) fn verified(&self, bytes: usize) {
        Self::count(&self.verified, 1);
        Self::count(&self.verified_bytes, bytes as u64);
    }

    pub(crate) fn round_trip(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.round_trips.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(nanos.max(1));
    }

    /// Notes an error once.
    pub(crate) fn error(&self, what: &str, error: &std::io::Error) {
        let text = format!("{} {what}: {error}", self.flow.protocol());
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if !errors.contains(&text) {
            errors.push(text);
        }
    }

    fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            sent: read(&self.sent),
            sent_bytes: read(&self.sent_bytes),
            verified: read(&self.verified),
            verified_bytes: read(&self.verified_bytes),
            lost: read(&self.lost),
            corrupt: read(&self.corrupt),
            late: read(&self.late),
            retransmitted: read(&self.retransmitted),
        }
    }

    fn report(&self) -> FlowReport {
        FlowReport {
            flow: self.flow,
            counts: self.counts(),
            round_trips: self.round_trips.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            errors: self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

impl Traffic {
    /// Starts `flows`, each from `client` to a server at `server`. Sockets are opened before this
    /// returns, so what cannot work at all is said here.
    ///
    /// # Errors
    /// When sockets or threads cannot be made; what had begun is stopped again.
    pub fn start(client: Endpoint<'_>, server: Endpoint<'_>, flows: &[Flow]) -> Result<Self, LabError> {
        let stop = Arc::new(Stop::default());
        let mut traffic = Self { flows: Vec::new(), threads: Vec::new(), stop };
        for flow in flows {
            let meter = Arc::new(Meter::new(*flow, Arc::clone(&traffic.stop)));
            traffic.flows.push(Arc::clone(&meter));
            let threads = &mut traffic.threads;
            match *flow {
                Flow::Echo { window, largest } => {
                    echo::start(client, server, window, largest, &meter, threads)?;
                }
                Flow::Datagrams { window, largest } => {
                    datagrams::start(client, server, window, largest, &meter, threads)?;
                }
                Flow::Bulk { buffer } => bulk::start(client, server, buffer, &meter, threads)?,
                Flow::Frames { .. } => {
                    let source = std::io::ErrorKind::Unsupported.into();
                    return Err(LabError::Socket { what: "frames between kernels", source });
                }
            }
        }
        Ok(traffic)
    }

    /// Starts a flow of Ethernet frames from one station to another, neither of which needs a kernel.
    ///
    /// # Errors
    /// When threads cannot be made.
    pub fn between(
        client: impl frames::Station + 'static,
        server: impl frames::Station + 'static,
        window: usize,
        largest: usize,
    ) -> Result<Self, LabError> {
        let stop = Arc::new(Stop::default());
        let meter = Arc::new(Meter::new(Flow::Frames { window, largest }, Arc::clone(&stop)));
        let mut traffic = Self { flows: vec![Arc::clone(&meter)], threads: Vec::new(), stop };
        frames::start(client, server, window, largest, &meter, &mut traffic.threads)?;
        Ok(traffic)
    }

    /// What each flow did so far, in the order in which they were asked for.
    #[must_use]
    pub fn counts(&self) -> Vec<(Flow, Counts)> {
        self.flows.iter().map(|meter| (meter.flow, meter.counts())).collect()
    }

    /// Full reports so far.
    #[must_use]
    pub fn reports(&self) -> Vec<FlowReport> {
        self.flows.iter().map(|meter| meter.report()).collect()
    }

    /// Sends nothing new, waits for what is on its way, and says what was done. Afterwards the path is
    /// silent.
    #[must_use]
    pub fn stop(self) -> Vec<FlowReport> {
        self.stop_within(LAST_WORD)
    }

    /// As [`Traffic::stop`], but what is not here after `last_word` (an hour at most) counts as lost.
    #[must_use]
    pub fn stop_within(mut self, last_word: Duration) -> Vec<FlowReport> {
        self.end(last_word);
        self.reports()
    }

    fn end(&mut self, last_word: Duration) {
        let millis = u64::try_from(last_word.as_millis()).unwrap_or(u64::MAX).min(3_600_000);
        self.stop.last_word_ms.store(millis, Ordering::Relaxed);
        self.stop.asked.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a traffic thread panicked");
            }
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// All round trips of the reports in one histogram.
#[must_use]
pub fn round_trips(reports: &[FlowReport]) -> Histogram<u64> {
    let mut all = histogram();
    for report in reports {
        // All have the same bounds, so adding cannot fail.
        let _ = all.add(&report.round_trips);
    }
    all
}
