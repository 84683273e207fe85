//! A dataplane that runs: watching it, talking about it, stopping it.
//!
//! Contract: housekeeping is two threads of the program, the [kicker] and the watcher,
//! which reports what happened to workers, follows the links and publishes port statistics. Stopping
//! asks the workers to drain, ends within a second, by force if need be, and gives every frame back to
//! its pool's depot. Dropping a [`Running`] stops it.

use crate::builder::{LaunchError, PortRef, Restart};
use crate::control::{Control, WorkerEpochs, WorkerState};
use crate::drainer;
use crate::housekeeping::{elsewhere, spawn, stay_on};
use crate::kicker::{self, Target};
use crate::observer;
use crate::report::{PoolEnd, StopReport, WorkerEnd};
use crate::tables::Epochs;
use crate::watcher::{Shared, lock};
use crate::worker::{Body, End, Placement, Time};
use crate::zygote::{self, Handle};
use isoplane_drivers::Port;
use isoplane_isolation::Status;
use isoplane_isolation::diagnostics::Source;
use isoplane_isolation::observer::{Sender, SenderTally};
use isoplane_memory::recovery::Balance;
use isoplane_memory::stats::{Block, BlockId, Segment, SegmentReader};
use isoplane_memory::{FrameCache, Pool};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const START_PATIENCE: Duration = Duration::from_secs(10);
const STOP_PATIENCE: Duration = Duration::from_millis(700);

pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) placement: Placement,
    pub(crate) restart: Restart,
    pub(crate) kicker_cpu: Option<usize>,
    pub(crate) ports: Vec<Box<dyn Port>>,
    pub(crate) bodies: Vec<Body>,
    pub(crate) targets: Vec<Target>,
    pub(crate) sources: Vec<Source>,
    pub(crate) segment: Arc<Segment>,
    pub(crate) supervisor_blocks: Vec<BlockId>,
    pub(crate) isolation_blocks: Vec<BlockId>,
    pub(crate) port_blocks: Vec<BlockId>,
    pub(crate) kicker_block: BlockId,
    pub(crate) control: Control,
    pub(crate) time: Time,
}

/// A running dataplane.
pub struct Running {
    name: String,
    shared: Arc<Shared>,
    segment: Arc<Segment>,
    reader: SegmentReader,
    zygote: Option<Handle>,
    /// The program's copies of what the worker processes own; worker threads bring theirs back.
    bodies: Vec<Body>,
    threads: Vec<JoinHandle<Body>>,
    housekeeping: Vec<JoinHandle<()>>,
    statuses: Vec<Status>,
    tally: Option<Arc<Mutex<SenderTally>>>,
    stopped: bool,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("name", &self.name)
            .field("workers", &self.shared.names)
            .finish_non_exhaustive()
    }
}

/// A pool and what each worker on it has in hand, by owner id.
type HandsOn = (Arc<Pool>, Vec<(u8, u32)>);

/// Why a dataplane ended without being asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The zygote was killed; the workers died with it. Launch the dataplane again.
    #[error("the zygote died, and the workers with it; launch the dataplane again")]
    ZygoteDied,
    /// No worker is left that would ever run again.
    #[error("all workers have died and were given up; the last one said: {last_words}")]
    NoWorkers {
        /// What the last one that panicked said.
        last_words: String,
    },
}

pub(crate) fn start(parts: Parts) -> Result<Running, LaunchError> {
    let Parts { name, placement, restart, ports, mut bodies, segment, control, time, .. } = parts;
    let reader = segment.reader()?;
    let block = |id: BlockId| segment.block(id).ok_or(isoplane_memory::stats::StatsError::NotASegment);
    let kicker_block = block(parts.kicker_block)?;
    let port_blocks = parts.port_blocks.iter().map(|id| block(*id)).collect::<Result<Vec<_>, _>>()?;
    let worker_blocks = parts.supervisor_blocks.iter().map(|id| block(*id)).collect::<Result<Vec<_>, _>>()?;
    let shared = Arc::new(Shared {
        names: bodies.iter().map(|b| b.name.clone()).collect(),
        control: control.clone(),
        stop: Arc::new(AtomicBool::new(false)),
        zygote_dead: AtomicBool::new(false),
        last_words: Mutex::new(vec![None; bodies.len()]),
        ports: Mutex::new(ports),
    });
    let mut observed = Vec::new();
    for (body, id) in bodies.iter().zip(&parts.isolation_blocks) {
        observed.push(observer::Worker {
            name: body.name.clone(),
            cpu: body.cpu,
            status: body.status.clone(),
            block: block(*id)?,
        });
    }
    let named = bodies.iter().filter_map(|b| b.isolation.as_ref()).any(|i| i.name_senders);
    let tally = named.then(Arc::default);
    let spinning: Vec<usize> = bodies.iter().filter_map(|b| b.cpu).collect();
    // Fork first: from here on the program may have threads.
    let zygote = match placement {
        Placement::Process => Some(
            zygote::launch(&mut bodies, &control, restart)
                .map_err(|source| LaunchError::Os { call: "fork the zygote", source })?,
        ),
        Placement::Thread => None,
    };
    let mut running = Running {
        name,
        reader,
        zygote: None,
        bodies: Vec::new(),
        threads: Vec::new(),
        housekeeping: Vec::new(),
        statuses: observed.iter().map(|worker| worker.status.clone()).collect(),
        tally,
        stopped: false,
        segment,
        shared,
    };
    match zygote {
        Some(handle) => {
            running.bodies = bodies;
            running.zygote = Some(handle);
        }
        None => running.start_threads(bodies, restart)?,
    }
    running.start_kicker(parts.targets, kicker_block, time, parts.kicker_cpu, &spinning)?;
    running.start_watcher(worker_blocks, port_blocks, &spinning)?;
    running.start_observer(observed, time, &spinning)?;
    running.start_drainer(parts.sources, time, &spinning)?;
    running.wait_until_started()?;
    Ok(running)
}

impl Running {
    fn start_threads(&mut self, bodies: Vec<Body>, restart: Restart) -> Result<(), LaunchError> {
        for (index, body) in bodies.into_iter().enumerate() {
            let control = self.shared.control.clone();
            let name = format!("iso-{}", body.name);
            self.threads.push(spawn(&name, move || thread_main(body, &control, index, restart))?);
        }
        Ok(())
    }

    fn start_kicker(
        &mut self,
        targets: Vec<Target>,
        block: Block,
        time: Time,
        cpu: Option<usize>,
        spinning: &[usize],
    ) -> Result<(), LaunchError> {
        if targets.is_empty() {
            return Ok(());
        }
        let stop = Arc::clone(&self.shared.stop);
        // Anywhere but on a spinning worker's CPU, unless there is nowhere else.
        let cpus = cpu.map_or_else(|| elsewhere(spinning), |cpu| vec![cpu]);
        if cpus.is_empty() {
            tracing::warn!(
                "the kicker shares the CPUs of spinning workers: sending will wait for the scheduler"
            );
        }
        self.housekeeping.push(spawn("iso-kicker", move || {
            stay_on(&cpus, "kicker");
            kicker::run(targets, &block, time, &stop);
        })?);
        Ok(())
    }

    fn start_watcher(
        &mut self,
        workers: Vec<Block>,
        ports: Vec<Block>,
        spinning: &[usize],
    ) -> Result<(), LaunchError> {
        let cpus = elsewhere(spinning);
        let shared = Arc::clone(&self.shared);
        let events = match &self.zygote {
            Some(handle) => Some(handle.events.try_clone().map_err(|error| LaunchError::Os {
                call: "dup",
                source: Errno::from_raw(error.raw_os_error().unwrap_or(0)),
            })?),
            None => None,
        };
        self.housekeeping.push(spawn("iso-watcher", move || {
            stay_on(&cpus, "watcher");
            shared.watch(events.as_ref(), &workers, &ports);
        })?);
        Ok(())
    }

    fn start_observer(
        &mut self,
        workers: Vec<observer::Worker>,
        time: Time,
        spinning: &[usize],
    ) -> Result<(), LaunchError> {
        let (control, stop) = (self.shared.control.clone(), Arc::clone(&self.shared.stop));
        let (cpus, tally) = (elsewhere(spinning), self.tally.clone());
        self.housekeeping.push(spawn("iso-observer", move || {
            stay_on(&cpus, "observer");
            observer::run(&workers, &control, time, tally.as_deref(), &stop);
        })?);
        Ok(())
    }

    fn start_drainer(
        &mut self,
        sources: Vec<Source>,
        time: Time,
        spinning: &[usize],
    ) -> Result<(), LaunchError> {
        if sources.is_empty() {
            return Ok(());
        }
        let (stop, cpus) = (Arc::clone(&self.shared.stop), elsewhere(spinning));
        let program = tracing::dispatcher::get_default(Clone::clone);
        let clock = match time {
            Time::Tsc(clock) => Some(clock),
            Time::Kernel(_) => None,
        };
        self.housekeeping.push(spawn("iso-drainer", move || {
            stay_on(&cpus, "drainer");
            drainer::run(sources, clock, &program, &stop);
        })?);
        Ok(())
    }

    fn wait_until_started(&self) -> Result<(), LaunchError> {
        let start = Instant::now();
        for (slot, name) in self.shared.control.slots().zip(&self.shared.names) {
            loop {
                let state = slot.state();
                if state == WorkerState::Running && slot.turns() > 0 {
                    break;
                }
                let words = || slot.hear().unwrap_or_else(|| format!("it is {state:?}"));
                let waited = start.elapsed();
                if self.shared.zygote_dead.load(Ordering::Acquire) {
                    let reason = "the zygote died".to_owned();
                    return Err(LaunchError::Start { worker: name.clone(), waited, reason });
                }
                if state == WorkerState::GivenUp || waited > START_PATIENCE {
                    let said = lock(&self.shared.last_words).iter().flatten().next_back().cloned();
                    let reason = said.unwrap_or_else(words);
                    return Err(LaunchError::Start { worker: name.clone(), waited, reason });
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }

    /// The dataplane's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The statistics segment, as another process would read it.
    #[must_use]
    pub const fn statistics(&self) -> &SegmentReader {
        &self.reader
    }

    /// The segment itself, to pass its descriptor on.
    #[must_use]
    pub const fn segment(&self) -> &Arc<Segment> {
        &self.segment
    }

    /// A worker's status block: backend, breaches, interruptions, slow path.
    #[must_use]
    pub fn isolation(&self, worker: usize) -> Option<&Status> {
        self.statuses.get(worker)
    }

    /// Who sent most IPIs to the workers' CPUs since the launch, at most `n`: process and kernel function.
    /// Empty unless [`WorkerIsolation::name_senders`](crate::WorkerIsolation::name_senders) asks for it.
    #[must_use]
    pub fn senders(&self, n: usize) -> Vec<Sender> {
        self.tally.as_ref().map(|tally| lock(tally).top(n)).unwrap_or_default()
    }

    /// Number of workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.shared.names.len()
    }

    /// State of a worker, by its number in the order of the builder's calls.
    #[must_use]
    pub fn state(&self, worker: usize) -> Option<WorkerState> {
        (worker < self.workers()).then(|| self.shared.control.slot(worker).state())
    }

    /// Process id of a worker; `None` for one in a thread.
    #[must_use]
    pub fn worker_pid(&self, worker: usize) -> Option<u32> {
        (worker < self.workers()).then(|| self.shared.control.slot(worker).pid()).filter(|pid| *pid != 0)
    }

    /// Process id of the zygote; `None` when workers are threads.
    #[must_use]
    pub fn zygote_pid(&self) -> Option<u32> {
        self.zygote.as_ref().map(|z| z.pid.as_raw() as u32)
    }

    /// How often a worker was started again.
    #[must_use]
    pub fn restarts(&self, worker: usize) -> Option<u32> {
        (worker < self.workers()).then(|| self.shared.control.slot(worker).starts().saturating_sub(1))
    }

    /// Asks a port something; cold.
    pub fn with_port<R>(&self, port: PortRef, ask: impl FnOnce(&dyn Port) -> R) -> Option<R> {
        lock(&self.shared.ports).get(port.0).map(|port| ask(&**port))
    }

    /// Waits until every worker that runs has ended the turn it was in: what was unlinked from tables
    /// before this call is not in use any more. False after `patience`.
    #[must_use]
    pub fn synchronise(&self, patience: Duration) -> bool {
        let start = Instant::now();
        let epochs = self.epochs();
        let before = epochs.now();
        loop {
            if epochs.passed(&before) {
                return true;
            }
            if start.elapsed() > patience {
                return false;
            }
            std::thread::yield_now();
        }
    }

    /// How far the workers are, for whoever changes tables under them. Stays usable when this is gone: workers
    /// that have stopped hold nothing.
    #[must_use]
    pub fn epochs(&self) -> WorkerEpochs {
        self.shared.control.epochs()
    }

    /// Why the dataplane has ended by itself, if it has.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        if self.shared.zygote_dead.load(Ordering::Acquire) {
            return Some(Failure::ZygoteDied);
        }
        if self.shared.control.slots().all(|slot| slot.state() == WorkerState::GivenUp) {
            let words = lock(&self.shared.last_words).iter().flatten().next_back().cloned();
            return Some(Failure::NoWorkers { last_words: words.unwrap_or_else(|| "nothing".to_owned()) });
        }
        None
    }

    /// Runs until SIGINT, SIGTERM or a failure, then stops.
    ///
    /// # Errors
    /// When signal handlers cannot be installed.
    pub fn run_until_signal(self) -> std::io::Result<StopReport> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
        loop {
            if signals.pending().next().is_some() {
                break;
            }
            if let Some(failure) = self.failure() {
                tracing::error!("{failure}");
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(self.stop())
    }

    /// Stops: workers forward what has arrived, wait for what they sent, and end. A process that has not
    /// ended within 0.7 s is killed; a thread ([`Placement::Thread`]) cannot be, so this waits for its
    /// app's turn to end. Then the queues are closed and the frames counted.
    pub fn stop(mut self) -> StopReport {
        self.stop_now()
    }

    fn stop_now(&mut self) -> StopReport {
        self.stopped = true;
        let asked = Instant::now();
        for slot in self.shared.control.slots() {
            slot.ask_to_stop();
        }
        let zygote_died = self.shared.zygote_dead.load(Ordering::Acquire);
        let (mut forced, mut gone) = (false, true);
        if let Some(handle) = self.zygote.take() {
            (forced, gone) = end_zygote(&handle, &self.shared.control, asked);
            forced &= !zygote_died;
        }
        if !gone {
            tracing::error!("a worker cannot be killed; its queues and frames are left as they are");
            std::mem::forget(std::mem::take(&mut self.bodies));
        }
        let mut lost_threads = false;
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(body) => self.bodies.push(body),
                Err(_) => lost_threads = true,
            }
        }
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.housekeeping.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a housekeeping thread panicked");
            }
        }
        let workers = self.worker_ends();
        let pools = self.close();
        StopReport { workers, pools, forced: forced || lost_threads, zygote_died }
    }

    fn worker_ends(&self) -> Vec<WorkerEnd> {
        let mut words = lock(&self.shared.last_words);
        let slots = self.shared.control.slots().zip(&self.shared.names).zip(words.iter_mut());
        slots
            .map(|((slot, name), words)| WorkerEnd {
                name: name.clone(),
                state: slot.state(),
                restarts: slot.starts().saturating_sub(1),
                last_words: slot.hear().or_else(|| words.take()),
            })
            .collect()
    }

    /// All workers are dead: counts the frames, then gives them all back.
    #[allow(unsafe_code, reason = "retiring the caches of dead workers")]
    fn close(&mut self) -> Vec<PoolEnd> {
        let mut pools: Vec<HandsOn> = Vec::new();
        let bodies = std::mem::take(&mut self.bodies);
        for (slot, body) in self.slots_of(&bodies) {
            let pool = body.frames.pool();
            let stopped = slot.state() == WorkerState::Stopped;
            // One that died could not say what it held: what its owner byte claims is taken as true.
            let in_hand = if stopped { slot.in_hand() } else { body.frames.owned() };
            let entry = (body.frames.id(), in_hand);
            match pools.iter_mut().find(|(p, _)| p.same_as(pool)) {
                Some((_, entries)) => entries.push(entry),
                None => pools.push((Arc::clone(pool), vec![entry])),
            }
        }
        let balances: Vec<Balance> = pools.iter().map(|(pool, in_hand)| Balance::of(pool, in_hand)).collect();
        for body in bodies {
            for queue in body.queues {
                queue.close();
            }
            let frames: FrameCache = body.frames;
            // SAFETY: the worker that had frames of this cache is dead: its process was reaped or its
            // thread joined, with app and batches dropped.
            unsafe { frames.retire() };
        }
        lock(&self.shared.ports).clear();
        let end = |(pool, _): HandsOn, balance| PoolEnd {
            name: pool.name().to_owned(),
            balance,
            in_depot: pool.in_depot(),
        };
        pools.into_iter().zip(balances).map(|(pool, balance)| end(pool, balance)).collect()
    }

    fn slots_of<'a>(
        &'a self,
        bodies: &'a [Body],
    ) -> impl Iterator<Item = (&'a crate::control::Slot, &'a Body)> {
        bodies.iter().filter_map(|body| {
            let index = self.shared.names.iter().position(|name| *name == body.name)?;
            Some((self.shared.control.slot(index), body))
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.stopped {
            let report = self.stop_now();
            if !report.is_clean() {
                tracing::warn!("the dataplane {:?} did not stop cleanly: {report:?}", self.name);
            }
        }
    }
}

/// Waits for the zygote, then kills it; says whether it had to, and whether all worker processes are gone.
fn end_zygote(handle: &Handle, control: &Control, asked: Instant) -> (bool, bool) {
    let mut forced = false;
    let mut patience = STOP_PATIENCE;
    loop {
        match waitpid(handle.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => {}
            Err(Errno::EINTR) => continue,
            _ => break,
        }
        if asked.elapsed() > patience {
            forced = true;
            // The workers die with it; a second round only waits for the kernel to say so.
            let _ = kill(handle.pid, Signal::SIGKILL);
            patience += Duration::from_secs(5);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // After a forced end the workers are orphans that the kernel is killing.
    let gone = |pid: u32| kill(Pid::from_raw(pid as i32), None) == Err(Errno::ESRCH) || is_zombie(pid);
    let end = Instant::now() + Duration::from_secs(5);
    let mut all_gone = true;
    for slot in control.slots() {
        let ended = || slot.pid() == 0 || slot.state().is_final() || gone(slot.pid());
        while !ended() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        all_gone &= ended();
    }
    (forced, all_gone)
}

/// A dead process that its new parent has not reaped yet.
fn is_zombie(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
}

fn thread_main(mut body: Body, control: &Control, index: usize, restart: Restart) -> Body {
    let slot = control.slot(index);
    let mut failures = 0;
    loop {
        let start = Instant::now();
        // A thread for each incarnation: frames cannot leave it, and what it put aside ends with it.
        let (back, end) = std::thread::scope(|scope| {
            let live = scope.spawn(|| {
                let prepared = body.prepare(Placement::Thread);
                body.live(slot, prepared)
            });
            live.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        body = back;
        if end == End::Stopped {
            return body;
        }
        let pause = if slot.must_stop() || end == End::Refused {
            None
        } else {
            restart.pause(failures, start.elapsed())
        };
        let Some(pause) = pause else {
            slot.set_state(WorkerState::GivenUp);
            return body;
        };
        tracing::warn!(worker = body.name, "the worker failed; starting it again in {pause:?}");
        failures = if start.elapsed() > restart.forgive_after() { 1 } else { failures + 1 };
        let died = Instant::now();
        while let Some(left) = pause.checked_sub(died.elapsed()).filter(|left| !left.is_zero()) {
            if slot.must_stop() {
                slot.set_state(WorkerState::GivenUp);
                return body;
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }
}
