//! Which CPU a worker runs on, and what its process does before its first turn.

use crate::worker::Placement;
use nix::errno::Errno;
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

/// Pins a worker that shall not be isolated; a process also locks what it inherited. Where the lock is granted, that also breaks
/// copy-on-write of everything the program may write later, and no page fault is left from the fork.
/// Where it is not, this says so, once for each start of a worker: it runs, and may fault.
pub(crate) fn prepare(worker: &str, cpu: Option<usize>, placement: Placement) {
    if let Some(cpu) = cpu
        && let Err(error) = pin(&[cpu])
    {
        tracing::warn!(worker, cpu, "cannot pin the worker: {error}");
    }
    if placement == Placement::Process
        && let Err(error) = mlockall(MlockAllFlags::MCL_CURRENT)
    {
        let why = why_unlocked(error);
        tracing::warn!(worker, "cannot lock the worker's memory: {why}; until then pages may fault under it");
    }
}

/// What mlockall(2) means by its answer.
fn why_unlocked(error: Errno) -> String {
    match error {
        // Over a limit, and a limit of zero.
        Errno::ENOMEM | Errno::EPERM => {
            "over the memlock limit; raise it (ulimit -l, LimitMEMLOCK=) or give \
                                         the program CAP_IPC_LOCK"
                .to_owned()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_told_from_other_reasons() {
        for limit in [Errno::ENOMEM, Errno::EPERM] {
            let why = why_unlocked(limit);
            for part in ["memlock limit", "ulimit -l", "LimitMEMLOCK=", "CAP_IPC_LOCK"] {
                assert!(why.contains(part), "{limit}: {why}");
            }
        }
        assert!(why_unlocked(Errno::EAGAIN).starts_with("EAGAIN"));
    }
}
