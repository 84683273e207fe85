//! Checks of timers and clocks.

use super::{Context, CpuSet, Finding, Form, Found};

pub(super) fn watchdog(context: &Context<'_>) -> Finding {
    let wanted = format!("off, or not on {}", context.cpus);
    let mut found = Vec::new();
    let mut on = false;
    for name in ["watchdog", "nmi_watchdog", "soft_watchdog"] {
        match context.number(&format!("/proc/sys/kernel/{name}")) {
            Err(finding) => return finding.wanted(wanted),
            Ok(None) => {}
            Ok(Some(value)) => {
                // `watchdog` is the switch for both others.
                on |= value != 0 && name != "watchdog";
                found.push((name, value));
            }
        }
    }
    if found.is_empty() {
        return Finding::not_applicable("this kernel has no lockup watchdogs").wanted(wanted);
    }
    if let [("watchdog", value)] = found[..] {
        on = value != 0;
    }
    let path = "/proc/sys/kernel/watchdog_cpumask";
    let cpus = match context.list(path) {
        Err(finding) => return finding.wanted(wanted),
        Ok(cpus) => cpus,
    };
    let mut text: Vec<String> = found.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if let Some(cpus) = &cpus {
        text.push(format!("watchdog_cpumask={cpus}"));
    }
    let everywhere = context.online.clone();
    let disturbed = on && context.disturbed(cpus.as_ref().unwrap_or(&everywhere)).is_some();
    Finding::good_if(!disturbed, text.join(" "))
        .unless_good(|finding| {
            let finding = finding.boot("nowatchdog");
            // The watchdogs may go on elsewhere.
            let rest = cpus.map_or_else(CpuSet::new, |cpus| super::interrupts::rest(context, &cpus));
            if rest.is_empty() {
                finding.change(Form::Number, "/proc/sys/kernel/watchdog", "0")
            } else {
                finding.change(Form::List, path, rest.to_string())
            }
        })
        .wanted(wanted)
}

pub(super) fn timer_migration(context: &Context<'_>) -> Finding {
    context.setting(
        "/proc/sys/kernel/timer_migration",
        "1",
        |on| on == 1,
        "1",
        "this kernel does not migrate timers",
    )
}

pub(super) fn clocksource(context: &Context<'_>) -> Finding {
    let directory = "/sys/devices/system/clocksource/clocksource0";
    let path = format!("{directory}/current_clocksource");
    let wanted = "tsc";
    if !x86(context) {
        return Finding::not_applicable("only x86 has a TSC").wanted(wanted);
    }
    match context.host.read(&path) {
        Found::Unreadable(why) => Finding::unreadable(&path, &why),
        Found::Missing => Finding::cannot("no clocksource is shown").advice("mount sysfs: mount -t sysfs sysfs /sys"),
        Found::Text(current) if current == wanted => Finding::good(current),
        Found::Text(current) => {
            let available = context.host.text(&format!("{directory}/available_clocksource")).unwrap_or_default();
            let finding = Finding::cannot(super::brief(&current)).boot("tsc=reliable");
            if available.split_whitespace().any(|name| name == wanted) {
                finding.change(Form::Word, path, wanted)
            } else {
                finding.advice("the kernel has given the TSC up: see 'dmesg | grep -i tsc' for the reason; in a virtual machine ask the host for an invariant TSC")
            }
        }
    }
    .wanted(wanted)
}

fn flags(context: &Context<'_>) -> Option<Vec<String>> {
    let info = context.host.text("/proc/cpuinfo")?;
    let line =
        info.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':').map(|(_, flags)| flags))?;
    Some(line.split_whitespace().map(str::to_owned).collect())
}

/// Only x86 has a line of "flags"; arm64 calls them "Features".
fn x86(context: &Context<'_>) -> bool {
    flags(context).is_some()
}

pub(super) fn tsc(context: &Context<'_>) -> Finding {
    let wanted = "constant_tsc, nonstop_tsc, and tsc_reliable or tsc=reliable";
    let Some(flags) = flags(context) else {
        return Finding::not_applicable("no x86 flags in /proc/cpuinfo").wanted(wanted);
    };
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let missing: Vec<&str> = ["constant_tsc", "nonstop_tsc"].into_iter().filter(|flag| !has(flag)).collect();
    if !missing.is_empty() {
        return Finding::warning(format!("without {}", missing.join(" and ")))
            .wanted(wanted)
            .advice("the TSC of this CPU stops or changes its rate: fix the frequency and forbid deep C-states, or use another host; in a virtual machine ask its host for an invariant TSC");
    }
    // arch/x86/kernel/tsc.c, check_system_tsc_reliable; tsc_sync.c, start_sync_check_timer.
    let mut found = "constant_tsc, nonstop_tsc".to_owned();
    for (what, have) in
        [("tsc_reliable", has("tsc_reliable")), ("tsc=reliable", context.boot("tsc") == Some("reliable"))]
    {
        if have {
            found.push_str(", ");
            found.push_str(what);
            return Finding::good(found).wanted(wanted);
        }
    }
    Finding::warning(found).wanted(wanted).boot("tsc=reliable")
}

pub(super) fn mce(context: &Context<'_>) -> Finding {
    // The files of all CPUs show one and the same number (arch/x86/kernel/cpu/mce/core.c).
    let directory = "/sys/devices/system/machinecheck";
    let first = context.host.list(directory).into_iter().find(|name| name.starts_with("machinecheck"));
    let path = format!("{directory}/{}/check_interval", first.unwrap_or_else(|| "machinecheck0".to_owned()));
    context.setting(&path, "0", |seconds| seconds == 0, "0", "this host does not poll for machine checks")
}

pub(super) fn stat_interval(context: &Context<'_>) -> Finding {
    let path = "/proc/sys/vm/stat_interval";
    let wanted = "at least 60 s";
    // mm/vmstat.c, vmstat_shepherd: in 6.12 it leaves isolated CPUs out.
    let isolated = super::boot::kept_apart(context).map(|(set, _)| set).unwrap_or_default();
    let skipped =
        context.kernel.is_some_and(|kernel| kernel >= (6, 12)) && context.cpus.without(&isolated).is_empty();
    if skipped && let Ok(Some(seconds)) = context.number(path) {
        return Finding::good(format!("{seconds} s; this kernel leaves isolated CPUs out")).wanted(wanted);
    }
    context.setting(path, wanted, |seconds| seconds >= 60, "120", "this kernel keeps no such statistics")
}
