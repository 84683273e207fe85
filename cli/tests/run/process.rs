//! `isoplane run` as a process, and what others see of it.

use crate::ISOPLANE;
use isoplane_lab::Namespace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// `isoplane run` as a process; killed when the test ends early.
pub(crate) struct Run {
    pub(crate) child: Child,
    pub(crate) out: BufReader<ChildStdout>,
    pub(crate) err: BufReader<ChildStderr>,
}

impl Run {
    /// Starts one in a namespace, and waits until it says that it runs.
    pub(crate) fn start(namespace: &Namespace, file: &Path) -> Self {
        Self::try_start(namespace, file).unwrap_or_else(|said| panic!("{said}"))
    }

    /// The same; what it said if it does not run.
    pub(crate) fn try_start(namespace: &Namespace, file: &Path) -> Result<Self, String> {
        let inside = namespace.enter().unwrap();
        let mut child = Command::new(ISOPLANE)
            .arg("run")
            .arg(file)
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        inside.leave().unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let mut run = Self { child, out: BufReader::new(out), err: BufReader::new(err) };
        let line = run.line();
        if !line.contains(": running: ") {
            let mut err = String::new();
            run.err.read_to_string(&mut err).unwrap();
            return Err(line + &err);
        }
        Ok(run)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The next line of the results.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    /// Lines of standard error of the form `isoplane: FILE: ...`, until one has `end` in it.
    pub(crate) fn said(&mut self, end: &str) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.err.read_line(&mut line).unwrap() > 0, "it ended before {end:?}: {said:?}");
            if let Some((_, what)) = line.trim_end().split_once(".toml:") {
                said.push(what.trim_start().to_owned());
            }
            if line.contains(end) {
                return said;
            }
        }
    }

    /// Stops it; the results that are left, and how it ended.
    pub(crate) fn stop(mut self) -> (bool, String) {
        self.signal(Signal::SIGTERM);
        let mut out = String::new();
        self.out.read_to_string(&mut out).unwrap();
        let mut err = String::new();
        self.err.read_to_string(&mut err).unwrap();
        (self.child.wait().unwrap().success(), out + &err)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Dataplanes spin, so they run one after the other.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value of the dataplane of that name.
pub(crate) fn total(name: &str, program: u32, counter: &str) -> u64 {
    let found = isoplane::memory::stats::find(Some(name)).unwrap();
    found.iter().find(|f| f.pid == program).map_or(0, |f| f.reader.total(counter))
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn file_in(folder: &Path, text: &str) -> PathBuf {
    let file = folder.join("live.toml");
    std::fs::write(&file, text).unwrap();
    file
}

/// What `isoplane top` shows of the dataplane of that name and program.
pub(crate) fn shown(name: &str, program: u32) -> Option<Value> {
    let output = Command::new(ISOPLANE).args(["top", name, "--once", "--json"]).output().unwrap();
    let all: Value = serde_json::from_slice(&output.stdout).ok()?;
    all["dataplanes"].as_array()?.iter().find(|d| d["pid"] == program).cloned()
}

/// Runs a program in a namespace; what it printed, and whether it was content.
pub(crate) fn run_in(namespace: &Namespace, command: &str) -> (bool, String) {
    let words: Vec<&str> = command.split_whitespace().collect();
    let inside = namespace.enter().unwrap();
    let output = Command::new(words[0]).args(&words[1..]).env("LC_ALL", "C").output();
    inside.leave().unwrap();
    let output = output.unwrap_or_else(|error| panic!("{command}: {error}"));
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// The same, of a program that must succeed.
pub(crate) fn succeed(namespace: &Namespace, command: &str) -> String {
    let (good, text) = run_in(namespace, command);
    assert!(good, "{command}: {text}");
    text
}

/// A program in the background; killed at the end.
pub(crate) struct Server(pub(crate) Child);

impl Server {
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    pub(crate) fn start(namespace: &Namespace, command: &str) -> Self {
        let words: Vec<&str> = command.split_whitespace().collect();
        let inside = namespace.enter().unwrap();
        let child = Command::new(words[0])
            .args(&words[1..])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{command}: {error}"));
        inside.leave().unwrap();
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
