//! Which CPU does what.

use isoplane::Idle;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// A share-out of the CPUs that we may use: the worker alone on the last one, a kicker on the one
/// before it where enough are left for everybody else, and the kernel's traffic on the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cpus {
    /// The worker's; `None` when there is only one for everybody.
    pub(crate) worker: Option<usize>,
    /// The kicker's own; `None`: it shares those of everybody else.
    pub(crate) kicker: Option<usize>,
    /// Everybody else's.
    pub(crate) others: Vec<usize>,
}

impl Cpus {
    /// Shares the allowed CPUs out.
    pub(crate) fn share_out() -> Self {
        Self::of(&allowed())
    }

    fn of(allowed: &[usize]) -> Self {
        match allowed {
            [others @ .., kicker, worker] if others.len() >= 2 => {
                Self { worker: Some(*worker), kicker: Some(*kicker), others: others.to_vec() }
            }
            [others @ .., worker] if !others.is_empty() => {
                Self { worker: Some(*worker), kicker: None, others: others.to_vec() }
            }
            _ => Self { worker: None, kicker: None, others: allowed.to_vec() },
        }
    }

    /// A worker that shares its CPU gives it away when it has nothing to do.
    pub(crate) const fn idle(&self) -> Idle {
        if self.worker.is_some() { Idle::Spin } else { Idle::Yield }
    }

    /// Without a CPU for a kicker: everybody else gets it.
    pub(crate) fn without_kicker(mut self) -> Self {
        self.others.extend(self.kicker.take());
        self
    }

    /// Keeps the calling thread, and those that it starts, off the worker's and the kicker's CPUs.
    pub(crate) fn stay_off(&self) {
        let mut set = CpuSet::new();
        for cpu in &self.others {
            // CPUs come from a set of the same size.
            let _ = set.set(*cpu);
        }
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &set) {
            tracing::warn!("cannot keep the traffic off the worker's CPU: {error}");
        }
    }
}

fn allowed() -> Vec<usize> {
    match sched_getaffinity(Pid::from_raw(0)) {
        Ok(set) => (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect(),
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_cpus_is_shared_out() {
        let of = |n: usize| Cpus::of(&(0..n).collect::<Vec<_>>());
        assert_eq!(of(1), Cpus { worker: None, kicker: None, others: vec![0] });
        assert_eq!(of(2), Cpus { worker: Some(1), kicker: None, others: vec![0] });
        assert_eq!(of(3), Cpus { worker: Some(2), kicker: None, others: vec![0, 1] });
        assert_eq!(of(4), Cpus { worker: Some(3), kicker: Some(2), others: vec![0, 1] });
        assert_eq!(of(1).idle(), Idle::Yield);
        assert_eq!(of(4).without_kicker(), Cpus { worker: Some(3), kicker: None, others: vec![0, 1, 2] });
    }
}
