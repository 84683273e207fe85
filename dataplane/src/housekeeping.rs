//! Threads of the program that serve the workers: starting one, and where it may run.
//!
//! Contract: a housekeeping thread stays off the CPUs that workers are pinned to, unless there are no
//! others; where it cannot be kept off them, that is said.

use crate::builder::LaunchError;
use nix::errno::Errno;
use std::thread::JoinHandle;

/// CPUs that we may use and no worker spins on.
pub(crate) fn elsewhere(spinning: &[usize]) -> Vec<usize> {
    crate::affinity::allowed().into_iter().filter(|cpu| !spinning.contains(cpu)).collect()
}

/// Keeps the calling thread on these CPUs, if there are any.
pub(crate) fn stay_on(cpus: &[usize], who: &str) {
    if !cpus.is_empty()
        && let Err(error) = crate::affinity::pin(cpus)
    {
        tracing::warn!("cannot keep the {who} on CPUs {cpus:?}: {error}");
    }
}

/// Starts a thread.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, LaunchError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map_err(|error| LaunchError::Os {
        call: "start a thread",
        source: Errno::from_raw(error.raw_os_error().unwrap_or(0)),
    })
}
