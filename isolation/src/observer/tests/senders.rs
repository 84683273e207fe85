//! Senders of IPIs on the running kernel: process and function are named, and nothing is left behind.

use super::machine::{Process, Spinner, cpus, interrupts, pin, unmap};
use super::*;
use nix::unistd::{Pid, getpid, gettid};
use std::time::Duration;

/// The tracer of a CPU; `None`, said aloud, where there cannot be one.
fn senders(cpu: u32) -> Option<Senders> {
    match Senders::open(&[cpu]) {
        Ok(senders) => Some(senders),
        Err(error) if nix::unistd::geteuid().is_root() => panic!("{error}"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Does something again and again until it has been seen. Others run on the machine, too, so the CPU is
/// not always ours when we do it.
fn until(mut seen: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !seen() {
        if Instant::now() > deadline {
            return false;
        }
    }
    true
}

#[test]
fn a_sibling_that_unmaps_is_named() {
    let Some((cpu, other)) = cpus() else { return };
    let Some(mut senders) = senders(cpu) else { return };
    // Threads that we make begin here, and are named here.
    pin(Pid::from_raw(0), other);
    let _spinner = Spinner::on(cpu);
    let names = senders.names_functions();
    let before = interrupts("TLB", cpu);
    let mut tally = SenderTally::default();
    let found = until(|| {
        unmap("unmapper", other);
        tally.add(&senders.drain());
        tally.top(usize::MAX).iter().any(|sender| {
            sender.comm == "unmapper" && (!names || sender.function.as_deref() == Some("flush_tlb_func"))
        })
    });
    if !found && interrupts("TLB", cpu) == before {
        eprintln!(
            "not here: this machine flushes another CPU's TLB without an interrupt (hypervisor, INVLPGB)"
        );
        return;
    }
    let all = tally.top(usize::MAX);
    assert!(found, "{all:?}");
    for sender in all.iter().filter(|sender| sender.comm == "unmapper") {
        assert_eq!((sender.to, sender.from, sender.pid), (cpu, other, getpid().as_raw() as u32));
        if sender.function.as_deref() == Some("flush_tlb_func") {
            assert_eq!(sender.asked, Asked::FunctionCall);
            assert!(sender.callsite.contains('+') && !sender.in_interrupt, "{sender:?}");
        }
    }
    if !names {
        eprintln!("not here: kernel addresses are hidden, so no function has a name");
    }
}

#[test]
fn a_membarrier_is_named() {
    let Some((cpu, other)) = cpus() else { return };
    let Some(mut senders) = senders(cpu) else { return };
    pin(Pid::from_raw(0), other);
    let _spinner = Spinner::on(cpu);
    let names = senders.names_functions();
    let mut tally = SenderTally::default();
    let found = until(|| {
        let barriers = std::thread::Builder::new().name("barrier".to_owned()).spawn(|| {
            for _ in 0..50 {
                membarrier();
            }
        });
        barriers.unwrap().join().unwrap();
        tally.add(&senders.drain());
        tally.top(usize::MAX).iter().any(|sender| {
            sender.comm == "barrier" && (!names || sender.function.as_deref() == Some("ipi_mb"))
        })
    });
    assert!(found, "{:?}", tally.top(usize::MAX));
}

/// Interrupts each CPU that runs a thread of this process.
#[allow(unsafe_code, reason = "membarrier has no wrapper")]
fn membarrier() {
    for command in [libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED] {
        // SAFETY: numbers only.
        assert_eq!(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }, 0);
    }
}

/// The claim that the observer leaves the worker's CPU alone, by the kernel's own word.
#[test]
fn sampling_sends_nothing_to_the_workers_cpu() {
    let Some((cpu, other)) = cpus() else { return };
    let Some(mut senders) = senders(cpu) else { return };
    let process = Process::on(cpu);
    let worker = watched("w");
    arm(&worker.status, process.id(), cpu);
    pin(Pid::from_raw(0), other);
    let mut observer = Observer::new(vec![worker]);
    observer.sample();
    let me = gettid().as_raw() as u32;
    // Tests beside this one send so many that the ring overflows now and then; such a round proves nothing.
    let whole = until(|| {
        let lost = senders.lost();
        senders.drain();
        for _ in 0..30 {
            for _ in 0..10 {
                assert_eq!(observer.sample().len(), 1);
            }
            let sent = senders.drain();
            let sent: Vec<_> =
                sent.iter().filter(|sender| sender.tid == me && !sender.in_interrupt).collect();
            assert!(sent.is_empty(), "{sent:?}");
        }
        senders.lost() == lost
    });
    assert!(whole, "every round lost some of what it was to judge by");
}

#[test]
fn findings_say_who_sent() {
    let Some((cpu, other)) = cpus() else { return };
    let Some(senders) = senders(cpu) else { return };
    pin(Pid::from_raw(0), other);
    let spinner = Spinner::on(cpu);
    let worker = watched("w");
    arm(&worker.status, spinner.id(), cpu);
    // Before the baseline: not attributed.
    unmap("early", other);
    let mut observer = Observer::new(vec![worker]).with_senders(senders);
    assert!(observer.sample().is_empty());
    let before = interrupts("TLB", cpu);
    let found = until(|| {
        unmap("late", other);
        let finding = observer.sample().remove(0);
        assert!(finding.senders.iter().all(|sender| sender.comm != "early" && sender.to == cpu));
        finding.senders.iter().any(|sender| sender.comm == "late")
    });
    if !found && interrupts("TLB", cpu) == before {
        eprintln!(
            "not here: this machine flushes another CPU's TLB without an interrupt (hypervisor, INVLPGB)"
        );
        return;
    }
    assert!(found);
    let all = observer.top_senders("w", 3);
    assert!(!all.is_empty() && all.len() <= 3 && all[0].count >= all[all.len() - 1].count, "{all:?}");
    assert!(observer.top_senders("nobody", 3).is_empty());
}

#[test]
fn all_cpus_watched_leaves_none_to_record_on() {
    let all: Vec<u32> = (0..8192).collect();
    assert_eq!(Senders::open(&all).unwrap_err(), SendersUnavailable::NoHousekeeping);
}

#[test]
fn a_tally_is_bounded_and_counts_the_rest() {
    let sender = |tid: u32, count: u64| Sender {
        to: 1,
        from: 0,
        pid: 1,
        tid,
        comm: String::new(),
        asked: Asked::Reschedule,
        function: None,
        callsite: "somewhere".to_owned(),
        in_interrupt: true,
        count,
        last: 0,
    };
    let mut tally = SenderTally::default();
    tally.add(&(0..3000).map(|tid| sender(tid, 1)).collect::<Vec<_>>());
    tally.add(&[sender(5, 10)]);
    assert_eq!(tally.others(), 3000 - 1024);
    let top = tally.top(2);
    assert_eq!((top.len(), top[0].tid, top[0].count), (2, 5, 11));
    assert_eq!(
        top[0].to_string(),
        "11 x reschedule of CPU 1 by (ended) (process 1, thread 5, in an interrupt) at somewhere"
    );
}

#[test]
fn more_than_fits_between_two_drains_is_a_loss_that_is_counted() {
    let Some((cpu, other)) = cpus() else { return };
    let Some(mut senders) = senders(cpu) else { return };
    let _spinner = Spinner::on(cpu);
    let deadline = Instant::now() + Duration::from_secs(30);
    let before = interrupts("TLB", cpu);
    // A ring has 128 KiB, and no record of a tracepoint is below 64 bytes.
    while interrupts("TLB", cpu) - before < 2 * (128 << 10) / 64 {
        unmap("flood", other);
        if Instant::now() > deadline || interrupts("TLB", cpu) == before {
            eprintln!("not here: this machine sends too few TLB interrupts to fill a ring");
            return;
        }
    }
    // The kernel says how many it lost when it writes the next record.
    let first: u64 = senders.drain().iter().map(|sender| sender.count).sum();
    unmap("flood", other);
    senders.drain();
    assert!(first > 0 && senders.lost() > 0, "{first} {}", senders.lost());
    // The ring was given back, again and again: what comes now is recorded.
    assert!(until(|| {
        unmap("later", other);
        senders.drain().iter().any(|sender| sender.comm == "later")
    }));
}
