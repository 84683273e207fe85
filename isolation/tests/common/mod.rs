//! Tests that change their process run in one of their own: the test program again, in its main thread,
//! with no other.
#![allow(dead_code, unused_macros, unused_imports, reason = "each test program uses a part")]

use libtest_mimic::{Arguments, Failed, Trial};
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const INSIDE: &str = "ISOPLANE_TEST_INSIDE";
/// Longer than any test takes, also on an emulated kernel that checks itself.
const LIMIT: Duration = Duration::from_secs(360);

/// A test: its name and what it does.
pub(crate) type Test = (&'static str, fn());

/// Names functions as tests.
macro_rules! tests {
    ($($path:path),+ $(,)?) => { &[$((stringify!($path), $path as fn())),+] };
}
pub(crate) use tests;

/// Whether this is the process of one test.
pub(crate) fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// The main function of a test program.
pub(crate) fn main(tests: &[Test]) -> ExitCode {
    if let Some(inside) = std::env::var_os(INSIDE) {
        // A test program that is killed leaves nothing running.
        // SAFETY: plain numbers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let (_, body) = tests.iter().find(|(name, _)| inside == *name).expect("a test of this name");
        body();
        return ExitCode::SUCCESS;
    }
    let trials = tests.iter().map(|(name, _)| Trial::test(*name, || outside(name))).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn outside(name: &str) -> Result<(), Failed> {
    let program = std::env::current_exe()?;
    let (mut said, pipe) = std::io::pipe()?;
    let mut command = Command::new(program);
    command.env(INSIDE, name).stdin(Stdio::null()).stdout(pipe.try_clone()?).stderr(pipe);
    let mut child = command.spawn()?;
    // Else the pipe would never end.
    drop(command);
    let said = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = said.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let said = said.join().unwrap_or_default();
    // These words first: whoever counts skipped tests goes by how a line begins.
    for (why, reason) in said.lines().filter_map(|line| line.split_once(": ")) {
        if matches!(why, "skipped" | "not here") {
            eprintln!("{why}: {name}: {reason}");
        }
    }
    match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("{status}\n{said}").into()),
        None => Err(format!("killed: no end within {LIMIT:?}\n{said}").into()),
    }
}

/// A field of `/proc/thread-self/status`.
pub(crate) fn status(field: &str) -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
}

/// A field of `/proc/thread-self/status` that is a hexadecimal mask.
pub(crate) fn mask(field: &str) -> u64 {
    u64::from_str_radix(&status(field), 16).expect("a mask")
}

/// A field of `/proc/thread-self/status` in kB, in bytes.
pub(crate) fn bytes(field: &str) -> u64 {
    let text = status(field);
    1024 * text.trim_end_matches(" kB").parse::<u64>().expect("a number of kB")
}

/// Page faults of the calling thread so far, minor and major.
pub(crate) fn faults() -> i64 {
    let usage =
        nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_THREAD).expect("getrusage");
    usage.minor_page_faults() + usage.major_page_faults()
}

/// Whether this runs as root; says that it does not.
pub(crate) fn root(what: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: {what} needs root");
    }
    root
}

/// Runs `body` in a forked child: 0 when it returned, 1 when it panicked, 256 and more for a signal.
pub(crate) fn in_child(body: impl FnOnce()) -> i32 {
    // SAFETY: the process of a test has one thread.
    match unsafe { nix::unistd::fork() }.expect("fork") {
        nix::unistd::ForkResult::Child => {
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
            // SAFETY: it ends the process and returns to nobody.
            unsafe { libc::_exit(i32::from(!passed)) }
        }
        nix::unistd::ForkResult::Parent { child } => match nix::sys::wait::waitpid(child, None) {
            Ok(nix::sys::wait::WaitStatus::Exited(_, code)) => code,
            Ok(nix::sys::wait::WaitStatus::Signaled(_, signal, _)) => 256 + signal as i32,
            other => panic!("{other:?}"),
        },
    }
}
