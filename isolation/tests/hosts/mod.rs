//! Made-up hosts: trees of `/proc` and `/sys` as Linux 6.12 has them, four CPUs, CPUs 2-3 for workers.

use isoplane_isolation::host::{Answer, Host, Probes, Report, Request, check};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// A directory that goes away; in memory where that can be had, since records are flushed often.
pub(crate) fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { TempDir::new_in(memory).unwrap() } else { TempDir::new().unwrap() }
}

/// Writes a setting as a kernel of 64 possible CPUs does: masks become whole words, and of the words of a
/// choice the one that was written gets the brackets.
pub(crate) fn write(path: &Path, content: &str) -> std::io::Result<()> {
    let text = match path.file_name().unwrap().to_str().unwrap() {
        "cpumask" | "rps_cpus" | "xps_cpus" | "default_smp_affinity" => {
            format!("00000000,{:0>8}", content.rsplit(',').next().unwrap())
        }
        "enabled" => ["always", "madvise", "never"]
            .map(|word| if word == content { format!("[{word}]") } else { word.to_owned() })
            .join(" "),
        _ => content.to_owned(),
    };
    fs::write(path, text + "\n")
}

/// A host below a directory that goes away with it.
pub(crate) struct Tree {
    root: TempDir,
}

/// What a kernel answers that has everything but task isolation.
pub(crate) fn probes() -> Probes {
    Probes {
        af_xdp: Answer::Yes,
        syscall_dispatch: Answer::Yes,
        task_isolation: Answer::No("EINVAL".to_owned()),
        hypervisor: None,
    }
}

pub(crate) fn request() -> Request {
    let mut request = Request::new("2-3".parse().unwrap());
    request.sample = Duration::from_millis(100);
    request
}

/// A thread's line in /proc: name, ticks, CPU.
pub(crate) fn stat(pid: u32, name: &str, ticks: u64, cpu: u32) -> String {
    let mut fields = vec!["0".to_owned(); 52];
    fields[0] = pid.to_string();
    fields[1] = format!("({name})");
    fields[2] = "R".to_owned();
    fields[13] = ticks.to_string();
    fields[38] = cpu.to_string();
    fields.join(" ")
}

const CPUINFO: &str = "vendor_id\t: GenuineIntel\nflags\t\t: fpu tsc constant_tsc nonstop_tsc tsc_adjust\n";

/// Files of a host that leaves CPUs 2-3 alone, with nothing left to wish for.
const GOOD: &[(&str, &str)] = &[
    (
        "proc/cmdline",
        "quiet nohz_full=2-3 isolcpus=managed_irq,domain,2-3 rcu_nocbs=2-3 irqaffinity=0-1 tsc=reliable\n",
    ),
    ("proc/cpuinfo", CPUINFO),
    ("proc/meminfo", "MemTotal:  16000000 kB\nMemAvailable:  8000000 kB\n"),
    ("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n"),
    ("proc/stat", "cpu  1 2 3 4 5 6 7 0 0 0\n"),
    ("proc/interrupts", "     CPU0 CPU1\n 24:  1 0 IR-PCI-MSIX-0000:00:01.0 0-edge eth0-rx\n"),
    ("proc/self/status", "Name:\tdoctor\nCapEff:\t000001ffffffffff\n"),
    ("proc/self/limits", "Max locked memory         8388608              8388608              bytes\n"),
    ("proc/sys/kernel/osrelease", "6.12.117-amd64\n"),
    ("proc/sys/kernel/random/boot_id", "11111111-2222-3333-4444-555555555555\n"),
    ("proc/sys/kernel/watchdog", "1\n"),
    ("proc/sys/kernel/nmi_watchdog", "1\n"),
    ("proc/sys/kernel/soft_watchdog", "1\n"),
    ("proc/sys/kernel/watchdog_cpumask", "0-1\n"),
    ("proc/sys/kernel/timer_migration", "1\n"),
    ("proc/sys/kernel/numa_balancing", "0\n"),
    ("proc/sys/kernel/sched_rt_runtime_us", "950000\n"),
    ("proc/sys/kernel/perf_event_paranoid", "2\n"),
    ("proc/sys/vm/compact_unevictable_allowed", "0\n"),
    ("proc/sys/vm/stat_interval", "1\n"),
    ("proc/irq/default_smp_affinity", "3\n"),
    ("proc/irq/24/smp_affinity_list", "0-1\n"),
    ("proc/irq/24/effective_affinity_list", "1\n"),
    ("proc/irq/24/eth0-rx/.keep", ""),
    ("sys/devices/system/cpu/online", "0-3\n"),
    ("sys/devices/system/cpu/possible", "0-3\n"),
    ("sys/devices/system/cpu/isolated", "2-3\n"),
    ("sys/devices/system/cpu/nohz_full", "2-3\n"),
    ("sys/devices/system/cpu/cpu2/topology/thread_siblings_list", "2\n"),
    ("sys/devices/system/cpu/cpu3/topology/thread_siblings_list", "3\n"),
    ("sys/devices/system/cpu/cpu2/cpufreq/scaling_governor", "performance\n"),
    ("sys/devices/system/cpu/cpu3/cpufreq/scaling_governor", "performance\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state0/name", "POLL\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state0/latency", "0\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state0/disable", "0\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state1/name", "C6\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state1/latency", "133\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state1/disable", "1\n"),
    ("sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n"),
    ("sys/devices/system/clocksource/clocksource0/available_clocksource", "tsc hpet acpi_pm\n"),
    ("sys/devices/system/machinecheck/machinecheck0/check_interval", "0\n"),
    ("sys/devices/virtual/workqueue/cpumask", "00000000,00000003\n"),
    ("sys/class/net/eth0/queues/rx-0/rps_cpus", "0\n"),
    ("sys/class/net/eth0/queues/tx-0/xps_cpus", "3\n"),
    ("sys/class/iommu/dmar0/.keep", ""),
    ("sys/kernel/iommu_groups/0/.keep", ""),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "64\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "64\n"),
    ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
    ("sys/kernel/mm/transparent_hugepage/khugepaged/defrag", "0\n"),
    ("sys/kernel/mm/ksm/run", "0\n"),
    ("sys/kernel/mm/damon/admin/kdamonds/0/state", "off\n"),
    ("sys/kernel/debug/sched/fair_server/cpu2/runtime", "0\n"),
    ("sys/kernel/debug/sched/fair_server/cpu3/runtime", "0\n"),
    ("sys/kernel/tracing/events/ipi/ipi_send_cpu/id", "77\n"),
];

/// What a host has that nobody has tuned, where it differs.
const BAD: &[(&str, &str)] = &[
    ("proc/cmdline", "quiet\n"),
    ("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n/dev/sda2 partition 1000 0 -2\n"),
    ("proc/interrupts", "     CPU0 CPU1\n 24:  1 0 PCI-MSIX-0000:00:01.0 0-edge eth0-rx\n"),
    ("proc/cpuinfo", "vendor_id\t: AuthenticAMD\nflags\t\t: fpu tsc constant_tsc hypervisor\n"),
    ("proc/self/status", "Name:\tdoctor\nCapEff:\t0000000000000000\n"),
    ("proc/sys/kernel/osrelease", "6.12.117-amd64\n"),
    ("proc/sys/kernel/watchdog_cpumask", "0-3\n"),
    ("proc/sys/kernel/timer_migration", "0\n"),
    ("proc/sys/kernel/numa_balancing", "1\n"),
    ("proc/sys/kernel/perf_event_paranoid", "3\n"),
    ("proc/sys/vm/compact_unevictable_allowed", "1\n"),
    ("proc/irq/default_smp_affinity", "00000000,0000000f\n"),
    ("proc/irq/24/smp_affinity_list", "0-3\n"),
    ("proc/irq/24/effective_affinity_list", "3\n"),
    ("proc/irq/25/smp_affinity_list", "2\n"),
    ("proc/irq/25/effective_affinity_list", "2\n"),
    ("proc/irq/25/nvme0q3/.keep", ""),
    ("sys/devices/system/cpu/isolated", "\n"),
    ("sys/devices/system/cpu/nohz_full", "(null)\n"),
    ("sys/devices/system/cpu/cpu2/topology/thread_siblings_list", "0,2\n"),
    ("sys/devices/system/cpu/cpu2/cpufreq/scaling_governor", "schedutil\n"),
    ("sys/devices/system/cpu/cpu3/cpuidle/state1/disable", "0\n"),
    ("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n"),
    ("sys/devices/system/machinecheck/machinecheck0/check_interval", "300\n"),
    ("sys/devices/virtual/workqueue/cpumask", "00000000,0000000f\n"),
    ("sys/class/net/eth0/queues/rx-0/rps_cpus", "00000000,0000000e\n"),
    ("sys/class/net/eth0/queues/tx-0/xps_cpus", "00000000,00000008\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n"),
    ("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n"),
    ("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n"),
    ("sys/kernel/mm/transparent_hugepage/khugepaged/defrag", "1\n"),
    ("sys/kernel/mm/ksm/run", "1\n"),
    ("sys/kernel/mm/damon/admin/kdamonds/0/state", "on\n"),
    ("sys/kernel/debug/sched/fair_server/cpu2/runtime", "50000000\n"),
    ("sys/kernel/debug/sched/fair_server/cpu3/runtime", "50000000\n"),
];

impl Tree {
    pub(crate) fn empty() -> Self {
        Self { root: directory() }
    }

    pub(crate) fn good() -> Self {
        let tree = Self::empty();
        GOOD.iter().for_each(|(path, content)| tree.set(path, content));
        tree.set("proc/7/task/7/stat", &stat(7, "sshd", 100, 0));
        tree.driver("i40e");
        tree
    }

    pub(crate) fn bad() -> Self {
        let tree = Self::good();
        BAD.iter().for_each(|(path, content)| tree.set(path, content));
        for gone in ["sys/kernel/iommu_groups", "sys/class/iommu", "sys/kernel/tracing/events"] {
            tree.remove(gone);
        }
        tree.driver("ice");
        tree
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn host(&self) -> Host {
        Host::at(self.path()).probes(probes()).writing(write).waiting(|_| {})
    }

    pub(crate) fn check(&self) -> Report {
        check(&self.host(), &request())
    }

    pub(crate) fn set(&self, path: &str, content: &str) {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(crate) fn remove(&self, path: &str) {
        let path = self.path().join(path);
        if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }

    pub(crate) fn driver(&self, name: &str) {
        let link = self.path().join("sys/class/net/eth0/device/driver");
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&link);
        symlink(format!("../../../../bus/pci/drivers/{name}"), link).unwrap();
    }

    /// Every file with its content.
    pub(crate) fn snapshot(&self) -> Vec<(String, String)> {
        let mut files = Vec::new();
        let mut directories = vec![self.path().to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() {
                    directories.push(entry.path());
                } else if entry.file_type().unwrap().is_file() {
                    let name = entry.path().strip_prefix(self.path()).unwrap().display().to_string();
                    files.push((name, fs::read_to_string(entry.path()).unwrap().trim().to_owned()));
                }
            }
        }
        files.sort();
        files
    }
}
