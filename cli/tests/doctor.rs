//! `isoplane doctor` as a user runs it. Changes are made to a made-up host only.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

fn doctor(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_isoplane")).arg("doctor").args(args).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A host with two CPUs, the second of them isolated.
fn host() -> TempDir {
    let root = TempDir::new().unwrap();
    for (path, content) in [
        ("sys/devices/system/cpu/online", "0-1\n"),
        ("sys/devices/system/cpu/possible", "0-1\n"),
        ("sys/devices/system/cpu/isolated", "1\n"),
        ("sys/devices/system/cpu/nohz_full", "1\n"),
        ("proc/cmdline", "nohz_full=1 isolcpus=1\n"),
        ("proc/sys/kernel/osrelease", "6.1.0\n"),
        ("proc/sys/kernel/random/boot_id", "1-2-3\n"),
        ("proc/sys/kernel/perf_event_paranoid", "2\n"),
        ("proc/sys/kernel/timer_migration", "0\n"),
        ("proc/sys/vm/stat_interval", "1\n"),
        ("sys/kernel/iommu_groups/0/.keep", ""),
    ] {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    root
}

fn get(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap().trim().to_owned()
}

#[test]
fn this_machine_gets_a_verdict() {
    let output = doctor(&["--json"]);
    assert_eq!(stderr(&output), "");
    let report = json(&output);
    let expected = match report["verdict"].as_str().unwrap() {
        "good" => 0,
        "warning" => 1,
        "cannot_isolate" => 2,
        other => panic!("{other}"),
    };
    assert_eq!(output.status.code(), Some(expected));
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 30);
    for check in checks {
        for field in ["id", "title", "found", "wanted", "why", "verdict"] {
            assert!(!check[field].as_str().unwrap().is_empty(), "{check:#}");
        }
        assert!(check["fix"].is_array(), "{check:#}");
        assert_eq!(check["reason"].is_string(), check["verdict"] == "not_applicable", "{check:#}");
    }
    assert!(report["boot_line"].as_str().unwrap().starts_with("nohz_full="));
    assert!(["isolated", "all_but_first"].contains(&report["chosen"].as_str().unwrap()));
    assert_eq!(report["changes"], Value::Array(vec![]));
    // The same as a table, with the exact boot line.
    let output = doctor(&[]);
    assert_eq!(output.status.code(), Some(expected));
    let text = stdout(&output);
    for part in ["CPUs for workers: ", "nohz_full", "why it matters", "not applicable"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn the_exit_status_is_the_worst_verdict() {
    let root = host();
    let dir = root.path().to_str().unwrap();
    let output = doctor(&["--root", dir, "--json"]);
    let report = json(&output);
    assert_eq!((output.status.code(), report["verdict"].as_str()), (Some(1), Some("warning")), "{report:#}");
    assert_eq!((report["cpus"].as_str(), report["chosen"].as_str()), (Some("1"), Some("isolated")));
    let output = doctor(&["--root", dir, "--json", "--cpu", "0"]);
    let report = json(&output);
    assert_eq!((output.status.code(), report["verdict"].as_str()), (Some(2), Some("cannot_isolate")));
    assert_eq!((report["housekeeping"].as_str(), report["chosen"].as_str()), (Some("1"), Some("asked")));
    // A CPU that does not exist is an answer, not a mistake in the command line.
    let output = doctor(&["--root", dir, "--cpu", "1,7"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stdout(&output).contains("7 not online"), "{}", stdout(&output));
    // Now let everything be as wanted.
    fs::write(root.path().join("proc/sys/kernel/timer_migration"), "1").unwrap();
    fs::write(root.path().join("proc/sys/vm/stat_interval"), "120").unwrap();
    let tracing = root.path().join("sys/kernel/tracing/events/ipi/ipi_send_cpu");
    fs::create_dir_all(&tracing).unwrap();
    fs::write(tracing.join("id"), "5").unwrap();
    let output = doctor(&["--root", dir, "--json"]);
    assert_eq!(output.status.code(), Some(0), "{:#}", json(&output));
}

#[test]
fn a_fix_is_undone_again() {
    let root = host();
    let dir = root.path().to_str().unwrap();
    let (timer, stat) = ("proc/sys/kernel/timer_migration", "proc/sys/vm/stat_interval");
    let output = doctor(&["--root", dir, "--fix", "--json"]);
    let report = json(&output);
    let changes = report["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 2, "{report:#}");
    assert!(changes.iter().all(|change| change["outcome"] == "changed"), "{report:#}");
    assert_eq!(changes[0]["path"], format!("/{timer}"));
    assert_eq!((changes[0]["before"].as_str(), changes[0]["content"].as_str()), (Some("0"), Some("1")));
    assert_eq!((get(root.path(), timer).as_str(), get(root.path(), stat).as_str()), ("1", "120"));
    // The report is about the host as it is now.
    let check =
        |id: &str| report["checks"].as_array().unwrap().iter().find(|c| c["id"] == id).unwrap().clone();
    assert_eq!(check("timer-migration")["verdict"], "good");
    // Below the made-up root, without --state.
    let state = root.path().join("var/lib/isoplane/doctor-undo.json");
    assert!(state.exists());
    // Somebody changes one of them: that one stays, and the status says so.
    fs::write(root.path().join(stat), "30\n").unwrap();
    let output = doctor(&["--root", dir, "--undo"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stdout(&output).contains("somebody has changed it to 30 since"), "{}", stdout(&output));
    assert_eq!((get(root.path(), timer).as_str(), get(root.path(), stat).as_str()), ("0", "30"));
    let output = doctor(&["--root", dir, "--undo", "--force", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(json(&output)["changes"][0]["outcome"], "restored");
    assert_eq!(get(root.path(), stat), "1");
    assert!(!state.exists());
    let output = doctor(&["--root", dir, "--undo"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("nothing to undo"), "{}", stdout(&output));
}

#[test]
fn the_record_is_where_it_was_asked_for() {
    let (root, elsewhere) = (host(), TempDir::new().unwrap());
    let dir = root.path().to_str().unwrap();
    let state = elsewhere.path().join("record.json");
    let output = doctor(&["--root", dir, "--fix", "--state", state.to_str().unwrap()]);
    // As it is after the fix.
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).contains("/proc/sys/kernel/timer_migration: 0 -> 1"), "{}", stdout(&output));
    assert!(state.exists() && !root.path().join("var").exists());
    fs::write(&state, "not a record").unwrap();
    for action in ["--fix", "--undo"] {
        let output = doctor(&["--root", dir, action, "--state", state.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(70), "{output:?}");
        assert!(stderr(&output).contains("is not understood"), "{}", stderr(&output));
    }
    assert_eq!(fs::read_to_string(&state).unwrap(), "not a record");
}

#[test]
fn a_command_line_that_makes_no_sense_is_no_verdict() {
    for (args, said) in [
        (&["--cpu", "x"][..], "'x' is no CPU and no range of CPUs"),
        (&["--cpu", ""], "is empty"),
        (&["--cpu", "3-1"], "ends before it begins"),
        (&["--cpu", "0-7:0/2"], "stride"),
        (&["--cpu", "8192"], "CPU 8192 is out of range"),
        (&["--cpu", "1,,2"], "no range of CPUs"),
        (&["--fix", "--undo"], "cannot be used with"),
        (&["--no-such-option"], "--no-such-option"),
    ] {
        let output = doctor(args);
        assert_eq!(output.status.code(), Some(64), "{args:?}");
        assert!(stderr(&output).contains(said), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
    let help = doctor(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(stdout(&help).contains("64 bad usage") && !stdout(&help).contains("--root"), "{}", stdout(&help));
    // With -v before the command, too.
    let output =
        Command::new(env!("CARGO_BIN_EXE_isoplane")).args(["-v", "doctor", "--cpu", "x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn every_row_is_explained_on_demand() {
    let root = host();
    let dir = root.path().to_str().unwrap();
    let (short, long) = (stdout(&doctor(&["--root", dir])), stdout(&doctor(&["--root", dir, "-v"])));
    // Why a good check matters is told to those who ask.
    assert!(!short.contains("100 to 1000 times"), "{short}");
    assert!(long.split_whitespace().collect::<Vec<_>>().join(" ").contains("100 to"), "{long}");
    assert!(short.contains("echo 1 >"), "{short}");
}
