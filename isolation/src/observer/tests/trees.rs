//! Trees made for the test: what is attributed, to whom, and what never is.

use super::*;
use crate::cause::Cause;
use std::fs;
use std::time::Duration;
use tempfile::TempDir;

/// A tree of files like the kernel's, with two workers' worth of text.
struct Tree {
    root: TempDir,
}

struct ThreadText {
    state: char,
    minor: u64,
    processor: u32,
    tracer: u32,
    allowed: &'static str,
    voluntary: u64,
    involuntary: u64,
    delay: u64,
    moves: u64,
}

const QUIET: ThreadText = ThreadText {
    state: 'R',
    minor: 100,
    processor: 3,
    tracer: 0,
    allowed: "3",
    voluntary: 10,
    involuntary: 20,
    delay: 1000,
    moves: 2,
};

const HEADER: &str = "           CPU0       CPU3       CPU5       \n";

impl Tree {
    fn new() -> Self {
        let tree = Self { root: TempDir::new().unwrap() };
        tree.write("proc/interrupts", &format!("{HEADER}LOC: 1 1 1 Local timer interrupts\n"));
        tree.write("proc/softirqs", &format!("{HEADER} HI: 0 0 0\nTIMER: 5 5 5\n"));
        tree.steal(7);
        tree.write("sys/devices/system/cpu/online", "0,3,5\n");
        tree.thread(7, &QUIET);
        tree
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn interrupts(&self, rows: &str) {
        self.write("proc/interrupts", &format!("{HEADER}{rows}"));
    }

    fn steal(&self, ticks: u64) {
        let stat = format!("cpu  1 1 1 1 1 1 1 99 1 1\ncpu3 1 1 1 1 1 1 1 {ticks} 1 1\nintr 1\n");
        self.write("proc/stat", &stat);
    }

    fn thread(&self, pid: u32, text: &ThreadText) {
        let ThreadText { state, minor, processor, tracer, allowed, voluntary, involuntary, delay, moves } =
            text;
        let at = |name: &str| format!("proc/{pid}/task/{pid}/{name}");
        let zeros = "0 ".repeat(26);
        self.write(
            &at("stat"),
            &format!("{pid} (w) x) {state} 1 1 1 1 1 1 {minor} 0 0 {zeros}{processor} 0\n"),
        );
        self.write(
            &at("status"),
            &format!(
                "Name:\tw\nTracerPid:\t{tracer}\nCpus_allowed_list:\t{allowed}\n\
                 voluntary_ctxt_switches:\t{voluntary}\nnonvoluntary_ctxt_switches:\t{involuntary}\n"
            ),
        );
        self.write(&at("schedstat"), &format!("5 {delay} 9\n"));
        self.write(&at("sched"), &format!("w (7, #threads: 1)\n---\nse.nr_migrations   :   {moves}\n"));
    }

    fn observer(&self, watched: &[Watched]) -> Observer {
        Observer::with(watched.to_vec(), &ProcFs::at(self.root.path()))
    }

    /// A worker, armed on CPU 3 as process 7, and an observer that has its baseline.
    fn observed(&self) -> (Watched, Observer) {
        let worker = watched("w");
        arm(&worker.status, (7, 7), 3);
        let mut observer = self.observer(std::slice::from_ref(&worker));
        assert!(observer.sample().is_empty());
        (worker, observer)
    }
}

fn one(mut findings: Vec<Finding>) -> Finding {
    assert_eq!(findings.len(), 1, "{findings:?}");
    findings.remove(0)
}

fn counts(finding: &Finding) -> Vec<(Cause, u64)> {
    finding.interruptions.iter().filter(|(_, n)| *n != 0).collect()
}

#[test]
fn nothing_happened_is_quiet() {
    let tree = Tree::new();
    let (worker, mut observer) = tree.observed();
    let finding = one(observer.sample());
    assert!(finding.is_quiet(), "{finding:?}");
    assert_eq!((finding.worker.as_str(), finding.thread, finding.cpu), ("w", (7, 7), Some(3)));
    assert_eq!(worker.status.snapshot().samples, 2);
    assert!(observer.missing().is_empty());
}

#[test]
fn each_row_has_its_cause() {
    let tree = Tree::new();
    let rows = |n: [u64; 20]| {
        format!(
            " 36: 9 {} 9 PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0\nNMI: 9 {} 9 x\nLOC: 9 {} 9 x\n\
             SPU: 9 {} 9   Spurious interrupts\nPMI: 9 {} 9 x\nIWI: 9 {} 9 x\nRTR: 9 {} 9 x\nRES: 9 {} 9 x\n\
             CAL: 9 {} 9 x\nTLB: 9 {} 9 x\nTRM: 9 {} 9 x\nTHR: 9 {} 9 x\nDFR: 9 {} 9 x\nMCE: 9 {} 9 x\n\
             MCP: 9 {} 9 x\nHYP: 9 {} 9   Hypervisor callback interrupts\nERR: 5\nMIS: 5\nPIN: 9 {} 9 x\n\
             NPI: 9 {} 9 x\nPIW: 9 {} 9 x\nNEW: 9 {} 9   Invented interrupts\n",
            n[0],
            n[1],
            n[2],
            n[3],
            n[4],
            n[5],
            n[6],
            n[7],
            n[8],
            n[9],
            n[10],
            n[11],
            n[12],
            n[13],
            n[14],
            n[15],
            n[16],
            n[17],
            n[18],
            n[19],
        )
    };
    tree.interrupts(&rows([100; 20]));
    let (worker, mut observer) = tree.observed();
    // Every row grows by a number of its own; calls by 9, 10 of them flushes is what 20 and 11 make.
    tree.interrupts(&rows([
        101, 102, 103, 104, 105, 106, 107, 108, 120, 111, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121,
    ]));
    let finding = one(observer.sample());
    let wanted = [
        (Cause::DeviceInterrupt, 1),
        (Cause::TimerTick, 3),
        (Cause::Reschedule, 8),
        (Cause::FunctionCall, 9),
        (Cause::TlbShootdown, 11),
        (Cause::IrqWork, 6),
        (Cause::Nmi, 2),
        (Cause::MachineCheck, 13 + 14 + 15 + 16),
        (Cause::Thermal, 12),
        (Cause::Hypervisor, 17 + 18 + 19 + 20),
        (Cause::Unknown, 4 + 21),
    ];
    assert_eq!(counts(&finding), wanted);
    let said: Vec<String> = finding.lines.iter().map(ToString::to_string).collect();
    for line in [
        "device_interrupt 36 (virtio1-req.0): 1",
        "unknown SPU (Spurious interrupts): 4",
        "hypervisor HYP (Hypervisor callback interrupts): 17",
        "unknown NEW (Invented interrupts): 21",
    ] {
        assert!(said.iter().any(|one| one == line), "{line}: {said:?}");
    }
    assert_eq!(worker.status.snapshot().interruptions, finding.interruptions);
}

#[test]
fn soft_interrupts_are_named() {
    let tree = Tree::new();
    let (_worker, mut observer) = tree.observed();
    tree.write("proc/softirqs", &format!("{HEADER} HI: 0 1 0\nTIMER: 50 7 50\n"));
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::Softirq, 3)]);
    let said: Vec<String> = finding.lines.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["softirq HI: 1", "softirq TIMER: 2"]);
}

#[test]
fn counters_that_go_backwards_count_nothing_and_are_followed() {
    let tree = Tree::new();
    tree.interrupts("LOC: 0 100 0 x\n36: 0 50 0 chip  a\n");
    let (_worker, mut observer) = tree.observed();
    tree.interrupts("LOC: 0 90 0 x\n36: 0 0 0 chip  b\n");
    tree.thread(7, &ThreadText { minor: 5, voluntary: 1, involuntary: 1, delay: 1, moves: 1, ..QUIET });
    tree.steal(1);
    assert!(one(observer.sample()).is_quiet());
    tree.interrupts("LOC: 0 92 0 x\n36: 0 1 0 chip  b\n");
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::DeviceInterrupt, 1), (Cause::TimerTick, 2)]);
    assert_eq!(finding.lines[0].name, "b");
}

#[test]
fn more_flushes_than_calls_are_no_negative_calls() {
    let tree = Tree::new();
    tree.interrupts("CAL: 0 100 0 x\nTLB: 0 50 0 x\n");
    let (_worker, mut observer) = tree.observed();
    tree.interrupts("CAL: 0 101 0 x\nTLB: 0 53 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TlbShootdown, 3)]);
}

#[test]
fn rows_that_come_and_go_count_what_came() {
    let tree = Tree::new();
    tree.interrupts("36: 0 50 0 chip  a\nLOC: 0 100 0 x\n");
    let (_worker, mut observer) = tree.observed();
    // A new line's counts began when it came; one that has gone is followed when it is back.
    tree.interrupts("37: 0 4 0 chip  new\nLOC: 0 100 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::DeviceInterrupt, 4)]);
    tree.interrupts("36: 0 51 0 chip  a\n37: 0 4 0 chip  new\nLOC: 0 100 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::DeviceInterrupt, 1)]);
}

#[test]
fn columns_move_when_a_cpu_goes_offline() {
    let tree = Tree::new();
    tree.interrupts("LOC: 1000 100 2000 x\n");
    let (_worker, mut observer) = tree.observed();
    // CPU 0 goes: CPU 3 is the first column now.
    tree.write("proc/interrupts", "   CPU3  CPU5\nLOC: 101 2000 x\n");
    tree.write("sys/devices/system/cpu/online", "3,5\n");
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::TimerTick, 1), (Cause::Hotplug, 1)]);
    let change = Event::CpusOnline { from: "0,3,5".to_owned(), to: "3,5".to_owned() };
    assert_eq!(finding.events, [change]);
    // The worker's own goes: nothing is known, and nothing invented when it is back.
    tree.write("proc/interrupts", "   CPU5\nLOC: 2000 x\n");
    assert_eq!(counts(&one(observer.sample())), []);
    tree.write("proc/interrupts", "   CPU3  CPU5\nLOC: 104 2000 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 3)]);
}

#[test]
fn a_cpu_that_was_offline_at_the_baseline_starts_when_it_is_back() {
    let tree = Tree::new();
    tree.write("proc/interrupts", "   CPU0\nLOC: 1000 x\n");
    let (_worker, mut observer) = tree.observed();
    tree.interrupts("LOC: 1000 500 2000 x\n36: 0 7 0 chip  a\n");
    assert_eq!(counts(&one(observer.sample())), []);
    tree.interrupts("LOC: 1000 502 2000 x\n36: 0 7 0 chip  a\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 2)]);
}

#[test]
fn what_happened_while_disarmed_is_nobodys() {
    let tree = Tree::new();
    tree.interrupts("LOC: 0 100 0 x\n");
    let worker = watched("w");
    let mut observer = tree.observer(std::slice::from_ref(&worker));
    assert!(observer.sample().is_empty(), "never armed");
    arm(&worker.status, (7, 7), 3);
    tree.interrupts("LOC: 0 200 0 x\n");
    assert!(observer.sample().is_empty(), "the baseline");
    tree.interrupts("LOC: 0 201 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 1)]);
    set_state(&worker.status, State::Off);
    tree.interrupts("LOC: 0 300 0 x\n");
    assert!(observer.sample().is_empty(), "off");
    arm(&worker.status, (7, 7), 3);
    tree.interrupts("LOC: 0 400 0 x\n");
    assert!(observer.sample().is_empty(), "a baseline again");
    assert_eq!(worker.status.snapshot().interruptions.total(), 1);
}

#[test]
fn a_broken_worker_is_not_isolated_until_it_armed_again() {
    let tree = Tree::new();
    tree.interrupts("LOC: 0 100 0 x\n");
    let (worker, mut observer) = tree.observed();
    set_state(&worker.status, State::Broken);
    tree.interrupts("LOC: 0 101 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 1)], "it was isolated at first");
    tree.interrupts("LOC: 0 111 0 x\n");
    assert!(observer.sample().is_empty());
    arm(&worker.status, (7, 7), 3);
    tree.interrupts("LOC: 0 112 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 1)]);
}

#[test]
fn a_restarted_worker_gets_a_new_baseline() {
    let tree = Tree::new();
    tree.interrupts("LOC: 0 100 0 x\n");
    let (worker, mut observer) = tree.observed();
    tree.thread(
        8,
        &ThreadText { minor: 9000, voluntary: 500, involuntary: 500, processor: 5, allowed: "5", ..QUIET },
    );
    arm(&worker.status, (8, 8), 5);
    tree.interrupts("LOC: 0 200 700 x\n");
    assert!(observer.sample().is_empty());
    tree.interrupts("LOC: 0 300 701 x\n");
    let finding = one(observer.sample());
    assert_eq!((finding.thread, finding.cpu), ((8, 8), Some(5)));
    assert_eq!(counts(&finding), [(Cause::TimerTick, 1)]);
}

#[test]
fn what_happens_to_the_thread_has_its_cause() {
    let tree = Tree::new();
    let (_worker, mut observer) = tree.observed();
    tree.thread(7, &ThreadText { involuntary: 22, minor: 103, delay: 2500, ..QUIET });
    tree.steal(9);
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::Preemption, 2)]);
    assert_eq!(finding.page_faults, PageFaults { minor: 3, major: 0 });
    assert_eq!(finding.run_delay, Duration::from_nanos(1500));
    assert_eq!(finding.steal, Duration::from_millis(20));

    let moved = ThreadText { involuntary: 22, processor: 5, allowed: "3,5", ..QUIET };
    tree.thread(7, &moved);
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::Migration, 1), (Cause::AffinityChange, 1)]);
    assert_eq!(
        finding.events,
        [
            Event::Migrated { from: 3, to: 5 },
            Event::AffinityChanged { from: "3".to_owned(), to: "3,5".to_owned() },
        ]
    );
    // On another CPU at both ends: this CPU's interrupts are not its own.
    tree.interrupts("LOC: 0 900 0 x\n");
    assert!(one(observer.sample()).is_quiet());
    tree.thread(7, &ThreadText { involuntary: 22, ..QUIET });
    assert_eq!(counts(&one(observer.sample())), [(Cause::Migration, 1), (Cause::AffinityChange, 1)]);
}

#[test]
fn a_move_away_and_back_is_seen_and_none_is_counted_twice() {
    let tree = Tree::new();
    let (_worker, mut observer) = tree.observed();
    tree.thread(7, &ThreadText { moves: 4, ..QUIET });
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::Migration, 2)]);
    assert_eq!(finding.events, [Event::MovedAndBack { moves: 2 }]);
    tree.thread(7, &ThreadText { moves: 5, processor: 5, ..QUIET });
    let finding = one(observer.sample());
    assert_eq!(counts(&finding), [(Cause::Migration, 1)]);
    assert_eq!(finding.events, [Event::Migrated { from: 3, to: 5 }]);
}

#[test]
fn a_worker_that_was_moved_before_the_baseline_is_found_out() {
    let tree = Tree::new();
    tree.thread(7, &ThreadText { processor: 0, ..QUIET });
    let (_worker, mut observer) = tree.observed();
    assert_eq!(one(observer.sample()).events, [Event::Migrated { from: 3, to: 0 }]);
    assert!(one(observer.sample()).is_quiet());
}

#[test]
fn a_tracer_counts_once_for_each_attach() {
    let tree = Tree::new();
    let (_worker, mut observer) = tree.observed();
    let steps = [(99, 1), (99, 0), (0, 0), (99, 1), (98, 1)];
    for (step, (tracer, wanted)) in steps.into_iter().enumerate() {
        tree.thread(7, &ThreadText { tracer, ..QUIET });
        assert_eq!(one(observer.sample()).interruptions.of(Cause::Ptrace), wanted, "step {step}");
    }
}

#[test]
fn a_stop_counts_once_whichever_side_of_it_is_seen_first() {
    let tree = Tree::new();
    let (_worker, mut observer) = tree.observed();
    // State, voluntary switches, stops to be counted.
    let steps = [
        ('T', 11, 1), // Both at once,
        ('T', 11, 0), // and it lasts.
        ('R', 11, 0),
        ('T', 11, 1), // The state first,
        ('T', 12, 0), // then the switch.
        ('R', 12, 0),
        ('R', 14, 2), // Two that were over before anybody looked.
        ('t', 15, 1), // By a tracer.
        ('T', 15, 0),
        ('R', 15, 0),
        ('S', 16, 1), // Blocked unasked.
    ];
    for (step, (state, voluntary, wanted)) in steps.into_iter().enumerate() {
        tree.thread(7, &ThreadText { state, voluntary, ..QUIET });
        assert_eq!(one(observer.sample()).interruptions.of(Cause::Stop), wanted, "step {step}");
    }
}

#[test]
fn blocking_by_permission_is_no_stop() {
    let tree = Tree::new();
    let (worker, mut observer) = tree.observed();
    let words = worker.status.words();
    let permissions: [&dyn Fn(); 4] = [
        &|| crate::status::bump(&words.visits, 1),
        &|| crate::status::bump(&words.allowed[Cause::Syscall as usize], 1),
        &|| crate::status::bump(&words.breaches[Cause::PageFault as usize], 1),
        &|| set_state(&worker.status, State::SlowPath),
    ];
    for (at, permit) in permissions.into_iter().enumerate() {
        let voluntary = 10 + 2 * at as u64;
        permit();
        tree.thread(7, &ThreadText { voluntary: voluntary + 1, ..QUIET });
        assert!(one(observer.sample()).is_quiet(), "permission {at}");
        set_state(&worker.status, State::Armed);
        observer.sample();
        tree.thread(7, &ThreadText { voluntary: voluntary + 2, ..QUIET });
        assert_eq!(counts(&one(observer.sample())), [(Cause::Stop, 1)], "permission {at}");
    }
}

#[test]
fn a_thread_that_is_gone_is_said_once() {
    let tree = Tree::new();
    let (worker, mut observer) = tree.observed();
    tree.thread(7, &ThreadText { state: 'Z', ..QUIET });
    let finding = one(observer.sample());
    assert_eq!(finding.events, [Event::Gone]);
    assert!(observer.sample().is_empty());
    arm(&worker.status, (4000, 4000), 3);
    assert_eq!(one(observer.sample()).events, [Event::Gone], "another that never was");
    assert!(observer.missing().is_empty(), "{:?}", observer.missing());
}

#[test]
fn what_cannot_be_read_is_said_once_and_the_rest_goes_on() {
    let tree = Tree::new();
    for path in ["proc/interrupts", "proc/7/task/7/schedstat", "sys/devices/system/cpu/online"] {
        fs::remove_file(tree.root.path().join(path)).unwrap();
    }
    let (_worker, mut observer) = tree.observed();
    tree.thread(7, &ThreadText { involuntary: 21, ..QUIET });
    fs::remove_file(tree.root.path().join("proc/7/task/7/schedstat")).unwrap();
    assert_eq!(counts(&one(observer.sample())), [(Cause::Preemption, 1)]);
    let missing: Vec<_> =
        observer.missing().iter().map(|one| one.path.file_name().unwrap().to_owned()).collect();
    assert_eq!(missing, ["interrupts", "online", "schedstat"]);
    // It comes back.
    tree.interrupts("LOC: 0 100 0 x\n");
    observer.sample();
    tree.interrupts("LOC: 0 101 0 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 1)]);
}

#[test]
fn a_file_that_no_thread_has_is_missing_once() {
    let tree = Tree::new();
    let worker = watched("w");
    let mut observer = tree.observer(std::slice::from_ref(&worker));
    for pid in [7, 8, 9] {
        tree.thread(pid, &QUIET);
        fs::remove_file(tree.root.path().join(format!("proc/{pid}/task/{pid}/sched"))).unwrap();
        arm(&worker.status, (pid, pid), 3);
        observer.sample();
        assert!(one(observer.sample()).is_quiet());
    }
    let missing: Vec<_> = observer.missing().iter().map(|one| one.path.clone()).collect();
    assert_eq!(missing, [tree.root.path().join("proc/PID/task/TID/sched")]);
    // A format that nobody knows is said, too; without `stat` nothing can be said of the thread.
    tree.write("proc/9/task/9/stat", "9 (w) R 1\n");
    assert!(observer.sample().is_empty());
    assert_eq!(observer.missing()[1].reason, "its format is not known");
}

#[test]
fn two_workers_keep_their_own_counts() {
    let tree = Tree::new();
    tree.interrupts("LOC: 0 100 200 x\n");
    tree.thread(8, &ThreadText { processor: 5, allowed: "5", ..QUIET });
    let workers = [watched("a"), watched("b"), watched("c")];
    arm(&workers[0].status, (7, 7), 3);
    arm(&workers[1].status, (8, 8), 5);
    let mut observer = tree.observer(&workers);
    assert!(observer.sample().is_empty());
    assert_eq!(observer.cpus(), [3, 5]);
    tree.interrupts("LOC: 0 101 202 x\n");
    let findings = observer.sample();
    let ticks: Vec<_> =
        findings.iter().map(|one| (one.worker.as_str(), one.interruptions.of(Cause::TimerTick))).collect();
    assert_eq!(ticks, [("a", 1), ("b", 2)]);
    // One leaves; the other one's counts are not disturbed by the columns that move.
    set_state(&workers[0].status, State::Off);
    tree.interrupts("LOC: 0 105 205 x\n");
    assert_eq!(counts(&one(observer.sample())), [(Cause::TimerTick, 3)]);
}

#[test]
fn a_status_block_is_not_trusted() {
    let tree = Tree::new();
    let worker = watched("w");
    let mut observer = tree.observer(std::slice::from_ref(&worker));
    for (id, cpu) in [((7, 7), u32::MAX - 1), ((7, 7), 8192), ((u32::MAX, u32::MAX), 3), ((0, 0), 3)] {
        arm(&worker.status, id, cpu);
        for _ in 0..3 {
            for finding in observer.sample() {
                assert_eq!(finding.events, [Event::Gone], "{finding:?}");
            }
        }
        assert_eq!(worker.status.snapshot().interruptions.total(), 0);
    }
}

#[test]
fn the_thread_samples_until_it_is_dropped() {
    let tree = Tree::new();
    tree.interrupts("LOC: 0 100 0 x\n");
    let (worker, observer) = tree.observed();
    let (send, findings) = std::sync::mpsc::channel();
    let observing =
        observer.spawn(Duration::from_millis(1), move |finding| drop(send.send(counts(finding)))).unwrap();
    assert!(findings.recv().unwrap().is_empty());
    tree.write("proc/softirqs", &format!("{HEADER} HI: 0 1 0\nTIMER: 5 5 5\n"));
    while findings.recv().unwrap() != [(Cause::Softirq, 1)] {}
    let mut observer = observing.stop().unwrap();
    let samples = worker.status.snapshot().samples;
    assert!(findings.into_iter().all(|finding| finding.is_empty()), "its end of the channel is dropped");
    assert!(one(observer.sample()).is_quiet());
    assert_eq!(worker.status.snapshot().samples, samples + 1);
}

#[test]
fn a_worker_without_a_cpu_of_its_own_has_what_is_the_threads() {
    let tree = Tree::new();
    tree.interrupts("LOC: 100 100 100 x\n");
    let worker = watched("w");
    arm(&worker.status, (7, 7), u32::MAX);
    let mut observer = tree.observer(std::slice::from_ref(&worker));
    assert!(observer.sample().is_empty());
    tree.interrupts("LOC: 200 200 200 x\n");
    tree.thread(7, &ThreadText { involuntary: 23, processor: 0, ..QUIET });
    let finding = one(observer.sample());
    assert_eq!(finding.cpu, None);
    assert_eq!(counts(&finding), [(Cause::Preemption, 3), (Cause::Migration, 1)]);
}
