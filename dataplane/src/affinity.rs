//! Which CPU a worker runs on, and what its process does before its first turn.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::unistd::Pid;

/// Numbers of the CPUs that this thread may run on.
pub(crate) fn allowed() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return Vec::new() };
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// Pins the calling thread.
pub(crate) fn pin(cpus: &[usize]) -> nix::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// Pins a worker process and locks what it inherited, which also breaks copy-on-write of everything
/// the program may write later: no page fault is left from the fork.
pub(crate) fn prepare_process(worker: &str, cpu: Option<usize>) {
    if let Some(cpu) = cpu
        && let Err(error) = pin(&[cpu])
    {
        tracing::warn!(worker, cpu, "cannot pin the worker: {error}");
    }
    if let Err(error) = mlockall(MlockAllFlags::MCL_CURRENT) {
        tracing::warn!(worker, "cannot lock the worker's memory ({error}): pages may fault under it");
    }
}
