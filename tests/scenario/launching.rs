//! What `launch` refuses, and says.

use crate::peer::{Peer, pool};
use isoplane::blocks::CrossConnect;
use isoplane::memory::Batch;
use isoplane::{App, Dataplane, Idle, LaunchError, Placement, PortId, Restart, Turn, Worker};

pub(crate) fn refusals() {
    let error = Dataplane::builder("empty").launch().expect_err("no worker");
    assert!(matches!(error, LaunchError::NoWorkers { .. }) && error.to_string().contains("empty"));

    let refuse = |worker: Worker| {
        let pool = pool("small", 1024);
        let (a, mut peer) = Peer::new(&pool, "left");
        let mut plane = Dataplane::builder("refused");
        let a = plane.port(a);
        plane.worker(worker.queue(a, 0), |_| CrossConnect);
        let error = plane.launch().expect_err("refused");
        peer.close();
        assert_eq!(pool.in_depot(), pool.chunks(), "a refusal keeps nothing");
        error
    };
    let cpu = refuse(Worker::new("w0").cpu(4095));
    assert!(matches!(cpu, LaunchError::Cpu { cpu: 4095, .. }), "{cpu}");
    let frames = refuse(Worker::new("w0").frames(100_000));
    assert!(frames.to_string().contains("100000 frames wanted for worker w0"), "{frames}");
    let name = refuse(Worker::new(""));
    assert!(matches!(name, LaunchError::WorkerName { .. }), "{name}");

    let (one, other) = (pool("one", 1024), pool("other", 1024));
    let ((a, _left), (b, _right)) = (Peer::new(&one, "left"), Peer::new(&other, "right"));
    let mut plane = Dataplane::builder("two pools");
    let (a, b) = (plane.port(a), plane.port(b));
    plane.worker(Worker::new("w0").queue(a, 0).queue(b, 0), |_| CrossConnect);
    let error = plane.launch().expect_err("two pools");
    assert!(matches!(error, LaunchError::PoolMismatch { .. }), "{error}");

    let pool = pool("queues", 2048);
    let (a, _left) = Peer::new(&pool, "left");
    let mut plane = Dataplane::builder("queues");
    let a = plane.port(a);
    plane.worker(Worker::new("w0").queue(a, 0), |_| CrossConnect);
    plane.worker(Worker::new("w1").queue(a, 0), |_| CrossConnect);
    let error = plane.launch().expect_err("one queue, two workers");
    assert!(matches!(error, LaunchError::Queue { queue: 0, .. }), "{error}");

    let (a, _left) = Peer::new(&pool, "left");
    let mut plane = Dataplane::builder("threads");
    let a = plane.port(a);
    plane.worker(Worker::new("w0").queue(a, 0), |_| CrossConnect);
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || wait.recv());
    let error = plane.launch().expect_err("two threads");
    assert!(matches!(error, LaunchError::Threads { threads: 2 }), "{error}");
    drop(done);
    let _ = thread.join();
}

struct Never;

impl App for Never {
    fn packets(&mut self, _: &mut Turn<'_>, _: PortId, _: &mut Batch) {}
}

/// An app whose construction panics: launch says so, with its words, instead of hanging.
pub(crate) fn app_that_panics_at_once() {
    for placement in [Placement::Process, Placement::Thread] {
        let pool = pool("scenario", 2048);
        let (a, mut left) = Peer::new(&pool, "left");
        let mut plane = Dataplane::builder("hopeless");
        let a = plane.port(a);
        plane.placement(placement).restart(Restart::Never);
        plane.worker(Worker::new("w0").idle(Idle::Yield).queue(a, 0), |setup| {
            assert!(setup.restarts > 100, "this app cannot be built");
            Never
        });
        let error = plane.launch().expect_err("the app panics");
        assert!(error.to_string().contains("this app cannot be built"), "{error}");
        left.close();
        assert_eq!(pool.in_depot(), pool.chunks(), "{:?}", pool.census());
    }
}
