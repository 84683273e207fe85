//! A worker from its start to its end, in a process of its own or in a thread.
//!
//! Contract: one incarnation of a worker takes over what its predecessor left (frames, rings, messages),
//! builds its app and makes turns until the control slot says stop; then it drains and reports what it
//! holds. A panic anywhere in the app ends the incarnation, not the program.

use crate::app::App;
use crate::control::{Slot, WorkerState};
use crate::turns::{Turns, WorkerBlocks};
use isoplane_drivers::Queue;
use isoplane_memory::stats::Segment;
use isoplane_memory::{Clock, FrameCache, Kernel, Pool, Survey};
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
    /// Give the CPU away (`sched_yield`, a system call): for machines with fewer CPUs than spinners.
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
    /// The vDSO, which may become a system call.
    Kernel(Instant),
}

impl Time {
    /// The TSC if the kernel trusts it; else the kernel's clock, with a warning that says why.
    #[must_use]
    pub fn best() -> Self {
        match Clock::tsc() {
            Ok(clock) => Self::Tsc(clock),
            Err(reason) => {
                tracing::warn!("workers take their time from the kernel: {reason}");
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
    pub(crate) main: Box<dyn Main>,
}

/// The loop, compiled for one kind of app.
pub(crate) trait Main: Send {
    fn run(&self, setup: &Setup<'_>, turns: &mut Turns, pace: &Pace<'_>);
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
    fn run(&self, setup: &Setup<'_>, turns: &mut Turns, pace: &Pace<'_>) {
        let mut app = (self.0)(setup);
        pace.slot.set_state(WorkerState::Running);
        pace.turns_until_stopped(&mut app, turns);
        pace.slot.set_state(WorkerState::Draining);
        pace.drain(&mut app, turns);
    }
}

/// Longest time that a stopping worker goes on forwarding what its receive rings hold.
const DRAIN_RECEIVE: Duration = Duration::from_millis(50);
/// Longest time that it then waits for its transmissions to complete.
const DRAIN_TRANSMIT: Duration = Duration::from_millis(400);

impl Pace<'_> {
    #[inline(always)]
    fn turns_until_stopped<A: App>(&self, app: &mut A, turns: &mut Turns) {
        let kernel = Kernel::outside_isolation();
        let mut count = self.slot.turns();
        while !self.slot.must_stop() {
            let report = turns.turn(app, self.time.now());
            if self.inline_kicks {
                turns.kick(&kernel);
            }
            count = count.wrapping_add(1);
            self.slot.turn_ended(count);
            if report.received == 0 {
                self.rest();
            }
        }
    }

    #[inline(always)]
    fn rest(&self) {
        match self.idle {
            Idle::Spin => std::hint::spin_loop(),
            Idle::Yield => std::thread::yield_now(),
        }
    }

    /// Forwards what has arrived, then waits for what was sent; both for a bounded time.
    fn drain<A: App>(&self, app: &mut A, turns: &mut Turns) {
        let kernel = Kernel::outside_isolation();
        let mut step = |turns: &mut Turns| {
            let report = turns.turn(app, self.time.now());
            if self.inline_kicks {
                turns.kick(&kernel);
            }
            self.rest();
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
    Panicked,
}

impl Body {
    /// One incarnation. Gives the body back, for the next one or to be closed.
    pub(crate) fn live(mut self, slot: &Slot) -> (Self, End) {
        let restarts = slot.count_start();
        slot.set_state(WorkerState::Starting);
        if restarts > 0 {
            self.recover();
        }
        let mut turns = Turns::new(self.queues, self.frames, &self.segment, &self.blocks);
        let setup = Setup {
            worker: &self.name,
            ports: &self.port_names,
            restarts,
            pool: &Arc::clone(turns.pool()),
            time: self.time,
        };
        let pace = Pace { slot, idle: self.idle, inline_kicks: self.inline_kicks, time: self.time };
        let result = catch_unwind(AssertUnwindSafe(|| self.main.run(&setup, &mut turns, &pace)));
        let (queues, frames) = turns.into_parts();
        self.queues = queues;
        self.frames = frames;
        match result {
            Ok(()) => {
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
                (self, End::Panicked)
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
