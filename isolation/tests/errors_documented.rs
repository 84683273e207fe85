//! docs/errors.md explains every error that isolation can end in, under the words that a user saw.
//!
//! The oracle is the source: the texts of all `#[error("...")]` attributes and the messages listed below
//! are looked for among the page's headings. What stands in place of a `{value}` is the page's choice.

use std::fs;
use std::path::{Path, PathBuf};

/// Where errors of isolation come from, below the repository.
const SOURCES: [&str; 6] = [
    "isolation/src",
    "memory/src/region.rs",
    "memory/src/clock.rs",
    "cli/src/noise",
    "cli/src/doctor",
    "cli/src/doctor.rs",
];

/// What is said by other means, and where.
const MESSAGES: [(&str, &str); 20] = [
    ("isolation/src/error.rs", "cannot isolate this thread"),
    ("isolation/src/backend/task_isolation/mod.rs", "it needs a kernel with the task-isolation patches"),
    ("isolation/src/backend/task_isolation/mod.rs", "the kernel's task isolation is of version"),
    ("isolation/src/backend/task_isolation/mod.rs", "the kernel's task isolation lacks modes"),
    ("isolation/src/backend/mod.rs", "it isolates a CPU, and the thread is not pinned to one"),
    ("isolation/src/backend/mod.rs", "it is written for x86-64; elsewhere there is advisory only"),
    ("isolation/src/backend/mod.rs", "; there are auto, task-isolation, dispatch, advisory"),
    ("isolation/src/backend/dispatch/mod.rs", "this kernel has no syscall user dispatch"),
    ("isolation/src/backend/handlers.rs", "a handler for SIGSYS or SIGTRAP was installed over that"),
    ("isolation/src/backend/handlers.rs", "a handler blocks SIGSYS or SIGTRAP while it runs"),
    ("isolation/src/isolation.rs", "the thread that was isolated here before ended without reporting"),
    ("isolation/src/isolation.rs", "after dropping privileges"),
    ("isolation/src/isolation.rs", "cannot fold the kernel's per-CPU statistics"),
    ("isolation/src/strict.rs", "isolation was broken"),
    ("isolation/src/observer/thread.rs", "the observer's thread may run on the CPUs of isolated workers"),
    ("isolation/src/observer/finding.rs", "cannot be read: what it tells of interruptions is not counted"),
    ("isolation/src/observer/senders/mod.rs", "kernel addresses are hidden"),
    ("dataplane/src/observer.rs", "an isolated worker was disturbed"),
    ("dataplane/src/builder.rs", "cannot isolate workers"),
    ("dataplane/src/worker.rs", "workers take their time from the kernel"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All Rust files at or below a path; none where nothing is.
fn files(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else {
        return path.is_file().then(|| path.to_owned()).into_iter().collect();
    };
    let mut all: Vec<PathBuf> = entries.flat_map(|entry| files(&entry.expect("entry").path())).collect();
    all.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    all.sort();
    all
}

/// The string literal that `text` starts with, after blanks; `None` when it starts with something else.
fn literal(text: &str) -> Option<String> {
    let mut chars = text.trim_start().strip_prefix('"')?.chars().peekable();
    let mut value = String::new();
    loop {
        match chars.next()? {
            '"' => return Some(value),
            '\\' => match chars.next()? {
                '\n' => while chars.next_if(|c| c.is_whitespace()).is_some() {},
                'n' => value.push('\n'),
                escaped => value.push(escaped),
            },
            other => value.push(other),
        }
    }
}

/// The texts of all error attributes of a file.
fn errors(source: &str) -> Vec<String> {
    source.split("#[error(").skip(1).filter_map(literal).collect()
}

/// What is fixed in the first clause of a text, between its `{values}`: enough of it to know it by.
fn fixed_parts(text: &str) -> Vec<String> {
    let (mut parts, mut rest) = (Vec::new(), text);
    loop {
        let open = rest.find('{').unwrap_or(rest.len());
        let (part, after) = rest.split_at(open);
        let known: usize = parts.iter().map(String::len).sum();
        // A clause ends at a semicolon or colon, once there is something to know it by.
        let end = part.char_indices().find(|(at, c)| matches!(c, ';' | ':') && known + at >= 12);
        parts.push(part[..end.map_or(part.len(), |(at, _)| at)].to_owned());
        match after.split_once('}') {
            Some((_, after)) if end.is_none() => rest = after,
            _ => break,
        }
    }
    parts.retain(|part| part.chars().any(char::is_alphabetic));
    parts
}

/// Whether the parts occur in a line, one after the other.
fn in_order(line: &str, parts: &[String]) -> bool {
    let mut rest = line;
    parts.iter().all(|part| match rest.find(part.trim()) {
        Some(at) => {
            rest = &rest[at + part.trim().len()..];
            true
        }
        None => false,
    })
}

#[test]
fn every_error_is_explained_under_its_text() {
    let page = read(&root().join("docs/errors.md"));
    let headings: Vec<&str> = page.lines().filter(|line| line.starts_with("### ")).collect();
    let mut missing = Vec::new();
    let mut looked_at = 0;
    for file in SOURCES.iter().flat_map(|source| files(&root().join(source))) {
        for text in errors(&read(&file)) {
            let parts = fixed_parts(&text);
            looked_at += 1;
            // A text of values alone is known by the error it is part of.
            if !parts.is_empty() && !headings.iter().any(|heading| in_order(heading, &parts)) {
                missing.push(format!("{}: {text}\n    looked for {parts:?}", file.display()));
            }
        }
    }
    assert!(looked_at >= 60, "only {looked_at} error texts were found: has their form changed?");
    for (file, message) in MESSAGES {
        let source = read(&root().join(file)).replace("\\\n", " ");
        let source = source.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(source.contains(message), "{file} does not say {message:?} any more: mend this test's list");
        if !headings.iter().any(|heading| heading.contains(message)) {
            missing.push(format!("{file}: {message}"));
        }
    }
    assert!(
        missing.is_empty(),
        "docs/errors.md has no heading (### ...) for:\n{}\nadd one for each, with what it means and what to do",
        missing.join("\n")
    );
}

#[test]
fn each_heading_says_what_to_make_of_it() {
    let page = read(&root().join("docs/errors.md"));
    for section in page.split("\n### ").skip(1) {
        let (heading, body) = section.split_once('\n').unwrap_or((section, ""));
        let body = body.split("\n## ").next().unwrap_or_default();
        assert!(body.split_whitespace().count() >= 6, "nothing is said about {heading:?}");
    }
}

#[test]
fn texts_are_taken_apart_as_the_compiler_would() {
    let source = "#[error(\n    \"a {b} c \\\n     \\\"d\\\"; e\"\n)]\nA,\n#[error(transparent)]\nB,\n#[error(\"{0}\")] C";
    assert_eq!(errors(source), ["a {b} c \"d\"; e", "{0}"]);
    assert_eq!(
        fixed_parts("region {name:?}: cannot lock {bytes} bytes ({source}); raise"),
        ["region ", ": cannot lock ", " bytes ("]
    );
    assert_eq!(fixed_parts("memory is not locked ({errno}; limit {}): x"), ["memory is not locked ("]);
    assert_eq!(
        fixed_parts("the backend {backend} is not to be had: {reason}"),
        ["the backend ", " is not to be had"]
    );
    assert!(fixed_parts("{call}: {errno}").is_empty());
    assert!(in_order("### a x c y e", &["a ".into(), " c".into(), "e".into()]));
    assert!(!in_order("### a x e y c", &["a ".into(), "c".into(), "e".into()]));
}
