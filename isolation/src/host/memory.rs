//! Checks of memory: what the kernel does to pages behind their owner's back.

use super::{Context, Finding, Form, Found};

/// Bit of `CAP_IPC_LOCK` in a set of capabilities (include/uapi/linux/capability.h).
const CAP_IPC_LOCK: u32 = 14;

/// The effective capabilities of the asking process.
pub(super) fn capabilities(context: &Context<'_>) -> Option<u64> {
    let status = context.host.text("/proc/self/status")?;
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

/// A size such as `HugePages_Free` or `MemAvailable` (in kB) from /proc/meminfo.
fn meminfo(context: &Context<'_>, name: &str) -> Option<u64> {
    let info = context.host.text("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

pub(super) fn hugepages(context: &Context<'_>) -> Finding {
    let directory = "/sys/kernel/mm/hugepages";
    let wanted = "free huge pages";
    let sizes = context.host.list(directory);
    if sizes.is_empty() {
        return Finding::not_applicable("this kernel has no huge pages").wanted(wanted);
    }
    let (mut found, mut free) = (Vec::new(), 0);
    for size in &sizes {
        let Some(size_kb) = size.strip_prefix("hugepages-").and_then(|size| size.strip_suffix("kB")) else {
            continue;
        };
        let count = |name: &str| context.number(&format!("{directory}/{size}/{name}"));
        match (count("free_hugepages"), count("nr_hugepages")) {
            (Err(finding), _) | (_, Err(finding)) => return finding.wanted(wanted),
            (Ok(Some(unused)), Ok(Some(all))) => {
                free += unused;
                found.push(format!("{unused} of {all} of {size_kb} kB free"));
            }
            _ => {}
        }
    }
    if found.is_empty() {
        return Finding::not_applicable("this kernel does not count huge pages").wanted(wanted);
    }
    Finding::good_if(free > 0, found.join(", ")).wanted(wanted).unless_good(|finding| {
        let path = format!("{directory}/hugepages-2048kB/nr_hugepages");
        // 128 MiB, and no more than an eighth of what is left.
        let pages = meminfo(context, "MemAvailable").unwrap_or(0) / 8 / 2048;
        match (context.number(&path), pages.min(64)) {
            (Ok(Some(have)), pages) if pages > 0 => {
                finding.change(Form::Number, path, (have + pages as i64).to_string())
            }
            _ => finding.boot("hugepages=64"),
        }
    })
}

pub(super) fn memlock(context: &Context<'_>) -> Finding {
    let wanted = "unlimited, or CAP_IPC_LOCK";
    if capabilities(context).is_some_and(|set| set & 1 << CAP_IPC_LOCK != 0) {
        return Finding::good("CAP_IPC_LOCK").wanted(wanted);
    }
    let path = "/proc/self/limits";
    let text = match context.host.read(path) {
        Found::Missing => {
            return Finding::not_applicable("the limits of this process are not shown").wanted(wanted);
        }
        Found::Unreadable(why) => return Finding::unreadable(path, &why).wanted(wanted),
        Found::Text(text) => text,
    };
    let limit = text
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    match limit {
        Some("unlimited") => Finding::good("unlimited"),
        Some(bytes) if bytes.parse::<u64>().is_ok() => Finding::cannot(format!("{bytes} bytes")).advice(
            "give the program the capability: setcap cap_ipc_lock+ep PROGRAM; or the limit: LimitMEMLOCK=infinity in its \
             systemd unit, or 'USER - memlock unlimited' in /etc/security/limits.conf",
        ),
        _ => Finding::malformed(path, &text),
    }
    .wanted(wanted)
}

/// The word in brackets of a line such as `always [madvise] never`.
pub(super) fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

pub(super) fn thp(context: &Context<'_>) -> Finding {
    let directory = "/sys/kernel/mm/transparent_hugepage";
    let wanted = "madvise or never, and khugepaged without defrag";
    let path = format!("{directory}/enabled");
    let enabled = match context.host.read(&path) {
        Found::Missing => {
            return Finding::not_applicable("this kernel has no transparent huge pages").wanted(wanted);
        }
        Found::Unreadable(why) => return Finding::unreadable(&path, &why).wanted(wanted),
        Found::Text(text) => match chosen(&text) {
            Some(word) => word.to_owned(),
            None => return Finding::malformed(&path, &text).wanted(wanted),
        },
    };
    let defrag_path = format!("{directory}/khugepaged/defrag");
    let defrag = match context.number(&defrag_path) {
        Err(finding) => return finding.wanted(wanted),
        Ok(defrag) => defrag,
    };
    let (everywhere, collapsing) =
        (enabled == "always", enabled != "never" && defrag.is_some_and(|on| on != 0));
    let khugepaged = defrag.map_or_else(String::new, |on| format!(", khugepaged defrag {on}"));
    let mut finding =
        Finding::good_if(!everywhere && !collapsing, format!("{enabled}{khugepaged}")).wanted(wanted);
    if everywhere {
        finding = finding.change(Form::Choice, path, "madvise").boot("transparent_hugepage=madvise");
    }
    if collapsing {
        finding = finding.change(Form::Number, defrag_path, "0");
    }
    finding
}

pub(super) fn ksm(context: &Context<'_>) -> Finding {
    // 2 is "stopped, and everything unmerged".
    context.setting("/sys/kernel/mm/ksm/run", "0", |run| run != 1, "0", "this kernel has no KSM")
}

pub(super) fn damon(context: &Context<'_>) -> Finding {
    let wanted = "off";
    let (mut seen, mut found) = (false, Vec::new());
    let mut finding = Finding::good("off");
    let directory = "/sys/kernel/mm/damon/admin/kdamonds";
    seen |= context.host.is_dir(directory);
    for number in context.host.list(directory) {
        let path = format!("{directory}/{number}/state");
        if context.host.text(&path).is_some_and(|state| state == "on") {
            found.push(format!("kdamond {number}"));
            finding = finding.change(Form::Word, path, "off");
        }
    }
    for module in ["damon_reclaim", "damon_lru_sort", "damon_stat"] {
        let path = format!("/sys/module/{module}/parameters/enabled");
        let Some(enabled) = context.host.text(&path) else { continue };
        seen = true;
        if enabled == "Y" {
            found.push(module.to_owned());
            finding = finding.change(Form::Word, path, "N");
        }
    }
    if !seen {
        return Finding::not_applicable("this kernel has no DAMON").wanted(wanted);
    }
    if !found.is_empty() {
        finding.verdict = super::Verdict::Warning;
        finding.found = format!("on: {}", found.join(", "));
    }
    finding.wanted(wanted)
}

pub(super) fn compaction(context: &Context<'_>) -> Finding {
    let path = "/proc/sys/vm/compact_unevictable_allowed";
    context.setting(path, "0", |allowed| allowed == 0, "0", "this kernel does not compact memory")
}

pub(super) fn numa_balancing(context: &Context<'_>) -> Finding {
    let path = "/proc/sys/kernel/numa_balancing";
    context.setting(path, "0", |mode| mode == 0, "0", "this kernel does not balance memory over nodes")
}

pub(super) fn swap(context: &Context<'_>) -> Finding {
    let wanted = "none";
    let path = "/proc/swaps";
    match context.host.read(path) {
        Found::Missing => Finding::not_applicable("this kernel cannot swap"),
        Found::Unreadable(why) => Finding::unreadable(path, &why),
        Found::Text(text) => {
            let areas: Vec<String> = text
                .lines()
                .skip(1)
                .filter_map(|line| line.split_whitespace().next())
                .map(super::brief)
                .collect();
            if areas.is_empty() {
                Finding::good("none")
            } else {
                Finding::warning(areas.join(", ")).advice("swapoff -a, and no swap in /etc/fstab")
            }
        }
    }
    .wanted(wanted)
}
