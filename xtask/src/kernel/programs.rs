//! The programs that run in the guest: the installed kselftests, the crates' tests, and what looks at the kernel.
//!
//! Contract: what is here finds and builds programs, and says how each is started, how long it may take and how
//! it speaks; [`suite`](super::suite) runs them.

use super::recipe::KSELFTESTS;
use super::suite::ALL_SECONDS;
use cargo_metadata::{Message, MetadataCommand, TargetKind};
use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Test binaries with this prefix are about the guest. Elsewhere they print `not here: REASON`.
const PREFIX: &str = "guest";
/// So are these, which want a machine with network devices.
const NICS_PREFIX: &str = "vfio";
/// Seconds for a program that does not say how many it takes.
pub(super) const SECONDS: u64 = 240;
/// At most so many for one that does.
const MOST_SECONDS: u64 = 600;
/// The kselftest that leaves out one hook of the series after the other and asks whether a test notices.
pub(super) const MUTANTS: &str = "mutants.sh";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speaks {
    Tap,
    Rust,
}

/// One program to run inside.
#[derive(Debug, Clone)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) dir: PathBuf,
    pub(super) command: Vec<String>,
    pub(super) speaks: Speaks,
    pub(super) seconds: u64,
    /// On a machine with network devices.
    pub(super) nics: bool,
}

/// Whether a filter picks this name; all do when there is none.
pub(super) fn wanted(name: &str, filters: &[String]) -> bool {
    filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()))
}

/// The installed kselftests, from the list that their build leaves.
pub(super) fn kselftest_programs(installed: &Path) -> Result<Vec<Program>, String> {
    let list = installed.join("kselftest-list.txt");
    let list = fs::read_to_string(&list).map_err(|e| format!("cannot read {}: {e}", list.display()))?;
    let dir = installed.join(KSELFTESTS);
    let settings = fs::read_to_string(dir.join("settings")).unwrap_or_default();
    let seconds = settings.lines().find_map(|line| line.strip_prefix("timeout=")?.trim().parse().ok());
    let prefix = format!("{KSELFTESTS}:");
    let programs = list.lines().filter_map(|line| line.trim().strip_prefix(&prefix)).map(|name| Program {
        name: format!("{KSELFTESTS}/{name}"),
        dir: dir.clone(),
        command: vec![format!("./{name}")],
        speaks: Speaks::Tap,
        seconds: seconds.filter(|seconds| *seconds > 0).unwrap_or(SECONDS).min(MOST_SECONDS),
        nics: false,
    });
    Ok(programs.collect())
}

/// The mutation check. It runs the tests again and again, and may take as long as one boot may.
pub(super) fn mutants(dir: PathBuf) -> Program {
    Program {
        name: format!("{KSELFTESTS}/{MUTANTS}"),
        command: vec![format!("./{MUTANTS}")],
        dir,
        speaks: Speaks::Tap,
        seconds: ALL_SECONDS - 60,
        nics: false,
    }
}

/// Asks kmemleak, twice: it takes an object for lost that it finds unreferenced and some seconds old.
pub(super) fn leaks() -> Program {
    let script = "echo 1..1; leaks=/sys/kernel/debug/kmemleak; \
                  for i in 1 2; do sleep 6; echo scan >$leaks || exit; done; \
                  if [ -z \"$(cat $leaks)\" ]; then echo ok 1 no leaks; else cat $leaks; echo not ok 1 leaks; exit 1; fi";
    Program {
        name: "kernel/kmemleak".into(),
        dir: "/".into(),
        command: ["bash", "-c", script].map(str::to_owned).to_vec(),
        speaks: Speaks::Tap,
        seconds: SECONDS,
        nics: false,
    }
}

/// Builds the crates' tests for the guest that the filters pick. Where they are must be visible inside: added
/// to `keep`.
pub(super) fn rust_programs(keep: &mut Vec<PathBuf>, filters: &[String]) -> Result<Vec<Program>, String> {
    let metadata = MetadataCommand::new()
        .current_dir(crate::root())
        .no_deps()
        .exec()
        .map_err(|e| format!("cannot read the workspace: {e}"))?;
    keep.push(metadata.target_directory.clone().into_std_path_buf());
    let mut programs = Vec::new();
    for package in &metadata.packages {
        let name = |target: &cargo_metadata::Target| format!("{}/{}", package.name, target.name);
        let ours = |target: &cargo_metadata::Target| {
            target.kind.contains(&TargetKind::Test)
                && [PREFIX, NICS_PREFIX].iter().any(|prefix| target.name.starts_with(prefix))
                && wanted(&name(target), filters)
        };
        let targets: Vec<&str> =
            package.targets.iter().filter(|t| ours(t)).flat_map(|t| ["--test", t.name.as_str()]).collect();
        if targets.is_empty() {
            continue;
        }
        if package.targets.iter().any(|target| target.kind.contains(&TargetKind::Example)) {
            examples(&package.name)?;
        }
        let args = ["test", "--no-run", "--all-features", "--message-format=json-render-diagnostics"];
        let mut cargo = Command::new("cargo");
        cargo.current_dir(crate::root()).args(args).args(["--package", &package.name]).args(targets);
        cargo.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut cargo = cargo.spawn().map_err(|e| format!("cannot start cargo: {e}"))?;
        let output = cargo.stdout.take().ok_or("cargo has no output")?;
        let dir = package.manifest_path.parent().ok_or("a manifest at the root")?;
        for message in Message::parse_stream(BufReader::new(output)) {
            let message = message.map_err(|e| format!("cannot read what cargo says: {e}"))?;
            let Message::CompilerArtifact(artifact) = message else { continue };
            let Some(program) =
                artifact.executable.filter(|_| artifact.profile.test && ours(&artifact.target))
            else {
                continue;
            };
            let more = ["--show-output", "--test-threads=1", "--color=never"].map(str::to_owned);
            programs.push(Program {
                name: name(&artifact.target),
                dir: dir.as_std_path().to_path_buf(),
                command: [program.to_string()].into_iter().chain(more).collect(),
                speaks: Speaks::Rust,
                seconds: SECONDS * 2,
                nics: artifact.target.name.starts_with(NICS_PREFIX),
            });
        }
        let status = cargo.wait().map_err(|e| format!("cannot wait for cargo: {e}"))?;
        if !status.success() {
            return Err(format!("the guest's tests of {} do not build", package.name));
        }
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
}

/// Builds a package's examples, which its tests run.
fn examples(package: &str) -> Result<(), String> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(crate::root()).args(["build", "--examples", "--all-features", "--package", package]);
    match cargo.stdin(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(format!("the examples of {package} do not build")),
        Err(error) => Err(format!("cannot start cargo: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installed_kselftests_are_found_with_their_limit() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(kselftest_programs(dir.path()).is_err(), "half an installation");
        fs::create_dir(dir.path().join(KSELFTESTS)).expect("made");
        fs::write(dir.path().join(KSELFTESTS).join("settings"), "timeout=77\n").expect("written");
        fs::write(dir.path().join("kselftest-list.txt"), format!("{KSELFTESTS}:calls\nnet:other\n"))
            .expect("written");
        let found = kselftest_programs(dir.path()).expect("found");
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name.as_str(), found[0].seconds), ("task_isolation/calls", 77));
    }
}
