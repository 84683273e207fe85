//! The CPU: is it there, is it ours, is it left alone; and pinning to it.
//!
//! Contract: what the kernel says is read when it is asked for and not kept. Files that a kernel does
//! not have mean that it does not have the thing.
//! Sources: Linux Documentation/ABI/testing/sysfs-devices-system-cpu, admin-guide/cgroup-v2.rst (cpuset).

use super::Weakness;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::{Pid, gettid};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const SYSFS: &str = "/sys/devices/system/cpu";

/// A CPU's number, as the kernel counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cpu(pub usize);

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPU {}", self.0)
    }
}

impl FromStr for Cpu {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        text.trim().parse().map(Self).map_err(|_| CpuError::NotANumber(text.to_owned()))
    }
}

/// Numbers of CPUs, ascending; reads and shows itself in the kernel's form, such as `0-3,8`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CpuList(Vec<usize>);

impl CpuList {
    /// Whether a CPU is one of them.
    #[must_use]
    pub fn contains(&self, cpu: Cpu) -> bool {
        self.0.binary_search(&cpu.0).is_ok()
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = Cpu> + '_ {
        self.0.iter().copied().map(Cpu)
    }

    /// How many they are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Cpu> for CpuList {
    fn from_iter<I: IntoIterator<Item = Cpu>>(cpus: I) -> Self {
        let mut list: Vec<usize> = cpus.into_iter().map(|cpu| cpu.0).collect();
        list.sort_unstable();
        list.dedup();
        Self(list)
    }
}

impl FromStr for CpuList {
    type Err = CpuError;

    /// An empty text is an empty list, and so is `(null)`, which some kernels write for "not set".
    fn from_str(text: &str) -> Result<Self, CpuError> {
        /// More than any Linux is built for; bounds what a wrong text may cost.
        const MOST: usize = 1 << 16;
        let text = text.trim();
        if text.is_empty() || text == "(null)" {
            return Ok(Self::default());
        }
        let wrong = || CpuError::NotANumber(text.to_owned());
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.trim().parse().map_err(|_| wrong())?;
            let last: usize = last.trim().parse().map_err(|_| wrong())?;
            if last < first || last >= MOST {
                return Err(wrong());
            }
            cpus.extend((first..=last).map(Cpu));
        }
        Ok(cpus.into_iter().collect())
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        for (n, run) in self.0.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if n == 0 { "" } else { "," };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

/// Why a thread cannot have a CPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// Not a number, or not a list of them.
    #[error("{0:?} is not a CPU or list of CPUs; write it like 3 or 0-3,8")]
    NotANumber(String),
    /// The machine has no such CPU.
    #[error("there is no {cpu}; this machine has {present}")]
    NoSuchCpu {
        /// The CPU asked for.
        cpu: Cpu,
        /// Those there are.
        present: CpuList,
    },
    /// It is there and switched off.
    #[error(
        "{cpu} is offline; online are {online}; bring it up with \
         `echo 1 > /sys/devices/system/cpu/cpu{}/online`", .cpu.0
    )]
    Offline {
        /// The CPU asked for.
        cpu: Cpu,
        /// Those that are online.
        online: CpuList,
    },
    /// This thread may not run on it.
    #[error(
        "{cpu} is not ours: this thread may run on {allowed}; widen its affinity (taskset, CPUAffinity=) or \
         its cpuset (cpuset.cpus, AllowedCPUs=, docker --cpuset-cpus)"
    )]
    NotOurs {
        /// The CPU asked for.
        cpu: Cpu,
        /// Those that the thread may run on.
        allowed: CpuList,
    },
    /// The kernel refused for another reason.
    #[error("the kernel refuses {cpu}: {errno}")]
    Refused {
        /// The CPU asked for.
        cpu: Cpu,
        /// Its answer.
        errno: Errno,
    },
    /// A file that says which CPUs there are cannot be read or understood.
    #[error("cannot learn the CPUs from {path}: {reason}; is sysfs mounted?")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

fn list(name: &str) -> Result<CpuList, CpuError> {
    let path = Path::new(SYSFS).join(name);
    let unknown = |reason: String| CpuError::Unknown { path: path.clone(), reason };
    let text = std::fs::read_to_string(&path).map_err(|error| unknown(error.to_string()))?;
    text.parse().map_err(|error: CpuError| unknown(error.to_string()))
}

/// CPUs that the machine has.
///
/// # Errors
/// [`CpuError::Unknown`].
pub fn present() -> Result<CpuList, CpuError> {
    list("present")
}

/// CPUs that are online.
///
/// # Errors
/// [`CpuError::Unknown`].
pub fn online() -> Result<CpuList, CpuError> {
    list("online")
}

/// CPUs whose tick stops while one thread runs there (`nohz_full=`); none where the kernel has no such.
#[must_use]
pub fn nohz_full() -> CpuList {
    list("nohz_full").unwrap_or_default()
}

/// CPUs that the calling thread may run on now: its affinity, within its cpuset.
#[must_use]
pub fn allowed() -> CpuList {
    // Refused only where the machine has more than 1024 CPUs, which this type of the C library is for.
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return CpuList::default() };
    let cpus = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
    cpus.map(Cpu).collect()
}

/// Why a CPU counts as isolated from the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isolated {
    /// By `isolcpus=` (from Linux 7.0 on, isolated partitions show here too).
    Boot,
    /// By a cpuset partition of type `isolated` (cgroup v2).
    Partition,
}

/// What the kernel promises about a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Facts {
    /// Which.
    pub cpu: Cpu,
    /// The tick stops while one thread runs (`nohz_full=`).
    pub nohz_full: bool,
    /// The load balancer puts nothing there.
    pub isolated: Option<Isolated>,
}

impl Facts {
    /// Reads them. A file that is not there promises nothing.
    #[must_use]
    pub fn of(cpu: Cpu) -> Self {
        let named = |name: &str| list(name).is_ok_and(|cpus| cpus.contains(cpu));
        let isolated = if named("isolated") {
            Some(Isolated::Boot)
        } else {
            partitions().contains(cpu).then_some(Isolated::Partition)
        };
        Self { cpu, nohz_full: named("nohz_full"), isolated }
    }

    /// What is missing for the CPU to be quiet, tick first.
    #[must_use]
    pub fn weaknesses(&self) -> Vec<Weakness> {
        if self.nohz_full { Vec::new() } else { vec![Weakness::TickStays(self.cpu)] }
    }
}

/// CPUs in isolated cpuset partitions, as far as this process sees the hierarchy.
fn partitions() -> CpuList {
    let read = |path: PathBuf| std::fs::read_to_string(path).ok();
    let Some(mount) = read("/proc/self/mountinfo".into()).and_then(|mounts| cgroup2(&mounts)) else {
        return CpuList::default();
    };
    // The root's list has all of them (Linux 6.7); inside a container only our own cgroup is to be seen.
    let all = read(mount.join("cpuset.cpus.isolated")).and_then(|text| text.parse::<CpuList>().ok());
    if let Some(all) = all.filter(|all| !all.is_empty()) {
        return all;
    }
    let Some(ours) = read("/proc/self/cgroup".into())
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("0::/").map(str::to_owned)))
        .map(|path| mount.join(path))
    else {
        return CpuList::default();
    };
    match read(ours.join("cpuset.cpus.partition")) {
        Some(kind) if kind.trim() == "isolated" => {
            read(ours.join("cpuset.cpus.effective")).and_then(|text| text.parse().ok()).unwrap_or_default()
        }
        _ => CpuList::default(),
    }
}

/// Where cgroup v2 is mounted.
fn cgroup2(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        filesystem.starts_with("cgroup2 ").then(|| PathBuf::from(point))
    })
}

/// Says whether the calling thread can have a CPU, without taking it.
///
/// Ours is what the thread may run on now, and any CPU that was isolated on purpose: `isolcpus=` and
/// `nohz_full=` set-ups take those out of everybody's affinity so that programs ask for them.
///
/// # Errors
/// [`CpuError`], one variant a reason.
pub fn check(cpu: Cpu) -> Result<Facts, CpuError> {
    let facts = Facts::of(cpu);
    judge(facts, present()?, online()?, allowed())?;
    Ok(facts)
}

fn judge(facts: Facts, present: CpuList, online: CpuList, allowed: CpuList) -> Result<(), CpuError> {
    let cpu = facts.cpu;
    if !present.contains(cpu) {
        Err(CpuError::NoSuchCpu { cpu, present })
    } else if !online.contains(cpu) {
        Err(CpuError::Offline { cpu, online })
    } else if allowed.contains(cpu) || facts.isolated.is_some() || facts.nohz_full {
        Ok(())
    } else {
        Err(CpuError::NotOurs { cpu, allowed })
    }
}

/// The affinity that a thread had before it was pinned.
#[derive(Debug, Clone, Copy)]
pub struct FormerAffinity {
    thread: Pid,
    set: CpuSet,
}

impl FormerAffinity {
    /// Gives the thread that was pinned its former affinity back, from any thread of the process.
    ///
    /// # Errors
    /// What sched_setaffinity(2) answers: `EINVAL` when no CPU of it is left, `ESRCH` when the thread is
    /// gone.
    pub fn restore(&self) -> Result<(), Errno> {
        sched_setaffinity(self.thread, &self.set)
    }
}

/// Checks a CPU and pins the calling thread to it. On return the thread runs there.
///
/// # Errors
/// [`CpuError`]; the affinity is as it was then.
pub fn pin(cpu: Cpu) -> Result<(Facts, FormerAffinity), CpuError> {
    let facts = check(cpu)?;
    let refused = |errno| CpuError::Refused { cpu, errno };
    let former =
        FormerAffinity { thread: gettid(), set: sched_getaffinity(Pid::from_raw(0)).map_err(refused)? };
    let mut set = CpuSet::new();
    set.set(cpu.0).map_err(refused)?;
    match sched_setaffinity(Pid::from_raw(0), &set) {
        Ok(()) => Ok((facts, former)),
        // The cpuset has the last word, also about isolated CPUs.
        Err(Errno::EINVAL) => Err(CpuError::NotOurs { cpu, allowed: allowed() }),
        Err(errno) => Err(refused(errno)),
    }
}

/// A thread that wants to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runnable {
    /// Its number.
    pub thread: u32,
    /// Its process.
    pub process: u32,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Runnable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (thread {} of process {})", self.name, self.thread, self.process)
    }
}

/// Checks that no other thread wants to run on a CPU at this moment, as far as this process may see
/// others (`hidepid`, containers). Looks at every thread of the machine: for set-up only.
///
/// # Errors
/// [`Weakness::OthersRunnable`], with all of them.
pub fn alone(cpu: Cpu) -> Result<(), Weakness> {
    let own = gettid().as_raw() as u32;
    let entries = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten();
    let number = |entry: &std::fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
    let mut threads = Vec::new();
    for process in entries("/proc".into()).filter_map(|entry| number(&entry)) {
        for entry in entries(format!("/proc/{process}/task").into()) {
            let Some(thread) = number(&entry).filter(|thread| *thread != own) else { continue };
            // Threads come and go meanwhile.
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            if let Some(name) = runnable_on(&stat, cpu) {
                threads.push(Runnable { thread, process, name });
            }
        }
    }
    if threads.is_empty() { Ok(()) } else { Err(Weakness::OthersRunnable { cpu, threads }) }
}

/// The name in a line of `/proc/PID/stat` whose thread is runnable on `cpu`.
fn runnable_on(stat: &str, cpu: Cpu) -> Option<String> {
    let (head, rest) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    // Field 3 is the state, field 39 the CPU (proc_pid_stat(5)).
    let mut fields = rest.split_whitespace();
    let runnable = fields.next()? == "R";
    let on: usize = fields.nth(35)?.parse().ok()?;
    (runnable && on == cpu.0).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_as_the_kernel_writes_them() {
        for (text, cpus) in [
            ("0-3,8\n", vec![0, 1, 2, 3, 8]),
            ("1", vec![1]),
            ("", vec![]),
            ("\n", vec![]),
            (" (null)\n", vec![]),
            ("5,1-2,2", vec![1, 2, 5]),
        ] {
            assert_eq!(text.parse::<CpuList>().unwrap().0, cpus, "{text:?}");
        }
        for text in ["a", "3-1", "1-", "-", "0-4294967295", "1,,2", "0x1"] {
            let error = text.parse::<CpuList>().unwrap_err();
            assert!(error.to_string().contains("0-3,8"), "{error}");
        }
    }

    #[test]
    fn lists_show_as_the_kernel_writes_them() {
        for text in ["0-3,8", "1", "0,2,4-5", "none"] {
            let parsed: CpuList = if text == "none" { CpuList::default() } else { text.parse().unwrap() };
            assert_eq!(parsed.to_string(), text);
        }
    }

    #[test]
    fn each_reason_not_to_have_a_cpu_has_its_own_error() {
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        let facts = |cpu: usize| Facts { cpu: Cpu(cpu), nohz_full: cpu == 3, isolated: None };
        let judge = |cpu: usize| super::judge(facts(cpu), list("0-7"), list("0-3,5"), list("0-1"));
        assert_eq!(judge(1), Ok(()));
        assert_eq!(judge(3), Ok(()), "taken out of the affinity on purpose");
        assert_eq!(judge(8), Err(CpuError::NoSuchCpu { cpu: Cpu(8), present: list("0-7") }));
        assert_eq!(judge(4), Err(CpuError::Offline { cpu: Cpu(4), online: list("0-3,5") }));
        assert_eq!(judge(5), Err(CpuError::NotOurs { cpu: Cpu(5), allowed: list("0-1") }));
        let said = judge(4).unwrap_err().to_string();
        assert!(said.contains("0-3,5") && said.contains("/sys/devices/system/cpu/cpu4/online"), "{said}");
    }

    #[test]
    fn a_name_cannot_hide_a_runnable_thread() {
        let stat = |name: &str, state: &str, cpu: usize| {
            let zeros = ["0"; 35].join(" ");
            format!("7 ({name}) {state} {zeros} {cpu} 0 0")
        };
        assert_eq!(runnable_on(&stat("a b) S 1", "R", 3), Cpu(3)).as_deref(), Some("a b) S 1"));
        assert_eq!(runnable_on(&stat("x", "S", 3), Cpu(3)), None);
        assert_eq!(runnable_on(&stat("x", "R", 2), Cpu(3)), None);
        assert_eq!(runnable_on("", Cpu(0)), None);
    }

    #[test]
    fn the_mount_of_cgroup_v2_is_found_among_others() {
        let mounts = "25 1 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      26 25 0:2 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2("25 1 0:1 / /x rw - cgroup cgroup rw\n"), None);
    }
}
