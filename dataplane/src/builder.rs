//! Describing a dataplane: its ports, its workers, what each of them runs.
//!
//! Contract: everything that can be wrong is found by [`Builder::launch`] before anything is forked,
//! and said with the name of the thing. `launch` forks, so it wants a process with one thread; the
//! program may start threads afterwards.

use crate::app::App;
use crate::control::Control;
use crate::kicker;
use crate::observer;
use crate::running::{self, Running};
use crate::turns::WorkerBlocks;
use crate::watcher;
use crate::worker::{Body, Idle, Main, MainOf, Placement, Setup, Time};
use crate::worker_isolation::WorkerIsolation;
use isoplane_drivers::{Capabilities, Port};
use isoplane_isolation::diagnostics::{self, ChannelError};
use isoplane_isolation::{Privileges, Status};
use isoplane_memory::stats::{Field, SegmentBuilder, StatsError};
use isoplane_memory::{Pool, PoolError, RegionError};
use std::sync::Arc;
use std::time::Duration;

/// A port of the dataplane, as [`Builder::port`] named it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRef(pub(crate) usize);

/// Who tells the kernel that rings have work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kicks {
    /// A housekeeping thread: workers make no system call.
    #[default]
    Kicker,
    /// Each worker itself, once a turn: no second CPU needed, but a system call in the loop.
    Inline,
}

/// When a worker that died is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    /// Never: the dataplane goes on without it.
    Never,
    /// After a pause that doubles with each death from `first` to `longest`; not after `limit` deaths
    /// in a row. A worker that lived for ten seconds starts counting anew.
    BackOff {
        /// First pause.
        first: Duration,
        /// Longest pause.
        longest: Duration,
        /// Deaths in a row before it is given up.
        limit: u32,
    },
}

impl Default for Restart {
    fn default() -> Self {
        Self::BackOff { first: Duration::from_millis(1), longest: Duration::from_secs(1), limit: 20 }
    }
}

impl Restart {
    pub(crate) const fn forgive_after(self) -> Duration {
        Duration::from_secs(10)
    }

    /// Pause before the next start, after `failures` deaths in a row and a life of `lived`.
    pub(crate) fn pause(self, failures: u32, lived: Duration) -> Option<Duration> {
        let Self::BackOff { first, longest, limit } = self else { return None };
        let failures = if lived > self.forgive_after() { 0 } else { failures };
        if failures >= limit {
            return None;
        }
        Some(first.saturating_mul(1 << failures.min(20)).min(longest))
    }
}

/// A worker to be: which CPU, how many frames, which queues.
#[derive(Debug, Clone)]
pub struct Worker {
    name: String,
    cpu: Option<usize>,
    frames: u32,
    idle: Idle,
    queues: Vec<(PortRef, u16)>,
    counters: Vec<Field>,
}

impl Worker {
    /// A worker with 1024 free frames, on no CPU in particular.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            cpu: None,
            frames: 1024,
            idle: Idle::Spin,
            queues: Vec::new(),
            counters: Vec::new(),
        }
    }

    /// Pins it to a CPU.
    #[must_use]
    pub const fn cpu(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// Free frames of its own, beyond those that its ports' rings hold.
    #[must_use]
    pub const fn frames(mut self, frames: u32) -> Self {
        self.frames = frames;
        self
    }

    /// What it does when nothing arrives.
    #[must_use]
    pub const fn idle(mut self, idle: Idle) -> Self {
        self.idle = idle;
        self
    }

    /// Gives it a queue of a port. Its [`PortId`](crate::PortId)s count in the order of these calls.
    #[must_use]
    pub fn queue(mut self, port: PortRef, queue: u16) -> Self {
        self.queues.push((port, queue));
        self
    }

    /// Declares counters of its app, in the order in which `Turn::count` numbers them.
    #[must_use]
    pub fn counters(mut self, fields: &[Field]) -> Self {
        self.counters.extend_from_slice(fields);
        self
    }
}

/// Why a dataplane could not be launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// Forking with several threads would leave locks held by nobody in the child.
    #[error(
        "the process has {threads} threads; launch() forks, so call it before any other thread is \
         started (or choose Placement::Thread)"
    )]
    Threads {
        /// How many there are.
        threads: usize,
    },
    /// There is nothing to run.
    #[error("the dataplane {name:?} has no worker")]
    NoWorkers {
        /// Its name.
        name: String,
    },
    /// Two workers of one name, or a name that is no label.
    #[error("worker name {name:?}: names are 1 to 32 bytes and unique")]
    WorkerName {
        /// The name.
        name: String,
    },
    /// A worker without queues.
    #[error("worker {worker:?} has no queue; give it one with Worker::queue")]
    NoQueues {
        /// The worker.
        worker: String,
    },
    /// More ports than a `PortId` can name.
    #[error("worker {worker:?} has {queues} queues; at most 256")]
    TooManyQueues {
        /// The worker.
        worker: String,
        /// How many.
        queues: usize,
    },
    /// No such queue, or it has an owner already.
    #[error(
        "worker {worker:?}: queue {queue} of port {port:?} does not exist or belongs to another worker; the port has {queues}"
    )]
    Queue {
        /// The worker.
        worker: String,
        /// The port.
        port: String,
        /// The queue asked for.
        queue: u16,
        /// Queues that the port has.
        queues: u16,
    },
    /// Ports of one worker must share a pool: they exchange frames.
    #[error(
        "worker {worker:?}: port {port:?} has frames of pool {pool:?}, the others of {other:?}; open all ports of a worker on one pool"
    )]
    PoolMismatch {
        /// The worker.
        worker: String,
        /// The port that differs.
        port: String,
        /// Its pool.
        pool: String,
        /// The others' pool.
        other: String,
    },
    /// The CPU does not exist or we may not use it.
    #[error("worker {worker:?}: CPU {cpu} is not ours; this process may run on {allowed:?}")]
    Cpu {
        /// The worker.
        worker: String,
        /// The CPU asked for.
        cpu: usize,
        /// CPUs that we may use.
        allowed: Vec<usize>,
    },
    /// The kicker would share a spinning worker's CPU, and neither would give way.
    #[error("the kicker may not run on CPU {cpu}: worker {worker:?} spins there")]
    KickerCpu {
        /// The CPU.
        cpu: usize,
        /// The worker.
        worker: String,
    },
    /// The isolation that was asked for is not to be had.
    #[error("cannot isolate workers: {0}")]
    Isolation(#[from] isoplane_isolation::Unmet),
    /// Threads of a process share its user and group.
    #[error("worker threads cannot drop privileges: they are the program's too; use Placement::Process")]
    PrivilegesOfThreads,
    /// The ring for log lines.
    #[error(transparent)]
    Log(#[from] ChannelError),
    /// Frames.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Statistics segment.
    #[error(transparent)]
    Statistics(#[from] StatsError),
    /// Control region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A system call.
    #[error("{call}: {source}")]
    Os {
        /// Which.
        call: &'static str,
        /// The kernel's answer.
        source: nix::errno::Errno,
    },
    /// A worker died or hung before its first turn.
    #[error("worker {worker:?} did not start within {waited:?}: {reason}")]
    Start {
        /// The worker.
        worker: String,
        /// How long we waited.
        waited: Duration,
        /// What is known.
        reason: String,
    },
}

/// Collects a dataplane's parts. Made by [`Dataplane::builder`].
pub struct Builder {
    name: String,
    ports: Vec<Box<dyn Port>>,
    workers: Vec<(Worker, Box<dyn Main>)>,
    placement: Placement,
    kicks: Kicks,
    restart: Restart,
    kicker_cpu: Option<usize>,
    isolation: Option<WorkerIsolation>,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let workers: Vec<_> = self.workers.iter().map(|(worker, _)| worker).collect();
        f.debug_struct("Builder").field("name", &self.name).field("workers", &workers).finish_non_exhaustive()
    }
}

/// Where a dataplane begins.
#[derive(Debug)]
pub struct Dataplane;

impl Dataplane {
    /// Starts describing a dataplane. `isoplane top NAME` finds it by this name.
    #[must_use]
    pub fn builder(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            ports: Vec::new(),
            workers: Vec::new(),
            placement: Placement::Process,
            kicks: Kicks::Kicker,
            restart: Restart::default(),
            kicker_cpu: None,
            isolation: Some(WorkerIsolation::default()),
        }
    }
}

impl Builder {
    /// Adds an open port.
    pub fn port(&mut self, port: impl Port + 'static) -> PortRef {
        self.boxed_port(Box::new(port))
    }

    /// Adds an open port whose driver was chosen at run time.
    pub fn boxed_port(&mut self, port: Box<dyn Port>) -> PortRef {
        self.ports.push(port);
        PortRef(self.ports.len() - 1)
    }

    /// Adds a worker and what it runs. `build` is called in the worker each time it starts; what it
    /// captures is inherited by the fork, and the app that it makes never leaves the worker.
    pub fn worker<A, F>(&mut self, worker: Worker, build: F) -> &mut Self
    where
        A: App,
        F: Fn(&Setup<'_>) -> A + Send + 'static,
    {
        self.workers.push((worker, Box::new(MainOf(build))));
        self
    }

    /// Processes (the default) or threads.
    pub const fn placement(&mut self, placement: Placement) -> &mut Self {
        self.placement = placement;
        self
    }

    /// Who kicks: a kicker (the default) or the workers.
    pub const fn kicks(&mut self, kicks: Kicks) -> &mut Self {
        self.kicks = kicks;
        self
    }

    /// When dead workers are started again.
    pub const fn restart(&mut self, restart: Restart) -> &mut Self {
        self.restart = restart;
        self
    }

    /// Pins the kicker. By default it runs on any CPU that no worker is pinned to.
    pub const fn kicker_cpu(&mut self, cpu: usize) -> &mut Self {
        self.kicker_cpu = Some(cpu);
        self
    }

    /// What isolation workers get: strict by default, `None` for none. A worker that was given no CPU is
    /// isolated wherever the scheduler puts it; one that kicks inline or yields when idle does so by the
    /// slow path.
    pub fn isolation(&mut self, isolation: impl Into<Option<WorkerIsolation>>) -> &mut Self {
        self.isolation = isolation.into();
        self
    }

    /// Checks everything, forks the zygote (which forks the workers) or starts the threads, starts the
    /// housekeeping threads and waits until every worker has made its first turn.
    ///
    /// # Errors
    /// See [`LaunchError`]; nothing runs after an error.
    pub fn launch(mut self) -> Result<Running, LaunchError> {
        self.check()?;
        let mut segment = SegmentBuilder::default();
        let port_names: Vec<String> = self.ports.iter().map(|p| short(p.name())).collect();
        let mut blocks = Vec::new();
        for (worker, _) in &self.workers {
            let names: Vec<&str> = worker.queues.iter().map(|(p, _)| port_names[p.0].as_str()).collect();
            blocks.push(WorkerBlocks::declare(&mut segment, &worker.name, &names, &worker.counters));
        }
        let supervisor_blocks: Vec<_> = self
            .workers
            .iter()
            .map(|(w, _)| segment.block(&w.name, "supervisor", &watcher::WORKER_FIELDS))
            .collect();
        let port_blocks: Vec<_> =
            port_names.iter().map(|name| segment.block("", name, &watcher::PORT_FIELDS)).collect();
        let isolation_blocks: Vec<_> = self
            .workers
            .iter()
            .map(|(w, _)| segment.block(&w.name, "isolation", observer::field::fields()))
            .collect();
        for ((worker, _), blocks) in self.workers.iter().zip(&mut blocks) {
            blocks.follow_links(worker.queues.iter().map(|(port, _)| port_blocks[port.0]).collect());
        }
        let kicker_block = segment.block("", "kicker", &kicker::field::FIELDS);
        let segment = Arc::new(segment.build(&self.name)?);
        let control = Control::create(&self.name, self.workers.len())?;
        let time = Time::best();

        let inline_kicks = self.kicks == Kicks::Inline;
        let mut bodies = Vec::new();
        let mut sources = Vec::new();
        let workers: Vec<_> = self.workers.drain(..).collect();
        for ((worker, main), blocks) in workers.into_iter().zip(blocks) {
            let pool = Arc::clone(self.ports[worker.queues[0].0.0].pool());
            let mut queues = Vec::new();
            for (port, queue) in &worker.queues {
                let port = &mut self.ports[port.0];
                let count = port.queues();
                queues.push(port.take_queue(*queue).ok_or_else(|| LaunchError::Queue {
                    worker: worker.name.clone(),
                    port: port.name().to_owned(),
                    queue: *queue,
                    queues: count,
                })?);
            }
            // By the port's place here and the queue there: what this worker keeps.
            let own: Vec<(usize, Option<u16>)> = worker.queues.iter().map(|(p, q)| (p.0, Some(*q))).collect();
            let others = self.ports.iter().enumerate().flat_map(|(at, port)| {
                port.descriptors().into_iter().map(move |(queue, fd)| ((at, queue), fd))
            });
            let not_its_own = others.filter(|(place, _)| !own.contains(place)).map(|(_, fd)| fd).collect();
            let status = Status::create(&format!("{}.{}", self.name, worker.name))?;
            let mut recorder = None;
            if let Some(isolation) = &self.isolation {
                let (made, source) = diagnostics::channel(&worker.name, isolation.log_lines)?;
                recorder = Some(made.status(status.clone()));
                sources.push(source);
            }
            bodies.push(Body {
                frames: pool.cache(&worker.name, worker.frames)?,
                port_names: worker.queues.iter().map(|(p, _)| self.ports[p.0].name().to_owned()).collect(),
                name: worker.name,
                cpu: worker.cpu,
                idle: worker.idle,
                inline_kicks,
                queues,
                blocks,
                segment: Arc::clone(&segment),
                time,
                isolation: self.isolation.clone(),
                recorder,
                not_its_own,
                status,
                main,
            });
        }
        let mut targets = Vec::new();
        for port in
            self.ports.iter().filter(|p| !inline_kicks && p.capabilities().contains(Capabilities::KICKS))
        {
            for queue in 0..port.queues() {
                if let Some(kick) = port.kick_target(queue) {
                    targets.push(kicker::Target { port: port.name().to_owned(), kick });
                }
            }
        }
        let parts = running::Parts {
            name: self.name,
            placement: self.placement,
            restart: self.restart,
            kicker_cpu: self.kicker_cpu,
            ports: self.ports,
            bodies,
            targets,
            sources,
            segment,
            supervisor_blocks,
            isolation_blocks,
            port_blocks,
            kicker_block,
            control,
            time,
        };
        running::start(parts)
    }

    fn check(&self) -> Result<(), LaunchError> {
        if let Some(isolation) = &self.isolation {
            isolation.backend.probe()?;
            if self.placement == Placement::Thread && isolation.privileges != Privileges::Keep {
                return Err(LaunchError::PrivilegesOfThreads);
            }
        }
        if self.placement == Placement::Process {
            let tasks = std::fs::read_dir("/proc/self/task").map_err(|error| LaunchError::Os {
                call: "count the threads in /proc/self/task",
                source: nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)),
            })?;
            let threads = tasks.count();
            if threads != 1 {
                return Err(LaunchError::Threads { threads });
            }
        }
        if self.workers.is_empty() {
            return Err(LaunchError::NoWorkers { name: self.name.clone() });
        }
        let allowed = crate::affinity::allowed();
        let mut taken = Vec::new();
        for (index, (worker, _)) in self.workers.iter().enumerate() {
            let name = || worker.name.clone();
            let duplicate = self.workers[..index].iter().any(|(w, _)| w.name == worker.name);
            if duplicate || worker.name.is_empty() || worker.name.len() > 32 {
                return Err(LaunchError::WorkerName { name: name() });
            }
            if worker.queues.is_empty() {
                return Err(LaunchError::NoQueues { worker: name() });
            }
            if worker.queues.len() > 256 {
                return Err(LaunchError::TooManyQueues { worker: name(), queues: worker.queues.len() });
            }
            if let Some(cpu) = worker.cpu.filter(|cpu| !allowed.contains(cpu)) {
                return Err(LaunchError::Cpu { worker: name(), cpu, allowed });
            }
            if worker.cpu.is_some() && worker.cpu == self.kicker_cpu && worker.idle == Idle::Spin {
                return Err(LaunchError::KickerCpu { cpu: worker.cpu.unwrap_or(0), worker: name() });
            }
            let first = self.port_of(worker, worker.queues[0])?;
            for (port_ref, queue) in &worker.queues {
                let port = self.port_of(worker, (*port_ref, *queue))?;
                if !port.pool().same_as(first.pool()) {
                    return Err(LaunchError::PoolMismatch {
                        worker: name(),
                        port: port.name().to_owned(),
                        pool: port.pool().name().to_owned(),
                        other: first.pool().name().to_owned(),
                    });
                }
                let key = (port_ref.0, *queue);
                if *queue >= port.queues() || taken.contains(&key) {
                    return Err(LaunchError::Queue {
                        worker: name(),
                        port: port.name().to_owned(),
                        queue: *queue,
                        queues: port.queues(),
                    });
                }
                taken.push(key);
            }
        }
        self.check_frames()
    }

    fn port_of(&self, worker: &Worker, (port, queue): (PortRef, u16)) -> Result<&dyn Port, LaunchError> {
        self.ports.get(port.0).map(|p| &**p).ok_or_else(|| LaunchError::Queue {
            worker: worker.name.clone(),
            port: format!("#{}", port.0),
            queue,
            queues: 0,
        })
    }

    /// All workers' frames must be there before the first one is taken.
    fn check_frames(&self) -> Result<(), LaunchError> {
        let mut pools: Vec<(&Arc<Pool>, u32)> = Vec::new();
        for (worker, _) in &self.workers {
            let pool = self.ports[worker.queues[0].0.0].pool();
            let known = pools.iter().position(|(p, _)| p.same_as(pool));
            let at = known.unwrap_or_else(|| {
                pools.push((pool, pool.in_depot()));
                pools.len() - 1
            });
            let left = &mut pools[at].1;
            if worker.frames > *left {
                return Err(LaunchError::Pool(PoolError::Exhausted {
                    name: pool.name().to_owned(),
                    who: format!("worker {}", worker.name),
                    wanted: worker.frames,
                    left: *left,
                    total: pool.chunks(),
                }));
            }
            *left -= worker.frames;
        }
        Ok(())
    }
}

/// A name as a statistics label: its last 32 bytes, cut at a character.
fn short(name: &str) -> String {
    let mut start = name.len().saturating_sub(32);
    while !name.is_char_boundary(start) {
        start += 1;
    }
    name[start..].to_owned()
}
