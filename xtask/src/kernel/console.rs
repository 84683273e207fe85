//! The guest kernel's console: what it complains about.

use super::tools::tail;

/// What a kernel prints when something is wrong with it, and never otherwise.
const COMPLAINTS: [&str; 14] = [
    "WARNING: ",
    "BUG: ",
    "Oops: ",
    "Kernel panic - not syncing",
    "general protection fault",
    "INFO: task ",
    "INFO: rcu",
    "rcu: INFO: ",
    "INFO: possible ",
    "INFO: trying to register non-static key",
    "UBSAN: ",
    "suspicious RCU usage",
    "new suspected memory leaks",
    "watchdog: BUG",
];

/// The first lines that say that something is wrong, and as much of what follows as explains it.
pub(crate) fn complaint(console: &str) -> Option<String> {
    let lines: Vec<&str> = console.lines().collect();
    let first = lines.iter().position(|line| COMPLAINTS.iter().any(|text| line.contains(text)))?;
    Some(lines[first..].iter().take(60).copied().collect::<Vec<_>>().join("\n"))
}

/// The end of the console, or why there is none.
pub(crate) fn end(console: &str) -> String {
    match tail(console, 40) {
        text if text.trim().is_empty() => "(the kernel printed nothing)".to_owned(),
        text => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_with_what_explains_them() {
        for line in [
            "[    1.0] WARNING: CPU: 1 PID: 33 at kernel/x.c:12 f+0x12/0x20",
            "[    1.0] BUG: sleeping function called from invalid context at mm/x.c:3",
            "[    1.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[    1.0] WARNING: possible circular locking dependency detected",
            "[    1.0] BUG: KASAN: slab-use-after-free in f+0x1/0x2",
            "[    1.0] kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "[    1.0] Kernel panic - not syncing: Attempted to kill init!",
        ] {
            let found = complaint(&format!("[    0.0] Linux\n{line}\n[    1.0] Call Trace:\n"));
            assert_eq!(found, Some(format!("{line}\n[    1.0] Call Trace:")));
        }
    }

    #[test]
    fn ordinary_chatter_is_none() {
        let chatter = "[    0.0] RCU restricting CPUs\n[    0.1] Warning: unsafe module parameter\n\
                       [    0.2] rcu: Hierarchical RCU implementation.\n[    0.3] debug: unmapping init memory";
        assert_eq!(complaint(chatter), None);
        assert_eq!(end(""), "(the kernel printed nothing)");
    }
}
