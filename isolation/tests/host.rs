//! Host checks against this machine and against made-up ones.

mod hosts;

use hosts::{Tree, probes, request, stat};
use isoplane_isolation::host::{
    self, Answer, CHECKS, Chosen, Fix, Host, Hypervisor, Report, Request, Verdict,
};
use std::collections::BTreeSet;

/// The checks with a verdict that bad, by id.
fn at_least(report: &Report, verdict: Verdict) -> Vec<&str> {
    report.checks.iter().filter(|check| check.verdict >= verdict).map(|check| check.id).collect()
}

/// What holds for every report, of whatever host.
fn is_whole(report: &Report) {
    assert_eq!(report.checks.iter().map(|c| c.id).collect::<Vec<_>>(), CHECKS.map(|info| info.id));
    for check in &report.checks {
        assert!(!check.found.is_empty() && !check.wanted.is_empty() && !check.why.is_empty(), "{check:?}");
        assert_eq!(check.reason.is_some(), check.verdict == Verdict::NotApplicable, "{check:?}");
        assert!(
            check.verdict < Verdict::Warning || !check.fix.is_empty(),
            "a problem without a fix: {check:?}"
        );
        for fix in &check.fix {
            if let Fix::Change(change) = fix {
                assert!(change.path.starts_with("/proc/") || change.path.starts_with("/sys/"), "{check:?}");
                assert!(!change.content.is_empty(), "{check:?}");
            }
        }
    }
    let worst = report.checks.iter().map(|check| check.verdict).max().unwrap();
    assert_eq!(report.verdict, worst.max(Verdict::Good));
}

fn found(report: &Report, id: &str) -> String {
    report.get(id).unwrap().found.clone()
}

fn fixes(report: &Report, id: &str) -> Vec<String> {
    report.get(id).unwrap().fix.iter().map(ToString::to_string).collect()
}

fn verdict(report: &Report, id: &str) -> Verdict {
    report.get(id).unwrap().verdict
}

#[test]
fn this_machine_is_understood() {
    let host = Host::real();
    let (cpus, _) = host::default_cpus(&host);
    let report = host::check(&host, &Request::new(cpus));
    is_whole(&report);
    // Tests run on machines with these.
    assert_ne!(verdict(&report, "cpus"), Verdict::NotApplicable);
    assert_eq!(verdict(&report, "syscall-dispatch"), Verdict::Good);
    assert_eq!(verdict(&report, "neighbours") == Verdict::NotApplicable, report.housekeeping.is_empty());
}

#[test]
fn ids_are_unique_and_each_is_explained() {
    let ids: BTreeSet<_> = CHECKS.iter().map(|info| info.id).collect();
    assert_eq!(ids.len(), CHECKS.len());
    let chapter = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/host-checks.md");
    let chapter = std::fs::read_to_string(chapter).unwrap();
    for info in CHECKS {
        assert!(
            chapter.contains(&format!("\n### `{}`", info.id)),
            "docs/host-checks.md has no `{}`",
            info.id
        );
    }
    let headings = chapter.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'));
    for heading in headings {
        assert!(ids.contains(heading), "docs/host-checks.md explains `{heading}`, which is no check");
    }
}

#[test]
fn a_tuned_host_is_good() {
    let report = Tree::good().check();
    is_whole(&report);
    assert_eq!(at_least(&report, Verdict::Warning), [""; 0], "{report:#?}");
    assert_eq!(report.verdict, Verdict::Good);
    assert_eq!(report.housekeeping.to_string(), "0-1");
    assert_eq!(report.changes().count(), 0);
    assert_eq!(
        report.boot_line(),
        "nohz_full=2-3 isolcpus=managed_irq,domain,2-3 rcu_nocbs=2-3 irqaffinity=0-1 tsc=reliable nowatchdog skew_tick=0"
    );
    let not_applicable: Vec<_> =
        report.checks.iter().filter(|c| c.verdict == Verdict::NotApplicable).map(|c| c.id).collect();
    assert_eq!(not_applicable, ["task-isolation"]);
}

#[test]
fn an_untuned_host_is_told_everything() {
    let report = Tree::bad().check();
    is_whole(&report);
    assert_eq!(
        at_least(&report, Verdict::CannotIsolate),
        ["nohz-full", "isolcpus", "clocksource", "memlock"]
    );
    let good: Vec<_> = report.checks.iter().filter(|c| c.verdict == Verdict::Good).map(|c| c.id).collect();
    // Linux 6.12 replaced RT throttling; nobody spins; the kernel itself has what it takes.
    assert_eq!(good, ["cpus", "rt-throttling", "neighbours", "af-xdp", "syscall-dispatch"]);
    let echo = |content: &str, path: &str| format!("echo {content} > {path}");
    for (id, fix) in [
        ("irqaffinity", echo("3", "/proc/irq/default_smp_affinity")),
        ("workqueues", echo("3", "/sys/devices/virtual/workqueue/cpumask")),
        ("rps", echo("2", "/sys/class/net/eth0/queues/rx-0/rps_cpus")),
        ("xps", echo("0", "/sys/class/net/eth0/queues/tx-0/xps_cpus")),
        ("watchdog", echo("0-1", "/proc/sys/kernel/watchdog_cpumask")),
        ("clocksource", echo("tsc", "/sys/devices/system/clocksource/clocksource0/current_clocksource")),
        ("hugepages", echo("64", "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")),
        ("thp", echo("madvise", "/sys/kernel/mm/transparent_hugepage/enabled")),
        ("thp", echo("0", "/sys/kernel/mm/transparent_hugepage/khugepaged/defrag")),
        ("cstates", echo("1", "/sys/devices/system/cpu/cpu3/cpuidle/state1/disable")),
        ("governor", echo("performance", "/sys/devices/system/cpu/cpu2/cpufreq/scaling_governor")),
        ("fair-server", echo("0", "/sys/kernel/debug/sched/fair_server/cpu2/runtime")),
        ("smt", echo("0", "/sys/devices/system/cpu/cpu0/online")),
        ("nohz-full", "boot with nohz_full=2-3".to_owned()),
        ("iommu", "boot with amd_iommu=on".to_owned()),
    ] {
        assert!(fixes(&report, id).contains(&fix), "{id}: {fix} is not in {:#?}", fixes(&report, id));
    }
    // 24 may be delivered to 0-3, and stays where it may and should be; 25 has nowhere of its own to go.
    let irqs = fixes(&report, "irqs");
    assert_eq!(
        irqs[..2],
        [echo("0-1", "/proc/irq/24/smp_affinity_list"), echo("0-1", "/proc/irq/25/smp_affinity_list")]
    );
    assert_eq!(found(&report, "irqs"), "2 of 2 IRQs: 24 (eth0-rx), 25 (nvme0q3)");
    let line = report.boot_line();
    for parameter in
        ["nosmt", "amd_iommu=on", "iommu=pt", "processor.max_cstate=1", "transparent_hugepage=madvise"]
    {
        assert!(line.split(' ').any(|word| word == parameter), "{parameter} is not in {line}");
    }
    // Each parameter once, whoever asks for it.
    let names: Vec<_> = line.split(' ').map(|word| word.split('=').next().unwrap()).collect();
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len(), "{line}");
    assert!(found(&report, "driver-bugs").contains("eth0 (ice, Linux 6.12)"));
}

/// Everything that [`Tree::good`] has, taken away one by one.
#[test]
fn a_missing_file_is_a_verdict() {
    let tree = Tree::good();
    let files = tree.snapshot();
    assert!(files.len() > 50);
    for (file, content) in files {
        tree.remove(&file);
        is_whole(&tree.check());
        tree.set(&file, &content);
    }
    let nothing = Tree::empty();
    let report = nothing.check();
    is_whole(&report);
    assert_eq!(report.verdict, Verdict::CannotIsolate);
    assert_eq!(report.changes().count(), 0);
}

/// Nonsense in every file: never good where the value decides, never a panic.
#[test]
fn a_malformed_file_is_a_verdict() {
    let nonsense =
        ["", "\n", "-1", "99999999999999999999999", "[", "]", "2-", "zz,zz", "\u{0}\u{1}", "ü", "1 2 3 4"];
    let long = "9,".repeat(100_000);
    let tree = Tree::good();
    for (file, good) in tree.snapshot() {
        for content in nonsense.iter().copied().chain([long.as_str()]) {
            tree.set(&file, content);
            let report = tree.check();
            is_whole(&report);
            for text in report.checks.iter().map(|check| &check.found) {
                assert!(text.chars().count() < 4000 && !text.contains('\u{1}'), "{file}: {text}");
            }
        }
        std::fs::write(tree.path().join(&file), [0xff, 0xfe, 0x00]).unwrap();
        is_whole(&tree.check());
        tree.set(&file, &good);
    }
    for (id, file) in [
        ("nohz-full", "sys/devices/system/cpu/nohz_full"),
        ("isolcpus", "sys/devices/system/cpu/isolated"),
        ("irqaffinity", "proc/irq/default_smp_affinity"),
        ("irqs", "proc/irq/24/smp_affinity_list"),
        ("workqueues", "sys/devices/virtual/workqueue/cpumask"),
        ("rps", "sys/class/net/eth0/queues/rx-0/rps_cpus"),
        ("watchdog", "proc/sys/kernel/watchdog_cpumask"),
        ("timer-migration", "proc/sys/kernel/timer_migration"),
        ("clocksource", "sys/devices/system/clocksource/clocksource0/current_clocksource"),
        ("thp", "sys/kernel/mm/transparent_hugepage/enabled"),
        ("ksm", "sys/kernel/mm/ksm/run"),
        ("fair-server", "sys/kernel/debug/sched/fair_server/cpu3/runtime"),
        ("smt", "sys/devices/system/cpu/cpu3/topology/thread_siblings_list"),
    ] {
        let tree = Tree::good();
        tree.set(file, "nonsense?");
        let report = tree.check();
        assert!(verdict(&report, id) >= Verdict::Warning, "{id}: {:?}", report.get(id));
        assert!(found(&report, id).contains("nonsense?"), "{id}: {:?}", report.get(id));
    }
}

#[test]
fn a_directory_or_a_pipe_in_the_place_of_a_file_does_not_hang() {
    for file in ["proc/sys/kernel/timer_migration", "sys/devices/system/cpu/nohz_full", "proc/cpuinfo"] {
        let tree = Tree::good();
        tree.remove(file);
        nix::unistd::mkfifo(&tree.path().join(file), nix::sys::stat::Mode::S_IRWXU).unwrap();
        is_whole(&tree.check());
        let tree = Tree::good();
        tree.remove(file);
        tree.set(&format!("{file}/inside"), "");
        is_whole(&tree.check());
    }
}

#[test]
fn cpus_that_cannot_be_had() {
    let tree = Tree::good();
    let check = |cpus: &str| host::check(&tree.host(), &Request::new(cpus.parse().unwrap()));
    let report = check("3-4");
    assert_eq!(verdict(&report, "cpus"), Verdict::CannotIsolate);
    assert!(found(&report, "cpus").contains("4 not online"));
    assert!(fixes(&report, "cpus")[0].contains("there is no CPU 4"));
    tree.set("sys/devices/system/cpu/cpu4/online", "0\n");
    assert_eq!(fixes(&check("3-4"), "cpus"), ["echo 1 > /sys/devices/system/cpu/cpu4/online"]);
    // Nobody left for housekeeping.
    let report = check("0-3");
    assert_eq!(verdict(&report, "cpus"), Verdict::CannotIsolate);
    assert!(!report.boot_line().contains("irqaffinity"), "{}", report.boot_line());
    is_whole(&report);
    // More than is isolated.
    let report = check("1-3");
    assert_eq!(at_least(&report, Verdict::CannotIsolate), ["nohz-full", "isolcpus"]);
}

#[test]
fn cpus_when_nobody_names_any() {
    let tree = Tree::good();
    let chosen = |tree: &Tree| {
        let (cpus, chosen) = host::default_cpus(&tree.host());
        (cpus.to_string(), chosen)
    };
    assert_eq!(chosen(&tree), ("2-3".to_owned(), Chosen::Isolated));
    tree.set("sys/devices/system/cpu/isolated", "\n");
    assert_eq!(chosen(&tree), ("1-3".to_owned(), Chosen::AllButFirst));
    // A partition that this kernel sums up, one that it does not, and one that is not valid.
    tree.set("sys/fs/cgroup/cpuset.cpus.isolated", "1\n");
    assert_eq!(chosen(&tree), ("1".to_owned(), Chosen::Isolated));
    tree.remove("sys/fs/cgroup/cpuset.cpus.isolated");
    tree.set("sys/fs/cgroup/a/cpuset.cpus.partition", "root\n");
    tree.set("sys/fs/cgroup/a/b/cpuset.cpus.partition", "isolated\n");
    tree.set("sys/fs/cgroup/a/b/cpuset.cpus.effective", "3\n");
    tree.set("sys/fs/cgroup/c/cpuset.cpus.partition", "isolated invalid (no parent)\n");
    tree.set("sys/fs/cgroup/c/cpuset.cpus.effective", "1\n");
    assert_eq!(chosen(&tree), ("3".to_owned(), Chosen::Isolated));
    let one = Tree::empty();
    one.set("sys/devices/system/cpu/online", "0\n");
    assert_eq!(chosen(&one), ("0".to_owned(), Chosen::AllButFirst));
    assert_eq!(chosen(&Tree::empty()), ("0".to_owned(), Chosen::AllButFirst));
}

#[test]
fn a_partition_isolates_as_boot_does() {
    let tree = Tree::good();
    tree.set("sys/devices/system/cpu/isolated", "2\n");
    assert_eq!(verdict(&tree.check(), "isolcpus"), Verdict::CannotIsolate);
    tree.set("sys/fs/cgroup/unified/cpuset.cpus.isolated", "3\n");
    let report = tree.check();
    assert_eq!(verdict(&report, "isolcpus"), Verdict::Good);
    assert_eq!(found(&report, "isolcpus"), "2-3 (isolcpus and cpuset partition)");
}

#[test]
fn callbacks_are_offloaded_by_either_parameter() {
    let tree = Tree::good();
    for (cmdline, nohz_full, verdict_) in [
        ("", "2-3", Verdict::Good),
        ("rcu_nocbs=all", "", Verdict::Good),
        ("rcu_nocbs=0 rcu_nocbs=2-N", "", Verdict::Good),
        ("rcu_nocbs=2", "3", Verdict::Good),
        ("rcu_nocbs=2", "", Verdict::Warning),
        ("rcu_nocbs=2-", "", Verdict::Warning),
    ] {
        tree.set("proc/cmdline", cmdline);
        tree.set("sys/devices/system/cpu/nohz_full", nohz_full);
        assert_eq!(verdict(&tree.check(), "rcu-nocbs"), verdict_, "{cmdline:?} {nohz_full:?}");
    }
}

#[test]
fn a_spinning_thread_on_housekeeping_is_found() {
    let tree = Tree::good();
    let root = tree.path().to_owned();
    // 100 ms are ten ticks: 9 of them is all the time, 8 is not; on a worker's CPU it is the worker.
    let ran = |name: &'static str, ticks: u64, cpu: u32, cpu_after: u32| {
        tree.set("proc/8/task/9/stat", &stat(9, name, 1000, cpu));
        let path = root.join("proc/8/task/9/stat");
        let line = stat(9, name, 1000 + ticks, cpu_after);
        let host = Host::at(&root).probes(probes()).waiting(move |_| std::fs::write(&path, &line).unwrap());
        let report = host::check(&host, &request());
        (verdict(&report, "neighbours"), found(&report, "neighbours"), fixes(&report, "neighbours"))
    };
    let (verdict_, found_, fixes_) = ran("burn) R (", 10, 1, 1);
    assert_eq!((verdict_, found_.as_str()), (Verdict::Warning, "burn) R ( (thread 9) on CPU 1"));
    assert!(fixes_[0].ends_with("taskset -pc 0 9"), "{fixes_:?}");
    assert_eq!(ran("burn", 9, 0, 0).0, Verdict::Warning);
    assert_eq!(ran("burn", 8, 0, 0).0, Verdict::Good);
    assert_eq!(ran("worker", 10, 3, 3).0, Verdict::Good);
    // Wherever on housekeeping it is, it is in somebody's way; one that came from a worker's CPU was not.
    assert_eq!(ran("moves", 10, 0, 1).0, Verdict::Warning);
    assert_eq!(ran("moves", 10, 2, 1).0, Verdict::Good);
    assert_eq!(ran("turns back", u64::MAX - 1000, 0, 0).0, Verdict::Warning);
    let mut unwatched = request();
    unwatched.sample = std::time::Duration::ZERO;
    assert_eq!(verdict(&host::check(&tree.host(), &unwatched), "neighbours"), Verdict::NotApplicable);
}

#[test]
fn kernels_before_the_fair_server_throttle() {
    let tree = Tree::good();
    tree.set("proc/sys/kernel/osrelease", "6.1.0-40-amd64\n");
    let report = tree.check();
    assert_eq!(verdict(&report, "fair-server"), Verdict::NotApplicable);
    assert_eq!(fixes(&report, "rt-throttling"), ["echo -1 > /proc/sys/kernel/sched_rt_runtime_us"]);
    // And before 6.12 the statistics are folded on isolated CPUs too.
    assert_eq!(fixes(&report, "stat-interval"), ["echo 120 > /proc/sys/vm/stat_interval"]);
    tree.remove("sys/kernel/debug/sched");
    tree.set("proc/sys/kernel/osrelease", "6.12.0\n");
    let report = tree.check();
    assert_eq!(verdict(&report, "fair-server"), Verdict::Warning);
    assert!(fixes(&report, "fair-server")[0].starts_with("mount -t debugfs"));
}

#[test]
fn what_the_kernel_answers_decides() {
    let tree = Tree::good();
    let with = |change: fn(&mut host::Probes)| {
        let mut probes = probes();
        change(&mut probes);
        host::check(&tree.host().probes(probes), &request())
    };
    let report = with(|probes| probes.task_isolation = Answer::Yes);
    assert_eq!(verdict(&report, "task-isolation"), Verdict::Good);
    let report = with(|probes| probes.syscall_dispatch = Answer::No("EINVAL".to_owned()));
    assert_eq!(verdict(&report, "syscall-dispatch"), Verdict::CannotIsolate);
    let report = with(|probes| {
        probes.syscall_dispatch = Answer::No("EINVAL".to_owned());
        probes.task_isolation = Answer::Yes;
    });
    assert_eq!(verdict(&report, "syscall-dispatch"), Verdict::Warning);
    let report = with(|probes| probes.af_xdp = Answer::No("EAFNOSUPPORT".to_owned()));
    assert_eq!(verdict(&report, "af-xdp"), Verdict::Warning);
    let report = with(|probes| {
        probes.hypervisor = Some(Hypervisor { signature: "KVMKVMKVM".to_owned(), pv_tlb_flush: true });
    });
    assert_eq!(verdict(&report, "virtual-machine"), Verdict::Warning);
    assert!(found(&report, "virtual-machine").contains("KVMKVMKVM), TLB flushes are paravirtual"));
}

#[test]
fn drivers_are_judged_with_their_kernel() {
    let tree = Tree::good();
    for (driver, kernel, bugs, af_xdp) in [
        ("i40e", "5.15.0", Verdict::Warning, Verdict::Good),
        ("i40e", "5.19.0", Verdict::Good, Verdict::Good),
        ("ice", "7.0.0-15-generic", Verdict::Warning, Verdict::Good),
        ("mlx5_core", "6.4.2", Verdict::Warning, Verdict::Good),
        ("mlx5_core", "6.12.0", Verdict::Good, Verdict::Good),
        ("ena", "6.8.0", Verdict::Warning, Verdict::Warning),
        ("r8169", "6.8.0", Verdict::Good, Verdict::Warning),
        ("virtio_net", "6.8.0", Verdict::Good, Verdict::Warning),
        ("virtio_net", "6.14.0", Verdict::Good, Verdict::Good),
        ("i40e", "not a version", Verdict::NotApplicable, Verdict::Good),
    ] {
        tree.driver(driver);
        tree.set("proc/sys/kernel/osrelease", kernel);
        let report = tree.check();
        assert_eq!(
            (verdict(&report, "driver-bugs"), verdict(&report, "af-xdp")),
            (bugs, af_xdp),
            "{driver} {kernel}: {report:#?}"
        );
    }
}

#[test]
fn a_process_without_rights_is_told_which() {
    let tree = Tree::good();
    tree.set("proc/self/status", "CapEff:\t0000000000000000\n");
    let report = tree.check();
    assert_eq!(
        (verdict(&report, "memlock"), found(&report, "memlock").as_str()),
        (Verdict::CannotIsolate, "8388608 bytes")
    );
    assert_eq!(verdict(&report, "perf"), Verdict::Good);
    tree.set("proc/self/limits", "Max locked memory  unlimited unlimited bytes\n");
    tree.set("proc/sys/kernel/perf_event_paranoid", "4\n");
    let report = tree.check();
    assert_eq!(verdict(&report, "memlock"), Verdict::Good);
    assert_eq!(fixes(&report, "perf")[0], "echo 2 > /proc/sys/kernel/perf_event_paranoid");
}
