//! Strict isolation under the backend that this machine has (`dispatch` on a stock kernel,
//! `task-isolation` on a patched one; `ISOPLANE_TEST_BACKEND` chooses), by behaviour and with every fault that can be made:
//! each case is a process of its own, since signal handlers, locked memory and forks are matters of a
//! whole process. Counts and causes are asserted, never times.

#[cfg(target_arch = "x86_64")]
#[path = "../common/mod.rs"]
mod common;
#[cfg(target_arch = "x86_64")]
mod cycles;
#[cfg(target_arch = "x86_64")]
mod faults;
#[cfg(target_arch = "x86_64")]
mod handlers;
#[cfg(target_arch = "x86_64")]
mod lab;
#[cfg(target_arch = "x86_64")]
mod modes;
#[cfg(target_arch = "x86_64")]
mod outside;
#[cfg(target_arch = "x86_64")]
mod policies;
#[cfg(target_arch = "x86_64")]
mod preparing;
#[cfg(target_arch = "x86_64")]
mod syscalls;

#[cfg(target_arch = "x86_64")]
fn main() -> std::process::ExitCode {
    if common::is_inside() {
        lab::start();
    }
    let all = [
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
    eprintln!("skipped: the backend dispatch is for x86-64");
}
