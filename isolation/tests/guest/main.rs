//! What only the backend `task-isolation` can tell, on a kernel with the task-isolation patches: every
//! disturbance from outside is a breach with its cause. Elsewhere each case says `not here` and is done.
//!
//! Each case is a process of its own, isolated on a `nohz_full` CPU; what disturbs it runs on housekeeping
//! CPUs. Counts and causes are asserted, never times.

#[cfg(target_arch = "x86_64")]
mod arming;
#[cfg(target_arch = "x86_64")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(target_arch = "x86_64")]
mod disturbances;
#[cfg(target_arch = "x86_64")]
mod helper;
#[cfg(target_arch = "x86_64")]
#[path = "../strict/lab.rs"]
#[allow(dead_code, reason = "the lab of the strict cases; a part of it serves here")]
mod lab;
#[cfg(target_arch = "x86_64")]
mod modes;

#[cfg(target_arch = "x86_64")]
fn main() -> std::process::ExitCode {
    if common::is_inside() {
        helper::start();
    }
    common::main(&[arming::CASES, disturbances::CASES, modes::CASES].concat())
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    eprintln!("not here: task isolation is for x86-64");
}
