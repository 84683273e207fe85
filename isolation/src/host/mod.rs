//! Whether a host lets a CPU alone: what was found, what is wanted, why, and the exact fix.
//!
//! Contract: [`check`] only looks; [`fix::apply`] changes what can be changed at run time and keeps a
//! record from which [`fix::undo`] puts everything back. Whatever the files of a host hold, a check ends
//! with a verdict. None of this belongs on an isolated thread: it reads hundreds of files.
//!
//! ```no_run
//! use isoplane_isolation::host::{self, Host, Request, Verdict};
//!
//! let host = Host::real();
//! let report = host::check(&host, &Request::new("2-3".parse()?));
//! for check in report.checks.iter().filter(|check| check.verdict >= Verdict::Warning) {
//!     println!("{}: found {}, wanted {}", check.title, check.found, check.wanted);
//! }
//! println!("boot with: {}", report.boot_line());
//! # Ok::<(), host::ParseError>(())
//! ```

mod boot;
mod cpus;
pub mod fix;
mod interrupts;
mod machine;
mod memory;
mod network;
mod power;
mod probe;
mod record;
mod sched;
mod seam;
mod time;

pub use cpus::{CpuSet, MAX_CPUS, ParseError};
pub use fix::{Change, Fix, Form};
pub use probe::{Answer, Hypervisor, Probes};
pub use seam::Host;

use seam::Found;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// What to look at.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Request {
    /// The CPUs that workers should have for themselves.
    pub cpus: CpuSet,
    /// How long to watch for threads that spin on housekeeping CPUs; zero: do not look. Times are counted
    /// by the kernel in steps of 10 ms, so less than 100 ms tells little.
    pub sample: Duration,
}

impl Request {
    /// These CPUs, watched for a quarter of a second.
    #[must_use]
    pub const fn new(cpus: CpuSet) -> Self {
        Self { cpus, sample: Duration::from_millis(250) }
    }
}

/// What a check came to. Later ones are worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// There is nothing of the kind here; the check says why it has nothing to say.
    NotApplicable,
    /// As wanted.
    Good,
    /// Workers run, and are disturbed more than they need be, or something they may want is missing.
    Warning,
    /// Workers cannot be isolated on these CPUs.
    CannotIsolate,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NotApplicable => "not applicable",
            Self::Good => "good",
            Self::Warning => "warning",
            Self::CannotIsolate => "cannot isolate",
        })
    }
}

/// A check and what it came to.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// Its name for scripts; never changes.
    pub id: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// What the host has.
    pub found: String,
    /// What a quiet CPU needs.
    pub wanted: String,
    /// Why it matters.
    pub why: &'static str,
    /// What it came to.
    pub verdict: Verdict,
    /// Why the check does not apply; `None` when it does.
    pub reason: Option<String>,
    /// What to do about it: all of these, or one of several that are marked with "or".
    pub fix: Vec<Fix>,
}

/// All checks of a host for some CPUs.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The CPUs that workers should have for themselves.
    pub cpus: CpuSet,
    /// All others that are online.
    pub housekeeping: CpuSet,
    /// The worst verdict.
    pub verdict: Verdict,
    /// What each check came to, in the order of [`CHECKS`].
    pub checks: Vec<Check>,
}

impl Report {
    /// The check with this id.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.id == id)
    }

    /// What can be changed at run time, in the order of the checks.
    pub fn changes(&self) -> impl Iterator<Item = (&Check, &Change)> {
        self.checks.iter().flat_map(|check| {
            check.fix.iter().filter_map(move |fix| match fix {
                Fix::Change(change) => Some((check, change)),
                Fix::Boot { .. } | Fix::Advice { .. } => None,
            })
        })
    }

    /// The boot parameters for these CPUs, in one line: those that isolation begins with and those that
    /// checks asked for. They replace parameters of the same name on the present command line.
    #[must_use]
    pub fn boot_line(&self) -> String {
        let cpus = &self.cpus;
        let mut line = vec![
            format!("nohz_full={cpus}"),
            format!("isolcpus=managed_irq,domain,{cpus}"),
            format!("rcu_nocbs={cpus}"),
        ];
        if !self.housekeeping.is_empty() {
            line.push(format!("irqaffinity={}", self.housekeeping));
        }
        line.extend(["tsc=reliable", "nowatchdog", "skew_tick=0"].map(str::to_owned));
        let name = |parameter: &str| parameter.split('=').next().unwrap_or_default().to_owned();
        for parameter in self.checks.iter().flat_map(|check| &check.fix).filter_map(|fix| match fix {
            Fix::Boot { parameter } => Some(parameter),
            Fix::Change(_) | Fix::Advice { .. } => None,
        }) {
            if !line.iter().any(|have| name(have) == name(parameter)) {
                line.push(parameter.clone());
            }
        }
        line.join(" ")
    }
}

/// What a check found; its name and its reason come from [`CHECKS`].
#[derive(Debug)]
struct Finding {
    found: String,
    wanted: String,
    verdict: Verdict,
    reason: Option<String>,
    fix: Vec<Fix>,
}

impl Finding {
    fn new(verdict: Verdict, found: impl Into<String>) -> Self {
        let mut found = found.into();
        if found.is_empty() {
            found.push_str("(empty)");
        }
        Self { found, wanted: String::new(), verdict, reason: None, fix: Vec::new() }
    }

    fn good(found: impl Into<String>) -> Self {
        Self::new(Verdict::Good, found)
    }

    fn warning(found: impl Into<String>) -> Self {
        Self::new(Verdict::Warning, found)
    }

    fn cannot(found: impl Into<String>) -> Self {
        Self::new(Verdict::CannotIsolate, found)
    }

    fn good_if(good: bool, found: impl Into<String>) -> Self {
        Self::new(if good { Verdict::Good } else { Verdict::Warning }, found)
    }

    fn not_applicable(reason: impl Into<String>) -> Self {
        let mut finding = Self::new(Verdict::NotApplicable, "nothing");
        finding.reason = Some(reason.into());
        finding
    }

    /// A file that is there and cannot be read or understood is never good.
    fn unreadable(path: &str, why: &str) -> Self {
        Self::warning(format!("{path} cannot be read: {why}")).advice(format!("as root: cat {path}"))
    }

    fn malformed(path: &str, text: &str) -> Self {
        Self::warning(format!("{path} holds '{}', which makes no sense here", brief(text)))
            .advice(format!("as root: cat {path}"))
    }

    fn wanted(mut self, wanted: impl Into<String>) -> Self {
        self.wanted = wanted.into();
        self
    }

    fn fix(mut self, fix: Fix) -> Self {
        self.fix.push(fix);
        self
    }

    fn boot(self, parameter: impl Into<String>) -> Self {
        self.fix(Fix::Boot { parameter: parameter.into() })
    }

    fn advice(self, text: impl Into<String>) -> Self {
        self.fix(Fix::Advice { text: text.into() })
    }

    fn change(self, form: Form, path: impl Into<String>, content: impl Into<String>) -> Self {
        self.fix(Fix::Change(Change { path: path.into(), content: content.into(), form }))
    }

    /// A fix is only for what is not as wanted.
    fn unless_good(self, fix: impl FnOnce(Self) -> Self) -> Self {
        if self.verdict >= Verdict::Warning { fix(self) } else { self }
    }
}

/// At most 60 characters of a text that somebody else wrote, on one line.
fn brief(text: &str) -> String {
    let mut brief: String = text.chars().take(60).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(60).is_some() {
        brief.push('…');
    }
    brief
}

/// What checks have in common.
struct Context<'a> {
    host: &'a Host,
    cpus: &'a CpuSet,
    sample: Duration,
    online: CpuSet,
    housekeeping: CpuSet,
    /// The largest CPU number that the host may have.
    last: u32,
    /// Major and minor number of the kernel's version, where it can be told.
    kernel: Option<(u32, u32)>,
    cmdline: Vec<String>,
}

impl<'a> Context<'a> {
    fn new(host: &'a Host, request: &'a Request) -> Self {
        let online = online(host);
        let last = host
            .text("/sys/devices/system/cpu/possible")
            .and_then(|text| CpuSet::parse_list(&text, MAX_CPUS - 1).ok()?.last())
            .or_else(|| online.last())
            .unwrap_or(0);
        let cmdline = host.text("/proc/cmdline").unwrap_or_default();
        Self {
            host,
            cpus: &request.cpus,
            sample: request.sample,
            housekeeping: online.without(&request.cpus),
            online,
            last,
            kernel: host.text("/proc/sys/kernel/osrelease").and_then(|text| version(&text)),
            cmdline: cmdline.split_whitespace().map(str::to_owned).collect(),
        }
    }

    /// The value of the last boot parameter `name=`.
    fn boot(&self, name: &str) -> Option<&str> {
        self.cmdline.iter().rev().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// A file that holds a list of CPUs.
    fn list(&self, path: &str) -> Result<Option<CpuSet>, Finding> {
        match self.host.read(path) {
            Found::Missing => Ok(None),
            Found::Unreadable(why) => Err(Finding::unreadable(path, &why)),
            Found::Text(text) => match CpuSet::parse_list(&text, self.last) {
                Ok(set) => Ok(Some(set)),
                Err(_) => Err(Finding::malformed(path, &text)),
            },
        }
    }

    /// A file that holds a mask of CPUs.
    fn mask(&self, path: &str) -> Result<Option<CpuSet>, Finding> {
        match self.host.read(path) {
            Found::Missing => Ok(None),
            Found::Unreadable(why) => Err(Finding::unreadable(path, &why)),
            Found::Text(text) => match CpuSet::parse_mask(&text) {
                Ok(set) => Ok(Some(set)),
                Err(_) => Err(Finding::malformed(path, &text)),
            },
        }
    }

    /// A file that holds one number.
    fn number(&self, path: &str) -> Result<Option<i64>, Finding> {
        match self.host.read(path) {
            Found::Missing => Ok(None),
            Found::Unreadable(why) => Err(Finding::unreadable(path, &why)),
            Found::Text(text) => match text.parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(Finding::malformed(path, &text)),
            },
        }
    }

    /// The check of a number that a file holds.
    fn setting(
        &self,
        path: &str,
        wanted: &str,
        good: impl Fn(i64) -> bool,
        set: &str,
        without: &str,
    ) -> Finding {
        match self.number(path) {
            Err(finding) => finding,
            Ok(None) => Finding::not_applicable(without),
            Ok(Some(number)) => Finding::good_if(good(number), number.to_string())
                .unless_good(|finding| finding.change(Form::Number, path, set)),
        }
        .wanted(wanted)
    }

    /// What the CPUs of workers have in common with `set`, if anything.
    fn disturbed(&self, set: &CpuSet) -> Option<CpuSet> {
        let both = self.cpus.and(set);
        (!both.is_empty()).then_some(both)
    }
}

fn online(host: &Host) -> CpuSet {
    host.text("/sys/devices/system/cpu/online")
        .and_then(|text| CpuSet::parse_list(&text, MAX_CPUS - 1).ok())
        .unwrap_or_default()
}

/// Major and minor number of a kernel release such as `6.12.117-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// A check before it has looked.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Info {
    /// See [`Check::id`].
    pub id: &'static str,
    /// See [`Check::title`].
    pub title: &'static str,
    /// See [`Check::why`].
    pub why: &'static str,
    run: fn(&Context<'_>) -> Finding,
}

impl fmt::Debug for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Info").field("id", &self.id).field("title", &self.title).finish_non_exhaustive()
    }
}

mod table;
pub use table::CHECKS;

/// Looks at a host.
#[must_use]
pub fn check(host: &Host, request: &Request) -> Report {
    let context = Context::new(host, request);
    let checks: Vec<Check> = CHECKS
        .iter()
        .map(|info| {
            let finding = (info.run)(&context);
            Check {
                id: info.id,
                title: info.title,
                found: finding.found,
                wanted: finding.wanted,
                why: info.why,
                verdict: finding.verdict,
                reason: finding.reason,
                fix: finding.fix,
            }
        })
        .collect();
    Report {
        cpus: request.cpus.clone(),
        housekeeping: context.housekeeping,
        verdict: checks
            .iter()
            .map(|check| check.verdict)
            .max()
            .unwrap_or(Verdict::NotApplicable)
            .max(Verdict::Good),
        checks,
    }
}

/// How [`default_cpus`] came to its choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Chosen {
    /// The CPUs that the kernel keeps apart already (`isolcpus=` or an isolated cpuset partition).
    Isolated,
    /// None are kept apart: all that are online but the first.
    AllButFirst,
}

/// The CPUs to look at when nobody named any.
#[must_use]
pub fn default_cpus(host: &Host) -> (CpuSet, Chosen) {
    let online = online(host);
    let request = Request::new(CpuSet::new());
    let context = Context::new(host, &request);
    let isolated = boot::kept_apart(&context).map(|(set, _)| set.and(&online)).unwrap_or_default();
    if !isolated.is_empty() && isolated != online {
        return (isolated, Chosen::Isolated);
    }
    let first = online.first().unwrap_or(0);
    let others: CpuSet = online.iter().filter(|cpu| *cpu != first).collect();
    // With one CPU there is no other; the report says that it cannot be isolated.
    (if others.is_empty() { CpuSet::from_iter([first]) } else { others }, Chosen::AllButFirst)
}
