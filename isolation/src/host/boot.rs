//! Checks of what is decided at boot: which CPUs the kernel leaves alone.

use super::{Context, CpuSet, Finding};

/// Where the kernel keeps CPUs out of the scheduler's domains: the set, and what made it.
pub(super) fn kept_apart(context: &Context<'_>) -> Result<(CpuSet, &'static str), Finding> {
    let boot = context.list("/sys/devices/system/cpu/isolated")?.unwrap_or_default();
    let mut partitions = CpuSet::new();
    for mount in MOUNTS {
        // Linux 6.7; the root cgroup has it.
        match context.list(&format!("{mount}/cpuset.cpus.isolated"))? {
            Some(set) => partitions = partitions.or(&set),
            None => partitions = partitions.or(&isolated_below(context, mount, 0)?),
        }
    }
    let by = match (boot.is_empty(), partitions.is_empty()) {
        (true, true) => "none",
        (false, true) => "isolcpus",
        (true, false) => "cpuset partition",
        (false, false) => "isolcpus and cpuset partition",
    };
    Ok((boot.or(&partitions), by))
}

/// Where cgroup v2 is mounted: alone, or beside version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// The CPUs of isolated partitions below a cgroup, on kernels that do not sum them up. Partitions hang
/// below the root or below other partitions, so a few levels are enough.
fn isolated_below(context: &Context<'_>, group: &str, depth: u32) -> Result<CpuSet, Finding> {
    let mut all = CpuSet::new();
    for name in context.host.list(group) {
        let child = format!("{group}/{name}");
        let Some(kind) = context.host.text(&format!("{child}/cpuset.cpus.partition")) else { continue };
        // An invalid one is written as "isolated invalid (REASON)".
        if kind == "isolated" {
            all = all.or(&context.list(&format!("{child}/cpuset.cpus.effective"))?.unwrap_or_default());
        }
        if depth < 4 {
            all = all.or(&isolated_below(context, &child, depth + 1)?);
        }
    }
    Ok(all)
}

fn named(set: &CpuSet) -> String {
    if set.is_empty() { "no CPU".to_owned() } else { set.to_string() }
}

pub(super) fn cpus(context: &Context<'_>) -> Finding {
    let path = "/sys/devices/system/cpu/online";
    let wanted = format!("{} online, and a CPU for housekeeping", context.cpus);
    match context.list(path) {
        Err(finding) => return finding.wanted(wanted),
        Ok(None) => {
            let finding = Finding::warning(format!("{path} is missing")).wanted(wanted);
            return finding.advice("mount sysfs: mount -t sysfs sysfs /sys");
        }
        Ok(Some(_)) => {}
    }
    let absent = context.cpus.without(&context.online);
    let found =
        format!("{} online; housekeeping on {}", named(&context.online), named(&context.housekeeping));
    if !absent.is_empty() {
        let mut finding = Finding::cannot(format!("{found}; {absent} not online"));
        for cpu in absent.iter() {
            let switch = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            finding = if context.host.exists(&switch) {
                finding.advice(format!("echo 1 > {switch}"))
            } else {
                finding.advice(format!(
                    "there is no CPU {cpu} on this host: choose among {}",
                    named(&context.online)
                ))
            };
        }
        return finding.wanted(wanted);
    }
    if context.cpus.is_empty() || context.housekeeping.is_empty() {
        return Finding::cannot(found)
            .wanted(wanted)
            .advice("leave at least one CPU out of the list; a host with one CPU cannot isolate any");
    }
    Finding::good(found).wanted(wanted)
}

pub(super) fn nohz_full(context: &Context<'_>) -> Finding {
    let wanted = format!("at least {}", context.cpus);
    let parameter = format!("nohz_full={}", context.cpus);
    match context.list("/sys/devices/system/cpu/nohz_full") {
        Err(finding) => finding,
        Ok(None) => Finding::cannot("a kernel that cannot stop the tick")
            .advice("boot a kernel that is built with CONFIG_NO_HZ_FULL=y")
            .boot(parameter),
        Ok(Some(set)) if context.cpus.without(&set).is_empty() => Finding::good(named(&set)),
        Ok(Some(set)) => Finding::cannot(named(&set)).boot(parameter),
    }
    .wanted(wanted)
}

pub(super) fn scheduler(context: &Context<'_>) -> Finding {
    let cpus = context.cpus;
    let wanted = format!("at least {cpus}");
    let finding = match kept_apart(context) {
        Err(finding) => finding,
        Ok((set, by)) if cpus.without(&set).is_empty() => Finding::good(format!("{set} ({by})")),
        Ok((set, _)) => Finding::cannot(named(&set)).boot(format!("isolcpus=managed_irq,domain,{cpus}")).advice(format!(
            "or, with cgroup v2 and until the next boot: echo +cpuset > /sys/fs/cgroup/cgroup.subtree_control; \
             mkdir /sys/fs/cgroup/isoplane; echo {cpus} > /sys/fs/cgroup/isoplane/cpuset.cpus; \
             echo isolated > /sys/fs/cgroup/isoplane/cpuset.cpus.partition; start the program in that group"
        )),
    };
    finding.wanted(wanted)
}

pub(super) fn rcu_nocbs(context: &Context<'_>) -> Finding {
    let cpus = context.cpus;
    let wanted = format!("at least {cpus}");
    // The callbacks of nohz_full CPUs are always offloaded (kernel/rcu/tree_nocb.h, rcu_init_nohz).
    let nohz_full = match context.list("/sys/devices/system/cpu/nohz_full") {
        Err(finding) => return finding.wanted(wanted),
        Ok(set) => set.unwrap_or_default(),
    };
    let parameter = context.boot("rcu_nocbs").unwrap_or_default();
    let Ok(given) = CpuSet::parse_list(parameter, context.last) else {
        return Finding::malformed("rcu_nocbs= in /proc/cmdline", parameter)
            .wanted(wanted)
            .boot(format!("rcu_nocbs={cpus}"));
    };
    let all = given.or(&nohz_full);
    Finding::good_if(cpus.without(&all).is_empty(), named(&all))
        .unless_good(|finding| finding.boot(format!("rcu_nocbs={cpus}")))
        .wanted(wanted)
}
