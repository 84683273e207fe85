//! What only the backend `task-isolation` can tell, on a kernel with the task-isolation patches: every
//! disturbance from outside is a breach with its cause; and the strict cases of every backend once more, so
//! that one program holds all there is to test in the guest. Elsewhere each case says `not here` and is done.
//!
//! Each case is a process of its own, isolated on a `nohz_full` CPU; what disturbs it runs on housekeeping
//! CPUs. Counts and causes are asserted, never times.

#[cfg(target_arch = "x86_64")]
mod allowances;
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
#[path = "../strict"]
mod strict {
    pub(crate) mod cycles;
    pub(crate) mod faults;
    pub(crate) mod handlers;
    pub(crate) mod lab;
    pub(crate) mod modes;
    pub(crate) mod outside;
    pub(crate) mod policies;
    pub(crate) mod preparing;
    pub(crate) mod syscalls;
}
#[cfg(target_arch = "x86_64")]
use strict::lab;

#[cfg(target_arch = "x86_64")]
fn main() -> std::process::ExitCode {
    use strict::{cycles, faults, handlers, modes, outside, policies, preparing, syscalls};
    if common::is_inside() {
        helper::start();
    }
    let all = [
        arming::CASES,
        disturbances::CASES,
        allowances::CASES,
        preparing::CASES,
        syscalls::CASES,
        faults::CASES,
        handlers::CASES,
        modes::CASES,
        policies::CASES,
        outside::CASES,
        cycles::CASES,
    ];
    common::main(&all.concat())
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    eprintln!("not here: task isolation is for x86-64");
}
