//! A thread that is really isolated, and what an observer attributes to it from arming to disarming.
//! The thread isolates itself in this process, so that a sibling can disturb it.

use isoplane_isolation::observer::{Finding, Observer, Watched};
use isoplane_isolation::{Cause, Cpu, Isolation, State, Status};
use isoplane_memory::{Region, RegionConfig};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const VISIT: u32 = 1;
const DISARM: u32 = 2;
const END: u32 = 3;

/// What is found until `enough`, within 30 s.
fn look(observer: &mut Observer, mut enough: impl FnMut(&[Finding]) -> bool) -> Vec<Finding> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut all = Vec::new();
    while !enough(&all) {
        assert!(Instant::now() < deadline, "{all:?}");
        std::thread::sleep(Duration::from_millis(2));
        all.append(&mut observer.sample());
    }
    all
}

fn total(findings: &[Finding], cause: Cause) -> u64 {
    findings.iter().map(|finding| finding.interruptions.of(cause)).sum()
}

#[test]
fn an_isolated_thread_is_observed_from_arming_to_disarming() {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut cpus = (0..CpuSet::count()).rev().filter(|cpu| set.is_set(*cpu).unwrap());
    let Some((cpu, other)) = cpus.next().zip(cpus.next()) else {
        eprintln!("skipped: one CPU is not enough to isolate a thread and observe it from another CPU");
        return;
    };
    let status = Status::create("observed").unwrap();
    let order = Arc::new(AtomicU32::new(0));
    let (theirs, orders) = (status.clone(), Arc::clone(&order));
    let worker = std::thread::spawn(move || {
        let mut prepared = Isolation::on(Cpu(cpu)).status(theirs).prepare().unwrap();
        let mut strict = prepared.arm().unwrap();
        let mut taken = 0;
        while orders.load(Ordering::Relaxed) < DISARM {
            if orders.load(Ordering::Relaxed) == VISIT && taken == 0 {
                taken = 1;
                strict.slow_path(|_| std::thread::sleep(Duration::from_millis(20))).unwrap();
            }
            std::hint::spin_loop();
            strict.turn().unwrap();
        }
        strict.disarm();
        while orders.load(Ordering::Relaxed) != END {
            std::thread::sleep(Duration::from_millis(1));
        }
    });

    let mut here = CpuSet::new();
    here.set(other).unwrap();
    sched_setaffinity(Pid::from_raw(0), &here).unwrap();
    let mut observer = Observer::new(vec![Watched { name: "observed".to_owned(), status: status.clone() }]);
    let first = look(&mut observer, |findings| !findings.is_empty());
    assert_eq!((first[0].cpu, first[0].thread.0), (Some(cpu as u32), std::process::id()));

    // A sibling maps, touches and unmaps.
    let config = RegionConfig::new("isoplane.test.sibling", 4096);
    let disturbed = look(&mut observer, |findings| {
        drop(Region::create(&config).unwrap());
        total(findings, Cause::FunctionCall) + total(findings, Cause::TlbShootdown) != 0
            || findings.len() > 1000
    });
    if disturbed.len() > 1000 {
        eprintln!("skipped in part: this machine flushes another CPU's TLB without an interrupt");
    }

    // It sleeps in the slow path, by permission.
    order.store(VISIT, Ordering::Relaxed);
    let visits = || status.snapshot().slow_path_visits;
    let visit = look(&mut observer, |_| visits() != 0 && status.state() == State::Armed);
    let after = observer.sample();
    for finding in first.iter().chain(&disturbed).chain(&visit).chain(&after) {
        for cause in [Cause::Stop, Cause::Ptrace, Cause::AffinityChange, Cause::Migration] {
            assert_eq!(finding.interruptions.of(cause), 0, "{cause}: {finding:?}");
        }
        assert!(finding.events.is_empty(), "{finding:?}");
    }

    // It goes on without isolation, and sleeps as it likes.
    order.store(DISARM, Ordering::Relaxed);
    while status.state() != State::Off {
        std::thread::yield_now();
    }
    let before = status.snapshot().interruptions;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(2));
        assert!(observer.sample().is_empty());
    }
    assert_eq!(status.snapshot().interruptions, before);
    order.store(END, Ordering::Relaxed);
    worker.join().unwrap();
    assert!(observer.missing().is_empty(), "{:?}", observer.missing());
}
