//! Every example runs and says what its page promises.

use std::path::PathBuf;
use std::process::{Command, Output};

/// Cargo builds the examples of this package next to its tests.
fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("this test has a path");
    path.pop();
    path.pop();
    path.join("examples").join(name)
}

fn run(name: &str, args: &[&str]) -> Output {
    let path = example(name);
    Command::new(&path).args(args).output().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn embedded_counts_what_it_echoed() {
    let output = run("embedded", &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("the app has seen 64 packets, 60 came back"), "{text}");
    assert!(text.contains("echoed 60, refused 4"), "{text}");
}
