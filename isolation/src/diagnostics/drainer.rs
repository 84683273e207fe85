//! The program's half: from records to ordinary events.
//!
//! Contract: runs on a housekeeping thread. Each call does bounded work, whatever a worker writes into its
//! ring; what makes no sense is counted and skipped. Events of a worker go to the drainer thread's own
//! dispatcher, in the order in which they were recorded, with their level, target and fields, and with
//! these attached:
//!
//! | field | what |
//! |---|---|
//! | `worker` | name of the channel |
//! | `cpu` | CPU that the recorder was installed for |
//! | `time` | when it happened, by the worker's TSC: RFC 3339, UTC, with nanoseconds |
//! | `tsc` | the counter itself, instead of `time`, where there is no [`Clock`] |
//! | `truncated` | `true` where the record was cut: a text is not whole, or fields are missing |

use super::decode::{Malformed, Record, Value};
use super::layout::{CALLSITES, DESCRIPTION, FIELDS, Head, PARTS, Slot};
use super::recorder::Lost;
use super::sites::{self, ATTACHED, NoSite, Site};
use isoplane_memory::Clock;
use isoplane_memory::ring::{Consumer, Mapped, RingMemory};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tracing::field;
use tracing::level_filters::LevelFilter;
use tracing::{Event, dispatcher};

/// Records of one source that one call takes, if nothing else is asked for.
const BUDGET: u32 = 1024;
/// How often a loss is reported at most.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// What one call of [`Drainer::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct DrainReport {
    /// Events that were taken out of the rings.
    pub events: u64,
    /// Events that their workers lost since the last call.
    pub lost: u64,
    /// Records that made no sense, or whose callsite is not known.
    pub malformed: u64,
    /// Incarnations of workers that started.
    pub started: u64,
    /// A ring has more records than the budget allowed.
    pub more: bool,
}

/// The program's half of a channel.
#[derive(Debug)]
pub struct Source {
    name: Box<str>,
    ring: Consumer<Slot>,
    head: Head,
    cpu: u64,
    incarnation: u64,
    known: Vec<Option<&'static Site>>,
    assembly: Assembly,
    /// Callsites that it may still add to those that the program knows.
    new_sites: u32,
    said_too_many: bool,
    /// Losses as last counted, and not yet reported.
    lost: Lost,
    unreported: u64,
    reported: Option<Instant>,
    corrupt: u64,
}

/// A description that is being put together.
#[derive(Debug, Default)]
struct Assembly {
    id: u16,
    next: u8,
    bytes: Vec<u8>,
}

impl Source {
    pub(super) fn new(name: &str, memory: Mapped<Slot>, head: Head) -> Self {
        Self {
            name: Box::from(name),
            ring: Consumer::new(memory),
            head,
            cpu: 0,
            incarnation: 0,
            known: vec![None; CALLSITES],
            assembly: Assembly::default(),
            new_sites: sites::MOST,
            said_too_many: false,
            lost: Lost::default(),
            unreported: 0,
            reported: None,
            corrupt: 0,
        }
    }

    /// Name of the worker.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Events that the worker recorded, as it says.
    #[must_use]
    pub fn recorded(&self) -> u64 {
        self.head.counters().recorded.load(Ordering::Relaxed)
    }

    /// Events that the worker lost, as it says.
    #[must_use]
    pub fn lost(&self) -> Lost {
        Lost::read(&self.head)
    }

    /// Number of the incarnation whose records were seen last; 0 before the first.
    #[must_use]
    pub const fn incarnation(&self) -> u64 {
        self.incarnation
    }

    #[cfg(test)]
    pub(super) const fn ring(&self) -> &Consumer<Slot> {
        &self.ring
    }

    #[cfg(test)]
    pub(super) const fn head(&self) -> &Head {
        &self.head
    }

    fn drain(&mut self, budget: u32, time: &Timescale, report: &mut DrainReport) {
        // Heals a consumer's index that somebody else has overwritten: the producer would stay stuck.
        self.ring.release(0);
        let available = self.ring.available(budget);
        if self.ring.corrupt() != self.corrupt {
            // The producer's index is a lie, so nothing says which slots hold records: starts anew there.
            self.corrupt = self.ring.corrupt();
            let memory = self.ring.memory();
            memory.store_consumer(memory.load_producer(Ordering::Acquire), Ordering::Release);
            self.ring.resync();
            report.malformed += 1;
            return;
        }
        for _ in 0..available.min(budget) {
            let slot = self.ring.read(0);
            self.ring.release(1);
            if self.record(&slot, time, report).is_err() {
                report.malformed += 1;
            }
        }
        report.more |= available > budget;
        self.count_losses(report);
    }

    fn record(&mut self, slot: &Slot, time: &Timescale, report: &mut DrainReport) -> Result<(), Malformed> {
        match Record::of(slot)? {
            Record::Start { incarnation, cpu } => {
                self.known.fill(None);
                self.assembly = Assembly::default();
                (self.incarnation, self.cpu) = (incarnation, cpu);
                report.started += 1;
                Ok(())
            }
            Record::Announce { id, part, parts, bytes } => self.announced(id, part, parts, bytes),
            Record::Event { id, tsc, truncated, fields } => {
                let site = self.known.get(usize::from(id)).copied().flatten().ok_or(Malformed)?;
                let mut values = [None; FIELDS];
                let mut whole = Ok(());
                for field in fields {
                    match field {
                        Ok((index, value)) if index < site.fields() => values[index] = Some(value),
                        // Its name did not fit the announcement.
                        Ok(_) if truncated => (),
                        _ => whole = Err(Malformed),
                    }
                }
                report.events += 1;
                self.emit(site, &values, truncated || whole.is_err(), time.of(tsc));
                whole
            }
        }
    }

    /// A part of a description. A worker writes all parts of one, in order.
    fn announced(&mut self, id: u16, part: u8, parts: u8, bytes: &[u8]) -> Result<(), Malformed> {
        let assembly = &mut self.assembly;
        if part == 0 {
            (assembly.id, assembly.next) = (id, 0);
            assembly.bytes.clear();
        }
        if part != assembly.next
            || id != assembly.id
            || part >= parts
            || usize::from(parts) > PARTS
            || assembly.bytes.len() + bytes.len() > DESCRIPTION
        {
            assembly.next = u8::MAX;
            return Err(Malformed);
        }
        assembly.bytes.extend_from_slice(bytes);
        assembly.next += 1;
        if assembly.next < parts {
            return Ok(());
        }
        assembly.next = u8::MAX;
        let place = self.known.get_mut(usize::from(id)).ok_or(Malformed)?;
        match sites::intern(&assembly.bytes, &mut self.new_sites) {
            Ok(site) => {
                *place = Some(site);
                Ok(())
            }
            Err(NoSite::Malformed) => Err(Malformed),
            Err(NoSite::TooMany) => {
                if !std::mem::replace(&mut self.said_too_many, true) {
                    tracing::warn!(
                        worker = &*self.name,
                        "a worker has announced more than {} different callsites; log lines of further ones \
                         are not shown",
                        sites::MOST
                    );
                }
                Err(Malformed)
            }
        }
    }

    fn emit(&self, site: &'static Site, values: &[Option<Value<'_>>; FIELDS], truncated: bool, time: Stamp) {
        let metadata = site.metadata();
        if *metadata.level() > LevelFilter::current() || site.is_unwanted() {
            return;
        }
        dispatcher::get_default(|dispatch| {
            if !dispatch.enabled(metadata) {
                return;
            }
            // `Raw` is formatted by `Debug`, which `tracing` wants wrapped, and the wrapping kept.
            let texts: [_; FIELDS] = std::array::from_fn(|at| match values[at] {
                Some(Value::Text(text)) => Some(field::debug(text)),
                _ => None,
            });
            let mut all: [Option<&dyn field::Value>; FIELDS + ATTACHED.len()] = [None; _];
            for at in 0..site.fields() {
                all[at] = match &values[at] {
                    Some(Value::I64(value)) => Some(value),
                    Some(Value::U64(value)) => Some(value),
                    Some(Value::I128(value)) => Some(value),
                    Some(Value::U128(value)) => Some(value),
                    Some(Value::F64(value)) => Some(value),
                    Some(Value::Bool(value)) => Some(value),
                    Some(Value::Str(value)) => Some(value),
                    Some(Value::Text(_)) => texts[at].as_ref().map(|text| text as _),
                    None => None,
                };
            }
            let worker = &*self.name;
            let (wall, tsc) = match &time {
                Stamp::Wall(time) => (Some(time.as_str()), None),
                Stamp::Ticks(ticks) => (None, Some(*ticks)),
            };
            let attached: [Option<&dyn field::Value>; ATTACHED.len()] = [
                Some(&worker),
                Some(&self.cpu),
                wall.as_ref().map(|time| time as _),
                tsc.as_ref().map(|tsc| tsc as _),
                truncated.then_some(&true),
            ];
            let end = site.fields() + ATTACHED.len();
            all[site.fields()..end].copy_from_slice(&attached);
            let values = metadata.fields().value_set_all(&all[..end]);
            // The root of its own: what the drainer is doing is not what the worker was doing.
            dispatch.event(&Event::new_child_of(None, metadata, &values));
        });
    }

    fn count_losses(&mut self, report: &mut DrainReport) {
        let lost = Lost::read(&self.head);
        let more = lost.total().wrapping_sub(self.lost.total());
        self.lost = lost;
        report.lost = report.lost.wrapping_add(more);
        self.unreported = self.unreported.wrapping_add(more);
        if self.unreported != 0 && self.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            tracing::warn!(
                worker = &*self.name,
                lost = self.unreported,
                full = lost.full,
                callsites = lost.callsites,
                nested = lost.nested,
                "a worker's log lines were lost; its log ring takes {} records",
                self.ring.capacity()
            );
            self.reported = Some(Instant::now());
            self.unreported = 0;
        }
    }
}

/// When a record was made.
enum Stamp {
    Wall(String),
    Ticks(u64),
}

/// From ticks to the time of day, anchored anew for each call: so neither the calibration's error nor an
/// adjustment of the system's clock adds up.
struct Timescale {
    clock: Option<Clock>,
    /// Nanoseconds since 1970 at the anchor.
    nanos: i128,
    ticks: u64,
}

impl Timescale {
    fn now(clock: Option<Clock>) -> Self {
        let ticks = Clock::ticks();
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Self { clock, nanos: i128::try_from(nanos).unwrap_or(0), ticks }
    }

    fn of(&self, tsc: u64) -> Stamp {
        let Some(clock) = &self.clock else { return Stamp::Ticks(tsc) };
        let ago = self.ticks.wrapping_sub(tsc).cast_signed();
        let distance = i128::from(clock.to_nanos(ago.unsigned_abs()));
        let nanos = self.nanos - if ago < 0 { -distance } else { distance };
        // Times that RFC 3339 can say: what a worker gone wild writes must not be a panic here.
        let nanos = nanos.clamp(0, 253_402_300_799_999_999_999);
        let (seconds, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        let time = UNIX_EPOCH + Duration::new(seconds as u64, rest as u32);
        Stamp::Wall(humantime::format_rfc3339_nanos(time).to_string())
    }
}

/// Turns the records of any number of workers into events of the program.
#[derive(Debug)]
pub struct Drainer {
    sources: Vec<Source>,
    clock: Option<Clock>,
    budget: u32,
}

impl Drainer {
    /// A drainer without sources. Without a clock (where [`Clock::tsc`] refuses) events carry `tsc` instead
    /// of `time`.
    #[must_use]
    pub const fn new(clock: Option<Clock>) -> Self {
        Self { sources: Vec::new(), clock, budget: BUDGET }
    }

    /// Takes at most this many records from each source in one call; 1024 if nothing is said, at least 1.
    #[must_use]
    pub fn budget(mut self, records: u32) -> Self {
        self.budget = records.max(1);
        self
    }

    /// Adds a worker.
    pub fn add(&mut self, source: Source) {
        self.sources.push(source);
    }

    /// The workers, in the order in which they were added.
    #[must_use]
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Takes what there is, within the budget, and makes events of it.
    pub fn drain(&mut self) -> DrainReport {
        let mut report = DrainReport::default();
        let time = Timescale::now(self.clock);
        for source in &mut self.sources {
            source.drain(self.budget, &time, &mut report);
        }
        report
    }
}
