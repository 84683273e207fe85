//! Workers that allocate while they are strict, in a program with the allocator that allows it: `arena NAME`.
//! The scenarios assert by panicking; `tests/strict.rs` runs them and looks at the exit status.

#[path = "../scenario/peer.rs"]
#[allow(dead_code, reason = "of the scenarios' peer, these need the port")]
mod peer;

use isoplane::isolation::arena::WorkerAlloc;
use isoplane::isolation::{Backend, Status};
use isoplane::memory::Batch;
use isoplane::memory::stats::Field;
use isoplane::{App, Dataplane, PortId, Running, Turn, Worker, WorkerIsolation};
use isoplane_lab::Counter;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use peer::{Peer, pool, wait_for};
use std::alloc::System;

#[global_allocator]
static ALLOCATOR: WorkerAlloc<System> = WorkerAlloc::new(System);

const MIB: usize = 1 << 20;

fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    match std::env::args().nth(1).as_deref() {
        Some("allocates-and-frees") => allocates_and_frees(),
        Some("more-than-there-is") => more_than_there_is(),
        other => {
            eprintln!("no scenario {other:?}; there are: allocates-and-frees, more-than-there-is");
            std::process::exit(2);
        }
    }
}

/// A worker with an arena of 1 MiB, watched; nothing when it cannot be strict here, and why.
fn watch<A: App + 'static>(
    fields: &[Field],
    app: fn() -> A,
    until: impl Fn(&Running) -> bool,
) -> Option<Status> {
    let set = sched_getaffinity(Pid::from_raw(0)).expect("affinity");
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu) == Ok(true)).collect();
    let [_, .., cpu] = cpus[..] else {
        eprintln!("skipped: a strict worker wants a CPU of its own, and there is only one");
        return None;
    };
    let pool = pool("arena", 4096);
    let (port, _left) = Peer::new(&pool, "left");
    let mut plane = Dataplane::builder("arena");
    let port = plane.port(port);
    plane.isolation(WorkerIsolation { arena: MIB, ..WorkerIsolation::default() });
    plane.worker(Worker::new("w0").cpu(cpu).counters(fields).queue(port, 0), move |_| app());
    let running = plane.launch().expect("launch");
    let status = running.isolation(0).expect("worker 0").clone();
    if status.backend() != Some(Backend::Dispatch) {
        eprintln!("skipped: the backend here is not dispatch, so nothing is caught");
        return None;
    }
    let tid = status.thread().1;
    let (calls, faults) =
        (Counter::system_calls(tid).expect("perf"), Counter::page_faults(tid).expect("perf"));
    wait_for("what the app does", || until(&running));
    // From outside too: no mmap, no brk, and no page of the arena that was not there.
    assert_eq!((calls.count().unwrap(), faults.count().unwrap()), (0, 0));
    let statistics = running.statistics();
    // The observer publishes now and then.
    wait_for("the segment to say so", || {
        statistics.total("arena_allocations") > 0
            && statistics.total("arena_exhausted") == status.snapshot().arena_exhausted
    });
    let report = running.stop();
    assert!(report.is_clean(), "{report:?}");
    let now = status.snapshot();
    assert_eq!((now.breaches.total(), now.armed), (0, 1), "{:?}", status.breaches(0));
    Some(status)
}

/// Allocates and frees in each turn, more in sum than the arena has.
struct Allocates {
    kept: Vec<Vec<u8>>,
}

impl App for Allocates {
    fn packets(&mut self, turn: &mut Turn<'_>, _: PortId, batch: &mut Batch) {
        turn.give_back(batch);
    }

    fn turn(&mut self, turn: &mut Turn<'_>) {
        let bytes = 64 << (self.kept.len() % 8);
        self.kept.push(vec![1; bytes]);
        turn.count(0, bytes as u64);
        if self.kept.len() == 32 {
            self.kept = Vec::new();
            turn.count(1, 1);
        }
    }
}

fn allocates_and_frees() {
    let fields = [Field::counter("bytes"), Field::counter("rounds")];
    let done = |running: &Running| running.statistics().total("bytes") > 8 * MIB as u64;
    let Some(status) = watch(&fields, || Allocates { kept: Vec::new() }, done) else { return };
    let now = status.snapshot();
    assert!(now.allocations > 1000, "{now:?}");
    assert_eq!(now.arena_exhausted, 0);
}

/// Asks once for more than there is, and then for something that there is.
#[derive(Default)]
struct Greedy {
    turns: u32,
}

impl App for Greedy {
    fn packets(&mut self, turn: &mut Turn<'_>, _: PortId, batch: &mut Batch) {
        turn.give_back(batch);
    }

    fn turn(&mut self, turn: &mut Turn<'_>) {
        self.turns = self.turns.saturating_add(1);
        // Not before it is isolated.
        if self.turns == 1000 {
            let refused = Vec::<u8>::new().try_reserve_exact(2 * MIB).is_err();
            let served = Vec::<u8>::new().try_reserve_exact(MIB / 4).is_ok();
            turn.count(0, u64::from(refused));
            turn.count(1, u64::from(served));
        }
        turn.gauge(2, self.turns.into());
    }
}

fn more_than_there_is() {
    let fields = [Field::counter("refused"), Field::counter("served"), Field::gauge("app_turns")];
    let done = |running: &Running| {
        let statistics = running.statistics();
        let asked = statistics.total("app_turns") > 2000;
        if asked {
            assert_eq!((statistics.total("refused"), statistics.total("served")), (1, 1));
        }
        asked
    };
    let Some(status) = watch(&fields, Greedy::default, done) else { return };
    assert_eq!(status.snapshot().arena_exhausted, 1);
}
