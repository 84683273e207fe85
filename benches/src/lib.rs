//! Side-by-side comparisons of isoplane with its peers: one file a comparison.
//!
//! | module | what it gives |
//! |---|---|
//! | [`comparison`] | what a comparison is, and the list of them |
//! | [`report`] | medians, ratios, spread; the table and the JSON |
//! | [`null`] | MAC swap between null ports, against testpmd |
//! | [`afxdp`], [`wire`], [`bpf`] | forwarding over veth, against testpmd; generator and sink for it |
//! | [`vfio`], [`counted`] | forwarding between two devices of the guest, against testpmd with `vfio-pci`; whether the TSC counts instructions |
//! | [`diag`] | one log event of a worker, against a formatter that writes a file |
//! | [`fib`], [`flap`] | longest-prefix match and changes of routes, against `dpdk-test-fib` |
//! | [`routes`] | routes with the shape of the Internet's tables |
//! | [`router`] | forwarding by a full table of routes, against a limit of nanoseconds a packet |
//! | [`testpmd`] | DPDK's testpmd as a child process |
//! | [`hugepages`] | huge pages for the time of a run, for both sides |
//!
//! Contract: both sides do the same work on the same CPU and pages, count the same thing, and run in
//! turn, each in a process of its own. Times are reported, never asserted by a test; a run whose comparison
//! has a target, and misses it, fails.
#![deny(missing_docs, unsafe_code)]

pub mod afxdp;
pub mod bpf;
pub mod comparison;
pub mod counted;
pub mod diag;
pub mod fib;
pub mod flap;
pub mod hugepages;
pub mod null;
pub mod report;
pub mod router;
pub mod routes;
pub mod testpmd;
pub mod vfio;
pub mod wire;

/// CPU of the forwarder, ours or the peer's.
pub const FORWARDER_CPU: usize = 1;
/// CPU of everything else: generators, control.
pub const OTHER_CPU: usize = 0;

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// The machine has no such CPU, or the thread may not use it.
pub fn pin(cpu: usize) -> Result<(), comparison::BenchError> {
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)).map_err(
        |error| {
            comparison::BenchError::Machine(format!("cannot run on CPU {cpu}: {error}; two CPUs are needed"))
        },
    )
}

/// May programs run here before all others? The longest measurement that is made so takes seconds.
#[must_use]
pub fn realtime() -> bool {
    static MAY: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *MAY.get_or_init(|| {
        let mut first = std::process::Command::new("chrt");
        first.args(["-f", "1", "true"]).stderr(std::process::Stdio::null());
        first.status().is_ok_and(|status| status.success())
    })
}

/// Puts this process before all others (SCHED_FIFO), so that none takes its CPU while it is measured by
/// time that passes. Without the right to do so it goes on as it is.
pub fn undisturbed() {
    if realtime() {
        let own = std::process::id().to_string();
        let _ = std::process::Command::new("chrt").args(["-f", "-p", "1", &own]).status();
    }
}

/// CPU time that all threads of a process have used, from `/proc/PID/task/*/schedstat`
/// (Documentation/scheduler/sched-stats.rst): on a machine that does other things too, the honest
/// measure of a forwarder that spins.
///
/// # Errors
/// The process is gone, or the kernel keeps no such numbers.
pub fn cpu_time(pid: u32) -> Result<std::time::Duration, comparison::BenchError> {
    let failed =
        |e: std::io::Error| comparison::BenchError::Machine(format!("CPU time of process {pid}: {e}"));
    let mut nanos = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).map_err(failed)? {
        let text = std::fs::read_to_string(task.map_err(failed)?.path().join("schedstat")).map_err(failed)?;
        nanos += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(std::time::Duration::from_nanos(nanos))
}
