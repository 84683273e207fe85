//! `diag`: one log event of a worker, recorded in its ring, against `tracing-subscriber`'s formatter through
//! a buffered writer to a file.
//!
//! What is compared is what the thread that logs spends on it, from the macro on: the same macros, the same
//! events. Ours writes a binary record and leaves the formatting to a drainer on another CPU, which is the
//! point; the ring is emptied between batches, outside of the measured time. The peer formats, takes its
//! lock, reads the clock and writes the file whenever its buffer is full. Each batch is timed by itself and
//! the median counts: an interrupted batch says nothing about either side.

use crate::comparison::{BenchError, Comparison, Sample};
use crate::report::median;
use isoplane_isolation::diagnostics::{Drainer, Recording, channel};
use isoplane_memory::Clock;
use std::collections::BTreeMap;
use std::fmt;
use std::hint::black_box;
use std::io::BufWriter;
use std::sync::Mutex;
use std::time::Instant;
use tracing::level_filters::LevelFilter;

/// Events that are timed together.
pub const BATCH: u64 = 1024;
/// Batches of one measurement; as many tenths again run before.
const BATCHES: usize = 2000;

/// What is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// Three integers.
    Integers,
    /// A value that is formatted by its `Display`.
    Formatted,
    /// A message with an argument.
    Message,
}

/// An address, as a dataplane would show one.
struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [b':'; 17];
        for (byte, to) in self.0.iter().zip(text.chunks_mut(3)) {
            to[0] = DIGITS[usize::from(byte >> 4)];
            to[1] = DIGITS[usize::from(byte & 15)];
        }
        f.write_str(std::str::from_utf8(&text).unwrap_or_default())
    }
}

impl Line {
    /// Logs a batch of events.
    #[inline(never)]
    pub fn batch(self) {
        match self {
            Self::Integers => {
                for n in 0..BATCH {
                    tracing::info!(port = black_box(3_u32), queue = black_box(-1_i64), n = black_box(n));
                }
            }
            Self::Formatted => {
                for n in 0..BATCH {
                    tracing::info!(from = %Mac(black_box([2, 0, 0, 0, 1, n as u8])));
                }
            }
            Self::Message => {
                for n in 0..BATCH {
                    tracing::info!("queue {} is full", black_box(n));
                }
            }
        }
    }

    /// Nanoseconds an event: batches in turn with `between`, which is not timed.
    fn measure(self, mut between: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
        let mut times = Vec::with_capacity(BATCHES);
        for batch in 0..BATCHES + BATCHES / 10 {
            let start = Instant::now();
            self.batch();
            let taken = start.elapsed();
            between()?;
            if batch >= BATCHES / 10 {
                times.push(taken.as_nanos() as f64 / BATCH as f64);
            }
        }
        Ok(median(&times))
    }
}

/// A recorder on this thread, and the drainer of its ring.
///
/// # Errors
/// See [`BenchError`].
pub fn recorder() -> Result<(Recording, Drainer), BenchError> {
    let (recorder, source) = channel("bench", 4096).map_err(|e| BenchError::ours("diag", e))?;
    let mut drainer = Drainer::new(Clock::tsc().ok()).budget(4096);
    drainer.add(source);
    let recorder = recorder.level(LevelFilter::INFO);
    Ok((recorder.install(0).map_err(|e| BenchError::ours("diag", e))?, drainer))
}

/// The comparison.
#[derive(Debug)]
pub struct Diag(pub Line);

impl Comparison for Diag {
    fn name(&self) -> &'static str {
        "diag"
    }

    fn case(&self) -> &'static str {
        match self.0 {
            Line::Integers => "integers",
            Line::Formatted => "formatted",
            Line::Message => "message",
        }
    }

    fn peer_name(&self) -> &'static str {
        "tracing-subscriber fmt, BufWriter, file"
    }

    fn unit(&self) -> &'static str {
        "Mevents/s"
    }

    fn packages(&self) -> &'static [&'static str] {
        &[]
    }

    fn ours(&self) -> Result<Sample, BenchError> {
        crate::pin(crate::FORWARDER_CPU)?;
        let (_recording, mut drainer) = recorder()?;
        let nanos = self.0.measure(|| {
            // Nobody listens to what comes out: `tracing` withholds events of a drainer that logs to its
            // own recorder.
            let report = tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), || {
                drainer.drain()
            });
            if report.events == BATCH && report.lost == 0 && report.malformed == 0 {
                return Ok(());
            }
            Err(BenchError::ours("diag", format!("a batch of {BATCH} came out as {report:?}")))
        })?;
        Ok(sample(nanos))
    }

    fn peer(&self) -> Result<Sample, BenchError> {
        let line = self.0;
        // On a thread of its own: the pinning and the subscriber end with it.
        let nanos = std::thread::spawn(move || {
            crate::pin(crate::FORWARDER_CPU)?;
            let file =
                tempfile::tempfile().map_err(|e| BenchError::Machine(format!("a file to log to: {e}")))?;
            let subscriber = tracing_subscriber::fmt()
                .with_ansi(false)
                .with_max_level(tracing::Level::INFO)
                .with_writer(Mutex::new(BufWriter::new(file)))
                .finish();
            tracing::subscriber::with_default(subscriber, || line.measure(|| Ok(())))
        });
        let nanos = nanos.join().map_err(|_| BenchError::Machine("the peer panicked".to_owned()))??;
        Ok(sample(nanos))
    }
}

fn sample(nanos: f64) -> Sample {
    Sample { rate: 1e3 / nanos, beside: BTreeMap::from([("ns_per_event".to_owned(), nanos)]) }
}
