//! A worker from its start to its end, in a process of its own or in a thread.
//!
//! Contract: one incarnation of a worker takes over what its predecessor left (frames, rings, messages),
//! builds its app and makes turns until the control slot says stop; then it drains and reports what it
//! holds. A panic anywhere in the app ends the incarnation, not the program.

use crate::app::App;
use crate::control::{Slot, WorkerState};
use crate::turns::{Turns, WorkerBlocks};
use crate::worker_isolation::{Guard, WorkerIsolation};
use isoplane_drivers::Queue;
use isoplane_isolation::diagnostics::Recorder;
use isoplane_isolation::{Prepared, Refused, Status, StrictError};
use isoplane_memory::stats::Segment;
use isoplane_memory::{Clock, FrameCache, Pool, Survey};
use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// In a process of its own: nothing that the program does to its memory map can interrupt it.
    #[default]
    Process,
    /// In a thread of the program: for tests, and for programs that accept that every `munmap`,
    /// `free` or thread exit of theirs may interrupt the worker.
    Thread,
}

/// What a worker does in a turn that brought nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Idle {
    /// Poll on: for a CPU that is the worker's alone.
    #[default]
    Spin,
    /// Give the CPU away (`sched_yield`, a system call, so a visit to the slow path under isolation): for
    /// machines with fewer CPUs than spinners.
    Yield,
}

/// What the closure that builds an app gets to know.
#[derive(Debug)]
pub struct Setup<'a> {
    /// The worker's name.
    pub worker: &'a str,
    /// Names of its ports, in the order of their [`PortId`](crate::PortId)s.
    pub ports: &'a [String],
    /// 0 for the first start, then one more each time the worker is started again.
    pub restarts: u32,
    /// The pool that its frames are of.
    pub pool: &'a Arc<Pool>,
    /// The clock that turns get their time from.
    pub time: Time,
}

/// Nanoseconds for turns: from the TSC, or from the kernel's clock where the TSC is refused.
#[derive(Debug, Clone, Copy)]
pub enum Time {
    /// No system call, ever.
    Tsc(Clock),
    /// The vDSO, where the kernel does not keep time by the TSC. Should it make a system call (no vDSO for
    /// that clock source), that is a breach of isolation like any other, and reported.
    Kernel(Instant),
}

impl Time {
    /// The TSC if the kernel trusts it; else the kernel's clock, with a warning that says why.
    #[must_use]
    pub fn best() -> Self {
        match Clock::tsc() {
            Ok(clock) => Self::Tsc(clock),
            Err(reason) => {
                tracing::warn!(
                    "workers take their time from the kernel, which may be a system call and then is a breach: {reason}"
                );
                Self::Kernel(Instant::now())
            }
        }
    }

    /// Nanoseconds since the clock was made.
    #[inline(always)]
    #[must_use]
    pub fn now(&self) -> u64 {
        match self {
            Self::Tsc(clock) => clock.nanos(),
            Self::Kernel(start) => start.elapsed().as_nanos() as u64,
        }
    }
}

/// Everything that a worker owns, made before the fork.
pub(crate) struct Body {
    pub(crate) name: String,
    pub(crate) cpu: Option<usize>,
    pub(crate) idle: Idle,
    pub(crate) inline_kicks: bool,
    pub(crate) port_names: Vec<String>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) frames: FrameCache,
    pub(crate) blocks: WorkerBlocks,
    pub(crate) segment: Arc<Segment>,
    pub(crate) time: Time,
    pub(crate) isolation: Option<WorkerIsolation>,
    pub(crate) recorder: Option<Recorder>,
    /// Descriptors of ports and of other workers' queues, which a process of its own has no use for.
    pub(crate) not_its_own: Vec<RawFd>,
    pub(crate) status: Status,
    pub(crate) main: Box<dyn Main>,
}

/// The loop, compiled for one kind of app.
pub(crate) trait Main: Send {
    /// Builds the app, isolates the worker, makes turns until it is asked to stop, drains.
    fn run(
        &self,
        setup: &Setup<'_>,
        turns: &mut Turns,
        pace: &Pace<'_>,
        prepared: Option<&mut Prepared>,
    ) -> Result<(), Cut>;
}

/// Why a worker's loop ended before it was asked to.
pub(crate) enum Cut {
    /// It could not be isolated.
    Refused(Refused),
    /// Its isolation was broken, and the program wants it to stop then or it could not be isolated again. It
    /// has drained.
    Broken(StrictError),
}

/// What the loop needs to know besides ports and app.
pub(crate) struct Pace<'a> {
    slot: &'a Slot,
    idle: Idle,
    inline_kicks: bool,
    time: Time,
}

pub(crate) struct MainOf<F>(pub(crate) F);

impl<A: App, F: Fn(&Setup<'_>) -> A + Send> Main for MainOf<F> {
    fn run(
        &self,
        setup: &Setup<'_>,
        turns: &mut Turns,
        pace: &Pace<'_>,
        prepared: Option<&mut Prepared>,
    ) -> Result<(), Cut> {
        let mut app = (self.0)(setup);
        if prepared.is_some() {
            pace.rehearse(&mut app, turns);
        }
        pace.warm_up(&mut app, turns);
        let mut guard = Guard::arm(prepared).map_err(Cut::Refused)?;
        pace.slot.set_state(WorkerState::Running);
        let result = pace.turns_until_stopped(&mut app, turns, &mut guard);
        drop(guard);
        pace.slot.set_state(WorkerState::Draining);
        pace.drain(&mut app, turns);
        result.map_err(Cut::Broken)
    }
}

/// Longest time that a stopping worker goes on forwarding what its receive rings hold.
const DRAIN_RECEIVE: Duration = Duration::from_millis(50);
/// Longest time that it then waits for its transmissions to complete.
const DRAIN_TRANSMIT: Duration = Duration::from_millis(400);
/// Turns before a worker is isolated.
const WARM_UP_TURNS: u32 = 16;

impl Pace<'_> {
    #[inline(always)]
    fn turns_until_stopped<A: App>(
        &self,
        app: &mut A,
        turns: &mut Turns,
        guard: &mut Guard<'_>,
    ) -> Result<(), StrictError> {
        let mut count = self.slot.turns();
        while !self.slot.must_stop() {
            let report = turns.turn(app, self.time.now());
            if self.inline_kicks && turns.wants_kick() {
                // A kick that the budget refuses is made in a later turn.
                let _ = guard.enter(|kernel| turns.kick(kernel));
            }
            count = count.wrapping_add(1);
            self.slot.turn_ended(count);
            guard.turn()?;
            if report.received == 0 {
                self.rest(guard);
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn rest(&self, guard: &mut Guard<'_>) {
        match self.idle {
            Idle::Spin => std::hint::spin_loop(),
            Idle::Yield => {
                let _ = guard.enter(|_| std::thread::yield_now());
            }
        }
    }

    /// Synthetic packets for an app that wants them, before isolation.
    fn rehearse<A: App>(&self, app: &mut A, turns: &mut Turns) {
        if let Err(error) = crate::rehearsal::rehearse(app, turns, || self.time.now()) {
            tracing::warn!("not rehearsed, so the first packets may cause page faults: {error}");
        }
    }

    /// A few turns before isolation, so that what is touched for the first time is touched now.
    fn warm_up<A: App>(&self, app: &mut A, turns: &mut Turns) {
        for _ in 0..WARM_UP_TURNS {
            if self.slot.must_stop() {
                return;
            }
            turns.turn(app, self.time.now());
            if self.inline_kicks && turns.wants_kick() {
                let _ = Guard::Free.enter(|kernel| turns.kick(kernel));
            }
        }
    }

    /// Forwards what has arrived, then waits for what was sent; both for a bounded time.
    fn drain<A: App>(&self, app: &mut A, turns: &mut Turns) {
        let mut step = |turns: &mut Turns| {
            let report = turns.turn(app, self.time.now());
            if self.inline_kicks && turns.wants_kick() {
                let _ = Guard::Free.enter(|kernel| turns.kick(kernel));
            }
            self.rest(&mut Guard::Free);
            report.received
        };
        let start = Instant::now();
        while step(turns) != 0 && start.elapsed() < DRAIN_RECEIVE {}
        turns.stop_receiving();
        let start = Instant::now();
        step(turns);
        while turns.in_flight() != 0 && start.elapsed() < DRAIN_TRANSMIT {
            step(turns);
        }
        turns.drain(app, self.time.now());
    }
}

/// How an incarnation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Stopped,
    /// It panicked, or could not be isolated again.
    Failed,
    /// It could not be isolated, and will not be next time.
    Refused,
}

impl Body {
    /// Prepares the calling thread for isolation, if the worker shall have it; else only pins it and
    /// locks what its process inherited.
    pub(crate) fn prepare(&self, placement: Placement) -> Result<Option<Prepared>, Refused> {
        match &self.isolation {
            Some(isolation) => isolation.prepare(self.cpu, &self.status).map(Some),
            None => {
                crate::affinity::prepare(&self.name, self.cpu, placement);
                Ok(None)
            }
        }
    }

    /// One incarnation. Gives the body back, for the next one or to be closed.
    pub(crate) fn live(mut self, slot: &Slot, prepared: Result<Option<Prepared>, Refused>) -> (Self, End) {
        let restarts = slot.count_start();
        slot.set_state(WorkerState::Starting);
        if restarts > 0 {
            self.recover();
        }
        let mut prepared = match prepared {
            Ok(prepared) => prepared,
            Err(refused) => {
                slot.say(&refused.to_string());
                slot.set_state(WorkerState::Dead);
                return (self, End::Refused);
            }
        };
        let _logging = self
            .isolation
            .as_ref()
            .zip(self.recorder.as_ref())
            .map(|(isolation, recorder)| isolation.log(recorder, self.cpu));
        let mut turns = Turns::new(self.queues, self.frames, &self.segment, &self.blocks);
        let setup = Setup {
            worker: &self.name,
            ports: &self.port_names,
            restarts,
            pool: &Arc::clone(turns.pool()),
            time: self.time,
        };
        let pace = Pace { slot, idle: self.idle, inline_kicks: self.inline_kicks, time: self.time };
        let run = || self.main.run(&setup, &mut turns, &pace, prepared.as_mut());
        let result = catch_unwind(AssertUnwindSafe(run));
        drop(prepared);
        let (queues, frames) = turns.into_parts();
        self.queues = queues;
        self.frames = frames;
        match result {
            Ok(Err(Cut::Refused(refused))) => {
                slot.say(&refused.to_string());
                slot.set_state(WorkerState::Dead);
                (self, End::Refused)
            }
            // Not what the program wanted: the next incarnation prepares anew, and is refused if it cannot.
            Ok(Err(Cut::Broken(error @ StrictError::Rearm(_)))) => {
                slot.say(&error.to_string());
                slot.set_state(WorkerState::Dead);
                (self, End::Failed)
            }
            Ok(ended) => {
                if let Err(Cut::Broken(error)) = ended {
                    slot.say(&error.to_string());
                }
                slot.set_in_hand(self.frames.len() as u32);
                slot.set_state(WorkerState::Stopped);
                (self, End::Stopped)
            }
            Err(panic) => {
                let text = panic
                    .downcast_ref::<&str>()
                    .map(|s| (*s).to_owned())
                    .or_else(|| panic.downcast_ref::<String>().cloned());
                if let Some(text) = text {
                    slot.say_if_silent(&text);
                }
                slot.set_state(WorkerState::Dead);
                (self, End::Failed)
            }
        }
    }

    /// Takes over what a dead predecessor left: rings first, then everything else that was its own.
    #[allow(unsafe_code, reason = "rebuilding the free list of a dead worker")]
    pub(crate) fn recover(&mut self) {
        let mut survey = Survey::new(&self.frames);
        for queue in &mut self.queues {
            queue.survey(&mut survey);
        }
        // SAFETY: the worker that had this cache's frames is dead (the zygote has reaped it, or its
        // thread has unwound and dropped app and batches), this body makes frames only after this
        // call, and all of its queues were surveyed.
        let found = unsafe { survey.finish(&mut self.frames) };
        tracing::info!(
            worker = self.name,
            free = found.free,
            in_rings = found.in_rings,
            unpublished = found.unpublished,
            lies = found.lies,
            "took the frames of the dead worker over"
        );
    }
}
