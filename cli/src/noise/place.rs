//! Where the measurement runs, and where everything else does.
//!
//! Contract: whether a CPU is there and ours is what isolation says about it; a CPU is refused before
//! anything was moved.

use isoplane_isolation::Cpu;
use isoplane_isolation::prepare::cpu::{self, CpuError, CpuList};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Why a CPU cannot be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// It is not there, not online, not ours.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// Nothing is left for everybody else.
    #[error(
        "{0} is the only one that this process may use; a spinning thread there would leave none for the \
         load and for whoever watches it"
    )]
    Only(Cpu),
    /// The kernel's answer.
    #[error("cannot move to {cpus}: sched_setaffinity: {errno}")]
    Move { cpus: CpuList, errno: Errno },
}

/// Moves the calling thread, and whoever it starts from now on, off the CPU that will be measured, and
/// returns where to.
pub(crate) fn make_room(cpu: Cpu) -> Result<CpuList, PlaceError> {
    cpu::check(cpu)?;
    let others: CpuList = cpu::allowed().iter().filter(|other| *other != cpu).collect();
    if others.is_empty() {
        return Err(PlaceError::Only(cpu));
    }
    be_on(&others)?;
    Ok(others)
}

/// Puts the calling thread on one CPU: for a child of a thread that has made room there, to which the
/// CPU is nobody's any more.
pub(crate) fn go_to(cpu: Cpu) -> Result<(), PlaceError> {
    be_on(&[cpu].into_iter().collect())
}

fn be_on(cpus: &CpuList) -> Result<(), PlaceError> {
    let mut set = CpuSet::new();
    let failed = |errno| PlaceError::Move { cpus: cpus.clone(), errno };
    for cpu in cpus.iter() {
        set.set(cpu.0).map_err(failed)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).map_err(failed)
}
