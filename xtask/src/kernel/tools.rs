//! Programs of the machine: are they there, and running them into a log.

use crate::packages;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What building needs: Debian package, and a program by which other systems are asked.
const BUILD: [(&str, Option<&str>); 12] = [
    ("bc", Some("bc")),
    ("binutils", Some("ld")),
    ("bison", Some("bison")),
    ("flex", Some("flex")),
    ("gcc", Some("gcc")),
    ("libc6-dev", None),
    ("libelf-dev", None),
    ("lz4", Some("lz4")),
    ("make", Some("make")),
    ("patch", Some("patch")),
    ("rsync", Some("rsync")),
    ("util-linux", Some("setpriv")),
];
/// What unpacking needs.
const UNPACK: [(&str, Option<&str>); 2] = [("tar", Some("tar")), ("xz-utils", Some("xz"))];
/// What booting needs. iproute2 and the rest run inside: the guest's root is the machine's.
const BOOT: [(&str, Option<&str>); 5] = [
    ("e2fsprogs", Some("mke2fs")),
    ("iproute2", Some("ip")),
    ("qemu-system-x86", Some("qemu-system-x86_64")),
    ("util-linux", Some("setpriv")),
    ("coreutils", Some("timeout")),
];

/// Makes sure that a kernel can be built.
pub(crate) fn to_build() -> Result<(), String> {
    ensure(BUILD.iter().chain(&UNPACK))
}

/// Makes sure that a guest can be booted.
pub(crate) fn to_boot() -> Result<(), String> {
    ensure(&BOOT)
}

fn ensure<'a>(
    wanted: impl IntoIterator<Item = &'a (&'static str, Option<&'static str>)>,
) -> Result<(), String> {
    let wanted: Vec<_> = wanted.into_iter().collect();
    if in_path("dpkg-query").is_some() {
        return packages::ensure(&wanted.iter().map(|(package, _)| *package).collect::<Vec<_>>());
    }
    let missing: Vec<&str> =
        wanted.iter().filter_map(|(_, program)| *program).filter(|p| in_path(p).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(format!(
        "missing programs: {}. Install them with this system's package manager, with the headers of libelf \
         and a static libc (Debian's names: libelf-dev, libc6-dev)",
        missing.join(", ")
    ))
}

/// Where a program is.
pub(crate) fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Runs a command to its end, its output into the log. The error names the step and shows the log's end.
pub(crate) fn logged(what: &str, command: &mut Command, log: &Path) -> Result<(), String> {
    let open = || File::options().create(true).append(true).open(log);
    let named = |e: std::io::Error| format!("{what}: {}: {e}", command.get_program().to_string_lossy());
    let (out, err) = (open().map_err(named)?, open().map_err(named)?);
    let status = command.stdin(Stdio::null()).stdout(out).stderr(err).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            let text = std::fs::read(log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            Err(format!("{what} failed ({status}). From {}:\n{}", log.display(), reason(&text)))
        }
        Err(e) => Err(format!("{what}: cannot start {}: {e}", command.get_program().to_string_lossy())),
    }
}

/// What a log says about a failure: errors and what follows them, since several compilers write into it at
/// once, and its end.
fn reason(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let end = lines.len().saturating_sub(10);
    let wrong =
        |line: &&str| ["error:", "Error ", "undefined reference"].iter().any(|word| line.contains(word));
    let mut shown: Vec<&str> = Vec::new();
    let mut until = 0;
    for (at, line) in lines[..end].iter().enumerate() {
        if wrong(line) {
            until = at + 4;
        }
        if at < until && shown.len() < 30 {
            shown.push(line);
        }
    }
    shown.extend(&lines[end..]);
    shown.join("\n")
}

/// A command's standard output, trimmed.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| format!("cannot start {name}: {e}"))?;
    if !out.status.success() {
        let error = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{name} failed ({}): {}", out.status, error.trim()));
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_shows_what_it_said() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        logged("one", Command::new("sh").args(["-c", "echo fine"]), &log).expect("succeeds");
        let error = logged("two", Command::new("sh").args(["-c", "echo out of ideas >&2; exit 3"]), &log);
        let error = error.expect_err("fails");
        assert!(error.starts_with("two failed") && error.contains("out of ideas"), "{error}");
        let error = logged("three", &mut Command::new("/nonexistent/program"), &log).expect_err("fails");
        assert!(error.contains("three: cannot start"), "{error}");
    }

    #[test]
    fn an_error_in_the_midst_of_a_log_is_shown() {
        let chatter = "  CC      kernel/fork.o\n".repeat(40);
        let log =
            format!("{chatter}kernel/x.c:1:2: error: no such thing\n   | here\n{chatter}make: *** Error 2\n");
        let shown = reason(&log);
        assert!(shown.contains("error: no such thing\n   | here") && shown.ends_with("Error 2"), "{shown}");
        assert!(shown.lines().count() < 20, "{shown}");
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
        assert_eq!(tail("", 2), "");
    }
}
