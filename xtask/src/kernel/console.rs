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

/// The scheduler's complaint that the housekeeping CPU looked after an isolated one more than 3 s late (Linux 6.12,
/// kernel/sched/core.c). That CPU is a thread of QEMU: a host with other things to do can keep it for as long.
const LATE: &str = " sched_tick_remote+";

/// The first lines that say that something is wrong, and as much of what follows as explains it.
pub(crate) fn complaint(console: &str) -> Option<String> {
    let lines: Vec<&str> = console.lines().collect();
    let complains = |line: &&str| COMPLAINTS.iter().any(|text| line.contains(text)) && !line.contains(LATE);
    let first = lines.iter().position(complains)?;
    Some(lines[first..].iter().take(60).copied().collect::<Vec<_>>().join("\n"))
}

/// Did the emulator run a breakpoint that was no longer there?
///
/// The kernel changes its own code with the help of a breakpoint (int3, 0xcc), and interrupts all CPUs before it forgets
/// of it. QEMU with a thread for each CPU (seen with 7.2, now and then when the host is busy) may still run what it
/// translated before; the kernel, which knows of no breakpoint there, dies of it. What tells this from a breakpoint
/// that a kernel left behind is that memory holds another instruction by then.
pub(crate) fn stale_breakpoint(console: &str) -> bool {
    let Some((_, after)) = console.split_once("Oops: int3: ") else { return false };
    let code = after.lines().find_map(|line| line.split_once("Code: ").map(|(_, code)| code));
    let before =
        code.and_then(|code| code.split_once(" <")).and_then(|(before, _)| before.rsplit(' ').next());
    before.is_some_and(|byte| byte.len() == 2 && byte != "cc")
}

/// Did init give up because the emulator was too slow for the kernel to find out how fast its local timer is?
pub(crate) fn timer_not_calibrated(console: &str) -> bool {
    console.contains("guest init: the local timer was not calibrated")
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
    fn a_breakpoint_that_is_gone_is_the_emulators() {
        let oops = |bytes: &str| {
            format!(
                "Linux\nOops: int3: 0000 [#1] PREEMPT SMP NOPTI\nCPU: 0 UID: 0\nRIP: 0010:__schedule+0x269/0x890\n\
                 Code: 48 29 c2 {bytes} 02 00 00\nRSP: 0018:ff\n"
            )
        };
        assert!(stale_breakpoint(&oops("e9 <6e>")));
        assert!(stale_breakpoint(&oops("66 <90>")));
        assert!(!stale_breakpoint(&oops("cc <6e>")));
        assert!(!stale_breakpoint(&oops("cc 6e")));
        assert!(!stale_breakpoint(&oops("e9 <6e>").replace("int3", "general protection fault")));
        assert!(!stale_breakpoint("Oops: int3: 0000"));
    }

    #[test]
    fn a_late_remote_tick_is_the_hosts() {
        let late =
            "[    9.0] WARNING: CPU: 0 PID: 44 at kernel/sched/core.c:5740 sched_tick_remote+0x17f/0x1b0";
        assert_eq!(complaint(late), None);
        let more = format!("{late}\n[    9.1] BUG: bad");
        assert_eq!(complaint(&more).as_deref(), Some("[    9.1] BUG: bad"));
    }

    #[test]
    fn ordinary_chatter_is_none() {
        let chatter = "[    0.0] RCU restricting CPUs\n[    0.1] Warning: unsafe module parameter\n\
                       [    0.2] rcu: Hierarchical RCU implementation.\n[    0.3] debug: unmapping init memory";
        assert_eq!(complaint(chatter), None);
        assert_eq!(end(""), "(the kernel printed nothing)");
    }
}
