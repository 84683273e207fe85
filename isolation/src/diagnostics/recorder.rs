//! The worker's half: a `tracing` subscriber that writes events into a ring.
//!
//! Contract: [`Recorder::install`] may allocate and runs before arming; recording an event does not enter
//! the kernel, allocate, lock or panic, and takes bounded time. One thread records; an event that comes
//! from another one, or within another event, is counted and dropped.
#![allow(unsafe_code, reason = "one thread's state behind a shared reference; see each block")]

use super::callsites::{Callsites, Description};
use super::layout::{HEADER, Head, SLOT_BYTES, Slot, header, record};
use super::room::Room;
use crate::status::{Status, bump};
use isoplane_memory::Clock;
use isoplane_memory::ring::{Mapped, Producer};
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, compiler_fence};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::{DefaultGuard, Interest};
use tracing::{Dispatch, Event, Metadata, Subscriber, span};

/// Why a recorder was not installed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum InstallError {
    /// The ring has a producer in this process already.
    #[error("this log ring has a recorder in this process already: drop its guard first")]
    Installed,
}

/// Events that were lost, by reason, since the channel was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Lost {
    /// The ring was full.
    pub full: u64,
    /// The worker used more than [`CALLSITES`](super::CALLSITES) callsites.
    pub callsites: u64,
    /// They came within the recording of another event, or from another thread.
    pub nested: u64,
}

impl Lost {
    /// All of them.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.full.wrapping_add(self.callsites).wrapping_add(self.nested)
    }

    pub(super) fn read(head: &Head) -> Self {
        let counters = head.counters();
        Self {
            full: counters.full.load(Ordering::Relaxed),
            callsites: counters.callsites.load(Ordering::Relaxed),
            nested: counters.nested.load(Ordering::Relaxed),
        }
    }
}

/// The worker's half of a channel. Made by the program; the worker installs it, in its process (after a
/// fork) or on its thread. It may be installed again when the worker is started again.
#[derive(Debug)]
pub struct Recorder {
    /// Only looked at while installing; the lock lets threads share the recorder.
    memory: Mutex<Mapped<Slot>>,
    head: Head,
    level: Option<LevelFilter>,
    status: Option<Status>,
    installed: Arc<AtomicBool>,
}

impl Recorder {
    pub(super) fn new(memory: Mapped<Slot>, head: Head) -> Self {
        Self { memory: Mutex::new(memory), head, level: None, status: None, installed: Arc::default() }
    }

    /// Records events up to this level, of every target. The default is what the program's own subscriber
    /// wants: the one that is current where the recorder is installed is asked once for each callsite, so
    /// directives such as `info,isoplane=debug` hold in the ring too; nothing where there is no subscriber.
    #[must_use]
    pub const fn level(mut self, level: LevelFilter) -> Self {
        self.level = Some(level);
        self
    }

    /// Counts records and lost events in a status block too.
    #[must_use]
    pub fn status(mut self, status: Status) -> Self {
        self.status = Some(status);
        self
    }

    /// Events lost so far.
    #[must_use]
    pub fn lost(&self) -> Lost {
        Lost::read(&self.head)
    }

    /// Makes this the calling thread's subscriber, while the guard lives. A new incarnation starts: it goes
    /// on where the ring stands, whatever its predecessor left unfinished. `cpu` is attached to its events.
    ///
    /// Allocates, and takes a lock of `tracing`: call it before arming, after the fork.
    ///
    /// # Errors
    /// [`InstallError::Installed`] when it is installed in this process already.
    pub fn install(&self, cpu: u32) -> Result<Recording, InstallError> {
        let shared = self.shared(cpu)?;
        // With a single subscriber `tracing` asks the *current* one for its interest in a new callsite. Where
        // the first event of a callsite comes within another event, that is none at all, and the callsite
        // would stay disabled for ever. With two of them it asks both, which say the same.
        let second = Dispatch::new(Handle(Arc::clone(&shared)));
        let dispatch = Dispatch::new(Handle(Arc::clone(&shared)));
        Ok(Recording {
            _second: second,
            _default: tracing::dispatcher::set_default(&dispatch),
            shared,
            _thread: PhantomData,
        })
    }

    pub(super) fn shared(&self, cpu: u32) -> Result<Arc<Shared>, InstallError> {
        if self.installed.swap(true, Ordering::Acquire) {
            return Err(InstallError::Installed);
        }
        let counters = self.head.counters();
        let incarnation = counters.incarnation.load(Ordering::Relaxed).wrapping_add(1);
        counters.incarnation.store(incarnation, Ordering::Relaxed);
        let mut state = State {
            ring: Producer::new(self.memory.lock().unwrap_or_else(PoisonError::into_inner).share()),
            callsites: Callsites::new(),
            head: self.head.clone(),
            status: self.status.clone(),
            incarnation,
            cpu,
            started: false,
        };
        state.start();
        Ok(Arc::new(Shared {
            wanted: Wanted::new(self.level),
            owner: here(),
            phase: AtomicU8::new(IDLE),
            state: UnsafeCell::new(state),
            head: self.head.clone(),
            installed: Arc::clone(&self.installed),
        }))
    }
}

/// Which events a worker's subscriber takes.
#[derive(Debug)]
pub(super) struct Wanted {
    level: LevelFilter,
    /// Whose interest in a callsite counts too.
    program: Option<Dispatch>,
}

impl Wanted {
    /// Up to a level; without one, what the current subscriber wants.
    pub(super) fn new(level: Option<LevelFilter>) -> Self {
        match level {
            Some(level) => Self { level, program: None },
            None => Self::by(tracing::dispatcher::get_default(Clone::clone), None),
        }
    }

    /// What this subscriber wants, up to a level.
    pub(super) fn by(program: Dispatch, level: Option<LevelFilter>) -> Self {
        Self { level: level.unwrap_or_else(LevelFilter::current), program: Some(program) }
    }

    pub(super) const fn level(&self) -> LevelFilter {
        self.level
    }

    /// Whether an event, or the question for one (`enabled!`), is on a level that is taken; spans are not.
    pub(super) fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !metadata.is_span() && *metadata.level() <= self.level
    }

    /// Asked once for each callsite. `tracing` itself asks the program's subscriber as well, at the same
    /// time and place, so nothing is called here that would not be called anyway.
    pub(super) fn interest(&self, metadata: &'static Metadata<'static>) -> Interest {
        let by_program = |program: &Dispatch| program.register_callsite(metadata).is_never();
        if self.enabled(metadata) && !self.program.as_ref().is_some_and(by_program) {
            Interest::always()
        } else {
            Interest::never()
        }
    }
}

/// While it lives, the events of its thread are recorded.
#[derive(Debug)]
#[must_use = "dropping it ends the recording"]
pub struct Recording {
    _default: DefaultGuard,
    _second: Dispatch,
    shared: Arc<Shared>,
    /// The guard belongs to its thread.
    _thread: PhantomData<*const ()>,
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.shared.end();
    }
}

const IDLE: u8 = 0;
const BUSY: u8 = 1;
const ENDED: u8 = 2;

/// What the subscriber shares with its guard.
pub(super) struct Shared {
    wanted: Wanted,
    /// The thread that records: see [`here`].
    owner: usize,
    phase: AtomicU8,
    state: UnsafeCell<State>,
    head: Head,
    installed: Arc<AtomicBool>,
}

// SAFETY: `state` is reached by the owner's thread only, and by one call at a time (`Shared::event`); the
// rest is atomics and values that do not change. `State` itself may be sent: nothing in it is of a thread.
unsafe impl Sync for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

/// An address that no other living thread has.
#[inline(always)]
fn here() -> usize {
    // Const and without a destructor: no registration, no system call, no allocation.
    thread_local! { static HERE: u8 = const { 0 } }
    HERE.with(|here| std::ptr::from_ref(here) as usize)
}

/// Ends the phase of an event, also when the formatting of a field panics.
struct Busy<'a>(&'a AtomicU8);

impl Drop for Busy<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        // Unless the recording has ended meanwhile: that is for good.
        if self.0.load(Ordering::Relaxed) == BUSY {
            self.0.store(IDLE, Ordering::Relaxed);
        }
    }
}

impl Shared {
    #[inline]
    pub(super) fn event(&self, event: &Event<'_>) {
        if self.owner != here() || self.phase.load(Ordering::Relaxed) != IDLE {
            return self.nested();
        }
        self.phase.store(BUSY, Ordering::Relaxed);
        // A signal handler on this thread sees the phase before it could see a half-written state.
        compiler_fence(Ordering::SeqCst);
        let _busy = Busy(&self.phase);
        // SAFETY: this is the owner's thread, and neither an event that it records already (the phase) nor
        // another thread can be here; the reference ends before the phase does.
        let state = unsafe { &mut *self.state.get() };
        state.event(event);
    }

    #[cold]
    fn nested(&self) {
        self.head.counters().nested.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.phase.store(ENDED, Ordering::Relaxed);
        self.installed.store(false, Ordering::Release);
    }
}

/// What the recording thread works with.
struct State {
    ring: Producer<Slot>,
    callsites: Callsites,
    head: Head,
    status: Option<Status>,
    incarnation: u64,
    cpu: u32,
    /// The drainer has been told that an incarnation starts.
    started: bool,
}

impl State {
    #[inline(always)]
    fn event(&mut self, event: &Event<'_>) {
        let tsc = Clock::ticks();
        let metadata = event.metadata();
        let Some(id) = self.callsites.find(metadata).or_else(|| self.announce(metadata)) else { return };
        if self.ring.free(1) == 0 {
            return self.full();
        }
        // SAFETY: the slot is in the region that the ring keeps mapped, and it is the producer's, since
        // there is one free: a consumer that follows the protocol does not read it before `publish`.
        let mut room = unsafe { Room::new(self.ring.slot(0)) };
        event.record(&mut room);
        room.finish(id, tsc);
        self.ring.publish(1);
        bump(&self.head.counters().recorded, 1);
        if let Some(status) = &self.status {
            bump(&status.words().records, 1);
        }
    }

    #[cold]
    fn full(&mut self) {
        bump(&self.head.counters().full, 1);
        self.lost();
    }

    fn lost(&self) {
        if let Some(status) = &self.status {
            bump(&status.words().records_lost, 1);
        }
    }

    /// Tells the drainer that an incarnation starts, which knows no callsites yet. Tried again with the
    /// first event when the ring is full now.
    fn start(&mut self) -> bool {
        if !self.started && self.ring.free(1) > 0 {
            let mut slot = [0; SLOT_BYTES / 8];
            slot[0] = header(record::START, 0, 0, 0, 0, 32);
            slot[1] = Clock::ticks();
            slot[2] = self.incarnation;
            slot[3] = u64::from(self.cpu);
            self.ring.write(0, Slot(slot));
            self.ring.publish(1);
            self.started = true;
        }
        self.started
    }

    /// Gives a callsite its number and describes it to the drainer, if the ring has room for that and for
    /// the event itself.
    #[cold]
    #[inline(never)]
    fn announce(&mut self, metadata: &'static Metadata<'static>) -> Option<u16> {
        let Some(id) = self.callsites.next() else {
            bump(&self.head.counters().callsites, 1);
            self.lost();
            return None;
        };
        let description = Description::of(metadata);
        let parts = description.bytes().chunks(SLOT_BYTES - HEADER);
        let count = parts.len() as u32;
        if !self.start() || self.ring.free(count + 1) < count + 1 {
            self.full();
            return None;
        }
        for (part, bytes) in parts.enumerate() {
            let mut slot = [0; SLOT_BYTES / 8];
            let used = HEADER + bytes.len();
            slot[0] = header(record::ANNOUNCE, 0, part as u8, count as u8, id, used as u16);
            slot[1] = Clock::ticks();
            if let Some(room) = bytemuck::bytes_of_mut(&mut slot).get_mut(HEADER..used) {
                room.copy_from_slice(bytes);
            }
            self.ring.write(part as u32, Slot(slot));
        }
        self.ring.publish(count);
        self.callsites.insert(metadata);
        Some(id)
    }
}

/// The subscriber itself. The guard ends it even where somebody has cloned the dispatch.
struct Handle(Arc<Shared>);

impl Subscriber for Handle {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        self.0.wanted.interest(metadata)
    }
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.wanted.enabled(metadata)
    }
    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0.wanted.level())
    }
    // Spans are disabled; somebody who makes one all the same gets an id that means nothing.
    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    #[inline]
    fn event(&self, event: &Event<'_>) {
        self.0.event(event);
    }
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}
