//! What the observer knows about one worker between two samples.

use super::Watched;
use super::finding::{Event, Finding, Missing, PageFaults};
use super::parse::{self, ThreadStat, ThreadStatus};
use super::procfs::{Kept, ProcFs};
use super::senders::{Sender, SenderTally};
use super::table::{Stand, Table};
use crate::cause::Cause;
use crate::status::{Snapshot, State};
use std::io;
use std::time::{Duration, Instant};

/// The length of a unit of USER_HZ, which is 100 on every architecture in use (`man 7 time`).
const USER_HZ_STEP: Duration = Duration::from_millis(10);

/// What all workers look at in one sample.
pub(super) struct Shared<'a> {
    pub(super) cpus: &'a [u32],
    pub(super) interrupts: &'a Table,
    pub(super) softirqs: &'a Table,
    pub(super) stat: &'a [u8],
    pub(super) online: Option<String>,
    pub(super) senders: &'a [Sender],
    pub(super) now: Instant,
}

/// One worker.
pub(super) struct Track {
    pub(super) watched: Watched,
    /// Who sent IPIs to it while it was isolated.
    pub(super) senders: SenderTally,
    fs: ProcFs,
    thread: Option<Thread>,
}

/// A thread on a CPU: what it stood at.
struct Thread {
    id: (u32, u32),
    /// `None`: no CPU of its own.
    cpu: Option<u32>,
    gone: bool,
    stat_file: Kept,
    status_file: Kept,
    delay_file: Kept,
    sched_file: Kept,
    base: Option<Base>,
    interrupts: Stand,
    softirqs: Stand,
}

/// What was read at the last sample.
struct Base {
    at: Instant,
    block: Snapshot,
    stat: ThreadStat,
    status: Option<ThreadStatus>,
    delay: Option<u64>,
    migrations: Option<u64>,
    steal: Option<u64>,
    online: Option<String>,
    /// A stop was counted by the thread's state, before the switch that goes with it was.
    stop_counted: bool,
}

impl Track {
    pub(super) fn new(watched: Watched, fs: ProcFs) -> Self {
        Self { watched, senders: SenderTally::default(), fs, thread: None }
    }

    /// Looks once, and adds what it found to the status block.
    pub(super) fn look(&mut self, shared: &Shared<'_>, missing: &mut Vec<Missing>) -> Option<Finding> {
        let finding = self.find(shared, missing);
        let seen = finding.as_ref().map(|finding| finding.interruptions).unwrap_or_default();
        self.watched.status.add_interruptions(&seen);
        finding
    }

    fn find(&mut self, shared: &Shared<'_>, missing: &mut Vec<Missing>) -> Option<Finding> {
        let status = &self.watched.status;
        let (id, cpu) = (status.thread(), status.cpu());
        // A worker that was armed after the tables were read waits for the next sample.
        let ready = cpu.is_none_or(|cpu| shared.cpus.contains(&cpu));
        if status.state() == State::Off || id.1 == 0 || !ready {
            self.thread = None;
            return None;
        }
        if self.thread.as_ref().is_none_or(|thread| (thread.id, thread.cpu) != (id, cpu)) {
            self.thread = Some(Thread::new(&self.fs, id, cpu));
        }
        let thread = self.thread.as_mut()?;
        let mut finding =
            Finding { worker: self.watched.name.clone(), thread: id, cpu, ..Finding::default() };
        let attributed = thread.advance(shared, status.snapshot(), missing, &mut finding);
        // What was read belongs to another life of the worker if it changed meanwhile.
        if status.state() == State::Off || (status.thread(), status.cpu()) != (id, cpu) {
            self.thread = None;
            return None;
        }
        if !attributed {
            return None;
        }
        self.senders.add(&finding.senders);
        Some(finding)
    }
}

impl Thread {
    fn new(fs: &ProcFs, id: (u32, u32), cpu: Option<u32>) -> Self {
        Self {
            id,
            cpu,
            gone: false,
            stat_file: fs.of_thread(id, "stat"),
            status_file: fs.of_thread(id, "status"),
            delay_file: fs.of_thread(id, "schedstat"),
            sched_file: fs.of_thread(id, "sched"),
            base: None,
            interrupts: Stand::default(),
            softirqs: Stand::default(),
        }
    }

    /// Reads all that there is, fills the finding with what came since the last time, and says whether
    /// that may be attributed to the worker.
    fn advance(
        &mut self,
        shared: &Shared<'_>,
        block: Snapshot,
        missing: &mut Vec<Missing>,
        finding: &mut Finding,
    ) -> bool {
        if self.gone {
            return false;
        }
        let status = self.status_file.read().map(parse::thread_status);
        let delay = self.delay_file.read().map(parse::run_delay);
        let migrations = self.sched_file.read().map(parse::migrations);
        // This one is the last, so that a thread that ends meanwhile is gone, and its files not missing.
        let stat = match self.stat_file.read().map(parse::thread_stat) {
            Err(error) if is_gone(&error) => return self.has_gone(finding),
            stat => known(missing, &self.stat_file, stat),
        };
        let Some(stat) = stat else { return false };
        if matches!(stat.state, b'Z' | b'X' | b'x') {
            return self.has_gone(finding);
        }
        let status = known(missing, &self.status_file, status);
        let delay = known(missing, &self.delay_file, delay);
        let migrations = known(missing, &self.sched_file, migrations);
        let steal = self.cpu.and_then(|cpu| parse::steal(shared.stat, cpu));
        let now = Base {
            at: shared.now,
            block,
            stat,
            status,
            delay,
            migrations,
            steal,
            online: shared.online.clone(),
            stop_counted: false,
        };
        let before = self.base.take();
        // Where it was at the beginning: at the baseline it is where it was armed.
        let armed_on = self.cpu.unwrap_or(stat.processor);
        let from = before.as_ref().map_or(armed_on, |before| before.stat.processor);
        let (mut seen, mut lines) = Default::default();
        if let Some(cpu) = self.cpu {
            shared.interrupts.advance(cpu, &mut self.interrupts, &mut seen, &mut lines);
            shared.softirqs.advance(cpu, &mut self.softirqs, &mut seen, &mut lines);
        }
        if from == armed_on || stat.processor == armed_on {
            finding.interruptions = seen;
            finding.lines = lines;
            let to = |sender: &&Sender| Some(sender.to) == self.cpu;
            finding.senders = shared.senders.iter().filter(to).cloned().collect();
        }
        let now = self.base.insert(now);
        let Some(before) = before else {
            // It may have been moved before anybody looked.
            now.stat.processor = armed_on;
            return false;
        };
        let isolated = matches!(before.block.state, State::Armed | State::SlowPath);
        compare(&before, now, finding);
        isolated || before.block.armed != now.block.armed
    }

    /// Says so once.
    fn has_gone(&mut self, finding: &mut Finding) -> bool {
        self.gone = true;
        finding.events.push(Event::Gone);
        true
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// What a file said, or a note that it said nothing.
fn known<T>(missing: &mut Vec<Missing>, file: &Kept, read: io::Result<Option<T>>) -> Option<T> {
    let reason = match read {
        Ok(Some(value)) => return Some(value),
        Ok(None) => "its format is not known".to_owned(),
        Err(error) => error.to_string(),
    };
    Missing::note(missing, file.source(), reason);
    None
}

/// What happened to the thread between two samples.
fn compare(before: &Base, now: &mut Base, finding: &mut Finding) {
    let since = |now: Option<u64>, before: Option<u64>| match (now, before) {
        (Some(now), Some(before)) => now.saturating_sub(before),
        _ => 0,
    };
    finding.interval = now.at.saturating_duration_since(before.at);
    finding.run_delay = Duration::from_nanos(since(now.delay, before.delay));
    let steal = u32::try_from(since(now.steal, before.steal)).unwrap_or(u32::MAX);
    finding.steal = USER_HZ_STEP.saturating_mul(steal);
    finding.page_faults = PageFaults {
        minor: now.stat.minor_faults.saturating_sub(before.stat.minor_faults),
        major: now.stat.major_faults.saturating_sub(before.stat.major_faults),
    };
    let seen = &mut finding.interruptions;
    let moves = since(now.migrations, before.migrations);
    if now.stat.processor != before.stat.processor {
        seen.add(Cause::Migration, moves.max(1));
        finding.events.push(Event::Migrated { from: before.stat.processor, to: now.stat.processor });
    } else if moves != 0 {
        seen.add(Cause::Migration, moves);
        finding.events.push(Event::MovedAndBack { moves });
    }
    if let (Some(to), Some(from)) = (&now.online, &before.online)
        && to != from
    {
        seen.add(Cause::Hotplug, 1);
        finding.events.push(Event::CpusOnline { from: from.clone(), to: to.clone() });
    }
    let mut blocked = 0;
    if let (Some(to), Some(from)) = (&now.status, &before.status) {
        seen.add(Cause::Preemption, to.involuntary.saturating_sub(from.involuntary));
        if to.allowed != from.allowed {
            seen.add(Cause::AffinityChange, 1);
            finding
                .events
                .push(Event::AffinityChanged { from: from.allowed.clone(), to: to.allowed.clone() });
        }
        if to.tracer != 0 && to.tracer != from.tracer {
            seen.add(Cause::Ptrace, 1);
            finding.events.push(Event::TracerAttached { tid: to.tracer });
        }
        blocked = to.voluntary.saturating_sub(from.voluntary);
    }
    if permitted(&before.block, &now.block) {
        blocked = 0;
    }
    // A stop is a switch by the thread itself, and a state that lasts until it is continued. Either may
    // be seen first; it is counted once.
    let mut stops = blocked.saturating_sub(u64::from(before.stop_counted));
    now.stop_counted = before.stop_counted && blocked == 0;
    let stopped = |state: u8| matches!(state, b'T' | b't');
    if stopped(now.stat.state) && !stopped(before.stat.state) {
        finding.events.push(Event::Stopped { traced: now.stat.state == b't' });
        if stops == 0 {
            stops = 1;
            now.stop_counted = blocked == 0;
        }
    }
    if !stopped(now.stat.state) {
        now.stop_counted = false;
    }
    seen.add(Cause::Stop, stops);
}

/// Whether the worker was in the kernel by permission, or was broken, so that it may have blocked there.
fn permitted(before: &Snapshot, now: &Snapshot) -> bool {
    before.state != State::Armed
        || now.state != State::Armed
        || before.armed != now.armed
        || before.slow_path_visits != now.slow_path_visits
        || before.allowed.total() != now.allowed.total()
        || before.breaches.total() != now.breaches.total()
}
