//! What others see of a CPU: entries into its kernel, by the kernel's own counters and by tracing.
//!
//! Contract: reading what was seen sends no interrupt to the CPU and takes no lock of it. Switching the witness
//! on and off changes the text of the kernel, of which every CPU is told by an interrupt: do both while nobody
//! there minds. Needs root, and tracefs at `/sys/kernel/tracing`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

const TRACEFS: &str = "/sys/kernel/tracing";
/// Between them, all ways in: calls, exceptions, interrupts of all kinds, NMIs; and the scheduler.
const EVENTS: [&str; 6] =
    ["raw_syscalls/sys_enter", "exceptions", "irq_vectors", "irq", "nmi", "sched/sched_switch"];

/// Watches one CPU, until it is dropped.
#[derive(Debug)]
pub struct CpuWitness {
    cpu: u32,
    /// A directory of tracefs of our own.
    instance: PathBuf,
    before: Entries,
}

/// What happened on a CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// Events that tracing saw.
    pub traced: u64,
    /// Interrupts by their name in `/proc/interrupts`, those that came.
    pub interrupts: BTreeMap<String, u64>,
}

impl Entries {
    /// Interrupts of all kinds.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.interrupts.values().sum()
    }
}

impl CpuWitness {
    /// Begins to watch.
    ///
    /// # Errors
    /// What could not be read or written, by its path.
    pub fn of(cpu: u32) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let instance = Path::new(TRACEFS).join(format!("instances/isoplane-{}-{number}", std::process::id()));
        named(&instance, fs::create_dir(&instance))?;
        let mut witness = Self { cpu, instance, before: Entries::default() };
        witness.write("tracing_cpumask", &mask(cpu))?;
        for event in EVENTS {
            let path = format!("events/{event}");
            // Not every machine has every kind.
            if witness.instance.join(&path).exists() {
                witness.write(&format!("{path}/enable"), "1")?;
            }
        }
        witness.before = witness.now()?;
        Ok(witness)
    }

    /// Forgets what was seen so far.
    ///
    /// # Errors
    /// As [`CpuWitness::of`].
    pub fn forget(&mut self) -> io::Result<()> {
        self.before = self.now()?;
        Ok(())
    }

    /// What happened since.
    ///
    /// # Errors
    /// As [`CpuWitness::of`].
    pub fn seen(&self) -> io::Result<Entries> {
        let now = self.now()?;
        let came = |(name, count): (String, u64)| {
            let before = self.before.interrupts.get(&name).copied().unwrap_or_default();
            Some((name, count.checked_sub(before)?)).filter(|(_, n)| *n > 0)
        };
        Ok(Entries {
            traced: now.traced.saturating_sub(self.before.traced),
            interrupts: now.interrupts.into_iter().filter_map(came).collect(),
        })
    }

    /// What tracing has to tell, at most so many lines of the last.
    ///
    /// # Errors
    /// As [`CpuWitness::of`].
    pub fn trace(&self, lines: usize) -> io::Result<String> {
        let path = self.instance.join(format!("per_cpu/cpu{}/trace", self.cpu));
        let text = named(&path, fs::read_to_string(&path))?;
        let all: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        Ok(all[all.len().saturating_sub(lines)..].join("\n"))
    }

    fn now(&self) -> io::Result<Entries> {
        let stats = self.instance.join(format!("per_cpu/cpu{}/stats", self.cpu));
        let text = named(&stats, fs::read_to_string(&stats))?;
        let of = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            line.and_then(|count| count.trim().parse::<u64>().ok())
        };
        // What was written over counts, too.
        let kinds = ["entries", "overrun", "dropped events"].map(of);
        let traced = kinds.iter().flatten().sum();
        if kinds[0].is_none() {
            return Err(io::Error::other(format!("{}: no count of entries", stats.display())));
        }
        let path = Path::new("/proc/interrupts");
        let table = named(path, fs::read_to_string(path))?;
        let interrupts = column(&table, self.cpu)
            .ok_or_else(|| io::Error::other(format!("/proc/interrupts: no CPU {}", self.cpu)))?;
        Ok(Entries { traced, interrupts })
    }

    fn write(&self, name: &str, value: &str) -> io::Result<()> {
        let path = self.instance.join(name);
        named(&path, fs::write(&path, value))
    }
}

impl Drop for CpuWitness {
    fn drop(&mut self) {
        // Events go off with it. Should that fail, it says nothing to anybody.
        if let Err(error) = fs::remove_dir(&self.instance) {
            tracing::error!("{} stays: {error}", self.instance.display());
        }
    }
}

fn named<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The kernel's notation of a set with one CPU: words of 32 bits in hexadecimal, the highest first.
fn mask(cpu: u32) -> String {
    let mut text = format!("{:x}", 1_u32 << (cpu % 32));
    for _ in 0..cpu / 32 {
        text.push_str(",00000000");
    }
    text
}

/// The CPU's counts in a table like `/proc/interrupts`.
fn column(table: &str, cpu: u32) -> Option<BTreeMap<String, u64>> {
    let mut lines = table.lines();
    let at = lines.next()?.split_whitespace().position(|name| name == format!("CPU{cpu}"))?;
    let row = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        // Some rows have one count, of no CPU.
        Some((name.trim().to_owned(), counts.split_whitespace().nth(at)?.parse().ok()?))
    };
    Some(lines.filter_map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_words() {
        assert_eq!(mask(0), "1");
        assert_eq!(mask(3), "8");
        assert_eq!(mask(33), "2,00000000");
    }

    #[test]
    fn columns_are_those_of_the_cpu() {
        let table = "           CPU0       CPU2\n  0:   7   9  IO-APIC  2-edge  timer\nLOC:  1  2  Local\n\
                     ERR:          3\n";
        let counts = column(table, 2).unwrap();
        assert_eq!(counts.into_iter().collect::<Vec<_>>(), [("0".into(), 9), ("LOC".into(), 2)]);
        assert!(column(table, 1).is_none());
    }
}
