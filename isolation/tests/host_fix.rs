//! Changing a host and putting everything back, on made-up hosts: `/proc` and `/sys` of this machine are
//! never written.

mod hosts;

use hosts::{Tree, request};
use isoplane_isolation::host::fix::{Done, Outcome, StateError, apply, undo};
use isoplane_isolation::host::{self, Host, Verdict};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;

/// Where records are kept: beside the host, so that its files can be compared.
struct State {
    directory: TempDir,
}

impl State {
    fn new() -> Self {
        Self { directory: hosts::directory() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("deeper/undo.json")
    }

    /// What the record says was at this path.
    fn recorded(&self, path: &str) -> Option<String> {
        let record: serde_json::Value = serde_json::from_slice(&fs::read(self.path()).ok()?).unwrap();
        let entries = record["entries"].as_array().unwrap();
        let entry = entries.iter().find(|entry| entry["path"] == path)?;
        Some(entry["before"].as_str().unwrap().to_owned())
    }
}

fn get(tree: &Tree, path: &str) -> String {
    fs::read_to_string(tree.path().join(path)).unwrap().trim().to_owned()
}

fn fix(tree: &Tree, state: &State) -> Vec<Done> {
    apply(&tree.host(), &tree.check(), &state.path(), false).unwrap()
}

fn unfix(tree: &Tree, state: &State) -> Vec<Done> {
    undo(&tree.host(), &state.path(), false).unwrap()
}

fn outcome<'a>(done: &'a [Done], path: &str) -> &'a Outcome {
    &done.iter().find(|done| done.path == path).unwrap_or_else(|| panic!("no {path} in {done:#?}")).outcome
}

const TIMER: &str = "/proc/sys/kernel/timer_migration";
const IRQ: &str = "/proc/irq/24/smp_affinity_list";
const WORKQUEUES: &str = "/sys/devices/virtual/workqueue/cpumask";

#[test]
fn a_fix_mends_and_an_undo_restores() {
    let (tree, state) = (Tree::bad(), State::new());
    let before = tree.snapshot();
    let wanted = tree.check().changes().count();
    assert!(wanted >= 20, "{wanted}");
    let done = fix(&tree, &state);
    assert_eq!(done.len(), wanted);
    assert!(done.iter().all(|done| done.outcome == Outcome::Changed), "{done:#?}");
    // What is left is for a person or for the next boot; the IRQs go where they may when one next comes.
    let report = tree.check();
    for (check, change) in report.changes() {
        assert!(["irqs", "hugepages"].contains(&check.id), "{} still wants {change:?}", check.id);
    }
    for id in [
        "irqaffinity",
        "workqueues",
        "rps",
        "xps",
        "watchdog",
        "clocksource",
        "thp",
        "ksm",
        "mce",
        "fair-server",
    ] {
        assert_eq!(report.get(id).unwrap().verdict, Verdict::Good, "{id}");
    }
    assert_eq!(fs::metadata(state.path()).unwrap().permissions().mode() & 0o777, 0o600);
    // Undone in the reverse order.
    let undone = unfix(&tree, &state);
    let order = |done: &[Done]| done.iter().map(|done| done.path.clone()).collect::<Vec<_>>();
    assert_eq!(order(&undone).into_iter().rev().collect::<Vec<_>>(), order(&done));
    assert!(undone.iter().all(|done| done.outcome == Outcome::Restored), "{undone:#?}");
    assert_eq!(tree.snapshot(), before);
    assert!(!state.path().exists());
    assert_eq!(unfix(&tree, &state), []);
}

/// Memory is asked for before compaction is restrained, work is moved before limits are lifted.
#[test]
fn changes_come_in_a_safe_order() {
    let (tree, state) = (Tree::bad(), State::new());
    let done = fix(&tree, &state);
    let place = |check: &str| done.iter().position(|done| done.check == check).unwrap();
    for (first, then) in [
        ("clocksource", "hugepages"),
        ("hugepages", "compaction"),
        ("workqueues", "irqs"),
        ("irqaffinity", "irqs"),
        ("irqs", "fair-server"),
    ] {
        assert!(place(first) < place(then), "{first} after {then}");
    }
    assert_eq!(done.last().unwrap().check, "fair-server");
}

#[test]
fn what_was_there_is_on_disk_before_each_write() {
    let (tree, state) = (Tree::bad(), State::new());
    let (root, record) = (tree.path().to_owned(), state.path());
    let writes = std::sync::Arc::new(AtomicUsize::new(0));
    let seen = writes.clone();
    let host = tree.host().writing(move |path, content| {
        let name = format!("/{}", path.strip_prefix(&root).unwrap().display());
        let recorded: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
        let entry = recorded["entries"]
            .as_array()
            .unwrap()
            .iter()
            .find(|e| e["path"] == name.as_str())
            .unwrap()
            .clone();
        let now = fs::read_to_string(path).unwrap();
        assert!(now.contains(entry["before"].as_str().unwrap()), "{name}: {entry}");
        assert_eq!(entry["pending"], true);
        seen.fetch_add(1, Ordering::Relaxed);
        hosts::write(path, content)
    });
    let done = apply(&host, &tree.check(), &state.path(), false).unwrap();
    assert_eq!(writes.load(Ordering::Relaxed), done.len());
}

/// The program dies at the n-th write, before or after the kernel took it, for every n.
#[test]
fn an_interrupted_fix_is_undone() {
    let total = Tree::bad().check().changes().count();
    for (at, taken) in (0..total).flat_map(|at| [(at, false), (at, true)]) {
        let (tree, state) = (Tree::bad(), State::new());
        let before = tree.snapshot();
        let writes = AtomicUsize::new(0);
        let dying = tree.host().writing(move |path, content| {
            let die = writes.fetch_add(1, Ordering::Relaxed) == at;
            if !die || taken {
                hosts::write(path, content)?;
            }
            // Not a panic with a message: many of these would hide real ones.
            if die { std::panic::resume_unwind(Box::new("dies here")) } else { Ok(()) }
        });
        let report = tree.check();
        catch_unwind(AssertUnwindSafe(|| apply(&dying, &report, &state.path(), false))).unwrap_err();
        // A second fix in between, every other time, must not take the first one's values for the host's.
        if at % 2 == 0 {
            fix(&tree, &state);
        }
        let undone = unfix(&tree, &state);
        assert!(undone.iter().all(|done| done.outcome.is_done()), "{at} {taken}: {undone:#?}");
        assert_eq!(tree.snapshot(), before);
        assert!(!state.path().exists());
    }
}

/// Likewise the undo: whatever it had put back already, the next one finishes.
#[test]
fn an_interrupted_undo_is_finished_by_the_next() {
    let total = Tree::bad().check().changes().count();
    for at in 0..total {
        let (tree, state) = (Tree::bad(), State::new());
        let before = tree.snapshot();
        fix(&tree, &state);
        let writes = AtomicUsize::new(0);
        let dying = tree.host().writing(move |path, content| {
            if writes.fetch_add(1, Ordering::Relaxed) == at {
                std::panic::resume_unwind(Box::new("dies here"));
            }
            hosts::write(path, content)
        });
        catch_unwind(AssertUnwindSafe(|| undo(&dying, &state.path(), false))).unwrap_err();
        let undone = unfix(&tree, &state);
        assert!(undone.iter().all(|done| done.outcome.is_done()), "{undone:#?}");
        assert_eq!(tree.snapshot(), before);
    }
}

#[test]
fn a_second_fix_keeps_the_first_record() {
    let (tree, state) = (Tree::bad(), State::new());
    let before = tree.snapshot();
    fix(&tree, &state);
    assert_eq!(state.recorded(WORKQUEUES).as_deref(), Some("00000000,0000000f"));
    // Other CPUs: what the first fix wrote is changed again.
    let host = tree.host();
    let mut other = request();
    other.cpus = "1-3".parse().unwrap();
    let done = apply(&host, &host::check(&host, &other), &state.path(), false).unwrap();
    assert_eq!(outcome(&done, WORKQUEUES), &Outcome::Changed);
    assert_eq!(get(&tree, WORKQUEUES.trim_start_matches('/')), "00000000,00000001");
    assert_eq!(state.recorded(WORKQUEUES).as_deref(), Some("00000000,0000000f"));
    unfix(&tree, &state);
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn what_somebody_else_changed_since_stays() {
    let (tree, state) = (Tree::bad(), State::new());
    fix(&tree, &state);
    tree.set("sys/devices/virtual/workqueue/cpumask", "4\n");
    // Neither a fix nor an undo overwrites it.
    let done = fix(&tree, &state);
    assert_eq!(outcome(&done, WORKQUEUES), &Outcome::ChangedSince { now: "4".to_owned() });
    let undone = unfix(&tree, &state);
    assert_eq!(outcome(&undone, WORKQUEUES), &Outcome::ChangedSince { now: "4".to_owned() });
    assert_eq!(undone.iter().filter(|done| !done.outcome.is_done()).count(), 1);
    assert_eq!(get(&tree, "sys/devices/virtual/workqueue/cpumask"), "4");
    // It stays in the record, alone, until it is forced.
    assert_eq!(state.recorded(WORKQUEUES).as_deref(), Some("00000000,0000000f"));
    assert_eq!(state.recorded(TIMER), None);
    let forced = undo(&tree.host(), &state.path(), true).unwrap();
    assert_eq!(forced.len(), 1);
    assert_eq!(forced[0].outcome, Outcome::Restored);
    assert_eq!(get(&tree, "sys/devices/virtual/workqueue/cpumask"), "00000000,0000000f");
    assert!(!state.path().exists());
}

#[test]
fn what_somebody_else_put_back_is_not_written_again() {
    let (tree, state) = (Tree::bad(), State::new());
    fix(&tree, &state);
    tree.set("proc/sys/kernel/timer_migration", "0\n");
    // The same mask in other words.
    tree.set("sys/devices/virtual/workqueue/cpumask", "00000000,0000000f\n");
    let undone = unfix(&tree, &state);
    assert_eq!(outcome(&undone, TIMER), &Outcome::Already);
    assert_eq!(outcome(&undone, WORKQUEUES), &Outcome::Already);
    assert!(!state.path().exists());
}

#[test]
fn a_value_that_is_read_back_in_other_words_is_the_same() {
    let (tree, state) = (Tree::bad(), State::new());
    let done = fix(&tree, &state);
    let change = done.iter().find(|done| done.path == WORKQUEUES).unwrap();
    assert_eq!((change.content.as_str(), &change.outcome), ("3", &Outcome::Changed));
    assert_eq!(get(&tree, "sys/devices/virtual/workqueue/cpumask"), "00000000,00000003");
    let thp = "sys/kernel/mm/transparent_hugepage/enabled";
    assert_eq!(outcome(&done, &format!("/{thp}")), &Outcome::Changed);
    assert_eq!(get(&tree, thp), "always [madvise] never");
    assert_eq!(state.recorded(&format!("/{thp}")).as_deref(), Some("always"));
    // A list in another order, a mask without its zeroes: still what the fix wrote.
    tree.set("sys/devices/virtual/workqueue/cpumask", "3\n");
    tree.set("proc/irq/24/smp_affinity_list", "0,1\n");
    let undone = unfix(&tree, &state);
    assert!(undone.iter().all(|done| done.outcome == Outcome::Restored), "{undone:#?}");
    assert_eq!(get(&tree, thp), "[always] madvise never");
    assert_eq!(get(&tree, "sys/devices/virtual/workqueue/cpumask"), "00000000,0000000f");
}

/// `path` is written by `write`, everything else as usual.
fn with(
    tree: &Tree,
    path: &'static str,
    write: impl Fn(&Path, &str) -> io::Result<()> + Send + Sync + 'static,
) -> Host {
    tree.host().writing(move |file, content| {
        if file.ends_with(path.trim_start_matches('/')) {
            write(file, content)
        } else {
            fs::write(file, content)
        }
    })
}

#[test]
fn a_refusal_is_said_and_not_recorded() {
    // Managed interrupts: EIO up to Linux 6.3, EPERM from then on (kernel/irq/proc.c).
    for errno in [nix::libc::EIO, nix::libc::EPERM, nix::libc::EINVAL, nix::libc::ENOSPC] {
        let (tree, state) = (Tree::bad(), State::new());
        let before = tree.snapshot();
        let host = with(&tree, IRQ, move |_, _| Err(io::Error::from_raw_os_error(errno)));
        let done = apply(&host, &tree.check(), &state.path(), false).unwrap();
        let Outcome::Refused { why } = outcome(&done, IRQ) else { panic!("{done:#?}") };
        assert!(why.contains(&io::Error::from_raw_os_error(errno).to_string()[..5]), "{why}");
        assert_eq!(done.iter().filter(|done| !done.outcome.is_done()).count(), 1);
        assert_eq!(state.recorded(IRQ), None);
        assert!(unfix(&tree, &state).iter().all(|done| done.outcome == Outcome::Restored));
        assert_eq!(tree.snapshot(), before);
    }
}

#[test]
fn a_value_that_the_kernel_ignores_is_refused() {
    let (tree, state) = (Tree::bad(), State::new());
    let host = with(&tree, TIMER, |_, _| Ok(()));
    let done = apply(&host, &tree.check(), &state.path(), false).unwrap();
    assert!(matches!(outcome(&done, TIMER), Outcome::Refused { .. }), "{done:#?}");
    assert_eq!(state.recorded(TIMER), None);
}

#[test]
fn a_value_that_the_kernel_adjusts_is_said_and_undone() {
    let (tree, state) = (Tree::bad(), State::new());
    let before = tree.snapshot();
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    // It found memory for half of them.
    let host = with(&tree, path, |file, content| {
        let pages: u32 = content.parse().unwrap();
        fs::write(file, (pages / 2).to_string())
    });
    let done = apply(&host, &tree.check(), &state.path(), false).unwrap();
    assert_eq!(outcome(&done, path), &Outcome::Adjusted { now: "32".to_owned() });
    assert_eq!(outcome(&unfix(&tree, &state), path), &Outcome::Restored);
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn what_cannot_be_restored_stays_in_the_record() {
    let (tree, state) = (Tree::bad(), State::new());
    fix(&tree, &state);
    let refusing = with(&tree, TIMER, |_, _| Err(io::Error::from_raw_os_error(nix::libc::EACCES)));
    // One refuses, one is gone with its device.
    tree.remove("proc/irq/24");
    let undone = undo(&refusing, &state.path(), false).unwrap();
    assert!(matches!(outcome(&undone, TIMER), Outcome::Refused { .. }));
    assert_eq!(outcome(&undone, IRQ), &Outcome::Gone);
    assert_eq!((state.recorded(TIMER).as_deref(), state.recorded(IRQ).as_deref()), (Some("0"), Some("0-3")));
    let again = unfix(&tree, &state);
    assert_eq!(again.len(), 2);
    assert_eq!(outcome(&again, TIMER), &Outcome::Restored);
    assert_eq!(outcome(&again, IRQ), &Outcome::Gone);
    // Force forgets what is gone.
    assert_eq!(undo(&tree.host(), &state.path(), true).unwrap().len(), 1);
    assert!(!state.path().exists());
}

#[test]
fn a_restart_undoes_everything() {
    let (tree, state) = (Tree::bad(), State::new());
    fix(&tree, &state);
    tree.set("proc/sys/kernel/random/boot_id", "99999999-0000-0000-0000-000000000000\n");
    // Whatever is there now was set by somebody else.
    let undone = unfix(&tree, &state);
    assert!(undone.iter().all(|done| done.outcome == Outcome::Restarted), "{undone:#?}");
    assert_eq!(get(&tree, "proc/sys/kernel/timer_migration"), "1");
    assert!(!state.path().exists());
    // And a fix after a restart begins a record of its own.
    let tree = Tree::bad();
    fix(&tree, &state);
    tree.set("proc/sys/kernel/random/boot_id", "88888888-0000-0000-0000-000000000000\n");
    tree.set("proc/sys/kernel/timer_migration", "0\n");
    tree.set("sys/devices/virtual/workqueue/cpumask", "7\n");
    assert_eq!(outcome(&fix(&tree, &state), WORKQUEUES), &Outcome::Changed);
    assert_eq!(state.recorded(WORKQUEUES).as_deref(), Some("7"));
}

#[test]
fn a_record_that_cannot_be_kept_changes_nothing() {
    let tree = Tree::bad();
    let before = tree.snapshot();
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    // Its directory is a file; it is a directory itself.
    for state in [file.join("undo.json"), directory.path().to_owned()] {
        let error = apply(&tree.host(), &tree.check(), &state, false).unwrap_err();
        assert!(matches!(error, StateError::Io { .. }), "{error}");
        assert!(error.to_string().contains("--state"), "{error}");
    }
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn a_record_of_others_is_neither_used_nor_overwritten() {
    let (tree, state) = (Tree::bad(), State::new());
    let before = tree.snapshot();
    fs::create_dir_all(state.path().parent().unwrap()).unwrap();
    for text in [
        "",
        "{",
        "[]",
        r#"{"version":2,"boot":"","entries":[]}"#,
        r#"{"version":1,"boot":"","entries":[],"more":1}"#,
        r#"{"version":1,"boot":"","entries":[{"path":"/proc/x"}]}"#,
        "\u{0}",
    ] {
        fs::write(state.path(), text).unwrap();
        for error in [
            apply(&tree.host(), &tree.check(), &state.path(), true).unwrap_err(),
            undo(&tree.host(), &state.path(), true).unwrap_err(),
        ] {
            assert!(matches!(error, StateError::Malformed { .. }), "{text:?}: {error}");
        }
        assert_eq!(fs::read_to_string(state.path()).unwrap(), text);
    }
    assert_eq!(tree.snapshot(), before);
}

/// The program died while it wrote a record: the old one holds, and the half of a new one is no obstacle.
#[test]
fn half_a_record_is_no_record() {
    let (tree, state) = (Tree::bad(), State::new());
    let before = tree.snapshot();
    fix(&tree, &state);
    let half = state.path().with_extension("json.new");
    fs::write(&half, r#"{"version":1,"bo"#).unwrap();
    tree.set("sys/devices/virtual/workqueue/cpumask", "7\n");
    assert_eq!(unfix(&tree, &state).iter().filter(|done| !done.outcome.is_done()).count(), 1);
    assert!(!half.exists());
    undo(&tree.host(), &state.path(), true).unwrap();
    assert_eq!(tree.snapshot(), before);
}

/// A link in the place of the file that a record is first written to would lead a write elsewhere.
#[test]
fn a_record_follows_no_link() {
    let (tree, state) = (Tree::bad(), State::new());
    let before = tree.snapshot();
    fs::create_dir_all(state.path().parent().unwrap()).unwrap();
    let target = state.directory.path().join("target");
    fs::write(&target, "keep").unwrap();
    std::os::unix::fs::symlink(&target, state.path().with_extension("json.new")).unwrap();
    apply(&tree.host(), &tree.check(), &state.path(), false).unwrap_err();
    assert_eq!(fs::read_to_string(&target).unwrap(), "keep");
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn a_record_reaches_nothing_but_settings() {
    let (tree, state) = (Tree::bad(), State::new());
    tree.set("etc/passwd", "root\n");
    fs::create_dir_all(state.path().parent().unwrap()).unwrap();
    for path in ["/etc/passwd", "/proc/../etc/passwd", "/sys/../etc/passwd", "etc/passwd", "/procetc"] {
        let record = serde_json::json!({
            "version": 1,
            "boot": "",
            "entries": [{ "check": "x", "path": path, "form": "word", "before": "mallory", "ours": ["root"], "pending": true }],
        });
        fs::write(state.path(), record.to_string()).unwrap();
        let undone = undo(&tree.host(), &state.path(), true).unwrap();
        assert!(matches!(undone[0].outcome, Outcome::Refused { .. }), "{undone:?}");
        assert_eq!(get(&tree, "etc/passwd"), "root");
    }
}

#[test]
fn one_doctor_at_a_time() {
    let (tree, state) = (Tree::bad(), State::new());
    static OTHER: Mutex<Option<StateError>> = Mutex::new(None);
    let (path, root) = (state.path(), tree.path().to_owned());
    let host = tree.host().writing(move |file, content| {
        let error = undo(&Host::at(&root), &path, false).unwrap_err();
        *OTHER.lock().unwrap() = Some(error);
        hosts::write(file, content)
    });
    apply(&host, &tree.check(), &state.path(), false).unwrap();
    assert!(matches!(OTHER.lock().unwrap().take(), Some(StateError::Busy { .. })));
    // The lock went with the fix.
    assert!(unfix(&tree, &state).iter().all(|done| done.outcome == Outcome::Restored));
}

#[test]
fn a_file_that_is_not_there_is_not_made() {
    let (tree, state) = (Tree::bad(), State::new());
    let report = tree.check();
    tree.remove("proc/sys/kernel/timer_migration");
    let done = apply(&tree.host(), &report, &state.path(), false).unwrap();
    assert_eq!(outcome(&done, TIMER), &Outcome::Gone);
    assert!(!tree.path().join("proc/sys/kernel/timer_migration").exists());
}
