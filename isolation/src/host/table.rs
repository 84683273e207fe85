//! Every check: its name, and why it matters.
//!
//! Contract: ids never change and are never used twice; `docs/host-checks.md` explains each.

use super::{Info, boot, interrupts, machine, memory, network, power, sched, time};

macro_rules! checks {
    ($($id:literal, $title:literal, $run:path: $why:literal;)+) => {
        /// Every check, in the order in which a report has them.
        pub const CHECKS: [Info; [$($id),+].len()] = [$(Info { id: $id, title: $title, why: $why, run: $run }),+];
    };
}

checks! {
    "cpus", "CPUs", boot::cpus:
        "a worker needs an online CPU for itself, and the kernel needs at least one other for everything else";
    "nohz-full", "nohz_full", boot::nohz_full:
        "elsewhere the timer tick interrupts a worker 100 to 1000 times a second; it can be stopped only on CPUs named at boot";
    "isolcpus", "isolcpus or cpuset partition", boot::scheduler:
        "elsewhere the scheduler may put any thread on the worker's CPU; a second runnable thread also restarts the tick";
    "rcu-nocbs", "rcu_nocbs", boot::rcu_nocbs:
        "RCU callbacks would run in soft interrupts on the worker's CPU";
    "irqaffinity", "default IRQ affinity", interrupts::default_affinity:
        "interrupts of devices that appear later go where the default says";
    "irqs", "IRQ affinity", interrupts::irqs:
        "each interrupt of a device takes a worker into the kernel for microseconds";
    "workqueues", "workqueue cpumask", interrupts::workqueues:
        "unbound kernel work items would run on the worker's CPU and preempt it";
    "rps", "RPS", network::rps:
        "receive packet steering sends IPIs to the CPUs in its masks and runs the kernel's protocol stack there";
    "xps", "XPS", network::xps:
        "a transmit queue given to a CPU that sends nothing through the kernel is lost to the CPUs that do";
    "watchdog", "lockup watchdogs", time::watchdog:
        "the watchdogs run a timer, a thread and a performance event (NMI) on each of their CPUs every few seconds";
    "timer-migration", "timer migration", time::timer_migration:
        "without it, timers stay on the CPU that started them and interrupt it when they expire";
    "clocksource", "clocksource", time::clocksource:
        "workers read time from the TSC; while the kernel itself does not trust the TSC they refuse to, and the tick cannot stop";
    "tsc", "TSC", time::tsc:
        "unless the TSC is declared reliable, a timer that checks it moves over all CPUs";
    "smt", "SMT siblings", power::smt:
        "a sibling shares the core: whatever runs there takes execution units and caches away";
    "governor", "frequency governor", power::governor:
        "a governor that follows the load changes the frequency under a worker; each change stalls the core";
    "cstates", "C-states", power::cstates:
        "leaving a deep idle state takes tens to hundreds of microseconds whenever a worker sleeps or restarts";
    "hugepages", "huge pages", memory::hugepages:
        "with pages of 4 KiB, frame pools overflow the TLB: each miss costs tens of nanoseconds";
    "memlock", "memlock limit", memory::memlock:
        "a worker locks all its memory; without the right to, page faults and the kernel's reclaim disturb it";
    "thp", "transparent huge pages", memory::thp:
        "khugepaged collapses pages of any process that asked, with IPIs to all CPUs and page faults in the process";
    "ksm", "KSM", memory::ksm:
        "merging makes pages read-only again: TLB flushes now, page faults later";
    "damon", "DAMON", memory::damon:
        "access monitoring clears accessed bits and flushes TLBs at every sample";
    "compaction", "compaction of locked pages", memory::compaction:
        "compaction would migrate pages although they are locked: TLB flushes and page faults in a worker";
    "numa-balancing", "NUMA balancing", memory::numa_balancing:
        "it unmaps pages to see who touches them: page faults by design";
    "swap", "swap", memory::swap:
        "reclaim of anonymous memory flushes TLBs; a page that was not locked may come back by a major fault";
    "mce", "machine-check polling", time::mce:
        "a timer on every CPU looks for corrected memory errors, every five minutes by default";
    "stat-interval", "vm.stat_interval", time::stat_interval:
        "the per-CPU statistics of virtual memory are folded by a kernel thread on each CPU, every second by default";
    "rt-throttling", "RT throttling", sched::rt_throttling:
        "a real-time thread that never sleeps is stopped for 50 ms of every second";
    "fair-server", "fair server", sched::fair_server:
        "from Linux 6.12 the deadline server of ordinary threads interrupts a spinning worker every second";
    "neighbours", "spinning neighbours", sched::neighbours:
        "a thread that spins on a housekeeping CPU delays the kicker there by whole time slices (4 ms were measured)";
    "virtual-machine", "virtual machine", machine::virtual_machine:
        "the host may take the CPU away at any time: gaps without a cause; where TLB flushes are paravirtual, counts of TLB interrupts understate";
    "iommu", "IOMMU", machine::iommu:
        "VFIO ports need an IOMMU with interrupt remapping; AF_XDP ports do not";
    "af-xdp", "AF_XDP", network::af_xdp:
        "AF_XDP ports need kernel support, and a driver with zero-copy to be fast";
    "driver-bugs", "known driver bugs", network::driver_bugs:
        "some drivers are known to corrupt memory or crash with AF_XDP in zero-copy mode";
    "task-isolation", "task isolation", machine::task_isolation:
        "a kernel with task isolation enforces strict mode for every kernel entry; without it interrupts are only observed";
    "syscall-dispatch", "syscall user dispatch", machine::syscall_dispatch:
        "without it, and without task isolation, nothing stops a worker's system calls: isolation is advisory";
    "perf", "perf permissions", machine::perf:
        "page faults of a worker are caught by a performance event that it opens for itself";
    "tracefs", "tracefs", machine::tracefs:
        "the sender of an IPI can be named only where the kernel's tracepoints can be read";
}
