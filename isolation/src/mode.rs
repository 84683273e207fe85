//! What an isolated thread may do, and what happens when it does something else.
//!
//! Contract: these are plain values that a backend interprets; the tables are those of the design and
//! hold for every backend, as far as it enforces at all.

bitflags::bitflags! {
    /// What an isolated thread may do without a breach.
    ///
    /// | mode | syscall | page fault, exception | interrupt, IPI, preemption |
    /// |---|---|---|---|
    /// | [`STRICT`](Mode::STRICT) (default) | breach | breach | breach |
    /// | [`ALLOW_SYSCALLS`](Mode::ALLOW_SYSCALLS) | runs, quiesced before return | breach | breach |
    /// | [`ALLOW_PAGE_FAULTS`](Mode::ALLOW_PAGE_FAULTS), [`ALLOW_EXCEPTIONS`](Mode::ALLOW_EXCEPTIONS) | as the rest of the mode says | handled, quiesced before return | breach |
    /// | [`ALLOW_INTERRUPTS`](Mode::ALLOW_INTERRUPTS) | as the rest says | as the rest says | taken, quiesced before return, counted |
    /// | [`ONESHOT`](Mode::ONESHOT), with an allowance | the first allowed kernel entry switches isolation off, silently, until it is armed again; what is forbidden stays a breach | | |
    ///
    /// Origin: the task-isolation discussion of 2016 on the Linux kernel mailing list
    /// (`PR_TASK_ISOLATION_ENABLE`, `_ALLOW_SYSCALLS`, `_ALLOW_EXCEPTIONS`, `_ONESHOT`); its three
    /// `SIGNAL_*` bits are the complements of the allowances.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Mode: u32 {
        /// System calls run, and the CPU is quiesced before they return.
        const ALLOW_SYSCALLS = 1 << 0;
        /// Exceptions other than page faults are handled, and the CPU is quiesced after.
        const ALLOW_EXCEPTIONS = 1 << 1;
        /// Page faults are handled, and the CPU is quiesced after.
        const ALLOW_PAGE_FAULTS = 1 << 2;
        /// Interrupts, IPIs and preemptions are taken, counted, and the CPU is quiesced after.
        const ALLOW_INTERRUPTS = 1 << 3;
        /// The first allowed kernel entry switches isolation off, silently, until it is armed again.
        const ONESHOT = 1 << 4;
    }
}

impl Mode {
    /// Nothing is allowed.
    pub const STRICT: Self = Self::empty();

    /// The allowances among the bits.
    #[must_use]
    pub const fn allowances(self) -> Self {
        self.difference(Self::ONESHOT)
    }
}

impl Default for Mode {
    fn default() -> Self {
        Self::STRICT
    }
}

bitflags::bitflags! {
    /// What is finished on this CPU before user code goes on, at arming and after each visit to the
    /// kernel. A kernel without task isolation can do the first two only, and neither with certainty:
    /// the backends `dispatch` and `advisory` say so among their weaknesses. The backend `task-isolation`
    /// always stops the tick, waits for timers and soft interrupts and folds statistics too, whatever is
    /// asked for here: without that there is no isolation.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Quiesce: u32 {
        /// Per-CPU batches of pages on their way to the LRU lists (a `munlock` of one page drains them).
        const LRU = 1 << 0;
        /// Kernel threads that wait for this CPU get it once before user code goes on (a yield; a very
        /// short sleep for a real-time thread, whose yield gives nothing to ordinary threads).
        const PENDING_WORK = 1 << 1;
        /// Per-CPU statistics of virtual memory. On a stock kernel this preempts *every* CPU
        /// (`/proc/sys/vm/stat_refresh`), other isolated ones too, so it is done at arming only.
        const VMSTAT = 1 << 2;
        /// This CPU's slabs, of which shrinking a cache would take one back with a kernel thread that runs
        /// here. Slow. Only the backend `task-isolation` can; the others do nothing for it.
        const SLAB = 1 << 3;
    }
}

impl Default for Quiesce {
    fn default() -> Self {
        Self::LRU | Self::PENDING_WORK
    }
}

/// What a program wants done about a breach. In each case isolation is off from the breach on, and a
/// forbidden system call runs, once, after that.
// Zero is what a thread's page reads as in a forked child, so it has to be one of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum OnBreach {
    /// Report it through the slow path, once, arm again and go on.
    #[default]
    Report = 0,
    /// `Strict::turn` returns it as an error, for a clean end. Isolation stays off.
    Stop,
    /// The process dies at once (`SIGKILL`; the first process of a pid namespace, which cannot be killed
    /// from within, ends with status 137), before the forbidden system call has run; the breach is in
    /// the [`Status`](crate::Status), for whoever shares it.
    Abort,
}
