//! Who else may have the CPU: real-time scheduling, the deadline server, throttling.
//!
//! Contract: the policy is the calling thread's alone and can be given back. What belongs to the whole
//! machine (the fair server, throttling) is read, never changed.
//! Sources: sched(7); Linux `kernel/sched/{deadline,rt,debug}.c`.
#![allow(unsafe_code, reason = "sched_setattr, sched_getattr and sched_setscheduler; see each block")]

use super::Weakness;
use super::cpu::{Cpu, Facts};
use nix::errno::Errno;
use nix::unistd::gettid;

/// The priority that [`Scheduling::Auto`] takes: above every ordinary thread, below every real-time one.
pub const AUTO_PRIORITY: u8 = 1;

/// How the thread is to be scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scheduling {
    /// `SCHED_FIFO` with [`AUTO_PRIORITY`] on a CPU that is isolated from the scheduler, what it has now
    /// on any other: a spinning real-time thread would starve whatever else was put there.
    #[default]
    Auto,
    /// What it has now.
    Keep,
    /// `SCHED_FIFO` with this priority, 1 to 99, wherever it runs.
    Fifo(u8),
}

/// The policy that a thread had before.
#[derive(Debug, Clone, Copy)]
pub struct Former {
    thread: libc::pid_t,
    attributes: libc::sched_attr,
}

impl Former {
    /// Gives the thread its former policy, priority and niceness back, from any thread of the process.
    ///
    /// # Errors
    /// What sched_setattr(2) answers: `ESRCH` when the thread is gone, `EPERM` when the former policy
    /// needs privileges that were dropped since.
    pub fn restore(&self) -> Result<(), Errno> {
        let mut attributes = self.attributes;
        // Restoring is no request about utilisation clamps, which reading reports whether set or not.
        attributes.sched_flags &= libc::SCHED_FLAG_RESET_ON_FORK as u64;
        // SAFETY: the attributes are a local of the size that they state; the kernel reads them only.
        let r = unsafe { libc::syscall(libc::SYS_sched_setattr, self.thread, &raw const attributes, 0) };
        Errno::result(r).map(drop)
    }
}

/// What became of a wish.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Scheduled {
    /// The thread is real-time now: `SCHED_FIFO`, `SCHED_RR` or `SCHED_DEADLINE`.
    pub real_time: bool,
    /// To give the former policy back; `None` when it was not changed.
    pub former: Option<Former>,
    /// What could not be had, and what the choice costs.
    pub weaknesses: Vec<Weakness>,
}

/// Gives the calling thread its scheduling for a CPU.
#[must_use]
pub fn apply(how: Scheduling, facts: &Facts) -> Scheduled {
    let mut weaknesses = Vec::new();
    let isolated = facts.isolated.is_some();
    let priority = match how {
        Scheduling::Auto if isolated => Some(AUTO_PRIORITY),
        Scheduling::Auto | Scheduling::Keep => None,
        Scheduling::Fifo(priority) => Some(priority),
    };
    let mut former = None;
    if let Some(priority) = priority {
        match fifo(priority) {
            Ok(before) => former = Some(before),
            Err(errno) => weaknesses.push(Weakness::RealTimeRefused { priority, errno }),
        }
    }
    let real_time = is_real_time();
    if !isolated {
        weaknesses.push(if real_time {
            Weakness::Starvation(facts.cpu)
        } else {
            Weakness::SharedCpu(facts.cpu)
        });
    }
    if real_time && let Err(throttled) = throttling() {
        weaknesses.push(throttled);
    }
    Scheduled { real_time, former, weaknesses }
}

fn fifo(priority: u8) -> Result<Former, Errno> {
    let thread = gettid().as_raw();
    let attributes = attributes()?;
    let parameter = libc::sched_param { sched_priority: i32::from(priority) };
    // SAFETY: the parameter is a local that the kernel only reads.
    let r = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameter) };
    Errno::result(r).map(|_| Former { thread, attributes })
}

fn attributes() -> Result<libc::sched_attr, Errno> {
    // SAFETY: it is a struct of numbers, for which zero is valid.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the kernel writes at most the stated size to a local that has it.
    let r = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    Errno::result(r).map(|_| attributes)
}

fn is_real_time() -> bool {
    attributes().is_ok_and(|now| {
        [libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE].contains(&(now.sched_policy as i32))
    })
}

/// Says whether the deadline server for ordinary threads (Linux 6.12) would interrupt a thread of
/// ordinary policy on this CPU. It does about once a second, also when nobody else wants the CPU.
/// Real-time threads are not served and not interrupted by it while nobody else wants the CPU; where the
/// tick stays on anyway, an interrupt a second more is nothing to say.
///
/// # Errors
/// [`Weakness::FairServer`] when it is armed, or debugfs does not let us see.
pub fn fair_server(facts: &Facts) -> Result<(), Weakness> {
    if !facts.nohz_full || is_real_time() || !has_fair_server() {
        return Ok(());
    }
    match fair_server_runtime(facts.cpu) {
        Some(0) => Ok(()),
        runtime_ns => Err(Weakness::FairServer { cpu: facts.cpu, runtime_ns }),
    }
}

/// The fair server's run time a period in nanoseconds, 0 when it is disarmed; `None` where it does not
/// exist or may not be seen (it is in debugfs, which is root's).
#[must_use]
pub fn fair_server_runtime(cpu: Cpu) -> Option<u64> {
    let path = format!("/sys/kernel/debug/sched/fair_server/cpu{}/runtime", cpu.0);
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Whether this kernel has fair servers. They also replaced the throttling of real-time threads.
fn has_fair_server() -> bool {
    nix::sys::utsname::uname().is_ok_and(|name| at_least(&name.release().to_string_lossy(), (6, 12)))
}

/// Whether a kernel's release, such as `6.12.0-rc1`, is at least a version.
fn at_least(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= version
}

/// Says whether the kernel stops real-time threads for a part of each period, as kernels before the fair
/// server do.
fn throttling() -> Result<(), Weakness> {
    let read = |name: &str| -> Option<i64> {
        std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?.trim().parse().ok()
    };
    let (Some(runtime_us), Some(period_us)) = (read("sched_rt_runtime_us"), read("sched_rt_period_us"))
    else {
        return Ok(());
    };
    if has_fair_server() || runtime_us < 0 || runtime_us >= period_us {
        return Ok(());
    }
    Err(Weakness::RtThrottling { runtime_us, period_us })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_by_number() {
        for (release, newer) in [
            ("6.12.117", true),
            ("6.9.1", false),
            ("6.12-rc1", true),
            ("10.0", true),
            ("5.13.0-x", false),
            ("", false),
        ] {
            assert_eq!(at_least(release, (6, 12)), newer, "{release}");
        }
    }
}
