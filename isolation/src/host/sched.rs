//! Checks of the scheduler: limits for real-time threads, and who else runs.

use super::{Change, Context, Finding, Fix, Form};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub(super) fn rt_throttling(context: &Context<'_>) -> Finding {
    let path = "/proc/sys/kernel/sched_rt_runtime_us";
    // 6.12 replaced the throttling of real-time threads by the fair server (kernel/sched/rt.c), but for
    // kernels built with CONFIG_RT_GROUP_SCHED, which have such a file for each cgroup.
    let replaced = context.kernel.is_some_and(|kernel| kernel >= (6, 12))
        && !context.host.exists("/sys/fs/cgroup/cpu/cpu.rt_runtime_us");
    if replaced && let Ok(Some(runtime)) = context.number(path) {
        return Finding::good(format!("{runtime}; from Linux 6.12 it limits deadline threads only"))
            .wanted("-1 before Linux 6.12");
    }
    context.setting(path, "-1", |runtime| runtime == -1, "-1", "this kernel has no real-time throttling")
}

pub(super) fn fair_server(context: &Context<'_>) -> Finding {
    let wanted = "runtime 0, or workers under SCHED_FIFO";
    if context.kernel.is_some_and(|kernel| kernel < (6, 12)) {
        return Finding::not_applicable("kernels before 6.12 have no fair server").wanted(wanted);
    }
    let (mut found, mut fixes) = (Vec::new(), Vec::new());
    for cpu in context.cpus.iter() {
        let path = format!("/sys/kernel/debug/sched/fair_server/cpu{cpu}/runtime");
        match context.number(&path) {
            Err(finding) => return finding.wanted(wanted),
            Ok(None) => {}
            Ok(Some(runtime)) => {
                let text = format!("{runtime} ns");
                if !found.contains(&text) {
                    found.push(text);
                }
                if runtime != 0 {
                    fixes.push(Fix::Change(Change { path, content: "0".to_owned(), form: Form::Number }));
                }
            }
        }
    }
    if found.is_empty() {
        let finding = Finding::warning("not shown");
        return if context.host.exists("/sys/kernel/debug/sched") {
            finding.advice("this kernel does not let it be changed: run workers under SCHED_FIFO")
        } else {
            finding.advice("mount -t debugfs none /sys/kernel/debug; or run workers under SCHED_FIFO")
        }
        .wanted(wanted);
    }
    let mut finding =
        Finding::good_if(fixes.is_empty(), format!("runtime {}", found.join(", "))).wanted(wanted);
    finding.fix = fixes;
    finding
}

/// One look at a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Look {
    name: String,
    /// User and system time, in ticks of [`TICK`].
    ticks: u64,
    cpu: u32,
}

/// The unit of times in /proc (USER_HZ is 100 on every architecture that we know).
const TICK: Duration = Duration::from_millis(10);

/// Reads a line of /proc/PID/task/TID/stat; fields 2, 14, 15 and 39 of proc_pid_stat(5).
fn look(stat: &str) -> Option<Look> {
    // A name may hold anything, a parenthesis too.
    let (before, rest) = stat.rsplit_once(')')?;
    let (_, name) = before.split_once('(')?;
    let mut fields = rest.split_whitespace();
    // What follows the name begins with field 3.
    let user: u64 = fields.nth(14 - 3)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let cpu = fields.nth(39 - 16)?.parse().ok()?;
    Some(Look { name: super::brief(name), ticks: user.checked_add(system)?, cpu })
}

fn threads(context: &Context<'_>) -> BTreeMap<String, Look> {
    let number = |name: &String| name.bytes().all(|b| b.is_ascii_digit());
    let mut threads = BTreeMap::new();
    for process in context.host.list("/proc").into_iter().filter(number) {
        let directory = format!("/proc/{process}/task");
        for thread in context.host.list(&directory).into_iter().filter(number) {
            let stat = context.host.text(&format!("{directory}/{thread}/stat"));
            if let Some(look) = stat.and_then(|stat| look(&stat)) {
                threads.insert(thread, look);
            }
        }
    }
    threads
}

pub(super) fn neighbours(context: &Context<'_>) -> Finding {
    let wanted = "no thread that runs all the time on a housekeeping CPU";
    if context.sample.is_zero() {
        return Finding::not_applicable("not watched").wanted(wanted);
    }
    if context.housekeeping.is_empty() {
        return Finding::not_applicable("there is no housekeeping CPU").wanted(wanted);
    }
    let before = threads(context);
    if before.is_empty() {
        return Finding::not_applicable("this host does not show its threads").wanted(wanted);
    }
    let start = Instant::now();
    context.host.wait(context.sample);
    let elapsed = start.elapsed().max(context.sample);
    let after = threads(context);
    let all = (elapsed.as_nanos() / TICK.as_nanos()).max(1) as u64;
    let mut spinning = Vec::new();
    for (thread, now) in &after {
        let Some(then) = before.get(thread).filter(|then| then.name == now.name) else { continue };
        let here = context.housekeeping.contains(then.cpu) && context.housekeeping.contains(now.cpu);
        // Nine tenths: ticks are counted when they end, so the first and the last may be missing.
        if here && now.ticks.saturating_sub(then.ticks).saturating_mul(10) >= all * 9 {
            spinning.push((thread, now));
        }
    }
    if spinning.is_empty() {
        return Finding::good(format!("none of {} threads", after.len())).wanted(wanted);
    }
    let found: Vec<String> = spinning
        .iter()
        .map(|(thread, look)| format!("{} (thread {thread}) on CPU {}", look.name, look.cpu))
        .collect();
    let mut finding = Finding::warning(found.join(", ")).wanted(wanted);
    for (thread, look) in spinning {
        finding =
            finding.advice(format!("stop it, or move it off the kicker's CPU: taskset -pc {} {thread}", {
                let others: super::CpuSet =
                    context.housekeeping.iter().filter(|cpu| *cpu != look.cpu).collect();
                if others.is_empty() { "OTHER-CPU".to_owned() } else { others.to_string() }
            }));
    }
    finding
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_threads_line_is_read_by_its_last_parenthesis() {
        let rest = "R 1 2 3 4 5 6 7 8 9 10 140 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 3 40 41";
        assert_eq!(
            look(&format!("7 (a) b) {rest}")),
            Some(Look { name: "a) b".to_owned(), ticks: 155, cpu: 3 })
        );
        assert_eq!(look("7 (a) R 1 2"), None);
        assert_eq!(look(""), None);
    }

    proptest! {
        #[test]
        fn any_line_is_a_thread_or_none(line in "\\PC{0,200}|[0-9() ]{0,200}") {
            let _ = look(&line);
        }
    }
}
