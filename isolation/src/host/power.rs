//! Checks of what cores share and how fast they run.

use super::{Change, Context, Finding, Fix, Form, Found};

fn cpu_file(cpu: u32, name: &str) -> String {
    format!("/sys/devices/system/cpu/cpu{cpu}/{name}")
}

pub(super) fn smt(context: &Context<'_>) -> Finding {
    let wanted = "no sibling online";
    let (mut shared, mut known) = (Vec::new(), false);
    let mut finding = Finding::good("each CPU is a core of its own");
    for cpu in context.cpus.iter() {
        match context.list(&cpu_file(cpu, "topology/thread_siblings_list")) {
            Err(finding) => return finding.wanted(wanted),
            Ok(None) => {}
            Ok(Some(siblings)) => {
                known = true;
                for sibling in siblings.and(&context.online).iter().filter(|sibling| *sibling != cpu) {
                    shared.push(format!("{cpu} with {sibling}"));
                    // Its two ends may both be in the list: one of them stays.
                    if !context.cpus.contains(sibling) || sibling > cpu {
                        finding = finding.advice(format!("echo 0 > {}", cpu_file(sibling, "online")));
                    }
                }
            }
        }
    }
    if !known {
        return Finding::not_applicable("this host does not say which CPUs share a core").wanted(wanted);
    }
    if !shared.is_empty() {
        finding.verdict = super::Verdict::Warning;
        finding.found = shared.join(", ");
        finding = finding.boot("nosmt");
    }
    finding.wanted(wanted)
}

pub(super) fn governor(context: &Context<'_>) -> Finding {
    let wanted = "performance";
    let (mut found, mut fixes) = (Vec::new(), Vec::new());
    for cpu in context.cpus.iter() {
        let path = cpu_file(cpu, "cpufreq/scaling_governor");
        match context.host.read(&path) {
            Found::Missing => {}
            Found::Unreadable(why) => return Finding::unreadable(&path, &why).wanted(wanted),
            Found::Text(governor) => {
                if governor != wanted {
                    fixes.push(Fix::Change(Change { path, content: wanted.to_owned(), form: Form::Word }));
                }
                let governor = super::brief(&governor);
                if !found.contains(&governor) {
                    found.push(governor);
                }
            }
        }
    }
    if found.is_empty() {
        return Finding::not_applicable("the kernel does not control the frequency here").wanted(wanted);
    }
    let mut finding = Finding::good_if(fixes.is_empty(), found.join(", ")).wanted(wanted);
    finding.fix = fixes;
    finding
}

/// Waking from a state takes at most this long, in microseconds, or the state is deep.
const DEEP_US: i64 = 10;

pub(super) fn cstates(context: &Context<'_>) -> Finding {
    let wanted = format!("none that takes more than {DEEP_US} µs to leave");
    let (mut states, mut deepest, mut fixes) = (0usize, None::<(i64, String)>, Vec::new());
    for cpu in context.cpus.iter() {
        let directory = cpu_file(cpu, "cpuidle");
        for state in context.host.list(&directory).into_iter().filter(|name| name.starts_with("state")) {
            let file = |name: &str| format!("{directory}/{state}/{name}");
            let path = file("disable");
            let (latency, disabled) = match (context.number(&file("latency")), context.number(&path)) {
                (Err(finding), _) | (_, Err(finding)) => return finding.wanted(wanted),
                (Ok(Some(latency)), Ok(Some(disabled))) => (latency, disabled),
                _ => continue,
            };
            states += 1;
            if latency > DEEP_US && disabled == 0 {
                let name = context.host.text(&file("name")).unwrap_or_else(|| state.clone());
                deepest = deepest.max(Some((latency, super::brief(&name))));
                fixes.push(Fix::Change(Change { path, content: "1".to_owned(), form: Form::Number }));
            }
        }
    }
    if states == 0 {
        return Finding::not_applicable("the kernel chooses no idle states here").wanted(wanted);
    }
    let found = deepest.as_ref().map_or_else(
        || "no deep ones".to_owned(),
        |(latency, name)| format!("{} enabled, the deepest {name} ({latency} µs)", fixes.len()),
    );
    let mut finding = Finding::good_if(deepest.is_none(), found).wanted(wanted);
    finding.fix = fixes;
    finding.unless_good(|finding| finding.boot("processor.max_cstate=1").boot("intel_idle.max_cstate=1"))
}
