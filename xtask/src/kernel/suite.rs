//! The tests that run in the guest: the series' kselftests, and test binaries of the crates named `guest*`, or
//! `vfio*` for those that want network devices.
//!
//! Contract: every program found is run and counted, also after one of them took the guest down; a guest
//! that dies, hangs or whose kernel complains fails the suite, and the console says why.

use super::console;
use super::guest::{End, Job, Machine, Outcome};
use super::programs::{
    MUTANTS, Program, SECONDS, Speaks, kselftest_programs, leaks, mutants, rust_programs, wanted,
};
use super::recipe::KSELFTESTS;
use super::tap::{self, Elsewhere};
use crate::report::{self, Tally};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Seconds for all that one boot runs.
pub(super) const ALL_SECONDS: u64 = 1500;
/// Under lockdep and KASAN everything takes longer.
const SLOWER_DEBUGGED: u64 = 4;
/// Why a kselftest skips that is about a kernel without the series.
const HAS_IT: &str = "the kernel has task isolation";
/// Why the mutation check leaves out causes that need broken hardware.
const NOT_CAUSED: &str = "no test can cause it here";
/// Guests that may die before we give up on the rest.
const DEATHS: usize = 6;
/// Boots that the emulator may spoil before that counts as a failure, too.
const SPOILT: usize = 3;
/// Starts lines by which the script says what it does.
const MARK: &str = "@@isoplane@@";

/// What is asked of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// The tests.
    Tests,
    /// The tests on a kernel that checks itself: more time, and a search for leaks.
    DebugTests,
    /// On such a kernel, the mutation check. What a kernel without one of its hooks complains about is not
    /// held against it.
    Mutants,
}

/// What the kernel's build left for its tests.
pub(crate) struct Installed {
    /// The kselftests; none when the source has none of ours.
    pub(crate) kselftests: Option<PathBuf>,
    /// A module to load and unload.
    pub(crate) module: PathBuf,
}

/// Runs what matches one of the filters, or everything.
pub(crate) fn run(
    machine: &Machine,
    installed: &Installed,
    filters: &[String],
    ask: Ask,
) -> Result<Tally, String> {
    let mut machine = machine.clone();
    let kselftests = installed.kselftests.as_deref();
    let mut programs = Vec::new();
    if ask == Ask::Mutants {
        let dir = kselftests.map(|dir| dir.join(KSELFTESTS)).filter(|dir| dir.join(MUTANTS).exists());
        programs.push(mutants(dir.ok_or("this kernel's source has no mutation check")?));
    } else {
        programs.extend(kselftests.map(kselftest_programs).transpose()?.unwrap_or_default());
        programs.extend(rust_programs(&mut machine.keep, filters)?);
        // Last: it judges what the others have left behind.
        programs.extend((ask == Ask::DebugTests).then(leaks));
    }
    programs.retain(|program| wanted(&program.name, filters));
    if programs.is_empty() {
        return Err(match filters {
            [] => "nothing to run in the guest: no kselftests in the series, no tests named guest*".into(),
            some => format!("no test for the guest has {} in its name", some.join(" or ")),
        });
    }
    let slow = if ask == Ask::Tests { 1 } else { SLOWER_DEBUGGED };
    for program in &mut programs {
        program.seconds *= slow;
    }
    let mut session = Session {
        module: &installed.module,
        ask,
        most: ALL_SECONDS * slow,
        total: Tally::default(),
        again: vec![],
        spoilt: 0,
    };
    session.all(&machine, &programs)?;
    // Once: what wants yet another boot there does not get it, and has no result.
    for (parameters, programs) in by_parameters(std::mem::take(&mut session.again)) {
        println!("\nbooting with {parameters}");
        let mut machine = machine.clone();
        machine.append.push(parameters);
        session.all(&machine, &programs)?;
    }
    let mut total = session.total;
    let without = session.again.into_iter();
    total
        .skipped
        .extend(without.map(|(program, wish)| format!("{}: boot with {}", program.name, wish.parameters)));
    Ok(total)
}

/// Tests that want another boot, one program for all of the same program and boot.
fn by_parameters(wishes: Vec<(Program, Elsewhere)>) -> BTreeMap<String, Vec<Program>> {
    let mut boots: BTreeMap<String, Vec<Program>> = BTreeMap::new();
    for (program, Elsewhere { test, parameters }) in wishes {
        let programs = boots.entry(parameters).or_default();
        let at = programs.iter().position(|known| known.name == program.name).unwrap_or_else(|| {
            programs.push(program);
            programs.len() - 1
        });
        let pick = match programs[at].speaks {
            Speaks::Tap => ["-t".to_owned(), test],
            // Filters of Rust's harness add up, too.
            Speaks::Rust => ["--exact".to_owned(), test],
        };
        programs[at].command.extend(pick);
    }
    boots
}

/// Several boots, and what came out of them.
struct Session<'a> {
    module: &'a Path,
    ask: Ask,
    /// Seconds for one boot.
    most: u64,
    total: Tally,
    again: Vec<(Program, Elsewhere)>,
    /// Boots that the emulator spoilt.
    spoilt: usize,
}

impl Session<'_> {
    /// Runs all programs, in one boot for each kind of machine if none of them takes the guest down.
    fn all(&mut self, machine: &Machine, programs: &[Program]) -> Result<(), String> {
        let (with, without): (Vec<Program>, Vec<Program>) =
            programs.iter().cloned().partition(|program| program.nics);
        self.on(machine, &without)?;
        let mut machine = machine.clone();
        machine.nics |= !with.is_empty();
        self.on(&machine, &with)
    }

    fn on(&mut self, machine: &Machine, programs: &[Program]) -> Result<(), String> {
        if programs.is_empty() {
            return Ok(());
        }
        let mut left = programs;
        for _ in 0..DEATHS {
            let done = self.boot(machine, left)?;
            left = &left[done..];
            if left.is_empty() {
                return Ok(());
            }
        }
        for program in left {
            println!("{}: FAILED: not run, the guest died too often", program.name);
            self.total.failed += 1;
        }
        Ok(())
    }

    /// Boots once for as many of the programs as it goes well; says how many were run.
    fn boot(&mut self, machine: &Machine, programs: &[Program]) -> Result<usize, String> {
        let longest = programs.iter().map(|p| p.seconds).max().unwrap_or(SECONDS);
        let all: u64 = programs.iter().map(|p| p.seconds + 10).sum();
        let script = script(programs, self.module, self.ask);
        let job = Job {
            script: &script,
            results: None,
            limit: Duration::from_secs(self.most.min(all + 120)),
            silence: Duration::from_secs(longest + 90),
        };
        let ask = self.ask;
        let mut progress = Progress { programs, current: None, done: 0, session: self };
        let outcome = machine.run(&job, |line| progress.line(line))?;
        let (done, current) = (progress.done, progress.current.take());
        if let Some(how) = spoilt(&outcome).filter(|_| self.spoilt < SPOILT) {
            self.spoilt += 1;
            let name = current.as_ref().map_or("no test in particular", |_| programs[done].name.as_str());
            println!("{name}: {how}: once more");
            return Ok(done);
        }
        let status = match outcome.end {
            End::Exited(status) if ask == Ask::Mutants => Ok(status),
            _ => outcome.status(),
        };
        match status {
            Ok(_) if done == programs.len() => {}
            // The script itself cannot fail; only what it runs.
            Ok(status) => return Err(format!("the guest's script ended early, with status {status}")),
            Err(reason) => {
                let name = current.map_or("no test in particular", |_| programs[done].name.as_str());
                println!("{name}: FAILED: {reason}");
                self.total.failed += 1;
            }
        }
        if outcome.booted.is_none() {
            return Err("the guest did not boot".into());
        }
        // The program that was running when the guest died is not tried again.
        Ok(programs.len().min(done + 1))
    }
}

/// What the emulator did to a guest that died, if it was the emulator.
fn spoilt(outcome: &Outcome) -> Option<&'static str> {
    let End::Died(said) = &outcome.end else { return None };
    // QEMU 7.2 and the 82574L: whoever switches MSI-X off, and be it Linux's driver on its way out, must be lucky
    // enough that no timer of its interrupt throttling still runs.
    if said.contains("e1000e_intrmgr_on_") && said.contains("_throttling_timer: Assertion") {
        return Some("QEMU fell over the interrupt throttling of its 82574L");
    }
    if outcome.booted.is_none() {
        return console::timer_not_calibrated(&outcome.console)
            .then_some("QEMU was too slow for the guest to calibrate its timer");
    }
    console::stale_breakpoint(&outcome.console)
        .then_some("QEMU ran a breakpoint that was no longer there, and the guest died of it")
}

/// Reads what the script and its programs print.
struct Progress<'a, 'b> {
    programs: &'a [Program],
    current: Option<Reading>,
    done: usize,
    session: &'a mut Session<'b>,
}

enum Reading {
    Tap(tap::Reader),
    Rust(report::Reader),
}

impl Progress<'_, '_> {
    fn line(&mut self, line: &str) {
        if let Some(mark) = line.strip_prefix(MARK) {
            let Some(program) = self.programs.get(self.done) else { return };
            match mark.trim().split_once(' ') {
                Some(("begin", _)) => {
                    self.current = Some(match program.speaks {
                        Speaks::Tap => Reading::Tap(tap::Reader::default()),
                        Speaks::Rust => Reading::Rust(report::Reader::default()),
                    });
                }
                Some(("end", status)) => self.end(status.trim().parse().unwrap_or(-1)),
                _ => {}
            }
            return;
        }
        let show = match &mut self.current {
            Some(Reading::Tap(reader)) => reader.line(line),
            Some(Reading::Rust(reader)) => {
                // Output and errors are one stream here: a reason may come after the name of its test.
                let reason = line.strip_prefix("test ").and_then(|rest| rest.split_once("... "));
                let reason = reason.map(|(_, said)| said).filter(|said| said.contains(": "));
                reader.line(reason.unwrap_or(line))
            }
            None => true,
        };
        if show && !line.is_empty() {
            println!("  {line}");
        }
    }

    fn end(&mut self, status: i32) {
        let Some(program) = self.programs.get(self.done) else { return };
        let (tally, wrong) = match self.current.take() {
            Some(Reading::Tap(mut reader)) => {
                let wishes = reader.elsewhere();
                self.session.again.extend(wishes.into_iter().map(|wish| (program.clone(), wish)));
                let (mut tally, wrong) = reader.finish(status);
                let elsewhere = |reason: &String| [HAS_IT, NOT_CAUSED].contains(&reason.as_str());
                let (not_here, skipped) = tally.skipped.into_iter().partition(elsewhere);
                tally.skipped = skipped;
                tally.not_here.extend::<Vec<_>>(not_here);
                (tally, wrong)
            }
            Some(Reading::Rust(mut reader)) => {
                let wishes = reader.elsewhere();
                let elsewhere = !wishes.is_empty();
                let wish = |(test, parameters)| (program.clone(), Elsewhere { test, parameters });
                self.session.again.extend(wishes.into_iter().map(wish));
                let mut tally = reader.finish();
                let wrong = match tally.failed {
                    0 if status != 0 => Some(format!("exit status {status}")),
                    // They are for the guest: it cannot be that there is nothing for them in it.
                    0 if tally.passed == 0 && !elsewhere => {
                        Some("none of its tests had anything to test".to_owned())
                    }
                    _ => None,
                };
                tally.failed += u64::from(wrong.is_some());
                (tally, wrong)
            }
            None => (Tally { failed: 1, ..Tally::default() }, Some("it never began".to_owned())),
        };
        let timed_out = matches!(status, 124 | 137).then(|| format!(" (limit: {} s)", program.seconds));
        let wrong =
            wrong.map(|text| format!(": {text}{}", timed_out.unwrap_or_default())).unwrap_or_default();
        println!("{}: {} passed, {} failed{wrong}", program.name, tally.passed, tally.failed);
        self.session.total.add(&tally);
        self.done += 1;
    }
}

/// Runs the programs one after the other, and says where each begins and ends.
fn script(programs: &[Program], module: &Path, ask: Ask) -> String {
    let module = quoted(&module.to_string_lossy());
    let mut text = format!("export TASK_ISOLATION_MODULE={module} TASK_ISOLATION_DISK=/run/disk\n");
    if ask == Ask::DebugTests {
        // A call is so slow there that RCU interrupts the CPU should the host stop it for a moment in the wrong place.
        text.push_str("export TASK_ISOLATION_WRITES=20000\n");
    }
    text.push_str(
        "run() { # NAME SECONDS DIRECTORY COMMAND...\n\
         \t# On the console too, so that a complaint there has a name.\n\
         \techo \"<4>isoplane: $1\" >/dev/kmsg\n",
    );
    text += &format!(
        "\tprintf '\\n{MARK} begin %s\\n' \"$1\"\n\
         \t(cd \"$3\" && CARGO_MANIFEST_DIR=$3 exec timeout --kill-after=5 \"$2\" \"${{@:4}}\")\n\
         \tprintf '\\n{MARK} end %s\\n' $?\n}}\n"
    );
    for program in programs {
        let words = program.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let dir = quoted(&program.dir.to_string_lossy());
        text += &format!("run {} {} {dir} {words}\n", quoted(&program.name), program.seconds);
    }
    text
}

/// A word as bash reads it back.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn program(name: &str, speaks: Speaks, command: &[&str]) -> Program {
        Program {
            name: name.into(),
            dir: std::env::temp_dir(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            speaks,
            seconds: 5,
            nics: false,
        }
    }

    /// Runs the script here, as the guest's bash would.
    fn play(programs: &[Program]) -> (Tally, usize) {
        let (session, done) = play_session(programs);
        (session.total, done)
    }

    fn play_session(programs: &[Program]) -> (Session<'static>, usize) {
        let script = script(programs, Path::new("/m.ko"), Ask::Tests).replace("/dev/kmsg", "/dev/null");
        let output = Command::new("bash").arg("-c").arg(script).output().expect("bash");
        let mut session = Session {
            module: Path::new("/m.ko"),
            ask: Ask::Tests,
            most: ALL_SECONDS,
            total: Tally::default(),
            again: Vec::new(),
            spoilt: 0,
        };
        let mut progress = Progress { programs, current: None, done: 0, session: &mut session };
        String::from_utf8_lossy(&output.stdout).lines().for_each(|line| progress.line(line));
        let done = progress.done;
        (session, done)
    }

    #[test]
    fn tests_that_want_another_boot_are_picked_for_it() {
        let wish = |test, boot| format!("echo ok 1 iso.{test} \\# SKIP boot with {boot}");
        let text =
            ["echo 1..3".to_owned(), wish("c1", "numa=fake=2"), wish("c2", "debug"), wish("c3", "debug")];
        let (session, _) = play_session(&[program("k", Speaks::Tap, &["bash", "-c", &text.join("; ")])]);
        assert_eq!((session.total.passed, session.total.failed, session.again.len()), (0, 0, 3));
        let boots = by_parameters(session.again);
        let picked = |boot: &str| {
            assert_eq!(boots[boot].len(), 1, "one program for {boot}");
            boots[boot][0].command[3..].join(" ")
        };
        assert_eq!(picked("debug"), "-t c2 -t c3");
        assert_eq!(picked("numa=fake=2"), "-t c1");
        assert_eq!(boots.len(), 2);
    }

    #[test]
    fn tests_of_the_crates_may_want_another_boot_too() {
        let text = "printf '%s\\n' 'test a ... ok' '---- b stdout ----' 'skipped: boot with intremap=off' \
                    'test result: ok. 2 passed; 0 failed; 0 ignored'";
        let (session, _) = play_session(&[program("r", Speaks::Rust, &["bash", "-c", text])]);
        assert_eq!((session.total.passed, session.total.skipped.len()), (1, 0));
        let boots = by_parameters(session.again);
        assert_eq!(boots["intremap=off"][0].command[3..].join(" "), "--exact b");
    }

    #[test]
    fn what_qemu_spoils_is_told_from_what_fails() {
        let outcome = |end, booted: Option<&str>, console: &str| Outcome {
            end,
            console: console.into(),
            booted: booted.map(str::to_owned),
        };
        let assertion = "QEMU ended with signal: 6: e1000e_core.c:169: e1000e_intrmgr_on_msix_throttling_timer: \
                         Assertion `msix_enabled(timer->core->owner)' failed.";
        assert!(spoilt(&outcome(End::Died(assertion.into()), Some("1.0"), "")).is_some());
        assert!(spoilt(&outcome(End::Died("QEMU ended with signal: 11".into()), Some("1.0"), "")).is_none());
        assert!(spoilt(&outcome(End::Exited(1), Some("1.0"), assertion)).is_none());
    }

    #[test]
    fn programs_know_the_module() {
        let text = "echo 1..1; [ \"$TASK_ISOLATION_MODULE\" = /m.ko ] && echo ok 1 a";
        assert_eq!(play(&[program("k", Speaks::Tap, &["bash", "-c", text])]).0.passed, 1);
    }

    #[test]
    fn both_kinds_of_output_are_counted() {
        let rust = "printf 'test result: FAILED. 2 passed; 1 failed; 0 ignored'; exit 101";
        let programs = [
            program("k", Speaks::Tap, &["bash", "-c", "echo 1..2; echo ok 1 it\\'s; echo ok 2 b"]),
            program("r", Speaks::Rust, &["bash", "-c", rust]),
        ];
        let (tally, done) = play(&programs);
        assert_eq!((tally.passed, tally.failed, done), (4, 1, 2));
    }

    #[test]
    fn reasons_in_the_same_line_as_the_test_count() {
        let text =
            "echo 'test a ... not here: no such CPU'; echo ok; echo 'test b ... skipped: b: no root'; echo ok
                    echo 'test c ... ok'; echo 'test result: ok. 3 passed; 0 failed; 0 ignored'";
        let (tally, _) = play(&[program("r", Speaks::Rust, &["bash", "-c", text])]);
        assert_eq!((tally.passed, tally.failed), (1, 0));
        assert_eq!((tally.not_here, tally.skipped), (vec!["no such CPU".into()], vec!["b: no root".into()]));
    }

    #[test]
    fn programs_that_crash_hang_or_say_nothing_fail() {
        let mut hangs = program("hangs", Speaks::Rust, &["sleep", "60"]);
        hangs.seconds = 1;
        let programs = [
            program("crashes", Speaks::Tap, &["bash", "-c", "echo 1..1; echo ok 1 a; kill -SEGV $$"]),
            hangs,
            program("silent", Speaks::Tap, &["true"]),
            program("missing", Speaks::Rust, &["/nonexistent/program"]),
        ];
        let (tally, done) = play(&programs);
        assert_eq!((tally.passed, tally.failed, done), (1, 4, 4));
    }

    #[test]
    fn words_survive_the_shell() {
        let word = "a 'b' $c \"d\" \\";
        let output = Command::new("bash").arg("-c").arg(format!("printf %s {}", quoted(word))).output();
        assert_eq!(String::from_utf8_lossy(&output.expect("bash").stdout), word);
    }
}
