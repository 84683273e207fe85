//! The `task-isolation` backend: strict mode by a kernel with the task-isolation patches, x86-64.
//!
//! Contract: the kernel quiesces the CPU, notices every entry but an NMI, and tells by a forced SIGSYS
//! with the cause before user code goes on; isolation is off from then on. Nothing here polls, waits or
//! retries without bound.
//!
//! | decision | why |
//! |---|---|
//! | the kernel's status block is in the thread's page | one line that the worker reads anyway; the kernel pins the page while the thread is isolated. Private, so nobody else writes it; wiped by fork, so a child, which is never isolated, reads zeroes and the parent keeps the pinned page itself |
//! | a turn compares the block's `seq` with the last one seen | any kernel entry changes it: a breach, one that the mode allows, `ONESHOT` switching off silently, a breach that a debugger swallowed |
//! | a signal, not `NOSIG` | the program learns before its next instruction; `Abort` dies before the forbidden call has run; the interrupted instruction is known |
//! | SIGSYS | the signal of `dispatch`: one handler, one rule about who else may have it; it is open in every mask that the preparation makes |
//! | no `REARM` | what the program does about a breach (report, stop) happens before isolation comes back |
//! | a visit is `OFF` .. `ENABLE` | one quiesce a visit. With `ALLOW_SYSCALLS` inside, every call of the visit would be quiesced, and a visit that starts a thread or a timer could not be, half way. So a visit is outside isolation altogether: a page fault in one is not a breach |
//! | `ENABLE` that fails after a visit is a breach, cause `quiesce` | the thread runs un-isolated then, which has to be heard of; the next turn tries again |

#[cfg(target_arch = "x86_64")]
mod decode;
pub(crate) mod uapi;

use std::cell::Cell;
use uapi::{Block, COUNTS};

/// What a thread's page holds of the backend. All zero where the backend is another, and in a forked child.
#[derive(Debug, Default)]
pub(crate) struct Half {
    /// Written by the kernel.
    pub(crate) block: Block,
    /// Breaches, races and entries by cause of the block that were counted already.
    breaches: Cell<u64>,
    races: Cell<u64>,
    counted: Cell<[u64; COUNTS]>,
    flags: Cell<u64>,
    quiesce: Cell<u64>,
    settle_us: Cell<u32>,
    cpu: Cell<u32>,
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn probe() -> Result<(), crate::Unmet> {
    Err(crate::Unmet::Backend {
        backend: crate::Backend::TaskIsolation,
        reason: "it is written for x86-64; elsewhere there is advisory only".to_owned(),
    })
}

/// Where the backend does not exist no thread has its gate, so none of these is ever called.
#[cfg(not(target_arch = "x86_64"))]
mod elsewhere {
    use crate::error::Unmet;
    use crate::thread::Thread;

    #[derive(Debug)]
    pub(crate) enum Refusal {}

    impl Refusal {
        pub(crate) fn unmet(&self) -> Vec<Unmet> {
            match *self {}
        }
    }

    pub(crate) fn enable(_: &Thread) -> Result<(), Refusal> {
        Ok(())
    }

    pub(crate) fn disable(_: &Thread) {}

    pub(crate) fn look(_: &Thread) {}

    pub(crate) fn take_counts(_: &Thread) {}

    pub(crate) fn unquiet(_: &Thread, refusal: &Refusal) {
        match *refusal {}
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use elsewhere::*;
#[cfg(target_arch = "x86_64")]
pub(crate) use here::*;

#[cfg(target_arch = "x86_64")]
mod here {
    #![allow(unsafe_code, reason = "hands the kernel addresses of its structs; see each block")]

    use super::decode;
    use super::uapi::{self, Args, Block, Features, Operation, STATE_ISOLATED, STATE_OFF};
    use crate::backend::{Backend, handlers, sys};
    use crate::cause::{Breach, Cause, Detail};
    use crate::error::Unmet;
    use crate::mode::{Mode, Quiesce};
    use crate::prepare::cpu::Cpu;
    use crate::status::{State, bump};
    use crate::thread::{Page, Thread};
    use isoplane_memory::Clock;
    use nix::errno::Errno;
    use std::sync::OnceLock;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    /// The signal that a breach comes as.
    pub(crate) const SIGNALS: &[libc::c_int] = &[libc::SIGSYS];

    /// Times that arming is asked for while the kernel answers that the CPU is busy. Each time the kernel
    /// tries [`TRIES`] times itself.
    const ROUNDS: u32 = 3;
    /// And while signals come in between.
    const INTERRUPTED: u32 = 16;
    const TRIES: u32 = 20;

    /// What the kernel can do, or why it cannot. Asked once, by a thread that is not isolated.
    pub(crate) fn probe() -> Result<(), Unmet> {
        static ANSWER: OnceLock<Result<Features, Errno>> = OnceLock::new();
        let refused = |reason: String| Unmet::Backend { backend: Backend::TaskIsolation, reason };
        let answer = ANSWER.get_or_init(features).as_ref();
        let features = answer.map_err(|errno| {
            refused(format!(
                "it needs a kernel with the task-isolation patches, and this one has none ({errno})"
            ))
        })?;
        judge(features).map_err(refused)
    }

    fn features() -> Result<Features, Errno> {
        let mut features = Features::default();
        let (address, size) = (&raw mut features, size_of::<Features>());
        // SAFETY: the kernel writes at most `size` bytes of the struct, which lives.
        answer(unsafe { uapi::prctl(Operation::Features, address as u64, size) })?;
        Ok(features)
    }

    /// Whether this version can use a kernel that can do this.
    pub(super) fn judge(features: &Features) -> Result<(), String> {
        let quiesce = uapi::Q_TICK | uapi::Q_VMSTAT | uapi::Q_LRU | uapi::Q_SOFTIRQ | uapi::Q_SCHED;
        if features.version != uapi::VERSION {
            let version = features.version;
            return Err(format!(
                "the kernel's task isolation is of version {version}, and this program knows version {} only",
                uapi::VERSION
            ));
        }
        if features.flags & uapi::FLAGS_OF_MODES != uapi::FLAGS_OF_MODES
            || features.quiesce & quiesce != quiesce
        {
            return Err(
                "the kernel's task isolation lacks modes or kinds of quiescing that this program needs"
                    .to_owned(),
            );
        }
        Ok(())
    }

    fn answer(result: i64) -> Result<(), Errno> {
        if result < 0 { Err(Errno::from_raw(-result as i32)) } else { Ok(()) }
    }

    /// What one prepared thread holds of the backend.
    #[derive(Debug)]
    pub(crate) struct Engine {
        stack: sys::SignalStack,
    }

    impl Engine {
        /// Takes the signal, puts the thread's handlers on its own stack, and begins to count from what the
        /// kernel has counted of this thread so far.
        pub(crate) fn prepare(
            page: &Page,
            cpu: Cpu,
            quiesce: Quiesce,
            settle: Duration,
        ) -> Result<Self, Unmet> {
            let failed = |call| move |errno: Errno| Unmet::Call { call, errno };
            let thread = page.thread();
            handlers::take_signals(SIGNALS).map_err(failed("sigaction"))?;
            let half = &thread.kernel;
            half.flags.set(flags(thread.mode()));
            half.quiesce.set(kinds(quiesce));
            half.settle_us
                .set(u32::try_from(settle.as_micros()).unwrap_or(u32::MAX).min(uapi::SETTLE_US_MAX));
            half.cpu.set(cpu.0 as u32);
            let block = &raw const half.block;
            // SAFETY: the kernel writes `STATUS_SIZE` bytes of atomics that nobody looks at meanwhile.
            answer(unsafe { uapi::prctl(Operation::Get, block as u64, uapi::STATUS_SIZE) })
                .map_err(failed("prctl(PR_TASK_ISOLATION_GET)"))?;
            half.breaches.set(half.block.breaches());
            half.races.set(half.block.races.load(Ordering::Relaxed));
            half.counted.set(counts(&half.block));
            let (base, bytes) = page.signal_stack();
            let stack = sys::SignalStack::set(base, bytes).map_err(failed("sigaltstack"))?;
            Ok(Self { stack })
        }

        /// Gives the thread its former signal stack back.
        pub(crate) fn unprepare(&self) {
            self.stack.restore();
        }
    }

    /// The kernel's flags of a mode.
    pub(super) fn flags(mode: Mode) -> u64 {
        // The kernel refuses a ONESHOT of no allowance; here it is a mode that allows nothing.
        let mode = if mode.allowances().is_empty() { Mode::STRICT } else { mode };
        u64::from(mode.bits()) & uapi::FLAGS_OF_MODES
    }

    /// What the kernel quiesces. Without the first four there is no isolation, and they cost little here.
    pub(super) fn kinds(quiesce: Quiesce) -> u64 {
        let mut kinds = uapi::Q_TICK | uapi::Q_SCHED | uapi::Q_SOFTIRQ | uapi::Q_VMSTAT;
        if quiesce.contains(Quiesce::LRU) {
            kinds |= uapi::Q_LRU;
        }
        if quiesce.contains(Quiesce::SLAB) {
            kinds |= uapi::Q_SLAB;
        }
        kinds
    }

    fn counts(block: &Block) -> [u64; uapi::COUNTS] {
        std::array::from_fn(|at| block.count[at].load(Ordering::Relaxed))
    }

    /// Why the kernel would not isolate.
    #[derive(Debug)]
    pub(crate) struct Refusal {
        errno: Errno,
        args: Args,
        cpu: Cpu,
    }

    impl Refusal {
        /// Everything that was in the way.
        pub(crate) fn unmet(&self) -> Vec<Unmet> {
            decode::refusal(self.cpu, self.errno, &self.args)
        }
    }

    /// Quiesces and isolates: the last thing that arming does. The thread says that it is armed already, so
    /// that a breach right behind the call finds it so.
    pub(crate) fn enable(thread: &Thread) -> Result<(), Refusal> {
        let half = &thread.kernel;
        let asked = Args {
            flags: half.flags.get(),
            quiesce: half.quiesce.get(),
            signo: libc::SIGSYS as u32,
            settle_us: half.settle_us.get(),
            tries: TRIES,
            status: (&raw const half.block) as u64,
            cookie: std::ptr::from_ref(thread) as u64,
            ..Args::default()
        };
        let cpu = Cpu(half.cpu.get() as usize);
        let (mut rounds, mut interrupted) = (ROUNDS, INTERRUPTED);
        loop {
            let mut args = asked;
            // SAFETY: the kernel reads and writes one such struct, which lives. The status block is in the
            // thread's page: `Prepared` disarms before the page goes, the kernel pins it meanwhile, and all
            // of it is atomics.
            let result = unsafe { uapi::prctl(Operation::Enable, (&raw mut args) as u64, size_of::<Args>()) };
            let Err(errno) = answer(result) else {
                if half.block.cpu.load(Ordering::Relaxed) == half.cpu.get() || half.block.state() == STATE_OFF
                {
                    return Ok(());
                }
                // Another CPU than it was prepared for, which somebody has moved it to, is as good to the kernel.
                disable(thread);
                args.unmet = uapi::unmet::AFFINITY;
                return Err(Refusal { errno: Errno::EINVAL, args, cpu });
            };
            let again = match errno {
                Errno::EBUSY | Errno::EAGAIN => &mut rounds,
                Errno::EINTR => &mut interrupted,
                _ => return Err(Refusal { errno, args, cpu }),
            };
            *again -= 1;
            if *again == 0 {
                return Err(Refusal { errno, args, cpu });
            }
        }
    }

    /// Isolation off, by the program's wish. Async-signal-safe.
    pub(crate) fn disable(thread: &Thread) {
        if thread.kernel.block.state() != STATE_OFF {
            // SAFETY: no memory. It always succeeds.
            unsafe { uapi::prctl(Operation::Off, 0, 0) };
        }
    }

    /// Takes over what the kernel has counted since the last time.
    pub(crate) fn take_counts(thread: &Thread) {
        let (half, Some(words)) = (&thread.kernel, thread.words()) else { return };
        let (now, before) = (counts(&half.block), half.counted.replace(counts(&half.block)));
        for (number, (now, before)) in now.into_iter().zip(before).enumerate() {
            let cause = decode::cause(number as u32);
            // NMIs are for the observer to count: they are no business of the mode's.
            if now != before && cause != Cause::Nmi {
                bump(&words.allowed[cause as usize], now.wrapping_sub(before));
            }
        }
        let races = half.block.races.load(Ordering::Relaxed);
        bump(&words.races, races.wrapping_sub(half.races.replace(races)));
    }

    /// The last breach, if nobody has taken it yet. It is counted as one, so not as allowed.
    fn take_breach(thread: &Thread, interrupted: u64) -> Option<Breach> {
        let half = &thread.kernel;
        let breaches = half.block.breaches();
        if half.breaches.replace(breaches) == breaches {
            return None;
        }
        let mut counted = half.counted.get();
        if let Some(count) = counted.get_mut(half.block.cause.load(Ordering::Relaxed) as usize) {
            *count = count.wrapping_add(1);
        }
        half.counted.set(counted);
        let in_slow_path = thread.state() == State::SlowPath;
        Some(decode::breach(&half.block, interrupted, Clock::ticks(), in_slow_path))
    }

    /// A signal with the code of a breach: whether it is one. Others may send such a signal, but cannot
    /// write the block.
    pub(crate) fn on_signal(thread: &Thread, interrupted: u64) -> bool {
        let Some(breach) = take_breach(thread, interrupted) else { return false };
        take_counts(thread);
        handlers::broken(thread, &breach);
        true
    }

    /// What the kernel did without a signal, or with one that went elsewhere, since the last turn.
    pub(crate) fn look(thread: &Thread) {
        let breach = take_breach(thread, 0);
        take_counts(thread);
        match (breach, thread.words()) {
            // Released since: it is reported when isolation is given back or begins anew.
            (Some(breach), Some(words)) if thread.state() == State::Off => return words.record(&breach),
            (Some(breach), _) => return handlers::broken(thread, &breach),
            (None, _) => {}
        }
        if thread.state() != State::Armed {
            return;
        }
        match thread.kernel.block.state() {
            STATE_ISOLATED => thread.saw(),
            // `ONESHOT`, or the program's own call.
            STATE_OFF => thread.release(),
            // A handler that left sideways: armed again by the turn.
            _ => thread.set_state(State::SlowPath),
        }
    }

    /// The CPU could not be made quiet behind a visit.
    pub(crate) fn unquiet(thread: &Thread, refusal: &Refusal) {
        let detail = Detail::Unquiet { unmet: refusal.args.unmet };
        let (cpu, tsc) = (refusal.cpu.0 as u32, Clock::ticks());
        let breach = Breach { cause: Cause::Quiesce, detail, cpu, tsc, in_slow_path: true, sender: None };
        handlers::broken(thread, &breach);
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::here::{flags, judge, kinds};
    use super::uapi::Features;
    use crate::mode::{Mode, Quiesce};

    #[test]
    fn modes_have_the_kernels_numbers() {
        for (mode, expected) in [
            (Mode::STRICT, 0),
            (Mode::ALLOW_SYSCALLS, 1),
            (Mode::ALLOW_EXCEPTIONS, 2),
            (Mode::ALLOW_PAGE_FAULTS, 4),
            (Mode::ALLOW_INTERRUPTS, 8),
            (Mode::ALLOW_INTERRUPTS | Mode::ONESHOT, 24),
            (Mode::ONESHOT, 0),
            (Mode::all(), 31),
            (Mode::from_bits_retain(u32::MAX), 31),
        ] {
            assert_eq!(flags(mode), expected, "{mode:?}");
        }
    }

    #[test]
    fn the_tick_is_always_quiesced() {
        assert_eq!(kinds(Quiesce::empty()), 0b01_1011);
        assert_eq!(kinds(Quiesce::default()), 0b01_1111);
        assert_eq!(kinds(Quiesce::all()), 0b11_1111);
    }

    #[test]
    fn a_kernel_that_can_less_is_not_used() {
        let good = Features { version: 1, flags: 0x1ff, quiesce: 0x3f, ..Features::default() };
        assert_eq!(judge(&good), Ok(()));
        let more = Features { flags: u64::MAX, quiesce: u64::MAX, causes: u64::MAX, ..good };
        assert_eq!(judge(&more), Ok(()));
        assert!(judge(&Features { version: 2, ..good }).unwrap_err().contains("version 2"));
        assert!(judge(&Features { version: 0, ..good }).is_err());
        assert!(judge(&Features { flags: 0x1ef, ..good }).is_err());
        assert!(judge(&Features { quiesce: 0x3b, ..good }).is_err());
    }
}
