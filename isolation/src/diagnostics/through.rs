//! The other route: the program's own subscriber, called by the worker in a visit to the kernel.
//!
//! Contract: outside of the visit the program's subscriber is asked for its interest in a callsite, once for
//! each, as `tracing` does by itself; nothing else of it runs. What it never wants costs no visit.
//! A visit that is refused (its budget is spent) costs the event its way, not the event: where there is a
//! recorder it takes the ring. Every refusal is counted.

use super::recorder::{InstallError, Recorder, Shared, Wanted};
use isoplane_memory::Kernel;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::{DefaultGuard, Interest};
use tracing::{Dispatch, Event, Metadata, Subscriber, span};

/// Opens the kernel for the calling thread, runs the closure once, quiesces, and is strict again: `true`.
/// `false` when the visit is refused, and the closure was not called. Outside of isolation it just calls.
pub type Gate = fn(&mut dyn FnMut(&Kernel)) -> bool;

/// Sends events through the slow path into the program's subscriber.
#[derive(Debug)]
pub struct ThroughSlowPath {
    program: Dispatch,
    gate: Gate,
    level: Option<LevelFilter>,
    refused: Arc<AtomicU64>,
}

impl ThroughSlowPath {
    /// Takes the program's dispatch (`tracing::dispatcher::get_default(Clone::clone)`). Visits are those of
    /// [`visit`](crate::visit): counted, timed and budgeted where the thread is isolated.
    #[must_use]
    pub fn new(program: Dispatch) -> Self {
        let gate: Gate = |visit| crate::visit(|kernel| visit(kernel)).is_ok();
        Self { program, gate, level: None, refused: Arc::default() }
    }

    /// Visits the kernel in another way.
    #[must_use]
    pub const fn gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Lets events up to this level pass; the program's subscriber filters them once more. The default is
    /// the program's `LevelFilter::current` when it is installed.
    #[must_use]
    pub const fn level(mut self, level: LevelFilter) -> Self {
        self.level = Some(level);
        self
    }

    /// Makes this the calling thread's subscriber, while the guard lives. Events whose visit is refused go
    /// to the ring of `otherwise`, if there is one. Allocates: call it before arming, after the fork.
    ///
    /// # Errors
    /// As for [`Recorder::install`].
    pub fn install(self, otherwise: Option<&Recorder>, cpu: u32) -> Result<SlowPathRecording, InstallError> {
        let ring = otherwise.map(|recorder| recorder.shared(cpu)).transpose()?;
        let refused = Arc::clone(&self.refused);
        let wanted = Wanted::by(self.program.clone(), self.level);
        let dispatch = Dispatch::new(Handle { route: self, wanted, ring: ring.clone() });
        let default = tracing::dispatcher::set_default(&dispatch);
        Ok(SlowPathRecording { _default: default, ring, refused, _thread: PhantomData })
    }
}

/// While it lives, the events of its thread take the slow path.
#[derive(Debug)]
#[must_use = "dropping it ends the recording"]
pub struct SlowPathRecording {
    _default: DefaultGuard,
    ring: Option<Arc<Shared>>,
    refused: Arc<AtomicU64>,
    _thread: PhantomData<*const ()>,
}

impl SlowPathRecording {
    /// Events whose visit was refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for SlowPathRecording {
    fn drop(&mut self) {
        if let Some(ring) = &self.ring {
            ring.end();
        }
    }
}

struct Handle {
    route: ThroughSlowPath,
    wanted: Wanted,
    ring: Option<Arc<Shared>>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.route.fmt(f)
    }
}

impl Subscriber for Handle {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        self.wanted.interest(metadata)
    }
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.wanted.enabled(metadata)
    }
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.wanted.level())
    }
    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let program = &self.route.program;
        let visited = (self.route.gate)(&mut |_kernel| {
            if program.enabled(event.metadata()) {
                program.event(event);
            }
        });
        if !visited {
            self.route.refused.fetch_add(1, Ordering::Relaxed);
            if let Some(ring) = &self.ring {
                ring.event(event);
            }
        }
    }
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}
