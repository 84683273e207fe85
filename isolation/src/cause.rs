//! Why the kernel was entered: causes, breaches, interruptions.
//!
//! Contract: a [`Cause`] has a fixed number and name, the same in logs, statistics, JSON and every
//! backend. Numbers are only ever added. A *breach* was enforced, an *interruption* was observed; lost
//! time that has no cause to be seen is a gap and is none of these.

use std::fmt;

macro_rules! causes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+) => {
        /// Why the kernel was entered.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Cause { $($(#[doc = $doc])+ $name,)+ }

        impl Cause {
            /// All causes, in the order of their numbers.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$name),+];

            /// Its name in statistics and JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }
        }
    };
}

causes! {
    /// A system call.
    Syscall = "syscall",
    /// A page fault.
    PageFault = "page_fault",
    /// Another exception: divide error, breakpoint, alignment check, ...
    Exception = "exception",
    /// An interrupt of a device.
    DeviceInterrupt = "device_interrupt",
    /// The local timer.
    TimerTick = "timer_tick",
    /// A reschedule IPI: a wake-up, a signal, a kick of the tick.
    Reschedule = "reschedule",
    /// A function-call IPI other than a TLB shootdown.
    FunctionCall = "function_call",
    /// A function-call IPI that flushes the TLB: a sibling thread changed the memory map.
    TlbShootdown = "tlb_shootdown",
    /// IRQ work that the kernel raised for itself.
    IrqWork = "irq_work",
    /// A non-maskable interrupt. No backend enforces this one.
    Nmi = "nmi",
    /// A machine check, or the timer that polls for them.
    MachineCheck = "machine_check",
    /// A thermal event.
    Thermal = "thermal",
    /// A soft interrupt that ran on the CPU.
    Softirq = "softirq",
    /// A signal was delivered to the thread.
    Signal = "signal",
    /// Another thread got the CPU although this one wanted to run.
    Preemption = "preemption",
    /// The thread ran on another CPU.
    Migration = "migration",
    /// The set of CPUs that the thread may run on was changed.
    AffinityChange = "affinity_change",
    /// The CPU, or another one, was taken offline or brought online.
    Hotplug = "hotplug",
    /// The thread was stopped (SIGSTOP, a job-control signal, the freezer) or blocked unasked.
    Stop = "stop",
    /// A debugger or tracer attached to the thread.
    Ptrace = "ptrace",
    /// The hypervisor's callback, or one of its interrupts.
    Hypervisor = "hypervisor",
    /// Quiescing did not come to an end in its bounded number of tries.
    Quiesce = "quiesce",
    /// An entry that fits no other cause.
    Unknown = "unknown",
    /// A TLB flush of kernel addresses: memory of the kernel's own was unmapped somewhere.
    KernelTlbFlush = "kernel_tlb_flush",
    /// The kernel's code was changed (a tracepoint, a static key, a BPF program) and every CPU had to see it.
    TextSync = "text_sync",
    /// `membarrier(2)` of another thread.
    Membarrier = "membarrier",
    /// Every CPU was stopped for a moment.
    StopMachine = "stop_machine",
    /// Another vector of the platform: spurious, of the performance counters, of the hypervisor.
    Platform = "platform",
}

impl Cause {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The cause of a number, if there is one.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is known about a breach besides its cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Detail {
    /// A system call.
    Syscall {
        /// Its number.
        number: u64,
        /// Address of the instruction after the call (what `si_call_addr` holds).
        call_address: u64,
        /// The kernel's `AUDIT_ARCH_*` of the entry: a 64-bit program may use the 32-bit one.
        arch: u32,
    },
    /// A page fault.
    Fault {
        /// The address that was touched.
        address: u64,
        /// The instruction that touched it; under `dispatch` the program's handler instead where the fault
        /// was also a SIGSEGV or SIGBUS, and the caller where it was a call of the vsyscall page.
        instruction: u64,
    },
    /// Nothing but where it happened: the instruction that was interrupted.
    At {
        /// Its address; the program's handler instead, under `task-isolation`, where an exception was also a
        /// signal of its own.
        instruction: u64,
    },
    /// A signal of another thread or process, or of the kernel.
    Signal {
        /// Its number.
        number: u32,
        /// The instruction that was interrupted.
        instruction: u64,
    },
    /// An interrupt of a device.
    Interrupt {
        /// Its number in `/proc/interrupts`, where the kernel could tell.
        irq: Option<u32>,
        /// The instruction that was interrupted.
        instruction: u64,
    },
    /// Another thread: who had the CPU meanwhile, or who attached as a debugger.
    Task {
        /// Its thread id.
        pid: u32,
        /// The instruction that was interrupted.
        instruction: u64,
    },
    /// The thread is not where it was isolated any more.
    Moved {
        /// The CPU where it is now.
        to: u32,
        /// The instruction that was interrupted.
        instruction: u64,
    },
    /// The CPU could not be made quiet again: see [`unquiet`].
    Unquiet {
        /// What was in the way: the kernel's `PR_TASK_ISOLATION_UNMET_*` bits.
        unmet: u64,
    },
}

impl Detail {
    /// The instruction at which isolation was broken; for a system call the one after it. `None` where the
    /// kernel named none.
    #[must_use]
    pub fn instruction(&self) -> Option<u64> {
        match *self {
            Self::Syscall { call_address: instruction, .. }
            | Self::Fault { instruction, .. }
            | Self::At { instruction }
            | Self::Signal { instruction, .. }
            | Self::Interrupt { instruction, .. }
            | Self::Task { instruction, .. }
            | Self::Moved { instruction, .. } => Some(instruction).filter(|address| *address != 0),
            Self::Unquiet { .. } => None,
        }
    }
}

/// What the bits of [`Detail::Unquiet`] mean, for people.
pub fn unquiet(unmet: u64) -> impl Iterator<Item = &'static str> {
    /// In the order of the bits (`PR_TASK_ISOLATION_UNMET_*` of the kernel patches' linux/task_isolation.h).
    const MEANINGS: [&str; 11] = [
        "more than one CPU is allowed",
        "the CPU is not nohz_full",
        "the clock is not stable",
        "a call of the 32-bit interface",
        "another thread is runnable there",
        "the tick is needed",
        "a timer is armed there",
        "statistics of virtual memory are unfolded",
        "batches of pages are undrained",
        "soft interrupts are pending",
        "the fair server cannot be parked",
    ];
    let named = MEANINGS.into_iter().enumerate().filter(move |(bit, _)| unmet & 1 << bit != 0);
    let unknown = unmet >> MEANINGS.len() != 0;
    named.map(|(_, meaning)| meaning).chain(unknown.then_some("something that this version has no name for"))
}

/// Who sent the interrupt that broke isolation. Only the backend `task-isolation` can tell, of a kernel
/// booted with `task_isolation_debug`; what it does not know is `None` or empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Sender {
    /// The CPU that it was sent from.
    pub cpu: Option<u32>,
    /// The thread that ran there.
    pub pid: Option<u32>,
    pub(crate) comm: [u8; 16],
    pub(crate) function: [u8; 40],
}

impl Default for Sender {
    fn default() -> Self {
        Self { cpu: None, pid: None, comm: [0; 16], function: [0; 40] }
    }
}

impl Sender {
    /// Name of the thread that ran there.
    #[must_use]
    pub fn comm(&self) -> &str {
        text(&self.comm)
    }

    /// The kernel's function that was called by the interrupt, or its handler.
    #[must_use]
    pub fn function(&self) -> &str {
        text(&self.function)
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("cpu", &self.cpu)
            .field("pid", &self.pid)
            .field("comm", &self.comm())
            .field("function", &self.function())
            .finish()
    }
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.comm().is_empty() {
            f.write_str("somebody")?
        } else {
            f.write_str(self.comm())?
        }
        if let Some(pid) = self.pid {
            write!(f, " ({pid})")?;
        }
        if let Some(cpu) = self.cpu {
            write!(f, " on CPU {cpu}")?;
        }
        if self.function().is_empty() { Ok(()) } else { write!(f, " for {}", self.function()) }
    }
}

/// The printable ASCII that a field starts with: a thread names itself as it likes.
fn text(field: &[u8]) -> &str {
    let end = field.iter().position(|byte| !(0x20..0x7f).contains(byte)).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).unwrap_or_default()
}

/// A kernel entry that the mode forbids and the backend enforces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Breach {
    /// Why.
    pub cause: Cause,
    /// What exactly.
    pub detail: Detail,
    /// The CPU that the thread was on then.
    pub cpu: u32,
    /// The time-stamp counter then.
    pub tsc: u64,
    /// It happened during a visit to the slow path, of something that the visit does not allow.
    pub in_slow_path: bool,
    /// Who caused it, where the kernel tells.
    pub sender: Option<Sender>,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.detail {
            Detail::Syscall { number, call_address, arch } => {
                let name = syscall_name(number, arch);
                write!(f, "system call {number} ({name}) at {call_address:#x}")?;
            }
            Detail::Fault { address, instruction } => {
                write!(f, "page fault on {address:#x} at {instruction:#x}")?;
            }
            Detail::At { instruction } => write!(f, "{} at {instruction:#x}", self.cause)?,
            Detail::Signal { number, instruction } => {
                write!(f, "{} {number} at {instruction:#x}", self.cause)?;
            }
            Detail::Interrupt { irq: Some(irq), instruction } => {
                write!(f, "{} {irq} at {instruction:#x}", self.cause)?;
            }
            Detail::Interrupt { irq: None, instruction } => write!(f, "{} at {instruction:#x}", self.cause)?,
            Detail::Task { pid, instruction } => {
                write!(f, "{} by thread {pid} at {instruction:#x}", self.cause)?;
            }
            Detail::Moved { to, instruction } => {
                write!(f, "{} to CPU {to} at {instruction:#x}", self.cause)?;
            }
            Detail::Unquiet { unmet } => {
                f.write_str("the CPU could not be made quiet again")?;
                for (n, what) in unquiet(unmet).enumerate() {
                    write!(f, "{}{what}", if n == 0 { ": " } else { ", " })?;
                }
            }
        }
        write!(f, " on CPU {}", self.cpu)?;
        if let Some(sender) = self.sender {
            write!(f, ", sent by {sender}")?;
        }
        if self.in_slow_path { f.write_str(", in the slow path") } else { Ok(()) }
    }
}

/// Kernel entries that were observed, by cause.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Interruptions([u64; Cause::COUNT]);

impl Default for Interruptions {
    fn default() -> Self {
        Self([0; Cause::COUNT])
    }
}

impl Interruptions {
    /// How many of this cause.
    #[must_use]
    pub const fn of(&self, cause: Cause) -> u64 {
        self.0[cause as usize]
    }

    /// Counts `n` more of a cause.
    pub const fn add(&mut self, cause: Cause, n: u64) {
        self.0[cause as usize] = self.0[cause as usize].wrapping_add(n);
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, n| sum.wrapping_add(*n))
    }

    /// Every cause with its count, also those that did not happen.
    pub fn iter(&self) -> impl Iterator<Item = (Cause, u64)> + '_ {
        Cause::ALL.into_iter().zip(self.0)
    }
}

impl From<[u64; Cause::COUNT]> for Interruptions {
    fn from(counts: [u64; Cause::COUNT]) -> Self {
        Self(counts)
    }
}

impl fmt::Debug for Interruptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.iter().filter(|(_, n)| *n != 0).map(|(cause, n)| (cause.name(), n)))
            .finish()
    }
}

/// The name of a native system call.
pub(crate) fn syscall_name(number: u64, arch: u32) -> &'static str {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    if arch != AUDIT_ARCH_X86_64 {
        return "of the 32-bit interface";
    }
    usize::try_from(number).ok().and_then(syscalls::Sysno::new).map_or("unknown", |call| call.name())
}
