//! kernel/uapi.md against the header that the patches add: every name with its number, every field, and the C program
//! in it compiles.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const HEADER: &str = "include/uapi/linux/task_isolation.h";

fn kernel() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the workspace").join("kernel")
}

/// What the patches make of the header, in `into`; without the rest of a kernel.
fn header(into: &Path) -> String {
    let mut patches: Vec<_> = fs::read_dir(kernel().join("patches/6.12"))
        .expect("kernel/patches/6.12")
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "patch"))
        .collect();
    patches.sort();
    // Not the repository around it: paths would be taken to be relative to that.
    let status = Command::new("git")
        .args(["apply", "--whitespace=nowarn", &format!("--include={HEADER}")])
        .args(&patches)
        .current_dir(into)
        .env("GIT_CEILING_DIRECTORIES", into.parent().expect("a directory in another"))
        .stdin(Stdio::null())
        .status()
        .expect("git");
    assert!(status.success(), "the patches do not apply to {HEADER}");
    fs::read_to_string(into.join(HEADER)).expect("the patches add the header")
}

fn guide() -> String {
    fs::read_to_string(kernel().join("uapi.md")).expect("kernel/uapi.md")
}

/// `#define PR_TASK_ISOLATION_NAME value`: names without the prefix, with their number, or that of the bit.
fn constants(header: &str) -> Vec<(&str, u32)> {
    let mut found = Vec::new();
    for line in header.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("#define") {
            continue;
        }
        let Some(name) = words.next().and_then(|name| name.strip_prefix("PR_TASK_ISOLATION_")) else {
            continue;
        };
        let value: String = words.take_while(|word| *word != "/*").collect();
        let number = value.strip_prefix("(1ULL<<").and_then(|bit| bit.strip_suffix(')')).unwrap_or(&value);
        if let Ok(number) = number.parse() {
            found.push((name, number));
        }
    }
    found
}

/// With single blanks.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_guide_has_every_name_with_its_number() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let header = header(scratch.path());
    let guide = guide();
    let mut missing = Vec::new();
    let mut seen = 0;
    for (name, number) in constants(&header) {
        // Limits and sizes, which the text gives in other words; and the cause of no breach.
        if name.ends_with("_MAX") || name.contains("_SIZE_") || ["CAUSE_NR", "CAUSE_NONE"].contains(&name) {
            continue;
        }
        let short = ["UNMET_", "CAUSE_", "STATE_", "Q_"].iter().find_map(|group| name.strip_prefix(group));
        let row = format!("| `{}` | {number} |", short.unwrap_or(name));
        seen += 1;
        if !guide.contains(&row) {
            missing.push(row);
        }
    }
    assert!(seen > 50, "only {seen} names found in {HEADER}");
    assert!(missing.is_empty(), "kernel/uapi.md lacks {missing:#?}");
}

#[test]
fn the_program_in_the_guide_compiles() {
    let gcc = Command::new("gcc").arg("--version").stdout(Stdio::null()).status();
    if !gcc.is_ok_and(|status| status.success()) {
        println!("skipped: no gcc");
        return;
    }
    let scratch = tempfile::tempdir().expect("a temporary directory");
    header(scratch.path());
    let guide = guide();
    let blocks =
        || guide.split("```c\n").skip(1).filter_map(|rest| rest.split_once("```")).map(|(code, _)| code);
    let program = blocks().find(|code| code.contains("int main(")).expect("a program in C");
    let reader = blocks().find(|code| code.contains("read_status(")).expect("a reader in C");
    let arguments =
        blocks().find(|code| code.contains("struct task_isolation_args {")).expect("the arguments");
    let header = fs::read_to_string(scratch.path().join(HEADER)).expect("made before");
    let header: Vec<String> = header.lines().map(words).collect();
    for line in arguments.lines().filter(|line| line.starts_with('\t')) {
        let field = words(line.split_once(';').map_or(line, |(field, _)| field)) + ";";
        assert!(header.iter().any(|line| line.starts_with(&field)), "{HEADER} has no {field}");
    }
    let source = scratch.path().join("strict.c");
    let used = "int main(int argc, char **argv)\n{\n\t(void)read_status;\n";
    let whole = program.replace("int main(int argc, char **argv)\n{\n", &format!("{reader}\n{used}"));
    assert!(whole.contains(used), "main() is written otherwise");
    fs::write(&source, whole).expect("it is writable");
    let status = Command::new("gcc")
        .args([
            "-O2",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            "-Wno-declaration-after-statement",
            "-Werror",
        ])
        .arg("-I")
        .arg(scratch.path().join("include/uapi"))
        .args(["-c", "-o"])
        .arg(scratch.path().join("strict.o"))
        .arg(&source)
        .status()
        .expect("gcc");
    assert!(status.success(), "the program in kernel/uapi.md does not compile");
}
