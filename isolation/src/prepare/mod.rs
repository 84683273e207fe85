//! What a thread does to itself before it can be isolated.
//!
//! Contract: each function does one thing and answers for it. Nothing here decides what to make of the
//! answers: that is the caller's, who runs the functions in this order in the thread that will be isolated:
//!
//! 1. [`signals::block`]
//! 2. [`cpu::pin`]
//! 3. [`memory::tune_malloc`], [`memory::disable_thp`], [`memory::keep_pages_in_place`],
//!    [`memory::lock`], [`memory::prefault_stack`]
//! 4. [`scheduling::apply`], [`scheduling::fair_server`], which privileges are still needed for
//! 5. whatever else needs privileges (perf events, descriptors to open)
//! 6. [`privileges::apply`], then [`privileges::die_with_parent`], since the kernel forgets that wish
//!    when the identity changes
//!
//! What could not be had and what is lost by it is a [`Weakness`]: the thread can run isolated without
//! it, and worse. What makes isolation impossible, or a promise broken, is an error of the module's own.
//!
//! | module | what it prepares |
//! |---|---|
//! | [`cpu`] | is the CPU there, ours, and left alone by the scheduler; pinning |
//! | [`memory`] | locking, pre-faulting, huge pages, NUMA, malloc |
//! | [`scheduling`] | real-time scheduling, and what the deadline server and throttling make of it |
//! | [`signals`] | which signals reach the thread |
//! | [`privileges`] | who it is, and what it may do no more |

pub mod cpu;
pub mod memory;
pub mod privileges;
pub mod scheduling;
pub mod signals;

use cpu::Cpu;
use nix::errno::Errno;

/// Something that preparing could not get, what is lost by that, and how to get it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Weakness {
    /// Nothing is locked in memory.
    #[error(
        "memory is not locked ({errno}; memlock limit {}): the kernel may take pages away, and the thread \
         faults when it touches them; raise the limit (ulimit -l, LimitMEMLOCK=) or give the program \
         CAP_IPC_LOCK", bytes_or_none(*.limit)
    )]
    MemoryNotLocked {
        /// What the kernel answered.
        errno: Errno,
        /// The limit in bytes; `None` is no limit.
        limit: Option<u64>,
    },
    /// What is there is locked; what is mapped from now on is not.
    #[error(
        "memory that is mapped from now on is not locked, since over the memlock limit of {limit} bytes \
         malloc would fail: its pages fault at the first touch; raise the limit to unlimited (ulimit -l, \
         LimitMEMLOCK=infinity) or give the program CAP_IPC_LOCK"
    )]
    FutureNotLocked {
        /// The limit in bytes.
        limit: u64,
    },
    /// Less of the stack was touched than was asked for.
    #[error(
        "only {touched} of {wanted} bytes of the stack are pre-faulted, there is not more: deeper calls \
         fault or overflow; give the thread a larger stack (ulimit -s, or the thread's builder)"
    )]
    StackNotPrefaulted {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes done.
        touched: usize,
    },
    /// Transparent huge pages stay on for the process.
    #[error(
        "transparent huge pages stay on ({0}): khugepaged may replace pages under the thread, which then \
         faults; write `never` or `madvise` to /sys/kernel/mm/transparent_hugepage/enabled"
    )]
    ThpNotDisabled(Errno),
    /// The memory policy could not be set while NUMA balancing is on.
    #[error(
        "NUMA balancing is on and the memory policy that keeps it off this thread was refused ({0}): the \
         kernel unmaps pages to see who touches them, and the thread faults; write 0 to \
         /proc/sys/kernel/numa_balancing, or give the program CAP_SYS_NICE where a container asks for it"
    )]
    NumaPolicy(Errno),
    /// NUMA balancing is on and other threads of the process may be scanned.
    #[error(
        "NUMA balancing is on and the process has {threads} threads, any of which may have the shared \
         memory scanned: this thread faults then; write 0 to /proc/sys/kernel/numa_balancing, or give the \
         worker a process of its own"
    )]
    NumaSiblings {
        /// Threads of the process.
        threads: usize,
    },
    /// malloc could not be told to keep its memory.
    #[error(
        "malloc did not take the setting {setting}: it may give memory back to the kernel and map it again; \
         allocate nothing after arming, or install WorkerAlloc"
    )]
    Malloc {
        /// Its name in mallopt(3).
        setting: &'static str,
    },
    /// Real-time scheduling was asked for and refused.
    #[error(
        "SCHED_FIFO with priority {priority} was refused ({errno}): kernel threads and other programs share \
         the CPU with the thread; give the program CAP_SYS_NICE or an rtprio limit (ulimit -r, LimitRTPRIO=) \
         of at least {priority} (priorities are 1 to 99), and check cpu.rt_runtime_us of its cgroup"
    )]
    RealTimeRefused {
        /// The priority asked for.
        priority: u8,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The CPU is not isolated from the scheduler.
    #[error(
        "{0} is not isolated from the scheduler: other threads may be put on it, and ordinary scheduling \
         lets them run; boot with isolcpus=domain,managed_irq,{n} or make it an isolated cpuset partition",
        n = .0.0
    )]
    SharedCpu(Cpu),
    /// A real-time spinner on a CPU that others use.
    #[error(
        "SCHED_FIFO on {0}, which is not isolated from the scheduler: whatever else is put there does not \
         run, kernel threads too; boot with isolcpus=domain,managed_irq,{n} or leave the choice to Auto",
        n = .0.0
    )]
    Starvation(Cpu),
    /// The kernel stops real-time threads for a part of each period.
    #[error(
        "real-time throttling is on: after {runtime_us} us of each {period_us} us the kernel stops the \
         thread; write -1 to /proc/sys/kernel/sched_rt_runtime_us"
    )]
    RtThrottling {
        /// Time that real-time threads get, in microseconds.
        runtime_us: i64,
        /// Of this much, in microseconds.
        period_us: i64,
    },
    /// The deadline server for ordinary threads is armed, or nobody lets us see whether it is.
    #[error(
        "the fair server of {cpu} is {}: it interrupts an ordinary spinning thread about once a second; \
         write 0 to /sys/kernel/debug/sched/fair_server/cpu{}/runtime, or use SCHED_FIFO",
        match .runtime_ns { Some(ns) => format!("armed ({ns} ns)"), None => "not to be seen".to_owned() },
        .cpu.0
    )]
    FairServer {
        /// The CPU.
        cpu: Cpu,
        /// Its run time a period in nanoseconds; `None` when debugfs may not be read.
        runtime_ns: Option<u64>,
    },
    /// The tick does not stop on this CPU.
    #[error(
        "{0} is not nohz_full: the timer tick interrupts the thread up to a thousand times a second; boot \
         with nohz_full={n} rcu_nocbs={n}", n = .0.0
    )]
    TickStays(Cpu),
    /// Other threads want to run on this CPU now.
    #[error(
        "{} other thread(s) want to run on {cpu} now, such as {}: the scheduler shares the CPU between them \
         and this one, and the tick stays on; move them (taskset -p, cpusets) or end them",
        .threads.len(), .threads.first().map_or_else(String::new, ToString::to_string)
    )]
    OthersRunnable {
        /// The CPU.
        cpu: Cpu,
        /// Who they are.
        threads: Vec<cpu::Runnable>,
    },
}

fn bytes_or_none(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "none".to_owned(), |bytes| format!("{bytes} bytes"))
}
