//! Scheduling policies, read back from the kernel.

use crate::common::root;
use isoplane_isolation::prepare::Weakness;
use isoplane_isolation::prepare::cpu::{self, Facts, Isolated};
use isoplane_isolation::prepare::scheduling::{AUTO_PRIORITY, Scheduling, apply, fair_server};
use nix::errno::Errno;

/// Policy and real-time priority of this thread, from `/proc/self/stat`.
fn policy() -> (u32, u32) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[41 - 3].parse().unwrap(), fields[40 - 3].parse().unwrap())
}

const OTHER: u32 = libc::SCHED_OTHER as u32;
const FIFO: u32 = libc::SCHED_FIFO as u32;

/// What the kernel would say of a CPU of ours, isolated or not.
fn facts(isolated: Option<Isolated>) -> Facts {
    let mut facts = Facts::of(cpu::allowed().iter().next().unwrap());
    facts.isolated = isolated;
    facts
}

pub(crate) fn auto_leaves_a_shared_cpu_alone() {
    let shared = facts(None);
    let scheduled = apply(Scheduling::Auto, &shared);
    assert_eq!(policy(), (OTHER, 0));
    assert!(!scheduled.real_time && scheduled.former.is_none());
    assert_eq!(scheduled.weaknesses, [Weakness::SharedCpu(shared.cpu)]);
}

pub(crate) fn auto_takes_an_isolated_cpu() {
    if !root("real-time scheduling") {
        return;
    }
    let isolated = facts(Some(Isolated::Boot));
    let scheduled = apply(Scheduling::Auto, &isolated);
    assert_eq!(policy(), (FIFO, u32::from(AUTO_PRIORITY)));
    assert!(scheduled.real_time);
    // What the machine does to real-time threads is its own; nothing else may be amiss.
    assert!(scheduled.weaknesses.iter().all(|w| matches!(w, Weakness::RtThrottling { .. })));
    // Nor is a real-time thread the fair server's.
    assert_eq!(fair_server(&isolated), Ok(()));
}

pub(crate) fn keep_keeps() {
    let scheduled = apply(Scheduling::Keep, &facts(Some(Isolated::Partition)));
    assert_eq!(policy(), (OTHER, 0));
    assert!(scheduled.former.is_none() && scheduled.weaknesses.is_empty());
}

pub(crate) fn fifo_on_a_shared_cpu_says_what_it_does() {
    if !root("real-time scheduling") {
        return;
    }
    let shared = facts(None);
    let scheduled = apply(Scheduling::Fifo(7), &shared);
    assert_eq!(policy(), (FIFO, 7));
    assert!(scheduled.weaknesses.contains(&Weakness::Starvation(shared.cpu)), "{:?}", scheduled.weaknesses);
}

pub(crate) fn a_refused_priority_changes_nothing() {
    let scheduled = apply(Scheduling::Fifo(100), &facts(Some(Isolated::Boot)));
    assert_eq!(policy(), (OTHER, 0));
    assert!(!scheduled.real_time && scheduled.former.is_none());
    let refused = Weakness::RealTimeRefused { priority: 100, errno: Errno::EINVAL };
    assert_eq!(scheduled.weaknesses, std::slice::from_ref(&refused));
    assert!(refused.to_string().contains("1 to 99"), "{refused}");
}

pub(crate) fn the_former_policy_comes_back() {
    if !root("real-time scheduling") {
        return;
    }
    // SAFETY: nice(2) takes a number.
    assert_eq!(unsafe { libc::nice(5) }, 5);
    let scheduled = apply(Scheduling::Fifo(3), &facts(None));
    assert_eq!(policy(), (FIFO, 3));
    scheduled.former.unwrap().restore().unwrap();
    assert_eq!(policy(), (OTHER, 0));
    // SAFETY: as above.
    assert_eq!(unsafe { libc::nice(0) }, 5);
}
