//! Checks of the machine and of what its kernel can do for isolation.

use super::memory::capabilities;
use super::{Answer, Context, Finding, Form};

pub(super) fn virtual_machine(context: &Context<'_>) -> Finding {
    let wanted = "bare metal, or CPUs of the host for this machine alone";
    let cpuinfo = context.host.text("/proc/cpuinfo").unwrap_or_default();
    let flagged = cpuinfo
        .lines()
        .filter_map(|line| line.strip_prefix("flags"))
        .any(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"));
    let xen = context.host.text("/sys/hypervisor/type");
    let asked = context.host.answers().hypervisor.as_ref();
    if !flagged && xen.is_none() && asked.is_none() {
        return if cpuinfo.is_empty() {
            Finding::not_applicable("nothing says whether this is a virtual machine")
        } else {
            Finding::good("no hypervisor")
        }
        .wanted(wanted);
    }
    let mut found = vec![match (asked, xen) {
        (Some(hypervisor), _) => format!("a virtual machine ({})", super::brief(&hypervisor.signature)),
        (None, Some(name)) => format!("a virtual machine ({})", super::brief(&name)),
        (None, None) => "a virtual machine".to_owned(),
    }];
    if asked.is_some_and(|hypervisor| hypervisor.pv_tlb_flush) {
        found.push("TLB flushes are paravirtual".to_owned());
    }
    if let Some(stolen) = stolen(context) {
        found.push(format!("{stolen} ms stolen from its CPUs since boot"));
    }
    Finding::warning(found.join(", ")).wanted(wanted).advice(
        "measure the gaps; have the host pin each virtual CPU to a core of its own and keep its other work away \
         (libvirt: vcpupin, emulatorpin), and show the guest an invariant TSC",
    )
}

/// Time that the host gave to others, in milliseconds: field 8 of the lines of /proc/stat, in ticks of 10 ms.
fn stolen(context: &Context<'_>) -> Option<u64> {
    let stat = context.host.text("/proc/stat")?;
    let line = stat.lines().find(|line| line.starts_with("cpu "))?;
    line.split_whitespace().nth(8)?.parse::<u64>().ok()?.checked_mul(10)
}

pub(super) fn iommu(context: &Context<'_>) -> Finding {
    let wanted = "an IOMMU with groups and interrupt remapping";
    let units = context.host.list("/sys/class/iommu");
    let groups = context.host.list("/sys/kernel/iommu_groups");
    // The chips of remapped interrupts are called IR-IO-APIC, IR-PCI-MSI, ... on x86.
    let remapped = context
        .host
        .text("/proc/interrupts")
        .is_some_and(|text| text.split_whitespace().any(|word| word.starts_with("IR-")));
    let cpuinfo = context.host.text("/proc/cpuinfo").unwrap_or_default();
    let parameter = if cpuinfo.contains("AuthenticAMD") { "amd_iommu=on" } else { "intel_iommu=on" };
    let advise = |finding: Finding| {
        finding.boot(parameter).boot("iommu=pt").advice(
            "switch the IOMMU on in the firmware (VT-d, AMD-Vi, SMMU), or have the host of a virtual machine provide one; \
             without VFIO ports there is nothing to do",
        )
    };
    let found = match (units.len(), groups.len()) {
        (0, 0) => "none".to_owned(),
        (units, groups) => {
            let with = if remapped { "with" } else { "without" };
            format!("{units} units, {groups} groups, {with} interrupt remapping")
        }
    };
    // Remapping has this name on x86 only; elsewhere groups are what can be seen.
    let x86 = cpuinfo.lines().any(|line| line.starts_with("flags"));
    Finding::good_if(!groups.is_empty() && (remapped || !x86), found).unless_good(advise).wanted(wanted)
}

pub(super) fn task_isolation(context: &Context<'_>) -> Finding {
    let wanted = "a kernel with task isolation";
    match &context.host.answers().task_isolation {
        Answer::Yes => Finding::good("with task isolation"),
        Answer::No(_) => Finding::not_applicable("a stock kernel: the backend is dispatch"),
        Answer::Unknown => Finding::not_applicable("the kernel was not asked"),
    }
    .wanted(wanted)
}

pub(super) fn syscall_dispatch(context: &Context<'_>) -> Finding {
    let wanted = "syscall user dispatch";
    let answers = context.host.answers();
    match &answers.syscall_dispatch {
        Answer::Yes => Finding::good("present"),
        Answer::Unknown => Finding::not_applicable("the kernel was not asked"),
        Answer::No(error) => {
            let found = format!("absent: {error}");
            let finding = if answers.task_isolation == Answer::Yes {
                Finding::warning(found)
            } else {
                Finding::cannot(found)
            };
            finding.advice("boot Linux 5.13 or later on x86-64, or a kernel with task isolation")
        }
    }
    .wanted(wanted)
}

pub(super) fn perf(context: &Context<'_>) -> Finding {
    // Bits of CAP_SYS_ADMIN and CAP_PERFMON (include/uapi/linux/capability.h).
    let allowed = capabilities(context).is_some_and(|set| set & (1 << 21 | 1 << 38) != 0);
    let path = "/proc/sys/kernel/perf_event_paranoid";
    let wanted = "at most 2, or CAP_PERFMON";
    match context.number(path) {
        Err(finding) => finding,
        Ok(None) => Finding::warning("a kernel without performance events")
            .advice("boot a kernel that is built with CONFIG_PERF_EVENTS=y"),
        Ok(Some(level)) if allowed => Finding::good(format!("{level}, with CAP_PERFMON or CAP_SYS_ADMIN")),
        Ok(Some(level)) => Finding::good_if(level <= 2, level.to_string()).unless_good(|finding| {
            finding.change(Form::Number, path, "2").advice("or: setcap cap_perfmon+ep PROGRAM")
        }),
    }
    .wanted(wanted)
}

pub(super) fn tracefs(context: &Context<'_>) -> Finding {
    let wanted = "readable";
    let directory = "/sys/kernel/tracing";
    // Mounted inside debugfs on kernels before 4.1, and by habit later.
    for root in [directory, "/sys/kernel/debug/tracing"] {
        // Linux 6.4 (include/trace/events/ipi.h); before that only some architectures.
        match context.number(&format!("{root}/events/ipi/ipi_send_cpu/id")) {
            Ok(Some(_)) => return Finding::good(format!("readable at {root}")).wanted(wanted),
            Err(finding) => return finding.wanted(wanted),
            Ok(None) => {}
        }
        if context.host.is_dir(&format!("{root}/events")) {
            return Finding::warning(format!("readable at {root}, without ipi_send_cpu"))
                .wanted(wanted)
                .advice("the sender of an IPI can be named from Linux 6.4 on");
        }
    }
    if !context.host.is_dir(directory) {
        return Finding::not_applicable("this kernel has no tracefs").wanted(wanted);
    }
    Finding::warning("not mounted, or not ours to read")
        .wanted(wanted)
        .advice("as root: mount -t tracefs nodev /sys/kernel/tracing")
}
