//! Events through the ring come out as they went in: an independent subscriber is given the same events
//! directly, and hears the same. Then what happens at every end of the ring.
//!
//! Each test has a dispatcher of its own on its own thread; the worker is a thread of the test.

mod ear;

use ear::Heard;
use isoplane_isolation::Status;
use isoplane_isolation::diagnostics::{
    CALLSITES, ChannelError, Drainer, InstallError, MIN_CAPACITY, Recorder, channel,
};
use isoplane_memory::Clock;
use std::fmt;
use std::sync::OnceLock;
use tracing::field::FieldSet;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Level, Metadata, debug, error, info, trace, warn};
use tracing_core::callsite::{Callsite, Identifier};
use tracing_core::metadata::Kind;

const ATTACHED: [&str; 5] = ["worker", "cpu", "time", "tsc", "truncated"];

fn drainer(name: &str, capacity: u32) -> (Recorder, Drainer) {
    let (recorder, source) = channel(name, capacity).expect("a channel");
    let mut drainer = Drainer::new(None);
    drainer.add(source);
    (recorder.level(LevelFilter::TRACE), drainer)
}

/// What is said while `what` runs with a recorder installed, on a thread of its own.
fn record(recorder: &Recorder, what: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _recording = recorder.install(7).expect("it is not installed");
            what();
        });
    });
}

/// What comes out of the ring.
fn drained(drainer: &mut Drainer) -> Vec<Heard> {
    ear::listen(|| while drainer.drain().more {})
}

/// An event as it was before a worker's name and the rest were attached.
fn own(mut heard: Heard) -> Heard {
    heard.fields.retain(|(name, _)| !ATTACHED.contains(&name.as_str()));
    heard
}

struct Shown(&'static str);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}>", self.0)
    }
}

/// One event of everything that the macros can say.
fn everything() {
    error!("a message");
    warn!(answer = 42, "with a field and {} arguments", 2);
    info!(i = i64::MIN, u = u64::MAX, f = 1.5, yes = true, no = false);
    debug!(small = -1_i8, byte = 255_u8, single = f32::MAX, size = usize::MAX);
    trace!(wide = i128::MIN, wider = u128::MAX, nan = f64::NAN, zero = -0.0);
    info!(text = "plain", empty = "", unicode = "grüße, 世界", owned = String::from("own"));
    info!(debug = ?Some("x"), display = %Shown("y"), "and {:>5}", "z");
    info!(target: "elsewhere", name = "not the event's");
    info!(name: "named", { a = 1 }, "named {b}", b = 2);
    let error: Box<dyn std::error::Error + 'static> = "broken".into();
    error!(error = &*error, none = Option::<u32>::None, some = Some(1_u32));
    info!(worker.port = 3, "dots.in.names" = 4, r#type = "raw");
    tracing::event!(Level::WARN, bytes = &[1_u8, 2, 255][..], empty = tracing::field::Empty);
    info!(
        a = 1,
        b = 2,
        c = 3,
        d = 4,
        e = 5,
        f = 6,
        g = 7,
        h = 8,
        i = 9,
        j = 10,
        k = 11,
        l = 12,
        m = 13,
        n = 14,
        o = 15,
        p = 16,
        q = 17,
        r = 18,
        s = 19,
        t = 20
    );
    let _span = tracing::info_span!("a span", of = 1).entered();
    info!("in a span");
}

#[test]
fn every_kind_of_event_comes_out_as_it_went_in() {
    let (recorder, mut drainer) = drainer("oracle", 128);
    record(&recorder, || {
        everything();
        everything();
    });
    let ring: Vec<_> = drained(&mut drainer).into_iter().map(own).collect();
    let direct = ear::listen(|| {
        everything();
        everything();
    });
    assert_eq!(direct.len(), 28);
    assert_eq!(ring, direct);
}

#[test]
fn worker_cpu_and_time_are_attached() {
    let clock = Clock::tsc().ok();
    let (recorder, source) = channel("attached", 64).expect("a channel");
    let mut drainer = Drainer::new(clock);
    drainer.add(source);
    record(&recorder.level(LevelFilter::INFO), || info!(x = 1));
    let heard = drained(&mut drainer);
    let [heard] = heard.as_slice() else { panic!("{heard:?}") };
    assert_eq!(heard.field("worker"), Some("str attached"));
    assert_eq!(heard.field("cpu"), Some("u64 7"));
    assert_eq!(heard.field("truncated"), None);
    match clock {
        Some(_) => {
            let time = heard.field("time").and_then(|time| time.strip_prefix("str ")).expect("a time");
            let time = humantime::parse_rfc3339(time).expect("RFC 3339");
            let ago = std::time::SystemTime::now().duration_since(time).expect("in the past");
            assert!(ago.as_secs() < 600, "{ago:?} ago");
            assert_eq!(heard.field("tsc"), None);
        }
        None => assert!(heard.field("tsc").is_some() && heard.field("time").is_none()),
    }
}

#[test]
fn what_does_not_fit_is_cut_on_a_character_boundary_and_says_so() {
    let (recorder, mut drainer) = drainer("cut", 64);
    let long = "ä€😀".repeat(100);
    record(&recorder, || {
        for skew in 0..9 {
            info!("{}{long}", &"12345678"[..skew]);
        }
        info!(first = 1, text = long.as_str(), lost = 2);
        info!(list = ?vec![1_u64; 1_000_000]);
        info!(short = 1);
    });
    let heard = drained(&mut drainer);
    assert_eq!(heard.len(), 12);
    for (skew, heard) in heard.iter().take(9).enumerate() {
        let text = heard.field("message").and_then(|m| m.strip_prefix("debug ")).expect("a message");
        let whole = format!("{}{long}", &"12345678"[..skew]);
        assert!(whole.starts_with(text), "{text}");
        assert!((233..=236).contains(&text.len()), "{} of 236 bytes used", text.len());
        assert_eq!(heard.field("truncated"), Some("bool true"));
    }
    let several = &heard[9];
    assert_eq!(several.field("first"), Some("i64 1"));
    assert!(several.field("text").is_some_and(|text| text.len() > 200));
    assert_eq!((several.field("lost"), several.field("truncated")), (None, Some("bool true")));
    assert!(heard[10].field("list").is_some_and(|list| list.starts_with("debug [1, 1, ")));
    assert_eq!(heard[11].field("truncated"), None);
}

#[test]
fn a_full_ring_drops_the_newest_and_counts_them() {
    let (recorder, mut drainer) = drainer("full", MIN_CAPACITY);
    let status = Status::create("full").expect("a status");
    let recorder = recorder.status(status.clone());
    let say = |from: u64, to: u64| {
        for n in from..to {
            info!(n);
        }
    };
    std::thread::scope(|scope| {
        let (to_worker, orders) = std::sync::mpsc::channel::<(u64, u64)>();
        let (done, finished) = std::sync::mpsc::channel();
        let recorder = &recorder;
        scope.spawn(move || {
            let _recording = recorder.install(0).expect("it is not installed");
            for (from, to) in orders {
                say(from, to);
                done.send(()).expect("the test waits");
            }
        });
        let run = |from, to| {
            to_worker.send((from, to)).expect("the worker lives");
            finished.recv().expect("the worker lives");
        };
        run(0, 100);
        let first = drained(&mut drainer);
        run(100, 105);
        let second = drained(&mut drainer);
        drop(to_worker);

        let numbers = |heard: &[Heard]| -> Vec<_> {
            heard.iter().filter_map(|h| h.field("n").map(str::to_owned)).collect()
        };
        let kept = numbers(&first).len() as u64;
        // Start, one part of an announcement and the events share the slots.
        assert_eq!(kept, u64::from(MIN_CAPACITY) - 2);
        assert_eq!(numbers(&first), (0..kept).map(|n| format!("u64 {n}")).collect::<Vec<_>>());
        assert_eq!(numbers(&second), (100..105).map(|n| format!("u64 {n}")).collect::<Vec<_>>());
        assert_eq!(drainer.sources()[0].recorded(), kept + 5);
        assert_eq!(drainer.sources()[0].lost().full, 100 - kept);
        let snapshot = status.snapshot();
        assert_eq!((snapshot.records, snapshot.records_lost), (kept + 5, 100 - kept));
        let said = first.iter().find(|h| h.field("lost").is_some()).expect("the loss is reported");
        assert_eq!(said.level, Level::WARN);
        assert_eq!(said.field("lost"), Some(format!("u64 {}", 100 - kept).as_str()));
    });
}

#[test]
fn levels_are_those_that_were_asked_for() {
    let (recorder, mut drainer) = drainer("levels", 64);
    record(&recorder.level(LevelFilter::WARN), || {
        error!("error");
        warn!("warn");
        info!("info");
        trace!("trace");
        assert!(tracing::enabled!(Level::WARN) && !tracing::enabled!(Level::INFO));
        assert!(!tracing::span_enabled!(Level::ERROR));
    });
    let heard = drained(&mut drainer);
    assert_eq!(heard.iter().map(|h| h.level).collect::<Vec<_>>(), [Level::ERROR, Level::WARN]);
}

#[test]
fn a_restarted_worker_goes_on_in_the_same_ring() {
    let (recorder, mut drainer) = drainer("restart", 64);
    let say = |life: u64| info!(life, "lives");
    for life in 1..=3 {
        record(&recorder, || {
            if life == 2 {
                warn!("another callsite gets the first number in this life");
            }
            say(life);
        });
    }
    let heard = drained(&mut drainer);
    let lives: Vec<_> = heard.iter().map(|h| h.field("life")).collect();
    assert_eq!(lives, [Some("u64 1"), None, Some("u64 2"), Some("u64 3")]);
    assert_eq!(drainer.sources()[0].incarnation(), 3);
}

#[test]
fn one_recorder_at_a_time() {
    let (recorder, _drainer) = drainer("twice", 64);
    let first = recorder.install(0).expect("the first");
    assert_eq!(recorder.install(0).err(), Some(InstallError::Installed));
    drop(first);
    drop(recorder.install(0).expect("after the first has ended"));
}

/// Logs while it is formatted, by the macro and past it.
struct Chatty<'a>(&'a Dispatch);

impl fmt::Debug for Chatty<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("before ")?;
        info!("withheld by tracing");
        hand(self.0, callsite());
        f.write_str("after")
    }
}

struct Panics;

impl fmt::Debug for Panics {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::panic::panic_any("while formatting")
    }
}

#[test]
fn an_event_within_an_event_leaves_the_outer_one_whole() {
    let (recorder, mut drainer) = drainer("nested", 64);
    record(&recorder, || {
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        info!(x = ?Chatty(&dispatch), y = 1);
        info!(z = 2);
    });
    assert_eq!(drainer.sources()[0].lost().nested, 1, "tracing withholds the other one");
    let heard: Vec<_> = drained(&mut drainer).into_iter().filter(|h| h.field("lost").is_none()).collect();
    assert_eq!(heard.len(), 2, "{heard:?}");
    assert_eq!((heard[0].field("x"), heard[0].field("y")), (Some("debug before after"), Some("i64 1")));
    assert_eq!(heard[1].field("z"), Some("i64 2"));
}

#[test]
fn events_of_other_threads_are_counted_not_recorded() {
    let (recorder, mut drainer) = drainer("foreign", 64);
    record(&recorder, || {
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        std::thread::scope(|scope| {
            scope.spawn(|| hand(&dispatch, callsite()));
        });
        info!(own = 1);
    });
    assert_eq!(drainer.sources()[0].lost().nested, 1);
    let heard: Vec<_> = drained(&mut drainer).into_iter().filter(|h| h.field("own").is_some()).collect();
    assert_eq!(heard.len(), 1);
}

#[test]
fn a_panic_while_formatting_does_not_end_the_recording() {
    let (recorder, mut drainer) = drainer("panics", 64);
    record(&recorder, || {
        let caught = std::panic::catch_unwind(|| info!(x = ?Panics));
        assert!(caught.is_err());
        info!(after = 1);
    });
    let heard = drained(&mut drainer);
    assert_eq!(heard.iter().map(|h| h.field("after")).collect::<Vec<_>>(), [Some("i64 1")]);
}

#[test]
fn a_subscriber_that_outlives_its_guard_records_no_more() {
    let (recorder, mut drainer) = drainer("ended", 64);
    record(&recorder, || info!(n = 1));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let recording = recorder.install(0).expect("it is not installed");
            let dispatch = tracing::dispatcher::get_default(Clone::clone);
            drop(recording);
            hand(&dispatch, callsite());
        });
    });
    let heard = drained(&mut drainer);
    let numbers: Vec<_> = heard.iter().filter_map(|h| h.field("n")).collect();
    assert_eq!(numbers, ["i64 1"]);
    assert_eq!(drainer.sources()[0].lost().nested, 1);
}

/// A new callsite with the field `n`.
fn callsite() -> &'static Metadata<'static> {
    struct Made(OnceLock<Metadata<'static>>);
    impl Callsite for Made {
        fn set_interest(&self, _: Interest) {}
        fn metadata(&self) -> &Metadata<'_> {
            self.0.get().expect("set below")
        }
    }
    let made: &'static Made = Box::leak(Box::new(Made(OnceLock::new())));
    made.0.get_or_init(|| {
        let fields = FieldSet::new(&["n"], Identifier(made));
        Metadata::new("made", "made", Level::INFO, None, None, None, fields, Kind::EVENT)
    })
}

/// Hands an event to a subscriber itself, past the macros and `tracing`'s own guard.
fn hand(dispatch: &Dispatch, metadata: &'static Metadata<'static>) {
    dispatch.event(&Event::new(metadata, &metadata.fields().value_set_all(&[Some(&1_u64)])));
}

#[test]
fn callsites_beyond_the_last_number_are_counted() {
    let (recorder, mut drainer) = drainer("many", 4096);
    record(&recorder, || {
        let dispatch = tracing::dispatcher::get_default(Clone::clone);
        (0..CALLSITES + 10).for_each(|_| hand(&dispatch, callsite()));
    });
    assert_eq!(drainer.sources()[0].lost().callsites, 10);
    let heard = drained(&mut drainer);
    assert_eq!(heard.iter().filter(|h| h.target == "made").count(), CALLSITES);
}

#[test]
fn a_call_takes_no_more_than_its_budget() {
    let (recorder, source) = channel("budget", 256).expect("a channel");
    let mut drainer = Drainer::new(None).budget(10);
    drainer.add(source);
    record(&recorder.level(LevelFilter::INFO), || (0..98).for_each(|n| info!(n)));
    let heard = ear::listen(|| {
        // Start and announcement are records too.
        for call in 0..10 {
            let report = drainer.drain();
            assert_eq!(report.events, if call == 0 { 8 } else { 10 });
            assert_eq!(report.more, call < 9);
        }
    });
    assert_eq!(heard.len(), 98);
}

#[test]
fn refused_capacities_name_the_ring() {
    for capacity in [0, 1, 8, 17, 1 << 21] {
        let error = channel("bad", capacity).expect_err("a refusal");
        assert!(matches!(&error, ChannelError::Capacity { capacity: c, .. } if *c == capacity));
        assert!(error.to_string().contains("bad"), "{error}");
    }
}
