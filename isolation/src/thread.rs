//! The state of one isolated thread: the gate that its system calls pass or do not pass, and what the
//! signal handlers need.
//!
//! Contract: one [`Thread`] belongs to one thread for as long as its [`Prepared`](crate::Prepared) lives,
//! and is found from anywhere in that thread (a handler, a panic hook, a subscriber) through a
//! thread-local pointer that is read without a call. It lives in a page of its own that the kernel wipes
//! in a forked child, so a child that inherits it finds an open gate and no state. Everything in it is
//! changed by its own thread only, by plain stores: a handler interrupts the thread, it never runs
//! beside it.
#![allow(unsafe_code, reason = "mappings and the thread-local pointer; see each block")]

use crate::arena;
use crate::backend::task_isolation::{self, Half, Refusal};
use crate::budget::Purse;
use crate::mode::{Mode, OnBreach, Quiesce};
use crate::quiesce::quiesce;
use crate::status::{BUCKETS, State, Status, Words, bump};
use isoplane_memory::{Clock, Kernel};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, mprotect, munmap};
use std::cell::Cell;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, compiler_fence};

thread_local! {
    /// Constant and without a destructor: reading it is one load, in a signal handler too.
    static CURRENT: Cell<*const Thread> = const { Cell::new(std::ptr::null()) };
}

/// Values of the selector: SYSCALL_DISPATCH_FILTER_ALLOW and _BLOCK.
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;
/// Tells a live page from one that a fork has wiped.
const ALIVE: u64 = 0x6973_6f70_6c61_6e65;

/// What the gate is made of. All zero is no gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Gate {
    /// The backend enforces nothing: the gate is a formality.
    None = 0,
    /// The selector of syscall user dispatch: one byte that the thread writes.
    Dispatch,
    /// The kernel's task isolation: opened and shut by a call that it exempts.
    Kernel,
}

/// What [`Thread::seen`] is when the next turn has to look: the kernel's word is even outside the kernel.
const LOOK: u32 = 1;

/// See the module. All zero is what a forked child sees.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Thread {
    // The kernel reads the selector at each system call, the worker `seen` each turn.
    pub(crate) selector: AtomicU8,
    _pad: [u8; 3],
    pub(crate) state: AtomicU32,
    alive: AtomicU64,
    /// The kernel's word (`seq` of its status block) as it was when the thread was isolated and the news were
    /// last taken, [`LOOK`] while it is not isolated. Under the other backends that word stays 0.
    seen: Cell<u32>,
    gate: Cell<Gate>,
    mode: Cell<Mode>,
    on_breach: Cell<OnBreach>,
    quiesce: Cell<Quiesce>,
    real_time: Cell<bool>,
    /// Where the C library's signal restorer is.
    pub(crate) restorer: Cell<u64>,
    purse: Cell<Purse>,
    /// Visits that are under way, and will look at this when they return.
    visits: Cell<u32>,
    words: Cell<Option<NonNull<Words>>>,
    scratch: Cell<*mut u8>,
    /// The part of the backend `task-isolation`.
    pub(crate) kernel: Half,
}

// The kernel wants its block in one page, and the page has to hold all of it.
const _: () = assert!(size_of::<Thread>() <= PAGE);

/// Why a visit to the kernel was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlowPathError {
    /// The budget is used up.
    #[error("the slow path's budget is used up; the visit was refused and counted (see Isolation::budget)")]
    OverBudget,
    /// Not the thread that was armed.
    #[error("this is not the thread that was isolated (or a forked child of it)")]
    WrongThread,
}

impl Thread {
    /// What the calling thread has, if it is prepared for isolation.
    #[inline(always)]
    pub(crate) fn current<'a>() -> Option<&'a Self> {
        // SAFETY: the pointer is set and cleared by `Page` for the thread that owns the page, which stays
        // mapped in between; in a forked child the page is there too, wiped.
        unsafe { CURRENT.with(Cell::get).as_ref() }
    }

    /// Whether the caller is this thread, and not a forked child of it.
    #[inline(always)]
    pub(crate) fn is_here(&self) -> bool {
        CURRENT.with(Cell::get) == std::ptr::from_ref(self) && self.is_alive()
    }

    /// False in a forked child.
    #[inline(always)]
    pub(crate) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed) == ALIVE
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode.get()
    }

    pub(crate) fn on_breach(&self) -> OnBreach {
        self.on_breach.get()
    }

    pub(crate) fn words(&self) -> Option<&Words> {
        // SAFETY: set from a `Status` that `Page` keeps, so the region is mapped; `None` in a child.
        self.words.get().map(|words| unsafe { words.as_ref() })
    }

    pub(crate) fn gate(&self) -> Gate {
        self.gate.get()
    }

    /// Isolated, and nothing has happened that a turn would have to look at. One load of a word that only
    /// the kernel writes, and one of the thread's own.
    #[inline(always)]
    pub(crate) fn is_undisturbed(&self) -> bool {
        self.kernel.block.seq() == self.seen.get()
    }

    /// The kernel's news so far are taken.
    pub(crate) fn saw(&self) {
        self.seen.set(self.kernel.block.seq());
        compiler_fence(Ordering::SeqCst);
        // A breach's handler may have come in between.
        if self.state() != State::Armed {
            self.seen.set(LOOK);
        }
    }

    /// Takes the kernel's counts, where the kernel has any.
    pub(crate) fn take_counts(&self) {
        if self.gate.get() == Gate::Kernel {
            task_isolation::take_counts(self);
        }
    }

    /// Takes the kernel's news, where the kernel has any.
    pub(crate) fn look(&self) {
        if self.gate.get() == Gate::Kernel {
            task_isolation::look(self);
        }
    }

    #[inline(always)]
    pub(crate) fn state(&self) -> State {
        State::from_u32(self.state.load(Ordering::Relaxed))
    }

    /// Sets the state, here and for observers.
    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state as u32, Ordering::Relaxed);
        self.seen.set(if state == State::Armed { self.kernel.block.seq() } else { LOOK });
        if let Some(words) = self.words() {
            words.state.store(state as u32, Ordering::Release);
        }
    }

    /// From here on system calls pass.
    #[inline(always)]
    pub(crate) fn open(&self) {
        if self.gate.get() == Gate::Kernel {
            return task_isolation::disable(self);
        }
        self.selector.store(ALLOW, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
    }

    /// From here on they do not, under `dispatch`.
    #[inline(always)]
    pub(crate) fn shut(&self) {
        compiler_fence(Ordering::SeqCst);
        if self.gate.get() == Gate::Dispatch {
            self.selector.store(BLOCK, Ordering::Relaxed);
        }
    }

    /// Whether they do not, at this moment.
    #[inline(always)]
    pub(crate) fn is_shut(&self) -> bool {
        self.selector.load(Ordering::Relaxed) == BLOCK
    }

    /// As far as a program can do it; the kernel does better where it isolates.
    pub(crate) fn quiesce(&self) {
        if self.gate.get() != Gate::Kernel {
            quiesce(self.quiesce.get(), self.scratch.get(), self.real_time.get());
        }
    }

    /// Isolated from here on: the last thing that arming does.
    pub(crate) fn isolate(&self) -> Result<(), Refusal> {
        if self.gate.get() != Gate::Kernel {
            self.shut_gate();
            return Ok(());
        }
        let before = self.state();
        arena::serve(true);
        self.set_state(State::Armed);
        match task_isolation::enable(self) {
            Ok(()) => {
                self.saw();
                Ok(())
            }
            Err(refusal) => {
                // As it was: who has not been isolated again after a breach hears so at each turn.
                arena::serve(false);
                self.set_state(before);
                Err(refusal)
            }
        }
    }

    /// As [`Thread::isolate`], where the gate is the thread's own.
    pub(crate) fn shut_gate(&self) {
        arena::serve(true);
        self.set_state(State::Armed);
        self.shut();
    }

    /// Not isolated from here on, for good: panics, the end of a worker, `ONESHOT`.
    pub(crate) fn release(&self) {
        self.open();
        arena::serve(false);
        self.set_state(State::Off);
    }

    /// The slow path: runs `visit` with the gate open, quiesces and isolates again; counts and times it.
    /// A thread that is not isolated at the moment just runs it. A panic in it leaves isolation off.
    pub(crate) fn visit<R>(
        &self,
        budgeted: bool,
        visit: impl FnOnce(&Kernel) -> R,
    ) -> Result<R, SlowPathError> {
        let kernel = Kernel::outside_isolation();
        let start = Clock::ticks();
        if !self.is_undisturbed() {
            // `ONESHOT` may have ended isolation, which a visit does not bring back.
            self.look();
        }
        match self.state() {
            State::SlowPath => {
                // A signal handler may get here before the visit that it interrupts has opened the gate.
                self.open();
                return Ok(visit(&kernel));
            }
            State::Off => return Ok(visit(&kernel)),
            State::Armed | State::Broken => {}
        }
        if budgeted && !self.pay(start) {
            if let Some(words) = self.words() {
                bump(&words.refused, 1);
            }
            return Err(SlowPathError::OverBudget);
        }
        let was_armed = self.state() == State::Armed;
        if was_armed {
            self.set_state(State::SlowPath);
        }
        self.open();
        arena::serve(false);
        let visiting = Visiting::begin(self);
        let result = visit(&kernel);
        visiting.end();
        // The visit may have dropped what the thread was prepared with.
        if self.is_alive() {
            self.leave(was_armed);
            self.count_visit(Clock::ticks().wrapping_sub(start));
        }
        Ok(result)
    }

    fn pay(&self, now: u64) -> bool {
        let mut purse = self.purse.get();
        let paid = purse.pay(now);
        self.purse.set(purse);
        paid
    }

    fn leave(&self, was_armed: bool) {
        arena::settle();
        // A breach, a release, or armed anew by the visit itself: `turn` has the say.
        if !was_armed || self.state() != State::SlowPath {
            return;
        }
        // The visit may have installed handlers.
        #[cfg(target_arch = "x86_64")]
        if let Some(signals) = match self.gate.get() {
            Gate::None => None,
            Gate::Dispatch => Some(crate::backend::dispatch::SIGNALS),
            Gate::Kernel => Some(task_isolation::SIGNALS),
        } && let Err(error) = crate::backend::handlers::keep_signals(self, signals)
        {
            tracing::warn!("cannot take SIGSYS and SIGTRAP back: {error}");
        }
        self.quiesce();
        // Again: quiescing may fault.
        if self.state() == State::SlowPath
            && let Err(refusal) = self.isolate()
        {
            task_isolation::unquiet(self, &refusal);
        }
    }

    fn count_visit(&self, ticks: u64) {
        let Some(words) = self.words() else { return };
        bump(&words.visits, 1);
        bump(&words.visit_ticks, ticks);
        if ticks > words.longest_visit.load(Ordering::Relaxed) {
            words.longest_visit.store(ticks, Ordering::Relaxed);
        }
        let bucket = (63 - (ticks | 1).leading_zeros() as usize).min(BUCKETS - 1);
        bump(&words.visit_histogram[bucket], 1);
        arena::publish(words);
    }
}

/// A visit that is under way: the thread's page stays while there is one. When it unwinds, whoever catches
/// the panic runs un-isolated.
struct Visiting<'a>(&'a Thread);

impl<'a> Visiting<'a> {
    fn begin(thread: &'a Thread) -> Self {
        thread.visits.set(thread.visits.get().wrapping_add(1));
        Self(thread)
    }

    fn end(self) {
        self.leave();
        std::mem::forget(self);
    }

    fn leave(&self) {
        self.0.visits.set(self.0.visits.get().wrapping_sub(1));
    }
}

impl Drop for Visiting<'_> {
    fn drop(&mut self) {
        self.leave();
        if self.0.is_alive() {
            self.0.release();
        }
    }
}

/// Visits the kernel from anywhere in an isolated thread: for code that has no
/// [`Strict`](crate::Strict) at hand, such as a tracing subscriber. Counted, timed and budgeted like any
/// visit; within another visit, or in a thread that is not isolated, `visit` just runs.
///
/// # Errors
/// [`SlowPathError::OverBudget`]; `visit` has not run then.
pub fn visit<R>(visit: impl FnOnce(&Kernel) -> R) -> Result<R, SlowPathError> {
    match Thread::current().filter(|thread| thread.is_alive()) {
        Some(thread) => thread.visit(true, visit),
        None => Ok(visit(&Kernel::outside_isolation())),
    }
}

/// Switches isolation of the calling thread off, without a breach, until it is armed again: for panic
/// hooks and the like, which are about to enter the kernel and cannot return.
pub fn release() {
    if let Some(thread) = Thread::current().filter(|thread| thread.is_alive()) {
        thread.release();
    }
}

/// What a thread's page is made with.
pub(crate) struct Setup {
    pub(crate) mode: Mode,
    pub(crate) on_breach: OnBreach,
    pub(crate) quiesce: Quiesce,
    pub(crate) real_time: bool,
    pub(crate) gate: Gate,
    pub(crate) purse: Purse,
}

/// Owns the thread's page, its scratch page and its signal stack, with guard pages between them.
#[derive(Debug)]
pub(crate) struct Page {
    base: NonNull<c_void>,
    bytes: usize,
    stack_bytes: usize,
    _status: Status,
}

const PAGE: usize = 4096;
/// Guard, thread page, guard, scratch page, guard, signal stack.
const HEAD: usize = 5 * PAGE;

impl Page {
    /// Maps, locks and touches everything, and makes it the calling thread's.
    pub(crate) fn install(setup: &Setup, status: Status) -> Result<Self, Errno> {
        // Four frames deep (a handler of the program's, a system call in it, a fault in that, and one
        // to spare), plus room for what the handlers themselves use.
        let stack_bytes = (4 * signal_frame_bytes() + 64 * 1024).next_multiple_of(PAGE);
        let bytes = HEAD + stack_bytes;
        let length = NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?;
        let (protection, flags) = (ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(None, length, protection, flags) }?;
        if let Err(errno) = Self::open_parts(base, stack_bytes) {
            // SAFETY: the mapping just made, which nothing refers to yet.
            let _ = unsafe { munmap(base, bytes) };
            return Err(errno);
        }
        let page = Self { base, bytes, stack_bytes, _status: status };
        let thread = Thread {
            selector: AtomicU8::new(ALLOW),
            _pad: [0; 3],
            state: AtomicU32::new(State::Off as u32),
            alive: AtomicU64::new(ALIVE),
            seen: Cell::new(LOOK),
            gate: Cell::new(setup.gate),
            mode: Cell::new(setup.mode),
            on_breach: Cell::new(setup.on_breach),
            quiesce: Cell::new(setup.quiesce),
            real_time: Cell::new(setup.real_time),
            restorer: Cell::new(0),
            purse: Cell::new(setup.purse),
            visits: Cell::new(0),
            words: Cell::new(Some(NonNull::from(page._status.words()))),
            // SAFETY: inside the mapping.
            scratch: Cell::new(unsafe { base.byte_add(3 * PAGE) }.cast().as_ptr()),
            kernel: Half::default(),
        };
        // SAFETY: the thread page is mapped writable, page-aligned, larger than a `Thread`, and nothing
        // refers to it yet.
        unsafe { page.pointer().write(thread) };
        CURRENT.with(|current| current.set(page.pointer().as_ptr()));
        // SAFETY: the page keeps the status, and takes this back when it goes.
        unsafe { arena::set_status(Some(NonNull::from(page._status.words()))) };
        Ok(page)
    }

    /// Makes the parts between the guard pages usable, locks and touches them.
    fn open_parts(base: NonNull<c_void>, stack_bytes: usize) -> Result<(), Errno> {
        for (offset, bytes) in [(PAGE, PAGE), (3 * PAGE, PAGE), (HEAD, stack_bytes)] {
            // SAFETY: parts of the mapping just made, which nothing refers to yet.
            unsafe {
                let part = base.byte_add(offset);
                mprotect(part, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
                part.cast::<u8>().write_bytes(0, bytes);
                // Refused where locking is: said once for all memory by the preparation.
                let _ = mlock(part, NonZeroUsize::new(bytes).ok_or(Errno::EINVAL)?.get());
            }
        }
        // SAFETY: the thread page, anonymous and private, as MADV_WIPEONFORK wants it (Linux 4.14).
        unsafe { madvise(base.byte_add(PAGE), PAGE, MmapAdvise::MADV_WIPEONFORK) }
    }

    fn pointer(&self) -> NonNull<Thread> {
        // SAFETY: inside the mapping.
        unsafe { self.base.byte_add(PAGE) }.cast()
    }

    pub(crate) fn thread(&self) -> &Thread {
        // SAFETY: written in `install`, mapped while this value lives; in a forked child it reads as
        // zeroes, which is a valid `Thread` too.
        unsafe { self.pointer().as_ref() }
    }

    /// The signal stack: lowest address and size.
    pub(crate) fn signal_stack(&self) -> (NonNull<c_void>, usize) {
        // SAFETY: inside the mapping.
        (unsafe { self.base.byte_add(HEAD) }, self.stack_bytes)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if CURRENT.with(Cell::get) == self.pointer().as_ptr().cast_const() {
            // SAFETY: `None` points nowhere; the thread is the one that the page was made for, or a child's copy.
            unsafe { arena::set_status(None) };
        }
        if !self.thread().is_here() {
            // A forked child's copy, whose signal stack may still be in here; or the wrong thread, while
            // the kernel reads the owner's selector at each of its system calls.
            return;
        }
        CURRENT.with(|current| current.set(std::ptr::null()));
        let thread = self.thread();
        if thread.visits.get() != 0 {
            // Dropped within a visit, which comes back to the page: it stays, and says that it is nobody's.
            thread.words.set(None);
            thread.alive.store(0, Ordering::Relaxed);
            return;
        }
        // SAFETY: the mapping made in `install`; `Prepared` has taken trapping, the handlers' stack and
        // the thread-local pointer away, so nobody reads it any more.
        let _ = unsafe { munmap(self.base, self.bytes) };
    }
}

/// Bytes that the kernel may write for one signal: the vector registers of this CPU count.
fn signal_frame_bytes() -> usize {
    const AT_MINSIGSTKSZ: libc::c_ulong = 51;
    // SAFETY: reads the auxiliary vector; an unknown entry gives 0.
    let bytes = unsafe { libc::getauxval(AT_MINSIGSTKSZ) } as usize;
    bytes.clamp(4096, 1 << 20)
}
