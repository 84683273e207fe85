//! The process that spins on the measured CPU.
//!
//! Contract: a fork of ours with one thread, so that nobody else's memory map, files or signals are its
//! own; it dies with us. It is pinned, its memory is there and locked, and nobody sends it signals: in
//! both modes, since a program that lacks even that measures itself. Until the loop starts it may do what
//! it likes and says what it did, in JSON lines through a pipe; in the loop it does nothing but read the
//! clock and look whether isolation holds; afterwards it says what went wrong, if something did.

use super::Mode;
use super::place;
use super::process::{self, Child, ForkError, PANICKED};
use isoplane::memory::{Clock, RegionError};
use isoplane_isolation::gaps::{self, Gaps};
use isoplane_isolation::prepare::scheduling::Scheduling;
use isoplane_isolation::{Backend, Cpu, Isolation, OnBreach, Quiesce, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::WaitStatus;
use serde::{Deserialize, Serialize};
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::Duration;

/// The CPU is kept busy for this long before anything is measured: clocks come up, and what was put
/// off until somebody ran here is done.
const WARM_UP: Duration = Duration::from_millis(100);
/// The loop ends by itself this long after its time, should nobody have told it to.
const LATEST: Duration = Duration::from_secs(2);

/// Why nothing spins.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpinnerError {
    /// No process.
    #[error("cannot start the measuring process: {0}")]
    Fork(#[from] ForkError),
    /// No pipe to it.
    #[error("cannot make a pipe for the measuring process: {0}")]
    Pipe(#[source] std::io::Error),
    /// No memory for results.
    #[error("cannot make shared memory for the results: {0}")]
    Memory(#[from] RegionError),
}

/// What is to be measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Task {
    pub(super) cpu: Cpu,
    pub(super) mode: Mode,
    pub(super) length: Duration,
    /// A step longer than this is a gap; `None`: by the loop's own median step.
    pub(super) threshold: Option<Duration>,
    pub(super) clock: Clock,
}

/// What the process did before it started to measure.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Setup {
    /// How isolation is enforced; `None` without isolation.
    pub(super) backend: Option<String>,
    /// What is weaker than full isolation, in words.
    pub(super) weaknesses: Vec<String>,
    /// Median step of the loop, in ticks.
    pub(super) step: u64,
}

/// What the process says.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    Ready(Setup),
    Failed(String),
}

/// A process that spins, or soon will.
#[derive(Debug)]
pub(super) struct Spinner {
    child: Child,
    messages: PipeReader,
    text: Vec<u8>,
    pub(super) gaps: Gaps,
    pub(super) status: Status,
}

impl Spinner {
    /// Forks it.
    pub(super) fn start(task: &Task) -> Result<Self, SpinnerError> {
        let gaps = Gaps::create("noise")?;
        let status = Status::create("noise")?;
        let (messages, theirs) = pipe().map_err(SpinnerError::Pipe)?;
        let (task, us) = (*task, nix::unistd::getpid());
        let (its_gaps, its_status) = (gaps.clone(), status.clone());
        let child = process::fork_child(move || {
            if !process::die_with(us) {
                return process::ORPHANED;
            }
            live(&task, &its_gaps, its_status, theirs)
        })?;
        Ok(Self { child, messages, text: Vec::new(), gaps, status })
    }

    /// Whether the loop runs.
    pub(super) fn is_spinning(&self) -> bool {
        self.gaps.so_far().started
    }

    /// Why it ended, if it did although nobody wanted it to.
    pub(super) fn failure(&mut self) -> Option<String> {
        let ended = self.child.ended()?;
        self.listen();
        if let Some(Message::Failed(why)) = self.said().find(|message| matches!(message, Message::Failed(_)))
        {
            return Some(why);
        }
        match ended {
            WaitStatus::Exited(_, 0) => None,
            WaitStatus::Exited(_, PANICKED) => Some("the measuring process panicked".to_owned()),
            WaitStatus::Exited(_, code) => Some(format!("the measuring process ended with exit code {code}")),
            WaitStatus::Signaled(_, signal, _) => {
                Some(format!("the measuring process was killed by {signal}"))
            }
            other => Some(format!("the measuring process ended: {other:?}")),
        }
    }

    /// Whether it is there.
    pub(super) fn is_gone(&mut self) -> bool {
        self.child.ended().is_some()
    }

    /// What it did before it measured.
    pub(super) fn setup(&mut self) -> Setup {
        self.listen();
        let ready = self.said().find_map(|message| match message {
            Message::Ready(setup) => Some(setup),
            Message::Failed(_) => None,
        });
        ready.unwrap_or_default()
    }

    /// Takes what is in the pipe, without waiting for more.
    fn listen(&mut self) {
        let mut some = [0; 4096];
        loop {
            let mut fds = [PollFd::new(self.messages.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0) {
                return;
            }
            match self.messages.read(&mut some) {
                Ok(n) if n > 0 => self.text.extend_from_slice(&some[..n]),
                _ => return,
            }
        }
    }

    fn said(&self) -> impl Iterator<Item = Message> {
        self.text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok())
    }
}

/// The process's life.
fn live(task: &Task, gaps: &Gaps, status: Status, pipe: PipeWriter) -> i32 {
    let say = |message: &Message| {
        if let Ok(mut line) = serde_json::to_vec(message) {
            line.push(b'\n');
            // Fits the pipe, so this does not wait; a reader that is gone has taken us with it.
            let _ = (&pipe).write_all(&line);
        }
    };
    match spin(task, gaps, status, &say) {
        Ok(()) => 0,
        Err(why) => {
            say(&Message::Failed(why));
            1
        }
    }
}

fn spin(task: &Task, gaps: &Gaps, status: Status, say: &dyn Fn(&Message)) -> Result<(), String> {
    place::go_to(task.cpu).map_err(|error| error.to_string())?;
    let isolation = Isolation::on(task.cpu).on_breach(OnBreach::Report).status(status);
    let isolation = match task.mode {
        // Prepared in the same way, but nothing is enforced, nothing is finished before, and others get
        // the CPU as the scheduler thinks right.
        Mode::None => {
            isolation.backend(Backend::Advisory).quiesce(Quiesce::empty()).scheduling(Scheduling::Keep)
        }
        Mode::Strict => isolation,
    };
    let mut prepared = isolation.prepare().map_err(|refused| refused.to_string())?;
    let (backend, weaknesses) = match task.mode {
        Mode::None => (None, Vec::new()),
        Mode::Strict => {
            let weaknesses = prepared.weaknesses().iter().map(ToString::to_string).collect();
            (Some(prepared.backend().to_string()), weaknesses)
        }
    };
    let (step, threshold) = calibrate(task);
    say(&Message::Ready(Setup { backend, weaknesses, step }));
    warm_up();
    let mut strict = prepared.arm().map_err(|refused| refused.to_string())?;
    let mut spinner = gaps.spinner(Clock::ticks, threshold);
    let ended = spinner.run(limit(task), || match strict.turn() {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => ControlFlow::Break(error),
    });
    strict.disarm();
    match ended {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(error) => Err(error.to_string()),
    }
}

/// Median step, and the threshold, in ticks.
fn calibrate(task: &Task) -> (u64, u64) {
    let step = gaps::calibrate(Clock::ticks);
    let threshold =
        task.threshold.map_or_else(|| gaps::threshold(step, &task.clock), |it| task.clock.to_ticks(it));
    (step, threshold)
}

fn warm_up() {
    let start = std::time::Instant::now();
    while start.elapsed() < WARM_UP {
        std::hint::black_box(gaps::calibrate(Clock::ticks));
    }
}

fn limit(task: &Task) -> u64 {
    task.clock.to_ticks(task.length + LATEST)
}
