//! The other route: the program's subscriber is called in visits to the kernel, and only there.

mod ear;

use ear::Ear;
use isoplane_isolation::diagnostics::{Drainer, InstallError, ThroughSlowPath, channel};
use isoplane_memory::Kernel;
use std::cell::Cell;
use std::fmt;
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Level, Metadata, Subscriber, debug, info, span, trace, warn};

thread_local! {
    static OPEN: Cell<bool> = const { Cell::new(false) };
    static VISITS: Cell<u32> = const { Cell::new(0) };
    static BUDGET: Cell<u32> = const { Cell::new(0) };
}

/// A kernel that is entered as often as there is a budget for.
fn gate(visit: &mut dyn FnMut(&Kernel)) -> bool {
    if BUDGET.get() == 0 {
        return false;
    }
    BUDGET.set(BUDGET.get() - 1);
    VISITS.set(VISITS.get() + 1);
    OPEN.set(true);
    visit(&Kernel::outside_isolation());
    OPEN.set(false);
    true
}

/// A program's subscriber that enters the kernel for whatever it is asked, so it must not be asked outside;
/// but for its interest, which `tracing` itself asks for.
struct Program(Ear);

impl Subscriber for Program {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        if metadata.target() == "silent" { Interest::never() } else { Interest::sometimes() }
    }
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        assert!(OPEN.get(), "asked outside of a visit");
        metadata.target() != "quiet" && *metadata.level() <= Level::DEBUG
    }
    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        assert!(OPEN.get(), "called outside of a visit");
        self.0.new_span(span)
    }
    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        assert!(OPEN.get(), "called outside of a visit");
        self.0.event(event);
    }
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}

/// Runs `what` on a thread whose events go through the gate.
fn route(ear: &Ear, budget: u32, what: impl FnOnce(ThroughSlowPath) + Send) {
    let program = Dispatch::new(Program(ear.clone()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            BUDGET.set(budget);
            what(ThroughSlowPath::new(program).gate(gate).level(LevelFilter::DEBUG));
        });
    });
}

#[test]
fn events_reach_the_program_in_one_visit_each() {
    let ear = Ear::default();
    route(&ear, 100, |route| {
        let recording = route.install(None, 0).expect("it installs");
        info!(a = 1, "first");
        debug!(target: "quiet", "the program does not want this one, which only it can say");
        warn!(target: "silent", "the program never wants this one, which costs no visit");
        trace!("nobody wants this one, which costs no visit");
        let _span = tracing::error_span!("no visit").entered();
        warn!("last");
        assert_eq!(VISITS.get(), 3);
        assert_eq!(recording.refused(), 0);
    });
    let heard = ear.heard();
    let levels: Vec<_> = heard.iter().map(|h| (h.level, h.field("a"))).collect();
    assert_eq!(levels, [(Level::INFO, Some("i64 1")), (Level::WARN, None)]);
    // The event itself, nothing is attached: the worker is who says it.
    assert_eq!(heard[0].fields.len(), 2);
}

#[test]
fn what_the_budget_refuses_takes_the_ring() {
    let ear = Ear::default();
    let (recorder, source) = channel("refused", 64).expect("a channel");
    let recorder = recorder.level(LevelFilter::DEBUG);
    let mut drainer = Drainer::new(None);
    drainer.add(source);
    route(&ear, 2, |route| {
        let recording = route.install(Some(&recorder), 3).expect("it installs");
        assert_eq!(recorder.install(3).err(), Some(InstallError::Installed));
        for n in 0..5 {
            info!(n);
        }
        assert_eq!(recording.refused(), 3);
    });
    let numbers = |heard: &[ear::Heard]| {
        heard.iter().filter_map(|h| h.field("n").map(str::to_owned)).collect::<Vec<_>>()
    };
    assert_eq!(numbers(&ear.heard()), ["i64 0", "i64 1"]);
    let rest = ear::listen(|| assert_eq!(drainer.drain().events, 3));
    assert_eq!(numbers(&rest), ["i64 2", "i64 3", "i64 4"]);
    assert!(recorder.install(3).is_ok(), "the guard has given the ring back");
}

#[test]
fn without_a_ring_a_refused_event_is_counted() {
    let ear = Ear::default();
    route(&ear, 0, |route| {
        let recording = route.install(None, 0).expect("it installs");
        info!("lost");
        info!("lost");
        assert_eq!((recording.refused(), VISITS.get()), (2, 0));
    });
    assert!(ear.heard().is_empty());
}

struct Chatty;

impl fmt::Debug for Chatty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        info!("within an event");
        f.write_str("whole")
    }
}

#[test]
fn an_event_within_an_event_makes_no_visit_of_its_own() {
    let ear = Ear::default();
    route(&ear, 100, |route| {
        let _recording = route.install(None, 0).expect("it installs");
        info!(x = ?Chatty);
        assert_eq!(VISITS.get(), 1);
    });
    let heard = ear.heard();
    assert_eq!(heard.iter().map(|h| h.field("x")).collect::<Vec<_>>(), [Some("debug whole")]);
}

#[test]
fn a_thread_that_is_not_isolated_just_writes() {
    let ear = Ear::default();
    let program = Dispatch::new(ear.clone());
    let recording =
        ThroughSlowPath::new(program).level(LevelFilter::INFO).install(None, 0).expect("it installs");
    info!("here");
    assert_eq!((recording.refused(), ear.heard().len()), (0, 1));
}
