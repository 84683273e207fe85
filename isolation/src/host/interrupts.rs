//! Checks of where interrupts and deferred kernel work go.

use super::{Change, Context, CpuSet, Finding, Fix, Form};

pub(super) fn default_affinity(context: &Context<'_>) -> Finding {
    let path = "/proc/irq/default_smp_affinity";
    let wanted = format!("none of {}", context.cpus);
    match context.mask(path) {
        Err(finding) => finding,
        Ok(None) => Finding::not_applicable("this kernel has no default affinity"),
        Ok(Some(set)) => away(context, path, &set).unless_good(|finding| {
            let housekeeping = &context.housekeeping;
            if housekeeping.is_empty() {
                finding
            } else {
                finding.boot(format!("irqaffinity={housekeeping}"))
            }
        }),
    }
    .wanted(wanted)
}

pub(super) fn workqueues(context: &Context<'_>) -> Finding {
    let path = "/sys/devices/virtual/workqueue/cpumask";
    match context.mask(path) {
        Err(finding) => finding,
        Ok(None) => Finding::not_applicable("this kernel does not let unbound workqueues be moved"),
        Ok(Some(set)) => away(context, path, &set),
    }
    .wanted(format!("none of {}", context.cpus))
}

/// What to do when there is nowhere to move work to.
pub(super) const NOWHERE: &str = "leave at least one online CPU out of the list, for housekeeping";

/// A mask that should have none of the workers' CPUs.
fn away(context: &Context<'_>, path: &str, set: &CpuSet) -> Finding {
    let found = if set.is_empty() { "no CPU".to_owned() } else { set.to_string() };
    let rest = rest(context, set);
    Finding::good_if(context.disturbed(set).is_none(), found).unless_good(|finding| {
        if rest.is_empty() {
            finding.advice(NOWHERE)
        } else {
            finding.change(Form::Mask, path, rest.to_mask())
        }
    })
}

/// What is left of a set without the workers' CPUs; housekeeping, when nothing is left.
pub(super) fn rest(context: &Context<'_>, set: &CpuSet) -> CpuSet {
    let rest = set.and(&context.housekeeping);
    if rest.is_empty() { context.housekeeping.clone() } else { rest }
}

pub(super) fn irqs(context: &Context<'_>) -> Finding {
    let wanted = format!("none delivered to {}", context.cpus);
    let numbers: Vec<String> = context
        .host
        .list("/proc/irq")
        .into_iter()
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .collect();
    if numbers.is_empty() {
        return Finding::not_applicable("this host shows no IRQs").wanted(wanted);
    }
    let (mut here, mut may, mut fixes) = (Vec::new(), 0usize, Vec::new());
    for irq in &numbers {
        let directory = format!("/proc/irq/{irq}");
        // Without a handler it interrupts nobody; a handler has a directory of its own.
        let handlers: Vec<String> = context
            .host
            .list(&directory)
            .into_iter()
            .filter(|name| context.host.is_dir(&format!("{directory}/{name}")))
            .collect();
        let path = format!("{directory}/smp_affinity_list");
        let allowed = match context.list(&path) {
            Err(finding) => return finding.wanted(wanted),
            Ok(None) => continue,
            Ok(Some(set)) => set,
        };
        // Where the controller delivers it now; one CPU out of the allowed ones on x86.
        let effective = match context.list(&format!("{directory}/effective_affinity_list")) {
            Err(finding) => return finding.wanted(wanted),
            Ok(set) => set.filter(|set| !set.is_empty()).unwrap_or_else(|| allowed.clone()),
        };
        if handlers.is_empty() || context.disturbed(&allowed.or(&effective)).is_none() {
            continue;
        }
        if context.disturbed(&effective).is_some() {
            here.push(format!("{irq} ({})", handlers.join(", ")));
        } else {
            may += 1;
        }
        let rest = rest(context, &allowed);
        if !rest.is_empty() {
            fixes.push(Fix::Change(Change { path, content: rest.to_string(), form: Form::List }));
        }
    }
    let mut found = match here.len() {
        0 => format!("none of {} IRQs is delivered there", numbers.len()),
        n => {
            let more = if n > 4 { format!(" and {} more", n - 4) } else { String::new() };
            format!("{n} of {} IRQs: {}{more}", numbers.len(), here[..n.min(4)].join(", "))
        }
    };
    if may > 0 {
        found.push_str(&format!("; {may} more may be moved there"));
    }
    let mut finding = Finding::good_if(here.is_empty(), found).wanted(wanted);
    // Also those that only may come: nothing then moves them there later.
    finding.fix = fixes;
    finding.unless_good(|finding| {
        finding
            .boot(format!("isolcpus=managed_irq,domain,{}", context.cpus))
            .advice("stop irqbalance, or name the CPUs in its IRQBALANCE_BANNED_CPULIST; IRQs that their driver manages move only by isolcpus=managed_irq")
    })
}
