//! Rings that a worker gone wild has written: a drainer must not panic, hang or believe them.

use super::layout::{DESCRIPTION, HEADER, PARTS, SLOT_BYTES, Slot, header, record};
use super::{Drainer, channel};
use isoplane_memory::Clock;
use isoplane_memory::ring::{Mapped, RingMemory};
use proptest::prelude::*;
use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber, info, span};

const CAPACITY: u32 = 16;

/// Looks at everything that an event says, and counts events.
#[derive(Default)]
struct Reader;

thread_local! { static READ: Cell<u64> = const { Cell::new(0) } }

impl Visit for Reader {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        std::hint::black_box(format!("{} {value:?}", field.name()));
    }
}

impl Subscriber for Reader {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        std::hint::black_box(format!("{:?}", event.metadata()));
        event.record(&mut Self);
        READ.set(READ.get() + 1);
    }
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}

/// A drainer whose ring anybody may write.
fn ring() -> (super::Recorder, Drainer, Mapped<Slot>) {
    let (recorder, source) = channel("hostile", CAPACITY).expect("a channel");
    let memory = source.ring().memory().share();
    // A clock where there is one: hostile times are part of it.
    static CLOCK: OnceLock<Option<Clock>> = OnceLock::new();
    let mut drainer = Drainer::new(*CLOCK.get_or_init(|| Clock::tsc().ok())).budget(64);
    drainer.add(source);
    (recorder.level(tracing::level_filters::LevelFilter::TRACE), drainer, memory)
}

fn slot(bytes: &[u8]) -> Slot {
    let mut slot = Slot([0; SLOT_BYTES / 8]);
    bytemuck::bytes_of_mut(&mut slot)[..bytes.len()].copy_from_slice(bytes);
    slot
}

fn with_header(first: u64, tsc: u64, payload: &[u8]) -> Slot {
    let mut bytes = Vec::from(first.to_ne_bytes());
    bytes.extend_from_slice(&tsc.to_ne_bytes());
    bytes.extend_from_slice(&payload[..payload.len().min(SLOT_BYTES - HEADER)]);
    slot(&bytes)
}

/// A description that is right, with fields of these names.
fn description(level: u8, texts: &[&str]) -> Vec<u8> {
    let mut bytes = vec![level, 1, 0, 0, 0];
    for text in texts {
        bytes.extend_from_slice(&(text.len() as u16).to_ne_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// Slots that are somewhat right: whatever the drainer may look at is now and then what it should be.
fn slots() -> impl Strategy<Value = Slot> {
    let payload = prop_oneof![
        prop::collection::vec(any::<u8>(), SLOT_BYTES - HEADER),
        Just(description(3, &["t", "n", "m", "f", "a", "b", "c"])),
        prop::collection::vec((0_u8..10, 0_u8..70, 0_u16..300, any::<u64>()), 0..20).prop_map(|fields| {
            let mut bytes = Vec::new();
            for (kind, index, length, value) in fields {
                bytes.extend_from_slice(&[kind, index]);
                bytes.extend_from_slice(&length.to_ne_bytes());
                bytes.extend_from_slice(&value.to_ne_bytes());
            }
            bytes
        }),
    ];
    let used = prop_oneof![any::<u16>(), 0..=300_u16, Just(SLOT_BYTES as u16), Just(42)];
    let tsc = prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), Just(1 << 63)];
    (0_u8..5, any::<u8>(), 0_u8..40, 0_u8..10, 0_u16..3, used, tsc, payload).prop_map(
        |(kind, flags, count, parts, id, used, tsc, payload)| {
            with_header(header(kind, flags, count, parts, id, used), tsc, &payload)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Every record is counted once, as an event, a start or malformed (announcements are none of these);
    /// then an honest incarnation is heard again.
    #[test]
    fn whatever_is_in_the_slots(content in prop::collection::vec(slots(), CAPACITY as usize)) {
        let (recorder, mut drainer, memory) = ring();
        for (at, slot) in content.iter().enumerate() {
            memory.write(at as u32, *slot);
        }
        memory.store_producer(CAPACITY, Ordering::Release);
        READ.set(0);
        let report = tracing::subscriber::with_default(Reader, || drainer.drain());
        prop_assert!(report.events + report.started <= u64::from(CAPACITY), "{report:?}");
        prop_assert!(report.malformed <= u64::from(CAPACITY), "{report:?}");
        prop_assert_eq!(READ.get(), report.events);
        honest(&recorder, &mut drainer)?;
    }

    /// Whatever the indices say, a call ends, and at the latest after the next start all is well.
    #[test]
    fn whatever_the_indices_say(producer in any::<u32>(), consumer in any::<u32>(), counts in any::<u64>()) {
        let (recorder, mut drainer, memory) = ring();
        memory.store_producer(producer, Ordering::Release);
        memory.store_consumer(consumer, Ordering::Release);
        for source in drainer.sources() {
            source.head().counters().full.store(counts, Ordering::Relaxed);
        }
        for _ in 0..3 {
            let report = tracing::subscriber::with_default(Reader, || drainer.drain());
            prop_assert!(report.events == 0 && report.malformed <= u64::from(CAPACITY), "{report:?}");
        }
        honest(&recorder, &mut drainer)?;
    }
}

fn honest(recorder: &super::Recorder, drainer: &mut Drainer) -> Result<(), TestCaseError> {
    let recording = recorder.install(0).expect("it is not installed");
    info!(honest = 1);
    drop(recording);
    READ.set(0);
    let report = tracing::subscriber::with_default(Reader, || drainer.drain());
    prop_assert_eq!((report.events, report.started, report.malformed), (1, 1, 0));
    prop_assert_eq!(READ.get(), 1);
    Ok(())
}

fn drain(slots: &[Slot]) -> super::DrainReport {
    let (_recorder, mut drainer, memory) = ring();
    for (at, slot) in slots.iter().enumerate() {
        memory.write(at as u32, *slot);
    }
    memory.store_producer(slots.len() as u32, Ordering::Release);
    tracing::subscriber::with_default(Reader, || drainer.drain())
}

fn announce(part: u8, parts: u8, bytes: &[u8]) -> Slot {
    let used = (HEADER + bytes.len()) as u16;
    with_header(header(record::ANNOUNCE, 0, part, parts, 0, used), 0, bytes)
}

const EVENT: u64 = header(record::EVENT, 0, 0, 0, 0, HEADER as u16);

#[test]
fn a_description_that_is_right_is_taken() {
    let whole = description(3, &["t", "n", "m", "f", "a"]);
    let report = drain(&[announce(0, 1, &whole), with_header(EVENT, 0, &[])]);
    assert_eq!((report.events, report.malformed), (1, 0));
}

#[test]
fn descriptions_that_are_wrong_are_not() {
    let right = description(3, &["t", "n", "m", "f", "a"]);
    let (start, end) = right.split_at(10);
    let event = with_header(EVENT, 0, &[]);
    let many: Vec<_> = std::iter::repeat_n("x", 4 + super::layout::FIELDS + 1).collect();
    let mut not_utf8 = right.clone();
    *not_utf8.last_mut().expect("a name") = 0xff;
    let wrong: [&[Slot]; 9] = [
        // The second part alone, twice the first, parts of different counts, parts out of order.
        &[announce(1, 2, end), event],
        &[announce(0, 2, start), announce(0, 2, start), event],
        &[announce(0, 0, &right), event],
        &[announce(0, 3, start), announce(2, 3, end), announce(1, 3, end), event],
        // No such level, texts that end early, bytes that are no text, more fields than there may be.
        &[announce(0, 1, &description(6, &["t", "n", "m", "f"])), event],
        &[announce(0, 1, start), event],
        &[announce(0, 1, &not_utf8), event],
        &[announce(0, 1, &description(1, &many)), event],
        &[announce(0, u8::MAX, &right), event],
    ];
    for (case, slots) in wrong.iter().enumerate() {
        let report = drain(slots);
        assert_eq!(report.events, 0, "case {case}");
        assert!(report.malformed >= 1, "case {case}");
    }
}

#[test]
fn an_announcement_without_end_takes_no_memory_without_end() {
    let part = vec![b'x'; SLOT_BYTES - HEADER];
    let slots: Vec<_> = (0..CAPACITY as u8).map(|at| announce(at, CAPACITY as u8, &part)).collect();
    assert!(slots.len() > PARTS && slots.len() * part.len() > DESCRIPTION);
    assert_eq!(drain(&slots).malformed, u64::from(CAPACITY));
}

#[test]
fn callsites_that_a_worker_adds_are_bounded() {
    let (_recorder, mut drainer, memory) = ring();
    let mut malformed = 0;
    for n in 0..super::sites::MOST + 32 {
        let name = n.to_string();
        memory.write(n % CAPACITY, announce(0, 1, &description(1, &["t", &name, "m", "f"])));
        if (n + 1) % CAPACITY == 0 {
            memory.store_producer(n + 1, Ordering::Release);
            malformed += tracing::subscriber::with_default(Reader, || drainer.drain()).malformed;
        }
    }
    assert!(malformed >= 32, "{malformed}");
}
