//! CPUs that are there, ours, and taken; and those that are not.

use crate::common::{in_child, status};
use isoplane_isolation::prepare::Weakness;
use isoplane_isolation::prepare::cpu::{self, Cpu, CpuError, CpuList};
use std::time::{Duration, Instant};

pub(crate) fn pinning_is_seen_by_the_kernel_and_undone() {
    let before = status("Cpus_allowed_list");
    assert_eq!(cpu::allowed().to_string(), before);
    for cpu in cpu::allowed().iter() {
        let (facts, former) = cpu::pin(cpu).unwrap();
        assert_eq!(facts.cpu, cpu);
        assert_eq!(status("Cpus_allowed_list"), cpu.0.to_string());
        assert_eq!(nix::sched::sched_getcpu().unwrap(), cpu.0);
        former.restore().unwrap();
        assert_eq!(status("Cpus_allowed_list"), before);
    }
}

pub(crate) fn a_cpu_that_is_not_there() {
    let before = status("Cpus_allowed_list");
    let error = cpu::pin(Cpu(9999)).unwrap_err();
    assert_eq!(error, CpuError::NoSuchCpu { cpu: Cpu(9999), present: cpu::present().unwrap() });
    assert!(error.to_string().contains("no CPU 9999"), "{error}");
    assert_eq!(status("Cpus_allowed_list"), before);
}

pub(crate) fn a_cpu_that_is_not_ours() {
    let all: Vec<Cpu> = cpu::allowed().iter().collect();
    let [one, other, ..] = all[..] else {
        eprintln!("skipped: needs two CPUs");
        return;
    };
    let (_, former) = cpu::pin(one).unwrap();
    // A CPU that was isolated on purpose may be asked for from outside.
    let facts = cpu::Facts::of(other);
    if facts.isolated.is_none() && !facts.nohz_full {
        let error = cpu::pin(other).unwrap_err();
        let allowed: CpuList = [one].into_iter().collect();
        assert_eq!(error, CpuError::NotOurs { cpu: other, allowed });
        assert!(error.to_string().contains("taskset"), "{error}");
        assert_eq!(status("Cpus_allowed_list"), one.0.to_string());
    }
    former.restore().unwrap();
    assert!(cpu::check(other).is_ok());
}

/// A child that spins on a CPU while `body` runs.
fn beside_a_spinner(cpu: Cpu, body: impl FnOnce(u32)) {
    // SAFETY: this process has one thread.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let _ = isoplane_isolation::prepare::privileges::die_with_parent(std::process::id());
            let _ = cpu::pin(cpu);
            let end = Instant::now() + Duration::from_secs(30);
            while Instant::now() < end {
                std::hint::spin_loop();
            }
            // SAFETY: it ends the process and returns to nobody.
            unsafe { libc::_exit(0) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let result =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(child.as_raw() as u32)));
            nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
            result.unwrap();
        }
    }
}

pub(crate) fn who_else_wants_to_run_is_named() {
    let on = cpu::allowed().iter().next().unwrap();
    beside_a_spinner(on, |spinner| {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            // It may take the child a moment to get there; afterwards it is runnable for good.
            if let Err(weakness) = cpu::alone(on) {
                let Weakness::OthersRunnable { cpu, threads } = &weakness else { panic!("{weakness}") };
                assert_eq!(*cpu, on);
                if let Some(found) = threads.iter().find(|thread| thread.process == spinner) {
                    assert_eq!(found.thread, spinner);
                    assert!(weakness.to_string().contains("want to run on CPU"), "{weakness}");
                    return;
                }
            }
            assert!(Instant::now() < end, "the spinner was never seen");
        }
    });
    // Not itself, though it runs there.
    assert_eq!(
        in_child(|| {
            cpu::pin(on).unwrap();
            if let Err(Weakness::OthersRunnable { threads, .. }) = cpu::alone(on) {
                assert!(threads.iter().all(|thread| thread.thread != std::process::id()));
            }
        }),
        0
    );
}
